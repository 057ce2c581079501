"""One run of the kernel benchmark, from names and numbers to a report; for the command line and for the node.

Boundary: it reads what was asked for and hands it to `bench.py`; it writes no file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..backends.config.names import COMFY
from ..backends.engine.router import Router
from ..backends.measure import environment
from ..backends.values.request import Host
from .bench import Progress, make_cases, run_cases
from .bench_command import named_only
from .bench_inputs import device_of
from .bench_report import CUDNN, SDPA, BenchReport
from .blocks_command import METHODS
from .contenders import parse_backends, split_backends
from .presets import MASK_KINDS, parse_presets
from .report import ComparisonError

if TYPE_CHECKING:
    import torch

MASKS = ("both", "unmasked", "masked")
DTYPES = ("bfloat16", "float16", "float32")
SHORT = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32"}
MOST_TOKENS = 2**20
UNASKED = "measured only where they are named (--backends, or the node's list)"
"""For a backend group, whose members are measured anyway, slow compilation, `reference` and the emulation."""


@dataclass
class Asked:
    """What is to be measured. Texts are lists separated by commas; an empty one means all."""

    presets: str = ""
    backends: str = ""
    masks: str = "both"
    mask_kind: str = "key_padding"
    dtype: str = "bfloat16"
    tokens: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        self.dtype = SHORT.get(self.dtype, self.dtype)
        for name, known in (("dtype", DTYPES), ("masks", MASKS), ("mask_kind", MASK_KINDS)):
            if getattr(self, name) not in known:
                raise ComparisonError(f"{name} {getattr(self, name)!r} is not one of {', '.join(known)}")
        if not 0 <= self.tokens <= MOST_TOKENS:
            raise ComparisonError(f"tokens {self.tokens}: give 1 to {MOST_TOKENS}, or 0 for the full lengths")


def choose_backends(text: str, router: Router) -> list[str]:
    """The backends that are named, PyTorch's first; for none all that are available here, cuDNN and `comfy` always.

    Left out unless named: backend groups, whose members run anyway, `reference`, and the emulation.

    Raises:
        ValueError: a name is unknown, is there twice, or is a way to choose.
    """
    if text.strip():
        return parse_backends(split_backends(text))
    others = [
        name
        for name, backend in router.backends.items()
        if name not in (SDPA, CUDNN) and not named_only(backend) and not router.unavailable(name)
    ]
    return [SDPA, CUDNN, *others, COMFY]


def measure(
    asked: Asked,
    router: Router,
    device: torch.device | None = None,
    *,
    host: Host | None = None,
    host_name: str | None = None,
    progress: Progress = lambda what, done, total: None,
    versions: dict[str, str] | None = None,
) -> BenchReport:
    """Run the benchmark on `device`, which the router must be for (default: its platform's first).

    Raises:
        ValueError: what was asked for makes no sense; the message says what to change.
    """
    presets = [preset.scaled(asked.tokens) for preset in parse_presets(asked.presets)]
    backends = choose_backends(asked.backends, router)
    cases, notes = make_cases(presets, asked.dtype, asked.masks, asked.mask_kind)
    if not cases:
        raise ComparisonError(f"nothing to measure: {'; '.join(notes)}")
    platform = router.platform
    report = BenchReport(
        cases=cases,
        dtype=asked.dtype,
        seed=asked.seed,
        tokens=asked.tokens,
        device=platform.kind,
        card=" ".join(filter(None, (platform.name, platform.sm or platform.gfx))) or platform.kind,
        machine=environment.in_words(platform),
        versions={**environment.versions(platform), **(versions or {})},
        notes=[*_scaling(asked.tokens, sum(preset.full is not None for preset in presets), len(presets)), *notes],
    )
    report.ended = run_cases(
        cases,
        backends,
        router,
        device or device_of(platform),
        seed=asked.seed,
        sparse=()
        if asked.backends.strip()
        else [name for name in METHODS if router.backends[name].candidate and not router.unavailable(name)],
        host=host,
        host_name=host_name,
        progress=progress,
    )
    measured = [*backends, *(row.backend for case in cases for row in case.rows)]
    report.notes += _not_here(measured, router, asked.backends)
    return report


def _scaling(tokens: int, scaled: int, count: int) -> list[str]:
    if not tokens:
        return []
    return [
        f"lengths scaled down to {tokens} tokens on the longest side, hidden keys in proportion, in {scaled} of {count}"
        " presets: these times are not those of the models"
    ]


def _not_here(backends: Sequence[str], router: Router, named: str) -> list[str]:
    """Without named backends: which ones were left out, and whether this machine cannot run them."""
    if named.strip():
        return []
    left_out = [name for name in router.backends if name not in backends]
    absent = [name for name in left_out if router.unavailable(name)]
    unasked = [name for name in left_out if name not in absent]
    notes = [f"not available here, the command doctor says why: {', '.join(absent)}"] if absent else []
    return notes + ([f"{UNASKED}: {', '.join(unasked)}"] if unasked else [])
