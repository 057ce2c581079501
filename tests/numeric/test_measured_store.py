"""The file of measured choices: kept, shared, exported, and what becomes of it when it is damaged, locked or full."""

from __future__ import annotations

import json
import logging
import re
import sqlite3
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from syrupy.assertion import SnapshotAssertion

torch = pytest.importorskip("torch", reason="torch is not installed")

from attention_backends.backends.kernels.registry import detect  # noqa: E402
from attention_backends.backends.measure import environment, remembered  # noqa: E402
from attention_backends.backends.measure.call_key import bucket  # noqa: E402
from attention_backends.backends.measure.environment import environment_of  # noqa: E402
from attention_backends.backends.observe.autotune import database  # noqa: E402
from attention_backends.backends.observe.autotune import store as measured_store  # noqa: E402
from attention_backends.backends.observe.autotune.database import MOST  # noqa: E402
from attention_backends.backends.observe.autotune.store import (  # noqa: E402
    FILE,
    VARIABLE,
    Store,
    default_path,
    path_in,
    shared_store,
)
from attention_backends.backends.values.platform import parse_platform  # noqa: E402
from measured_entries import ELSEWHERE, MS, entry, key, some  # noqa: E402
from measured_machines import INCUMBENT, Machine, ran, small_call  # noqa: E402

HERE = environment_of(detect(torch.device("cpu")))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "user" / FILE)


def put(store: Store, *entries: Any) -> None:
    for one in entries:
        store.put(one)


def again(store: Store) -> Store:
    """The store of another process."""
    return Store(store.path)


def no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured_store, "REST_SECONDS", 0.0)
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.05)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_what_is_put_is_found_by_key_environment_and_accuracy(store: Store) -> None:
    put(store, *some())
    other = again(store)
    assert other.get(key(), HERE, "exact") == some()[0]
    assert other.get(key(), HERE, "quantized") is None
    assert other.get(key(), ELSEWHERE, "exact") is None
    assert other.get(key(q_len=5120), HERE, "exact") is None
    put(other, entry(key(), ms={"torch_sdpa": 1.0}))
    found = again(store).get(key(), HERE, "exact")
    assert found is not None
    assert found.winner == "torch_sdpa"
    assert len(store.entries()) == 4, "one entry for each kind of call"


def test_entries_are_plain_data_newest_first(store: Store, snapshot: SnapshotAssertion) -> None:
    put(store, *reversed(some()))
    entries = store.entries()
    assert [one["role"] for one in entries] == ["self", "cross", "ltx2.audio_to_video", "joint"]
    assert entries == json.loads(json.dumps(entries))
    assert entries[0]["ms"] == MS
    assert entries[1]["rejected"]["emulated_int8"] == snapshot
    store.here.add(HERE)
    assert [one["here"] for one in store.entries()] == [True, True, True, False]
    summary = store.summary()
    assert summary == {
        "path_name": FILE, "entries": 4, "entries_here": 3, "bytes": store.path.stat().st_size, "problem": None,
    }  # fmt: skip
    assert str(store.path.parent) not in json.dumps(summary)


def test_an_environment_is_the_machine_and_every_version_that_matters() -> None:
    text = environment_of(parse_platform("cuda:9.0,torch=2.11.0,cudnn=91002,packages=flash-attn==2.8.3;triton==3.4.0"))
    for part in ("cuda", "sm_90", "driver ", "torch 2.11.0", "cuDNN 91002", "flash-attn 2.8.3", "triton 3.4.0"):
        assert part in text
    assert f"attention-backends {environment.own_version()}" in text
    newer = environment_of(parse_platform("cuda:9.0,torch=2.12.0,cudnn=91002,packages=flash-attn==2.8.3;triton==3.4.0"))
    assert newer != text
    assert str(Path.home()) not in HERE


def test_a_document_moves_entries_to_another_store(store: Store, tmp_path: Path) -> None:
    put(store, *some())
    document = json.loads(json.dumps(store.export()))
    assert document["format"] == "attention_backends.measured"
    assert document["version"] == 1
    other = Store(tmp_path / "other.sqlite3")
    assert other.import_(document) == 4
    assert other.import_(document) == 4
    assert other.export()["entries"] == document["entries"]
    assert other.clear() == 4
    assert (other.entries(), other.clear()) == ([], 0)


def changed(field: str, value: Any) -> dict[str, Any]:
    return {"format": "attention_backends.measured", "version": 1, "entries": [{**some()[0].as_dict(), field: value}]}


@pytest.mark.parametrize(
    "document",
    [
        pytest.param([], id="a list"),
        pytest.param({"format": "other"}, id="format"),
        pytest.param({"format": "attention_backends.measured", "version": 2, "entries": []}, id="version"),
        pytest.param({"format": "attention_backends.measured", "version": 1, "entries": {}}, id="entries"),
        pytest.param({"format": "attention_backends.measured", "version": 1, "entries": [7]}, id="an entry"),
        pytest.param(changed("role", 5), id="role"),
        pytest.param(changed("q_len", "long"), id="q_len"),
        pytest.param(changed("q_len", True), id="q_len, bool"),
        pytest.param(changed("is_causal", 1), id="is_causal"),
        pytest.param(changed("mask", "some"), id="mask"),
        pytest.param(changed("accuracy", "any"), id="accuracy"),
        pytest.param(changed("winner", "fast_attn"), id="winner"),
        pytest.param(changed("ms", {"torch_sdpa": -1}), id="ms"),
        pytest.param(changed("ms", {"torch_sdpa": float("nan")}), id="ms, nan"),
        pytest.param(changed("rejected", {"xformers": ""}), id="rejected"),
        pytest.param(changed("put_off", {"xformers": 0}), id="put_off"),
        pytest.param(changed("environment", "x" * 3000), id="environment"),
    ],
)
def test_a_document_with_anything_wrong_changes_nothing(
    store: Store, document: Any, snapshot: SnapshotAssertion
) -> None:
    put(store, some()[1])
    if isinstance(document, dict) and document.get("entries") and isinstance(document["entries"], list):
        document["entries"].append(some()[3].as_dict())
    with pytest.raises(ValueError) as caught:
        store.import_(document)
    assert str(caught.value) == snapshot
    assert [one["role"] for one in store.entries()] == ["cross"]


def test_the_oldest_entries_go_first(store: Store) -> None:
    documents = [entry(key(f"role.{number}"), written=1000.0 + number).as_dict() for number in range(MOST)]
    assert store.import_({"format": "attention_backends.measured", "version": 1, "entries": documents}) == MOST
    put(store, entry(key("newest"), written=9e9))
    roles = [one["role"] for one in store.entries()]
    assert len(roles) == MOST
    assert roles[0] == "newest"
    assert "role.0" not in roles
    assert len(json.dumps(store.export())) < 1 << 20, "what a route takes"


# When the file cannot be used


@pytest.mark.parametrize("content", [b"no database" * 500, b""])
def test_a_damaged_file_is_set_aside(
    store: Store, content: bytes, caplog: pytest.LogCaptureFixture, snapshot: SnapshotAssertion
) -> None:
    store.path.parent.mkdir()
    store.path.write_bytes(content)
    assert store.get(key(), HERE, "exact") is None
    put(store, some()[0])
    assert again(store).get(key(), HERE, "exact") == some()[0]
    asides = sorted(path.name for path in store.path.parent.iterdir())
    if content:
        assert asides == [FILE, f"{FILE}.damaged"]
        assert store.path.with_name(f"{FILE}.damaged").read_bytes() == content
        assert warnings(caplog) == snapshot
        assert store.summary()["problem"] == warnings(caplog)[0]
    else:
        assert asides == [FILE], "an empty file is a new one"


def test_pages_that_are_damaged_are_found(store: Store) -> None:
    store.import_({"format": "attention_backends.measured", "version": 1,
                   "entries": [entry(key(f"role.{number}")).as_dict() for number in range(200)]})  # fmt: skip
    content = bytearray(store.path.read_bytes())
    content[4096:] = b"\xff" * (len(content) - 4096)
    store.path.write_bytes(bytes(content))
    other = again(store)
    assert other.get(key("role.5"), HERE, "exact") is None
    put(other, some()[0])
    assert [one["role"] for one in other.entries()] == ["self"]
    assert store.path.with_name(f"{FILE}.damaged").exists()


@pytest.mark.parametrize("other_version", [True, False])
def test_a_file_of_another_version_is_set_aside_and_kept(store: Store, other_version: bool) -> None:
    store.path.parent.mkdir()
    with sqlite3.connect(store.path) as file:
        file.execute("CREATE TABLE choices (what TEXT)")
        file.execute("INSERT INTO choices VALUES ('dear')")
        file.execute(f"PRAGMA user_version = {7 if other_version else 0}")
    file.close()
    put(store, some()[0])
    assert [one["role"] for one in again(store).entries()] == ["self"]
    aside = store.path.with_name(f"{FILE}.other-version")
    kept = sqlite3.connect(aside)
    assert kept.execute("SELECT what FROM choices").fetchone() == ("dear",)
    kept.close()
    assert "is not 1" in str(store.problem)
    store.path.write_bytes(aside.read_bytes())
    put(again(store), some()[0])
    assert store.path.with_name(f"{FILE}.other-version-2").exists(), "nothing that was set aside is lost"


def test_where_no_file_can_be_made_the_choice_works_in_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, snapshot: SnapshotAssertion
) -> None:
    no_rest(monkeypatch)
    (tmp_path / "file").write_text("in the way")
    store = Store(tmp_path / "file" / FILE)
    machine = Machine(store, {INCUMBENT: lambda: 3.0, "sdpa_math": lambda: 2.0})
    machine.run(small_call())
    machine.run(small_call(), steps=2)
    assert ran(machine.session) == {"sdpa_math": 60}, "no trial in the second run"
    assert store.entries()[0]["winner"] == "sdpa_math"
    assert len(warnings(caplog)) == 1, "said once"
    assert re.sub(r"\(.*\)", "(...)", warnings(caplog)[0]) == snapshot
    (tmp_path / "file").unlink()
    store.flush()
    assert again(store).entries()[0]["winner"] == "sdpa_math", "nothing is lost"
    assert store.summary()["problem"] is None


def test_a_read_only_file_is_read_and_new_choices_stay_in_memory(
    store: Store, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_rest(monkeypatch)
    put(store, some()[0])
    readonly = again(store)

    def connect() -> sqlite3.Connection:
        return sqlite3.connect(f"{readonly.path.as_uri()}?mode=ro", uri=True, isolation_level=None)

    monkeypatch.setattr(readonly._database, "_connect", connect)
    put(readonly, some()[1])
    assert [one["role"] for one in readonly.entries()] == ["self", "cross"]
    assert "readonly database" in warnings(caplog)[0]
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        readonly.clear()
    assert len(readonly.entries()) == 2, "what could not be removed is still there"
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        readonly.import_(Store.export(store))


def test_a_full_disk(store: Store, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    no_rest(monkeypatch)
    put(store, some()[0])
    full = True

    def connect() -> sqlite3.Connection:
        file = sqlite3.connect(store.path, isolation_level=None)
        if full:
            file.execute("PRAGMA max_page_count = 3")
        return file

    monkeypatch.setattr(store._database, "_connect", connect)
    for number in range(40):
        put(store, entry(key(f"role.{number}")))
    assert len(store.entries()) == 41
    (said,) = warnings(caplog)
    assert "disk is full" in said
    in_file = len(again(store).entries())
    assert 1 <= in_file < 41
    full = False
    store.flush()
    assert len(again(store).entries()) == 41, "nothing is lost"


def test_a_locked_file_holds_up_one_access_and_not_each(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.05)
    put(store, some()[0])
    other = sqlite3.connect(store.path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    tried: list[int] = []
    connect = store._database._connect
    monkeypatch.setattr(store._database, "_connect", lambda: (tried.append(1), connect())[1])
    put(store, some()[1])
    for _ in range(20):
        assert store.get(key(), HERE, "exact") is None
        assert store.get(some()[1].key, HERE, "quantized") == some()[1]
    assert len(tried) == 1
    assert "database is locked" in str(store.problem)
    other.execute("COMMIT")
    other.close()
    store._rests[False] = 0.001
    assert store.get(key(), HERE, "exact") == some()[0]
    store.flush()
    assert len(again(store).entries()) == 2


PROCESS = """
import sys
sys.path[:0] = [{tests!r}]
import conftest, random
from pathlib import Path
from attention_backends.backends.observe.autotune.store import Store
from measured_machines import INCUMBENT, Machine, noisy, small_call
me = int(sys.argv[1])
source = random.Random(me)
machine = Machine(Store(Path(sys.argv[2])), {{INCUMBENT: noisy(3, source), "sdpa_math": noisy(2, source)}})
print("ready", flush=True)
sys.stdin.readline()
for number, length in enumerate((40, 48, 56, 64)):
    machine.run(small_call(length), blocks=20, steps=4)
    machine.run(small_call(), role=f"mine.{{me}}.{{number}}", blocks=20, steps=4)
    assert machine.store.problem is None, machine.store.problem
print("done")
"""


def test_two_processes_that_tune_at_once(store: Store) -> None:
    code = PROCESS.format(tests=str(Path(__file__).parents[1]))
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(number), str(store.path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in (1, 2)
    ]  # fmt: skip
    for process in both:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    ends = [process.communicate("go\n", timeout=120) for process in both]
    assert [out for out, _ in ends] == ["done\n", "done\n"], ends
    entries = store.entries()
    roles = [one["role"] for one in entries]
    assert len(roles) == len({(one["role"], one["q_len"]) for one in entries}) == 4 + 2 * 4
    assert {one["winner"] for one in entries} == {"sdpa_math"}
    assert store.problem is None
    assert [path.name for path in store.path.parent.iterdir()] == [FILE], "no journal and nothing set aside is left"


# Where it is


def test_one_store_for_each_file_of_a_process(tmp_path: Path) -> None:
    assert shared_store(tmp_path / "a.sqlite3") is shared_store(tmp_path / "x" / ".." / "a.sqlite3")
    assert shared_store(tmp_path / "a.sqlite3") is not shared_store(tmp_path / "b.sqlite3")
    assert list(tmp_path.iterdir()) == [], "a store that is only looked at makes no file"


def test_the_variable_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv(remembered.CACHE_VARIABLE, str(tmp_path))
    assert default_path() == tmp_path / FILE
    assert path_in(tmp_path / "user") == tmp_path / "user" / "attention_backends" / FILE
    monkeypatch.setenv(VARIABLE, str(tmp_path / "mine.sqlite3"))
    assert default_path() == path_in(tmp_path / "user") == tmp_path / "mine.sqlite3"


def test_lengths_of_one_bucket_differ_by_a_quarter_at_most() -> None:
    ends = sorted({bucket(length) for length in range(4, 20000)})
    assert all(later / end <= 1.25 for end, later in pairwise(ends))
