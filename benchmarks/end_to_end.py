"""End to end: each real model once per backend in a running ComfyUI that has this pack and the models.

    python benchmarks/end_to_end.py --server http://127.0.0.1:8188 --output benchmarks/results

It repeats the published comparison of vLLM-Omni: same prompt, sizes, frames and steps; the graphs are those of
benchmarks/graphs. The column `comfy` is ComfyUI's own attention function. Time is that of the diffusion stage,
as Attention Report measures it: no loading, no decoding. Each backend is warmed up once, then timed with other seeds,
since ComfyUI would answer the same graph from its cache. A backend that did not compute every call has no time: its
cell says what happened.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
GRAPHS = ROOT / "benchmarks" / "graphs"
FAMILIES = ("hunyuan_video_15", "wan22_14b", "wan22_5b", "qwen_image", "flux2_dev", "ltx2")
BACKENDS = ("torch_sdpa", "cudnn_attn", "flashinfer_attn", "comfy")
SEED = 42
Graph = dict[str, dict[str, Any]]
# A proxy that the environment names must not see requests to one's own machine.
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


class RefusedError(Exception):
    """ComfyUI did not take a graph or did not finish it; the text says why in one line."""


def one_branch(graph: Graph, backend: str, seed: int) -> Graph:
    """The first branch of a comparison's graph, on `backend`, ending in its report as text."""
    report = next(number for number, node in graph.items() if node["class_type"] == "AttentionReport")
    needed, waiting = set(), [report]
    while waiting:
        number = waiting.pop()
        if number not in needed:
            needed.add(number)
            waiting += [link[0] for link in graph[number]["inputs"].values() if isinstance(link, list)]
    branch = {number: copy.deepcopy(graph[number]) for number in needed}
    for node in branch.values():
        inputs = node["inputs"]
        if node["class_type"] == "AttentionBackendSelector":
            inputs["backend"] = backend
        for name in ("seed", "noise_seed"):
            if name in inputs:
                inputs[name] = seed
    branch["report"] = {"class_type": "PreviewAny", "inputs": {"source": [report, 2]}}
    return branch


def request(url: str, body: object = None) -> Any:
    """The JSON that a GET, or with a body a POST, answers with."""
    data = None if body is None else json.dumps(body).encode()
    with _open(urllib.request.Request(url, data, {"Content-Type": "application/json"}), timeout=60) as answer:  # noqa: S310 - the address that a person gave
        return json.load(answer)


def run(server: str, graph: Graph) -> dict[str, Any]:
    """Queue a branch, wait for it, and return its report.

    Raises:
        RefusedError: model files are missing, or the run failed.
    """
    try:
        prompt = request(f"{server}/prompt", {"prompt": graph})["prompt_id"]
    except urllib.error.HTTPError as error:
        raise RefusedError(_refusal(error.read())) from None
    while True:
        record = request(f"{server}/history/{prompt}").get(prompt)
        if record and record["status"]["completed"] is not None:
            break
        time.sleep(0.5)
    if record["status"]["status_str"] != "success":
        errors = [content for kind, content in record["status"]["messages"] if kind == "execution_error"]
        raise RefusedError(errors[0]["exception_message"].strip().splitlines()[0] if errors else "interrupted")
    report: dict[str, Any] = json.loads(record["outputs"]["report"]["text"][0])
    return report


def _refusal(body: bytes) -> str:
    answer = json.loads(body)
    missing = sorted(
        str(error["extra_info"].get("received_value", error["details"]))
        for node in answer["node_errors"].values()
        for error in node["errors"]
        if error["type"] == "value_not_in_list"
    )
    return f"model files missing: {', '.join(missing)}" if missing else str(answer["error"]["message"])


def measure(server: str, graph: Graph, backend: str, repeat: int) -> dict[str, Any]:
    """One cell: median, least and most seconds, or why there are none."""
    seconds: list[float] = []
    report: dict[str, Any] = {}
    try:
        for turn in range(repeat + 1):
            report = run(server, one_branch(graph, backend, SEED + turn))
            fallen = sorted({row["reason"] for row in report["run"]["rows"] if row["reason"]})
            if fallen:
                return {"why": f"fell back: {'; '.join(fallen)}"}
            if turn:
                seconds.append(report["run"]["seconds"])
    except RefusedError as error:
        return {"why": str(error)}
    ran = sorted({row["member"] or row["backend"] for row in report["run"]["rows"]})
    facts = {"ran": ran, "steps": report["run"]["steps"], "latent": report["settings"]["latent"]}
    times = {"seconds": round(median(seconds), 3), "least": min(seconds), "most": max(seconds), "runs": len(seconds)}
    return {**times, **facts, "versions": report["versions"]}


def table(results: dict[str, dict[str, dict[str, Any]]], backends: list[str]) -> str:
    """Markdown: a row for each model, a column for each backend; notes say why a cell is empty."""
    notes: list[str] = []
    lines = [f"| model | {' | '.join(backends)} |", "|---" * (len(backends) + 1) + "|"]
    for model, cells in results.items():
        shown = []
        for backend in backends:
            cell = cells[backend]
            if "why" in cell:
                if cell["why"] not in notes:
                    notes.append(cell["why"])
                shown.append(f"- [{notes.index(cell['why']) + 1}]")
            else:
                shown.append(f"{cell['seconds']:.2f} s ({cell['least']:.2f}-{cell['most']:.2f})")
        lines.append(f"| {model} | {' | '.join(shown)} |")
    return "\n".join([*lines, "", *(f"{at}. {note}" for at, note in enumerate(notes, start=1))])


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; status 1 when nothing could be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default="http://127.0.0.1:8188", help="a running ComfyUI; default: %(default)s")
    parser.add_argument("--models", default=",".join(FAMILIES), help="default: %(default)s; or paths of API graphs")
    parser.add_argument("--backends", default=",".join(BACKENDS), help="default: %(default)s")
    parser.add_argument("--repeat", type=int, default=3, help="timed runs after one warm-up; default: %(default)s")
    parser.add_argument("--output", type=Path, help="folder for end-to-end.json and end-to-end.md")
    options = parser.parse_args(argv)
    backends, results = options.backends.split(","), {}
    for name in options.models.split(","):
        path = GRAPHS / f"{name}.json" if name in FAMILIES else Path(name)
        graph = json.loads(path.read_text(encoding="utf-8"))
        cells = results[path.stem.removeprefix("compare_")] = {}
        for backend in backends:
            cells[backend] = measure(options.server, graph, backend, options.repeat)
            print(
                f"{path.stem}, {backend}: {cells[backend].get('seconds', cells[backend].get('why'))}", file=sys.stderr
            )
    measured = [cell for cells in results.values() for cell in cells.values() if "seconds" in cell]
    machine = measured[0]["versions"] if measured else {}
    command = "python benchmarks/end_to_end.py " + " ".join(argv if argv is not None else sys.argv[1:])
    about = f"Seconds of the diffusion stage, median (least-most). {machine}\n\n    {command}"
    page = f"{table(results, backends)}\n\n{about}\n"
    print(page)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        data = {"command": command, "results": results}
        (options.output / "end-to-end.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        (options.output / "end-to-end.md").write_text(page, encoding="utf-8")
    return 0 if measured else 1


if __name__ == "__main__":
    from paired import training_paused

    with training_paused():
        sys.exit(main())
