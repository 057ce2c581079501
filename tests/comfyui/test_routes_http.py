"""What the routes under /attention_backends/ answer, asked of a real server."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from typing import Any

import pytest
from attention_backends.backends.config import AttentionConfig, AttentionSpec
from attention_backends.backends.observe.advisories import ADVISORIES, NOT_USED, note_without_advisory
from attention_backends.backends.values.reasons import TEMPLATES, Reason, known
from attention_backends.devtools.server import Server
from hook_side import nodes_module
from syrupy.assertion import SnapshotAssertion
from workflow_graphs import Graph, embedded, ksampler

pytestmark = pytest.mark.comfy
PREFIX = "/attention_backends"
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


def asked(server: Server, path: str, body: bytes | None = None, **headers: str) -> tuple[int, dict[str, Any]]:
    """Status and JSON of any answer; header names are written with underscores."""
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(f"{server.url}{PREFIX}{path}", body, sent)
    try:
        with _open(request, timeout=120) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        text = error.read()
        return error.code, json.loads(text) if text.startswith(b"{") else {"error": text.decode()}


def changed(server: Server, body: object, **headers: str) -> tuple[int, dict[str, Any]]:
    return asked(server, "/settings", json.dumps(body).encode(), **{"Content_Type": "application/json", **headers})


def per_role_workflow(steps: int = 4) -> dict[str, Any]:
    graph = Graph("")
    model, settings = embedded(graph)
    model = graph.selector(model, "torch_sdpa")
    model = graph.add("PerRoleAttentionConfig", model=model, role="cross", backend="sdpa_math", extra="")
    sampled = ksampler(graph, model, **settings, steps=steps, cfg=4.0, sampler_name="euler", scheduler="simple")
    graph.add("PreviewImage", images=graph.add("TinyShapesImage", samples=sampled, scale=2))
    return graph.nodes


def autotuned_workflow(word: str) -> dict[str, Any]:
    """A graph that names `autotune`, or its older name, in every node that has a menu of backends and in a text."""
    graph = Graph("")
    model, settings = embedded(graph)
    model = graph.add("AttentionConfigText", model=model, text=f"default: {word}", file="none", component="transformer")
    model = graph.selector(model, word)
    model = graph.add("PerRoleAttentionConfig", model=model, role="cross", backend=word, extra="")
    model = graph.add("AttentionSchedule", model=model, backend=word, when="steps", window="0-1", blocks="", role="")
    sampled = ksampler(graph, model, **settings, steps=2, cfg=4.0, sampler_name="euler", scheduler="simple")
    graph.add("PreviewImage", images=graph.add("TinyShapesImage", samples=sampled, scale=2))
    return graph.nodes


def test_a_saved_graph_may_say_autotune_or_measured(server: Server) -> None:
    for node in ("AttentionBackendSelector", "PerRoleAttentionConfig", "AttentionSchedule"):
        menu = server.get(f"/object_info/{node}")[node]["input"]["required"]["backend"]
        options = menu[1].get("options") or menu[0]
        assert (options[:2], options[-1]) == (["auto", "autotune"], "measured")
    # The settings panel offers these, and a value that it stored fills a new node only if the node's menu has it.
    assert asked(server, "/settings")[1]["choices"] == options
    for word in ("autotune", "measured"):
        server.run(autotuned_workflow(word))
        run = asked(server, "/last_run")[1]["runs"][0]
        assert {finding["asked"] for finding in run["audit"]} == {"autotune"}


@pytest.mark.parametrize("path", ["", "/export"])
def test_measured_choices_are_served_under_both_names(server: Server, path: str) -> None:
    assert asked(server, f"/autotune{path}") == asked(server, f"/measured{path}")
    assert asked(server, f"/autotune{path}")[0] == 200


def test_measured_choices_are_changed_under_both_names(server: Server) -> None:
    document = json.dumps(asked(server, "/measured/export")[1]).encode()
    for word in ("autotune", "measured"):
        assert asked(server, f"/{word}/import", document, Content_Type="application/json")[1]["taken"] >= 0
        assert asked(server, f"/{word}/clear", b"{}", Content_Type="application/json")[0] == 200


def test_the_machine_is_described_without_paths(server: Server, snapshot: SnapshotAssertion) -> None:
    status, machine = asked(server, "/machine")
    assert status == 200
    assert machine["platform"]["kind"] == "cpu"
    assert machine["platform"]["torch"]
    rows = {row["id"]: row for row in machine["backends"]}
    assert rows["torch_sdpa"]["available"]
    assert rows["cudnn_attn"]["reasons"] == snapshot
    path = machine["interpreter"]["path"]
    commands = [row["install"]["text"] for row in rows.values() if (row["install"] or {}).get("kind") == "command"]
    assert all(path in command for command in commands)
    rest = json.dumps({**machine, "interpreter": None, "backends": [{**row, "install": None} for row in rows.values()]})
    assert str(server.folder) not in rest
    assert not re.search(r"[\" ]/\w+/\w+", rest)


def test_one_backend_can_be_asked_for(server: Server, snapshot: SnapshotAssertion) -> None:
    status, answer = asked(server, "/machine?backend=CUDNN_ATTN&backend=torch_sdpa")
    assert status == 200
    assert [row["id"] for row in answer["backends"]] == ["cudnn_attn", "torch_sdpa"]
    assert asked(server, "/machine?backend=torch_spda")[0] == 400
    status, answer = asked(server, "/machine?backend=auto")
    assert status == 400
    assert answer == snapshot
    assert asked(server, "/machine?" + "&".join(["backend=torch_sdpa"] * 65))[0] == 400


def test_runs_are_listed_and_given_in_full(server: Server) -> None:
    server.run(per_role_workflow())
    status, listed = asked(server, "/runs")
    assert status == 200
    short = listed["runs"][0]
    assert short["state"] == "done"
    assert (short["calls"], short["fallbacks"]) == (32, 0)  # 4 blocks, 4 steps, self and cross
    assert {"role": "cross", "backend": "sdpa_math", "calls": 16} in short["totals"]
    assert short["nodes"] == [
        {"id": "6", "class_type": "PerRoleAttentionConfig", "backend": "sdpa_math"},
        {"id": "5", "class_type": "AttentionBackendSelector", "backend": "torch_sdpa"},
    ]
    status, answer = asked(server, f"/runs/{short['number']}")
    run = answer["run"]
    assert (status, answer["numbering"]) == (200, listed["numbering"])
    assert sum(row["calls"] for row in run["rows"]) == 32
    assert [(window["first"], window["last"]) for window in run["windows"]] == [(1, 1), (2, 2), (3, 3), (4, 4)]
    counted = [0] * len(run["rows"])
    for row, calls, milliseconds in (cell for window in run["windows"] for cell in window["cells"]):
        counted[row] += calls
        assert milliseconds > 0
    assert counted == [row["calls"] for row in run["rows"]]
    assert asked(server, "/last_run")[1]["runs"][0]["rows"] == run["rows"]


@pytest.mark.parametrize(
    ("number", "status"),
    [("999999", 404), ("-1", 400), ("1e3", 400), pytest.param("9" * 400, 400, id="400 digits-400")],
)
def test_a_wrong_number_is_refused(server: Server, number: str, status: int, snapshot: SnapshotAssertion) -> None:
    found, answer = asked(server, f"/runs/{number}")
    assert found == status
    assert answer == snapshot


def test_settings_hold_without_a_restart_and_over_one(server: Server) -> None:
    status, before = asked(server, "/settings")
    assert status == 200
    assert before["choices"][0] == "auto"
    assert before["machine"]["hub"] == {"value": False, "variable": None}
    assert asked(server, "/machine")[1]["platform"]["hub"] is False
    status, after = changed(server, {"hub": True, "log_level": "DEBUG"})
    assert (status, after["machine"]["hub"]["value"], after["machine"]["log_level"]["value"]) == (200, True, "DEBUG")
    assert asked(server, "/machine")[1]["platform"]["hub"] is True
    kept = json.loads((server.folder / "user" / "attention_backends.json").read_text(encoding="utf-8"))
    assert kept == {"hub": True, "log_level": "DEBUG", "trace": "full"}
    assert changed(server, {"hub": False, "log_level": ""})[1]["machine"]["hub"]["value"] is False


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"hub": "yes"}, 400),
        ({"hubs": True}, 400),
        ({"log_level": ["DEBUG"]}, 400),
        ({"trace": "some"}, 400),
        ([], 400),
        ({"log_level": "x" * 5000}, 413),
    ],
    ids=["hub-400", "unknown-400", "log_level-400", "trace-400", "list-400", "long-413"],
)
def test_wrong_settings_are_refused_with_the_reason(
    server: Server, body: object, status: int, snapshot: SnapshotAssertion
) -> None:
    found, answer = changed(server, body)
    assert found == status
    assert answer == snapshot


def test_other_sites_and_other_bodies_change_nothing(server: Server) -> None:
    assert changed(server, {"hub": True}, Content_Type="text/plain")[0] == 415
    assert changed(server, {"hub": True}, Sec_Fetch_Site="cross-site")[0] == 403
    assert changed(server, {"hub": True}, Origin="http://elsewhere.example")[0] == 403
    assert asked(server, "/settings", b"{nonsense", Content_Type="application/json")[0] == 400
    assert asked(server, "/settings", b"[" * 4000, Content_Type="application/json")[0] == 400
    assert asked(server, "/settings")[1]["machine"]["hub"]["value"] is False


def test_the_bug_report_names_no_path(server: Server, snapshot: SnapshotAssertion) -> None:
    with _open(f"{server.url}{PREFIX}/bug_report", timeout=120) as answer:
        text = answer.read().decode()
        assert answer.headers["Content-Type"].startswith("text/plain")
    lines = text.splitlines()
    assert next(line for line in lines if line.startswith("| cudnn_attn |")) == snapshot
    assert next(line for line in lines if "self=torch_sdpa" in line) == snapshot
    assert str(server.folder) not in text
    assert not re.search(r"(^|[\s'\"`])(~?/\w+/\w+|[A-Z]:\\)", text, re.MULTILINE)


def test_a_variable_of_the_person_wins_and_is_said(tmp_path: Any, snapshot: SnapshotAssertion) -> None:
    MachineSettings = nodes_module("http.machine_settings").MachineSettings

    environ = {"ATTENTION_BACKENDS_HUB": "0", "DIFFUSION_ATTENTION_BACKEND": "sage_attn"}
    settings = MachineSettings(tmp_path, environ)
    assert settings.as_dict()["hub"]["variable"] == "ATTENTION_BACKENDS_HUB"
    assert settings.defaults_from_environment() == {"DIFFUSION_ATTENTION_BACKEND": "sage_attn"}
    with pytest.raises(PermissionError) as caught:
        settings.change({"hub": True})
    assert str(caught.value) == snapshot
    settings.change({"log_level": ""})
    assert environ["ATTENTION_BACKENDS_HUB"] == "0"


def test_a_damaged_file_is_as_none(tmp_path: Any) -> None:
    settings = nodes_module("http.machine_settings")

    (tmp_path / "attention_backends.json").write_text("{'hub'", encoding="utf-8")
    assert settings.MachineSettings(tmp_path, {}).stored == settings.UNSET


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("ImportError: /home/ann/venv/lib/x.so: undefined symbol", "ImportError: .../x.so: undefined symbol"),
        (r"in C:\Users\Ann Smith\venv\x.pyd, line 3", "in .../x.pyd, line 3"),
        (r"\\nas\share\models\a.safetensors", ".../a.safetensors"),
        ("see https://github.com/org/name/issues/1", "see https://github.com/org/name/issues/1"),
        ("self/cross and 1/2, 8.0-8.7", "self/cross and 1/2, 8.0-8.7"),
        ('File "/srv/Ann Smith/c.py", line 1', 'File ".../c.py", line 1'),
        ("said '/s' and \"x\"", "said '.../s' and \"x\""),
        ("cannot write /home/alice", "cannot write ~"),
        ("cannot write /home/alice: full", "cannot write ~: full"),
        (r"cannot write C:\Users\Alice Smith", "cannot write ~"),
        ("in /home/alice doe/lib/x.so: gone", "in .../x.so: gone"),
        ("file:///mnt/data/alice/x", ".../x"),
        ("path:/home/alice/x/y", "path:.../y"),
        ("~alice/lib/x", ".../x"),
        ("from https://alice:secret@host/simple", "from https://host/simple"),
    ],
)  # fmt: skip
def test_paths_are_cut_to_their_last_part(text: str, shown: str) -> None:
    from attention_backends.backends.values.privacy import without_paths

    assert without_paths(text) == shown


def test_what_is_not_counted_or_offered_has_words_in_every_language() -> None:
    answers, roles = nodes_module("http.answers"), nodes_module("hook.roles")
    named = {family.bypass for family in roles.FAMILIES if family.bypass}
    for text in (*named, *(f"{text}; {roles.CONTROLNETS}" for text in named), roles.CONTROLNETS):
        found = answers.bypass_reason(text)
        assert (str(found), bool(answers.phrases_of([found]))) == (text, True)
    assert answers.phrases_of([answers.bypass_reason("the layers of a new model")]) == {}
    for row in ADVISORIES:
        assert isinstance(known(row.what, "offer."), Reason)
        assert isinstance(known(row.reason, "offer.why."), Reason)
    assert TEMPLATES["offer"].endswith(NOT_USED)
    layers = (AttentionConfig(default=AttentionSpec("sage_attn")),)
    assert all(isinstance(note_without_advisory(family, layers), Reason) for family in ("", "hunyuan_video"))
