"""What the trace costs: model calls of a Wan of 30 layers with it full, sampled and off, alternated in one process.

Run: python benchmarks/trace_cost.py [--json FILE]   (needs a ComfyUI; about a minute on a quiet machine)

Two figures for each setting. **Paired**: the time of a model call over that of the one next to it with the trace off,
with a 95 % interval; a call takes 50 ms or more, as the limit is over a step. **Counted**: what the trace does in a
model call, each piece alone in a loop (best of many), over a step of 50 ms: finer than a machine's noise. Limits: on,
at most 1 % of a step; off, nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import random
import statistics
import sys
import time
import timeit
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(Path(__file__).resolve().parent)]

import comfy_location  # noqa: E402
import conftest  # noqa: E402, F401  # loads this folder as the package attention_backends
import tiny_models  # noqa: E402
import tiny_sampling  # noqa: E402
import torch  # noqa: E402
from paired import interval, machine, training_paused  # noqa: E402

MODES = ("full", "sampled", "off")
STEPS = 20
STEP_MS = 50
LAYERS = 30
"""As many as Wan 2.1 1.3B has; each has two attention calls."""


class Model:
    """A narrow Wan with our node on it, ready for single model calls of a run with any trace."""

    def __init__(self, device: torch.device, tokens: int) -> None:
        from attention_backends.nodes.hook import patch
        from attention_backends.nodes.hook import run as sampling

        family = tiny_models.FAMILIES["wan"]
        narrow = {"dim": 128, "ffn_dim": 256, "text_dim": 16, "freq_dim": 32, "num_layers": LAYERS}
        tiny_models.FAMILIES["wan"] = replace(family, unet={**family.unet, **narrow}, text=(20, 16))
        patcher = tiny_sampling.build("wan")
        tiny_models.FAMILIES["wan"] = family
        patched = patch.set_default(patcher, "torch_sdpa", accuracy="exact", strict=False, guard="off")
        self.device = device
        self.sampling = sampling
        self.model = patched.model.to(device)
        self.options = patched.model_options["transformer_options"]
        self.sigmas = torch.linspace(1.0, 0.0, STEPS + 1, device=device)
        self.latent = torch.randn(1, 16, 1, 32, tokens // 8, device=device)  # a patch is 2 x 2
        self.text = torch.randn(1, 20, 16, device=device)

    def new_run(self, mode: str) -> Any:
        """A run whose trace keeps what `mode` says, its marks not yet on the model."""
        run = self.sampling.Run(self.options[self.sampling.KEY])
        run.run_report.mode = mode
        return run

    def call(self, run: Any, step: int) -> float:
        """Milliseconds of one model call, the device waited for before and after it."""
        sigma = self.sigmas[step % STEPS].repeat(1)
        of_run = {self.sampling.RUN_KEY: run, "sigmas": sigma, "sample_sigmas": self.sigmas, "cond_or_uncond": [0]}
        self.sampling.synchronise(self.device)
        start = time.perf_counter()
        self.model.apply_model(
            self.latent, sigma, c_crossattn=self.text, transformer_options={**self.options, **of_run}
        )
        self.sampling.synchronise(self.device)
        return 1e3 * (time.perf_counter() - start)


def paired(model: Model, rounds: int) -> dict[str, Any]:
    """Rounds of one model call in each mode, in an order drawn anew; ratios to the call of the round with it off."""
    rng = random.Random(0)
    names = (*MODES, "off again")  # how much two calls differ that do the same
    runs = {name: model.new_run(name.split()[0]) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        for turn in range(-2, rounds):
            for name in rng.sample(names, len(names)):
                runs[name].mark(model.model, {"sample_sigmas": model.sigmas})
                taken = model.call(runs[name], turn % STEPS)
                runs[name].close()  # marks of one run only, outside what is timed
                if turn >= 0:
                    times[name].append(taken)
    finally:
        gc.enable()
    return {
        "model_call_ms": round(statistics.median(times["off"]), 2),
        "rounds": rounds,
        **{
            name: interval([a / b for a, b in zip(times[name], times["off"], strict=True)], 5)
            for name in names
            if name != "off"
        },
    }


def best(work: Callable[[], Any], number: int = 2000, rounds: int = 25) -> float:
    """Microseconds of one execution: the fastest of several loops."""
    return 1e6 * min(timeit.repeat(work, number=number, repeat=rounds)) / number


def counted(model: Model) -> dict[str, Any]:
    """What each attention call and each model call pay for the trace, and their share of a step of `STEP_MS`."""
    from attention_backends.backends.measure.device_clock import DeviceClock
    from attention_backends.backends.report import Row
    from attention_backends.backends.report.timed_kernel import timed_kernel

    run = model.new_run("full")
    model.call(run, 0)
    run.close()
    attention_calls, rows = sum(row.calls for row in run.run_report.rows.values()), len(run.run_report.rows)
    kind = model.device.type

    class Call:
        query = torch.empty(1, device=model.device)

    def per_call(mode: str) -> float:
        clock, call = DeviceClock(kind), Call()
        clock.paused = mode == "sampled"  # most of its model calls
        kernel: Any = timed_kernel(lambda call: None, clock, Row("", "", "", "", ""))

        def calls() -> None:
            for _ in range(attention_calls):
                kernel(call)
            clock.collect()

        return best(calls, number=20) / attention_calls - best(lambda: (lambda call: None)(call))

    def per_model_call(mode: str) -> float:
        def once() -> float:
            """Of a run's first model calls, each of which is its own window."""
            run_report, clock = model.new_run(mode).run_report, DeviceClock(kind)
            run_report.rows.update(run.run_report.rows)
            sigma = model.sigmas[1].repeat(1)
            start = time.perf_counter()
            for _ in range(60):
                run_report.end_of_model_call(clock, model.device, sigma, model.sigmas)
            return 1e6 * (time.perf_counter() - start) / 60

        return min(once() for _ in range(200))

    found: dict[str, Any] = {"attention_calls": attention_calls, "rows": rows}
    for mode in MODES:
        each, end = 0.0 if mode == "off" else per_call(mode), per_model_call(mode)
        found[mode] = {
            "us_per_attention_call": round(each, 3),
            "us_per_model_call": round(end, 3),
            f"percent_of_{STEP_MS}_ms": round((each * attention_calls + end) / (10 * STEP_MS), 4),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    parser.add_argument("--rounds", type=int, default=150)
    parser.add_argument("--tokens", type=int, default=512, help="of the picture; more take longer")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda where this torch has it")
    arguments = parser.parse_args()
    comfyui = comfy_location.find_comfyui()
    if comfyui is None:
        raise SystemExit(comfy_location.why_no_comfyui())
    tiny_sampling.prepare(comfyui)
    logging.disable(logging.WARNING)
    with torch.inference_mode():
        model = Model(torch.device(arguments.device), arguments.tokens)
        found = {
            "machine": torch.cuda.get_device_name() if arguments.device == "cuda" else machine(),
            "torch": torch.__version__,
            "tokens": arguments.tokens,
            "paired": paired(model, arguments.rounds),
            "counted": counted(model),
        }
    text = json.dumps(found, indent=2)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    with training_paused():
        main()
