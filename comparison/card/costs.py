"""Costs of one call on a device: of honouring a mask, of our path around a kernel, of a check of the guard."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...backends.values.devices import synchronise
from ...backends.values.request import AttentionCall, AttentionRequest
from ..bench_inputs import random_call
from ..bench_report import SDPA
from ..paired import alternated, interval, ratios

if TYPE_CHECKING:
    import torch

    from ...backends.observe.guard import Guard, GuardedKernel

HEADS, HEAD_DIM = 8, 64


def call_of(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> AttentionCall:
    """Normal noise as query, key and value, (batch, heads, tokens, head_dim) each."""
    batch, heads, tokens, head_dim = shape
    name = str(dtype).removeprefix("torch.")
    return random_call(AttentionRequest(batch, heads, tokens, tokens, head_dim, name), device, seed=0)


def mask_forms(tokens: int) -> dict[str, torch.Tensor]:
    """Masks that ComfyUI's models make, for `tokens` queries and keys; the shapes are broadcastable to all heads."""
    import torch

    keys, half = torch.arange(tokens), tokens // 2
    rows = keys[:, None]
    text_first = torch.zeros(1, 1, 1, tokens)
    text_first[..., 32 : 32 + half] = torch.finfo(torch.float32).min
    return {
        "nothing hidden": torch.ones(1, 1, 1, tokens, dtype=torch.bool),
        "nothing hidden, a row for each query": torch.ones(1, 1, tokens, tokens, dtype=torch.bool),
        "suffix of 50 %": (keys < half)[None, None, None],
        "suffix of 50 %, a row for each query": (keys < half).repeat(1, 1, tokens, 1),
        "gap of 50 %, most negative numbers": text_first,
        "1 key in the middle": (keys != half)[None, None, None],
        "four blocks on the diagonal": (rows // (tokens // 4) == keys // (tokens // 4))[None, None],
        "causal": (keys <= rows)[None, None],
    }


def mask_cost(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, rounds: int = 15
) -> dict[str, Any]:
    """SDPA with the mask beside SDPA on what its plan leaves of the call; all on one device.

    `reading_ms`: making the plan once. `same`: both gave the same bits, else the largest difference.
    """
    import torch

    from ...backends.engine.mask_reader import inspect
    from ...backends.measure.device_clock import timed
    from ...backends.values.mask_plan import write_part

    sdpa, device = torch.nn.functional.scaled_dot_product_attention, mask.device
    added = mask if mask.dtype == torch.bool else mask.to(query.dtype)
    call, plan = AttentionCall(query, key, value, added), inspect(mask, key.shape[2])

    def stock() -> torch.Tensor:
        output = sdpa(query, key, value, added)
        synchronise(device)
        return output

    def ours() -> torch.Tensor:
        outputs = [
            None if part is None else sdpa(part.query, part.key, part.value, part.attn_mask, is_causal=part.is_causal)
            for part in plan.calls(call)
        ]
        output = plan.empty_output(call)
        for part, found in zip(plan.sub_calls, outputs, strict=True):
            output = output if found is None else write_part(found, part, output)
        synchronise(device)
        assert output is not None  # noqa: S101  # for types: every form here leaves a key
        return output

    one, other = stock(), ours()
    return {
        **ratios(stock, ours, rounds),
        "treatment": plan.strategy,
        "same": True if torch.equal(one, other) else float((one - other).abs().max()),
        "reading_ms": round(statistics.median(timed(device, inspect, mask, key.shape[2])[1] for _ in range(5)), 3),
    }


def call_cost(device: torch.device, rounds: int = 100, calls: int = 100) -> dict[str, Any]:
    """Microseconds of the host for each call of 1x8x16x64, and what ours take over SDPA, as paired differences.

    `attention`: the Python API. `planned`: a call whose plan is known, which the hook in ComfyUI makes too.
    """
    import torch

    from ...backends.api import attention
    from ..contenders import Routed, router_for

    call = call_of((1, 8, 16, 64), device, torch.float32 if device.type == "cpu" else torch.bfloat16)
    query, key, value = call.query, call.key, call.value
    routed = Routed(router_for(str(device)), SDPA)
    session, slot = routed.session, routed._planned(call, "self", "0", None)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    kinds: dict[str, Callable[[], Any]] = {
        "sdpa": lambda: sdpa(query, key, value),
        "attention": lambda: attention(query, key, value, backend=SDPA),
        "planned": lambda: session.attention(slot, call),
    }
    times = alternated(kinds, rounds, calls, lambda: synchronise(device))
    of_each = {name: [1e3 * ms / calls for ms in found] for name, found in times.items()}
    over = {
        f"{name}_over_sdpa_us": interval([a - b for a, b in zip(of_each[name], of_each["sdpa"], strict=True)])
        for name in ("attention", "planned")
    }
    return {"sdpa_us": round(statistics.median(of_each["sdpa"]), 2), **over}


def guard_cost(
    shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, calls: int = 20, rounds: int = 3
) -> dict[str, float]:
    """Watching one block of a run of 20 steps, as a share of SDPA's own time: checks times their price.

    A check is timed separately from its call: its share of the call is below the noise of a loaded machine.
    """
    from ...backends.measure.device_clock import timed
    from ...backends.observe.guard.turns import NEVER

    guard, watch, call, attend = _watched(shape, device, dtype)
    checks = checks_of(calls)

    def least(work: Callable[[], Any], times: int) -> float:
        return min(timed(device, work)[1] for _ in range(times))

    attention = least(attend, rounds)
    check = least(lambda: guard.check(watch, call, 0), rounds * 4)
    watch.due_call = watch.due_step = NEVER
    per_call = least(lambda: [watch(call) for _ in range(1000)], rounds) / 1000
    bare = least(lambda: [watch.kernel(call) for _ in range(1000)], rounds) / 1000
    return {
        "tokens": shape[2],
        "calls": calls,
        "checks_of_20_calls": checks,
        "attention_ms": attention,
        "check_ms": check,
        "other_calls_us": (per_call - bare) * 1e3,
        "share_of_attention": (checks * check + calls * (per_call - bare)) / (calls * attention),
    }


def waits(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, checks: int = 20) -> dict[str, int]:
    """How often torch warns that a CUDA device is waited for: in checks of the guard, and in calls that it leaves."""
    import torch

    from ...backends.observe.guard.turns import NEVER

    guard, watch, call, _ = _watched(shape, device, dtype)

    def warned(work: Callable[[], Any]) -> int:
        work()
        synchronise(device)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                for _ in range(checks):
                    work()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(warning.message) for warning in caught)

    in_checks = warned(lambda: guard.check(watch, call, 0))
    watch.due_call = watch.due_step = NEVER
    return {"checks": checks, "in_checks": in_checks, "in_other_calls": warned(lambda: watch(call))}


def _watched(
    shape: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> tuple[Guard, GuardedKernel, AttentionCall, Callable[[], torch.Tensor]]:
    """A guard, a watched kernel that gives a result at once, its call, and what computes that result."""
    import torch

    from ...backends.observe.guard import BUDGETS, Guard, GuardedKernel
    from ...backends.report import Row, RunReport

    sdpa, call = torch.nn.functional.scaled_dot_product_attention, call_of(shape, device, dtype)
    guard, output = Guard("watch", RunReport()), sdpa(call.query, call.key, call.value)
    watch = GuardedKernel(guard, lambda call: output, BUDGETS["exact"], Row("", "", "", "", ""))
    return guard, watch, call, lambda: sdpa(call.query, call.key, call.value)


def checks_of(steps: int, blocks: int = 80) -> float:
    """Checks of one block in a run of so many steps, the mean over the blocks of a model."""
    import torch

    from ...backends.observe.guard import Guard
    from ...backends.observe.guard.turns import Step
    from ...backends.report import Row, RunReport

    guard, seen = Guard("watch", RunReport()), []
    guard.check = lambda watch, call, number: seen.append(watch.role_and_block)  # type: ignore
    rows = [Row("self", str(block), "", "", "") for block in range(blocks)]
    watches: list[Any] = []
    nothing = torch.zeros(1)
    call = AttentionCall(nothing, nothing, nothing)

    def model() -> list[Any]:
        for block in range(blocks):
            if len(watches) == block:
                watches.append(guard.watched(lambda call: None, "quantized", rows[block]))  # type: ignore
            watches[block](call)
        return []

    for step in range(steps):
        guard.model_call(object(), model, model, Step(step, steps))
    return len(seen) / blocks
