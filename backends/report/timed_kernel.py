"""Wraps a kernel so that its calls and device time are added to a row of the run report."""

from __future__ import annotations

from time import perf_counter_ns
from typing import TYPE_CHECKING

from ..kernels.backend import Kernel
from ..measure.device_clock import DeviceClock
from ..values.request import AttentionCall

if TYPE_CHECKING:
    import torch

    from . import Row


def timed_kernel(kernel: Kernel, clock: DeviceClock, row: Row) -> Kernel:
    """The kernel, which adds to `row.launches`, and for timed calls to `timed` and `nanoseconds`."""
    return _by_events(kernel, clock, row) if clock.has_events else _by_the_host(kernel, clock, row)


def _by_events(kernel: Kernel, clock: DeviceClock, row: Row) -> Kernel:
    start, stop, add_time = clock.start, clock.stop, row.add_time

    def run(call: AttentionCall) -> torch.Tensor:
        token = start(call.query.device)
        output = kernel(call)
        row.launches += 1
        stop(token, add_time)
        return output

    return run


def _by_the_host(kernel: Kernel, clock: DeviceClock, row: Row) -> Kernel:
    """As `_by_events`, for a clock that delivers at once; inlined, since calls on the CPU can be short."""

    def run(call: AttentionCall) -> torch.Tensor:
        start = perf_counter_ns()
        output = kernel(call)
        row.launches += 1
        if not clock.paused:
            row.nanoseconds += perf_counter_ns() - start
            row.timed += 1
        return output

    return run
