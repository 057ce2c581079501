"""The words of other languages: one for each thing, the one that ComfyUI's own texts use, spaced as they are there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
OTHER_WORDS: dict[str, dict[str, str]] = json.loads(
    (ROOT / "tests" / "fixtures" / "other_words.json").read_text(encoding="utf-8")
)
"""By language, words that stood here or might, as regular expressions, with the one that is used instead."""
JAPANESE = "[\u3040-\u30ff\u4e00-\u9fff]"


def flat(part: Any) -> Iterator[str]:
    if isinstance(part, dict):
        for inner in part.values():
            yield from flat(inner)
    else:
        yield part


def texts(language: str) -> dict[str, str]:
    """Every file of a language as one text, without code."""
    found = {}
    for path in sorted((ROOT / "locales" / language).glob("*.json")):
        found[f"{language}/{path.name}"] = "\n".join(flat(json.loads(path.read_text(encoding="utf-8"))))
    for path in sorted((ROOT / "web" / "docs").glob(f"*/{language}.md")):
        text = path.read_text(encoding="utf-8")
        found[f"{path.parent.name}/{path.name}"] = re.sub(r"```.*?```|`[^`\n]+`", "`", text, flags=re.DOTALL)
    return found


@pytest.mark.parametrize("language", OTHER_WORDS)
def test_a_thing_has_one_name(language: str) -> None:
    for place, text in texts(language).items():
        for word, instead in OTHER_WORDS[language].items():
            assert not re.search(word, text), f"{place}: {word}, say {instead}"


def test_japanese_has_no_space_beside_latin() -> None:
    for place, text in texts("ja").items():
        found = re.search(f".*(?:{JAPANESE} [A-Za-z0-9]|[A-Za-z0-9] {JAPANESE}).*", text)
        assert not found, f"{place}: {found and found.group()}"


@pytest.mark.parametrize("language", OTHER_WORDS)
def test_settings_say_the_same_in_the_panel_and_in_the_list(language: str) -> None:
    """They stand twice, for ComfyUI's list of translations and for our own script."""
    folder = ROOT / "locales" / language
    panel = json.loads((folder / "main.json").read_text(encoding="utf-8"))["attentionBackends"]["settings"]
    names = {re.sub(r" ?\{role\} ?", "", panel[key]) for key in panel}
    for one, said in json.loads((folder / "settings.json").read_text(encoding="utf-8")).items():
        assert said["tooltip"] in panel.values(), f"{one}: {said['tooltip']}"
        assert re.sub(r" ?\b(?:self|cross|joint)\b ?", "", said["name"], flags=re.ASCII) in names, (
            f"{one}: {said['name']}"
        )
