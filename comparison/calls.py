"""Attention alone: every backend on the same query, key and value, against attention computed in float64.

Boundary: calls and backends; where the calls come from does not matter, `captured` takes them from the embedded model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends.engine.mask_reader import inspect
from ..backends.engine.router import Router
from ..backends.measure.device_clock import timed
from ..backends.measure.error import cosine, exact_rows, relative_l2
from ..backends.values.grid import TokenGrid
from ..backends.values.request import AttentionCall, Host
from . import metrics
from .contenders import REFERENCE, Routed
from .report import CallScore, Row, Spread
from .rounds import Entry, Progress, round_robin
from .scene import Scene

CPU = torch.device("cpu")
MOST_SCORES = 2**23
"""Scores of one head and sample that are computed in float64 at once: 64 MiB."""


@dataclass(frozen=True)
class CapturedCall:
    """One attention call of a model, and where in the model it was made."""

    role: str
    block: str
    call: AttentionCall
    host: Host | None = None
    """What ComfyUI would have run, for the backend `comfy`."""
    grid: TokenGrid | None = None
    """How its tokens lie, where that is known."""


def captured(scene: Scene, router: Router) -> list[CapturedCall]:
    """The calls of one model evaluation in the middle of sampling, one for each role and block."""
    reference = Routed(router, REFERENCE)
    latent, sigma = scene.halfway(reference)
    calls: list[CapturedCall] = []

    def keep(query: Tensor, key: Tensor, value: Tensor, *, role: str, block: int) -> Tensor:
        grid = scene.grid if role == "self" else None
        calls.append(CapturedCall(role, str(block), AttentionCall(query, key, value), grid=grid))
        return reference(query, key, value, role=role, block=block)

    scene.predict(latent, sigma, keep)
    return calls


@torch.inference_mode()
def compare_calls(
    calls: Sequence[CapturedCall], backends: Sequence[str], router: Router, repeat: int, progress: Progress
) -> tuple[list[Row], bool]:
    """A row for each backend, with a score for each call; True when a person interrupted it.

    A row's `relative_l2` and `cosine` are those of its worst call; a step is one pass over all calls. Masks are read
    once, before anything is timed, and honoured as in ComfyUI: a backend that takes none runs what they leave visible.
    """
    device = calls[0].call.query.device
    masks = [
        None if (mask := entry.call.attn_mask) is None else inspect(mask, entry.call.key.shape[2]) for entry in calls
    ]
    exact = [exact_rows(entry.call, max(16, MOST_SCORES // entry.call.key.shape[2]), CPU) for entry in calls]
    entries = []
    for backend in backends:
        scores = [CallScore(entry.role, entry.block, entry.call.request().describe()) for entry in calls]
        entries.append(Entry(Row(backend, calls=scores), Routed(router, backend)))
    times: dict[tuple[str, int], list[float]] = {}

    def work(entry: Entry, lap: Callable[[], None]) -> list[Tensor]:
        outputs = []
        for at, item in enumerate(calls):
            call = _copy(item.call)  # a kernel that changes its inputs is not to spoil them for the others
            output, ms = timed(
                device, entry.attention.run, call, item.role, item.block, masks[at], item.host, item.grid
            )
            times.setdefault((entry.row.asked, at), []).append(ms)
            outputs.append(output)
        return outputs

    interrupted = round_robin(entries, repeat, work, work, device, progress)
    for entry in entries:
        # The first pass was the warm-up, and one that failed has no time for its last calls: both are left out.
        passes = [
            times[entry.row.asked, at][1 : 1 + entry.row.runs] for at in range(len(calls) if entry.row.runs else 0)
        ]
        entry.row.total_ms = entry.row.step_ms = Spread.of([sum(each) for each in zip(*passes, strict=True)])
        entry.row.attention_share = None
        for at, output in enumerate(entry.result):
            score = entry.row.calls[at]
            score.ms = Spread.of(passes[at])
            strategy = entry.attention.mask_strategy(
                calls[at].call, calls[at].role, calls[at].block, masks[at], calls[at].grid
            )
            score.request += f"; mask {strategy}" if strategy else ""
            score.broken = metrics.what_is_not_finite(output)
            rows, wanted = exact[at]
            score.relative_l2 = relative_l2(output[:, :, rows], wanted)
            score.cosine = cosine(output[:, :, rows], wanted)
        _sum_up(entry.row)
    return [entry.row for entry in entries], interrupted


def _sum_up(row: Row) -> None:
    """Set the row's own numbers to those of its worst call."""
    if not row.runs:
        row.calls = []
        return
    broken = [f"{call.broken} of {call.role} attention in block {call.block}" for call in row.calls if call.broken]
    row.broken = "; ".join(broken) or None
    row.relative_l2 = max((call.relative_l2 for call in row.calls), key=_nan_first)
    row.cosine = min((call.cosine for call in row.calls), key=lambda value: -_nan_first(-value))


def _nan_first(value: float) -> float:
    return float("inf") if value != value else value


def _copy(call: AttentionCall) -> AttentionCall:
    return call.changed(query=call.query.clone(), key=call.key.clone(), value=call.value.clone())
