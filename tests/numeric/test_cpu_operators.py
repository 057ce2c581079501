"""torch's operators on the CPU, as backends call them, against float64: lengths, head sizes, types, masks, nothing.

A thin sweep in the normal run; `-m slow` has thousands of calls, also with the vector instructions of other CPUs
(ATEN_CPU_CAPABILITY), `-m compile` those of `flex_attn`, which is compiled for each kind.

What was found so far. torch 2.13, FlexAttention with AVX2: wrong or NaN at head_dim 8 and 16 with kv_len 8 modulo 16,
right with AVX-512 (`backends/kernels/flex_attn.py`). Nothing in the others, in 2,100 calls with each of three sets of
instructions.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from attention_backends.backends.engine.router import Router
from attention_backends.backends.kernels import BACKENDS
from attention_backends.backends.values.platform import Platform
from attention_backends.backends.values.request import AttentionRequest

torch = pytest.importorskip("torch", reason="torch is not installed")

from attention_backends.backends.values.masks import for_kernels  # noqa: E402
from attention_calls import as_comfyui_runs, call_for  # noqa: E402
from kernel_machines import running_on  # noqa: E402
from tolerance import allowed, error, truth  # noqa: E402

TESTS = str(Path(__file__).parents[1])

CPU = Platform("cpu", torch=torch.__version__)
HERE = running_on("cpu")
LENGTHS = (*range(1, 34), 40, 47, 48, 49, 63, 64, 65, 72, 127, 128, 129, 136, 191, 192, 193, 255, 256, 257, 520, 1025)
"""Around every width that vector instructions and blocks have."""
HEAD_DIMS = (*range(1, 10), 12, 15, 16, 17, 20, 24, 31, 32, 33, 40, 48, 63, 64, 65, 72, 80, 96, 100, 128, 160, 256, 320)
FLEX_DIMS, FLEX_LENGTHS = (8, 16, 24, 40, 64), (1, 7, 8, 9, 15, 16, 17, 24, 40, 72, 77, 128, 136)


@pytest.fixture(autouse=True)
def inference():
    with as_comfyui_runs():
        yield


def some_request(rng: random.Random) -> AttentionRequest:
    """A call of at most 300,000 scores for each head."""
    q_len, kv_len = rng.choice(LENGTHS), rng.choice(LENGTHS)
    if q_len * kv_len > 300_000:
        q_len = 33
    heads = rng.randint(1, 4)
    mask = rng.choice(("none", "none", "key_padding", "bool", "bias"))
    return AttentionRequest(
        *(rng.randint(1, 2), heads, q_len, kv_len, rng.choice(HEAD_DIMS)),
        dtype=rng.choice(("float16", "bfloat16", "float32", "float64")),
        num_kv_heads=rng.choice((1, heads)),
        v_head_dim=rng.choice((0, 0, 0, rng.choice(HEAD_DIMS))),
        mask=mask,
        is_causal=mask == "none" and rng.random() < 0.4,
        scale=rng.choice((None, None, 0.2)),
    )


def sweep(count: int, seed: int) -> tuple[int, list[str]]:
    """So many random calls on each backend: how many ran, and what was wrong."""
    kernels = {name: BACKENDS[name].load(CPU) for name in HERE}
    rng, ran, faults = random.Random(seed), 0, []
    for number in range(count):
        request = some_request(rng)
        for name, kernel in kernels.items():
            if BACKENDS[name].unsupported_reasons(request, CPU):
                continue
            call = call_for(request, seed=number)
            if request.mask == "bias" and rng.random() < 0.5:
                call.attn_mask = for_kernels(call.attn_mask.to(torch.float32), call.query.dtype)
            made, exact = error(kernel(call), truth(call)), BACKENDS[name].accuracy == "exact"
            right = (
                made.worst_row < 1e-11
                if request.dtype == "float64" and exact
                else made.within(allowed(call, BACKENDS[name].arithmetic))
            )
            ran += 1
            if not right:
                faults.append(f"{name}: {request.describe()}: {made}")
    return ran, faults


def test_random_calls() -> None:
    ran, faults = sweep(60, seed=1)
    assert faults == []
    assert ran > 200


@pytest.mark.slow
@pytest.mark.parametrize("instructions", ["", "default", "avx2", "avx512"])
def test_thousands_of_random_calls(instructions: str) -> None:
    """With "" what this CPU has; the others are chosen when torch is loaded, so in a process of their own."""
    if instructions:
        ran = _elsewhere(instructions, "import test_cpu_operators as t; ran, faults = t.sweep(1000, 2)")
        assert ran > 3000
    else:
        ran, faults = sweep(3000, seed=2)
        assert faults == []
        assert ran > 10_000


def _elsewhere(instructions: str, code: str) -> int:
    """Run code that sets `ran` and `faults` in a process with these vector instructions."""
    lines = f"import conftest, torch; torch.set_num_threads(1); {code}; assert not faults, faults[:9]; print(ran)"
    ended = subprocess.run(
        [sys.executable, "-c", lines],
        cwd=Path(__file__).parent,
        env={**os.environ, "ATEN_CPU_CAPABILITY": instructions, "OMP_NUM_THREADS": "1", "PYTHONPATH": TESTS},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    return int(ended.stdout.split()[-1])


EMPTY = [{"q_len": 0}, {"kv_len": 0}, {"batch": 0}, {"q_len": 0, "kv_len": 0}]


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("mask", ["none", "bool", "bias"])
@pytest.mark.parametrize("sizes", EMPTY, ids=str)
def test_nothing_to_compute(name: str, mask: str, sizes: dict[str, int]) -> None:
    """Zeros or an empty tensor, as scaled_dot_product_attention gives, or a refusal; never NaN, never a crash."""
    request = AttentionRequest(2, 2, 5, 7, 8, "float32", mask=mask)._replace(**sizes)
    reasons = Router(CPU).reasons_against(name, request)
    assert all("kv_len 0 < 1" in reason for reason in reasons)
    whole = call_for(AttentionRequest(2, 2, 5, 7, 8, "float32", mask=mask))
    batch, q_len, kv_len = request.batch, request.q_len, request.kv_len
    call = whole.changed(
        query=whole.query[:batch, :, :q_len],
        key=whole.key[:batch, :, :kv_len],
        value=whole.value[:batch, :, :kv_len],
        attn_mask=None if mask == "none" else whole.attn_mask[: max(batch, 1), :, :q_len, :kv_len],
    )
    if reasons:
        return
    output = BACKENDS[name].load(CPU)(call)
    assert output.shape == (batch, 2, q_len, 8)
    assert not output.isnan().any()
    assert output.count_nonzero() == 0


def flex_sweep(dims: tuple[int, ...] = FLEX_DIMS, lengths: tuple[int, ...] = FLEX_LENGTHS) -> tuple[int, list[str]]:
    """`flex_attn`, compiled: head sizes, lengths, types, masks and causality."""
    kernel = BACKENDS["flex_attn"].load(CPU)
    kinds = [("none", False), ("none", True), ("key_padding", False), ("bool", False), ("bias", False)]
    ran, faults = 0, []
    for head_dim in dims:
        for dtype, kv_len in ((dtype, kv_len) for dtype in ("float32", "float16", "bfloat16") for kv_len in lengths):
            for mask, causal in kinds if dtype == "float32" else kinds[:1]:
                call = call_for(AttentionRequest(1, 2, 33, kv_len, head_dim, dtype, mask=mask, is_causal=causal))
                made = error(kernel(call), truth(call))
                ran += 1
                if not made.within(allowed(call, "half")):
                    faults.append(f"{call.request().describe()}: {made}")
    return ran, faults


@pytest.mark.compile
@pytest.mark.parametrize("instructions", ["", "avx2"])
def test_flex_attention_compiled(instructions: str) -> None:
    if reasons := Router(CPU).unavailable("flex_attn"):
        pytest.skip(f"compile: {'; '.join(reasons)}")
    if instructions:
        _elsewhere(instructions, "import test_cpu_operators as t; ran, faults = t.flex_sweep()")
    else:
        assert flex_sweep()[1] == []
