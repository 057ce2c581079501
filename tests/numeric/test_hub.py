"""Kernels from Hugging Face's Hub: never without permission, from pinned repositories, and said wherever it is so."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from attention_backends.backends.config.layers import Choice
from attention_backends.backends.engine.plan import CallKind
from attention_backends.backends.engine.router import Router
from attention_backends.backends.kernels import BACKENDS
from attention_backends.backends.kernels.registry import detect
from attention_backends.backends.kernels.support import hub
from attention_backends.backends.values import platform
from attention_backends.backends.values.platform import HUB_VARIABLE, Platform, hub_allowed, parse_platform
from attention_backends.backends.values.request import AttentionRequest
from syrupy.assertion import SnapshotAssertion

pytest.importorskip("torch", reason="torch is not installed")

from attention_backends.backends.doctor.doctor import examine
from attention_backends.backends.doctor.install import Interpreter
from attention_backends.backends.engine.session import Session
from attention_calls import as_comfyui_runs, call_for
from fakes import hub as fake
from fakes import on_platform
from tolerance import allowed, error, truth

ROOT = Path(__file__).resolve().parents[2]
CALL = AttentionRequest(1, 2, 64, 64, 64, "bfloat16")
KERNELS = ("kernels", "0.15.2")
HERE = Interpreter("/usr/bin/python", "cp312", "linux_x86_64")
OFF = f"Hub kernels are off ({HUB_VARIABLE}=1 allows downloads)"
FROM_HUB = [
    ("flash_attn_2", (8, 6), "kernels-community/flash-attn2", 3),
    ("flash_attn_3", (9, 0), "kernels-community/flash-attn3", 1),
    ("flash_attn_4", (10, 0), "kernels-community/flash-attn4", 0),
]


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch):
    for name, value in (("DOWNLOADS", []), ("REDIRECTIONS", {}), ("LOCAL", {}), ("CACHE", set())):
        monkeypatch.setattr(fake, name, value)
    with as_comfyui_runs():
        yield


def card(capability: tuple[int, int], *packages: tuple[str, str], hub: bool = True, os: str = "linux") -> Platform:
    return Platform(
        "cuda", capability=capability, torch="2.11.0", cuda="13.0", cudnn=91002, packages=packages, hub=hub, os=os
    )


@pytest.mark.parametrize(("backend", "capability", "repository", "version"), FROM_HUB)
def test_allowed_it_runs_from_a_pinned_repository_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    capability: tuple[int, int],
    repository: str,
    version: int,
    snapshot: SnapshotAssertion,
) -> None:
    router = on_platform(monkeypatch, card(capability, KERNELS))
    assert router.unavailable(backend) == ()
    assert [f"{repository}@{version}"] == fake.DOWNLOADS
    call = call_for(CALL)
    assert error(router.kernel(backend)(call), truth(call)).within(allowed(call, "exact"))
    assert router.reasons_against(backend, CALL._replace(mask="bool")) == snapshot
    origin = f"Hub: {repository} v{version}"
    slot = Session(router).plan(CallKind(CALL, "self", "self"))
    assert slot.plan.decision.backend in ("flash_attn", "cudnn_attn", "torch_sdpa", backend)
    assert BACKENDS[backend].kernel_name(CALL, router.platform) == f"{backend} ({origin})"
    (row,) = examine(router, HERE, [backend])
    assert (row.available, row.version, row.file, row.advice) == (True, origin, None, None)
    assert row.symbols.problem == ""


def test_the_account_of_a_run_names_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    router = on_platform(monkeypatch, card((8, 6), KERNELS))
    session = Session(router)
    slot = session.plan(CallKind(CALL, "self", "self"))
    session.attention(slot, call_for(CALL))
    (row,) = session.run_report.as_dict()["rows"]  # type: ignore[misc]
    assert (row["backend"], row["member"]) == (
        "flash_attn",
        "flash_attn_2 (Hub: kernels-community/flash-attn2 v3)",
    )
    (line,) = examine(router, HERE, ["flash_attn"])
    assert line.version == "Hub: kernels-community/flash-attn2 v3"


@pytest.mark.parametrize(("backend", "capability", "repository", "version"), FROM_HUB)
def test_while_it_is_off_the_library_is_not_even_called(
    monkeypatch: pytest.MonkeyPatch, backend: str, capability: tuple[int, int], repository: str, version: int
) -> None:
    monkeypatch.setattr(fake, "FORBIDDEN", True)  # a call fails the test, and no `except Exception` can catch that
    machine = card(capability, KERNELS, hub=False)
    router = on_platform(monkeypatch, machine)
    package = BACKENDS[backend].requires[0].partition(">")[0]
    assert router.unavailable(backend) == (f"package {package} is not installed, and {OFF}",)
    for name in (backend, "flash_attn"):
        assert router.select(CALL, Choice(name, "node")).backend not in (backend, "flash_attn")
    examine(router, HERE, ["flash_attn", backend])
    router.default_backend()
    with pytest.raises(PermissionError, match="allows downloads"):
        BACKENDS[backend].hub.load(machine)  # type: ignore[attr-defined]
    assert fake.DOWNLOADS == []


def test_the_fake_would_have_failed_the_test_above(
    monkeypatch: pytest.MonkeyPatch, snapshot: SnapshotAssertion
) -> None:
    monkeypatch.setattr(fake, "FORBIDDEN", True)
    with pytest.raises(pytest.fail.Exception) as caught:
        on_platform(monkeypatch, card((8, 6), KERNELS)).unavailable("flash_attn_2")
    assert str(caught.value) == snapshot


@pytest.mark.parametrize(
    "machine",
    [
        card((8, 6)),
        card((8, 6), ("kernels", "0.14.1")),
        card((8, 6), ("flash-attn", "2.6.0"), KERNELS, hub=False),
        # No build for the machine is known: then the Hub is not spoken of.
        card((12, 0), KERNELS),
        card((8, 6), KERNELS, os="win32"),
        card((7, 5), KERNELS),
        Platform("rocm", gfx="gfx942", packages=(KERNELS,), hub=True),
        Platform("cpu", packages=(KERNELS,), hub=True),
    ],
)
def test_reasons_in_words(monkeypatch: pytest.MonkeyPatch, machine: Platform, snapshot: SnapshotAssertion) -> None:
    assert on_platform(monkeypatch, machine).unavailable("flash_attn_2") == snapshot
    assert fake.DOWNLOADS == []


def test_an_installed_package_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake, "FORBIDDEN", True)
    router = on_platform(monkeypatch, card((8, 6), ("flash-attn", "2.8.3"), KERNELS))
    assert router.unavailable("flash_attn_2") == ()
    assert BACKENDS["flash_attn_2"].kernel_name(CALL, router.platform) is None
    (row,) = examine(router, HERE, ["flash_attn_2"])
    assert row.version == "flash-attn 2.8.3"


def test_a_local_kernel_and_the_cache_need_no_download(
    monkeypatch: pytest.MonkeyPatch, snapshot: SnapshotAssertion
) -> None:
    repository = "kernels-community/flash-attn2"
    monkeypatch.setattr(fake, "LOCAL", {repository: fake.REPOSITORIES[repository, 3]})
    assert on_platform(monkeypatch, card((8, 6), KERNELS)).unavailable("flash_attn_2") == ()
    monkeypatch.setattr(fake, "LOCAL", {})
    monkeypatch.setattr(fake, "OFFLINE", True)
    (reason,) = on_platform(monkeypatch, card((8, 6), KERNELS)).unavailable("flash_attn_2")
    assert reason == snapshot
    (row,) = examine(on_platform(monkeypatch, card((8, 6), KERNELS)), HERE, ["flash_attn_2"])
    assert row.version == "Hub: kernels-community/flash-attn2 v3"
    assert row.advice is not None
    assert "https://github.com/Dao-AILab/flash-attention/releases" in row.advice.text
    monkeypatch.setattr(fake, "CACHE", {repository})
    assert on_platform(monkeypatch, card((8, 6), KERNELS)).unavailable("flash_attn_2") == ()
    assert fake.DOWNLOADS == []


def test_only_trusted_publishers(snapshot: SnapshotAssertion) -> None:
    with pytest.raises(ValueError) as caught:
        hub.HubKernel("somebody/flash-attn2", 1, ((8, 0),))
    assert str(caught.value) == snapshot


def test_a_publisher_that_the_hub_no_longer_trusts_is_refused(
    monkeypatch: pytest.MonkeyPatch, snapshot: SnapshotAssertion
) -> None:
    monkeypatch.setattr(fake, "PUBLISHERS", set())
    (reason,) = on_platform(monkeypatch, card((8, 6), KERNELS)).unavailable("flash_attn_2")
    assert reason == snapshot
    assert fake.DOWNLOADS == []


def test_a_repository_that_leads_elsewhere_is_refused(
    monkeypatch: pytest.MonkeyPatch, snapshot: SnapshotAssertion
) -> None:
    monkeypatch.setattr(fake, "REDIRECTIONS", {"kernels-community/flash-attn2": "somebody/flash-attn2"})
    (reason,) = on_platform(monkeypatch, card((8, 6), KERNELS)).unavailable("flash_attn_2")
    assert reason == snapshot
    assert fake.DOWNLOADS == []


def test_what_fails_to_load_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hopper: version 3 cannot be fetched, so the family takes version 2, which is installed."""
    monkeypatch.setattr(fake, "OFFLINE", True)
    router = on_platform(monkeypatch, card((9, 0), ("flash-attn", "2.8.3"), KERNELS))
    assert router.unavailable("flash_attn") == ()
    assert router.backends["flash_attn"].kernel_name(CALL, router.platform) == "flash_attn_2"
    assert router.backends["flash_attn"].origin(router.platform) is None


@pytest.mark.parametrize(
    ("value", "allowed_"),
    [
        ("1", True),
        ("on", True),
        (" TRUE ", True),
        ("yes", True),
        ("", False),
        ("0", False),
        ("off", False),
        ("2", False),
    ],
)
def test_the_environment_decides_and_only_a_clear_yes_counts(
    monkeypatch: pytest.MonkeyPatch, value: str, allowed_: bool
) -> None:
    monkeypatch.setenv(HUB_VARIABLE, value)
    assert hub_allowed() is allowed_
    platform._machine.cache_clear()
    assert detect().hub is allowed_
    monkeypatch.delenv(HUB_VARIABLE)
    platform._machine.cache_clear()
    assert detect().hub is False


def test_a_described_machine_says_it_with_a_word(snapshot: SnapshotAssertion) -> None:
    on = parse_platform("cuda:8.6,hub=on,packages=kernels==0.15.2")
    assert (on.hub, parse_platform("cuda:8.6").hub) == (True, False)
    assert Router(on).select(CALL, Choice("flash_attn_2", "node"), strict=True).backend == "flash_attn_2"
    with pytest.raises(ValueError) as caught:
        parse_platform("cuda:8.6,hub=maybe")
    assert str(caught.value) == snapshot


def test_nothing_optional_is_imported_at_start() -> None:
    """In a process of its own, with the variable set: neither the library nor a kernel package is touched."""
    script = f"""
import importlib.util, sys
names = ("kernels", "huggingface_hub", "xformers", "aiter", "torch_npu", "torch_xla", "flash_attn", "torch")
for name in names:
    sys.modules[name] = None  # any import of it raises
spec = importlib.util.spec_from_file_location("pack", {str(ROOT / "__init__.py")!r},
                                              submodule_search_locations=[{str(ROOT)!r}])
sys.modules["pack"] = importlib.util.module_from_spec(spec)
from pack.backends.values.platform import parse_platform
from pack.backends.engine.router import Router
router = Router(parse_platform("cuda:8.6,hub=on,packages=kernels==0.15.2;xformers==0.0.35"))
print([name for name in router.backends if not router.unavailable(name)])
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, env={HUB_VARIABLE: "1"}
    )
    assert done.returncode == 0, done.stderr
    assert "'flash_attn_2'" in done.stdout
    assert "'xformers'" in done.stdout


AMD = Platform("rocm", gfx="gfx942", torch="2.11.0", packages=(KERNELS,), os="linux", hub=True)


def test_aiter_from_the_hub_has_the_limits_of_its_build(
    monkeypatch: pytest.MonkeyPatch, snapshot: SnapshotAssertion
) -> None:
    router = on_platform(monkeypatch, AMD)
    assert router.unavailable("aiter") == ()
    assert fake.DOWNLOADS == ["kernels-community/aiter-flash-attn-ck@1"]
    call = call_for(CALL)
    assert error(router.kernel("aiter")(call), truth(call)).within(allowed(call, "exact"))
    assert router.backends["aiter"].origin(router.platform) == "Hub: kernels-community/aiter-flash-attn-ck v1"
    assert router.reasons_against("aiter", CALL._replace(dtype="float16")) == snapshot
    assert router.reasons_against("aiter", CALL._replace(head_dim=96)) == snapshot
    assert str(router.backends["flash_attn"].kernel_name(CALL, router.platform)).startswith("aiter (Hub")
    installed = replace(AMD, packages=(KERNELS, ("amd-aiter", "0.1.7")))
    assert BACKENDS["aiter"].origin(installed) is None
    assert on_platform(monkeypatch, installed).reasons_against("aiter", CALL._replace(dtype="float16")) == ()


@pytest.mark.parametrize(("backend", "machine"), [("aiter", AMD), ("sage_attn_3", None)])
def test_they_too_are_taken_only_where_it_is_allowed(
    monkeypatch: pytest.MonkeyPatch, backend: str, machine: Platform | None
) -> None:
    monkeypatch.setattr(fake, "FORBIDDEN", True)
    triton = ("triton", "3.6.0")
    router = on_platform(monkeypatch, replace(machine or card((12, 0), KERNELS, triton), hub=False))
    (reason,) = router.unavailable(backend)
    assert reason.endswith(f"is not installed, and {OFF}")


def test_sage_3_from_the_hub(monkeypatch: pytest.MonkeyPatch, snapshot: SnapshotAssertion) -> None:
    triton = ("triton", "3.6.0")
    router = on_platform(monkeypatch, card((12, 0), KERNELS, triton))
    assert router.unavailable("sage_attn_3") == ()
    assert fake.DOWNLOADS == ["kernels-community/sage-blackwell@1"]
    call = call_for(CALL)
    key = call.key.clone()
    assert error(router.kernel("sage_attn_3")(call), truth(call)).within(allowed(call, "fp4"))
    assert bool((call.key == key).all())  # the Hub's build writes into it too
    assert router.backends["sage_attn_3"].kernel_name(CALL, router.platform) == (
        "sage_attn_3 (Hub: kernels-community/sage-blackwell v1)"
    )
    # The Hub has no build for other Blackwell cards.
    assert on_platform(monkeypatch, card((10, 0), KERNELS, triton)).unavailable("sage_attn_3") == snapshot
