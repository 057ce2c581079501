"""What a backend is: declared limits, an accuracy class, two kinds of reasons, and a kernel loaded on demand.

*Unavailable* is about the machine (package, version, card) and is asked once per process. *Unsupported* is about
one request (dtype, head size, mask) and is asked once per kind of call. Both answer with reasons: an empty list
means yes. A reason is lower case and names the value and the limit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, TypeVar, cast

from ..values.aliases import Alias
from ..values.grid import Kept, Place, Progress
from ..values.limits import ANY_MASK, FLOATING, HALF, Limits
from ..values.options import Option
from ..values.package import Package, Symbols
from ..values.platform import Platform
from ..values.reasons import Reason
from ..values.request import AttentionCall, AttentionRequest
from ..values.tolerance import EXACT, Tolerance, accuracy, tolerance
from ..values.versions import meets, read

if TYPE_CHECKING:
    import torch

    from .support.varlen import VarlenCall, VarlenKernel

__all__ = ["ANY_MASK", "FLOATING", "HALF", "Backend", "Kernel", "Limits", "LseKernel", "package_reason"]

Kernel = Callable[[AttentionCall], "torch.Tensor"]
"""Computes one call; returns (batch, num_heads, q_len, v_head_dim)."""

LseKernel = Callable[[AttentionCall], "tuple[torch.Tensor, torch.Tensor]"]
"""Computes one call; returns its output and the log-sum-exp (LSE) of each row's scores.

The LSE is the natural logarithm, float32, (batch, num_heads, q_len): scale and mask included, one value
for each query head, -inf for a row without a visible key. `support/lse.py` brings a library's result into this form.
"""

Computed = TypeVar("Computed")
AnyCall = TypeVar("AnyCall", AttentionCall, "VarlenCall")
"""What a kernel returns: an output, or an output and its LSE."""


class _ByArithmetic:
    """The accuracy class of a backend, from its arithmetic; a backend that sets `accuracy` overrides it."""

    def __get__(self, backend: Backend | None, of: type[Backend]) -> str:
        if backend is None:
            return accuracy(of.arithmetic, sparse=of.sparse)
        found: str = backend.__dict__.setdefault("accuracy", accuracy(backend.arithmetic, sparse=backend.sparse))
        return found


class Backend:
    """One thing a person can select. A subclass declares the class attributes and writes `load`."""

    id: ClassVar[str]
    summary: ClassVar[str]
    """One sentence for menus: what it does and when to use it."""
    aliases: ClassVar[tuple[Alias, ...]] = ()
    """Its names in other systems, and what else people write."""
    arithmetic: ClassVar[str] = "half"
    """What it computes in, the coarsest of its steps: one of `tolerance.TOLERANCES`."""
    sparse: ClassVar[bool] = False
    """It skips work that has a weight."""
    accuracy: ClassVar[str] = cast("str", _ByArithmetic())
    """One of `tolerance.ACCURACY`; follows from `arithmetic` and `sparse`."""
    kinds: ClassVar[tuple[str, ...]] = ("cuda",)
    """Kinds of platform it runs on (`platform.KINDS`)."""
    min_capability: ClassVar[tuple[int, int] | None] = None
    """Lowest CUDA compute capability; asked only on `cuda`."""
    architectures: ClassVar[tuple[str, ...] | None] = None
    """The only AMD architectures that it has kernels for, such as `gfx942`; asked only on `rocm`."""
    requires: ClassVar[tuple[str, ...]] = ()
    """Distributions it needs, as requirement strings such as `flash-attn>=2.6.3`."""
    packages: ClassVar[tuple[Package, ...]] = ()
    """The packages that can make it available, best first; empty where it is part of torch or of us."""
    asks_for: ClassVar[tuple[str, ...]] = ()
    """Other distributions that its checks read; one that no backend declares counts as missing."""
    symbols: ClassVar[tuple[Symbols, ...]] = ()
    """The names that it takes from its packages; empty where it needs nothing beyond torch or us."""
    tested_on: ClassVar[tuple[str, ...]] = ()
    """Described machines (`platform.parse_platform`) on which tests run it, with fakes of the packages that they have;
    tests add one machine of every other kind that it runs on."""
    limits: ClassVar[Limits] = Limits()
    remarks: ClassVar[tuple[str, ...]] = ()
    """For the support table: what `unsupported_reasons` or `load` ask beyond `limits` and `requires`."""
    options: ClassVar[tuple[Option, ...]] = ()
    """What a person may set under `extra`; `load` takes each as a keyword argument with the same default."""
    candidate: ClassVar[bool] = True
    """Autotune may choose it and an error may advise it; False where its time or its result is no evidence."""
    hosted: ClassVar[bool] = False
    """It is the host's own function: it runs only inside a host, with the accuracy that the function has there, and no
    probe or benchmark outside can run it."""
    by_name_only: ClassVar[bool] = False
    """Comparisons leave it out unless it is named: its members run anyway, or it takes long."""
    once_planned: ClassVar[bool] = False
    """Graphs could name it before it was built; their calls fell back then, and skip work now."""
    compiled: ClassVar[bool] = False
    """torch.compile makes it, so the versions of compilers decide what it computes."""
    rotates: ClassVar[bool] = False
    """It rotates the channels of query and key before it rounds them, so that strong ones do not decide the scale."""
    comfy_function: ClassVar[str] = ""
    """ComfyUI's own function of the same kernel, by its name in comfy/ldm/modules/attention.py."""
    holds_scores: ClassVar[bool] = False
    """It keeps the whole matrix of scores in memory: `workspace_bytes` then decides where it may run at all."""
    varlen: ClassVar[bool] = False
    """It has a varlen kernel too: packed sequences of different lengths in one call (`load_varlen`)."""
    lse: ClassVar[bool] = False
    """It can give the log-sum-exp with the output (`load_lse`)."""

    @property
    def runs_on(self) -> tuple[str, ...]:
        """The kinds of platform on which it, or a member of a group, can run."""
        return self.kinds

    def unavailable_reasons(self, platform: Platform) -> list[Reason]:
        """Why this backend cannot run on `platform` at all; empty when it can."""
        if platform.kind not in self.kinds:
            return [needs_device(self.kinds, platform)]
        reasons: list[Reason] = []
        cards = self.capabilities(platform)
        if platform.kind == "cuda" and (self.min_capability or cards is not None):
            if platform.capability is None:
                reasons.append(Reason("capability.unknown"))
            elif self.min_capability and platform.capability < self.min_capability:
                sm, names = _named((self.min_capability,))
                reasons.append(Reason("capability.min", **names, min=sm[0], found=_sm(platform)))
            elif cards is not None and platform.capability not in cards:
                sm, names = _named(cards)
                reasons.append(Reason("capability.in", **names, taken=sm, found=_sm(platform)))
        if platform.kind == "rocm" and self.architectures is not None and platform.gfx not in self.architectures:
            gfx = platform.gfx or Reason("architecture.unknown")
            reasons.append(Reason("architecture", gfx=gfx, taken=self.architectures))
        reasons += [reason for need in self.requires if (reason := package_reason(need, platform))]
        return list(dict.fromkeys(reasons))

    def arithmetic_on(self, platform: Platform) -> str:
        """Its arithmetic on this machine; override where one id means several kernels."""
        if self.arithmetic in EXACT and self.accuracy == "quantized":
            return "int8"  # only the class is declared
        return self.arithmetic

    def tolerance_on(self, platform: Platform) -> Tolerance:
        """How far it may be off on this machine."""
        return tolerance(self.arithmetic_on(platform), sparse=self.accuracy == "sparse")

    def capabilities(self, platform: Platform) -> tuple[tuple[int, int], ...] | None:
        """The only CUDA compute capabilities that it has kernels for; None for any from `min_capability`."""
        return None

    def kernel_name(self, request: AttentionRequest, platform: Platform) -> str | None:
        """Which of several kernels would run `request`, for reports; None where the backend is one kernel."""
        return None

    def origin(self, platform: Platform) -> str | None:
        """Where its code comes from, where that is none of its packages; None otherwise. For reports."""
        return None

    def library(self, platform: Platform) -> str:
        """The library that computes it and its version, where that is no package, such as cuDNN; else empty."""
        return ""

    def limits_on(self, platform: Platform) -> Limits:
        """The limits that hold on `platform`; override where they differ between machines."""
        return self.limits

    def unsupported_reasons(self, request: AttentionRequest, platform: Platform) -> list[Reason]:
        """Why this backend, available on `platform`, cannot run `request`; empty when it can."""
        return self.limits_on(platform).reasons(request)

    def workspace_bytes(self, request: AttentionRequest, platform: Platform) -> int:
        """Bytes that one call takes at most beyond query, key, value, mask and output (`support/workspace.py`).

        An upper bound, reported to ComfyUI's memory planner. Buffers of O(q_len) are ignored.
        """
        return 0

    def option_conflicts(self, options: Mapping[str, object]) -> list[str]:
        """Which of these options contradict each other on every machine; asked when a configuration is read.

        Their names, types and limits were checked before, by their declarations.
        """
        return []

    def option_reasons(self, platform: Platform, options: Mapping[str, object]) -> list[Reason]:
        """Why this backend, available on `platform`, cannot run with these options, judged by versions alone.

        What only the imported package shows, `load` raises.
        """
        return []

    def avoid_reasons(self, request: AttentionRequest, platform: Platform) -> list[Reason]:
        """Why `auto` skips this backend for `request` although it could run: others are known to be faster.

        If a person names the backend, it runs and these are notes.
        """
        return []

    def load(self, platform: Platform) -> Kernel:
        """Import what the kernel needs and return it. Called where it is available, once for each set of options.

        A kernel does not write into query, key or value: a fallback computes the call from them.
        Options are keyword arguments: `def load(self, platform: Platform, *, smooth_k: bool = True) -> Kernel`.

        Raises:
            Exception: what a broken package raises; the caller makes an unavailable reason of it.
        """
        raise NotImplementedError

    def unsupported_option_reasons(
        self, request: AttentionRequest, platform: Platform, options: Mapping[str, object]
    ) -> list[Reason]:
        """Why it cannot run calls of this kind with these options, where it could without them."""
        return []

    def is_not_for(self, category: str, reasons: Sequence[str]) -> bool:
        """Whether `reasons`, of a refused call, say that the backend is for no calls of this role at all.

        Cross-attention is such a role for sparse methods. There it is no failure that another backend runs, unless a
        person named this one for that role.
        """
        return False

    def bind(
        self,
        kernel: Kernel,
        request: AttentionRequest,
        place: Place,
        progress: Progress,
        kept: Kept,
        dense: Callable[..., Kernel],
    ) -> Kernel:
        """The kernel of a plan; asked only where `sparse`. Override where the kernel depends on the place of a call.

        Args:
            request: of the plan's calls.
            progress: where in the run the model call is; it changes between calls.
            kept: counts how much was computed.
            dense: loads the exact kernel that runs calls, or steps, that are not sparse; with an id that backend's.
        """
        return kernel

    def varlen_limits(self, platform: Platform) -> Limits | None:
        """The limits of `load_varlen`'s kernel, all tokens taken as one sample; None where there is none.

        Checked after the request of each sequence was accepted.
        """
        return self.limits_on(platform) if self.varlen else None

    def load_varlen(self, platform: Platform) -> VarlenKernel:
        """Import the varlen kernel; called only after `load`, with the same options.

        Raises:
            Exception: what the package raises; then one call runs for each sequence.
        """
        raise NotImplementedError

    def lse_limits(self, platform: Platform) -> Limits | None:
        """The limits of `load_lse`'s kernel, asked after those of `load`'s; None where there is none on `platform`."""
        return self.limits_on(platform) if self.lse else None

    def load_lse(self, platform: Platform) -> LseKernel:
        """Import the kernel that also gives the log-sum-exp; asked only after `load`, with the same options.

        Raises:
            Exception: what the package raises; then calls that ask for the log-sum-exp are refused.
        """
        raise NotImplementedError


class BrokenBackend(Backend):
    """The placeholder for a backend whose file cannot be loaded: unavailable everywhere, with the reason."""

    candidate = False
    by_name_only = True
    summary = "Its file cannot be loaded."

    def __init__(self, backend_id: str, reason: str) -> None:
        self.id = backend_id  # type: ignore[misc]  # each instance is its own backend
        self.reason = reason

    def unavailable_reasons(self, platform: Platform) -> list[Reason]:
        return [Reason("unavailable", why=self.reason)]


def needs_device(kinds: Sequence[str], platform: Platform) -> Reason:
    """The reason of a backend that runs on these kinds of device alone."""
    needed = Reason(f"device.{kinds[0]}")
    for kind in kinds[1:]:
        joined = "device.or" if kind == kinds[-1] else "device.list"
        needed = Reason(joined, one=needed, other=Reason(f"device.{kind}"))
    return Reason("device", needed=needed, found=Reason(f"device.{platform.kind}"))


def _sm(platform: Platform) -> str:
    """`sm90`, as people write it."""
    return (platform.sm or "").replace("_", "")


def _named(cards: Sequence[tuple[int, int]]) -> tuple[tuple[str, ...], dict[str, str]]:
    """`sm90` of each card, and the generations with their English article."""
    described = [Platform("cuda", capability=card) for card in cards]
    names = "/".join(dict.fromkeys(card.architecture for card in described))
    article = "an" if names.startswith("A") else "a"
    return tuple(map(_sm, described)), {"article": article, "names": names}


def for_scale(kernel: Callable[[AnyCall], Computed], scale: float | None) -> Callable[[AnyCall], Computed]:
    """The kernel; for a scale <= 0, a kernel called with the query times 0 or -1 and a positive scale.

    FlashAttention kernels take the row maximum and set hidden keys to -inf before they scale, so a scale <= 0 gives
    a wrong result: torch's CPU kernel makes a causal call NaN (2.13).
    """
    if scale is None or not scale <= 0:
        return kernel
    sign, positive = (-1.0, -scale) if scale < 0 else (scale, 1.0)

    def run(call: AnyCall) -> Computed:
        return kernel(call.changed(query=call.query * sign, scale=positive))

    return run


def package_reason(requirement: str, platform: Platform) -> Reason | None:
    """Why a requirement such as `flash-attn>=2.6.3` or `torch>=2.7` is not met on `platform`, or None when it is."""
    from packaging.requirements import Requirement

    need = Requirement(requirement)
    found = platform.torch if need.name == "torch" else platform.version(need.name)
    if found is None:
        return Reason("package.missing", package=need.name)
    if read(found) is None:
        return Reason("package.unreadable", package=need.name, found=found)
    if not meets(found, str(need.specifier)):
        return Reason("package.version", package=need.name, found=found, specifier=str(need.specifier))
    return None
