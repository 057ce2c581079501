"""How many frames and files of this package a warm and a cold call run, in some commits.

Counted with `sys.setprofile`. A frame is an entry into a function of ours, a generator's each time it goes on; the
methods that a dataclass gets count for the file of their class.

- hook: ComfyUI's attention with our override, on 1x8x16x64 in a model call, as in `overhead.py`.
- sampled: the same in a tiny Wan that is sampled twice, with what the nodes put around it: modules, roles, callers.
- python: `attention(query, key, value)`.

Of each the first call of the process, with the modules that it imports; a cold one, which has to be planned: the first
of another run, or of another shape; and a warm one, which finds its plan.

Run: python benchmarks/frames.py [COMMIT ...] [--json FILE]   (without a commit: this folder; the calls of
ComfyUI need one, see README)
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("hook", "sampled", "python")
OURS = "attention_backends."


class Counted:
    """Counts the frames of ours; only inside `around` if given, one counter for each call of it."""

    def __init__(self, around: CodeType | None = None) -> None:
        self.around = around
        self.calls: list[Counter[str]] = []
        self._depth = 0

    def __call__(self, frame: FrameType, event: str, arg: Any) -> None:
        code = frame.f_code
        if code is self.around:
            self._depth += (event == "call") - (event == "return")
            if event == "call" and self._depth == 1:
                self.calls.append(Counter())
        elif event == "call" and self._depth:
            module: str = frame.f_globals.get("__name__", "")  # a generated method has the globals of its class
            if module.startswith(OURS):
                self.calls[-1][module.removeprefix(OURS)] += 1

    def of(self, function: Callable[[], Any]) -> list[Counter[str]]:
        """One counter of files for each call of `around`, or one for all where there is none."""
        self.calls, self._depth = [], 0
        if self.around is None:
            self.calls, self._depth = [Counter()], 1
        sys.setprofile(self)
        try:
            function()
        finally:
            sys.setprofile(None)
        return self.calls


def prepare_comfyui() -> Any:
    """ComfyUI's module of attention functions."""
    import logging

    import comfy_location
    import tiny_sampling

    comfyui = comfy_location.find_comfyui()
    if comfyui is None:
        raise SystemExit(comfy_location.why_no_comfyui())
    tiny_sampling.prepare(comfyui, "--use-pytorch-cross-attention")
    logging.disable(logging.WARNING)
    return importlib.import_module("comfy.ldm.modules.attention")


def hook() -> dict[str, Counter[str]]:
    """Calls of ComfyUI's attention with our override, in a model call that nothing else is in."""
    import torch

    attention = prepare_comfyui().attention_pytorch
    from attention_backends.backends.config import AttentionConfig, AttentionSpec

    try:
        host, runs, current = (
            importlib.import_module(f"attention_backends.nodes.hook.{name}")
            for name in ("override", "run", "attention_modules")
        )
        name = "model_call"
    except ModuleNotFoundError:  # an earlier commit
        host, runs, current = (
            importlib.import_module(f"attention_backends.nodes.{name}") for name in ("host", "sampling", "sites")
        )
        name = "scope"
    override = host.Override((AttentionConfig(default=AttentionSpec("torch_sdpa")),))
    query = torch.zeros(1, 8, 16, 64)

    def run(calls: int) -> list[Counter[str]]:
        model_call = getattr(runs.Run(override), name)(query.device)
        set_current = getattr(current, f"set_{name}")
        previous = set_current(model_call)

        def call() -> None:
            model_call.ordinal = 0
            options = {runs.OVERRIDE: override}
            flags = {"skip_reshape": True, "skip_output_reshape": True, "transformer_options": options}
            attention(query, query, query, 8, mask=None, **flags)

        try:
            return [Counted().of(call)[0] for _ in range(calls)]
        finally:
            set_current(previous)

    first, second = run(1), run(3)
    return {"first": first[0], "cold": second[0], "warm": second[-1]}


def sampled() -> dict[str, Counter[str]]:
    """The calls of ComfyUI's attention while a tiny Wan is sampled twice, two steps each."""
    import asyncio

    attention = prepare_comfyui()
    import tiny_sampling
    from attention_backends import comfy_entrypoint

    async def nodes() -> list[Any]:
        found: list[Any] = await (await comfy_entrypoint()).get_node_list()
        return found

    selector = next(node for node in asyncio.run(nodes()) if node.__name__ == "AttentionBackendSelector")
    model = tiny_sampling.build("wan")
    patched = selector.execute(model, backend="torch_sdpa", accuracy="exact", strict=False, guard="off").args[0]
    counted = Counted(attention.optimized_attention.__code__)
    runs = [counted.of(lambda: tiny_sampling.sample(patched, "wan", steps=2)) for _ in range(2)]
    return {"first": runs[0][0], "cold": runs[1][0], "warm": runs[1][-1]}


def python() -> dict[str, Counter[str]]:
    """Calls of `attention` on the CPU."""
    import torch
    from attention_backends.backends import attention

    def call(length: int) -> Counter[str]:
        query = torch.zeros(1, 2, length, 16)
        return Counted().of(lambda: attention(query, query, query))[0]

    first, cold, _ = call(8), call(24), call(24)
    return {"first": first, "cold": cold, "warm": call(24)}


def work(tree: Path, part: str) -> None:
    """Print what one part counts in one checkout. Runs in a separate process."""
    sys.path.insert(0, str(tree / "tests"))
    import conftest  # noqa: F401  # loads `tree` as the package

    answers, sys.stdout = sys.stdout, sys.stderr  # what ComfyUI prints while it starts is no answer
    found = {"hook": hook, "sampled": sampled, "python": python}[part]()
    result = {
        kind: {"frames": files.total(), "files": len(files), "by_file": dict(files.most_common())}
        for kind, files in found.items()
    }
    print(json.dumps(result), file=answers)


def counted_in(tree: Path) -> dict[str, Any]:
    """The counts of one checkout."""
    result = {}
    for part in PARTS:
        command = [sys.executable, str(Path(__file__).resolve()), "--work", str(tree), "--part", part]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
        result[part] = json.loads(done.stdout)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commits", nargs="*")
    parser.add_argument("--json", type=Path, help="also write the counts there")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work is not None:
        work(arguments.work, arguments.part)
        return
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for commit in arguments.commits:
            tree = Path(folder, commit)
            subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(tree), commit], cwd=ROOT, check=True)
            try:
                result[commit] = counted_in(tree)
            finally:
                subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)
    if not arguments.commits:
        result["this folder"] = counted_in(ROOT)
    text = json.dumps({**result, "python": sys.version.split()[0]}, indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
