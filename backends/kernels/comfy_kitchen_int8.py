"""`comfy_kitchen_int8`: the INT8 attention of comfy-kitchen, the package that ComfyUI itself uses for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..values.aliases import COMFYUI, Alias
from ..values.limits import Batch, Causal, Dtypes, HeadDim, Heads
from ..values.package import Package, Symbols
from ..values.platform import Platform
from ..values.request import AttentionCall, AttentionRequest
from .backend import Backend, Kernel, Limits
from .support.layout import GRID, Elements, on_device_of
from .support.workspace import key_size, query_size, value_size

if TYPE_CHECKING:
    import torch

HEAD_DIMS = (64, 128, 256)
"""Head sizes that the package does not pad."""

VECTOR = 16
"""Required alignment in bytes of a tensor's start and of each row."""


class ComfyKitchenInt8(Backend):
    """comfy_kitchen.int8_attention, since 0.2.29 (sage_attention.py and backends/cuda/sage_attention, read in 0.2.31).

    Query, key, value and weights are INT8, after a rotation that spreads outliers; float32 comes back as exact as
    bfloat16. Offsets in the rounded tensors are 32 bits wide, batch and heads are grid dimensions. Tensors whose rows
    are not aligned are an error there (https://github.com/Comfy-Org/ComfyUI/issues/15529) and copied here. A row for
    which a bias of finite numbers below -34,000 hides every key gives zeros where SDPA gives a mean over hidden keys.
    """

    id = "comfy_kitchen_int8"
    summary = "ComfyUI's own INT8 attention, from comfy-kitchen. Takes masks and any head size up to 256."
    aliases = (Alias(COMFYUI, "comfy_kitchen_int8"), Alias(COMFYUI, "comfy kitchen attention"))
    arithmetic = "int8"
    rotates = True
    comfy_function = "attention_comfy_kitchen_int8"
    kinds = ("cuda", "rocm")
    min_capability = (7, 5)
    architectures = (
        *("gfx1100", "gfx1101", "gfx1102", "gfx1103", "gfx1150", "gfx1151", "gfx1152", "gfx1153"),
        *("gfx1200", "gfx1201"),
    )
    """RDNA 3 and 4: those with matrix cores in backends/hip/architectures.json."""
    requires = ("comfy-kitchen>=0.2.29",)
    packages = (
        Package(
            "comfy-kitchen",
            "comfy_kitchen",
            "0.2.40",
            "https://github.com/Comfy-Org/comfy-kitchen",
            how="ComfyUI's requirements.txt names the version that fits it: {pip} --no-deps "
            "comfy-kitchen==THAT_VERSION",
        ),
    )
    symbols = (Symbols("comfy_kitchen", ("int8_attention", "int8_attention_is_available")),)
    tested_on = (
        "cuda:7.5,packages=comfy-kitchen==0.2.31",
        "cuda:12.0,packages=comfy-kitchen==0.2.40",
        "rocm:gfx1100,packages=comfy-kitchen==0.2.40",
    )
    limits = Limits(
        Dtypes(("float16", "bfloat16", "float32")),
        HeadDim(max=HEAD_DIMS[-1]),
        Causal("no"),
        Elements(padded=HEAD_DIMS),
        Batch(GRID),
        Heads(GRID),
    )

    def workspace_bytes(self, request: AttentionRequest, platform: Platform) -> int:
        """Query, key and value in 8 bits, head_dim padded to a supported size."""
        padded = next((size for size in HEAD_DIMS if size >= request.head_dim), request.head_dim)
        wide = request._replace(head_dim=padded, v_head_dim=padded)
        return query_size(wide) + key_size(wide) + value_size(wide)

    def load(self, platform: Platform) -> Kernel:
        import comfy_kitchen
        import torch
        from comfy_kitchen import int8_attention, int8_attention_is_available

        if not int8_attention_is_available():
            raise ImportError("comfy_kitchen says that it has no INT8 attention for this device")
        prequantize = getattr(comfy_kitchen, "prequantize_int8_attention", None)
        taken = (torch.bool, torch.float16, torch.bfloat16, torch.float32)

        def run(call: AttentionCall) -> torch.Tensor:
            mask = call.attn_mask
            if mask is not None and mask.dtype not in taken:
                mask = mask.to(torch.float32)
            query, key, value = (aligned(tensor) for tensor in (call.query, call.key, call.value))
            output: torch.Tensor
            with on_device_of(query):
                if not call.owned or prequantize is None:
                    output = int8_attention(query, key, value, scale=call.scale, attn_mask=mask)
                    return output
                quantized = prequantize(query, key, value, scale=call.scale, attn_mask=mask)
                # From here on only the 8-bit copies are needed: half the memory, or a quarter.
                del query, key, value
                call.query = call.key = call.value = None  # type: ignore[assignment]  # released before the kernel runs
                output = comfy_kitchen.int8_attention_from_prequantized(quantized)
            return output

        return run


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a contiguous copy if its start or a row is not aligned to 16 bytes."""
    import torch

    if tensor.shape[-1] not in HEAD_DIMS:  # the package copies it, to pad it
        return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
    size = tensor.element_size()
    rows = zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
    fits = all(length < 2 or (stride > 0 and stride * size % VECTOR == 0) for length, stride in rows)
    if fits and tensor.stride(-1) == 1 and tensor.data_ptr() % VECTOR == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


BACKENDS = (ComfyKitchenInt8(),)
