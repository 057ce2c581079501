"""The file of measured choices under odd circumstances: hostile documents, broken pages, and what clearing leaves."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from time import time
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from attention_backends.backends.kernels.registry import detect  # noqa: E402
from attention_backends.backends.measure.environment import environment_of  # noqa: E402
from attention_backends.backends.observe.autotune import database  # noqa: E402
from attention_backends.backends.observe.autotune import store as measured_store  # noqa: E402
from attention_backends.backends.observe.autotune.database import MOST  # noqa: E402
from attention_backends.backends.observe.autotune.store import Store  # noqa: E402
from attention_backends.backends.values import platform  # noqa: E402
from measured_entries import entry, key, some  # noqa: E402

HERE = environment_of(detect(torch.device("cpu")))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "user" / "measured.sqlite3")


def many(count: int, **more: Any) -> list[Any]:
    return [entry(key(q_len=64 + number), **more) for number in range(count)]


@pytest.mark.parametrize("field", ["ms", "written"])
def test_a_number_that_no_float_holds_is_refused(store: Store, field: str) -> None:
    one = entry(key()).as_dict()
    one[field] = {name: 10**400 for name in one["ms"]} if field == "ms" else 10**400
    with pytest.raises(ValueError, match="expected a number"):
        store.import_({**store.export(), "entries": [one]})


def test_entries_from_the_future_do_not_push_out_what_is_measured_here(store: Store) -> None:
    future = [one._replace(written=1e15) for one in many(MOST)]
    store.import_({**store.export(), "entries": [one.as_dict() for one in future]})
    mine = entry(key("joint"), written=time() + 1)
    store.put(mine)
    assert Store(store.path).get(mine.key, HERE, "exact") is not None
    assert all(one["written"] <= time() + 1 for one in store.entries())


def test_a_cleared_file_is_small_again(store: Store) -> None:
    store.import_({**store.export(), "entries": [one.as_dict() for one in many(300)]})
    full = store.summary()["bytes"]
    assert store.clear() == 300
    assert store.summary()["bytes"] < full / 10
    assert Store(store.path).entries() == []


def test_a_file_that_another_process_reads_can_be_cleared(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.05)
    for one in some():
        store.put(one)
    real = database.Database._shrink
    reader = sqlite3.connect(store.path, isolation_level=None)

    def meanwhile(self: database.Database) -> None:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM measured").fetchone()
        real(self)

    monkeypatch.setattr(database.Database, "_shrink", meanwhile)
    assert store.clear() == 4
    reader.execute("COMMIT")
    reader.close()
    assert Store(store.path).entries() == []


def test_a_broken_page_of_the_table_is_found_too(store: Store) -> None:
    store.import_({**store.export(), "entries": [one.as_dict() for one in many(50)]})
    with sqlite3.connect(store.path) as file:
        size = file.execute("PRAGMA page_size").fetchone()[0]
        pages = file.execute("PRAGMA page_count").fetchone()[0]
        roots = dict(file.execute("SELECT type, rootpage FROM sqlite_master"))
    file.close()
    data = bytearray(store.path.read_bytes())
    for page in range(2, pages + 1):
        if page not in roots.values() and data[(page - 1) * size] == 13:  # a leaf of a table
            data[(page - 1) * size : page * size] = b"\xaa" * size
    store.path.write_bytes(data)
    after = Store(store.path)
    assert after.entries() == []
    after.put(some()[0])
    assert len(Store(store.path).entries()) == 1
    assert "damaged" in (after.problem or "")
    assert store.path.with_name("measured.sqlite3.damaged").exists()


def test_what_a_person_does_by_hand_ends_the_rest_and_the_complaint(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.05)
    for one in some():
        store.put(one)
    document = store.export()
    locked = sqlite3.connect(store.path, isolation_level=None)
    locked.execute("BEGIN EXCLUSIVE")
    assert store.entries() == []
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        store.clear()
    assert "locked" in (store.problem or "")
    locked.execute("COMMIT")
    locked.close()
    assert store.import_(document) == 4
    assert (len(store.entries()), store.problem) == (4, None)
    assert store.clear() == 4


def test_the_complaint_ends_where_the_file_works_again_after_an_attempt_by_hand(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.05)
    monkeypatch.setattr(measured_store, "REST_SECONDS", 0.0)
    store.put(some()[0])
    locked = sqlite3.connect(store.path, isolation_level=None)
    locked.execute("BEGIN EXCLUSIVE")
    assert store.entries() == []
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        store.import_(store.export())
    locked.execute("COMMIT")
    locked.close()
    assert (len(store.entries()), store.problem) == (1, None)


def test_entries_that_cannot_be_understood_are_no_problem_once_they_are_cleared(store: Store) -> None:
    store.put(some()[0])
    with sqlite3.connect(store.path) as file:
        file.execute("UPDATE measured SET entry = '[]'")
    file.close()
    assert store.entries() == []
    assert "cannot be understood" in (store.problem or "")
    store.clear()
    assert store.problem is None


def test_what_a_read_only_file_has_is_used_while_nothing_can_be_written(store: Store, monkeypatch: Any) -> None:
    kept, new = some()[0], some()[1]
    store.put(kept)

    def full(self: Store, entries: Any) -> None:
        raise sqlite3.OperationalError("attempt to write a readonly database")

    monkeypatch.setattr(Store, "_write", full)
    after = Store(store.path)
    after.put(new)
    assert after.get(kept.key, kept.environment, kept.accuracy) == kept
    assert after.get(new.key, new.environment, new.accuracy) == new
    assert "cannot be used" in (after.problem or "")


@pytest.mark.comfy
def test_a_full_store_can_be_imported_where_it_was_exported() -> None:
    """In sizes as on a card: eight kernels, three of them refused with the longest reasons."""
    from attention_backends.backends.observe.autotune import entry as measured_entry

    environment = "cuda NVIDIA GeForce RTX 5090 sm120 | driver 580.95.05 | torch 2.10.0+cu130 | CUDA 13.0 | " \
        "cuDNN 91400 | comfy-kitchen 0.2.7 | flash-attn 2.8.3 | sageattention 2.2.0 | sageattn3 1.0.0 | " \
        "spas-sage-attn 0.1.0 | triton 3.6.0 | xformers 0.0.33 | attention-backends 0.1.0"  # fmt: skip
    ms = {name: 1.2345 for name in ("torch_sdpa", "sdpa_flash", "sdpa_cudnn", "sage_fp8_cuda", "flash_attn_2")}
    refused = {name: "failed: RuntimeError: " + "x" * 278 for name in ("sage_attn_3", "xformers", "flex_attn")}
    document = measured_entry.document(many(MOST, environment=environment, ms=ms, rejected=refused))
    import hook_side

    hook_side.comfyui()
    limit = hook_side.nodes_module("http.measured_routes").MOST_BYTES
    assert len(json.dumps(document, indent=1)) <= limit
    page = (Path(__file__).parents[2] / "web" / "measured_view.js").read_text(encoding="utf-8")
    assert f"const MOST_BYTES = {limit >> 20} << 20\n" in page


@pytest.mark.comfy
def test_the_device_of_comfyui_tells_which_choices_hold_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `--cpu` on a machine with a card that is the CPU."""
    import hook_side

    hook_side.comfyui()
    import comfy.model_management
    import folder_paths

    routes = hook_side.nodes_module("http.measured_routes")
    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path))
    monkeypatch.setattr(comfy.model_management, "get_torch_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(platform, "_machine", platform._machine.__wrapped__)  # it is asked once per process
    monkeypatch.setattr(platform, "_default_device_type", lambda: "mps")
    store = routes.users_store()
    assert environment_of(detect()) != HERE
    store.put(entry(key()))
    assert [one["here"] for one in routes.content(store)["entries"]] == [True]
