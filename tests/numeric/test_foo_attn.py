"""A kernel is one file, one line and one fake: a copy of this tree gets `foo_attn`, and everything has it.

The copy runs in processes of its own. The package foo-attn is really installed there, as far as Python can tell, so the
doctor, a probe and a benchmark see it on this machine as they would see any other.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed")

ROOT = Path(__file__).resolve().parents[2]

FILE = '''
"""`foo_attn`: a kernel that exists in a test alone."""

from __future__ import annotations

from dataclasses import dataclass

from ..values.aliases import SGLANG, Alias
from .backend import Backend, Kernel, Limits
from ..values.limits import HeadDim, HeadDimMultiple, Masks, Rule
from ..values.options import Option
from ..values.package import Package, Symbols
from ..values.platform import Platform
from ..values.reasons import Reason, template
from ..values.request import AttentionCall, AttentionRequest

HEADS = template("foo.heads", "{heads} heads are too many, {max} at most")


@dataclass(frozen=True)
class FewHeads(Rule):
    max: int

    def reason(self, request: AttentionRequest) -> Reason | None:
        if request.num_heads <= self.max:
            return None
        return Reason(HEADS, heads=request.num_heads, max=self.max)

    def describe(self) -> str:
        return f"few heads, {self.max} at most"


def pip(platform: Platform, machine: str) -> tuple[str, ...]:
    return ("foo-attn==1.0",)


class FooAttn(Backend):
    id = "foo_attn"
    summary = "A kernel that exists in a test alone."
    aliases = (Alias(SGLANG, "foo", "the same, for a test"),)
    kinds = ("cuda", "cpu")
    requires = ("foo-attn>=1.0",)
    packages = (
        Package("foo-attn", "foo_attn", "1.0", "https://foo.example", arguments=pip, declares_torch=False),
    )
    symbols = (Symbols("foo_attn", ("foo_attn_func",)),)
    tested_on = ("cuda:8.0,packages=foo-attn==1.0", "cpu,packages=foo-attn==1.0")
    limits = Limits(HeadDim(max=128), HeadDimMultiple(8), Masks(("none", "key_padding", "bool")), FewHeads(64))
    options = (Option("careful", bool, False, "For a test."),)

    def load(self, platform: Platform, *, careful: bool = False) -> Kernel:
        from foo_attn import foo_attn_func

        def run(call: AttentionCall):
            key, value = call.key, call.value
            groups = call.query.shape[1] // key.shape[1]
            key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
            return foo_attn_func(
                call.query,
                key,
                value,
                mask=call.attn_mask,
                causal=call.is_causal,
                softmax_scale=call.scale,
            )

        return run


BACKENDS = (FooAttn(),)
'''

FAKE = '''
"""foo_attn 1.0: half types, heads of query and key alike."""

import torch


def foo_attn_func(q, k, v, mask=None, causal=False, softmax_scale=None):
    assert q.dtype in (torch.float16, torch.bfloat16)
    assert q.shape[1] == k.shape[1]
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=softmax_scale)
'''

DROPPED = {
    "mask": ("mask=call.attn_mask,", "mask=None,"),
    "causal": ("causal=call.is_causal,", "causal=False,"),
    "scale": ("softmax_scale=call.scale,", "softmax_scale=None,"),
    "gqa": ("tensor.repeat_interleave(groups, dim=1)", "tensor.repeat(1, groups, 1, 1)"),
}
"""What a wrong kernel drops or misreads, and the line of it."""

ASK = """
import json, sys
sys.path.insert(0, "devtools/inside")
import with_package
with_package.load()
import torch
from attention_backends.backends.kernels import BACKENDS
from attention_backends.backends.kernels.registry import detect
from attention_backends.backends.doctor.doctor import examine
from attention_backends.backends.doctor.install import Interpreter, how_to_get
from attention_backends.backends.doctor.probe import judge
from attention_backends.devtools.pages.backends import support_page
from attention_backends.backends.observe.autotune.candidates import candidates
from attention_backends.backends.config.names import CHOICES, canonical
from attention_backends.backends.values.platform import parse_platform
from attention_backends.backends.values.request import AttentionRequest
from attention_backends.backends.engine.router import Router
from attention_backends.devtools.pages.systems import systems_page
from attention_backends.comparison.bench_run import Asked, choose_backends, measure

platform = detect(torch.device("cpu"))
router = Router(platform, use_probe_results=False)
call = AttentionRequest(1, 4, 64, 64, 64, "bfloat16")
(row,) = examine(router, Interpreter("python", "cp312", "linux_x86_64"), ["foo_attn"])
refused = router.reasons_against("foo_attn", call._replace(head_dim=136, num_heads=65, mask="bias"))
elsewhere = parse_platform("cuda:8.0")
report = measure(Asked("hv15", backends="foo_attn", tokens=64, masks="unmasked"), router)
probed = judge("foo_attn", platform, BACKENDS)
print(json.dumps({
    "choices": CHOICES,
    "doctor": row.as_dict(),
    "elsewhere": BACKENDS["foo_attn"].unavailable_reasons(elsewhere),
    "advice": how_to_get(BACKENDS["foo_attn"], elsewhere, Interpreter("python", "cp312", "linux_x86_64")).text,
    "refused": [(reason.id, reason) for reason in refused],
    "table": [line for line in support_page().splitlines() if "foo_attn" in line],
    "alias": canonical("FOO"),
    "systems": systems_page().count("| `foo` | `foo_attn` |"),
    "candidates": candidates(router, call, "torch_sdpa", "exact", {}),
    "chosen": choose_backends("", router),
    "bench": {row.backend: row.status for case in report.cases for row in case.rows},
    "probe": probed.status,
}))
"""


OF_ALL_BACKENDS = (
    *("pure/test_config.py", "pure/test_config_layers.py", "pure/test_config_options.py", "pure/test_doctor.py"),
    *("pure/test_limits.py", "pure/test_names.py", "pure/test_options.py", "pure/test_registry.py"),
    "pure/test_systems.py",
    *("project/test_backend_ids.py", "project/test_locale_words.py", "project/test_support_table.py"),
)
"""The tests without torch that look at every backend."""


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this tree with a new kernel, and the kernel's package, installed for Python."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    folder = tmp_path_factory.mktemp("with foo") / "pack"
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", "*.py", "*.toml", "*.md"]
    listed += ["*.ambr", "*.json"]
    files = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for name in filter(lambda name: (ROOT / name).is_file(), files):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    add(folder, "foo_attn", FILE)
    counted = FAKE.replace("import torch\n", "import torch\n\nfrom . import arithmetic\n")
    counted = counted.replace("    assert", "    arithmetic.CALLS.append('foo_attn_func')\n    assert", 1)
    (folder / "tests" / "fakes" / "foo_attn.py").write_text(counted, encoding="utf-8")
    site = folder.parent / "site"
    (site / "foo_attn-1.0.dist-info").mkdir(parents=True)
    (site / "foo_attn-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: foo-attn\nVersion: 1.0\n")
    (site / "foo_attn.py").write_text(FAKE, encoding="utf-8")
    return folder


def add(folder: Path, backend_id: str, text: str) -> None:
    """One file and one line."""
    kernels = folder / "backends" / "kernels"
    (kernels / f"{backend_id}.py").write_text(text, encoding="utf-8")
    registry = kernels / "registry.py"
    before, end, after = registry.read_text(encoding="utf-8").partition("\n    }\n")
    line = f'\n        "{backend_id}": "kernels.{backend_id}",'
    registry.write_text(before + line + end + after, encoding="utf-8")


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHONPATH": str(folder.parent / "site"), "OMP_NUM_THREADS": "1"}
    environ.pop("PYTEST_XDIST_WORKER", None)
    return subprocess.run([sys.executable, *words], cwd=folder, env=environ, capture_output=True, text=True)


@pytest.fixture(scope="module")
def answers(pack: Path) -> dict[str, Any]:
    done = run(pack, "-c", ASK)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_doctor_finds_it_here_and_says_how_to_get_it_elsewhere(answers: dict[str, Any]) -> None:
    row = answers["doctor"]
    assert row["available"], row["reasons"]
    assert row["version"] == "foo-attn 1.0"
    assert row["symbols"] == {"needed": ["foo_attn.foo_attn_func"], "missing": [], "problem": None}
    assert row["cards"]["kinds"] == ["cuda", "cpu"]
    assert answers["elsewhere"] == ["package foo-attn is not installed"]
    assert answers["advice"] == "python -m pip install foo-attn==1.0"


def test_menus_show_it_last_and_its_name_elsewhere_means_it(answers: dict[str, Any]) -> None:
    assert answers["choices"][-1] == "foo_attn"
    assert answers["alias"] == "foo_attn"
    assert answers["systems"] == 1


def test_its_rules_refuse_and_stand_in_the_support_table(answers: dict[str, Any]) -> None:
    assert [reason_id for reason_id, _ in answers["refused"]] == ["head_dim.max", "mask", "foo.heads"]
    what, limits, option, names = answers["table"]
    assert "`foo-attn>=1.0`" in what
    assert limits.strip("| ").split(" | ")[3:5] == ["to 128, multiples of 8", "key_padding, bool"]
    assert "few heads, 64 at most" in limits
    assert "`careful`" in option
    assert "`foo`" in names


def test_probe_benchmark_and_measured_choice_run_it(answers: dict[str, Any]) -> None:
    assert answers["probe"] == "ok"
    assert answers["bench"]["foo_attn"] == "ok"
    assert "foo_attn" in answers["chosen"]
    assert "foo_attn" in answers["candidates"]


def test_the_tests_of_all_backends_pass(pack: Path) -> None:
    written = run(pack, "devtools/inside/with_package.py", "devtools/inside/write_docs.py")  # as `dev.py docs` does
    assert written.returncode == 0, written.stderr
    files = [f"tests/{name}" for name in OF_ALL_BACKENDS]
    # What is asked of each backend by itself is asked of the new one alone.
    each = "test_every_row_says_what_the_router_says or test_every_refusal or test_no_command_can_change_torch"
    which = f"foo_attn or not ({each})"
    done = run(pack, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "-k", which, *files)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr


@pytest.mark.slow
def test_its_numbers_are_compared_and_one_that_drops_something_fails(pack: Path) -> None:
    for dropped, (line, wrong) in DROPPED.items():
        assert FILE.count(line) == 1
        add(pack, f"foo_attn_{dropped}", FILE.replace(line, wrong).replace('"foo_attn"', f'"foo_attn_{dropped}"', 1))
    files = ("tests/numeric/test_declared_numerics.py", "tests/numeric/test_kernels_limits.py")
    done = run(pack, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rA", "--tb=no", "-k", "foo_attn", *files)
    found = re.findall(r"^(PASSED|FAILED|ERROR) \S*::(\w+)\[(foo_attn\w*)", done.stdout, re.MULTILINE)
    assert found, done.stdout + done.stderr
    outcomes: dict[str, dict[str, set[str]]] = {}
    for outcome, test, backend in found:
        outcomes.setdefault(test, {}).setdefault(backend, set()).add(outcome)
    wrong_ones = {f"foo_attn_{dropped}": {"FAILED"} for dropped in DROPPED}
    assert outcomes["test_all_that_is_declared_is_right"] == {"foo_attn": {"PASSED"}, **wrong_ones}
    assert outcomes["test_every_cell_is_right_or_refused"]["foo_attn"] == {"PASSED"}
