"""Each command of ours that a page shows works as it is written, for somebody who installed by ComfyUI-Manager."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from attention_backends import cli
from attention_backends.devtools import environment
from test_docs import INSTALLED, PORTABLE
from test_replay_command import FILES

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [
        *(page for page in ROOT.glob("*.md") if page.name != "CHANGELOG.md"),
        *(page for place in ("docs/*.md", "benchmarks/*.md", "web/docs/**/*.md") for page in ROOT.glob(place)),
    ]
)
TEXTS = sorted([*ROOT.glob("locales/**/*.json"), *ROOT.glob("web/*.js"), *ROOT.glob("nodes/*.py")])
PROGRAM = re.compile(r"python[\w.]*(?:\\python\.exe)? (?:-m attention_backends|\S*attention-backends)\b")
NAMES = ("doctor", "explain", "route", "compare", "bench", "tune", "replay", "card", "blocks", "quality")

DRIVER = """
import json, os, runpy, sys, traceback
for folder, words in json.loads(sys.stdin.read()):
    os.chdir(folder)
    sys.argv = words
    try:
        runpy.run_path(words[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
        status = 99
    print("ENDED", json.dumps([words, status]), flush=True)
"""


def shown() -> dict[str, Path]:
    """Each command as a page has it, in prose or in a block, and the first page that does."""
    found: dict[str, Path] = {}
    for page in (*PAGES, *TEXTS):
        text = re.sub(r"\\\n\s*", "", page.read_text(encoding="utf-8"))
        for match in PROGRAM.finditer(text):
            rest = re.match(r"[^\n`]*", text[match.end() :])
            assert rest is not None
            words = re.split(r"\s{3,}|  #", rest[0].strip())[0].strip()
            if text[match.start() - 1] == "`" and "`" not in text[match.end() :].partition("\n")[0]:
                words = " ".join(text[match.end() :].partition("`")[0].split())  # a span that goes on in the next line
            found.setdefault(f"{match[0]} {words}".strip(), page)
    return found


SHOWN = shown()


def arguments(command: str) -> list[str]:
    """What follows the program."""
    match = PROGRAM.match(command)
    assert match is not None
    return shlex.split(command[match.end() :])


def is_light(words: list[str]) -> bool:
    """Whether a command ends within seconds: the others are parsed alone."""
    kept = {"--show", "--export", "--import", "--clear"}
    return (words[0] in ("explain", "route", "replay", "doctor") and "--probe" not in words) or (
        words[0] == "tune" and bool(kept & set(words))
    )


def test_there_are_some() -> None:
    assert len(SHOWN) > 20
    assert {words[0] for command in SHOWN if (words := arguments(command))} == set(NAMES)


@pytest.mark.parametrize("command", SHOWN)
def test_it_names_a_program_that_is_there_and_parses(command: str) -> None:
    match = PROGRAM.match(command)
    assert match is not None
    assert match[0] in (INSTALLED, PORTABLE), SHOWN[command]
    words = arguments(command)
    if words:
        cli._parser("test").parse_args(cli._joined(words))


def test_no_page_shows_the_form_that_fails_for_an_installed_pack() -> None:
    """`python -m attention_backends` needs an installation as a package, which ComfyUI does not make."""
    assert [(command, page.name) for command, page in SHOWN.items() if command.startswith("python -m")] == []


@pytest.mark.skipif(sys.platform == "win32", reason="a link to a folder takes rights on Windows")
def test_the_light_ones_run(tmp_path: Path) -> None:
    """All in one process: starting Python and torch anew for each takes a minute."""
    comfyui = tmp_path / "ComfyUI"
    (comfyui / "custom_nodes").mkdir(parents=True)
    (comfyui / "custom_nodes" / "attention-backends").symlink_to(ROOT, target_is_directory=True)
    for folder in (tmp_path, comfyui):
        (folder / "picture.png").write_bytes(FILES["text.png"])
    commands = []
    for command in SHOWN:
        words = arguments(command)
        if not words or not is_light(words) or command.startswith("python -m"):
            continue
        program = command.split()[1].replace("\\", "/")
        commands.append((str(tmp_path if command.startswith(PORTABLE) else comfyui), [program, *words]))
    commands.sort(key=lambda one: "--import" in one[1])
    assert len(commands) > 15
    own = {
        "ATTENTION_BACKENDS_MEASURED": str(tmp_path / "mine.sqlite3"),
        "ATTENTION_BACKENDS_CACHE": str(tmp_path / "c"),
    }
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("ATTENTION_", "DIFFUS"))}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps(commands),
        env={**clean, **own},
        capture_output=True,
        text=True,
        timeout=300,
    )
    ended = [json.loads(line.removeprefix("ENDED ")) for line in done.stdout.splitlines() if line.startswith("ENDED ")]
    assert [words for words, _ in ended] == [words for _, words in commands], done.stderr[-2000:]
    refused = {" ".join(words[1:]): status for words, status in ended if status}
    # Each of these is shown for what it refuses.
    assert set(refused.values()) <= {1, 2}, done.stderr[-2000:]
    assert all(command.startswith("explain ") for command in refused), refused


def test_dev_py_makes_the_module_form_work_in_its_venv(tmp_path: Path) -> None:
    made = tmp_path / ".venv"
    venv.create(made, with_pip=False)
    environment._share_packages(made)
    python = environment.python_of(made)
    for _ in range(2):
        environment.offer_package(ROOT, python)
    done = subprocess.run(
        [str(python), "-m", "attention_backends", "route", "--platform", "cuda:9.0", "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)
    code = "import attention_backends as a, attention_backends.backends as b; print(a.WEB_DIRECTORY, b.__file__)"
    said = subprocess.run([str(python), "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert said.stdout.split() == ["web", str(ROOT / "backends" / "__init__.py")], said.stderr
