"""Node Attention Comparison: the picture of Compare Attention Backends from branches that a person built by hand."""

from __future__ import annotations

import math
from typing import Any

import torch
from comfy_api.latest import io

from ...backends.report.audit import fell_back
from ...backends.report.outcome import NOT_USED, PARTLY
from ...backends.values.plain_data import load_json
from ...comparison import metrics, picture, tables
from ...comparison.report import ComparisonError, Report, Row, Spread
from ..configure.selector import CATEGORY
from ..history import graph
from ..inputs import text_of, wrong_link

BRANCHES = 6
MOST_SECONDS = 1e9
MOST_BYTES, MOST_VALUES = 8 << 20, 400_000
"""Of one report, and of the values in it: a long run of a large model has some ten thousand rows."""


class AttentionComparison(io.ComfyNode):
    """Images with labels and Attention Reports in; one labelled picture with differences, and a table, out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        branches: list[Any] = []
        for number in range(1, BRANCHES + 1):
            branches += [
                io.Image.Input(f"image_{number}", optional=number > 1),
                io.String.Input(f"label_{number}", default="", optional=True, tooltip="Empty: what really ran."),
                io.String.Input(
                    f"report_{number}", default="", optional=True, force_input=True,
                    tooltip="The report output of Attention Report in this branch.",
                ),
            ]  # fmt: skip
        return io.Schema(
            node_id="AttentionComparison",
            display_name="Attention Comparison",
            category=CATEGORY,
            description=(
                "Draws the images of several branches side by side with their differences from the first. With "
                "reports connected it refuses branches that differ in more than attention, and names the difference."
            ),
            inputs=branches,
            outputs=[io.Image.Output(display_name="comparison"), io.String.Output(display_name="table")],
        )

    @classmethod
    def validate_inputs(
        cls,
        image_2: Any = None,
        image_3: Any = None,
        image_4: Any = None,
        image_5: Any = None,
        image_6: Any = None,
        report_1: Any = None,
        report_2: Any = None,
        report_3: Any = None,
        report_4: Any = None,
        report_5: Any = None,
        report_6: Any = None,
        input_types: Any = None,
    ) -> bool | str:
        """At least two images are connected, where ComfyUI looks for the first one alone; no report is made up."""
        given = (image_2, image_3, image_4, image_5, image_6)
        sockets = {f"image_{number}": image for number, image in enumerate(given, start=2)}
        if problem := wrong_link(cls, input_types, **sockets):
            return problem
        if input_types is not None and len({*sockets, "image_1"} & set(input_types)) < 2:
            return "connect at least two images to compare"
        try:
            for number, report in enumerate((report_1, report_2, report_3, report_4, report_5, report_6), start=1):
                if isinstance(report, str):  # else it is connected, or ComfyUI itself refuses it
                    parse_report(text_of(report), number)
        except ComparisonError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, **given: Any) -> io.NodeOutput:
        numbers = [number for number in range(1, BRANCHES + 1) if given.get(f"image_{number}") is not None]
        if len(numbers) < 2:
            raise ComparisonError(f"{len(numbers)} image connected: connect at least two to compare")
        images = [given[f"image_{number}"].float().cpu() for number in numbers]
        for number, image in zip(numbers, images, strict=True):
            if image.shape != images[0].shape:
                raise ComparisonError(
                    f"image {number} has shape {tuple(image.shape)}, image {numbers[0]} {tuple(images[0].shape)}: "
                    "branches of one comparison need the same size and number of frames"
                )
        reports = {number: parse_report(text_of(given.get(f"report_{number}") or ""), number) for number in numbers}
        check_same({number: report for number, report in reports.items() if report})
        labels = {number: text_of(given.get(f"label_{number}") or "").strip() for number in numbers}
        drawn = draw(images, [make_row(number, labels[number], reports[number]) for number in numbers], reports)
        return io.NodeOutput(*drawn)


def parse_report(text: str, number: int) -> dict[str, Any]:
    """The JSON of an Attention Report; empty when none is connected.

    Raises:
        ComparisonError: it is not what that node gives, or too large.
    """
    if not text.strip():
        return {}
    try:
        report = load_json(text, "report", most_bytes=MOST_BYTES, most_entries=MOST_VALUES, constants=True)
        _check_report(report)
    except (ValueError, TypeError, KeyError) as error:
        raise ComparisonError(f"report {number} is not the report output of an Attention Report node") from error
    found: dict[str, Any] = report
    return found


def _check_report(report: Any) -> None:
    """Look at every part that is used here.

    Raises:
        ValueError, TypeError, KeyError: a part is missing or of another kind.
    """
    for name in ("settings", "versions"):
        _need(report[name], dict, name)
    device = report["versions"].get("device", "")
    _need(device, str, "device")
    for one in _need(report.get("not_counted", []), list, "not_counted"):
        for name in ("node_id", "class_type", "reason"):
            _need(one[name], str, name)
    run = report["run"]
    if run is None:
        return
    _need(run, dict, "run")
    _need(run.get("model", ""), str, "model")
    _need(run["steps"], int, "steps")
    if run.get("seconds") is not None and not 0 <= _need(run["seconds"], (int, float), "seconds") < MOST_SECONDS:
        raise ValueError(f"seconds {run['seconds']}")
    for row in _need(run["rows"], list, "rows"):
        _need(row["backend"], str, "backend")
        _need(row["calls"], int, "calls")
        for name in ("member", "asked", "reason"):
            _need(row[name], (str, type(None)), name)


def _need(value: Any, kind: type | tuple[type, ...], name: str) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{name} is of type {type(value).__name__}")
    return value


def check_same(reports: dict[int, dict[str, Any]]) -> None:
    """Refuse branches whose settings or versions differ, naming each difference."""
    if not reports:
        return
    first_number, first = next(iter(reports.items()))
    differences = []
    for number, report in reports.items():
        for part in ("settings", "versions"):
            for key in sorted({*first[part], *report[part]}):
                mine, theirs = first[part].get(key, "absent"), report[part].get(key, "absent")
                if mine != theirs:
                    differences.append(f"{key}: {mine!r} in branch {first_number}, {theirs!r} in {number}")
    if differences:
        raise ComparisonError(
            "these branches differ in more than attention, so they cannot be compared; make these equal: "
            + "; ".join(differences)
        )


def make_row(number: int, label: str, report: dict[str, Any]) -> Row:
    """A row from a label and what an Attention Report says; it failed when no call ran what was asked for."""
    run = report.get("run")
    if not run:
        return Row(label or f"branch {number}")
    paths = run["rows"]
    ran = " + ".join(dict.fromkeys(path["member"] or path["backend"] for path in paths)) or None
    asked = " + ".join(dict.fromkeys(path["asked"] or "auto" for path in paths)) or f"branch {number}"
    others = sum(path["calls"] for path in paths if path["reason"] and not path.get("expected"))
    row = Row(asked, ran=ran, label=label or None, fell_back=others, runs=1)
    outcome = run.get("outcome") or {}
    if outcome.get("kind") == NOT_USED:
        row.failed = outcome["text"]
    elif paths and all(fell_back(path) for path in paths):
        row.failed = "fell back: " + ", ".join(dict.fromkeys(path["reason"] for path in paths))
    if run.get("seconds"):
        row.total_ms = Spread.of([1e3 * run["seconds"]])
        row.step_ms = Spread.of([1e3 * run["seconds"] / max(1, run["steps"])])
    return row


def fallback_notes(rows: list[Row], reports: dict[int, dict[str, Any]]) -> list[str]:
    """For each branch in which some calls, not all, ran something else than was asked for: how many and why.

    Calls that another pack computed have a separate note: they were not decided here.
    """
    notes = []
    for row, (number, report) in zip(rows, reports.items(), strict=True):
        paths = (report.get("run") or {"rows": []})["rows"]
        fallen = [path for path in paths if fell_back(path)]
        if fallen and not row.failed:
            calls, total = (sum(path["calls"] for path in some) for some in (fallen, paths))
            reasons = ", ".join(dict.fromkeys(path["reason"] for path in fallen))
            notes.append(f"branch {number}: {calls} of {total} calls fell back: {reasons}")
        outcome = (report.get("run") or {}).get("outcome") or {}
        if outcome.get("kind") == PARTLY:
            notes.append(f"branch {number}: {outcome['text']}")
    return notes


def not_counted_notes(reports: dict[int, dict[str, Any]]) -> list[str]:
    """For each sampler of a branch that has no run report: which one and why; times and rows are without it."""
    return [
        f"branch {number}: node {one['node_id']} ({one['class_type']}) is not counted: {one['reason']}"
        for number, report in reports.items()
        for one in report.get("not_counted", ())
    ]


def as_number(value: Any) -> float:
    """A number that a node was given; nan where something else stands there."""
    return float(value) if isinstance(value, (int, float)) else math.nan


def draw(images: list[torch.Tensor], rows: list[Row], reports: dict[int, dict[str, Any]]) -> tuple[torch.Tensor, str]:
    """The picture and the table; the first branch is the reference."""
    nothing: dict[str, Any] = {"settings": {}, "versions": {}, "run": None}
    known = next((report for report in reports.values() if report), nothing)

    def setting(default: Any, *names: str) -> Any:
        """The first value of these inputs upstream."""
        return next(iter(graph.values(known["settings"], *names)), default)

    report = Report(
        mode="end_to_end",
        model=(known["run"] or {}).get("model", ""),
        prompt=" | ".join(map(str, graph.values(known["settings"], "text", "caption", "prompt"))),
        seed=setting(0, "seed", "noise_seed"),
        width=images[0].shape[2],
        height=images[0].shape[1],
        frames=images[0].shape[0],
        steps=(known["run"] or {}).get("steps") or setting(0, "steps"),
        guidance=as_number(setting(1.0, "cfg", "guidance")),
        sampling=str(setting("", "sampler_name")),
        dtype="",
        machine=known["versions"].get("device", ""),
        versions=known["versions"],
        rows=rows,
        notes=[*fallback_notes(rows, reports), *not_counted_notes(reports)],
    )
    if not all(reports.values()):
        report.notes.append("without reports nothing says that these branches are comparable")
    report.relate()
    for row, image in zip(rows, images, strict=True):
        metrics.score(row, image[..., :3], images[0][..., :3])
    return picture.to_tensor(picture.draw(report, [image[..., :3] for image in images])), tables.console(report)
