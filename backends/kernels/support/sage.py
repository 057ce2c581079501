"""What the SageAttention kernels have in common: the installed release, its cards and options, the state of its build.

Two libraries share the name `sageattention`: 1.0.6 on PyPI is Triton only, 2.x is built from its sources and has
CUDA kernels. Their limits and their defects differ, so the version decides. The algorithm: arXiv:2410.02367.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from inspect import signature
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

from ...values.limits import NO_MASK, Batch, HeadDim, HeadDimIn, Heads, KeyLength, Rule
from ...values.options import Option
from ...values.package import Package, Symbols
from ...values.platform import Platform
from ...values.reasons import Reason, template
from ...values.request import AttentionCall, AttentionRequest
from ...values.versions import read
from ..backend import Kernel, Limits, package_reason
from .hub import FromHub
from .layout import GRID, Elements, indexable, on_device_of, to_bshd
from .workspace import item_bytes, key_size, rounded_bytes, value_size

if TYPE_CHECKING:
    import torch
    from packaging.version import Version

    from .varlen import VarlenCall, VarlenKernel

REQUIREMENT = "sageattention>=1.0.6,!=2.0.*,!=2.1.0"
"""2.0.x and 2.1.0 were betas with other defects; Diffusers also begins at 2.1.1."""

SOURCES = "https://github.com/thu-ml/SageAttention"

SAGE2_PACKAGES = (
    Package(
        "sageattention",
        "sageattention",
        "2.2.0",
        SOURCES,
        how="build version 2 from {page} for {tags}, then: {pip} --no-deps WHEEL",
        note="building it takes nvcc: 12.0, for sm_90 12.3, for sm_89 12.4, for sm_120 12.8",
        systems=("linux",),
        needs_triton=True,
    ),
    Package(
        "sageattention",
        "sageattention",
        "2.2.0+cu130torch2.10.0andhigher.post6",
        "https://github.com/woct0rdho/SageAttention/releases",
        note="of CUDA only the first number counts, and a wheel named 'torch2.10.0andhigher' fits every later torch; "
        "wheels before post5 take head_dim to 128",
        systems=("win32",),
        needs_triton=True,
    ),
)
"""2.x: the authors' sources, and woct0rdho's wheels for Windows."""


KEY_BLOCK = template("kv_len.block", "kv_len {kv_len} is not a multiple of {of}")


@dataclass(frozen=True)
class KeyBlock(Rule):
    """kv_len is a multiple of `of`: the kernel counts what fills its last block."""

    of: int
    causal: bool = False
    """It holds with is_causal too; else a causal call never sees what fills the block."""

    order = KeyLength.order + 1

    def reason(self, request: AttentionRequest) -> Reason | None:
        if request.kv_len % self.of == 0 or (request.is_causal and not self.causal):
            return None
        return Reason(KEY_BLOCK, kv_len=request.kv_len, of=self.of)

    def describe(self) -> str:
        return f"kv_len a multiple of {self.of}" + ("" if self.causal else " unless causal")


SAGE2_LIMITS = Limits(HeadDim(max=128), NO_MASK, Elements(padded=(64, 128)), Batch(GRID), Heads(GRID))
"""2.1.1 and 2.2.0, sageattention/core.py: head sizes are padded to 64 or 128, offsets are 32 bits wide, batch and
heads are grid dimensions."""

WIDE_LIMITS = SAGE2_LIMITS.but(HeadDim(max=256), Elements(padded=(64, 128, 256)))
"""woct0rdho's wheels from post5 on: `pad_qkv` of sageattention/core.py pads to 256 too, but for the sm90 kernel."""

Capabilities = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Build:
    """What a release of sageattention 2.x can do, as its sources say.

    `attn`, `fp16_cuda` and `fp8_cuda`: the compute capabilities that `sageattn` dispatches on, and those that each
    CUDA extension is built for. `triton_on`: those on which `sageattn` runs the Triton kernel. `masks`: whether the
    Triton kernel has a parameter for them. `asks_cuda`: whether `sageattn` takes another accumulator below CUDA 12.8.
    """

    attn: Capabilities
    fp16_cuda: Capabilities
    fp8_cuda: Capabilities
    triton_on: Capabilities = ((8, 6),)
    masks: bool = False
    wide: bool = False
    asks_cuda: bool = False

    def limits(self) -> Limits:
        """What its kernels take, but for the sm90 kernel, which stays at `SAGE2_LIMITS`."""
        return WIDE_LIMITS if self.wide else SAGE2_LIMITS


_RELEASED: Capabilities = ((8, 0), (8, 6), (8, 9), (9, 0), (12, 0))
_UPSTREAM: Capabilities = ((8, 0), (8, 6), (8, 9), (9, 0), (12, 0), (12, 1))
_CUDA: Capabilities = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0), (12, 1))
_FP8: Capabilities = ((8, 9), (9, 0), (10, 0), (12, 0), (12, 1))
_POST_1 = Build(
    attn=((7, 5), *_RELEASED),
    fp16_cuda=((8, 0), (8, 6), (8, 9)),
    fp8_cuda=((8, 9), (12, 0)),
    triton_on=((7, 5), (8, 6)),
)
_POST_4 = replace(_POST_1, triton_on=((7, 5),), masks=True, asks_cuda=True)

BUILDS: Mapping[tuple[str, str, int], Build] = MappingProxyType(
    {
        ("thu-ml", "2.1.1", 0): Build(_UPSTREAM, _CUDA, _FP8),
        ("thu-ml", "2.2.0", 0): Build(_UPSTREAM, _CUDA, _FP8, masks=True),
        ("woct0rdho", "2.1.1", 0): Build(_RELEASED, _RELEASED, ((8, 9), (9, 0), (12, 0))),
        ("woct0rdho", "2.2.0", 0): Build(_RELEASED, _RELEASED, ((8, 9), (9, 0), (12, 0))),
        ("woct0rdho", "2.2.0", 1): _POST_1,
        ("woct0rdho", "2.2.0", 2): replace(_POST_1, masks=True),
        ("woct0rdho", "2.2.0", 4): _POST_4,
        ("woct0rdho", "2.2.0", 5): replace(
            _POST_4,
            attn=((7, 5), (8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (12, 0), (12, 1)),
            fp16_cuda=((8, 0), (8, 6), (8, 7), (8, 9)),
            fp8_cuda=((8, 9), (10, 0), (12, 0), (12, 1)),
            wide=True,
        ),
    }
)
"""By whose build it is, release, and the first post-release that it holds for.

Read in setup.py and sageattention/core.py: thu-ml at v2.1.1 and d1a57a5; woct0rdho at the tags v2.1.1-windows to
v2.2.0-windows.post6. sm80 code runs on all cards of 8.x. The README of post6 says that its wheels hold no code for
sm100 and sm121, for which the sources can be built: a probe tells.
"""

WHEEL = re.compile(r"cu(?P<cuda>\d{3})torch2(\.\d+){1,2}(andhigher)?(\.post(?P<post>\d+))?")
"""The local part of the version of woct0rdho's wheels, as .github/workflows/build-sageattn.yml of his makes it."""

SAGE2_ONLY = "sageattn_qk_int8_pv_fp16_cuda"
"""A name that 1.x does not have."""


def sage2_symbols(*names: str) -> Symbols:
    """What a kernel takes from 2.x."""
    return Symbols("sageattention", tuple(dict.fromkeys((*names, SAGE2_ONLY))), "sageattention>=2")


TAIL_BLOCK = 64
"""Keys per block of the INT8 kernels."""

AS_PACKAGE = "auto"
"""The value of an option that means: as the package's `sageattn` chooses on the card."""

SMOOTH_K = Option("smooth_k", bool, True, "Subtract the keys' mean before rounding them: more exact, a little slower.")
SMOOTH_V = Option("smooth_v", bool, False, "Subtract the values' mean before rounding them; for values with a bias.")
GRANULARITY = Option(
    "qk_quant_gran",
    str,
    AS_PACKAGE,
    "How many numbers of query and key share a scale; auto is the package's choice for the card.",
    choices=(AS_PACKAGE, "per_warp", "per_thread"),
)


def installed(platform: Platform) -> Version:
    """The installed version of sageattention, a pre-release as its release; 0 where it is missing or unreadable."""
    from packaging.version import Version

    return read(platform.version("sageattention") or "") or Version("0")


def is_sage2(platform: Platform) -> bool:
    """True for 2.x, false for 1.x."""
    return installed(platform).major >= 2


def build(platform: Platform) -> Build:
    """What the installed 2.x can do.

    woct0rdho's wheels (https://github.com/woct0rdho/SageAttention) are known by their version, such as
    2.2.0+cu130torch2.9.0andhigher.post4; any other build counts as thu-ml's.
    """
    version = installed(platform)
    wheel = WHEEL.fullmatch(version.local or "")
    release = "2.2.0" if version.release >= (2, 2) else "2.1.1"
    if wheel is None:
        return BUILDS["thu-ml", release, 0]
    post = int(wheel["post"] or 0)
    found = BUILDS[max(key for key in BUILDS if key[:2] == ("woct0rdho", release) and key[2] <= post)]
    if int(wheel["cuda"]) >= 128:
        return found
    # What a compiler before CUDA 12.8 can build.
    attn, fp16, fp8 = (
        tuple(card for card in cards if card < (10, 0)) for cards in (found.attn, found.fp16_cuda, found.fp8_cuda)
    )
    return replace(found, attn=attn, fp16_cuda=fp16, fp8_cuda=fp8)


def triton_reasons(platform: Platform) -> list[Reason]:
    """Why Triton, which every sageattention imports, cannot run its kernels on this card.

    sm75 works with Triton 3.0 to 3.2 and fails with 3.3 (https://github.com/thu-ml/SageAttention/issues/197);
    Blackwell needs 3.3, the first that knows it.
    """
    name = "triton" if platform.version("triton") else "triton-windows"
    if platform.version(name) is None:
        return [Reason("package.missing", package="triton-windows" if platform.os == "win32" else "triton")]
    need = {"Turing": "<3.3", "Blackwell": ">=3.3"}.get(platform.architecture, "")
    reason = package_reason(name + need, platform)
    return [Reason("package.needed", reason=reason, by=platform.sm)] if reason else []


def without_noise(limits: Limits, platform: Platform) -> Limits:
    """The limits of the FP8 kernel: on sm12x it gives noise from 167,000 keys on, none at 151,000.

    https://github.com/thu-ml/SageAttention/issues/388
    """
    return limits.but(KeyLength(max=150_000)) if platform.capability in ((12, 0), (12, 1)) else limits


def granularity(platform: Platform) -> str:
    """What `sageattn` of 2.x takes for `qk_quant_gran` on this card."""
    blackwell = platform.capability in ((10, 0), (12, 0), (12, 1)) and platform.capability in build(platform).attn
    return "per_warp" if blackwell else "per_thread"


def scale_of(call: AttentionCall) -> float:
    return float(call.query.shape[-1] ** -0.5) if call.scale is None else call.scale


def import_sage2() -> ModuleType:
    """Import sageattention 2.x.

    Raises:
        ImportError: what is imported is another release than its metadata says.
    """
    import sageattention

    module: ModuleType = sageattention
    if not hasattr(module, SAGE2_ONLY):
        raise ImportError(f"metadata says sageattention 2.x, but {module.__file__} has no {SAGE2_ONLY}")
    return module


def supported_kwargs(
    function: Callable[..., Any], platform: Platform, options: tuple[Option, ...], settings: dict[str, object]
) -> dict[str, object]:
    """The settings that `function` has parameters for; it silently drops others in **kwargs.

    Raises:
        NotImplementedError: one that it lacks is not at its default; the message has the version.
    """
    parameters = signature(function).parameters
    defaults = {option.name: option.default for option in options}
    lacking = [name for name, value in settings.items() if name not in parameters and value != defaults[name]]
    if lacking:
        name = getattr(function, "__name__", "the kernel")
        raise NotImplementedError(f"sageattention {installed(platform)}: {name} has no option {', '.join(lacking)}")
    return {name: value for name, value in settings.items() if name in parameters}


def varlen_limits(platform: Platform) -> Limits | None:
    """The limits of `sageattn_varlen`, a Triton kernel in 1.0.6 and 2.x alike; None where Triton's is not to be used.

    In 1.0.6 it has the defect of its sibling: keys that fill the last block of 64 count, so the lengths that
    `sage_attn` refuses stay refused, one sequence at a time. On sm12x the sources of 2.x call this kernel unusable.
    """
    if platform.capability in ((12, 0), (12, 1)):
        return None
    if is_sage2(platform):
        return build(platform).limits()
    return SAGE2_LIMITS.but(HeadDimIn((64, 128)))


def load_varlen(smooth_k: bool) -> VarlenKernel:
    """`sageattn_varlen`, which subtracts the keys' mean over all sequences, 1.0.6 in the caller's tensor.

    The mean is the same for all keys that a query sees, so it changes no weight; it is subtracted here, in new memory.
    """
    import sageattention

    sageattn_varlen = sageattention.sageattn_varlen

    def run(call: VarlenCall) -> torch.Tensor:
        key = call.key - call.key.mean(dim=0, keepdim=True) if smooth_k else call.key
        head_dim = call.query.shape[-1]
        with on_device_of(call.query):
            output: torch.Tensor = sageattn_varlen(
                indexable(call.query),
                indexable(key),
                indexable(call.value),
                call.q_offsets,
                call.kv_offsets,
                max(call.q_lengths),
                max(call.kv_lengths),
                is_causal=False,
                sm_scale=float(head_dim**-0.5) if call.scale is None else call.scale,
                smooth_k=False,
            )
        return output

    return run


class SageBackend(FromHub):
    """A kernel of one of the SageAttention packages, which import Triton, all of them."""

    arithmetic = "int8"
    kinds = ("cuda",)
    asks_for = (*FromHub.asks_for, "triton", "triton-windows")
    reads_tail: ClassVar[bool] = False
    """It multiplies weight 0 with unwritten shared memory behind the last key, which may hold NaN.

    https://github.com/thu-ml/SageAttention/pull/377. woct0rdho's post6 fills it with zeros; that was not run on
    a card for this project, so it is refused too.
    """

    def check(self, module: ModuleType) -> None:
        """Refuse builds that do not have this kernel, or a faulty one."""

    def workspace_bytes(self, request: AttentionRequest, platform: Platform) -> int:
        """Query and key in 8 bits, the smoothed keys, and the values turned and in 8 bits where a kernel does that."""
        wide = (key_size(request) + value_size(request)) * item_bytes(request)
        return rounded_bytes(request) + wide + value_size(request)

    def unavailable_reasons(self, platform: Platform) -> list[Reason]:
        reasons = super().unavailable_reasons(platform)
        return reasons + triton_reasons(platform) if platform.kind in self.kinds else reasons


class SageCuda(SageBackend):
    """One CUDA kernel of sageattention 2.x under its own name, `function` of the package."""

    requires = (REQUIREMENT, "sageattention>=2")
    packages = SAGE2_PACKAGES
    limits = SAGE2_LIMITS
    function: ClassVar[str]
    flag: ClassVar[str]
    """The name by which sageattention.core says whether this kernel was built."""

    def limits_on(self, platform: Platform) -> Limits:
        return build(platform).limits()

    def check(self, module: ModuleType) -> None:
        """Refuse builds without this kernel, or with a faulty one.

        Raises:
            ImportError: with what is wrong.
        """
        if not getattr(module.core, self.flag, True):
            raise ImportError(f"sageattention was built without the kernel for this card ({self.flag} is false)")

    def kernel(self, platform: Platform, **settings: object) -> Kernel:
        """The function with these options as its keyword arguments.

        Raises:
            ImportError: the installed build does not have the kernel, or a faulty one.
            NotImplementedError: the installed version does not have an option.
        """
        module = import_sage2()
        self.check(module)
        function = getattr(module, self.function)
        if settings.get("qk_quant_gran") == AS_PACKAGE:
            settings["qk_quant_gran"] = granularity(platform)
        settings = supported_kwargs(function, platform, self.options, settings)

        def run(call: AttentionCall) -> torch.Tensor:
            query, key, value = (indexable(to_bshd(tensor)) for tensor in (call.query, call.key, call.value))
            with on_device_of(query):
                output: torch.Tensor = function(
                    query,
                    key,
                    value,
                    tensor_layout="NHD",
                    is_causal=call.is_causal,
                    sm_scale=scale_of(call),
                    **settings,
                )
            return to_bshd(output)

        return run
