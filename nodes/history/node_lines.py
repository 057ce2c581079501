"""What the last prompt of a workflow came to on each of our nodes, as plain data; the page makes words of it.

A node has the runs of its prompt; between two samplers of a split run it is `running`. Where the prompt ended well
without one, ComfyUI took the sampler's output from its cache, and the node has the run that made it, marked as
`cached`. While the prompt is executed, a node without a run is `waiting`: an equal run of before tells nothing, as its
output may have left the cache. A node that the prompt did not have, or that no sampler of it used, is not there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ...backends.report import outcome
from . import graph, queued_by, runs

MOST_HISTORY = 64
"""Prompts of ComfyUI's history that are searched for a mark."""
RUNNING, SUCCESS, STOPPED = "running", "success", "stopped"
Entry = tuple[Mapping[str, Any], runs.SamplerNode]


def of_prompt(prompt_id: str, ended: str = "") -> dict[str, Any]:
    """{"prompt_id", "mark", "nodes": {id: line}}; `mark` of the page's workflow that queued it, or None.

    ended: `SUCCESS` or `STOPPED` where the page knows; ComfyUI says it before the prompt leaves the queue.
    """
    prompt, mark, state = _queued(prompt_id)
    state = ended if state == RUNNING and ended else state
    entries = runs.entries()
    own: list[Entry] = [entry for entry in entries if entry[0]["prompt_id"] == prompt_id]
    mark = mark or next((sampler.queued_by for _, sampler in own), None)
    return {"prompt_id": prompt_id, "mark": mark, "nodes": lines(prompt, own, entries, state)}


def of_mark(mark: str) -> dict[str, Any]:
    """As `of_prompt`, of the last prompt that was executed for this workflow; without one there are no nodes."""
    known = next((entry[0]["prompt_id"] for entry in runs.entries() if entry[1].queued_by == mark), None)
    prompt_id = _last_prompt(mark) or known
    return {"prompt_id": None, "mark": mark, "nodes": {}} if prompt_id is None else of_prompt(prompt_id)


def lines(
    prompt: graph.Prompt, own: list[Entry], entries: Iterable[Entry], state: str = SUCCESS
) -> dict[str, dict[str, Any]]:
    """The lines of the nodes of a prompt.

    Args:
        prompt: the graph; empty if it is not known any more.
        own: its runs, newest first.
        entries: all runs that are kept, newest first.
        state: of the prompt: `RUNNING`, `SUCCESS`, or `STOPPED`, where a sampler may not have been reached.
    """
    found: dict[str, list[Entry]] = {}
    for entry in reversed(own):
        for node in entry[0]["nodes"]:
            found.setdefault(node["id"], []).append(entry)
    lines = {name: joined(name, theirs) for name, theirs in found.items()}
    missing = [name for name, node in prompt.items() if node.get("class_type") in runs.CONFIG_NODES]
    missing = [name for name in missing if name not in lines]
    if state == RUNNING:
        lines.update({name: {**lines[name], "state": RUNNING} for name in found if _goes_on(prompt, name, found[name])})
    for name in missing:
        if state == RUNNING:
            lines[name] = {"class_type": prompt[name]["class_type"], "state": "waiting"}
        elif state == SUCCESS and (made := _from_cache(prompt, name, entries)):
            lines[name] = {**joined(name, made), "cached": True}
    return lines


def _goes_on(prompt: graph.Prompt, name: str, done: list[Entry]) -> bool:
    """Whether another sampler of these runs' kind is behind a node and has no run yet, as of a split run."""
    kinds = {sampler.class_type for _, sampler in done}
    ran = {sampler.node_id for _, sampler in done}
    behind = (other for other in graph.descendants(prompt, name) if other not in ran)
    return done[-1][0]["state"] == "done" and any(prompt[other].get("class_type") in kinds for other in behind)


def _from_cache(prompt: graph.Prompt, name: str, entries: Iterable[Entry]) -> list[Entry]:
    """The runs that made what ComfyUI has in its cache for the samplers behind a node, oldest first."""
    found: dict[str, Entry] = {}
    for entry in entries:
        summary, sampler = entry
        place = sampler.node_id
        if summary["state"] != "done" or place is None or place in found or place not in prompt:
            continue
        if name not in sampler.asked or graph.signature(prompt, place) != sampler.signature:
            continue
        found[place] = entry
    return sorted(found.values(), key=lambda entry: entry[0]["number"])


def joined(name: str, entries: list[Entry]) -> dict[str, Any]:
    """The line of one node with these runs, oldest first: two samplers of a split run are one.

    `steps`, `ms_per_step` and `attention_share` are of all steps, and `saved` is there where each run can be compared.
    `step` and the outcome's are of the last run. Backends are in `totals`, those with most calls first.
    """
    summaries = [summary for summary, _ in entries]
    last, sampler = entries[-1]
    outcomes = [summary["outcome"] for summary in summaries]
    totals: dict[tuple[str, str], int] = {}
    for total in (total for summary in summaries for total in summary["totals"]):
        key = total["role"], total["backend"]
        totals[key] = totals.get(key, 0) + total["calls"]
    asked = sampler.asked.get(name, {})
    return {
        "class_type": next(node["class_type"] for node in last["nodes"] if node["id"] == name),
        "state": last["state"],
        "outcome": outcome.merged(outcomes),
        "step": last["step"],
        "of_steps": last["steps"],
        "steps": sum(summary["steps"] for summary in summaries),
        "totals": [{"role": role, "backend": backend, "calls": calls} for (role, backend), calls in totals.items()],
        "calls": sum(totals.values()),
        "fallbacks": sum(summary["fallbacks"] for summary in summaries),
        "offers": list(dict.fromkeys(offer for summary in summaries for offer in summary["offers"])),
        "tuning": any(summary["tuning"]["state"] == "tuning" for summary in summaries),
        "sparse": _sparse(summaries),
        **_times(summaries),
        "inputs": dict(asked.get("inputs", {})),
        "models": {other: dict(values) for other, values in asked.get("models", {}).items()},
        "cached": False,
    }


def _sparse(summaries: list[dict[str, Any]] | list[Mapping[str, Any]]) -> dict[str, Any] | None:
    """{"kept": mean over the calls with a map, "calls": those, "whole": calls that were computed whole}.

    `kept` is None without such calls, and while only a device knows it.
    """
    found = [(one, sum(one["dense"].values())) for summary in summaries for one in summary["sparse"]]
    if not found:
        return None
    calls = sum(one["calls"] - whole for one, whole in found)
    kept = sum((one["calls"] - whole) * (one["kept"] or 0.0) for one, whole in found)
    known = calls and all(one["kept"] is not None or one["calls"] == whole for one, whole in found)
    return {
        "kept": round(kept / calls, 4) if known else None,
        "calls": calls,
        "whole": sum(whole for _, whole in found),
    }


def _times(summaries: list[dict[str, Any]] | list[Mapping[str, Any]]) -> dict[str, Any]:
    """`ms_per_step` and `attention_share`, weighted by steps and time, and `saved` in all."""
    each = [(summary["ms_per_step"], summary["steps"], summary["attention_share"]) for summary in summaries]
    known = all(ms is not None and steps for ms, steps, _ in each)
    whole = sum(ms * steps for ms, steps, _ in each) if known else 0
    steps = sum(steps for _, steps, _ in each)
    shared = known and whole and all(share is not None for *_, share in each)
    saved = [summary["saved"] for summary in summaries]
    than = list(dict.fromkeys(name for one in saved if one for name in one["than"]))
    return {
        "ms_per_step": round(whole / steps, 1) if known else None,
        "attention_share": round(sum(ms * n * share for ms, n, share in each) / whole, 3) if shared else None,
        "saved": {"seconds": sum(s["seconds"] for s in saved), "of": sum(s["of"] for s in saved), "than": than}
        if saved and all(saved)
        else None,
    }


def _queue() -> Any:
    from server import PromptServer

    return getattr(getattr(PromptServer, "instance", None), "prompt_queue", None)


def _queued(prompt_id: str) -> tuple[graph.Prompt, str | None, str]:
    """Graph, mark and state of a prompt that is executed or was; empty where it is not known."""
    prompt, mark = runs.entry_of(prompt_id)
    if prompt:
        return prompt, mark, RUNNING
    queue = _queue()
    entry = queue.get_history(prompt_id=prompt_id).get(prompt_id) if queue is not None else None
    if entry is None:
        return {}, None, STOPPED
    ended_well = (entry.get("status") or {}).get("status_str") == "success"
    return entry["prompt"][2], queued_by.mark_of(entry["prompt"][3]), SUCCESS if ended_well else STOPPED


def _last_prompt(mark: str) -> str | None:
    """Id of the last prompt with this mark that is executed or was."""
    queue = _queue()
    if queue is None:
        return None
    running, _ = queue.get_current_queue_volatile()
    done = [entry["prompt"] for entry in queue.get_history(max_items=MOST_HISTORY).values()]
    return next((str(item[1]) for item in (*running, *reversed(done)) if queued_by.mark_of(item[3]) == mark), None)
