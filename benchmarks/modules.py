"""How many modules of this package an import of a value type loads, and a warm call loads and runs, in some commits.

A warm call is the third one of its kind through `attention(query, key, value)`; what it runs are the files of ours in
which any of its functions are.

Run: python benchmarks/modules.py [COMMIT ...] [--json FILE]   (without a commit: this folder; needs torch)
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LOAD = """
import importlib.util, json, sys
tree = sys.argv[1]
spec = importlib.util.spec_from_file_location(
    "attention_backends", f"{tree}/__init__.py", submodule_search_locations=[tree])
sys.modules["attention_backends"] = package = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
def ours(): return {name for name in sys.modules if name.startswith("attention_backends.")}
"""
VALUE = """
import importlib
for name in sys.argv[2:]:
    try:
        importlib.import_module(f"attention_backends.backends.{name}")
    except ModuleNotFoundError:
        continue
    break
else:
    raise SystemExit(f"there is none of {sys.argv[2:]} in {tree}")
kernels = {name for name in ours() if ".kernels." in name and not name.endswith((".registry", ".backend"))}
print(json.dumps({"of_ours": len(ours()), "kernels": len(kernels), "torch": "torch" in sys.modules}))
"""
VALUES = {
    "AttentionRequest": ("values.request", "request"),
    "Platform": ("values.platform", "platform"),
    "Limits": ("values.limits", "limits"),
    "Option": ("values.options", "options"),
    "MaskPlan": ("values.mask_plan", "mask.pieces"),
    "AttentionConfig": ("config",),
}
"""Each with the modules that have it or had it in earlier commits."""
CALL = """
import torch
from attention_backends.backends import attention
query = torch.zeros(1, 2, 8, 16)
for _ in range(2):
    attention(query, query, query)
loaded, files, functions = len(ours()), set(), set()
def seen(frame, event, arg):
    if event == "call" and frame.f_code.co_filename.startswith(tree):
        files.add(frame.f_code.co_filename)
        functions.add(frame.f_code)
sys.setprofile(seen)
attention(query, query, query)
sys.setprofile(None)
print(json.dumps({"of_ours_loaded": loaded, "files_run": len(files), "functions_run": len(functions)}))
"""


def counted(tree: Path) -> dict[str, Any]:
    """The counts of one checkout, each in a separate process."""

    def run(code: str, *modules: str) -> dict[str, Any]:
        command = [sys.executable, "-c", LOAD + code, str(tree), *modules]
        found: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        return found

    imports = {name: run(VALUE, *modules) for name, modules in VALUES.items()}
    return {"import_of_a_value_type": imports, "warm_call": run(CALL)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commits", nargs="*")
    parser.add_argument("--json", type=Path, help="also write the counts there")
    arguments = parser.parse_args()
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for commit in arguments.commits:
            tree = Path(folder, commit)
            subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(tree), commit], cwd=ROOT, check=True)
            try:
                result[commit] = counted(tree)
            finally:
                subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)
    if not arguments.commits:
        result["this folder"] = counted(ROOT)
    text = json.dumps({**result, "python": sys.version.split()[0]}, indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
