"""Probes: kernels that crash, hang, lie or babble, each in a process of its own; and the command that runs them.

The broken kernels are a module that is written to disk, which the child imports through the probe's own argument.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from syrupy.assertion import SnapshotAssertion

torch = pytest.importorskip("torch")

from attention_backends.backends.doctor.doctor import probe_all  # noqa: E402
from attention_backends.backends.doctor.isolated import run, words_of  # noqa: E402
from attention_backends.backends.doctor.probe import judge, probe  # noqa: E402
from attention_backends.backends.engine.router import Router  # noqa: E402
from attention_backends.backends.kernels import BACKENDS  # noqa: E402
from attention_backends.backends.kernels.backend import Backend, Kernel, Limits  # noqa: E402
from attention_backends.backends.kernels.registry import detect  # noqa: E402
from attention_backends.backends.kernels.support.sage import KeyBlock  # noqa: E402
from attention_backends.backends.kernels.support.sdpa import plain_sdpa  # noqa: E402
from attention_backends.backends.measure import remembered  # noqa: E402
from attention_backends.backends.measure.remembered import Outcome  # noqa: E402
from attention_backends.backends.sparse.executors import OF_PACKAGES  # noqa: E402
from attention_backends.backends.values.limits import Dtypes, HeadDimIn  # noqa: E402
from attention_backends.backends.values.platform import Platform  # noqa: E402
from attention_backends.backends.values.request import AttentionCall  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
posix = pytest.mark.skipif(sys.platform == "win32", reason="signals and process groups are POSIX's")

BROKEN = """
import atexit, os, signal, subprocess, sys, threading, time
from pathlib import Path

from attention_backends.backends.kernels.backend import FLOATING, Backend, Limits
from attention_backends.backends.values.limits import Dtypes
from attention_backends.backends.values.platform import KINDS
from attention_backends.backends.kernels.support.sdpa import plain_sdpa


class Kernel(Backend):
    summary = "For a test."
    kinds = KINDS
    limits = Limits(Dtypes(FLOATING))

    def __init__(self, backend_id, run, at_load=lambda: None):
        self.id, self.run, self.at_load = backend_id, run, at_load

    def load(self, platform):
        self.at_load()
        return self.run


def signalled(call):
    print("the kernel's last words", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)
    time.sleep(60)


def hanging(call):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(os.environ["CHILD_OF_KERNEL"]).write_text(str(child.pid))
    time.sleep(600)


def babbling(call):
    if not sys.stdout.closed:  # it is called for more than one problem
        for _ in range(20_000):
            print('{"status": "crashed"} ' + 60 * "#")
        os.write(1, b"\\xff\\x00 not text" * 1000)
        sys.stdout.close()
    print("warning: " + 2_000_000 * "x", file=sys.stderr)
    return plain_sdpa()(call)


def crashing_at_exit(call):
    atexit.register(os.kill, os.getpid(), signal.SIGSEGV)
    threading.Thread(target=time.sleep, args=(600,)).start()  # Python would wait for it
    return plain_sdpa()(call)


def raising(call):
    print("line 1\\n\\nline 2", file=sys.stderr)
    raise ValueError("no kernel image is available\\n  for execution on the device")


def poisoning(call):
    import torch

    torch.zeros(1, device=call.query.device)[torch.full((8,), 99, device=call.query.device)]
    return plain_sdpa()(call)


BACKENDS = {
    kernel.id: kernel
    for kernel in (
        Kernel("poisoning", poisoning),
        Kernel("good", plain_sdpa()),
        Kernel("signalled", signalled),
        Kernel("exiting", lambda call: os._exit(0)),
        Kernel("crashing_import", plain_sdpa(), lambda: os.kill(os.getpid(), signal.SIGKILL)),
        Kernel("exiting_import", plain_sdpa(), lambda: sys.exit("bye")),
        Kernel("hanging", hanging),
        Kernel("babbling", babbling),
        Kernel("crashing_at_exit", crashing_at_exit),
        Kernel("raising", raising),
    )
}
"""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(remembered.CACHE_VARIABLE, str(tmp_path / "cache"))
    remembered._outcomes.cache_clear()


@pytest.fixture
def child_of_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Puts the broken kernels on disk; returns where the hanging one writes the process that it starts."""
    (tmp_path / "broken_kernels.py").write_text(BROKEN, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("CHILD_OF_KERNEL", str(tmp_path / "pid"))
    return tmp_path / "pid"


SOURCE = "broken_kernels:BACKENDS"


# In a process of its own


@pytest.mark.usefixtures("child_of_kernel")
def test_a_kernel_that_is_right() -> None:
    outcome = probe("good", source=SOURCE)
    assert outcome.status == "ok", outcome
    assert outcome.relative_l2 is not None
    assert 0 < outcome.relative_l2 < 2e-3
    assert outcome.ms is not None
    assert outcome.ms > 0


class Expected(NamedTuple):
    status: str
    stderr: str = ""


@posix
@pytest.mark.usefixtures("child_of_kernel")
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("signalled", Expected("crashed", "the kernel's last words")),
        ("crashing_import", Expected("crashed")),
        ("exiting", Expected("crashed")),
        ("exiting_import", Expected("unavailable")),
        ("babbling", Expected("ok")),
        ("crashing_at_exit", Expected("ok")),
        ("raising", Expected("failed", "line 2")),
    ],
)
def test_whatever_a_kernel_does_is_an_outcome_in_words(
    name: str, expected: Expected, snapshot: SnapshotAssertion
) -> None:
    outcome = probe(name, source=SOURCE)  # "hung" where it waits for what Python would wait for
    assert outcome.status == expected.status
    assert outcome.reason.split(", in ")[0] == snapshot
    if name == "signalled":  # the innermost function is worth more than the signal
        assert ", in signalled (" in outcome.reason
        assert "broken_kernels.py, line " in outcome.reason
    assert any(expected.stderr in line for line in outcome.stderr) or not expected.stderr, outcome.stderr
    assert all(len(line) <= 200 for line in outcome.stderr)
    assert len(outcome.stderr) <= 8


@posix
def test_a_kernel_that_hangs_is_killed_with_its_children(
    child_of_kernel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Limited(subprocess.Popen):  # type: ignore[type-arg]
        """Its time is up as soon as the kernel hangs, however long the start took."""

        def wait(self, timeout: float | None = None) -> int:
            while timeout is not None and self.poll() is None:
                if child_of_kernel.exists() and child_of_kernel.read_text():
                    raise subprocess.TimeoutExpired(self.args, timeout)
                time.sleep(0.05)
            return super().wait()

    monkeypatch.setattr(subprocess, "Popen", Limited)
    outcome = probe("hanging", source=SOURCE)
    assert outcome.status == "hung"
    assert outcome.reason.startswith("no answer within ")
    assert outcome.reason.endswith(" s while running")
    assert _gone(int(child_of_kernel.read_text()))


def _gone(pid: int) -> bool:
    """Waits until the process has gone; for ever where it never does, which ends in pytest's time limit."""
    while True:
        try:
            os.kill(pid, 0)
            if "Z" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2][:3]:
                return True  # dead, and nobody has asked for its status yet
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.05)


def test_a_python_that_does_not_even_start_is_no_fault_of_the_kernels(
    tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        (tmp_path / "sitecustomize.py").write_text("import os; os._exit(7)")
        patch.setenv("PYTHONPATH", str(tmp_path))
        outcome = probe("torch_sdpa")
    assert (outcome.status, outcome.reason) == snapshot
    assert outcome.status not in remembered.LASTING


@posix
def test_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    # The waiting process is interrupted; what it waits for, and that one's child, must go too.
    child = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    code = (
        # A shell that starts the tests in the background has SIGINT ignored, and children inherit that.
        "import importlib.util, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"path = {str(ROOT / 'backends' / 'doctor' / 'isolated.py')!r}\n"
        "spec = importlib.util.spec_from_file_location('isolated', path)\n"
        "isolated = importlib.util.module_from_spec(spec); spec.loader.exec_module(isolated)\n"
        f"isolated.run([sys.executable, '-c', {child!r}], 600)\n"
    )
    waiting = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL, start_new_session=True)
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert waiting.poll() is None
        time.sleep(0.05)
    waiting.send_signal(signal.SIGINT)
    waiting.wait()
    assert _gone(int((tmp_path / "pid").read_text()))


@pytest.mark.parametrize(
    "status",
    [
        pytest.param(-11, id="segmentation fault"),
        pytest.param(-9, id="killed"),
        pytest.param(-40, id="signal without a name"),
        pytest.param(3, id="exit code"),
        pytest.param(0xC0000005, id="access violation"),
        pytest.param(0xC0000409 - 2**32, id="stack buffer overrun"),
    ],
)
def test_the_end_of_a_process_in_words(status: int, snapshot: SnapshotAssertion) -> None:
    if sys.platform == "win32" and status in (-11, -9):
        pytest.skip("no such signal there")
    assert words_of(status) == snapshot


def test_lines_that_come_one_by_one_are_all_kept() -> None:
    code = "import sys, time\nfor n in range(6): print(n, file=sys.stderr, flush=True); time.sleep(0.05)"
    assert run([sys.executable, "-c", code], timeout=60).tail == ("0", "1", "2", "3", "4", "5")


def test_only_the_last_lines_of_stderr_are_kept() -> None:
    code = "import sys; [print(f'line {n}', file=sys.stderr) for n in range(100_000)]; sys.exit(3)"
    ended = run([sys.executable, "-c", code], timeout=60)
    assert ended.status == 3
    assert ended.tail == tuple(f"line {number}" for number in range(99_992, 100_000))


# The verdict


class Subject(Backend):
    summary = "For a test."
    kinds = ("cpu",)
    limits = Limits()

    def __init__(self, kernel: Kernel, backend_id: str = "subject", **declared: object) -> None:
        self.id = backend_id  # type: ignore[misc]
        self._kernel = kernel
        for name, value in declared.items():
            setattr(self, name, value)

    def load(self, platform: Platform) -> Kernel:
        return self._kernel


def verdict(kernel: Kernel, backend_id: str = "subject", **declared: object) -> Outcome:
    with torch.inference_mode():
        subject = Subject(kernel, backend_id, **declared)
        return judge(backend_id, Platform("cpu", torch=torch.__version__), {backend_id: subject})


def with_nan(call: AttentionCall) -> torch.Tensor:
    output = plain_sdpa()(call).clone()
    output[0, 1, 7, 3] = float("nan")
    return output


def wrong_scale(call: AttentionCall) -> torch.Tensor:
    return plain_sdpa()(AttentionCall(call.query, call.key, call.value, scale=1.0))


def without_the_last_block(call: AttentionCall) -> torch.Tensor:
    """Padded keys that count with score 0, as in SageAttention 1.0.6."""
    zeros = torch.zeros_like(call.key[:, :, : -call.key.shape[2] % 64])
    key, value = (torch.cat((tensor, zeros), dim=2) for tensor in (call.key, call.value))
    return plain_sdpa()(AttentionCall(call.query, key, value))


def mean_taken_from_keys(call: AttentionCall) -> torch.Tensor:
    call.key.sub_(call.key.mean(dim=2, keepdim=True))
    return plain_sdpa()(call)


def out_of_memory(call: AttentionCall) -> torch.Tensor:
    raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")


@pytest.mark.parametrize(
    ("kernel", "status", "error"),
    [
        pytest.param(with_nan, "failed", "", id="NaN"),
        pytest.param(wrong_scale, "failed", "6.", id="scale"),
        pytest.param(without_the_last_block, "failed", "", id="last block"),
        pytest.param(lambda call: torch.zeros_like(call.query), "failed", "1.0e+00", id="zeros"),
        pytest.param(lambda call: plain_sdpa()(call) + float("inf"), "failed", "", id="infinite"),
        pytest.param(lambda call: plain_sdpa()(call).transpose(1, 2), "failed", "", id="layout"),
        pytest.param(lambda call: (plain_sdpa()(call), None), "failed", "", id="two outputs"),
        pytest.param(lambda call: sys.exit(4), "failed", "", id="exit"),
        pytest.param(mean_taken_from_keys, "failed", "", id="inputs"),
        pytest.param(out_of_memory, "untested", "", id="memory"),
        pytest.param(plain_sdpa(), "ok", "", id="right"),
    ],
)
def test_the_verdict_on_an_exact_kernel(kernel: Kernel, status: str, error: str, snapshot: SnapshotAssertion) -> None:
    outcome = verdict(kernel)
    assert outcome.status == status
    assert re.sub(r"\d\.\de[+-]\d\d", "...", outcome.reason) == snapshot
    assert not error or f"{outcome.relative_l2:.1e}".startswith(error)


def noisy(relative: float) -> Kernel:
    """Right but for noise of this relative size."""

    def kernel(call: AttentionCall) -> torch.Tensor:
        output = plain_sdpa()(call)
        noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
        return output + (noise * relative * output.float().norm() / noise.norm()).to(output.dtype)

    return kernel


@pytest.mark.parametrize("backend_id", ["subject", "sage_attn_3", "torch_sdpa"])
@pytest.mark.parametrize(
    ("declared", "fits", "too_much"),
    [
        ({}, 0.0005, 0.01),
        ({"arithmetic": "fp32"}, 0.0005, 0.01),
        ({"arithmetic": "int8"}, 0.04, 0.15),
        ({"arithmetic": "fp8"}, 0.06, 0.15),
        ({"arithmetic": "fp4"}, 0.2, 0.7),
        ({"accuracy": "quantized"}, 0.04, 0.15),
        ({"sparse": True}, 0.9, None),
    ],
    ids=str,
)
def test_the_tolerance_is_that_of_the_arithmetic(
    declared: dict[str, object], fits: float, too_much: float | None, backend_id: str
) -> None:
    assert verdict(noisy(fits), backend_id, **declared).status == "ok"
    if too_much is not None:
        assert verdict(noisy(too_much), backend_id, **declared).status == "failed"


def test_the_first_problem_that_the_kernel_takes_is_used(snapshot: SnapshotAssertion) -> None:
    seen: list[AttentionCall] = []

    def kernel(call: AttentionCall) -> torch.Tensor:
        seen.append(call)
        return plain_sdpa()(call)

    assert verdict(kernel, limits=Limits(Dtypes(("bfloat16",)), HeadDimIn((128,)), KeyBlock(64))).status == "ok"
    assert seen[0].key.shape == (1, 2, 256, 128)
    assert seen[0].key.dtype == torch.bfloat16
    refused = verdict(kernel, limits=Limits(HeadDimIn((32,))))
    assert (refused.status, refused.reason.split(":")[0]) == snapshot


CPU = Platform("cpu", torch="2.11.0", described=True)
QUICK = [name for name in BACKENDS if not BACKENDS[name].unavailable_reasons(CPU) and name != "flex_attn"]
"""What runs on a CPU at once; flex_attn compiles for long."""


@pytest.mark.parametrize("name", QUICK)
def test_every_backend_that_runs_here_passes(name: str) -> None:
    platform = detect(torch.device("cpu"))
    with torch.inference_mode():
        alone = name != "comfy" and not BACKENDS[name].sparse  # the one needs ComfyUI, the others a token grid
        assert judge(name, platform, BACKENDS).status == ("ok" if alone else "untested")


# All of them, and the command


def test_only_what_the_machine_has_is_run_and_it_is_remembered_at_once(snapshot: SnapshotAssertion) -> None:
    asked, said = [], []

    def runs(name: str) -> Outcome:
        asked.append(name)
        if name == "good":
            return Outcome("ok", "", 1e-4, 3.0)
        raise KeyboardInterrupt

    class Needs(Subject):
        requires = ("flash-attn",)

    class Raises(Subject):
        def unavailable_reasons(self, platform: Platform) -> list[str]:
            raise OSError("driver library is gone")

    backends = {
        "needs": Needs(plain_sdpa(), "needs"),
        "raises": Raises(plain_sdpa(), "raises"),
        "good": Subject(plain_sdpa(), "good"),
        "stopped": Subject(plain_sdpa(), "stopped"),
    }
    router = Router(Platform("cpu", torch="2.11.0"), backends)
    with pytest.raises(KeyboardInterrupt):
        probe_all(router, (), runs, said.append)
    assert asked == ["good", "stopped"]
    assert said == ["probing good ...", "probing stopped ..."]
    remembered._outcomes.cache_clear()
    assert remembered.recall("good", router.platform) == Outcome("ok", "", 1e-4, 3.0)
    found = probe_all(router, ("needs", "raises"), runs, said.append)
    assert {name: outcome.summary for name, outcome in found.items()} == snapshot


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pack as somebody downloads it: in a folder of any name, not installed."""
    folder = tmp_path_factory.mktemp("custom nodes") / "attention-backends-main 2"
    for name in ("backends", "cli", "comparison", "nodes"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("__init__.py", "__main__.py", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def _doctor(pack: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-s", str(pack), "doctor", *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done


def test_the_command_probes_shows_and_forgets_in_a_folder_of_any_name(pack: Path, tmp_path: Path) -> None:
    done = _doctor(pack, "--json", "--probe", "_native_math", "flash_attn_2")
    assert done.stderr.count("probing ") == 1  # the other one is not there
    rows = {row["id"]: row for row in json.loads(done.stdout)["backends"]}
    assert rows["sdpa_math"]["probed"]["status"] == "ok"
    assert rows["flash_attn_2"]["probed"]["status"] == "unavailable"
    assert len(list((tmp_path / "cache").iterdir())) == 1
    later = _doctor(pack, "sdpa_math")
    assert "probing" not in later.stderr
    assert "; probed: ok (relative" in later.stdout
    forgotten = _doctor(pack, "--forget", "sdpa_math")
    assert "probes forgotten: 1" in forgotten.stderr
    assert "probed" not in forgotten.stdout


def test_nothing_is_probed_or_written_unless_asked(pack: Path, tmp_path: Path) -> None:
    _doctor(pack)
    assert not (tmp_path / "cache").exists()


def test_what_the_command_says_of_a_named_backend_and_of_all(
    capsys: pytest.CaptureFixture[str], snapshot: SnapshotAssertion
) -> None:
    from attention_backends.cli import main

    remembered.remember(
        {"sdpa_math": Outcome("crashed", "signal 6 (SIGABRT) while running", None, None, ("why",))}, detect()
    )
    assert main(["doctor", "_native_math", "npu_fusion"]) == 0
    named = capsys.readouterr().out
    assert "    cards: any device\n" in named
    shown = ("sdpa_math ", "    cards: ", "    names: ", "    stderr ")
    assert [" ".join(line.split()) for line in named.splitlines() if line.startswith(shown)] == snapshot
    assert main(["doctor"]) == 0
    overview = capsys.readouterr().out
    assert "cards: " not in overview
    assert "stderr of the probe" not in overview
    assert " ".join(next(line for line in overview.splitlines() if line.startswith("sdpa_math ")).split()) == snapshot
    assert main(["doctor", "--verbose"]) == 0
    assert capsys.readouterr().out.count("    cards: ") == len(BACKENDS) + len(OF_PACKAGES)


@pytest.mark.parametrize("seconds", ["0", "-1", "soon", "inf", "nan"])
def test_a_time_limit_is_a_number_of_seconds(
    capsys: pytest.CaptureFixture[str], seconds: str, snapshot: SnapshotAssertion
) -> None:
    from attention_backends.cli import main

    with pytest.raises(SystemExit):
        main(["doctor", "--probe", f"--timeout={seconds}"])
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.partition("argument --timeout: ")[2] == snapshot


# On a card


@pytest.mark.gpu
@pytest.mark.usefixtures("child_of_kernel")
def test_a_poisoned_context_is_the_end_of_one_probe_only() -> None:
    outcome = probe("poisoning", source=SOURCE)
    assert outcome.status in ("failed", "crashed")
    assert "device-side assert" in outcome.reason
    assert probe("good", source=SOURCE).status == "ok"


@pytest.mark.gpu
@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_of_this_card_passes_its_probe(name: str) -> None:
    reasons = BACKENDS[name].unavailable_reasons(detect())
    if reasons:
        pytest.skip(f"GPU: {name}: {'; '.join(reasons)}")
    outcome = probe(name)
    assert outcome.status in (("untested",) if name == "comfy" else ("ok", "unavailable")), outcome


DROPS = {
    "mask": lambda call: (None, call.is_causal, call.scale),
    "scale": lambda call: (call.attn_mask, call.is_causal, None),
    "is_causal": lambda call: (call.attn_mask, False, call.scale),
}


@pytest.mark.parametrize("dropped", [*DROPS, "num_kv_heads", "nothing"])
def test_a_build_that_drops_an_argument_is_seen(monkeypatch: pytest.MonkeyPatch, dropped: str) -> None:
    """The plain problem alone would not show it."""
    import torch
    from attention_backends.backends.doctor.probe import judge
    from attention_backends.backends.kernels import BACKENDS
    from attention_backends.backends.values.platform import Platform

    sdpa = torch.nn.functional.scaled_dot_product_attention

    def kernel(call):
        mask, causal, scale = DROPS.get(dropped, DROPS["mask"])(call)
        if dropped not in DROPS:
            mask = call.attn_mask
        key, value = call.key, call.value
        if key.shape[1] != call.query.shape[1]:
            group = call.query.shape[1] // key.shape[1]
            if dropped == "num_kv_heads":  # heads in another order
                key, value = key.repeat(1, group, 1, 1), value.repeat(1, group, 1, 1)
            else:
                key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        return sdpa(call.query, key, value, mask, is_causal=causal, scale=scale)

    backend = BACKENDS["torch_sdpa"]
    monkeypatch.setattr(type(backend), "load", lambda self, platform: kernel)
    outcome = judge("torch_sdpa", Platform("cpu", torch=torch.__version__), BACKENDS)
    if dropped == "nothing":
        assert outcome.status == "ok", outcome.reason
    else:
        assert outcome.status == "failed"
        assert "wrong: relative L2" in outcome.reason
        assert dropped in outcome.reason
