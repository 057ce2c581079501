"""The command `bench`: its options, its progress, the files it writes and what it prints.

Boundary: the terminal and the output folder. Importing it needs no torch, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..backends.config.names import COMFY
from ..backends.kernels import BACKENDS
from ..backends.kernels.backend import Backend
from .command import Progress, make_folder, seed
from .metrics import need
from .presets import GRIDS, MASK_KINDS, PRESETS
from .report import ComparisonError

if TYPE_CHECKING:
    from .bench_run import Asked

HELP = "time every kernel on the attention calls of real models, with its error and its memory"


def named_only(backend: Backend) -> bool:
    """Whether a benchmark leaves it out unless it is named; `bench_run.choose_backends` says why."""
    return backend.by_name_only or not backend.candidate


ONLY_NAMED = tuple(name for name, backend in BACKENDS.items() if named_only(backend) and name != COMFY)
"""What runs here and is left out unless named."""
FILES = ("benchmark.png", "benchmark.json", "benchmark.md")
EXAMPLES = f"""examples:
  %(prog)s --presets hv15
  %(prog)s --presets hv15,flux2 --backends cudnn,flash_attn,sage --masked
  %(prog)s --tokens 1024            on a CPU: shorter sequences of the same calls
  %(prog)s --presets wan22_480p --tokens 8192     dense kernels, and sparse methods at 1/2, 1/4 and 1/8

Presets: {", ".join(PRESETS)}.
With a token grid, only where named, or all as grids: {", ".join(GRIDS)}.
torch_sdpa always runs: ratios are to it and to cudnn_attn. A backend that cannot run gets a row that says why. Full
sizes are meant for a GPU; --tokens N scales the longest side down to N, and the other lengths and the hidden keys with
it. The mask hides the last keys; --mask-kind bias hands it over as a full (1, 1, Q, K) tensor of numbers to add."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--presets", default="", help="names, separated by commas; default: all")
    parser.add_argument(
        "--backends",
        help=f"names, separated by commas; default: all that run here but {', '.join(ONLY_NAMED)}",
    )
    masks = parser.add_mutually_exclusive_group()
    masks.add_argument("--masked", action="store_const", dest="masks", const="masked", help="only with a mask")
    masks.add_argument("--unmasked", action="store_const", dest="masks", const="unmasked", help="only without")
    masks.add_argument("--both", action="store_const", dest="masks", const="both", help="the default")
    parser.set_defaults(masks="both")
    kinds = ", ".join(MASK_KINDS)
    parser.add_argument("--mask-kind", default="key_padding", help=f"one of {kinds}; default: %(default)s")
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16, float16 or float32; default: %(default)s")
    parser.add_argument("--tokens", type=int, default=0, metavar="N", help="longest side; default: as in the model")
    parser.add_argument("--seed", type=seed, default=0, help="default: %(default)s")
    parser.add_argument("--device", help="such as cpu or cuda:1; default: the first accelerator, else the CPU")
    parser.add_argument(
        "--output", type=Path, default=Path("attention_benchmark"), metavar="DIR",
        help="folder for the chart and the report; default: %(default)s",
    )  # fmt: skip


def run(options: argparse.Namespace, program: str) -> int:
    """Measure, write the files, print the tables.

    Returns 0, or 1 where a kernel left the device unusable, or 130 after an interruption; in both cases the rows that
    were finished are written.

    Raises:
        ValueError: bad options, or a package that is not installed; the message says what to do.
    """
    need("matplotlib.figure")
    try:
        import torch
    except ImportError as error:
        raise ComparisonError(f"a benchmark needs torch, which cannot be imported here: {error}") from error
    from .bench import INTERRUPTED
    from .bench_chart import draw_benchmark
    from .bench_run import Asked, measure
    from .bench_tables import console, markdown
    from .contenders import parse_backends, router_for
    from .picture import save

    if options.backends is not None and not options.backends.strip():
        parse_backends([])  # says what to do
    asked = Asked(
        options.presets, options.backends or "", options.masks, options.mask_kind, options.dtype, options.tokens,
        options.seed,
    )  # fmt: skip
    make_folder(options.output)
    with contextlib.redirect_stdout(sys.stderr):  # what packages print while they load is no part of the answer
        router = router_for(options.device)
        if router.platform.kind == "cpu" and not asked.tokens:
            print("full lengths on a CPU take hours; --tokens 1024 scales them down", file=sys.stderr)
        progress = Progress()
        try:
            device = torch.device(options.device) if options.device else None
            report = measure(asked, router, device, progress=progress)
        except KeyboardInterrupt:
            progress.end()
            print("interrupted before anything could be measured", file=sys.stderr)
            return 130
        finally:
            progress.end()
    report.command = _command(program, asked, options.device)
    save(draw_benchmark(report), options.output / "benchmark.png")
    (options.output / "benchmark.json").write_text(report.to_json(), encoding="utf-8")
    (options.output / "benchmark.md").write_text(markdown(report), encoding="utf-8")
    if options.json:
        print(report.to_json(), end="")
    else:
        print(f"{console(report)}\n\nChart:  {(options.output / 'benchmark.png').absolute()}")
        print(f"Report: {(options.output / 'benchmark.md').absolute()}, and benchmark.json beside it")
    if report.ended is not None:
        print(report.ended, file=sys.stderr)
        return 130 if report.ended == INTERRUPTED else 1
    return 0


def _command(program: str, asked: Asked, device: str | None) -> str:
    """The command that repeats this run."""
    words = [*program.split(), "bench"]
    for name in ("presets", "backends"):
        words += [f"--{name}", getattr(asked, name)] if getattr(asked, name).strip() else []
    words += [f"--{asked.masks}", "--mask-kind", asked.mask_kind, "--dtype", asked.dtype]
    words += ["--tokens", str(asked.tokens), "--seed", str(asked.seed), *(["--device", device] if device else [])]
    return shlex.join(words)
