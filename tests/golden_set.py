"""The golden set: what the pack answers, kept while its files are moved and its names changed.

Each area is one function here and one file of lines `case<TAB>JSON` in `golden/`, written once. Everything is asked
from outside: the command line, the Python names that programs use, a real server's HTTP routes. A difference that is
meant is a line in `golden/meant.txt` with its reason; every other difference fails `test_golden_set.py`.

Run:  python tests/golden_set.py            compare all areas (those of ComfyUI only where one is found)
      python tests/golden_set.py --write    write the files anew; only at the commit that a rework starts from
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import fnmatch
import hashlib
import inspect
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "tests" / "golden"
INPUTS = FOLDER / "inputs"
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tests"))
import conftest  # noqa: E402, F401  # loads this folder as the package attention_backends
from golden_words import reworded  # noqa: E402

VARIABLES = (
    *("ATTENTION_BACKENDS_CONFIG", "DIFFUSION_ATTENTION_BACKEND", "DIFFUSERS_ATTN_BACKEND"),
    *("ATTENTION_BACKENDS_CACHE", "ATTENTION_BACKENDS_HUB", "ATTENTION_BACKENDS_TRACE"),
)
"""What a person may have set must decide nothing here."""
EVERYTHING = ";".join(
    (
        *("flash-attn==2.8.3", "flash-attn-3==3.0.0", "flash-attn-4==4.0.0b36", "flashinfer-python==0.7.2"),
        *("sageattention==2.2.0", "sageattn3==1.0.0", "xformers==0.0.35", "comfy-kitchen==0.2.40", "triton==3.6.0"),
    )
)
PLATFORMS = (
    *("cpu", "mps", "xpu", "npu", "npu,packages=torch-npu==2.13.0", "xla,packages=torch-xla==2.9.0"),
    *("cuda:12.0,cudnn=91002", "cuda:12.0,cudnn=90400", f"cuda:12.0,torch=2.11.0,cudnn=91002,packages={EVERYTHING}"),
    *("cuda:10.0,cudnn=91002", f"cuda:10.3,torch=2.11.0,cudnn=91002,packages={EVERYTHING}", "cuda:9.0"),
    *(f"cuda:9.0,torch=2.11.0,packages={EVERYTHING}", f"cuda:8.9,torch=2.11.0,packages={EVERYTHING}"),
    *("cuda:8.9,os=windows,cudnn=none,cudnn_sdp=off", f"cuda:8.6,torch=2.11.0,packages={EVERYTHING}"),
    *("cuda:8.9,packages=sageattention==2.2.0+cu130torch2.9.0andhigher.post4;triton==3.6.0",),
    *("cuda:7.5,packages=xformers==0.0.35;sageattention==1.0.6;triton==3.2.0", "cuda:6.1,packages=xformers==0.0.29"),
    *("cuda", "rocm:gfx942,packages=aiter==0.1.7;flash-attn==2.8.3", "rocm:gfx1100,packages=flash-attn==2.8.3"),
    "rocm",
)
REQUESTS = (
    "num_heads=24,q_len=4096,head_dim=128",
    "num_heads=24,q_len=4096,head_dim=128,mask=key_padding",
    "num_heads=24,q_len=4096,head_dim=128,mask=bool",
    "num_heads=24,q_len=4096,head_dim=128,mask=bias",
    "num_heads=40,q_len=32760,kv_len=512,head_dim=128",
    "num_heads=24,q_len=4096,head_dim=128,is_causal=true",
    "num_heads=24,q_len=77,head_dim=64,dtype=float16",
    "num_heads=8,q_len=4096,head_dim=40,dtype=float16",
    "num_heads=8,q_len=4096,head_dim=256",
    "num_heads=24,num_kv_heads=8,q_len=4096,head_dim=128",
    "num_heads=24,q_len=4096,head_dim=128,dtype=float32",
    "num_heads=24,q_len=4096,head_dim=128,exact_only=true",
    "batch=2,num_heads=24,q_len=4096,head_dim=128,v_head_dim=64,scale=0.125",
)
CONFIGS = (
    "sage_attn",
    "SAGE_ATTN",
    "_native_cudnn",
    '{"default": "sdpa_math", "per_role": {"cross": "torch_sdpa"}}',
    "default: torch_sdpa\nper_role:\n  cross:\n    backend: sdpa_flash\n",
    "default.backend=sage_attn,per_role.cross.backend=torch_sdpa",
    "--diffusion-attention-backend FLASH_ATTN",
    "--attention-backend sage_attn_3",
    '{"accuracy": "quantized"}',
    '{"accuracy": "quantized", "default": "measured"}',
    '{"default": "sage_attn", "strict": true}',
    '{"default": {"backend": "sage_attn", "options": {"smooth_k": false}}}',
    '{"schedule": [{"backend": "sage_attn", "steps": "2:-2"}]}',
    "no_such_backend",
    '{"default": 5}',
    "video_sparse_attn",
)
STORE_VARIABLE = "ATTENTION_BACKENDS_MEASURED"


@contextlib.contextmanager
def _clean(**variables: str) -> Iterator[None]:
    before = dict(os.environ)
    for name in (*VARIABLES, STORE_VARIABLE):
        os.environ.pop(name, None)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def answer(*words: str) -> Any:
    """What a command prints as JSON; text that cannot be read as JSON as it is."""
    from attention_backends.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status: Any = main([*words, "--json"])
        except SystemExit as end:
            status = end.code
    text = out.getvalue()
    try:
        found = json.loads(text)
    except ValueError:
        found = text or err.getvalue()
    return found if status == 0 else {"status": status, "answer": found}


def _short(found: Any) -> Any:
    """What `explain` decided and why, without what the case names itself."""
    if isinstance(found, dict) and "rejected" in found:
        kept = {name: found[name] for name in ("backend", "member", "category", "source", "asked", "notes")}
        return {**kept, "rejected": {row["backend"]: row["reasons"] for row in found["rejected"]}}
    return found


def explain() -> dict[str, Any]:
    """`explain --json` for machines x requests with `auto`, and for machines x names of backends."""
    from attention_backends.backends.config.names import CHOICES

    cases = {}
    for platform, request in product(PLATFORMS, REQUESTS):
        cases[f"{platform} | {request}"] = _short(answer("explain", "--platform", platform, "--request", request))
    for platform, name in product(PLATFORMS, CHOICES):
        found = answer("explain", "--platform", platform, "--config", name, "--request", REQUESTS[0])
        cases[f"{platform} | {name}"] = _short(found)
    return cases


def configurations() -> dict[str, Any]:
    """Configurations in every form, for two roles."""
    cases = {}
    for text, role in product(CONFIGS, ("self", "cross", "ltx2.audio_to_video")):
        found = answer("explain", "--platform", PLATFORMS[8], "--config", text, "--role", role)
        cases[f"{text} | {role}"] = _short(found)
    for variable in VARIABLES[:3]:
        with _clean(**{variable: "sage_attn"}):
            cases[f"{variable}=sage_attn"] = _short(answer("explain", "--platform", PLATFORMS[8]))
    return cases


def route() -> dict[str, Any]:
    """`route --json`, for each machine and whole."""
    return {"--all": answer("route", "--all"), **{one: answer("route", "--platform", one) for one in PLATFORMS}}


def doctor() -> dict[str, Any]:
    """The rows of `doctor --json` for each machine, as if one interpreter were asked there."""
    from attention_backends.backends.doctor import doctor as of_machine
    from attention_backends.backends.doctor.install import Interpreter
    from attention_backends.backends.engine.router import Router
    from attention_backends.backends.values.platform import parse_platform

    cases = {}
    for one in PLATFORMS:
        rows = of_machine.examine(Router(parse_platform(one)), Interpreter("python", "cp312", "linux_x86_64"), (), None)
        for row in rows:
            # Where a package of this machine lies, and which names it has, is no part of the described machine.
            cases[f"{one} | {row.id}"] = {**row.as_dict(), "file": None, "symbols": None}
    return cases


def records() -> dict[str, Any]:
    """Old records and an old store, read on several machines."""
    cases = {}
    for path, platform in product(sorted(INPUTS.glob("record*.json")), ("cpu", *PLATFORMS[6:9])):
        cases[f"{path.name} | {platform}"] = answer("replay", str(path), "--platform", platform)
    with _clean(**{STORE_VARIABLE: str(INPUTS / "measured.sqlite3")}):
        for platform in ("cpu", f"{PLATFORMS[13]},name=NVIDIA GeForce RTX 4090"):
            words = ("--config", "measured", "--platform", platform, "--request", REQUESTS[0])
            cases[f"measured | {platform}"] = _short(answer("explain", *words))
    return cases


def python_names() -> dict[str, Any]:
    """What programs may import, and how it is called."""
    from attention_backends import backends
    from attention_backends.backends.config.names import ALIASES, CHOICES

    cases: dict[str, Any] = {"aliases": dict(sorted(ALIASES.items())), "choices": sorted(CHOICES)}
    for name in sorted(backends.__all__):
        found = getattr(backends, name)
        try:
            signature = str(inspect.signature(found)) if callable(found) else repr(found)
        except ValueError:  # an exception's class, whose constructor is Python's
            signature = ", ".join(base.__name__ for base in found.__mro__[:-1])
        cases[name] = re.sub(r"attention_backends\.[\w.]+\.", "", signature)
    return cases


def workflows() -> dict[str, Any]:
    """The shipped workflows, as a digest of their content."""
    return {
        path.name: hashlib.sha256(json.dumps(json.loads(path.read_text(encoding="utf-8"))).encode()).hexdigest()
        for path in sorted((ROOT / "workflows").glob("*.json"))
    }


def server() -> dict[str, Any]:
    """`/object_info` of our nodes, our routes, and the log's lines of a run with two backends; needs a ComfyUI."""
    from server_harness import start_server
    from workflow_graphs import Graph, embedded, ksampler

    def settings(python: Path, folder: Path) -> None:
        user = folder / "user"
        user.mkdir(exist_ok=True)
        (user / "attention_backends.json").write_bytes((INPUTS / "settings.json").read_bytes())

    graph = Graph("")
    model, of_model = embedded(graph)
    model = graph.selector(model, "auto")
    model = graph.add("PerRoleAttentionConfig", model=model, role="cross", backend="sdpa_math", extra="")
    sampled = ksampler(graph, model, **of_model, steps=4, cfg=4.0, sampler_name="euler", scheduler="simple")
    graph.add("PreviewImage", images=graph.add("AttentionDemoImage", samples=sampled, scale=2))
    with _clean(), start_server(extra_nodes=(), fill=settings) as running:
        nodes = running.get("/object_info")
        cases = {
            f"object_info | {name}": {**node, "python_module": "", "essentials_category": None}
            for name, node in nodes.items()
            if node["python_module"].endswith(ROOT.name)
        }
        running.run(graph.nodes)
        for path in ("settings", "recommended", "measured", "measured/export", "runs", "last_run"):
            cases[f"GET {path}"] = _steady(running.get(f"/attention_backends/{path}"))
        machine = running.get("/attention_backends/machine")
        cases["GET machine"] = {"keys": sorted(machine), "backends": sorted(machine["backends"][0])}
        lines = [line for line in running.log.splitlines() if "diffusion attention" in line]
        cases["log"] = [re.sub(r"^.*?(?=Default|Using|Resolved)", "", line) for line in lines]
    return cases


_UNSTEADY = re.compile(r"(^|_)(ms|seconds|bytes|numbering|prompt_id|started|ended|version|timed)$|^(windows|cells)$")


def _steady(found: Any) -> Any:
    """An answer without times, sizes, random names and versions, which differ from run to run; the keys stay."""
    if isinstance(found, dict):
        return {key: "..." if _UNSTEADY.search(key) else _steady(value) for key, value in found.items()}
    if isinstance(found, list):
        return [_steady(value) for value in found]
    return re.sub(r"\d[\d.,]* ?(ms|s|%|x)\b", "N \\1", found) if isinstance(found, str) else found


AREAS: dict[str, Callable[[], dict[str, Any]]] = {
    area.__name__: area for area in (explain, configurations, route, doctor, records, python_names, workflows, server)
}


def lines_of(cases: dict[str, Any]) -> list[str]:
    return [f"{case!r}"[1:-1] + f"\t{json.dumps(found, sort_keys=True)}" for case, found in cases.items()]


def in_todays_words(line: str) -> str:
    """A line of the golden set, its reasons as they are written today (`golden_words.py`)."""
    case, _, found = line.partition("\t")
    return f"{case}\t{json.dumps(reworded(json.loads(found)), sort_keys=True)}"


def meant() -> dict[str, list[str]]:
    """Area: patterns of its cases whose difference is meant, from the lines `area | pattern | reason`."""
    patterns: dict[str, list[str]] = {}
    for line in (FOLDER / "meant.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            area, pattern, reason = (part.strip() for part in line.split(" || "))
            if not reason or area not in AREAS:
                raise ValueError(f"golden/meant.txt: no reason, or no such area: {line}")
            patterns.setdefault(area, []).append(pattern)
    return patterns


def differences(area: str) -> list[str]:
    """What differs from the golden set and is not meant, as lines of a diff."""
    with _clean(**{STORE_VARIABLE: str(INPUTS / "none.sqlite3")}):
        now = lines_of(AREAS[area]())
    before = [in_todays_words(line) for line in (FOLDER / f"{area}.tsv").read_text(encoding="utf-8").splitlines()]
    patterns = meant().get(area, [])

    def counts(line: str) -> bool:
        case = line.partition("\t")[0]
        return not any(fnmatch.fnmatchcase(case, pattern) for pattern in patterns)

    kept = [list(filter(counts, lines)) for lines in (before, now)]
    return [line for line in difflib.unified_diff(*kept, "golden", "now", lineterm="", n=0)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("area", nargs="*", choices=[*AREAS, []], help="default: all")
    parser.add_argument("--write", action="store_true", help="write the files anew")
    options = parser.parse_args()
    failed = False
    for area in options.area or AREAS:
        if options.write:
            with _clean(**{STORE_VARIABLE: str(INPUTS / "none.sqlite3")}):
                text = "\n".join(lines_of(AREAS[area]())) + "\n"
            (FOLDER / f"{area}.tsv").write_text(text, encoding="utf-8")
            print(f"{area}: {text.count(chr(10))} cases written")
        else:
            found = differences(area)
            failed |= bool(found)
            print(f"{area}: {len(found)} lines differ" if found else f"{area}: as before", *found, sep="\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
