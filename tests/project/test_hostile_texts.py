"""Texts and files that were made to do harm are read or refused, in little time and memory.

They run in one process of their own, which knows limits (`hostile_process.py`); the cases are in `hostile_texts.py`.
CPU time is measured and not the clock's, and what each case may take is ten times what it took when it was written.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from hostile_texts import CASES
from syrupy.assertion import SnapshotAssertion

TESTS = Path(__file__).parents[1]
DOCUMENTED = ("ConfigError", "UnknownBackendError", "RefusedBackendError", "ComparisonError", "ValueError")
"""Errors that say which part is wrong; a ValueError only of the command line, whose whole answer it is."""
MOST_SECONDS = 2.0
MOST_MEMORY = 100


@lru_cache(maxsize=1)
def found() -> dict[str, Any]:
    """What became of each case, by its name."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ATTENTION_BACKENDS")}
    words = [sys.executable, str(TESTS / "hostile_process.py"), str(TESTS.parent)]
    ran = subprocess.run(words, capture_output=True, text=True, encoding="utf-8", env=clean, check=False)
    rows = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
    if ran.returncode != 0:
        after = rows[-1]["case"] if rows else "nothing"
        rows.append(
            {"case": "", "ended": f"the process ended with {ran.returncode} after {after}: {ran.stderr[-2000:]}"}
        )
    return {row["case"]: row for row in rows}


def test_there_are_many_and_the_process_lives_through_all_of_them() -> None:
    assert len(CASES) >= 60
    assert found().get("") is None, found()[""]["ended"]
    assert set(found()) == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_text_is_read_or_refused(name: str) -> None:
    case = found()[name]
    allowed = ("read", *DOCUMENTED) if name.split(": ")[0] in ("import", "explain") else ("read", *DOCUMENTED[:-1])
    assert case["outcome"] in allowed, case
    assert case["seconds"] < MOST_SECONDS, case
    assert (case["memory"] or 0) < MOST_MEMORY, case
    assert len(case.get("message", "")) < 3000, "an error does not repeat a long text"


@pytest.mark.parametrize(
    "name",
    [
        "YAML: merge keys",
        "YAML: aliases",
        "YAML: too long",
        "YAML: a tag of Python",
        "YAML: a base 60 number",
        "JSON: too long",
        "JSON: one key in few",
        "record: blocks times calls",
        "replay: zTXt",
        "replay: zTXt of another name",
        "flags: variables inside one another",
    ],
)
def test_what_is_said_of_it(name: str, snapshot: SnapshotAssertion) -> None:
    assert found()[name]["message"].partition(" the names are")[0][:300] == snapshot
