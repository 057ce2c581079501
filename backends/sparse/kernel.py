"""`SparseKernel`: a sparse method with its options, loaded on one machine; it runs the first executor that can."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from ..kernels.backend import Kernel
from ..values.faults import is_cuda_fault, is_out_of_memory
from ..values.grid import Kept, Place, Progress, TokenGrid
from ..values.platform import Platform
from ..values.request import AttentionCall, AttentionRequest
from .block_map import BlockMap, Dense, Map, with_other_tokens
from .executor import AUTO, Executor, Run, run_map
from .layers import layer_of
from .method import SparseMethod, Where

if TYPE_CHECKING:
    import torch

log = logging.getLogger("attention_backends")


class NoExecutorError(RuntimeError):
    """The executor that was named cannot compute a call."""


class SparseKernel:
    """A method with its options on one machine. Called without a place, all tokens lie in one row of one frame."""

    def __init__(self, method: SparseMethod, options: Mapping[str, object], platform: Platform) -> None:
        self.method = method
        self.options = options
        self.platform = platform
        self._loaded: dict[str, Run] = {}

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        request = call.request()._replace(grid=TokenGrid(1, 1, call.query.shape[2]))
        return self.bound(request, Place(), Progress(), Kept(), self._dense)(call)

    def _dense(self, call: AttentionCall) -> torch.Tensor:
        from torch.nn.functional import scaled_dot_product_attention

        return scaled_dot_product_attention(
            call.query, call.key, call.value, scale=call.scale, enable_gqa=call.enable_gqa
        )

    def bound(self, request: AttentionRequest, place: Place, progress: Progress, kept: Kept, dense: Kernel) -> Kernel:
        """The kernel for calls of one kind at one place of the model."""
        import torch

        grid = request.grid
        if grid is None:
            return dense
        method, options = self.method, self.options
        compute = self.executor(request, kept, progress)
        kv_before = grid.before - grid.hidden_before
        q_cells, k_cells = (slice(before, before + grid.cells) for before in (grid.before, kv_before))
        kv_after = request.kv_len - kv_before - grid.cells
        beside = grid.tokens > grid.cells

        def run(call: AttentionCall) -> torch.Tensor:
            where = Where(
                progress.step, progress.steps, progress.sigma, layer_of(place.block, progress.blocks), place.role,
                progress.samples, place.block, progress.blocks, progress.kept,
            )  # fmt: skip
            on_grid = call
            if beside:
                on_grid = call.changed(
                    query=call.query[:, :, q_cells], key=call.key[:, :, k_cells], value=call.value[:, :, k_cells]
                )
            if not call.query.numel():
                return dense(call)
            if is_recorded(call):
                kept.add_dense("a CUDA graph is recorded")
                return dense(call)
            with torch.autocast(call.query.device.type, enabled=False):  # scores in float32, output in the call's dtype
                selected = method.select_at(on_grid, grid, where, options)
                if not isinstance(selected, Dense):
                    block_map = with_other_tokens(selected, grid, kv_after, method.other_block)
                    output = compute(call, block_map)
                    if not isinstance(output, Dense):
                        return output
                    selected = output
            kept.add_dense(selected.reason)
            return dense(call)

        return run

    def executor(
        self, request: AttentionRequest, kept: Kept, progress: Progress
    ) -> Callable[[AttentionCall, Map], torch.Tensor | Dense]:
        """What computes the maps of calls of one kind: the first executor that can; or why none can.

        `kept` counts what is computed. An executor that fails is not tried again for such calls in the same run, also
        not in other blocks of the model: compiling may take long each time.
        """
        named = str(self.options.get("executor", AUTO))
        able, reasons = self.method.executors(request, self.platform, self.options)

        def compute(call: AttentionCall, block_map: Map) -> torch.Tensor | Dense:
            one = block_map if isinstance(block_map, BlockMap) else block_map.of_head(0)
            for executor in able:
                failed = self.method.id, executor.id, request
                if failed in progress.kept or executor.call_reasons(call, one):
                    continue
                if executor is not able[-1] and executor.avoid_map_reasons(one):
                    continue
                try:
                    output = run_map(self._run(executor), call, block_map)
                except Exception as error:
                    if executor is able[-1] or is_out_of_memory(error) or is_cuda_fault(error):
                        raise
                    progress.kept[failed] = True
                    log.warning("%s: executor %s failed (%s: %s); the next one runs for: %s", self.method.id,
                                executor.id, type(error).__name__, error, request.describe())  # fmt: skip
                else:
                    waits = not call.query.is_cpu and (self.method.reads_back or executor.reads_back(one))
                    kept.add(block_map.share(), executor.id, waits)
                    return output
            against = {**reasons, **{each.id: tuple(each.call_reasons(call, one)) for each in able}}
            wanted = self.method.only_executor or named
            texts = [f"executor {name}: {'; '.join(why)}" for name, why in against.items() if wanted in (AUTO, name)]
            if named != AUTO:  # as any kernel that was named and cannot run: strict stops
                raise NoExecutorError(texts[0])
            return Dense(", ".join(texts))

        return compute

    def _run(self, executor: Executor) -> Run:
        run = self._loaded.get(executor.id)
        if run is None:
            run = self._loaded[executor.id] = executor.load(self.platform)
        return run


def is_recorded(call: AttentionCall) -> bool:
    """Whether a CUDA graph records this call: choosing and computing blocks may read values, and a graph would repeat
    the blocks of one step.
    """
    import torch

    return call.query.is_cuda and torch.cuda.is_current_stream_capturing()
