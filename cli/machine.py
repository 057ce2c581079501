"""The machine that a command is about: this one, or one that is described."""

from __future__ import annotations

import contextlib
import sys

from ..backends.doctor.doctor import this_machine
from ..backends.values.platform import Platform, parse_platform

EXAMPLE_PLATFORM = "cuda:12.0,cudnn=91002,packages=flashinfer-python==0.7.2;flash-attn==2.8.3"


def platform_of(described: str | None) -> Platform:
    """The described platform, else this one.

    Raises:
        ValueError: the description is wrong, or this machine has no torch.
    """
    if described is not None:
        return parse_platform(described)
    with contextlib.redirect_stdout(sys.stderr):
        platform, without_torch = this_machine()
    if without_torch is not None:
        raise ValueError(f"this machine cannot be asked ({without_torch}); describe one with --platform")
    return platform
