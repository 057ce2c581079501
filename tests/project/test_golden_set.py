"""What the pack answers from outside is what it answered before its files were moved; see `golden_set.py`."""

from __future__ import annotations

import pytest
from golden_set import AREAS, FOLDER, differences, meant

CASES = [pytest.param(area, marks=[pytest.mark.comfy] if area == "server" else []) for area in AREAS]


@pytest.mark.parametrize("area", CASES)
def test_answers_are_those_of_the_golden_set(area: str) -> None:
    found = differences(area)
    assert not found, f"not as in {FOLDER.name}/{area}.tsv, and not meant:\n" + "\n".join(found[:40])


def test_a_difference_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    before = AREAS["python_names"]()
    monkeypatch.setitem(AREAS, "python_names", lambda: {**before, "checks": "()"})
    assert sum(line.startswith(("+checks\t", "-checks\t")) for line in differences("python_names")) == 2


def test_every_meant_difference_has_a_reason() -> None:
    assert set(meant()) <= set(AREAS)
