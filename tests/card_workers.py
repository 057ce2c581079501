"""Second workers on the CPU for tests of `backends/cards`: threads with a clock that tests advance, a bandwidth and a
latency, so that no test depends on how busy the machine is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from attention_backends.backends.cards import over
from attention_backends.backends.cards.card import Card
from attention_backends.backends.cards.heads import HeadsOverCards
from attention_backends.backends.cards.transport import Transport
from attention_backends.backends.config import AttentionConfig, AttentionSpec
from attention_backends.backends.engine.plan import CallKind, Slot
from attention_backends.backends.engine.routers import router_for
from attention_backends.backends.engine.session import Session
from attention_backends.backends.report import RunReport
from attention_backends.backends.values.reasons import Reason
from attention_backends.backends.values.request import AttentionCall, AttentionRequest

CPU = torch.device("cpu")


class Time:
    """The clock of one device, which work on it advances."""

    def __init__(self) -> None:
        self.passed = 0.0


class HomeClock:
    """What `HeadsOverCards` uses of a `DeviceClock`, by the home device's `Time`."""

    def __init__(self, time: Time) -> None:
        self.time = time

    def start(self, device: object = None) -> float:
        return self.time.passed

    def stop(self, token: float, sink: Callable[[float], None]) -> None:
        sink((self.time.passed - token) * 1e3)

    def collect(self) -> None:
        pass


class Worker(Transport):
    """A thread whose copies take `latency + bytes / bandwidth`, and are copies in fact."""

    def __init__(self, name: str, home: Time, *, bandwidth: float = 1e10, latency: float = 1e-5) -> None:
        super().__init__(name, CPU)
        self.home = home
        self.time = Time()
        self.bandwidth = bandwidth
        self.latency = latency
        self.error: BaseException | None = None
        """Raised by the next copy there."""
        self.sent = 0
        self.is_inference: list[bool] = []

    def begin(self, work: Callable[[], Any]) -> Future[Any]:
        started = self.home.passed

        def run() -> Any:
            self.time.passed = max(self.time.passed, started)
            return work()

        return super().begin(run)

    def end(self, started: Future[Any]) -> Any:
        try:
            return super().end(started)
        finally:
            self.home.passed = max(self.home.passed, self.time.passed)

    @contextmanager
    def current(self) -> Iterator[None]:
        self.is_inference.append(torch.is_inference_mode_enabled())
        yield

    def send(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        if self.error is not None:
            raise self.error
        self.time.passed += sum(self.latency + tensor.nbytes / self.bandwidth for tensor in tensors)
        self.sent += 1
        return [tensor.contiguous().clone() for tensor in tensors]

    def bring(self, source: torch.Tensor, target: torch.Tensor) -> None:
        self.time.passed += self.latency + target.nbytes / self.bandwidth
        super().bring(source, target)

    def now(self) -> float:
        return self.time.passed


class Bench:
    """A session on the CPU with other workers, whose calls advance the clocks by their amount of work."""

    def __init__(
        self, *bandwidths: float, speeds: Sequence[float] = (1e11, 1e11), config: AttentionConfig | None = None,
        latency: float = 1e-5, computes: bool = True,
    ) -> None:  # fmt: skip
        """
        Args:
            computes: False: outputs are left empty, where only times matter.
            bandwidths: bytes per second, one for each other worker.
            speeds: operations per second of the home worker and the others.
        """
        self.home = Time()
        self.workers = [
            Worker(f"cuda:{number}", self.home, bandwidth=bandwidth, latency=latency)
            for number, bandwidth in enumerate(bandwidths, 1)
        ]
        layers = (config or AttentionConfig(AttentionSpec("torch_sdpa"), source="test"),)
        self.run_report = RunReport(layers=layers)
        self.session = Session(router_for(CPU), layers, self.run_report, checks=False, device=CPU)
        self.speeds = dict(zip([self.home, *(worker.time for worker in self.workers)], speeds, strict=False))
        self.computes = computes
        self.room: list[int] = []
        self.cards: list[Card] = []

        def cards(like: torch.Tensor) -> list[Card]:
            self.cards = [Card(worker, router_for, layers, like) for worker in self.workers]
            for card, worker in zip(self.cards, self.workers, strict=True):
                self._slow(card.session, worker.time)
            return self.cards

        self.over = HeadsOverCards(
            self.session,
            cards,
            clock=HomeClock(self.home),  # type: ignore[arg-type]  # what it uses of one
            make_room=lambda size, device: self.room.append(size),
        )
        self.session.divider = self.over
        self._slow(self.session, self.home)

    def _slow(self, session: Session, time: Time) -> None:
        """Have the kernels of a session advance a clock: 30 us for a launch, then by the amount of work."""
        plain = session.kernel

        def kernel(decision: Any, kind: CallKind) -> Any:
            loaded = plain(decision, kind)

            def run(call: AttentionCall) -> torch.Tensor:
                time.passed += 3e-5 + work_of(call.request()) / self.speeds[time]
                if self.computes:
                    return loaded(call)
                return call.query.new_empty(*call.query.shape[:3], call.value.shape[3])

            return run

        session.kernel = kernel  # type: ignore[method-assign]

    def slot(self, call: AttentionCall, block: str = "") -> Slot:
        return self.session.plan(CallKind(call.request(), "self", "self", block))

    def run(self, slot: Slot, call: AttentionCall, times: int = 1) -> torch.Tensor:
        """The output of the last of some calls."""
        for _ in range(times):
            output = self.session.attention(slot, call)
        return output

    def estimate(self) -> Any:
        """The only one."""
        (found,) = self.over._estimates.values()
        return found


def second_worker(monkeypatch: pytest.MonkeyPatch) -> list[Worker]:
    """Another worker on the CPU for each session that names cards, as if it were a card: fast, with a fast link."""
    made: list[Worker] = []

    def cards(session: Any, names: Any, routers: Any, like: torch.Tensor) -> list[Card]:
        made.append(Worker("cuda:1", Time(), bandwidth=1e15, latency=0.0))
        return [Card(made[-1], router_for, session.layers, like)]

    monkeypatch.setattr(over, "KINDS", ("cpu",))
    monkeypatch.setattr(over, "_cards", cards)
    return made


def reasons_off(notes: Iterable[str]) -> list[str]:
    """The ids of the reasons in run report notes why nothing is divided."""
    return [note.values["reason"].id for note in notes if isinstance(note, Reason) and note.id == "cards.off"]  # type: ignore[attr-defined]


def work_of(request: AttentionRequest) -> float:
    """Operations, with lengths in blocks of 64 as kernels compute them."""
    v_head_dim = request.v_head_dim or request.head_dim
    rows, columns = -(-request.q_len // 64) * 64, -(-request.kv_len // 64) * 64
    return 2.0 * request.batch * request.num_heads * rows * columns * (request.head_dim + v_head_dim)


def make_call(
    heads: int = 8, kv_heads: int | None = None, tokens: int = 256, keys: int | None = None, dim: int = 16,
    batch: int = 1, mask: torch.Tensor | None = None, is_causal: bool = False, seed: int = 0,
) -> AttentionCall:  # fmt: skip
    """A call with random tensors."""
    made = torch.Generator().manual_seed(seed)
    kv_heads, keys = kv_heads or heads, keys or tokens
    query = torch.randn(batch, heads, tokens, dim, generator=made)
    key, value = (torch.randn(batch, kv_heads, keys, dim, generator=made) for _ in range(2))
    return AttentionCall(query, key, value, mask, is_causal, None, kv_heads != heads)
