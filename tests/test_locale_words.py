"""The words of other languages: one for each thing, the one that ComfyUI's own texts use, spaced as they are there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
OTHER_WORDS = {
    "zh": {
        "你": "您, or nobody",
        "守护": "防护 (guard)",
        "时间表": "调度 (schedule)",
        "窗口": "区间 (window of steps)",
        "挂钩": "钩子 (hook)",
        "忘记": "清除 (forget)",
        "运行记录": "运行报告 (account of a run; 记录 is what Attention Record writes)",
        "……": "...",
    },
    "ja": {
        "カード": "GPU",
        "メモリー": "メモリ",
        "カテゴリー": "カテゴリ",
        "既定": "デフォルト",
        "正確": "厳密 (exact; 正確でない is wrong, not rounded)",
        "枝": "分岐 (branch)",
        "つな": "接続, 連結 (connect, stack)",
        "書き出": "エクスポート (export)",
        "取り込": "インポート (import)",
        "コンディショニング": "条件付け (conditioning)",
        "……": "...",
    },
    "ko": {
        "바이패스": "우회 (bypass)",
        "갈래": "분기 (branch)",
        "카드": "GPU",
        "크로스": "교차 (cross-attention)",
        "컨디셔닝": "조건 (conditioning)",
        "내려받": "다운로드 (download)",
        "동영상": "비디오 (video)",
        "단계": "스텝 (step)",
        "고르": "선택 (choose)",
        "어텐션 훅": "어텐션 후크 (hook)",
        "……": "...",
    },
}
"""Words that stood here or might, with the one that is used instead."""
ONE_LEVEL = "한 단계 미만"  # not a step of a sampler: a level of brightness
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
            assert word not in text.replace(ONE_LEVEL, ""), f"{place}: {word}, say {instead}"


def test_korean_writes_workflow_as_comfyui_does() -> None:
    for place, text in texts("ko").items():
        assert not re.search("워크플로(?!우)", text), place


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
