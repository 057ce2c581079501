"""Valid data with one part after another in another kind: it is read, or refused with the documented error.

What is read is used too: by the report of a record, by a run's timetable, by the words about an entry.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from attention_backends.backends.config import AttentionConfig
from attention_backends.backends.config.names import UnknownBackendError
from attention_backends.backends.config.print import to_flags, to_json, to_yaml
from attention_backends.backends.config.text import parse_config
from attention_backends.backends.config.timetable import Timetable
from attention_backends.backends.engine.router import Router
from attention_backends.backends.measure import remembered
from attention_backends.backends.observe.autotune import entry as measured_entry
from attention_backends.backends.observe.autotune.database import TABLE
from attention_backends.backends.observe.autotune.store import FILE, Store
from attention_backends.backends.observe.replay.record import as_record
from attention_backends.backends.values.errors import ConfigError
from attention_backends.backends.values.platform import parse_platform
from attention_backends.backends.values.request import AttentionRequest
from attention_backends.comparison import replay_command
from hook_side import nodes_module
from measured_entries import entry, key
from test_record import made_up

CPU = parse_platform("cpu")
OTHERS: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        3,
        10**30,
        10**5000,
        1.5,
        -0.5,
        math.nan,
        math.inf,
        1e300,
        "",
        "x",
        "1",
        "a\0b",
        "\ud800",
    ),
    *([], [1], ["x"], [None], [[]], {}, {"a": 1}, {"": {}}, {1: 2}, "x" * 5000),
)
GONE = object()


def mutants(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Where something is put, and the whole with it there; then the whole without that entry."""
    inside = data
    for name in path:
        inside = inside[name]
    for other in OTHERS:
        if type(other) is not type(inside) or other != inside:
            yield path, with_other(data, path, other)
    if path:
        yield path, with_other(data, path, GONE)
    names = list(inside) if isinstance(inside, dict) else range(len(inside)) if isinstance(inside, list) else ()
    for name in names:
        yield from mutants(data, (*path, name))


def with_other(data: Any, path: tuple[Any, ...], other: Any) -> Any:
    if not path:
        return copy.deepcopy(other)
    whole = copy.deepcopy(data)
    place = whole
    for name in path[:-1]:
        place = place[name]
    if other is GONE:
        del place[path[-1]]
    else:
        place[path[-1]] = copy.deepcopy(other)
    return whole


def only(allowed: tuple[type[Exception], ...], work: Callable[[], Any], where: object) -> Any:
    """What the work gives; None where it is refused with an error that is allowed."""
    caught: Exception | None = None
    try:
        return work()
    except Exception as error:
        caught = error
    assert type(caught) in allowed, f"{where}: {type(caught).__name__}: {str(caught)[:300]}"
    assert len(str(caught)) < 4000, where
    return None


RECORD = as_record(
    [
        {
            **made_up("flash_attn", member="flash_attn_3", options={}, asked="sage_attn", reason="no"),
            "settings": {"accuracy": "exact", "strict": False, "guard": "off"},
            "changes": ["role cross: flash_attn -> torch_sdpa"], "not_repeated": ["role self: two kernels"],
            "steps": 3, "guard_alarms": 1, "first_alarm": "bad",
        }
    ],
    {"comfyui": "0.33.0"},
    [{"node_id": "7", "class_type": "KSampler", "reason": "none"}],
)  # fmt: skip
CALL = AttentionRequest(1, 8, 64, 64, 64, "float16")


def test_a_record() -> None:
    router = Router(CPU)
    read = 0
    for path, data in mutants(RECORD):
        if not isinstance(data, dict) or "attention_backends_record" not in data:
            continue
        config = only((ConfigError,), lambda data=data: parse_config(data, "text"), path)  # type: ignore[misc]
        if config is not None:
            only((), lambda config=config: use(config, router), path)  # type: ignore[misc]
            read += 1
    assert read > 20, "no mutant was read, so nothing was used"


def use(config: AttentionConfig, router: Router) -> None:
    """What becomes of a record in a run, and in the command `replay`."""
    record = config.record
    if record is None:
        return
    hash(config)
    to_json(config)
    record.remarks("6", CPU)
    record.after("6", 3)
    for run in record.runs:
        run.choice("cross", "blocks.0", CALL, 2)
        assert run.part(1) >= 0
    report = replay_command.report_of(record, router)
    assert replay_command.as_text(report)
    json.dumps(report)


CONFIG: dict[str, Any] = {
    "default": {"backend": "flash_attn_2", "extra": {}},
    "per_role": {"cross": "torch_sdpa", "ltx2": {"audio_self": {"backend": "sdpa_math"}}},
    "schedule": [{"backend": "sdpa_math", "extra": {}, "steps": "0-3,last 2", "blocks": ["0-1", 7], "role": "self",
                  "masked": True}, {"backend": "fa", "percent": "0-0.2"}, {"backend": "fa", "sigmas": "1-0.85"}],
    "accuracy": "quantized", "strict": True, "guard": "watch", "joint_is_self": False,
}  # fmt: skip
OTHER_SYSTEMS: dict[str, dict[str, Any]] = {
    "vLLM-Omni": {
        "diffusion_attention_config": {"default": {"backend": "TORCH_SDPA", "quant": {"q_block_size": 1}}},
        "diffusion_attention_schedule": {
            "profiles": {"a": {"per_role": {"self": "FLASH_ATTN"}}},
            "default": [{"start": 0, "end": 2, "profile": "a"}],
        },
    },
    "sigmas": {
        "diffusion_attention_schedule": {
            "profiles": {"a": {"default": "FLASH_ATTN"}}, "sigma": [{"low": 0.1, "high": 0.5, "profile": "a"}],
        },
    },
    "SGLang": {
        "attention_backend": "fa", "attention_backend_config": {"topk": 0.5},
        "component_attention_backends": {"transformer": {"self": "fa"}, "vae": "sdpa", "transformer_2.cross": "sage"},
    },
    "Smart-Diffusion": {"args": {"infer": {"attn_type": "sage", "attn_config": {"topk": 0.5}}}},
    "options": {"default": {"backend": "sparge_attn", "extra": {"topk": 0.5}}},
    "options in options": {"default": {"backend": "vmoba_attn", "extra": {"moba_config": {"st_topk": 1}}}},
}  # fmt: skip


@pytest.mark.parametrize("name", ["ours", *OTHER_SYSTEMS])
def test_a_configuration(name: str) -> None:
    for path, data in mutants(CONFIG if name == "ours" else OTHER_SYSTEMS[name]):
        work = lambda data=data: parse_config(data, "text")  # noqa: E731
        config = only((ConfigError, UnknownBackendError, refused()), work, path)
        if isinstance(config, AttentionConfig):
            only((), lambda config=config: run_with(config), path)  # type: ignore[misc]
            only((), lambda config=config: parse_config(to_yaml(config)), path)  # type: ignore[misc]


def refused() -> type[Exception]:
    from attention_backends.backends.config.names import RefusedBackendError

    return RefusedBackendError


def run_with(config: AttentionConfig) -> None:
    hash(config)
    timetable = Timetable((config,), (1.0, 0.5, 0.0), lambda percent: 1 - percent, ("blocks.0", "blocks.1"))
    for sigma in (1.0, 0.5, None):
        timetable.resolve(timetable.at(sigma), "self", "self", "blocks.0", masked=True)
    timetable.unused(["self"])
    to_flags(config)


ENTRY = {**entry(key()).as_dict(), "rejected": {"xformers": "no"}, "put_off": {"flex_attn": 2}}


def test_a_document_of_measured_choices() -> None:
    for path, data in mutants(measured_entry.document([entry(key())])):
        found = only((ValueError,), lambda data=data: measured_entry.read_document(data, 1000), path)  # type: ignore[misc]
        for one in found or ():
            assert json.dumps(one.as_dict())
            assert one.summary()


def test_the_rows_of_a_store(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever stands in a row, the others are read."""
    store = Store(tmp_path / FILE)
    store.put(entry(key()))
    entries = [json.dumps(data, allow_nan=True) for _, data in mutants(ENTRY) if _written(data)]
    values = [None, 1, 1.5, b"\xff", b"[]", "", "x", "[" * 10_000, "\0", *entries]
    with contextlib.closing(sqlite3.connect(store.path)) as file:
        for number, value in enumerate(values):
            row = (f"e{number}", "exact", value if number < 5 else "k", 2.0 if number % 2 else "x", value)
            with contextlib.suppress(sqlite3.IntegrityError):
                file.execute("INSERT INTO measured VALUES (?, ?, ?, ?, ?)", row)
        file.execute("INSERT INTO measured VALUES ('u', 'exact', 'k', 1.0, CAST(x'ff22fe' AS TEXT))")
        file.commit()
    found = Store(store.path).entries()
    assert entry(key()).environment in {one["environment"] for one in found}
    assert Store(store.path).get(entry(key()).key, entry(key()).environment, "exact") is not None


def _written(data: Any) -> bool:
    try:
        json.dumps(data).encode()
        return True
    except (ValueError, TypeError):
        return False


OTHER_TABLES = {
    "another column": "CREATE TABLE measured (environment TEXT, accuracy TEXT, key TEXT, written REAL, text TEXT)",
    "a column less": "CREATE TABLE measured (environment TEXT, accuracy TEXT, key TEXT, entry TEXT)",
    "a column more": TABLE.replace("entry TEXT NOT NULL", "entry TEXT NOT NULL, more TEXT NOT NULL"),
    "another order": TABLE.replace("environment TEXT NOT NULL, accuracy TEXT NOT NULL",
                                   "accuracy TEXT NOT NULL, environment TEXT NOT NULL"),
    "no key": TABLE.replace(", PRIMARY KEY (environment, accuracy, key)", ""),
    "no number of rows": f"{TABLE} WITHOUT ROWID",
    "a check": TABLE.replace("entry TEXT NOT NULL", "entry TEXT NOT NULL CHECK (length(entry) < 5)"),
    "a view": "CREATE VIEW measured AS SELECT 1 AS environment",
    "a trigger": f"{TABLE}; CREATE TRIGGER t BEFORE INSERT ON measured BEGIN SELECT RAISE(ABORT, 'no'); END",
    "another program's": "CREATE TABLE bookmarks (url TEXT)",
    "a table beside it": f"{TABLE}; CREATE TABLE bookmarks (url TEXT)",
    "nothing": "SELECT 1",
}  # fmt: skip


@pytest.mark.parametrize("table", OTHER_TABLES)
def test_a_store_with_another_table_is_set_aside(table: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / FILE
    with contextlib.closing(sqlite3.connect(path)) as file:
        file.executescript(f"{OTHER_TABLES[table]}; PRAGMA user_version = 1;")
    before = path.read_bytes()
    store = Store(path)
    assert store.entries() == []
    store.put(entry(key()))
    assert len(Store(path).entries()) == 1
    assert path.with_name(f"{FILE}.damaged").read_bytes() == before
    assert f"it is {FILE}.damaged now" in caplog.text


def test_a_store_that_was_looked_over_by_sqlite_is_still_ours(tmp_path: Path) -> None:
    store = Store(tmp_path / FILE)
    store.put(entry(key()))
    with contextlib.closing(sqlite3.connect(store.path)) as file:
        file.executescript("ANALYZE; CREATE INDEX by_time ON measured (written); VACUUM;")
    assert len(Store(store.path).entries()) == 1


PROBES = {
    "format": 1,
    "outcomes": {"flash_attn_2 | cpu": {"status": "ok", "reason": "", "relative_l2": 1e-3, "ms": 2.0, "stderr": ["a"]}},
}


def test_remembered_probes(tmp_path: Path) -> None:
    for number, (path, data) in enumerate(mutants(PROBES)):
        if not _written(data):
            continue
        file = tmp_path / f"{number}.json"
        file.write_text(json.dumps(data), encoding="utf-8")
        found = only((), lambda file=file: remembered._outcomes(file), path)  # type: ignore[misc]
        assert file.exists() or (found == {} and file.with_name(f"{file.name}.damaged").exists())
        for outcome in found.values():
            assert outcome.summary


def test_settings_of_the_machine(tmp_path: Path) -> None:
    settings = nodes_module("http.machine_settings")
    file = tmp_path / settings.FILE
    for path, data in mutants({"hub": False, "log_level": "DEBUG", "trace": "full"}):
        only((ValueError,), lambda data=data: settings.checked(data), path)  # type: ignore[misc]
        if _written(data):
            file.write_text(json.dumps(data), encoding="utf-8")
            made = only((), lambda: settings.MachineSettings(tmp_path, {}), path)
            assert set(made.stored) == set(settings.UNSET)


REPORT: dict[str, Any] = {
    "run": {
        "model": "WAN21", "steps": 2, "seconds": 1.5,
        "rows": [{"role": "self", "member": None, "backend": "torch_sdpa", "asked": None, "reason": "no", "calls": 4}],
    },
    "not_counted": [{"node_id": "7", "class_type": "KSampler", "reason": "none"}],
    "settings": {"KSampler.seed": 1, "KSampler.cfg": 1.0, "CLIPTextEncode.text": ["a", "b"], "latent": [[1, 2]]},
    "versions": {"comfyui": "0.33.0", "torch": "2.13.0", "device": "cpu"},
}  # fmt: skip


@pytest.mark.comfy
def test_the_reports_of_branches(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from attention_backends.comparison.report import ComparisonError
    from hook_side import plain_comfyui

    plain_comfyui(monkeypatch)
    comparison = nodes_module("compare.comparison")
    images = {"image_1": torch.zeros(1, 8, 8, 3), "image_2": torch.ones(1, 8, 8, 3)}
    monkeypatch.setattr(comparison.picture, "draw", lambda report, pictures: report.subject())  # seconds each
    monkeypatch.setattr(comparison.picture, "to_tensor", lambda drawn: torch.zeros(1, 8, 8, 3))
    monkeypatch.setattr(comparison.metrics, "score", lambda *_: None)
    for path, data in mutants(REPORT):
        if _written(data):
            text = json.dumps(data)
            given = {**images, "report_1": text, "report_2": text}
            work = lambda given=given: comparison.AttentionComparison.execute(**given)  # noqa: E731
            only((ComparisonError,), work, path)
