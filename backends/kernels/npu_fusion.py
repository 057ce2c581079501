"""`npu_fusion`: fused attention on Ascend NPUs, from torch_npu."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..values.aliases import DIFFUSERS, LISTED, SMART_DIFFUSION, XFUSER, YUNCHANG, Alias
from ..values.limits import Batch, Causal, HeadDim, HeadDimMultiple, Heads, KeyLength, Masks
from ..values.package import Package, Symbols
from ..values.platform import Platform
from ..values.request import AttentionCall
from .backend import Backend, Kernel, Limits
from .support.layout import to_bshd
from .support.sdpa import expanded

if TYPE_CHECKING:
    import torch


class NpuFusion(Backend):
    """npu_fusion_attention of torch_npu, as documented for Atlas A2 on https://www.hiascend.com.

    Its mask says what is hidden, the inverse of SDPA's; without a scale it multiplies scores by 1; its bias is added
    before the scale, so biases are refused. A mask is (batch, heads or 1, q_len, kv_len), (1, 1, q_len, kv_len) or
    smaller, never one row for all queries. The result is a tuple. Its ways to say `causal` are refused: none could be
    run. Sizes as documented for the same operator in MindSpore: batch 2,048, 256 heads, 524,288 keys, and head sizes
    in sixteens up to 512.
    """

    id = "npu_fusion"
    summary = "Fused attention on Ascend NPUs. Exact in half precision; takes boolean masks."
    aliases = (
        Alias(
            DIFFUSERS,
            "_native_npu",
            "for Ascend NPUs with torch_npu only, and only where it is named: auto runs SDPA there, as SGLang does; "
            "vLLM runs mindiesd's kernels, which this pack does not call",
        ),
        Alias(SMART_DIFFUSION, "npu", f"{LISTED}; here it is for Ascend NPUs with torch_npu only"),
        Alias(YUNCHANG, "NPU", "for Ascend NPUs with torch_npu only"),
        Alias(XFUSER, "NPU", "for Ascend NPUs with torch_npu only"),
    )
    kinds = ("npu",)
    requires = ("torch-npu>=2.1",)
    packages = (
        Package(
            "torch-npu",
            "torch_npu",
            "2.13.0",
            "https://gitcode.com/ascend/pytorch",
            how="take the release made for torch {torch} from {page}; its tags are {tags}",
            systems=("linux",),
        ),
    )
    symbols = (Symbols("torch_npu", ("npu_fusion_attention",)),)
    tested_on = ("npu,torch=2.13.0,packages=torch-npu==2.13.0",)
    limits = Limits(
        HeadDim(max=512),
        HeadDimMultiple(16),
        Masks(("none", "key_padding", "bool")),
        Causal("no"),
        KeyLength(max=524_288),
        Batch(2048),
        Heads(256),
    )

    def load(self, platform: Platform) -> Kernel:
        from torch_npu import npu_fusion_attention

        def run(call: AttentionCall) -> torch.Tensor:
            call = expanded(call)
            query, key, value = (to_bshd(tensor).contiguous() for tensor in (call.query, call.key, call.value))
            scale = call.query.shape[-1] ** -0.5 if call.scale is None else call.scale
            result = npu_fusion_attention(
                query, key, value, query.shape[2], "BSND", atten_mask=_hidden(call), scale=scale, keep_prob=1.0
            )
            output: torch.Tensor = to_bshd(result[0])
            if call.attn_mask is None:
                return output
            # What a query without any key gets there is not documented; by SDPA it is zeros.
            return output.masked_fill(call.attn_mask.any(dim=-1, keepdim=True).logical_not(), 0.0)

        return run


def _hidden(call: AttentionCall) -> torch.Tensor | None:
    """True where a key is hidden, in one of the shapes that the operator takes; None without a mask."""
    if call.attn_mask is None:
        return None
    batch, _, q_len, _ = call.query.shape
    heads = call.attn_mask.shape[1]
    samples = batch if heads > 1 else call.attn_mask.shape[0]
    return call.attn_mask.logical_not().expand(samples, heads, q_len, call.key.shape[2]).contiguous()


BACKENDS = (NpuFusion(),)
