"""Releases on a package index, and the files in them: of a wheel only the requested ones are fetched.

A wheel is a zip file, whose list of files stands at its end: HTTP range requests read that list and then single files.
A release without a wheel is fetched whole. Nothing is installed or run.
"""

from __future__ import annotations

import html
import io
import json
import os
import re
import ssl
import subprocess
import sys
import tarfile
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

from packaging.specifiers import SpecifierSet
from packaging.utils import InvalidSdistFilename, InvalidWheelFilename, parse_sdist_filename, parse_wheel_filename
from packaging.version import InvalidVersion, Version

DEFAULT_INDEX = "https://pypi.org/simple"
BLOCK = 64 * 1024
"""Bytes that one range request asks for at least."""
JSON = "application/vnd.pypi.simple.v1+json"


class Tree(Protocol):
    """The files of a release."""

    @property
    def files(self) -> tuple[str, ...]: ...

    def read(self, path: str) -> str: ...


class Memory(NamedTuple):
    """Files that are in memory already."""

    content: dict[str, str]

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(self.content)

    def read(self, path: str) -> str:
        return self.content[path]


class Zipped:
    """A wheel, read in place."""

    def __init__(self, stream: io.RawIOBase | io.BytesIO) -> None:
        self._zip = zipfile.ZipFile(stream)
        self.files = tuple(self._zip.namelist())

    def read(self, path: str) -> str:
        return self._zip.read(path).decode("utf-8", "replace")


class Folder:
    """A source tree on this machine."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files = tuple(
            sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.suffix in (".py", ".pyi"))
        )

    def read(self, path: str) -> str:
        return (self.root / path).read_text(encoding="utf-8", errors="replace")


def unpacked(archive: bytes) -> Memory:
    """The Python files of a source distribution, without the folder that it puts around them."""
    content = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            path = member.name.partition("/")[2]
            if member.isfile() and path.endswith((".py", ".pyi")) and (file := tar.extractfile(member)):
                content[path] = file.read().decode("utf-8", "replace")
    return Memory(content)


class TooMuchError(Exception):
    """The limit of bytes is reached."""


class Web:
    """Fetches, and counts the bytes."""

    def __init__(self, most: int) -> None:
        self.most, self.received = most, 0
        self._trust = ssl.create_default_context(cafile=os.environ.get("PIP_CERT"))

    def get(self, url: str, **headers: str) -> tuple[bytes, dict[str, str]]:
        """The body and the headers, names in lower case.

        Raises:
            TooMuchError: the limit is reached.
            OSError: what the network says.
        """
        if self.received >= self.most:
            raise TooMuchError(f"{self.received} bytes were read, the limit is {self.most}")
        request = urllib.request.Request(url, headers={name.replace("_", "-"): text for name, text in headers.items()})
        with urllib.request.urlopen(request, timeout=120, context=self._trust) as answer:
            if "Range" in headers and answer.status != 206:
                raise OSError(f"{urllib.parse.urlsplit(url).path.rpartition('/')[2]}: the index has no range requests")
            body: bytes = answer.read()
            found = {name.lower(): text for name, text in answer.headers.items()}
        self.received += len(body)
        return body, found


class Ranged(io.RawIOBase):
    """A file on the web as a seekable stream, fetched in blocks."""

    def __init__(self, web: Web, url: str) -> None:
        self._web, self._url = web, url
        self._start, self._block = 0, b""
        tail, headers = web.get(url, Range=f"bytes=-{BLOCK}")
        self._size = int(headers["content-range"].rpartition("/")[2])
        self._at = 0
        self._start, self._block = self._size - len(tail), tail

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        end = self._size if size is None or size < 0 else min(self._size, self._at + size)
        if end <= self._at:
            return b""
        if not (self._start <= self._at and end <= self._start + len(self._block)):
            last = min(self._size, max(end, self._at + BLOCK)) - 1
            self._start, (self._block, _) = self._at, self._web.get(self._url, Range=f"bytes={self._at}-{last}")
        found = self._block[self._at - self._start : end - self._start]
        self._at = end
        return found


class Release(NamedTuple):
    """One version of a package, and how to get its files."""

    package: str
    version: Version
    open: Callable[[], Tree]
    in_place: bool
    """Whether single files of it can be read."""


def index_url() -> str:
    """The index that pip is set to: its variable, else its configuration, else the public one."""
    if named := os.environ.get("PIP_INDEX_URL"):
        return named.rstrip("/")
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    found = re.findall(r"^(?:global|install)\.index-url='(.*)'$", listed, re.MULTILINE)
    return found[-1].rstrip("/") if found else DEFAULT_INDEX


def releases(web: Web, index: str, package: str) -> list[Release]:
    """All releases of a package that were not withdrawn, the oldest first."""
    page = f"{index}/{package}/"
    body, headers = web.get(page, Accept=f"{JSON}, text/html;q=0.1")
    if "json" in headers.get("content-type", ""):
        listed = [(one["filename"], one["url"]) for one in json.loads(body)["files"] if not one.get("yanked")]
    else:
        links = re.findall(r'<a ([^>]*)href="([^"#]+)[^>]*>\s*([^<]+?)\s*</a>', body.decode())
        listed = [(name, html.unescape(url)) for before, url, name in links if "data-yanked" not in before]
    chosen: dict[Version, tuple[int, str]] = {}
    for name, url in listed:
        version, worth = _read_name(name)
        if version is not None and worth > chosen.get(version, (0, ""))[0]:
            chosen[version] = (worth, urllib.parse.urljoin(page, url))
    found = []
    for version, (worth, url) in sorted(chosen.items()):
        wheel = worth > 1
        get = _wheel(web, url) if wheel else _sdist(web, url)
        found.append(Release(package, version, get, wheel))
    return found


def _wheel(web: Web, url: str) -> Callable[[], Tree]:
    return lambda: Zipped(Ranged(web, url))


def _sdist(web: Web, url: str) -> Callable[[], Tree]:
    return lambda: unpacked(web.get(url)[0])


def _read_name(name: str) -> tuple[Version | None, int]:
    """The version in a file's name, and the file's preference: wheels for Linux first, sources last."""
    try:
        if name.endswith(".whl"):
            version, tags = parse_wheel_filename(name)[1], parse_wheel_filename(name)[3]
            systems = {tag.platform for tag in tags}
            return version, 4 if "any" in systems else 3 if any("x86_64" in one for one in systems) else 2
        if name.endswith(".tar.gz"):
            return parse_sdist_filename(name)[1], 1
    except (InvalidWheelFilename, InvalidSdistFilename, InvalidVersion):
        pass
    return None, 0


def accepted(found: list[Release], specifier: str) -> list[Release]:
    """Those that a requirement takes: final ones, or all where no final one is there."""
    wanted = SpecifierSet(specifier)
    final = [one for one in found if wanted.contains(one.version, prereleases=False)]
    return final or [one for one in found if wanted.contains(one.version, prereleases=True)]


def source_trees(folder: Path) -> list[Release]:
    """The trees that a person keeps for packages that no index has: folders called PACKAGE@VERSION."""
    found = []
    for path in sorted(folder.iterdir()):
        package, at, version = path.name.partition("@")
        if at and path.is_dir():
            found.append(Release(package, Version(version), lambda path=path: Folder(path), True))  # type: ignore[misc]
    return found
