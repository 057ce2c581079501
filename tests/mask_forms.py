"""Random masks of every form that ComfyUI passes, for tests: bool, -inf, most negative numbers, biases."""

from __future__ import annotations

import random

import torch

SHAPES = ("(Lq, Lk)", "(1, Lk)", "(B, 1, Lk)", "(B, Lq, Lk)", "(B, 1, 1, Lk)", "(B, H, Lq, Lk)", "(1, 1, Lq, Lk)")
PATTERNS = (
    "nothing", "suffix", "prefix", "both ends", "gap", "lengths", "causal", "blocks", "window", "random", "all hidden",
    "rows without keys", "bottom right",
)  # fmt: skip
FILLS = ("bool", "-inf", "finfo.min", "-max", "half of min")


def visible_keys(pattern: str, batch: int, heads: int, q_len: int, kv_len: int, rng: random.Random) -> torch.Tensor:
    """(batch, heads, q_len, kv_len), True where a query sees a key."""
    visible = torch.ones(batch, heads, q_len, kv_len, dtype=torch.bool)
    rows, keys = torch.arange(q_len)[:, None], torch.arange(kv_len)[None]
    cut = rng.randint(0, kv_len)
    if pattern == "suffix":
        visible[..., cut:] = False
    elif pattern == "prefix":
        visible[..., :cut] = False
    elif pattern == "both ends":
        visible[..., :cut] = False
        visible[..., kv_len - rng.randint(0, kv_len) :] = False
    elif pattern == "gap":
        other = rng.randint(0, kv_len)
        visible[..., min(cut, other) : max(cut, other)] = False
    elif pattern == "lengths":
        for sample in range(batch):
            visible[sample, ..., rng.randint(0, kv_len) :] = False
    elif pattern == "causal":
        visible &= keys <= rows
    elif pattern == "bottom right":
        visible &= keys <= rows + kv_len - q_len
    elif pattern == "blocks":
        size = max(1, -(-max(q_len, kv_len) // rng.randint(1, 5)))
        visible &= rows // size == keys // size
    elif pattern == "window":
        visible &= (rows - keys).abs() <= rng.randint(0, 3)
    elif pattern == "random":
        visible &= torch.rand(visible.shape, generator=torch.Generator().manual_seed(rng.getrandbits(32))) > 0.4
    elif pattern == "all hidden":
        visible[rng.randrange(batch)] = False
    elif pattern == "rows without keys":
        visible[:, :, rng.randrange(q_len)] = False
    return visible


def shaped(visible: torch.Tensor, shape: str) -> torch.Tensor:
    """Cut to one of `SHAPES`, from its first sample, head and query where the shape has none of its own."""
    return {
        "(Lq, Lk)": visible[0, 0],
        "(1, Lk)": visible[0, 0, :1],
        "(B, 1, Lk)": visible[:, 0, :1],
        "(B, Lq, Lk)": visible[:, 0],
        "(B, 1, 1, Lk)": visible[:, :1, :1],
        "(B, H, Lq, Lk)": visible,
        "(1, 1, Lq, Lk)": visible[:1, :1],
    }[shape]


def filled(visible: torch.Tensor, fill: str, dtype: torch.dtype, bias: bool, rng: random.Random) -> torch.Tensor:
    """The mask in numbers, or as it is for `bool`; with `bias`, visible keys get small finite numbers."""
    if fill == "bool":
        return visible
    lowest = torch.finfo(dtype).min
    value = {"-inf": float("-inf"), "finfo.min": lowest, "-max": -torch.finfo(dtype).max, "half of min": lowest / 2}
    mask = torch.zeros(visible.shape, dtype=dtype)
    if bias:
        mask += torch.randn(visible.shape, generator=torch.Generator().manual_seed(rng.getrandbits(32))).to(dtype)
    return mask.masked_fill(~visible, value[fill])


def random_mask(rng: random.Random, batch: int, heads: int, q_len: int, kv_len: int, dtype: torch.dtype):
    """A mask and the words for it."""
    pattern, shape, fill = rng.choice(PATTERNS), rng.choice(SHAPES), rng.choice(FILLS)
    bias = rng.random() < 0.25
    visible = shaped(visible_keys(pattern, batch, heads, q_len, kv_len, rng), shape)
    return filled(visible, fill, dtype, bias, rng), f"{pattern}, {shape}, {fill}{', bias' if bias else ''}"
