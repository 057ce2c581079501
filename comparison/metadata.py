"""Texts that ComfyUI wrote into a file beside the picture: PNG, animated PNG, WebP, latents and safetensors.

Boundary: the standard library only. Files come from anywhere, so every length is checked and limited.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from pathlib import Path

from .report import ComparisonError

MOST = 64 * 1024 * 1024
"""Bytes of one text; workflows have up to a few megabytes."""
PNG = b"\x89PNG\r\n\x1a\n"
_ASCII = 2
"""The TIFF type of texts."""


def texts_of(path: Path) -> dict[str, str]:
    """Every text of a file by its name; where one is there twice, the last.

    Raises:
        ComparisonError: it cannot be read, is of another kind, or is damaged.
    """
    try:
        data = path.expanduser().read_bytes()
    except OSError as error:
        raise ComparisonError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        if data.startswith(PNG):
            return dict(_png(data))
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return dict(_webp(data))
        if path.suffix.lower() in (".latent", ".safetensors"):
            return _safetensors(data)
    except (ValueError, IndexError, RecursionError, zlib.error) as error:
        raise ComparisonError(f"{path.name} is damaged: {error}") from error
    raise ComparisonError(
        f"{path.name}: metadata are read from PNG, WebP, .latent and .safetensors files; of others, such as videos, "
        "keep the record that the node's output record gives, and name that .json file"
    )


def _png(data: bytes) -> Iterator[tuple[str, str]]:
    place = len(PNG)
    while place + 8 <= len(data):
        length, kind = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        body = data[place + 8 : place + 8 + length]
        if len(body) != length:
            raise ValueError(f"its part {kind.decode('latin-1')} ends after {len(body)} of {length} bytes")
        place += 12 + length
        name, _, rest = body.partition(b"\0")
        if kind in (b"tEXt", b"comf"):  # the second is ComfyUI's own, in animated pictures
            yield name.decode("latin-1"), rest.decode("latin-1")
        elif kind == b"zTXt":
            yield name.decode("latin-1"), _inflated(rest[1:]).decode("latin-1")
        elif kind == b"iTXt":
            packed, (_, _, text) = rest[:1] == b"\1", _three(rest[2:])
            yield name.decode("latin-1"), (_inflated(text) if packed else text).decode("utf-8")
        elif kind == b"IEND":
            return


def _three(rest: bytes) -> tuple[bytes, bytes, bytes]:
    language, _, rest = rest.partition(b"\0")
    translated, _, text = rest.partition(b"\0")
    return language, translated, text


def _inflated(data: bytes) -> bytes:
    unpacker = zlib.decompressobj()
    text = unpacker.decompress(data, MOST)
    if unpacker.unconsumed_tail:
        raise ValueError(f"a text of more than {MOST} bytes")
    return text


def _webp(data: bytes) -> Iterator[tuple[str, str]]:
    """ComfyUI writes each text as `name:text` into an entry of EXIF of its own."""
    place = 12
    while place + 8 <= len(data):
        length = int.from_bytes(data[place + 4 : place + 8], "little")
        if data[place : place + 4] == b"EXIF":
            exif = data[place + 8 : place + 8 + length]
            for text in _exif(exif[6:] if exif.startswith(b"Exif\0\0") else exif):
                name, colon, rest = text.partition(":")
                if colon:
                    yield name, rest
        place += 8 + length + length % 2


def _exif(tiff: bytes) -> Iterator[str]:
    order = {b"II": "little", b"MM": "big"}.get(tiff[:2])
    if order is None:
        raise ValueError("its EXIF has no byte order")

    def number(at: int, size: int) -> int:
        if at + size > len(tiff):
            raise ValueError(f"its EXIF ends at byte {len(tiff)}, before {at + size}")
        return int.from_bytes(tiff[at : at + size], "little" if order == "little" else "big")

    first = number(4, 4)
    for index in range(number(first, 2)):
        entry = first + 2 + 12 * index
        if number(entry + 2, 2) == _ASCII:
            size = number(entry + 4, 4)
            start = entry + 8 if size <= 4 else number(entry + 8, 4)
            yield tiff[start : start + size].rstrip(b"\0").decode("utf-8")


def _safetensors(data: bytes) -> dict[str, str]:
    length = int.from_bytes(data[:8], "little")
    if length > min(MOST, len(data) - 8):
        raise ValueError(f"its head of {length} bytes is not there")
    head = json.loads(data[8 : 8 + length])
    found = head.get("__metadata__", {}) if isinstance(head, dict) else None
    if not isinstance(found, dict):
        raise ValueError("its head is not one of safetensors")
    return {str(name): str(text) for name, text in found.items()}
