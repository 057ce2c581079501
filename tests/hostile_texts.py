"""Texts and files that were made to do harm, and what reads each of them; `hostile_process.py` runs them."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import random
import sqlite3
import struct
import zlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

Work = Callable[[Path], Callable[[], Any]]
"""Makes what is read, in a folder, and gives what reads it: only that is measured."""
CASES: dict[str, Work] = {}


def ours(name: str) -> Any:
    return importlib.import_module(f"attention_backends.{name}")


# What reads them


def text(make: Callable[[], str], **how: Any) -> Work:
    def work(folder: Path) -> Callable[[], Any]:
        made = make()
        return lambda: ours("backends.config.text").parse_config(made, "text", **{"read_files": False, **how})

    return work


def file(name: str, make: Callable[[], bytes]) -> Work:
    def work(folder: Path) -> Callable[[], Any]:
        (folder / name).write_bytes(make())
        return lambda: ours("backends.config.text").parse_config(folder / name, "file")

    return work


def variable(make: Callable[[Path], str], name: str = "ATTENTION_BACKENDS_CONFIG") -> Work:
    def work(folder: Path) -> Callable[[], Any]:
        made = make(folder)
        return lambda: ours("backends.config.text").from_environment({name: made})

    return work


def replayed(name: str, make: Callable[[], bytes]) -> Work:
    """As `replay picture.png`, once as a table and once as JSON."""

    def work(folder: Path) -> Callable[[], Any]:
        (folder / name).write_bytes(make())
        return lambda: replay(folder / name)

    return work


def replay(path: Path) -> Any:
    command, router = ours("comparison.replay_command"), ours("backends.engine.router").Router(platform())
    report = command.report_of(command.load(path), router)
    return len(command.as_text(report)), len(json.dumps(report))


def platform() -> Any:
    return ours("backends.values.platform").parse_platform("cpu")


def imported(make: Callable[[], bytes]) -> Work:
    """As `tune --import`."""

    def work(folder: Path) -> Callable[[], Any]:
        (folder / "choices.json").write_bytes(make())
        words = ["tune", "--store", str(folder / "store.sqlite3"), "--import", str(folder / "choices.json")]
        return lambda: command_line(words)

    return work


def plain(run: Callable[[Path], Any]) -> Work:
    """Where nothing is made before."""
    return lambda folder: lambda: run(folder)


def command_line(words: list[str]) -> Any:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        status = ours("cli").main(words)
    if status != 0:
        raise ValueError(said.getvalue())
    return status


def store(make: Callable[[Path], None]) -> Work:
    """A file of measured choices: read, and written after it was set aside."""

    def work(folder: Path) -> Callable[[], Any]:
        make(folder / "measured.sqlite3")
        return lambda: looked_at(folder / "measured.sqlite3")

    return work


def looked_at(path: Path) -> Any:
    kept = ours("backends.observe.autotune.store").Store(path)
    return kept.entries(), kept.summary()


def probes(make: Callable[[], bytes]) -> Work:
    def work(folder: Path) -> Callable[[], Any]:
        (folder / "probes.json").write_bytes(make())
        return lambda: ours("backends.measure.remembered")._outcomes(folder / "probes.json")

    return work


def settings(make: Callable[[], bytes]) -> Work:
    def work(folder: Path) -> Callable[[], Any]:
        (folder / "attention_backends.json").write_bytes(make())
        return lambda: ours("nodes.http.machine_settings").MachineSettings(folder, {}).stored

    return work


# What is made


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(*chunks: bytes) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IEND", b"")


def packed(data: bytes, key: bytes = b"attention_backends", kind: bytes = b"zTXt") -> bytes:
    return in_text(zlib.compress(data, 9), key, kind)


def in_text(data: bytes, key: bytes = b"attention_backends", kind: bytes = b"zTXt") -> bytes:
    return chunk(kind, key + (b"\0\0" if kind == b"zTXt" else b"\0\1\0\0\0") + data)


def zeros(size: int) -> bytes:
    return b"0" * size


@lru_cache(maxsize=1)
def bomb() -> bytes:
    """A hundred megabytes, compressed."""
    packer = zlib.compressobj(1)
    return b"".join([*(packer.compress(zeros(1 << 20)) for _ in range(100)), packer.flush()])


def call(**more: Any) -> dict[str, Any]:
    return {"batch": 1, "num_heads": 2, "q_len": 64, "kv_len": 64, "head_dim": 64, "dtype": "float16", **more}


def record(decisions: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    run = {"node_id": "1", "model": "WAN21", "model_calls": 3, "machine": {}, "decisions": decisions, **more}
    return {"attention_backends_record": 1, "made_by": {}, "runs": [run], "not_recorded": []}


def decision(blocks: Any = ("blocks.0-3",), calls: Any = None, ran: Any = None, **more: Any) -> dict[str, Any]:
    calls = [call()] if calls is None else calls
    ran = [{"from_model_call": 1, "backend": "torch_sdpa"}] if ran is None else ran
    return {"role": "self", "blocks": list(blocks), "calls": calls, "ran": ran, **more}


def products() -> dict[str, Any]:
    """Records that are short and stand for far more."""
    calls = [call(q_len=64 + number) for number in range(700)]
    parts = [
        {"from_model_call": 1 + number, "backend": ("torch_sdpa", "sdpa_math")[number % 2]} for number in range(1500)
    ]
    small = [call(q_len=64 + number) for number in range(10)]
    return {
        "blocks times calls": record([decision(["a.0-9999"], small * 10)]),
        "blocks times calls times decisions": record([decision(["a.0-999"], small[:4]) for _ in range(60)]),
        "calls times what ran them": record([decision(calls=calls, ran=parts)]),
        "runs": {**record([]), "runs": record([decision(["a.0-9999"], small)])["runs"] * 60},
        "the name of a model in every choice": record([decision(ran=parts)], model="m" * 900_000),
        "the name of a role in every block": record([decision(["a.0-9999"], role="r" * 900_000)]),
        "a wide table": record([decision([f"b{'x' * 90}{number}." for number in range(3000)], ran=parts[:1400])]),
        "as many as are allowed": record([decision(["a.0-9999"], small[:5])]),
    }


def as_json(data: Any) -> str:
    return json.dumps(data)


def safetensors(head: bytes) -> bytes:
    return struct.pack("<Q", len(head)) + head


def webp(entries: int, size: int) -> bytes:
    """EXIF whose entries all stand for the same bytes."""
    table = b"".join(struct.pack("<HHII", 0x10F, 2, size, 8 + 2 + 12 * entries) for _ in range(entries))
    tiff = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", entries) + table + b"a:" + b"x" * size
    return exif(tiff)


def exif(tiff: bytes) -> bytes:
    return b"RIFF\0\0\0\0WEBP" + b"EXIF" + struct.pack("<I", len(tiff)) + tiff


def bombs(levels: int, width: int) -> str:
    """YAML whose aliases stand for `width` to the power of `levels` entries."""
    lines = ["a0: &a0 [" + ",".join("x" * width) + "]"]
    for level in range(1, levels):
        lines.append(f"a{level}: &a{level} [" + ",".join([f"*a{level - 1}"] * width) + "]")
    return "\n".join(lines)


def merges(levels: int = 12, width: int = 3) -> str:
    """YAML whose merge keys stand for as many."""
    lines = ["a0: &a0 {x: fa}"]
    for level in range(1, levels):
        lines.append(f"a{level}: &a{level} {{<<: [{', '.join([f'*a{level - 1}'] * width)}]}}")
    return "\n".join(lines)


def database(sql: str, version: int = 1) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        with contextlib.closing(sqlite3.connect(path)) as made:
            made.executescript(f"{sql}; PRAGMA user_version = {version};")

    return make


MEASURED = (
    "CREATE TABLE measured (environment TEXT NOT NULL, accuracy TEXT NOT NULL, key TEXT NOT NULL, "
    "written REAL NOT NULL, entry TEXT NOT NULL, PRIMARY KEY (environment, accuracy, key))"
)
ROW = "INSERT INTO measured VALUES ('e', 'exact', 'k', 1.0, {})"
FILL = (
    "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {}) "
    "INSERT INTO measured SELECT 'e', 'exact', i, i, {} FROM n"
)


def large(path: Path) -> None:
    """A file that is longer than any store, without taking the disk."""
    database(MEASURED)(path)
    with path.open("r+b") as made:
        made.truncate(4 << 30)


def letters(count: int) -> str:
    return "".join(random.Random(7).choices("abcdefghijklmnopqrstuvwxyz_", k=count))


# Cases

TEXTS: dict[str, Callable[[], str]] = {
    "YAML: merge keys": merges,
    "YAML: many merge keys": lambda: merges(60, 9),
    "YAML: aliases": lambda: bombs(9, 10),
    "YAML: an alias that contains itself": lambda: "a: &a [*a]",
    "YAML: aliases as keys": lambda: "a: &a x\n" + "\n".join(f"? *a\n: {number}" for number in range(500)),
    "YAML: brackets": lambda: "a: " + "[" * 5000,
    "YAML: brackets as long as is allowed": lambda: "a: " + "[" * 32_000,
    "YAML: braces": lambda: "a: " + "{a: " * 5000,
    "YAML: dashes": lambda: "a:\n" + "- " * 15_000 + "x",
    "YAML: indented ever more": lambda: "\n".join(" " * depth + "a:" for depth in range(240)),
    "YAML: questions": lambda: "a:\n" + "? " * 15_000,
    "YAML: anchors": lambda: "a: " + "".join(f"&a{number} " for number in range(4000)) + "x",
    "YAML: an anchor on each": lambda: "\n".join(f"k{number}: &a{number} x" for number in range(2000)),
    "YAML: too long": lambda: "a: x\n" * 20_000,
    "YAML: commas": lambda: "a: [" + "," * 30_000,
    "YAML: short items": lambda: "a: [" + "x," * 15_000 + "]",
    "YAML: short lines": lambda: "a:\n" + "- \n" * 10_000,
    "YAML: one key again and again": lambda: "a: x\n" * 6000,
    "YAML: an open quote": lambda: 'a: "' + "\n" * 30_000,
    "YAML: escapes": lambda: 'a: "' + "\\u0041" * 5000 + '"',
    "YAML: folded text": lambda: "a: >\n" + "  x\n" * 8000,
    "YAML: a base 60 number": lambda: "default: 1" + ":59" * 10_000,
    "YAML: a long number": lambda: "default: " + "9" * 30_000,
    "YAML: an exponent": lambda: "default:\n  backend: sparge_attn\n  extra: {topk: 1e999999999}",
    "YAML: dates": lambda: "a: 2001-13-01\nb: 2001-12-14t21:59:43.10-05:00",
    "YAML: a tag of Python": lambda: "default: !!python/object/apply:os.system [echo]",
    "YAML: a tag of bytes": lambda: "default: !!binary " + "A" * 30_000,
    "YAML: a set and an ordered map": lambda: "a: !!set {x, y}\nb: !!omap [x: 1]",
    "YAML: documents": lambda: "---\na: x\n" * 3000,
    "YAML: directives": lambda: "%YAML 1.1\n%TAG ! tag:x,2000:\n" * 500 + "---\na: x",
    "YAML: NUL": lambda: "default: fa\0\nguard: off",
    "YAML: half of a character": lambda: "default: \ud800\nguard: off",
    "YAML: not a letter of ours": lambda: "d\u00e9faut: \u00e9\n\u202edefault: fa\n\ufeffa: b",
    "YAML: comments": lambda: "a: x\n" + "#\n" * 15_000,
    "JSON: one key again and again": lambda: "{" + ",".join(['"a": 1'] * 48_000) + "}",
    "JSON: one key in few": lambda: '{"per_role": {' + ",".join(['"a": "fa"'] * 9000) + "}}",
    "JSON: too long": lambda: '{"a": "' + "x" * 1_000_000 + '"}',
    "JSON: too long in bytes": lambda: '{"a": "' + "\u20ac" * 400_000 + '"}',
    "JSON: brackets": lambda: '{"a":' + "[" * 900_000,
    "JSON: braces": lambda: '{"a":' * 150_000,
    "JSON: empty lists": lambda: '{"a": [' + "[]," * 300_000 + "[]]}",
    "JSON: a long key": lambda: '{"' + "k" * 900_000 + '": 1}',
    "JSON: long roles": lambda: as_json({"per_role": {"r" * 400_000: {str(n): "fa" for n in range(9000)}}}),
    "JSON: many roles": lambda: as_json({"per_role": {f"r{number}": "fa" for number in range(9000)}}),
    "JSON: many roles, the last one wrong": lambda: json.dumps(
        {"per_role": {**{f"r{number}": "fa" for number in range(9000)}, "x": "sagee"}}, indent=1
    ),
    "JSON: few roles of many lines, one wrong": lambda: json.dumps(
        {"per_role": {**{f"r{number}": "fa" for number in range(1900)}, "x": "sagee '" * 50}}, indent=1
    ),
    "JSON: a long name of a backend": lambda: as_json({"default": letters(900_000)}),
    "JSON: long names of backends": lambda: as_json({"per_role": {str(n): letters(70) + str(n) for n in range(5000)}}),
    "JSON: unknown options": lambda: as_json(
        {"default": {"backend": "vmoba_attn", "extra": {f"moba_{number}": 1 for number in range(9000)}}}
    ),
    "JSON: unknown entries beside another system's": lambda: as_json(
        {"attention_backend": "fa", **{f"gard{number}": 1 for number in range(9000)}}
    ),
    "JSON: components": lambda: as_json(
        {"component_attention_backends": {f"transformr_{number}": "fa" for number in range(9000)}}
    ),
    "JSON: roles of components": lambda: as_json(
        {"component_attention_backends": {"vae": {f"r{number}": "fa" for number in range(9000)}}}
    ),
    "JSON: inside JSON": lambda: as_json({"args": as_json({"args": as_json({"infer": "[" * 300_000})})}),
    "JSON: a number": lambda: '{"default": ' + "9" * 900_000 + "}",
    "JSON: a large exponent": lambda: '{"default": {"backend": "sparge_attn", "extra": {"topk": 1e999}}}',
    "JSON: NaN": lambda: '{"default": NaN}',
    "JSON: half of a character": lambda: '{"per_role": {"\\ud800": "fa"}}',
    "JSON: NUL": lambda: '{"per_role": {"a\\u0000b": "sage\\u0000"}}',
    "JSON: escapes": lambda: '{"a": "' + "\\\\" * 400_000 + '"}',
    "JSON: an open quote": lambda: '{"a": "' + 'x\\"' * 300_000,
    "schedule: entries": lambda: as_json({"schedule": [{"backend": "fa", "steps": n} for n in range(3000)]}),
    "schedule: blocks": lambda: as_json({"schedule": {"backend": "fa", "blocks": "0-999999999"}}),
    "schedule: a large range": lambda: as_json({"schedule": {"backend": "fa", "steps": "0-999999"}}),
    "schedule: parts": lambda: as_json({"schedule": {"backend": "fa", "steps": ",".join(["0-9"] * 200_000)}}),
    "schedule: a name that is tried everywhere": lambda: as_json(
        {"schedule": {"backend": "fa", "blocks": "a" + "1" * 200_000 + "."}}
    ),
    "schedule: spaces": lambda: as_json({"schedule": {"backend": "fa", "percent": "0" + " " * 200_000 + "x"}}),
    "schedule: a list of lists": lambda: as_json({"schedule": {"backend": "fa", "steps": [["0"] * 90] * 90}}),
    "schedule: profiles times windows": lambda: as_json(
        {
            "diffusion_attention_schedule": {
                "profiles": {"a": {"per_role": {f"r{number}": "fa" for number in range(4000)}}},
                "default": [{"start": n, "end": n + 1, "profile": "a"} for n in range(1200)],
            }
        }
    ),
    "flags: a deep name": lambda: "per_role." + "a." * 16_000 + "b=fa",
    "flags: too long": lambda: "default=fa " * 20_000,
    "flags: variables inside one another": lambda: "ATTENTION_BACKENDS_CONFIG=" * 1200 + "fa",
    "flags: commas": lambda: "extra=" + "a," * 16_000,
    "flags: brackets": lambda: "-dac " + "[" * 32_000,
    "flags: backslashes behind an open quote": lambda: 'default="' + "\\" * 16_000,
    "flags: an open quote in brackets": lambda: "-dac {" + '"\\' * 15_000,
    "flags: comments": lambda: "default=fa\n" + "#\n" * 15_000 + "x",
    "flags: many": lambda: "vllm serve x " + " ".join(f"--x{number} y" for number in range(3000)),
    "flags: pairs": lambda: "\n".join(f"a{number}=b" for number in range(4000)),
    "flags: spaces before the equals sign": lambda: "a" + " " * 32_000,
    "flags: a program": lambda: "a." * 16_000,
    "flags: a large exponent": lambda: "default.backend=sparge_attn default.extra.topk=1e9999",
    "flags: JSON with one key twice": lambda: "-dac '{\"default\": \"fa\", \"default\": \"sage\"}'",
    "flags: components": lambda: "--component-attention-backends " + ",".join(f"vae_{n}=fa" for n in range(3000)),
    "a name": lambda: letters(32_000),
    "a name of a megabyte": lambda: letters(1_000_000),
    "more than a megabyte": lambda: "{" + " " * 1_000_001,
    "the name of a file": lambda: "x" * 9000 + ".json",
    "an assignment that ends like a file": lambda: "a=" + "x" * 9000 + ".json",
    "Python: brackets": lambda: "f(" * 1900,
    "Python: signs": lambda: "f()" + "-" * 3900 + "1",
    "Python: sums": lambda: "f()" + "+f()" * 900,
    "Python: names in quotes": lambda: "AttentionConfig(\n" + ",\n".join(f"'{letters(20)}{n}'" for n in range(1200)),
    "Python: braces": lambda: "f({" + "{1:" * 190,
    "quotes": lambda: "'" * 32_000,
    "white space": lambda: " \n" * 16_000,
}  # fmt: skip
CASES |= {name: text(make) for name, make in TEXTS.items()}
CASES |= {f"record: {name}": text(lambda name=name: as_json(products()[name])) for name in products()}  # type: ignore[misc]
CASES |= {
    f"replay: {name}": replayed("a.png", lambda name=name: png(packed(as_json(products()[name]).encode())))  # type: ignore[misc]
    for name in products()
}
CASES |= {
    "replay: zTXt of another name": replayed("a.png", lambda: png(in_text(bomb(), b"workflow"))),
    "replay: zTXt": replayed("a.png", lambda: png(in_text(bomb()))),
    "replay: zTXt of many texts": replayed("a.png", lambda: png(*[packed(zeros(5 << 20))] * 90)),
    "replay: iTXt": replayed("a.png", lambda: png(in_text(bomb(), kind=b"iTXt"))),
    "replay: iTXt of brackets": replayed("a.png", lambda: png(packed(b'{"a":' + b"[" * 900_000, kind=b"iTXt"))),
    "replay: a PNG of many parts": replayed("a.png", lambda: png(*[chunk(b"abCd", b"")] * 300_000)),
    "replay: a PNG of many texts": replayed("a.png", lambda: png(*[chunk(b"tEXt", b"a\0b")] * 90_000)),
    "replay: a PNG with a length that is not there": replayed("a.png", lambda: png()[:-12] + b"\xff" * 4 + b"tEXtab"),
    "replay: EXIF of one text again and again": replayed("a.webp", lambda: webp(60_000, 1_000_000)),
    "replay: EXIF in a circle": replayed("a.webp", lambda: exif(b"II*\0" + b"\xff" * 4 + b"\0" * 8)),
    "replay: a WebP of many parts": replayed("a.webp", lambda: b"RIFF\0\0\0\0WEBP" + b"ABCD\0\0\0\0" * 300_000),
    "replay: safetensors of brackets": replayed("a.latent", lambda: safetensors(b'{"a":' + b"[" * 3_000_000)),
    "replay: safetensors of lists": replayed("a.latent", lambda: safetensors(b'{"a":[' + b"[]," * 1_000_000 + b"0]}")),
    "replay: safetensors, too long": replayed("a.latent", lambda: safetensors(b" " * (9 << 20))),
    "replay: JSON, too long": replayed("a.json", lambda: b'{"attention_backends_record": 1, "a": "' + zeros(20 << 20)),
    "import: lists": imported(lambda: b'{"entries": [' + b"[]," * 900_000 + b"0]}"),
    "import: brackets": imported(lambda: b"[" * 4_000_000),
    "import: too long": imported(lambda: b" " * (20 << 20)),
    "import: a number": imported(lambda: b'{"format": ' + b"9" * 900_000 + b"}"),
    "import: half of a character": imported(lambda: entries({"environment": "\ud800"})),
    "import: large numbers": imported(lambda: entries({"q_len": 10**30, "written": 10**30})),
    "store: longer than any": store(large),
    "store: a long entry": store(database(f"{MEASURED}; {ROW.format('hex(zeroblob(9000000))')}")),
    "store: many entries": store(database(f"{MEASURED}; {FILL.format(60_000, chr(39) + '[]' + chr(39))}")),
    "store: brackets in an entry": store(database(f"{MEASURED}; {ROW.format(repr('[' * 200_000))}")),
    "probes: brackets": probes(lambda: b"[" * 900_000),
    "probes: too long": probes(lambda: b" " * (20 << 20)),
    "probes: a large number": probes(lambda: b'{"format": 1, "outcomes": {"a": {"status": "ok", "reason": "", "ms": 1'
                              + b"0" * 400 + b', "relative_l2": 1, "stderr": []}}}'),
    "settings: brackets": settings(lambda: b'{"hub":' + b"[" * 30_000),
    "settings: too long": settings(lambda: b" " * (20 << 20)),
    "file: too long": file("a.yaml", lambda: b"#" * (20 << 20)),
    "file: YAML, too long": file("a.yaml", lambda: b"a: x\n" * 20_000),
    "file: JSON, too long": file("a.json", lambda: b"{" + b" " * (20 << 20)),
    "variable: a folder": variable(lambda folder: str(made_folder(folder / "a.json"))),
    "variable: merge keys": variable(lambda folder: merges()),
    "variable: a long name": variable(lambda folder: letters(900_000), "DIFFUSION_ATTENTION_BACKEND"),
    "variable: a home that is not there": variable(lambda folder: "~nobody-of-that-name/a.json"),
}  # fmt: skip
PLAIN: dict[str, Callable[[Path], Any]] = {
    "options: a deep name": lambda folder: ours("backends.config.text").parse_extra("a" + ".a" * 16_000 + "=1"),
    "options: too long": lambda folder: ours("backends.config.text").parse_extra("a=1 " * 20_000),
    "explain: a number": lambda folder: command_line(
        ["explain", "--platform", "cpu", "--request", call_of("9" * 4000)]
    ),
    "explain: a long number": lambda folder: command_line(
        ["explain", "--platform", "cpu", "--request", call_of("9" * 90_000)]
    ),
    "explain: a long request": lambda folder: command_line(["explain", "--platform", "cpu", "--request", "x" * 90_000]),
    "privacy: an open quote": lambda folder: ours("backends.values.privacy").without_paths('"/' + "a" * 100_000 + "\n"),
    "privacy: separators": lambda folder: ours("backends.values.privacy").without_paths(
        "'" + "/a" * 50_000 + "C:\\" * 30_000
    ),
}
if hasattr(os, "mkfifo"):
    PLAIN |= {
        "variable: a pipe": lambda folder: from_variable(str(pipe(folder / "a.json"))),
        "replay: a pipe": lambda folder: replay(pipe(folder / "a.png")),
        "probes: a pipe": lambda folder: ours("backends.measure.remembered")._outcomes(pipe(folder / "probes.json")),
    }
if Path("/dev/zero").exists():
    PLAIN |= {
        "variable: a device": lambda folder: from_variable(str(zero(folder / "a.json"))),
        "replay: a device": lambda folder: replay(zero(folder / "a.png")),
        "probes: a device": lambda folder: ours("backends.measure.remembered")._outcomes(zero(folder / "probes.json")),
        "store: a device": lambda folder: looked_at(zero(folder / "measured.sqlite3")),
        "settings: a device": lambda folder: ours("nodes.http.machine_settings").MachineSettings(
            zero(folder / "attention_backends.json").parent, {}
        ),
    }
CASES |= {name: plain(run) for name, run in PLAIN.items()}


def from_variable(value: str) -> Any:
    return ours("backends.config.text").from_environment({"ATTENTION_BACKENDS_CONFIG": value})


def call_of(q_len: str) -> str:
    return f"num_heads=1,head_dim=64,q_len={q_len}"


def entries(change: dict[str, Any]) -> bytes:
    one = {
        "role": "self", "dtype": "float16", "batch": 1, "num_heads": 2, "num_kv_heads": 2, "q_len": 64, "kv_len": 64,
        "head_dim": 64, "v_head_dim": 64, "mask": "none", "is_causal": False, "exact_only": False, "environment": "e",
        "accuracy": "exact", "winner": "torch_sdpa", "incumbent": "torch_sdpa", "ms": {"torch_sdpa": 1.0},
        "rejected": {}, "put_off": {}, "written": 1.0, **change,
    }  # fmt: skip
    return json.dumps({"format": "attention_backends.measured", "version": 1, "entries": [one]}).encode()


def made_folder(path: Path) -> Path:
    path.mkdir()
    return path


def pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def zero(path: Path) -> Path:
    path.symlink_to("/dev/zero")
    return path
