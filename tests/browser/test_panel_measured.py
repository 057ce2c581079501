"""The measured choices over HTTP and in the panel: seen, exported, imported and cleared, on a real server."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from attention_backends.backends.observe.autotune.entry import document
from attention_backends.backends.observe.autotune.store import Store
from attention_backends.devtools.server import Server
from browser import load_workflow, open_comfyui, why_no_browser
from measured_entries import ELSEWHERE, entry, key, some
from panel_pictures import keep
from server_harness import start_server
from syrupy.assertion import SnapshotAssertion
from test_panel import barriers, open_tab, ours, run_workflow, workflow
from test_routes_http import asked
from test_web import words

pytestmark = pytest.mark.comfy
FILE = Path("user", "attention_backends", "measured.sqlite3")
JSON = {"Content_Type": "application/json"}


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    def fill(python: Path, folder: Path) -> None:
        store = Store(folder / FILE)
        for one in some():
            store.put(one)

    with start_server(extra_nodes=(), fill=fill) as server:
        yield server


@pytest.fixture
def server(running: Server) -> Server:
    """With the entries of `some`, whatever a test before this one did."""
    posted(running, "/measured/clear", {})
    assert posted(running, "/measured/import", document(some()))[0] == 200
    return running


def posted(server: Server, path: str, body: object, **headers: str) -> tuple[int, dict[str, Any]]:
    return asked(server, path, json.dumps(body).encode(), **{**JSON, **headers})


def test_what_a_run_stored_is_seen(running: Server) -> None:
    status, found = asked(running, "/measured")
    assert status == 200
    size = (running.folder / FILE).stat().st_size
    assert found["summary"] == {
        "path_name": "measured.sqlite3", "entries": 4, "entries_here": 3, "bytes": size, "problem": None,
    }  # fmt: skip
    assert [one["role"] for one in found["entries"]] == ["self", "cross", "ltx2.audio_to_video", "joint"]
    assert found["entries"][0]["ms"] == {"torch_sdpa": 4.25, "sdpa_flash": 3.125, "sdpa_math": 12.5}
    assert [one["here"] for one in found["entries"]] == [True, True, True, False]


def test_an_export_is_imported_again(server: Server) -> None:
    before = asked(server, "/measured")[1]
    status, exported = asked(server, "/measured/export")
    assert (status, exported) == (200, document(some()))
    status, cleared = posted(server, "/measured/clear", {})
    assert (status, cleared["removed"], cleared["entries"], cleared["summary"]["entries"]) == (200, 4, [], 0)
    status, back = posted(server, "/measured/import", exported)
    assert (status, back["taken"], back["entries"]) == (200, 4, before["entries"])
    assert asked(server, "/measured")[1]["entries"] == before["entries"]


def test_what_is_wrong_is_refused_and_changes_nothing(server: Server, snapshot: SnapshotAssertion) -> None:
    good = document(some())
    lame = {**good, "entries": [{**good["entries"][0], "winner": "nobody"}]}
    wrong = [
        ({}, 400, "empty"),
        ({**good, "version": 99}, 400, "version"),
        (lame, 400, "winner"),
        ({**good, "more": "x" * (4 << 20)}, 413, "size"),
    ]
    for body, status, why in wrong:
        assert posted(server, "/measured/import", body) == (status, {"error": snapshot(name=why)})
    assert asked(server, "/measured/import", b'{"a": NaN}', **JSON) == (400, {"error": snapshot(name="NaN")})
    assert asked(server, "/measured/import", b"[" * 5000, **JSON)[0] == 400
    for body in ([], {"confirm": True}, None):
        assert posted(server, "/measured/clear", body)[0] == 400
    for route in ("/measured/clear", "/measured/import"):
        assert posted(server, route, {}, Content_Type="text/plain")[0] == 415
        assert posted(server, route, {}, Sec_Fetch_Site="cross-site")[0] == 403
        assert posted(server, route, {}, Origin="http://elsewhere.example")[0] == 403
        assert asked(server, route)[0] in (404, 405)
    assert asked(server, "/measured")[1]["summary"]["entries"] == 4


def test_no_answer_holds_a_path(server: Server) -> None:
    secret = entry(key("secret"), rejected={"xformers": "cannot load /home/ann/venv/lib/x.so: no such file"})
    posted(server, "/measured/import", document([secret]))
    for route in ("/measured", "/measured/export"):
        text = json.dumps(asked(server, route)[1])
        assert "cannot load .../x.so" in text
        assert str(server.folder) not in text
        assert not re.search(r"[\" ]/\w+/\w+", text)


def test_a_damaged_file_is_set_aside_and_said(server: Server) -> None:
    (server.folder / FILE).write_bytes(b"no database at all" * 100)
    status, found = asked(server, "/measured")
    assert (status, found["entries"]) == (200, [])
    assert "measured.sqlite3.damaged" in found["summary"]["problem"]
    assert posted(server, "/measured/import", document(some()))[1]["summary"]["entries"] == 4


# In the panel


@pytest.fixture(scope="module")
def panel_page(running: Server) -> Iterator[Any]:
    with open_comfyui(running.url) as page:
        open_tab(page)
        yield page


@pytest.fixture
def shown(server: Server, panel_page: Any) -> Any:
    """The section, with what `server` holds now."""
    panel_page.problems.clear()
    with panel_page.expect_response("**/attention_backends/measured"):  # what it shows may be of the test before
        panel_page.evaluate("() => window.app.api.dispatchCustomEvent('reconnected')")
    found = panel_page.get_by_role("region", name=words()["measured"]["title"])
    found.get_by_text("3 for this machine, 4 in all").wait_for()
    return found


@pytest.mark.browser
@pytest.mark.skipif(why_no_browser() is not None, reason=f"browser: {why_no_browser()}")
class TestPanel:
    def test_it_shows_what_the_route_says(self, server: Server, shown: Any) -> None:
        page, told = shown.page, asked(server, "/measured")[1]
        kb = f"{told['summary']['bytes'] / 1024:.1f}"
        facts = ["3 for this machine, 4 in all", f"measured.sqlite3, {kb} KB"]
        assert shown.locator("dd").all_inner_texts() == facts
        shown.get_by_text("For other machines or versions (1)").click()
        for one in told["entries"]:
            item = shown.locator(".ab-kinds > li").filter(has=page.get_by_text(one["role"], exact=True))
            text = item.inner_text()
            assert item.locator(".ab-winner").inner_text().startswith(one["winner"])
            assert item.locator(".ab-candidates > li").count() == len(one["ms"])
            for backend, ms in one["ms"].items():
                line = item.locator(".ab-candidates > li").filter(has_text=backend).inner_text()
                assert float(line.split()[-2]) == pytest.approx(ms, rel=5e-3)
            for backend, reason in one["rejected"].items():
                assert f"{backend} excluded: {reason}" in text
            assert (ELSEWHERE in text) is not one["here"]
        call = "4096 x 80 tokens, heads 24 x 128, bfloat16, batch 2, mask key_padding, quantized allowed"
        assert call in shown.inner_text()
        with page.expect_download() as download:
            shown.get_by_role("button", name="Export").click()
        saved = json.loads(Path(download.value.path()).read_text(encoding="utf-8"))
        assert saved == asked(server, "/measured/export")[1]
        assert ours(page) == []

    def test_clear_asks_once_and_import_brings_them_back(self, server: Server, shown: Any, tmp_path: Path) -> None:
        page, file = shown.page, tmp_path / "choices.json"
        file.write_text(json.dumps(asked(server, "/measured/export")[1]), encoding="utf-8")
        forget = shown.get_by_role("button", name="Delete all")
        forget.focus()
        page.keyboard.press("Enter")
        question = shown.get_by_role("group", name="Delete all 4 autotune results?")
        question.wait_for()
        assert page.evaluate("() => document.activeElement.textContent") == "Delete"
        page.keyboard.press("Escape")
        question.wait_for(state="detached")
        assert asked(server, "/measured")[1]["summary"]["entries"] == 4
        assert page.evaluate("() => document.activeElement.textContent") == "Delete all"
        page.keyboard.press("Enter")
        page.keyboard.press("Enter")
        shown.get_by_text("4 results deleted.").wait_for()
        assert asked(server, "/measured")[1]["summary"]["entries"] == 0
        shown.get_by_text("No results yet.").wait_for()
        assert forget.is_disabled()

        picker = shown.locator("input[type=file]")
        picker.set_input_files(file)
        shown.get_by_text("4 results imported.").wait_for()
        assert asked(server, "/measured")[1]["summary"]["entries"] == 4
        file.write_text('{"format": "another"}', encoding="utf-8")
        picker.set_input_files(file)
        shown.get_by_text("not a document of measured choices").wait_for()
        file.write_text(" " * ((4 << 20) + 1), encoding="utf-8")
        picker.set_input_files(file)
        shown.get_by_text("The file is too large: 4194305 bytes (limit 4194304).").wait_for()
        assert shown.locator(".ab-kinds > li").count() == 4  # what was shown stays
        assert [text for text in ours(page) if "400" not in text] == []  # the browser's own line on a refusal

    def test_what_became_of_a_damaged_file_is_shown(self, server: Server, shown: Any) -> None:
        (server.folder / FILE).write_bytes(b"no database at all" * 100)
        shown.page.evaluate("() => window.app.api.dispatchCustomEvent('execution_success', {})")
        shown.locator(".ab-hint", has_text="it is measured.sqlite3.damaged").wait_for()

    def test_many_kinds_are_shown_when_asked_for(self, server: Server, shown: Any) -> None:
        many = [entry(key(f"role {number}"), written=1.0 + number) for number in range(60)]
        posted(server, "/measured/import", document(many))
        shown.page.evaluate("() => window.app.api.dispatchCustomEvent('execution_success', {})")
        here = shown.locator(".ab-kinds").first.locator(":scope > li")
        more = shown.get_by_role("button", name="Show all 63")
        more.wait_for()
        assert here.count() == 20
        more.click()
        assert here.count() == 63

    def test_the_state_is_that_of_the_last_run(self, server: Server, shown: Any) -> None:
        page = shown.page
        load_workflow(page, workflow(backend="measured", steps=4))
        account = run_workflow(page, server)
        tuning, said = account["tuning"], words()["tuning"]
        assert tuning["kinds"] > 0
        one, several = said["kinds"].split(" | ")
        kinds = (one if tuning["kinds"] == 1 else several).format(kinds=tuning["kinds"])
        state = f"Run {account['number']}: {said[tuning['state']]}, {kinds} ("
        parts = [
            said[name].format(count=tuning[name])
            for name in ("from_store", "decided", "open", "not_tuned")
            if tuning[name]
        ]
        shown.locator("dd").first.get_by_text(state + ", ".join(parts) + ")").wait_for()
        assert shown.page.locator(".ab-run .ab-tuned").inner_text().endswith(f"({', '.join(parts)})")
        assert ours(page) == []

    @pytest.mark.parametrize("palette", ["light", "dark"])
    def test_it_looks_right_at_300_px(self, shown: Any, tmp_path: Path, palette: str) -> None:
        page, panel = shown.page, shown.page.locator(".attention-backends")
        page.evaluate("(name) => window.app.extensionManager.setting.set('Comfy.ColorPalette', name)", palette)
        panel.evaluate("panel => { panel.style.width = '300px' }")
        page.wait_for_timeout(300)
        shown.screenshot(path=keep(tmp_path, f"measured_{palette}_300.png"))
        shown.get_by_role("button", name="Delete all").click()
        page.screenshot(path=keep(tmp_path, f"measured_page_{palette}.png"))
        assert panel.evaluate("panel => panel.scrollWidth <= panel.clientWidth")
        unnamed = "section => [...section.querySelectorAll('button, summary')].filter(e => !e.innerText.trim()).length"
        assert shown.evaluate(unnamed) == 0
        shown.get_by_role("button", name="Keep").click()
        assert ours(page) == []
        assert barriers(page) == []
