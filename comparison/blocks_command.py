"""The command `blocks`: which key blocks a sparse method keeps for one head, as numbers and as a picture.

Boundary: the terminal and one file. Importing it needs no torch, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..backends.config import AttentionSpec
from ..backends.config.text import parse_extra
from ..backends.kernels import BACKENDS
from ..backends.sparse.block_map import Dense, with_other_tokens
from ..backends.sparse.kernel import SparseKernel
from ..backends.sparse.layers import layer_of
from ..backends.sparse.method import SparseMethod, Where
from ..backends.values.grid import Place, TokenGrid, parse_grid
from ..backends.values.request import AttentionRequest
from .command import seed
from .metrics import need
from .report import ComparisonError

if TYPE_CHECKING:
    from ..backends.engine.router import Router
    from ..backends.sparse.block_map import Map

HELP = "draw which key blocks a sparse method keeps, and say how much of the work that is"
METHODS = {name: backend.pair_bytes > 0 for name, backend in BACKENDS.items() if isinstance(backend, SparseMethod)}
"""Sparse backends, and whether they choose blocks by scores; others go by the grid alone."""
MOST_TOKENS = 2**18
EXAMPLES = f"""examples:
  %(prog)s --method sliding_tile_attn --grid 21x30x52 --step 20 --steps 50
  %(prog)s --method radial_attn --grid 21x30x52 --options decay_factor=0.2
  %(prog)s --method sparge_attn --grid 512+8x30x52 --options topk=0.25 --output sparge.png

Methods: {", ".join(METHODS)}.
A grid is frames x height x width in tokens: for a video the latent divided by the patch size, 21x30x52 for Wan at 81
frames of 832x480. Text before and after it is written as 512+21x30x52+77. Query and key are random numbers from the
seed, so a method that goes by scores keeps other blocks than in a model; where it keeps a share, the share is right.
Nothing is timed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--method", required=True, help="a sparse backend, by any of its names")
    parser.add_argument("--grid", required=True, help="FRAMESxHEIGHTxWIDTH in tokens")
    parser.add_argument("--options", default="", help="of the method: name=value pairs or JSON; default: its own")
    parser.add_argument("--step", type=_whole, help="of the sampler, from 0; default: none, no step is dense")
    parser.add_argument("--steps", type=_whole, help="of the whole schedule, with --step; default: 50")
    parser.add_argument("--layer", type=_whole, default=0, help="number of the block; default: %(default)s")
    parser.add_argument("--head", type=_whole, default=0, help="which head is drawn; default: %(default)s")
    parser.add_argument("--heads", type=_whole, help="heads of the model; default: up to the one that is drawn")
    parser.add_argument("--head-dim", type=_whole, default=128, help="default: %(default)s")
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16, float16 or float32; default: %(default)s")
    parser.add_argument("--seed", type=seed, default=0, help="default: %(default)s")
    parser.add_argument("--device", help="such as cpu or cuda:1; default: the first accelerator, else the CPU")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the picture, a .png; default: none is drawn")


def _whole(text: str) -> int:
    if not text.isdecimal() or len(text) > 6:
        raise argparse.ArgumentTypeError(f"{text[:20]!r} is not a whole number from 0")
    return int(text)


class Asked(NamedTuple):
    """What is drawn."""

    spec: AttentionSpec
    grid: TokenGrid
    request: AttentionRequest
    place: Place
    head: int
    step: int | None
    steps: int | None
    seed: int


def parse(options: argparse.Namespace) -> Asked:
    """The options as they are meant.

    Raises:
        ValueError: one of them is wrong; the message says what is allowed.
    """
    spec = AttentionSpec(options.method, parse_extra(options.options))
    if spec.backend not in METHODS:
        raise ComparisonError(f"{options.method} has no blocks to draw; these methods have: {', '.join(METHODS)}")
    grid = parse_grid(options.grid)
    if grid.queries_only or not 1 <= grid.tokens <= MOST_TOKENS:
        why = "is of queries alone" if grid.queries_only else f"has {grid.tokens} tokens, not 1 to {MOST_TOKENS}"
        raise ComparisonError(f"grid {options.grid} {why}")
    if options.dtype not in ("bfloat16", "float16", "float32"):
        raise ComparisonError(f"--dtype {options.dtype} is not bfloat16, float16 or float32")
    heads = options.head + 1 if options.heads is None else options.heads
    if options.head >= heads:
        raise ComparisonError(f"--head {options.head}: there are {heads} heads, counted from 0")
    if not 1 <= options.head_dim <= 1024 or heads * grid.tokens * options.head_dim > 2**31:
        raise ComparisonError(f"{heads} heads of {options.head_dim} for {grid.tokens} tokens are not drawn")
    if options.step is None and options.steps is not None:
        raise ComparisonError("--steps needs --step: without it no step is dense, and the last value of a list counts")
    steps = (50 if options.steps is None else options.steps) if options.step is not None else None
    if options.step is not None and steps is not None and options.step >= steps:
        raise ComparisonError(f"--step {options.step}: there are {steps} steps, counted from 0")
    request = AttentionRequest(1, heads, grid.tokens, grid.tokens, options.head_dim, options.dtype, grid=grid)
    place = Place("self", "self", f"blocks.{options.layer}")
    return Asked(spec, grid, request, place, options.head, options.step, steps, options.seed)


def run(options: argparse.Namespace, program: str) -> int:
    """Choose the blocks, write the picture, print how much is kept and what would compute it.

    Raises:
        ValueError: bad options, or a package that is not installed; the message says what to do.
    """
    asked = parse(options)
    if options.output is not None:
        need("matplotlib.figure")
        if options.output.suffix.lower() != ".png":
            raise ComparisonError(f"--output {options.output} does not end in .png")
    try:
        from .contenders import router_for
    except ImportError as error:
        raise ComparisonError(f"choosing blocks needs torch, which cannot be imported here: {error}") from error

    with contextlib.redirect_stdout(sys.stderr):  # what packages print while they load is no part of the answer
        router = router_for(options.device)
        if reasons := router.reasons_against(asked.spec.backend, asked.request, options=asked.spec.extra):
            raise ComparisonError(f"{asked.spec.backend} cannot run here: {'; '.join(reasons)}")
        found = blocks_of(asked, router)
    answer = described(asked, found, router)
    if options.output is not None and not isinstance(found, Dense):
        from .blocks_picture import draw_blocks
        from .picture import save

        try:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            save(draw_blocks(answer, found, asked, by_scores=METHODS[asked.spec.backend]), options.output)
        except OSError as error:
            raise ComparisonError(f"--output {options.output}: {error.strerror or error}") from error
        answer["picture"] = str(options.output.absolute())
    print(json.dumps(answer, indent=2) if options.json else sentences(answer))
    return 0


def blocks_of(asked: Asked, router: Router) -> Map | Dense:
    """The map of the whole call, or why it is computed whole."""
    import torch

    from .bench_inputs import device_of, random_call

    method = router.backends[asked.spec.backend]
    kernel = method.load(router.platform, **asked.spec.extra)
    if not isinstance(method, SparseMethod) or not isinstance(kernel, SparseKernel):
        raise TypeError(f"{asked.spec.backend} has no blocks")
    grid = asked.grid
    call = random_call(asked.request, device_of(router.platform), asked.seed)
    cells = slice(grid.before, grid.before + grid.cells)
    on_grid = call.changed(query=call.query[:, :, cells], key=call.key[:, :, cells], value=call.value[:, :, cells])
    where = Where(asked.step, asked.steps, None, layer_of(asked.place.block), asked.place.role, ())
    with torch.inference_mode():
        found = method.select_at(on_grid, grid, where, kernel.options)
    if isinstance(found, Dense):
        return found
    return with_other_tokens(found, grid, grid.after, method.other_block)


def described(asked: Asked, found: Map | Dense, router: Router) -> dict[str, Any]:
    """{"method", "options", "grid", "head", "step", "steps", "layer", "dense", "kept", "kept_of_head",
    "query_blocks", "key_blocks", "executor", "not"}: `dense` is why the call is computed whole, or None; `kept` the
    share of query-key pairs over all heads; `not` why other executors would not compute it.
    """
    head = None
    if not isinstance(found, Dense):
        head = found.of_head(asked.head)
    method = router.backends[asked.spec.backend]
    if not isinstance(method, SparseMethod):
        raise TypeError(f"{asked.spec.backend} has no blocks")
    able, reasons = method.executors(asked.request, router.platform, asked.spec.extra)
    return {
        "method": asked.spec.backend,
        "options": dict(asked.spec.extra),
        "grid": asked.grid.describe(),
        "head": asked.head,
        "step": asked.step,
        "steps": asked.steps,
        "layer": asked.place.block,
        "dense": found.reason if isinstance(found, Dense) else None,
        "kept": 1.0 if isinstance(found, Dense) else round(found.pairs, 4),
        "kept_of_head": 1.0 if head is None else round(head.pairs, 4),
        "query_blocks": None if head is None else head.queries.count,
        "key_blocks": None if head is None else head.keys.count,
        "executor": able[0].id if able else None,
        "not": {name: "; ".join(why) for name, why in reasons.items()},
    }


def sentences(answer: dict[str, Any]) -> str:
    """The answer for a person."""
    options = ", ".join(f"{name}={value}" for name, value in answer["options"].items()) or "defaults"
    at = "outside a sampler" if answer["step"] is None else f"step {answer['step']} of {answer['steps']}"
    lines = [f"{answer['method']} ({options}), grid {answer['grid']}, {answer['layer']}, {at}"]
    if answer["dense"] is not None:
        return "\n".join([*lines, f"Computed whole: {answer['dense']}."])
    lines += [
        f"Kept: {100 * answer['kept_of_head']:.1f} % of head {answer['head']}, "
        f"{100 * answer['kept']:.1f} % of all heads",
        f"Blocks: {answer['query_blocks']} of queries, {answer['key_blocks']} of keys",
        f"Computed by: {answer['executor'] or 'no executor here'}",
        *(f"  not {name}: {why}" for name, why in answer["not"].items()),
        *([f"Picture: {answer['picture']}"] if "picture" in answer else []),
    ]
    return "\n".join(lines)
