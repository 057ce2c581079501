"""A worker thread for another device, and the copies between it and the home device.

`Transport` itself runs a second worker on a device that the tensors are on already, such as the CPU: nothing is copied.
`cuda_transport.py` has the one for cards; tests inject others, with a bandwidth and a latency.

A worker makes each step of a part in turn and waits for it (`send`, the kernel, `settle`, `bring`), so an error of the
device is raised in that call, and nothing of it is pending when it ends. Meanwhile the caller's thread computes the
home part. For calls where dividing pays, that wait of tens of microseconds is small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, TypeVar

from .cost import Link, Points

if TYPE_CHECKING:
    import torch

Result = TypeVar("Result")

SIZES = (3 << 16, 3 << 20, 3 << 24)
"""Bytes of the copies by which a link is measured: 192 KiB, 3 MiB and 48 MiB."""
REPEATS = 3


class Transport:
    """Another device of this process. `begin` and `end` are called by the thread that makes the attention call, the
    other methods by the worker."""

    def __init__(self, name: str, device: torch.device) -> None:
        """`name`: for reports, such as `cuda:1`."""
        self.name = name
        self.device = device
        self._link: Link | None = None
        self._workers = ThreadPoolExecutor(1, thread_name_prefix=f"attention on {name}")

    def begin(self, work: Callable[[], Result]) -> Future[Result]:
        """Start `work` in the worker thread, in the caller's inference mode and without gradients."""
        import torch

        inference = torch.is_inference_mode_enabled()

        def run() -> Result:
            with torch.inference_mode(inference), torch.no_grad(), self.current():
                return work()

        return self._workers.submit(run)

    def end(self, started: Future[Result]) -> Result:
        """Wait for work and return its result.

        Raises:
            Exception: what the work raised.
        """
        return started.result()

    @contextmanager
    def current(self) -> Iterator[None]:
        """The device and its stream as current ones."""
        yield

    def send(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The tensors of the home device, on this one."""
        return list(tensors)

    def bring(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy a result of this device into `target`, a view of a tensor on the home device."""
        target.copy_(source)

    def settle(self) -> None:
        """Wait until this device has done what it was given."""

    def now(self) -> float:
        """Seconds, for differences."""
        return perf_counter()

    def release(self) -> None:
        """Free buffers; the next copy makes new ones."""

    def link(self, like: torch.Tensor) -> Link:
        """The link as measured, once: three tensors there and one back, as a call does.

        Args:
            like: a tensor of the home device.
        """
        if self._link is None:
            self._link = self.end(self.begin(lambda: self._measured(like)))
        return self._link

    def _measured(self, like: torch.Tensor) -> Link:
        there, back = [], []
        for size in SIZES:
            here = [like.new_zeros(size // 3 // like.element_size()) for _ in range(3)]
            target = like.new_empty(size // like.element_size())
            to, fro = [], []
            for _ in range(REPEATS):
                start = self.now()
                sent = self.send(here)
                arrived = self.now()
                source = like.new_zeros(target.shape, device=sent[0].device)
                self.settle()
                returned = self.now()
                self.bring(source, target)
                to.append(arrived - start)
                fro.append(self.now() - returned)
            there.append((size, median(to)))
            back.append((size, median(fro)))
        return Link(Points(there), Points(back))
