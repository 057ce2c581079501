"""Real models of diffusers with a few random weights, and the arguments of one forward; seconds of CPU for all.

`MODELS`: name -> a function that returns the model and the keyword arguments of its forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("torch")

import torch

Built = tuple[Any, dict[str, Any]]


def _seeded(build: Callable[[], Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().eval()


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    """Random numbers of this shape, the same each time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def wan(image: bool = False) -> Built:
    from diffusers import WanTransformer3DModel

    more: dict[str, Any] = {"image_dim": 8, "added_kv_proj_dim": 24} if image else {}
    model = _seeded(
        lambda: WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
            ffn_dim=32, num_layers=2, rope_max_seq_len=32, **more,
        )
    )  # fmt: skip
    given = {
        "hidden_states": noise(1, 4, 2, 8, 8),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": noise(1, 512 if image else 7, 16, seed=2),  # with a picture the last 512 are text
    }
    if image:
        given["encoder_hidden_states_image"] = noise(1, 5, 8, seed=3)
    return model, given


def flux() -> Built:
    from diffusers import FluxTransformer2DModel

    model = _seeded(
        lambda: FluxTransformer2DModel(
            in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
        )
    )  # fmt: skip
    ids = torch.zeros(16, 3)
    ids[:, 1] = torch.arange(16) // 4
    ids[:, 2] = torch.arange(16) % 4
    return model, {
        "hidden_states": noise(1, 16, 4),
        "encoder_hidden_states": noise(1, 5, 32, seed=2),
        "pooled_projections": noise(1, 32, seed=3),
        "timestep": torch.tensor([0.5]),
        "img_ids": ids,
        "txt_ids": torch.zeros(5, 3),
    }


def qwen_image(masked: bool = False) -> Built:
    from diffusers import QwenImageTransformer2DModel

    model = _seeded(
        lambda: QwenImageTransformer2DModel(
            in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
        )
    )  # fmt: skip
    mask = torch.ones(2, 7, dtype=torch.bool)
    if masked:
        mask[1, 4:] = False
    return model, {
        "hidden_states": noise(2, 16, 16),
        "encoder_hidden_states": noise(2, 7, 16, seed=2),
        "encoder_hidden_states_mask": mask,
        "timestep": torch.tensor([0.5, 0.5]),
        "img_shapes": [[(1, 4, 4)]] * 2,
    }


def sd3() -> Built:
    from diffusers import SD3Transformer2DModel

    model = _seeded(
        lambda: SD3Transformer2DModel(
            sample_size=8, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=4,
            joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=64, out_channels=4,
            pos_embed_max_size=16, dual_attention_layers=(0,), qk_norm="rms_norm",
        )
    )  # fmt: skip
    return model, {
        "hidden_states": noise(1, 4, 8, 8),
        "encoder_hidden_states": noise(1, 6, 32, seed=2),
        "pooled_projections": noise(1, 64, seed=3),
        "timestep": torch.tensor([500]),
    }


def sdxl(masked: bool = False) -> Built:
    from diffusers import UNet2DConditionModel

    model = _seeded(
        lambda: UNet2DConditionModel(
            block_out_channels=(16, 32), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(2, 4), use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=8, transformer_layers_per_block=(1, 1),
            projection_class_embeddings_input_dim=64, cross_attention_dim=16, norm_num_groups=8,
        )
    )  # fmt: skip
    given = {
        "sample": noise(1, 4, 8, 8),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": noise(1, 6, 16, seed=2),
        "added_cond_kwargs": {"text_embeds": noise(1, 16, seed=3), "time_ids": torch.ones(1, 6)},
    }
    if masked:
        mask = torch.ones(1, 6, dtype=torch.bool)
        mask[:, 3:] = False
        given["encoder_attention_mask"] = mask
    return model, given


def ltx2(masked: bool = False) -> Built:
    from diffusers import LTX2VideoTransformer3DModel

    model = _seeded(
        lambda: LTX2VideoTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
            audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=4,
            audio_cross_attention_dim=8, num_layers=2, caption_channels=16, rope_double_precision=False,
        )
    )  # fmt: skip
    given = {
        "hidden_states": noise(1, 8, 4),
        "audio_hidden_states": noise(1, 5, 4, seed=4),
        "encoder_hidden_states": noise(1, 6, 16, seed=2),
        "audio_encoder_hidden_states": noise(1, 6, 16, seed=3),
        "timestep": torch.tensor([500.0]),
        "num_frames": 2,
        "height": 2,
        "width": 2,
        "audio_num_frames": 5,
    }
    if masked:
        mask = torch.ones(1, 6)
        mask[:, 4:] = 0
        given["encoder_attention_mask"] = given["audio_encoder_attention_mask"] = mask
    return model, given


def hunyuan_video_15() -> Built:
    from diffusers import HunyuanVideo15Transformer3DModel

    model = _seeded(
        lambda: HunyuanVideo15Transformer3DModel(
            in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
            num_refiner_layers=1, mlp_ratio=2.0, text_embed_dim=16, text_embed_2_dim=8, image_embed_dim=12,
            rope_axes_dim=(4, 4, 8), task_type="t2v",
        )
    )  # fmt: skip
    mask = torch.ones(1, 6)
    mask[:, 4:] = 0
    mask_2 = torch.ones(1, 3)
    mask_2[:, 2:] = 0
    return model, {
        "hidden_states": noise(1, 9, 2, 4, 4),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": noise(1, 6, 16, seed=2),
        "encoder_attention_mask": mask,
        "encoder_hidden_states_2": noise(1, 3, 8, seed=3),
        "encoder_attention_mask_2": mask_2,
        "image_embeds": torch.zeros(1, 2, 12),
    }


def z_image() -> Built:
    from diffusers import ZImageTransformer2DModel

    model = _seeded(
        lambda: ZImageTransformer2DModel(
            in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
            axes_dims=[8, 4, 4], axes_lens=[128, 16, 16],
        )
    )  # fmt: skip
    return model, {
        "x": [noise(4, 1, 8, 8), noise(4, 1, 8, 8, seed=5)],
        "t": torch.tensor([0.5, 0.5]),
        "cap_feats": [noise(7, 16, seed=2), noise(40, 16, seed=3)],
    }


MODELS: dict[str, Callable[[], Built]] = {
    "wan": wan,
    "wan_image": lambda: wan(image=True),
    "flux": flux,
    "qwen_image": qwen_image,
    "qwen_image_masked": lambda: qwen_image(masked=True),
    "sd3": sd3,
    "sdxl": sdxl,
    "sdxl_masked": lambda: sdxl(masked=True),
    "ltx2": ltx2,
    "ltx2_masked": lambda: ltx2(masked=True),
    "hunyuan_video_15": hunyuan_video_15,
    "z_image": z_image,
}


def forward(model: Any, given: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors of one forward, without gradients."""
    with torch.no_grad():
        output = model(**given, return_dict=False)
    flat: list[torch.Tensor] = []
    for part in output:
        flat += part if isinstance(part, list) else [part]
    return flat
