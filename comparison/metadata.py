"""Texts that ComfyUI wrote into a file beside the picture: PNG, animated PNG, WebP, latents and safetensors.

Boundary: the standard library, and the limits of `backends`. Files come from anywhere: of a picture only the headers
of its parts and its texts are read, and every length is checked before it is read or unpacked.
"""

from __future__ import annotations

import os
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ..backends.values.plain_data import load_json
from .report import ComparisonError

MOST = 16 * 1024 * 1024
"""Bytes of all texts of a file together, unpacked; workflows have up to a few megabytes."""
MOST_PARTS = 100_000
"""Parts of a file; pictures of a gigabyte are written in parts of some ten kilobytes."""
MOST_HEAD = 4 * 1024 * 1024
MOST_TENSORS = 100_000
"""Bytes and entries of the head of a safetensors file."""
LONGEST_NAME = 79
"""Bytes of the name of a text in a PNG, by its specification."""
PNG = b"\x89PNG\r\n\x1a\n"
_ASCII = 2
"""The TIFF type of texts."""


def texts_of(path: Path, wanted: str | None = None) -> dict[str, str]:
    """Every text of a file by its name; where one is there twice, the last.

    wanted: the one text that is asked for; of the others only the names are given, with an empty text.

    Raises:
        ComparisonError: it cannot be read, is of another kind, is too large, or is damaged.
    """
    try:
        place = path.expanduser()
        if not stat.S_ISREG(os.stat(place).st_mode):  # before opening: opening a pipe waits for its other end
            raise ComparisonError(f"cannot read {path}: it is a folder, a device or a pipe, not a file")
        with place.open("rb") as file:
            return _texts(_Limited(file, wanted), path)
    except ComparisonError:
        raise
    except (OSError, RuntimeError) as error:
        raise ComparisonError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    except (ValueError, IndexError, OverflowError, zlib.error) as error:
        raise ComparisonError(f"{path.name} is damaged: {error}") from error


def _texts(file: _Limited, path: Path) -> dict[str, str]:
    begin = file.read(12)
    if begin.startswith(PNG):
        return dict(_png(file))
    if begin[:4] == b"RIFF" and begin[8:12] == b"WEBP":
        return dict(_webp(file))
    if path.suffix.lower() in (".latent", ".safetensors"):
        return _safetensors(file)
    raise ComparisonError(
        f"{path.name}: metadata are read from PNG, WebP, .latent and .safetensors files; of others, such as videos, "
        "keep the record that the node's output record gives, and name that .json file"
    )


class _Limited:
    """A file with a limit on the bytes of text that are read and unpacked."""

    def __init__(self, file: BinaryIO, wanted: str | None) -> None:
        self.file = file
        self.size = os.fstat(file.fileno()).st_size
        self._wanted = wanted
        self._left = MOST

    def read(self, size: int) -> bytes:
        return self.file.read(size)

    def spend(self, size: int) -> None:
        """Check a length before that much is read or unpacked.

        Raises:
            ValueError: with it the texts of this file are longer than all may be.
        """
        self._left -= size
        if self._left < 0:
            raise ValueError(f"a text of more than {MOST} bytes, or several that are so long together")

    def parts(self) -> Iterator[None]:
        """One turn for each part.

        Raises:
            ValueError: it has too many.
        """
        for _ in range(MOST_PARTS):
            yield
        raise ValueError(f"it has more than {MOST_PARTS} parts")

    def wants(self, name: str) -> bool:
        return self._wanted in (None, name)

    def inflated(self, data: bytes) -> bytes:
        unpacker = zlib.decompressobj()
        text = unpacker.decompress(data, self._left + 1)
        self.spend(len(text))
        return text


def _png(file: _Limited) -> Iterator[tuple[str, str]]:
    offset = len(PNG)
    for _ in file.parts():
        if offset + 8 > file.size:
            return
        file.file.seek(offset)
        head = file.read(8)
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        if offset + 8 + length > file.size:
            there = file.size - offset - 8
            raise ValueError(f"its part {kind.decode('latin-1')} ends after {there} of {length} bytes")
        offset += 12 + length
        if kind in (b"tEXt", b"comf", b"zTXt", b"iTXt"):  # the second is ComfyUI's own, in animated pictures
            begin = file.read(min(length, LONGEST_NAME + 1))
            name = begin.partition(b"\0")[0].decode("latin-1")
            if file.wants(name):
                file.spend(length)
                yield name, _text_of_png(kind, begin + file.read(length - len(begin)), file)
            else:
                yield name, ""
        elif kind == b"IEND":
            return


def _text_of_png(kind: bytes, body: bytes, file: _Limited) -> str:
    rest = body.partition(b"\0")[2]
    if kind == b"zTXt":
        return file.inflated(rest[1:]).decode("latin-1")
    if kind == b"iTXt":
        packed, (_, _, text) = rest[:1] == b"\1", _three(rest[2:])
        return (file.inflated(text) if packed else text).decode("utf-8")
    return rest.decode("latin-1")


def _three(rest: bytes) -> tuple[bytes, bytes, bytes]:
    language, _, rest = rest.partition(b"\0")
    translated, _, text = rest.partition(b"\0")
    return language, translated, text


def _webp(file: _Limited) -> Iterator[tuple[str, str]]:
    """ComfyUI writes each text as `name:text` into its own EXIF entry."""
    offset = 12
    for _ in file.parts():
        if offset + 8 > file.size:
            return
        file.file.seek(offset)
        head = file.read(8)
        length = int.from_bytes(head[4:], "little")
        if head[:4] == b"EXIF":
            length = min(length, file.size - offset - 8)
            file.spend(length)
            exif = file.read(length)
            for text in _exif(exif[6:] if exif.startswith(b"Exif\0\0") else exif, file):
                name, colon, rest = text.partition(":")
                if colon:
                    yield name, rest if file.wants(name) else ""
        offset += 8 + length + length % 2


def _exif(tiff: bytes, file: _Limited) -> Iterator[str]:
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
            text = tiff[start : min(start + size, len(tiff))]
            file.spend(len(text))  # several entries may point to the same bytes
            yield text.rstrip(b"\0").decode("utf-8")


def _safetensors(file: _Limited) -> dict[str, str]:
    file.file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if length > file.size - 8:
        raise ValueError(f"its head of {length} bytes is not there")
    if length > MOST_HEAD:
        raise ValueError(f"its head has {length} bytes > {MOST_HEAD}")
    text = file.read(length).decode("utf-8")
    head = load_json(text, "its head", most_bytes=MOST_HEAD, most_entries=MOST_TENSORS)
    found = head.get("__metadata__", {}) if isinstance(head, dict) else None
    if not isinstance(found, dict):
        raise ValueError("its head is not one of safetensors")
    return {name: text if isinstance(text, str) and file.wants(name) else "" for name, text in found.items()}
