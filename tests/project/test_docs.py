"""What the pages say: links lead somewhere, commands answer so, messages and names exist. Facts: test_docs_facts.py."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from attention_backends import cli
from attention_backends.backends.config.names import canonical
from attention_backends.backends.config.text import CONFIG_VARIABLE, DEFAULT_VARIABLES, parse_config
from attention_backends.backends.kernels.registry import looked_for
from attention_backends.comparison.presets import parse_presets
from attention_backends.devtools.commands import HELP

ROOT = Path(__file__).resolve().parents[2]
GUIDES = [ROOT / "docs" / name for name in ("troubleshooting.md", "limitations.md", "choosing.md")]
HELP_PAGES = sorted((ROOT / "web" / "docs").rglob("*.md"))
PAGES = [
    ROOT / "README.md",
    ROOT / "ARCHITECTURE.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "demo" / "README.md",
    ROOT / "benchmarks" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *HELP_PAGES,
]
INSTALLED = "python custom_nodes/attention-backends"
PORTABLE = r"python_embeded\python.exe ComfyUI\custom_nodes\attention-backends"
OURS = (INSTALLED, PORTABLE, "python -m attention_backends")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


pages = pytest.mark.parametrize("page", PAGES, ids=name_of)
guides = pytest.mark.parametrize("page", GUIDES, ids=name_of)


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> Iterator[list[str]]:
    """The lines of each fenced block of this language, without what it is indented by."""
    for indent, body in re.findall(rf"^( *)```{language}\n(.*?)^ *```$", text_of(page), re.DOTALL | re.MULTILINE):
        yield [line.removeprefix(indent) for line in body.splitlines()]


def spans(page: Path) -> list[str]:
    """The inline code of a page, a line break in it as a space."""
    prose = re.sub(r"^ *```.*?^ *```$", "", text_of(page), flags=re.DOTALL | re.MULTILINE)
    return [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose)]


# Links


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    prose = re.sub(r"^ *```.*?^ *```$", "", text_of(page), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def links(page: Path) -> list[str]:
    found = re.findall(r"\]\(([^)\s]+)\)", text_of(page))
    return [link for link in found if not re.match(r"[a-z]+:", link)]


@pages
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for link in links(page):
        target, _, anchor = link.partition("#")
        place = (page.parent / target).resolve() if target else page
        assert place.exists(), f"{name_of(page)}: {link}"
        assert not anchor or anchor in anchors(place), f"{name_of(page)}: {link}: there is {sorted(anchors(place))}"


def test_the_readme_leads_to_every_guide() -> None:
    led = {(ROOT / link.partition("#")[0]).resolve() for link in links(ROOT / "README.md")}
    assert led >= {*GUIDES, *(ROOT / "docs").glob("*.md")}


def test_the_first_screen_of_the_readme_answers_for_each_kind_of_card() -> None:
    """One picture, and a row for each kind of card with what to install, choose and expect, and a source."""
    first = text_of(ROOT / "README.md").partition("\n## Install")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in first.splitlines() if line[:1] == "|"]
    head, _, *cards = rows
    assert head == ["Your card", "Install", "Choose as `backend`", "Expect", "Source"]
    assert [row[0].partition(" (")[0] for row in cards] == ["RTX 30", "RTX 40", "RTX 50", "AMD", "Mac"]
    assert all(all(row) and "](" in row[4] for row in cards)
    for row in cards[:4]:
        assert [canonical(name) for name in re.findall(r"`(\w+)`", row[2]) if name != "gfx1151"], row
    assert first.count("![") == 1
    assert "has run on a GPU" in first
    assert "ComfyUI-Manager" in first
    assert "git clone" in first
    assert "second model" in first
    assert len(first.splitlines()) < 40


def test_choosing_gives_advice_before_evidence() -> None:
    advice, _, evidence = text_of(ROOT / "docs" / "choosing.md").partition("\n## Evidence\n")
    assert not re.search(r"\((?:measured|reported|assumed)\b", advice)
    assert len(re.findall(r"\((?:measured|reported|assumed)\b", evidence)) > 20
    assert re.findall(r"^1\. ", advice, re.MULTILINE)
    assert not re.findall(r"^1\. ", evidence, re.MULTILINE)


# Commands


def commands(page: Path) -> Iterator[str]:
    """What follows the program in each command of ours that a page shows."""
    joined = re.sub(r"\\\n\s*", "", text_of(page))
    for line in joined.splitlines():
        shown = line.strip().removeprefix("$ ").partition("  #")[0]
        for program in OURS:
            if shown.startswith(f"{program} "):
                yield re.split(r"\s{3,}", shown.removeprefix(f"{program} "))[0]
    for span in spans(page):
        words = span.split()
        for program in OURS:
            if span.startswith(f"{program} "):
                yield span.removeprefix(f"{program} ")
        if words[0] in ("doctor", "explain", "route", "bench", "compare") and any("-" in word for word in words[1:]):
            yield span


@pages
def test_every_command_parses_and_means_something(page: Path) -> None:
    for command in commands(page):
        try:
            options = cli._parser("test").parse_args(cli._joined(shlex.split(command)))
        except SystemExit:
            pytest.fail(f"{name_of(page)}: {command}")
        for backend in getattr(options, "backend", []):
            canonical(backend)
        if options.command in ("bench", "compare") and options.backends:
            assert all(map(canonical, options.backends.split(",")))
        if options.command == "bench" and options.presets:
            parse_presets(options.presets)


@pages
def test_every_command_of_dev_py_exists(page: Path) -> None:
    for command in re.findall(r"(?:python3|py) dev\.py (\w+)", text_of(page)):
        assert command in HELP, f"{name_of(page)}: dev.py {command}"


def shown() -> list[Any]:
    """Each command of a console block with the lines that stand under it."""
    found = []
    for page in GUIDES:
        for lines in blocks(page, "console"):
            for part in "\n".join(lines).split("$ ")[1:]:
                command, *answer = part.splitlines()
                if answer:
                    label = f"{page.stem}: {command.removeprefix(OURS[0]).strip()[:70]}"
                    found.append(pytest.param(command, answer, id=label))
    return found


@pytest.mark.parametrize(("command", "answer"), shown())
def test_a_command_answers_as_the_page_says(
    command: str, answer: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for variable in (CONFIG_VARIABLE, *DEFAULT_VARIABLES):
        monkeypatch.delenv(variable, raising=False)
    arguments = shlex.split(command.removeprefix(OURS[0]))
    status = cli.main(arguments)
    said, refused = capsys.readouterr()
    lines = (refused if status else said).splitlines()
    for line in answer:
        matching = [number for number, one in enumerate(lines) if one.startswith(line)]
        assert matching, f"not said, or not after the line before: {line}\n\n" + "\n".join(lines)
        lines = lines[matching[0] + 1 :]


# Messages


def literal(node: ast.AST) -> str | None:
    """A regular expression for what an expression of strings can say; None for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[srd]|\\\{\w+\\\}", ".*", re.escape(node.value))  # and the values of a reason's text
    if isinstance(node, ast.JoinedStr):
        return "".join(literal(part) or ".*" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = literal(node.left), literal(node.right)
        return None if left is None and right is None else f"{left or '.*'}{right or '.*'}"
    return None


@lru_cache(maxsize=1)
def sayings() -> re.Pattern[str]:
    """Every text in our code that has some words of its own, line by line."""
    found = set()
    for path in [p for f in ("backends", "cli", "comparison", "nodes") for p in (ROOT / f).rglob("*.py")]:
        for node in ast.walk(ast.parse(text_of(path))):
            for line in (literal(node) or "").split("\\\n"):
                if len(re.sub(r"\.\*|\W", "", line)) >= 10:
                    found.add(line)
    return re.compile("|".join(f"(?:{one})" for one in sorted(found)))


@guides
def test_every_message_is_in_the_code(page: Path) -> None:
    for lines in blocks(page, "text"):
        for line in lines:
            if not sayings().fullmatch(line.strip()):
                pytest.fail(f"{name_of(page)} quotes what no code says: {line}")


@pytest.mark.parametrize("page", HELP_PAGES, ids=name_of)
def test_every_message_of_a_help_page_is_in_the_code(page: Path) -> None:
    listed = text_of(page).rpartition("\n## ")[2]
    for message in re.findall(r"^- `([^`]+)`", listed, re.MULTILINE):
        if len(message.split()) > 3 and not sayings().fullmatch(message):
            pytest.fail(f"{name_of(page)} quotes what no code says: {message}")


def test_an_invented_message_would_be_found() -> None:
    assert sayings().fullmatch("wrong: relative L2 1.1e+00 > 8.0e-02")
    assert not sayings().fullmatch("the kernel was somehow not right")
    assert not sayings().fullmatch("wrong: relative L1 1.1e+00 > 8.0e-02")


ERRORS_ELSEWHERE = (
    "ImportError: flash_attn not found",
    "ModuleNotFoundError: No module named 'flash_attn'",
    "Flash attention requires bf16 or fp16 dtype",
    "torch_npu is not available",
    "torch_xla is not available",
    "requires GPUs with sm75 or higher",
    "'NoneType' object has no attribute '_trait'",
)
"""What the documents and kernels of other systems say when something is wrong."""


def test_errors_of_other_systems_are_looked_up_by_their_words() -> None:
    for error in ERRORS_ELSEWHERE:
        assert f"`{error}`" in text_of(ROOT / "docs" / "troubleshooting.md"), error


# Names

KERNEL_WORDS = re.compile(r"attn|sdpa|sage|flash|cudnn|xformers|aiter|_fusion|kitchen|cutlass|emulated")
NO_BACKENDS = {
    *looked_for(),
    "flash_attn_func",
    "sageattention",
    "sageattn3",
    "compare_attention",
    "bench_attention_backends.py",
}


@pytest.mark.parametrize("page", [ROOT / "README.md", *GUIDES, *HELP_PAGES], ids=name_of)
def test_every_backend_that_is_named_exists(page: Path) -> None:
    for span in spans(page):
        for word in re.split(r"[,\s]+", span):
            a_name = re.fullmatch(r"_?[a-z][a-z0-9_-]*", word) and not word.startswith("attention")
            if a_name and KERNEL_WORDS.search(word) and word not in NO_BACKENDS:
                canonical(word)


@guides
def test_every_configuration_on_a_page_is_understood(page: Path) -> None:
    for lines in blocks(page, "yaml"):
        parse_config("\n".join(lines), read_files=False)
