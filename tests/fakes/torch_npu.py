"""torch_npu 2.x: npu_fusion_attention as its documentation describes it (https://www.hiascend.com)."""

from __future__ import annotations

import torch

from . import arithmetic


def npu_fusion_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    head_num: int,
    input_layout: str,
    pse: torch.Tensor | None = None,
    padding_mask: torch.Tensor | None = None,
    atten_mask: torch.Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = 2147483647,
    next_tockens: int = 2147483647,
    inner_precise: int = 0,
    prefix: list[int] | None = None,
    actual_seq_qlen: list[int] | None = None,
    actual_seq_kvlen: list[int] | None = None,
    sparse_mode: int = 0,
    gen_mask_parallel: bool = True,
    sync: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, int, int]:
    arithmetic.CALLS.append("npu_fusion_attention")
    if input_layout != "BSND":
        raise RuntimeError(f"the fake knows BSND, not {input_layout}")
    batch, q_len, heads, head_dim = query.shape
    if head_num != heads:
        raise RuntimeError(f"head_num {head_num} must equal the N of query, {heads}")
    if query.dtype not in (torch.float16, torch.bfloat16):
        raise RuntimeError("call aclnnFlashAttentionScore failed: unsupported data type")
    if head_dim % 16 or head_dim > 512:
        raise RuntimeError("call aclnnFlashAttentionScore failed: D must be a multiple of 16, at most 512")
    if not all(tensor.is_contiguous() for tensor in (query, key, value)):
        raise RuntimeError("call aclnnFlashAttentionScore failed: format ND")
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    scores = q.float() @ arithmetic.for_heads(q, k).float().transpose(-2, -1) * scale
    if atten_mask is not None:
        full = (q_len, key.shape[1])
        shapes = ((batch, heads, *full), (batch, 1, *full), (1, 1, *full), full)
        if atten_mask.dtype not in (torch.bool, torch.uint8) or tuple(atten_mask.shape) not in shapes:
            raise RuntimeError(f"atten_mask {atten_mask.dtype} {tuple(atten_mask.shape)} not in {shapes}")
        scores = scores.masked_fill(atten_mask.bool(), torch.finfo(torch.float32).min)  # True: hidden
    weights = torch.softmax(scores, dim=-1).to(query.dtype).float()
    output = (weights @ arithmetic.for_heads(q, v).float()).to(query.dtype).transpose(1, 2).contiguous()
    return output, scores.amax(-1), scores.sum(-1), torch.empty(0), 0, 0, 0
