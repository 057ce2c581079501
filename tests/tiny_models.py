"""The table of tiny models: for each model family ComfyUI's own classes with a few random weights.

A row says which class of comfy.supported_models to take, the dimensions, the latent, and what its conditioning
holds. Two blocks of each kind, and every length differs from every other one that could be mistaken for it.
Building and sampling are in tiny_sampling.py; nothing here imports ComfyUI or torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

TEXT = 20  # text tokens of every family, unless its encoder has a fixed number
PADDED = 13  # text tokens that a padded attention_mask leaves visible


@dataclass(frozen=True)
class Family:
    """One model to build.

    config: class name in comfy.supported_models. unet: arguments of the diffusion model. latents: shapes of the
    empty latent, batch first (two for models that sample video and audio together). text: (tokens, channels) of
    the conditioning. extras: makes the rest of the conditioning from `rand(*shape)`. cfg: 1.0 for models that
    are sampled without a negative prompt. shrink: replaces parts whose size no argument reaches, and sets buffers
    that a checkpoint would hold. from_file: ComfyUI recognises these dimensions in a saved file, so UNETLoader
    loads what tiny_sampling.save writes; for the others it expects the full size.
    """

    config: str
    unet: dict[str, Any]
    latents: tuple[tuple[int, ...], ...]
    text: tuple[int, int]
    extras: Callable[[Any], dict[str, Any]] = field(default=lambda rand: {})
    cfg: float = 3.0
    shrink: Callable[[Any], None] = field(default=lambda model: None)
    from_file: bool = False


def _mask(visible: int) -> Any:
    import torch

    return (torch.arange(TEXT) < visible).long().unsqueeze(0)


def _padded_mask(_rand: Any) -> dict[str, Any]:
    return {"attention_mask": _mask(PADDED)}


def _pooled(channels: int) -> Callable[[Any], dict[str, Any]]:
    return lambda rand: {"pooled_output": rand(1, channels)}


def _redux_bias(rand: Any) -> dict[str, Any]:
    """Flux with a style image that is attended to at a lower strength: a bias of (batch, query, key)."""
    bias = rand(1, 1, 1).new_zeros(1, TEXT + 96, TEXT + 96)
    bias[:, :, TEXT // 2 : TEXT] = -0.7
    return {"attention_mask": bias, "attention_mask_img_shape": (8, 12), **_pooled(64)(rand)}


def _wan_image(rand: Any) -> dict[str, Any]:
    return {"clip_vision_output": SimpleNamespace(penultimate_hidden_states=rand(1, 257, 1280))}


def _guide_frame(rand: Any) -> dict[str, Any]:
    """LTX: the last latent frame is a guide that is attended to at half strength."""
    import torch

    frames, height, width = 3, 4, 6
    noise_mask = torch.ones(1, 1, frames, height, width)
    noise_mask[:, :, -1] = 0
    tokens = height * width
    return {
        **_padded_mask(rand),
        "concat_mask": noise_mask,
        "keyframe_idxs": rand(1, 3, tokens, 2).abs(),
        "guide_attention_entries": [
            {"pre_filter_count": tokens, "strength": 0.5, "pixel_mask": None, "latent_shape": [1, height, width]}
        ],
    }


def _hunyuan15(rand: Any) -> dict[str, Any]:
    vision = SimpleNamespace(last_hidden_state=rand(1, 27, 1152))
    return {"conditioning_byt5small": rand(1, 10, 1472), "clip_vision_output": vision, "pooled_output": None}


def _ace_lyrics(_rand: Any) -> dict[str, Any]:
    import torch

    return {"conditioning_lyrics": torch.arange(1, 13).unsqueeze(0)}


def _anima_ids(_rand: Any) -> dict[str, Any]:
    import torch

    return {"t5xxl_ids": torch.arange(1, 16), "t5xxl_weights": torch.ones(15)}


def _small_anima_adapter(model: Any) -> None:
    import comfy.ldm.anima.model
    import comfy.ops

    model.llm_adapter = comfy.ldm.anima.model.LLMAdapter(
        source_dim=64, target_dim=64, model_dim=64, num_layers=2, num_heads=2,
        operations=comfy.ops.disable_weight_init,
    )  # fmt: skip


def _small_ace_lyrics(model: Any) -> None:
    import comfy.ldm.ace.lyric_encoder
    import comfy.ops

    model.lyric_encoder = comfy.ldm.ace.lyric_encoder.ConformerEncoder(
        input_size=64, output_size=64, attention_heads=2, linear_units=128, num_blocks=1, static_chunk_size=0,
        operations=comfy.ops.disable_weight_init,
    )  # fmt: skip


def _set_rope_frequencies(model: Any) -> None:
    """MiniMax H3 stores these in the checkpoint instead of computing them."""
    frequencies = model.rope.inv_freq
    frequencies.copy_(10000.0 ** -(frequencies.new_tensor(range(len(frequencies))) / len(frequencies)))


def _set_position_table(model: Any) -> None:
    """SD3 stores its position embedding in the checkpoint instead of computing it."""
    model.pos_embed.copy_(model.pos_embed.new_tensor(range(model.pos_embed.numel())).sin().view_as(model.pos_embed))


IMAGE = (1, 16, 16, 24)
VIDEO = (1, 16, 3, 8, 12)

WAN = {
    "image_model": "wan2.1", "model_type": "t2v", "dim": 256, "num_heads": 2, "ffn_dim": 512, "num_layers": 2,
    "in_dim": 16, "out_dim": 16, "patch_size": (1, 2, 2), "freq_dim": 256, "window_size": (-1, -1),
    "qk_norm": True, "cross_attn_norm": True, "eps": 1e-6,
}  # fmt: skip
FLUX = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "patch_size": 2, "vec_in_dim": 64,
    "context_in_dim": 64, "hidden_size": 256, "mlp_ratio": 4.0, "num_heads": 2, "depth": 2,
    "depth_single_blocks": 2, "axes_dim": [16, 56, 56], "theta": 10000, "qkv_bias": True, "guidance_embed": True,
    "yak_mlp": False, "txt_norm": False, "txt_ids_dims": [],
}  # fmt: skip
FLUX2 = {
    **FLUX, "image_model": "flux2", "in_channels": 128, "out_channels": 128, "patch_size": 1, "vec_in_dim": None,
    "mlp_ratio": 3.0, "axes_dim": [32, 32, 32, 32], "theta": 2000, "qkv_bias": False, "global_modulation": True,
    "mlp_silu_act": True, "ops_bias": False, "default_ref_method": "index", "ref_index_scale": 10.0,
    "txt_ids_dims": [3],
}  # fmt: skip
CHROMA = {
    "image_model": "chroma", "in_channels": 64, "out_channels": 64, "patch_size": 2, "vec_in_dim": None,
    "context_in_dim": 64, "hidden_size": 256, "mlp_ratio": 4.0, "num_heads": 2, "depth": 2,
    "depth_single_blocks": 2, "axes_dim": [16, 56, 56], "theta": 10000, "qkv_bias": True, "in_dim": 64,
    "out_dim": 256, "hidden_dim": 64, "n_layers": 2, "txt_ids_dims": [],
}  # fmt: skip
SD3 = {
    "in_channels": 16, "out_channels": 16, "patch_size": 2, "depth": 2, "input_size": None, "adm_in_channels": 64,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 64, "out_features": 128}},
    "num_patches": 144, "pos_embed_max_size": 12, "pos_embed_scaling_factor": None, "qk_norm": "rms",
    "x_block_self_attn_layers": [0],
}  # fmt: skip
QWEN_IMAGE = {
    "image_model": "qwen_image", "in_channels": 64, "out_channels": 16, "num_layers": 2,
    "attention_head_dim": 128, "num_attention_heads": 2, "joint_attention_dim": 64,
}  # fmt: skip
LTXV = {
    "image_model": "ltxv", "num_layers": 2, "attention_head_dim": 32, "num_attention_heads": 4,
    "cross_attention_dim": 128, "caption_channels": 64,
}  # fmt: skip
# The connectors between text encoder and blocks default to 30 heads of 128: most of a full-size model's weights.
LTXAV = {
    **LTXV, "image_model": "ltxav", "audio_attention_head_dim": 16, "audio_num_attention_heads": 4,
    "audio_cross_attention_dim": 64, "connector_attention_head_dim": 32, "connector_num_attention_heads": 2,
    "connector_num_layers": 1,
}  # fmt: skip
HUNYUAN_VIDEO = {
    "image_model": "hunyuan_video", "in_channels": 16, "out_channels": 16, "patch_size": [1, 2, 2],
    "vec_in_dim": 768, "context_in_dim": 64, "hidden_size": 256, "mlp_ratio": 4.0, "num_heads": 2, "depth": 2,
    "depth_single_blocks": 2, "axes_dim": [16, 56, 56], "theta": 256, "qkv_bias": True, "guidance_embed": True,
    "byt5": False, "meanflow": False, "use_cond_type_embedding": False, "vision_in_dim": None,
    "meanflow_sum": False,
}  # fmt: skip
HUNYUAN_VIDEO15 = {
    **HUNYUAN_VIDEO, "in_channels": 65, "out_channels": 32, "patch_size": [1, 1, 1], "vec_in_dim": None,
    "depth_single_blocks": 0, "guidance_embed": False, "byt5": True, "use_cond_type_embedding": True,
    "vision_in_dim": 1152, "meanflow_sum": True,
}  # fmt: skip
LUMINA2 = {
    "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 192, "cap_feat_dim": 64, "n_layers": 2,
    "n_refiner_layers": 1, "n_heads": 4, "n_kv_heads": 2, "qk_norm": True, "axes_dims": [16, 16, 16],
    "axes_lens": [300, 512, 512], "rope_theta": 10000.0, "ffn_dim_multiplier": 1.0, "multiple_of": 64,
}  # fmt: skip
Z_IMAGE = {
    **LUMINA2, "dim": 256, "n_kv_heads": 4, "axes_dims": [16, 24, 24], "axes_lens": [1536, 512, 512],
    "rope_theta": 256.0, "z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 32,
}  # fmt: skip
COSMOS1 = {
    "image_model": "cosmos", "max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": 16,
    "out_channels": 16, "patch_spatial": 2, "patch_temporal": 1, "model_channels": 128, "num_blocks": 2,
    "num_heads": 2, "block_config": "FA-CA-MLP", "concat_padding_mask": True, "crossattn_emb_channels": 64,
    "pos_emb_cls": "rope3d", "block_x_format": "THWBD", "affline_emb_norm": True, "use_adaln_lora": True,
    "adaln_lora_dim": 32, "extra_per_block_abs_pos_emb": True, "extra_per_block_abs_pos_emb_type": "learnable",
}  # fmt: skip
COSMOS_PREDICT2 = {
    "image_model": "cosmos_predict2", "max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": 16,
    "out_channels": 16, "patch_spatial": 2, "patch_temporal": 1, "model_channels": 128, "num_blocks": 2,
    "num_heads": 2, "concat_padding_mask": True, "crossattn_emb_channels": 64, "pos_emb_cls": "rope3d",
    "use_adaln_lora": True, "adaln_lora_dim": 32, "rope_enable_fps_modulation": False,
}  # fmt: skip
HIDREAM = {
    "image_model": "hidream", "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 2,
    "num_single_layers": 2, "attention_head_dim": 64, "num_attention_heads": 2, "caption_channels": [64, 64],
    "text_emb_dim": 64, "num_routed_experts": 2, "num_activated_experts": 1, "axes_dims_rope": [32, 16, 16],
    "max_resolution": [128, 128], "llama_layers": [0, 1, 2, 2],
}  # fmt: skip
HUNYUAN3D2 = {
    "image_model": "hunyuan3d2", "in_channels": 64, "context_in_dim": 64, "hidden_size": 128, "mlp_ratio": 4.0,
    "num_heads": 2, "depth": 2, "depth_single_blocks": 2, "qkv_bias": True, "guidance_embed": False,
}  # fmt: skip
HUNYUAN3D2_1 = {
    "image_model": "hunyuan3d2_1", "in_channels": 64, "context_dim": 64, "hidden_size": 128, "num_heads": 2,
    "depth": 3, "num_moe_layers": 1, "num_experts": 2, "moe_top_k": 1, "qkv_bias": False,
    "guidance_cond_proj_dim": None,
}  # fmt: skip
ACE_STEP = {
    "audio_model": "ace", "in_channels": 8, "out_channels": 8, "num_layers": 2, "attention_head_dim": 32,
    "num_attention_heads": 4, "mlp_ratio": 2.0, "max_height": 16, "max_width": 4096, "patch_size": [16, 1],
    "speaker_embedding_dim": 512, "text_embedding_dim": 64, "ssl_latent_dims": [32, 32],
    "lyric_encoder_vocab_size": 64, "lyric_hidden_size": 64,
}  # fmt: skip
MINIMAX_H3 = {
    "image_model": "minimax_h3", "hidden_size": 256, "num_layers": 2, "token_refiner_num_layers": 1,
    "num_attention_heads": 2, "attention_head_dim": 128, "ffn_hidden_size": 256, "latents_dim": 24,
    "audio_latents_dim": 32, "text_dim": 64, "timestep_input_dim": 64, "time_embed_hidden_size": 64,
    "time_embed_dim": 64, "rope_inv_freq_len": 16,
}  # fmt: skip
KANDINSKY5 = {
    "image_model": "kandinsky5", "model_dim": 128, "time_dim": 64, "ff_dim": 256, "visual_embed_dim": 132,
    "num_text_blocks": 2, "num_visual_blocks": 2,
}  # fmt: skip
OMNIGEN2 = {
    "image_model": "omnigen2", "patch_size": 2, "in_channels": 16, "hidden_size": 192, "num_layers": 2,
    "num_refiner_layers": 1, "num_attention_heads": 4, "num_kv_heads": 2, "multiple_of": 64,
    "axes_dim_rope": [16, 16, 16], "axes_lens": [1024, 1664, 1664], "text_feat_dim": 64, "timestep_scale": 1000.0,
}  # fmt: skip
UNET = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 64, "channel_mult": [1, 2],
    "num_res_blocks": [1, 1], "transformer_depth_middle": 1, "context_dim": 64, "use_spatial_transformer": True,
    "legacy": False,
}  # fmt: skip
SD15 = {**UNET, "transformer_depth": [1, 1], "transformer_depth_output": [1, 1, 1, 1]}
SDXL = {
    **UNET, "transformer_depth": [0, 2], "transformer_depth_output": [0, 0, 2, 2], "transformer_depth_middle": 2,
    "use_linear_in_transformer": True, "num_classes": "sequential", "adm_in_channels": 1600,
}  # fmt: skip

FAMILIES: dict[str, Family] = {
    "wan": Family("WAN21_T2V", WAN, (VIDEO,), (TEXT, 4096), from_file=True),
    "wan_i2v": Family(
        "WAN21_I2V", {**WAN, "model_type": "i2v", "in_dim": 36}, (VIDEO,), (TEXT, 4096), _wan_image, from_file=True
    ),
    "wan_vace": Family(
        "WAN21_Vace", {**WAN, "model_type": "vace", "num_layers": 4, "vace_in_dim": 96, "vace_layers": 2}, (VIDEO,),
        (TEXT, 4096), from_file=True,
    ),
    "wan22_5b": Family(
        "WAN22_T2V", {**WAN, "in_dim": 48, "out_dim": 48}, ((1, 48, 3, 8, 12),), (TEXT, 4096), from_file=True
    ),
    "flux": Family("Flux", FLUX, (IMAGE,), (TEXT, 64), _pooled(64), cfg=1.0, from_file=True),
    "flux_masked": Family("Flux", FLUX, (IMAGE,), (TEXT, 64), _redux_bias, cfg=1.0, from_file=True),
    "flux2": Family("Flux2", FLUX2, ((1, 128, 8, 12),), (TEXT, 64), cfg=1.0, from_file=True),
    "chroma": Family("Chroma", CHROMA, (IMAGE,), (TEXT, 64)),
    "sd3": Family("SD3", SD3, (IMAGE,), (TEXT, 64), _pooled(64), shrink=_set_position_table, from_file=True),
    "qwen_image": Family("QwenImage", QWEN_IMAGE, ((1, 16, 1, 16, 24),), (TEXT, 64)),
    "qwen_image_masked": Family("QwenImage", QWEN_IMAGE, ((1, 16, 1, 16, 24),), (TEXT, 64), _padded_mask),
    "ltxv": Family("LTXV", LTXV, ((1, 128, 3, 4, 6),), (TEXT, 64), _padded_mask, from_file=True),
    "ltxv_guide": Family("LTXV", LTXV, ((1, 128, 3, 4, 6),), (TEXT, 64), _guide_frame, from_file=True),
    "ltxav": Family("LTXAV", LTXAV, ((1, 128, 3, 4, 6), (1, 8, 11, 16)), (TEXT, 64), from_file=True),
    # One prompt only: ComfyUI fails on this family's mask when a negative prompt is batched with it.
    "hunyuan_video": Family(
        "HunyuanVideo", HUNYUAN_VIDEO, (VIDEO,), (TEXT, 64), lambda rand: {**_padded_mask(rand), **_pooled(768)(rand)},
        cfg=1.0, from_file=True,
    ),
    "hunyuan_video15": Family(
        "HunyuanVideo15", HUNYUAN_VIDEO15, ((1, 32, 3, 4, 6),), (TEXT, 64), _hunyuan15, from_file=True
    ),
    "lumina2": Family("Lumina2", LUMINA2, (IMAGE,), (TEXT, 64), _padded_mask, cfg=1.0),
    "z_image": Family("ZImage", Z_IMAGE, (IMAGE,), (TEXT, 64), cfg=1.0),
    "cosmos1": Family("CosmosT2V", COSMOS1, (VIDEO,), (TEXT, 64)),
    "cosmos_predict2": Family("CosmosT2IPredict2", COSMOS_PREDICT2, ((1, 16, 1, 16, 24),), (TEXT, 64)),
    "anima": Family(
        "Anima", {**COSMOS_PREDICT2, "image_model": "anima"}, ((1, 16, 1, 16, 24),), (TEXT, 64), _anima_ids,
        shrink=_small_anima_adapter,
    ),
    "hidream": Family(
        "HiDream", HIDREAM, (IMAGE,), (TEXT, 64),
        lambda rand: {"pooled_output": rand(1, 64), "conditioning_llama3": rand(1, 3, 17, 64)},
    ),
    "hunyuan3d2": Family("Hunyuan3Dv2", HUNYUAN3D2, ((1, 64, 48),), (TEXT, 64)),
    "hunyuan3d2_1": Family("Hunyuan3Dv2_1", HUNYUAN3D2_1, ((1, 64, 48),), (TEXT, 64)),
    "ace_step": Family("ACEStep", ACE_STEP, ((1, 8, 16, 48),), (TEXT, 64), _ace_lyrics, shrink=_small_ace_lyrics),
    "minimax_h3": Family(
        "MiniMaxH3", MINIMAX_H3, ((1, 24, 3, 4, 6), (1, 32, 2, 11)), (TEXT, 64), shrink=_set_rope_frequencies,
        from_file=True,
    ),
    "kandinsky5": Family("Kandinsky5", KANDINSKY5, (VIDEO,), (TEXT, 3584), _pooled(768), from_file=True),
    "omnigen2": Family(
        "Omnigen2", OMNIGEN2, (IMAGE,), (TEXT, 64),
        lambda rand: {"attention_mask": _mask(TEXT), "reference_latents": [rand(1, 16, 8, 8)]},
    ),
    "sd15": Family("SD15", SD15, ((1, 4, 16, 24),), (77, 64)),
    "sdxl": Family("SDXL", SDXL, ((1, 4, 16, 24),), (77, 64), _pooled(64)),
}  # fmt: skip
