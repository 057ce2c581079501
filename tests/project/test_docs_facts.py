"""What the guides say of cards, masks, costs and model families is what the code and the results say."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

from attention_backends.backends.engine.priorities import PRIORITIES
from attention_backends.backends.kernels import BACKENDS
from attention_backends.backends.kernels.backend import ANY_MASK
from attention_backends.backends.values.limits import Masks
from attention_backends.backends.values.platform import parse_platform

ROOT = Path(__file__).resolve().parents[2]


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def table(page: Path, first: str) -> list[list[str]]:
    """The cells of the table whose head begins so, without the head."""
    lines = text_of(page).splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {first} |")) + 2
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def test_the_cards_of_the_guide_are_those_of_the_routes() -> None:
    def listed(order: tuple[str, ...]) -> str:
        return ", ".join(f"`{name}`" for name in order) or "none"

    wanted = []
    for route in PRIORITIES:
        low, high = route.capabilities or ((0, 0), (0, 0))
        cards = f" ({low[0]}.{low[1]} to {high[0]}.{high[1]})" if route.capabilities else ""
        said = f"{route.evidence}: {route.source}"
        wanted.append([f"{route.title}{cards}", listed(route.order), listed(route.lossy), said])
    assert table(ROOT / "docs" / "choosing.md", "machine") == wanted


def test_the_kernels_that_are_said_to_take_masks_take_them() -> None:
    machine = parse_platform("cuda:8.9,packages=sageattention==2.2.0")
    words = " ".join(text_of(ROOT / "docs" / "troubleshooting.md").split())
    said = re.search(r"With a mask that stays, (.+?) take all kinds, (.+?) boolean ones", words)
    assert said is not None
    for name in re.findall(r"`(\w+)`", said[1]):
        assert BACKENDS[name].limits_on(machine)[Masks].kinds == ANY_MASK, name
    for name in re.findall(r"`(\w+)`", said[2]):
        assert "bool" in BACKENDS[name].limits_on(machine)[Masks].kinds, name
        assert "bias" not in BACKENDS[name].limits_on(machine)[Masks].kinds, name


def test_every_statement_of_the_guide_says_what_it_rests_on() -> None:
    statements = re.split(r"^- ", text_of(ROOT / "docs" / "choosing.md"), flags=re.MULTILINE)[1:]
    assert len(statements) > 20
    for statement in statements:
        bullet = re.split(r"\n(?:\n|\d+\. )", statement)[0]
        linked = "](limitations.md#" in bullet or "route --platform" in bullet
        assert linked or re.search(r"\((measured|reported|assumed)\b", bullet), bullet


def test_the_cost_of_routing_is_that_of_the_results() -> None:
    results = json.loads(text_of(ROOT / "benchmarks" / "results" / "overhead-cpu.json"))
    override = results["override_path_1x8x16x64"]
    over_stock = override["ours_over_bare_us"]["median"] - override["stock_over_bare_us"]["median"]
    in_wan = results["tiny_wan"]["ours_minus_stock_us_per_attention_call"]["median"]
    words = " ".join(text_of(ROOT / "docs" / "choosing.md").split())
    said = re.search(r"Routing costs (\d+) microseconds? .* path, (\d+) in a small Wan", words)
    assert said is not None
    assert (int(said[1]), int(said[2])) == (round(over_stock), round(in_wan))


ROLES = ROOT / "nodes" / "hook" / "roles.py"


def families() -> tuple[Any, ...]:
    """`nodes/hook/roles.py` needs no ComfyUI, but its package does."""
    # A name inside the package, for its relative imports.
    spec = importlib.util.spec_from_file_location("attention_backends.nodes.hook.roles_of_the_docs", ROLES)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.FAMILIES


def test_what_bypasses_the_hook_is_that_of_the_role_table() -> None:
    wanted = []
    for family in families():
        roles = dict.fromkeys(role.name for _, roles in family.roles_at_paths for role in roles)
        names = ", ".join(f"`{role}`" for role in roles) or "none"
        wanted.append([f"`{family.name}`", names, family.bypass or "nothing"])
    rows = "\n".join(f"| {' | '.join(row)} |" for row in wanted)
    assert table(ROOT / "docs" / "limitations.md", "family") == wanted, f"the table should be:\n{rows}"
