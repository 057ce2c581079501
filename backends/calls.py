"""One call of the library's `attention`: from what is in force around it to a plan, its kernel, and back.

What is in force is in `context.py`. A thread keeps a session for each set of configurations, and in it the plans.
"""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import TYPE_CHECKING

from .config import AttentionConfig
from .config.names import COMFY
from .config.text import parse_config
from .context import KEPT, Book, CallSession, Stack, current
from .engine.call_checks import CheckError, check
from .engine.router import Router
from .kernels import BACKENDS
from .kernels.comfy import Comfy
from .kernels.registry import detect
from .report import RunReport
from .values.masks import as_4d, for_kernels
from .values.platform import Platform
from .values.request import AttentionCall, LseCall

if TYPE_CHECKING:
    import torch

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


def run_attention(
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
    return_lse: bool,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`attention` outside any graph; the path of every call."""
    if backend is not None and not isinstance(backend, (str, AttentionConfig)):
        backend = parse_config(backend, "attention(backend)")  # hashable, unlike a mapping
    stack = current()
    book = stack.account.book() if stack.account is not None else _own_book()
    try:
        session_key = (stack.asked, query.device, backend)
        mask_facts = None if attn_mask is None else (attn_mask.dtype, attn_mask.shape, attn_mask.stride())
        # Everything that can change a decision; shapes stand for the layout's sizes.
        sizes = (query.shape, key.shape, value.shape, query.dtype)
    except AttributeError:
        _only_tensors(query, key, value, attn_mask)
        raise
    plan_key: tuple[object, ...] = (role, layout, sizes, mask_facts, is_causal, scale, enable_gqa)
    if return_lse:
        plan_key = (*plan_key, "lse")
    session = book.sessions.get(session_key)
    if session is None:
        _only_tensors(query)
        session = book.sessions[session_key] = _session(stack, query.device, backend, book)
    known = session.plans.get(plan_key)
    if known is None:
        _understood(query, key, value, attn_mask, layout)
    if layout == "BSHD":
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if attn_mask is not None and attn_mask.ndim != 4:
        attn_mask = as_4d(attn_mask)
    call = (LseCall if return_lse else AttentionCall)(query, key, value, attn_mask, is_causal, scale, enable_gqa)
    if session.check_calls:
        check(call)
    if attn_mask is not None:
        call.attn_mask = for_kernels(attn_mask, query.dtype)
    if known is None:
        check(call, only_shapes=True)
        known = session.keep(plan_key, call.request(lse=return_lse), role, category_of(role), query.device.type)
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
    if layout == "BSHD":
        output = output.transpose(1, 2)
    if return_lse and isinstance(call, LseCall):
        return output, call.lse
    return output


_thread = threading.local()


def _own_book() -> Book:
    """This thread's book: sessions are not shared between threads."""
    try:
        book: Book = _thread.book
    except AttributeError:
        book = _thread.book = Book(RunReport(mode="off"))  # which nobody reads
    return book


def _session(stack: Stack, device: torch.device, backend: str | AttentionConfig | None, book: Book) -> CallSession:
    layers = stack.asked.layers
    if backend is not None and not stack.asked.forced:
        layers = (parse_config(backend, "attention(backend)"), *layers)
    if len(book.sessions) >= KEPT:
        book.sessions.clear()
    book.run_report.device = device.type
    return CallSession(router_for(device), stack.asked, layers, book.run_report)


def _understood(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, layout: str
) -> None:
    """Refuse what would be read in another way than it was meant; asked once for each kind of call."""
    _only_tensors(query, key, value, mask)
    if layout not in LAYOUTS:
        raise CheckError(f"layout {layout!r} is not one of {', '.join(LAYOUTS)}")
    shapes = [tuple(tensor.shape) for tensor in (query, key, value)]
    if any(len(shape) != 4 for shape in shapes):
        raise CheckError(f"query, key and value {shapes} must have 4 dimensions each, in the order {layout}")
    if mask is None:
        return
    if mask.ndim == 3:
        raise CheckError(
            f"attn_mask {tuple(mask.shape)} could be by head or by sample; give it 4 dimensions, with 1 for the missing"
        )
    if not 1 <= mask.ndim <= 4:
        raise CheckError(f"attn_mask {tuple(mask.shape)} must have 1, 2 or 4 dimensions")
    if mask.is_complex():
        raise CheckError(f"attn_mask of dtype {mask.dtype} is neither boolean nor a number that is added to scores")


def _only_tensors(*given: object) -> None:
    import torch

    for one in given:
        if one is not None and not isinstance(one, torch.Tensor):
            kind = f"{type(one).__module__}.{type(one).__name__}"
            raise CheckError(f"attention takes torch tensors, not {kind}; torch.as_tensor makes one of an array")
