"""The command `replay`: what a picture's record says, whether it can run here, and the configuration that repeats it.

Boundary: the terminal and files. What a record means is in `backends/config/recorded.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..backends.config.record_reader import is_record, read
from ..backends.config.recorded import MARK, ChoiceTimeline, Recorded, differences
from ..backends.engine.router import Router
from ..backends.values.bounded import MOST_JSON, read_file, shortened
from ..backends.values.errors import ConfigError
from ..backends.values.plain_data import load_json
from ..backends.values.request import AttentionRequest
from .metadata import texts_of
from .report import ComparisonError

HELP = "what a picture's attention record says, and the configuration that repeats it"
WIDEST = 200
"""Characters of a cell of the table: every row is as wide as the widest."""
KEY = "attention_backends"
"""As node Attention Record names its entry of a file's metadata."""
EXAMPLES = """examples:
  %(prog)s picture.png
  %(prog)s picture.png --output same_again.json
  %(prog)s same_again.json --platform cuda:9.0 --json

The record is what node Attention Record put into the metadata of a PNG, WebP or .latent file, or a .json file with it.
The configuration repeats it: paste it into node Attention Config From Text in the workflow of the picture, instead of
the other attention nodes. What cannot run here falls back, and says so."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("file", type=Path, help="a picture with a record, or the record as .json")
    parser.add_argument("--platform", help="a machine, described as for explain; default: this one")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the configuration there, as JSON")


def run(options: argparse.Namespace, record: Recorded, router: Router) -> int:
    """Print what was recorded, and whether it can run on the router's machine; write the configuration if asked to.

    Raises:
        ComparisonError: the configuration cannot be written.
    """
    with contextlib.redirect_stdout(sys.stderr):  # what packages print while they load is no part of the answer
        report = report_of(record, router)
    if options.output is not None:
        try:
            options.output.write_text(json.dumps(record.data, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise ComparisonError(f"cannot write {options.output}: {error.strerror or error}") from error
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        print(as_text(report))
        if options.output is not None:
            print(f"Configuration: {options.output}")
    return 0


def load(path: Path) -> Recorded:
    """The record of a file.

    Raises:
        ComparisonError, ConfigError: it has none, or it cannot be read.
    """
    if path.suffix.lower() == ".json":
        try:
            text = read_file(path.expanduser(), MOST_JSON).decode("utf-8-sig")
        except (OSError, RuntimeError, UnicodeDecodeError) as error:
            raise ComparisonError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
        data = load_json(text, path.name)
    else:
        found = texts_of(path, KEY)
        if KEY not in found:
            there = ", ".join(found) or "none"
            raise ComparisonError(
                f"{path.name} has no attention record (its metadata: {there}). It is written where node Attention "
                "Record stands between the sampler and the node that saves, ComfyUI runs without --disable-metadata, "
                "and a script that queues the prompt sends extra_pnginfo"
            )
        data = load_json(found[KEY], path.name)
    if not is_record(data):
        raise ConfigError(f"{path.name}: not a record of attention-backends: it has no entry {MARK}")
    return read(data, path.name)


def report_of(record: Recorded, router: Router) -> dict[str, Any]:
    """The record beside what this machine can do, as plain data."""
    data = record.data
    version = str(data["made_by"].get("attention_backends", ""))
    refused: Refused = {}
    return {
        "made_by": data["made_by"],
        "machine": router.platform.describe(),
        "not_recorded": data["not_recorded"],
        "runs": [
            {
                **{name: recorded_run[name] for name in recorded_run if name not in ("decisions", "cards")},
                "differences": differences(run.machine, router.platform, version),
                "decisions": [
                    _decision(entry, timeline, router, refused)
                    for entry, timeline in zip(recorded_run["decisions"], run.timelines, strict=True)
                ],
            }
            for of_all, run_of_all in zip(data["runs"], record.runs, strict=True)
            for recorded_run, run in zip(
                (of_all, *of_all.get("cards", ())), (run_of_all, *run_of_all.others.values()), strict=True
            )
        ],
        "config": data,
    }


Refused = dict[tuple[str, str, AttentionRequest], tuple[str, ...]]
"""Backend, options and call, and why that cannot run here: the parts of a record are mostly of the same few."""


def _decision(entry: Mapping[str, Any], timeline: ChoiceTimeline, router: Router, known: Refused) -> dict[str, Any]:
    """An entry with `cannot_run` in each part: why not here, for any of its calls; empty where it can."""
    requests = [AttentionRequest(**call) for call in entry["calls"]]
    parts = []
    for ran, choice in zip(entry["ran"], timeline.choices, strict=True):
        name, options = choice.asked or "", repr(sorted(choice.extra.items()))
        reasons: dict[str, None] = {}
        for request in requests:
            key = (name, options, request)
            if key not in known:
                known[key] = tuple(router.reasons_against(name, request, options=choice.extra))
            reasons.update(dict.fromkeys(known[key]))
        parts.append({**ran, "cannot_run": list(reasons)})
    return {**entry, "ran": parts}


def as_text(report: Mapping[str, Any]) -> str:
    """The table a person reads."""
    by = ", ".join(f"{name} {version}" for name, version in report["made_by"].items())
    lines = [f"Recorded by: {by}", f"Machine:     {report['machine']}"]
    for run in report["runs"]:
        steady = "the same kernels throughout" if run.get("steady") else "kernels changed while it ran"
        node = f", node {run['node_id']}" if run.get("node_id") else ""
        card = f", on {run['card']}" if run.get("card") else ""
        lines += ["", f"{run.get('model') or 'A model'}{node}{card}: {run['model_calls']} model calls; {steady}"]
        if run["differences"]:
            lines.append(f"The same seed may give another picture here: {'; '.join(run['differences'])}")
        lines += [f"Changed: {text}" for text in run.get("changes", ())]
        lines += [f"Not repeated: {text}" for text in run.get("not_repeated", ())]
        if run.get("guard_alarms"):
            lines.append(f"The guard found {run['guard_alarms']} bad calls; the first: {run.get('first_alarm')}")
        lines += _table(run["decisions"])
    for one in report["not_recorded"]:
        lines += ["", f"Not recorded: node {one.get('node_id')} ({one.get('class_type')}): {one.get('reason')}"]
    return "\n".join(lines)


def _table(decisions: list[dict[str, Any]]) -> list[str]:
    rows: list[tuple[str, ...]] = [("ROLE", "BLOCKS", "FROM", "RAN", "HERE")]
    for entry in decisions:
        blocks = ", ".join(block or "-" for block in entry["blocks"])
        for ran in entry["ran"]:
            options = ", ".join(f"{name}={value}" for name, value in (ran.get("options") or {}).items())
            what = f"{ran['backend']} ({ran['member']})" if ran.get("member") else ran["backend"]
            here = f"no: {'; '.join(ran['cannot_run'])}" if ran["cannot_run"] else "yes"
            said = f"{what}, {options}" if options else what
            row = (entry["role"], blocks, f"model call {ran['from_model_call']}", said, here)
            rows.append(tuple(shortened(cell, WIDEST) for cell in row))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return ["  ".join([*(f"{row[column]:{widths[column]}}" for column in range(4)), row[4]]) for row in rows]
