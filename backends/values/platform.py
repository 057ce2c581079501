"""`Platform`: an immutable description of a machine, detected or described.

`detect` reads the running machine; `parse_platform` a description such as `cuda:12.0,cudnn=91002`, for which selection
can be explained on another machine.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, TypeVar

from .devices import kind_beside_torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

Value = TypeVar("Value")

OS_NAMES = {"linux": "linux", "windows": "win32", "win32": "win32", "darwin": "darwin", "macos": "darwin"}
"""Name of an operating system in a description -> sys.platform."""

KINDS = ("cpu", "cuda", "rocm", "xpu", "mps", "npu", "xla")

FLASH_TRITON_VARIABLE = "FLASH_ATTENTION_TRITON_AMD_ENABLE"
"""flash-attn's variable, read at import: exactly TRUE enables its Triton backend on AMD cards."""

HUB_VARIABLE = "ATTENTION_BACKENDS_HUB"
"""Environment variable; 1 allows downloads of kernels from Hugging Face's Hub."""


@dataclass(frozen=True)
class Platform:
    """Facts about a machine. `kind` is one of `KINDS`; everything else may be unknown."""

    kind: str
    capability: tuple[int, int] | None = None
    """CUDA compute capability, e.g. (9, 0)."""
    gfx: str | None = None
    """AMD architecture, e.g. `gfx942`."""
    name: str = ""
    torch: str = ""
    """torch's version, without its local part."""
    cuda: str | None = None
    cudnn: int | None = None
    """cuDNN's version number, e.g. 91002 for 9.10.2."""
    packages: tuple[tuple[str, str], ...] = ()
    os: str = field(default=sys.platform)
    cudnn_sdp_enabled: bool = True
    """False after torch.backends.cuda.enable_cudnn_sdp(False) in this process."""
    hub: bool = False
    """Downloads from Hugging Face's Hub are allowed (`kernels/support/hub.py`)."""
    flash_triton: bool = False
    """`FLASH_TRITON_VARIABLE` is set."""
    described: bool = False
    """True for a described machine: packages are assumed to work and not imported."""

    def version(self, package: str) -> str | None:
        """The installed version of a distribution, or None."""
        return dict(self.packages).get(package)

    @property
    def sm(self) -> str:
        """`sm_120` for capability (12, 0), an empty string when unknown."""
        return f"sm_{self.capability[0]}{self.capability[1]}" if self.capability else ""

    @property
    def architecture(self) -> str:
        """NVIDIA's name of the generation, an empty string when unknown."""
        if self.capability is None:
            return ""
        major, minor = self.capability
        if major >= 10:
            return "Blackwell"
        return {9: "Hopper", 8: "Ada" if minor == 9 else "Ampere", 7: "Turing" if minor == 5 else "Volta"}.get(
            major, f"sm_{major}{minor}"
        )

    def describe(self) -> str:
        """One line: kind, card, versions."""
        parts = [self.kind, self.name, self.sm or self.gfx or "", f"torch {self.torch}" if self.torch else ""]
        parts += [f"CUDA {self.cuda}" if self.cuda else "", f"cuDNN {self.cudnn}" if self.cudnn else ""]
        return ", ".join(filter(None, parts))


def dotted(capability: tuple[int, int]) -> str:
    """A compute capability as text, e.g. `9.0`."""
    return f"{capability[0]}.{capability[1]}"


def installed_packages(names: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """(name, version) of each installed distribution, from metadata, without importing it."""
    from importlib import metadata

    found = []
    for name in names:
        try:
            found.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            continue
        except Exception as error:  # a damaged installation is reported, and must not raise
            found.append((name, f"unreadable ({error})"))
    return tuple(found)


def hub_allowed() -> bool:
    """Whether the environment allows downloads from the Hub."""
    return os.environ.get(HUB_VARIABLE, "").strip().lower() in ("1", "on", "true", "yes")


def detect(device: torch.device | None, distributions: tuple[str, ...]) -> Platform:
    """Read the machine, for `device` (default: the first accelerator, else the CPU). Imports torch.

    Read once per process, except the switches of the Hub and of cuDNN, which can change.

    Args:
        distributions: packages to look for; `kernels/registry.detect` passes those that backends declare.
    """
    platform = _machine(device, distributions)
    if platform.hub != hub_allowed():
        platform = replace(platform, hub=hub_allowed())
    if platform.kind != "cuda":
        return platform
    import torch

    enabled: bool = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    return platform if enabled == platform.cudnn_sdp_enabled else replace(platform, cudnn_sdp_enabled=enabled)


@lru_cache(maxsize=16)
def _machine(device: torch.device | None, distributions: tuple[str, ...]) -> Platform:
    import torch

    version = torch.__version__.split("+")[0]
    packages, hub = installed_packages(distributions), hub_allowed()
    kind = device.type if device is not None else _default_device_type()
    if kind == "cuda" and torch.cuda.is_available():
        index = device.index if device is not None and device.index is not None else torch.cuda.current_device()
        name = torch.cuda.get_device_name(index)
        if torch.version.hip:
            gfx = torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
            triton = os.environ.get(FLASH_TRITON_VARIABLE) == "TRUE"
            return Platform("rocm", gfx=gfx, name=name, torch=version, packages=packages, hub=hub, flash_triton=triton)
        return Platform(
            "cuda",
            capability=torch.cuda.get_device_capability(index),
            name=name,
            torch=version,
            cuda=torch.version.cuda,
            cudnn=torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
            packages=packages,
            hub=hub,
        )
    if kind not in KINDS:
        kind = "cpu"
    return Platform(kind, torch=version, packages=packages, hub=hub)


def _default_device_type() -> str:
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        return "xpu"
    if torch.backends.mps.is_available():
        return "mps"
    return kind_beside_torch() or "cpu"


def parse_platform(text: str) -> Platform:
    """Parse the description of a machine: `KIND[:CARD]`, then `name=value` pairs, separated by commas.

    CARD is a compute capability for cuda (`12.0`) and an architecture for rocm (`gfx942`). The names are
    `torch`, `cuda`, `cudnn`, `name`, `os` (linux, windows, darwin), `cudnn_sdp`, `hub` and `flash_triton`
    (on, off), and `packages`, a list such as `flash-attn==2.8.3;flashinfer-python==0.7.2`.

    Raises:
        ValueError: malformed; the message has the part.
    """
    head, *pairs = (part.strip() for part in text.split(","))
    kind, _, card = head.partition(":")
    kind, card = kind.strip().lower(), card.strip()
    if kind not in KINDS:
        raise ValueError(f"platform: {kind!r} is not one of {', '.join(KINDS)}")
    values = _parse_pairs(pairs)
    if card and kind not in ("cuda", "rocm"):
        raise ValueError(f"platform: {kind} takes no card, got {card!r}")
    capability = _parse_capability(card) if card and kind == "cuda" else None
    gfx = card.lower() if card and kind == "rocm" else None
    default_cudnn = "91002" if kind == "cuda" else ""
    cudnn = values.get("cudnn", default_cudnn)
    try:
        cudnn_version = int(cudnn) if cudnn and cudnn.lower() != "none" else None
    except ValueError as error:
        raise ValueError(f"platform: cudnn {cudnn!r} is not a version number such as 91002") from error
    return Platform(
        kind,
        capability=capability,
        gfx=gfx,
        name=values.get("name", ""),
        torch=values.get("torch", "2.11.0"),
        cuda=values.get("cuda", "13.0" if kind == "cuda" else None),
        cudnn=cudnn_version,
        packages=_parse_packages(values.get("packages", "")),
        os=_one_of("os", OS_NAMES, values.get("os", "darwin" if kind == "mps" else "linux")),
        cudnn_sdp_enabled=_one_of("cudnn_sdp", {"on": True, "off": False}, values.get("cudnn_sdp", "on")),
        hub=_one_of("hub", {"on": True, "off": False}, values.get("hub", "off")),
        flash_triton=_one_of("flash_triton", {"on": True, "off": False}, values.get("flash_triton", "off")),
        described=True,
    )


def _one_of(name: str, choices: Mapping[str, Value], value: str) -> Value:
    if value.lower() not in choices:
        raise ValueError(f"platform: {name} {value!r} is not one of {', '.join(choices)}")
    return choices[value.lower()]


def _parse_pairs(pairs: list[str]) -> dict[str, str]:
    known = ("torch", "cuda", "cudnn", "name", "os", "cudnn_sdp", "hub", "flash_triton", "packages")
    values = {}
    for pair in filter(None, pairs):
        name, equals, value = pair.partition("=")
        if not equals or name.strip() not in known:
            raise ValueError(f"platform: {pair!r} is not one of {', '.join(known)}, as name=value")
        values[name.strip()] = value.strip()
    return values


WITHOUT_A_DOT = (
    "50", "52", "53", "60", "61", "62", "70", "72", "75", "80", "86", "87", "88", "89", "90", "100", "101", "103",
    "110", "120", "121",
)  # fmt: skip
"""NVIDIA's compute capabilities, to split numbers such as `sm_120`, which is ambiguous otherwise."""


def _parse_capability(text: str) -> tuple[int, int]:
    digits = text.lower().removeprefix("sm_").removeprefix("sm").rstrip("abcf")
    if "." not in digits and digits in WITHOUT_A_DOT:
        digits = f"{digits[:-1]}.{digits[-1]}"
    major, dot, minor = digits.partition(".")
    if not (dot and major.isdigit() and minor.isdigit()):
        raise ValueError(f"platform: {text!r} is not a compute capability such as 9.0 or sm_90")
    return int(major), int(minor)


def _parse_packages(text: str) -> tuple[tuple[str, str], ...]:
    packages = []
    for item in filter(None, (part.strip() for part in text.split(";"))):
        name, equals, version = item.partition("==")
        if not equals or not version:
            raise ValueError(f"platform: package {item!r} has no version; write name==version")
        packages.append((name.strip().lower().replace("_", "-"), version.strip()))
    return tuple(packages)
