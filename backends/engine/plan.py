"""How calls of one kind run, once that is decided: what a host keeps, and runs later calls of that kind through.

`Plan.compute` is the warm path. Plans are made by a session (`session.py`).
"""

from __future__ import annotations

from time import perf_counter_ns
from typing import TYPE_CHECKING

from ..kernels.backend import Kernel
from ..report import Row
from ..values.faults import check_output_is
from ..values.request import AttentionCall, AttentionRequest
from .router import Decision

if TYPE_CHECKING:
    import torch

    from ..kernels.comfy import HostFunction
    from ..measure.device_clock import DeviceClock


CPU = -1
"""The CPU as the index of a device."""


class Plan:
    """How every call of one kind runs: the kernel, the decision behind it, and the row that counts it."""

    __slots__ = ("clock", "decision", "dtype", "function", "index", "kernel", "request", "row", "shape", "strict")

    def __init__(
        self,
        request: AttentionRequest,
        decision: Decision,
        kernel: Kernel,
        row: Row,
        strict: bool,
        clock: DeviceClock | None = None,
        function: HostFunction | None = None,
    ) -> None:
        self.request = request
        self.decision = decision
        self.kernel = kernel
        self.row = row
        self.strict = strict
        self.clock = clock
        """The host's clock, where the kernel is to be timed with it and does not do so itself."""
        self.function = function
        """What the host's own attention is for these calls, where that is known."""
        import torch

        self.shape = (request.batch, request.num_heads, request.q_len, request.v_head_dim or request.head_dim)
        """Of the output."""
        self.dtype: torch.dtype = getattr(torch, request.dtype)
        self.index: int | None = None
        """Of the device of the calls. A host that lets kernels give the inputs up sets it when it plans."""

    def become(self, other: Plan) -> None:
        """Run later calls of this kind as `other` would."""
        self.decision, self.kernel, self.row, self.clock = other.decision, other.kernel, other.row, other.clock

    def compute(self, call: AttentionCall) -> torch.Tensor:
        """Run the kernel, and time it where `clock` says so.

        Here and not in a function around the kernel, as `timed_kernel` has it: each plan would have its own, and
        fetching those from memory between the operations of a model costs more than a call of one that is shared.

        Raises:
            KernelOutputError: what the kernel returned is not the output of such a call.
        """
        clock = self.clock
        if clock is None:
            output = self.kernel(call)
        else:
            start = perf_counter_ns()
            output = self.kernel(call)
            row = self.row
            row.launches += 1
            if not clock.paused:
                row.nanoseconds += perf_counter_ns() - start
                row.timed += 1
        index = self.index
        try:  # 0.2 us; `device` would be 0.1 more
            if (
                output.shape == self.shape
                and output.dtype is self.dtype
                and (output.is_cpu if index == CPU else output.get_device() == index)
            ):
                return output
        except AttributeError:  # no tensor
            pass
        if call.query is not None:  # a first call, or a host has moved a model within a run
            index = self.index = call.query.get_device()
        check_output_is(output, self.shape, self.dtype, CPU if index is None else index)
        return output
