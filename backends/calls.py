"""Runs one call of `attention`: resolves its context, plans it once, runs its plan.

`context.py` has the configurations. A thread has one session per set of configurations, which has the plans.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from operator import index
from typing import TYPE_CHECKING, Any, Literal, overload

from .config import AttentionConfig
from .config.layers import cards_of, record_of, resolve
from .config.names import COMFY
from .config.text import parse_config
from .context import KEPT, Context, ThreadSessions, current
from .engine.call_checks import CheckError, check, differing
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

    from .parallel.group_session import GroupSession

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
    group: object = None,
    parallel: str | None = None,
    replicated_before: int = 0,
    replicated_after: int = 0,
    sequence_order: str = "contiguous",
    cards: str | Sequence[str] | None = None,
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
    group: object = None,
    parallel: str | None = None,
    replicated_before: int = 0,
    replicated_after: int = 0,
    sequence_order: str = "contiguous",
    cards: str | Sequence[str] | None = None,
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
    group: object = None,
    parallel: str | None = None,
    replicated_before: int = 0,
    replicated_after: int = 0,
    sequence_order: str = "contiguous",
    cards: str | Sequence[str] | None = None,
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
        group: a torch.distributed ProcessGroup, or a DeviceMesh of one dimension: every rank makes this call with its
            own tokens, and gets their output. The whole sequence is that of the ranks in their order; a rank may have
            none. `attn_mask` has the rows of this rank's queries, or one row that is the same on all ranks, and the
            keys of all ranks, or one row and this rank's keys; `grid` and the tokens beside it are of the whole
            sequence. Without gradients.
        parallel: with `group`: `ulysses` exchanges heads for tokens, `ring` passes keys around, from a backend that
            gives the log-sum-exp; None or `auto`: `parallel/strategy.py` decides.
        replicated_before, replicated_after: with `group`: tokens at the start and the end of query and key that are the
            same on every rank, such as a prompt; they count once.
        sequence_order: with `group`: `contiguous`, or `balanced` for causal calls: rank r has the r-th and the r-th
            last of 2 * ranks chunks (`parallel/shards.py`: `balanced_order`).
        cards: CUDA devices of this process over which the heads of a call are divided where that is faster: `all`, or
            names such as `["cuda:0", "cuda:1"]`; that of the tensors takes part in any case. A setting like `strict`;
            not with `group`, gradients or `return_lse` (`docs/parallel.md`).

    Returns:
        A tensor like `query`, in the same layout, with the head size of `value`. With `return_lse` a pair: that, and
        the log-sum-exp of scaled and masked scores: natural logarithm, float32, (batch, num_heads, q_len) in either
        layout, -inf for a row without a visible key, without gradient. `engine/merge.py` merges such pairs.

    Raises:
        NoBackendError: strict and the named backend cannot run this call, or every backend failed.
        CheckError: the layout is unknown or the shapes do not fit together; with checks on, also dtypes, devices or the
            mask. In a group every rank raises it where one rank refuses the call, or ranks differ in it.
        GroupError: another rank of the group failed or ended; the group cannot be used again.

    A mask that only hides keys may be read and replaced by fewer keys: on the CPU at every call; on an accelerator,
    where reading synchronises, only for a named backend that refuses the mask and accepts the call without it. Else the
    mask is passed unchanged.

    `torch.compile` breaks the graph here: the configuration may differ when the graph runs. Heads are not divided over
    `cards` then, and the run report says so.
    """
    import torch

    if torch.compiler.is_compiling():
        outside_the_graph: Callable[..., torch.Tensor] = torch.compiler.disable(_outside_the_graph)  # type: ignore[no-untyped-call]
        return outside_the_graph(
            query, key, value, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa, cards=cards,
            backend=backend, role=role, layout=layout, return_lse=return_lse, grid=grid, tokens_before=tokens_before,
            tokens_after=tokens_after, group=group, parallel=parallel, replicated_before=replicated_before,
            replicated_after=replicated_after, sequence_order=sequence_order,
        )  # fmt: skip
    if group is not None or parallel is not None:
        return _in_group(
            (query, key, value, attn_mask), group, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa,
            backend=backend, role=role, layout=layout, return_lse=return_lse,
            grid=(grid, tokens_before, tokens_after),
            parallel=parallel, replicated=(replicated_before, replicated_after), sequence_order=sequence_order,
            cards=cards,
        )  # fmt: skip
    if cards is not None:
        backend = _over_cards(backend, cards if isinstance(cards, str) else tuple(cards))
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


def _outside_the_graph(
    *tensors: torch.Tensor | None, cards: str | Sequence[str] | None, backend: object, group: object, **arguments: Any
) -> Any:
    """`attention`, called by a compiled graph, without other cards; the run report says so where some are named."""
    if group is None:
        context = current()
        of_call = backend if cards is None else _over_cards(backend, cards if isinstance(cards, str) else tuple(cards))
        layers = context.layers
        if of_call is not None:
            layers = (parse_config(of_call, "attention(backend)"), *layers)
        if cards_of(layers):
            reporting, off = context.reporting, Reason("cards.off", reason=Reason("cards.compiled"))
            own = getattr(_thread, "own", None) or _new_thread() if reporting is None else reporting.of_thread()
            if off not in own.run_report.notes:
                own.run_report.note(off)
            cards = ()
    return attention(*tensors, cards=cards, backend=backend, group=group, **arguments)  # type: ignore[arg-type]


_thread = threading.local()


def _new_thread() -> ThreadSessions:
    """This thread's sessions outside of blocks with a run report; sessions are not shared between threads."""
    own: ThreadSessions
    own = _thread.own = ThreadSessions(RunReport(mode="off"))  # not read
    return own


def _in_group(
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None],
    group: object,
    *,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    backend: object,
    role: str,
    layout: str,
    return_lse: bool,
    grid: tuple[Grid | None, int, int],
    parallel: str | None,
    replicated: tuple[int, int],
    sequence_order: str,
    cards: object,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`attention` with `group`. What can be wrong with a call is checked inside `run`, so that all ranks refuse it."""
    from .parallel.group_call import AUTO, GroupOptions, Prepared, run
    from .parallel.rank_group import rank_group

    if group is None:
        raise CheckError(f"parallel {parallel!r} without group; give a torch.distributed ProcessGroup too")

    def prepare() -> Prepared:
        import torch

        query, key, value, mask = tensors
        _check_meaning(query, key, value, mask, layout)
        if cards is not None:
            raise CheckError("cards and group exclude one another; in a group each process computes on its own device")
        frames, before, after = grid
        token_grid = None if frames is None and not before and not after else _token_grid(frames, before, after)
        options = GroupOptions(
            AUTO if parallel is None else parallel, *replicated, sequence_order, role, category_of(role), token_grid
        )
        options.check()
        if layout == "BSHD":
            query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        mask = None if mask is None else for_kernels(as_4d(mask), query.dtype)
        call = (LseCall if return_lse else AttentionCall)(query, key, value, mask, is_causal, scale, enable_gqa)
        check(call, only_shapes=True, any_kv_len=True)
        if text := differing(query, key, value, mask):
            raise CheckError(text)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value)):
            raise CheckError("gradients are not computed in a group; call it under torch.no_grad()")
        return Prepared(_group_session(backend, query.device), call, options)

    output, lse = run(rank_group(group), prepare)
    if layout == "BSHD":
        output = output.transpose(1, 2)
    return (output, lse) if lse is not None else output


@lru_cache(maxsize=256)
def _with_cards(backend: str | AttentionConfig | None, cards: str | tuple[str, ...]) -> AttentionConfig:
    config = parse_config(backend, "attention(backend)") if backend is not None else AttentionConfig()
    return replace(config, cards=cards, source=config.source if backend is not None else "attention(cards)")  # type: ignore[arg-type]


def _over_cards(backend: object, cards: str | tuple[str, ...]) -> AttentionConfig:
    """The configuration of one call with `cards`."""
    if backend is not None and not isinstance(backend, (str, AttentionConfig)):
        backend = parse_config(backend, "attention(backend)")
    return _with_cards(backend, cards)


def _group_session(backend: object, device: torch.device) -> GroupSession:
    from .parallel.group_session import GroupSession

    if backend is not None and not isinstance(backend, (str, AttentionConfig)):
        backend = parse_config(backend, "attention(backend)")
    context = current()
    reporting = context.reporting
    own = getattr(_thread, "own", None) or _new_thread() if reporting is None else reporting.of_thread()
    key = (context.number, device, backend)
    session = own.in_groups.get(key)
    if session is None:
        layers = context.layers
        if backend is not None and not context.forced:
            layers = (parse_config(backend, "attention(backend)"), *layers)
        if record_of(layers) is not None:
            raise CheckError("a record is not repeated in a group; leave group or the record out")
        if len(own.in_groups) >= KEPT:
            own.in_groups.clear()
        own.run_report.device = device.type
        session = GroupSession(router_for(device), layers, own.run_report, checks=False, device=device)
        own.in_groups[key] = observe(session)
    return session


def _session(
    context: Context, device: torch.device, backend: str | AttentionConfig | None, own: ThreadSessions
) -> CallSession:
    layers = context.layers
    if backend is not None and not context.forced:
        layers = (parse_config(backend, "attention(backend)"), *layers)
    elif isinstance(backend, AttentionConfig) and backend.cards is not None:  # `force_backend` decides the backend only
        layers = (AttentionConfig(cards=backend.cards, source=backend.source), *layers)
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
        if cards_of(layers):
            from .cards.over import divide

            divide(self, device, router_for)
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
