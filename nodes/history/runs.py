"""The run reports of the sampling runs in this process: those that are going on, and the last ones, newest first."""

from __future__ import annotations

import itertools
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

from ...backends.observe.advisories import NOT_USED
from ...backends.observe.replay import record
from ...backends.report import BY_ANOTHER, RunReport, audit, kept, outcome
from ...backends.values.reasons import Reason
from . import figures, graph, queued_by

log = logging.getLogger("attention_backends")

KEPT = 20
NO_MODEL = (
    "LATENT", "IMAGE", "MASK", "VIDEO", "AUDIO", "CONDITIONING", "CLIP", "VAE", "CONTROL_NET", "NOISE", "SAMPLER",
    "SIGMAS", "INT", "FLOAT", "STRING", "BOOLEAN",
)  # fmt: skip
"""Types of outputs that bring no model along: what is before them decided an earlier run, if any."""
NUMBERING = secrets.token_hex(4)
"""Names this process's numbers: after a restart of the server they begin again."""
GOING_ON = outcome.Outcome(outcome.RUNNING)
CONFIG_NODES = (
    "AttentionBackendSelector", "PerRoleAttentionConfig", "AttentionConfigText", "AttentionSchedule",
    "AttentionOverGPUs",
)  # fmt: skip
"""Our nodes that decide something, as they stand in a graph."""


class SamplerNode(NamedTuple):
    """The node of the graph that sampled, as it stood in the queue; no `signature` where there was no queue."""

    node_id: str | None
    class_type: str
    signature: str | None
    queued_by: str | None
    """The mark of the page's workflow that queued it. In no report, as these are written into reports."""
    likeness: str | None = None
    """As `signature`, of `graph.likeness`."""
    asked: Mapping[str, Mapping[str, Any]] = MappingProxyType({})
    """Our nodes on its model by id: `inputs`, their values, and `models`, those of each node before them."""
    seed: int | None = None
    begun: int = 0
    """When its run began, in seconds since 1970, UTC."""


class FinishedRun(NamedTuple):
    """A run that is over. `report` is what other modules see."""

    report: dict[str, Any]
    summary: dict[str, Any]
    windows: list[dict[str, object]]
    sampler_node: SamplerNode
    record: dict[str, Any] | None = None
    """Its decisions, as node Attention Record writes them."""
    parts: tuple[FinishedRun, ...] = ()
    """The runs that this entry is of, oldest first, where they are several (`together`)."""


_runs: deque[FinishedRun] = deque(maxlen=KEPT)
_live: dict[int, tuple[dict[str, Any], RunReport, SamplerNode]] = {}
_numbers = itertools.count(1)
_lock = threading.Lock()
_open: list[list[FinishedRun]] = []
"""What `together` collects at the moment, in any thread."""
_warm = figures.WarmRuns()
_of_thread = threading.local()
"""`parts`: the list of `_open` that this thread's runs go to."""


def begin(run_report: RunReport) -> None:
    """A run begins: from now on its report can be read while it grows."""
    prompt_id, node_id = executing()
    prompt, by = entry_of(prompt_id)
    sampler = graph.origin(prompt, node_id) if node_id is not None else None
    if sampler is None:
        nodes, sampler_node = [], SamplerNode(node_id, "", None, by)
    else:
        nodes = _config_nodes(prompt, sampler)
        sampler_node = SamplerNode(
            sampler,
            str(prompt[sampler].get("class_type")),
            graph.signature(prompt, sampler),
            by,
            graph.likeness(prompt, sampler),
            {node["id"]: _asked(prompt, node["id"]) for node in nodes},
            graph.seed(prompt, sampler),
        )
    sampler_node = sampler_node._replace(begun=round(time.time()))
    run_report.node_id = sampler_node.node_id or ""
    with _lock:
        head = {"number": next(_numbers), "prompt_id": prompt_id, "node_id": node_id, "nodes": nodes}
        _live[id(run_report)] = head, run_report, sampler_node


def executing() -> tuple[str | None, str | None]:
    """The prompt and the node that ComfyUI is executing; None where a program samples without a server."""
    try:
        from comfy_execution.utils import get_executing_context
    except ModuleNotFoundError:
        return None, None
    context = get_executing_context()
    return (context.prompt_id, context.node_id) if context else (None, None)


def add(run_report: RunReport) -> None:
    """Keep a finished run and log it in one line."""
    if id(run_report) not in _live:
        begin(run_report)
    with _lock:
        head, _, sampler_node = _live.pop(id(run_report))
        report = {**head, **run_report.as_dict()}
        decided = record.of_run(run_report)
        told = figures.of_run(report, run_report)
        parts = getattr(_of_thread, "parts", None)
        saved = _saved(report, run_report, sampler_node) if parts is None else None
        summary = _summary(report, state(report), sampler_node, told, saved)
        finished = FinishedRun(report, summary, run_report.windows(), sampler_node, decided)
        if parts is None:
            _runs.appendleft(finished)
        else:
            parts.append(finished)
    log.info("attention of this run: %s", run_report.summary())
    log.info("%s", audit.line(report["audit"]))


@contextmanager
def together() -> Iterator[list[FinishedRun]]:
    """Keep the runs that this thread ends inside the `with` as one entry; what is taken off the list is not kept."""
    before = getattr(_of_thread, "parts", None)
    parts: list[FinishedRun] = []
    _of_thread.parts = parts
    with _lock:
        _open.append(parts)
    try:
        yield parts
    finally:
        _of_thread.parts = before
        with _lock:
            _open[:] = [one for one in _open if one is not parts]
            if parts:
                _runs.appendleft(_joined(parts))


def _joined(parts: list[FinishedRun]) -> FinishedRun:
    """One entry of several runs: the report of the last one, which says so, and all of them in `compared`."""
    last = parts[-1]
    if len(parts) == 1:
        return last
    asked = [" + ".join(dict.fromkeys(row["asked"] or "auto" for row in part.report["rows"])) for part in parts]
    names = ", ".join(dict.fromkeys(filter(None, asked)))
    note = Reason("runs.joined", count=len(parts), names=names)
    report = {
        **last.report,
        "notes": [note, *last.report["notes"]],
        "compared": [part.report for part in parts],
    }
    return last._replace(report=report, summary={**last.summary, "compared": len(parts)}, parts=tuple(parts))


def recent() -> list[dict[str, Any]]:
    """The last runs, newest first."""
    with _lock:
        return [run.report for run in _runs]


def of_node(prompt: graph.Prompt, node_id: str, prompt_id: str | None) -> list[dict[str, Any]]:
    """The run reports of the execution that made this node's output, oldest first; empty where none is kept.

    Where ComfyUI took the output from its cache, that is the execution of an earlier prompt which had the same node
    with everything upstream equal. A run that failed made no output.
    """
    with _lock:
        done = [run for run in _runs if run.summary["state"] == "done"]
    if not done:
        return []
    wanted = graph.signature(prompt, node_id)
    here = prompt_id, node_id
    found = [
        run
        for run in done
        if run.sampler_node.signature == wanted
        or (run.sampler_node.signature is None and (run.report["prompt_id"], run.sampler_node.node_id) == here)
    ]
    # Two equal nodes of one graph may have run both; a graph with other ids has none.
    found = [run for run in found if run.sampler_node.node_id == node_id] or found
    made = [(run.report["prompt_id"], run.sampler_node.node_id) for run in found]
    of_one = [run for run, by in zip(found, made, strict=True) if by == made[0]][::-1]
    return [part.report for run in of_one for part in (run.parts or (run,))]


def decisions(number: int) -> dict[str, Any] | None:
    """What a run decided, as `record.of_run` has it; None where it is not kept any more."""
    with _lock:
        return next((run.record for run in _all() if run.report["number"] == number), None)


def sampling_classes() -> set[str]:
    """Classes of the nodes whose run reports are kept: whatever they are called, they sample."""
    with _lock:
        return {run.sampler_node.class_type for run in _runs}


def summaries() -> list[dict[str, Any]]:
    """One short entry for each run: those that are going on, then the last ones, newest first."""
    return [summary for summary, _ in entries()]


def entries() -> list[tuple[dict[str, Any], SamplerNode]]:
    """As `summaries`, with the node that sampled."""
    live = [(_summary(run, "running", sampler, told), sampler) for run, told, sampler in _going_on()]
    with _lock:
        return live + [(kept.summary, kept.sampler_node) for kept in _runs]


def find(number: int) -> dict[str, Any] | None:
    """The whole report of one run, its timeline in `windows`, or None where it is not kept any more."""
    with _lock:
        found = next((kept for kept in _all() if kept.report["number"] == number), None)
    if found is not None:
        return {**found.report, "state": found.summary["state"], "windows": found.windows}
    return next(({**run, "state": "running"} for run, *_ in _going_on() if run["number"] == number), None)


def _all() -> Iterator[FinishedRun]:
    """Every run that can be asked for by its number: entries, the parts of those, and what is being collected."""
    for run in _runs:
        yield run
        yield from run.parts
    for parts in _open:
        yield from parts


def state(report: dict[str, Any]) -> str:
    """Of a run that is over: `done`, or `stopped` where it was cancelled or failed."""
    return "stopped" if report["outcome"]["kind"] in outcome.STOPPED else "done"


def _saved(report: dict[str, Any], run_report: RunReport, sampler_node: SamplerNode) -> figures.Saved | None:
    if sampler_node.likeness is None:
        return None
    work = sampler_node.likeness, sampler_node.node_id, report["model"], report["device"], report["steps"]
    return _warm.add((*work, run_report.size), report)


def _summary(
    report: dict[str, Any],
    state: str,
    sampler_node: SamplerNode,
    told: dict[str, Any],
    saved: figures.Saved | None = None,
) -> dict[str, Any]:
    totals: dict[tuple[str, str], int] = {}
    for row in report["rows"]:
        key = row["role"], row["backend"]
        totals[key] = totals.get(key, 0) + row["calls"]
    names = ("number", "prompt_id", "node_id", "nodes", "model", "device", "steps", "seconds")
    return {
        **{name: report[name] for name in names},
        "queued_by": sampler_node.queued_by,
        "sampler": {"id": sampler_node.node_id, "class_type": sampler_node.class_type},
        "seed": sampler_node.seed,
        "begun": sampler_node.begun,
        "state": state,
        "tuning": report["tuning"],
        "calls": sum(totals.values()),
        "outcome": report["outcome"],
        "fallbacks": sum(row["calls"] for row in report["rows"] if audit.fell_back(row)),
        "by_another": sum(row["calls"] for row in report["rows"] if row["backend"] == BY_ANOTHER),
        "totals": [{"role": role, "backend": backend, "calls": n} for (role, backend), n in totals.items()],
        "sparse": kept.of_rows(report["rows"]),
        "offers": [note for note in report["notes"] if note.endswith(NOT_USED)],
        **told,
        "saved": None if saved is None else saved.as_dict(),
    }


def _going_on() -> list[tuple[dict[str, Any], dict[str, Any], SamplerNode]]:
    """The run reports of the runs that are going on, as they are now, newest first, with `figures.of_run`."""
    with _lock:
        live = list(_live.values())
    found = []
    for head, run_report, sampler_node in reversed(live):
        # The sampler's thread writes to these while we read: each copy is one step of the interpreter.
        now = replace(
            run_report, rows=dict(run_report.rows), notes=dict(run_report.notes),
            categories=dict(run_report.categories),
            stopped=run_report.stopped or GOING_ON,
        )  # fmt: skip
        report = now.as_dict()
        found.append(({**head, **report, "windows": now.windows()}, figures.of_run(report, now), sampler_node))
    return found


def queued(prompt_id: str | None) -> graph.Prompt:
    """The graph of the prompt that runs; empty where there is no queue."""
    return entry_of(prompt_id)[0]


def entry_of(prompt_id: str | None) -> tuple[graph.Prompt, str | None]:
    """The graph of the prompt that runs, and the mark of the page that queued it; empty and None without a queue.

    From the queue, because a node that ComfyUI took from its cache is not asked again.
    """
    if prompt_id is None:
        return {}, None
    from server import PromptServer

    queue = getattr(getattr(PromptServer, "instance", None), "prompt_queue", None)
    if queue is None:
        return {}, None
    running, _ = queue.get_current_queue_volatile()
    entry = next((item for item in running if item[1] == prompt_id), None)
    return ({}, None) if entry is None else (entry[2], queued_by.mark_of(entry[3]))


def _asked(prompt: graph.Prompt, node_id: str) -> dict[str, Any]:
    """The values of a node of ours, and of the nodes that its model comes from; of these, those that can be long are
    left out."""

    def values(name: str) -> dict[str, Any]:
        inputs = prompt[name].get("inputs", {}).items()
        return {key: value for key, value in inputs if isinstance(value, (str, int, float)) and len(str(value)) < 1000}

    before = graph.ancestors(prompt, node_id, follow=_may_hold_model)
    return {"inputs": values(node_id), "models": {name: values(name) for name in before}}


def _config_nodes(prompt: graph.Prompt, node_id: str) -> list[dict[str, str]]:
    """Our nodes on the model of the sampler that runs: id, class and backend, so that a page can write beside them.

    None where the node compares models: which of them a run is of, and whose backend, the graph does not say.
    """
    if prompt[node_id].get("class_type") == "AttentionCompare":
        return []
    nodes = ((name, prompt[name]) for name in graph.ancestors(prompt, node_id, follow=_may_hold_model))
    return [
        {"id": name, "class_type": node["class_type"], "backend": str(node["inputs"].get("backend", ""))}
        for name, node in nodes
        if node["class_type"] in CONFIG_NODES
    ]


def _may_hold_model(class_type: str, number: int) -> bool:
    """Whether an output can be a model, or something of a pack that has one in it."""
    import nodes as comfy_nodes

    types = getattr(comfy_nodes.NODE_CLASS_MAPPINGS.get(class_type), "RETURN_TYPES", ())
    return not (0 <= number < len(types) and types[number] in NO_MODEL)
