"""Roles of attention calls, and how a table of a model family says which module makes calls of which role.

The tables belong to the hosts, whose modules have other paths: ComfyUI's in `nodes/hook/roles.py`, Diffusers' in
`integrations/diffusers/roles.py`. Names of roles are the same in both.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple


class Role(NamedTuple):
    """A role and the category it falls back to: `self`, `cross` or `joint`."""

    name: str
    category: str
    guessed: bool = False


CATEGORIES = ("self", "cross", "joint")
SELF = Role("self", "self")
CROSS = Role("cross", "cross")
JOINT = Role("joint", "joint")
TEXT_SELF = Role("text_self", "self")
IMAGE_SELF = Role("image_self", "self")
LTX2_PATHS = (
    (r"transformer_blocks\.\d+\.attn1", (SELF,)),
    (r"transformer_blocks\.\d+\.attn2", (CROSS,)),
    (r"transformer_blocks\.\d+\.audio_attn1", (Role("ltx2.audio_self", "self"),)),
    (r"transformer_blocks\.\d+\.audio_attn2", (Role("ltx2.audio_text_cross", "cross"),)),
    (r"transformer_blocks\.\d+\.audio_to_video_attn", (Role("ltx2.audio_to_video", "cross"),)),
    (r"transformer_blocks\.\d+\.video_to_audio_attn", (Role("ltx2.video_to_audio", "cross"),)),
)
"""LTX-2's modules have the same paths in ComfyUI and in Diffusers."""


def category_of(role: str) -> str:
    """The category of a role, guessed from its name."""
    if role in CATEGORIES:
        return role
    if role.endswith((".single", ".double")):  # FLUX, HunyuanVideo: text and picture together
        return "joint"
    return "cross" if "cross" in role or "_to_" in role else "self"


@dataclass(frozen=True)
class Family:
    """A model family: how to know it, the roles of its attention modules, and what never reaches the hook."""

    name: str
    classes: tuple[str, ...]
    """Class names of the diffusion model or any of its bases; with the end of its module where two share a name."""
    roles_at_paths: tuple[tuple[str, tuple[Role, ...]], ...]
    """Regular expression over `path` or `path:ModuleClass`, and the roles of the calls its forward makes."""
    bypass: str = ""
    """Attention of this family that the host does not route."""
    preferred_at: tuple[str, ...] = ()
    """Below an attention module: the modules whose preferred attention its calls are made with, in order."""
    mask_argument: str = ""
    """Where each block makes its mask anew: the argument of the attention module's forward that it makes it from."""


def roles_at(family: Family | None, path: str, module_class: str) -> tuple[Role, ...]:
    """The roles of the calls made by the module at `path`, in order; empty when the table does not know it."""
    if family is None:
        return ()
    for pattern, roles in family.roles_at_paths:
        if re.fullmatch(pattern, f"{path}:{module_class}" if ":" in pattern else path):
            return roles
    return ()


def guess(path: str, q_len: int, kv_len: int) -> Role:
    """A role for a call that the table does not know, from its path and then its lengths."""
    last = path.rsplit(".", 1)[-1].lower()
    if "cross" in last or last == "attn2":
        return Role("cross", "cross", guessed=True)
    if "self" in last or last == "attn1" or q_len == kv_len:
        return Role("self", "self", guessed=True)
    return Role("cross", "cross", guessed=True)


def block_of(path: str) -> str:
    """The block a module belongs to: its path up to the first number, e.g. `double_blocks.3`, `blocks.block0`."""
    match = re.match(r"(?:[^.]+\.)*?(?:block)?\d+(?=\.|$)", path)
    return match.group(0) if match else ""
