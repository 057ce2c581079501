"""Which backends the command `quality` samples, and the options that make a sparse method keep a given share.

Boundary: names and options; nothing runs here.
"""

from __future__ import annotations

import json
from typing import NamedTuple

from ..backends.engine.router import Router
from ..backends.kernels.backend import Backend
from ..backends.sparse.method import SparseMethod
from ..backends.values.grid import TokenGrid
from .bench import SHARES
from .contenders import REFERENCE, parse_backends, split_backends


class Contender(NamedTuple):
    """One row."""

    name: str
    """Short, for tables."""
    asked: str
    """The backend and all its options."""


def choose(text: str, router: Router, grid: TokenGrid, dense_steps: int) -> list[Contender]:
    """The backends that are named, the reference first; a sparse method without options at each of `SHARES`.

    Args:
        text: names separated by commas, options behind them; empty for all sparse methods that need no trained model
            and all quantized kernels that run here.
        grid: of the model's self-attention.
        dense_steps: at the beginning, of methods that are named without options.

    Raises:
        ValueError: as `parse_backends`.
    """
    named = parse_backends(split_backends(text)) if text.strip() else [REFERENCE, *_default(router)]
    found: list[Contender] = []
    for asked in named:
        backend = router.backends.get(asked)
        if isinstance(backend, SparseMethod):
            found += at_shares(backend, grid, dense_steps)
        else:
            found.append(Contender(_short(asked, router, grid, dense_steps), asked))
    return found


def _short(asked: str, router: Router, grid: TokenGrid, dense_steps: int) -> str:
    """A backend with its options, or `sol_attn 25 %` where the options are those of that share."""
    backend = router.backends.get(asked.partition(" ")[0])
    known = at_shares(backend, grid, dense_steps) if isinstance(backend, SparseMethod) else []
    return next((contender.name for contender in known if contender.asked == asked), asked)


def _default(router: Router) -> list[str]:
    return [
        name
        for name, backend in router.backends.items()
        if backend.candidate and not router.unavailable(name) and _is_lossy(backend)
    ]


def _is_lossy(backend: Backend) -> bool:
    if isinstance(backend, SparseMethod):
        return not backend.trained
    return backend.accuracy == "quantized" and not backend.by_name_only


def at_shares(method: SparseMethod, grid: TokenGrid, dense_steps: int) -> list[Contender]:
    """A row for each of `SHARES`; one row with the method's defaults where its options do not say a share."""
    found = []
    for share in SHARES:
        options = method.keeping(share, grid)
        if options is None:
            return [Contender(method.id, _label(method.id, {"dense_steps": dense_steps}))]
        asked = _label(method.id, {**options, "dense_steps": dense_steps})
        found.append(Contender(f"{method.id} {100 * share:g} %", asked))
    return found


def _label(backend: str, options: dict[str, object]) -> str:
    return parse_backends([f"{backend} " + " ".join(f"{name}={json.dumps(value)}" for name, value in options.items())])[
        1
    ]
