"""Node Attention Benchmark: kernels on the attention calls of real models, no model needed."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.utils
import comfyui_version
import torch
from comfy.ldm.modules import attention
from comfy_api.latest import io, ui

from ...backends.values.request import AttentionCall
from ...comparison import picture
from ...comparison.bench_chart import draw_benchmark
from ...comparison.bench_inputs import LARGEST_CACHE
from ...comparison.bench_run import DTYPES, MASKS, MOST_TOKENS, Asked, measure
from ...comparison.bench_tables import console
from ...comparison.contenders import parse_backends, split_backends
from ...comparison.presets import PRESETS, largest, parse_presets
from ..configure.selector import CATEGORY
from ..hook.hook_calls import run_comfy
from ..hook.origins import name_of
from ..hook.run import router_for
from ..inputs import text_of

ALL = "all"


class AttentionBenchmark(io.ComfyNode):
    """Names of presets and backends in; a table, a chart and JSON out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        models = "\n".join(f"{preset.name}: {preset.model}" for preset in PRESETS.values())
        return io.Schema(
            node_id="AttentionBenchmark",
            display_name="Attention Benchmark",
            category=CATEGORY,
            description=(
                "Times every attention kernel on the calls of real models, with its error, its memory and a ranking. "
                "It needs no model. What ComfyUI itself would run is a row. A kernel that cannot run says why."
            ),
            search_aliases=["attention speed", "kernel benchmark", "sage vs flash"],
            inputs=[
                io.Combo.Input(
                    "presets", options=[ALL, *PRESETS], default="hv15",
                    tooltip=f"Whose attention calls to time; {ALL} takes minutes on a GPU.\n{models}",
                ),
                io.Int.Input(
                    "tokens", default=0, min=0, max=MOST_TOKENS,
                    tooltip="0: the full lengths, for a GPU. On a CPU give 256 to 1024: the longest side is scaled "
                    "down to it, the other lengths and the hidden keys in proportion.",
                ),
                io.Combo.Input(
                    "masked", options=list(MASKS), default="both",
                    tooltip="With a mask that hides the keys that the model pads, without one, or both.",
                ),
                io.String.Input(
                    "backends", default="",
                    tooltip="Names separated by commas; torch_sdpa is always there. Empty: all that run on this "
                    "machine, cuDNN and what ComfyUI itself would run.",
                ),
                io.Combo.Input("dtype", options=list(DTYPES), default="bfloat16"),
                io.Int.Input(
                    "seed", default=0, min=0, max=2**63 - 1,
                    tooltip="Of the inputs. Another one measures again; with the same, ComfyUI keeps the result.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="table"),
                io.Image.Output(display_name="chart"),
                io.String.Output(display_name="report", tooltip="JSON, with the machine and the versions."),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, backends: Any) -> bool | str:
        """Refuse a backend that does not exist before anything runs."""
        if not isinstance(backends, str):  # connected to another node: known only when it runs
            return True
        try:
            if text_of(backends).strip():
                parse_backends(split_backends(backends))
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, presets: str, tokens: int, masked: str, backends: str, dtype: str, seed: int) -> io.NodeOutput:
        asked = Asked(presets, text_of(backends), masked, dtype=dtype, tokens=tokens, seed=seed)
        device = comfy.model_management.get_torch_device()
        # Models that other graphs left on the card would make kernels run out of memory; ComfyUI loads them again.
        elements = largest([preset.scaled(tokens) for preset in parse_presets(presets)])
        comfy.model_management.free_memory(16 * elements + LARGEST_CACHE, device)
        bar: Any = None

        def progress(what: str, done: int, total: int) -> None:
            nonlocal bar
            comfy.model_management.throw_exception_if_processing_interrupted()
            bar = bar or comfy.utils.ProgressBar(total)
            bar.update_absolute(done, total)

        report = measure(
            asked, router_for(device), device, host=as_comfyui_would, host_name=name_of(attention.optimized_attention),
            progress=progress, versions={"comfyui": comfyui_version.__version__},
        )  # fmt: skip
        comfy.model_management.soft_empty_cache()
        if bar is not None:
            bar.update_absolute(bar.total)
        chart = picture.to_tensor(draw_benchmark(report))
        return io.NodeOutput(console(report), chart, report.to_json(), ui=ui.PreviewImage(chart, cls=cls))


def as_comfyui_would(call: AttentionCall) -> torch.Tensor:
    """Run a call as a model without any of our nodes would: ComfyUI's own choice, start-up flags included."""
    arguments = {"heads": call.query.shape[1], "skip_reshape": True, "skip_output_reshape": True}
    query, key, value = call.query, call.key, call.value
    return run_comfy(attention.optimized_attention, query, key, value, call.attn_mask, None, arguments)
