"""The attention calls of a model as plain tensors: one of each role and shape, from one model call in ComfyUI."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...backends.values.masks import for_kernels
from ...backends.values.request import AttentionCall, AttentionRequest, Host
from ...comparison.calls import CapturedCall
from ...comparison.contenders import REFERENCE
from ..hook import attention_modules, compiled, patch
from ..hook.compiled import POSITIONAL
from ..hook.hook_calls import run_comfy
from ..hook.hook_plans import preferred_function
from ..hook.layouts import Layout
from ..hook.model_call import ModelCall
from ..hook.override import Override
from ..hook.run import KEY, OVERRIDE
from ..hook.token_grids import grid_of


class Capturing(Override):
    """An override that also keeps a copy of the first call of each role and kind."""

    calls: dict[tuple[str, AttentionRequest], CapturedCall]

    def __call__(self, func: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        model_call = None if torch.compiler.is_dynamo_compiling() else attention_modules.current_model_call()
        if model_call is not None and model_call.run.override is self:
            marked = model_call.attention_module
            model_call.attention_module, holder = attention_modules.maker(model_call)
            try:
                self._keep(model_call, func, holder, args, kwargs)
            finally:
                model_call.attention_module = marked
        return super().__call__(func, *args, **kwargs)

    def run_owned(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """A call in containers, which are emptied: the copies need the tensors anyway."""
        return self(compiled.comfys_attention(), *(container.take() for container in args[:3]), *args[3:], **kwargs)

    def _keep(
        self, model_call: ModelCall, func: Callable[..., torch.Tensor], holder: Any, args: Any, kwargs: Any
    ) -> None:
        given = {**kwargs, **dict(zip(POSITIONAL, args[3:], strict=False))}
        query, key, value = args[:3]
        call = Layout(query, key, value, given).call(query, key, value, given.get("mask"))
        request = call.request()
        found = model_call.role(model_call.ordinal, request.q_len, request.kv_len)
        role = found.name
        if (role, request) not in self.calls:
            block = model_call.attention_module.block if model_call.attention_module is not None else ""
            func = preferred_function(model_call.attention_module, model_call.ordinal, holder) or func
            number = model_call.window.grids
            grids = model_call.run.grids[number] if number else ()
            grid = grid_of(grids, role, found.category, request.q_len)
            self.calls[role, request] = CapturedCall(role, block, *_kept(call, func), grid)


def capturing(model: Any) -> tuple[Any, dict[tuple[str, AttentionRequest], CapturedCall]]:
    """A clone of `model` on the reference backend, and the calls that sampling with it will put there."""
    # Where sparse backends are allowed, model calls have token grids.
    clone = patch.set_default(model, REFERENCE, accuracy="sparse", strict=False, guard="off")
    options = clone.model_options["transformer_options"]
    before = options[KEY]
    override = Capturing(before.layers, before.foreign, before.notes)
    override.calls = {}
    options[KEY] = options[OVERRIDE] = override
    return clone, override.calls


def _kept(call: AttentionCall, func: Callable[..., torch.Tensor]) -> tuple[AttentionCall, Host]:
    """A copy of the call, since the model may write into its tensors later; and what ComfyUI would have run on it."""
    mask = None if call.attn_mask is None else for_kernels(call.attn_mask.clone(), call.query.dtype)
    copied = call.changed(query=call.query.clone(), key=call.key.clone(), value=call.value.clone(), attn_mask=mask)
    arguments: dict[str, Any] = {"heads": copied.query.shape[1], "skip_reshape": True, "skip_output_reshape": True}
    if call.scale is not None:
        arguments["scale"] = call.scale
    if call.enable_gqa:
        arguments["enable_gqa"] = True

    def host(of: AttentionCall) -> torch.Tensor:
        return run_comfy(func, of.query, of.key, of.value, of.attn_mask, None, arguments)

    return copied, host
