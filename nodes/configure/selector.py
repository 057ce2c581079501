"""Node Attention Backend Selector: one backend for every attention call of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comfy import model_management
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker

from ...backends.config import GUARD_MODES, AttentionSpec
from ...backends.config.names import AUTO, NAMES, canonical, menu
from ...backends.config.text import from_environment, parse_extra
from ...backends.kernels.registry import detect
from ...backends.values.errors import ConfigError
from ...backends.values.tolerance import ACCURACY
from ..history import graph, runs
from ..hook import patch
from ..inputs import about_options, options_of, wrong_link

CATEGORY = "attention"
SECOND = 1
"""Number of the output of the second model."""
NO_SECOND_MODEL = (
    "the second output is connected and the second model is not: connect one to the input second model, or take the "
    "first output"
)


def environment() -> str:
    """What the nodes inherit from environment variables and the file they name; part of a node's fingerprint."""
    try:
        return repr(from_environment())
    except ValueError as error:
        return str(error)


def backend_menu() -> list[str]:
    """The options of a backend's widget, those that can run on this server's platform first."""
    return list(menu(detect(model_management.get_torch_device()).kind))


def check_backend(name: Any, input_types: Mapping[str, Any] | None = None, extra: Any = None) -> bool | str:
    """For `validate_inputs`: True, or what is wrong with a backend's name or with its options as text."""
    try:
        if isinstance(extra, str):
            parse_extra(options_of(extra))
        if name is None:
            if input_types is None or "backend" in input_types:  # connected to another node: known only when it runs
                return True
            return f"backend must be a name, not null; write {AUTO}, or one of: {', '.join(NAMES)}"
        canonical(str(name))
        if isinstance(extra, str):
            spec_of(str(name), extra)
    except ValueError as error:
        return str(error)
    return True


def extra_input() -> io.String.Input:
    """The input for a backend's options, the same on every node that names one; it is the last one of each."""
    return io.String.Input(
        "extra",
        display_name="kernel options",
        default="",
        optional=True,  # graphs from before it was there have no value for it
        advanced=True,
        tooltip=(
            "Options of the backend as name=value pairs or JSON. Leave empty for its defaults.\n"
            "For example, for video_sparse_attn: sparsity=0.75, dense_steps=3"
        ),
    )


def spec_of(backend: str, extra: Any) -> AttentionSpec:
    """A backend with the options that its node has as text.

    Raises:
        ConfigError, UnknownBackendError: `extra` is no text, or the backend is unknown or has no such option or value.
    """
    if not isinstance(extra, str):
        raise ConfigError(f"extra must be text, not {type(extra).__name__}: {extra!r}")
    return AttentionSpec(backend, parse_extra(options_of(extra)))


def lacks_second_model() -> bool:
    """Whether the selector that is executing has nothing to give to a node that takes its second output."""
    prompt_id, node_id = runs.executing()
    prompt = runs.queued(prompt_id)
    # A program, or a node that another one made: ComfyUI blocks who takes the output.
    if node_id is None or node_id not in prompt:
        return False
    return "model_2" not in prompt[node_id]["inputs"] and graph.is_taken(prompt, node_id, SECOND)


class AttentionBackendSelector(io.ComfyNode):
    """MODEL in, patched MODEL out; the same for an optional second one, such as the other expert of Wan 2.2."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AttentionBackendSelector",
            display_name="Attention Backend Selector (Sage, Flash, SDPA)",
            category=CATEGORY,
            description=(
                "Chooses which kernel computes attention in this model. Put it between the model loader and the "
                "sampler. Only this model is changed; bypass the node and everything is as before. Add Per-Role "
                "Attention Config nodes for exceptions."
            ),
            search_aliases=[
                "attention backend",
                "sage attention",
                "sageattention",
                "flash attention",
                "cudnn",
                "sdpa",
                "xformers",
                "pytorch attention",
                "sageattn",
            ],
            inputs=[
                io.Model.Input("model"),
                io.Combo.Input(
                    "backend",
                    options=backend_menu(),
                    default=AUTO,
                    tooltip=(
                        "auto: the best kernel for this GPU, lossless unless you allow more.\n"
                        "autotune: measures kernels while sampling and keeps the fastest.\n"
                        "Or one by name. Node Info lists them; This machine in the Attention tab says which run here."
                    ),
                ),
                io.Combo.Input(
                    "accuracy",
                    display_name="auto may use",
                    options=list(ACCURACY),
                    default="exact",
                    advanced=True,
                    tooltip=(
                        "What auto and autotune choose from. exact: lossless kernels only. quantized: also Sage, INT8, "
                        "FP8 and FP4. sparse: also kernels that skip work. A backend chosen by name runs anyway."
                    ),
                ),
                io.Boolean.Input(
                    "strict",
                    default=False,
                    advanced=True,
                    tooltip=(
                        "On: stop with the reasons when the chosen backend cannot run a call. Off: a lossless kernel "
                        "computes that call, and the report says why."
                    ),
                ),
                io.Combo.Input(
                    "guard",
                    options=list(GUARD_MODES),
                    default="watch",
                    advanced=True,
                    tooltip=(
                        "Spot-checks quantized and sparse kernels against exact attention. watch: the report shows the "
                        "errors, worst blocks first. enforce: a bad call is computed again exactly, and its block "
                        "stays exact for the rest of the run."
                    ),
                ),
                io.Boolean.Input(
                    "recommended",
                    display_name="exceptions for this model",
                    default=False,
                    optional=True,  # graphs from before it was there have no value for it
                    advanced=True,
                    tooltip=(
                        "Keeps known trouble spots of this model lossless when you use Sage or another quantized "
                        "kernel: masked text, cross-attention, the last blocks, the first and last step. What you set "
                        "by role or schedule wins. Off: only reported."
                    ),
                ),
                io.Model.Input(
                    "model_2",
                    display_name="second model",
                    optional=True,
                    tooltip=(
                        "Optional: the low-noise model of Wan 2.2. It gets the same settings, is patched separately, "
                        "and leaves by the second output."
                    ),
                ),
                extra_input(),
            ],
            outputs=[
                io.Model.Output(),
                io.Model.Output(
                    display_name="second model",
                    tooltip=(
                        "The second model, patched. A graph that takes this output without a second model stops and "
                        "says why."
                    ),
                ),
            ],
        )

    @classmethod
    def validate_inputs(
        cls, backend: Any = None, model_2: Any = None, extra: Any = None, input_types: Any = None
    ) -> bool | str:
        """Accept every spelling that a configuration may use, so that old and foreign graphs load."""
        problem = wrong_link(cls, input_types, model_2=model_2)
        return problem or check_backend(backend, input_types, extra)

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> Any:
        return environment() + (NO_SECOND_MODEL if lacks_second_model() else "")

    @classmethod
    def execute(
        cls,
        model: Any,
        backend: str,
        accuracy: str,
        strict: bool,
        guard: str,
        recommended: bool = False,
        model_2: Any = None,
        extra: str = "",
    ) -> io.NodeOutput:
        settings: dict[str, Any] = {"accuracy": accuracy, "strict": strict, "guard": guard, "recommended": recommended}
        settings |= {"extra": spec_of(backend, extra).extra, "said": about_options(extra)}
        first = patch.set_default(model, backend, **settings)
        if model_2 is None:
            if lacks_second_model():
                raise ConfigError(NO_SECOND_MODEL)
            return io.NodeOutput(first, ExecutionBlocker(NO_SECOND_MODEL))
        return io.NodeOutput(first, patch.set_default(model_2, backend, **settings))
