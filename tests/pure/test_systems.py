"""What configurations of other systems mean here, case by case.

The cases are those that the other systems' own tests make of their configuration, roles and selection.
"""

from __future__ import annotations

import copy
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from attention_backends.backends.config import AttentionConfig, AttentionSpec
from attention_backends.backends.config import text as config_text
from attention_backends.backends.config.flags import ELSEWHERE
from attention_backends.backends.config.foreign_entries import XFUSER_ENTRIES
from attention_backends.backends.config.layers import Choice, resolve
from attention_backends.backends.config.names import (
    BACKEND_IDS,
    NAMES,
    RefusedBackendError,
    UnknownBackendError,
    aliases,
    canonical,
    options_of,
)
from attention_backends.backends.config.print import to_dict, to_json
from attention_backends.backends.config.schedule import ScheduleEntry
from attention_backends.backends.config.systems import key_of, line_of, systems
from attention_backends.backends.config.text import from_environment, parse_config
from attention_backends.backends.config.timetable import Timetable
from attention_backends.backends.engine.router import Router
from attention_backends.backends.values.errors import ConfigError, NoBackendError
from attention_backends.backends.values.platform import parse_platform
from attention_backends.backends.values.request import parse_request
from attention_backends.devtools.pages.systems import systems_page
from syrupy.assertion import SnapshotAssertion

ROOT = Path(__file__).resolve().parents[2]
ROWS = [(system, row) for system in systems() for row in system.names]

# The names that each system publishes, as its enum or its documents list them.
PUBLISHED = {
    "vllm_omni": "FLASH_ATTN CUDNN_ATTN FLASHINFER_ATTN TORCH_SDPA SDPA SAGE_ATTN SAGE_ATTN_3 TRTLLM_ATTN "
    "FASTVIDEO_VSA FLASH_ATTN_HUB FLASH_ATTN_3_HUB RAINFUSION_ATTN SPARSE_BLOCK "
    # Newer than 0.30.0
    "SPARSE_ATTN SOL_ATTN SPARGE SLA_ATTN MINDIE_SLA aiter_quant vdnh3 VDNH3_ATTN b12x flashinfer_sm120",
    "sglang": "fa2 fa fa3 fa4 sliding_tile_attn torch_sdpa torch_cudnn_sdpa cudnn_sdpa dynamic_cudnn_sdpa sage_attn "
    "sage_attn_3 sparge_attn video_sparse_attn video_sparse_attn_h3 hybrid_window_attn_h3 sparse_video_gen_2_attn "
    "vmoba_attn aiter aiter_sage sla_attn sage_sla_attn laser_attn block_sparse_attn rain_fusion_attn sol_attn "
    "subblock_sparse_attn cube_sparse_attn fp8_fa_sm120 no_attention",
    "diffusers": "flash flash_hub flash_varlen flash_varlen_hub flash_4_hub _flash_3 _flash_varlen_3 _flash_3_hub "
    "_flash_3_varlen_hub aiter aiter_fa2_hub flex native _native_cudnn _native_efficient _native_flash _native_math "
    "_native_npu _native_xla sage sage_hub sage_blackwell_hub sage_varlen _sage_qk_int8_pv_fp8_cuda "
    "_sage_qk_int8_pv_fp8_cuda_sm90 _sage_qk_int8_pv_fp16_cuda _sage_qk_int8_pv_fp16_triton xformers",
    "smart_diffusion": "auto flash_attn sage sparge spas_sage flash_mla flash_infer triton npu ref",
    # Registered functions, the words of Model Attention Backend and Model Sparse Attention, and proposed ones.
    "comfyui": "comfy_kitchen_int8 sage sage3 flash xformers pytorch sub_quad split sub-quadratic pytorch_attention "
    "comfy_kitchen_attention sol-attn sla vsa block_sparse draft draft_attention",
    "kjnodes": "disabled auto sageattn_qk_int8_pv_fp16_cuda sageattn_qk_int8_pv_fp16_triton "
    "sageattn_qk_int8_pv_fp8_cuda sageattn_qk_int8_pv_fp8_cuda++ sageattn3 sageattn3_per_block_mean",
    "wan_wrapper": "sdpa flash_attn_2 flash_attn_3 sageattn sageattn_3 radial_sage_attention sageattn_compiled "
    "sageattn_varlen sageattn_ultravico comfy",
    "yunchang": "AITER FA FA3 FLASHINFER TORCH_MATH TORCH_FLASH TORCH_EFFICIENT TORCH_CUDNN SAGE_AUTO SAGE_FP16 "
    "SAGE_FP16_TRITON SAGE_FP8 SAGE_FP8_SM90 SPARSE_SAGE NPU "
    # raylight's older menu
    "TORCH FLASH_ATTN FLASH_ATTN_3 SAGE_AUTO_DETECT SAGE_FP16_CUDA SAGE_FP8_CUDA AITER_ROCM",
    "xfuser": "SDPA SDPA_MATH SDPA_EFFICIENT SDPA_FLASH FLASH CUDNN FLASH_3 FLASH_3_FP8 NVTE_FP8 FLASH_4 FLASH_4_FP4 "
    "SAGE FLEX_BLOCK_ATTN AITER AITER_BF16 AITER_BF16FP8 AITER_MLA AITER_I8FP8 AITER_FP8 AITER_MXFP8 AITER_F8F6 "
    "AITER_MXFP6 AITER_F6F4 AITER_MXFP4 AITER_F4F4 AITER_I8FP8_SPARGE AITER_FP8_SPARGE AITER_MXFP8_SPARGE "
    "AITER_F8F6_SPARGE AITER_MXFP6_SPARGE AITER_F6F4_SPARGE AITER_MXFP4_SPARGE AITER_F4F4_SPARGE AITER_SAGE "
    "AITER_SPARSE_SAGE AITER_SAGE_V2 AITER_SPARSE_SAGE_V2 AITER_SPARGE AITER_SPARGE_V2 AITER_VSA FLEX_VSA_H3 "
    "TRITON_VSA_H3 FLEX_BLOCK_SPARGE AITER_FLYDSL AITER_FLYDSL_FP8 NPU",
    "fastvideo": "FLASH_ATTN TORCH_SDPA SAGE_ATTN SAGE_ATTN_THREE ATTN_QAT_INFER ATTN_QAT_TRAIN VIDEO_SPARSE_ATTN "
    "VIDEO_SPARSE_ATTN_H3 BSA_ATTN VMOBA_ATTN SLA_ATTN SAGE_SLA_ATTN NABLA_ATTN NO_ATTENTION",
}
SPACED = {"pytorch_attention": "pytorch attention", "comfy_kitchen_attention": "comfy kitchen attention"}

# Names that mean different things in two systems; without a system, the first of each holds.
DIFFERENT = {
    "auto": ["auto", "sage_attn"],
    "fa": ["flash_attn", "flash_attn_2"],
    "fa3": ["flash_attn", "flash_attn_3"],
    "flash_attn": ["flash_attn", "flash_attn_2"],
}


# Names


@pytest.mark.parametrize("system", PUBLISHED)
def test_every_published_name_means_something_or_is_refused_with_a_reason(system: str) -> None:
    rows = {row.name: row for one in systems() if one.id == system for row in one.names}
    published = [SPACED.get(name, name) for name in PUBLISHED[system].split()]
    assert set(published) <= set(rows)
    for name in published:
        row = rows[name]
        if row.means is None:
            for of in (system, ""):
                with pytest.raises(RefusedBackendError, match="is not available here: ") as caught:
                    canonical(name, of)
                assert str(caught.value).endswith(row.line)
                assert "unknown" not in str(caught.value)
        else:
            assert canonical(name, system) == canonical(name.upper(), system) == row.means
            bare = DIFFERENT.get(key_of(name), [row.means])[0]
            assert canonical(name) == canonical(name.upper()) == bare
            assert parse_config(name).default == AttentionSpec(bare, options_of(name))


@pytest.mark.parametrize(("system", "row"), ROWS, ids=lambda value: getattr(value, "name", getattr(value, "id", "")))
def test_a_row_is_true_to_itself(system: Any, row: Any) -> None:
    assert row.means is None or row.means in NAMES
    assert row.means is not None or row.line, "a refusal needs a reason"
    assert not row.line.endswith(".")
    assert "|" not in row.line


def test_a_name_means_the_same_in_every_system_but_for_a_few() -> None:
    meanings: dict[str, list[str | None]] = {}
    for _, row in ROWS:
        found = meanings.setdefault(key_of(row.name), [])
        found += [row.means] if row.means not in found else []
    assert {name: found for name, found in meanings.items() if len(found) > 1} == DIFFERENT
    for name, means in meanings.items():
        if name in BACKEND_IDS:
            assert canonical(name) == means[0] == name, "an id of ours never means another one"


@pytest.mark.parametrize(
    ("text", "backend"),
    [
        ("--attention-backend fa3", "flash_attn"),
        ("XFuser_attention: fa3", "flash_attn_3"),
        ("XFuser_attention=FA", "flash_attn_2"),
        ("XFuser_attention: FLASH_ATTN", "flash_attn_2"),
        ("--diffusion-attention-backend FLASH_ATTN", "flash_attn"),
        ("FASTVIDEO_ATTENTION_BACKEND=FLASH_ATTN", "flash_attn"),
        ("sage_attention: auto", "sage_attn"),
        ("attn_type: auto", "auto"),
    ],
)
def test_the_entry_of_a_system_says_which_meaning_of_a_name_counts(text: str, backend: str) -> None:
    assert parse_config(text).default.backend == backend


def test_the_note_of_a_name_with_two_meanings_names_the_other(snapshot: SnapshotAssertion) -> None:
    for name in ("fa3", "FA"):
        (note,) = parse_config(name).notes
        assert note == snapshot(name=name)
    for name in ("auto", "flash_attn"):  # these are our own words
        assert "XFuser_attention" not in parse_config(name).notes[0]
        assert "KJNodes" not in parse_config(name).notes[0]


def test_a_name_can_stand_for_options_too_and_written_ones_have_precedence() -> None:
    name = "sageattn_qk_int8_pv_fp8_cuda++"
    fast = AttentionSpec("sage_fp8_cuda", {"pv_accum_dtype": "fp32+fp16"})
    assert AttentionSpec(name) == parse_config(name).default == fast
    assert parse_config({"per_role": {"self": name}}).per_role["self"] == fast
    assert parse_config({"schedule": [{"backend": name, "steps": "0-"}]}).schedule[0].spec == fast
    written = {"backend": name, "extra": {"pv_accum_dtype": "fp32", "smooth_v": True}}
    assert parse_config({"default": written}).default == AttentionSpec("sage_fp8_cuda", written["extra"])
    assert AttentionSpec(name, {"smooth_k": False}).extra == {"pv_accum_dtype": "fp32+fp16", "smooth_k": False}
    for config in (parse_config(name), parse_config({"default": written})):
        assert parse_config(to_json(config)) == config
    for _, row in ROWS:
        if row.options:
            AttentionSpec(str(row.means), dict(row.options))


def test_names_stand_in_one_place() -> None:
    published = {key_of(row.name) for _, row in ROWS if row.means}
    assert published - set(NAMES) <= set(aliases())


def test_the_line_of_a_name_is_logged_once(caplog: pytest.LogCaptureFixture, snapshot: SnapshotAssertion) -> None:
    config_text._say_once.cache_clear()
    with caplog.at_level(logging.INFO, "attention_backends"):
        for _ in range(3):
            config = parse_config({"default": "fa3", "per_role": {"cross": "dynamic_cudnn_sdpa", "self": "sdpa_math"}})
    texts = [record.getMessage() for record in caplog.records]
    assert texts == list(config.notes)
    assert texts == snapshot


def test_pasting_a_name_on_which_the_systems_disagree_prints_its_line(snapshot: SnapshotAssertion) -> None:
    """Also where it is an id of ours: a person who pastes it means what their system means."""
    for text in ("aiter", "FLASH_ATTN", "flash_attn", "fa2", "fa4", "_native_npu", "auto", "attention_backend: aiter"):
        (note,) = parse_config(text).notes
        assert note == snapshot(name=text)
    assert parse_config("torch_sdpa").notes == ()
    assert parse_config({"per_role": {"cross": None}}).notes == (), "nothing was written"
    assert "that vLLM bundles" in parse_config("--diffusion-attention-backend FLASH_ATTN").notes[0]
    assert "vLLM bundles" in parse_config({"attention_config": {"per_role": {"self": "FLASH_ATTN"}}}).notes[0]
    assert "prefers lossy kernels" in parse_config("infer.attn_type=auto").notes[0]
    assert line_of("sage_attn", "sglang") == ""
    assert line_of("no_attention", "sglang") == "", "a refusal speaks for itself"


def test_a_note_says_what_differs_here(snapshot: SnapshotAssertion) -> None:
    (note,) = parse_config("infer.attn_type=sparge").notes
    assert note == snapshot
    assert chosen("cuda:9.0", CALL.format(128), "sparge").is_fallback


def test_a_refusal_speaks_of_the_system_that_the_name_came_from(snapshot: SnapshotAssertion) -> None:
    for text, title in {
        "--attention-backend sla_attn": "SGLang diffusion",
        "--diffusion-attention-backend SLA_ATTN": "vLLM-Omni",
        "transformer=sla_attn": "SGLang diffusion",
    }.items():
        with pytest.raises(RefusedBackendError, match=f"of {title} ") as caught:
            parse_config(text)
        assert str(caught.value) == snapshot(name=text)


def test_the_page_of_names_is_generated() -> None:
    page = (ROOT / "docs" / "systems.md").read_text(encoding="utf-8")
    assert page == systems_page(), "stale: python3 dev.py docs"
    for _, row in ROWS:
        assert f"| `{row.name}` | " in page
    for name in (*XFUSER_ENTRIES, *ELSEWHERE):
        assert f"| `{name}` | " in page


# Forms of other systems: what each becomes, or a part of the reason against it

FORMS: dict[str, dict[str, Any] | str] = {
    "--attention_backend sage --cross_attention_backend sdpa": {
        "default": {"backend": "sage_attn"},
        "per_role": {"cross": {"backend": "torch_sdpa"}},
    },
    "torchrun --nproc_per_node=8 run.py --model Wan --ulysses_degree 8 --cross_attention_backend sdpa": {
        "per_role": {"cross": {"backend": "torch_sdpa"}}
    },
    "--use_hybrid_attn_schedule --hybrid_attn_schedule FLASH_3,SAGE,SAGE,FLASH_3": {
        "schedule": [
            {"backend": "flash_attn_3", "steps": "0"},
            {"backend": "sage_attn", "steps": "1-2"},
            {"backend": "flash_attn_3", "steps": "3"},
        ]
    },
    "--use_hybrid_attn_schedule --hybrid_attn_low_precision_backend sage --hybrid_attn_high_precision_backend flash_3 "
    "--num_hybrid_attn_high_precision_steps 5 --cross_attention_backend sdpa": {
        "per_role": {"cross": {"backend": "torch_sdpa"}},
        "schedule": [
            {"backend": "sage_attn", "steps": "0-"},
            {"backend": "flash_attn_3", "steps": "first 5,last 5"},
            {"backend": "torch_sdpa", "steps": "0-", "role": "cross"},
        ],
    },
    "--use_hybrid_attn_schedule --hybrid_attn_low_precision_backend sage --hybrid_attn_high_precision_backend sdpa "
    "--num_hybrid_attn_high_precision_steps 0": {"schedule": [{"backend": "sage_attn", "steps": "0-"}]},
    "--hybrid_attn_schedule SAGE,SAGE": {},
    "--use_hybrid_attn_schedule --hybrid_attn_schedule SAGE,FLASH_3_FP8": "FlashAttention 3 in FP8",
    "--use_hybrid_attn_schedule --attention_backend sage": "both use_hybrid_attn_schedule",
    "--use_hybrid_attn_schedule": "needs hybrid_attn_schedule, or",
    "--use_hybrid_attn_schedule --hybrid_attn_schedule SAGE --hybrid_attn_low_precision_backend SAGE": "give one of",
    "--use_hybrid_attn_schedule --hybrid_attn_schedule SAGE,,SAGE": "names with commas",
    "use_hybrid_attn_schedule: 3": "expected true or false",
    "FASTVIDEO_ATTENTION_BACKEND=SAGE_ATTN_THREE": {"default": {"backend": "sage_attn_3"}},
    "FASTVIDEO_FA4=1 FASTVIDEO_ATTENTION_BACKEND=SAGE_ATTN fastvideo generate --model x": {
        "default": {"backend": "sage_attn"}
    },
    "FASTVIDEO_ATTENTION_BACKEND=NABLA_ATTN": {"default": {"backend": "nabla_attn"}},
    "python main.py --use-sage-attention --listen": {"default": {"backend": "sage_attn"}},
    "python main.py --use-quad-cross-attention": "choose comfy",
    "--use-flash-attention --use-sage-attention": "give one",
    '{"backend": "FASTVIDEO_VSA", "fastvideo_vsa_provider": "auto", "fastvideo_vsa_precision": "bf16"}': {
        "default": {
            "backend": "video_sparse_attn",
            "extra": {"fastvideo_vsa_provider": "auto", "fastvideo_vsa_precision": "bf16"},
        }
    },
    "vllm serve x --diffusion-attention-backend FASTVIDEO_VSA --fastvideo-vsa-topk 64": {
        "default": {"backend": "video_sparse_attn", "extra": {"fastvideo_vsa_topk": 64}}
    },
    '{"default": {"backend": "FLASHINFER_ATTN", "quant": {"dtype_qk": "fp8_e4m3"}}}': "not implemented here",
    "vllm serve x --diffusion-kv-cache-dtype fp8 --diffusion-attention-backend FLASH_ATTN": {
        "default": {"backend": "flash_attn"}
    },
    "--diffusion-kv-cache-dtype fp8": "fp8 is FP8 attention",
    "DIFFUSION_ATTENTION_QUANT=fp8:fp8 vllm serve x --diffusion-attention-backend FLASHINFER_ATTN": {
        "default": {"backend": "flashinfer_attn"}
    },
    "DIFFUSION_ATTENTION_QUANT=fp8:fp8": "name a backend",
    "--VSA-sparsity 0.9": "its option sparsity",
    '{"schedule": [{"start": 0, "end": 2, "profile": "dense"}]}': "diffusion_attention_schedule",
    "--attention-backend sparge_attn --attention-backend-config topk=0.3": {
        "default": {"backend": "sparge_attn", "extra": {"topk": 0.3}}
    },
    "--attention-backend sage_attn --attention-backend-config n_k=4": "n_k is an option of SGLang",
}


@pytest.mark.parametrize("text", FORMS)
def test_a_form_of_another_system_is_translated_or_refused(text: str) -> None:
    expected = FORMS[text]
    if isinstance(expected, str):
        with pytest.raises((ConfigError, RefusedBackendError)) as caught:
            parse_config(text)
        assert expected in str(caught.value)
        assert "unknown" not in str(caught.value)
        return
    config = parse_config(text)
    assert to_dict(config) == expected
    assert parse_config(to_json(config)) == config
    assert not any("not about attention" in note and "attn" in note for note in config.notes)


def test_the_ends_of_a_hybrid_schedule_are_precise_as_in_xfuser() -> None:
    config = parse_config(next(text for text in FORMS if "num_hybrid_attn_high_precision_steps 5" in text))
    sigmas = (*(1 - step / 14 for step in range(14)), 0.0)
    table = Timetable((config,), sigmas)

    def asked(role: str) -> str:
        found = [str(table.resolve(table.at(sigma), role, role, "")[0].asked) for sigma in sigmas[:-1]]
        return "".join({"sage_attn": "s", "flash_attn_3": "f", "torch_sdpa": "t"}[backend] for backend in found)

    assert asked("self") == "fffff" + "ssss" + "fffff"
    assert asked("cross") == "t" * 14


# 1 to 9: roles, priority, forms


def ask(value: object, role: str, category: str) -> Choice:
    return resolve((parse_config(value),), role, category)


def test_1_a_role_takes_its_own_and_others_the_default() -> None:
    value = {"default": "FLASH_ATTN", "per_role": {"self": "SAGE_ATTN", "cross": "TORCH_SDPA"}}
    assert ask(value, "self", "self").asked == "sage_attn"
    assert ask(value, "cross", "cross").asked == "torch_sdpa"
    cross_only = {"default": "FLASH_ATTN", "per_role": {"cross": "TORCH_SDPA"}}
    assert ask(cross_only, "joint", "joint").asked == "flash_attn"
    assert ask(value, "joint", "joint") == Choice("flash_attn", "config.default")
    assert ask(value, "flux.double", "joint") == Choice("flash_attn", "config.default")


def test_2_the_category_counts_where_the_role_is_not_named_and_the_source_says_so() -> None:
    choice = ask({"per_role": {"cross": "TORCH_SDPA"}}, "ltx2.audio_to_video", "cross")
    assert choice.asked == "torch_sdpa"
    assert choice.source == "config.per_role['cross'] (category of 'ltx2.audio_to_video')"
    both = {"per_role": {"cross": "TORCH_SDPA", "ltx2": {"audio_to_video": "CUDNN_ATTN"}}}
    choice = ask(both, "ltx2.audio_to_video", "cross")
    assert (choice.asked, choice.source) == ("cudnn_attn", "config.per_role['ltx2.audio_to_video']")


def test_3_nothing_said_is_the_platforms_route() -> None:
    assert resolve((), "self", "self") == Choice(None, "platform route")
    for role, category in (("cross", "cross"), ("joint", "joint"), ("flux.double", "joint")):
        assert ask({"per_role": {"self": "SAGE_ATTN"}}, role, category) == Choice(None, "platform route")


def test_4_nested_roles_and_every_kind_of_spec_are_equal_and_nothing_is_changed() -> None:
    spec = {"backend": "TORCH_SDPA"}
    nested = {"per_role": {"ltx2": {"audio_self": spec, "audio_to_video": "TORCH_SDPA"}}}
    before = copy.deepcopy(nested)
    typed = {"per_role": {"ltx2.audio_self": AttentionSpec("torch_sdpa"), "ltx2.audio_to_video": spec}}
    assert parse_config(nested) == parse_config(typed)
    assert nested == before
    wrapped = {"diffusion_attention_config": nested}
    assert parse_config(wrapped) == parse_config(typed)
    assert nested == before
    assert wrapped["diffusion_attention_config"] is nested


@pytest.mark.parametrize("auto", ["auto", "AUTO", " Auto ", None])
def test_5_auto_is_as_if_nothing_stood_there(auto: Any) -> None:
    assert parse_config({"default": auto}).default.is_auto
    assert dict(parse_config({"per_role": {"self": auto}}).per_role) == {}
    assert parse_config({"attention_backend": auto, "default": "fa"}).default.backend == "flash_attn"
    assert ask({"default": "fa", "per_role": {"self": auto}}, "self", "self").source == "config.default"


LTX2 = {
    "self": ("self", "FLASH_ATTN"),
    "ltx2.audio_self": ("self", "TORCH_SDPA"),
    "cross": ("cross", "CUDNN_ATTN"),
    "ltx2.audio_text_cross": ("cross", "TORCH_SDPA"),
    "ltx2.audio_to_video": ("cross", "FLASHINFER_ATTN"),
    "ltx2.video_to_audio": ("cross", "SAGE_ATTN"),
}


def test_6_the_six_roles_of_ltx2_from_flags_and_from_yaml() -> None:
    flags = " ".join(f"--diffusion-attention-config.per_role.{role}.backend {name}" for role, (_, name) in LTX2.items())
    with pytest.raises(ConfigError, match="conflicts with"):
        parse_config(flags + " --diffusion-attention-config.per_role.ltx2 TORCH_SDPA")
    nested = """
        per_role:
          self: FLASH_ATTN
          cross: CUDNN_ATTN
          ltx2:
            audio_self: TORCH_SDPA
            audio_text_cross: {backend: TORCH_SDPA}
            audio_to_video: FLASHINFER_ATTN
            video_to_audio: SAGE_ATTN
    """
    assert parse_config(flags) == parse_config(nested)
    for role, (category, name) in LTX2.items():
        choice = ask(flags, role, category)
        assert (choice.asked, choice.source) == (canonical(name), f"config.per_role[{role!r}]")
    partly = {"default": "TORCH_SDPA", "per_role": {"cross": "CUDNN_ATTN", "ltx2.audio_self": "SAGE_ATTN"}}
    asked = {role: ask(partly, role, category).asked for role, (category, _) in LTX2.items()}
    assert asked == {
        "self": "torch_sdpa",
        "ltx2.audio_self": "sage_attn",
        "cross": "cudnn_attn",
        "ltx2.audio_text_cross": "cudnn_attn",
        "ltx2.audio_to_video": "cudnn_attn",
        "ltx2.video_to_audio": "cudnn_attn",
    }


def test_7_the_environment_counts_below_everything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    environ = {"DIFFUSION_ATTENTION_BACKEND": "SAGE_ATTN"}
    explicit = parse_config("TORCH_SDPA")
    assert resolve((explicit, *from_environment(environ)), "self", "self").asked == "torch_sdpa"
    only_cross = parse_config({"per_role": {"cross": "TORCH_SDPA"}})
    assert resolve((only_cross, *from_environment(environ)), "self", "self") == Choice(
        "sage_attn", "DIFFUSION_ATTENTION_BACKEND.default"
    )
    assert resolve(from_environment({"DIFFUSION_ATTENTION_BACKEND": "auto"}), "self", "self").asked is None
    assert from_environment({"DIFFUSION_ATTENTION_BACKEND": "garbage"}, above=(explicit,)) == ()
    with pytest.raises(UnknownBackendError):
        from_environment({"DIFFUSION_ATTENTION_BACKEND": "garbage"}, above=(only_cross,))
    monkeypatch.setitem(os.environ, "DIFFUSION_ATTENTION_BACKEND", "garbage")
    assert parse_config("--diffusion-attention-backend auto") == AttentionConfig(), "parsing reads no environment"


def test_8_a_shorthand_with_a_structured_default_is_an_error_with_roles_it_is_not(snapshot: SnapshotAssertion) -> None:
    roles = "--diffusion-attention-config.per_role.cross.backend TORCH_SDPA"
    config = parse_config(f"--diffusion-attention-backend SAGE_ATTN {roles}")
    assert (config.default.backend, config.per_role["cross"].backend) == ("sage_attn", "torch_sdpa")
    for value in (
        "--diffusion-attention-backend SAGE_ATTN --diffusion-attention-config.default.backend FLASH_ATTN",
        {"backend": "SAGE_ATTN", "default": "FLASH_ATTN"},
        {"diffusion_attention_backend": "SAGE_ATTN", "diffusion_attention_config": {"default": "SAGE_ATTN"}},
    ):
        with pytest.raises(ConfigError) as caught:
            parse_config(value)
        assert str(caught.value) == snapshot


@pytest.mark.parametrize("place", ["default", "per_role"])
def test_9_an_option_of_another_backend_is_an_error_when_it_is_read(place: str) -> None:
    for extra in ({"svg2_num_q_centroids": 3}, {"fastvideo_vsa_topk": 64}, {"nonsense": 1}):
        spec = {"backend": "TORCH_SDPA", "extra": extra}
        with pytest.raises(ConfigError, match=f"extra of torch_sdpa: .*{next(iter(extra))}"):
            parse_config({"default": spec} if place == "default" else {"per_role": {"never.used": spec}})


def test_3_a_schedule_that_is_pasted_leaves_joint_attention_alone_too() -> None:
    profiles = {"sage": {"per_role": {"self": "SAGE_ATTN"}}}
    pasted = {"diffusion_attention_schedule": {"profiles": profiles, "default": [{"start": 0, "profile": "sage"}]}}
    ours = {"schedule": [{"backend": "SAGE_ATTN", "role": "self", "steps": "0-"}]}
    for value in (pasted, ours):
        for more, joint in (({}, None), ({"joint_is_self": True}, "sage_attn")):
            config = parse_config({**value, **more})
            table = Timetable((config,), (1.0, 0.5, 0.0))
            asked = [table.resolve(table.at(1.0), role, role, "")[0].asked for role in ("self", "joint")]
            assert asked == ["sage_attn", joint]
            assert parse_config(to_json(config)) == config
    entry = ScheduleEntry(AttentionSpec("sage_attn"), role="self")
    table = Timetable((AttentionConfig(schedule=(entry,)),))
    assert table.resolve(table.at(None), "joint", "joint", "")[0].asked == "sage_attn", "a node's entry covers it"


# 10 to 12: selection on described machines


def chosen(platform: str, request: str, config: str = "auto") -> Any:
    router = Router(parse_platform(platform))
    return router.decide(parse_request(request), (parse_config(config),), "self", "self")


CALL = "num_heads=24,q_len=4096,head_dim={}"


@pytest.mark.parametrize(
    ("platform", "head_dim", "backend"),
    [
        ("cuda:12.0,cudnn=91002", 128, "cudnn_attn"),
        ("cuda:12.0,cudnn=91002", 72, "cudnn_attn"),
        ("cuda:12.0,cudnn=91002", 320, "torch_sdpa"),
        ("cuda:12.0,cudnn=91002", 12, "torch_sdpa"),
        ("cuda:12.0,cudnn=90400,packages=flashinfer-python==0.7.2", 128, "flashinfer_attn"),
        ("cuda:12.0,cudnn=90400", 128, "torch_sdpa"),
        ("cuda:9.0,packages=flash-attn==2.8.3", 128, "flash_attn"),
        ("cuda:9.0", 128, "torch_sdpa"),
        ("cuda:7.5,packages=flash-attn==2.8.3", 128, "torch_sdpa"),
        ("mps", 128, "torch_sdpa"),
        ("cpu", 128, "torch_sdpa"),
    ],
)
def test_10_automatic_choice_follows_the_card_and_the_head_size(platform: str, head_dim: int, backend: str) -> None:
    assert chosen(platform, CALL.format(head_dim)).backend == backend


@pytest.mark.parametrize(
    ("platform", "head_dim", "config"),
    [
        ("cuda:12.0,cudnn=91002", 12, "CUDNN_ATTN"),
        ("cuda:12.0,cudnn=91002", 128, "FLASHINFER_ATTN"),
        ("cuda:9.0,packages=sageattention==2.2.0;triton==3.6.0", 256, "sage_attn"),
    ],
)
def test_10_a_named_backend_that_cannot_run_is_an_error_with_strict(
    platform: str, head_dim: int, config: str, snapshot: SnapshotAssertion
) -> None:
    with pytest.raises(NoBackendError) as caught:
        chosen(platform, CALL.format(head_dim), f"backend={config},strict=true")
    decision = chosen(platform, CALL.format(head_dim), config)
    assert decision.is_fallback
    assert decision.reason == snapshot
    assert str(decision.reason) in str(caught.value)
    assert chosen("cuda:12.0,cudnn=91002", CALL.format(72), "backend=CUDNN_ATTN,strict=true").backend == "cudnn_attn"


def test_11_old_cards_and_single_precision_stay_on_sdpa() -> None:
    flash = "packages=flash-attn==2.8.3"
    assert chosen(f"cuda:8.0,{flash}", CALL.format(128) + ",dtype=float32").backend == "torch_sdpa"
    decision = chosen(f"cuda:7.5,{flash}", CALL.format(128), "FLASH_ATTN")
    assert decision.backend == "torch_sdpa"
    assert "sm75" in str(decision.reason)
    with pytest.raises(NoBackendError, match="sparge_attn: "):
        chosen("cuda:7.5,packages=spas-sage-attn==0.1.0", CALL.format(128), "backend=sparge,strict=true")


def test_12_an_unknown_name_lists_the_names_and_the_nearest() -> None:
    with pytest.raises(UnknownBackendError) as caught:
        parse_config("--attention-backend sage_atn")
    assert "did you mean sage_attn" in str(caught.value)
    assert all(name in str(caught.value) for name in NAMES)
    assert not isinstance(caught.value, RefusedBackendError)


@pytest.mark.parametrize(
    ("name", "runs_on"),
    [
        ("video_sparse_attn_h3", "fastvideo-kernel"),
        ("hybrid_window_attn_h3", "FlashAttention"),
    ],
)
def test_a_refusal_names_the_package_whose_kernels_it_runs_there(
    name: str, runs_on: str, snapshot: SnapshotAssertion
) -> None:
    with pytest.raises(UnknownBackendError) as refused:
        canonical(name)
    assert runs_on in str(refused.value)
    assert str(refused.value) == snapshot
