"""What the FlashAttention packages have in common: one function, BSHD tensors, no masks."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, ClassVar

from .backend import Backend, Kernel
from .layout import indexable, on_device_of, to_bshd
from .platform import Platform
from .request import AttentionCall

if TYPE_CHECKING:
    import torch


class FlashAttention(Backend):
    """`flash_attn_func` of one package (https://github.com/Dao-AILab/flash-attention).

    `causal` there is aligned to the bottom right, in SDPA to the top left; the two agree only where q_len equals
    kv_len, so a subclass leaves `Limits.causal_cross` off.
    """

    module: ClassVar[str]

    def load(self, platform: Platform) -> Kernel:
        # Packages of this family share the folder `flash_attn`: that it can be imported says little.
        flash_attn_func = import_module(self.module).flash_attn_func

        def run(call: AttentionCall) -> torch.Tensor:
            query, key, value = (indexable(to_bshd(tensor)) for tensor in (call.query, call.key, call.value))
            with on_device_of(query):
                output = flash_attn_func(query, key, value, softmax_scale=call.scale, causal=call.is_causal)
            # Versions 3 and 4 have returned (output, log-sum-exp) as well as the output alone.
            attended: torch.Tensor = output[0] if isinstance(output, tuple) else output
            return to_bshd(attended)

        return run
