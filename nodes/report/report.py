"""Node Attention Report: what ran in the sampler before it, as text and as data."""

from __future__ import annotations

import json
import platform
from collections.abc import Container
from typing import Any

import comfyui_version
import torch
from comfy_api.latest import io

from ...backends.report import BY_ANOTHER, audit, kept, outcome
from ...backends.report import findings as guard_findings
from ..configure.selector import CATEGORY
from ..history import graph, runs
from ..inputs import wrong_link
from . import report_picture

PICTURE = 3
"""Which output the picture is."""


class AttentionReport(io.ComfyNode):
    """LATENT in, the same LATENT out, and the run report of the sampling run that made it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AttentionReport",
            display_name="Attention Report",
            category=CATEGORY,
            description=(
                "Put it after the sampler: it passes the latent on and reports which kernel computed attention, per "
                "role and block, how often, and why not the one that was asked for. Needs an Attention Backend "
                "Selector or Per-Role Attention Config before the sampler."
            ),
            search_aliases=["which attention ran"],
            inputs=[io.Latent.Input("samples", tooltip="The sampler's output.")],
            outputs=[
                io.Latent.Output(display_name="samples"),
                io.String.Output(display_name="text", tooltip="A table to read; connect a Preview as Text node."),
                io.String.Output(display_name="report", tooltip="JSON, for Attention Comparison and for scripts."),
                io.Image.Output(display_name="picture", tooltip="The table as an image, drawn where it is connected."),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
            not_idempotent=True,
        )

    @classmethod
    def validate_inputs(cls, input_types: Any = None) -> bool | str:
        return wrong_link(cls, input_types) or True

    @classmethod
    def fingerprint_inputs(cls, samples: Any) -> bool:
        """Whether the picture is drawn. ComfyUI's cache has to tell apart an answer with it and one without."""
        return graph.is_taken(runs.queued(runs.executing()[0]), str(cls.hidden.unique_id), PICTURE)

    @classmethod
    def execute(cls, samples: dict[str, Any]) -> io.NodeOutput:
        prompt, node_id = cls.hidden.prompt or {}, str(cls.hidden.unique_id)
        latent = samples["samples"]
        parts = list(latent.unbind()) if latent.is_nested else [latent]
        run, missing = find_run(prompt, node_id, runs.executing()[0])
        report = {
            "run": run,
            "not_counted": missing,
            "settings": {**graph.settings(prompt, node_id), "latent": [list(part.shape) for part in parts]},
            "versions": versions(),
        }
        wanted = graph.is_taken(prompt, node_id, PICTURE)
        picture = report_picture.draw(report, remarks(report)) if wanted else None
        return io.NodeOutput(samples, as_text(report), json.dumps(report), picture)


def find_run(
    prompt: graph.Prompt, node_id: str, prompt_id: str | None
) -> tuple[dict[str, Any] | None, list[dict[str, str]]]:
    """The merged run report of the samplers upstream, or None; and the samplers that have none, nearest first.

    Stages, such as the two samplers of Wan 2.2 14B, become one report: steps and seconds are added up.
    """
    stages, missing = find_stages(prompt, node_id, prompt_id)
    return merged(stages) if stages else None, missing


def find_stages(
    prompt: graph.Prompt, node_id: str, prompt_id: str | None
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """The run reports of the samplers upstream of this node, oldest first; and the samplers that have none.

    Only reports of the executions that made what this node got count (`runs.of_node`), from an earlier prompt where
    ComfyUI took a sampler from its cache.
    """
    upstream = graph.ancestors(prompt, node_id)
    accounts = {name: runs.of_node(prompt, name, prompt_id) for name in upstream}
    known = runs.sampling_classes()
    samplers = [name for name in upstream if accounts[name] or is_sampler(prompt[name]["class_type"], known)]
    missing = [
        {"node_id": name, "class_type": prompt[name]["class_type"], "reason": why_not_counted(prompt, name, samplers)}
        for name in samplers
        if not accounts[name]
    ]
    by_number = {run["number"]: run for found in accounts.values() for run in found}
    return [by_number[number] for number in sorted(by_number)], missing


def is_sampler(class_type: str, known: Container[str]) -> bool:
    """Whether nodes of this class sample: one of them did, or a sampler by its name that makes a LATENT of a model.

    The name alone would take in upsamplers and the choice of a sampler; the sockets alone, nodes that add noise.
    """
    if class_type in known:
        return True
    import nodes as comfy_nodes

    node = comfy_nodes.NODE_CLASS_MAPPINGS.get(class_type)
    if node is None or "sampler" not in class_type.lower() or "LATENT" not in node.RETURN_TYPES:
        return False
    groups = node.INPUT_TYPES()
    taken = [spec[0] for group in ("required", "optional") for spec in groups.get(group, {}).values() if spec]
    return "MODEL" in taken or "GUIDER" in taken


def why_not_counted(prompt: graph.Prompt, sampler: str, samplers: Container[str]) -> str:
    """Why a sampler has no run report: none of our nodes is between it and the samplers before it, or it is gone."""
    before = graph.ancestors(prompt, sampler, stop=samplers)
    if any(prompt[name]["class_type"] in runs.CONFIG_NODES for name in before):
        return f"no data: this sampler's model has no attention node, or the run is older than the last {runs.KEPT}"
    return "no data: this sampler's model has no attention node"


def merged(stages: list[dict[str, Any]]) -> dict[str, Any]:
    """One run report of one or more stages, oldest first."""
    if len(stages) == 1:
        return stages[0]
    seconds = [stage["seconds"] for stage in stages]
    return {
        **stages[-1],
        "model": " + ".join(dict.fromkeys(stage["model"] for stage in stages)),
        "steps": sum(stage["steps"] for stage in stages),
        "seconds": None if None in seconds else sum(seconds),
        "rows": [row for stage in stages for row in stage["rows"]],
        "guard": [entry for stage in stages for entry in stage["guard"]],
        "outcome": outcome.merged([stage["outcome"] for stage in stages]),
        "audit": audit.merged(stage["audit"] for stage in stages),
        "notes": list(dict.fromkeys(note for stage in stages for note in stage["notes"])),
    }


def versions() -> dict[str, str]:
    """What a comparison has to hold equal beside the graph."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {"comfyui": comfyui_version.__version__, "torch": torch.__version__, "device": device}


def as_text(report: dict[str, Any]) -> str:
    """The table a person reads: one line per role and backend, then fallbacks and notes."""
    run = report["run"]
    if run is None:
        return "\n".join(remarks(report))
    totals: dict[tuple[str, str, str], list[float]] = {}
    for row in run["rows"]:
        role = ", ".join(filter(None, (row["role"], row.get("card"))))
        total = totals.setdefault((role, row["backend"], row["mask"]), [0, 0.0, 0])
        total[0] += row["calls"]
        total[1] += row["ms"] or 0.0
        total[2] += row["timed"]
    lines = not_counted(report)
    if lines:
        lines.append("the lines below are about the other samplers before this node")
    lines.append(f"{'role':24} {'backend':18} {'mask':12} {'calls':>7} {'ms':>10}")
    for (role, backend, mask), (calls, milliseconds, timed) in totals.items():
        shown = f"{milliseconds:10.1f}" if timed else f"{'-':>10}"
        lines.append(f"{role:24} {backend:18} {mask:12} {calls:7.0f} {shown}")
    lines += findings(run)
    if about := about_times(run):
        lines.append(about)
    return "\n".join(lines)


def about_times(run: dict[str, Any]) -> str:
    """What the column of milliseconds rests on; empty where every call was timed."""
    calls = sum(row["calls"] for row in run["rows"])
    timed = sum(row["timed"] for row in run["rows"])
    if timed == calls:
        return ""
    if run["trace"] == "off":
        return "ms: not measured, the trace of times is off in the settings"
    if timed:
        return f"ms: {timed} of {calls} calls were timed; the others are taken to be as long, row by row"
    if run["trace"] == "sampled":
        return "ms: not measured, none of these model calls was among those that are sampled"
    return f"ms: not measured, device {run['device']} has no events that are timed"


def not_counted(report: dict[str, Any]) -> list[str]:
    """One line for each sampler that has no run report."""
    missing = report.get("not_counted", ())
    return [f"node {one['node_id']} ({one['class_type']}): {one['reason']}" for one in missing]


def findings(run: dict[str, Any]) -> list[str]:
    """What a person should know beside the figures: asked and ran, fallbacks, the guard, notes."""
    reasons = dict.fromkeys(_fallback(row) for row in run["rows"] if row["reason"])
    outcome_text = (run.get("outcome") or {}).get("text")
    lines = [*([outcome_text] if outcome_text else []), audit.line(run["audit"]), *reasons]
    lines += kept.lines(run["rows"])
    lines += guard_findings.lines(run.get("guard", ()))
    lines += [f"note: {note}" for note in run["notes"]]
    if run.get("bypass"):
        lines.append(f"not counted (bypasses ComfyUI's attention hook): {run['bypass']}")
    return lines


def _fallback(row: dict[str, Any]) -> str:
    card = f"{row['card']}: " if row.get("card") else ""
    return f"{_kind(row)}: {card}{row['role']}: {row['reason']}"


def _kind(row: dict[str, Any]) -> str:
    """What the reason of a row is about."""
    if row["backend"] == BY_ANOTHER:
        return "by another"
    return "fallback" if audit.fell_back(row) else f"{row['asked']} {audit.NOT_FOR_IT}"


def remarks(report: dict[str, Any]) -> list[str]:
    """Everything beside the table."""
    if report["run"] is not None:
        return [*not_counted(report), *findings(report["run"])]
    text = "no data: this sampler's model has no attention node, or the run is no longer kept"
    return [text, *not_counted(report)]
