from typing import Any

import torch

def fix_empty_latent_channels(model: Any, latent_image: torch.Tensor) -> torch.Tensor: ...
