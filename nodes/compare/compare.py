"""Node Compare Attention Backends: one sampling set-up, several backends or patched models, one picture and report.

The set-up is in `compare_setup.py`, the runs in `compare_runs.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ...backends.measure.error import cosine, relative_l2
from ...comparison import metrics, picture, tables
from ...comparison.contenders import parse_backends, split_backends
from ...comparison.report import ComparisonError, Report
from ..configure.selector import CATEGORY
from ..history import graph
from ..inputs import text_of, wrong_link
from . import similarity
from .compare_runs import compare, compare_attention, make_variants
from .compare_setup import SetUp, make_guider
from .pictures import decode

PATCHED = ("model_1", "model_2", "model_3", "model_4")
DEFAULT_BACKENDS = "torch_sdpa, cudnn_attn, flash_attn, sage_attn"
MOST_CFG = 100.0
MODES = ("end_to_end", "one_step", "attention")


class AttentionCompare(io.ComfyNode):
    """Samples once per backend, same noise, and shows latents, pictures, differences, times and memory."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AttentionCompare",
            display_name="Compare Attention Backends",
            category=CATEGORY,
            description=(
                "Samples the same noise once per backend and draws the pictures side by side, with what really ran, "
                "times, memory and the differences. torch_sdpa is the reference; what ComfyUI would run is always a "
                "row. Connect a guider, or a model with positive and negative."
            ),
            search_aliases=["attention benchmark", "sage vs sdpa", "backend comparison"],
            inputs=[
                io.Noise.Input("noise"),
                io.Sampler.Input("sampler"),
                io.Sigmas.Input("sigmas"),
                io.Latent.Input("latent_image"),
                io.String.Input(
                    "backends",
                    default=DEFAULT_BACKENDS,
                    tooltip="Names separated by commas. Unavailable ones are shown with the reason. Leave "
                    "empty to compare only the models connected below.",
                ),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default="end_to_end",
                    tooltip="end_to_end: the finished pictures. one_step: one step from the same half-finished "
                    "latent, which shows a kernel's error before sampling amplifies it; with sigmas of one step, that "
                    "step from the noise. attention: the same query, key and value, taken from the model, against "
                    "float64.",
                ),
                io.Int.Input("repeat", default=1, min=1, max=20, tooltip="Timed runs of each backend after warm-up."),
                io.Float.Input(
                    "cfg", default=1.0, min=0.0, max=MOST_CFG, tooltip="Used with model, not with a guider."
                ),
                io.Guider.Input("guider", optional=True),
                io.Model.Input("model", optional=True),
                io.Conditioning.Input("positive", optional=True),
                io.Conditioning.Input("negative", optional=True),
                io.Vae.Input("vae", optional=True, tooltip="Without it the pictures are ComfyUI's linear previews."),
                *(
                    io.Model.Input(name, optional=True, tooltip="Optional: an already patched model to include.")
                    for name in PATCHED
                ),
                io.ClipVision.Input(
                    "clip_vision", optional=True, tooltip="With it, each row has the CLIP similarity to the reference."
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="latents", tooltip="One batch, in the order of the rows that finished."),
                io.Image.Output(display_name="comparison"),
                io.String.Output(display_name="table"),
                io.String.Output(display_name="report", tooltip="JSON."),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(
        cls,
        cfg: Any = None,
        backends: Any = None,
        guider: Any = None,
        model: Any = None,
        positive: Any = None,
        negative: Any = None,
        vae: Any = None,
        model_1: Any = None,
        model_2: Any = None,
        model_3: Any = None,
        model_4: Any = None,
        clip_vision: Any = None,
        input_types: Any = None,
    ) -> bool | str:
        """What can be known before hours of sampling; an input that is connected is None here."""
        sockets = {
            "guider": guider, "model": model, "positive": positive, "negative": negative, "vae": vae,
            "model_1": model_1, "model_2": model_2, "model_3": model_3, "model_4": model_4, "clip_vision": clip_vision,
        }  # fmt: skip
        if problem := wrong_link(cls, input_types, **sockets):
            return problem
        if input_types is not None and "guider" not in input_types:
            missing = [name for name in ("model", "positive") if name not in input_types]
            if missing:
                return f"connect a guider, or model, positive and negative; missing: {', '.join(missing)}"
        if isinstance(cfg, float) and not 0 <= cfg <= MOST_CFG:  # nan is neither
            return f"cfg {cfg} is not a number from 0 to {MOST_CFG:g}"
        try:
            if isinstance(backends, str) and (names := text_of(backends, DEFAULT_BACKENDS).strip()):
                parse_backends(split_backends(names))
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls,
        noise: Any,
        sampler: Any,
        sigmas: torch.Tensor,
        latent_image: dict[str, Any],
        backends: str,
        mode: str,
        repeat: int,
        cfg: float,
        guider: Any = None,
        model: Any = None,
        positive: Any = None,
        negative: Any = None,
        vae: Any = None,
        clip_vision: Any = None,
        **patched: Any,
    ) -> io.NodeOutput:
        backends = text_of(backends, DEFAULT_BACKENDS)
        if sigmas.shape[-1] < 2:
            raise ComparisonError(f"sigmas of length {sigmas.shape[-1]}: at least one step is needed")
        guider = guider if guider is not None else make_guider(model, positive, negative, cfg)
        setup = SetUp(guider, noise, sampler, sigmas, latent_image, mode)
        models = {name: given for name, given in patched.items() if given is not None}
        results: list[torch.Tensor | None]
        if mode == "attention":
            report, results = compare_attention(setup, backends, models, repeat), []
        else:
            report, results = compare(setup, make_variants(guider.model_patcher, backends, models), repeat)
        report.prompt = prompt_text(cls.hidden.prompt or {}, str(cls.hidden.unique_id))
        pictures = judge(report, results, guider.model_patcher, vae) if results else []
        if clip_vision is not None:
            similarity.score(report.rows, pictures, clip_vision)
        done = [result for result in results if result is not None]
        latents = {**latent_image, "samples": batch(done) if done else latent_image["samples"]}
        drawn = picture.to_tensor(picture.draw(report, pictures))
        return io.NodeOutput(latents, drawn, tables.console(report), report.to_json())


def batch(results: list[torch.Tensor]) -> torch.Tensor:
    """All results as one batch; latents of several parts (video with audio) cannot be joined: the first alone."""
    return results[0] if results[0].is_nested else torch.cat(results)


def judge(report: Report, results: list[torch.Tensor | None], model: Any, vae: Any) -> list[torch.Tensor | None]:
    """Pictures of the results, in the report their size, and in its rows what each says against the first."""
    report.relate()
    pictures = [None if result is None else decode(result, model, vae) for result in results]
    if vae is None:
        report.notes.append("pictures are previews of the latents: connect a VAE for full ones")
    elif (shown := next((picture for picture in pictures if picture is not None), None)) is not None:
        report.frames, report.height, report.width = shown.shape[:3]
    for row, result, shown in zip(report.rows, results, pictures, strict=True):
        if result is None or shown is None:
            continue
        row.broken = metrics.what_is_not_finite(result)
        if pictures[0] is not None and results[0] is not None:
            metrics.score(row, shown, pictures[0])
            row.relative_l2 = relative_l2(result, results[0])
            row.cosine = cosine(result, results[0])
    return pictures


def prompt_text(prompt: graph.Prompt, node_id: str) -> str:
    """The texts written upstream of the node, for the report."""
    found = graph.settings(prompt, node_id)
    texts = [value for key, value in found.items() if key.rsplit(".", 1)[-1] in ("text", "caption", "prompt")]
    flat = [text for value in texts for text in (value if isinstance(value, list) else [value])]
    return " | ".join(text for text in flat if isinstance(text, str) and text)
