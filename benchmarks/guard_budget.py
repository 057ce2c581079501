"""What an error of attention does to a picture, what honest kernels make, and what the guard costs.

The first part samples the embedded model with attention of which each row is off by a given share of its size, in a
random direction in every call, in all roles and blocks, and compares the picture with the exact one. The second part
looks at every call of such runs as the guard does, with arithmetic that real kernels have (tests/tolerance.py emulates
it). Budgets in backends/observe/guard/__init__.py stand between the two. The third part times a watched kernel.

Run: python benchmarks/guard_budget.py [--json FILE]   (no ComfyUI needed; about four minutes on one core)
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(Path(__file__).resolve().parent)]

import conftest  # noqa: E402, F401  # loads this folder as the package attention_backends
import tolerance  # noqa: E402
import torch  # noqa: E402
from attention_backends.comparison.card.costs import guard_cost  # noqa: E402
from paired import machine, training_paused  # noqa: E402

SCENES = (
    ("a large red circle on the left on white", 1),
    ("a small blue square at the top right", 2),
    ("a large yellow star at the bottom on grey", 3),
)
ERRORS = (0.001, 0.003, 0.01, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
STEPS = 20
HEADS, HEAD_DIM, TOKENS = 8, 64, 4096

Change = Callable[[Any, torch.Tensor], torch.Tensor]


def scene(caption: str, seed: int) -> Any:
    from attention_backends.comparison.scene import Scene, Settings

    return Scene(Settings(prompt=caption, seed=seed, steps=STEPS), torch.device("cpu"))


def exact(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: Any) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(query, key, value)


def noisy(error: float, seed: int) -> Callable[..., torch.Tensor]:
    """Attention of which each row is off by `error` times its own size, in a random direction."""
    random = torch.Generator().manual_seed(seed)

    def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: Any) -> torch.Tensor:
        output = exact(query, key, value)
        direction = torch.randn(output.shape, generator=random)
        size = output.norm(dim=-1, keepdim=True) / direction.norm(dim=-1, keepdim=True)
        return output + error * size * direction

    return attention


def psnr(latent: torch.Tensor, reference: torch.Tensor) -> float:
    from attention_backends.comparison import metrics
    from attention_backends.comparison.scene import picture_of

    return metrics.psnr(picture_of(latent), picture_of(reference))


def of_errors(scenes: list[Any], references: list[torch.Tensor]) -> list[dict[str, float]]:
    """Error -> PSNR, the median and the worst of the scenes."""
    table = []
    for error in ERRORS:
        found = [psnr(one.sample(noisy(error, at)), references[at]) for at, one in enumerate(scenes)]
        table.append({"relative_l2": error, "psnr": statistics.median(found), "worst_psnr": min(found)})
    return table


def arithmetics() -> dict[str, tuple[str, torch.dtype, Callable[[Any], torch.Tensor]]]:
    """Name -> accuracy class, dtype of the inputs, and what computes a call."""
    from attention_backends.backends.kernels import BACKENDS
    from attention_backends.backends.kernels.registry import detect

    platform = detect(torch.device("cpu"))
    plain, int8 = (BACKENDS[name].load(platform) for name in ("torch_sdpa", "emulated_int8"))
    return {
        "torch_sdpa, float32": ("exact", torch.float32, plain),
        "every step rounded to bfloat16": ("exact", torch.bfloat16, tolerance._plain),
        "every step rounded to float16": ("exact", torch.float16, tolerance._plain),
        "emulated_int8": ("quantized", torch.float32, int8),
        "emulated_int8, bfloat16": ("quantized", torch.bfloat16, int8),
        "INT8 scores, FP8 weights and values": ("quantized", torch.bfloat16, tolerance._int8_fp8),
        "FP4 throughout": ("quantized", torch.bfloat16, tolerance._fp4),
    }


def of_kernels(scenes: list[Any], references: list[torch.Tensor]) -> dict[str, dict[str, Any]]:
    """The guard's worst figures over every call of whole runs, and the pictures."""
    from attention_backends.backends.observe.guard import Budget, Guard, GuardedKernel
    from attention_backends.backends.report import Row, RunReport
    from attention_backends.backends.values.request import AttentionCall

    table = {}
    for name, (accuracy, dtype, kernel) in arithmetics().items():
        guard, row = Guard("watch", RunReport()), Row("", "", name, "", "none")
        watch = GuardedKernel(guard, lambda call, kernel=kernel: kernel(call).to(call.query.dtype), Budget(9, 9), row)

        def attention(
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            dtype: torch.dtype = dtype,
            guard: Guard = guard,
            watch: GuardedKernel = watch,
            **_: Any,
        ) -> torch.Tensor:
            call = AttentionCall(query.to(dtype), key.to(dtype), value.to(dtype))
            return guard.check(watch, call, 0).float()

        found = [psnr(one.sample(attention), references[at]) for at, one in enumerate(scenes)]
        figures = row.guard.as_dict()
        table[name] = {
            "accuracy": accuracy,
            "checked": figures["checked"],
            "relative_l2": figures["relative_l2"],
            "row_error": figures["row_error"],
            "cosine": figures["cosine"],
            "psnr": statistics.median(found),
            "worst_psnr": min(found),
        }
        print(name, table[name], flush=True)
    return table


def rounded(value: Any) -> Any:
    """Four digits of every number; JSON has no infinity."""
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    chosen = parser.parse_args()
    from attention_backends.backends.observe.guard import BUDGETS

    torch.set_num_threads(1)  # on tensors this small, threads mostly wait for each other
    scenes = [scene(*each) for each in SCENES]
    with torch.inference_mode():
        price = guard_cost((1, HEADS, TOKENS, HEAD_DIM), torch.device("cpu"), torch.float32, rounds=5)
        print(price, flush=True)
        references = [one.sample(exact) for one in scenes]
        errors = of_errors(scenes, references)
        for line in errors:
            print(line, flush=True)
        kernels = of_kernels(scenes, references)
    found = rounded(
        {
            "command": "python benchmarks/guard_budget.py",
            "machine": f"{machine()}, {torch.get_num_threads()} threads",
            "torch": torch.__version__,
            "pictures": [f"{caption}; seed {seed}" for caption, seed in SCENES],
            "steps": STEPS,
            "budgets": {name: budget._asdict() for name, budget in BUDGETS.items()},
            "errors": errors,
            "kernels": kernels,
            "cost": price,
        }
    )
    text = json.dumps(found, indent=1)
    if chosen.json:
        chosen.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    with training_paused():
        main()
