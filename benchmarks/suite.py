"""All figures of this machine that the project lives by: what routing costs, masks, whole models, copies.

    python3 dev.py bench

It runs each benchmark in a process of its own, writes benchmarks/results/suite-cpu.json, a page with the same name and
a chart, and says what became slower than the results that were there before: a figure whose interval lies wholly on
the worse side of the old one's. It takes about ten minutes; let the machine do nothing else meanwhile.
"""

from __future__ import annotations

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
    "sampling_pytorch": ["sampling.py", f"--flag={PYTORCH}"],
    "sampling_default": ["sampling.py"],
}


def run(part: str) -> dict[str, Any]:
    """The JSON that a benchmark prints last; what ComfyUI prints before it is left out."""
    command = [sys.executable, str(HERE / PARTS[part][0]), *PARTS[part][1:]]
    output = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
    found: dict[str, Any] = json.loads(output[output.index("\n{\n") :] if not output.startswith("{") else output)
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
    """What became worse beyond both intervals: of ratios (`faster`) less is worse, of microseconds more."""
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
    """The results as Markdown: ratios, then microseconds."""
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
    lines += [f"| {name} | {text(figure)} |" for name, figure in found.items() if not name.endswith("faster")]
    lines += [
        "",
        "Slower than the results before:" if regressions else "Nothing is slower than the results before.",
        "",
    ]
    return "\n".join([*lines, *(f"- {line}" for line in regressions)]).rstrip() + "\n"


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


def main() -> int:
    """Run everything; status 1 when something became slower."""
    before = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    results: dict[str, Any] = {}
    for part in PARTS:
        print(f"{part} ...", file=sys.stderr, flush=True)
        results[part] = run(part)
    facts = results["masks"]
    results = {"machine": facts["machine"], "torch": facts["torch"], **results}
    regressions = worse(figures(results), figures(before))
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    RESULTS.with_suffix(".md").write_text(page(results, regressions), encoding="utf-8")
    chart(results, RESULTS.with_suffix(".png"))
    print(page(results, regressions))
    return 1 if regressions else 0


if __name__ == "__main__":
    sys.exit(main())
