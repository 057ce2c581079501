"""Writes the table of kernel times in README.md from benchmarks/results/: bench-*.json, which the command `bench` made,
and */card.json, which `card` made. `dev.py docs` runs it too.

Run: python benchmarks/table.py [--check]   (needs only the standard library; --check writes nothing and fails if stale)

Only accelerators are in the table: a CPU runs scaled-down lengths, whose times are not those of the models.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
README, RESULTS = ROOT / "README.md", ROOT / "benchmarks" / "results"
BEGIN = "<!-- kernel times: written by benchmarks/table.py, do not edit -->"
END = "<!-- end of kernel times -->"
NONE = "No card has been measured with this version yet."


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """The results by file name.

    Raises:
        ValueError: a file is not a result of the command `bench` or `card`.
    """
    found = {}
    for path in sorted(folder.glob("bench-*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.get("kind") != "attention-backends kernel benchmark":
            raise ValueError(f"{path.name} is not a result of the command bench")
        found[path.name] = data
    for path in sorted(folder.glob("*/card.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.get("kind") != "attention-backends card":
            raise ValueError(f"{path.parent.name}/{path.name} is not a result of the command card")
        reports = list(data["parts"].get("presets", {}).get("results", {}).values())
        if reports:
            cases = [case for report in reports for case in report["cases"]]
            found[f"{path.parent.name}/{path.name}"] = {**reports[0], "cases": cases}
    return found


def table(results: dict[str, dict[str, Any]]) -> str:
    """The text between the markers: a table for each card, one line for each case, a column for each backend."""
    cards = {name: data for name, data in results.items() if data["device"] != "cpu"}
    parts = [_card(name, data) for name, data in cards.items()] or [NONE]
    others = [f"[{name}](benchmarks/results/{name})" for name in results if name not in cards]
    if others:
        parts.append(f"On a CPU, with lengths scaled down: {', '.join(others)}.")
    return "\n\n".join(parts)


def _card(name: str, data: dict[str, Any]) -> str:
    ran = [row["backend"] for case in data["cases"] for row in case["rows"] if row["status"] == "ok"]
    backends = list(dict.fromkeys(ran))
    versions = [f"{key} {data['versions'][key]}" for key in ("torch", "cuda", "cudnn") if key in data["versions"]]
    ended = f" The run ended early: {data['ended']}." if data["ended"] else ""
    scaled = f" Lengths scaled down to {data['tokens']}." if data["tokens"] else ""
    lines = [
        f"**{data['card']}**, {', '.join(versions)}, {data['dtype']}: milliseconds, the median of "
        f"{data['protocol']['timed']} calls, the fastest in bold ([all figures](benchmarks/results/{name}))."
        f"{scaled}{ended}",
        "",
        f"| | {' | '.join(backends)} |",
        "|---|" + "---:|" * len(backends),
    ]
    for case in data["cases"]:
        times = {row["backend"]: row for row in case["rows"] if row["status"] == "ok"}
        if times:
            cells = [_cell(times.get(backend)) for backend in backends]
            lines.append(f"| {case['name']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    text = f"{row['ms']:.0f}" if row["ms"] >= 100 else f"{row['ms']:.3g}"
    return f"**{text}**" if row["rank"] == 1 else text


def filled(text: str, results: dict[str, dict[str, Any]]) -> str:
    """A page with the table between its markers.

    Raises:
        ValueError: the page does not have both markers, once each and in order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise ValueError(f"README.md must have these two lines, once each and in this order: {BEGIN} {END}")
    return f"{before}{BEGIN}\n{table(results)}\n{END}{after}"


def main(arguments: list[str]) -> int:
    """Write README.md, or with --check say whether it is as it should be."""
    text = README.read_text(encoding="utf-8")
    wanted = filled(text, read(RESULTS))
    if wanted == text:
        print("README.md has the newest table")
        return 0
    if "--check" in arguments:
        print("the table in README.md is stale: run python benchmarks/table.py", file=sys.stderr)
        return 1
    README.write_text(wanted, encoding="utf-8")
    print("README.md: table written")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
