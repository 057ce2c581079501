"""What the FlashAttention packages have in common: one function, BSHD tensors, no masks."""

from __future__ import annotations

from inspect import signature
from typing import TYPE_CHECKING, ClassVar

from ...values.platform import Platform
from ...values.request import AttentionCall
from ..backend import Kernel, Limits, LseKernel
from .hub import FromHub
from .layout import indexable, on_device_of, to_bshd
from .lse import checked

if TYPE_CHECKING:
    import torch

    from .varlen import VarlenCall, VarlenKernel

PAGE = "https://github.com/Dao-AILab/flash-attention"


class FlashAttention(FromHub):
    """`flash_attn_func` of one package (https://github.com/Dao-AILab/flash-attention), or of its build on the Hub.

    `causal` there is aligned to the bottom right, in SDPA to the top left; the two agree only where q_len equals
    kv_len, so a subclass leaves `Causal` at equal lengths.
    """

    module: ClassVar[str]
    varlen = True
    lse = True

    def load(self, platform: Platform) -> Kernel:
        # Packages of this family share the folder `flash_attn`: that it can be imported is no proof.
        flash_attn_func = self.imported(platform, self.module).flash_attn_func

        def run(call: AttentionCall) -> torch.Tensor:
            query, key, value = (indexable(to_bshd(tensor)) for tensor in (call.query, call.key, call.value))
            with on_device_of(query):
                output = flash_attn_func(query, key, value, softmax_scale=call.scale, causal=call.is_causal)
            # Versions 3 and 4 have returned (output, log-sum-exp) as well as the output alone.
            attended: torch.Tensor = output[0] if isinstance(output, tuple) else output
            return to_bshd(attended)

        return run

    def load_varlen(self, platform: Platform) -> VarlenKernel:
        """`flash_attn_varlen_func` of the same module; betas of version 4 take no longest lengths."""
        flash_attn_varlen_func = self.imported(platform, self.module).flash_attn_varlen_func
        takes_longest = "max_seqlen_q" in signature(flash_attn_varlen_func).parameters

        def run(call: VarlenCall) -> torch.Tensor:
            longest = {"max_seqlen_q": max(call.q_lengths), "max_seqlen_k": max(call.kv_lengths)}
            with on_device_of(call.query):
                output = flash_attn_varlen_func(
                    indexable(call.query),
                    indexable(call.key),
                    indexable(call.value),
                    cu_seqlens_q=call.q_offsets,
                    cu_seqlens_k=call.kv_offsets,
                    softmax_scale=call.scale,
                    **(longest if takes_longest else {}),
                )
            attended: torch.Tensor = output[0] if isinstance(output, tuple) else output
            return attended

        return run

    def lse_limits(self, platform: Platform) -> Limits | None:
        """Not on AMD: the base of the logarithm of its backends was not checked."""
        return None if platform.kind == "rocm" else super().lse_limits(platform)

    def load_lse(self, platform: Platform) -> LseKernel:
        """The same function asked for its `softmax_lse`, (batch, num_heads, q_len), float32, the natural logarithm.

        Version 2 and 3 call the argument return_attn_probs, and need no probabilities for it while nothing is dropped;
        version 4 calls it return_lse. Betas of version 3 have none, and always return the pair.
        """
        flash_attn_func = self.imported(platform, self.module).flash_attn_func
        known = signature(flash_attn_func).parameters
        lse_arguments = {name: True for name in ("return_lse", "return_attn_probs") if name in known}

        def run(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
            query, key, value = (indexable(to_bshd(tensor)) for tensor in (call.query, call.key, call.value))
            with on_device_of(query):
                output = flash_attn_func(
                    query, key, value, softmax_scale=call.scale, causal=call.is_causal, **lse_arguments
                )
            if not isinstance(output, tuple):
                raise NotImplementedError("this build of flash_attn_func returns no log-sum-exp")
            return to_bshd(output[0]), output[1]

        return checked(run)
