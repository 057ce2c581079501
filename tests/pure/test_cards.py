"""The pages as files: no place left to be filled in, and every picture that a page shows is there and is a picture."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOT_OURS = ("node_modules", "demo_output", "shared", "build", "dist")
PAGES = sorted(
    page
    for page in ROOT.rglob("*.md")
    if not any(part.startswith(".") or part in NOT_OURS for part in page.relative_to(ROOT).parts)
)
BEGINNINGS = {
    ".png": b"\x89PNG\r\n\x1a\n", ".jpg": b"\xff\xd8\xff", ".jpeg": b"\xff\xd8\xff", ".gif": b"GIF8", ".svg": b"<",
    ".webp": b"RIFF",
}  # fmt: skip


def placeholders(text: str) -> list[str]:
    """Marks such as @LOSS@ that a program was to replace by what it measured."""
    return re.findall(r"@[A-Z][A-Z_0-9]*@", text)


def pictures(text: str) -> list[str]:
    """Local files that a page shows, or links to as a picture."""
    linked = re.findall(r"\]\(([^)\s]+)[^)]*\)", text) + re.findall(r"<img[^>]*\ssrc=[\"']([^\"']+)", text)
    local = [link.partition("#")[0] for link in linked if not re.match(r"[a-z]+:|/", link)]
    return [link for link in local if Path(link).suffix.lower() in BEGINNINGS]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_nothing_is_left_to_be_filled_in(page: Path) -> None:
    assert placeholders(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_picture_is_there(page: Path) -> None:
    for link in pictures(page.read_text(encoding="utf-8")):
        file = page.parent / link
        assert file.is_file(), f"{name_of(page)} shows {link}, which is not there"
        assert file.read_bytes().startswith(BEGINNINGS[file.suffix.lower()]), f"{link} is not what its name says"


def test_pages_with_pictures_are_among_them() -> None:
    shown = {name_of(page): pictures(page.read_text(encoding="utf-8")) for page in PAGES}
    assert "docs/comparison.png" in shown["README.md"]
    assert shown["demo/README.md"]


def test_both_checks_find_what_they_look_for() -> None:
    text = "loss @LOSS@, mail me@example.org @a@ ![a](x/y.png) [b](z.jpg 'title') <img src=\"c.svg\"> [web](https://a/b.png)"
    assert placeholders(text) == ["@LOSS@"]
    assert pictures(text) == ["x/y.png", "z.jpg", "c.svg"]
