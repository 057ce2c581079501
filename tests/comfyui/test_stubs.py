"""What devtools/stubs says of ComfyUI and aiohttp is there: each name, and each argument of a function."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import comfy_location  # noqa: E402
import tiny_sampling  # noqa: E402

STUBS = Path(__file__).resolve().parents[2] / "devtools" / "stubs"
MODULES = {
    ".".join(path.relative_to(STUBS).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(STUBS.rglob("*.pyi"))
}


@pytest.fixture(scope="module", autouse=True)
def _comfyui() -> None:
    folder = comfy_location.find_comfyui()
    if folder is None:
        pytest.skip(comfy_location.why_no_comfyui())
    tiny_sampling.prepare(folder, "--use-pytorch-cross-attention")


def module(name: str) -> Any:
    """A module, or what stands for one in its package, as `comfy_api.latest.io` does."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        package, _, last = name.rpartition(".")
        return getattr(importlib.import_module(package), last)


def missing(body: list[ast.stmt], real: Any, where: str) -> Iterator[str]:
    """What a stub describes and the real thing lacks."""
    for node in body:
        match node:
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                pass
            case ast.AnnAssign(target=ast.Name(id=name)) | ast.Assign(targets=[ast.Name(id=name)]):
                pass
            case _:
                continue
        if name.startswith("_") and not name.startswith("__"):
            continue  # a name of the stub alone
        path = f"{where}.{name}"
        if not hasattr(real, name) and not (isinstance(node, ast.AnnAssign) and is_set(real, name)):
            yield path
        elif isinstance(node, ast.ClassDef):
            yield from missing(node.body, getattr(real, name), path)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from (f"{path}({one})" for one in arguments(node) - taken(getattr(real, name)))


def is_set(real: Any, name: str) -> bool:
    """Whether a class declares an attribute of its objects, or sets it in a method."""
    sources = (inspect.getsource(one) for one in getattr(real, "__mro__", ()) if one.__module__ != "builtins")
    form = re.compile(rf"^\s+(self\.{name}(:.+)? = |{name}: )", re.MULTILINE)
    return any(form.search(source) for source in sources)


def arguments(node: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    every = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
    return {one.arg for one in every} - {"self", "cls"}


def taken(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters)


@pytest.mark.comfy
@pytest.mark.parametrize("name", MODULES)
def test_names_and_arguments_are_there(name: str) -> None:
    assert list(missing(ast.parse(MODULES[name].read_text(encoding="utf-8")).body, module(name), name)) == []
