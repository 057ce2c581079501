"""Which role each attention call has, per model family: a table, read by module path.

ComfyUI's hook does not say whether a call is self- or cross-attention, and shapes do not decide it (equal
lengths, guide tokens, cached keys). The path of the module whose forward makes the call does. A module that makes
several calls lists one role for each, in order; the last one repeats.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ...backends.values.roles import CROSS as CROSS
from ...backends.values.roles import IMAGE_SELF, JOINT, LTX2_PATHS, TEXT_SELF
from ...backends.values.roles import SELF as SELF
from ...backends.values.roles import Family as Family
from ...backends.values.roles import Role as Role
from ...backends.values.roles import block_of as block_of
from ...backends.values.roles import guess as guess
from ...backends.values.roles import roles_at as roles_at

EVERY_CALL = "every attention call of this model"

FAMILIES: tuple[Family, ...] = (
    Family(
        "wan",
        ("WanModel",),
        (
            (r"blocks\.\d+\.self_attn", (SELF,)),  # Animate 2: of the pose's branch too
            # With a start image the picture's keys come first, then the text's.
            (r"blocks\.\d+\.cross_attn:WanI2VCrossAttention", (Role("wan.image_cross", "cross"), CROSS)),
            (r"blocks\.\d+\.cross_attn", (CROSS,)),
            (r"vace_blocks\.\d+\.self_attn", (Role("wan.vace_self", "self"),)),
            (r"vace_blocks\.\d+\.cross_attn", (Role("wan.vace_cross", "cross"),)),
            (r"blocks\.\d+\.audio_cross_attn_wrapper\.audio_cross_attn", (Role("wan.audio_cross", "cross"),)),  # HuMo
            (r"blocks\.\d+", (CROSS,)),  # the autoregressive model, once it has cached the text's keys
        ),
        bypass="the face blocks of Wan Animate, the audio injector of Wan S2V, the music blocks and injector of "
        "WanDancer, the audio layers of MultiTalk",
    ),
    Family(
        "flux",  # FLUX.1, FLUX.2, Chroma: text first, then the picture
        ("Flux", "Chroma"),
        (
            (r"double_blocks\.\d+", (Role("flux.double", "joint"),)),
            (r"single_blocks\.\d+", (Role("flux.single", "joint"),)),
        ),
    ),
    Family(
        "aura_flow",
        ("aura.mmdit.MMDiT",),
        ((r"(double|single)_layers\.\d+\.attn", (JOINT,)),),
    ),
    Family(
        "sd3",
        ("MMDiT",),
        # SD3.5 medium: the second call of a block is the picture alone.
        ((r"joint_blocks\.\d+", (JOINT, Role("sd3.image_self", "self"))),),
        bypass="the context processor",
        preferred_at=("x_block.attn", "x_block.attn2"),
    ),
    Family(
        "qwen_image_21",  # a call for each stretch of text, which sees what stands before it, and for each picture
        ("QwenImage21Transformer2DModel",),
        ((r"transformer_blocks\.\d+\.attn", (JOINT,)),),
    ),
    Family(
        "qwen_image",
        ("QwenImageTransformer2DModel",),
        ((r"transformer_blocks\.\d+\.attn", (JOINT,)),),
        mask_argument="encoder_hidden_states_mask",
    ),
    Family(
        "mage_flow",  # made of Qwen-Image's blocks
        ("MageFlowTransformer2DModel",),
        ((r"transformer_blocks\.\d+\.attn", (JOINT,)),),
        mask_argument="encoder_hidden_states_mask",
    ),
    Family(
        "ltx2",
        ("LTXAVModel",),
        LTX2_PATHS,
        bypass="the text connectors, which run before sampling",
    ),
    Family(
        "ltxv",
        ("LTXVModel", "LTXBaseModel"),
        (
            (r"transformer_blocks\.\d+\.attn1", (SELF,)),
            (r"transformer_blocks\.\d+\.attn2", (CROSS,)),
        ),
    ),
    Family(
        "hunyuan_video",  # 1.0 and 1.5
        ("HunyuanVideo",),
        (
            (r"txt_in\.individual_token_refiner\.blocks\.\d+", (TEXT_SELF,)),
            (r"double_blocks\.\d+", (Role("hunyuan_video.double", "joint"),)),
            (r"single_blocks\.\d+", (Role("hunyuan_video.single", "joint"),)),
        ),
    ),
    Family(
        "lumina2",  # Lumina 2 and Z-Image
        ("NextDiT",),
        (
            (r"context_refiner\.\d+\.attention", (TEXT_SELF,)),
            (r"(noise_refiner|siglip_refiner)\.\d+\.attention", (IMAGE_SELF,)),
            (r"layers\.\d+\.attention", (JOINT,)),
        ),
    ),
    Family(
        "cosmos",
        ("GeneralDIT",),
        (
            (r"blocks\.block\d+\.blocks\.0\.block\.attn", (SELF,)),
            (r"blocks\.block\d+\.blocks\.1\.block\.attn", (CROSS,)),
        ),
    ),
    Family(
        "cosmos_predict2",  # Predict2 and Anima
        ("MiniTrainDIT",),
        ((r"blocks\.\d+\.self_attn", (SELF,)), (r"blocks\.\d+\.cross_attn", (CROSS,))),
        bypass="Anima's text adapter",
    ),
    Family(
        "hidream",  # picture first, then text
        ("HiDreamImageTransformer2DModel",),
        ((r"(double|single)_stream_blocks\.\d+\.block\.attn1", (JOINT,)),),
    ),
    Family(
        "hidream_o1",  # one stream; what is causal in it does not reach the hook
        ("HiDreamO1Transformer",),
        ((r"language_model\.layers\.\d+\.self_attn", (JOINT,)),),
        bypass="the causal part of attention, which is the prompt's, and the vision model",
    ),
    Family("hunyuan3d", ("Hunyuan3Dv2",), ((r"(double|single)_blocks\.\d+", (JOINT,)),)),
    Family("hunyuan3d_2_1", ("HunYuanDiTPlain",), (), bypass=EVERY_CALL),
    Family(
        "ace_step",
        ("ACEStepTransformer2DModel",),
        ((r"transformer_blocks\.\d+\.cross_attn", (CROSS,)),),
        bypass="self-attention, which is linear in this model, and the lyric encoder",
    ),
    Family(
        "minimax_h3",
        ("MiniMaxH3Model",),
        (
            (r"blocks\.\d+\.attn", (JOINT,)),
            (r"token_refiner\.blocks\.\d+\.attn", (TEXT_SELF,)),
        ),
        bypass="the token refiner, which runs before sampling",
    ),
    Family(
        "kandinsky5",
        ("Kandinsky5",),
        (
            (r"text_transformer_blocks\.\d+\.self_attention", (TEXT_SELF,)),
            (r"visual_transformer_blocks\.\d+\.self_attention", (SELF,)),
            (r"visual_transformer_blocks\.\d+\.cross_attention", (CROSS,)),
        ),
    ),
    Family(
        "omnigen2",
        ("OmniGen2Transformer2DModel",),
        (
            (r"context_refiner\.\d+\.attn", (TEXT_SELF,)),
            (r"(noise_refiner|ref_image_refiner)\.\d+\.attn", (IMAGE_SELF,)),
            (r"layers\.\d+\.attn", (JOINT,)),
        ),
    ),
    Family(
        "boogu",
        ("BooguTransformer2DModel",),
        (
            (r"context_refiner\.\d+\.attn", (TEXT_SELF,)),
            (r"(noise_refiner|ref_image_refiner)\.\d+\.attn", (IMAGE_SELF,)),
            (r"double_stream_layers\.\d+\.img_instruct_attn\.processor", (JOINT,)),
            (r"double_stream_layers\.\d+\.img_self_attn", (IMAGE_SELF,)),
            (r"single_stream_layers\.\d+\.attn", (JOINT,)),
        ),
    ),
    Family("lens", ("LensTransformer2DModel",), ((r"transformer_blocks\.\d+\.attn", (JOINT,)),)),
    Family("joyimage", ("JoyImageTransformer3DModel",), ((r"double_blocks\.\d+\.attn", (JOINT,)),)),
    Family("ideogram4", ("Ideogram4Transformer2DModel",), ((r"layers\.\d+\.attention", (JOINT,)),)),
    Family(
        "krea2",
        ("SingleStreamDiT",),
        (
            (r"txtfusion\.(layerwise|refiner)_blocks\.\d+\.attn", (TEXT_SELF,)),
            (r"blocks\.\d+\.attn", (JOINT,)),
        ),
    ),
    Family(
        "pixeldit",
        ("PixDiT_T2I",),
        ((r"patch_blocks\.\d+\.attn", (JOINT,)), (r"pixel_blocks\.\d+\.attn", (IMAGE_SELF,))),
    ),
    Family("cogvideo", ("CogVideoXTransformer3DModel",), ((r"blocks\.\d+", (JOINT,)),)),
    Family(
        "mochi",
        ("AsymmDiTJoint",),
        ((r"blocks\.\d+\.attn", (JOINT,)),),
        bypass="the pooling of the text",
    ),
    Family(
        "cascade",  # stages B and C: the picture looks at itself and the text in one call
        ("StageB", "StageC"),
        ((r"(down|up)_blocks\.\d+\.\d+\.attention\.attn", (JOINT,)),),
    ),
    Family(
        "stable_audio",
        ("AudioDiffusionTransformer",),
        (
            (r"transformer\.layers\.\d+\.self_attn", (SELF,)),
            (r"transformer\.layers\.\d+\.cross_attn", (CROSS,)),
        ),
    ),
    Family(
        "triposplat",
        ("LatentSeqMMFlowModel",),
        (
            (r"context_refiner\.\d+\.attn", (Role("triposplat.condition_self", "self"),)),
            (r"noise_refiner\.\d+\.attn", (SELF,)),
            (r"blocks\.\d+\.attn", (JOINT,)),
        ),
    ),
    Family(
        "trellis2",
        ("Trellis2",),
        (
            (r"(?:\w+\.)?blocks\.\d+\.self_attn", (SELF,)),
            (r"(?:\w+\.)?blocks\.\d+\.cross_attn(?:\.cross_attn_block)?", (CROSS,)),
        ),
    ),
    *(
        Family(name, (diffusion_model,), (), bypass=EVERY_CALL)
        for name, diffusion_model in (
            ("ace_step_15", "AceStepConditionGenerationModel"),
            ("depth_anything_3", "DepthAnything3Net"),
            ("ernie", "ErnieImageModel"),
            ("hunyuan_dit", "HunYuanDiT"),
            ("minimax_music", "MiniMaxMusic3DiT"),
            ("pixart", "PixArtMS"),
            ("rt_detr", "RTv4"),
            ("sam3", "SAM3Model"),
            ("seedvr", "NaDiT"),
        )
    ),
    Family(
        "unet",  # SD 1.x, SD 2.x, SDXL, SVD
        ("UNetModel",),
        (
            (r".*transformer_blocks\.\d+\.attn1", (SELF,)),
            (r".*transformer_blocks\.\d+\.attn2", (CROSS,)),
            (r".*time_stack\.\d+\.attn1", (Role("unet.time_self", "self"),)),
            (r".*time_stack\.\d+\.attn2", (Role("unet.time_cross", "cross"),)),
            # A patch that replaces attention calls it from the block itself: only lengths tell.
        ),
        bypass="the layers of GLIGEN",
    ),
)


CONTROLNETS = "ControlNets, which run as models of their own"
"""ComfyUI gives them no `transformer_options` (comfy/controlnet.py calls `control_model` without)."""

ONLY_IN: Mapping[str, str] = {
    "the face blocks of Wan Animate": "AnimateWanModel",
    "the audio injector of Wan S2V": "WanModel_S2V",
    "the music blocks and injector of WanDancer": "WanDancerModel",
    "the audio layers of MultiTalk": "MultiTalk",
    "the layers of GLIGEN": "gligen",
}
"""Parts of a family's `bypass` that not each of its models has -> a part of the name of their model's or patch's class
or module."""


def bypass_of(family: Family | None, names: str, controlled: bool = False) -> str:
    """What the run report cannot count in this model; empty if that is nothing.

    Args:
        names: of the classes of the model and of its patches, with their modules.
        controlled: a ControlNet takes part.
    """
    own = re.split(r", (?=the )", family.bypass) if family is not None and family.bypass else []
    parts = [part for part in own if ONLY_IN.get(part, "") in names]
    return "; ".join(filter(None, (", ".join(parts), CONTROLNETS if controlled else "")))


def family_of(class_names: tuple[str, ...]) -> Family | None:
    """The family of a diffusion model from the names of its class and bases, alone or with their modules'.

    None when unknown.
    """
    return next((family for family in FAMILIES if set(family.classes) & set(class_names)), None)


def known_roles() -> tuple[str, ...]:
    """Every role of the table, the categories first, then the families' own in their order."""
    found = [role.name for family in FAMILIES for _, roles in family.roles_at_paths for role in roles]
    return tuple(dict.fromkeys((SELF.name, CROSS.name, JOINT.name, *found)))
