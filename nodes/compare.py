"""Node Compare Attention Backends: one sampling set-up, several backends or patched models, one picture and report."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import comfyui_version
import torch
from comfy_api.latest import io

from ..backends.names import COMFY
from ..backends.router import NoBackendError
from ..comparison import machine, metrics, picture, tables
from ..comparison.calls import compare_calls
from ..comparison.contenders import REFERENCE, RefusedError, parse_backends
from ..comparison.report import ComparisonError, Report, Row
from ..comparison.rounds import Entry, round_robin
from . import graph, patch, runs, similarity
from .capture import capturing
from .pictures import decode
from .sampling import router_for
from .selector import CATEGORY
from .timed import timed

log = logging.getLogger("attention_backends")

PATCHED = ("model_1", "model_2", "model_3", "model_4")
NOT_MEASURED = "VBench: not measured; it scores many prompts and seeds, a comparison has one"
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
                    default="torch_sdpa, cudnn_attn, flash_attn, sage_attn",
                    tooltip="Names separated by commas. One that cannot run here is a panel that says why. Leave "
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
                io.Float.Input("cfg", default=1.0, min=0.0, max=100.0, tooltip="Used with model, not with a guider."),
                io.Guider.Input("guider", optional=True),
                io.Model.Input("model", optional=True),
                io.Conditioning.Input("positive", optional=True),
                io.Conditioning.Input("negative", optional=True),
                io.Vae.Input("vae", optional=True, tooltip="Without it the pictures are ComfyUI's linear previews."),
                *(
                    io.Model.Input(name, optional=True, tooltip="A model with attention nodes of its own, as a row.")
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


class SetUp:
    """One sampling run with everything but the model's attention fixed."""

    def __init__(
        self, guider: Any, noise: Any, sampler: Any, sigmas: torch.Tensor, latent: dict[str, Any], mode: str
    ) -> None:
        self.guider = guider
        self.sampler = sampler
        self.mode = mode
        self.seed = noise.seed
        self.noise_mask = latent.get("noise_mask")
        image = comfy.sample.fix_empty_latent_channels(guider.model_patcher, latent["samples"])
        check_latent(image, guider.model_patcher)
        self.latent = image
        self.noise = noise.generate_noise({**latent, "samples": image})
        self.sigmas = sigmas
        middle = (len(sigmas) - 1) // 2
        if mode != "end_to_end" and middle:  # of a single step nothing can be sampled before
            self.latent = self.sample(guider.model_patcher, sigmas[: middle + 1])
            self.noise = torch.zeros_like(self.noise)
            self.sigmas = sigmas[middle : middle + 2]

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    def sample(
        self, model: Any, sigmas: torch.Tensor | None = None, on_step: Callable[..., None] | None = None
    ) -> torch.Tensor:
        """Sample with `model` in place of the guider's own; on the CPU."""
        guider = copy.copy(self.guider)
        guider.model_patcher, guider.model_options = model, model.model_options
        result: torch.Tensor = guider.sample(
            self.noise, self.latent, self.sampler, self.sigmas if sigmas is None else sigmas,
            denoise_mask=self.noise_mask, callback=on_step, disable_pbar=True, seed=self.seed,
        )  # fmt: skip
        return result.cpu()


def check_latent(latent: torch.Tensor, model: Any) -> None:
    """Raises ComparisonError for a latent that is another model's: its error would otherwise stand in every row."""
    if latent.is_nested:
        return
    expected = model.get_model_object("latent_format")
    shape, dimensions = tuple(latent.shape), expected.latent_dimensions + 2
    if len(shape) != dimensions or shape[1] != expected.latent_channels:
        raise ComparisonError(
            f"latent_image of shape {shape} is not one of this model, which has {expected.latent_channels} channels in "
            f"{dimensions} dimensions, batch and channels first: make it with this model's empty latent node or VAE"
        )


class Variant:
    """One patched model in the race; what `rounds.round_robin` asks of an attention."""

    def __init__(self, row: Row, model: Any) -> None:
        self.row = row
        self.model, self._timed = timed(model)
        self.account: dict[str, Any] | None = None
        self._asked_before: dict[str, Any] | None = None

    @property
    def ran(self) -> str | None:
        """Every backend that computed attention in the last run."""
        rows = self.account["rows"] if self.account else []
        return " + ".join(dict.fromkeys(row["member"] or row["backend"] for row in rows)) or None

    def attention_ms(self, device: torch.device) -> float | None:
        """Time in attention of the run since this was asked last; None where it is not measured, or not of each call.

        On a GPU the device has come to rest by now, so its events can be read.
        """
        account = self.account if self.account is not self._asked_before else None
        self._asked_before = self.account
        if self._timed is not None and self._timed.times(device):
            milliseconds, counted = self._timed.milliseconds()
            calls = 0 if account is None else sum(row["calls"] for row in account["rows"])
            return milliseconds if 0 < calls == counted else None
        if account is None or any(row["timed"] != row["calls"] for row in account["rows"]):
            return None
        return float(sum(row["ms"] for row in account["rows"]))


def make_guider(model: Any, positive: Any, negative: Any, cfg: float) -> Any:
    """A CFG guider. Raises ComparisonError when something is not connected."""
    missing = [name for name, given in (("model", model), ("positive", positive)) if given is None]
    if missing:
        raise ComparisonError(f"connect a guider, or model, positive and negative; missing: {', '.join(missing)}")
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative if negative is not None else positive)
    guider.set_cfg(cfg if negative is not None else 1.0)
    return guider


def compare_attention(setup: SetUp, backends: str, patched: dict[str, Any], repeat: int) -> Report:
    """Every backend on the same calls, one of each role and shape, from a step in the middle of sampling."""
    if patched:
        raise ComparisonError("mode attention compares backends by name: disconnect model_1 to model_4")
    if not backends.strip():
        raise ComparisonError("nothing to compare: name backends, such as sdpa_math")
    router = router_for(setup.guider.model_patcher.load_device)
    names = backend_names(backends)
    rows = [Row(name, failed="; ".join(router.unavailable(name)) or None) for name in names]
    model, calls = capturing(setup.guider.model_patcher)
    setup.sample(model)
    if not calls:
        raise ComparisonError("no attention call of this model reached the hook: there is nothing to compare")
    able = [row.asked for row in rows if row.failed is None]
    progress_bar = comfy.utils.ProgressBar((repeat + 1) * len(able))

    cancelled = Cancelled()

    def progress(what: str, done: int, total: int) -> None:
        with cancelled:
            comfy.model_management.throw_exception_if_processing_interrupted()
            progress_bar.update_absolute(done, total)

    measured, _ = compare_calls(list(calls.values()), able, router, repeat, progress)
    found = {row.asked: row for row in measured}
    report = make_report(setup, [found.get(row.asked, row) for row in rows])
    report.relate()
    cancelled.go_on(report)
    progress_bar.update_absolute(progress_bar.total)
    report.notes.append("one call of each role and shape, from one step in the middle of sampling")
    return report


def backend_names(backends: str) -> list[str]:
    """The ids that are named, the reference first and what ComfyUI would run second."""
    names = parse_backends(backends.split(",")) if backends.strip() else [REFERENCE]
    if COMFY not in names:
        names.insert(1, COMFY)
    return names


def make_variants(model: Any, backends: str, patched: dict[str, Any]) -> list[Variant]:
    """The rows: the reference, what ComfyUI would run, each named backend, each connected model."""
    if not backends.strip() and not patched:
        raise ComparisonError("nothing to compare: name backends, or connect patched models")
    router = router_for(model.load_device)
    variants = []
    for name in backend_names(backends):
        row = Row(name, failed="; ".join(router.unavailable(name)) or None)
        settings = {"accuracy": "sparse", "strict": True, "guard": "off"}
        variants.append(Variant(row, patch.set_default(model, name, **settings)))
    variants += [Variant(Row(name, label=name.replace("_", " ")), given) for name, given in patched.items()]
    return variants


def compare(setup: SetUp, variants: list[Variant], repeat: int) -> tuple[Report, list[torch.Tensor | None]]:
    """Run every variant, warmed up and interleaved; a row that cannot run says why, finished rows are kept."""
    device = setup.guider.model_patcher.load_device
    entries = {id(variant): Entry(variant.row, variant) for variant in variants}  # type: ignore[arg-type]
    able = [variant for variant in variants if variant.row.failed is None]
    progress = Steps(setup.steps, repeat, len(able))
    by_entry = {id(entries[id(variant)]): variant for variant in variants}
    cancelled = Cancelled()

    def run(entry: Entry, lap: Callable[[], None], sigmas: torch.Tensor) -> list[torch.Tensor]:
        variant = by_entry[id(entry)]

        def on_step(*_: Any) -> None:
            progress.bar.update(1)
            lap()

        before = runs.recent()[:1]
        try:
            with cancelled:
                result = setup.sample(variant.model, sigmas, on_step)
        except NoBackendError as error:
            raise RefusedError(first_reason(error)) from error
        newest = runs.recent()[:1]
        variant.account = newest[0] if newest != before else None
        return [result]

    def begin_run(what: str, done: int, total: int) -> None:
        with cancelled:
            comfy.model_management.throw_exception_if_processing_interrupted()
            progress.begin_run(done)

    round_robin(
        [entries[id(variant)] for variant in able], repeat,
        lambda entry, lap: run(entry, lambda: None, setup.sigmas[:2]),
        lambda entry, lap: run(entry, lap, setup.sigmas),
        device, begin_run,
    )  # fmt: skip
    report = make_report(setup, [variant.row for variant in variants])
    cancelled.go_on(report)
    progress.end()
    return report, [entries[id(variant)].result[0] if entries[id(variant)].result else None for variant in variants]


class Cancelled:
    """Around what ComfyUI can cancel: tells it to `round_robin` as a keyboard's interrupt, and keeps it."""

    error: BaseException | None = None

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, comfy.model_management.InterruptProcessingException):
            self.error = error
            raise KeyboardInterrupt from error

    def go_on(self, report: Report) -> None:
        """Go on cancelling, if that was asked for; what was measured before is in the log then."""
        if self.error is not None:
            report.relate()
            log.info("the comparison was cancelled; what was measured before:\n%s", tables.console(report))
            raise self.error


class Steps:
    """The progress bar over all runs: warm-ups of one step each, then `repeat` rounds of whole runs."""

    def __init__(self, steps: int, repeat: int, rows: int) -> None:
        self.steps = steps
        self.rows = rows
        self.bar = comfy.utils.ProgressBar(rows * (1 + steps * repeat))

    def begin_run(self, done: int) -> None:
        """Go to where run number `done` begins, also past runs that failed before their end."""
        if done:
            self.bar.update_absolute(min(done, self.rows) + max(0, done - self.rows) * self.steps)

    def end(self) -> None:
        """All is done, whatever failed."""
        self.bar.update_absolute(self.bar.total)


def first_reason(error: NoBackendError) -> str:
    """The named backend's own reasons out of a strict refusal."""
    lines = str(error).splitlines()
    return lines[3].strip() if len(lines) > 3 else lines[0]


def make_report(setup: SetUp, rows: list[Row]) -> Report:
    """What all rows share."""
    platform = router_for(setup.guider.model_patcher.load_device).platform
    shape = list(setup.latent.shape) if not setup.latent.is_nested else list(setup.latent.unbind()[0].shape)
    sampler = getattr(getattr(setup.sampler, "sampler_function", None), "__name__", type(setup.sampler).__name__)
    model = setup.guider.model_patcher.model
    return Report(
        mode=setup.mode,
        model=type(model).__name__,
        prompt="",
        seed=setup.seed,
        width=shape[-1],
        height=shape[-2],
        frames=shape[2] if len(shape) == 5 else 1,
        steps=setup.steps,
        guidance=float(getattr(setup.guider, "cfg", 1.0)),
        sampling=f"{sampler}, sigmas {float(setup.sigmas[0]):.4g} to {float(setup.sigmas[-1]):.4g}",
        dtype=str(model.get_dtype()).removeprefix("torch."),
        machine=machine.describe(platform),
        versions={**machine.versions(platform), "comfyui": comfyui_version.__version__},
        rows=rows,
        notes=["sizes are those of the latent", NOT_MEASURED],
    )


def judge(report: Report, results: list[torch.Tensor | None], model: Any, vae: Any) -> list[torch.Tensor | None]:
    """Pictures of the results, and in the report's rows what each says against the first."""
    report.relate()
    pictures = [None if result is None else decode(result, model, vae) for result in results]
    for row, result, shown in zip(report.rows, results, pictures, strict=True):
        if result is None or shown is None:
            continue
        row.broken = metrics.what_is_not_finite(result)
        if pictures[0] is not None and results[0] is not None:
            metrics.score(row, shown, pictures[0])
            row.relative_l2 = metrics.relative_l2(result, results[0])
            row.cosine = metrics.cosine(result, results[0])
    return pictures


def prompt_text(prompt: graph.Prompt, node_id: str) -> str:
    """The texts written upstream of the node, for the report."""
    found = graph.settings(prompt, node_id)
    texts = [value for key, value in found.items() if key.rsplit(".", 1)[-1] in ("text", "caption", "prompt")]
    flat = [text for value in texts for text in (value if isinstance(value, list) else [value])]
    return " | ".join(text for text in flat if isinstance(text, str) and text)
