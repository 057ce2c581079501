"""Prebuilt kernels from Hugging Face's Hub, through the package `kernels`; only where the person allows downloads.

Off unless ATTENTION_BACKENDS_HUB=1 is set: then a kernel whose own package is missing is taken from a pinned
repository of a trusted publisher. `kernels` keeps what it fetched, and honours HF_HUB_OFFLINE (its cache alone),
KERNELS_CACHE and LOCAL_KERNELS (https://github.com/huggingface/kernels). While this is off, it is not even imported.
Asking whether such a backend is available loads it, as everywhere here, and so fetches it the first time.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

from .backend import package_reason
from .platform import HUB_VARIABLE, Platform

REQUIREMENT = "kernels>=0.15"
"""0.14 began to check who published a repository, 0.15 to work from its cache when it is told to stay offline."""

TRUSTED = ("kernels-community",)
"""Publishers whose repositories may be named here; `kernels` asks the Hub about them once more."""


@dataclass(frozen=True)
class HubKernel:
    """A repository on the Hub, the version of its interface, and the cards that its builds are known to run on."""

    repository: str
    version: int
    cards: tuple[tuple[int, int], ...]
    """CUDA compute capabilities."""

    def __post_init__(self) -> None:
        if self.repository.partition("/")[0] not in TRUSTED:
            raise ValueError(f"{self.repository} is not of a trusted publisher ({', '.join(TRUSTED)})")

    @property
    def name(self) -> str:
        """What reports call it, e.g. `kernels-community/flash-attn2 v3`."""
        return f"{self.repository} v{self.version}"

    def fits(self, platform: Platform) -> bool:
        """True where a build for this machine is known: these cards, on Linux."""
        return platform.kind == "cuda" and platform.os == "linux" and platform.capability in self.cards

    def obstacle(self, platform: Platform) -> str | None:
        """Why it is not taken from the Hub on a machine that it fits, in words that follow `and`; None if it is."""
        if not platform.hub:
            return f"Hub kernels are off ({HUB_VARIABLE}=1 allows downloads)"
        reason = package_reason(REQUIREMENT, platform)
        return f"{reason}, which loads it from the Hub" if reason else None

    def load(self, platform: Platform) -> ModuleType:
        """Import the kernel, after a download where no cache has it.

        Raises:
            PermissionError: nobody allowed downloads.
            Exception: what `kernels` raises: no build for this torch, no network, an untrusted publisher.
        """
        if not platform.hub:
            raise PermissionError(f"{self.name}: {self.obstacle(platform)}")
        get_kernel = import_module("kernels").get_kernel
        with warnings.catch_warnings():
            # Up to 0.16 a repository can lead to another one, about whose publisher nothing was asked.
            warnings.filterwarnings("error", message=".*redirected to")
            module: ModuleType = get_kernel(self.repository, version=self.version, trust_remote_code=False)
        return module
