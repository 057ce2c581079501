"""Tiny diffusion models of ComfyUI that are called without a sampler: a model call each, and where its attention is.

For families whose conditioning takes much beside the model; those that are sampled are in tiny_models.py. A row says
which class to build, with what, and makes the arguments of one call from `rand(*shape)`. Nothing here imports ComfyUI.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

TEXT = 20


@dataclass(frozen=True)
class Forward:
    """One model: its class in `comfy.ldm`, how to build it, its call, and the role of each place of attention.

    roles: regular expression over the module's path -> role of its calls, several with `|`. calls: how many reach the
    hook. stored: buffers that a checkpoint holds instead of the model computing them.
    """

    place: str
    build: dict[str, Any]
    call: Callable[[Any], dict[str, Any]]
    roles: dict[str, str]
    calls: int
    stored: tuple[str, ...] = ()


def _time(rand: Any) -> Any:
    return rand(1).abs().clamp(max=1)


def _positions(rand: Any, length: int) -> Any:
    return (rand(1, length) * 0).long() + (rand(length) * 0 + 1).cumsum(0).long()


IMAGE = (1, 16, 8, 12)

FORWARDS: dict[str, Forward] = {
    "krea2": Forward(
        "krea2.model:SingleStreamDiT",
        {"features": 128, "tdim": 32, "txtdim": 64, "heads": 4, "kvheads": 2, "multiplier": 2, "layers": 2,
         "txtlayers": 2, "txtheads": 2, "txtkvheads": 2},
        lambda rand: {"x": rand(*IMAGE), "timesteps": _time(rand), "context": rand(1, TEXT, 128)},
        {r"txtfusion\.(layerwise|refiner)_blocks\.\d+\.attn": "text_self", r"blocks\.\d+\.attn": "joint"}, 6,
    ),
    "lens": Forward(
        "lens.model:LensTransformer2DModel",
        {"in_channels": 16, "out_channels": 4, "num_layers": 2, "num_attention_heads": 2, "enc_hidden_dim": 32,
         "selected_layer_index": (0, 1)},
        lambda rand: {"x": rand(*IMAGE), "timestep": _time(rand), "context": rand(1, TEXT, 64)},
        {r"transformer_blocks\.\d+\.attn": "joint"}, 2,
    ),
    "boogu": Forward(
        "boogu.model:BooguTransformer2DModel",
        {"hidden_size": 240, "num_layers": 2, "num_double_stream_layers": 2, "num_refiner_layers": 1,
         "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 16, "instruction_feat_dim": 32},
        lambda rand: {"x": rand(*IMAGE), "timesteps": _time(rand), "context": rand(1, TEXT, 32), "num_tokens": TEXT},
        {r"context_refiner\.\d+\.attn": "text_self", r"noise_refiner\.\d+\.attn": "image_self",
         r"double_stream_layers\.\d+\.img_instruct_attn\.processor": "joint",
         r"double_stream_layers\.\d+\.img_self_attn": "image_self", r"single_stream_layers\.\d+\.attn": "joint"}, 8,
    ),
    "joyimage": Forward(
        "joyimage.model:JoyImageTransformer3DModel",
        {"hidden_size": 256, "num_attention_heads": 2, "text_dim": 32, "num_layers": 2},
        lambda rand: {"hidden_states": rand(1, 16, 1, 8, 12), "timestep": _time(rand), "context": rand(1, TEXT, 32),
                      "transformer_options": {}},
        {r"double_blocks\.\d+\.attn": "joint"}, 2,
    ),
    "ideogram4": Forward(
        "ideogram4.model:Ideogram4Transformer2DModel",
        {"in_channels": 16, "num_layers": 2, "num_attention_heads": 1, "attention_head_dim": 128,
         "intermediate_size": 64, "adaln_dim": 16, "llm_features_dim": 32},
        lambda rand: {"x": rand(*IMAGE), "timesteps": _time(rand), "context": rand(1, TEXT, 32)},
        {r"layers\.\d+\.attention": "joint"}, 2,
    ),
    "pixeldit": Forward(
        "pixeldit.model:PixDiT_T2I",
        {"num_groups": 2, "hidden_size": 64, "pixel_attn_hidden_size": 32, "pixel_num_groups": 2, "patch_depth": 2,
         "txt_embed_dim": 32},
        lambda rand: {"x": rand(1, 3, 32, 48), "timesteps": _time(rand), "context": rand(1, TEXT, 32)},
        {r"patch_blocks\.\d+\.attn": "joint", r"pixel_blocks\.\d+\.attn": "image_self"}, 4,
    ),
    "cogvideo": Forward(
        "cogvideo.model:CogVideoXTransformer3DModel",
        {"num_attention_heads": 2, "text_embed_dim": 32, "num_layers": 2, "time_embed_dim": 32,
         "use_rotary_positional_embeddings": True},
        lambda rand: {"x": rand(1, 16, 3, 8, 12), "timestep": _time(rand), "context": rand(1, TEXT, 32)},
        {r"blocks\.\d+": "joint"}, 2,
    ),
    "cascade_c": Forward(
        "cascade.stage_c:StageC",
        {"c_cond": 32, "c_hidden": [32, 32], "nhead": [2, 2], "blocks": [[1, 1], [1, 1]], "c_clip_text": 32,
         "c_clip_text_pooled": 32, "c_clip_img": 32},
        lambda rand: {"x": rand(*IMAGE), "r": _time(rand), "clip_text": rand(1, TEXT, 32),
                      "clip_text_pooled": rand(1, 1, 32), "clip_img": rand(1, 1, 32)},
        {r"(down|up)_blocks\.\d+\.\d+\.attention\.attn": "joint"}, 4,
    ),
    "stable_audio": Forward(
        "audio.dit:AudioDiffusionTransformer",
        {"embed_dim": 128, "cond_token_dim": 64, "global_cond_dim": 32, "depth": 2, "num_heads": 2},
        lambda rand: {"x": rand(1, 64, 40), "timestep": _time(rand), "context": rand(1, TEXT, 64),
                      "global_embed": rand(1, 32)},
        {r"transformer\.layers\.\d+\.self_attn": "self", r"transformer\.layers\.\d+\.cross_attn": "cross"}, 4,
        ("transformer.rotary_pos_emb.inv_freq",),
    ),
    "aura_flow": Forward(
        "aura.mmdit:MMDiT",
        {"dim": 64, "n_layers": 3, "n_double_layers": 1, "n_heads": 2, "global_conddim": 64, "cond_seq_dim": 32},
        lambda rand: {"x": rand(1, 4, 8, 12), "timestep": _time(rand), "context": rand(1, TEXT, 32)},
        {r"(double|single)_layers\.\d+\.attn": "joint"}, 3,
    ),
    "mage_flow": Forward(
        "mage_flow.model:MageFlowTransformer2DModel",
        {"in_channels": 16, "out_channels": 16, "num_layers": 2, "num_attention_heads": 1, "joint_attention_dim": 32},
        lambda rand: {"x": rand(*IMAGE), "timestep": _time(rand), "context": rand(1, TEXT, 32)},
        {r"transformer_blocks\.\d+\.attn": "joint"}, 2,
    ),
    "triposplat": Forward(
        "triposplat.model:LatentSeqMMFlowModel",
        {"q_token_length": 24, "model_channels": 64, "cond_channels": 32, "num_blocks": 2, "num_refiner_blocks": 1,
         "cond2_channels": None, "num_head_channels": 32},
        lambda rand: {"x": [rand(1, 24, 16), rand(1, 1, 5)], "t": _time(rand), "context": rand(1, TEXT, 32)},
        {r"context_refiner\.\d+\.attn": "triposplat.condition_self", r"noise_refiner\.\d+\.attn": "self",
         r"blocks\.\d+\.attn": "joint"}, 4,
    ),
    # The attention function is made by the model and handed to each block of a language model.
    "hidream_o1": Forward(
        "hidream_o1.model:HiDreamO1Transformer",
        {"text_config_overrides": {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
                                   "num_attention_heads": 2, "num_key_value_heads": 1},
         "vision_config_overrides": {"hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "depth": 1,
                                     "num_position_embeddings": 16, "deepstack_visual_indexes": ()}},
        lambda rand: {"x": rand(1, 3, 64, 96), "timesteps": _time(rand), "input_ids": _positions(rand, TEXT),
                      "position_ids": _positions(rand, TEXT + 6).expand(1, 3, -1), "ar_len": TEXT},
        {r"language_model\.layers\.\d+\.self_attn": "joint"}, 2,
    ),
    "wan_animate2": Forward(
        "wan.model_animate2:WanAnimate2Model",
        {"in_dim": 36, "dim": 256, "ffn_dim": 64, "freq_dim": 64, "text_dim": 32, "num_heads": 2, "num_layers": 2},
        lambda rand: {"x": rand(1, 36, 4, 8, 12), "timestep": _time(rand), "context": rand(1, TEXT, 32),
                      "pose_latents": rand(1, 16, 3, 8, 12)},
        {r"blocks\.\d+\.self_attn": "self", r"blocks\.\d+\.cross_attn": "wan.image_cross|cross"}, 18,
    ),
    "wan_autoregressive": Forward(
        "wan.ar_model:CausalWanModel",
        {"dim": 256, "ffn_dim": 64, "freq_dim": 64, "text_dim": 32, "num_heads": 2, "num_layers": 2, "in_dim": 16},
        lambda rand: {"x": rand(1, 16, 1, 8, 12), "timestep": _time(rand), "context": rand(1, TEXT, 32)},
        {r"blocks\.\d+\.self_attn": "self", r"blocks\.\d+\.cross_attn": "cross"}, 4,
    ),
    "wan_humo": Forward(
        "wan.model:HumoWanModel",
        {"model_type": "t2v", "in_dim": 16, "dim": 256, "ffn_dim": 64, "freq_dim": 64, "text_dim": 32, "num_heads": 2,
         "num_layers": 2},
        lambda rand: {"x": rand(1, 16, 3, 8, 12), "timestep": _time(rand), "context": rand(1, TEXT, 32),
                      "audio_embed": rand(1, 9, 8, 5, 1280)},
        {r"blocks\.\d+\.self_attn": "self", r"blocks\.\d+\.cross_attn": "cross",
         r"blocks\.\d+\.audio_cross_attn_wrapper\.audio_cross_attn": "wan.audio_cross"}, 6,
    ),
}  # fmt: skip
