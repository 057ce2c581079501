"""Which role each attention call of a Diffusers model has: a table, read by module path.

Names of roles are those of ComfyUI's table (`nodes/hook/roles.py`), so that one configuration serves both hosts. A
model without a row works, with roles that are guessed from paths and lengths.
"""

from __future__ import annotations

from ...backends.values.roles import CROSS, IMAGE_SELF, JOINT, LTX2_PATHS, SELF, TEXT_SELF, Family, Role

FAMILIES: tuple[Family, ...] = (
    Family(
        "wan",
        ("WanTransformer3DModel", "WanVACETransformer3DModel", "SkyReelsV2Transformer3DModel"),
        (
            (r"blocks\.\d+\.attn1", (SELF,)),
            # With a start image the picture's keys come first, then the text's (`AttentionModule.role`).
            (r"blocks\.\d+\.attn2:with_image", (Role("wan.image_cross", "cross"), CROSS)),
            (r"blocks\.\d+\.attn2", (CROSS,)),
            (r"vace_blocks\.\d+\.attn1", (Role("wan.vace_self", "self"),)),
            (r"vace_blocks\.\d+\.attn2", (Role("wan.vace_cross", "cross"),)),
        ),
    ),
    Family(
        "flux",  # text first, then the picture
        ("FluxTransformer2DModel", "Flux2Transformer2DModel", "ChromaTransformer2DModel"),
        (
            (r"transformer_blocks\.\d+\.attn", (Role("flux.double", "joint"),)),
            (r"single_transformer_blocks\.\d+\.attn", (Role("flux.single", "joint"),)),
        ),
    ),
    Family(
        "sd3",
        ("SD3Transformer2DModel",),
        (
            (r"transformer_blocks\.\d+\.attn", (JOINT,)),
            (r"transformer_blocks\.\d+\.attn2", (Role("sd3.image_self", "self"),)),
        ),
    ),
    Family("qwen_image", ("QwenImageTransformer2DModel",), ((r"transformer_blocks\.\d+\.attn", (JOINT,)),)),
    Family(
        "ltx2",
        ("LTX2VideoTransformer3DModel",),
        LTX2_PATHS,
    ),
    Family(
        "ltxv",
        ("LTXVideoTransformer3DModel",),
        ((r"transformer_blocks\.\d+\.attn1", (SELF,)), (r"transformer_blocks\.\d+\.attn2", (CROSS,))),
    ),
    Family(
        "hunyuan_video",  # 1.0 and 1.5
        ("HunyuanVideoTransformer3DModel", "HunyuanVideo15Transformer3DModel"),
        (
            (r"context_embedder\.token_refiner\.refiner_blocks\.\d+\.attn", (TEXT_SELF,)),
            (r"transformer_blocks\.\d+\.attn", (Role("hunyuan_video.double", "joint"),)),
            (r"single_transformer_blocks\.\d+\.attn", (Role("hunyuan_video.single", "joint"),)),
        ),
    ),
    Family(
        "lumina2",  # Lumina 2 and Z-Image
        ("ZImageTransformer2DModel", "Lumina2Transformer2DModel"),
        (
            (r"context_refiner\.\d+\.(attention|attn)", (TEXT_SELF,)),
            (r"(noise_refiner|siglip_refiner)\.\d+\.(attention|attn)", (IMAGE_SELF,)),
            (r"layers\.\d+\.(attention|attn)", (JOINT,)),
        ),
    ),
    Family("cogvideo", ("CogVideoXTransformer3DModel",), ((r"transformer_blocks\.\d+\.attn1", (JOINT,)),)),
    Family("mochi", ("MochiTransformer3DModel",), ((r"transformer_blocks\.\d+\.attn1", (JOINT,)),)),
    Family(
        "unet",  # SD 1.x, SD 2.x, SDXL, SVD, AnimateDiff
        ("UNet2DConditionModel", "UNet3DConditionModel", "UNetSpatioTemporalConditionModel", "UNetMotionModel"),
        (
            (r".*(temporal_transformer_blocks|motion_modules)\..*attn1", (Role("unet.time_self", "self"),)),
            (r".*(temporal_transformer_blocks|motion_modules)\..*attn2", (Role("unet.time_cross", "cross"),)),
            # With an IP adapter the text's keys come first, then each picture's.
            (r".*transformer_blocks\.\d+\.attn2:with_adapter", (CROSS, Role("unet.image_cross", "cross"))),
            (r".*transformer_blocks\.\d+\.attn1", (SELF,)),
            (r".*transformer_blocks\.\d+\.attn2", (CROSS,)),
        ),
    ),
    Family(
        "text_encoder",  # of transformers
        ("PreTrainedModel",),
        ((r".*EncDecAttention", (CROSS,)), (r".*(vision|visual).*", (IMAGE_SELF,)), (r".*", (TEXT_SELF,))),
    ),
    Family("vae", ("AutoencoderMixin",), ((r"(encoder|decoder)\.mid_block\.attentions\.\d+", (SELF,)),)),
)


def family_of(model: object) -> Family | None:
    """The family of a model by the names of its class and bases; None when unknown."""
    names = {base.__name__ for base in type(model).__mro__}
    return next((family for family in FAMILIES if names & set(family.classes)), None)


def known_roles() -> tuple[str, ...]:
    """Every role of the table."""
    found = [role.name for family in FAMILIES for _, roles in family.roles_at_paths for role in roles]
    return tuple(dict.fromkeys(found))
