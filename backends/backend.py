"""What a backend is: declared limits, an accuracy class, two kinds of reasons, and a kernel loaded on demand.

*Unavailable* is about the machine (package, version, card) and is asked once per process. *Unsupported* is about
one request (dtype, head size, mask) and is asked once per kind of call. Both answer with reasons: an empty list
means yes. A reason is lower case and names the value and the limit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import isclose
from typing import TYPE_CHECKING, ClassVar

from .options import Option
from .platform import Platform
from .request import AttentionCall, AttentionRequest

if TYPE_CHECKING:
    import torch

Kernel = Callable[[AttentionCall], "torch.Tensor"]
"""Computes one call; returns (batch, num_heads, q_len, v_head_dim)."""

ACCURACY = ("exact", "quantized", "sparse")
"""`exact`: differs from SDPA by rounding only. `quantized`: INT8, FP8, FP4 arithmetic. `sparse`: skips work."""

HALF = ("float16", "bfloat16")
FLOATING = ("float16", "bfloat16", "float32", "float64")
ANY_MASK = ("none", "key_padding", "bool", "bias")


@dataclass(frozen=True)
class Limits:
    """The requests a kernel accepts, as data: the source of its reasons and of the support table."""

    dtypes: tuple[str, ...] = HALF
    max_head_dim: int | None = None
    head_dims: tuple[int, ...] | None = None
    """The only head sizes there are; None for any up to `max_head_dim`."""
    head_dim_multiple: int = 1
    masks: tuple[str, ...] = ANY_MASK
    gqa: bool = True
    causal: bool = True
    causal_cross: bool = False
    """Accepts is_causal with q_len != kv_len, aligned top-left as SDPA defines it."""
    mask_and_causal: bool = False
    scale: bool = True
    """Takes a scale; without it only head_dim ** -0.5, which every kernel computes by itself."""
    mixed_head_dims: bool = False
    """Accepts values whose head size differs from the keys'."""
    min_kv_len: int = 1
    max_kv_len: int | None = None
    kv_block: int = 1
    """Unless is_causal is set, kv_len must be a multiple of this: the kernel counts what fills its last block."""
    max_elements: int | None = None
    """Most elements of query, key or value, head_dim padded to `padded_head_dims`: a kernel that counts in 32 bits."""
    padded_head_dims: tuple[int, ...] = ()
    max_batch: int | None = None
    max_heads: int | None = None

    def reasons(self, request: AttentionRequest) -> list[str]:
        """Why `request` is outside these limits; empty when it is inside."""
        head_dim, v_head_dim = request.head_dim, request.v_head_dim or request.head_dim
        largest = max(head_dim, v_head_dim)
        checks: Iterable[tuple[bool, str]] = (
            (request.dtype not in self.dtypes, f"dtype {request.dtype} not in ({', '.join(self.dtypes)})"),
            (
                self.head_dims is not None and head_dim not in self.head_dims,
                f"head_dim {head_dim} not in {self.head_dims}",
            ),
            (
                self.max_head_dim is not None and largest > self.max_head_dim,
                f"head_dim {largest} > {self.max_head_dim}",
            ),
            (
                head_dim % self.head_dim_multiple != 0 or v_head_dim % self.head_dim_multiple != 0,
                f"head_dim {head_dim} is not a multiple of {self.head_dim_multiple}",
            ),
            (
                head_dim != v_head_dim and not self.mixed_head_dims,
                f"head_dim of values {v_head_dim} != {head_dim}",
            ),
            (request.mask not in self.masks, f"mask kind {request.mask} not in ({', '.join(self.masks)})"),
            (
                request.grouped and not self.gqa,
                f"grouped query heads {request.num_heads}/{request.num_kv_heads} are not supported",
            ),
            (request.is_causal and not self.causal, "is_causal is not supported"),
            (
                request.is_causal and self.causal and not self.causal_cross and request.q_len != request.kv_len,
                f"is_causal with q_len {request.q_len} != kv_len {request.kv_len}",
            ),
            (
                request.is_causal and request.mask != "none" and not self.mask_and_causal,
                "is_causal together with a mask",
            ),
            (not self.scale and not _default_scale(request), f"scale {request.scale} is not head_dim ** -0.5"),
            (request.kv_len < self.min_kv_len, f"kv_len {request.kv_len} < {self.min_kv_len}"),
            (
                self.max_kv_len is not None and request.kv_len > self.max_kv_len,
                f"kv_len {request.kv_len} > {self.max_kv_len}",
            ),
            (
                request.kv_len % self.kv_block != 0 and not request.is_causal,
                f"kv_len {request.kv_len} is not a multiple of {self.kv_block}",
            ),
            (
                self.max_elements is not None and self.elements(request) > self.max_elements,
                f"{self.elements(request)} elements in one tensor > {self.max_elements}",
            ),
            (
                self.max_batch is not None and request.batch > self.max_batch,
                f"batch {request.batch} > {self.max_batch}",
            ),
            (
                self.max_heads is not None and request.num_heads > self.max_heads,
                f"num_heads {request.num_heads} > {self.max_heads}",
            ),
        )
        return [reason for refused, reason in checks if refused]

    def elements(self, request: AttentionRequest) -> int:
        """Elements of the largest of query, key and value, as the kernel sees them."""
        largest = max(request.head_dim, request.v_head_dim)
        head_dim = next((size for size in sorted(self.padded_head_dims) if size >= largest), largest)
        rows = max(request.num_heads * request.q_len, (request.num_kv_heads or request.num_heads) * request.kv_len)
        return request.batch * rows * head_dim


def _default_scale(request: AttentionRequest) -> bool:
    return request.scale is None or isclose(request.scale, request.head_dim**-0.5, rel_tol=1e-6)


class Backend:
    """One thing a person can select. A subclass declares the class attributes and writes `load`."""

    id: ClassVar[str]
    summary: ClassVar[str]
    """One sentence for menus: what it does and when to use it."""
    accuracy: ClassVar[str] = "exact"
    kinds: ClassVar[tuple[str, ...]] = ("cuda",)
    """Kinds of platform it runs on (`platform.KINDS`)."""
    min_capability: ClassVar[tuple[int, int] | None] = None
    """Lowest CUDA compute capability; asked only on `cuda`."""
    architectures: ClassVar[tuple[str, ...] | None] = None
    """The only AMD architectures that it has kernels for, such as `gfx942`; asked only on `rocm`."""
    requires: ClassVar[tuple[str, ...]] = ()
    """Distributions it needs, as requirement strings such as `flash-attn>=2.6.3`."""
    limits: ClassVar[Limits] = Limits()
    options: ClassVar[tuple[Option, ...]] = ()
    """What a person may set under `extra`; `load` takes each as a keyword argument with the same default."""
    changes_inputs: ClassVar[bool] = False
    """The kernel writes into query, key or value; callers that keep them hand it copies."""

    def unavailable_reasons(self, platform: Platform) -> list[str]:
        """Why this backend cannot run on `platform` at all; empty when it can."""
        if platform.kind not in self.kinds:
            return [f"device {platform.kind} not in ({', '.join(self.kinds)})"]
        reasons = []
        cards = self.cards(platform)
        if platform.kind == "cuda" and (self.min_capability or cards is not None):
            if platform.capability is None:
                reasons.append("compute capability unknown")
            elif self.min_capability and platform.capability < self.min_capability:
                reasons.append(f"compute capability {_dotted(platform.capability)} < {_dotted(self.min_capability)}")
            elif cards is not None and platform.capability not in cards:
                known = ", ".join(_dotted(card) for card in cards)
                reasons.append(f"compute capability {_dotted(platform.capability)} not in ({known})")
        if platform.kind == "rocm" and self.architectures is not None and platform.gfx not in self.architectures:
            reasons.append(f"architecture {platform.gfx or 'unknown'} not in ({', '.join(self.architectures)})")
        reasons += [reason for need in self.requires if (reason := package_reason(need, platform))]
        return reasons

    def cards(self, platform: Platform) -> tuple[tuple[int, int], ...] | None:
        """The only CUDA compute capabilities that it has kernels for; None for any from `min_capability`."""
        return None

    def member(self, request: AttentionRequest, platform: Platform) -> str | None:
        """Which of several kernels would run `request`, for reports; None where the backend is one kernel."""
        return None

    def origin(self, platform: Platform) -> str | None:
        """Where its code comes from, where that is none of its packages; None otherwise. For reports."""
        return None

    def limits_on(self, platform: Platform) -> Limits:
        """The limits that hold on `platform`; override where they differ between machines."""
        return self.limits

    def unsupported_reasons(self, request: AttentionRequest, platform: Platform) -> list[str]:
        """Why this backend, available on `platform`, cannot run `request`; empty when it can."""
        return self.limits_on(platform).reasons(request)

    def avoid_reasons(self, request: AttentionRequest, platform: Platform) -> list[str]:
        """Why a route passes over this backend for `request` although it could run: others are known to be faster.

        Not asked when a person names the backend.
        """
        return []

    def load(self, platform: Platform) -> Kernel:
        """Import what the kernel needs and return it. Called where it is available, once for each set of options.

        Options are keyword arguments: `def load(self, platform: Platform, *, smooth_k: bool = True) -> Kernel`.

        Raises:
            Exception: whatever a broken package raises; the caller turns it into an unavailable reason.
        """
        raise NotImplementedError


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def package_reason(requirement: str, platform: Platform) -> str | None:
    """Why a requirement such as `flash-attn>=2.6.3` is not met on `platform`, or None when it is."""
    from packaging.requirements import Requirement
    from packaging.version import InvalidVersion, Version

    need = Requirement(requirement)
    found = platform.version(need.name)
    if found is None:
        return f"package {need.name} is not installed"
    try:
        version = Version(found)
    except InvalidVersion:
        return f"package {need.name} has no readable version: {found}"
    if not need.specifier.contains(version, prereleases=True):
        return f"package {need.name} {found} does not meet {need.specifier}"
    return None
