"""The list of backends: one line for each, its id and the module that declares it.

A module is imported when its declarations are needed. It has a tuple `BACKENDS`: the backend that it declares, or
several. Importing one loads neither torch nor the kernel's package.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from functools import cache
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING

from ..values import platform
from ..values.platform import Platform

if TYPE_CHECKING:
    import torch

    from .backend import Backend

log = logging.getLogger("attention_backends")

MODULES: Mapping[str, str] = MappingProxyType(
    {
        "torch_sdpa": "kernels.torch_sdpa",
        "cudnn_attn": "kernels.cudnn_attn",
        "flash_attn": "kernels.flash_attn",
        "flash_attn_2": "kernels.flash_attn_2",
        "flash_attn_3": "kernels.flash_attn_3",
        "flash_attn_4": "kernels.flash_attn_4",
        "flashinfer_attn": "kernels.flashinfer_attn",
        "sage_attn": "kernels.sage_attn",
        "sage_fp16_cuda": "kernels.sage_fp16_cuda",
        "sage_fp16_triton": "kernels.sage_fp16_triton",
        "sage_fp8_cuda": "kernels.sage_fp8_cuda",
        "sage_fp8_sm90": "kernels.sage_fp8_sm90",
        "sage_attn_3": "kernels.sage_attn_3",
        "comfy_kitchen_int8": "kernels.comfy_kitchen_int8",
        "xformers": "kernels.xformers",
        "flex_attn": "kernels.flex_attn",
        "sdpa_flash": "kernels.sdpa_flash",
        "sdpa_efficient": "kernels.sdpa_efficient",
        "sdpa_math": "kernels.sdpa_math",
        "aiter": "kernels.aiter",
        "npu_fusion": "kernels.npu_fusion",
        "xla_flash": "kernels.xla_flash",
        "comfy": "kernels.comfy",
        "emulated_int8": "kernels.emulated_int8",
        "reference": "kernels.reference",
        "trtllm_attn": "kernels.trtllm_attn",
        "sliding_tile_attn": "sparse.methods.sliding_tile",
        "video_sparse_attn": "sparse.methods.video_sparse",
        "vmoba_attn": "sparse.methods.vmoba",
        "sparse_video_gen_2_attn": "sparse.methods.sparse_video_gen_2",
        "sparge_attn": "sparse.methods.sparge",
        "sol_attn": "sparse.methods.sol",
        "radial_attn": "sparse.methods.radial",
        "subblock_attn": "sparse.methods.subblock",
        "nabla_attn": "sparse.methods.nabla",
        "ssta_attn": "sparse.methods.ssta",
        "cube_attn": "sparse.methods.cube",
        "custom_sparse_attn": "sparse.methods.custom",
        "sparse_video_gen_attn": "sparse.methods.sparse_video_gen",
    }
)
"""Id -> module, from the folder `backends` on. Ids are public for ever; a new one is added at the end."""


@cache
def find(backend_id: str) -> Backend:
    """The backend with this id, from its module; where that cannot be loaded, a `BrokenBackend` that says why.

    Raises:
        KeyError: there is no such id.
    """
    where = MODULES[backend_id]
    try:
        declared: tuple[Backend, ...] = import_module(f"..{where}", __package__).BACKENDS
        for backend in declared:
            if backend.id == backend_id:
                return backend
        reason = f"{where} declares {', '.join(one.id for one in declared)}, not {backend_id}"
    except MemoryError:  # not a defect of the file
        raise
    except Exception as error:  # whatever a file raises costs only its own backend
        log.exception("the file of the attention backend %s cannot be loaded", backend_id)
        reason = f"{where} cannot be loaded: {type(error).__name__}: {error}"
    from .backend import BrokenBackend

    return BrokenBackend(backend_id, reason)


class Backends(MutableMapping[str, "Backend"]):
    """Every backend by id, in the order of the list; a module is imported when its backend is asked for."""

    def __init__(self) -> None:
        self._others: dict[str, Backend] = {}
        """Backends outside `MODULES`, added by tests."""

    def __getitem__(self, backend_id: str) -> Backend:
        return self._others[backend_id] if backend_id in self._others else find(backend_id)

    def __setitem__(self, backend_id: str, backend: Backend) -> None:
        self._others[backend_id] = backend

    def __delitem__(self, backend_id: str) -> None:
        del self._others[backend_id]

    def __contains__(self, backend_id: object) -> bool:
        return backend_id in MODULES or backend_id in self._others

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys((*MODULES, *self._others)))

    def __len__(self) -> int:
        return len({*MODULES, *self._others})


BACKENDS = Backends()


def distributions(ids: Iterable[str]) -> list[str]:
    """The distributions of the packages behind these backends, each once; unknown ids are skipped."""
    packages = (package for one in ids if one in MODULES for package in find(one).packages)
    return list(dict.fromkeys(package.distribution for package in packages))


def environments(ids: Iterable[str], platform: Platform) -> list[str]:
    """What decides, beside versions, what the packages behind these backends compute on `platform`, each once."""
    packages = (package for one in ids if one in MODULES for package in find(one).packages)
    return list(dict.fromkeys(filter(None, (package.environment(platform) for package in packages))))


def any_compiled(ids: Iterable[str]) -> bool:
    """Whether torch.compile makes one of these backends; unknown ids are skipped."""
    return any(find(one).compiled for one in ids if one in MODULES)


def detect(device: torch.device | None = None) -> Platform:
    """The running machine with every package that a backend declares, as `platform.detect`. Imports torch."""
    return platform.detect(device, looked_for())


@cache
def looked_for() -> tuple[str, ...]:
    """The distributions whose versions are read: those that backends declare, each once."""
    names = (name for backend in map(find, MODULES) for name in backend.asks_for)
    return tuple(dict.fromkeys((*distributions(MODULES), *names)))
