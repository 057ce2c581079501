"""Node Attention Report: what ran in the sampler before it, as text and as data."""

from __future__ import annotations

import json
import platform
from typing import Any

import comfyui_version
import torch
from comfy_api.latest import io

from ..backends import audit, guard_findings
from . import graph, runs
from .selector import CATEGORY


class AttentionReport(io.ComfyNode):
    """LATENT in, the same LATENT out, and the account of the sampling run that made it."""

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
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
            not_idempotent=True,
        )

    @classmethod
    def execute(cls, samples: dict[str, Any]) -> io.NodeOutput:
        prompt, node_id = cls.hidden.prompt or {}, str(cls.hidden.unique_id)
        latent = samples["samples"]
        parts = list(latent.unbind()) if latent.is_nested else [latent]
        report = {
            "run": find_run(prompt, node_id),
            "settings": {**graph.settings(prompt, node_id), "latent": [list(part.shape) for part in parts]},
            "versions": versions(),
        }
        return io.NodeOutput(samples, as_text(report), json.dumps(report))


def find_run(prompt: graph.Prompt, node_id: str) -> dict[str, Any] | None:
    """The newest run of a sampler upstream of this node, or None when no patched model was sampled there.

    Stages that ran in one prompt, such as the two samplers of Wan 2.2 14B, become one account: steps and seconds are
    added up. A stage that ComfyUI took from its cache is not in it.
    """
    upstream = graph.ancestors(prompt, node_id)
    found = [run for run in runs.recent() if run["node_id"] in upstream]
    stages = [run for run in reversed(found) if run["prompt_id"] == found[0]["prompt_id"]]
    if len(stages) < 2:
        return stages[0] if stages else None
    seconds = [stage["seconds"] for stage in stages]
    return {
        **stages[-1],
        "model": " + ".join(dict.fromkeys(stage["model"] for stage in stages)),
        "steps": sum(stage["steps"] for stage in stages),
        "seconds": None if None in seconds else sum(seconds),
        "rows": [row for stage in stages for row in stage["rows"]],
        "guard": [entry for stage in stages for entry in stage["guard"]],
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
        return "no account: the model before this sampler has no Attention Backend Selector, or it ran too long ago"
    totals: dict[tuple[str, str, str], list[float]] = {}
    for row in run["rows"]:
        total = totals.setdefault((row["role"], row["backend"], row["mask"]), [0, 0.0])
        total[0] += row["calls"]
        total[1] += row["ms"] or 0.0
    timed = run["device"] == "cpu"
    lines = [f"{'role':24} {'backend':18} {'mask':12} {'calls':>7} {'ms':>10}"]
    for (role, backend, mask), (calls, milliseconds) in totals.items():
        shown = f"{milliseconds:10.1f}" if timed else f"{'-':>10}"
        lines.append(f"{role:24} {backend:18} {mask:12} {calls:7.0f} {shown}")
    lines.append(audit.line(run["audit"]))
    reasons = dict.fromkeys(f"{row['role']}: {row['reason']}" for row in run["rows"] if row["reason"])
    lines += [f"fallback: {reason}" for reason in reasons]
    lines += guard_findings.lines(run.get("guard", ()))
    lines += [f"note: {note}" for note in run["notes"]]
    if run.get("bypass"):
        lines.append(f"not counted, because it never reaches ComfyUI's attention hook: {run['bypass']}")
    if not timed:
        lines.append("ms: measured on the CPU only; on an accelerator calls return before the work is done")
    return "\n".join(lines)
