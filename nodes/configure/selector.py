"""Node Attention Backend Selector: one backend for every attention call of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comfy_api.latest import io

from ...backends.config import GUARD_MODES
from ...backends.config.names import AUTO, CHOICES, NAMES, canonical
from ...backends.config.text import from_environment
from ...backends.values.tolerance import ACCURACY
from ..hook import patch
from ..inputs import wrong_link

CATEGORY = "attention"


def environment() -> str:
    """What the nodes inherit from environment variables and the file they name; part of a node's fingerprint."""
    try:
        return repr(from_environment())
    except ValueError as error:
        return str(error)


def check_backend(name: Any, input_types: Mapping[str, Any] | None = None) -> bool | str:
    """For `validate_inputs`: True, or what is wrong with a backend's name."""
    if name is None:
        if input_types is None or "backend" in input_types:  # connected to another node: known only when it runs
            return True
        return f"backend must be a name, not null; write {AUTO}, or one of: {', '.join(NAMES)}"
    try:
        canonical(str(name))
    except ValueError as error:
        return str(error)
    return True


class AttentionBackendSelector(io.ComfyNode):
    """MODEL in, patched MODEL out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AttentionBackendSelector",
            display_name="Attention Backend Selector",
            category=CATEGORY,
            description=(
                "Chooses which kernel computes attention in this model. Put it between the model loader and the "
                "sampler. Only this model is changed; bypass the node and everything is as before. Add Per-Role "
                "Attention Config nodes for exceptions."
            ),
            search_aliases=["attention backend", "sage attention", "flash attention", "cudnn", "sdpa"],
            inputs=[
                io.Model.Input("model"),
                io.Combo.Input(
                    "backend",
                    options=list(CHOICES),
                    default=AUTO,
                    tooltip=(
                        "auto: the best kernel for this card that accuracy allows.\n"
                        "measured: tries the kernels that accuracy allows during a run, keeps the fastest for each "
                        "kind of call, and takes it in later runs.\n"
                        "A backend by name: runs every call that it can; strict says what happens with the others. "
                        "What each one is, and what this machine has and lacks: This machine in the attention panel, "
                        "and docs/backends.md."
                    ),
                ),
                io.Combo.Input(
                    "accuracy",
                    options=list(ACCURACY),
                    default="exact",
                    tooltip=(
                        "What auto may pick. exact: only kernels that differ by rounding. quantized: INT8, FP8 and "
                        "FP4 kernels too. sparse: also kernels that skip work. A backend chosen by name runs anyway."
                    ),
                ),
                io.Boolean.Input(
                    "strict",
                    default=False,
                    tooltip=(
                        "On: stop with the reasons when the chosen backend cannot run a call. Off: fall back to the "
                        "platform's exact kernels for that call, and say so in the account of the run."
                    ),
                ),
                io.Combo.Input(
                    "guard",
                    options=list(GUARD_MODES),
                    default="watch",
                    tooltip=(
                        "Compares kernels that are not exact with exact attention now and then, on a few rows. watch: "
                        "the report says what was found, worst blocks first. enforce: a bad call is computed again "
                        "exactly, and its block stays exact for the rest of the run. Exact kernels are not checked."
                    ),
                ),
                io.Boolean.Input(
                    "recommended",
                    display_name="recommended for this model",
                    default=False,
                    optional=True,  # graphs from before it was there have no value for it
                    tooltip=(
                        "On: with a kernel that is not exact, calls of which trouble is known in this model family run "
                        "exactly: masked text, cross-attention, the last blocks or the first and last step. What you "
                        "set by role or schedule wins. Off: the report says what would have applied."
                    ),
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def validate_inputs(cls, backend: Any = None, input_types: Any = None) -> bool | str:
        """Accept every spelling that a configuration may use, so that old and foreign graphs load."""
        return wrong_link(cls, input_types) or check_backend(backend, input_types)

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> Any:
        return environment()

    @classmethod
    def execute(
        cls, model: Any, backend: str, accuracy: str, strict: bool, guard: str, recommended: bool = False
    ) -> io.NodeOutput:
        settings: dict[str, Any] = {"accuracy": accuracy, "strict": strict, "guard": guard}
        return io.NodeOutput(patch.set_default(model, backend, **settings, recommended=recommended))
