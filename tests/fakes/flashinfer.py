"""flashinfer 0.7.2: prefill functions as flashinfer/prefill.py, quantization/packbits.py and include/ have them.

The block-sparse wrappers are those of flashinfer/sparse.py in 0.6.0, which has the least room.
"""

from __future__ import annotations

from itertools import accumulate, pairwise

import torch

from . import arithmetic

CAPABILITY: tuple[int, int] | None = (9, 0)
HEAD_DIMS = (64, 128, 256)


def single_prefill_with_kv_cache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale_q: torch.Tensor | None = None,
    scale_k: torch.Tensor | None = None,
    scale_v: torch.Tensor | None = None,
    o_dtype: torch.dtype | None = None,
    custom_mask: torch.Tensor | None = None,
    packed_custom_mask: torch.Tensor | None = None,
    causal: bool = False,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_fp16_qk_reduction: bool = False,
    sm_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    kv_cache_sf: object | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
) -> torch.Tensor:
    arithmetic.CALLS.append("single_prefill_with_kv_cache")
    if q.ndim != 3 or kv_layout != "NHD":
        raise ValueError("q must be (qo_len, num_qo_heads, head_dim)")
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"Unsupported dtype: {q.dtype}")
    if q.shape[-1] not in HEAD_DIMS:
        raise RuntimeError(f"Unsupported head_dim: {q.shape[-1]}")
    if any(tensor.stride(-1) != 1 for tensor in (q, k, v)):
        raise RuntimeError("the last dimension must be contiguous")
    visible = None
    if packed_custom_mask is None and custom_mask is not None:
        flat = custom_mask.contiguous().view(-1)
        packed_custom_mask = packbits(flat, bitorder="little")  # a float mask is packed as if it were bits
    if packed_custom_mask is not None:  # `causal` is not looked at then
        visible = _unpacked(packed_custom_mask, q.shape[0], k.shape[0])
    elif causal:
        visible = arithmetic.causal_mask(q.shape[0], k.shape[0], bottom_right=True)
    return _one(q, k, v, sm_scale, visible)


def packbits(x: torch.Tensor, bitorder: str = "big") -> torch.Tensor:
    arithmetic.CALLS.append("packbits")
    if x.ndim != 1:
        raise ValueError("x must be a 1D tensor")
    bits = torch.nn.functional.pad(x.bool(), (0, -len(x) % 8)).view(-1, 8).int()
    powers = 2 ** torch.arange(8) if bitorder == "little" else 2 ** torch.arange(7, -1, -1)
    return (bits * powers).sum(dim=1).to(torch.uint8)


def _unpacked(packed: torch.Tensor, q_len: int, kv_len: int) -> torch.Tensor:
    """What a kernel reads: bits from the lowest up, (q_len, kv_len)."""
    bits = packed[:, None].bitwise_right_shift(torch.arange(8, dtype=torch.uint8)).bitwise_and(1)
    return bits.flatten()[: q_len * kv_len].view(q_len, kv_len).bool()


class BatchPrefillWithRaggedKVCacheWrapper:
    """`plan` keeps a mask that it once got, and takes offsets into packed bits for offsets into bytes."""

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: torch.Tensor | None = None,
        kv_indptr_buf: torch.Tensor | None = None,
        custom_mask_buf: torch.Tensor | None = None,
        mask_indptr_buf: torch.Tensor | None = None,
        backend: str = "auto",
    ) -> None:
        arithmetic.CALLS.append("BatchPrefillWithRaggedKVCacheWrapper")
        if kv_layout != "NHD" or float_workspace_buffer.numel() < 128 * 1024 * 1024:
            raise ValueError("kv_layout must be NHD, the workspace at least 128 MB")
        self.workspace = float_workspace_buffer
        self.bits: torch.Tensor | None = None

    def plan(
        self,
        qo_indptr: torch.Tensor,
        kv_indptr: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        head_dim_vo: int | None = None,
        custom_mask: torch.Tensor | None = None,
        packed_custom_mask: torch.Tensor | None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: str | torch.dtype = "float16",
        kv_data_type: str | torch.dtype | None = None,
    ) -> None:
        arithmetic.CALLS.append("plan")
        if qo_indptr.dtype != torch.int32 or kv_indptr.dtype != torch.int32:
            raise ValueError("offsets must be int32")
        self.q_offsets, self.kv_offsets = qo_indptr.tolist(), kv_indptr.tolist()
        self.shapes = (num_qo_heads, num_kv_heads, head_dim_qk)
        self.causal, self.scale, self.dtype = causal, sm_scale, q_data_type
        if packed_custom_mask is not None:
            self.bits, self.byte_offsets = packed_custom_mask, self._mask_offsets(1)
        elif custom_mask is not None:
            pieces = [custom_mask[a:b] for a, b in pairwise(self._mask_offsets(1))]
            packed = [packbits(piece, "little") for piece in pieces]
            self.bits, self.byte_offsets = torch.cat(packed), [0, *accumulate(len(piece) for piece in packed)]

    def _mask_offsets(self, size: int) -> list[int]:
        areas = (
            (q[1] - q[0]) * (kv[1] - kv[0])
            for q, kv in zip(pairwise(self.q_offsets), pairwise(self.kv_offsets), strict=True)
        )
        return [0, *accumulate(-(-area // size) for area in areas)]

    def run(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, return_lse: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        arithmetic.CALLS.append("run")
        if q.dtype != self.dtype or (q.shape[1], k.shape[1], q.shape[2]) != self.shapes:
            raise ValueError("the tensors are not what plan() was told")
        if len(q) != self.q_offsets[-1]:
            raise ValueError(f"q.shape[0] ({len(q)}) does not match qo_indptr[-1] ({self.q_offsets[-1]})")
        if len(k) != self.kv_offsets[-1]:
            raise IndexError("CUDA error: an illegal memory access was encountered")
        outputs, lse = [], []
        for index, (rows, keys) in enumerate(zip(pairwise(self.q_offsets), pairwise(self.kv_offsets), strict=True)):
            q_len, kv_len = rows[1] - rows[0], keys[1] - keys[0]
            visible = None
            if self.bits is not None:
                visible = _unpacked(self.bits[self.byte_offsets[index] :], q_len, kv_len)
            elif self.causal:
                visible = arithmetic.causal_mask(q_len, kv_len, bottom_right=True)
            outputs.append(_one(q[slice(*rows)], k[slice(*keys)], v[slice(*keys)], self.scale, visible))
            query, key = (part.transpose(0, 1)[None] for part in (q[slice(*rows)], k[slice(*keys)]))
            scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
            lse.append(arithmetic.log_sum_exp(query, key, scale, visible, base_2=True)[0].T)  # (tokens, heads)
        return (torch.cat(outputs), torch.cat(lse)) if return_lse else torch.cat(outputs)


class _Sparse:
    """What both block-sparse wrappers do: the kernel and the room for lengths are chosen once."""

    def __init__(self, float_workspace_buffer: torch.Tensor, backend: str = "auto") -> None:
        arithmetic.CALLS.append(type(self).__name__)
        if float_workspace_buffer.numel() < 128 * 1024 * 1024:
            raise ValueError("the workspace must have at least 128 MB")
        self.kernel = backend
        self.room = torch.empty(32768, dtype=torch.int32)

    def _planned(self, lengths: torch.Tensor, dtype: torch.dtype, head_dim: int) -> None:
        arithmetic.CALLS.append(f"{type(self).__name__}.plan")
        self.room[: len(lengths)].copy_(lengths)  # which raises where there is no room
        if dtype not in (torch.float16, torch.bfloat16) or head_dim not in HEAD_DIMS:
            raise RuntimeError(f"no kernel for {dtype} and head_dim {head_dim}")
        if self.kernel not in ("auto", f"{dtype} {head_dim}"):
            raise RuntimeError(f"the kernel is that of {self.kernel}")
        self.kernel, self.dtype, self.head_dim = f"{dtype} {head_dim}", dtype, head_dim

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """(tokens, heads, head_dim), as a kernel of the dtype that was planned reads them."""
        if any(tensor.dtype != self.dtype or tensor.shape[-1] != self.head_dim for tensor in (q, k, v)):
            raise RuntimeError("the tensors are not what plan() was told")
        if not all(tensor.is_contiguous() for tensor in (q, k, v)):
            raise RuntimeError("the last dimension must be contiguous")
        return _one(q, k, v, self.scale, visible)


class BlockSparseAttentionWrapper(_Sparse):
    def __init__(self, float_workspace_buffer: torch.Tensor, backend: str = "auto") -> None:
        super().__init__(float_workspace_buffer, backend)

    def plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        M: int,
        N: int,
        R: int,
        C: int,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        mask: torch.Tensor | None = None,
        packed_mask: torch.Tensor | None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: str | torch.dtype = "float16",
        kv_data_type: str | torch.dtype | None = None,
        o_data_type: str | torch.dtype = "float16",
        non_blocking: bool = True,
    ) -> None:
        """The output is float16 unless `o_data_type` says otherwise, whatever the query is."""
        if indptr.dtype != torch.int32 or indices.dtype != torch.int32:
            raise RuntimeError("Unsupported idtype")
        if int(indices.max()) * C > N:
            raise ValueError("indices out of bound")
        if num_qo_heads % num_kv_heads or mask is not None or packed_mask is not None or causal:
            raise NotImplementedError
        self._planned((indptr[1:] - indptr[:-1]) * C, q_data_type, head_dim)
        self.output, self.scale = getattr(torch, str(o_data_type).removeprefix("torch.")), sm_scale
        rows = R * torch.arange(len(indptr))
        rows[-1] = M
        if R * (num_qo_heads // num_kv_heads) < 4:  # the decoding kernel computes one query of each row
            rows = torch.arange(len(indptr))
        self.rows, self.pages = rows.tolist(), [indices[a:b].long() for a, b in pairwise(indptr.tolist())]
        self.size, self.shapes = C, (M, num_qo_heads, num_kv_heads)

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
    ) -> torch.Tensor:
        arithmetic.CALLS.append("BlockSparseAttentionWrapper.run")
        if (len(q), q.shape[1], k.shape[1]) != self.shapes:
            raise ValueError("the tensors are not what plan() was told")
        key, value = (tensor.reshape(-1, self.size, *tensor.shape[1:]) for tensor in (k, v))
        output = torch.full_like(q, float("nan"), dtype=self.output)
        for (start, stop), pages in zip(pairwise(self.rows), self.pages, strict=True):
            own = (tensor[pages].flatten(0, 1) for tensor in (key, value))
            visible = torch.ones(stop - start, len(pages) * self.size, dtype=torch.bool)
            output[start:stop] = self._attend(q[start:stop], *own, visible)
        return output


class VariableBlockSparseAttentionWrapper(_Sparse):
    def __init__(self, float_workspace_buffer: torch.Tensor, backend: str = "auto") -> None:
        super().__init__(float_workspace_buffer, backend)

    def plan(
        self,
        block_mask_map: torch.Tensor,
        block_row_sz: torch.Tensor,
        block_col_sz: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        non_blocking: bool = True,
        q_data_type: str | torch.dtype = "float16",
        kv_data_type: str | torch.dtype | None = None,
    ) -> None:
        lengths = (block_mask_map * block_col_sz[:, None, :]).sum(-1)
        if int(lengths.sum()) > arithmetic.INT32:
            raise RuntimeError("offsets wrap")
        assert num_qo_heads % num_kv_heads == 0, "num_qo_heads must be a multiple of num_kv_heads"
        assert num_kv_heads == block_mask_map.shape[0] == block_row_sz.shape[0] == block_col_sz.shape[0]
        assert block_mask_map.shape[1:] == (block_row_sz.shape[-1], block_col_sz.shape[-1])
        if causal:
            raise NotImplementedError
        self._planned(lengths.flatten(), q_data_type, head_dim)
        self.scale, self.shapes = sm_scale, (num_qo_heads, num_kv_heads)
        self.visible = [
            seen.repeat_interleave(rows.long(), 0).repeat_interleave(columns.long(), 1)
            for seen, rows, columns in zip(block_mask_map, block_row_sz, block_col_sz, strict=True)
        ]

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
    ) -> torch.Tensor:
        """(heads, tokens, head_dim)."""
        arithmetic.CALLS.append("VariableBlockSparseAttentionWrapper.run")
        if (len(q), len(k)) != self.shapes:
            raise ValueError("the tensors are not what plan() was told")
        shares = len(q) // len(k)
        heads = [
            self._attend(q[at, :, None], k[at // shares, :, None], v[at // shares, :, None], self.visible[at // shares])
            for at in range(len(q))
        ]
        return torch.stack(heads)[:, :, 0]


def trtllm_ragged_attention_deepseek(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    workspace_buffer: torch.Tensor,
    seq_lens: torch.Tensor,
    max_q_len: int,
    max_kv_len: int,
    bmm1_scale: float,
    bmm2_scale: float,
    o_sf_scale: float,
    batch_size: int,
    window_left: int,
    cum_seq_lens_q: torch.Tensor,
    cum_seq_lens_kv: torch.Tensor,
    enable_pdl: bool | None,
    is_causal: bool,
    return_lse: bool,
    attention_sinks: torch.Tensor | None = None,
    skip_softmax_threshold_scale_factor: float | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    sage_attn_sfs: tuple[torch.Tensor | None, ...] = (None, None, None, None),
    num_elts_per_sage_attn_blk: tuple[int, int, int, int] = (0, 0, 0, 0),
    backend: str = "trtllm-gen",
    q_seq_lens_cpu: torch.Tensor | None = None,
    kv_seq_lens_cpu: torch.Tensor | None = None,
) -> torch.Tensor:
    """The kernel is told the strides of key and value, and reads a query as if it had no gaps."""
    arithmetic.CALLS.append("trtllm_ragged_attention_deepseek")
    if CAPABILITY not in ((10, 0), (10, 3)):
        raise RuntimeError("Missing TRTLLM-GEN kernel ragged attention")
    assert query.shape[2] in (128, 256), f"Unsupported head dimensions: query={query.shape[2]}"
    assert (q_seq_lens_cpu is None) == (kv_seq_lens_cpu is None)
    if q_seq_lens_cpu is None:
        arithmetic.CALLS.append("read back")
    elif int(q_seq_lens_cpu.sum()) != len(query) or int(kv_seq_lens_cpu.sum()) != len(key):
        raise ValueError("lengths do not add up to the tokens")
    if int(workspace_buffer[:16].sum()):
        raise RuntimeError("the workspace must be zero at first")
    memory = query.as_strided((query.numel(),), (1,)) if query.storage_offset() == 0 else query.flatten()
    query = memory.view(query.shape)
    outputs = []
    rows, keys = pairwise(cum_seq_lens_q.tolist()), pairwise(cum_seq_lens_kv.tolist())
    for at, among, kv_len in zip(rows, keys, seq_lens.tolist(), strict=True):
        among = (among[0], among[0] + kv_len)
        visible = arithmetic.causal_mask(at[1] - at[0], kv_len, bottom_right=True) if is_causal else None
        outputs.append(_one(query[slice(*at)], key[slice(*among)], value[slice(*among)], bmm1_scale, visible))
    return torch.cat(outputs) * bmm2_scale


def _one(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sm_scale: float | None, visible: torch.Tensor | None
) -> torch.Tensor:
    query, key, value = (arithmetic.as_32_bit_code_reads(tensor).transpose(0, 1)[None] for tensor in (q, k, v))
    scale = q.shape[-1] ** -0.5 if sm_scale is None else sm_scale
    return arithmetic.exact(query, key, value, scale, visible)[0].transpose(0, 1)
