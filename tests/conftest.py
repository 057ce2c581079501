"""Loads the folder as the package `attention_backends` and says at the end what could not be checked.

The folder is loaded as ComfyUI loads it, from whatever it is called and without being installed. It must
never be on sys.path itself: its `nodes` would then stand in for ComfyUI's own `nodes`.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
GROUPS = {
    "comfy": "ComfyUI",
    "gpu": "GPU",
    "browser": "browser",
    "interpreter": "Triton's interpreter",
}


def _load_package() -> None:
    spec = importlib.util.spec_from_file_location(
        "attention_backends", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    if spec is None or spec.loader is None:
        raise ImportError(f"{ROOT} cannot be loaded as a package")
    package = importlib.util.module_from_spec(spec)
    sys.modules["attention_backends"] = package
    spec.loader.exec_module(package)


if "PYTEST_XDIST_WORKER" in os.environ:  # each process has its core; before torch counts them
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# The tests start hundreds of processes; with this variable each of them would compile the pack and ComfyUI anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# `python -m pytest` puts the working folder on the path; "" means the working folder too.
sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry or os.curdir) != str(ROOT)]
_load_package()
try:  # how fast a machine is must not decide a test
    from hypothesis import HealthCheck, settings

    settings.register_profile("here", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("here")
except ModuleNotFoundError:
    pass  # the tests that use it are skipped


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Processes for `-n auto`: one for each core up to four; one where tests would share a GPU."""
    return 1 if _why_no_cuda() is None else min(4, os.cpu_count() or 1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if any(item.get_closest_marker("gpu") for item in items):
        reason = _why_no_cuda()
        if reason:
            for item in items:
                if item.get_closest_marker("gpu"):
                    item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def shared_server() -> Iterator[Any]:
    from server_harness import start_server

    with start_server(extra_nodes=()) as running:
        yield running


@pytest.fixture(scope="module")
def server(shared_server: Any) -> Any:
    """A real ComfyUI server with this pack alone. All modules of a process share it: starting one takes 8 s of a core.

    It has runs of the tests before; what a page sets is set back by the next one that is opened.
    """
    # No answer from the cache of the module before. ComfyUI empties it after the prompt that it has by then, so a
    # small one goes first: the first prompt of the module would lose its answers at its end.
    shared_server.post("/free", {"free_memory": True})
    black = {"class_type": "EmptyImage", "inputs": {"width": 16, "height": 16, "batch_size": 1, "color": 0}}
    shared_server.run({"1": black, "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}})
    return shared_server


@pytest.fixture(scope="session")
def tiny_models_server() -> Iterator[Any]:
    """The same, started as stock ComfyUI with PyTorch attention is, with nodes that give tiny models of any family."""
    from server_harness import start_server

    nodes = [ROOT / "tests" / "server_nodes" / name for name in ("tiny_models_node.py", "shaky_model_node.py")]
    environ = {"ATTENTION_BACKENDS_TESTS": str(ROOT / "tests")}
    with start_server(extra_nodes=nodes, flags=["--use-pytorch-cross-attention"], environ=environ) as running:
        yield running


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """A browser stays open from test to test, but not while others run: they may need an event loop."""
    if item.get_closest_marker("browser") and not (nextitem and nextitem.get_closest_marker("browser")):
        from browser import close_browsers

        close_browsers()


def _why_no_cuda() -> str | None:
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch

    return None if torch.cuda.is_available() else "no CUDA device"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counts: Counter[tuple[str, str]] = Counter()
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        # A skip of a whole module or a fixture carries no marker; then the reason has the word.
        words = getattr(report, "keywords", ())  # a module's report has none where tests run in several processes
        groups = (name for marker, name in GROUPS.items() if marker in words or name in reason)
        counts[next(groups, "other"), reason.removeprefix("Skipped: ")] += 1
    for marker in ("slow", "compile"):
        left_out = sum(marker in item.keywords for item in terminalreporter.stats.get("deselected", []))
        if left_out:
            counts[marker, f"left out; run them with -m {marker}"] = left_out
    terminalreporter.section("checks that were skipped")
    if not counts:
        terminalreporter.write_line("none")
    for (group, reason), count in sorted(counts.items()):
        terminalreporter.write_line(f"{group}: {count} skipped: {reason}")
