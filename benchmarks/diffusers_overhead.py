"""What routing costs in Diffusers: a forward of a tiny model with a configuration applied, less the unpatched one.

The tensors are too small to hide it, and both ways compute with the same SDPA, so the difference divided by the number
of attention calls is the cost of one. It includes what a forward costs once: the run, the timeline, the guard.

Two models that are built alike take turns: in the first half one of them is patched, in the second half the other one,
so that where their weights lie in memory does not count. A deep copy would not do: its dictionaries are laid out in
another way, which takes 7,000 more instructions per call. Both ways alternate in an order that is drawn anew in each
round. The figure is the median of paired differences over both halves with a 95 % interval by bootstrap.
`unpatched_minus_unpatched` is the same without any patch, what noise makes of zero: where its interval does not hold 0,
or the interval of `ours_minus_unpatched` is wider than 1 us, the machine was not quiet.

Times are of the thread's CPU where the platform has a fine clock of it: what other processes take is left out, their
effect on caches and clock rate is not.

Run: python benchmarks/diffusers_overhead.py [--json FILE] [--rounds N]   (needs Diffusers; about two minutes)
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "integrations")]

import conftest  # noqa: E402, F401  # loads this folder as the package attention_backends
import torch  # noqa: E402
from paired import interval, machine, training_paused  # noqa: E402

LAYERS = 24
IS_FINE = hasattr(time, "thread_time_ns") and time.get_clock_info("thread_time").resolution <= 1e-6
CLOCK = time.thread_time_ns if IS_FINE else time.perf_counter_ns


def models() -> dict[str, tuple[Callable[[], Any], dict[str, Any]]]:
    """Wan, whose processors call Diffusers' dispatch, and SD3, whose processors call SDPA, with many blocks."""
    import tiny_diffusers as tiny
    from diffusers import SD3Transformer2DModel, WanTransformer3DModel

    wan = partial(
        WanTransformer3DModel, num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=16, ffn_dim=32, num_layers=LAYERS, rope_max_seq_len=32,
    )  # fmt: skip
    sd3 = partial(
        SD3Transformer2DModel, sample_size=8, in_channels=4, num_layers=LAYERS, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=64,
        out_channels=4, pos_embed_max_size=16,
    )  # fmt: skip
    return {"wan": (wan, tiny.wan()[1]), "sd3": (sd3, tiny.sd3()[1])}


def differences(base: Any, other: Any, given: dict[str, Any], rounds: int) -> tuple[list[float], list[float]]:
    """Milliseconds of a forward of `base` in each round, and those of `other` less those of `base`."""
    forwards = {"base": partial(base, **given, return_dict=False), "other": partial(other, **given, return_dict=False)}
    times: dict[str, list[float]] = {name: [] for name in forwards}
    rng = random.Random(0)
    for forward in (*forwards.values(), *forwards.values()):
        forward()
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name in rng.sample(list(forwards), 2):
                start = CLOCK()
                forwards[name]()
                times[name].append((CLOCK() - start) / 1e6)
    finally:
        gc.enable()
    pairs = zip(times["base"], times["other"], strict=True)
    return times["base"], [other - base for base, other in pairs]


def measured(build: Callable[[], Any], given: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Microseconds per attention call: ours minus unpatched, and unpatched minus unpatched."""
    from attention_backends.integrations.diffusers import apply, reset

    model, other = build().eval(), build().eval()
    half = max(rounds // 2, 1)
    unpatched: list[float] = []
    of_ours: list[list[float]] = []
    of_noise: list[list[float]] = []
    with torch.no_grad():
        for base, patched in ((model, other), (other, model)):
            of_noise.append(differences(base, patched, given, half)[1])
            applied = apply(patched, "torch_sdpa")
            times, more = differences(base, patched, given, half)
            calls = applied.reports["model"].calls / (half + 2)
            reset(patched)
            unpatched += times
            of_ours.append(more)
    return {
        "attention_calls": calls,
        "unpatched_ms": interval(unpatched),
        "ours_minus_unpatched_us_per_call": interval(_per_call(of_ours, calls), 2),
        "unpatched_minus_unpatched_us_per_call": interval(_per_call(of_noise, calls), 2),
    }


def _per_call(halves: list[list[float]], calls: float) -> list[float]:
    """Microseconds per call of each pair of rounds, one from each half: what differs between the models cancels."""
    return [(first + second) / 2 / calls * 1e3 for first, second in zip(*halves, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--rounds", type=int, default=400)
    options = parser.parse_args()
    torch.set_num_threads(1)
    import diffusers

    with training_paused():
        load = os.getloadavg() if hasattr(os, "getloadavg") else ()
        results: dict[str, Any] = {
            "command": f"python benchmarks/diffusers_overhead.py --rounds {options.rounds}",
            "machine": f"{machine()}, one torch thread", "python": platform.python_version(),
            "torch": torch.__version__, "diffusers": diffusers.__version__, "clock": CLOCK.__name__,
            "load_before": [round(one, 2) for one in load],
        }  # fmt: skip
        for name, (build, given) in models().items():
            results[name] = measured(build, given, options.rounds)
        results["load_after"] = [round(one, 2) for one in (os.getloadavg() if load else ())]
    text = json.dumps(results, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
