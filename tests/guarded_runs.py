"""Kernels that are wrong on purpose, and a small model of blocks to run them in, for the tests of the guard."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from attention_backends.backends.config import AttentionConfig, AttentionSpec
from attention_backends.backends.engine.plan import CallKind, Plan
from attention_backends.backends.engine.router import Router
from attention_backends.backends.engine.session import Session
from attention_backends.backends.kernels import BACKENDS
from attention_backends.backends.kernels.backend import FLOATING, Backend, Kernel, Limits
from attention_backends.backends.kernels.registry import detect
from attention_backends.backends.kernels.support.sdpa import plain_sdpa
from attention_backends.backends.observe.guard import Guard
from attention_backends.backends.values.limits import Causal, Dtypes, ValueHeadDim
from attention_backends.backends.values.platform import KINDS, Platform
from attention_backends.backends.values.request import AttentionCall

LOSSY = "sage_fp8_cuda"
"""The id that the wrong kernels go by."""
BLOCKS, STEPS = 3, 10

sdpa = plain_sdpa()
int8 = BACKENDS["emulated_int8"].load(detect(torch.device("cpu")))


class Lossy(Backend):
    """A kernel that says of itself that it is not exact."""

    id: ClassVar[str] = LOSSY
    summary = "For a test."
    accuracy = "quantized"
    kinds = KINDS
    limits = Limits(Dtypes(FLOATING), Causal("any"), ValueHeadDim(may_differ=True))

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def load(self, platform: Platform) -> Kernel:
        return self.kernel


def session(kernel: Kernel, mode: str, seed: int = 0) -> Session:
    """A session in which LOSSY is this kernel and was asked for; `seed` draws the guard's rows."""
    router = Router(detect(torch.device("cpu")), {**BACKENDS, LOSSY: Lossy(kernel)})
    made = Session(router, (AttentionConfig(AttentionSpec(LOSSY), guard=mode),))
    if mode != "off":
        made.register(Guard(mode, made.run_report, everything=False, seed=seed))
    return made


class Sabotage(NamedTuple):
    """A wrong kernel, and a call that shows it."""

    kernel: Kernel
    call: AttentionCall


def tensors(
    source: random.Random, batch: int, heads: int, q_len: int, kv_len: int, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(source.randrange(1 << 30))
    query = torch.randn(batch, heads, q_len, head_dim, generator=draw)
    key, value = (torch.randn(batch, heads, kv_len, head_dim, generator=draw) for _ in range(2))
    return query, key + torch.randn(batch, heads, 1, head_dim, generator=draw), value


def some_call(source: random.Random) -> AttentionCall:
    batch, heads, head_dim = source.choice((1, 2)), source.choice((2, 4, 6)), source.choice((32, 64))
    return AttentionCall(*tensors(source, batch, heads, source.randint(65, 300), source.randint(20, 300), head_dim))


def tail_rows_zeroed(source: random.Random) -> Sabotage:
    """The rows of an unfinished last block of queries stay empty."""
    call = some_call(source)
    tail = source.randint(1, 63)

    def kernel(call: AttentionCall) -> torch.Tensor:
        output = int8(call).clone()
        output[:, :, -tail:] = 0
        return output

    return Sabotage(kernel, call)


def scale_of_one_head(source: random.Random) -> Sabotage:
    call = some_call(source)
    head, factor = source.randrange(call.query.shape[1]), source.choice((0.25, 0.5, 2.0, 4.0))

    def kernel(call: AttentionCall) -> torch.Tensor:
        query = call.query.clone()
        query[:, head] *= factor
        return int8(AttentionCall(query, call.key, call.value))

    return Sabotage(kernel, call)


def mask_dropped(source: random.Random) -> Sabotage:
    """2 % of the keys are hidden, and the kernel sees them; as booleans or as numbers to add."""
    query, key, value = tensors(source, 1, 4, source.randint(65, 300), source.randint(100, 400), 64)
    kv_len = key.shape[2]
    hidden = torch.tensor(source.sample(range(kv_len), round(kv_len * 0.02)))
    mask = torch.ones(1, 1, source.choice((1, query.shape[2])), kv_len, dtype=torch.bool)
    mask[..., hidden] = False
    if source.random() < 0.5:
        mask = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))

    def kernel(call: AttentionCall) -> torch.Tensor:
        return int8(AttentionCall(call.query, call.key, call.value))

    return Sabotage(kernel, AttentionCall(query, key, value, mask))


def key_changed(source: random.Random) -> Sabotage:
    """What sageattention 1.0.6 does: the keys' mean is subtracted in the caller's tensor. The output is right."""

    def kernel(call: AttentionCall) -> torch.Tensor:
        call.key.sub_(call.key.mean(dim=2, keepdim=True))
        return int8(call)

    return Sabotage(kernel, some_call(source))


def int32_wrap(source: random.Random) -> Sabotage:
    """q 100,000 x kv 77: past 2**31 the offset of a row's scores wraps, and the row of another place is read."""
    call = AttentionCall(*tensors(source, 1, 1, 100_000, 77, 16))
    pitch = 77 * source.choice((280, 320, 640, 1280))
    offsets = (torch.arange(100_000) * pitch).to(torch.int32).long()
    rows = offsets.div(pitch, rounding_mode="floor") % 100_000

    def kernel(call: AttentionCall) -> torch.Tensor:
        return sdpa(call)[:, :, rows]

    return Sabotage(kernel, call)


SABOTAGES: dict[str, Callable[[random.Random], Sabotage]] = {
    "tail rows zeroed": tail_rows_zeroed,
    "one head's scale wrong": scale_of_one_head,
    "mask dropped with 2 % of keys hidden": mask_dropped,
    "K changed in place": key_changed,
    "int32 wrap on q 100,000 x kv 77": int32_wrap,
}


class ToyModel:
    """Blocks that make the same call each on its own query and key, one model call per step, as ComfyUI runs them.

    `wrong(call, block, step)` is the kernel; it is told where it is, which a real one is not.
    """

    def __init__(self, call: AttentionCall, wrong: Callable[[AttentionCall, int, int], torch.Tensor]) -> None:
        self.call = call
        self.wrong = wrong
        self.block = self.step = 0

    def kernel(self, call: AttentionCall) -> torch.Tensor:
        """For `session`."""
        return self.wrong(call, self.block, self.step)

    def run(self, session: Session, steps: int = STEPS) -> torch.Tensor:
        """The latent after so many steps."""
        latent = torch.randn(self.call.query.shape, generator=torch.Generator().manual_seed(0))
        plans: dict[int, Plan] = {}
        for step in range(steps):
            self.step = step

            def model(latent: torch.Tensor = latent) -> torch.Tensor:
                for block in range(BLOCKS):
                    self.block = block
                    key = self.call.key.clone()
                    made = AttentionCall(self.call.query + 0.1 * latent, key, self.call.value, self.call.attn_mask)
                    if block not in plans:
                        plans[block] = session.plan(CallKind(made.request(), "self", "self", str(block)))
                    latent = latent + session.attention(plans[block], made) + key.mean()  # the model uses its key again
                return latent

            guard = session.registered(Guard)
            predicted = guard.model_call(object(), model, model) if guard is not None else model()
            latent = 0.9 * latent + 0.1 * predicted
        return latent
