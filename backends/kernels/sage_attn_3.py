"""`sage_attn_3`: SageAttention 3, FP4 arithmetic for Blackwell cards, from the package sageattn3."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..values.aliases import COMFYUI, DIFFUSERS, FASTVIDEO, HUB, KJNODES, SGLANG, VLLM_OMNI, WAN_WRAPPER, Alias
from ..values.limits import NO_MASK, Batch, GroupedHeads, HeadDimIn, Heads, Rule, Scale
from ..values.package import Package, Symbols
from ..values.platform import Platform
from ..values.reasons import Reason, template
from ..values.request import AttentionCall, AttentionRequest
from .backend import Kernel, Limits
from .support import sage
from .support.hub import HubKernel
from .support.layout import GRID, INT32_ELEMENTS, Elements, on_device_of
from .support.workspace import item_bytes, key_size, query_size, value_size

if TYPE_CHECKING:
    import torch

BLOCK = 128
"""Tokens to which query and key are padded."""


CORRECTION = template("correction", "{elements} elements in the correction of one sample > {max}")


ONE_MEAN = (
    "there the query less its mean over all rows, here less that of each 128 rows, which is the package's default"
)


@dataclass(frozen=True)
class Correction(Rule):
    """SageAttention 3's correction matrix, num_heads x ceil(q_len / block) x padded kv_len, has < 2**31 elements."""

    block: int

    order = Elements.order + 1

    def reason(self, request: AttentionRequest) -> Reason | None:
        block = self.block
        elements = request.num_heads * -(-request.q_len // block) * -(-request.kv_len // block) * block
        return None if elements <= INT32_ELEMENTS else Reason(CORRECTION, elements=elements, max=INT32_ELEMENTS)

    def describe(self) -> str:
        return f"heads x blocks of {self.block} queries x keys padded to {self.block} at most 2^31 - 1"


class SageAttn3(sage.SageBackend):
    """sageattn3_blackwell of 1.0.0 (sageattention3_blackwell/sageattn3/api.py; arXiv:2505.11594).

    It takes a mask and any keyword and uses none of them, computes with head_dim ** -0.5 only, has no grouped heads,
    and subtracts the keys' mean in place, so it gets a copy of the keys. Head sizes of 256 and more run PyTorch's
    attention under its name. Its correction matrix, heads x query blocks x keys, is addressed in 32 bits and faults
    beyond (https://github.com/thu-ml/SageAttention/pull/394). The Hub's build, which Diffusers 0.42 pins, is the same
    function, for sm120 alone (https://github.com/huggingface/kernels-community/pull/1099).
    """

    id = "sage_attn_3"
    summary = "SageAttention 3 in FP4, for Blackwell cards. The fastest and the least exact; takes no masks."
    aliases = (
        Alias(VLLM_OMNI, "SAGE_ATTN_3"),
        Alias(SGLANG, "sage_attn_3"),
        Alias(DIFFUSERS, "sage_blackwell_hub", HUB),
        Alias(COMFYUI, "sage3"),
        Alias(KJNODES, "sageattn3", ONE_MEAN),
        Alias(KJNODES, "sageattn3_per_block_mean"),
        Alias(WAN_WRAPPER, "sageattn_3", ONE_MEAN),
        Alias(FASTVIDEO, "SAGE_ATTN_THREE"),
    )
    arithmetic = "fp4"
    comfy_function = "attention3_sage"
    requires = ("sageattn3",)
    packages = (
        Package(
            "sageattn3",
            "sageattn3",
            "1.0.0",
            f"{sage.SOURCES}/tree/main/sageattention3_blackwell",
            how="build it from {page}, with nvcc 12.8 or newer, for {tags}",
            needs_triton=True,
        ),
    )
    symbols = (Symbols("sageattn3", ("sageattn3_blackwell",)),)
    tested_on = ("cuda:12.0,packages=sageattn3==1.0.0;triton==3.6.0",)
    hub = HubKernel("kernels-community/sage-blackwell", 1, ((12, 0),))
    limits = Limits(
        HeadDimIn((64, 128)),
        NO_MASK,
        GroupedHeads(taken=False),
        Scale(taken=False),
        Correction(BLOCK),
        Elements(),
        Batch(GRID),
        Heads(GRID),
    )

    def capabilities(self, platform: Platform) -> tuple[tuple[int, int], ...]:
        return ((10, 0), (12, 0), (12, 1))  # what setup.py builds; sm103 is not among them

    def workspace_bytes(self, request: AttentionRequest, platform: Platform) -> int:
        """The keys' copy, the query less its blocks' means, the correction in float32, and everything in 4 bits."""
        query, key = query_size(request), key_size(request)
        correction = request.batch * request.num_heads * -(-request.q_len // BLOCK) * request.kv_len * 4
        return (query + key) * item_bytes(request) + correction + (query + key + value_size(request)) // 2

    def load(self, platform: Platform) -> Kernel:
        sageattn3_blackwell = self.imported(platform, "sageattn3").sageattn3_blackwell

        def run(call: AttentionCall) -> torch.Tensor:
            with on_device_of(call.query):
                output: torch.Tensor = sageattn3_blackwell(
                    call.query, call.key.clone(), call.value, is_causal=call.is_causal
                )
            return output

        return run


BACKENDS = (SageAttn3(),)
