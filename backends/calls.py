"""Runs one call of `attention`: resolves its context, plans it once, runs its plan.

`context.py` has the configurations. A thread has one session per set of configurations, which has the plans.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import lru_cache
from operator import index
from typing import TYPE_CHECKING, Literal, overload

from .config import AttentionConfig
from .config.layers import resolve
from .config.names import COMFY
from .config.text import parse_config
from .context import KEPT, Context, ThreadSessions, current
from .engine.call_checks import CheckError, check
from .engine.mask_reader import inspect
from .engine.plan import CPU, CallKind, Slot
from .engine.router import Router
from .engine.session import Session
from .engine.sub_calls import calls_of, plan_sub_calls
from .kernels import BACKENDS
from .kernels.comfy import Comfy
from .kernels.registry import detect
from .observe import observe
from .report import RunReport
from .values.grid import TokenGrid
from .values.mask_plan import MaskPlan, passed_on
from .values.masks import as_4d, for_kernels
from .values.platform import Platform
from .values.reasons import Reason
from .values.request import AttentionCall, LseCall

if TYPE_CHECKING:
    import torch

Grid = tuple[int, int, int]
"""Frames, height and width of the tokens of a call."""

LAYOUTS = ("BHSD", "BSHD")
CATEGORIES = ("self", "cross", "joint")


class _Outside(Comfy):
    """`comfy` is unavailable outside ComfyUI."""

    def unavailable_reasons(self, platform: Platform) -> list[Reason]:
        return [Reason("only_comfyui")]


def router_for(device: torch.device | None = None) -> Router:
    """The router of a device (default: the first accelerator, else the CPU), one per process.

    A new one after a library has switched cuDNN's attention on or off.
    """
    return _router(detect(device))


@lru_cache(maxsize=16)
def _router(platform: Platform) -> Router:
    return Router(platform, {**BACKENDS, COMFY: _Outside()})


def category_of(role: str) -> str:
    """The category of a role, guessed from its name."""
    if role in CATEGORIES:
        return role
    if role.endswith((".single", ".double")):  # FLUX, HunyuanVideo: text and picture together
        return "joint"
    return "cross" if "cross" in role or "_to_" in role else "self"


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
    grid: Grid | None = None,
    tokens_before: int = 0,
    tokens_after: int = 0,
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
    grid: Grid | None = None,
    tokens_before: int = 0,
    tokens_after: int = 0,
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
    grid: Grid | None = None,
    tokens_before: int = 0,
    tokens_after: int = 0,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Scaled dot-product attention on the configured backend.

    Args:
        query: (batch, num_heads, q_len, head_dim), or with layout BSHD (batch, q_len, num_heads, head_dim).
        key, value: the same with num_kv_heads and kv_len; all on one device, in one dtype.
        attn_mask: (batch, num_heads, q_len, kv_len), any of them 1 to broadcast, or (q_len or 1, kv_len), or
            (kv_len,); boolean (True: visible), or numbers, integers too, that are added to the scores. Only `reference`
            accepts one with `is_causal`.
        scale: factor of the scores; None: head_dim ** -0.5.
        enable_gqa: several query heads share one key head.
        backend: for this call, above the blocks around it and below `force_backend`: a name, or a configuration in any
            form that `config.text.parse_config` reads.
        role: `self`, `cross`, `joint`, or a dotted name such as `ltx2.audio_to_video`; selects per-role entries.
        return_lse: return the log-sum-exp of each row too, from a backend that has it. The mask is passed unchanged.
        grid: (frames, height, width) of the tokens, for sparse backends; an image has one frame.
        tokens_before, tokens_after: other tokens, such as a prompt, before and after those of the grid.

    Returns:
        A tensor like `query`, in the same layout, with the head size of `value`. With `return_lse` a pair: that, and
        the log-sum-exp of scaled and masked scores: natural logarithm, float32, (batch, num_heads, q_len) in either
        layout, -inf for a row without a visible key, without gradient. `engine/merge.py` merges such pairs.

    Raises:
        NoBackendError: strict and the named backend cannot run this call, or every backend failed.
        CheckError: the layout is unknown or the shapes do not fit together; with checks on, also dtypes, devices or the
            mask.

    A mask that only hides keys may be read and replaced by fewer keys: on the CPU at every call; on an accelerator,
    where reading synchronises, only for a named backend that refuses the mask and accepts the call without it. Else the
    mask is passed unchanged.

    `torch.compile` breaks the graph here: the configuration may differ when the graph runs.
    """
    import torch

    if torch.compiler.is_compiling():
        outside_the_graph: Callable[..., torch.Tensor] = torch.compiler.disable(attention)  # type: ignore[no-untyped-call]
        return outside_the_graph(
            query, key, value, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa,
            backend=backend, role=role, layout=layout, return_lse=return_lse, grid=grid, tokens_before=tokens_before,
            tokens_after=tokens_after,
        )  # fmt: skip
    if backend is not None and not isinstance(backend, (str, AttentionConfig)):
        backend = parse_config(backend, "attention(backend)")  # hashable, unlike a mapping
    context = current()
    reporting = context.reporting
    own = getattr(_thread, "own", None) or _new_thread() if reporting is None else reporting.of_thread()
    try:
        session_key = (context.number, query.device, backend)
        mask_facts = None if attn_mask is None else (attn_mask.dtype, attn_mask.shape, attn_mask.stride())
        # Everything that can change a decision.
        sizes = (query.shape, key.shape, value.shape, query.dtype)
    except AttributeError:
        _only_tensors(query, key, value, attn_mask)
        raise
    plan_key: tuple[object, ...] = (role, layout, sizes, mask_facts, is_causal, scale, enable_gqa)
    if return_lse:
        plan_key = (*plan_key, "lse")
    token_grid = None
    if grid is not None or tokens_before or tokens_after:
        token_grid = _token_grid(grid, tokens_before, tokens_after)
        plan_key = (*plan_key, token_grid)
    session = own.sessions.get(session_key)
    if session is None:
        _only_tensors(query)
        session = own.sessions[session_key] = _session(context, query.device, backend, own)
    known = session.slots.get(plan_key)
    if known is None:
        _check_meaning(query, key, value, attn_mask, layout)
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
        known = session.keep(plan_key, CallKind(call.request(lse=return_lse, grid=token_grid), role, category_of(role)))
    slot, call.enable_gqa = known  # only set for grouped heads
    mask_plan = None
    try:
        if slot is None:
            slot, mask_plan = session.slot_by_mask(plan_key, call, role, token_grid)
        output = session.attention(slot, call, mask_plan)
    except Exception:
        # Strict, or every backend failed on these tensors: later calls start with a new session.
        own.sessions.pop(session_key, None)
        raise
    if layout == "BSHD":
        output = output.transpose(1, 2)
    if return_lse and isinstance(call, LseCall):
        return output, call.lse
    return output


_thread = threading.local()


def _new_thread() -> ThreadSessions:
    """This thread's sessions outside of blocks with a run report; sessions are not shared between threads."""
    own: ThreadSessions
    own = _thread.own = ThreadSessions(RunReport(mode="off"))  # not read
    return own


def _session(
    context: Context, device: torch.device, backend: str | AttentionConfig | None, own: ThreadSessions
) -> CallSession:
    layers = context.layers
    if backend is not None and not context.forced:
        layers = (parse_config(backend, "attention(backend)"), *layers)
    if len(own.sessions) >= KEPT:
        own.sessions.clear()
    own.run_report.device = device.type
    return CallSession(router_for(device), layers, device, context.checks, own.run_report)


class CallSession(Session):
    """A session with the slots of its calls, by everything that can change a decision."""

    def __init__(
        self, router: Router, layers: tuple[AttentionConfig, ...], device: torch.device, check_calls: bool,
        run_report: RunReport,
    ) -> None:  # fmt: skip
        super().__init__(router, layers, run_report, checks=False, device=device)
        observe(self)
        self.check_calls = check_calls
        """Whether each call is validated before it is planned."""
        self.slots: dict[tuple[object, ...], tuple[Slot | None, bool]] = {}
        """Call key -> (slot, grouped); the slot is None if the mask must be read first."""
        self.by_mask: dict[tuple[object, ...], Slot] = {}

    def keep(self, key: tuple[object, ...], kind: CallKind) -> tuple[Slot | None, bool]:
        """Plan a kind of call and store it under `key`."""
        if len(self.slots) >= KEPT:
            self.slots.clear()
        slot = None if self.reads_mask(kind) else self.plan(kind)
        planned = self.slots[key] = slot, kind.request.grouped
        return planned

    def reads_mask(self, kind: CallKind) -> bool:
        """Whether the values of a mask are read before the call runs.

        On the CPU always: it is cheap, and fewer keys are less work. On an accelerator reading synchronises, so only
        for a named backend that refuses the mask and accepts the call without it.
        """
        request = kind.request
        if request.lse:  # sub-calls would give the LSE of their own keys
            return False
        if request.mask == "none" or self.device_index == CPU:
            return request.mask != "none"
        asked = resolve(self.layers, kind.role, kind.category).asked
        if asked is None or not self.router.reasons_against(asked, request):
            return False
        return not self.router.reasons_against(asked, request._replace(mask="none"))

    def slot_by_mask(
        self, key: tuple[object, ...], call: AttentionCall, role: str, grid: TokenGrid | None = None
    ) -> tuple[Slot, MaskPlan]:
        """Read the mask of a call; returns its slot and mask plan."""
        mask_plan = passed_on(None)
        if call.attn_mask is not None:
            mask_plan = inspect(call.attn_mask, call.key.shape[2], grid is not None)
        key = (*key, mask_plan.facts)
        slot = self.by_mask.get(key)
        if slot is None:
            if len(self.by_mask) >= KEPT:
                self.by_mask.clear()
            slot = self.by_mask[key] = self._planned(mask_plan, call, role, grid)
        return slot, mask_plan

    def _planned(self, mask_plan: MaskPlan, call: AttentionCall, role: str, grid: TokenGrid | None) -> Slot:
        category = category_of(role)
        calls = calls_of(self, mask_plan, call, resolve(self.layers, role, category).asked, grid)
        if not calls:
            return self.plan(CallKind(call.request(grid=grid), role, category))

        def planned(part: AttentionCall, mask_text: str, of_part: TokenGrid | None) -> Slot:
            return self.plan(CallKind(part.request(grid=of_part), role, category, mask=mask_text))

        return plan_sub_calls(self, mask_plan, call, calls, planned, grid)


def _check_meaning(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, layout: str
) -> None:
    """Refuse an unknown layout or shapes that do not fit; called once per kind of call."""
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


def _token_grid(grid: Grid | None, before: int, after: int) -> TokenGrid:
    """The grid as given to `attention`.

    Raises:
        CheckError: it is none, or there is none beside which the other tokens could stand.
    """
    if grid is None:
        raise CheckError(f"tokens_before {before!r} and tokens_after {after!r} stand beside a grid; give grid too")
    given = (*(grid if isinstance(grid, tuple | list) else ()), before, after)
    try:
        sizes = [index(size) for size in given if not isinstance(size, bool)]  # NumPy's numbers too
    except TypeError:
        sizes = []
    if len(given) != 5 or len(sizes) != 5 or min(sizes[:3]) < 1 or min(sizes) < 0:
        raise CheckError(
            f"grid {grid!r} with tokens_before {before!r} and tokens_after {after!r} is not three whole "
            "numbers from 1, with whole numbers from 0"
        )
    frames, height, width, before, after = sizes
    return TokenGrid(frames, height, width, before, after)


def _only_tensors(*given: object) -> None:
    import torch

    for value in given:
        if value is not None and not isinstance(value, torch.Tensor):
            kind = f"{type(value).__module__}.{type(value).__name__}"
            raise CheckError(f"attention takes torch tensors, not {kind}; torch.as_tensor makes one of an array")
