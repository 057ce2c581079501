"""Prebuilt kernels from Hugging Face's Hub, through the package `kernels`; only where the person allows downloads.

Off unless ATTENTION_BACKENDS_HUB=1 is set: then a kernel whose own package is missing is taken from a pinned
repository of a trusted publisher. `kernels` keeps what it fetched, and honours HF_HUB_OFFLINE (its cache alone),
KERNELS_CACHE and LOCAL_KERNELS (https://github.com/huggingface/kernels). While this is off, `kernels` is not imported.
Asking whether such a backend is available loads it, and so downloads it the first time.
"""

from __future__ import annotations

import threading
import warnings
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import ClassVar

from ...values.platform import HUB_VARIABLE, Platform
from ...values.reasons import Reason, template
from ...values.request import AttentionRequest
from ..backend import Backend, package_reason

_loading = threading.Lock()

REQUIREMENT = "kernels>=0.15"
"""0.14 began to check who published a repository, 0.15 to work from its cache in offline mode."""

TRUSTED = ("kernels-community",)
"""Publishers whose repositories may be named here; `kernels` asks the Hub about them once more."""


@dataclass(frozen=True)
class HubKernel:
    """A repository on the Hub, the version of its interface, and the cards that its builds are known to run on."""

    repository: str
    version: int
    cards: tuple[tuple[int, int], ...] = ()
    """CUDA compute capabilities."""
    architectures: tuple[str, ...] = ()
    """AMD architectures."""

    def __post_init__(self) -> None:
        if self.repository.partition("/")[0] not in TRUSTED:
            raise ValueError(f"{self.repository} is not of a trusted publisher ({', '.join(TRUSTED)})")

    @property
    def name(self) -> str:
        """What reports call it, e.g. `kernels-community/flash-attn2 v3`."""
        return f"{self.repository} v{self.version}"

    def fits(self, platform: Platform) -> bool:
        """True where a build for this machine is known: these cards, on Linux."""
        on_amd = platform.kind == "rocm" and platform.gfx in self.architectures
        return platform.os == "linux" and (on_amd or (platform.kind == "cuda" and platform.capability in self.cards))

    def obstacle(self, platform: Platform) -> Reason | None:
        """Why it is not taken from the Hub on a machine that it fits, in words that follow `and`; None if it is."""
        if not platform.hub:
            return Reason(HUB_OFF, variable=HUB_VARIABLE)
        reason = package_reason(REQUIREMENT, platform)
        return Reason(HUB_NEEDS, reason=reason) if reason else None

    def load(self, platform: Platform) -> ModuleType:
        """Import the kernel, after a download where no cache has it.

        Raises:
            PermissionError: downloads are not allowed.
            Exception: what `kernels` raises: no build for this torch, no network, an untrusted publisher.
        """
        if not platform.hub:
            raise PermissionError(f"{self.name}: {self.obstacle(platform)}")
        get_kernel = import_module("kernels").get_kernel
        # Up to 0.16 a repository can redirect to another one, whose publisher was not checked. Python's filters are
        # the process's, and `kernels` has no argument for it: one load at a time, so that no load of ours restores
        # another's. A kernel is loaded once, mostly by the probe, which runs in a separate process.
        with _loading, warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*redirected to")
            module: ModuleType = get_kernel(self.repository, version=self.version, trust_remote_code=False)
        return module


AND_NOT_FROM_HUB = template("package.hub", "{reasons}, and {obstacle}")

HUB_OFF = template("hub.off", "Hub kernels are off ({variable}=1 allows downloads)")
HUB_NEEDS = template("hub.needs", "{reason}, which loads it from the Hub")


class FromHub(Backend):
    """A backend that falls back to a repository on the Hub where its package is missing."""

    asks_for: ClassVar[tuple[str, ...]] = ("kernels",)
    hub: ClassVar[HubKernel | None] = None
    """The repository used where the person allows downloads; None for none."""

    def unavailable_reasons(self, platform: Platform) -> list[Reason]:
        reasons = super().unavailable_reasons(platform)
        lacking = self._lacking(platform)
        if self.hub is None or not lacking or not self.hub.fits(platform):
            return reasons
        others = [reason for reason in reasons if reason not in lacking]
        obstacle = self.hub.obstacle(platform)
        return [*others, Reason(AND_NOT_FROM_HUB, reasons=tuple(lacking), obstacle=obstacle)] if obstacle else others

    def _lacking(self, platform: Platform) -> list[Reason]:
        return [reason for need in self.requires if (reason := package_reason(need, platform))]

    def from_hub(self, platform: Platform) -> HubKernel | None:
        """The repository that its function is taken from; None where its own package is used, or nothing is."""
        hub = self.hub
        usable = hub is not None and hub.fits(platform) and hub.obstacle(platform) is None
        return hub if usable and self._lacking(platform) else None

    def imported(self, platform: Platform, module: str) -> ModuleType:
        """`module` of the installed package, or the Hub's build where that is missing and downloads are allowed."""
        hub = self.from_hub(platform)
        return hub.load(platform) if hub else import_module(module)

    def origin(self, platform: Platform) -> str | None:
        hub = self.from_hub(platform)
        return f"Hub: {hub.name}" if hub else None

    def kernel_name(self, request: AttentionRequest, platform: Platform) -> str | None:
        origin = self.origin(platform)
        return f"{self.id} ({origin})" if origin else None
