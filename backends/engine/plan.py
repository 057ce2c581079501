"""How calls of one kind run: an immutable `Plan`, and the `Slot` in which a host keeps it.

`Plan.compute` is the warm path. A session (`session.py`) makes plans, and puts another one into a slot when a kernel
fails or an observer refuses it.
"""

from __future__ import annotations

from time import perf_counter_ns
from typing import TYPE_CHECKING, NamedTuple

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
"""The device index of the CPU."""


class CallKind(NamedTuple):
    """Key of calls that share a plan: their facts, and where in the model they are made."""

    request: AttentionRequest
    role: str
    category: str
    block: str = ""
    mask: str = ""
    """How the mask is honoured, for the run report; empty: only the kind of the mask is reported."""


class Plan:
    """How every call of one kind runs: the decision, its kernel, and the row of the run report that counts it."""

    __slots__ = (
        *("clock", "decision", "device_index", "dtype", "function", "hosted", "kernel", "kind", "row", "shape"),
        "strict",
    )

    def __init__(
        self,
        kind: CallKind,
        decision: Decision,
        kernel: Kernel,
        row: Row,
        strict: bool,
        *,
        clock: DeviceClock | None = None,
        function: HostFunction | None = None,
        hosted: bool = False,
        device_index: int | None = None,
    ) -> None:
        """
        Args:
            clock: times the kernel on the host; None where a wrapper of the kernel does.
            function: the host's own attention function for these calls, where it is known.
            hosted: the kernel is the host's function and takes a `HostedCall`.
            device_index: of the device of the calls; None: read from each call.
        """
        import torch

        request = kind.request
        self.kind = kind
        self.decision = decision
        self.kernel = kernel
        self.row = row
        self.strict = strict
        self.clock = clock
        self.function = function
        self.hosted = hosted
        self.shape = (request.batch, request.num_heads, request.q_len, request.v_head_dim or request.head_dim)
        """Shape of the output, (batch, num_heads, q_len, v_head_dim)."""
        self.dtype: torch.dtype = getattr(torch, request.dtype)
        self.device_index = device_index

    @property
    def request(self) -> AttentionRequest:
        return self.kind.request

    @property
    def is_trial(self) -> bool:
        """True while autotune times several kernels in this slot (`TrialPlan`)."""
        return False

    def compute(self, call: AttentionCall) -> torch.Tensor:
        """Run the kernel, time it if there is a `clock`, and check its output.

        The timing is inlined: a wrapper for each plan (`timed_kernel`) would not stay in the CPU's cache between the
        operations of a model, this shared code does.

        Returns:
            (batch, num_heads, q_len, v_head_dim).

        Raises:
            KernelOutputError: shape, dtype or device of the output is wrong.
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
        index = self.device_index
        try:  # 0.2 us; `device` would be 0.1 more
            if (
                output.shape == self.shape
                and output.dtype is self.dtype
                and (output.is_cpu if index == CPU else output.get_device() == index)
            ):
                return output
        except AttributeError:  # not a tensor
            pass
        if call.query is not None:  # `device_index` is None, or a host has moved a model within a run
            index = call.query.get_device()
        check_output_is(output, self.shape, self.dtype, CPU if index is None else index)
        return output


class Slot:
    """Mutable holder of the plan of one kind of call, or of one plan for each sub-call of its mask."""

    __slots__ = ("plan", "split")

    plan: Plan
    """The plan of the whole call, or of the first sub-call that has keys."""

    def __init__(self, split: SplitPlan | None = None) -> None:
        """`split`: plans of the sub-calls; None: a session sets `plan`."""
        self.split = split
        if split is not None:
            self.plan = next(slot.plan for slot in split.slots if slot is not None)


class SplitPlan:
    """The plans of the sub-calls of one kind of mask."""

    __slots__ = ("as_booleans", "copied", "slots", "varlen")

    def __init__(
        self, slots: tuple[Slot | None, ...], varlen: Slot | None = None, copied: int = 0, as_booleans: bool = False
    ) -> None:
        self.slots = slots
        """One slot for each sub-call of the mask plan; None for a sub-call without keys."""
        self.copied = copied
        """Peak bytes of copies: gathered or packed keys and values, and the output of a sub-call."""
        self.as_booleans = as_booleans
        """True: `MaskPlan.booleans` runs, for a kernel that takes boolean masks only."""
        self.varlen = varlen
        """Slot of one varlen call for all sub-calls; None where the backend has no varlen kernel, or it failed."""
