"""Errors of a configuration name the entry that they are about by its path."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from attention_backends.backends.config.text import parse_config
from attention_backends.backends.values.errors import ConfigError
from syrupy.assertion import SnapshotAssertion

PLACES = {
    "an option": (
        "default: fa\nper_role:\n  cross:\n    backend: video_sparse_attn\n    extra:\n      sparsity: 3\n",
        "per_role['cross']",
        "sparsity",
    ),
    "the same wrong name twice": ("per_role:\n  cross: sagee\n  self: sagee\ndefault: sagee", "default", "sagee"),
    "twice, roles only": ("per_role:\n  a: fa\n  b: {backend: sagee}\n  c: sagee\n", "per_role['b']", "sagee"),
    "the name is a role's too": ("per_role:\n  sagee: fa\n  cross: sagee\n", "per_role['cross']", "sagee"),
    "a nested role": (
        "per_role:\n  ltx2:\n    audio_self: fa\n    audio_to_video: sagee\n",
        "per_role['ltx2.audio_to_video']",
        "sagee",
    ),
    "a dotted role": (
        "per_role:\n  ltx2.audio_self: fa\n  ltx2.audio_to_video: sagee\n",
        "per_role['ltx2.audio_to_video']",
        "sagee",
    ),
    "an unknown entry": ("per_role:\n  cross:\n    backend: sage\n    topk: 1\n", "per_role['cross']", "topk"),
    "an unknown entry that is an option below": (
        "per_role:\n  cross: {backend: sparge, extra: {topk: x}}\ntopk: 1\n",
        "",
        "topk",
    ),
    "a setting": ("default: fa\naccuracy: good\n", "", "accuracy"),
    "a setting that YAML reads": ("default: fa\nguard: on\n", "", "guard"),
    "an option of an option": (
        "default:\n  backend: vmoba_attn\n  extra:\n    moba_config:\n      st_topk: 1\n      st_topkk: 1\n",
        "default",
        "moba_config",
    ),
    "the short default": ("per_role:\n  cross: fa\nbackend: sagee\n", "default", "sagee"),
    "vLLM's wrapper": (
        '{\n"diffusion_attention_config":\n{"per_role":\n{"self": "fa",\n"cross": "sagee"}}}',
        "per_role['cross']",
        "sagee",
    ),
    "JSON with tabs": ('{\n\t"per_role": {\n\t\t"cross": "sagee"\n\t}\n}', "per_role['cross']", "sagee"),
    "JSON, given twice": ('{\n"default": "fa",\n"default": "sage"\n}', "", "default"),
    "SGLang's components": (
        "attention_backend: fa\ncomponent_attention_backends:\n  text-encoder: fa\n  transformer-2: sagee\n",
        "component_attention_backends.transformer_2",
        "sagee",
    ),
    "a schedule": ("schedule:\n- {backend: fa, steps: 1}\n- {backend: sagee, steps: 2}\n", "schedule[1]", "sagee"),
    "flags": ("default=fa\nper_role.self=fa # sagee\nper_role.cross=sagee\n", "per_role['cross']", "sagee"),
    "the same wrong flag twice": ("vllm serve x \\\n -dac.per_role.cross sagee -dac.default sagee", "default", "sagee"),
    "JSON in a flag": (
        "-dac.default fa \\\n-dac.per_role '{\n\"self\": \"fa\",\n\"cross\": \"sagee\"}'",
        "per_role['cross']",
        "sagee",
    ),
    "a flag that conflicts": ("default=fa\nper_role.cross=fa\nper_role.cross=fa2", "", "per_role.cross"),
}  # fmt: skip


@pytest.mark.parametrize("case", PLACES)
def test_an_error_names_its_entry(case: str) -> None:
    text, path, named = PLACES[case]
    with pytest.raises(ValueError, match=r".") as caught:
        parse_config(text, "text")
    where, _, said = str(caught.value).partition(": ")
    assert where == f"text.{path}".rstrip(".")
    assert re.search(rf"(?<![\w.]){re.escape(named)}\b", said.partition(" the names are")[0])


@pytest.mark.parametrize("name", ["a.yaml", "a.json"])
def test_an_error_in_a_file_names_the_file_and_the_entry(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"default": "fa",\n"per_role":\n{"cross": "sagee"}}')
    with pytest.raises(ValueError, match=rf"^config \({name}\).*'cross'.*'sagee'"):
        parse_config(tmp_path / name)


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
