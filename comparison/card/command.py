"""The command `card`: its options, what it prints, and the page that a person may share.

Boundary: the terminal. Importing it needs no torch.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from pathlib import Path

from ..command import make_folder
from . import store
from .page import page
from .parts import PARTS
from .run import MACHINE, measure

HELP = "measure what this card does, part by part within a given time: one JSON and one page"
NAMES = tuple(name for name in PARTS if name != MACHINE)
EXAMPLES = f"""examples:
  %(prog)s
  %(prog)s --minutes 20
  %(prog)s --parts numerics,presets
  %(prog)s --share

Parts, in order of worth: {", ".join(NAMES)}.
Each runs in its own process with at most a third of the time that is left, the last with all of it. Results are kept as
they come, in card.partial.json and .md, which are card.json and .md once the run has ended: kill it when you like.
Nothing leaves the machine. --share measures nothing: it prints the page of the last run, to paste into an issue.
Paths are cut down to their last part, and "..." replaces the names of the user and of the host. Names of at most three
letters and common words, such as root, user or ubuntu, are not replaced: look the page through before you paste it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--minutes", type=float, default=6.0, help="for all parts together; default: %(default)g")
    parser.add_argument("--parts", default=",".join(NAMES), help="names, separated by commas; default: all")
    parser.add_argument(
        "--out", type=Path, default=Path("attention_card"), metavar="DIR",
        help="where the folder of the card is made; default: %(default)s",
    )  # fmt: skip
    parser.add_argument("--share", action="store_true", help="print the page of the last run, and measure nothing")


def _interrupt(*_: object) -> None:
    """End as after Ctrl+C: the part that runs is ended too."""
    raise KeyboardInterrupt


def run(options: argparse.Namespace, program: str) -> int:
    """Measure and print where the results are, or print the page of the last run.

    Returns 0, or 130 after an interruption.

    Raises:
        ValueError: bad options, or there is no run to share.
    """
    if options.share:
        last = store.newest(options.out)
        if last is None:
            raise ValueError(
                f"no run lies under {options.out}; run card without --share, or name its folder with --out"
            )
        data = store.read(last)
        print(store.dumped(data) if options.json else page(data), end="")
        return 0
    if not 0 < options.minutes <= 24 * 60:
        raise ValueError(f"minutes {options.minutes:g}: give a number above 0, at most a day")
    names = list(dict.fromkeys(name.strip() for name in options.parts.split(",") if name.strip()))
    unknown = [name for name in names if name not in NAMES]
    if unknown or not names:
        raise ValueError(f"no part is called {', '.join(unknown) or 'nothing'}; there are: {', '.join(NAMES)}")
    make_folder(options.out)
    given = ["--parts", ",".join(names)] if names != list(NAMES) else []
    command = shlex.join([*program.split(), "card", "--minutes", f"{options.minutes:g}", *given])
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        file, interrupted = measure(
            options.out, names, options.minutes, command, lambda text: print(text, file=sys.stderr, flush=True)
        )
    finally:
        signal.signal(signal.SIGTERM, before)
    if options.json:
        print(file.read_text(encoding="utf-8"), end="")
    else:
        print(f"Page:    {file.with_suffix('.md').absolute()}\nResults: {file.absolute()}")
    return 130 if interrupted else 0
