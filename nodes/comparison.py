"""Node Attention Comparison: the picture of Compare Attention Backends from branches that a person built by hand."""

from __future__ import annotations

import json
from typing import Any

import torch
from comfy_api.latest import io

from ..comparison import metrics, picture, tables
from ..comparison.report import ComparisonError, Report, Row, Spread
from .selector import CATEGORY

BRANCHES = 6


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
        reports = {number: parse_report(given.get(f"report_{number}") or "", number) for number in numbers}
        check_same({number: report for number, report in reports.items() if report})
        labels = {number: (given.get(f"label_{number}") or "").strip() for number in numbers}
        drawn = draw(images, [make_row(number, labels[number], reports[number]) for number in numbers], reports)
        return io.NodeOutput(*drawn)


def parse_report(text: str, number: int) -> dict[str, Any]:
    """The JSON of an Attention Report; empty when none is connected."""
    if not text.strip():
        return {}
    try:
        report = json.loads(text)
        complete = {"run", "settings", "versions"} <= set(report)
    except (json.JSONDecodeError, TypeError) as error:
        raise ComparisonError(f"report {number} is not the report output of an Attention Report node") from error
    if not complete:
        raise ComparisonError(f"report {number} is not the report output of an Attention Report node")
    found: dict[str, Any] = report
    return found


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
    """A row from a label and what an Attention Report says."""
    run = report.get("run")
    if not run:
        return Row(label or f"branch {number}")
    ran = " + ".join(dict.fromkeys(row["member"] or row["backend"] for row in run["rows"])) or None
    row = Row(label or ran or f"branch {number}", ran=ran, label=label or None, runs=1)
    if run.get("seconds") is not None:
        row.total_ms = Spread.of([1e3 * run["seconds"]])
        row.step_ms = Spread.of([1e3 * run["seconds"] / max(1, run["steps"])])
    return row


def draw(images: list[torch.Tensor], rows: list[Row], reports: dict[int, dict[str, Any]]) -> tuple[torch.Tensor, str]:
    """The picture and the table; the first branch is the reference."""
    known = next((report for report in reports.values() if report), {"settings": {}, "versions": {}, "run": None})
    settings: dict[str, Any] = known["settings"]

    def setting(name: str, default: Any) -> Any:
        return next((value for key, value in settings.items() if key.rsplit(".", 1)[-1] == name), default)

    texts = [setting(name, "") for name in ("text", "caption", "prompt")]
    flat = [text for value in texts for text in (value if isinstance(value, list) else [value]) if text]
    report = Report(
        mode="end_to_end",
        model=(known["run"] or {}).get("model", ""),
        prompt=" | ".join(map(str, flat)),
        seed=setting("seed", setting("noise_seed", 0)),
        width=images[0].shape[2],
        height=images[0].shape[1],
        frames=images[0].shape[0],
        steps=setting("steps", 0),
        guidance=float(setting("cfg", 1.0)),
        sampling=str(setting("sampler_name", "")),
        dtype="",
        machine=known["versions"].get("device", ""),
        versions=known["versions"],
        rows=rows,
        notes=[] if all(reports.values()) else ["without reports nothing says that these branches are comparable"],
    )
    report.relate()
    for row, image in zip(rows, images, strict=True):
        metrics.score(row, image[..., :3], images[0][..., :3])
    return picture.to_tensor(picture.draw(report, [image[..., :3] for image in images])), tables.console(report)
