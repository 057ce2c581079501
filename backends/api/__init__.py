"""The Python API: attention for any program, on the backend that a `with` block, the environment or the platform's
priorities select.

    from attention_backends.backends import attention, attention_backend

    with attention_backend("cudnn_attn", strict=True):
        output = attention(query, key, value)

Precedence, highest first: `force_backend`, the `backend` argument, the blocks around the call from the inside out, the
environment variables, the platform's priorities. Importing this module does not import torch. `calls.py` runs a call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from ..config import AttentionConfig
from ..config.layers import settings_of
from ..config.names import AUTO, AUTOTUNE
from ..config.text import parse_config
from ..engine.call_checks import CheckError
from ..engine.routers import router_for
from ..report import RunReport
from ..values.errors import ConfigError, GroupError, NoBackendError
from .calls import attention
from .context import Block, add_up, current, entered, read_environment

if TYPE_CHECKING:
    import torch

__all__ = [
    "CheckError",
    "GroupError",
    "account",
    "attention",
    "attention_backend",
    "checks",
    "force_backend",
    "read_environment",
]


@contextmanager
def attention_backend(
    backend: object,
    *,
    strict: bool | None = None,
    accuracy: str | None = None,
    device: torch.device | None = None,
) -> Iterator[None]:
    """Configure attention calls inside the block.

    Blocks nest: the inner one has precedence; what it does not set (a role, strictness) comes from the outer one.

    Args:
        backend: a name, or a configuration in any form that `config.text.parse_config` reads.
        strict: raise if the named backend cannot run, instead of falling back; None: unset.
        accuracy: the least exact class that `auto` may pick: exact, quantized or sparse.
        device: of the calls, for the check on entry; default: the first accelerator, else the CPU.

    Raises:
        UnknownBackendError, ConfigError: invalid; nothing was changed.
        NoBackendError: strict, and a backend of it cannot run on the device; nothing was changed.
    """
    config = parse_config(backend, "attention_backend")
    given = {name: value for name, value in (("strict", strict), ("accuracy", accuracy)) if value is not None}
    if given:
        config = replace(config, **given)  # type: ignore[arg-type]  # each value has its field's type
    _must_be_available(config, (config, *current().layers), device)
    with entered(Block(config)):
        yield


@contextmanager
def force_backend(backend: object, *, device: torch.device | None = None) -> Iterator[None]:
    """Run every attention call inside the block on `backend`, or raise.

    Overrides `backend=`, other blocks, per-role entries and the environment. The innermost `force_backend` wins.

    Raises:
        UnknownBackendError, ConfigError: invalid, or names no backend; nothing was changed.
        NoBackendError: it cannot run on `device`; nothing was changed.
    """
    config = replace(parse_config(backend, "force_backend"), strict=True)
    if config.default.backend in (AUTO, AUTOTUNE):
        raise ConfigError(
            f"force_backend: {config.default.backend} forces nothing; name a backend, or use attention_backend"
        )
    _must_be_available(config, (config,), device)
    with entered(Block(config, forced=True)):
        yield


def checks(on: bool = True) -> AbstractContextManager[None]:
    """Validate every call inside the block, or not, above the environment variable (`engine/call_checks.py`)."""
    return entered(Block(checks=on))


@contextmanager
def account() -> Iterator[RunReport]:
    """A run report of the calls inside the block: backend, calls and reasons for each role.

    Calls of other threads in this context are added when the block ends. Blocks nest. Leaving the block does not
    synchronise: `RunReport.end_of_run` does, and adds pending times.
    """
    outer = current().reporting
    block = Block(reports=True)
    try:
        with entered(block):
            yield block.run_report
    finally:
        block.collect()
        if outer is not None:
            add_up(outer.of_thread().run_report, block.run_report)


def _must_be_available(
    config: AttentionConfig, layers: tuple[AttentionConfig, ...], device: torch.device | None
) -> None:
    """Raise where these layers are strict and a backend that `config` names cannot run on the device."""
    if not settings_of(layers).strict:
        return
    router = router_for(device)
    named = {spec.backend for spec in (config.default, *config.per_role.values())} - {AUTO, AUTOTUNE}
    refused = [f"  {name}: {'; '.join(reasons)}" for name in sorted(named) if (reasons := router.unavailable(name))]
    if refused:
        able = [name for name, known in router.backends.items() if known.accuracy == "exact"]
        able = [name for name in able if not router.unavailable(name)]
        raise NoBackendError(
            "\n".join(
                [
                    f"{config.source}: asked for strictly, and it cannot run here",
                    f"  machine: {router.platform.describe()}",
                    *refused,
                    f"  what to do: choose one that can run ({', '.join(able)}), or leave strict off to fall back",
                ]
            )
        )
