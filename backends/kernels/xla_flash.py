"""`xla_flash`: the flash attention of torch_xla, a Pallas kernel for TPUs."""

from __future__ import annotations

from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING

from ..values.aliases import DIFFUSERS, Alias
from ..values.limits import NO_MASK, Dtypes, HeadDim, HeadDimMultiple, KeyLength, Masks, Rule
from ..values.package import Package, Symbols
from ..values.platform import Platform
from ..values.reasons import Reason, template
from ..values.request import AttentionCall, AttentionRequest
from .backend import Backend, Kernel, Limits, package_reason
from .support.sdpa import expanded

if TYPE_CHECKING:
    import torch

BLOCK = 512
"""Keys per block; more than one block has to be filled to the last key."""

LANES = 128
"""kv_len is a multiple of this where segments are used; so are head sizes above it."""


WIDE = template("head_dim.wide", "head_dim {head_dim} > {of} is not a multiple of {of}")


@dataclass(frozen=True)
class WideHeadDim(Rule):
    """Head sizes above `of` are a multiple of it."""

    of: int

    column = HeadDimMultiple.column
    order = HeadDimMultiple.order

    def reason(self, request: AttentionRequest) -> Reason | None:
        for size in (request.head_dim, request.v_head_dim or request.head_dim):
            if size > self.of and size % self.of:
                return Reason(WIDE, head_dim=size, of=self.of)
        return None

    def describe(self) -> str:
        return f"above {self.of} multiples of {self.of}"


LONG = template("kv_len.long", "kv_len {kv_len} > {of} is not a multiple of {of}")


@dataclass(frozen=True)
class LongKeys(Rule):
    """More than `of` keys are a multiple of it."""

    of: int

    order = KeyLength.order + 1

    def reason(self, request: AttentionRequest) -> Reason | None:
        if request.kv_len <= self.of or request.kv_len % self.of == 0:
            return None
        return Reason(LONG, kv_len=request.kv_len, of=self.of)

    def describe(self) -> str:
        return f"kv_len above {self.of} a multiple of {self.of}"


class XlaFlash(Backend):
    """flash_attention of torch_xla/experimental/custom_kernel.py, over jax.experimental.pallas.ops.tpu.

    Without `sm_scale` it multiplies scores by 1. Beyond one block, kv_len has to be a multiple of 512: some versions
    raise, others pad with a bias that is wrong where q_len differs from kv_len; so keys are padded here, and hidden
    as another segment. A padding mask is a segment too. 2.3 has no scale, and another argument for segments. float32
    is refused: a TPU multiplies it in bfloat16 by default.
    """

    id = "xla_flash"
    summary = "Flash attention of PyTorch/XLA, for TPUs. Exact in bfloat16; takes padding masks."
    aliases = (Alias(DIFFUSERS, "_native_xla", "for XLA devices with torch_xla only"),)
    kinds = ("xla",)
    requires = ("torch-xla>=2.3",)
    packages = (
        Package(
            "torch-xla",
            "torch_xla",
            "2.9.0",
            "https://github.com/pytorch/xla",
            how="take the release made for torch {torch} from {page}; its tags are {tags}",
            systems=("linux",),
        ),
    )
    symbols = (
        Symbols("torch_xla.experimental.custom_kernel", ("flash_attention",)),
        Symbols("torch_xla.runtime", ("device_type",)),
    )
    tested_on = (
        "xla,torch=2.9.0,packages=torch-xla==2.9.0",
        "xla,torch=2.3.0,packages=torch-xla==2.3.0",
    )
    limits = Limits(Dtypes(("bfloat16",)), HeadDim(max=256), WideHeadDim(LANES), Masks(("none", "key_padding")))
    first_limits = limits.but(NO_MASK, LongKeys(BLOCK))

    def limits_on(self, platform: Platform) -> Limits:
        return self.first_limits if package_reason("torch-xla>=2.4", platform) else self.limits

    def load(self, platform: Platform) -> Kernel:
        from torch_xla import runtime
        from torch_xla.experimental.custom_kernel import flash_attention

        if runtime.device_type() != "TPU":
            raise ImportError(f"the XLA device is {runtime.device_type()}, and the kernel is made for TPU")
        takes_scale = "sm_scale" in signature(flash_attention).parameters

        def run(call: AttentionCall) -> torch.Tensor:
            from torch.nn.functional import pad

            call = expanded(call)
            query, key, value = call.query, call.key, call.value
            scale = query.shape[-1] ** -0.5 if call.scale is None else call.scale
            options: dict[str, object] = {}
            if takes_scale:
                options["sm_scale"] = scale
            else:
                query = query * scale
            visible = _visible_keys(call)
            extra = _padding(key.shape[2], masked=visible is not None)
            if visible is not None or extra:
                segments = _segments(key, visible)
                options["q_segment_ids"] = segments.new_ones(query.shape[0], query.shape[2])
                options["kv_segment_ids"] = pad(segments, (0, extra))
                key, value = (pad(tensor, (0, 0, 0, extra)) for tensor in (key, value))
            output: torch.Tensor = flash_attention(query, key, value, causal=call.is_causal, **options)
            if visible is None:
                return output
            # A sample without any key would get a mean over hidden ones; by SDPA it is zeros.
            return output.masked_fill(visible.any(dim=-1).logical_not()[:, None, None, None], 0.0)

        return run


def _padding(kv_len: int, *, masked: bool) -> int:
    """How many keys have to be added before the kernel takes them."""
    if kv_len > BLOCK:
        return -kv_len % BLOCK
    return -kv_len % LANES if masked else 0


def _visible_keys(call: AttentionCall) -> torch.Tensor | None:
    """The padding mask as (batch, kv_len); None without one."""
    if call.attn_mask is None:
        return None
    return call.attn_mask[:, 0, 0].bool().expand(call.key.shape[0], call.key.shape[2])


def _segments(key: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
    """(batch, kv_len): 1 for keys that the queries, all of segment 1, may see; 0 for the others."""
    import torch

    if visible is None:
        return torch.ones(key.shape[0], key.shape[2], dtype=torch.int32, device=key.device)
    return visible.to(torch.int32)


BACKENDS = (XlaFlash(),)
