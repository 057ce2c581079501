"""Records every attention call that reaches ComfyUI's hook, for each tiny model, as a fixture.

    python tests/record_hook_calls.py --comfyui ~/comfy/ComfyUI

writes tests/fixtures/hook_calls_<version>.json. Run it with the Python of a ComfyUI (torch and its requirements).
The fixture lets the adapter and the role table be tested where there is no ComfyUI. It holds facts only: where a
call came from, its arguments and layouts, and which calls never reached the hook. Calls that are equal in all but
the step are one line with the steps and the count; `sigmas` of a family has the value at each of these steps.
ComfyUI runs with --use-pytorch-cross-attention, so a call that goes past the hook is seen when it ends in torch's
scaled_dot_product_attention; attention written out as matrix products is not seen.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tiny_models import FAMILIES
from tiny_sampling import build, prepare, sample, unavailable

STEPS = 2
# Where a call sits; of every other key in transformer_options only the name is kept.
PLACE = ("block", "block_index", "block_type", "total_blocks", "grid_sizes", "img_slice", "cond_or_uncond")


def tensor_facts(tensor: torch.Tensor) -> dict[str, Any]:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"shape": list(tensor.shape), "stride": list(tensor.stride()), "dtype": dtype}


def mask_facts(mask: torch.Tensor | None) -> dict[str, Any] | None:
    """Layout and range; infinities are strings, as JSON has none."""
    if mask is None:
        return None
    low, high = (float(bound) for bound in mask.double().aminmax())
    bounds = {"min": low, "max": high}
    return {**tensor_facts(mask), **{k: str(v) if v in (torch.inf, -torch.inf) else v for k, v in bounds.items()}}


def plain(value: Any) -> Any:
    """A keyword argument or option as JSON: dtypes and other objects by name."""
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value).removeprefix("torch.")


class Recorder:
    """The pass-through override, the module that is running, and what both saw."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.running: list[tuple[str, str]] = []
        self.inside = 0
        self.sigmas: dict[int, list[float]] = {}
        self.sample_sigmas: list[float] = []
        self.calls: dict[str, dict[str, Any]] = {}
        self.bypass: dict[str, dict[str, Any]] = {}

    def override(self, func: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        options = kwargs["transformer_options"]
        named = {**kwargs, **dict(zip(("heads", "mask"), args[3:5], strict=False))}
        del named["transformer_options"], named["_inside_attn_wrapper"]
        call = {
            **self._where(),
            "positional": len(args),
            "keywords": sorted(kwargs),
            "heads": named.pop("heads"),
            **{name: tensor_facts(tensor) for name, tensor in zip("qkv", args, strict=False)},
            "mask": mask_facts(named.pop("mask", None)),
            "flags": {key: plain(value) for key, value in named.items()},
            "options": {key: plain(options[key]) for key in PLACE if key in options},
            "other_options": sorted(key for key in options if key not in PLACE),
        }
        self._count(self.calls, call, self._step(options))
        self.inside += 1
        try:
            return func(*args, **kwargs)
        finally:
            self.inside -= 1

    def saw_sdpa(self, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None) -> None:
        if not self.inside:
            shapes = {"q_shape": list(query.shape), "k_shape": list(key.shape), "mask": mask_facts(mask)}
            self._count(self.bypass, {**self._where(), **shapes}, None)

    def _where(self) -> dict[str, str]:
        module, class_name = self.running[-1] if self.running else ("", "")
        return {"module": module, "class": class_name}

    def _step(self, options: dict[str, Any]) -> int:
        self.sample_sigmas = options["sample_sigmas"].tolist()
        sigmas = options["sigmas"].tolist()
        reached = [i for i, sigma in enumerate(self.sample_sigmas) if sigma >= sigmas[0] * (1 - 1e-4)]
        step = reached[-1] if reached else 0
        self.sigmas[step] = sigmas
        return step

    @staticmethod
    def _count(table: dict[str, dict[str, Any]], call: dict[str, Any], step: int | None) -> None:
        entry = table.setdefault(json.dumps(call, sort_keys=True), {**call, "count": 0})
        entry["count"] += 1
        if step is not None:
            steps = entry.setdefault("steps", [])
            if step not in steps:
                steps.append(step)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Module hooks and the counter around torch's SDPA; both are gone afterwards."""
        handles = []
        for path, module in self.model.named_modules():
            if next(module.children(), None) is None:
                continue
            entry = (path, type(module).__name__)
            handles.append(module.register_forward_pre_hook(lambda *_, entry=entry: self.running.append(entry)))
            handles.append(module.register_forward_hook(lambda *_: self.running.pop() and None, always_call=True))
        original = torch.nn.functional.scaled_dot_product_attention

        def counted(query: Any, key: Any, value: Any, attn_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
            self.saw_sdpa(query, key, attn_mask)
            return original(query, key, value, attn_mask, *args, **kwargs)

        torch.nn.functional.scaled_dot_product_attention = counted
        try:
            yield
        finally:
            torch.nn.functional.scaled_dot_product_attention = original
            for handle in handles:
                handle.remove()


def record(name: str, steps: int = STEPS) -> dict[str, Any]:
    """Sample one family and return what the hook saw."""
    patcher = build(name)
    model = patcher.model.diffusion_model
    recorder = Recorder(model)
    patcher.model_options.setdefault("transformer_options", {})["optimized_attention_override"] = recorder.override
    with recorder.watching():
        sample(patcher, name, steps=steps)
    return {
        "model": type(model).__name__,
        "mro": [base.__name__ for base in type(model).__mro__ if base is not object],
        "sample_sigmas": recorder.sample_sigmas,
        "sigmas": [recorder.sigmas[step] for step in sorted(recorder.sigmas)],
        "calls": list(recorder.calls.values()),
        "bypass": list(recorder.bypass.values()),
    }


def to_json(head: dict[str, Any], families: dict[str, dict[str, Any]]) -> str:
    """JSON with one call per line, so that a changed call is a changed line."""

    def line(value: Any) -> str:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)

    def listing(values: list[Any]) -> str:
        return "[" + ",".join("\n   " + line(value) for value in values) + "]"

    parts = []
    for name, facts in families.items():
        fields = ",\n  ".join(
            f"{line(key)}: {listing(value) if key in ('calls', 'bypass') else line(value)}"
            for key, value in facts.items()
        )
        parts.append(f" {line(name)}: {{\n  {fields}}}")
    return f'{line(head)[:-1]},"families":{{\n' + ",\n".join(parts) + "\n}}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Record the attention calls of every tiny model.")
    parser.add_argument("--comfyui", type=Path, required=True, help="the ComfyUI folder to record")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "fixtures", help="folder to write to")
    args = parser.parse_args()
    flag = "--use-pytorch-cross-attention"
    prepare(args.comfyui.expanduser(), flag)
    import comfyui_version

    families = {}
    for name in FAMILIES:
        reason = unavailable(name)
        families[name] = {"unavailable": reason} if reason else record(name)
        print(f"{name}: {reason or str(len(families[name]['calls'])) + ' different calls'}")
    version = comfyui_version.__version__
    head = {"comfyui": version, "torch": torch.__version__, "flags": ["--cpu", flag], "steps": STEPS}
    target = args.out / f"hook_calls_{version}.json"
    args.out.mkdir(parents=True, exist_ok=True)
    target.write_text(to_json(head, families), encoding="utf-8", newline="\n")
    print(f"{target}: {target.stat().st_size // 1024} KB")


if __name__ == "__main__":
    main()
