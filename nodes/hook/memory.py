"""Raises ComfyUI's memory estimate of a run by what the chosen kernels take beyond it; the model is not changed.

ComfyUI decides from the latent's shape how much of a model it loads and how many prompts it batches. A kernel that
builds the whole matrix of scores needs more than its formula knows. What a kernel needs is declared by the kernel
(`Backend.workspace_bytes`); which calls a model makes for a latent is known from its last run with a latent of that
shape, and guessed before the first one from the latent, the patch size and the heads (`estimated_calls.py`).
"""

from __future__ import annotations

import logging
import math
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ...backends.config import AttentionConfig
from ...backends.config.layers import Choice, asks_for_sparse, resolve, settings_of
from ...backends.values.errors import NoBackendError
from ...backends.values.faults import is_cuda_fault, is_out_of_memory
from ...backends.values.grid import TokenGrid
from ...backends.values.request import AttentionRequest
from .estimated_calls import expected_requests, patch_size
from .roles import Role
from .run import KEY, RUN_KEY, router_for
from .token_grids import patches

if TYPE_CHECKING:
    from .hook_plans import HookPlan
    from .run import Run

log = logging.getLogger("attention_backends")

ESTIMATE_FAILED = "ComfyUI's own estimate of the memory stands, without what the chosen kernels take beyond it"
"""The beginning of the note of a run whose estimate failed."""
MOST_SHAPES = 8
"""Latent shapes of one model whose calls are remembered."""


class Kind(NamedTuple):
    """A kind of call that a model makes for one sample of a latent."""

    role: Role
    request: AttentionRequest
    copied: int = 0
    """Bytes that the mask plan copies: gathered keys and values, packed tokens, the output of parts."""
    apart: bool = False
    """Batch does not scale with samples: the mask splits it, and `request.batch` is what the kernel sees at once."""


Shape = tuple[float, ...]
_known: weakref.WeakKeyDictionary[torch.nn.Module, OrderedDict[Hashable, frozenset[Kind]]] = weakref.WeakKeyDictionary()


class MemoryKey(NamedTuple):
    """The key under which a run's calls are remembered."""

    model: weakref.ref[torch.nn.Module]
    shape: Shape
    """Of the latent, without its batch."""
    grids: bool = False
    """Whether its calls have token grids."""

    @property
    def calls(self) -> Hashable:
        """The part of the key beside the model."""
        return (self.shape, "grids") if self.grids else self.shape


def key_of(model: Any, noise_shape: Any, grids: bool = False) -> MemoryKey:
    """The key of a run of a `BaseModel` on a latent of this shape; `grids`: its calls have token grids."""
    diffusion_model = model.diffusion_model
    return MemoryKey(weakref.ref(getattr(diffusion_model, "_orig_mod", diffusion_model)), tuple(noise_shape[1:]), grids)


def expected(key: MemoryKey, model: Any, conds: Any) -> frozenset[Kind]:
    """The calls of a run: those of the last run like it, else a guess."""
    diffusion_model = key.model()
    if diffusion_model is None:
        return frozenset()
    shapes = _known.get(diffusion_model)
    known = None if shapes is None else shapes.get(key.calls)
    if known is not None:
        return known
    guessed = expected_requests(diffusion_model, model, key.shape, conds)
    kinds = frozenset(Kind(role, request) for role, request in guessed)
    return frozenset(map(partial(_with_grid, diffusion_model, key.shape), kinds)) if key.grids else kinds


def _with_grid(diffusion_model: torch.nn.Module, shape: Shape, kind: Kind) -> Kind:
    """A guessed kind with a grid of its tokens; what stands beside the grid does not change the memory."""
    sizes = patches((0, *map(int, shape)), patch_size(diffusion_model))
    grid = TokenGrid(*sizes, max(kind.request.q_len - prod(sizes), 0), 0, kind.role.category == "cross")
    return kind._replace(request=kind.request._replace(grid=grid))


def learn(run: Run) -> None:
    """After a run, whether it ended well or not: remember its calls; where that fails, the next run is guessed."""
    try:
        _learn(run)
    except Exception as error:  # an estimate is not worth a picture
        log.debug("the calls of a run were not remembered: %s: %s", type(error).__name__, error)


def _learn(run: Run) -> None:
    diffusion_model = run.memory_key.model() if run.memory_key is not None else None
    kinds = frozenset(kind for one in run.cards.all() for kind in _kinds(one))
    if run.memory_key is None or diffusion_model is None or not kinds:
        return
    shapes = _known.setdefault(diffusion_model, OrderedDict())
    shapes.pop(run.memory_key.calls, None)
    shapes[run.memory_key.calls] = kinds
    if len(shapes) > MOST_SHAPES:
        shapes.popitem(last=False)


def _kinds(run: Run) -> Iterator[Kind]:
    samples = max(run.samples, 1)
    for model_call in run.model_calls():
        for hook_plan in model_call.session.plans.values():
            kind, split = hook_plan.slot.plan.kind, hook_plan.slot.split
            role = Role(kind.role, kind.category)
            copied = -(-split.copied // samples) if split is not None else 0
            whole = hook_plan.layout.shapes[0][0]
            for request in _requests(hook_plan):
                if request.batch < whole:
                    yield Kind(role, request, copied, apart=True)
                else:
                    yield Kind(role, request._replace(batch=-(-request.batch // samples)), copied)


def _requests(hook_plan: HookPlan) -> set[AttentionRequest]:
    slot = hook_plan.slot
    if slot.split is None:
        return {slot.plan.request}
    return {sub_call.plan.request for sub_call in slot.split.slots if sub_call is not None}


def needed(layers: tuple[AttentionConfig, ...], kinds: frozenset[Kind], samples: int, device: torch.device) -> int:
    """Bytes that the most expensive of these calls takes beyond ComfyUI's estimate, for `samples` samples at once."""
    router, accuracy = router_for(device), settings_of(layers).accuracy
    most = 0
    for kind in kinds:
        request = kind.request
        if not kind.apart:
            request = request._replace(batch=request.batch * samples)
        for choice in _choices(layers, kind.role):
            try:
                decision = router.select(request, choice, accuracy=accuracy)
            except NoBackendError:  # the run itself will say so
                continue
            extra = router.backends[decision.backend].workspace_bytes(request, router.platform)
            most = max(most, extra + kind.copied * samples)
    return most


def _choices(layers: tuple[AttentionConfig, ...], role: Role) -> list[Choice]:
    """What may be asked for in this role at some time of the run."""
    found = {choice.asked: choice for choice in [resolve(layers, role.name, role.category)]}
    for layer in layers:
        for entry in layer.schedule:
            if entry.takes(role.name, role.category, layer.parent_of):
                found[entry.spec.backend] = Choice(entry.spec.backend, "schedule", entry.spec.extra)
    return list(found.values())


def prepare_sampling_wrapper(executor: Any, model: Any, noise_shape: Any, conds: Any, *args: Any, **kwargs: Any) -> Any:
    """Around the loading of a model for a run: ask for the memory that the chosen kernels take as well.

    ComfyUI's formula is proportional to the latent's size, so it is called with a larger size.
    ComfyUI's own node for context windows does so too; the shape is for the estimate alone.
    """
    model_options = kwargs.get("model_options") or (args[0] if args else None) or {}
    options = model_options.get("transformer_options", {})
    override, run = options.get(KEY), options.get(RUN_KEY)
    if override is not None:
        run = run if run is not None and run.override is override else None
        try:
            noise_shape = _adjusted_shape(
                override, run, model, noise_shape, conds, model_options.get("context_handler")
            )
        except Exception as error:  # a model or a latent of an unknown kind: an estimate is not worth a run
            if is_out_of_memory(error) or is_cuda_fault(error):
                raise
            text = f"{ESTIMATE_FAILED}: {type(error).__name__}: {error}"
            if run is not None:
                run.note(text)
            else:
                log.warning("%s", text)
    return executor(model, noise_shape, conds, *args, **kwargs)


def _adjusted_shape(override: Any, run: Run | None, model: Any, noise_shape: Any, conds: Any, windows: Any) -> Any:
    """The latent shape that makes ComfyUI reserve what this run takes; the run stores the reported bytes."""
    windowed = _window_of(windows, noise_shape)
    shape = noise_shape if windowed is None else windowed[0]
    key = key_of(model.model, shape, asks_for_sparse(override.layers))
    samples = int(shape[0])
    kinds, devices = expected(key, model.model, conds), _devices_of(model)
    extra = max(needed(override.layers, kinds, samples, device) for device in devices)
    if run is not None:
        run.memory_key, run.extra_bytes = key, extra / samples
    if not extra:
        return shape
    cut_last = windowed is not None and windowed[1] == len(shape) - 1
    return _shape_for(model.model, shape, extra, at=-2 if cut_last else -1)


def _devices_of(model: Any) -> list[torch.device]:
    """The devices of a model patcher and of its copies for ComfyUI's MultiGPU CFG Split, which gets the same memory."""
    copies: list[Any] = getattr(model, "get_additional_models_with_key", lambda key: [])("multigpu")
    return list(dict.fromkeys([model.load_device, *(copy.load_device for copy in copies)]))


def _shape_for(model: Any, noise_shape: Any, extra: int, at: int) -> list[int]:
    """The shape for which the model's own estimate is at least `extra` bytes larger.

    Whole numbers, since other packs read the shape too.
    """
    shape, longer = list(noise_shape), list(noise_shape)
    longer[at] += 1
    step = model.memory_required(longer) - model.memory_required(shape)
    if step > 0:
        shape[at] += math.ceil(round(extra / step, 6))
    return shape


def _window_of(handler: Any, noise_shape: Any) -> tuple[list[int], int] | None:
    """The latent that a model sees where ComfyUI's context windows cut it, and along which dimension; else None."""
    dim, length = getattr(handler, "dim", None), getattr(handler, "context_length", None)
    shape = list(noise_shape)
    packed = len(shape) == 3 and shape[1] == 1
    if type(dim) is not int or type(length) is not int or packed or not 1 < dim < len(shape):
        return None
    shape[dim] = min(shape[dim], length)
    return shape, dim


def with_estimate(model: Any, run: Run) -> Any:
    """The model with this run's estimate, for ComfyUI's choice of how many prompts go into one model call."""
    return EstimateProxy(model, run.extra_bytes) if run.extra_bytes else model


class EstimateProxy:
    """A proxy of a `BaseModel` with another memory estimate, used during one call."""

    def __init__(self, model: Any, extra_bytes: float) -> None:
        """`extra_bytes`: for each sample."""
        self.__dict__.update(_model=model, _extra=extra_bytes)

    @property  # type: ignore[misc]  # object allows setting it; the proxy does not
    def __class__(self) -> Any:
        return type(self._model)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_model"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._model, name, value)

    def memory_required(self, input_shape: Any, *args: Any, **kwargs: Any) -> Any:
        """The model's own estimate plus what the chosen kernels take for these samples."""
        return self._model.memory_required(input_shape, *args, **kwargs) + self._extra * input_shape[0]
