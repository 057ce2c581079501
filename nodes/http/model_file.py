"""What a model file holds, from its header alone: the roles of its attention and the sizes of its heads.

ComfyUI's own detection reads names and shapes, so it is given tensors without data, and the model is made on torch's
meta device: no weight is read and none is allocated. Where a file tells nothing, the last run of it may.
"""

from __future__ import annotations

import json
import logging
import math
import os
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import comfy.model_detection
import comfy.utils
import folder_paths
import torch

from ...backends.values.faults import is_cuda_fault, is_out_of_memory
from ..history import runs
from ..hook.attention_modules import family_of_model
from ..hook.roles import known_roles, roles_at

FOLDERS = ("diffusion_models", "checkpoints")
MOST_HEADER = 100_000_000
"""Bytes; that of safetensors' own reader."""
SMALL = 65_536
"""Numbers in a vector that detection may look into; they are zeros here."""
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
"""Of safetensors; others stand for a format that detection does not ask about."""
HEAD_DIM = ("head_dim", "dim_head", "attention_head_dim")
"""What ComfyUI's attention modules call it."""

log = logging.getLogger("attention_backends")


class ModelFacts(NamedTuple):
    """What is known of a model before it is loaded; `head_dims` is empty where the roles are those of a run."""

    family: str
    roles: tuple[str, ...]
    head_dims: tuple[int, ...] = ()


def facts_of(name: str) -> ModelFacts | None:
    """The facts of a file in ComfyUI's folders, by its name in a loader's menu; None where nothing tells them."""
    for folder in FOLDERS:
        path = folder_paths.get_full_path(folder, name)
        if path is not None:
            stat = os.stat(path)
            if (found := _in_file(path, stat.st_mtime_ns, stat.st_size)) is not None:
                return found
    return _in_runs(name)


def _in_runs(name: str) -> ModelFacts | None:
    """The roles that the last run of a model from this file had."""
    for summary, sampler in runs.entries():
        before = (values for node in sampler.asked.values() for values in node["models"].values())
        if summary["state"] == "done" and any(name in values.values() for values in before):
            return ModelFacts("", tuple(dict.fromkeys(total["role"] for total in summary["totals"])))
    return None


@lru_cache(maxsize=64)
def _in_file(path: str, _changed: int, size: int) -> ModelFacts | None:
    if not path.lower().endswith((".safetensors", ".sft")):
        return None
    try:
        weights, metadata = _header(path, size)
        model = _without_weights(weights, metadata)
    except Exception as error:  # a format that this ComfyUI does not know can fail anywhere
        if is_out_of_memory(error) or is_cuda_fault(error):
            raise
        log.debug("the header of a model file tells nothing: %s", error)
        return None
    return None if model is None else _facts(model)


def _header(path: str, size: int) -> tuple[dict[str, torch.Tensor], dict[str, str] | None]:
    """Names with shapes and dtypes, and the metadata.

    Raises:
        ValueError: not a safetensors file.
    """
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(size, MOST_HEADER):
            raise ValueError(f"header of {length} bytes")
        found: dict[str, Any] = json.loads(file.read(length))
    metadata = found.pop("__metadata__", None)
    return {name: _empty(one["shape"], one["dtype"]) for name, one in found.items()}, metadata


def _empty(shape: list[int], dtype: str) -> torch.Tensor:
    kind = DTYPES.get(dtype, torch.uint8)
    if len(shape) < 2 and math.prod(shape) <= SMALL:
        return torch.zeros(shape, dtype=kind)
    return torch.empty(shape, dtype=kind, device="meta")


def _without_weights(weights: dict[str, torch.Tensor], metadata: dict[str, str] | None) -> torch.nn.Module | None:
    """The diffusion model as ComfyUI would make it, on the meta device; None where it would not know it."""
    prefix = comfy.model_detection.unet_prefix_from_state_dict(weights)
    own = comfy.utils.state_dict_prefix_replace(dict(weights), {prefix: ""}, filter_keys=True) or weights
    with _quiet():
        config = comfy.model_detection.model_config_from_unet(own, "", metadata=metadata)
        if config is None:
            return None
        model: torch.nn.Module = config.get_model(own, "", device=torch.device("meta")).diffusion_model
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """ComfyUI logs each model that it makes: not those that this thread makes to look at."""
    here = threading.get_ident()

    def others(record: logging.LogRecord) -> bool:
        return record.thread != here

    root = logging.getLogger()
    root.addFilter(others)
    try:
        yield
    finally:
        root.removeFilter(others)


def _facts(model: torch.nn.Module) -> ModelFacts | None:
    family = family_of_model(model)
    if family is None:
        return None
    found: set[str] = set()
    head_dims: set[int] = set()
    for path, module in model.named_modules():
        if at := roles_at(family, path, type(module).__name__):
            found |= {role.name for role in at}
            head_dims |= next(filter(None, map(_head_dims, module.modules())), set())
    roles = tuple(name for name in known_roles() if name in found)
    return ModelFacts(family.name, roles, tuple(sorted(head_dims)))


def _head_dims(module: torch.nn.Module) -> set[int]:
    """The size of a module's heads, where it has it by a usual name."""
    for name in HEAD_DIM:
        if isinstance(size := getattr(module, name, None), int):
            return {size}
    width, heads = (getattr(module, name, None) for name in ("hidden_size", "num_heads"))
    return {width // heads} if isinstance(width, int) and isinstance(heads, int) and heads else set()
