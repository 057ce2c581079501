"""Two nodes for the embedded model: a caption to CONDITIONING, and its latents to pictures.

Their ids do not begin with "Attention": the search for nodes would list them before the nodes that people look for.
The ids that did stay for graphs that have them, deprecated, so that search and menus do not offer them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from comfy_api.latest import io

from ..demo import captions, latents
from .inputs import wrong_link

CATEGORY = "attention/demo"


class TinyShapesCaption(io.ComfyNode):
    """Caption in, CONDITIONING of the embedded model out; a fixed table instead of a text encoder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TinyShapesCaption",
            display_name="Demo Caption",
            category=CATEGORY,
            description=(
                "Turns a caption into conditioning for the embedded demo models: tiny_shapes_wan draws a picture, "
                "tiny_motion_wan a clip of moving shapes. Leave it empty for the negative prompt. Known words: "
                + ", ".join(captions.vocabulary())
                + "."
            ),
            inputs=[
                io.String.Input(
                    "caption",
                    default="a large red circle on the left",
                    tooltip=(
                        "A picture: a small blue star at the top right on beige. A clip: a small blue star moving left "
                        "slowly from the right on beige, or a red ring moving up and a blue star moving left."
                    ),
                )
            ],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def validate_inputs(cls, caption: Any) -> bool | str:
        """Say before the graph runs which words the model does not know."""
        if not isinstance(caption, str):
            return True  # connected to another node: known only when it runs
        try:
            captions.encode(caption)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, caption: str) -> io.NodeOutput:
        return io.NodeOutput([[captions.encode(caption).unsqueeze(0), {}]])


class TinyShapesImage(io.ComfyNode):
    """LATENT of the embedded model in, IMAGE out: one latent cell is one pixel, enlarged without smoothing."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TinyShapesImage",
            display_name="Demo Latent To Image",
            category=CATEGORY,
            description=(
                "Shows latents of the embedded demo models. They have no VAE: a picture is Wan's linear preview of the "
                "latent, one pixel a cell; a clip gives one picture a frame."
            ),
            inputs=[
                io.Latent.Input("samples"),
                io.Int.Input("scale", default=16, min=1, max=64, tooltip="Pixels of the picture per latent cell."),
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def validate_inputs(cls, input_types: Any = None) -> bool | str:
        return wrong_link(cls, input_types) or True

    @classmethod
    def execute(cls, samples: dict[str, Any], scale: int) -> io.NodeOutput:
        latent = samples["samples"]
        if latent.ndim != 5 or latent.shape[1] != latents.CHANNELS:
            raise ValueError(
                f"latent of shape {tuple(latent.shape)}: the demo model's are (batch, {latents.CHANNELS}, frames, "
                "height, width); use an empty video latent such as EmptyHunyuanLatentVideo"
            )
        frames = latents.latent_to_rgb(latents.process_in(latent)).flatten(0, 1)
        return io.NodeOutput(frames.repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2).cpu())


class AttentionDemoCaption(TinyShapesCaption):
    """`TinyShapesCaption` by the id that it had first."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return replace(super().define_schema(), node_id="AttentionDemoCaption", is_deprecated=True)


class AttentionDemoImage(TinyShapesImage):
    """`TinyShapesImage` by the id that it had first."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return replace(super().define_schema(), node_id="AttentionDemoImage", is_deprecated=True)
