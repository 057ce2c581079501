"""`explain`: what would run for a described call, which setting decides it, and why nothing else would."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from typing import Any

from ..backends.config import AttentionConfig
from ..backends.config.layers import default_of, joint_note, record_of, settings_of
from ..backends.config.text import from_environment, parse_config
from ..backends.engine.router import Router
from ..backends.observe.advisories import lines_for
from ..backends.observe.autotune.candidates import with_store
from ..backends.observe.autotune.store import Store, default_path
from ..backends.sparse.method import SparseMethod
from ..backends.values.request import AttentionRequest, parse_request
from ..backends.values.roles import CATEGORIES, category_of
from .machine import EXAMPLE_PLATFORM, platform_of

EXAMPLE_REQUEST = "batch=1,num_heads=24,q_len=4096,kv_len=4096,head_dim=128,dtype=bfloat16,mask=none"
HELP = "what would run for a call, which setting decides it, and why nothing else would"
EXAMPLES = f"""examples:
  %(prog)s --config sage_attn --request num_heads=24,q_len=4096,head_dim=128
  %(prog)s --role ltx2.audio_to_video --config "per_role.cross.backend=torch_sdpa"
  %(prog)s --platform "{EXAMPLE_PLATFORM}"
  %(prog)s --platform rocm:gfx942 --config attention.yaml --json
  %(prog)s --config sage_attn --family qwen_image

A configuration is a backend's name, JSON, YAML, the path of a .json or .yaml file, dotted flags, name=value pairs, or
a command line of vLLM-Omni, SGLang or Smart-Diffusion. ATTENTION_BACKENDS_CONFIG, DIFFUSION_ATTENTION_BACKEND and
DIFFUSERS_ATTN_BACKEND count below --config.
A machine is cpu, mps, xpu, npu, xla, cuda[:CAPABILITY] or rocm[:GFX], then name=value pairs: torch, cuda, cudnn,
cudnn_sdp (on, off), flash_triton (on, off), os (linux, windows, darwin), packages (NAME==VERSION;NAME==VERSION)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--role", default="self", help="role of the call, e.g. cross or ltx2.audio_to_video")
    parser.add_argument("--category", choices=CATEGORIES, help="the role's category; default: from its name")
    parser.add_argument("--config", default="", help="configuration in any accepted form; default: everything auto")
    parser.add_argument(
        "--component", default="transformer", help="model of the pipeline, e.g. transformer_2; default: %(default)s"
    )
    parser.add_argument("--family", help="a model family, e.g. qwen_image: adds what is recommended for it")
    parser.add_argument("--request", default=EXAMPLE_REQUEST, help="the call; default: %(default)s")
    parser.add_argument("--platform", help="a machine as described below; default: this one")


def run(options: argparse.Namespace) -> int:
    """Print the decision; returns the exit status."""
    request = parse_request(options.request)
    if not options.role.strip():
        raise ValueError("--role is empty; write self, cross, joint, or a role of the model such as flux.single")
    named: tuple[AttentionConfig, ...] = ()
    if options.config.strip():
        named = (parse_config(options.config, "--config", component=options.component),)
    layers = (*named, *from_environment(above=named))
    category = options.category or category_of(options.role)
    router = Router(platform_of(options.platform))
    with contextlib.redirect_stdout(sys.stderr):
        decision = router.decide(request, layers, options.role, category)
        accuracy, store = settings_of(layers).accuracy, Store(default_path())
        decision = with_store(decision, request, options.role, category, accuracy, router, store)
    answer = {
        "backend": decision.backend,
        "member": router.backends[decision.backend].kernel_name(request, router.platform),
        "role": options.role,
        "category": category,
        "category_derived": options.category is None and options.role not in CATEGORIES,
        "source": decision.source,
        "asked": decision.asked,
        "rejected": [
            {"backend": rejection.backend, "reasons": list(rejection.reasons)} for rejection in decision.rejected
        ],
        "request": request._asdict(),
        "platform": router.platform.describe(),
        "notes": [
            *dict.fromkeys(note for layer in layers for note in layer.notes),
            *_about_schedules(layers, options.role, category),
            *_about_records(layers),
            *filter(None, [joint_note(layers, options.role, category)]),
            *decision.notes,
            *(lines_for(options.family, default_of(layers), accuracy) if options.family else []),
            *_about_the_mask(request),
        ],
    }
    method = router.backends[decision.backend]
    if isinstance(method, SparseMethod):
        able, reasons = method.executors(request, router.platform, decision.options)
        why_not = {name: list(why) for name, why in reasons.items()}
        answer["executors"] = {"able": [one.id for one in able], "reasons": why_not}
    print(json.dumps(answer, indent=2) if options.json else _sentences(answer, request))
    return 0


def _about_schedules(layers: tuple[AttentionConfig, ...], role: str, category: str) -> list[str]:
    return [
        f"{layer.source}.schedule[{number}] asks for {entry.spec.backend} at {entry.describe()}; what is said here "
        "holds for the rest of a run"
        for layer in layers
        for number, entry in enumerate(layer.schedule)
        if entry.takes(role, category)
    ]


def _about_records(layers: tuple[AttentionConfig, ...]) -> list[str]:
    record = record_of(layers)
    if record is None:
        return []
    return [f"the record in {record.source} decides by block and model call, which are not known here; see replay"]


def _about_the_mask(request: AttentionRequest) -> list[str]:
    if request.mask == "none":
        return []
    return [
        "a described call has no mask values. In ComfyUI and in attention() the mask can be read: where it only hides "
        "keys, the call runs on the others without a mask, samples of different lengths as one call over packed "
        "tokens where the backend has a kernel for that. Ask again with mask=none for what runs then"
    ]


def _sentences(answer: dict[str, Any], request: AttentionRequest) -> str:
    role, category = answer["role"], answer["category"]
    taken = ", taken from its name" if answer["category_derived"] else ""
    of = f" (category {category}{taken})" if category != role else ""
    runs = f"{answer['backend']} ({answer['member']})" if answer["member"] else answer["backend"]
    asked = f", which asks for {answer['asked']}" if answer["asked"] else ""
    lines = [
        f"Call:    {request.describe()}",
        f"Machine: {answer['platform']}",
        f"{runs} would run for role {role}{of}.",
        f"That follows from: {answer['source']}{asked}.",
    ]
    if executors := answer.get("executors"):
        lines.append(f"Its blocks would be computed by: {executors['able'][0]}.")
        lines += [f"  not {name}: {'; '.join(why)}" for name, why in executors["reasons"].items()]
    lines += [f"Note: {note}." for note in answer["notes"]]
    if answer["rejected"]:
        lines.append("Refused before it:")
        lines += [f"  {rejection['backend']}: {'; '.join(rejection['reasons'])}" for rejection in answer["rejected"]]
    return "\n".join(lines)
