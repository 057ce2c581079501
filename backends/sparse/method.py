"""`SparseMethod`: the backend around a published sparse method, which selects blocks and has an executor compute them.

A method's file declares the backend and writes `blocks` and `select_blocks`. The session binds its kernel (`kernel.py`)
to a place in the model (`Backend.bind`), so that the method knows grid, step and layer of each call.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from ..kernels.backend import Backend, Kernel
from ..kernels.support.workspace import item_bytes, key_size, query_size
from ..values.grid import Kept, Place, Progress, TokenGrid
from ..values.limits import FLOATING, Causal, Dtypes, Limits, Masks, Rule, ValueHeadDim
from ..values.platform import KINDS, Platform
from ..values.reasons import Reason, reason_id, template
from ..values.request import AttentionCall, AttentionRequest
from .block_map import Dense, Map, on_device
from .blocks import Blocks
from .by_step import DENSE_STEPS, computed_whole
from .executor import AUTO, Selection, executors, select

if TYPE_CHECKING:
    import torch

NOT_ON_A_GRID = template("grid.off", "the tokens of this role lie on no grid")
NO_GRID = template("grid.unknown", "no token grid is known for this call")
OTHER_KEYS = template("grid.keys", "the {kv_len} keys are not the tokens of the grid")
NO_PROOF = template("grid.proof", "grid {grid} has {tokens} tokens, and the call has {q_len} queries and {kv_len} keys")


@dataclass(frozen=True)
class Grid(Rule):
    """The call needs a token grid that accounts for its queries; of the keys beside the grid some may be hidden."""

    order = 60

    def reason(self, request: AttentionRequest) -> Reason | None:
        grid = request.grid
        if grid is None:
            return Reason(NO_GRID)
        if not grid.cells:
            return Reason(NOT_ON_A_GRID)
        if grid.queries_only:
            return Reason(OTHER_KEYS, kv_len=request.kv_len)
        most = grid.tokens - grid.hidden_before
        if request.q_len == grid.tokens and most - grid.after <= request.kv_len <= most:
            return None
        return Reason(NO_PROOF, grid=grid.describe(), tokens=grid.tokens, q_len=request.q_len, kv_len=request.kv_len)

    def describe(self) -> str:
        return "a token grid"


class Where(NamedTuple):
    """Where in a run and in the model a call is made."""

    step: int | None
    """Of the whole schedule, from 0; None outside a sampler."""
    steps: int | None
    sigma: float | None
    layer: int | None
    """Number of the block (`layers.layer_of`); None if unknown."""
    role: str
    samples: tuple[object, ...]
    """Identity of each sample of the batch."""
    block: str = ""
    """Name of the block."""
    blocks: tuple[str, ...] = ()
    """The blocks of the model, in its order; empty if unknown."""
    kept: MutableMapping[Hashable, object] = MappingProxyType({})  # type: ignore[assignment]  # nothing is kept
    """What methods keep for the rest of the run, by their own keys."""


class SparseMethod(Backend):
    """A sparse method. A subclass declares its options and writes `select_blocks`."""

    sparse = True
    asks_for = ("flashinfer-python", "fastvideo-kernel", "spas-sage-attn", "flash-attn-4")
    kinds = tuple(kind for kind in KINDS if kind != "xla")
    limits = Limits(Dtypes(FLOATING), Masks(("none",)), Causal("no"), ValueHeadDim(may_differ=True), Grid())
    by_name_only = True
    other_block: ClassVar[int] = 64
    """Tokens in a block of those beside the grid."""

    steps_option: ClassVar[str] = "dense_steps"
    """The method's own name of `dense_steps`; the larger number counts."""
    layers_option: ClassVar[str] = "dense_layers"
    """Likewise of `dense_layers`."""
    published_steps: ClassVar[tuple[int, int] | None] = None
    """Steps that are computed whole where a person sets none, of how many; scaled to the schedule."""
    pair_bytes: ClassVar[int] = 24
    """Bytes that choosing takes at most for each head and pair of blocks: scores, sorted scores, their order and sums;
    0 where a map follows from the grid."""

    reads_back: ClassVar[bool] = False
    """Whether choosing waits, in each call, to read from another device than the CPU."""

    only_executor: ClassVar[str | None] = None
    """The one executor that computes its maps; None: any that can."""

    same_thing: ClassVar[tuple[str, ...]] = ()
    """Options of which one may be given."""

    trained: ClassVar[bool] = False
    """Whether it was published for models that were trained with it; on others it only approximates."""

    def blocks(self, grid: TokenGrid, options: Mapping[str, object]) -> Blocks:
        """The blocks of queries, and of keys where these are not others (`key_blocks`)."""
        raise NotImplementedError

    def key_blocks(self, grid: TokenGrid, options: Mapping[str, object]) -> Blocks:
        """The blocks of keys."""
        return self.blocks(grid, options)

    def select_blocks(
        self, call: AttentionCall, grid: TokenGrid, where: Where, options: Mapping[str, object]
    ) -> Map | Dense:
        """Which key blocks each query block of the grid sees.

        Args:
            call: the tokens on the grid alone; query (batch, num_heads, grid.cells, head_dim).
            options: every declared option, with its value or default.

        Returns:
            The map of the tokens on the grid, or why this call is computed whole.
        """
        raise NotImplementedError

    def keeping(self, share: float, grid: TokenGrid) -> dict[str, object] | None:
        """Options that keep about this share of the pairs of a grid, in every layer and for any number of tokens.

        None: its options do not say a share.
        """
        names = {option.name for option in self.options}
        short: dict[str, object] = {"min_seq_len": 0} if "min_seq_len" in names else {}
        if "topk" in names:
            return {"topk": share, **short}
        return {"sparsity": 1 - share, **short} if "sparsity" in names else None

    def is_not_for(self, category: str, reasons: Sequence[str]) -> bool:
        found = set(map(reason_id, reasons))
        # The last one is asked before the grid.
        of_cross = {NO_GRID, OTHER_KEYS, "accuracy.forbidden"}
        return NOT_ON_A_GRID in found or (category == "cross" and bool(found & of_cross))

    def select_at(
        self, call: AttentionCall, grid: TokenGrid, where: Where, options: Mapping[str, object]
    ) -> Map | Dense:
        """`select_blocks` but in steps and layers that are computed whole."""
        whole = self.dense_at(where, options)
        return self.select_blocks(call, grid, where, options) if whole is None else whole

    def dense_at(self, where: Where, options: Mapping[str, object]) -> Dense | None:
        """Why calls of this step or layer are computed whole; None: they are not."""
        whole = computed_whole(where, options, steps=self.steps_option, layers=self.layers_option)
        if whole is None and self.published_steps is not None and options[self.steps_option] is None:
            whole = first_steps(where, *self.published_steps)
        return whole

    def executors(self, request: AttentionRequest, platform: Platform, options: Mapping[str, object]) -> Selection:
        """The executors for calls of one kind with these options."""
        if self.only_executor is None:
            return select(request, platform, str(options.get("executor", AUTO)))
        able, reasons = select(request, platform, self.only_executor)
        alone = (f"{self.only_executor} alone computes its blocks",)
        return Selection(able, {name: why if name == self.only_executor else alone for name, why in reasons.items()})

    def values(self, options: Mapping[str, object]) -> dict[str, object]:
        """Every declared option with its value; published steps are None, as they are scaled, unless a person says how
        many steps are dense.
        """
        defaults = {option.name: option.default for option in self.options}
        if self.published_steps is not None:
            defaults[self.steps_option] = 0 if DENSE_STEPS.name in options else None
        return defaults | dict(options)

    def option_conflicts(self, options: Mapping[str, object]) -> list[str]:
        given = [name for name in self.same_thing if options.get(name) is not None]
        return [f"{' and '.join(given)} say the same thing; give one"] if len(given) > 1 else []

    def option_reasons(self, platform: Platform, options: Mapping[str, object]) -> list[Reason]:
        named = options.get("executor", AUTO)
        return [
            Reason("named", name=f"executor {named}", reason=reason)
            for executor in (executors() if named != AUTO else ())
            for reason in (executor.unavailable_reasons(platform) if executor.id == named else ())
        ]

    def unsupported_option_reasons(
        self, request: AttentionRequest, platform: Platform, options: Mapping[str, object]
    ) -> list[Reason]:
        named = options.get("executor", AUTO)
        return [
            Reason("named", name=f"executor {named}", reason=reason)
            for executor in (executors(str(named)) if named != AUTO else ())
            if executor.id == named
            for reason in executor.unsupported_reasons(request, platform)
        ]

    def load(self, platform: Platform, **options: object) -> Kernel:
        from .kernel import SparseKernel

        return SparseKernel(self, self.values(options), platform)

    def workspace_bytes(self, request: AttentionRequest, platform: Platform) -> int:
        """What choosing takes with default options, and what the executor takes that comes first here."""
        grid = request.grid
        if grid is None:
            return 0
        able = self.executors(request, platform, {}).able
        return self.choosing_bytes(request, grid) + (able[0].workspace_bytes(request, platform) if able else 0)

    def choosing_bytes(self, request: AttentionRequest, grid: TokenGrid) -> int:
        """Bytes that `select_blocks` takes at most, with default options."""
        if not self.pair_bytes:
            return 0
        values = self.values({})
        queries, keys = self.blocks(grid, values), self.key_blocks(grid, values)
        heads = request.batch * request.num_heads
        means = 4 * 4 * heads * (queries.count + keys.count) * request.head_dim  # in float32, scaled, normalised
        whole = 0
        if queries.index is not None and item_bytes(request) < 4:
            whole = 4 * max(query_size(request), key_size(request))  # tokens in float32, for means of scattered ones
        return self.pair_bytes * heads * queries.count * keys.count + means + whole

    def bind(
        self,
        kernel: Kernel,
        request: AttentionRequest,
        place: Place,
        progress: Progress,
        kept: Kept,
        dense: Callable[..., Kernel],
    ) -> Kernel:
        from .kernel import SparseKernel

        if not isinstance(kernel, SparseKernel):
            return kernel
        return kernel.bound(request, place, progress, kept, self.dense_kernel(dense, kernel.options))

    def dense_kernel(self, dense: Callable[..., Kernel], options: Mapping[str, object]) -> Kernel:
        """What computes calls whole: the exact kernel of the machine, or that of a named backend, `dense(name)`."""
        return dense()


def first_steps(where: Where, count: int, published: int) -> Dense | None:
    """Whether a call lies in the first `count` of `published` steps, scaled to the length of this schedule."""
    if where.step is None or not count:
        return None
    steps = where.steps or published
    dense = min(count, -(-count * steps // published))
    if where.step >= dense:
        return None
    scaled = "" if steps == published else f" ({count} of {published} in the publication)"
    return Dense(f"the first {dense} of {steps} steps{scaled}")


def block_means(tensor: torch.Tensor, blocks: tuple[int, ...], index: torch.Tensor | None) -> torch.Tensor:
    """Mean over the tokens of each block, in float32.

    Args:
        tensor: (batch, heads, tokens, size).
        blocks: sizes; `index`: the order of the tokens (`blocks.Blocks`).

    Returns:
        (batch, heads, blocks, size).
    """
    import torch

    if index is None and len(set(blocks[:-1])) <= 1 and blocks[-1] <= blocks[0]:
        size, full = blocks[0], sum(blocks) // blocks[0]
        batch, heads, _, channels = tensor.shape
        means = tensor[:, :, : full * size].reshape(batch, heads, full, size, channels).mean(3, dtype=torch.float32)
        if full == len(blocks):
            return means
        return torch.cat((means, tensor[:, :, full * size :].mean(2, keepdim=True, dtype=torch.float32)), 2)
    sizes = torch.tensor(blocks, device=tensor.device)
    numbers = torch.repeat_interleave(torch.arange(len(blocks), device=tensor.device), sizes, output_size=sum(blocks))
    if index is not None:
        of_token = torch.empty_like(numbers)
        of_token[on_device(index, tensor.device)] = numbers
        numbers = of_token
    sums = tensor.new_zeros((*tensor.shape[:2], len(blocks), tensor.shape[3]), dtype=torch.float32)
    sums.index_add_(2, numbers, tensor.float())
    return sums / sizes[:, None]


def mean_scores(call: AttentionCall, queries: Blocks, keys: Blocks | None = None) -> torch.Tensor:
    """Scaled products of the mean query and the mean key of blocks.

    Returns:
        (batch, num_heads, query blocks, key blocks), float32.
    """
    keys = queries if keys is None else keys
    of_queries = block_means(call.query, queries.sizes, queries.index)
    of_keys = block_means(call.key, keys.sizes, keys.index)
    return (of_queries * scale_of(call)) @ for_each_head(call, of_keys).mT


def scale_of(call: AttentionCall) -> float:
    """The factor of the scores."""
    return float(call.query.shape[3]) ** -0.5 if call.scale is None else call.scale


def for_each_head(call: AttentionCall, of_keys: torch.Tensor) -> torch.Tensor:
    """What each key head has, (batch, num_kv_heads, ...), for each query head."""
    return of_keys.repeat_interleave(call.query.shape[1] // call.key.shape[1], 1) if call.enable_gqa else of_keys
