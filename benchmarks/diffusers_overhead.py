"""What routing costs in Diffusers: a forward of a tiny model with a configuration applied, less the unpatched one.

The tensors are too small to hide it, and both ways compute with the same SDPA, so the difference divided by the number
of attention calls is the cost of one. It includes what a forward costs once: the run, the timeline, the guard. Both
ways alternate in an order that is drawn anew in each round; the figure is the median of paired differences with a 95 %
interval by bootstrap.

Run: python benchmarks/diffusers_overhead.py [--json FILE] [--rounds N]   (needs Diffusers; about one minute)
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "integrations")]

import conftest  # noqa: E402, F401  # loads this folder as the package attention_backends
import torch  # noqa: E402
from paired import alternated, interval, machine, training_paused  # noqa: E402

LAYERS = 24


def models() -> dict[str, tuple[Any, dict[str, Any]]]:
    """Wan, whose processors call Diffusers' dispatch, and SD3, whose processors call SDPA, with many blocks."""
    import tiny_diffusers as tiny
    from diffusers import SD3Transformer2DModel, WanTransformer3DModel

    wan = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=32, num_layers=LAYERS, rope_max_seq_len=32,
    )  # fmt: skip
    sd3 = SD3Transformer2DModel(
        sample_size=8, in_channels=4, num_layers=LAYERS, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=64, out_channels=4,
        pos_embed_max_size=16,
    )  # fmt: skip
    return {"wan": (wan.eval(), tiny.wan()[1]), "sd3": (sd3.eval(), tiny.sd3()[1])}


def measured(model: Any, given: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Microseconds per attention call: ours minus unpatched, the same model with its stand-ins set and removed."""
    import copy

    from attention_backends.integrations.diffusers import apply, reset

    other = copy.deepcopy(model)
    applied = apply(other, "torch_sdpa")

    def unpatched() -> None:
        model(**given, return_dict=False)

    def ours() -> None:
        other(**given, return_dict=False)

    with torch.no_grad():
        times = alternated({"unpatched": unpatched, "ours": ours}, rounds, calls=2)
        calls = applied.reports["model"].calls / (2 * rounds + 2)
    reset(other)
    pairs = zip(times["ours"], times["unpatched"], strict=True)
    return {
        "attention_calls": calls,
        "unpatched_ms": interval([one / 2 for one in times["unpatched"]]),
        "ours_minus_unpatched_us_per_call": interval([(one - base) / 2 / calls * 1e3 for one, base in pairs]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    import diffusers

    with training_paused():
        load = os.getloadavg() if hasattr(os, "getloadavg") else ()
        results: dict[str, Any] = {
            "machine": machine(), "torch": torch.__version__, "diffusers": diffusers.__version__,
            "load_before": [round(one, 2) for one in load], "rounds": options.rounds,
        }  # fmt: skip
        for name, (model, given) in models().items():
            results[name] = measured(model, given, options.rounds)
            print(name, results[name], flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
