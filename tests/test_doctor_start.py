"""What importing the pack brings with it, and how long it takes: measured in fresh processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from attention_backends.backends.machine.packages import PACKAGES_OF
from attention_backends.backends.machine.symbols import SYMBOLS_OF
from attention_backends.backends.platform import PACKAGES

ROOT = Path(__file__).resolve().parent.parent
MOST_SECONDS = 0.3
ATTEMPTS = 8

IMPORT_ALL = """
import importlib, importlib.util, json, pkgutil, sys, time

root, *first = sys.argv[1:]
for name in first:
    importlib.import_module(name)
before = set(sys.modules)
start = time.process_time()  # importing waits for nobody, and other work on the machine is not ours
spec = importlib.util.spec_from_file_location(
    "attention_backends", root + "/__init__.py", submodule_search_locations=[root]
)
sys.modules["attention_backends"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["attention_backends"])
import attention_backends.backends.kernels, attention_backends.cli
for found in pkgutil.walk_packages(attention_backends.backends.__path__, "attention_backends.backends."):
    if found.name != "attention_backends.backends.guard.rows":  # arithmetic in torch, for when a guard looks
        importlib.import_module(found.name)
seconds = time.process_time() - start
print(json.dumps({"seconds": seconds, "tops": sorted({name.split(".")[0] for name in set(sys.modules) - before})}))
"""


def _optional() -> set[str]:
    """The top-level modules of every package that a backend may be made of, and the heavy ones that we use later."""
    modules = {package.module for packages in PACKAGES_OF.values() for package in packages}
    modules |= {need.module for needs in SYMBOLS_OF.values() for need in needs}
    named = {name.replace("-", "_") for name in PACKAGES}
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
    trace = tmp_path / "imported"
    for name in _optional() | {"torch"}:
        (tmp_path / f"{name}.py").write_text(f"open({str(trace)!r}, 'a').write('{name} ')\nraise ImportError")
    assert "attention_backends" in _import_all(PYTHONPATH=str(tmp_path))["tops"]
    assert not trace.exists(), trace.read_text()


def test_importing_the_pack_takes_little_beside_torch() -> None:
    pytest.importorskip("torch")
    best = float("inf")
    for _ in range(ATTEMPTS):  # one quiet moment on a busy machine is enough
        best = min(best, _import_all("torch")["seconds"])
        if best < MOST_SECONDS:
            return
    pytest.fail(f"importing the pack took {best:.2f} s beside torch, at best of {ATTEMPTS}; at most {MOST_SECONDS} s")
