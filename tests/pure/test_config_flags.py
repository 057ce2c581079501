"""Command lines, flags and component maps of other systems: what they mean here, and how they are refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from attention_backends.backends.config.names import RefusedBackendError, UnknownBackendError
from attention_backends.backends.config.print import to_dict
from attention_backends.backends.config.text import parse_config, parse_extra
from attention_backends.backends.config.tokens import scalar, words_of
from attention_backends.backends.values.errors import ConfigError
from syrupy.assertion import SnapshotAssertion


def said(value: object, **how: Any) -> dict[str, Any]:
    return to_dict(parse_config(value, **how))


def backends(default: str | None = None, **per_role: str) -> dict[str, Any]:
    found: dict[str, Any] = {"default": {"backend": default}} if default else {}
    if per_role:
        found["per_role"] = {role: {"backend": backend} for role, backend in per_role.items()}
    return found


MIXED = backends("flash_attn", cross="torch_sdpa")
COMMAND_LINES = {
    "vLLM, whole command": (
        "python examples/offline_inference/text_to_video/text_to_video.py \\\n"
        "    --model Wan-AI/Wan2.2-TI2V-5B-Diffusers \\\n"
        '    --prompt "A dog, it\'s running = fast" --seed -1 \\\n'
        "    --diffusion-attention-config.default.backend FLASH_ATTN \\\n"
        "    --diffusion-attention-config.per_role.cross.backend TORCH_SDPA \\\n"
        "    --tensor-parallel-size 2 --output outputs/wan22_mixed.mp4\n",
        MIXED,
    ),
    "vLLM, JSON": (
        "# JSON\nvllm-omni serve <model> \\\n    --diffusion-attention-config "
        '\'{"default":{"backend":"FLASH_ATTN"},"per_role":{"cross":{"backend":"TORCH_SDPA"}}}\'',
        MIXED,
    ),
    "vLLM, short": ("-dac.default.backend FLASH_ATTN -dac.per_role.cross.backend TORCH_SDPA", MIXED),
    "vLLM, short JSON": ("""-dac '{"default": "FLASH_ATTN", "per_role": {"cross": "TORCH_SDPA"}}'""", MIXED),
    "vLLM, JSON and a dotted flag": (
        """-dac '{"default": "FLASH_ATTN"}' -dac.per_role.cross.backend=TORCH_SDPA""",
        MIXED,
    ),
    "vLLM, shorthand with a role": (
        "--diffusion-attention-backend FLASH_ATTN --diffusion-attention-config.per_role.cross.backend TORCH_SDPA",
        MIXED,
    ),
    "vLLM, underscores": ("--diffusion_attention_backend=FLASH_ATTN -dac.per-role.cross.backend TORCH_SDPA", MIXED),
    "vLLM, JSON without quotes of a shell": ('-dac {"default": "FLASH_ATTN", "per_role": {"cross": "SDPA"}}', MIXED),
    "environment": ("export DIFFUSION_ATTENTION_BACKEND=SAGE_ATTN", backends("sage_attn")),
    "a configuration in the environment": (
        """ATTENTION_BACKENDS_CONFIG='{"per_role": {"cross": "sdpa"}}' DIFFUSERS_ATTN_BACKEND=flash_attn python x.py""",
        MIXED,
    ),
    "environment before a command": (
        "DIFFUSION_ATTENTION_BACKEND=FLASHINFER_ATTN CUDA_VISIBLE_DEVICES=0 python text_to_video.py --model X",
        backends("flashinfer_attn"),
    ),
    "a flag stands above the environment": (
        "DIFFUSION_ATTENTION_BACKEND=SAGE_ATTN vllm serve x --diffusion-attention-backend FLASH_ATTN",
        backends("flash_attn"),
    ),
    "SGLang": (
        'sglang generate \\\n  --model-path <MODEL> \\\n  --prompt "..." --backend sglang \\\n'
        "  --attention-backend fa\n",
        backends("flash_attn"),
    ),
    "SGLang, components": (
        '--attention-backend fa2 --component-attention-backends "transformer=fa,transformer.cross=torch_sdpa"',
        MIXED,
    ),
    "SGLang, components without quotes": (
        "--component-attention-backends transformer=fa,transformer.cross=torch_sdpa,text-encoder=torch_sdpa",
        MIXED,
    ),
    "SGLang, components as JSON": (
        """--component-attention-backends '{"transformer": "fa", "transformer.cross": "torch_sdpa"}'""",
        MIXED,
    ),
    "SGLang, components dotted": (
        "--component-attention-backends.transformer fa --component-attention-backends.transformer.cross=torch_sdpa",
        MIXED,
    ),
    "SGLang, the map alone": ("transformer=fa,transformer.cross=torch_sdpa,vae=fa", MIXED),
    "SGLang, as YAML": ("attention_backend: fa\ncomponent-attention-backends:\n  transformer: {cross: sdpa}", MIXED),
    "SGLang, components and dotted": (
        "--component-attention-backends transformer=fa --component-attention-backends.transformer.cross=torch_sdpa",
        MIXED,
    ),
    "SGLang, components dotted first": (
        "--component-attention-backends.transformer.cross=torch_sdpa \\\n"
        """--component-attention-backends '{"transformer": "fa", "text-encoder": "fa"}'""",
        MIXED,
    ),
    "spaces around =": ("default.backend = flash_attn\nper_role.cross = 'torch_sdpa'  # a word", MIXED),
    "Smart-Diffusion": ("python run.py infer.attn_type=sage infer.steps=40", backends("sage_attn")),
    "Smart-Diffusion, its auto": ("infer.attn_type=auto", {}),
    "Smart-Diffusion, quantization": (
        "args.infer.attn_type = 'sage'\nargs.infer.attn_config.quant_bits = 8 # 4, 8 supported\n"
        "args.infer.attn_config.quant_symmetric = True",
        {"default": {"backend": "sage_attn", "extra": {"quant_bits": 8, "quant_symmetric": True}}},
    ),
}


@pytest.mark.parametrize("case", COMMAND_LINES)
def test_command_lines_paste_unchanged(case: str) -> None:
    text, expected = COMMAND_LINES[case]
    assert said(text) == expected


def test_what_a_command_line_says_besides_is_named(snapshot: SnapshotAssertion) -> None:
    notes = parse_config("sglang generate --model-path x --attention-backend torch_sdpa --seed -1 --prompt 'a b'").notes
    assert notes == snapshot


@pytest.mark.parametrize(
    "text",
    [
        "BACKEND=fa",
        "vllm serve x --seed 1",
        "sglang serve --attention-backnd fa",
        "vllm serve x \\\n --diffusion-attention-profile '[]'",
        "--attention-backend",
        "--attention-backend --strict=true",
        "-dac '{\"default\": }'",
        "-dac FLASH_ATTN",
        '-dac \'{"default":',
        "backend=fa\nper_role.cross=[1,",
        "--attention-backend fa --diffusion-attention-backend fa2",
        "--attention-backend fa default=fa2",
        "-dac.default.backend fa --diffusion-attention-backend fa",
        "-dac.per_role.cross fa -dac.per_role.cross.backend fa",
        "-dac.per_role.cross fa transformer.cross=fa2",
        "transformer=fa transformer=fa2",
        "default=fa2 transformer=fa",
        "component_attention_backends.tranformer=fa",
        "attention_backend_config.sparsity=0.5",
        "--component-attention-backends transformer=fa --component-attention-backends.transformer=fa2",
        "args.infer.attn_config.quant_bits = 8 # 4, 8 supported",
        "args.infer.attn_config.quant_symmetric = True",
        "args.infer.attn_config.sparsity_ratio = 0.5 # 50% sparse",
        "args.infer.attn_config.quant_bits = 5",
        "infer.attn_type=sage infer.attn_config.quant_bits=4",
        "infer.attn_type=sage infer.attn_config.quant_symmetric=False",
        "infer.attn_type=fa infer.attn_config.quant_bits=8",
        "infer.attn_type=sage infer.attn_config.quant_bits=5",
    ],
)
def test_flags_that_are_not_understood_are_refused_with_the_word(text: str, snapshot: SnapshotAssertion) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(text)
    assert str(caught.value) == snapshot


def test_words_are_split_as_a_shell_does() -> None:
    text = """a 'b c' "d \\"e\\"" --x='f g' {"h": "i j"} [1, 2] C:\\x\\y.yaml # no word\nk \\\n it's"""
    assert words_of(text, "x") == [
        "a",
        "b c",
        'd "e"',
        "--x=f g",
        '{"h": "i j"}',
        "[1, 2]",
        "C:\\x\\y.yaml",
        "k",
        "it's",
    ]
    assert words_of("a ^\r\nb `\nc", "x") == ["a", "b", "c"], "as Windows' shells do"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("-1", -1),
        ("1e-3", 0.001),
        (".5", 0.5),
        ("1.", 1.0),
        ("TRUE", True),
        ("false", False),
        ("[1, 2]", [1, 2]),
        ('{"a": [1]}', {"a": [1]}),
        ('"1"', "1"),
        ("'1'", "1"),
        ("0-3,38", "0-3,38"),
        ("1_000", "1_000"),
        ("nan", "nan"),
        ("[1", "[1"),
        ("9" * 41, "9" * 41),
    ],
)
def test_values_are_read_as_they_are_written(text: str, value: object) -> None:
    assert scalar(text) == value
    assert type(scalar(text)) is type(value)


def test_pairs_keep_lists_and_commas_inside_values() -> None:
    expected = {"a": [1, -2], "b": "0,1", "c": -1, "d": 1e-3, "e": {"f": "g h"}}
    assert parse_extra("""a=[1, -2],b=0,1, c=-1 d=1e-3 e='{"f": "g h"}'""") == expected
    assert parse_extra(json.dumps(expected)) == expected
    brackets = {"a": {"]": [1, "}"], 'b"': '\\"'}, "c": 2}
    assert parse_extra("a='" + json.dumps(brackets["a"]) + "',c=2") == brackets


# Components


def test_components_name_the_model_that_they_are_for(snapshot: SnapshotAssertion) -> None:
    text = (
        "attention_backend=fa2 transformer=fa transformer.cross=torch_sdpa transformer_2=sage_attn text_encoder=native"
    )
    assert said(text) == MIXED
    second = parse_config(text, component="transformer-2")
    assert to_dict(second) == backends("sage_attn", cross="torch_sdpa")
    assert said(text, component="transformer_3") == MIXED, "x_3 falls back to x"
    assert said(text, component="other") == backends("flash_attn_2"), "the global backend holds for the rest"
    assert parse_config(text).notes == snapshot


@pytest.mark.parametrize(
    "text",
    [
        "model_path: x\nnum_gpus: 2\nattention_backend: fa2\ncomponent_attention_backends: {transformer: fa}",
        '{"model_path": "x", "num_gpus": 2, "diffusion_attention_config": {"default": "FLASH_ATTN"}}',
        "--model-path x --num-gpus 2 --attention-backend fa",
    ],
)
def test_a_whole_configuration_of_a_server_pastes(text: str, snapshot: SnapshotAssertion) -> None:
    config = parse_config(text)
    assert to_dict(config) == backends("flash_attn")
    assert next(note for note in config.notes if "num_gpus" in note) == snapshot(name="note")


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("attention_backend: fa\nattention_backend_confg: x", "attention_backend_confg"),
        ("attention_backend: fa\nstrickt: true", "strickt"),
        ("default: fa\nmodel_path: x", "model_path"),
        ('{"diffusion_attention_config": {"model_path": "x"}}', "model_path"),
    ],
)
def test_what_could_be_a_slip_is_refused(text: str, wrong: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown entry {wrong};.* known: default"):
        parse_config(text)


def test_a_component_that_nobody_knows_is_named_and_changes_nothing(snapshot: SnapshotAssertion) -> None:
    config = parse_config("--component-attention-backends transformer=torch_sdpa,denoiser=sdpa")
    assert to_dict(config) == backends("torch_sdpa")
    assert config.notes == snapshot


def test_a_variable_of_attention_that_is_not_read_is_named(snapshot: SnapshotAssertion) -> None:
    config = parse_config(
        "SGLANG_VARLEN_FA=0 SGLANG_DIFFUSION_ATTENTION_CONFIG=a.json sglang serve --attention-backend torch_sdpa"
    )
    assert config.notes == snapshot


def test_a_refused_name_of_another_component_changes_nothing() -> None:
    assert said("transformer=fa,text_encoder=no_attention") == backends("flash_attn")
    with pytest.raises(UnknownBackendError, match=r"component_attention_backends\.text_encoder: unknown attention"):
        parse_config("transformer=fa,text_encoder=sagee")
    with pytest.raises(RefusedBackendError, match=r"'no_attention' of SGLang diffusion"):
        parse_config("transformer=no_attention")


@pytest.mark.parametrize("component", ["", None, 3])
def test_a_component_must_be_a_name(component: Any, snapshot: SnapshotAssertion) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config("fa", component=component)
    assert str(caught.value) == snapshot


@pytest.mark.parametrize(
    "flag",
    [
        "--diffusion-kv-cache-dtype fp8",
        "--diffusion-kv-cache-dtype=fp8",
        "--ulysses-degree 2",
        "--ring-degree 2",
        "--sp-degree 2",
    ],
)
def test_a_skipped_flag_that_changes_attention_elsewhere_says_what_it_does_there(
    flag: str, snapshot: SnapshotAssertion
) -> None:
    notes = parse_config(f"vllm serve x --omni --seed 1 {flag} --diffusion-attention-backend FLASH_ATTN").notes
    name = flag.replace("=", " ").split()[0]
    (note,) = (one for one in notes if name in one)
    assert note == snapshot
    (passed_over,) = (one for one in notes if "--omni" in one)
    assert passed_over == snapshot(name="passed over")
    entry = name.lstrip("-").replace("-", "_")
    mapped = parse_config({entry: 2, "seed": 1, "diffusion_attention_config": {"default": "FLASH_ATTN"}}).notes
    assert [one for one in mapped if entry in one or "seed" in one] == snapshot(name=f"{entry} and seed")


def test_a_variable_that_changes_attention_elsewhere_says_so(snapshot: SnapshotAssertion) -> None:
    notes = parse_config("DIFFUSION_ATTENTION_QUANT=fp8 vllm serve x --diffusion-attention-backend FLASH_ATTN").notes
    assert next(note for note in notes if "DIFFUSION_ATTENTION_QUANT" in note) == snapshot


def test_a_flag_with_attn_in_it_is_not_passed_over(snapshot: SnapshotAssertion) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config("python run.py --attention_backend fa --hybrid_attn_plan a,b")
    assert str(caught.value) == snapshot
