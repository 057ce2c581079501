"""Copies between two CUDA (or ROCm) devices of one process.

Consumer cards have no peer access, so what goes from one to the other is staged through pinned memory of the host, in
chunks: while one is on its way to the card, the next one leaves the other. Where the cards have peer access, torch
copies directly. Copies use streams of their own. Pinned memory is at most two chunks for each card.

Written from the documentation of torch.cuda; not run on two cards by this project.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager

import torch

from .transport import Result, Transport

CHUNK = 16 << 20
"""Bytes of each of the two pinned buffers."""


class CudaTransport(Transport):
    """Another card."""

    def __init__(self, home: torch.device, device: torch.device) -> None:
        super().__init__(str(device), device)
        self.home = home
        self.has_peer_access = torch.cuda.can_device_access_peer(device, home) and torch.cuda.can_device_access_peer(
            home, device
        )
        self._home_stream = torch.cuda.Stream(home)  # type: ignore[no-untyped-call]
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._buffers: list[torch.Tensor] = []

    def begin(self, work: Callable[[], Result]) -> Future[Result]:
        """Start `work` once the home device has computed what was given to it so far."""
        ready = _reached(torch.cuda.current_stream(self.home))

        def after() -> Result:
            ready.synchronize()
            return work()

        return super().begin(after)

    @contextmanager
    def current(self) -> Iterator[None]:
        """This card is current, since kernels look at the current device; both cards have the worker's streams."""
        with torch.cuda.stream(self._home_stream), torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            yield

    def send(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        made = []
        for tensor in tensors:
            with torch.cuda.device(self.home):
                source = tensor.contiguous()
            tensor.record_stream(self._home_stream)
            target = torch.empty(source.shape, dtype=source.dtype, device=self.device)
            self._copy(source, target, self._home_stream, self._stream)
            made.append(target)
        self._stream.synchronize()
        self._home_stream.synchronize()
        return made

    def bring(self, source: torch.Tensor, target: torch.Tensor) -> None:
        with torch.cuda.device(self.home):
            here = target if target.is_contiguous() else torch.empty(target.shape, dtype=target.dtype, device=self.home)
            self._copy(source.contiguous(), here, self._stream, self._home_stream)
            if here is not target:
                target.copy_(here)
        target.record_stream(self._home_stream)
        self._home_stream.synchronize()

    def settle(self) -> None:
        self._stream.synchronize()

    def release(self) -> None:
        self._buffers = []

    def _copy(
        self, source: torch.Tensor, target: torch.Tensor, leaving: torch.cuda.Stream, arriving: torch.cuda.Stream
    ) -> None:
        """Copy contiguous tensors; `leaving` and `arriving`: streams of the device of each."""
        arriving.wait_event(_reached(leaving))
        if self.has_peer_access:
            target.copy_(source, non_blocking=True)  # torch orders it after both devices' current streams
            return
        if not self._buffers:
            self._buffers = [torch.empty(CHUNK, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        free: list[torch.cuda.Event | None] = [None, None]
        from_bytes, to_bytes = source.view(-1).view(torch.uint8), target.view(-1).view(torch.uint8)
        for number, at in enumerate(range(0, from_bytes.numel(), CHUNK)):
            part, half = from_bytes[at : at + CHUNK], number % 2
            buffer, before = self._buffers[half][: part.numel()], free[half]
            if before is not None:
                leaving.wait_event(before)
            with torch.cuda.stream(leaving):
                buffer.copy_(part, non_blocking=True)
            arriving.wait_event(_reached(leaving))
            with torch.cuda.stream(arriving):
                to_bytes[at : at + CHUNK].copy_(buffer, non_blocking=True)
            free[half] = _reached(arriving)
        for last in free:  # the next copy reuses the buffers; before one the other way, both streams are synchronised
            if last is not None:
                leaving.wait_event(last)


def _reached(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """An event after everything that the stream was given so far."""
    event: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(stream)
    return event


def transports(home: torch.device, devices: Sequence[torch.device]) -> list[Transport]:
    """One for each device but the home card."""
    return [CudaTransport(home, device) for device in devices if device != home]
