"""ComfyUI's own attention functions: the default one, its accuracy, and the server's start-up flags.

A function is identified by its name in comfy/ldm/modules/attention.py, below any wrapper. An unknown one counts as
exact if it is ComfyUI's default, since pictures without this pack are made with it; if a checkpoint asks for it, it
counts as quantized and the guard checks it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch

from ...backends.config.names import COMFY
from ...backends.kernels import BACKENDS
from ...backends.kernels.comfy import HostFunction

KNOWN = {
    "attention_basic": (COMFY, "exact"),
    "attention_sub_quad": (COMFY, "exact"),
    "attention_split": (COMFY, "exact"),
    "attention_xformers": (COMFY, "exact"),
    "attention_pytorch": (COMFY, "exact"),
    "attention_flash": (COMFY, "exact"),
    "attention_comfy_kitchen_sol": ("comfy_kitchen_sol", "sparse"),
    **{
        backend.comfy_function: (backend.id, backend.accuracy)
        for backend in BACKENDS.values()
        if backend.comfy_function
    },
}
"""Name -> (its name in run reports, its accuracy)."""
READS_BOOLEANS_WRONG = ("attention_basic", "attention_split", "attention_sub_quad", "attention_xformers")
"""They add boolean masks, or read them as weights; SDPA and the packages' kernels read them as torch does."""


def name_of_function(func: Any) -> str:
    """A function's own name, whatever `partial` or wrapper is around it."""
    while isinstance(func, partial):
        func = func.func
    return getattr(func, "__qualname__", None) or type(func).__qualname__


@lru_cache(maxsize=64)
def _known(name: str, preferred: bool) -> HostFunction:
    label, accuracy = KNOWN.get(name, (COMFY, "quantized" if preferred else "exact"))
    return HostFunction(label, accuracy, name)


def host_function(func: Any, *, preferred: bool = False) -> HostFunction:
    """What one of ComfyUI's functions is: its default, or one that a checkpoint asks for."""
    return _known(name_of_function(func), preferred)


def reads_booleans(func: Any) -> bool:
    """Whether a function is known to read boolean masks as torch does."""
    name = name_of_function(func)
    return name in KNOWN and name not in READS_BOOLEANS_WRONG


def forces_upcast(attn_precision: torch.dtype | None, dtype: torch.dtype) -> bool:
    """Whether scores are to be computed in float32 though the tensors are not.

    The model says so, or the server was started with --force-upcast-attention; --dont-upcast-attention forbids it.
    """
    if dtype == torch.float32:
        return False
    try:
        from comfy.ldm.modules.attention import get_attn_precision
    except ImportError:  # without ComfyUI
        return attn_precision == torch.float32
    return bool(get_attn_precision(attn_precision, dtype) == torch.float32)


class Started(NamedTuple):
    """The attention function that a ComfyUI server uses by default."""

    function: HostFunction
    flag: str
    """The command line flag that chose it; empty where none did."""

    @property
    def is_exact(self) -> bool:
        """Whether it differs from PyTorch's attention by rounding only."""
        return self.function.accuracy == "exact"

    def describe(self) -> str:
        """In words, e.g. `sage_attn (attention_sage, --use-sage-attention)`."""
        name = self.function.id if self.function.id != COMFY else self.function.name.removeprefix("attention_")
        return f"{name} ({', '.join(filter(None, (self.function.name, self.flag)))})"

    def changed_by_auto(self) -> str:
        """What `auto` with accuracy exact changes on this server, and how to keep it; empty for nothing."""
        if self.is_exact:
            return ""
        accuracy = self.function.accuracy
        return (
            f"ComfyUI's own attention on this server is {self.describe()}, which is {accuracy}: auto with accuracy "
            f"exact runs exactly instead, which may be slower; choose comfy to keep it, or allow {accuracy}"
        )


FLAGS = (
    "use_sage_attention",
    "use_flash_attention",
    "use_ck_attention",
    "use_split_cross_attention",
    "use_quad_cross_attention",
    "use_pytorch_cross_attention",
)
"""ComfyUI's arguments that choose its attention function; each excludes the others."""


def started_with() -> Started:
    """This server's default now: another pack may have replaced the function since the start.

    Raises:
        ImportError: there is no ComfyUI in this process.
    """
    from comfy.cli_args import args
    from comfy.ldm.modules.attention import optimized_attention

    flag = next((name for name in FLAGS if getattr(args, name, False)), "")
    return Started(host_function(optimized_attention), flag and f"--{flag.replace('_', '-')}")


def changed_by_auto(func: Callable[..., Any]) -> str:
    """As `Started.changed_by_auto`, of the function that ComfyUI would have run for a call."""
    function = host_function(func)
    if function.accuracy == "exact":
        return ""
    try:
        flag = started_with().flag
    except ImportError:
        flag = ""
    return Started(function, flag).changed_by_auto()
