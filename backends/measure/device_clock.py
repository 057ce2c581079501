"""Device time of work without synchronisation: a pair of events in its stream, read once they have passed.

Without timing events the times are the host's: correct on the CPU, elsewhere only the launch time
(`measures_device_time` is False).
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, TypeVar

from ..values.devices import synchronise

if TYPE_CHECKING:
    import torch

log = logging.getLogger("attention_backends")

EVENTS = {"cuda": "cuda", "rocm": "cuda", "xpu": "xpu"}
"""Kind of device with timing events -> torch's module."""
MOST_PENDING = 4096
"""Most pending times; further work is not timed."""

Result = TypeVar("Result")
Sink = Callable[[float], None]
"""Called with the milliseconds of one piece of work."""


def timed(device: torch.device, work: Callable[..., Result], *arguments: Any) -> tuple[Result, float]:
    """(result, milliseconds) of `work(*arguments)`, synchronised before and after."""
    synchronise(device)
    start = perf_counter_ns()
    result = work(*arguments)
    synchronise(device)
    return result, (perf_counter_ns() - start) / 1e6


class DeviceClock:
    """Times work on devices of one kind. Not shared between threads.

    Work between `start` and `stop` must be in the current stream. `collect` delivers times in the order of `stop`; on
    the CPU `stop` does. Nothing is timed during CUDA graph capture or tracing by torch.compile.
    """

    def __init__(
        self,
        kind: str,
        *,
        new_event: Callable[[], Any] | None = None,
        current_stream: Callable[[torch.device | None], Any] | None = None,
        is_capturing: Callable[[], bool] | None = None,
        most_pending: int = MOST_PENDING,
    ) -> None:
        """`kind`: of `platform.KINDS`. `new_event`, `current_stream`, `is_capturing`: default: torch's."""
        self.paused = False
        """While True nothing is timed: `start` returns None."""
        self._most_pending = most_pending
        self._broken = False
        self._pending: deque[tuple[Any, Any, torch.device | None, Callable[..., None]]] = deque()
        self._free: dict[torch.device | None, list[Any]] = {}
        self._new_event = new_event
        self._current_stream = current_stream or (lambda device: None)
        self._is_capturing = is_capturing or (lambda: False)
        self._is_tracing: Callable[[], bool] = lambda: False
        if new_event is None and kind in EVENTS:
            self._use_torch(EVENTS[kind])
        self.has_events = self._new_event is not None
        self.measures_device_time = kind == "cpu" or self.has_events
        """False if only launch time can be measured."""

    def _use_torch(self, name: str) -> None:
        import torch

        module = getattr(torch, name)
        if not hasattr(module, "Event"):
            return
        self._new_event = lambda: module.Event(enable_timing=True)
        self._current_stream = module.current_stream
        self._is_capturing = getattr(module, "is_current_stream_capturing", self._is_capturing)
        self._is_tracing = torch.compiler.is_dynamo_compiling

    def start(self, device: torch.device | None = None) -> Any:
        """Begin timing in the current stream of `device` (default: the current one). Returns a token for `stop`."""
        if self.paused:
            return None
        if self._new_event is None:
            return perf_counter_ns()
        if self._is_tracing():
            return None
        if len(self._pending) >= self._most_pending:
            self.collect()
        if self._broken or len(self._pending) >= self._most_pending:
            return None
        free = self._free.setdefault(device, [])  # an event belongs to one device
        try:
            if self._is_capturing():
                return None
            before = free.pop() if free else self._new_event()
            behind = free.pop() if free else self._new_event()
            stream = self._current_stream(device)
            before.record(stream)
        except Exception as error:  # a failed time must not end the run
            self._stop_timing(error)
            return None
        return before, behind, stream, device

    def stop(self, token: Any, sink: Sink) -> None:
        """End timing: `sink` gets the milliseconds later. Does nothing for the token None."""
        if token is None:
            return
        if self._new_event is None:
            sink((perf_counter_ns() - token) / 1e6)
            return
        before, behind, stream, device = token
        try:
            behind.record(stream)
        except Exception as error:  # as in `start`
            self._stop_timing(error)
            return
        self._pending.append((before, behind, device, sink))

    def mark(self, reached: Callable[[], None], device: torch.device | None = None) -> None:
        """Have `collect` call `reached` once all earlier work is done and its times are delivered.

        Called at once without events; not called after an error of the device.
        """
        if self._new_event is None:
            reached()
            return
        if self._broken:
            return
        free = self._free.setdefault(device, [])
        try:
            if self._is_capturing():
                return
            behind = free.pop() if free else self._new_event()
            behind.record(self._current_stream(device))
        except Exception as error:  # as in `start`
            self._stop_timing(error)
            return
        self._pending.append((None, behind, device, reached))

    def collect(self, wait: bool = False) -> None:
        """Deliver the times of finished work. `wait`: synchronise and deliver all, at the end of a run."""
        pending = self._pending
        while pending:
            before, behind, device, sink = pending[0]
            try:
                if wait:
                    behind.synchronize()
                elif not behind.query():
                    return
                milliseconds = None if before is None else before.elapsed_time(behind)
            except Exception as error:  # as in `start`
                self._stop_timing(error)
                return
            pending.popleft()
            free = self._free.setdefault(device, [])
            free.append(behind)
            if milliseconds is None:
                sink()
            else:
                free.append(before)
                sink(milliseconds)

    def _stop_timing(self, error: Exception) -> None:
        """Time nothing any more; the work itself raises a device fault too."""
        log.debug("the device's times cannot be read: %s: %s", type(error).__name__, error)
        self._broken = True
        self._pending.clear()
        self._free.clear()
