"""Machines whose kernels cost what a test says, on a clock that only they move: for tests of the measured choice."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from attention_backends.backends.config import AttentionConfig, AttentionSpec
from attention_backends.backends.engine.plan import CallKind, Slot
from attention_backends.backends.engine.router import Router
from attention_backends.backends.engine.session import Session
from attention_backends.backends.kernels import BACKENDS
from attention_backends.backends.kernels.backend import FLOATING, Backend, Kernel, Limits
from attention_backends.backends.kernels.registry import detect
from attention_backends.backends.kernels.support.sdpa import plain_sdpa
from attention_backends.backends.observe import observe
from attention_backends.backends.observe.autotune.store import Store
from attention_backends.backends.observe.autotune.tuner import Tuner
from attention_backends.backends.values.grid import Kept
from attention_backends.backends.values.limits import Causal, Dtypes, ValueHeadDim
from attention_backends.backends.values.platform import KINDS, Platform
from attention_backends.backends.values.request import AttentionCall, Host

INCUMBENT = "torch_sdpa"
"""What the route of a CPU takes."""
_sdpa = plain_sdpa()
_known: dict[int, tuple[AttentionCall, torch.Tensor]] = {}
Cost = Callable[[], float]


def sdpa(call: AttentionCall) -> torch.Tensor:
    """The exact result, computed once for each call: hundreds of calls are made with the same one."""
    if _known.get(id(call), (None,))[0] is not call:
        _known[id(call)] = call, _sdpa(call)
    return _known[id(call)][1]


class Clock:
    """Milliseconds that pass when a kernel says so. `delay`: times come only when they are collected, as on a GPU."""

    measures_device_time = True

    def __init__(self, delay: bool = False) -> None:
        self.now = 0.0
        self.delay = delay
        self.waiting: list[tuple[float, Callable[[float], None]]] = []

    def start(self, device: Any = None) -> float:
        return self.now

    def stop(self, token: float, sink: Callable[[float], None]) -> None:
        self.waiting.append((self.now - token, sink))
        if not self.delay:
            self.collect()

    def collect(self, wait: bool = False) -> None:
        waiting, self.waiting = self.waiting, []
        for ms, sink in waiting:
            sink(ms)


class Costed(Backend):
    """A backend whose calls take as long on the clock as `cost` says."""

    summary = "For a test."
    kinds = KINDS
    limits: ClassVar[Limits] = Limits(Dtypes(FLOATING), Causal("any"), ValueHeadDim(may_differ=True))

    def __init__(
        self, name: str, clock: Clock, cost: Cost, kernel: Kernel = sdpa, accuracy: str = "exact", most: int = 2**40
    ) -> None:
        self.id = name  # type: ignore[misc]
        self.accuracy = accuracy  # type: ignore[misc]
        self.candidate = name not in BACKENDS or BACKENDS[name].candidate  # type: ignore[misc]
        self.clock, self.cost, self.kernel, self.most = clock, cost, kernel, most
        self.calls = 0
        self.spent = 0.0

    def unsupported_reasons(self, request: Any, platform: Platform) -> list[str]:
        return [f"q_len {request.q_len} > {self.most}"] if request.q_len > self.most else []

    def load(self, platform: Platform) -> Kernel:
        def run(call: AttentionCall) -> torch.Tensor:
            ms = self.cost()
            self.calls += 1
            self.clock.now += ms
            self.spent += ms
            return self.kernel(call)

        return run


class CostedSparse(Costed):
    """A sparse backend, which computes calls whole while `whole` says so."""

    sparse = True

    def __init__(self, name: str, cost: Cost, whole: Callable[[], bool] = lambda: False, kernel: Kernel = sdpa) -> None:
        super().__init__(name, Clock(), cost, kernel, "sparse")
        self.whole = whole

    def bind(
        self, kernel: Kernel, request: Any, place: Any, progress: Any, kept: Kept, dense: Callable[[], Kernel]
    ) -> Kernel:
        of_dense = dense()

        def run(call: AttentionCall) -> torch.Tensor:
            if self.whole():
                kept.add_dense("the first steps")
                return of_dense(call)
            kept.add(0.25, "gather")
            return kernel(call)

        return run


def noisy(ms: float, source: random.Random, sigma: float = 0.08, outliers: float = 0.02) -> Cost:
    """A cost around `ms`, lognormal, and now and then several times as much."""

    def cost() -> float:
        factor = source.uniform(2, 5) if source.random() < outliers else 1.0
        return ms * source.lognormvariate(0, sigma) * factor

    return cost


class Machine:
    """Backends with costs, and runs on them. One store, as one process has."""

    def __init__(
        self,
        store: Store,
        costs: dict[str, Cost],
        *,
        delay: bool = False,
        asked: str = "autotune",
        accuracy: str = "exact",
        strict: bool = False,
        guard: str = "off",
        others: Iterable[Costed] = (),
    ) -> None:
        self.clock = Clock(delay)
        self.store = store
        self.backends = {name: Costed(name, self.clock, cost) for name, cost in costs.items()}
        for other in others:
            other.clock = self.clock
            self.backends[other.id] = other
        platform = detect(torch.device("cpu"))
        self.router = Router(platform, {**self.backends, "comfy": BACKENDS["comfy"]}, use_probe_results=False)
        self.layers = (
            AttentionConfig(AttentionSpec(asked), accuracy=accuracy, strict=strict, guard=guard, source="node"),
        )
        self.session: Session
        self.tuner: Tuner

    def begin(self) -> Session:
        """A new run: a session with a tuner of its own."""
        self.session = observe(Session(self.router, self.layers))
        self.tuner = Tuner(self.session, self.store, self.clock)
        self.session.register(self.tuner)
        return self.session

    def run(
        self,
        call: AttentionCall,
        *,
        blocks: int = 30,
        steps: int = 8,
        role: str = "self",
        close: bool = True,
        host: Host | None = None,
    ) -> Session:
        """A run in which each block makes this call once in each step."""
        session = self.begin()
        plans: dict[int, Slot] = {}
        for _ in range(steps):
            self.tuner.model_call(object())
            for block in range(blocks):
                if block not in plans:
                    plans[block] = session.plan(CallKind(call.request(), role, role, f"blocks.{block}"))
                output = session.attention(plans[block], call, host=host)
                assert torch.isfinite(output).all()
        if close:
            self.tuner.close()
        self.plans = plans
        return session


def small_call(q_len: int = 8) -> AttentionCall:
    """A call that computes in microseconds; what it costs is for the clock to say."""
    generator = torch.Generator().manual_seed(0)
    return AttentionCall(*(torch.randn(1, 2, q_len, 16, generator=generator) for _ in range(3)))


def steady(**costs: float) -> dict[str, Cost]:
    """A cost for each backend that is always the same."""
    return {name: lambda ms=ms: ms for name, ms in costs.items()}


def ran(session: Session) -> dict[str, int]:
    """How many calls each backend had."""
    found: dict[str, int] = {}
    for row in session.run_report.rows.values():
        if row.calls:
            found[row.backend] = found.get(row.backend, 0) + row.calls
    return found
