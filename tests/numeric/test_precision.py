"""`reference` and `sdpa_math` are as exact as they say, whatever a process or a thread switched in torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
from attention_backends.backends.kernels import BACKENDS
from attention_backends.backends.values.platform import Platform
from attention_backends.backends.values.request import AttentionRequest

torch = pytest.importorskip("torch", reason="torch is not installed")

from attention_backends.backends.kernels.support import precision  # noqa: E402
from attention_backends.backends.observe.guard import rows as guard_rows  # noqa: E402
from attention_calls import as_comfyui_runs, call_for, cast  # noqa: E402
from tolerance import error, truth  # noqa: E402

CPU = Platform("cpu", torch=torch.__version__)
REQUESTS = {
    "plain": AttentionRequest(1, 2, 130, 200, 64, "bfloat16"),
    "float16": AttentionRequest(1, 2, 130, 200, 64, "float16", scale=0.3),
    "float32": AttentionRequest(1, 2, 130, 200, 64, "float32"),
    "boolean": AttentionRequest(2, 4, 60, 77, 40, "bfloat16", num_kv_heads=2, mask="bool"),
    "bias": AttentionRequest(2, 4, 60, 77, 40, "float16", mask="bias"),
    "causal": AttentionRequest(1, 2, 60, 77, 40, "bfloat16", is_causal=True),
    "wider values": AttentionRequest(1, 2, 60, 77, 40, "bfloat16", v_head_dim=64),
}


@contextmanager
def math_in_half() -> Iterator[None]:
    """As ComfyUI sets it for the whole process."""
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)


@contextmanager
def medium() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def flushed() -> Iterator[None]:
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def float64_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


SWITCHES: dict[str, Any] = {
    "as it is": nullcontext,
    "half types allowed in plain attention": math_in_half,
    "float32 products in less": medium,
    "autocast to bfloat16": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast to float16": lambda: torch.autocast("cpu", dtype=torch.float16),
    "denormals flushed": flushed,
    "deterministic": deterministic,
    "float64 by default": float64_by_default,
}


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("kind", REQUESTS)
@pytest.mark.parametrize("backend", ["sdpa_math", "reference"])
def test_only_the_output_is_rounded(backend: str, kind: str, switch: str) -> None:
    """Half types: the result of exact arithmetic, rounded once. Computed in half types it is ten times as far off."""
    kernel = BACKENDS[backend].load(CPU)
    with as_comfyui_runs():
        call = call_for(REQUESTS[kind])
        expected = truth(call)
        with SWITCHES[switch]():
            output = kernel(call)
        assert output.dtype == call.query.dtype
        rounded = error(expected.to(call.query.dtype), expected).total
        assert error(output, expected).total <= 1.05 * rounded + 2e-6


def test_the_measure_sees_half_types() -> None:
    """What sdpa_math did inside ComfyUI: the same switch, torch's own plain attention."""
    from torch import _scaled_dot_product_attention_math as math

    call = call_for(REQUESTS["plain"])
    expected = truth(call)
    with as_comfyui_runs(), math_in_half():
        output = math(call.query, call.key, call.value, None, 0.0, False)[0]
    rounded = error(expected.to(call.query.dtype), expected).total
    assert error(output, expected).total > 1.5 * rounded


@pytest.mark.parametrize("allowed", ["high", "medium"])
def test_less_than_float32_means_float64(allowed: str) -> None:
    """Where float32 products may be less, on whatever machine that then has an effect."""
    before = torch.get_float32_matmul_precision()
    assert precision.wide_dtype(torch.bfloat16, "cpu") == torch.float32
    request = REQUESTS["float32"]
    usual = BACKENDS["sdpa_math"].workspace_bytes(request, CPU)
    try:
        torch.set_float32_matmul_precision(allowed)
        for device in ("cpu", "cuda"):
            assert precision.wide_dtype(torch.float32, device) == torch.float64
        assert precision.wide_dtype(torch.float32, "mps") == torch.float32
        assert BACKENDS["sdpa_math"].workspace_bytes(request, CPU) > 1.8 * usual
    finally:
        torch.set_float32_matmul_precision(before)
    assert precision.wide_dtype(torch.float64, "cpu") == torch.float64


def test_older_versions_of_torch_are_asked_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    class Old:
        allow_tf32 = False

    monkeypatch.setattr(torch.backends.cuda, "matmul", Old())
    monkeypatch.setattr(torch.backends.mkldnn, "matmul", None, raising=False)
    assert precision.float32_is_full("cuda")
    assert precision.float32_is_full("cpu")
    Old.allow_tf32 = True
    assert not precision.float32_is_full("cuda")
    assert precision.float32_is_full("cpu")


@pytest.mark.parametrize("place", ["query", "key", "value"])
def test_nan_is_not_hidden(place: str) -> None:
    """One looks for the kernel that NaN comes from; rows without a visible key are zeros all the same."""
    for backend in ("reference", "sdpa_math"):
        call = call_for(AttentionRequest(1, 1, 5, 9, 8, "float32", mask="bool"))
        call.attn_mask[..., 3, :] = False
        getattr(call, place)[0, 0, 0, 0] = float("nan")
        output = BACKENDS[backend].load(CPU)(call)
        assert output.isnan().any(), backend
        if place == "query":
            assert output[0, 0, 3].abs().max() == 0, backend


@pytest.mark.parametrize("switch", ["autocast to bfloat16", "autocast to float16", "float32 products in less"])
def test_the_rows_of_the_guard_are_float32(switch: str) -> None:
    import random

    with as_comfyui_runs():
        call = call_for(REQUESTS["boolean"])
        sampled = guard_rows.SampledRows.draw(call, random.Random(0))
        with SWITCHES[switch]():
            rows, unmasked_rows = guard_rows.exact_rows(call, sampled)
        expected = guard_rows.take(truth(cast(call, torch.float64)), sampled.rows)
        assert rows.dtype == torch.float32
        assert unmasked_rows is not None
        assert error(rows, expected[sampled.samples]).total < 1e-5
