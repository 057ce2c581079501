"""SGLang's map from pipeline components to backends: reads the entries of one diffusion model.

A ComfyUI MODEL is the diffusion model: `transformer`, or `transformer_2` for a second expert (Wan 2.2's low-noise
model). Entries of text encoders and autoencoders are checked and have no effect.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping

from ..values.bounded import nearest
from ..values.errors import ConfigError
from ..values.fields import Fields
from . import LONGEST_ROLE, AttentionSpec
from .flags import COMPONENT_NAME
from .names import RefusedBackendError

KNOWN = ("transformer", "unet", "text_encoder", "image_encoder", "vae", "audio_vae", "video_vae")
MOST = 64
"""Most entries of a map; a pipeline has a dozen components."""
_DIFFUSION_MODEL = re.compile(r"transformer(_\d+)?")

Read = Callable[[object, str], AttentionSpec]


def component_name(name: str) -> str:
    """A component's name as SGLang compares it: `_` for `-`; `unet` is the diffusion model too."""
    return re.sub(r"^unet(?=(_\d+)?$)", "transformer", str(name).strip().replace("-", "_"))


def component_entries(
    value: object, component: str, read: Read, where: str
) -> tuple[AttentionSpec, dict[str, AttentionSpec], list[str]]:
    """(backend, backends by role, notes about other components) of `component`.

    `x_2` uses the entries of `x` where it has none.

    Raises:
        ConfigError: it is no map, or a name is a misspelt component.
    """
    wanted = component_name(component)
    names = [wanted.rpartition("_")[0], wanted] if re.fullmatch(r".+_\d+", wanted) else [wanted]
    own, roles, notes = AttentionSpec(), dict[str, AttentionSpec](), list[str]()
    entries = _flat(Fields(value, where, ConfigError).data, where)
    for name in names:  # its own name last, so that it wins
        for (of, role), entry in entries.items():
            if of != name:
                continue
            spec = read(entry, f"{of}.{role}" if role else of)
            if spec.is_auto:
                continue
            if role:
                roles[role] = spec
            else:
                own = spec
    for (of, role), entry in entries.items():
        if of not in names:
            notes.append(_elsewhere(of, role, entry, wanted, read))
    return own, roles, notes


def _flat(value: Mapping[object, object], where: str) -> dict[tuple[str, str], object]:
    """Entries by (component, role), from dotted names or nested mappings."""
    entries: dict[tuple[str, str], object] = {}
    for key, entry in value.items():
        name, _, role = str(key).partition(".")
        of = component_name(name[: LONGEST_ROLE + 1])
        _check_name(of, where)
        inner = entry if isinstance(entry, Mapping) and not {"backend", "extra"} & set(entry) else {"": entry}
        for inner_role, spec in inner.items():
            full = ".".join(filter(None, (role, str(inner_role))))
            if len(entries) == MOST or len(full) > LONGEST_ROLE:
                raise ConfigError(
                    f"{where}: more than {MOST} entries, or a role of more than {LONGEST_ROLE} characters"
                )
            if (of, full) in entries:
                raise ConfigError(f"{where}: {'.'.join(filter(None, (of, full)))} is given twice")
            entries[of, full] = spec
    return entries


def _check_name(name: str, where: str) -> None:
    near = nearest(name, KNOWN, cutoff=0.85)
    if near and not COMPONENT_NAME.fullmatch(name):
        raise ConfigError(f"{where}: no component {name!r}; did you mean {near[0]}?")


def _elsewhere(of: str, role: str, entry: object, wanted: str, read: Read) -> str:
    """The note about an entry for another component. An unknown backend in it raises."""
    name = f"{of}.{role}" if role else of
    with contextlib.suppress(RefusedBackendError):  # has no effect here anyway
        read(entry, name)
    if _DIFFUSION_MODEL.fullmatch(of):
        return f"component {name}: for another diffusion model than {wanted}; choose component {of} on that model"
    return f"component {name}: not routed here, only the diffusion model is; this entry changes nothing"
