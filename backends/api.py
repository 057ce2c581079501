"""The library as functions: attention for any program, on the backend that a `with` block, the environment or the
machine's route chooses.

    from attention_backends.backends import attention, attention_backend

    with attention_backend("cudnn_attn", strict=True):
        output = attention(query, key, value)

A call asks, highest first: `force_backend`, the `backend` argument, the blocks around it from the inside out, the
environment variables, the platform's route. Importing this module imports no torch; the first call does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

from .call_checks import CheckError, check
from .config import AttentionConfig, ConfigError, settings_of
from .config.text import parse_config
from .kernels import BACKENDS
from .kernels.comfy import Comfy
from .mask import as_4d
from .names import AUTO, COMFY, MEASURED
from .platform import Platform, detect
from .request import AttentionCall
from .router import NoBackendError, Router
from .scopes import KEPT, Account, Book, CallSession, Entry, Stack, add_up, current, entered, read_environment
from .trace import Trace

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

LAYOUTS = ("BHSD", "BSHD")
CATEGORIES = ("self", "cross", "joint")


class _Outside(Comfy):
    """What ComfyUI would have run: there is none where nobody hands a call over."""

    def unavailable_reasons(self, platform: Platform) -> list[str]:
        return ["runs only inside ComfyUI, which hands over its own function with each call"]


def router_for(device: torch.device | None = None) -> Router:
    """The router of a device (default: the first accelerator, else the CPU), kept for the life of the process.

    Another one where a library has switched cuDNN's attention off or on since.
    """
    return _router(detect(device))


@lru_cache(maxsize=16)
def _router(platform: Platform) -> Router:
    return Router(platform, {**BACKENDS, COMFY: _Outside()})


def category_of(role: str) -> str:
    """The category that a role's name suggests; only a model's own table knows it."""
    if role in CATEGORIES:
        return role
    if role.endswith((".single", ".double")):  # FLUX, HunyuanVideo: text and picture together
        return "joint"
    return "cross" if "cross" in role or "_to_" in role else "self"


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
) -> torch.Tensor:
    """Scaled dot-product attention on the backend that is in force here.

    Args:
        query: (batch, num_heads, q_len, head_dim), or with layout BSHD (batch, q_len, num_heads, head_dim).
        key, value: the same with num_kv_heads and kv_len; all on one device, in one dtype.
        attn_mask: (batch, num_heads, q_len, kv_len) with 1 where it is the same for all, or (q_len or 1, kv_len);
            boolean (True: visible) or added to the scores.
        scale: what scores are multiplied by; None stands for head_dim ** -0.5.
        enable_gqa: several query heads share one key head.
        backend: for this call, in place of what blocks around it say: a name, or a configuration in any form that
            `config_text.parse_config` reads; nothing overrides `force_backend`.
        role: which attention of a model it is: `self`, `cross`, `joint`, or a dotted name such as
            `ltx2.audio_to_video`; per-role entries are found by it.

    Returns:
        A tensor like `query`, in the same layout, with the head size of `value`.

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

    run: Callable[..., torch.Tensor] = _attention
    if torch.compiler.is_compiling():
        run = torch.compiler.disable(_attention)  # type: ignore[no-untyped-call]
    return run(query, key, value, attn_mask, is_causal, scale, enable_gqa, backend, role, layout)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    backend: object,
    role: str,
    layout: str,
) -> torch.Tensor:
    """`attention` outside any graph; the path of every call."""
    if backend is not None and not isinstance(backend, (str, AttentionConfig)):
        backend = parse_config(backend, "attention(backend)")  # hashable, unlike a mapping
    stack = current()
    book = stack.account.book() if stack.account is not None else _own_book()
    session_key = (stack.asked, query.device, backend)
    session = book.sessions.get(session_key)
    if session is None:
        session = book.sessions[session_key] = _session(stack, query.device, backend, book)
    mask_facts = None if attn_mask is None else (attn_mask.dtype, attn_mask.shape, attn_mask.stride())
    # Everything that can change a decision; shapes stand for the layout's sizes.
    sizes = (query.shape, key.shape, value.shape, query.dtype)
    plan_key = (role, layout, sizes, mask_facts, is_causal, scale, enable_gqa)
    known = session.plans.get(plan_key)
    if known is None:
        _understood(query, key, value, attn_mask, layout)
    if layout == "BSHD":
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if attn_mask is not None and attn_mask.ndim != 4:
        attn_mask = as_4d(attn_mask)
    call = AttentionCall(query, key, value, attn_mask, is_causal, scale, enable_gqa)
    if session.check_calls:
        check(call)
    if known is None:
        check(call, only_shapes=True)
        known = session.keep(plan_key, call.request(), role, category_of(role), query.device.type)
    plan, call.enable_gqa = known  # kernels are told of grouping only where there is some
    try:
        if plan is not None:
            output = session.run(plan, call)
        else:
            output = session.run_read(plan_key, call, role, category_of(role))
    except Exception:
        # Either strict, or every backend failed, and then it is the tensors: neither says anything about later calls.
        book.sessions.pop(session_key, None)
        raise
    return output.transpose(1, 2) if layout == "BSHD" else output


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
        backend: a name, or a configuration in any form that `config_text.parse_config` reads.
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
    _must_be_available(config, (config, *current().asked.layers), device)
    with entered(Entry(config)):
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
    if config.default.backend in (AUTO, MEASURED):
        raise ConfigError(
            f"force_backend: {config.default.backend} forces nothing; name a backend, or use attention_backend"
        )
    _must_be_available(config, (config,), device)
    with entered(Entry(config, forced=True)):
        yield


def checks(on: bool = True) -> AbstractContextManager[None]:
    """Look over every call inside the block before it runs, or not: in place of what the environment says.

    What is looked at is in `call_checks.py`.
    """
    return entered(Entry(checks=on))


@contextmanager
def account() -> Iterator[Trace]:
    """Keep account of the calls inside the block: which backend ran for each role, how often, and why not another.

    Calls of other threads that run in this context are added when the block ends. Accounts nest. Nothing waits for an
    accelerator: the times of what it has not done by the end of the block come with `Trace.end_of_run`, which waits.
    """
    before = current().account
    entry = Entry(account=(kept := Account()))
    try:
        with entered(entry):
            yield kept.trace
    finally:
        kept.close()
        if before is not None:
            add_up(before.book().trace, kept.trace)


_thread = threading.local()


def _own_book() -> Book:
    """This thread's book: sessions are not shared between threads."""
    try:
        book: Book = _thread.book
    except AttributeError:
        book = _thread.book = Book(Trace(mode="off"))  # which nobody reads
    return book


def _session(stack: Stack, device: torch.device, backend: str | AttentionConfig | None, book: Book) -> CallSession:
    layers = stack.asked.layers
    if backend is not None and not stack.asked.forced:
        layers = (parse_config(backend, "attention(backend)"), *layers)
    if len(book.sessions) >= KEPT:
        book.sessions.clear()
    book.trace.device = device.type
    return CallSession(router_for(device), stack.asked, layers, book.trace)


def _understood(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, layout: str
) -> None:
    """Refuse what would be read in another way than it was meant; asked once for each kind of call."""
    if layout not in LAYOUTS:
        raise CheckError(f"layout {layout!r} is not one of {', '.join(LAYOUTS)}")
    shapes = [tuple(tensor.shape) for tensor in (query, key, value)]
    if any(len(shape) != 4 for shape in shapes):
        raise CheckError(f"query, key and value {shapes} must have 4 dimensions each, in the order {layout}")
    if mask is not None and mask.ndim not in (2, 4):
        raise CheckError(
            f"attn_mask {tuple(mask.shape)} could be by head or by sample; give it 4 dimensions, with 1 for the missing"
        )


def _must_be_available(
    config: AttentionConfig, layers: tuple[AttentionConfig, ...], device: torch.device | None
) -> None:
    """Raise where these layers are strict and a backend that `config` names cannot run on the device."""
    if not settings_of(layers).strict:
        return
    router = router_for(device)
    named = {spec.backend for spec in (config.default, *config.per_role.values())} - {AUTO, MEASURED}
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
