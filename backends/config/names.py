"""Resolves every accepted name of a backend to its id.

Ids never change: workflows and configuration files contain them. Aliases are the names of other systems (`systems.py`),
declared by each backend, so that their configurations paste unchanged.
"""

from __future__ import annotations

from functools import lru_cache

from ..kernels import registry
from ..values.aliases import PEOPLE
from ..values.bounded import nearest, shortened
from .systems import key_of, meanings, row_in, rows_of

AUTO = "auto"
"""The first backend of the platform's priorities that can run the call."""

AUTOTUNE = "autotune"
"""The backend that was measured fastest on this machine for this kind of call."""

MEASURED = "measured"
"""Older name of `AUTOTUNE`, accepted everywhere and stored as `autotune`."""

COMFY = "comfy"
"""ComfyUI's own attention function."""

MENU: tuple[str, ...] = (
    "torch_sdpa",
    "cudnn_attn",
    "flash_attn",
    "flash_attn_2",
    "flash_attn_3",
    "flash_attn_4",
    "flashinfer_attn",
    "sage_attn",
    "sage_fp16_cuda",
    "sage_fp16_triton",
    "sage_fp8_cuda",
    "sage_fp8_sm90",
    "sage_attn_3",
    "comfy_kitchen_int8",
    "xformers",
    "flex_attn",
    "sdpa_flash",
    "sdpa_efficient",
    "sdpa_math",
    "aiter",
    "npu_fusion",
    "xla_flash",
    "sliding_tile_attn",
    "video_sparse_attn",
    "vmoba_attn",
    "sparse_video_gen_2_attn",
    "sparge_attn",
    "sol_attn",
    "radial_attn",
    COMFY,
    "emulated_int8",
    "reference",
    "trtllm_attn",
)
"""Order of lists and pages, which never changes; further backends follow at the end."""

BACKEND_IDS: tuple[str, ...] = (*MENU, *(backend_id for backend_id in registry.MODULES if backend_id not in MENU))
"""The id of every backend, in the order of lists."""

NAMES: tuple[str, ...] = (AUTO, AUTOTUNE, *BACKEND_IDS)
"""The canonical names: `auto`, `autotune`, then the ids."""

CHOICES: tuple[str, ...] = (AUTO, AUTOTUNE, MEASURED, *BACKEND_IDS)
"""Options of a menu: `NAMES`, and `measured`, because saved graphs contain it and ComfyUI validates a combo's value."""

FAVOURITES: tuple[str, ...] = (
    "sage_attn",
    "flash_attn",
    "cudnn_attn",
    "torch_sdpa",
    COMFY,
    "aiter",
    "npu_fusion",
    "xla_flash",
    "xformers",
    "sage_attn_3",
    "sage_fp8_cuda",
    "sage_fp8_sm90",
    "sage_fp16_cuda",
    "sage_fp16_triton",
    "comfy_kitchen_int8",
    "flash_attn_2",
    "flash_attn_3",
    "flash_attn_4",
    "flashinfer_attn",
    "trtllm_attn",
    "flex_attn",
    "sdpa_flash",
    "sdpa_efficient",
    "sdpa_math",
    "emulated_int8",
    "reference",
)
"""Order of a node's menu: what people look for, what a platform alone has, kernels of a group, aids for debugging."""


@lru_cache(maxsize=8)
def menu(kind: str) -> tuple[str, ...]:
    """`CHOICES` in the order of a node's menu on a platform of this kind.

    First `auto` and `autotune`, then the backends that run on such a platform, then those that run on others, and
    `measured` last. What is installed does not count, so the order is always the same on one machine.
    """

    def place(name: str) -> tuple[int, int]:
        backend = registry.BACKENDS[name]
        group = 0 if kind in backend.runs_on else 1
        return group, FAVOURITES.index(name) if name in FAVOURITES else len(FAVOURITES)

    return (AUTO, AUTOTUNE, *sorted(BACKEND_IDS, key=place), MEASURED)


@lru_cache(maxsize=1)
def aliases() -> dict[str, str]:
    """Alias -> id, without the ids themselves."""
    published = {name: str(row.means) for name, row in meanings().items()}
    written = {
        key_of(alias.name): backend.id
        for backend in registry.BACKENDS.values()
        for alias in backend.aliases
        if alias.system == PEOPLE
    }
    return {name: means for name, means in {**published, **written, MEASURED: AUTOTUNE}.items() if name not in NAMES}


def __getattr__(name: str) -> object:
    """`ALIASES`, computed on access because it imports every backend's declaration."""
    if name != "ALIASES":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return aliases()


class UnknownBackendError(ValueError):
    """A name that is no id and no alias. A long message is shortened in its middle."""

    def __init__(self, message: str) -> None:
        super().__init__(shortened(message))


class RefusedBackendError(UnknownBackendError):
    """A name that another system publishes and that has no equivalent here; the message says why."""


def is_known(name: str) -> bool:
    """Whether `canonical` accepts the name."""
    key = key_of(name)
    return key in NAMES or key in aliases()


def canonical(name: str, system: str = "") -> str:
    """The id of a name; case, surrounding space and `-` for `_` do not matter.

    `system`: id of the system that the name comes from, if known; what the name means there then has precedence.

    Raises:
        RefusedBackendError: another system publishes the name, without an equivalent here; the message says why.
        UnknownBackendError: unknown; the message has the nearest names and the whole list.
    """
    key = key_of(name)
    own = row_in(name, system) if system else None
    if own is not None and own.means is not None:
        return own.means
    if key in NAMES:
        return key
    if key in aliases():
        return aliases()[key]
    for publisher, row in rows_of(name, system):
        raise RefusedBackendError(f"attention backend {name!r} of {publisher.title} is not available here: {row.line}")
    near = nearest(key, [*NAMES, *aliases()], count=3)
    hint = f" did you mean {' or '.join(near)}?" if near else ""
    raise UnknownBackendError(f"unknown attention backend {name!r};{hint} the names are: {', '.join(NAMES)}")


def options_of(name: str, system: str = "") -> dict[str, object]:
    """The options that an accepted name includes, beside its id."""
    row = row_in(name, system) if system else None
    if row is None and key_of(name) not in NAMES:
        row = meanings().get(key_of(name))
    return {} if row is None or row.means is None else dict(row.options)
