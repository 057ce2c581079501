"""The command `compare`: its options, its progress, the files it writes and what it prints.

Boundary: the terminal and the output folder. Importing it needs no torch, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shlex
import sys
import tempfile
from pathlib import Path

from .metrics import need
from .report import ComparisonError

HELP = "sample the embedded model once per backend: pictures side by side, differences, times"
FILES = ("comparison.png", "comparison.json", "comparison.md")
EXAMPLES = """examples:
  %(prog)s
  %(prog)s --frames 4 --backends "sparge_attn topk=0.5, sparge_attn topk=0.25"     options behind a name
  %(prog)s --backends sdpa_math,sage_attn --repeat 5 --prompt "a small blue star at the top on black"
  %(prog)s --mode attention --json

torch_sdpa always runs and is the reference. A backend that cannot run gets a row that says why; nothing runs in its
place. Modes: end_to_end samples a whole picture; one_step compares one step from the same latent; attention runs
every backend on the same query, key and value and compares with float64."""

MOST_SEED = 2**62
"""So that seeds counted on from it are some that torch takes."""


def seed(text: str) -> int:
    """A seed on the command line.

    Raises:
        argparse.ArgumentTypeError: it is no whole number that torch takes.
    """
    if not re.fullmatch(r"-?\d{1,19}", text) or abs(int(text)) > MOST_SEED:
        raise argparse.ArgumentTypeError(f"{text[:30]!r} is not a whole number of at most {MOST_SEED}")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--backends", help="names, separated by commas; default: all that run here")
    parser.add_argument("--mode", default="end_to_end", help="end_to_end, one_step or attention; default: %(default)s")
    parser.add_argument("--prompt", help="what to draw; default: a shape that the embedded model knows")
    parser.add_argument("--steps", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--size", default="32x32", help="WIDTHxHEIGHT in pixels, or one number; default: %(default)s")
    parser.add_argument("--frames", type=int, default=1, help="more than 1 for a video; default: %(default)s")
    parser.add_argument("--seed", type=seed, default=1, help="default: %(default)s")
    parser.add_argument("--guidance", type=float, default=4.0, help="default: %(default)s")
    parser.add_argument("--repeat", type=int, default=3, help="measured runs of each backend; default: %(default)s")
    parser.add_argument("--dtype", help="float32, float16 or bfloat16; default: float32 on the CPU, else float16")
    parser.add_argument("--device", help="such as cpu or cuda:1; default: the first accelerator, else the CPU")
    parser.add_argument(
        "--output", type=Path, default=Path("attention_comparison"), metavar="DIR",
        help="folder for the picture and the report; default: %(default)s",
    )  # fmt: skip


def run(options: argparse.Namespace, program: str) -> int:
    """Compare, write the files, print the table.

    Returns 0, or 1 where the reference itself did not run, or 130 after an interruption (what was finished is written).

    Raises:
        ValueError: bad options, or a package that is not installed; the message says what to do.
    """
    need("skimage.metrics")
    need("matplotlib.figure")
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise ComparisonError(f"a comparison needs torch, which cannot be imported here: {error}") from error
    from .contenders import default_backends, parse_backends, router_for, split_backends
    from .picture import draw, save
    from .run import compare
    from .scene import Settings
    from .tables import console, markdown

    width, height = _size(options.size)
    given = {name: getattr(options, name) for name in ("prompt",) if getattr(options, name) is not None}
    settings = Settings(
        mode=options.mode, seed=options.seed, width=width, height=height, frames=options.frames, steps=options.steps,
        guidance=options.guidance, repeat=options.repeat, dtype=options.dtype, device=options.device, **given,
    )  # fmt: skip
    make_folder(options.output)
    with contextlib.redirect_stdout(sys.stderr):  # what packages print while they load is no part of the answer
        router = router_for(settings.device)
        named = None if options.backends is None else parse_backends(split_backends(options.backends))
        backends = named or default_backends(router)
        progress = Progress()
        try:
            found = compare(settings, backends, router=router, progress=progress)
        except KeyboardInterrupt:
            progress.end()
            print("interrupted before anything could be compared", file=sys.stderr)
            return 130
        finally:
            progress.end()
    report = found.report
    report.command = _command(program, settings, backends)
    save(draw(report, found.pictures), options.output / "comparison.png")
    (options.output / "comparison.json").write_text(report.to_json(), encoding="utf-8")
    (options.output / "comparison.md").write_text(markdown(report), encoding="utf-8")
    if options.json:
        print(report.to_json(), end="")
    else:
        print(f"{report.subject()}\n\n{console(report)}\n\nPicture: {(options.output / 'comparison.png').absolute()}")
        print(f"Report:  {(options.output / 'comparison.md').absolute()}, and comparison.json beside it")
    if found.interrupted:
        return 130
    return 1 if report.rows[0].failed else 0


class Progress:
    """One line on stderr that is written over; nothing where stderr is not a terminal."""

    def __init__(self) -> None:
        self._shown = sys.stderr.isatty()

    def __call__(self, what: str, done: int, total: int) -> None:
        if self._shown:
            print(f"\r[{done + 1}/{total}] {what}".ljust(78), end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self._shown:
            print("\r" + " " * 78 + "\r", end="", file=sys.stderr, flush=True)


def _size(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.strip().isdigit() for part in parts):
        raise ComparisonError(f"size {text!r}: give WIDTHxHEIGHT such as 32x32, or one number")
    return int(parts[0]), int(parts[-1])


def make_folder(folder: Path) -> None:
    """Make the output folder, and write a file in it: the work whose results go there may take hours.

    Raises:
        ComparisonError: nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as trial:
            trial.write(b"0")
    except OSError as error:
        raise ComparisonError(
            f"output folder {folder}: no file can be written there ({error.strerror or error}); name another folder "
            "with --output"
        ) from error


def _command(program: str, settings: object, backends: list[str]) -> str:
    """The command that repeats this comparison, with every option that matters spelled out."""
    values = vars(settings)
    words = [*program.split(), "compare", "--backends", ",".join(backends), "--size",
             f"{values['width']}x{values['height']}"]  # fmt: skip
    for name in ("mode", "prompt", "steps", "frames", "seed", "guidance", "repeat", "dtype", "device"):
        if values[name] is not None:
            value = f"{values[name]:g}" if isinstance(values[name], float) else str(values[name])
            words += [f"--{name}", value]
    return shlex.join(words)
