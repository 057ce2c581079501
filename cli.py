"""The command line: what every backend needs here (`doctor`), what would run for a call and why (`explain`), and
what backends do to a picture (`compare`, in `comparison/command.py`).

It reads arguments and prints; what is true is decided in `backends/`. Bad arguments and strict refusals end with
status 2 and their reason on stderr, everything else with 0.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from dataclasses import asdict
from io import TextIOWrapper
from typing import Any

from .backends.config_text import from_environment, parse_config
from .backends.doctor import Row, examine, this_machine, why_no_card
from .backends.install import Interpreter, running_interpreter
from .backends.kernels import BACKENDS
from .backends.names import canonical
from .backends.platform import Platform, parse_platform
from .backends.request import AttentionRequest, parse_request
from .backends.router import NoBackendError, Router
from .comparison import command as compare

CATEGORIES = ("self", "cross", "joint")
EXAMPLE_REQUEST = "batch=1,num_heads=24,q_len=4096,kv_len=4096,head_dim=128,dtype=bfloat16,mask=none"
EXAMPLE_PLATFORM = "cuda:12.0,cudnn=91002,packages=flashinfer-python==0.7.2;flash-attn==2.8.3"

DOCTOR_EXAMPLES = """examples:
  %(prog)s
  %(prog)s sage_attn flash_attn
  %(prog)s --json

Nothing is installed or changed: commands are printed for you to run."""

EXPLAIN_EXAMPLES = f"""examples:
  %(prog)s --config sage_attn --request num_heads=24,q_len=4096,head_dim=128
  %(prog)s --role ltx2.audio_to_video --config "per_role.cross.backend=torch_sdpa"
  %(prog)s --platform "{EXAMPLE_PLATFORM}"
  %(prog)s --platform rocm:gfx942 --config attention.yaml --json

A configuration is a backend's name, JSON, YAML, the path of a .json or .yaml file, dotted flags or name=value
pairs. ATTENTION_BACKENDS_CONFIG, DIFFUSION_ATTENTION_BACKEND and DIFFUSERS_ATTN_BACKEND count below --config.
A machine is cpu, mps, xpu, npu, xla, cuda[:CAPABILITY] or rocm[:GFX], then name=value pairs: torch, cuda, cudnn,
cudnn_sdp (on, off), os (linux, windows, darwin), packages (NAME==VERSION;NAME==VERSION)."""


def main(argv: list[str], program: str = "python -m attention_backends") -> int:
    """Run one command and return its exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a path may hold what a cp1252 console cannot show
    options = _parser(program).parse_args(_joined(argv))
    try:
        if options.command == "compare":
            status = compare.run(options, program)
        else:
            status = _doctor(options) if options.command == "doctor" else _explain(options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # The reader, such as `head`, has enough. Python would complain again when it flushes at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except NoBackendError as refusal:
        return _fail(str(refusal), options.json)
    except ValueError as problem:
        return _fail(" ".join(str(problem).split()), options.json)


def _parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=program, description="Attention backends of this machine, or of any other.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def command(name: str, text: str, epilog: str) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name, help=text, description=text, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        added.add_argument("--json", action="store_true", help="print JSON instead of text")
        return added

    doctor = command(
        "doctor",
        "each backend: available with version and file, or why not and how to get it",
        DOCTOR_EXAMPLES,
    )
    doctor.add_argument("backend", nargs="*", help="only these, by any of their names")
    explain = command(
        "explain", "what would run for a call, on whose word, and why nothing else would", EXPLAIN_EXAMPLES
    )
    explain.add_argument("--role", default="self", help="role of the call, e.g. cross or ltx2.audio_to_video")
    explain.add_argument("--category", choices=CATEGORIES, help="the role's category; default: told by its name")
    explain.add_argument("--config", default="", help="configuration in any accepted form; default: everything auto")
    explain.add_argument("--request", default=EXAMPLE_REQUEST, help="the call; default: %(default)s")
    explain.add_argument("--platform", help="a machine as described below; default: this one")
    compare.add_arguments(command("compare", compare.HELP, compare.EXAMPLES))
    return parser


def _joined(argv: list[str]) -> list[str]:
    """Bind the word after --config to it: a configuration may itself begin with `--`."""
    joined = list(argv)
    for index, word in enumerate(joined[:-1]):
        if word == "--config":
            joined[index : index + 2] = [f"--config={joined[index + 1]}"]
            break
    return joined


def _fail(message: str, as_json: bool) -> int:
    if as_json:
        print(json.dumps({"error": message}, indent=2))
    print(message, file=sys.stderr)
    return 2


def _doctor(options: argparse.Namespace) -> int:
    ids = [canonical(name) for name in options.backend]
    unknown = [name for name in ids if name not in BACKENDS]
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: a way to choose, not a backend; the names are: {', '.join(BACKENDS)}")
    interpreter = running_interpreter()
    with contextlib.redirect_stdout(sys.stderr):  # what packages print while they load is no part of the answer
        platform, without_torch = this_machine()
        rows = examine(Router(platform), interpreter, ids, without_torch)
        hint = None if without_torch else why_no_card(platform)
    if options.json:
        report = {
            "platform": {**asdict(platform), "packages": dict(platform.packages)},
            "interpreter": interpreter.path,
            "hint": hint,
            "backends": [row.as_dict() for row in rows],
        }
        print(json.dumps(report, indent=2))
    else:
        print(_doctor_text(platform, interpreter, hint, rows, everything=bool(ids)))
    return 0


def _doctor_text(
    platform: Platform, interpreter: Interpreter, hint: str | None, rows: list[Row], *, everything: bool
) -> str:
    lines = [
        f"Machine:     {platform.describe()}",
        f"Interpreter: {interpreter.path} ({interpreter.python}, {interpreter.machine})",
    ]
    lines += [f"Note:        {hint}", ""] if hint else [""]
    width = max(len(row.id) for row in rows)
    lines.append(f"{'BACKEND':{width}}  ACCURACY   AVAILABLE")
    for row in rows:
        detail = ", ".join(filter(None, (row.version, row.file))) if row.available else "; ".join(row.reasons)
        state = "yes" if row.available else "no "
        lines.append(f"{row.id:{width}}  {row.accuracy:9}  {state}  {detail}".rstrip())
        if row.advice and (everything or row.advice.kind != "nothing"):
            lines += [f"    {text}" for text in (row.advice.text, row.advice.note) if text]
    return "\n".join(lines)


def category_of(role: str) -> str:
    """The category that a role's name suggests; only a model's own table knows it."""
    if role in CATEGORIES:
        return role
    if role.endswith((".single", ".double")):  # FLUX, HunyuanVideo: text and picture together
        return "joint"
    return "cross" if "cross" in role or "_to_" in role else "self"


def _explain(options: argparse.Namespace) -> int:
    request = parse_request(options.request)
    named = (parse_config(options.config, "--config"),) if options.config.strip() else ()
    category = options.category or category_of(options.role)
    router = Router(_platform(options.platform))
    with contextlib.redirect_stdout(sys.stderr):
        decision = router.decide(request, (*named, *from_environment()), options.role, category)
    answer = {
        "backend": decision.backend,
        "member": router.backends[decision.backend].member(request, router.platform),
        "role": options.role,
        "category": category,
        "category_derived": options.category is None and options.role not in CATEGORIES,
        "source": decision.source,
        "asked": decision.asked,
        "rejected": [{"backend": said.backend, "reasons": list(said.reasons)} for said in decision.rejected],
        "request": request._asdict(),
        "platform": router.platform.describe(),
    }
    print(json.dumps(answer, indent=2) if options.json else _sentences(answer, request))
    return 0


def _platform(described: str | None) -> Platform:
    if described is not None:
        return parse_platform(described)
    with contextlib.redirect_stdout(sys.stderr):
        platform, without_torch = this_machine()
    if without_torch is not None:
        raise ValueError(f"this machine cannot be asked ({without_torch}); describe one with --platform")
    return platform


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
    if answer["rejected"]:
        lines.append("Refused before it:")
        lines += [f"  {said['backend']}: {'; '.join(said['reasons'])}" for said in answer["rejected"]]
    return "\n".join(lines)
