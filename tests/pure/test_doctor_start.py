"""What importing the pack brings with it, and how much work it is: counted in fresh processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from attention_backends.backends.kernels import BACKENDS
from attention_backends.backends.kernels.registry import looked_for

ROOT = Path(__file__).resolve().parents[2]
MOST_CALLS = 141_000
"""137,012 on Python 3.11; a backend adds one or two thousand, another module some hundreds."""
MOST_MODULES = 20
"""Of others, such as the standard library's, that torch has not imported."""

IMPORT_ALL = """
import importlib, importlib.util, json, pkgutil, sys

root, *first = sys.argv[1:]
for name in first:
    importlib.import_module(name)
before = set(sys.modules)
calls = 0
def count(frame, event, argument):
    global calls
    calls += event in ("call", "c_call")
sys.setprofile(count)  # calls and not seconds: a busy machine makes no more of them
spec = importlib.util.spec_from_file_location(
    "attention_backends", root + "/__init__.py", submodule_search_locations=[root]
)
sys.modules["attention_backends"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["attention_backends"])
import attention_backends.backends.kernels, attention_backends.cli
for found in pkgutil.walk_packages(attention_backends.backends.__path__, "attention_backends.backends."):
    ours = found.name.removeprefix("attention_backends.backends.")
    if ours not in ("cards.cuda_transport", "observe.guard.rows"):  # imported where torch is in use
        importlib.import_module(found.name)
sys.setprofile(None)
new = sorted(set(sys.modules) - before)
print(json.dumps({"calls": calls, "modules": new, "tops": sorted({name.split(".")[0] for name in new})}))
"""


def _optional() -> set[str]:
    """The top-level modules of every package that a backend may be made of, and the heavy ones that we use later."""
    modules = {package.module for backend in BACKENDS.values() for package in backend.packages}
    modules |= {need.module for backend in BACKENDS.values() for need in backend.symbols}
    named = {name.replace("-", "_") for name in looked_for()}
    return ({module.split(".")[0] for module in modules} | named | {"matplotlib", "skimage", "numpy"}) - {"torch"}


def _import_all(*first: str, **environ: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, str(ROOT), *first],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_no_optional_package_and_no_torch_is_imported_by_importing_the_pack(tmp_path: Path) -> None:
    # Each is there, leaves a trace and raises, so that what imports one inside a `try` is seen too.
    run_report = tmp_path / "imported"
    for name in _optional() | {"torch"}:
        (tmp_path / f"{name}.py").write_text(f"open({str(run_report)!r}, 'a').write('{name} ')\nraise ImportError")
    assert "attention_backends" in _import_all(PYTHONPATH=str(tmp_path))["tops"]
    assert not run_report.exists(), run_report.read_text()


def test_importing_the_pack_takes_little_beside_torch() -> None:
    pytest.importorskip("torch")
    found = _import_all("torch")
    others = [name for name in found["modules"] if name.split(".")[0] != "attention_backends"]
    assert len(others) <= MOST_MODULES, others
    assert found["calls"] <= MOST_CALLS
