"""The names a person may write for a backend, and the one id each of them means.

The ids are public for ever: workflows and configuration files hold them. The aliases are the spellings of
vLLM-Omni, SGLang diffusion, Diffusers and Smart-Diffusion, which each backend declares, so that a configuration
written for one of them pastes unchanged. Only names live here; what each backend can do is in `kernels/`.
"""

from __future__ import annotations

from functools import lru_cache

from ..kernels import registry
from ..values.aliases import PEOPLE
from ..values.bounded import nearest, shortened
from .systems import key_of, rows_of, systems

AUTO = "auto"
"""Take the first exact backend of the platform's route that can run the call."""

AUTOTUNE = "autotune"
"""Take the backend that was measured fastest on this machine for this kind of call."""

MEASURED = "measured"
"""The older name of `AUTOTUNE`. It is accepted wherever a backend is named, and is stored as `autotune`."""

COMFY = "comfy"
"""Run what ComfyUI would have run by itself."""

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
"""The order in which menus show backends. It is kept; one that is not here stands at the end."""

BACKEND_IDS: tuple[str, ...] = (*MENU, *(backend_id for backend_id in registry.MODULES if backend_id not in MENU))
"""Every backend that can be named, in the order in which menus show them."""

NAMES: tuple[str, ...] = (AUTO, AUTOTUNE, *BACKEND_IDS)
"""The canonical names: the two ways to let the pack choose, then each backend."""

CHOICES: tuple[str, ...] = (AUTO, AUTOTUNE, MEASURED, *BACKEND_IDS)
"""What a menu offers: `NAMES`, and `measured`, because saved graphs hold it and ComfyUI validates a combo's value."""


@lru_cache(maxsize=1)
def aliases() -> dict[str, str]:
    """Every accepted spelling that is no id itself, and the id it means."""
    published = {key_of(row.name): row.means for system in systems() for row in system.names if row.means}
    written = {
        key_of(alias.name): backend.id
        for backend in registry.BACKENDS.values()
        for alias in backend.aliases
        if alias.system == PEOPLE
    }
    return {name: means for name, means in {**published, **written, MEASURED: AUTOTUNE}.items() if name not in NAMES}


def __getattr__(name: str) -> object:
    """`ALIASES`, made when it is asked for: it takes the declarations of all backends."""
    if name != "ALIASES":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return aliases()


class UnknownBackendError(ValueError):
    """A name that no backend and no alias has. A message that quotes a long text is shortened in its middle."""

    def __init__(self, message: str) -> None:
        super().__init__(shortened(message))


class RefusedBackendError(UnknownBackendError):
    """A name that another system publishes and that means nothing here; the message says why."""


def is_known(name: str) -> bool:
    """Whether `canonical` would return an id."""
    key = key_of(name)
    return key in NAMES or key in aliases()


def canonical(name: str, system: str = "") -> str:
    """Return the id that `name` means; case, surrounding space and `-` for `_` do not matter.

    `system` is the id of the system that it comes from, where that is known: a refusal speaks of that one.

    Raises:
        RefusedBackendError: another system publishes the name, and nothing here is the same; the message says why.
        UnknownBackendError: nothing has that name; the message gives the nearest names and the whole list.
    """
    key = key_of(name)
    if key in NAMES:
        return key
    if key in aliases():
        return aliases()[key]
    for one, row in rows_of(key, system):
        raise RefusedBackendError(f"attention backend {name!r} of {one.title} is not available here: {row.line}")
    near = nearest(key, [*NAMES, *aliases()], count=3)
    hint = f" did you mean {' or '.join(near)}?" if near else ""
    raise UnknownBackendError(f"unknown attention backend {name!r};{hint} the names are: {', '.join(NAMES)}")
