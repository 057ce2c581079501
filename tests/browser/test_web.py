"""The front-end files by themselves: their types, their texts, and that they stay in their place."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import make_locales
import pytest
from attention_backends.devtools.server import Server
from browser import open_comfyui, ours, why_no_browser

ROOT = Path(__file__).resolve().parents[2]
WEB = ROOT / "web"
CHECK = ROOT / "tests" / "web"
SCRIPTS = sorted(WEB.glob("*.js"))
ENGLISH = ROOT / "locales" / "en"


def words() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ENGLISH / "main.json").read_text(encoding="utf-8"))["attentionBackends"]
    return found


def leaves(book: dict[str, Any], path: str = "") -> set[str]:
    found = set()
    for name, value in book.items():
        found |= leaves(value, f"{path}{name}.") if isinstance(value, dict) else {path + name}
    return found


# A page that came over http from another machine has no other way to the clipboard.
NO_OTHER_WAY = ("dom.js", "document.execCommand")


def node_with_types(script: str) -> list[str]:
    """The command that runs a script with node, where the published types and the compiler are installed."""
    node = shutil.which("node")
    if node is None or not (CHECK / "node_modules" / "typescript" / "bin" / "tsc").is_file():
        pytest.skip("node or its packages are missing: install node and npm, then python3 dev.py test")
    return [node, str(CHECK / script)]


def test_types_are_right() -> None:
    command = [*node_with_types("node_modules/typescript/bin/tsc"), "--project", str(CHECK)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout


def test_nothing_is_used_that_the_types_call_deprecated() -> None:
    result = subprocess.run(node_with_types("deprecated.mjs"), capture_output=True, text=True, timeout=300)
    *uses, checked = result.stdout.splitlines() or [""]
    assert checked == f"{len(SCRIPTS)} scripts", result.stderr
    known = [use for use in uses if all(word in use for word in NO_OTHER_WAY)]
    assert len(known) == 1  # so the check sees what is there
    assert [use for use in uses if use not in known] == []


OLD_FRONT_END = """
import { app } from './scripts/app.js'
const [manager] = process.argv.slice(2)
if (manager !== 'none') app.extensionManager = JSON.parse(manager)
globalThis.document = {}
await import('./extensions/ours/attention.js')
const [extension] = app.registered
await extension.setup()
for (const type of ['AttentionBackendSelector', 'PerRoleAttentionConfig', 'KSampler']) {
  await extension.nodeCreated({ type, widgets: [{ name: 'backend', value: 'auto' }, { name: 'role', value: 'self' }] })
}
await extension.commands[0].function()
console.log('works')
"""


@pytest.mark.parametrize("manager", ["none", "{}", '{"setting": {}, "command": {}, "workflow": {}}'])
def test_a_front_end_without_its_manager_gets_no_error(tmp_path: Path, manager: str) -> None:
    """The nodes work without tab and settings; a TypeError in `nodeCreated` would stop them from being added."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is missing")
    (tmp_path / "scripts").mkdir()
    shutil.copytree(WEB, tmp_path / "extensions" / "ours")
    (tmp_path / "package.json").write_text('{"type": "module"}')
    (tmp_path / "scripts" / "app.js").write_text(
        "export const app = { registered: [], registerExtension(one) { this.registered.push(one) } }"
    )
    (tmp_path / "scripts" / "api.js").write_text(
        "export const api = { addEventListener() {}, apiURL: (path) => path,"
        " fetchApi: async () => ({ ok: true, json: async () => ({ environment: {}, choices: [], defaults: {} }) }) }"
    )
    (tmp_path / "start.js").write_text(OLD_FRONT_END)
    result = subprocess.run([node, "start.js", manager], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (0, "works\n"), result.stderr


def test_the_file_of_a_model_is_found(tmp_path: Path) -> None:
    """Behind patches, named connections, bypassed nodes and subgraphs: the roles of that model are offered."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is missing")
    for name in ("model_of.js", "workflow_runs.js"):
        shutil.copy(WEB / name, tmp_path)
    (tmp_path / "package.json").write_text('{"type": "module"}')
    script = (CHECK / "models.mjs").read_text(encoding="utf-8").replace("../../web/", "./")
    (tmp_path / "models.mjs").write_text(script, encoding="utf-8")
    result = subprocess.run([node, "models.mjs"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (0, "works\n"), result.stderr


def test_every_text_is_there_and_none_is_left_over() -> None:
    source = "\n".join(script.read_text(encoding="utf-8") for script in SCRIPTS)
    used = set(re.findall(r"""say\(\s*['"]([\w.]+)['"]""", source))
    # Keys that are put together: `say(done ? 'copy.done' : 'copy.failed')` and `columns.${name}`.
    used |= set(re.findall(r"""say\(\w+ \? '([\w.]+)'""", source)) | set(re.findall(r""" : '(copy\.\w+)'\)""", source))
    used |= {f"{name}.title" for name in re.findall(r"""section\(\s*['"](\w+)['"]""", source)}
    parts = set(re.findall(r"say\(`([\w.]+)\$\{", source))
    known = leaves(words())
    assert used <= known
    assert {key for key in known - used if not any(key.startswith(part) for part in parts)} == set()


def test_scripts_keep_to_themselves() -> None:
    """No globals, no prototypes of others, no text as HTML, no address outside the server."""
    forbidden = (
        r"\bwindow\.\w+\s*=[^=]", r"globalThis\.\w+\s*=[^=]", r"\.prototype\b", r"innerHTML", r"insertAdjacentHTML",
        r"\beval\(", r"new Function", r"https?://", r"document\.(body|head)", r"localStorage",
    )  # fmt: skip
    for script in SCRIPTS:
        text = script.read_text(encoding="utf-8")
        assert [pattern for pattern in forbidden if re.search(pattern, text)] == [], script.name


@pytest.mark.comfy
def test_english_repeats_the_code(server: Server) -> None:
    for name, content in make_locales.files(server).items():
        stored = json.loads((ENGLISH / name).read_text(encoding="utf-8"))
        assert stored == content, f"{name}: run python tests/make_locales.py"


@pytest.mark.comfy
def test_the_server_gives_the_texts_and_the_scripts(server: Server) -> None:
    assert server.get("/api/i18n")["en"]["attentionBackends"] == words()
    served = {path for path in server.get("/extensions") if path.startswith(f"/extensions/{ROOT.name}/")}
    assert served == {f"/extensions/{ROOT.name}/{script.name}" for script in SCRIPTS}


DEPRECATED = """
const menu = (app) => void app.canvas.getGroupMenuOptions({ getMenuOptions: () => [] })
export const use = { menu, unload: () => addEventListener('unload', () => {}), shim: () => import('/scripts/ui.js') }
"""
"""What the front end, the browser and ComfyUI's old files for packs call deprecated."""


@pytest.mark.comfy
@pytest.mark.browser
@pytest.mark.skipif(why_no_browser() is not None, reason=f"browser: {why_no_browser()}")
def test_every_browser_test_sees_what_is_deprecated(server: Server) -> None:
    with open_comfyui(server.url) as page:
        assert ours(page) == []
        page.route("**/probe.js", lambda route: route.fulfill(body=DEPRECATED, content_type="text/javascript"))
        for pack, part, count in (("x", "menu", 0), (ROOT.name, "menu", 1), (ROOT.name, "unload", 1), ("x", "shim", 1)):
            page.problems.clear()
            address = f"/extensions/{pack}/probe.js"
            page.evaluate("async ([it, part]) => { await (await import(it)).use[part](window.app) }", [address, part])
            page.wait_for_timeout(300)
            assert (len(page.problems), len(ours(page))) == (1, count), (pack, part, page.problems)
