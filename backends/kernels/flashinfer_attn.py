"""`flashinfer_attn`: FlashInfer's dense prefill kernel, one call per sample."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..backend import HALF, Backend, Kernel, Limits
from ..layout import INT32_ELEMENTS, indexable, on_device_of
from ..platform import Platform
from ..request import AttentionCall

if TYPE_CHECKING:
    import torch


class FlashInferAttn(Backend):
    """single_prefill_with_kv_cache of flashinfer-python (https://docs.flashinfer.ai), sizes and strides in 32 bits.

    Its mask is boolean and the same for every head; a mask that differs by head takes one call per head. A mask
    switches `causal` off there without a word, so the two together are refused. It knows no batch: 64 samples are
    the most that are worth a loop. Kernels are compiled at the first call with nvcc where no prebuilt ones fit.
    """

    id = "flashinfer_attn"
    summary = "FlashInfer's dense prefill kernel. Exact; takes boolean masks."
    kinds = ("cuda",)
    min_capability = (7, 5)
    requires = ("flashinfer-python>=0.6",)
    limits = Limits(
        dtypes=HALF,
        head_dims=(64, 128, 256),
        masks=("none", "key_padding", "bool"),
        max_batch=64,
        max_elements=INT32_ELEMENTS,
    )
    turing_limits = Limits(
        dtypes=("float16",),
        head_dims=(64, 128, 256),
        masks=("none", "key_padding", "bool"),
        max_batch=64,
        max_elements=INT32_ELEMENTS,
    )

    def limits_on(self, platform: Platform) -> Limits:
        return self.turing_limits if platform.architecture == "Turing" else self.limits

    def load(self, platform: Platform) -> Kernel:
        from flashinfer import single_prefill_with_kv_cache as prefill

        def attend(
            query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, call: AttentionCall
        ) -> torch.Tensor:
            """One sample, (length, heads, head_dim); the mask is (q_len, kv_len)."""
            scale = query.shape[-1] ** -0.5 if call.scale is None else call.scale
            output: torch.Tensor = prefill(
                query, key, value, custom_mask=mask, causal=call.is_causal, kv_layout="NHD", sm_scale=scale
            )
            return output

        def run(call: AttentionCall) -> torch.Tensor:
            import torch

            samples = []
            with on_device_of(call.query):
                for index in range(call.query.shape[0]):
                    query, key, value = (
                        indexable(tensor[index].transpose(0, 1)) for tensor in (call.query, call.key, call.value)
                    )
                    masks = masks_of(call, index)
                    if len(masks) == 1:
                        samples.append(attend(query, key, value, masks[0], call))
                        continue
                    group = query.shape[1] // key.shape[1]
                    heads = [
                        attend(
                            query[:, head : head + 1],
                            key[:, head // group : head // group + 1],
                            value[:, head // group : head // group + 1],
                            mask,
                            call,
                        )
                        for head, mask in enumerate(masks)
                    ]
                    samples.append(torch.cat(heads, dim=1))
            return torch.stack(samples).transpose(1, 2)

        return run


def masks_of(call: AttentionCall, index: int) -> list[torch.Tensor | None]:
    """The masks of one sample, each (q_len, kv_len): a single one for all heads, or one per head."""
    mask = call.attn_mask
    if mask is None:
        return [None]
    sample = mask[index if mask.shape[0] > 1 else 0]
    same_for_heads = sample.shape[0] == 1 or sample.stride(0) == 0
    heads = sample[:1] if same_for_heads else sample
    return list(heads.expand(-1, call.query.shape[2], call.key.shape[2]))
