"""The guard on the real arithmetic of SageAttention 1.0.6, through Triton's interpreter: honest calls and real defects.

How to run it: see test_sage_interpreter.py.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from importlib import metadata
from types import ModuleType
from typing import Any

import pytest
from attention_backends.backends.values.platform import Platform
from attention_backends.backends.values.request import AttentionCall, AttentionRequest

torch = pytest.importorskip("torch", reason="torch is not installed")

from attention_backends.backends.engine.router import Router  # noqa: E402
from attention_backends.backends.observe.guard import Guard, GuardedKernel  # noqa: E402
from attention_backends.backends.report import Row, RunReport  # noqa: E402
from attention_calls import call_for, copied  # noqa: E402
from test_sage_interpreter import SaysCuda, inference, sageattention  # noqa: E402, F401  # fixtures

pytestmark = pytest.mark.interpreter
CALLS, PARTS = 3000, 6


def on_a_card(call: AttentionCall) -> AttentionCall:
    """The same memory, in tensors that say that they are on a card."""
    query, key, value = (tensor.as_subclass(SaysCuda) for tensor in (call.query, call.key, call.value))
    return AttentionCall(query, key, value, None, call.is_causal, call.scale, call.enable_gqa)


def watched(kernel: Callable[[AttentionCall], Any]) -> tuple[Callable[[AttentionCall], Any], Row]:
    """A function that runs one call and looks at it, and the row that the figures go to."""
    guard, row = Guard("watch", RunReport(), everything=False), Row("self", "0", "sage_attn", "test", "none")
    watch = guard.watched(lambda call: kernel(on_a_card(call)).as_subclass(torch.Tensor), "quantized", row)
    assert isinstance(watch, GuardedKernel)
    return lambda call: guard.check(watch, call, 0), row


def requests(count: int, seed: int) -> list[AttentionRequest]:
    source = random.Random(seed)
    return [
        AttentionRequest(
            1,
            1,
            source.randint(1, 128),
            64,
            source.choice((64, 96, 128)),
            source.choice(("float16", "bfloat16")),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("part", range(PARTS))  # in parts, for the time limit of a test
def test_honest_sage_gives_no_alarm_in_3000_calls(sageattention: ModuleType, part: int) -> None:  # noqa: F811
    packages = (("sageattention", "1.0.6"), ("triton", metadata.version("triton")))
    kernel = Router(Platform("cuda", capability=(8, 9), packages=packages)).kernel("sage_attn")
    run, row = watched(lambda call: kernel(copied(call)))  # as a session does for what changes its inputs
    for seed, request in enumerate(requests(CALLS // PARTS, part)):
        run(call_for(request, seed=seed))
    assert row.guard.checked == CALLS // PARTS
    assert row.guard.alarms == 0, row.guard
    assert row.guard.relative_l2 > 0.001


def directly(module: ModuleType, call: AttentionCall) -> Any:
    return module.sageattn(call.query, call.key, call.value, is_causal=call.is_causal, sm_scale=call.scale)


def test_that_it_changes_its_keys_is_seen(sageattention: ModuleType) -> None:  # noqa: F811
    run, row = watched(lambda call: directly(sageattention, call))
    for seed in range(20):
        run(call_for(AttentionRequest(1, 2, 100, 64, 64, "float16"), seed=seed))
    assert row.guard.alarms == 20
    assert "changed query, key" in row.guard.first_alarm


@pytest.mark.parametrize("kv_len", [77, 200])
def test_that_the_filling_of_its_last_block_counts_is_seen(sageattention: ModuleType, kv_len: int) -> None:  # noqa: F811
    run, row = watched(lambda call: directly(sageattention, copied(call)))
    for seed in range(20):
        run(call_for(AttentionRequest(1, 2, 100, kv_len, 64, "float16"), seed=seed))
    assert row.guard.alarms == 20, row.guard
