"""What routing costs: our path against ComfyUI's own, per attention call, on tensors too small to hide it.

Figures, all in microseconds per attention call:
1. The override path (ComfyUI's wrapper, our override, selection, SDPA) over a bare SDPA call, on 1x8x16x64. Of it,
   reading the facts and selecting: the path with a kernel that does nothing, less ComfyUI's wrapper with an override
   that does nothing, less running a call that is already planned.
2. Finding the plan of a mask that was read before in the same model call.
3. A whole model call of a tiny Wan, hooks and all, ours minus stock with PyTorch attention.

Stock and ours alternate in short blocks, order balanced, so that drift of the machine falls on both; the figure is
the median of the paired differences with a 95 % interval by bootstrap.

Run: python benchmarks/overhead.py [--json FILE]   (needs a ComfyUI, see README; about one minute)
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
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import comfy_location  # noqa: E402
import conftest  # noqa: E402, F401  # loads this folder as the package attention_backends
import tiny_models  # noqa: E402
import tiny_sampling  # noqa: E402
import torch  # noqa: E402
from paired import interval, machine, training_paused  # noqa: E402

LAYERS = 8
BLOCK = 10
"""Model calls of one kind in a row."""


def per_call(function: Callable[[], Any], calls: int) -> float:
    """Microseconds per call of one block."""
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls * 1e6


def override_path(pairs: int) -> dict[str, Any]:
    """Bare SDPA, ComfyUI's wrapped PyTorch attention, and ours, on 1x8x16x64 without reshapes."""
    import comfy.ldm.modules.attention as comfy_attention
    from attention_backends.backends.config import AttentionConfig, AttentionSpec
    from attention_backends.nodes.hook import attention_modules
    from attention_backends.nodes.hook import override as host
    from attention_backends.nodes.hook import run as sampling

    override = host.Override((AttentionConfig(default=AttentionSpec("torch_sdpa")),))
    model_call = sampling.Run(override).model_call(torch.device("cpu"))
    query, key, value = (torch.randn(1, 8, 16, 64) for _ in range(3))
    flags = {"mask": None, "skip_reshape": True, "skip_output_reshape": True}
    sdpa, stock_attention = torch.nn.functional.scaled_dot_product_attention, comfy_attention.attention_pytorch

    def bare() -> torch.Tensor:
        return sdpa(query, key, value)

    def ignore(func: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """An override that does nothing."""

    def stock() -> None:
        stock_attention(query, key, value, 8, transformer_options={}, **flags)

    def ours() -> None:
        model_call.ordinal = 0
        stock_attention(query, key, value, 8, transformer_options={sampling.OVERRIDE: override}, **flags)

    kinds = [bare, stock, ours]
    previous = attention_modules.set_model_call(model_call)
    try:
        times = alternate(kinds, pairs, calls=200)
        (hook_plan,) = model_call.session.plans.values()
        output = bare()
        hook_plan.slot.plan.kernel = lambda call: output

        def nothing() -> None:
            stock_attention(query, key, value, 8, transformer_options={sampling.OVERRIDE: ignore}, **flags)

        def planned() -> None:
            model_call.session.attention(hook_plan.slot, hook_plan.layout.call(query, key, value, None))

        without = alternate([ours, nothing, planned], pairs, calls=200)
    finally:
        attention_modules.set_model_call(previous)
    selecting = zip(without["ours"], without["nothing"], without["planned"], strict=True)
    return {
        "bare_sdpa_us": round(statistics.median(times["bare"]), 2),
        "stock_over_bare_us": interval([b - a for a, b in zip(times["bare"], times["stock"], strict=True)], 2),
        "ours_over_bare_us": interval([b - a for a, b in zip(times["bare"], times["ours"], strict=True)], 2),
        "reading_and_selecting_us": interval([whole - wrapper - rest for whole, wrapper, rest in selecting], 2),
    }


def mask_lookup(rounds: int) -> dict[str, float]:
    """Finding the plan of a (1, 1, 1, 512) mask again, in one model call."""
    from attention_backends.backends.config import AttentionConfig
    from attention_backends.nodes.hook import override as host
    from attention_backends.nodes.hook import run as sampling

    model_call = sampling.Run(host.Override((AttentionConfig(),))).model_call(torch.device("cpu"))
    model_call.begin({}, in_model_call=True)
    mask = torch.ones(1, 1, 1, 512, dtype=torch.bool)
    mask[..., 256:] = False

    def find() -> None:
        model_call.masks.plan(mask, None, 512)

    return interval(alternate([find], rounds, calls=1000)["find"], 2)


def alternate(kinds: list[Callable[[], Any]], rounds: int, calls: int) -> dict[str, list[float]]:
    """Time blocks of each kind in a new order every round."""
    rng = random.Random(0)
    times: dict[str, list[float]] = {kind.__name__: [] for kind in kinds}
    for kind in kinds:
        per_call(kind, calls)
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for kind in rng.sample(kinds, len(kinds)):
                times[kind.__name__].append(per_call(kind, calls))
    finally:
        gc.enable()
    return times


def tiny_wan(rounds: int) -> dict[str, Any]:
    """Whole model calls of a Wan whose layers do almost nothing, as sampling makes them."""
    from attention_backends.nodes.hook import patch
    from attention_backends.nodes.hook import run as sampling

    family = tiny_models.FAMILIES["wan"]
    narrow = {"dim": 32, "ffn_dim": 32, "text_dim": 16, "freq_dim": 32, "num_layers": LAYERS}
    tiny_models.FAMILIES["wan"] = replace(family, unet={**family.unet, **narrow}, text=(20, 16))
    patcher = tiny_sampling.build("wan")
    tiny_models.FAMILIES["wan"] = family
    patched = patch.set_default(patcher, "torch_sdpa", accuracy="exact", strict=False, guard="off")
    options = patched.model_options["transformer_options"]
    run = sampling.Run(options[sampling.KEY])
    model = patcher.model
    latent, text, sigma = torch.randn(1, 16, 1, 4, 4), torch.randn(1, 20, 16), torch.tensor([0.7])
    base = {"cond_or_uncond": [0], "sigmas": sigma, "sample_sigmas": torch.tensor([1.0, 0.7, 0.3, 0.0])}

    def call(extra: dict[str, Any]) -> None:
        model.apply_model(latent, sigma, c_crossattn=text, transformer_options={**base, **extra})

    def stock() -> None:
        run.close()
        call({})

    def ours() -> None:
        call({**options, sampling.RUN_KEY: run})

    def block(kind: Callable[[], None]) -> float:
        kind()  # puts the marks on, or takes them off, outside the timed calls
        return per_call(lambda: call({}) if kind is stock else kind(), BLOCK)

    rng, differences, stock_times = random.Random(0), [], []
    for kind in (stock, ours) * 3:
        block(kind)
    gc.collect()
    gc.disable()
    for _ in range(rounds):
        times = {kind.__name__: block(kind) for kind in rng.sample([stock, ours], 2)}
        stock_times.append(times["stock"])
        differences.append((times["ours"] - times["stock"]) / (2 * LAYERS))
    gc.enable()
    run.close()
    return {
        "layers": LAYERS,
        "attention_calls_per_model_call": 2 * LAYERS,
        "stock_model_call_us": round(statistics.median(stock_times), 1),
        "ours_minus_stock_us_per_attention_call": interval(differences, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the figures there")
    arguments = parser.parse_args()
    comfyui = comfy_location.find_comfyui()
    if comfyui is None:
        raise SystemExit(comfy_location.why_no_comfyui())
    tiny_sampling.prepare(comfyui, "--use-pytorch-cross-attention")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    import comfyui_version

    with torch.inference_mode():
        result = {
            "override_path_1x8x16x64": override_path(pairs=300),
            "mask_plan_lookup_us": mask_lookup(rounds=300),
            "tiny_wan": tiny_wan(rounds=300),
            "comfyui": comfyui_version.__version__,
            "torch": torch.__version__,
            "python": sys.version.split()[0],
            "machine": f"{machine()}, one torch thread",
        }
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    with training_paused():
        main()
