"""Where the tokens of attention calls stand: a table, read by family and role, beside that of the roles.

The grid is frames x height x width of the tokens inside the model: the latent of the model call divided by the patch
size, rounded up as the models pad. It comes from the model call's own input, not from the sampler's latent, so context
windows, tiles and areas have grids of their own. Other tokens stand before or after the grid: a prompt, reference
latents, padding. Methods compare the sum with the length of each call (`backends/sparse/method.Grid`); a family that is
not in the table has no grid.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import ceil, prod
from typing import Any, NamedTuple

import torch

from ...backends.values.grid import OFF_GRID, TokenGrid
from .estimated_calls import patch_size

Sizes = tuple[int, int, int]


@dataclass(frozen=True)
class Others:
    """Tokens beside the grid that one input of the model becomes."""

    name: str
    """Of the input, as `apply_model` gets it; `c_crossattn` is the prompt."""
    kind: str = "text"
    """`text`: a token for each row. `latents`: one latent or a list, each cut into patches like the model's own.
    `keyframes`: a token for each position; they are the last frames of the latent itself. `motion`: see `_motion`."""
    needs: str = ""
    """An attribute of the model; where it is None, the model leaves the input out."""


PROMPT = Others("c_crossattn")
REFERENCES = Others("ref_latents", "latents")


@dataclass(frozen=True)
class Layout:
    """Where the tokens of some roles of a family stand."""

    roles: tuple[str, ...]
    before: tuple[Others, ...] = ()
    after: tuple[Others, ...] = ()
    classes: tuple[str, ...] = ()
    """Only in models of these classes."""
    rest: str = ""
    """Tokens that no input tells: they stand `before` or `after` the grid."""
    rest_with: str = ""
    """The input with which there are such tokens, before the grid."""
    multiple: str = ""
    """The attribute of the model with the number to whose multiple prompt, grid and each reference are padded."""


IN_FRAMES = (Others("time_dim_concat", "latents"),)
WAN_REFERENCE = Others("reference_latent", "latents")

LAYOUTS: Mapping[str, tuple[Layout, ...]] = {
    "wan": (
        Layout(
            ("self",), after=(*IN_FRAMES, WAN_REFERENCE, Others("reference_motion", "motion")),
            classes=("WanModel_S2V",),
        ),
        Layout(("self",), after=(*IN_FRAMES, WAN_REFERENCE), classes=("HumoWanModel",)),
        Layout(
            ("self",), before=(WAN_REFERENCE,), after=(*IN_FRAMES, Others("pose_latents", "latents")),
            classes=("SCAILWanModel",),
        ),
        Layout(("wan.vace_self",)),
        Layout(
            ("self",), before=(Others("reference_latent", "latents", needs="ref_conv"),),
            after=(*IN_FRAMES, Others("context_latents", "latents")),
        ),
    ),
    "flux": (Layout(("flux.double", "flux.single"), before=(PROMPT,), after=(REFERENCES,)),),
    "qwen_image": (Layout(("joint",), before=(PROMPT,), after=(REFERENCES,)),),
    "hunyuan_video": (
        Layout(
            ("hunyuan_video.double", "hunyuan_video.single"),
            before=(
                Others("clip_fea", needs="vision_in"), Others("txt_byt5", needs="byt5_in"), PROMPT,
                Others("ref_latent", "latents"),
            ),
        ),
    ),
    "lumina2": (
        # With references: their prompts and pictures too. The picture is always last.
        Layout(("joint",), before=(PROMPT,), rest_with="ref_latents", multiple="pad_tokens_multiple"),
        Layout(("image_self",), before=(REFERENCES,), multiple="pad_tokens_multiple"),
    ),
    "ltxv": (Layout(("self",), after=(Others("keyframe_idxs", "keyframes"),)),),
    "ltx2": (Layout(("self",), after=(Others("keyframe_idxs", "keyframes"),)),),
    "cosmos": (Layout(("self",)),),
    "cosmos_predict2": (Layout(("self",)),),
    "kandinsky5": (Layout(("self",)),),
    # Prompt, keyframes, references and sound, whose numbers follow from several inputs; the video is always last.
    "minimax_h3": (Layout(("joint",), rest="before"),),
    "cogvideo": (Layout(("joint",), before=(PROMPT,)),),
    "mochi": (Layout(("joint",), rest="after"),),  # the prompt, cut to the longest of the batch
    "sd3": (Layout(("joint",), before=(PROMPT,)), Layout(("sd3.image_self",))),
    "omnigen2": (Layout(("joint",), rest="before"),),
}  # fmt: skip
"""Family (`roles.FAMILIES`) -> its layouts; the first one that names a role, and fits the model's class, has it."""

WITHOUT_GRID = ("text_self", "image_self", "ltx2.audio_self")
"""Roles without a grid where no layout above names them: text or sound alone, and the picture and each reference in
turn (OmniGen2). Nothing is known of other roles, such as guessed ones.
"""


class Placed(NamedTuple):
    """The grid of some roles in one model call."""

    roles: tuple[str, ...]
    grid: TokenGrid
    rest: str = ""


Grids = tuple[Placed, ...]


def grids_of(diffusion_model: torch.nn.Module, family: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Grids:
    """The grids of a model call; empty where the family is not in the table.

    Args:
        args, kwargs: of `BaseModel.apply_model`.
    """
    layouts = LAYOUTS.get(family, ())
    model = getattr(diffusion_model, "_orig_mod", diffusion_model)
    given = {"c_crossattn": args[3] if len(args) > 3 else None, **kwargs}
    shapes = given.get("latent_shapes")  # several latents packed into one: video, then sound
    shape = tuple(shapes[0]) if shapes and len(shapes) > 1 else tuple(args[0].shape)
    if not layouts or not 4 <= len(shape) <= 5:
        return ()
    names = {base.__name__ for base in type(model).__mro__}
    patch = patch_size(model)
    return tuple(
        placed
        for layout in layouts
        if not layout.classes or names & set(layout.classes)
        for placed in [_placed(layout, model, patch, patches(shape, patch), given)]
    )


def _placed(layout: Layout, model: Any, patch: tuple[int, ...], sizes: Sizes, given: Mapping[str, Any]) -> Placed:
    frames, height, width = sizes
    multiple = getattr(model, layout.multiple, None) if layout.multiple else None
    before, after = (
        sum(_padded(count, multiple) for other in others for count in _tokens(other, model, patch, given))
        for others in (layout.before, layout.after)
    )
    rest = layout.rest
    keyframes = [other for other in layout.after if other.kind == "keyframes"]
    guides = sum(count for other in keyframes for count in _tokens(other, model, patch, given)) // (height * width)
    if guides:  # they may be fewer in the call: what is masked is left out
        frames, after, rest = frames - guides, 0, "after"
    if layout.rest_with and given.get(layout.rest_with):
        rest = "before"
    if multiple:
        cells = frames * height * width
        after += _padded(cells, multiple) - cells
    return Placed(layout.roles, TokenGrid(frames, height, width, before, after), rest)


def _padded(count: int, multiple: int | None) -> int:
    return ceil(count / multiple) * multiple if multiple else count


def _tokens(other: Others, model: Any, patch: tuple[int, ...], given: Mapping[str, Any]) -> list[int]:
    """How many tokens each part of an input becomes; nothing without it."""
    value = given.get(other.name)
    if value is None or (other.needs and getattr(model, other.needs, None) is None):
        return []
    if other.kind == "latents":
        latents: Iterable[torch.Tensor] = value if isinstance(value, list | tuple) else (value,)
        return [prod(patches(tuple(latent.shape), patch)) for latent in latents]
    if other.kind == "keyframes":
        return [int(value.shape[2])]
    if other.kind == "motion":
        return [_motion(tuple(value.shape))]
    return [int(value.shape[1])]


def _motion(shape: tuple[int, ...]) -> int:
    """Tokens of the frames before the video in Wan S2V: 1, 2 and 16 of them, the older the coarser."""
    height, width = shape[-2:]
    return (height // 2) * (width // 2) + (height // 4) * (width // 4) + 4 * (height // 8) * (width // 8)


def patches(shape: tuple[int, ...], patch: tuple[int, ...]) -> Sizes:
    """Frames, height and width in tokens of a latent (batch, channels, [frames,] height, width)."""
    sizes, steps = (1, *shape[2:])[-3:], (1, 1, *patch)[-3:]
    frames, height, width = (ceil(size / step) for size, step in zip(sizes, steps, strict=True))
    return frames, height, width


def grid_of(grids: Grids, role: str, category: str, q_len: int) -> TokenGrid | None:
    """The grid of calls of a role; `OFF_GRID` where the table knows that there is none, None where it is unknown."""
    for roles, grid, rest in grids:
        if category == "cross":
            return grid._replace(queries_only=True)
        if role in roles:
            if rest:
                others = q_len - grid.tokens
                grid = grid._replace(**{rest: getattr(grid, rest) + others}) if others >= 0 else grid
            return grid
    return OFF_GRID if grids and role in WITHOUT_GRID else None
