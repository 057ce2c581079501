"""A custom node for the demo and the tests: random CONDITIONING, so that no text encoder is needed.

It is copied into a temporary custom_nodes folder and is no part of the pack.
"""

from typing import Any

import torch


class RandomConditioning:
    CATEGORY = "testing"
    FUNCTION = "make"
    RETURN_TYPES = ("CONDITIONING",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "tokens": ("INT", {"default": 77, "min": 1, "max": 4096}),
                "width": ("INT", {"default": 4096, "min": 1, "max": 65536}),
                "seed": ("INT", {"default": 0, "min": 0}),
                # Flux and SD3 want a pooled embedding of this width; 0 leaves it out.
                "pooled_width": ("INT", {"default": 0, "min": 0, "max": 65536}),
                # An attention_mask that hides this many tokens at the end; 0 leaves it out.
                "hidden_tokens": ("INT", {"default": 0, "min": 0, "max": 4096}),
            }
        }

    def make(self, tokens: int, width: int, seed: int, pooled_width: int, hidden_tokens: int) -> tuple[list[Any]]:
        generator = torch.Generator().manual_seed(seed)
        extra = {}
        if pooled_width:
            extra["pooled_output"] = torch.randn(1, pooled_width, generator=generator)
        if hidden_tokens:
            extra["attention_mask"] = torch.ones(1, tokens, dtype=torch.int64)
            extra["attention_mask"][:, -hidden_tokens:] = 0
        return ([[torch.randn(1, tokens, width, generator=generator), extra]],)


NODE_CLASS_MAPPINGS = {"AttentionBackendsRandomConditioning": RandomConditioning}
