"""Run as a program: what a ComfyUI that is started with each attention flag computes with, and what we say of it.

    python tests/server_flags.py FOLDER

prints JSON, flag -> what was found. ComfyUI chooses its function while comfy/ldm/modules/attention.py is imported: the
first flag is on the command line, for the others that file is read again with the arguments that they set. Sage, Flash
and comfy-kitchen are stand-ins that compute with SDPA.
"""

from __future__ import annotations

import importlib
import json
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
import conftest  # noqa: F401  # makes the pack importable
import tiny_sampling

FLAGS = (
    "--use-sage-attention",
    "--use-flash-attention",
    "--use-ck-attention",
    "--use-split-cross-attention",
    "--use-quad-cross-attention",
    "--use-pytorch-cross-attention",
)
used: list[str] = []


def sdpa(name: str, layout: str = "HND") -> Any:
    def run(
        q: Any, k: Any, v: Any, tensor_layout: str = layout, sm_scale: Any = None, attn_mask: Any = None, **_: Any
    ) -> Any:
        used.append(name)
        if tensor_layout == "NHD":
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask, scale=sm_scale)
        return out.transpose(1, 2) if tensor_layout == "NHD" else out

    return run


def fake_packages() -> None:
    for name, functions in {
        "sageattention": {"sageattn": sdpa("sageattention")},
        "flash_attn": {"flash_attn_func": sdpa("flash_attn", "NHD")},
    }.items():
        module = types.ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.__dict__.update(functions)
        sys.modules[name] = module
    import comfy_kitchen

    comfy_kitchen.int8_attention_is_available = lambda *_: True
    comfy_kitchen.int8_attention = lambda q, k, v, scale=None, attn_mask=None: sdpa("comfy_kitchen")(
        q, k, v, sm_scale=scale, attn_mask=attn_mask
    )


def look() -> dict[str, Any]:
    """What this ComfyUI, as it was started, makes of `comfy` and of `auto`."""
    import comfy.ldm.modules.attention as attention
    from hook_side import HEADS, model_call, nodes_module, override, rows, sampling

    started = nodes_module("hook.comfy_functions").started_with()
    found: dict[str, Any] = {
        "function": started.function.name,
        "flag": started.flag,
        "accuracy": started.function.accuracy,
        "words": started.describe(),
        "changed": started.changed_by_auto(),
    }

    class WanModel(torch.nn.Module):
        def forward(self, x: Any, options: Any) -> Any:
            return attention.optimized_attention(x, x, x, HEADS, transformer_options=options)

    model = WanModel()
    x = rows(6, dtype=torch.bfloat16)
    used.clear()
    stock = attention.optimized_attention(x, x, x, HEADS)
    found["stock"] = list(used)
    for backend in ("comfy", "auto"):
        used.clear()
        ours = override(backend, strict=True)
        run = sampling.Run(ours)
        options = {sampling.KEY: ours, sampling.OVERRIDE: ours, sampling.RUN_KEY: run}
        output = model_call(model, options, lambda options=options: model(x, options))
        run.close()
        (row,) = [row for row in run.run_report.rows.values() if row.calls]
        found[backend] = {
            "used": list(used),
            "backend": row.backend,
            "member": row.member,
            "guarded": row.guard is not None,
            "equal": bool(torch.equal(output, stock)),
            "notes": [note for note in run.run_report.notes if "on this server" in note],
        }
    return found


def main(folder: str) -> None:
    tiny_sampling.prepare(Path(folder), FLAGS[0])
    fake_packages()
    import comfy.ldm.modules.attention as attention
    from comfy import model_management
    from comfy.cli_args import args

    found = {}
    names = {flag: flag.removeprefix("--").replace("-", "_") for flag in FLAGS}
    there = {flag: name for flag, name in names.items() if hasattr(args, name)}
    for flag in there:
        if flag != FLAGS[0]:
            for other, name in there.items():
                setattr(args, name, other == flag)
            model_management.ENABLE_PYTORCH_ATTENTION = flag == "--use-pytorch-cross-attention"
            importlib.reload(attention)
        found[flag] = look()
    found["upcast"] = [upcasts(force=True), upcasts(dont=True), upcasts()]
    print(json.dumps(found))


def upcasts(force: bool = False, dont: bool = False) -> list[bool]:
    """Whether scores are forced to float32: by --force-upcast-attention, by a model; bfloat16 by a model."""
    import comfy.ldm.modules.attention as attention
    from comfy.cli_args import args
    from hook_side import nodes_module

    args.force_upcast_attention, args.dont_upcast_attention = force, dont
    importlib.reload(attention)
    forces = nodes_module("hook.comfy_functions").forces_upcast
    half, brain, full = torch.float16, torch.bfloat16, torch.float32
    return [forces(None, half), forces(full, half), forces(full, brain), forces(full, full)]


if __name__ == "__main__":
    main(sys.argv[1])
