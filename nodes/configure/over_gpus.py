"""Node Attention Over GPUs: the heads of long attention calls over several GPUs of this machine."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ...backends.config.card_names import ALL, card_names
from ...backends.values.errors import ConfigError
from ..hook import patch
from ..inputs import text_of, wrong_link
from .selector import CATEGORY, environment


class AttentionOverGPUs(io.ComfyNode):
    """MODEL in, patched MODEL out; stacks with the other nodes, and the last one of its kind decides."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AttentionOverGPUs",
            display_name="Attention Over GPUs",
            category=CATEGORY,
            description=(
                "Computes some heads of long attention calls on other GPUs of this computer and brings them back, "
                "where that is measured to be faster. The model stays on its GPU and the result is exact. Short calls, "
                "slow links and compiled models stay on one GPU, and the run report says so."
            ),
            search_aliases=["multi gpu", "multigpu", "second gpu", "two gpus", "parallel attention"],
            inputs=[
                io.Model.Input("model"),
                io.String.Input(
                    "devices",
                    default=ALL,
                    tooltip=(
                        "all, off, or names such as: cuda:0, cuda:1. The GPU of the model always takes part.\n"
                        "The other GPUs need free memory for their part of a call."
                    ),
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def validate_inputs(cls, devices: Any = None, input_types: Any = None) -> bool | str:
        problem = wrong_link(cls, input_types)
        if problem or devices is None:
            return problem or True
        try:
            card_names(_text(devices), "devices")
        except ConfigError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> Any:
        return environment()

    @classmethod
    def execute(cls, model: Any, devices: str) -> io.NodeOutput:
        return io.NodeOutput(patch.set_cards(model, _text(devices)))


def _text(devices: Any) -> Any:
    """The input; empty text means all."""
    text = text_of(devices, ALL)
    return ALL if isinstance(text, str) and not text.strip() else text
