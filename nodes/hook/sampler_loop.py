"""The sampler's step from the sampler's own loop, found on the call stack of a model call.

Sigmas alone cannot tell the step of each model call. Heun's method calls the model at the next sigma inside a step, and
the next step begins at that same sigma. The samplers of ComfyUI, and those written after them, count their steps in a
local variable `i` beside the sigmas, and call the model from inside that loop. That count is read here, once per
evaluation of the model, without reading anything from a device. Where no such loop is found, the caller goes by sigma
(`backends/schedule`).

Boundary: frames of Python; it knows no sampler by name.
"""

from __future__ import annotations

import sys
from types import CodeType, FrameType
from typing import Any

COUNTER, SIGMAS = "i", "sigmas"
"""Local variables of a sampler's loop: the step, from 0, and the sampler's sigmas, one more than it has steps."""


def loop_step(outside: CodeType, count: int) -> int | None:
    """The step that the sampler around this call is in; None where its loop is not found on this thread's stack.

    Args:
        outside: code of the function around the whole sampling run; frames outside of it are not looked at.
        count: how many steps the sampler has.
    """
    found = None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not outside:
        code = frame.f_code
        names = code.co_varnames + code.co_cellvars
        if COUNTER in names and SIGMAS in names:
            step = _counted(frame.f_locals, count)
            found = found if step is None else step  # the outermost: loops inside a step count something else
        frame = frame.f_back
    return found if frame is not None else None


def _counted(values: dict[str, Any], count: int) -> int | None:
    step, sigmas = values.get(COUNTER), values.get(SIGMAS)
    if type(step) is not int or not 0 <= step < count:
        return None
    try:
        return step if len(sigmas) == count + 1 else None  # type: ignore[arg-type]  # caught
    except TypeError:
        return None
