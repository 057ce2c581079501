"""The command `quality`: its options, its progress, the files it writes and what it prints.

Boundary: the terminal and the output folder. Importing it needs no torch, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .command import Progress, make_folder, seed
from .metrics import need
from .report import ComparisonError

if TYPE_CHECKING:
    from .quality import Asked

HELP = "sample clips of the embedded video model: how far each backend is from dense attention, and how fast"
FILES = ("quality.md", "quality.json", "quality.png", "frames.png")
VIDEO_WEIGHTS = Path(__file__).parents[1] / "demo" / "weights" / "tiny_motion_wan_fp16.safetensors"
"""`demo.model.VIDEO_WEIGHTS`, which needs torch."""
EXAMPLES = """examples:
  %(prog)s
  %(prog)s --prompts 4 --steps 10 --backends "sparge_attn,sol_attn keep_percent=25"
  %(prog)s --backends "vmoba_attn spatial_chunk_size=[4,4] moba_threshold=0.25" --output DIR

torch_sdpa always runs and is the reference. A sparse backend without options is sampled at 50, 25 and 12.5 % kept,
where its options can say a share, else with its defaults; the first --dense-steps of its steps are dense. With options
it runs as they say. On a CPU the default takes hours: choose fewer prompts, steps or backends. It writes quality.md,
quality.json, quality.png (quality against time in attention) and frames.png (the first prompt)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--backends",
        help="names, separated by commas, options behind them; default: sparse methods that need no trained model, and "
        "quantized kernels that run here",
    )
    parser.add_argument("--prompts", type=int, default=16, metavar="N", help="captions; default: %(default)s")
    parser.add_argument("--steps", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--size", type=int, default=32, help="pixels on a side, an even number; default: %(default)s")
    parser.add_argument("--frames", type=int, default=8, help="default: %(default)s, a whole clip")
    parser.add_argument("--seed", type=seed, default=0, help="of captions and noise; default: %(default)s")
    parser.add_argument("--guidance", type=float, default=4.0, help="default: %(default)s")
    parser.add_argument(
        "--dense-steps", type=int, metavar="N", help="of methods named without options; default: a fifth of the steps"
    )
    parser.add_argument("--weights", type=Path, metavar="FILE", help="default: the embedded video model")
    parser.add_argument("--dtype", help="float32, float16 or bfloat16; default: float32 on the CPU, else float16")
    parser.add_argument("--device", help="such as cpu or cuda:1; default: the first accelerator, else the CPU")
    parser.add_argument(
        "--output", type=Path, default=Path("attention_quality"), metavar="DIR",
        help="folder for the report and the pictures; default: %(default)s",
    )  # fmt: skip


def run(options: argparse.Namespace, program: str) -> int:
    """Measure, write the files, print the table.

    Returns 0, or 130 after an interruption; then the prompts that were finished are written.

    Raises:
        ValueError: bad options, or a package that is not installed; the message says what to do.
    """
    need("skimage.metrics")
    need("matplotlib.figure")
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise ComparisonError(f"the command needs torch, which cannot be imported here: {error}") from error
    from .contenders import parse_backends, router_for
    from .picture import save
    from .quality import Asked, measure
    from .quality_chart import draw_frames, draw_quality
    from .quality_tables import console, markdown

    if options.backends is not None and not options.backends.strip():
        parse_backends([])  # says what to do
    asked = Asked(
        options.weights or VIDEO_WEIGHTS, options.backends or "", options.prompts, options.steps, options.size,
        options.frames, options.seed, options.guidance, options.dense_steps, options.dtype, options.device,
    )  # fmt: skip
    make_folder(options.output)
    with contextlib.redirect_stdout(sys.stderr):  # what packages print while they load is no part of the answer
        router = router_for(asked.device)
        progress = Progress()
        try:
            found = measure(asked, router=router, progress=progress)
        except KeyboardInterrupt:
            progress.end()
            print("interrupted before a prompt was finished", file=sys.stderr)
            return 130
        finally:
            progress.end()
    report = found.report
    report.command = _command(program, asked, options.weights)
    save(draw_quality(report), options.output / "quality.png")
    save(draw_frames(report, found.clips), options.output / "frames.png")
    (options.output / "quality.json").write_text(report.to_json(), encoding="utf-8")
    (options.output / "quality.md").write_text(markdown(report), encoding="utf-8")
    if options.json:
        print(report.to_json(), end="")
    else:
        print(f"{console(report)}\n\nReport: {(options.output / 'quality.md').absolute()}, and its pictures beside it")
    return 0 if report.ended is None else 130


def _command(program: str, asked: Asked, weights: Path | None) -> str:
    """The command that repeats this run."""
    words = [*program.split(), "quality", *(["--backends", asked.backends] if asked.backends else [])]
    for name in ("prompts", "steps", "size", "frames", "seed", "guidance", "dtype", "device"):
        value = getattr(asked, name)
        if value is not None:
            words += [f"--{name}", f"{value:g}" if isinstance(value, float) else str(value)]
    words += ["--dense-steps", str(asked.first_steps), *(["--weights", str(weights)] if weights else [])]
    return shlex.join(words)
