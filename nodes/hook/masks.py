"""The mask plans of one model call: each source mask is read once, and nothing is kept after the call.

ComfyUI samples under inference_mode, where a tensor has no version to tell that it was written to. So a plan is kept
under the mask's memory for one model call, and the mask with it, so that its memory is not reused for another one; and
only if no other pack's code runs between the blocks (`foreign_code.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ...backends.engine.mask_reader import inspect
from ...backends.values.faults import is_cuda_fault
from ...backends.values.mask_plan import MaskPlan, passed_on
from ...backends.values.masks import as_4d

if TYPE_CHECKING:
    from .run import Run

MOST_READ = 4
"""Masks read in one model call on an accelerator, where reading one waits for the device."""

MADE_ANEW = "this model makes its masks again in every block: they are passed to kernels unchanged"
COMPILED = "the model is compiled: its masks are passed to kernels unchanged"
COMPOSED = "another pack's override may change masks: they are passed to kernels unchanged"
PATCHED = "another pack's patch may change masks: they are passed to kernels unchanged"
FOREIGN = "another pack's code runs in this model and may change masks, so they are passed to kernels unchanged: {}"
OUTSIDE = "attention outside a model call: its masks are passed to kernels unchanged"
UNREAD = "a mask could not be read and is passed on unchanged"


class Masks:
    """The plans of the model call that is running."""

    __slots__ = ("_ask", "_plans", "_run", "not_kept")

    def __init__(self, run: Run, ask: Callable[[], str] | None = None) -> None:
        """`ask` returns why no plan may be kept in this model call; None outside one. Called at the first mask."""
        self._run = run
        self._ask = ask
        self._plans: dict[tuple[Any, ...], tuple[torch.Tensor, MaskPlan]] = {}
        self.not_kept: str | None = OUTSIDE if ask is None else None
        """Why no plan may be kept; empty if no other pack's code can change masks in this model call.

        A kept plan holds a reference to its mask and relies on its values. None until the first mask, since the check
        looks at every module.
        """

    def plan(self, mask: torch.Tensor, source: torch.Tensor | None, kv_len: int) -> MaskPlan:
        """The plan of a mask in one of ComfyUI's shapes, read now or earlier in this model call.

        Args:
            source: the tensor that the model makes this mask from in every block, or None; equal sources mean
                equal masks.
        """
        if self.not_kept is None:
            self.not_kept = "" if self._ask is None else self._ask()
        if self.not_kept:
            return self._plan_anew(mask, kv_len, self.not_kept)
        source_mask = mask if source is None else source
        # The tensor's version, where torch counts writes in place.
        version = 0 if source_mask.is_inference() else source_mask._version
        key: tuple[Any, ...] = (mask.shape, mask.stride(), mask.dtype, kv_len, version, source_mask.data_ptr())
        if source is not None:
            key = (*key, source.shape, source.stride(), source.dtype)
        found = self._plans.get(key)
        if found is None:
            if mask.device.type != "cpu" and len(self._plans) >= MOST_READ:
                self._run.note(MADE_ANEW)
                return passed_on(as_4d(mask))
            found = self._plans[key] = (source_mask, self._read(mask, kv_len))
        return found[1]

    def _plan_anew(self, mask: torch.Tensor, kv_len: int, reason: str) -> MaskPlan:
        """Read a mask again: cheap on the CPU; on an accelerator each reading waits for the device."""
        if mask.device.type == "cpu":
            return self._read(mask, kv_len)
        self._run.note(reason)
        return passed_on(as_4d(mask))

    def _read(self, mask: torch.Tensor, kv_len: int) -> MaskPlan:
        try:
            return inspect(as_4d(mask), kv_len, self._run.asks_for_sparse)
        except RuntimeError as error:
            if is_cuda_fault(error):  # an earlier kernel's: reading waits for the device, so it shows here
                raise
            # An operation that this device lacks, or too little memory to read it: the kernel may still have enough.
            self._run.note(f"{UNREAD}: {str(error).splitlines()[0]}")
            return passed_on(as_4d(mask))
