"""`doctor`: each backend with version and file, or why it cannot run and how to get it."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from dataclasses import asdict, replace

from ..backends.config.names import canonical
from ..backends.doctor import probe, sparse_executors
from ..backends.doctor.doctor import Row, examine, probe_all, this_machine, why_no_card
from ..backends.doctor.install import Interpreter, running_interpreter
from ..backends.engine.router import Router
from ..backends.kernels import BACKENDS
from ..backends.measure import remembered
from ..backends.values.platform import Platform

HELP = "each backend: available with version and file, or why not and how to get it"
EXAMPLES = """examples:
  %(prog)s
  %(prog)s sage_attn flash_attn
  %(prog)s --json
  %(prog)s --probe
  %(prog)s --probe sage_attn --timeout 300
  %(prog)s --forget sage_attn

Nothing is installed or changed: commands are printed for you to run. A probe runs each kernel on a tiny problem, in a
separate process. What it finds is remembered for this card, driver, torch and package versions, in a folder that
ATTENTION_BACKENDS_CACHE can name: a kernel that crashed, hung or was wrong is not used until a later probe is ok."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("backend", nargs="*", help="only these, by any of their names")
    parser.add_argument("--verbose", action="store_true", help="for all backends what is said of a named one")
    parser.add_argument("--probe", action="store_true", help="run each kernel that is there, and remember the outcome")
    parser.add_argument(
        "--timeout", type=_seconds, default=probe.TIMEOUT, help="seconds for one probe; default: %(default)g"
    )
    parser.add_argument("--forget", action="store_true", help="drop what earlier probes found")


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return seconds


def run(options: argparse.Namespace) -> int:
    """Print the machine and its backends; returns the exit status."""
    ids = [canonical(name) for name in options.backend]
    unknown = [name for name in ids if name not in BACKENDS]
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: a way to choose, not a backend; the names are: {', '.join(BACKENDS)}")
    interpreter = running_interpreter()
    with contextlib.redirect_stdout(sys.stderr):  # what packages print while they load is no part of the answer
        platform, without_torch = this_machine()
        if options.forget:
            print(f"outcomes of probes forgotten: {remembered.forget(ids)}")
        found = {}
        if options.probe and without_torch is None:
            found = probe_all(Router(platform), ids, lambda name: probe.probe(name, options.timeout), print)
        rows = examine(Router(platform), interpreter, ids, without_torch)
        rows = [row if row.probed else replace(row, probed=found.get(row.id)) for row in rows]
        executors = [] if ids else _executors(platform, interpreter, options, without_torch)
        hint = None if without_torch else why_no_card(platform)
    if options.json:
        report = {
            "platform": {**asdict(platform), "packages": dict(platform.packages)},
            "interpreter": interpreter.path,
            "hint": hint,
            "backends": [row.as_dict() for row in rows],
            "executors": [row.as_dict() for row in executors],
        }
        print(json.dumps(report, indent=2))
    else:
        print(_doctor_text(platform, interpreter, hint, rows, executors, everything=bool(ids) or options.verbose))
    return 0


def _executors(
    platform: Platform, interpreter: Interpreter, options: argparse.Namespace, without_torch: str | None
) -> list[Row]:
    """Rows of the packages that compute the blocks of sparse methods, probed first where that is asked for."""
    found = {}
    if options.probe and without_torch is None:
        for name in sparse_executors.to_probe(platform):
            print(f"probing {name} ...")
            found[name] = probe.probe(name, options.timeout)
    return sparse_executors.examine(platform, interpreter, found, without_torch)


def _doctor_text(
    platform: Platform,
    interpreter: Interpreter,
    hint: str | None,
    rows: list[Row],
    executors: list[Row],
    *,
    everything: bool,
) -> str:
    """Executors without a trace of their package are left out, unless everything is asked for."""
    lines = [
        f"Machine:     {platform.describe()}",
        f"Interpreter: {interpreter.path} ({interpreter.python}, {interpreter.machine})",
    ]
    lines += [f"Note:        {hint}", ""] if hint else [""]
    shown = [row for row in executors if everything or row.version]
    for title, some in (("BACKEND", rows), ("SPARSE EXECUTOR", shown)):
        width = max((len(text) for text in (title, *(row.id for row in some))), default=0)
        lines += [f"{title:{width}}  ACCURACY   AVAILABLE"] if some else []
        for row in some:
            lines += _row_lines(row, width, everything=everything)
    return "\n".join(lines)


def _row_lines(row: Row, width: int, *, everything: bool) -> list[str]:
    details = [", ".join(filter(None, (row.version, row.file)))] if row.available else list(row.reasons)
    if row.probed and row.probed.status != "unavailable":
        details.append(f"probed: {row.probed.summary}")
    state = "yes" if row.available else "no "
    lines = [f"{row.id:{width}}  {row.accuracy:9}  {state}  {'; '.join(filter(None, details))}".rstrip()]
    if everything:
        lines += [f"    cards: {row.cards.text}"]
        lines += [f"    names: {row.symbols.text}"] if row.symbols.needed else []
        lines += [f"    stderr of the probe: {line}" for line in (row.probed.stderr if row.probed else ())]
    elif row.symbols.problem and row.symbols.installed:
        lines.append(f"    names: {row.symbols.problem}")
    if row.advice and (everything or row.advice.kind != "nothing"):
        lines += [f"    {text}" for text in (row.advice.text, row.advice.note) if text]
    return lines
