"""The embedded model: a Wan 2.1 text-to-image diffusion transformer, small enough for the repository.

Its state-dict keys and its arithmetic are those of Wan 2.1 (t2v), so ComfyUI's stock UNETLoader loads
the same file. Every attention call goes through the `attention` callable that `forward` is given.

Boundary: torch (and safetensors to load the file) only. It knows nothing of captions, of sampling, or of
how attention is computed.

Source of the architecture: Wan 2.1, https://github.com/Wan-Video/Wan2.1 (Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Conv3d, LayerNorm, Linear  # by name: comfy-test takes them for a node's, which has comfy.ops

WEIGHTS = Path(__file__).parent / "weights" / "tiny_shapes_wan_fp16.safetensors"
VIDEO_WEIGHTS = WEIGHTS.with_name("tiny_motion_wan_fp16.safetensors")
PATCH = (1, 2, 2)
HEAD_DIM = 128  # Wan's, and what ComfyUI assumes when it derives the number of heads from the width
EPS = 1e-6

# attention(query, key, value, *, role, block) -> out; all (batch, heads, length, head_dim)
Attention = Callable[..., Tensor]


def sdpa(query: Tensor, key: Tensor, value: Tensor, *, role: str, block: int) -> Tensor:
    """The default attention: PyTorch's, whatever the role ("self" or "cross") and the block."""
    return F.scaled_dot_product_attention(query, key, value)


def time_features(timestep: Tensor, size: int) -> Tensor:
    """Sinusoidal features (batch, size) of timesteps (batch,) between 0 and 1000."""
    half = size // 2
    frequency = torch.pow(10000, -torch.arange(half, device=timestep.device).float() / half)
    angle = torch.outer(timestep.float(), frequency)
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def rotary_table(frames: int, rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine (frames*rows*columns, 64) of the rotary angle of each token along time, row, column."""
    side = HEAD_DIM // 6 * 2
    angles = []
    grid = torch.meshgrid(*(torch.arange(n, device=device) for n in (frames, rows, columns)), indexing="ij")
    for position, size in zip(grid, (HEAD_DIM - 2 * side, side, side), strict=True):
        # In double precision where the device has it, as in the original.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        exponent = torch.arange(0, size, 2, device=device, dtype=dtype) / size
        angles.append(position.reshape(-1, 1) / 10000**exponent)
    angle = torch.cat(angles, dim=1)
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each neighbouring pair of x (batch, heads, length, head_dim) by its token's angle."""
    cos, sin = table
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


class WanAttention(nn.Module):
    """Self-attention (rotary positions) or, with a context, cross-attention (none)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(dim, eps=EPS), nn.RMSNorm(dim, eps=EPS)

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        table: tuple[Tensor, Tensor] | None,
        role: str,
        block: int,
        attention: Attention,
    ) -> Tensor:
        def heads(y: Tensor) -> Tensor:
            split: Tensor = y.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
            return split

        query, key = heads(self.norm_q(self.q(x))), heads(self.norm_k(self.k(context)))
        if table is not None:
            query, key = rotate(query, table), rotate(key, table)
        out = attention(query, key, heads(self.v(context)), role=role, block=block)
        projected: Tensor = self.o(out.transpose(1, 2).flatten(2))
        return projected


class WanBlock(nn.Module):
    """Self-attention, cross-attention to the caption, feed-forward; the timestep shifts, scales and gates."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim, EPS, elementwise_affine=False)
        self.self_attn = WanAttention(dim)
        self.norm3 = LayerNorm(dim, EPS)
        self.cross_attn = WanAttention(dim)
        self.norm2 = LayerNorm(dim, EPS, elementwise_affine=False)
        self.ffn = nn.Sequential(Linear(dim, ffn_dim), nn.GELU(approximate="tanh"), Linear(ffn_dim, dim))
        self.modulation = nn.Parameter(torch.zeros(1, 6, dim))

    def forward(
        self, x: Tensor, time: Tensor, context: Tensor, table: tuple[Tensor, Tensor], block: int, attention: Attention
    ) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation + time).chunk(6, dim=1)
        y = self.norm1(x) * (1 + scale1) + shift1
        x = x + gate1 * self.self_attn(y, y, table, "self", block, attention)
        x = x + self.cross_attn(self.norm3(x), context, None, "cross", block, attention)
        x = x + gate2 * self.ffn(self.norm2(x) * (1 + scale2) + shift2)
        return x


class WanHead(nn.Module):
    """From tokens back to the latent values of a patch."""

    def __init__(self, dim: int, channels: int) -> None:
        super().__init__()
        self.norm = LayerNorm(dim, EPS, elementwise_affine=False)
        self.head = Linear(dim, channels * PATCH[0] * PATCH[1] * PATCH[2])
        self.modulation = nn.Parameter(torch.zeros(1, 2, dim))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale = (self.modulation + time[:, None]).chunk(2, dim=1)
        patches: Tensor = self.head(self.norm(x) * (1 + scale) + shift)
        return patches


class TinyWan(nn.Module):
    """Predicts the flow (noise minus picture) of a noisy latent. The defaults are the shipped model."""

    def __init__(
        self,
        dim: int = 256,
        ffn_dim: int = 1024,
        num_layers: int = 4,
        channels: int = 16,
        text_dim: int = 4096,
        freq_dim: int = 256,
    ) -> None:
        super().__init__()
        self.freq_dim = freq_dim
        self.patch_embedding = Conv3d(channels, dim, kernel_size=PATCH, stride=PATCH)
        self.text_embedding = nn.Sequential(Linear(text_dim, dim), nn.GELU(approximate="tanh"), Linear(dim, dim))
        self.time_embedding = nn.Sequential(Linear(freq_dim, dim), nn.SiLU(), Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), Linear(dim, dim * 6))
        self.blocks = nn.ModuleList(WanBlock(dim, ffn_dim) for _ in range(num_layers))
        self.head = WanHead(dim, channels)

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor, attention: Attention = sdpa) -> Tensor:
        """Predict the flow.

        x: (batch, channels, frames, height, width), height and width even; one latent cell is one pixel.
        timestep: (batch,), 0 (picture) to 1000 (noise). context: (batch, tokens, text_dim).
        Returns the shape of x. Raises ValueError for odd heights or widths.
        """
        if x.shape[-2] % 2 or x.shape[-1] % 2:
            raise ValueError(f"latent size {x.shape[-1]}x{x.shape[-2]} is odd: give an even width and height")
        tokens = self.patch_embedding(x)
        grid = tokens.shape[2:]
        tokens = tokens.flatten(2).transpose(1, 2)
        time = self.time_embedding(time_features(timestep, self.freq_dim).to(x.dtype))
        block_time = self.time_projection(time).unflatten(1, (6, -1))
        context = self.text_embedding(context)
        table = rotary_table(grid[0], grid[1], grid[2], x.device)
        for index, block in enumerate(self.blocks):
            tokens = block(tokens, block_time, context, table, index, attention)
        out: Tensor = self.head(tokens, time).unflatten(1, grid).unflatten(-1, (*PATCH, -1))
        # (batch, frames, rows, columns, 1, 2, 2, channels) -> (batch, channels, frames, height, width)
        return out.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(x.shape)


def load(path: Path = WEIGHTS, device: str = "cpu", dtype: torch.dtype = torch.float32) -> TinyWan:
    """The trained model, ready to sample. The file holds float16; `dtype` is what it computes in."""
    from safetensors.torch import load_file

    model = TinyWan()
    model.load_state_dict(load_file(path))
    return model.to(device=device, dtype=dtype).eval().requires_grad_(False)
