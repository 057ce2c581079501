"""`comfy`: ComfyUI's own attention function for this call."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..values.aliases import KJNODES, WAN_WRAPPER, Alias
from ..values.limits import Causal, Dtypes, ValueHeadDim
from ..values.platform import KINDS, Platform
from ..values.request import AttentionCall, AttentionRequest, HostedCall
from .backend import FLOATING, Backend, Kernel, Limits

if TYPE_CHECKING:
    import torch


class Comfy(Backend):
    """Exists only inside ComfyUI, which hands over its own function with each call.

    Its accuracy is that of ComfyUI's start-up flags and of the checkpoint's own preference.
    """

    id = "comfy"
    summary = "ComfyUI's own attention function, as its start-up flags and the checkpoint's preference choose it."
    aliases = (Alias(KJNODES, "disabled", "the model's attention stays ComfyUI's"), Alias(WAN_WRAPPER, "comfy"))
    kinds = KINDS
    hosted = True
    candidate = False
    by_name_only = True
    # A causal call is a mask that was read as such; the host has the mask itself.
    remarks = (
        "exact as far as ComfyUI's function is: INT8 after --use-sage-attention, --use-ck-attention or where a "
        "checkpoint asks for it, and guarded then",
    )
    limits = Limits(Dtypes((*FLOATING, "float8_e4m3fn", "float8_e5m2")), Causal("any"), ValueHeadDim(may_differ=True))

    def load(self, platform: Platform) -> Kernel:
        return run_host


class HostFunction(Comfy):
    """One function of ComfyUI's, where it is known: what `comfy` means for the calls of one plan.

    It is in no list of backends: a person selects `comfy`. The run report, the guard and the rule for models that
    forbid low precision use this object.
    """

    def __init__(self, label: str, accuracy: str, name: str) -> None:
        """
        Args:
            label: its name in run reports: the id of the backend that runs the same kernel, else `comfy`.
            accuracy: its accuracy class.
            name: ComfyUI's own name of it.
        """
        self.id = label  # type: ignore[misc]  # an instance per function, not a class
        self.accuracy = accuracy  # type: ignore[misc]
        self.name = name

    @property
    def called(self) -> str:
        """The name to show: the id of the backend of the same kernel, else the function's own name."""
        return self.name if self.id == Comfy.id else self.id

    def may_run(self, request: AttentionRequest) -> bool:
        """False if the model forbids low precision and this function has it."""
        return not request.exact_only or self.accuracy == "exact"

    def kernel_name(self, request: AttentionRequest, platform: Platform) -> str | None:
        """The function's name where it is another kernel than PyTorch's; None else."""
        return None if self.id == Comfy.id else self.id


def run_host(call: AttentionCall) -> torch.Tensor:
    """Run the host's own attention function.

    Raises:
        RuntimeError: the call did not come from ComfyUI.
    """
    if not isinstance(call, HostedCall):
        raise RuntimeError("the backend 'comfy' runs only inside ComfyUI; this call came from elsewhere")
    return call.host(*call.arguments, call)


BACKENDS = (Comfy(),)
