from collections.abc import Callable

import torch

optimized_attention: Callable[..., torch.Tensor]

def get_attn_precision(attn_precision: torch.dtype | None, current_dtype: torch.dtype) -> torch.dtype | None: ...
