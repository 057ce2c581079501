"""All figures of this machine that the project lives by: what routing costs, masks, whole models, memory.

    python3 dev.py bench [--accept]

It runs each benchmark in a separate process and says what became worse than the committed results: a figure whose
interval lies wholly on the worse side of the old one's. The results are benchmarks/results/suite-cpu.json, a page with
the same name and a chart. Where something became worse they are written beside those, as suite-cpu.new.*, unless
`--accept` says that it is meant. It takes about ten minutes; let the machine do nothing else meanwhile.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "suite-cpu.json"
PYTORCH = "--use-pytorch-cross-attention"
PARTS: dict[str, list[str]] = {
    "overhead": ["overhead.py"],
    "masks": ["masks.py"],
    "memory": ["memory.py"],
    "sampling_pytorch": ["sampling.py", f"--flag={PYTORCH}"],
    "sampling_default": ["sampling.py"],
}


def run(part: str) -> dict[str, Any]:
    """The JSON that a benchmark prints last; what ComfyUI prints before it is left out."""
    command = [sys.executable, str(HERE / PARTS[part][0]), *PARTS[part][1:]]
    output = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
    found: dict[str, Any] = json.loads(output[output.index("\n{\n") :] if not output.startswith("{") else output)
    return found


def committed(path: Path = RESULTS) -> dict[str, Any]:
    """The results of the last commit; those on disk where there is no git, or they were never committed."""
    command = ["git", "-C", str(path.parent), "show", f"HEAD:./{path.name}"]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    except OSError:  # no git
        shown = None
    if shown is not None and shown.returncode == 0:
        text = shown.stdout
    elif path.exists():
        text = path.read_text(encoding="utf-8")
    else:
        return {}
    found: dict[str, Any] = json.loads(text)
    return found


def figures(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Every figure with an interval, by the words that lead to it."""
    found: dict[str, dict[str, float]] = {}

    def walk(node: Any, path: tuple[str, ...]) -> None:
        if isinstance(node, dict) and {"median", "low", "high"} <= set(node):
            found[", ".join(path)] = node
        elif isinstance(node, dict):
            for name, inner in node.items():
                walk(inner, (*path, name))

    walk(results, ())
    return found


def worse(now: dict[str, dict[str, float]], before: dict[str, dict[str, float]]) -> list[str]:
    """What became worse beyond both intervals: of ratios (`faster`) less is worse, of microseconds and bytes more."""
    found = []
    for name, figure in now.items():
        old = before.get(name)
        if old is None:
            continue
        is_ratio = name.endswith("faster")
        if figure["high"] < old["low"] if is_ratio else figure["low"] > old["high"]:
            found.append(f"{name}: {figure['median']} ({figure['low']}-{figure['high']}), was {old['median']}")
    return found


def page(results: dict[str, Any], regressions: list[str]) -> str:
    """The results as Markdown: ratios, then microseconds, then memory."""
    found = figures(results)
    lines = [
        "# Benchmarks of this machine",
        "",
        f"{results['machine']}, torch {results['torch']}. Median (95 % interval).",
        "",
        "    python3 dev.py bench",
        "",
        "![Ratios](suite-cpu.png)",
        "",
        "| stock / ours | ratio |",
        "|---|---|",
    ]
    lines += [f"| {name.removesuffix(', faster')} | {text(figure)} |" for name, figure in found.items()
              if name.endswith("faster")]  # fmt: skip
    lines += ["", "| cost of one attention call | us |", "|---|---|"]
    lines += [
        f"| {name} | {text(figure)} |" for name, figure in found.items() if not name.endswith(("faster", "_bytes"))
    ]
    lines += ["", "| memory of one attention call at its peak | KiB | beside it |", "|---|---:|---|"]
    lines += memory_lines(results.get("memory", {}))
    lines += [
        "",
        "Worse than the committed results:" if regressions else "Nothing is worse than the committed results.",
        "",
    ]
    return "\n".join([*lines, *(f"- {line}" for line in regressions)]).rstrip() + "\n"


def memory_lines(memory: dict[str, Any]) -> list[str]:
    """A line for each figure of memory, with what it is to be compared with."""
    beside = {
        "calls": ("ours_bytes", "stock_bytes", "PyTorch's own call"),
        "declared": ("measured_bytes", "declared_bytes", "declared"),
        "owned": ("owned_bytes", "kept_bytes", "with tensors that the caller keeps"),
    }
    lines = []
    for group, (figure, other, words) in beside.items():
        for name, found in memory.get(group, {}).items():
            lines.append(
                f"| {group}, {name} | {found[figure]['median'] / 1024:,.0f} | {found[other] / 1024:,.0f} {words} |"
            )
    return lines


def text(figure: dict[str, float]) -> str:
    """`1.98 (1.96-2.01)`."""
    return f"{figure['median']:.2f} ({figure['low']:.2f}-{figure['high']:.2f})"


def chart(results: dict[str, Any], path: Path) -> None:
    """The ratios as bars with their intervals; the line is `as fast as stock`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ratios = {name.removesuffix(", faster"): figure for name, figure in figures(results).items()
              if name.endswith("faster")}  # fmt: skip
    figure, axes = pyplot.subplots(figsize=(9, 0.32 * len(ratios) + 1), dpi=90)
    for at, value in enumerate(ratios.values()):
        axes.barh(at, value["median"], color="C0" if value["high"] >= 1 else "C3", height=0.7)
        axes.plot([value["low"], value["high"]], [at, at], color="black", linewidth=1.2)
    axes.set_yticks(range(len(ratios)), list(ratios), fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1, color="0.4", linewidth=0.8)
    axes.set_xlabel("time of stock / ours: above 1 is faster")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def write(results: dict[str, Any], regressions: list[str], accept: bool, path: Path = RESULTS) -> Path:
    """Write the results, their page and their chart; where they are worse and not accepted, beside the old ones."""
    beside = path.with_suffix(f".new{path.suffix}")
    target = beside if regressions and not accept else path
    target.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    target.with_suffix(".md").write_text(
        page(results, regressions).replace(f"({path.stem}.png)", f"({target.stem}.png)"), encoding="utf-8"
    )
    chart(results, target.with_suffix(".png"))
    if target is path:  # what an earlier try left
        for suffix in (".json", ".md", ".png"):
            beside.with_suffix(suffix).unlink(missing_ok=True)
    return target


def main(arguments: list[str] | None = None) -> int:
    """Run everything; status 1 when something became worse and that was not accepted."""
    parser = argparse.ArgumentParser(description="Measure everything, and compare with the committed results.")
    parser.add_argument("--accept", action="store_true", help="take the results although some figures became worse")
    accept = parser.parse_args(arguments).accept
    before = committed()
    results: dict[str, Any] = {}
    for part in PARTS:
        print(f"{part} ...", file=sys.stderr, flush=True)
        results[part] = run(part)
    facts = results["masks"]
    results = {"machine": facts["machine"], "torch": facts["torch"], **results}
    regressions = worse(figures(results), figures(before))
    target = write(results, regressions, accept)
    print(page(results, regressions))
    if regressions and not accept:
        print(f"{RESULTS.name} is as it was; the new figures are in {target.name} (--accept takes them)")
        return 1
    return 0


if __name__ == "__main__":
    from paired import training_paused

    with training_paused():
        sys.exit(main())
