"""What role and block each attention call of a tiny model has, for the tests to compare with.

Written from the models' own code and the lengths of the tiny models, without looking at nodes/hook/roles.py.
"""

from __future__ import annotations

import re

WAN = {r"blocks\.\d+\.self_attn": "self", r"blocks\.\d+\.cross_attn": "cross"}
FLUX = {r"double_blocks\.\d+": "flux.double", r"single_blocks\.\d+": "flux.single"}
LTX = {r"transformer_blocks\.\d+\.attn1": "self", r"transformer_blocks\.\d+\.attn2": "cross"}
HUNYUAN_VIDEO = {
    r"txt_in\.individual_token_refiner\.blocks\.\d+": "text_self",
    r"double_blocks\.\d+": "hunyuan_video.double",
    r"single_blocks\.\d+": "hunyuan_video.single",
}
PREDICT2 = {r"blocks\.\d+\.self_attn": "self", r"blocks\.\d+\.cross_attn": "cross"}
NEXT_DIT = {
    r"context_refiner\.\d+\.attention": "text_self",
    r"noise_refiner\.\d+\.attention": "image_self",
    r"layers\.\d+\.attention": "joint",
}
UNET = {r".*\.transformer_blocks\.\d+\.attn1": "self", r".*\.transformer_blocks\.\d+\.attn2": "cross"}

# Module path -> role; where one path makes calls of two roles, the number of keys tells them apart.
EXPECTED: dict[str, dict[str, str | dict[int, str]]] = {
    "wan": WAN,
    "wan_i2v": {**WAN, r"blocks\.\d+\.cross_attn": {257: "wan.image_cross", 20: "cross"}},
    "wan_vace": {
        **WAN, r"vace_blocks\.\d+\.self_attn": "wan.vace_self", r"vace_blocks\.\d+\.cross_attn": "wan.vace_cross",
    },
    "wan22_5b": WAN,
    "flux": FLUX,
    "flux_masked": FLUX,
    "flux2": FLUX,
    "chroma": FLUX,
    "sd3": {r"joint_blocks\.\d+": {116: "joint", 96: "sd3.image_self"}},
    "qwen_image": {r"transformer_blocks\.\d+\.attn": "joint"},
    "qwen_image_masked": {r"transformer_blocks\.\d+\.attn": "joint"},
    "ltxv": LTX,
    "ltxv_guide": LTX,
    "ltxav": {
        **LTX,
        r"transformer_blocks\.\d+\.audio_attn1": "ltx2.audio_self",
        r"transformer_blocks\.\d+\.audio_attn2": "ltx2.audio_text_cross",
        r"transformer_blocks\.\d+\.audio_to_video_attn": "ltx2.audio_to_video",
        r"transformer_blocks\.\d+\.video_to_audio_attn": "ltx2.video_to_audio",
    },
    "hunyuan_video": HUNYUAN_VIDEO,
    "hunyuan_video15": HUNYUAN_VIDEO,
    "lumina2": NEXT_DIT,
    "z_image": NEXT_DIT,
    "cosmos1": {
        r"blocks\.block\d+\.blocks\.0\.block\.attn": "self", r"blocks\.block\d+\.blocks\.1\.block\.attn": "cross",
    },
    "cosmos_predict2": PREDICT2,
    "anima": PREDICT2,
    "hidream": {r"(double|single)_stream_blocks\.\d+\.block\.attn1": "joint"},
    "hunyuan3d2": {r"(double|single)_blocks\.\d+": "joint"},
    "hunyuan3d2_1": {},
    "ace_step": {r"transformer_blocks\.\d+\.cross_attn": "cross"},
    "minimax_h3": {r"blocks\.\d+\.attn": "joint"},
    "kandinsky5": {
        r"text_transformer_blocks\.\d+\.self_attention": "text_self",
        r"visual_transformer_blocks\.\d+\.self_attention": "self",
        r"visual_transformer_blocks\.\d+\.cross_attention": "cross",
    },
    "omnigen2": {
        r"context_refiner\.\d+\.attn": "text_self",
        r"(noise|ref_image)_refiner\.\d+\.attn": "image_self",
        r"layers\.\d+\.attn": "joint",
    },
    "sd15": UNET,
    "sdxl": UNET,
}  # fmt: skip


def expected_role(name: str, path: str, kv_len: int) -> str:
    role = next(role for pattern, role in EXPECTED[name].items() if re.fullmatch(pattern, path))
    return role[kv_len] if isinstance(role, dict) else role


def expected_block(path: str) -> str:
    """The block is the first numbered part; Cosmos 1 writes the number into the name."""
    parts = path.split(".")
    return ".".join(parts[: 1 + next(i for i, part in enumerate(parts) if re.fullmatch(r"(block)?\d+", part))])
