"""The command `tune`: fills the store of measured choices from presets, and shows, clears, exports and imports it.

Boundary: the terminal and files; what is tried and what wins is decided in `backends/`. Importing it needs no torch, so
that `--help` is quick.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sqlite3
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..backends.observe.autotune.entry import MOST_BYTES, MOST_VALUES
from ..backends.observe.autotune.store import VARIABLE, Store, default_path
from ..backends.values.bounded import read_file
from ..backends.values.counted import counted
from ..backends.values.plain_data import load_json
from ..backends.values.tolerance import ACCURACY
from .command import Progress
from .presets import PRESETS, Preset, parse_presets
from .report import ComparisonError

if TYPE_CHECKING:
    import torch

    from ..backends.engine.router import Router

HELP = "measure which kernel is fastest for the calls of real models, for the backend `autotune`"
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32"}
ROLES = {
    "wan22": "self", "wan22_14b_self": "self", "ltx2_video": "self", "ltx2_audio": "self",
    "wan22_14b_cross": "cross", "ltx2_audio_to_video": "cross", "wan22_480p": "self", "wan22_720p": "self",
    "ltx2_720p": "self",
}  # fmt: skip
"""The role of each preset's call; all others are of text and picture together, `joint`."""
MOST_CALLS = 2000
"""Calls of one preset after which it is given up."""
COLUMNS = ("role", "call", "winner", "ms", "what was found")

EXAMPLES = f"""examples:
  %(prog)s --presets flux2,z_image
  %(prog)s --tokens 1024 --dtype float32        on a CPU: shorter sequences of the same calls
  %(prog)s --accuracy quantized                 kernels that are not exact are tried too
  %(prog)s --show
  %(prog)s --export choices.json

Presets: {", ".join(PRESETS)}.
What is found holds for calls of the same sizes, dtype and role on this machine with these versions. A run of ComfyUI
with `autotune` measures the same; ComfyUI's own store is attention_backends/measured.sqlite3 in its user
folder, which --store or the variable {VARIABLE} can name. Clearing, exporting and importing are for the whole file."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--presets", default="", help="names, separated by commas; default: all")
    parser.add_argument("--tokens", type=int, default=0, metavar="N", help="longest side; default: as in the model")
    parser.add_argument("--accuracy", choices=ACCURACY, default="exact", help="what may win; default: %(default)s")
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16, float16 or float32; default: %(default)s")
    parser.add_argument("--device", help="such as cpu or cuda:1; default: the first accelerator, else the CPU")
    parser.add_argument("--store", type=Path, metavar="FILE", help=f"default: {VARIABLE}, else in the cache folder")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--show", action="store_true", help="only show what is in the store")
    instead.add_argument("--clear", action="store_true", help="only forget all of it")
    instead.add_argument("--export", type=Path, metavar="FILE", help="only write it to a JSON file; - for stdout")
    instead.add_argument("--import", type=Path, metavar="FILE", dest="import_", help="only take over such a file")


def run(options: argparse.Namespace, program: str) -> int:
    """Do what was asked for and print it. Returns 0, or 130 after an interruption, or 1 where a kernel left the
    device unusable; what was found by then is kept.

    Raises:
        ValueError: bad options, a file that cannot be used; the message says which.
    """
    store = Store(options.store or default_path())
    try:
        if options.clear:
            return _said(options, {"removed": store.clear()}, "choices forgotten: {removed}")
        if options.export is not None:
            return _export(options, store)
        if options.import_ is not None:
            text = read_file(options.import_, MOST_BYTES).decode("utf-8")
            document = load_json(text, options.import_.name, most_bytes=MOST_BYTES, most_entries=MOST_VALUES)
            return _said(options, {"taken": store.import_(document)}, "choices taken over: {taken}")
    except (OSError, sqlite3.Error, UnicodeDecodeError, RecursionError) as error:
        raise ComparisonError(f"{options.import_ or options.export or store.path}: {error}") from error
    status = 0
    failed: list[dict[str, str]] = []
    if options.show:
        with contextlib.suppress(ImportError):  # so that it is known which choices hold here
            import torch  # noqa: F401
    else:
        failed, status = _measure(options, store)
    entries = store.entries()
    if not options.show:
        entries = [entry for entry in entries if entry["here"] and entry["origin"] == "tune"]
    if options.json:
        print(json.dumps({"summary": store.summary(), "entries": entries, "not_measured": failed}, indent=2))
    else:
        print(_table(store, entries, failed))
    return status


def _said(options: argparse.Namespace, found: dict[str, Any], text: str) -> int:
    print(json.dumps(found, indent=2) if options.json else text.format(**found))
    return 0


def _export(options: argparse.Namespace, store: Store) -> int:
    document = store.export()
    text = json.dumps(document, indent=1) + "\n"
    if str(options.export) == "-":
        sys.stdout.write(text)
        return 0
    options.export.write_text(text, encoding="utf-8")
    return _said(options, {"exported": len(document["entries"])}, "choices exported: {exported}")


def _measure(options: argparse.Namespace, store: Store) -> tuple[list[dict[str, str]], int]:
    """Measure the presets that were asked for; those that gave nothing with the reason, and the exit status."""
    try:
        import torch
    except ImportError as error:
        raise ComparisonError(f"measuring needs torch, which cannot be imported here: {error}") from error
    from ..backends.values.faults import KernelFaultError
    from .bench_inputs import device_of
    from .contenders import router_for

    dtype = DTYPES.get(options.dtype, options.dtype)
    if dtype not in DTYPES.values():
        raise ComparisonError(f"dtype {dtype!r} is not one of {', '.join(dict.fromkeys(DTYPES.values()))}")
    if options.tokens < 0:
        raise ComparisonError(f"tokens {options.tokens}: give 1 or more, or 0 for the full lengths")
    presets = [preset.scaled(options.tokens) for preset in parse_presets(options.presets)]
    try:
        store.save()  # measuring takes minutes, and a run of ComfyUI goes by the file alone
    except (OSError, sqlite3.Error) as error:
        raise ComparisonError(
            f"{store.path} cannot be written ({getattr(error, 'strerror', None) or error}); name another file with "
            f"--store or {VARIABLE}"
        ) from error
    failed, progress = [], Progress()
    with contextlib.redirect_stdout(sys.stderr):  # what packages print while they load is no part of the answer
        router = router_for(options.device)
        if router.platform.kind == "cpu" and not options.tokens:
            print("full lengths on a CPU take hours; --tokens 1024 scales them down", file=sys.stderr)
        device = torch.device(options.device) if options.device else device_of(router.platform)
        try:
            for number, preset in enumerate(presets):
                progress(preset.name, number, len(presets))
                if (why := measure(preset, dtype, options.accuracy, router, store, device)) is not None:
                    failed.append({"preset": preset.name, "reason": why})
        except KeyboardInterrupt:
            return failed, 130
        except KernelFaultError as fault:
            return [*failed, {"preset": preset.name, "reason": str(fault)}], 1
        finally:
            progress.end()
    return failed, 0


def measure(
    preset: Preset, dtype: str, accuracy: str, router: Router, store: Store, device: torch.device
) -> str | None:
    """Try all candidates on one preset's call until the store has a choice; None, or why it has none.

    Raises:
        KernelFaultError: a kernel left the device unusable.
    """
    import torch

    from ..backends.config import AttentionConfig, AttentionSpec
    from ..backends.config.names import AUTOTUNE
    from ..backends.engine.plan import CallKind
    from ..backends.engine.session import Session
    from ..backends.observe import observe
    from ..backends.observe.autotune.tuner import Tuner
    from ..backends.values.faults import is_out_of_memory
    from .bench_inputs import random_call

    config = AttentionConfig(AttentionSpec(AUTOTUNE), accuracy=accuracy, source="tune")
    session = observe(Session(router, (config,)))
    tuner = Tuner(session, store, anew=True)
    session.register(tuner)
    role = ROLES.get(preset.name, "joint")
    request = preset.request(dtype)
    with torch.inference_mode():
        try:
            call = random_call(request, device, 0)
            slot = session.plan(CallKind(call.request(), role, role))
            if not slot.plan.is_trial:
                return slot.plan.decision.source.partition(f"{AUTOTUNE} ")[2].strip("()")
            _warm_up(session, tuner, slot.plan.decision.backend, accuracy, call)
            for _ in range(MOST_CALLS):
                session.attention(slot, call)
                tuner.clock.collect(wait=True)
                if not slot.plan.is_trial:
                    break
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return "out of memory"
    kinds = session.run_report.tuning.as_dict()
    return None if kinds["decided"] else slot.plan.decision.source.partition(f"{AUTOTUNE} ")[2].strip("()")


def _warm_up(session: Any, tuner: Any, incumbent: str, accuracy: str, call: Any) -> None:
    """Have every candidate compile what it compiles: here compile time is not counted against it."""
    from ..backends.values.faults import KernelFaultError, is_cuda_fault

    for name in tuner.candidates(call.request(), incumbent, accuracy):
        try:
            session.router.kernel(name)(call)
        except Exception as error:  # it is tried again, and then its reason is kept
            if is_cuda_fault(error):
                raise KernelFaultError(f"{name} left the GPU unusable: {error}") from error


def _table(store: Store, entries: list[dict[str, Any]], failed: list[dict[str, str]]) -> str:
    summary = store.summary()
    lines = [
        f"Store: {store.path} ({counted(summary['entries'], 'choice')}, {summary['entries_here']} for this machine)"
    ]
    lines += [f"Note: {summary['problem']}"] if summary["problem"] else []
    rows = [COLUMNS, *(_row(entry) for entry in entries)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    if entries:
        lines += ["", *("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
                        for row in rows)]  # fmt: skip
    lines += ["", "Not measured:"] if failed else []
    lines += [f"  {one['preset']}: {one['reason']}" for one in failed]
    return "\n".join(lines)


def _row(entry: dict[str, Any]) -> tuple[str, ...]:
    sizes = f"{entry['batch']}x{entry['num_heads']}x{entry['q_len']}x{entry['kv_len']}x{entry['head_dim']}"
    facts = [sizes, entry["dtype"], "" if entry["mask"] == "none" else f"mask {entry['mask']}"]
    times = sorted(entry["ms"].items(), key=lambda item: item[1])
    found = [f"{name} {ms:.3g} ms" for name, ms in times if name != entry["winner"]]
    found += [f"{name}: {reason}" for name, reason in entry["rejected"].items()]
    found += [f"{name}: deferred, its first call took too long" for name in entry["put_off"]]
    found += [] if entry["here"] else [f"of another machine: {entry['environment']}"]
    found += [datetime.fromtimestamp(entry["written"], timezone.utc).strftime("%Y-%m-%d")]
    ms = f"{entry['ms'][entry['winner']]:.3g}"
    return entry["role"], " ".join(filter(None, facts)), entry["winner"], ms, "; ".join(found)
