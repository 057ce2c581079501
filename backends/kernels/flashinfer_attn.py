"""`flashinfer_attn`: FlashInfer's dense prefill kernels, one sample at a time or a whole batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import log
from typing import TYPE_CHECKING, Any, NamedTuple

from ..values.aliases import LISTED, SMART_DIFFUSION, VLLM_OMNI, YUNCHANG, Alias
from ..values.limits import NO_MASK, Batch, Dtypes, HeadDimIn, Masks, Rule
from ..values.masks import stored_once
from ..values.package import Symbols
from ..values.platform import Platform
from ..values.reasons import Reason, template
from ..values.request import AttentionCall, AttentionRequest
from .backend import Backend, Kernel, Limits, LseKernel, package_reason
from .support.flashinfer import FLASHINFER
from .support.layout import Elements, indexable, on_device_of
from .support.lse import checked
from .support.ragged import WORKSPACE_BYTES, offsets_of, stream_of, to_bhsd, to_thd, workspace
from .support.workspace import item_bytes, mask_size, output_size

if TYPE_CHECKING:
    import torch

    from .support.varlen import VarlenCall, VarlenKernel

LN_2 = log(2)

PLANS = 8
"""Plans that are kept; each holds 8 MiB on the device and 8 MiB of pinned memory."""

MASKED_BATCH = 64
"""The largest batch for which a masked call runs as a loop over samples."""


MASKED = template("batch.masked", "batch {batch} > {max} with a mask")


@dataclass(frozen=True)
class MaskedBatch(Rule):
    """The most samples of a call with a mask."""

    max: int

    order = Batch.order

    def reason(self, request: AttentionRequest) -> Reason | None:
        if request.mask == "none" or request.batch <= self.max:
            return None
        return Reason(MASKED, batch=request.batch, max=self.max)

    def describe(self) -> str:
        return f"batch to {self.max} with a mask"


class FlashInferAttn(Backend):
    """single_prefill_with_kv_cache and BatchPrefillWithRaggedKVCacheWrapper (https://docs.flashinfer.ai).

    Sizes and strides are 32 bits wide. A mask is boolean, the same for every head, and silently switches `causal`
    off, so the two together are refused. Masked calls run sample by sample, and head by head where heads differ:
    the wrapper for batches mistakes offsets into packed bits for offsets into bytes, and keeps a mask once planned.
    Kernels are compiled at the first call with nvcc where no prebuilt ones fit. Before 0.6.16 they ask at head_dim 128
    and 256 for more shared memory than Turing has (flashinfer-ai/flashinfer: issue 3620, pull request 3526); from 0.6
    on no other limit is known to differ.
    """

    id = "flashinfer_attn"
    summary = "FlashInfer's dense prefill kernel. Exact; takes boolean masks."
    aliases = (
        Alias(VLLM_OMNI, "FLASHINFER_ATTN"),
        Alias(SMART_DIFFUSION, "flash_infer", f"{LISTED}; here it runs FlashInfer"),
        Alias(YUNCHANG, "FLASHINFER"),
    )
    kinds = ("cuda",)
    min_capability = (7, 5)
    requires = ("flashinfer-python>=0.6",)
    packages = (FLASHINFER,)
    symbols = (
        Symbols("flashinfer", ("single_prefill_with_kv_cache", "BatchPrefillWithRaggedKVCacheWrapper", "packbits")),
    )
    tested_on = (
        "cuda:7.5,packages=flashinfer-python==0.7.2.post1",
        "cuda:12.0,packages=flashinfer-python==0.7.2.post1",
    )
    limits = Limits(
        HeadDimIn((64, 128, 256)), Masks(("none", "key_padding", "bool")), Elements(), MaskedBatch(MASKED_BATCH)
    )
    turing_limits = limits.but(Dtypes(("float16",)))
    old_turing_limits = turing_limits.but(HeadDimIn((64,)))
    varlen = True
    lse = True

    def limits_on(self, platform: Platform) -> Limits:
        if platform.architecture != "Turing":
            return self.limits
        old = platform.version("flashinfer-python") and package_reason("flashinfer-python>=0.6.16", platform)
        return self.old_turing_limits if old else self.turing_limits

    def workspace_bytes(self, request: AttentionRequest, platform: Platform) -> int:
        """The package's own workspace where a batch runs as one; else packed masks and the samples' outputs."""
        if request.mask == "none":
            return WORKSPACE_BYTES if request.batch > 1 else 0
        one = request.q_len * request.kv_len  # the mask of a sample, before it is packed into bits
        return one + max(mask_size(request), one) // 8 + output_size(request) * item_bytes(request)

    def load(self, platform: Platform) -> Kernel:
        from flashinfer import packbits, single_prefill_with_kv_cache

        planned = plans(self.id)

        def attend(
            query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bits: torch.Tensor | None, call: AttentionCall
        ) -> torch.Tensor:
            """One sample, THD; `bits` is its packed mask."""
            output: torch.Tensor = single_prefill_with_kv_cache(
                query,
                key,
                value,
                packed_custom_mask=bits,
                causal=call.is_causal,
                kv_layout="NHD",
                sm_scale=_scale(call),
            )
            return output

        def by_sample(call: AttentionCall) -> torch.Tensor:
            import torch

            packed = packed_masks(call, packbits)
            samples = []
            for index in range(call.query.shape[0]):
                query, key, value = (
                    indexable(tensor[index].transpose(0, 1)) for tensor in (call.query, call.key, call.value)
                )
                heads = packed[index if len(packed) > 1 else 0]
                if len(heads) == 1:
                    samples.append(attend(query, key, value, heads[0], call))
                    continue
                group = query.shape[1] // key.shape[1]
                outputs = [
                    attend(
                        query[:, head : head + 1],
                        key[:, head // group : head // group + 1],
                        value[:, head // group : head // group + 1],
                        bits,
                        call,
                    )
                    for head, bits in enumerate(heads)
                ]
                samples.append(torch.cat(outputs, dim=1))
            return torch.stack(samples).transpose(1, 2)

        def run(call: AttentionCall) -> torch.Tensor:
            with on_device_of(call.query):
                if call.attn_mask is not None or call.query.shape[0] == 1:
                    return by_sample(call)
                wrapper = planned(Shapes.of(call), stream_of(call.query))
                output = wrapper.run(to_thd(call.query), to_thd(call.key), to_thd(call.value))
                return to_bhsd(output, call.query.shape[0])

        return run

    def load_varlen(self, platform: Platform) -> VarlenKernel:
        """The wrapper for ragged batches; one plan for each set of lengths."""
        planned = plans(self.id)

        def run(call: VarlenCall) -> torch.Tensor:
            (_, heads, head_dim), kv_heads = call.query.shape, call.key.shape[1]
            scale = float(head_dim**-0.5) if call.scale is None else call.scale
            device, dtype = call.query.device, call.query.dtype
            shapes = Shapes(device, dtype, call.q_lengths, call.kv_lengths, heads, kv_heads, head_dim, False, scale)
            with on_device_of(call.query):
                wrapper = planned(shapes, stream_of(call.query))
                output: torch.Tensor = wrapper.run(indexable(call.query), call.key, call.value)
            return output

        return run

    def lse_limits(self, platform: Platform) -> Limits:
        """Without masks: they run sample by sample, through another function."""
        return self.limits_on(platform).but(NO_MASK)

    def load_lse(self, platform: Platform) -> LseKernel:
        """The wrapper for batches, for a single sample too: its log-sum-exp is (tokens, num_heads), in base 2."""
        planned = plans(self.id)

        def run(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
            batch, heads, q_len, _ = call.query.shape
            with on_device_of(call.query):
                wrapper = planned(Shapes.of(call), stream_of(call.query))
                output, lse = wrapper.run(to_thd(call.query), to_thd(call.key), to_thd(call.value), return_lse=True)
            return to_bhsd(output, batch), lse.view(batch, q_len, heads).transpose(1, 2) * LN_2

        return checked(run)


def _scale(call: AttentionCall) -> float:
    return float(call.query.shape[-1] ** -0.5) if call.scale is None else call.scale


class Shapes(NamedTuple):
    """Everything that a plan depends on, but the stream; calls that agree in it share a plan."""

    device: torch.device
    dtype: torch.dtype
    q_lengths: tuple[int, ...]
    kv_lengths: tuple[int, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    is_causal: bool
    scale: float

    @classmethod
    def of(cls, call: AttentionCall) -> Shapes:
        batch, num_heads, q_len, head_dim = call.query.shape
        kv_heads, kv_len = call.key.shape[1:3]
        query = call.query
        return cls(
            *(query.device, query.dtype, (q_len,) * batch, (kv_len,) * batch, num_heads, kv_heads, head_dim),
            *(call.is_causal, _scale(call)),
        )

    def plan(self, wrapper: Any) -> Any:
        """Plan the wrapper with these facts and return it."""
        wrapper.plan(
            offsets_of(self.q_lengths, self.device),
            offsets_of(self.kv_lengths, self.device),
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            causal=self.is_causal,
            sm_scale=self.scale,
            q_data_type=self.dtype,
        )
        return wrapper


def plans(backend: str) -> Callable[[Shapes, int], Any]:
    """Gives the wrapper for batches, planned for these shapes on a stream; `PLANS` of them are kept.

    Each kind of call has its own wrapper: the plan of one call must not be used by another.
    """
    from flashinfer import BatchPrefillWithRaggedKVCacheWrapper

    @lru_cache(maxsize=PLANS)
    def planned(shapes: Shapes, stream: int) -> Any:
        return shapes.plan(BatchPrefillWithRaggedKVCacheWrapper(workspace(backend, shapes.device, stream), "NHD"))

    return planned


Bits = list[list["torch.Tensor | None"]]
"""Packed masks: for each sample, or for all of them, one for each head, or one for all heads."""


def packed_masks(call: AttentionCall, packbits: Any) -> Bits:
    """Bits of the call's mask, the lowest first; [[None]] where it has none. Kept in the call's memo, if it has one."""
    mask = call.attn_mask
    if mask is None:
        return [[None]]
    q_len, kv_len = call.query.shape[2], call.key.shape[2]
    key = ("packed bits", q_len, kv_len)
    if call.memo is not None and key in call.memo:
        cached: Bits = call.memo[key]  # type: ignore[assignment]  # nothing else is put under this key
        return cached
    bits: Bits = [
        [packbits(head.expand(q_len, kv_len).reshape(-1).bool(), bitorder="little") for head in stored_once(sample)]
        for sample in stored_once(mask)
    ]
    if call.memo is not None:
        call.memo[key] = bits
    return bits


BACKENDS = (FlashInferAttn(),)
