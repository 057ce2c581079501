"""The library as functions: attention for any program, on the backend that a `with` block, the environment or the
machine's route chooses.

    from attention_backends.backends import attention, attention_backend

    with attention_backend("cudnn_attn", strict=True):
        output = attention(query, key, value)

A call asks, highest first: `force_backend`, the `backend` argument, the blocks around it from the inside out, the
environment variables, the platform's route. Importing this module imports no torch; the first call does. What becomes
of one call is in `calls.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, overload

from .calls import router_for, run_attention
from .config import AttentionConfig
from .config.layers import settings_of
from .config.names import AUTO, AUTOTUNE
from .config.text import parse_config
from .context import Block, add_up, current, entered, read_environment
from .engine.call_checks import CheckError
from .report import RunReport
from .values.errors import ConfigError, NoBackendError

if TYPE_CHECKING:
    import torch

__all__ = [
    "CheckError",
    "account",
    "attention",
    "attention_backend",
    "checks",
    "force_backend",
    "read_environment",
]


@overload
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    backend: object = None,
    role: str = "self",
    layout: str = "BHSD",
    return_lse: Literal[False] = False,
) -> torch.Tensor: ...


@overload
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    backend: object = None,
    role: str = "self",
    layout: str = "BHSD",
    return_lse: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    backend: object = None,
    role: str = "self",
    layout: str = "BHSD",
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Scaled dot-product attention on the backend that is in force here.

    Args:
        query: (batch, num_heads, q_len, head_dim), or with layout BSHD (batch, q_len, num_heads, head_dim).
        key, value: the same with num_kv_heads and kv_len; all on one device, in one dtype.
        attn_mask: (batch, num_heads, q_len, kv_len) with 1 where it is the same for all, or (q_len or 1, kv_len), or
            (kv_len,); boolean (True: visible), or numbers that are added to the scores, integers among them. Together
            with `is_causal` only `reference` takes one.
        scale: what scores are multiplied by; None stands for head_dim ** -0.5.
        enable_gqa: several query heads share one key head.
        backend: for this call, in place of what blocks around it say: a name, or a configuration in any form that
            `config.text.parse_config` reads; nothing overrides `force_backend`.
        role: which attention of a model it is: `self`, `cross`, `joint`, or a dotted name such as
            `ltx2.audio_to_video`; per-role entries are found by it.

        return_lse: the log-sum-exp of each row's scores too, from a backend that gives it. The mask is then handed over
            as it is.

    Returns:
        A tensor like `query`, in the same layout, with the head size of `value`. With `return_lse` a pair: that, and
        the log-sum-exp, natural logarithm, float32, (batch, num_heads, q_len) in either layout, -inf for a row without
        a visible key; scale and mask are in it, and it has no gradient. `engine/merge.py` joins such pairs.

    Raises:
        NoBackendError: a backend was asked for strictly and cannot run this call, or every backend failed.
        CheckError: the layout is unknown or the shapes do not fit together; with checks on, also types, devices or the
            mask.

    A mask that only hides keys is honoured with fewer keys where it is read: on the CPU at every call; on an
    accelerator, where reading waits for the device, only for a backend that was named, refuses the mask and takes the
    call without it. Elsewhere the mask is handed over as it is.

    Under `torch.compile` the call is left out of the graph: what is in force may differ when the graph runs.
    """
    import torch

    run: Callable[..., torch.Tensor | tuple[torch.Tensor, torch.Tensor]] = run_attention
    if torch.compiler.is_compiling():
        run = torch.compiler.disable(run_attention)  # type: ignore[no-untyped-call]
    return run(query, key, value, attn_mask, is_causal, scale, enable_gqa, backend, role, layout, return_lse)


@contextmanager
def attention_backend(
    backend: object,
    *,
    strict: bool | None = None,
    accuracy: str | None = None,
    device: torch.device | None = None,
) -> Iterator[None]:
    """Have attention calls inside the block ask for `backend`.

    Blocks nest: the inner one is asked first, and what it says nothing about (a role, strictness) is left to the outer.

    Args:
        backend: a name, or a configuration in any form that `config.text.parse_config` reads.
        strict: an asked-for backend that cannot run raises, instead of falling back; None leaves it as it is.
        accuracy: the least exact class that `auto` may take: exact, quantized or sparse.
        device: where the calls will be, for the check on entering; default: the first accelerator, else the CPU.

    Raises:
        UnknownBackendError, ConfigError: it cannot be understood. Nothing was changed.
        NoBackendError: strict, and a backend of it cannot run on the device. Nothing was changed.
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
    """Have every attention call inside the block run on `backend`, whatever else says, or raise.

    Arguments `backend=`, blocks, per-role entries and the environment count for nothing inside. A force inside a
    force holds until it ends.

    Raises:
        UnknownBackendError, ConfigError: it cannot be understood, or names no backend. Nothing was changed.
        NoBackendError: it cannot run on `device`. Nothing was changed.
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
    """Look over every call inside the block before it runs, or not: in place of what the environment says.

    What is looked at is in `engine/call_checks.py`.
    """
    return entered(Block(checks=on))


@contextmanager
def account() -> Iterator[RunReport]:
    """Keep account of the calls inside the block: which backend ran for each role, how often, and why not another.

    Calls of other threads that run in this context are added when the block ends. Accounts nest. Nothing waits for an
    accelerator: the times of what it has not done by the end of the block come with `RunReport.end_of_run`, which
    waits.
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
