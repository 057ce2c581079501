"""`emulated_int8`: what SageAttention's INT8 quantisation does to a result, in plain PyTorch on any machine.

An emulation, not a kernel: slower than exact attention. It shows on a laptop what quantised scores do to a picture,
and gives the tolerance by which real quantised kernels are judged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..values.limits import Causal, Dtypes, ValueHeadDim
from ..values.platform import KINDS, Platform
from ..values.request import AttentionCall, AttentionRequest
from .backend import FLOATING, Backend, Kernel, Limits
from .support.sdpa import expanded, plain_sdpa
from .support.workspace import expanded_bytes, item_bytes, key_size, query_size

if TYPE_CHECKING:
    import torch

QUERY_BLOCK = 128
KEY_BLOCK = 64
"""Tokens that share one scale (SageAttention, arXiv:2410.02367, section 4.2)."""


class EmulatedInt8(Backend):
    """Keys less their mean over tokens, query and key rounded to INT8 per block, then exact attention on the result.

    The mean shifts all scores of a query alike, so softmax and masks do not see it. Values and the second product
    stay as they are, in the precision of the input.
    """

    id = "emulated_int8"
    summary = "An emulation of INT8 attention, slow, for seeing on any machine what quantising does to a picture."
    arithmetic = "int8"
    kinds = KINDS
    candidate = False
    limits = Limits(Dtypes(FLOATING), Causal("any"), ValueHeadDim(may_differ=True))

    def workspace_bytes(self, request: AttentionRequest, platform: Platform) -> int:
        """The most of three moments: the query is rounded, the key is, and the kernel runs on both."""
        query, key, item = query_size(request), key_size(request), item_bytes(request)
        rounding = 3 * 4  # float32: the numbers by their scale, those rounded, and those times the scale again
        expanding = expanded_bytes(request) if request.mask != "none" else 0
        return max(rounding * query, (query + key) * item + max(rounding * key, expanding))

    def load(self, platform: Platform) -> Kernel:
        sdpa = plain_sdpa()

        def run(call: AttentionCall) -> torch.Tensor:
            rounded = call.changed(
                query=round_trip(call.query, QUERY_BLOCK),
                key=round_trip(call.key - call.key.mean(dim=2, keepdim=True), KEY_BLOCK),
            )
            # Grouped heads with a mask have no fused kernel outside CUDA; torch would materialise the scores.
            return sdpa(expanded(rounded) if call.enable_gqa and call.attn_mask is not None else rounded)

        return run


def round_trip(tensor: torch.Tensor, block: int) -> torch.Tensor:
    """(batch, heads, length, head_dim) to INT8 and back, one scale per head and `block` tokens: max |x| / 127."""
    import torch

    batch, heads, length, head_dim = tensor.shape
    padded = torch.nn.functional.pad(tensor.float(), (0, 0, 0, -length % block))
    blocks = padded.reshape(batch, heads, -(-length // block), block, head_dim)
    scale = blocks.abs().amax(dim=(-2, -1), keepdim=True).clamp(min=1e-30) / 127
    rounded: torch.Tensor = (blocks / scale).round() * scale
    return rounded.flatten(2, 3)[:, :, :length].to(tensor.dtype)


BACKENDS = (EmulatedInt8(),)
