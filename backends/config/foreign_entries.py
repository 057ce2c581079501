"""Entries of xfuser, ComfyUI's start-up flags and vLLM-Omni that have another form here: translated to our entries.

xfuser 0.7 (`xfuser.config.args`): `cross_attention_backend` is the role cross, without it cross-attention follows the
main backend; `hybrid_attn_schedule` has one name per step, or a low-precision backend runs between N steps of a
high-precision one at both ends (`xfuser.core.distributed.attention_schedule`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import groupby
from types import MappingProxyType
from typing import Any

from ..values.aliases import COMFYUI, XFUSER
from ..values.errors import ConfigError
from . import AttentionSpec
from .foreign_options import BESIDE_BACKEND
from .schedule import ScheduleEntry

XFUSER_CROSS = "cross_attention_backend"
XFUSER_HYBRID = "use_hybrid_attn_schedule"
_LIST, _LOW, _HIGH, _ENDS = (
    *("hybrid_attn_schedule", "hybrid_attn_low_precision_backend", "hybrid_attn_high_precision_backend"),
    "num_hybrid_attn_high_precision_steps",
)
XFUSER_ENTRIES = (XFUSER_CROSS, XFUSER_HYBRID, _LIST, _LOW, _HIGH, _ENDS)
COMFYUI_FLAGS: Mapping[str, str] = MappingProxyType(
    {
        "use_pytorch_cross_attention": "pytorch",
        "use_sage_attention": "sage",
        "use_flash_attention": "flash",
        "use_ck_attention": "comfy kitchen attention",
        "use_split_cross_attention": "split",
        "use_quad_cross_attention": "sub_quad",
    }
)
"""ComfyUI's start-up flags, and the registered function that each starts."""
TRANSLATED: Mapping[str, str] = MappingProxyType(
    {
        XFUSER_CROSS: "`per_role.cross`",
        XFUSER_HYBRID: "switches the schedule on; then `attention_backend` is an error, as in xfuser",
        _LIST: "`schedule`, one name per step",
        _LOW: "`schedule`, between the first and the last steps",
        _HIGH: "`schedule`, the first and the last steps",
        _ENDS: "how many steps those are, at each end",
        "fastvideo_vsa_topk": "beside one name of a backend: an option of it, as are the others of vLLM-Omni's "
        "AttentionSpec",
    }
)
"""What the other entries become, for the documents."""
SWITCHES = (XFUSER_HYBRID, *COMFYUI_FLAGS)
"""Flags that need no value."""

ReadSpec = Callable[[object, str, str], AttentionSpec]


def translated(entries: Mapping[str, Any], source: str, read: ReadSpec, note: Callable[[str], None]) -> dict[str, Any]:
    """The entries with the foreign ones in our form; backends in those as `AttentionSpec`.

    Args:
        entries: all entries of a configuration.
        source: its name in messages.
        read: reads a name of a backend: (value, place for messages, id of the system).
        note: takes notes for the person.

    Raises:
        ConfigError: entries contradict each other, as their system says too, or entries of ours.
    """
    for name in SWITCHES:
        if not isinstance(entries.get(name, False), (bool, type(None))):
            raise ConfigError(f"{source}.{name}: expected true or false, not {entries[name]!r}")
    ours = {name: value for name, value in entries.items() if name not in (*XFUSER_ENTRIES, *COMFYUI_FLAGS)}
    own = {name: entries[name] for name in XFUSER_ENTRIES if entries.get(name) is not None}
    if own:
        _xfuser(ours, own, source, read, note)
    flags = [name for name in COMFYUI_FLAGS if entries.get(name)]
    if len(flags) > 1 or (flags and ours.get("default") is not None):
        raise ConfigError(f"{source}: {', '.join([*flags, *(['default'] if 'default' in ours else [])])}; give one")
    for name in flags:
        ours["default"] = read(COMFYUI_FLAGS[name], f"{source}.{name}", COMFYUI)
    return _beside(ours)


def _beside(entries: dict[str, Any]) -> dict[str, Any]:
    """Options beside the only name of a backend, as vLLM-Omni's AttentionSpec has them, under that name."""
    beside = {name: entries[name] for name in BESIDE_BACKEND if entries.get(name) is not None}
    named = [name for name in ("backend", "diffusion_attention_backend") if isinstance(entries.get(name), str)]
    if not beside or len(named) != 1:
        return entries
    rest = {name: value for name, value in entries.items() if name not in BESIDE_BACKEND}
    return {**rest, named[0]: {"backend": entries[named[0]], **beside}}


def _xfuser(
    ours: dict[str, Any], own: dict[str, Any], source: str, read: ReadSpec, note: Callable[[str], None]
) -> None:
    """Put xfuser's entries into `ours`."""

    def spec(name: str, value: object) -> AttentionSpec:
        return read(value, f"{source}.{name}", XFUSER)

    if ours.get("attention_backend") is not None:
        ours["attention_backend"] = spec("attention_backend", ours["attention_backend"])
    cross = spec(XFUSER_CROSS, own[XFUSER_CROSS]) if XFUSER_CROSS in own else AttentionSpec()
    if not cross.is_auto:
        roles = ours.get("per_role") or {}
        if not isinstance(roles, Mapping) or "cross" in roles:
            raise ConfigError(f"{source}: both {XFUSER_CROSS} and per_role; give one of them")
        ours["per_role"] = {**roles, "cross": cross}
    hybrid = [name for name in own if name != XFUSER_CROSS]
    if not own.get(XFUSER_HYBRID):
        if hybrid and hybrid != [XFUSER_HYBRID]:
            note(f"{', '.join(hybrid)}: without effect without {XFUSER_HYBRID}, as in xfuser")
        return
    for name in ("attention_backend", "schedule"):
        if ours.get(name):
            raise ConfigError(f"{source}: both {XFUSER_HYBRID} and {name}; give one of them")
    if _LIST in own and (_LOW in own or _HIGH in own):
        raise ConfigError(f"{source}: both {_LIST} and {_LOW if _LOW in own else _HIGH}; give one of them")
    entries = _listed(own[_LIST], spec, source, note) if _LIST in own else _ends(own, spec, source)
    if not cross.is_auto:  # no schedule reaches it there
        entries.append(ScheduleEntry(cross, steps="0-", role="cross"))  # type: ignore[arg-type]  # windows are text
    ours["schedule"] = entries


def _listed(
    value: object, spec: Callable[[str, object], AttentionSpec], source: str, note: Callable[[str], None]
) -> list[ScheduleEntry]:
    """One name per step."""
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) and name.strip() for name in names):
        raise ConfigError(f"{source}.{_LIST}: expected names with commas between them, not {value!r}")
    specs = [spec(_LIST, name.strip()) for name in names]
    note(f"{_LIST}: for runs of {len(specs)} steps; xfuser stops at other numbers, here later steps take the default")
    windows, first = [], 0
    for backend, run in groupby(specs):
        last = first + len(list(run)) - 1
        windows.append(ScheduleEntry(backend, steps=f"{first}-{last}"))  # type: ignore[arg-type]
        first = last + 1
    return [entry for entry in windows if not entry.spec.is_auto]


def _ends(own: Mapping[str, Any], spec: Callable[[str, object], AttentionSpec], source: str) -> list[ScheduleEntry]:
    """High precision for the first and the last N steps, low precision between them."""
    missing = [name for name in (_LOW, _HIGH, _ENDS) if name not in own]
    if missing:
        raise ConfigError(f"{source}: {XFUSER_HYBRID} needs {_LIST}, or {', '.join(missing)} too")
    count = own[_ENDS]
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise ConfigError(f"{source}.{_ENDS}: expected a number of steps from 0 on, not {count!r}")
    windows = [ScheduleEntry(spec(_LOW, own[_LOW]), steps="0-")]  # type: ignore[arg-type]
    high = spec(_HIGH, own[_HIGH])
    if count:
        windows.append(ScheduleEntry(high, steps=f"first {count},last {count}"))  # type: ignore[arg-type]
    return windows
