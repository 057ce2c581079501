"""The command `tune`: it fills the store from presets, and shows, clears, exports and imports it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from syrupy.assertion import SnapshotAssertion

torch = pytest.importorskip("torch", reason="torch is not installed")

from attention_backends.backends.config.text import CONFIG_VARIABLE, DEFAULT_VARIABLES  # noqa: E402
from attention_backends.backends.engine.router import NOTHING_MEASURES, Router  # noqa: E402
from attention_backends.backends.kernels.registry import detect  # noqa: E402
from attention_backends.backends.observe.autotune import tuner  # noqa: E402
from attention_backends.backends.observe.autotune.store import VARIABLE, Store  # noqa: E402
from attention_backends.cli import main  # noqa: E402
from attention_backends.comparison import contenders  # noqa: E402
from attention_backends.comparison.presets import GRIDS, PRESETS  # noqa: E402
from attention_backends.comparison.tune_command import ROLES  # noqa: E402
from measured_entries import some  # noqa: E402
from measured_machines import Clock, Costed  # noqa: E402

Capture = pytest.CaptureFixture[str]
SMALL = ("--tokens", "16", "--dtype", "float32", "--device", "cpu")


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in (CONFIG_VARIABLE, *DEFAULT_VARIABLES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "measured.sqlite3"))
    return tmp_path / "measured.sqlite3"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, Costed]:
    """Kernels whose cost a test sets."""
    clock = Clock()
    costs = {"torch_sdpa": 3.0, "sdpa_math": 2.0, "aiter": 9.0}
    backends = {name: Costed(name, clock, lambda ms=ms: ms) for name, ms in costs.items()}
    router = Router(detect(torch.device("cpu")), backends, use_probe_results=False)
    monkeypatch.setattr(contenders, "router_for", lambda device: router)
    monkeypatch.setattr(tuner, "DeviceClock", lambda kind: clock)
    return backends


def tune(capsys: Capture, *arguments: str, status: int = 0) -> dict[str, Any]:
    assert main(["tune", "--json", *arguments]) == status
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_presets_fill_the_store(
    file: Path, machine: dict[str, Costed], capsys: Capture, snapshot: SnapshotAssertion
) -> None:
    found = tune(capsys, "--presets", "flux2,wan22_14b_cross", *SMALL)
    assert found["not_measured"] == []
    assert {(one["role"], one["winner"], one["num_heads"]) for one in found["entries"]} == {
        ("joint", "sdpa_math", 48), ("cross", "sdpa_math", 40),
    }  # fmt: skip
    (rejected,) = {one["rejected"]["aiter"] for one in found["entries"]}
    assert rejected == snapshot
    assert found["summary"]["entries"] == found["summary"]["entries_here"] == 2
    assert Store(file).summary()["entries"] == 2


def test_what_is_known_is_measured_anew(file: Path, machine: dict[str, Costed], capsys: Capture) -> None:
    tune(capsys, "--presets", "flux2", *SMALL)
    machine["torch_sdpa"].cost = lambda: 1.5
    (entry,) = tune(capsys, "--presets", "flux2", *SMALL)["entries"]
    assert entry["winner"] == "torch_sdpa"


def test_a_kernel_may_compile_as_long_as_it_likes(file: Path, machine: dict[str, Costed], capsys: Capture) -> None:
    times = iter([60_000.0])
    machine["sdpa_math"].cost = lambda: next(times, 2.0)
    (entry,) = tune(capsys, "--presets", "flux2", *SMALL)["entries"]
    assert (entry["winner"], entry["put_off"]) == ("sdpa_math", {})


def test_what_gives_no_choice_says_why(
    file: Path, machine: dict[str, Costed], capsys: Capture, snapshot: SnapshotAssertion
) -> None:
    machine["torch_sdpa"].cost = lambda: 0.2
    found = tune(capsys, "--presets", "flux2", *SMALL)
    assert found["entries"] == []
    assert found["not_measured"] == snapshot

    def fails(call: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    machine["torch_sdpa"].kernel = fails
    assert tune(capsys, "--presets", "flux2", *SMALL)["not_measured"] == [
        {"preset": "flux2", "reason": "out of memory"}
    ]


def test_a_fault_of_the_gpu_ends_it(file: Path, machine: dict[str, Costed], capsys: Capture) -> None:
    tune(capsys, "--presets", "flux2", *SMALL)

    def fault(call: Any) -> torch.Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    machine["torch_sdpa"].kernel = fault
    found = tune(capsys, "--presets", "wan22_14b_cross,hv15", *SMALL, status=1)
    assert "illegal memory access" in found["not_measured"][0]["reason"]
    assert len(found["not_measured"]) == 1
    assert found["summary"]["entries"] == 1, "what was found before is kept"


def test_show_export_clear_and_import(file: Path, tmp_path: Path, capsys: Capture, snapshot: SnapshotAssertion) -> None:
    store = Store(file)
    for entry in some():
        store.put(entry)
    assert len(tune(capsys, "--show")["entries"]) == 4
    assert main(["tune", "--show"]) == 0
    text = capsys.readouterr().out
    first, _, _, *table = text.splitlines()
    assert first.partition("measured.sqlite3 ")[2] == snapshot
    assert [" ".join(line.rpartition("; ")[0].split()) for line in table] == snapshot  # without the days
    assert "sdpa_flash" in text
    out = tmp_path / "choices.json"
    assert tune(capsys, "--export", str(out)) == {"exported": 4}
    assert main(["tune", "--export", "-"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(out.read_text(encoding="utf-8"))
    assert tune(capsys, "--clear") == {"removed": 4}
    assert tune(capsys, "--show")["entries"] == []
    assert tune(capsys, "--import", str(out)) == {"taken": 4}
    assert tune(capsys, "--import", str(out), "--store", str(tmp_path / "other.sqlite3")) == {"taken": 4}
    assert len(Store(tmp_path / "other.sqlite3").entries()) == 4


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["--presets", "flux9"], id="presets"),
        pytest.param(["--dtype", "int3"], id="dtype"),
        pytest.param(["--tokens", "-1"], id="tokens"),
        pytest.param(["--import", "{folder}/nothing.json"], id="no file"),
        pytest.param(["--import", "{folder}/wrong.json"], id="another document"),
        pytest.param(["--import", "{folder}/text.json"], id="no JSON"),
        pytest.param(["--import", "{folder}/deep.json"], id="deep JSON"),
        pytest.param(["--export", "{folder}/no/such/folder.json"], id="no folder"),
    ],
)
def test_bad_input_ends_with_a_reason(
    file: Path, tmp_path: Path, capsys: Capture, arguments: list[str], snapshot: SnapshotAssertion
) -> None:
    (tmp_path / "wrong.json").write_text("[]", encoding="utf-8")
    (tmp_path / "text.json").write_text("choices", encoding="utf-8")
    (tmp_path / "deep.json").write_text("[" * 200_000, encoding="utf-8")
    arguments = [word.replace("{folder}", str(tmp_path)) for word in arguments]
    found = tune(capsys, *arguments, status=2)
    said = found["error"].replace(str(tmp_path), "FOLDER").replace("\\", "/")
    assert said.partition(" are: ")[0].partition(": [Errno")[0] == snapshot


def test_a_store_that_cannot_be_written_is_found_before_the_work(
    file: Path, machine: dict[str, Costed], tmp_path: Path, capsys: Capture, snapshot: SnapshotAssertion
) -> None:
    (tmp_path / "plain").write_text("here first", encoding="utf-8")
    nowhere = tmp_path / "plain" / "measured.sqlite3"
    found = tune(capsys, "--presets", "flux2", "--store", str(nowhere), *SMALL, status=2)
    assert re.sub(r"\(.*\)", "(...)", found["error"].replace(str(nowhere), "FILE")) == snapshot


def test_explain_knows_the_store(
    file: Path, machine: dict[str, Costed], capsys: Capture, snapshot: SnapshotAssertion
) -> None:
    tune(capsys, "--presets", "flux2", *SMALL)
    preset = PRESETS["flux2"].scaled(16)
    sizes = f"num_heads=48,q_len={preset.q_len},head_dim=128,dtype=float32"
    question = ["explain", "--json", "--config", "autotune", "--role", "flux.single", "--request"]
    assert main([*question, sizes]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["backend"], answer["asked"], answer["notes"]) == ("sdpa_math", "autotune", [])
    assert answer["source"] == snapshot
    assert main([*question, sizes, "--platform", "cuda:9.0"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["notes"] == [NOTHING_MEASURES]


def test_every_preset_has_a_role() -> None:
    assert set(ROLES) <= {*PRESETS, *GRIDS}
    assert {ROLES.get(name, "joint") for name in PRESETS if "cross" in name or "_to_" in name} == {"cross"}
