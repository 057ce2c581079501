"""The names a person may write for a backend. They are public for ever: saved workflows hold them."""

from __future__ import annotations

import pytest
from attention_backends.backends.config.names import (
    AUTO,
    AUTOTUNE,
    BACKEND_IDS,
    CHOICES,
    COMFY,
    FAVOURITES,
    MEASURED,
    NAMES,
    UnknownBackendError,
    aliases,
    canonical,
    menu,
)
from attention_backends.backends.kernels import BACKENDS
from attention_backends.backends.values.platform import KINDS

FIRST_RELEASE = """
auto measured torch_sdpa cudnn_attn flash_attn flash_attn_2 flash_attn_3 flash_attn_4 flashinfer_attn
sage_attn sage_fp16_cuda sage_fp16_triton sage_fp8_cuda sage_fp8_sm90 sage_attn_3 comfy_kitchen_int8 xformers flex_attn
sdpa_flash sdpa_efficient sdpa_math aiter npu_fusion xla_flash sliding_tile_attn video_sparse_attn vmoba_attn
sparse_video_gen_2_attn sparge_attn sol_attn radial_attn comfy emulated_int8 reference
"""


def test_menus_keep_the_order_of_the_first_release() -> None:
    names = FIRST_RELEASE.split()
    assert [name for name in CHOICES if name in names] == names


def test_the_choices_are_unique_and_begin_with_the_two_automatic_ones() -> None:
    assert len(set(CHOICES)) == len(CHOICES)
    assert CHOICES[:3] == (AUTO, AUTOTUNE, MEASURED)
    assert CHOICES[3:] == BACKEND_IDS
    assert (AUTO, AUTOTUNE, *BACKEND_IDS) == NAMES
    assert COMFY in BACKEND_IDS


@pytest.mark.parametrize("kind", KINDS)
def test_the_menu_begins_with_what_runs_on_the_platform_and_loses_nothing(kind: str) -> None:
    options = menu(kind)
    assert sorted(options) == sorted(CHOICES)
    assert (*options[:2], options[-1]) == (AUTO, AUTOTUNE, MEASURED)
    backends = [BACKENDS[name] for name in options[2:-1]]
    groups = [int(kind not in one.runs_on) for one in backends]
    assert groups == sorted(groups)


def test_the_menu_has_the_order_that_people_look_for() -> None:
    assert menu("cuda")[:7] == (AUTO, AUTOTUNE, "sage_attn", "flash_attn", "cudnn_attn", "torch_sdpa", COMFY)
    assert menu("rocm")[:5] == (AUTO, AUTOTUNE, "flash_attn", "torch_sdpa", COMFY)
    assert menu("mps")[:4] == menu("cpu")[:4] == (AUTO, AUTOTUNE, "torch_sdpa", COMFY)
    assert set(FAVOURITES) <= set(BACKEND_IDS)


def test_every_name_has_a_backend_and_every_backend_a_name() -> None:
    assert set(BACKENDS) == set(BACKEND_IDS)
    assert all(backend.id == name for name, backend in BACKENDS.items())


@pytest.mark.parametrize("name", NAMES)
def test_a_name_means_itself_in_any_spelling(name: str) -> None:
    for spelling in (name, name.upper(), name.replace("_", "-"), f"  {name.title()} "):
        assert canonical(spelling) == name


def test_an_alias_is_no_name_and_leads_to_one() -> None:
    for alias, meaning in aliases().items():
        assert alias not in NAMES
        assert meaning in NAMES
        assert canonical(alias.upper()) == meaning


@pytest.mark.parametrize(
    ("published", "meaning"),
    [
        # vLLM-Omni
        ("FLASH_ATTN", "flash_attn"),
        ("CUDNN_ATTN", "cudnn_attn"),
        ("FLASHINFER_ATTN", "flashinfer_attn"),
        ("TORCH_SDPA", "torch_sdpa"),
        ("SDPA", "torch_sdpa"),
        ("SAGE_ATTN", "sage_attn"),
        ("SAGE_ATTN_3", "sage_attn_3"),
        ("FASTVIDEO_VSA", "video_sparse_attn"),
        ("FLASH_ATTN_3_HUB", "flash_attn_3"),
        # SGLang diffusion: fa3 and fa4 are the family there
        ("fa", "flash_attn"),
        ("fa2", "flash_attn_2"),
        ("fa3", "flash_attn"),
        ("fa4", "flash_attn"),
        ("cudnn_sdpa", "cudnn_attn"),
        ("torch_cudnn_sdpa", "cudnn_attn"),
        ("sparse_video_gen_2_attn", "sparse_video_gen_2_attn"),
        # Diffusers
        ("native", "torch_sdpa"),
        ("_native_cudnn", "cudnn_attn"),
        ("_native_flash", "sdpa_flash"),
        ("_flash_3_hub", "flash_attn_3"),
        ("flash_varlen", "flash_attn_2"),
        ("_sage_qk_int8_pv_fp8_cuda_sm90", "sage_fp8_sm90"),
        ("xformers", "xformers"),
        # Smart-Diffusion
        ("sage", "sage_attn"),
        ("sparge", "sparge_attn"),
    ],
)
def test_names_of_other_systems_paste_unchanged(published: str, meaning: str) -> None:
    assert canonical(published) == meaning


@pytest.mark.parametrize(
    ("wrong", "near"), [("sage_atn", "sage_attn"), ("flash_attn_5", "flash_attn"), ("cuddn", "cudnn")]
)
def test_an_unknown_name_gets_the_nearest_and_the_list(wrong: str, near: str) -> None:
    with pytest.raises(UnknownBackendError) as caught:
        canonical(wrong)
    message = str(caught.value)
    assert repr(wrong) in message
    assert near in message.partition("did you mean")[2].partition("?")[0]
    assert all(name in message for name in NAMES)


def test_nothing_near_gives_the_list_alone() -> None:
    with pytest.raises(UnknownBackendError, match="the names are: auto, ") as caught:
        canonical("qqqqqq")
    assert "did you mean" not in str(caught.value)
