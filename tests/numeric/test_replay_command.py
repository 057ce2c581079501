"""The command `replay`: a record out of a file, what of it can run here, and the configuration that repeats it."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from attention_backends import cli
from attention_backends.backends.config.text import parse_config
from attention_backends.backends.observe.replay.record import as_record
from attention_backends.comparison.metadata import PNG, texts_of
from syrupy.assertion import SnapshotAssertion
from test_record import made_up

RECORD = as_record(
    [
        {
            **made_up("flash_attn", member="flash_attn_3"),
            "changes": ["role cross blocks.1: flash_attn -> torch_sdpa from model call 3 on (failed)"],
            "steady": False,
        }
    ],
    {"comfyui": "0.33.0"},
)
TEXT = json.dumps(RECORD)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(*chunks: bytes) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
    return PNG + head + b"".join(chunks) + chunk(b"IDAT", zlib.compress(b"\0\0")) + chunk(b"IEND", b"")


def latent(head: object) -> bytes:
    data = json.dumps(head).encode()
    return struct.pack("<Q", len(data)) + data


KEY, VALUE = b"attention_backends", TEXT.encode()
FILES = {
    "text.png": png(chunk(b"tEXt", KEY + b"\0" + VALUE)),
    "packed.png": png(chunk(b"zTXt", KEY + b"\0\0" + zlib.compress(VALUE))),
    "unicode.png": png(chunk(b"iTXt", KEY + b"\0\0\0en\0name\0" + VALUE)),
    "unicode_packed.png": png(chunk(b"iTXt", KEY + b"\0\1\0\0\0" + zlib.compress(VALUE))),
    "animated.png": png(chunk(b"comf", KEY + b"\0" + VALUE)),
    "kept.latent": latent({"__metadata__": {"prompt": "{}", "attention_backends": TEXT}}),
    "record.json": b"\xef\xbb\xbf" + VALUE,
}


def replay(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = cli.main(["replay", *words])
    said = capsys.readouterr()
    return status, said.out, said.err


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_record(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / name).write_bytes(FILES[name])
    status, out, _ = replay(capsys, str(tmp_path / name), "--platform", "cpu", "--json")
    assert status == 0
    assert json.loads(out)["config"] == RECORD


def test_pillows_files_are_read(tmp_path: Path) -> None:
    """As ComfyUI writes them: PNG with Pillow's texts, WebP with one entry of EXIF for each."""
    image_module = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    from PIL.PngImagePlugin import PngInfo

    image = image_module.new("RGB", (8, 8))
    info = PngInfo()
    info.add_text("prompt", "{}")
    info.add_text("attention_backends", TEXT)
    image.save(tmp_path / "a.png", pnginfo=info)
    exif = image.getexif()
    exif[0x0110], exif[0x010F], exif[0x010E] = "prompt:{}", 'workflow:{"a": 1}', f"attention_backends:{TEXT}"
    image.save(tmp_path / "a.webp", exif=exif)
    assert texts_of(tmp_path / "a.png") == {"prompt": "{}", "attention_backends": TEXT}
    assert texts_of(tmp_path / "a.webp") == {"attention_backends": TEXT, "workflow": '{"a": 1}', "prompt": "{}"}


def test_the_table_says_what_ran_and_what_can_run_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], snapshot: SnapshotAssertion
) -> None:
    (tmp_path / "a.png").write_bytes(FILES["text.png"])
    machine = "cuda:9.0,name=H100,torch=2.13.0,packages=flash-attn-3==3.0.0;flash-attn==2.8.3"
    status, out, _ = replay(capsys, str(tmp_path / "a.png"), "--platform", machine)
    assert status == 0
    lines = out.splitlines()
    assert lines[0].endswith(", comfyui 0.33.0")
    assert lines[3:6] == snapshot
    last = [part for part in lines[-1].split("  ") if part]
    assert [part.strip() for part in last[:4]] == ["cross", "blocks.0-39", "model call 1", "flash_attn (flash_attn_3)"]
    assert last[4].strip().startswith("no: does not support a bool")

    _, out, _ = replay(capsys, str(tmp_path / "a.png"), "--platform", "cpu", "--json")
    (decision,) = json.loads(out)["runs"][0]["decisions"]
    assert decision["ran"][0]["cannot_run"] == snapshot


def test_the_output_is_a_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.png").write_bytes(FILES["text.png"])
    kept = tmp_path / "again.json"
    assert replay(capsys, str(tmp_path / "a.png"), "--platform", "cpu", "--output", str(kept))[0] == 0
    config = parse_config(str(kept), "file")
    assert config.record is not None
    assert config.record.data == RECORD
    assert replay(capsys, str(kept), "--platform", "cpu")[0] == 0
    status, _, err = replay(capsys, str(kept), "--platform", "cpu", "--output", str(tmp_path / "no" / "x.json"))
    assert (status, "cannot write" in err) == (2, True)


def test_explain_takes_a_record_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.json").write_text(TEXT, encoding="utf-8")
    assert cli.main(["explain", "--config", str(tmp_path / "a.json"), "--role", "cross", "--platform", "cpu"]) == 0
    assert "replay" in capsys.readouterr().out


WRONG: dict[str, tuple[bytes, str]] = {
    "empty.png": (b"", "empty.png: metadata are read from PNG, WebP"),
    "video.mp4": (b"\0\0\0\x18ftypmp42", "of others, such as videos, keep the record"),
    "short.png": (PNG + struct.pack(">I", 99) + b"tEXtabc", "short.png is damaged: its part tEXt ends after 3 of 99"),
    "bare.png": (png(chunk(b"tEXt", b"prompt\0{}")), "bare.png has no attention record (its metadata: prompt)"),
    "none.png": (png(), "(its metadata: none)"),
    "text.png": (png(chunk(b"tEXt", KEY + b"\0nonsense")), "text.png: not valid JSON at line 1"),
    "other.png": (png(chunk(b"tEXt", KEY + b'\0{"a": 1}')), "other.png: not a record of attention-backends"),
    "bad.png": (png(chunk(b"zTXt", KEY + b"\0\0junk")), "bad.png is damaged: "),
    "list.json": (b"[1]", "list.json: not a record"),
    "new.json": (b'{"attention_backends_record": 7}', "a record of format 7, and this version reads 1"),
    "bad.latent": (struct.pack("<Q", 1 << 40) + b"{}", "its head of 1099511627776 bytes is not there"),
    "deep.latent": (latent([1]), "its head is not one of safetensors"),
    "bad.webp": (b"RIFF\0\0\0\0WEBPEXIF\x04\0\0\0XXXX", "bad.webp is damaged: its EXIF has no byte order"),
    "cut.webp": (b"RIFF\0\0\0\0WEBPEXIF\x08\0\0\0II*\0\xff\0\0\0", "its EXIF ends at byte 8"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_bad_file_is_a_clear_error(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, said = WRONG[name]
    (tmp_path / name).write_bytes(data)
    status, _, err = replay(capsys, str(tmp_path / name), "--platform", "cpu")
    assert status == 2
    assert said in err


def test_a_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("gone.png", "gone.json"):
        status, _, err = replay(capsys, str(tmp_path / name))
        assert (status, "cannot read" in err, "No such file" in err) == (2, True, True)


def test_a_small_text_cannot_become_a_large_one(tmp_path: Path, snapshot: SnapshotAssertion) -> None:
    from attention_backends.comparison import metadata

    packed: Any = zlib.compress(bytes(metadata.MOST + 1))
    (tmp_path / "bomb.png").write_bytes(png(chunk(b"zTXt", b"a\0\0" + packed)))
    with pytest.raises(ValueError) as caught:
        texts_of(tmp_path / "bomb.png")
    assert str(caught.value) == snapshot
