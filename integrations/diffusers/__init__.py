"""Routes the attention calls of chosen Diffusers models through `backends/`.

    from attention_backends.integrations.diffusers import apply, reset

    applied = apply(pipe, "sage_attn")
    pipe("a cat")
    print(applied.summary())
    reset(pipe)

Nothing of Diffusers is patched, and none of its modules is imported here: each attention module of a chosen model gets
a stand-in (`stand_ins.py`), which `reset` removes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .api import Applied, apply, attention_backend, report, reset

__all__ = ["Applied", "apply", "attention_backend", "report", "reset"]


def __getattr__(name: str) -> object:
    """Import public names on access."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import api

    return getattr(api, name)
