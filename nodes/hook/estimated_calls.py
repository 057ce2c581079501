"""Before a model's first run: the attention calls that it will probably make, from the latent's shape and the model.

Read from the model: its patch size, the heads of its attention modules, the length of the prompt. Other
tokens (pictures, padding of the text) are left out, and a packed latent of video and audio, whose shape is
unknown, gives no guess. After the first run the calls are known, see `memory.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from ...backends.kernels.support.workspace import ITEM_BYTES
from ...backends.values.request import AttentionRequest
from .attention_modules import family_of_model
from .callers import calling_methods
from .roles import SELF, Role

HEADS = ("num_heads", "heads", "n_local_heads", "n_heads", "num_attention_heads")
HEAD_DIMS = ("head_dim", "dim_head", "attention_head_dim")
WIDTHS = ("hidden_size", "hidden_dim", "inner_dim", "dim")
"""What ComfyUI's models and their attention modules call these numbers."""
SHORT = ("text_self", "unet.time_self", "unet.time_cross", "ltx2.audio_self", "ltx2.audio_text_cross")
"""Roles whose calls are not about the latent's tokens."""


def expected_requests(
    diffusion_model: torch.nn.Module, model: Any, shape: tuple[float, ...], conds: Any
) -> Iterator[tuple[Role, AttentionRequest]]:
    """The calls for one sample, each role with its largest one; nothing where too little is known.

    Args:
        model: the `BaseModel` around `diffusion_model`.
        shape: of the latent, without its batch: channels, then frames, height, width as the model has them.
        conds: prompts as ComfyUI's sampler has them, lists of dictionaries by name.
    """
    modules = [module for name, module in diffusion_model.named_modules() if name and calling_methods(module)]
    places = [*modules, diffusion_model]
    heads = next(filter(None, (_number(module, HEADS) for module in places)), 0)
    tokens = _tokens(diffusion_model, shape)
    dtype = str(model.get_dtype_inference()).removeprefix("torch.")
    if not modules or not heads or not tokens or dtype not in ITEM_BYTES:
        return
    head_dim = next(filter(None, (_number(module, HEAD_DIMS) for module in places)), 0)
    head_dim = head_dim or next(filter(None, (_number(module, WIDTHS) for module in places)), 128 * heads) // heads
    family = family_of_model(diffusion_model)
    roles = {role for _, found in family.roles_at_paths for role in found} if family is not None else {SELF}
    text = _text_tokens(conds)
    for role in roles:
        if role.name in SHORT or (role.category == "cross" and not text):
            continue
        q_len = tokens + text if role.category == "joint" else tokens
        kv_len = text if role.category == "cross" else q_len
        yield role, AttentionRequest(1, heads, q_len, kv_len, head_dim, dtype)


def _number(module: torch.nn.Module, names: tuple[str, ...]) -> int:
    """The first of these attributes that is a positive number; 0 for none."""
    found = (module.__dict__.get(name) for name in names)
    return next((number for number in found if type(number) is int and number > 0), 0)


def _tokens(diffusion_model: torch.nn.Module, shape: tuple[float, ...]) -> int:
    """Tokens of a latent; 0 where its shape does not tell."""
    sizes = shape[1:]
    if not sizes or (len(sizes) == 1 and shape[0] == 1):  # several latents packed into one row
        return 0
    patch = patch_size(diffusion_model)[-len(sizes) :]
    patch = (1,) * (len(sizes) - len(patch)) + patch
    return math.prod(math.ceil(size / step) for size, step in zip(sizes, patch, strict=True))


def patch_size(diffusion_model: torch.nn.Module) -> tuple[int, ...]:
    """How much of the latent is one token, the last dimensions of it; one number means height and width."""
    attributes = diffusion_model.__dict__
    size = attributes.get("patch_size", attributes.get("patch_spatial"))
    if isinstance(size, list | tuple) and all(type(number) is int and number > 0 for number in size):
        return tuple(size)
    if type(size) is int and size > 0:
        return (attributes.get("patch_temporal") or attributes.get("patch_size_t") or 1, size, size)
    halved = 2 ** _halvings(diffusion_model)
    return (halved, halved)


def _halvings(diffusion_model: torch.nn.Module) -> int:
    """Of a UNet: how often height and width are halved before its first attention."""
    count = 0
    for block in getattr(diffusion_model, "input_blocks", ()):
        inside = list(block.modules())
        if any(calling_methods(module) for module in inside):
            break
        count += any(type(module).__name__ == "Downsample" for module in inside)
    return count


def _text_tokens(conds: Any) -> int:
    """Tokens of the longest prompt; 0 without one."""
    texts = (cond.get("cross_attn") for prompts in conds.values() for cond in prompts or ())
    return max((text.shape[-2] for text in texts if isinstance(text, torch.Tensor) and text.ndim > 1), default=0)
