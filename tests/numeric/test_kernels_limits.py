"""Every cell of backend x dtype x head_dim x mask x grouping x lengths is right, or refused before the kernel runs.

Packages that need a card run as fakes with the real signatures and refusals (fakes/); with a card, whatever is
installed runs on it. What is refused says why, with value and limit.
"""

from __future__ import annotations

import re
from functools import cache
from itertools import product

import pytest
from attention_backends.backends.kernels.registry import detect
from attention_backends.backends.values.platform import Platform
from attention_backends.backends.values.request import AttentionRequest
from kernel_machines import MACHINES, SAGE_1, SAGE_2, SAGE_FORK, TRITON, Machine, running_on
from syrupy.assertion import SnapshotAssertion

torch = pytest.importorskip("torch", reason="torch is not installed")

from attention_backends.backends.engine.router import Router  # noqa: E402
from attention_calls import as_comfyui_runs, call_for, copied  # noqa: E402
from fakes import arithmetic, machine  # noqa: E402
from tolerance import Error, allowed, error, truth  # noqa: E402

DTYPES = ("float16", "bfloat16", "float32")
HEAD_DIMS = (40, 64, 72, 96, 100, 128, 160, 256)
MASKS = ("none", "key_padding", "bool", "bias")
KV_HEADS = (4, 2)
LENGTHS = ((64, 64), (33, 77), (130, 192))


def _request(dtype: str, head_dim: int, mask: str, kv_heads: int, lengths: tuple[int, int], **flags: object):
    return AttentionRequest(2, 4, *lengths, head_dim, dtype, num_kv_heads=kv_heads, mask=mask, **flags)


GRID = [_request(*cell) for cell in product(DTYPES, HEAD_DIMS, MASKS, KV_HEADS, LENGTHS)]
GRID += [
    _request(*cell, is_causal=is_causal, scale=scale)
    for cell in product(DTYPES, (64,), ("none", "bool"), KV_HEADS, LENGTHS)
    for is_causal, scale in ((True, None), (False, 0.06), (True, 0.06))
]

REASON = re.compile(r"^(?=[a-z]).*(\d|not in \(|together with|not supported|does not support).*(?<!\.)$")


@pytest.fixture(autouse=True)
def inference():
    with as_comfyui_runs():
        yield


@cache
def _limit(request: AttentionRequest, arithmetic_class: str, device: str = "cpu") -> Error:
    return allowed(call_for(request, device), arithmetic_class)


def _check_all(router: Router, backend: str, arithmetic_class: str, grid=GRID, device: str = "cpu") -> int:
    """Run every cell that is not refused; the number that ran."""
    faults, ran = [], 0
    for request in grid:
        reasons = router.reasons_against(backend, request)
        if reasons:
            faults += [f"{request.describe()}: reason {reason!r}" for reason in reasons if not REASON.match(reason)]
            continue
        call, limit = call_for(request, device), _limit(request, arithmetic_class, device)
        expected = truth(call)
        made = error(router.kernel(backend)(call), expected)
        ran += 1
        if not made.within(limit):
            faults.append(f"{request.describe()}: {made} > {limit}")
    assert not faults, "\n".join(faults[:20])
    return ran


PARTS = 4
"""The normal run takes one cell in so many of each machine, the next machine another one; `-m slow` takes all."""


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["part", "whole"])
@pytest.mark.parametrize("case", MACHINES, ids=str)
def test_every_cell_is_right_or_refused(monkeypatch: pytest.MonkeyPatch, case: Machine, whole: bool) -> None:
    router = machine(monkeypatch, case.packages, case.capability)
    assert router.unavailable(case.backend) == ()
    first = 0 if whole else MACHINES.index(case) % PARTS
    assert _check_all(router, case.backend, case.arithmetic, GRID[first :: 1 if whole else PARTS]) >= (
        12 if whole else 3
    )
    assert arithmetic.CALLS


@pytest.mark.parametrize("backend", ["torch_sdpa", "sdpa_flash", "sdpa_math", "reference"])
def test_every_cell_of_what_runs_here(backend: str) -> None:
    router = Router(Platform("cpu", torch=torch.__version__))
    grid = [request for request in GRID if request.head_dim in (40, 64, 100)][::2]
    assert _check_all(router, backend, "exact", grid) > 100


def test_every_cell_of_the_emulation() -> None:
    router = Router(Platform("cpu", torch=torch.__version__))
    grid = [request for request in GRID if request.head_dim in (40, 64, 100)]
    assert _check_all(router, "emulated_int8", "int8", grid) > 200


@pytest.mark.parametrize("case", MACHINES, ids=str)
def test_refusing_calls_no_library(monkeypatch: pytest.MonkeyPatch, case: Machine) -> None:
    router = machine(monkeypatch, case.packages, case.capability)
    refused = sum(bool(router.reasons_against(case.backend, request)) for request in GRID)
    assert refused > 0
    assert arithmetic.CALLS == []


def test_a_wrong_kernel_would_be_seen() -> None:
    """A dropped mask, a wrong scale, swapped heads, one bad row and one NaN are all beyond the tolerances."""
    for dtype, arithmetic_class in (("bfloat16", "exact"), ("float16", "int8"), ("bfloat16", "fp8")):
        request = _request(dtype, 64, "key_padding", 4, (130, 130))
        call, limit = call_for(request), _limit(request, arithmetic_class)
        expected = truth(call)
        assert error(expected, expected).within(limit)
        for fault in ("mask", "scale", "heads", "row", "nan"):
            wrong = copied(call)
            wrong.attn_mask = None if fault == "mask" else call.attn_mask
            wrong.scale = 0.2 if fault == "scale" else None
            output = truth(wrong)
            if fault == "heads":
                output = output.flip(1)
            if fault == "row":
                output[0, 0, -1] = 0
            if fault == "nan":
                output[0, 0, -1, 0] = float("nan")
            assert not error(output, expected).within(limit), (dtype, arithmetic_class, fault)


def test_the_measure_of_error() -> None:
    expected = torch.ones(1, 1, 4, 3, dtype=torch.float64)
    assert error(expected, expected) == Error(0.0, 0.0)
    half = expected.clone()
    half[0, 0, 0] = 1.5
    assert error(half, expected) == pytest.approx(Error(0.25, 0.5))


TRTLLM = "flashinfer-python==0.7.2 flashinfer-cubin==0.6.13"

# What a request is refused for, with value and limit, on one machine each.
REFUSALS = [
    ("flash_attn_2", "flash-attn==2.8.3", (8, 0), {"head_dim": 264}, "head_dim 264 > 256"),
    ("flash_attn_2", "flash-attn==2.8.3", (8, 0), {"dtype": "float32"}, "does not support float32"),
    ("flash_attn_2", "flash-attn==2.8.3", (8, 0), {"mask": "key_padding"}, "does not support a key_padding mask"),
    ("flash_attn_2", "flash-attn==2.8.3", (8, 0), {"is_causal": True}, "is_causal with q_len 128 != kv_len 256"),
    ("flash_attn_2", "flash-attn==2.8.3", (8, 0), {"batch": 70000, "q_len": 1}, "batch 70000 > 65535"),
    (
        "flash_attn_2",
        "flash-attn==2.8.3",
        (8, 0),
        {"num_heads": 48, "q_len": 400_000},
        "2457600000 elements in one tensor > 2147483647",
    ),
    ("flash_attn_3", "flash-attn-3==3.0.0", (9, 0), {"head_dim": 100}, "head_dim 100 is not a multiple of 8"),
    ("flash_attn_4", "flash-attn-4==4.0.0b36", (10, 0), {"head_dim": 192}, "head_dim 192 > 128"),
    ("flashinfer_attn", "flashinfer-python==0.7.2", (9, 0), {"head_dim": 96}, "head_dim 96 not in (64, 128, 256)"),
    (
        "flashinfer_attn",
        "flashinfer-python==0.7.2",
        (9, 0),
        {"batch": 65, "mask": "bool"},
        "batch 65 > 64 with a mask",
    ),
    ("flashinfer_attn", "flashinfer-python==0.7.2", (9, 0), {"mask": "bias"}, "does not support a bias mask"),
    ("flashinfer_attn", "flashinfer-python==0.7.2", (7, 5), {"dtype": "bfloat16"}, "does not support bfloat16"),
    ("trtllm_attn", TRTLLM, (10, 3), {"head_dim": 64}, "head_dim 64 not in (128,)"),
    ("trtllm_attn", TRTLLM, (10, 0), {"mask": "key_padding"}, "does not support a key_padding mask"),
    ("trtllm_attn", TRTLLM, (10, 0), {"is_causal": True}, "is_causal with q_len 128 != kv_len 256"),
    ("sage_fp16_cuda", SAGE_2, (8, 0), {"kv_len": 77}, "kv_len 77 is not a multiple of 64"),
    (
        "sage_fp16_cuda",
        SAGE_2,
        (8, 0),
        {"q_len": 77, "kv_len": 77, "is_causal": True},
        "kv_len 77 is not a multiple of 64",
    ),
    ("sage_fp16_cuda", SAGE_FORK, (8, 7), {"mask": "key_padding"}, "does not support a key_padding mask"),
    ("sage_fp8_cuda", SAGE_2, (8, 9), {"head_dim": 160}, "head_dim 160 > 128"),
    ("sage_fp8_cuda", SAGE_2, (12, 1), {"kv_len": 167_000}, "kv_len 167000 > 150000"),
    (
        "sage_fp8_cuda",
        SAGE_2,
        (8, 9),
        {"num_heads": 56, "head_dim": 72, "kv_len": 300_000},
        "2150400000 elements in one tensor > 2147483647",
    ),
    ("sage_fp8_sm90", SAGE_2, (9, 0), {"dtype": "float32"}, "does not support float32"),
    ("comfy_kitchen_int8", "comfy-kitchen==0.2.31", (8, 9), {"head_dim": 264}, "head_dim 264 > 256"),
    ("comfy_kitchen_int8", "comfy-kitchen==0.2.31", (8, 9), {"is_causal": True}, "does not support is_causal"),
    (
        "comfy_kitchen_int8",
        "comfy-kitchen==0.2.31",
        (8, 9),
        {"num_heads": 24, "head_dim": 160, "kv_len": 400_000},
        "2457600000 elements in one tensor > 2147483647",
    ),
    ("sage_attn", SAGE_1, (8, 9), {"kv_len": 77}, "kv_len 77 is not a multiple of 64"),
    ("sage_attn", SAGE_1, (8, 9), {"head_dim": 72}, "head_dim 72 not in (64, 96, 128)"),
    ("sage_attn", SAGE_1, (8, 9), {"mask": "bool"}, "does not support a bool mask"),
    ("sage_attn", SAGE_2, (8, 9), {"dtype": "float32"}, "does not support float32"),
    ("sage_attn", SAGE_2, (8, 9), {"head_dim": 160}, "head_dim 160 > 128"),
    (
        "sage_attn",
        SAGE_2,
        (8, 9),
        {"num_heads": 56, "head_dim": 72, "kv_len": 300_000},
        "2150400000 elements in one tensor > 2147483647",
    ),
    ("sage_attn", SAGE_2, (12, 0), {"kv_len": 167_000}, "kv_len 167000 > 150000"),
    (
        "sage_fp16_triton",
        SAGE_2,
        (8, 9),
        {"mask": "bool", "is_causal": True, "q_len": 256},
        "is_causal together with a",
    ),
    ("sage_fp16_triton", f"sageattention==2.1.1 {TRITON}", (8, 9), {"mask": "bias"}, "does not support a bias mask"),
    ("sage_attn_3", f"sageattn3==1.0.0 {TRITON}", (12, 0), {"head_dim": 256}, "head_dim 256 not in (64, 128)"),
    (
        "sage_attn_3",
        f"sageattn3==1.0.0 {TRITON}",
        (12, 0),
        {"num_kv_heads": 1},
        "does not support grouped query heads (2/1)",
    ),
    ("sage_attn_3", f"sageattn3==1.0.0 {TRITON}", (12, 0), {"scale": 0.5}, "scale 0.5 is not head_dim ** -0.5"),
    (
        "sage_attn_3",
        f"sageattn3==1.0.0 {TRITON}",
        (12, 0),
        {"mask": "key_padding"},
        "does not support a key_padding mask",
    ),
    (
        "sage_attn_3",
        f"sageattn3==1.0.0 {TRITON}",
        (12, 0),
        {"num_heads": 56, "q_len": 73_774, "kv_len": 73_774},
        "2386435072 elements in the correction of one sample > 2147483647",
    ),
    ("xformers", "xformers==0.0.35", (7, 5), {"dtype": "bfloat16"}, "does not support bfloat16"),
    ("xformers", "xformers==0.0.35", (7, 5), {"head_dim": 100}, "head_dim 100 is not a multiple of 8 for float16"),
    (
        "xformers",
        "xformers==0.0.35",
        (8, 0),
        {"dtype": "float32", "head_dim": 77},
        "head_dim 77 is not a multiple of 4 for float32",
    ),
    ("xformers", "xformers==0.0.35", (8, 0), {"is_causal": True}, "is_causal with q_len 128 != kv_len 256"),
    ("xformers", "xformers==0.0.35", (12, 0), {"mask": "key_padding"}, "does not support a key_padding mask"),
    ("xformers", "xformers==0.0.35", (12, 0), {"dtype": "float32"}, "does not support float32"),
    ("xformers", "xformers==0.0.35", (10, 3), {"head_dim": 264}, "head_dim 264 > 256"),
]


@pytest.mark.parametrize(("backend", "packages", "capability", "changes", "reason"), REFUSALS)
def test_refusals_name_value_and_limit(
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    packages: str,
    capability: tuple[int, int],
    changes: dict[str, object],
    reason: str,
) -> None:
    router = machine(monkeypatch, packages, capability)
    base = AttentionRequest(1, 2, 128, 256, 128, "float16")
    assert router.reasons_against(backend, base) == ()
    reasons = router.reasons_against(backend, base._replace(**changes))
    assert any(text.startswith(reason) for text in reasons), reasons


def test_a_scale_equal_to_the_default_is_no_scale_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    router = machine(monkeypatch, f"sageattn3==1.0.0 {TRITON}", (12, 0))
    assert (
        router.reasons_against("sage_attn_3", AttentionRequest(1, 2, 128, 128, 128, "float16", scale=128**-0.5)) == ()
    )


@pytest.mark.parametrize(
    ("backend", "packages", "capability"),
    [
        ("flash_attn_2", "flash-attn==2.7.3", (12, 0)),
        ("flash_attn_2", "flash-attn==2.7.2", (9, 0)),
        ("flashinfer_attn", "flashinfer-python==0.6.16", (7, 5)),
        ("flashinfer_attn", "flashinfer-python==0.6.15", (8, 0)),
    ],
)
def test_a_limit_of_one_version_or_card_is_not_that_of_the_next(
    monkeypatch: pytest.MonkeyPatch, backend: str, packages: str, capability: tuple[int, int]
) -> None:
    router = machine(monkeypatch, packages, capability)
    assert router.reasons_against(backend, AttentionRequest(1, 2, 128, 128, 128, "float16")) == ()


def test_flashinfer_before_0_6_16_has_too_large_kernels_for_turing(monkeypatch: pytest.MonkeyPatch) -> None:
    router = machine(monkeypatch, "flashinfer-python==0.6.15", (7, 5))
    request = AttentionRequest(1, 2, 128, 128, 128, "float16")
    for head_dim in (128, 256):
        refused = router.reasons_against("flashinfer_attn", request._replace(head_dim=head_dim))
        assert refused == (f"head_dim {head_dim} not in (64,)",)
    assert router.reasons_against("flashinfer_attn", request._replace(head_dim=64)) == ()


# Why a backend is not available at all: card, package, version.
UNAVAILABLE = [
    ("flash_attn_2", "flash-attn==2.6.0", (8, 0), "package flash-attn 2.6.0 does not meet >=2.6.3"),
    ("flash_attn_2", "flash-attn==2.8.3", (7, 5), "needs an Ampere GPU or newer (sm80); this one is sm75"),
    (
        "flash_attn_2",
        "flash-attn==2.7.2",
        (12, 0),
        "package flash-attn 2.7.2 does not meet >=2.7.3, which sm_120 needs",
    ),
    ("flash_attn_2", "flash-attn==2.8.3", None, "the compute capability of"),
    ("flash_attn_2", "flash-attn-4==4.0.0b36", (9, 0), "package flash-attn is not installed"),
    ("flash_attn_3", "flash-attn-3==3.0.0", (8, 0), "needs a Hopper GPU (sm90); this one is sm80"),
    ("flash_attn_4", "flash-attn-4==4.0.0b4", (12, 0), "package flash-attn-4 4.0.0b4 does not meet >=4.0.0b5"),
    ("flash_attn", "flash-attn==2.8.3", (12, 0), "package flash-attn-4 is not installed"),
    ("flash_attn", "flash-attn==2.8.3", (7, 5), "needs an Ampere GPU or newer (sm80); this one is sm75"),
    ("sage_attn", "sageattention==1.0.6", (8, 9), "package triton is not installed"),
    ("sage_attn", f"sageattention==1.0.5 {TRITON}", (8, 9), "package sageattention 1.0.5 does not meet "),
    ("sage_attn", f"sageattention==2.0.1 {TRITON}", (8, 9), "package sageattention 2.0.1 does not meet "),
    ("sage_attn", SAGE_1, (7, 5), "package triton 3.6.0 does not meet <3.3, which sm_75 needs"),
    (
        "sage_attn",
        "sageattention==1.0.6 triton==3.2.0",
        (12, 0),
        "package triton 3.2.0 does not meet >=3.3, which sm_1",
    ),
    (
        "sage_attn",
        SAGE_2,
        (8, 7),
        "needs an Ampere/Ada/Hopper/Blackwell GPU (sm80, sm86, sm89, sm90, sm120, sm121); this one is sm87",
    ),
    (
        "sage_attn",
        SAGE_2,
        (10, 3),
        "needs an Ampere/Ada/Hopper/Blackwell GPU (sm80, sm86, sm89, sm90, sm120, sm121); this one is sm103",
    ),
    (
        "sage_attn",
        SAGE_FORK,
        (10, 3),
        "needs a Turing/Ampere/Ada/Hopper/Blackwell GPU (sm75, sm80, sm86, sm87, sm89, sm90, sm100, sm120",
    ),
    ("sage_fp16_triton", SAGE_1, (8, 9), "package sageattention 1.0.6 does not meet >=2"),
    ("sage_fp16_cuda", SAGE_1, (8, 0), "package sageattention 1.0.6 does not meet >=2"),
    (
        "sage_fp16_cuda",
        SAGE_2,
        (8, 7),
        "needs an Ampere/Ada/Hopper/Blackwell GPU (sm80, sm86, sm89, sm90, sm100, sm120, sm121); this one is sm87",
    ),
    ("sage_fp16_cuda", SAGE_FORK, (9, 0), "needs an Ampere/Ada GPU (sm80, sm86, sm87, sm89); this one is sm90"),
    (
        "sage_fp8_cuda",
        SAGE_2,
        (8, 6),
        "needs an Ada/Hopper/Blackwell GPU (sm89, sm90, sm100, sm120, sm121); this one is sm86",
    ),
    ("sage_fp8_cuda", SAGE_FORK, (9, 0), "needs an Ada/Blackwell GPU (sm89, sm100, sm120, sm121); this one is sm90"),
    ("sage_fp8_sm90", SAGE_2, (8, 9), "needs a Hopper GPU (sm90); this one is sm89"),
    ("comfy_kitchen_int8", "comfy-kitchen==0.2.28", (8, 9), "package comfy-kitchen 0.2.28 does not meet >=0.2.29"),
    ("comfy_kitchen_int8", "comfy-kitchen==0.2.31", (7, 0), "needs a Turing GPU or newer (sm75); this one is sm70"),
    ("trtllm_attn", "flashinfer-python==0.7.2", (12, 0), "needs a Blackwell GPU (sm100, sm103); this one is sm120"),
    ("trtllm_attn", "", (10, 0), "package flashinfer-python is not installed"),
    (
        "trtllm_attn",
        "flashinfer-python==0.7.2",
        (10, 0),
        "package flashinfer-cubin is not installed, and downloads are",
    ),
    (
        "sage_attn_3",
        f"sageattn3==1.0.0 {TRITON}",
        (10, 3),
        "needs a Blackwell GPU (sm100, sm120, sm121); this one is sm103",
    ),
    ("flashinfer_attn", "flashinfer-python==0.5.3", (9, 0), "package flashinfer-python 0.5.3 does not meet >=0.6"),
    ("xformers", "xformers==0.0.28", (8, 6), "package xformers 0.0.28 does not meet >=0.0.29"),
    ("xformers", "", (8, 6), "package xformers is not installed"),
]


@pytest.mark.parametrize(("backend", "packages", "capability", "reason"), UNAVAILABLE)
def test_unavailable_names_card_package_and_version(
    monkeypatch: pytest.MonkeyPatch, backend: str, packages: str, capability: tuple[int, int] | None, reason: str
) -> None:
    reasons = machine(monkeypatch, packages, capability).unavailable(backend)
    assert any(text.startswith(reason) for text in reasons), reasons


def test_versions_are_compared_as_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine(monkeypatch, "flash-attn==2.10.0", (8, 0)).unavailable("flash_attn_2") == ()


def test_amd_cards_of_flash_attn(snapshot: SnapshotAssertion) -> None:
    packages = (("flash-attn", "2.8.3"),)
    from attention_backends.backends.kernels import BACKENDS

    backend = BACKENDS["flash_attn_2"]
    assert backend.unavailable_reasons(Platform("rocm", gfx="gfx942", packages=packages)) == []
    assert backend.unavailable_reasons(Platform("rocm", gfx="gfx1030", packages=packages)) == snapshot


@pytest.mark.gpu
@pytest.mark.parametrize("backend", running_on("cuda"))
def test_every_cell_on_this_card(backend: str) -> None:
    router = Router(detect())
    reasons = router.unavailable(backend)
    if reasons:
        pytest.skip(f"GPU: {backend}: {'; '.join(reasons)}")
    arithmetic_class = router.backends[backend].arithmetic_on(router.platform)
    assert _check_all(router, backend, arithmetic_class, device="cuda") >= 12
