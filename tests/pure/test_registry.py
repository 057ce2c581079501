"""The list of backends: one line each, whose modules are imported when they are needed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
from attention_backends.backends.config import names
from attention_backends.backends.config.layers import resolve
from attention_backends.backends.config.names import BACKEND_IDS, MENU
from attention_backends.backends.config.systems import key_of, systems
from attention_backends.backends.config.text import parse_config
from attention_backends.backends.doctor.doctor import examine
from attention_backends.backends.doctor.install import Interpreter
from attention_backends.backends.engine.router import Router
from attention_backends.backends.kernels import BACKENDS, registry
from attention_backends.backends.values.aliases import PEOPLE
from attention_backends.backends.values.platform import Platform
from attention_backends.backends.values.request import AttentionRequest

ROOT = Path(__file__).resolve().parents[2]
REQUEST = AttentionRequest(1, 4, 64, 64, 64, "bfloat16")

EVER = """
torch_sdpa cudnn_attn flash_attn flash_attn_2 flash_attn_3 flash_attn_4 flashinfer_attn sage_attn sage_fp16_cuda
sage_fp16_triton sage_fp8_cuda sage_fp8_sm90 sage_attn_3 comfy_kitchen_int8 xformers flex_attn sdpa_flash sdpa_efficient
sdpa_math aiter npu_fusion xla_flash sliding_tile_attn video_sparse_attn vmoba_attn sparse_video_gen_2_attn sparge_attn
sol_attn radial_attn comfy emulated_int8 reference trtllm_attn
"""


def test_an_id_that_was_ever_published_stays() -> None:
    assert set(registry.MODULES) >= set(EVER.split())


def test_every_id_has_a_place_in_menus_and_a_new_one_the_last() -> None:
    assert set(MENU) <= set(registry.MODULES)
    assert set(BACKEND_IDS) == set(registry.MODULES)
    assert BACKEND_IDS[: len(MENU)] == MENU


def test_every_file_is_in_the_list_and_declares_what_the_list_says() -> None:
    folders = (ROOT / "backends" / folder for folder in ("kernels", "sparse/methods"))
    files = {path.stem for folder in folders for path in folder.glob("*.py")} - {
        *("__init__", "registry", "backend", "group", "broken"),
    }
    assert files == {module.rpartition(".")[2] for module in registry.MODULES.values()}
    assert list(BACKENDS) == list(registry.MODULES)
    for module in set(registry.MODULES.values()):
        declared = import_module(f"attention_backends.backends.{module}").BACKENDS
        listed = {name for name, where in registry.MODULES.items() if where == module}
        assert {backend.id for backend in declared} == listed, module


@pytest.fixture
def bad_files(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """Three files that are no good, each under an id that there is."""
    bad = {"xla_flash": "kernels.no_such_file", "aiter": "kernels.reference", "npu_fusion": "values.request"}
    forget = (registry.find, registry.looked_for, names.aliases, systems)
    monkeypatch.setattr(registry, "MODULES", {**registry.MODULES, **bad})
    for each in forget:
        each.cache_clear()
    yield bad
    monkeypatch.undo()
    for each in forget:
        each.cache_clear()


def test_a_bad_file_costs_its_own_backend_alone(bad_files: dict[str, str]) -> None:
    router = Router(Platform("cpu"), use_probe_results=False)
    for backend_id, module in bad_files.items():
        (reason,) = BACKENDS[backend_id].unavailable_reasons(Platform("cpu"))
        assert module in reason
        choice = resolve((parse_config(backend_id, "test"),), "self", "self")
        assert router.select(REQUEST, choice).backend not in bad_files
    assert len(examine(router, Interpreter("python", "cp312", "linux_x86_64"))) == len(BACKENDS)
    assert names.canonical("pytorch") == "torch_sdpa"
    assert registry.looked_for()
    assert router.select(REQUEST, resolve((), "self", "self")).backend not in bad_files
    with pytest.raises(KeyError):
        registry.find("no_such_attn")


def test_every_package_that_is_declared_is_looked_for() -> None:
    declared = {package.distribution for backend in BACKENDS.values() for package in backend.packages}
    assert declared < set(registry.looked_for())
    assert {"triton", "triton-windows", "kernels", "aiter", "flashinfer-cubin"} <= set(registry.looked_for())


LOADED = """
import json, sys
sys.path.insert(0, "devtools/inside")
import with_package
with_package.load()
from importlib import import_module
for name in sys.argv[1:]:
    import_module(f"attention_backends.backends.{name}")
print(json.dumps([name for name in sys.modules if ".kernels." in name or name.split(".")[0] == "torch"]))
"""


VALUES = (
    *("values.request", "values.limits", "values.platform", "values.package", "values.aliases", "config.names"),
    *("values.options", "values.mask_plan", "config", "config.systems", "kernels", "kernels.registry"),
)


def test_a_value_loads_no_kernel_and_no_torch() -> None:
    done = subprocess.run([sys.executable, "-c", LOADED, *VALUES], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == ["attention_backends.backends.kernels.registry"]


def test_one_backend_loads_its_own_file_alone() -> None:
    code = LOADED.replace(
        "print(", "from attention_backends.backends.kernels import registry\nregistry.find('xformers')\nprint("
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {name.removeprefix("attention_backends.backends.") for name in json.loads(done.stdout)}
    assert loaded & set(registry.MODULES.values()) == {"kernels.xformers"}
    assert "torch" not in loaded


def test_a_name_in_another_system_belongs_to_one_backend_and_to_a_system_that_there_is() -> None:
    declared = [(alias.system, key_of(alias.name)) for backend in BACKENDS.values() for alias in backend.aliases]
    assert {system for system, _ in declared} == {PEOPLE, *(system.id for system in systems())}
    assert len(set(declared)) == len(declared)
