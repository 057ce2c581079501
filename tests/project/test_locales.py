"""Texts in other languages: the same keys as in English, English as in the schemas, a help page for every node."""

from __future__ import annotations

import ast
import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from attention_backends.backends.config.names import AUTO, AUTOTUNE, BACKEND_IDS, menu
from attention_backends.devtools.pages import node_help
from attention_backends.devtools.server import Server
from browser import open_comfyui, why_no_browser
from make_locales import escaped, phrases

ROOT = Path(__file__).resolve().parents[2]
LOCALES = ROOT / "locales"
HELP = ROOT / "web" / "docs"
OTHERS = ("zh", "ja", "ko")
FILES = ("main", "nodeDefs", "settings", "commands")
SAME_EVERYWHERE = re.compile(
    r"[a-z0-9_]*|cfg|vae|ms|torch|cuDNN|Python|ComfyUI|JSON\.?|Latent|CLIP.*|Attention Backends|[A-Z]+|\{\w+\}"
    r"|\{\w+\}[,;] \{\w+\}"
)
"""Names that other languages write as English does."""
FIELDS = re.compile(r"(?:head_dim|kv_len|num_heads|\{\w+\}|[A-Z]+|NVIDIA|Apple|Ascend|Intel|[^a-zA-Z])*")
"""Reasons without a word of English: fields of a request, and brands."""
IDENTIFIER = re.compile(r"\b[a-z0-9]+(?:[_.][a-z0-9]+)+\b|\b(?:SDPA|JSON|YAML|INT8|FP8|FP4|cuDNN|CLIP)\b|\{\w+\}")
"""Words that stay as they are in any language: ids, names with dots and underscores, placeholders."""


def read(language: str, name: str) -> Any:
    return json.loads((LOCALES / language / f"{name}.json").read_text(encoding="utf-8"))


def flat(part: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], str]:
    """Every text with the keys that lead to it."""
    if not isinstance(part, dict):
        return {path: part}
    return {key: text for name, inner in part.items() for key, text in flat(inner, (*path, name)).items()}


def pairs() -> list[tuple[str, str]]:
    return [(language, name) for language in OTHERS for name in FILES]


@pytest.mark.parametrize(("language", "name"), pairs())
def test_a_language_has_the_texts_that_english_has(language: str, name: str) -> None:
    english, other = flat(read("en", name)), flat(read(language, name))
    assert sorted(other) == sorted(english), {
        "missing": sorted(set(english) - set(other)),
        "stale": sorted(set(other) - set(english)),
    }


@pytest.mark.parametrize(("language", "name"), pairs())
def test_every_text_is_translated_and_keeps_its_names(language: str, name: str) -> None:
    other = flat(read(language, name))
    for key, text in flat(read("en", name)).items():
        said = other[key]
        assert said.strip(), key
        same = SAME_EVERYWHERE if "said" not in key else FIELDS
        assert said != text or same.fullmatch(text), f"{key} is not translated: {text}"
        if key[-1] == "name":
            continue  # a label may be an id in English
        lost = (
            set(IDENTIFIER.findall(text))
            - {"e.g", "{article}"}
            - set(IDENTIFIER.findall(re.sub(r"[^\x00-\x7f]", " ", said)))
        )
        assert not lost, f"{key} lost {sorted(lost)}: {said}"


@pytest.mark.parametrize("language", ["en", *OTHERS])
@pytest.mark.parametrize("name", FILES)
def test_no_text_has_a_meaning_to_the_front_end(language: str, name: str) -> None:
    # vue-i18n reads a bar as plural forms, an at sign as a link, a brace as a placeholder.
    for key, text in flat(read(language, name)).items():
        plain = re.sub(r"\{'.'\}", "", text)  # how it is told to take one as it is
        if "attentionBackends" in key:  # read by web/words.js alone, which knows two forms for a number
            plain = re.sub(r"^([^|]*\{\w+\}[^|]*) \| ([^|]*\{\w+\}[^|]*)$", r"\1\2", plain)
        assert not re.search(r"[|@]", plain), f"{key}: {text}"
        assert "attentionBackends" in key or not re.search(r"[{}]", plain), f"{key}: {text}"


def test_every_reason_of_the_server_has_words() -> None:
    assert read("en", "main")["attentionBackends"]["said"] == phrases()


def whole_texts() -> set[str]:
    """What the sparse methods say of calls that they compute whole, with 7 as every number."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "backends" / "sparse").rglob("*.py")]
    calls = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
    words = {"name": {"blocks"}, "unit": {"steps", "layers"}, "scaled": {"", " (7 of 7 in the publication)"}}
    for call in calls:
        if isinstance(call.func, ast.Name) and call.func.id == "composed":
            words["name"] |= {k.value.value for k in call.keywords if isinstance(k.value, ast.Constant)}
    found: set[str] = set()
    for call in calls:
        if isinstance(call.func, ast.Name) and call.func.id == "Dense":
            parts = call.args[0].values if isinstance(call.args[0], ast.JoinedStr) else [call.args[0]]
            texts = {""}
            for part in parts:
                if isinstance(part, ast.FormattedValue):
                    of = words.get(ast.unparse(part.value), {"7"})
                elif isinstance(part, ast.Constant):
                    of = {str(part.value)}
                else:
                    of = set()  # made of reasons
                texts = {text + one for text in texts for one in of}
            found |= texts
    return found


def test_every_call_that_is_computed_whole_has_words() -> None:
    """The report has plain English; the server reads it back: a new text needs a line in backends/values/reasons.py."""
    from attention_backends.backends.values.reasons import with_values

    made = {text: with_values(text, "whole.") for text in whole_texts()}
    assert len(made) > 10
    assert [text for text, reason in made.items() if type(reason) is str] == []
    assert all(str(reason) == text for text, reason in made.items())


@lru_cache(maxsize=1)
def schemas() -> dict[str, Any]:
    """The schema of every node that the pack offers, by id; skips where there is no ComfyUI."""
    pytest.importorskip("torch", reason="torch is not installed")
    from hook_side import comfyui, nodes_module

    comfyui()
    tree = ast.parse((ROOT / "nodes" / "__init__.py").read_text(encoding="utf-8"))
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module]
    module_of = {alias.name: str(node.module) for node in imports for alias in node.names}
    listed = next(n for n in ast.walk(tree) if isinstance(n, ast.AsyncFunctionDef) and n.name == "get_node_list")
    names = [node.id for node in ast.walk(listed) if isinstance(node, ast.Name) and node.id in module_of]
    found = [getattr(nodes_module(module_of[name]), name).define_schema() for name in names]
    return {schema.node_id: schema for schema in found}


@pytest.mark.comfy
def test_english_is_what_the_nodes_say() -> None:
    texts = read("en", "nodeDefs")
    assert sorted(texts) == sorted(schemas())
    for node_id, schema in schemas().items():
        said = texts[node_id]
        assert said["display_name"] == schema.display_name
        assert said["description"] == escaped(schema.description)
        assert list(said["inputs"]) == [one.id for one in schema.inputs], node_id
        assert list(said["outputs"]) == [str(number) for number in range(len(schema.outputs))], node_id
        for one in schema.inputs:
            assert said["inputs"][one.id].get("tooltip", "") == escaped(one.tooltip or ""), f"{node_id}.{one.id}"
        for number, output in enumerate(schema.outputs):
            assert said["outputs"][str(number)].get("tooltip", "") == escaped(output.tooltip or ""), (
                f"{node_id}, output {number}"
            )


@pytest.mark.parametrize("language", ["en", *OTHERS])
def test_the_selector_says_where_the_list_of_backends_is(language: str) -> None:
    """In three lines: the list itself is on the help page, as the front end cuts long tooltips off."""
    tooltip = read(language, "nodeDefs")["AttentionBackendSelector"]["inputs"]["backend"]["tooltip"]
    lines = tooltip.splitlines()
    assert len(lines) == 3
    assert [re.split("[:\uff1a]", line)[0] for line in lines[:2]] == [AUTO, AUTOTUNE]
    assert max(map(len, lines)) <= 110
    assert read(language, "main")["attentionBackends"]["machine"]["title"] in tooltip
    assert not [name for name in BACKEND_IDS if "_" in name and name in tooltip]


@pytest.mark.parametrize("language", ["en", *OTHERS])
def test_the_selectors_help_lists_every_backend(language: str) -> None:
    text = page("AttentionBackendSelector", language)
    said = node_help.sentences(text)
    assert list(said) == [name for name in menu("cuda") if name in BACKEND_IDS]
    assert all(said.values())
    assert language != "en" or said == {name: node_help.english()[name] for name in said}
    assert text == node_help.with_list(text, said), "run: python3 dev.py docs"


def short_name(texts: dict[str, Any]) -> str:
    """A node's display name without the words for the search."""
    name: str = texts["display_name"]
    return name.partition(" (")[0]


# Help pages: the front end asks for docs/ID/LANGUAGE.md, then for docs/ID.md

FORMER_IDS = {"AttentionDemoCaption": "TinyShapesCaption", "AttentionDemoImage": "TinyShapesImage"}
"""Ids that graphs may have and no menu offers, and those of today."""


@pytest.mark.comfy
def test_former_ids_are_not_offered() -> None:
    assert {name for name, schema in schemas().items() if schema.is_deprecated} == set(FORMER_IDS)


@pytest.mark.parametrize("language", ["en", *OTHERS])
def test_former_ids_are_described_as_those_of_today(language: str) -> None:
    for former, now in FORMER_IDS.items():
        assert page(former, language) == page(now, language)


def page(node_id: str, language: str) -> str:
    path = HELP / f"{node_id}.md" if language == "en" else HELP / node_id / f"{language}.md"
    return path.read_text(encoding="utf-8")


def first_cells(text: str) -> list[list[str]]:
    """The first column of the tables of inputs and outputs, without their heads."""
    tables = re.findall(r"^\|[^\n]*\n\|[-| ]+\n((?:\|[^\n]*\n)+)", text + "\n", re.MULTILINE)[:2]
    return [re.findall(r"^\| `([^`]+)`", table, re.MULTILINE) for table in tables]


def labels(text: str) -> list[str]:
    """What stands beside each name in the first column, or the name itself."""
    of_sockets = "\n## ".join(text.split("\n## ")[:3])
    rows = re.findall(r"^\| `([^`]+)` ?([^|]*?) *\|", of_sockets, re.MULTILINE)
    return [label or name for name, label in rows]


def without_number(name: str) -> str:
    return re.sub(r"^(image|label|report)_\d$", r"\1_1", name)


def test_the_readme_names_every_node() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for texts in read("en", "nodeDefs").values():
        assert re.search(rf"^\|.*\b{re.escape(short_name(texts))}\b.*\|", readme, re.MULTILINE), texts["display_name"]


def test_every_node_has_its_pages_and_no_other_has() -> None:
    ids = set(read("en", "nodeDefs"))
    assert {path.stem for path in HELP.glob("*.md")} == ids
    assert {path.name for path in HELP.iterdir() if path.is_dir()} == ids
    for node_id in ids:
        assert {path.stem for path in (HELP / node_id).iterdir()} == {"en", *OTHERS}
        assert (HELP / node_id / "en.md").read_text(encoding="utf-8") == page(node_id, "en"), "run: python3 dev.py docs"


@pytest.mark.parametrize("language", ["en", *OTHERS])
def test_a_page_describes_every_input_and_output(language: str) -> None:
    for node_id, texts in read("en", "nodeDefs").items():
        inputs, outputs = first_cells(page(node_id, language))
        wanted = dict.fromkeys(map(without_number, texts["inputs"]))
        assert inputs == list(wanted), f"{node_id}, {language}"
        assert len(outputs) == len(texts["outputs"]), f"{node_id}, {language}"


@pytest.mark.comfy
def test_the_pages_name_outputs_as_the_nodes_do() -> None:
    for node_id, schema in schemas().items():
        names = [output.display_name or output.get_io_type() for output in schema.outputs]
        assert first_cells(page(node_id, "en"))[1] == names, node_id


@pytest.mark.parametrize("language", OTHERS)
def test_a_page_is_headed_and_illustrated_as_in_english(language: str) -> None:
    for node_id, texts in read(language, "nodeDefs").items():
        ours, theirs = page(node_id, "en"), page(node_id, language)
        english = ours.splitlines()[0].removeprefix("# ")
        assert theirs.splitlines()[0] == f"# {short_name(texts)} ({english})"
        for form in (r"^## ", r"^\|", r"^- `"):
            counts = [len(re.findall(form, text, re.MULTILINE)) for text in (ours, theirs)]
            assert counts[0] == counts[1], f"{node_id}, {language}: {form}"
        quoted = [set(re.findall(r"^- `([^`]{12,})`", text, re.MULTILINE)) for text in (ours, theirs)]
        assert quoted[0] == quoted[1], f"{node_id}, {language}: messages differ"
        for bold in re.findall(r"\*\*(.+?)\*\*", theirs):
            assert bold in set(map(short_name, read(language, "nodeDefs").values())), bold


@pytest.mark.parametrize("language", OTHERS)
def test_a_page_gives_the_names_that_the_node_shows(language: str) -> None:
    for node_id, texts in read(language, "nodeDefs").items():
        shown = [texts["inputs"][name]["name"] for name in texts["inputs"] if without_number(name) == name]
        shown += [output["name"] for output in texts["outputs"].values()]
        assert labels(page(node_id, language)) == shown, node_id


@pytest.mark.comfy
@pytest.mark.browser
@pytest.mark.skipif(why_no_browser() is not None, reason=f"browser: {why_no_browser()}")
@pytest.mark.parametrize(("setting", "shown"), [("zh", "zh"), ("fr", "en")])
def test_the_front_end_shows_names_and_help(server: Server, setting: str, shown: str) -> None:
    """A language that has no texts of ours, such as French, gets the English ones."""
    texts = read(shown, "nodeDefs")["AttentionReport"]
    with open_comfyui(server.url, {"Comfy.Locale": setting}) as front_end:
        title, outputs = front_end.evaluate(
            """() => {
              const node = window.LiteGraph.createNode('AttentionReport')
              window.app.graph.add(node)
              window.app.canvas.selectNode(node)
              window.app.canvas.setDirty(true, true)
              return [node.title, node.outputs.map((output) => output.localized_name ?? output.name)]
            }"""
        )
        front_end.locator("[data-testid=info-button]").first.click()
        help_page = front_end.locator(".node-help-content")
        help_page.locator("table").first.wait_for(timeout=20_000)
        heading, rows = help_page.locator("h1").inner_text(), help_page.locator("tr").count()
    assert title == texts["display_name"]
    assert outputs == [output["name"] for output in texts["outputs"].values()]
    assert heading == page("AttentionReport", shown).splitlines()[0].removeprefix("# ")
    assert rows == 7  # a head and the rows of two tables
