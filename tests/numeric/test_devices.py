"""Devices that a package beside torch brings are seen where it is installed, and waited for in their own way."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from types import ModuleType, SimpleNamespace

import pytest
from syrupy.assertion import SnapshotAssertion

torch = pytest.importorskip("torch", reason="torch is not installed")

from attention_backends.backends.doctor import problems  # noqa: E402
from attention_backends.backends.engine.router import Router  # noqa: E402
from attention_backends.backends.kernels import BACKENDS  # noqa: E402
from attention_backends.backends.kernels.registry import detect  # noqa: E402
from attention_backends.backends.measure import device_clock  # noqa: E402
from attention_backends.backends.values import devices, platform  # noqa: E402
from attention_backends.backends.values.platform import Platform  # noqa: E402
from attention_backends.comparison import contenders  # noqa: E402
from attention_backends.comparison.bench_inputs import device_of  # noqa: E402
from conftest import ROOT  # noqa: E402
from fakes import torch_npu, torch_xla  # noqa: E402


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without an accelerator that torch knows by itself; nothing is kept of it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    platform._machine.cache_clear()
    yield
    platform._machine.cache_clear()


def install(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    """Let these distributions be installed, and no others of those that bring devices."""
    real = metadata.version

    def version(name: str) -> str:
        known = {key.replace("_", "-"): value for key, value in versions.items()}
        if name in known:
            return known[name]
        if name in ("torch-npu", "torch-xla"):
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)


def with_npu(monkeypatch: pytest.MonkeyPatch, *, there: bool = True) -> list[object]:
    waits: list[object] = []
    install(monkeypatch, torch_npu="2.11.0")
    monkeypatch.setitem(sys.modules, "torch_npu", torch_npu)
    npu = SimpleNamespace(is_available=lambda: there, synchronize=lambda device=None: waits.append(device))
    monkeypatch.setattr(torch, "npu", npu, raising=False)
    return waits


def with_xla(monkeypatch: pytest.MonkeyPatch, version: str = "2.9.0", device: str = "TPU") -> list[str]:
    waits: list[str] = []
    install(monkeypatch, torch_xla=version)
    for name, module in torch_xla.modules(version).items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(torch_xla, "DEVICE", device)
    if version >= "2.7":
        sync = lambda wait=False: waits.append(f"sync, wait={wait}")  # noqa: E731
        monkeypatch.setattr(sys.modules["torch_xla"], "sync", sync, raising=False)
    model = ModuleType("torch_xla.core.xla_model")
    model.mark_step = lambda: waits.append("mark_step")  # type: ignore[attr-defined]
    model.wait_device_ops = lambda: waits.append("wait_device_ops")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_xla.core", ModuleType("torch_xla.core"))
    monkeypatch.setitem(sys.modules, "torch_xla.core.xla_model", model)
    return waits


def test_an_npu_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    with_npu(monkeypatch)
    found = detect()
    assert (found.kind, found.version("torch-npu")) == ("npu", "2.11.0")
    assert Router(found).unavailable("npu_fusion") == ()


def test_a_tpu_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    with_xla(monkeypatch)
    found = detect()
    assert (found.kind, found.version("torch-xla")) == ("xla", "2.9.0")
    assert Router(found).unavailable("xla_flash") == ()
    assert Router(found).default_backend() == "xla_flash"


def test_packages_without_their_device(monkeypatch: pytest.MonkeyPatch) -> None:
    with_npu(monkeypatch, there=False)
    assert detect().kind == "cpu"
    platform._machine.cache_clear()
    with_xla(monkeypatch, device="CPU")
    assert detect().kind == "cpu"


def test_a_package_that_does_not_load_is_no_device(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with_npu(monkeypatch)
    monkeypatch.setitem(sys.modules, "torch_npu", None)  # importing it raises
    assert detect().kind == "cpu"
    assert any(message.startswith("torch-npu ") and "ModuleNotFoundError" in message for message in caplog.messages)


def test_a_card_that_torch_knows_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    with_npu(monkeypatch)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    monkeypatch.setattr(devices, "brought", lambda kind: pytest.fail("asked although there is a card"))
    assert detect().kind == "xpu"


def test_nothing_is_imported_that_is_not_installed() -> None:
    code = (
        "import sys; sys.path.insert(0, 'devtools/inside'); import with_package; with_package.load();"
        "tried = [];"
        "finder = type('F', (), {'find_spec': lambda self, name, *rest: tried.append(name)})();"
        "sys.meta_path.insert(0, finder);"
        "from attention_backends.backends.kernels.registry import detect; detect();"
        "print([name for name in tried if name.startswith(('torch_npu', 'torch_xla'))])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


def test_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    npu = with_npu(monkeypatch)
    devices.synchronise(SimpleNamespace(type="npu"))  # type: ignore[arg-type]  # this torch knows no such device
    assert len(npu) == 1
    devices.synchronise(torch.device("cpu"))
    xla = with_xla(monkeypatch)
    devices.synchronise(torch.device("xla"))
    assert xla == ["sync, wait=True"]
    older = with_xla(monkeypatch, "2.4.0")
    devices.synchronise(torch.device("xla"))
    assert older == ["mark_step", "wait_device_ops"]


def test_who_times_and_who_probes_wait_alike() -> None:
    from attention_backends.comparison import bench

    assert bench.timed is problems.timed is device_clock.timed
    assert device_clock.synchronise is devices.synchronise


def test_bench_on_an_npu_imports_what_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with_npu(monkeypatch)
    asked: list[str] = []
    monkeypatch.setattr(devices, "brought", lambda kind: asked.append(kind) or True)
    monkeypatch.setattr(torch, "device", lambda text: SimpleNamespace(type="npu", index=None, text=text))
    monkeypatch.setattr(torch, "empty", lambda *size, device: torch.zeros(*size))
    monkeypatch.setattr(contenders, "detect", lambda wanted: Platform(wanted.type))
    assert contenders.router_for("npu:0").platform.kind == "npu"
    assert asked == ["npu"]
    assert device_of(Platform("npu")).text == "npu"  # type: ignore[attr-defined]


def test_an_npu_that_is_not_there_is_an_error_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, snapshot: SnapshotAssertion
) -> None:
    install(monkeypatch)
    with pytest.raises(contenders.ComparisonError) as caught:
        contenders.router_for("npu")
    assert str(caught.value) == snapshot


def test_aiter_is_the_flash_attention_of_amd() -> None:
    """As in vLLM-Omni, whose FLASH_ATTN runs AITER there; flash-attn where AITER cannot."""
    family = BACKENDS["flash_attn"]

    def member(gfx: str, *packages: tuple[str, str]) -> str | None:
        described = Platform("rocm", gfx=gfx, torch="2.11.0", packages=packages, described=True)
        assert Router(described).unavailable("flash_attn") == ()
        return family.kernel_name(None, described)  # type: ignore[arg-type]

    amd, flash = ("amd-aiter", "0.1.7"), ("flash-attn", "2.8.3")
    assert member("gfx942", amd, flash) == "aiter"
    assert member("gfx950", amd) == "aiter"
    assert member("gfx942", flash) == "flash_attn_2"
    assert member("gfx90a", amd, flash) == "flash_attn_2"  # not on AITER's list
    reasons = Router(Platform("rocm", gfx="gfx942", described=True)).unavailable("flash_attn")
    assert [reason.partition(" is not installed")[0] for reason in reasons] == [
        "aiter: package amd-aiter",
        "flash_attn_2: package flash-attn",
    ]
