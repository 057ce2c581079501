"""On a ComfyUI that is too old the pack says so in one line, and nothing else happens."""

from __future__ import annotations

import asyncio
import logging
import re
import sys
import types
from pathlib import Path

import attention_backends
import pytest
from syrupy.assertion import SnapshotAssertion

ROOT = Path(__file__).resolve().parents[2]


class ComfyExtension:
    async def on_load(self) -> None:
        pass


def pretend(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    """A ComfyUI of this version, of which no more than the API's first names is there."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ("comfy", "comfy_api", "folder_paths")]:
        monkeypatch.delitem(sys.modules, name)
    api = types.ModuleType("comfy_api")
    latest = types.ModuleType("comfy_api.latest")
    latest.ComfyExtension = ComfyExtension  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "comfy_api", api)
    monkeypatch.setitem(sys.modules, "comfy_api.latest", latest)
    monkeypatch.setitem(sys.modules, "folder_paths", None)  # type: ignore[arg-type]
    told = types.ModuleType("comfyui_version")
    told.__version__ = version  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "comfyui_version", told if version is not None else None)  # type: ignore[arg-type]


@pytest.mark.parametrize("version", ["0.3.64", "0.8.0", "0.17.9", "0.1"])
def test_one_readable_line_and_no_nodes(
    version: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, snapshot: SnapshotAssertion
) -> None:
    pretend(monkeypatch, version)
    with caplog.at_level(logging.INFO):
        extension = asyncio.run(attention_backends.comfy_entrypoint())
        asyncio.run(extension.on_load())
        assert asyncio.run(extension.get_node_list()) == []
    (record,) = caplog.records
    assert record.exc_info is None
    assert record.getMessage() == snapshot
    assert isinstance(extension, ComfyExtension)


@pytest.mark.parametrize("version", ["0.18.0", "0.18.0rc1", "0.33.0", "1.0", "a fork", None])
def test_others_are_tried(version: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here that fails for want of a ComfyUI, and with it the reason."""
    pretend(monkeypatch, version)
    for name in [name for name in sys.modules if name.startswith("attention_backends.nodes")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError):
        asyncio.run(attention_backends.comfy_entrypoint())


def test_the_version_is_that_of_the_packages_metadata() -> None:
    wanted = re.search(r'requires-comfyui = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    said = re.search(r'oldest = "([\d.]+)"', (ROOT / "__init__.py").read_text(encoding="utf-8"))
    assert wanted is not None
    assert said is not None
    assert said[1] == wanted[1]
