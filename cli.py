"""The command line: what every backend needs here (`doctor`), what would run for a call and why (`explain`), in which
order a machine tries backends (`route`), what they do to a picture (`compare`), how long they take (`bench`), which
is fastest for a kind of call (`tune`), all of that within a given time (`card`), which blocks a sparse method keeps
(`blocks`), what backends do to clips (`quality`), and what a picture's record says (`replay`); the last seven are in
`comparison/`.

It reads arguments and prints; what is true is decided in `backends/`. Bad arguments and strict refusals end with
status 2 and their reason on stderr, everything else with 0.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from dataclasses import asdict, replace
from io import TextIOWrapper
from typing import Any

from .backends.config import AttentionConfig
from .backends.config.layers import default_of, joint_note, record_of, settings_of
from .backends.config.names import canonical
from .backends.config.text import from_environment, parse_config
from .backends.doctor import probe, route_report, sparse_executors
from .backends.doctor.doctor import Row, examine, probe_all, this_machine, why_no_card
from .backends.doctor.install import Interpreter, running_interpreter
from .backends.engine.router import Router
from .backends.kernels import BACKENDS
from .backends.measure import remembered
from .backends.observe.advisories import lines_for
from .backends.observe.autotune.candidates import with_store
from .backends.observe.autotune.store import Store, default_path
from .backends.sparse.method import SparseMethod
from .backends.values.bounded import shortened
from .backends.values.errors import NoBackendError
from .backends.values.platform import Platform, parse_platform
from .backends.values.request import AttentionRequest, parse_request
from .backends.values.roles import CATEGORIES, category_of
from .comparison import bench_command as bench
from .comparison import blocks_command as blocks
from .comparison import command as compare
from .comparison import quality_command as quality
from .comparison import replay_command as replay
from .comparison import tune_command as tune
from .comparison.card import command as card
from .comparison.card import work as card_part

EXAMPLE_REQUEST = "batch=1,num_heads=24,q_len=4096,kv_len=4096,head_dim=128,dtype=bfloat16,mask=none"
EXAMPLE_PLATFORM = "cuda:12.0,cudnn=91002,packages=flashinfer-python==0.7.2;flash-attn==2.8.3"

DOCTOR_EXAMPLES = """examples:
  %(prog)s
  %(prog)s sage_attn flash_attn
  %(prog)s --json
  %(prog)s --probe
  %(prog)s --probe sage_attn --timeout 300
  %(prog)s --forget sage_attn

Nothing is installed or changed: commands are printed for you to run. A probe runs each kernel on a tiny problem, in a
separate process. What it finds is remembered for this card, driver, torch and package versions, in a folder that
ATTENTION_BACKENDS_CACHE can name: a kernel that crashed, hung or was wrong is not used until a later probe is ok."""

EXPLAIN_EXAMPLES = f"""examples:
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

ROUTE_EXAMPLES = f"""examples:
  %(prog)s
  %(prog)s --platform "{EXAMPLE_PLATFORM}"
  %(prog)s --platform rocm:gfx942 --json
  %(prog)s --all"""


def main(argv: list[str], program: str = "python -m attention_backends") -> int:
    """Run one command and return its exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a path may hold what a cp1252 console cannot show
    if argv[:1] == [probe.CHILD]:
        return probe.child(argv[1:])
    if argv[:1] == [card_part.CHILD]:
        return card_part.child(argv[1:])
    options = _parser(program).parse_args(_joined(argv))
    try:
        measuring = {
            "compare": compare, "bench": bench, "tune": tune, "autotune": tune, "card": card, "blocks": blocks,
            "quality": quality,
        }  # fmt: skip
        if options.command in measuring:
            status: int = measuring[options.command].run(options, program)
        else:
            commands = {"doctor": _doctor, "explain": _explain, "route": _route, "replay": _replay}
            status = commands[options.command](options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # The reader, such as `head`, has enough. Python would complain again when it flushes at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:  # a command that measures writes what it has, once it has something
        print("interrupted", file=sys.stderr)
        return 130
    except NoBackendError as refusal:
        return _fail(str(refusal), options.json)
    except ValueError as problem:
        return _fail(shortened(" ".join(str(problem).split())), options.json)


def _parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=program, description="Attention backends of this machine, or of any other.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def command(name: str, text: str, epilog: str, aliases: tuple[str, ...] = ()) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            aliases=aliases,
            help=text,
            description=text,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.add_argument("--json", action="store_true", help="print JSON instead of text")
        return added

    doctor = command(
        "doctor",
        "each backend: available with version and file, or why not and how to get it",
        DOCTOR_EXAMPLES,
    )
    doctor.add_argument("backend", nargs="*", help="only these, by any of their names")
    doctor.add_argument("--verbose", action="store_true", help="for all backends what is said of a named one")
    doctor.add_argument("--probe", action="store_true", help="run each kernel that is there, and remember the outcome")
    doctor.add_argument(
        "--timeout", type=_seconds, default=probe.TIMEOUT, help="seconds for one probe; default: %(default)g"
    )
    doctor.add_argument("--forget", action="store_true", help="drop what earlier probes found")
    explain = command(
        "explain", "what would run for a call, which setting decides it, and why nothing else would", EXPLAIN_EXAMPLES
    )
    explain.add_argument("--role", default="self", help="role of the call, e.g. cross or ltx2.audio_to_video")
    explain.add_argument("--category", choices=CATEGORIES, help="the role's category; default: from its name")
    explain.add_argument("--config", default="", help="configuration in any accepted form; default: everything auto")
    explain.add_argument(
        "--component", default="transformer", help="model of the pipeline, e.g. transformer_2; default: %(default)s"
    )
    explain.add_argument("--family", help="a model family, e.g. qwen_image: adds what is recommended for it")
    explain.add_argument("--request", default=EXAMPLE_REQUEST, help="the call; default: %(default)s")
    explain.add_argument("--platform", help="a machine as described below; default: this one")
    route = command("route", "which backends auto tries on a machine, in which order", ROUTE_EXAMPLES)
    route.add_argument("--platform", help="a machine, described as for explain; default: this one")
    route.add_argument("--all", action="store_true", help="every row of the table, for all kinds of machine")
    compare.add_arguments(command("compare", compare.HELP, compare.EXAMPLES))
    bench.add_arguments(command("bench", bench.HELP, bench.EXAMPLES))
    tune.add_arguments(command("tune", tune.HELP, tune.EXAMPLES, aliases=("autotune",)))
    card.add_arguments(command("card", card.HELP, card.EXAMPLES))
    blocks.add_arguments(command("blocks", blocks.HELP, blocks.EXAMPLES))
    quality.add_arguments(command("quality", quality.HELP, quality.EXAMPLES))
    replay.add_arguments(command("replay", replay.HELP, replay.EXAMPLES))
    return parser


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return seconds


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
        if options.forget:
            print(f"outcomes of probes forgotten: {remembered.forget(ids)}")
        found = {}
        if options.probe and without_torch is None:
            found = probe_all(Router(platform), ids, lambda name: probe.probe(name, options.timeout), print)
        rows = examine(Router(platform), interpreter, ids, without_torch)
        rows = [row if row.probed else replace(row, probed=found.get(row.id)) for row in rows]
        executors = [] if ids else _executors(platform, interpreter, options, without_torch)
        hint = None if without_torch else why_no_card(platform)
    if options.json:
        report = {
            "platform": {**asdict(platform), "packages": dict(platform.packages)},
            "interpreter": interpreter.path,
            "hint": hint,
            "backends": [row.as_dict() for row in rows],
            "executors": [row.as_dict() for row in executors],
        }
        print(json.dumps(report, indent=2))
    else:
        print(_doctor_text(platform, interpreter, hint, rows, executors, everything=bool(ids) or options.verbose))
    return 0


def _executors(
    platform: Platform, interpreter: Interpreter, options: argparse.Namespace, without_torch: str | None
) -> list[Row]:
    """Rows of the packages that compute the blocks of sparse methods, probed first where that is asked for."""
    found = {}
    if options.probe and without_torch is None:
        for name in sparse_executors.to_probe(platform):
            print(f"probing {name} ...")
            found[name] = probe.probe(name, options.timeout)
    return sparse_executors.examine(platform, interpreter, found, without_torch)


def _doctor_text(
    platform: Platform,
    interpreter: Interpreter,
    hint: str | None,
    rows: list[Row],
    executors: list[Row],
    *,
    everything: bool,
) -> str:
    """Executors without a trace of their package are left out, unless everything is asked for."""
    lines = [
        f"Machine:     {platform.describe()}",
        f"Interpreter: {interpreter.path} ({interpreter.python}, {interpreter.machine})",
    ]
    lines += [f"Note:        {hint}", ""] if hint else [""]
    shown = [row for row in executors if everything or row.version]
    for title, some in (("BACKEND", rows), ("SPARSE EXECUTOR", shown)):
        width = max((len(text) for text in (title, *(row.id for row in some))), default=0)
        lines += [f"{title:{width}}  ACCURACY   AVAILABLE"] if some else []
        for row in some:
            lines += _row_lines(row, width, everything=everything)
    return "\n".join(lines)


def _row_lines(row: Row, width: int, *, everything: bool) -> list[str]:
    details = [", ".join(filter(None, (row.version, row.file)))] if row.available else list(row.reasons)
    if row.probed and row.probed.status != "unavailable":
        details.append(f"probed: {row.probed.summary}")
    state = "yes" if row.available else "no "
    lines = [f"{row.id:{width}}  {row.accuracy:9}  {state}  {'; '.join(filter(None, details))}".rstrip()]
    if everything:
        lines += [f"    cards: {row.cards.text}"]
        lines += [f"    names: {row.symbols.text}"] if row.symbols.needed else []
        lines += [f"    stderr of the probe: {line}" for line in (row.probed.stderr if row.probed else ())]
    elif row.symbols.problem and row.symbols.installed:
        lines.append(f"    names: {row.symbols.problem}")
    if row.advice and (everything or row.advice.kind != "nothing"):
        lines += [f"    {text}" for text in (row.advice.text, row.advice.note) if text]
    return lines


def _route(options: argparse.Namespace) -> int:
    if options.all:
        rows = route_report.all_routes()
        print(json.dumps({"routes": rows}, indent=2) if options.json else route_report.all_as_text(rows))
        return 0
    router = Router(_platform(options.platform))
    with contextlib.redirect_stdout(sys.stderr):
        report = route_report.route_report(router)
    print(json.dumps(report, indent=2) if options.json else route_report.as_text(report))
    return 0


def _replay(options: argparse.Namespace) -> int:
    record = replay.load(options.file)  # first, since asking a machine takes seconds
    router = Router(_platform(options.platform))
    return replay.run(options, record, router)


def _explain(options: argparse.Namespace) -> int:
    request = parse_request(options.request)
    if not options.role.strip():
        raise ValueError("--role is empty; write self, cross, joint, or a role of the model such as flux.single")
    named: tuple[AttentionConfig, ...] = ()
    if options.config.strip():
        named = (parse_config(options.config, "--config", component=options.component),)
    layers = (*named, *from_environment(above=named))
    category = options.category or category_of(options.role)
    router = Router(_platform(options.platform))
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
    if executors := answer.get("executors"):
        lines.append(f"Its blocks would be computed by: {executors['able'][0]}.")
        lines += [f"  not {name}: {'; '.join(why)}" for name, why in executors["reasons"].items()]
    lines += [f"Note: {note}." for note in answer["notes"]]
    if answer["rejected"]:
        lines.append("Refused before it:")
        lines += [f"  {rejection['backend']}: {'; '.join(rejection['reasons'])}" for rejection in answer["rejected"]]
    return "\n".join(lines)
