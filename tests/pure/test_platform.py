"""The machine as a value: described in words, or read from the one that runs."""

from __future__ import annotations

from importlib import metadata

import pytest
from attention_backends.backends.kernels import BACKENDS
from attention_backends.backends.kernels.registry import detect, looked_for
from attention_backends.backends.values.platform import KINDS, Platform, installed_packages, parse_platform
from packaging.requirements import Requirement
from syrupy.assertion import SnapshotAssertion


def test_the_example_of_the_command_line() -> None:
    platform = parse_platform("cuda:12.0,cudnn=91002,packages=flashinfer-python==0.7.2;flash-attn==2.8.3")
    assert (platform.kind, platform.capability, platform.cudnn) == ("cuda", (12, 0), 91002)
    assert platform.version("flash-attn") == "2.8.3"
    assert platform.version("flashinfer-python") == "0.7.2"
    assert platform.version("sageattention") is None
    assert platform.described


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_can_be_described(kind: str) -> None:
    platform = parse_platform(kind.upper())
    assert platform.kind == kind
    assert platform.capability is None
    assert platform.os == ("darwin" if kind == "mps" else "linux")
    assert (platform.cuda is not None) == (kind == "cuda")


@pytest.mark.parametrize("text", ["cuda:12.1", "cuda:sm_121", "cuda:sm121", "cuda:121", "cuda:sm_121a", "cuda: 12.1"])
def test_capabilities_in_every_spelling(text: str) -> None:
    assert parse_platform(text).capability == (12, 1)


@pytest.mark.parametrize(
    ("capability", "sm", "architecture"),
    [
        ("7.0", "sm_70", "Volta"),
        ("7.5", "sm_75", "Turing"),
        ("8.0", "sm_80", "Ampere"),
        ("8.6", "sm_86", "Ampere"),
        ("8.7", "sm_87", "Ampere"),
        ("8.9", "sm_89", "Ada"),
        ("9.0", "sm_90", "Hopper"),
        ("10.0", "sm_100", "Blackwell"),
        ("10.3", "sm_103", "Blackwell"),
        ("12.0", "sm_120", "Blackwell"),
        ("12.1", "sm_121", "Blackwell"),
    ],
)
def test_generations(capability: str, sm: str, architecture: str) -> None:
    platform = parse_platform(f"cuda:{capability}")
    assert (platform.sm, platform.architecture) == (sm, architecture)


def test_an_amd_card_and_every_other_value() -> None:
    platform = parse_platform("rocm:GFX942, torch=2.9.1, name=MI300X, os=linux")
    assert (platform.kind, platform.gfx, platform.torch, platform.name) == ("rocm", "gfx942", "2.9.1", "MI300X")
    windows = parse_platform("cuda:8.9,os=windows,cuda=12.8,cudnn=none,cudnn_sdp=off")
    assert (windows.os, windows.cuda, windows.cudnn, windows.cudnn_sdp_enabled) == ("win32", "12.8", None, False)


def test_package_names_are_written_as_people_like() -> None:
    assert parse_platform("cuda,packages=Flash_Attn==2.8.3; ").packages == (("flash-attn", "2.8.3"),)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "gpu",
        "cuda:new",
        "cuda:9",
        "cuda:99",
        "cuda:sm_1210",
        "cpu:avx512",
        "cuda:9.0,cudnn=new",
        "cuda:9.0,os=beos",
        "cuda:9.0,cudnn_sdp=maybe",
        "cuda:9.0,colour=red",
        "cuda:9.0,packages=flash-attn",
        "cuda:9.0,packages=flash-attn==",
        "cuda:9.0,packages=a==1,b==2",
    ],
)
def test_bad_descriptions_say_which_part(text: str, snapshot: SnapshotAssertion) -> None:
    with pytest.raises(ValueError, match=r"^platform: ") as caught:
        parse_platform(text)
    assert str(caught.value) == snapshot


def test_a_platform_is_a_value() -> None:
    one, other = parse_platform("cuda:9.0,packages=a==1"), parse_platform("cuda:9.0,packages=a==1")
    assert one == other
    assert hash(one) == hash(other)


def test_the_description_in_words(snapshot: SnapshotAssertion) -> None:
    words = parse_platform("cuda:12.0,name=RTX PRO 6000,torch=2.11.0").describe()
    assert words == snapshot
    assert Platform("cpu").describe() == "cpu"


@pytest.mark.parametrize("name", BACKENDS)
def test_what_a_backend_requires_is_looked_for(name: str) -> None:
    """Otherwise the backend says that a package is not installed, which is."""
    assert {Requirement(need).name for need in BACKENDS[name].requires} <= {"torch", *looked_for()}


def test_a_damaged_package_is_reported_and_does_not_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "sageattention":
            raise KeyError("Version")
        if name == "flash-attn":
            return "2.8.3"
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    found = dict(installed_packages(looked_for()))
    assert found == {"flash-attn": "2.8.3", "sageattention": "unreadable ('Version')"}


def test_the_running_machine() -> None:
    torch = pytest.importorskip("torch")
    platform = detect()
    assert platform.kind in KINDS
    assert not platform.described
    assert platform.torch == torch.__version__.split("+")[0]
    assert (platform.kind == "cuda") == (torch.cuda.is_available() and torch.version.hip is None)


def test_a_device_can_be_named() -> None:
    torch = pytest.importorskip("torch")
    assert detect(torch.device("cpu")).kind == "cpu"
