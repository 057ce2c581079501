"""Errors of a configuration point at the entry that they are about, by its path, never at the same word elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
from attention_backends.backends.config.text import parse_config
from attention_backends.backends.values.errors import ConfigError
from syrupy.assertion import SnapshotAssertion

PLACES = {
    "an option among many words": (
        "default: fa\nper_role:\n  cross:\n    backend: video_sparse_attn\n    extra:\n      sparsity: 3\n",
        6,
    ),
    "the word in a comment before it": ("# sagee is a slip\ndefault: fa\nper_role:\n  cross: sagee\n", 4),
    "the word in a comment behind it": ("default: sagee\n# sagee is a slip\n", 1),
    "the same wrong name twice": ("per_role:\n  cross: sagee\n  self: sagee\ndefault: sagee", 4),
    "twice, roles only": ("default: fa\nper_role:\n  a: fa\n  b: {backend: sagee}\n  c: sagee\n", 4),
    "the name is a role's too": ("per_role:\n  sagee: fa\n  cross: sagee\n", 3),
    "a nested role": ("per_role:\n  ltx2:\n    audio_self: fa\n    audio_to_video: sagee\n", 4),
    "a dotted role": ("per_role:\n  ltx2.audio_self: fa\n  ltx2.audio_to_video: sagee\n", 3),
    "an unknown entry": ("per_role:\n  cross:\n    backend: sage\n    topk: 1\n", 4),
    "an unknown entry that is an option below": (
        "per_role:\n  cross: {backend: sparge, extra: {topk: x}}\ntopk: 1\n",
        3,
    ),
    "a setting": ("default: fa\naccuracy: good\n", 2),
    "a setting that YAML reads": ("default: fa\nguard: on\n", 2),
    "an option of an option": (
        "default:\n  backend: vmoba_attn\n  extra:\n    moba_config:\n      st_topk: 1\n      st_topkk: 1\n",
        6,
    ),
    "the short default": ("per_role:\n  cross: fa\nbackend: sagee\n", 3),
    "vLLM's wrapper": ('{\n"diffusion_attention_config":\n{"per_role":\n{"self": "fa",\n"cross": "sagee"}}}', 5),
    "JSON with tabs": ('{\n\t"default": "fa",\n\t"per_role": {\n\t\t"cross": "sagee"\n\t}\n}', 4),
    "JSON, given twice": ('{\n"default": "fa",\n"default": "sage"\n}', 3),
    "SGLang's components": (
        "attention_backend: fa\ncomponent_attention_backends:\n  text-encoder: fa\n  transformer-2: sagee\n",
        4,
    ),
    "a schedule": ("default: fa\nschedule:\n- {backend: fa, steps: 1}\n- {backend: sagee, steps: 2}\n", 4),
    "flags": ("default=fa\nper_role.self=fa # sagee\nper_role.cross=sagee\n", 3),
    "the same wrong flag twice": ("vllm serve x \\\n -dac.per_role.cross sagee \\\n -dac.default sagee", 3),
    "JSON in a flag": ("-dac.default fa \\\n-dac.per_role '{\n\"self\": \"fa\",\n\"cross\": \"sagee\"}'", 4),
    "a flag that conflicts": ("default=fa\nper_role.cross=fa\nper_role.cross=fa2", 3),
}  # fmt: skip


@pytest.mark.parametrize("case", PLACES)
def test_an_error_points_at_its_line(case: str) -> None:
    text, line = PLACES[case]
    with pytest.raises(ValueError, match=r"\bline \d") as caught:
        parse_config(text, "text")
    assert f"(line {line})" in str(caught.value)


@pytest.mark.parametrize("name", ["a.yaml", "a.json"])
def test_an_error_in_a_file_points_at_its_line_too(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"default": "fa",\n"per_role":\n{"cross": "sagee"}}')
    with pytest.raises(ValueError, match=rf"^config \({name}\).*'cross'.*'sagee'.* \(line 3\)$"):
        parse_config(tmp_path / name)


def test_one_line_needs_no_number() -> None:
    for text in ("per_role.cross=sagee", '{"default": "sagee"}'):
        with pytest.raises(ValueError, match=r".") as caught:
            parse_config(text)
        assert "line" not in str(caught.value)


def test_what_stands_nowhere_in_the_text_gets_no_line() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config("\n\n- sage\n- sdpa")
    assert "line" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        'pipe.transformer.set_attention_backend("_flash_3_hub")',
        "pipeline = load('x')\npipeline.transformer.set_attention_backend('flash')",
        'with attention_backend("_flash_3_hub"):\n    image = pipeline(prompt).images[0]',
        'attention_backend("sage")',
        'attention_config=AttentionConfig(\n    default=AttentionSpec(backend="FLASH_ATTN"),\n'
        '    per_role={\n        "cross": AttentionSpec(backend="TORCH_SDPA"),\n    },\n),',
        "from vllm_omni.diffusion.data import AttentionConfig",
        "pipeline.transformer.reset_attention_backend()",
    ],
)
def test_python_is_told_from_a_configuration(text: str, snapshot: SnapshotAssertion) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(text)
    assert str(caught.value) == snapshot


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        '["sage"]',
        '""',
        "default: ''",
    ],
)
def test_what_is_no_configuration_is_not_taken_for_a_name(text: str, snapshot: SnapshotAssertion) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        parse_config(text)
    assert str(caught.value).partition(" the names are")[0] == snapshot
    assert parse_config('"sage"').default == parse_config("'sage'").default == parse_config("sage").default


@pytest.mark.parametrize("text", ["? [a, b]\n: fa", "per_role:\n  ? {a: b}\n  : fa", "? [a]\n: 1\n? [a]\n: 2"])
def test_a_key_that_is_no_text_is_refused(text: str, snapshot: SnapshotAssertion) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(text)
    assert str(caught.value) == snapshot
