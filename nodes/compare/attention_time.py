"""The time that a model spends in attention on a GPU, by events in its stream: nothing waits for it inside a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..hook import attention_modules
from ..hook.override import Override
from ..hook.run import KEY, OVERRIDE


class Timed(Override):
    """An override that also puts an event before and behind each attention call of its model on a GPU."""

    new_event: Callable[[], Any] = staticmethod(lambda: torch.cuda.Event(enable_timing=True))
    pairs: list[tuple[Any, Any]]

    def __call__(self, func: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        model_call = None if torch.compiler.is_dynamo_compiling() else attention_modules.current_model_call()
        if model_call is None or model_call.run.override is not self or not self.times(args[0].device):
            return super().__call__(func, *args, **kwargs)
        stream = torch.cuda.current_stream(args[0].device) if args[0].is_cuda else None
        before, behind = self.new_event(), self.new_event()
        before.record(stream)
        output = super().__call__(func, *args, **kwargs)
        behind.record(stream)
        self.pairs.append((before, behind))
        return output

    @staticmethod
    def times(device: torch.device) -> bool:
        """On the CPU a call is over when it returns: there the run report has its time."""
        return device.type == "cuda"

    def milliseconds(self) -> tuple[float, int]:
        """(time, number) of the calls since the last call of this method; the device must be idle."""
        pairs, self.pairs = self.pairs, []
        return sum(before.elapsed_time(behind) for before, behind in pairs), len(pairs)


def timed(model: Any) -> tuple[Any, Timed | None]:
    """A clone of a MODEL whose attention calls are timed; the model itself where no override of ours answers them."""
    options = model.model_options.get("transformer_options", {})
    before = options.get(KEY)
    if before is None or options.get(OVERRIDE) is not before:
        return model, None
    clone = model.clone()
    override = Timed(before.layers, before.foreign, before.notes)
    override.pairs = []
    options = clone.model_options["transformer_options"] = {**options, KEY: override, OVERRIDE: override}
    return clone, override
