"""The results of `card` as a page of Markdown, complete or not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

Data = dict[str, Any]
HEADINGS = {
    "doctor": "Backends, each probed in its own process",
    "numerics": "Errors against float64, and their limits",
    "masks": "SDPA with a mask against the mask's plan",
    "presets": "Attention calls of real models",
    "hunyuan_cudnn": "HunyuanVideo: cuDNN by name against PyTorch's choice",
    "overhead": "What our path costs for each call",
    "guard": "What the guard costs",
    "compile": "torch.compile",
    "pictures": "The embedded model end to end",
}


def page(data: Data) -> str:
    """Machine, versions, what became of each part, and a table for each that has results."""
    parts: dict[str, Data] = data["parts"]
    facts = parts.get("machine", {}).get("results", {})
    lines = [
        f"# {facts.get('card', 'A machine that is not known yet')}",
        "",
        f"{facts.get('machine', 'unknown machine')}. {_versions(facts)}",
        "",
        f"    {data['command']}",
        "",
        f"Started {data['started']}, {data['minutes']:g} minutes allowed; the run is {data['state']}.",
        "",
    ]
    lines += _table(
        ("part", "status", "seconds"),
        ((name, _status(part), _number(part.get("seconds"))) for name, part in parts.items() if name != "machine"),
    )
    for name, part in parts.items():
        if name in HEADINGS and part.get("results"):
            lines += ["", f"## {HEADINGS[name]}", "", *_TABLES[name](part["results"])]
    return "\n".join(lines).rstrip() + "\n"


def _versions(facts: Data) -> str:
    driver = [f"driver {facts['driver']}"] if facts.get("driver") else []
    return ", ".join([*driver, *(f"{name} {version}" for name, version in facts.get("versions", {}).items())])


def _status(part: Data) -> str:
    missing = part.get("not_reached") or []
    return "; ".join(
        filter(
            None,
            (
                ": ".join(filter(None, (part.get("status", "running"), part.get("reason", "")))),
                *(f"without {name}: {reason}" for name, reason in part.get("lost", {}).items()),
                f"not reached: {', '.join(missing)}" if missing else "",
            ),
        )
    )


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return lines + [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]


def _number(value: Any) -> str:
    if isinstance(value, dict) and "median" in value:
        spread = f" ({value['low']:.3g} to {value['high']:.3g})" if "low" in value else ""
        return f"{value['median']:.3g}{spread}"
    return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def _doctor(results: Data) -> list[str]:
    def state(row: Data) -> str:
        probed = row["probed"]
        if probed["status"] == "ok":
            return f"ok, relative L2 {_number(probed['relative_l2'])}, first call {_number(probed['ms'])} ms"
        return f"{probed['status']}: {probed['reason']}"

    return _table(
        ("backend", "package", "probe"), ((name, row["version"] or "-", state(row)) for name, row in results.items())
    )


def _numerics(results: Data) -> list[str]:
    rows = (
        (
            name,
            row["arithmetic"],
            _number(row["worst_relative_l2"]),
            _number(row["limit"]),
            f"{row['calls']} ran, {row['refused']} refused, {row['not_reached']} not reached",
            "; ".join(row["wrong"][:3]) + (f"; {len(row['wrong']) - 3} more" if len(row["wrong"]) > 3 else "")
            or "none",
        )
        for name, row in results.items()
    )
    return _table(("backend", "arithmetic", "worst relative L2", "limit", "calls", "wrong"), rows)


def _masks(results: Data) -> list[str]:
    rows = (
        (name, row["treatment"], _number(row["stock_ms"]), _number(row["ours_ms"]), _number(row["faster"]),
         _number(row["reading_ms"]), "yes" if row["same"] is True else f"off by {_number(row['same'])}")
        for name, row in results.items()
    )  # fmt: skip
    return _table(("mask", "plan", "SDPA ms", "plan ms", "faster", "reading ms", "same bits"), rows)


def _presets(results: Data) -> list[str]:
    lines = []
    for report in results.values():
        for case in report["cases"]:
            ran = sorted((row for row in case["rows"] if row["rank"]), key=lambda row: row["rank"])
            cells = (
                (row["backend"], _number(row["ms"]), _number(row["ratio_to_sdpa"]), _number(row["relative_l2"]))
                for row in ran
            )
            sizes = f"{case['request']['q_len']} on {case['request']['kv_len']} tokens, {report['dtype']}"
            lines += [
                f"**{case['name']}**, {sizes}",
                "",
                *_table(("backend", "ms", "vs SDPA", "relative L2"), cells),
                "",
            ]
            failed = [row for row in case["rows"] if not row["rank"]]
            lines += [f"- {row['backend']}: {row['status']}" for row in failed] + ([""] if failed else [])
    return lines


def _figures(results: Data) -> list[str]:
    rows: list[tuple[str, ...]] = []
    for name, value in results.items():
        if isinstance(value, dict) and "median" not in value:
            rows += [(f"{name}: {inner}".replace("_", " "), _number(each)) for inner, each in value.items()]
        else:
            rows.append((name.replace("_", " "), _number(value)))
    return _table(("figure", "value"), rows)


def _pictures(results: Data) -> list[str]:
    rows = (
        (row["asked"], _number(row["total_ms"]), _number(row["step_ms"]), _number(row["psnr"]), row["verdict"])
        for row in results["rows"]
    )
    table = _table(("backend", "ms for all steps", "ms for a step", "PSNR", "result"), rows)
    return [
        f'"{results["prompt"]}", seed {results["seed"]}, {results["steps"]} steps; pictures: comparison.png',
        "",
        *table,
    ]


_TABLES: dict[str, Callable[[Data], list[str]]] = {
    "doctor": _doctor,
    "numerics": _numerics,
    "masks": _masks,
    "presets": _presets,
    "hunyuan_cudnn": _presets,
    "overhead": _figures,
    "guard": _figures,
    "compile": _figures,
    "pictures": _pictures,
}
