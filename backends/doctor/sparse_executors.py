"""The installed packages that compute the blocks of sparse methods: rows for the doctor, and a probe of each.

They are no backends, so no router knows them. A probe compares one with `gather`, computed in float64, on two small
maps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from ..measure.device_clock import timed
from ..measure.error import relative_l2
from ..measure.remembered import Outcome
from ..sparse.block_map import BlockMap
from ..sparse.blocks import in_order
from ..sparse.executor import PackageExecutor
from ..sparse.executors import OF_PACKAGES
from ..sparse.executors.gather import gather
from ..values.faults import is_out_of_memory
from ..values.platform import Platform
from ..values.reasons import error_text
from ..values.request import AttentionCall
from . import symbols
from .doctor import NO_TORCH, Row, cards_of, file_of, made_of
from .install import Advice, Interpreter, how_to_get

if TYPE_CHECKING:
    import torch

PREFIX = "executor:"
"""Before the id of an executor, where a probe's child expects that of a backend."""

BLOCKS, REST = 5, 24
"""Whole blocks of the maps, and the tokens in the last block of the second one."""


def by_id(executor_id: str) -> PackageExecutor:
    return next(executor for executor in OF_PACKAGES if executor.id == executor_id)


def examine(
    platform: Platform, interpreter: Interpreter, probed: dict[str, Outcome], without_torch: str | None = None
) -> list[Row]:
    """A row for each executor of a package; `probed` by `PREFIX` and id."""
    return [_row(executor, platform, interpreter, probed, without_torch) for executor in OF_PACKAGES]


def _row(
    executor: PackageExecutor,
    platform: Platform,
    interpreter: Interpreter,
    probed: dict[str, Outcome],
    without_torch: str | None,
) -> Row:
    declared = executor.declared
    reasons: tuple[str, ...] = (without_torch,) if without_torch else tuple(executor.unavailable_reasons(platform))
    if without_torch is None and not reasons:
        try:
            executor.load(platform)
        except Exception as error:  # what a broken package raises is the reason
            reasons = (error_text(error),)
    if without_torch is not None:
        advice: Advice | None = Advice("nothing", NO_TORCH)
        found = symbols.without_import(declared, platform, "not looked for: there is no torch")
    else:
        advice = how_to_get(declared, platform, interpreter) if reasons else None
        found = symbols.find(declared, platform)
    version, module = made_of(declared, platform)
    outcome = probed.get(PREFIX + executor.id)
    file = module and file_of(module)
    cards = cards_of(declared, platform)
    return Row(executor.id, declared.accuracy, reasons, version, file, advice, cards, found, outcome)


def to_probe(platform: Platform) -> Iterable[str]:
    """The executors whose package and card are there, with `PREFIX`."""
    return [PREFIX + executor.id for executor in OF_PACKAGES if not executor.unavailable_reasons(platform)]


def judge(executor: PackageExecutor, platform: Platform, device: torch.device) -> Outcome:
    """Load and run one executor in this process and compare it with `gather` in float64."""
    reasons = executor.unavailable_reasons(platform)
    if reasons:
        return Outcome("unavailable", "; ".join(reasons))
    limit, worst, first = executor.declared.tolerance_on(platform).relative_l2, 0.0, 0.0
    try:
        run = executor.load(platform)
        for call, block_map in _problems(executor.probed_block):
            moved = call.changed(query=call.query.to(device), key=call.key.to(device), value=call.value.to(device))
            output, ms = timed(device, lambda given, on=block_map: run(given, on), moved)
            wide = call.changed(query=call.query.double(), key=call.key.double(), value=call.value.double())
            error = relative_l2(output.cpu(), gather(wide, block_map))
            worst, first = max(worst, error), first or ms
            if not error <= limit:  # NaN too
                return Outcome("failed", f"wrong: relative L2 to gather {error:.1e} > {limit:.1e}", error, round(ms, 3))
    except (Exception, SystemExit) as error:  # what a kernel raises is the outcome
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        return Outcome("untested" if is_out_of_memory(error) else "failed", f"raised {text}")
    return Outcome("ok", "", worst, round(first, 3))


def _problems(block: int) -> Iterator[tuple[AttentionCall, BlockMap]]:
    import torch

    generator = torch.Generator().manual_seed(0)
    for tokens, head_dim, kv_heads in ((BLOCKS * block, 64, 2), (BLOCKS * block + REST, 128, 1)):
        shapes = ((1, heads, tokens, head_dim) for heads in (2, kv_heads, kv_heads))
        query, key, value = (torch.randn(shape, generator=generator).bfloat16() for shape in shapes)
        blocks = in_order(tokens, block)
        seen = torch.rand(1, 2, blocks.count, blocks.count, generator=generator) < 0.5
        seen[..., 0] = True
        yield AttentionCall(query, key, value, enable_gqa=kv_heads == 1), BlockMap(blocks, blocks, seen)
