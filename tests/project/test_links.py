"""Addresses on the internet: well-formed here, opened one by one by `pytest -m links`. Links inside: test_docs.py."""

from __future__ import annotations

import re
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from attention_backends.backends.kernels import BACKENDS
from attention_backends.backends.kernels.support import flash, sage
from syrupy.assertion import SnapshotAssertion

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("backends", "benchmarks", "comparison", "demo", "devtools", "docs", "locales", "nodes", "web", "workflows")
SUFFIXES = {".md", ".py", ".js", ".json", ".toml", ".css"}
LOCAL = ("127.0.0.1", "localhost")
GONE = (404, 410)
SECONDS = 20


def sources() -> Iterator[Path]:
    yield from sorted(path for path in ROOT.iterdir() if path.suffix in SUFFIXES)
    for folder in FOLDERS:
        yield from sorted(path for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES)


def addresses_in(text: str) -> list[str]:
    """The addresses of a page or a program, without what a sentence, a link or a string puts behind them."""
    found = []
    for address in re.findall(r"https?://[^\s<>\"'`|\\]+", text):
        while address[-1] in ".,;:!?*" or (address[-1] in ")]}" and address.count(address[-1]) > opened(address)):
            address = address[:-1]
        found.append(address)
    return found


def opened(address: str) -> int:
    return address.count({")": "(", "]": "[", "}": "{"}[address[-1]])


def collected() -> dict[str, list[str]]:
    """Each address outside of this machine, with the files that show it."""
    shown: dict[str, list[str]] = {}
    for path in sources():
        for address in addresses_in(path.read_text(encoding="utf-8")):
            if not re.match(rf"http://(?:{'|'.join(map(re.escape, LOCAL))})\b", address):
                shown.setdefault(address, []).append(path.relative_to(ROOT).as_posix())
    for page in package_pages():  # some are put together when they are needed
        shown.setdefault(page, []).append("a package of a backend")
    return shown


def package_pages() -> set[str]:
    """Where `doctor` and the panel send people for a package that is missing."""
    return {package.page for backend in BACKENDS.values() for package in backend.packages}


@pytest.mark.parametrize(
    ("text", "addresses"),
    [
        ("see https://a.example/b, or https://c.example/d.", ["https://a.example/b", "https://c.example/d"]),
        ("[#388](https://a.example/issues/388)); refused", ["https://a.example/issues/388"]),
        ('PAGE = "https://a.example/x(y)"', ["https://a.example/x(y)"]),
        ('{"note": "https://a.example/b\\nnext line"}', ["https://a.example/b"]),
        ("| https://a.example | *https://b.example* |", ["https://a.example", "https://b.example"]),
        ("https://docs.example/2.10/varlen.html; the scale", ["https://docs.example/2.10/varlen.html"]),
    ],
)
def test_an_address_ends_where_it_ends(text: str, addresses: list[str]) -> None:
    assert addresses_in(text) == addresses


def test_what_people_are_shown_is_collected() -> None:
    shown = collected()
    assert len(package_pages()) >= 8
    assert set(shown) >= {*package_pages(), sage.SOURCES, flash.PAGE}
    for page in (ROOT / "CHANGELOG.md", ROOT / "demo" / "README.md", ROOT / "docs" / "limitations.md"):
        linked = re.findall(r"\]\((https:[^)]+)\)", re.sub(r"\n", "", page.read_text(encoding="utf-8")))
        assert linked, page
        for address in linked:
            assert page.relative_to(ROOT).as_posix() in shown[address], address


def test_every_address_is_well_formed() -> None:
    for address, pages in collected().items():
        where = f"{', '.join(pages)}: {address}"
        parts = urlsplit(address)
        assert parts.scheme == "https", where
        assert re.fullmatch(r"(?:[a-z0-9-]+\.)+[a-z]{2,}", parts.netloc), where
        assert re.fullmatch(r"[\w./~%#?=&+:@(),-]*", address.partition("://")[2], re.ASCII), where
        if parts.netloc == "github.com":
            known = r"/[\w-]+/[\w.-]+(?:/(?:issues|pull)/\d+|/releases|/(?:tree|blob)/.+)?"
            assert re.fullmatch(known, parts.path), where
            assert not parts.path.endswith(".git"), where


# Opened


def verdict(address: str) -> str:
    """`ok`, why the address is wrong (`404`, `no such host`), or `?` and why nothing can be said of it."""
    request = urllib.request.Request(address, headers={"User-Agent": "Mozilla/5.0 (a check of links)"})
    try:
        with urllib.request.urlopen(request, timeout=SECONDS):
            return "ok"
    except urllib.error.HTTPError as error:
        return str(error.code) if error.code in GONE else f"ok: the host answers {error.code}"
    except urllib.error.URLError as error:
        unknown = isinstance(error.reason, socket.gaierror) and error.reason.errno != socket.EAI_AGAIN
        return "no such host" if unknown else f"? {error.reason}"
    except OSError as error:
        return f"? {error}"


def broken(shown: dict[str, list[str]]) -> list[str]:
    """Page and address of each that leads nowhere; skips where no address at all answers."""
    with ThreadPoolExecutor(8) as pool:
        said = dict(zip(shown, pool.map(verdict, shown), strict=True))
    if not any(one.startswith("ok") or one in map(str, GONE) for one in said.values()):
        example = next(iter(said.items()), ("none", "nothing to open"))
        pytest.skip(f"no network: none of {len(said)} addresses answered ({example[0]}: {example[1]})")
    wrong = {address: one for address, one in said.items() if not one.startswith(("ok", "?"))}
    return [f"{', '.join(shown[address])}: {address}: {one}" for address, one in wrong.items()]


@pytest.mark.links
def test_every_address_leads_somewhere() -> None:
    found = broken(collected())
    assert not found, "\n".join(found)


class Answers(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(int(self.path.strip("/")))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def no_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a name server answers for a name that does not exist; nothing is asked for it."""
    ask = socket.getaddrinfo

    def answer(name: str, *others: object, **more: object) -> object:
        if str(name).endswith(".invalid"):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return ask(name, *others, **more)

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def host() -> Iterator[str]:
    """A web server that answers /404 with 404."""
    with HTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.usefixtures("no_names")
def test_a_page_that_is_gone_and_a_host_that_is_not_are_named(host: str) -> None:
    nowhere = "https://nowhere.invalid/page"
    asked = {f"{host}/200": ["a.md"], f"{host}/404": ["b.md", "c.py"], f"{host}/410": ["d.md"], nowhere: ["e.md"]}
    asked |= {f"{host}/403": ["f.md"], f"{host}/429": ["g.md"]}  # such a host is there, and keeps programs out
    assert broken(asked) == [
        f"b.md, c.py: {host}/404: 404",
        f"d.md: {host}/410: 410",
        f"e.md: {nowhere}: no such host",
    ]


@pytest.mark.usefixtures("no_names")
def test_without_a_network_the_check_is_skipped_and_says_so(snapshot: SnapshotAssertion) -> None:
    with pytest.raises(pytest.skip.Exception) as caught:
        broken({"https://nowhere.invalid/": ["a.md"], "https://neither.invalid/": ["b.md"]})
    assert str(caught.value) == snapshot
