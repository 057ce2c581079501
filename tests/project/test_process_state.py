"""What belongs to the whole process is not set and restored around a call: another thread sees it, or puts it back.

ComfyUI runs one thread for each card, its server others, and other packs their own. The scan finds every setter of
such state in the package; each that stays is named here with the reason why no thread can meet it.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("backends", "nodes", "comparison", "integrations")

CALLS = {
    *("sdpa_kernel", "_sdpa_kernel_variadic", "_set_sdp_priority_order", "allow_fp16_bf16_reduction_math_sdp"),
    *("catch_warnings", "simplefilter", "filterwarnings", "resetwarnings", "showwarning", "captureWarnings"),
    *("redirect_stdout", "redirect_stderr", "dup2", "chdir", "umask", "setlocale", "putenv", "unsetenv"),
    *("set_num_threads", "set_num_interop_threads", "manual_seed_all", "set_rng_state", "seed_all", "fork_rng"),
    *("set_default_dtype", "set_default_device", "set_default_tensor_type", "use_deterministic_algorithms"),
    *("set_float32_matmul_precision", "set_warn_always", "preferred_linalg_library", "set_flags"),
    *("setrecursionlimit", "setswitchinterval", "setdefaulttimeout", "setprofile", "settrace", "signal", "alarm"),
    *("setLevel", "basicConfig", "addLevelName", "rc", "rcdefaults", "rc_context", "seterr", "set_per_process_memory"),
}
"""Functions by their last name. torch.inference_mode, no_grad, autocast and cuda.device are each thread's own."""
OF_MODULES = {
    "torch": {"manual_seed", "seed"},
    "random": {"seed"},
    "logging": {"disable"},
    "gc": {"disable", "enable", "freeze", "set_threshold"},
    "faulthandler": {"enable", "disable"},
    "matplotlib": {"use", "set_loglevel"},
}
MODULES = {
    *("torch", "sys", "os", "warnings", "logging", "builtins", "socket", "np", "numpy", "matplotlib", "PIL", "Image")
}
"""Setting an attribute or an item of these sets it for everybody."""
WRITERS = {"update", "pop", "setdefault", "clear", "insert", "append", "remove", "extend", "popitem", "patch"}

ALLOWED = {
    ("backends/kernels/support/hub.py", "catch_warnings"): "under a lock; `kernels` has no argument for it",
    ("backends/kernels/support/hub.py", "filterwarnings"): "under that lock",
    ("backends/doctor/probe.py", "faulthandler.enable"): "the child of a probe has a process of its own",
    ("comparison/bench_command.py", "redirect_stdout"): "the command line: its process, before any thread",
    ("comparison/quality_command.py", "redirect_stdout"): "the command line: its process, before any thread",
    **{
        ("comparison/card/work.py", name): "a part of `card` has a process of its own"
        for name in ("faulthandler.enable", "sys.stdout", "os.environ")
    },
    ("comparison/card/parts.py", "set_num_threads"): "in that process",
    ("comparison/card/costs.py", "catch_warnings"): "in that process",
    ("comparison/card/costs.py", "simplefilter"): "in that process",
    ("comparison/card/command.py", "signal"): "the command line: its process",
    ("comparison/paired.py", "gc.disable"): "for processes that time and do nothing else",
    ("comparison/paired.py", "gc.enable"): "for processes that time and do nothing else",
    ("comparison/blocks_command.py", "redirect_stdout"): "the command line: its process, before any thread",
    ("comparison/command.py", "redirect_stdout"): "the command line: its process, before any thread",
    ("comparison/replay_command.py", "redirect_stdout"): "the command line: its process, before any thread",
    ("comparison/tune_command.py", "redirect_stdout"): "the command line: its process, before any thread",
    ("nodes/http/machine_settings.py", "setLevel"): "set for good by a person's setting, on our own logger",
}


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def setters(source: str) -> Iterator[str]:
    """The names of what a source sets for the whole process."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            dotted = _dotted(node.func)
            owner, _, name = dotted.rpartition(".")
            switches = name.startswith("_set_sdp") or (name.startswith("enable_") and name.endswith("_sdp"))
            writes = owner and name in WRITERS and (owner.split(".")[0] in MODULES or owner.endswith(".config"))
            if name in CALLS or switches:
                yield name
            elif name in OF_MODULES.get(owner, ()) or writes:
                yield dotted
        elif isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Delete)):
            targets = node.targets if isinstance(node, (ast.Assign, ast.Delete)) else [node.target]
            for target in targets:
                inner = target.value if isinstance(target, ast.Subscript) else target
                dotted = _dotted(inner)
                if "." in dotted and (dotted.split(".")[0] in MODULES or ".config." in dotted):
                    yield dotted


def found() -> set[tuple[str, str]]:
    return {
        (path.relative_to(ROOT).as_posix(), name)
        for folder in FOLDERS
        for path in sorted(ROOT.joinpath(folder).rglob("*.py"))
        for name in setters(path.read_text(encoding="utf-8"))
    }


def test_nothing_of_the_whole_process_is_set_but_what_is_named_with_its_reason() -> None:
    assert found() - set(ALLOWED) == set()


def test_each_reason_is_still_of_use() -> None:
    assert set(ALLOWED) - found() == set()


@pytest.mark.parametrize(
    "source",
    [
        "with torch.nn.attention.sdpa_kernel([pin]):\n    run()",
        "torch.backends.cuda.enable_math_sdp(False)",
        "torch._C._set_sdp_use_flash(False)",
        "with warnings.catch_warnings():\n    run()",
        "with contextlib.redirect_stdout(sys.stderr):\n    run()",
        "os.environ['A'] = 'b'",
        "os.environ.pop('A')",
        "del sys.modules['a']",
        "sys.stdout = other",
        "torch.backends.cudnn.benchmark = True",
        "torch.manual_seed(0)",
        "torch._dynamo.config.recompile_limit = 9",
        "with torch._inductor.config.patch(a=1):\n    run()",
        "PIL.Image.MAX_IMAGE_PIXELS = None",
        "logging.getLogger('x').setLevel(10)",
        "logging.disable()",
        "sys.path.insert(0, 'a')",
    ],
)
def test_the_scan_sees(source: str) -> None:
    assert list(setters(source))


@pytest.mark.parametrize(
    "source",
    [
        "generator = torch.Generator().manual_seed(0)",
        "with torch.inference_mode():\n    run()",
        "torch.backends.cuda.math_sdp_enabled()",
        "os.environ.get('A')",
        "config = torch.backends",
    ],
)
def test_the_scan_leaves_alone(source: str) -> None:
    assert not list(setters(source))


def test_looking_at_the_machine_leaves_imports_as_they_are() -> None:
    """setuptools, which torch.compile loads to build C++, cannot be imported once something has searched for pip."""
    code = """
import sys
sys.path.insert(0, {tests!r})
import conftest
from attention_backends.cli import main
from attention_backends.backends.doctor.install import running_interpreter
def finders():
    return [(id(one), sorted(getattr(one, "__dict__", ()))) for one in sys.meta_path]
before = finders()
running_interpreter()
assert main(["doctor"]) == 0
assert finders() == before
import setuptools
"""
    words = [sys.executable, "-c", code.format(tests=str(ROOT / "tests"))]
    result = subprocess.run(words, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
