"""Pictures as latents of Wan 2.1, without a VAE: one latent cell is one pixel.

Wan's latent format comes with linear factors that turn a latent into a rough RGB preview. Here that is the
decoder itself: a picture is what the factors make of the latent, so ComfyUI's own preview shows it too.
Two spaces: the model works on normalised latents; what ComfyUI passes between nodes is `process_out` of them.

Boundary: torch only. The numbers are those of the Wan 2.1 latent format; a test compares them with ComfyUI's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

CHANNELS = 16
MEAN = torch.tensor(
    [
        -0.7571,
        -0.7089,
        -0.9113,
        0.1075,
        -0.1745,
        0.9653,
        -0.1517,
        1.5508,
        0.4134,
        -0.0715,
        0.5517,
        -0.3632,
        -0.1922,
        -0.9497,
        0.2503,
        -0.2921,
    ]
)
STD = torch.tensor(
    [
        2.8184,
        1.4541,
        2.3275,
        2.6558,
        1.2196,
        1.7708,
        2.6052,
        2.0743,
        3.2687,
        2.1526,
        2.8652,
        1.5579,
        1.6382,
        1.1253,
        2.8251,
        1.9160,
    ]
)
RGB_FACTORS = torch.tensor(
    [
        [-0.1299, -0.1692, 0.2932],
        [0.0671, 0.0406, 0.0442],
        [0.3568, 0.2548, 0.1747],
        [0.0372, 0.2344, 0.1420],
        [0.0313, 0.0189, -0.0328],
        [0.0296, -0.0956, -0.0665],
        [-0.3477, -0.4059, -0.2925],
        [0.0166, 0.1902, 0.1975],
        [-0.0412, 0.0267, -0.1364],
        [-0.1293, 0.0740, 0.1636],
        [0.0680, 0.3019, 0.1128],
        [0.0032, 0.0581, 0.0639],
        [-0.1251, 0.0927, 0.1699],
        [0.0060, -0.0633, 0.0005],
        [0.3477, 0.2275, 0.2950],
        [0.1984, 0.0913, 0.1861],
    ]
)
RGB_BIAS = torch.tensor([-0.1835, -0.0868, -0.3360])


def process_in(latent: Tensor) -> Tensor:
    """From ComfyUI's LATENT (batch, 16, ...) to the model's normalised space."""
    shape = (1, CHANNELS) + (1,) * (latent.ndim - 2)
    return (latent - MEAN.to(latent).view(shape)) / STD.to(latent).view(shape)


def process_out(latent: Tensor) -> Tensor:
    """From the model's normalised space to ComfyUI's LATENT (batch, 16, ...)."""
    shape = (1, CHANNELS) + (1,) * (latent.ndim - 2)
    return latent * STD.to(latent).view(shape) + MEAN.to(latent).view(shape)


def latent_to_rgb(latent: Tensor) -> Tensor:
    """Decode normalised latents (batch, 16, ...) to RGB (batch, ..., 3) in 0..1."""
    rgb = latent.float().movedim(1, -1) @ RGB_FACTORS.to(latent.device) + RGB_BIAS.to(latent.device)
    return ((rgb + 1) / 2).clamp(0, 1)


def rgb_to_latent(rgb: Tensor) -> Tensor:
    """Normalised latents (batch, 16, frames, height, width) to train on, of RGB (batch, 3, ...) in 0..1.

    Decoding gives the picture back exactly: it sees three of sixteen directions, where the pseudo-inverse of
    the factors puts it. Of the others, three carry the picture too, so that it stands out from the noise, and
    six carry the place of each cell, from edge to edge. The model knows only relative places (rotary
    positions), so it learns to lay out this grid as it denoises, and draws on it. In a clip (more than one frame)
    three more carry the time of each frame, which tells the first frame from the last.
    """
    factors = RGB_FACTORS.double()
    channel = (torch.arange(CHANNELS).double() + 0.5) / CHANNELS
    cosines = torch.cos(math.pi * torch.arange(1, 13) * channel[:, None])
    spare = torch.linalg.qr(torch.cat([factors, cosines], dim=1)).Q[:, 3:].T.float()  # unseen by the factors
    inverse = torch.linalg.pinv(factors).float()

    rgb = rgb.movedim(1, -1) * 2 - 1
    frames, height, width = rgb.shape[-4:-1]
    places = []
    for axis, size in enumerate((height, width)):
        place = (torch.arange(size) * 2 + 1) / size - 1
        place = place[:, None].expand(height, width) if axis == 0 else place[None].expand(height, width)
        places += [1.5 * place, torch.sin(math.pi * place), torch.cos(math.pi * place)]
    grid = torch.stack(places, dim=-1).expand(*rgb.shape[:-1], 6)
    hidden = torch.cat([rgb, grid], dim=-1)
    if frames > 1:
        time = torch.arange(frames) / 4 - 1  # a shorter clip is the start of a longer one
        waves = torch.stack([1.5 * time, torch.sin(math.pi * time), torch.cos(math.pi * time)], dim=-1)
        hidden = torch.cat([hidden, waves[:, None, None].expand(*rgb.shape[:-1], 3)], dim=-1)
    latent: Tensor = (rgb - RGB_BIAS) @ inverse + 2 * hidden @ spare[: hidden.shape[-1]]
    return latent.movedim(-1, 1)
