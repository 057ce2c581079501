"""The node Attention Config From Text in a real ComfyUI: files that come and go, names that are refused, and a
stranger's workflow, whose hostile texts end with the documented error while the server goes on.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from syrupy.assertion import SnapshotAssertion

torch = pytest.importorskip("torch", reason="torch is not installed")

from attention_backends.devtools.server import Server, WorkflowError  # noqa: E402
from hostile_texts import TEXTS, products  # noqa: E402
from test_bad_input import without_names  # noqa: E402
from test_server_families import branch, last_run  # noqa: E402

pytestmark = pytest.mark.comfy


@pytest.fixture(scope="module")
def server(tiny_models_server: Server) -> Server:
    return tiny_models_server


def run(server: Server, tmp_path: Path, **inputs: Any) -> set[tuple[str, str]]:
    """Samples with the node and returns which backend ran for each role."""
    inputs = {"model": ["tiny", 0], "text": "", "file": "none", "component": "transformer", **inputs}
    graph = {
        "tiny": {"class_type": "TinyModel", "inputs": {"family": "wan"}},
        "text": {"class_type": "AttentionConfigText", "inputs": inputs},
    }
    server.run(graph | branch(("text", 0), "wan", tmp_path / "kept.pt"))
    return {(row["role"], row["backend"]) for row in last_run(server)["rows"]}


def test_text_and_files_decide_and_an_edited_file_is_read_again(server: Server, tmp_path: Path) -> None:
    text = "vllm serve x --diffusion-attention-backend TORCH_SDPA \\\n -dac.per_role.cross.backend _native_math"
    assert run(server, tmp_path, text=text) == {("self", "torch_sdpa"), ("cross", "sdpa_math")}
    folder = server.folder / "user" / "default" / "attention_backends"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mine.yaml").write_text("default: sdpa_math\n")  # after the page was loaded
    offered = server.get("/object_info/AttentionConfigText")["AttentionConfigText"]["input"]["optional"]["file"]
    assert "mine.yaml" in (offered[1].get("options") or offered[0])
    assert run(server, tmp_path, file="mine.yaml") == {("self", "sdpa_math"), ("cross", "sdpa_math")}
    (folder / "mine.yaml").write_text("default: torch_sdpa\n")
    assert run(server, tmp_path, file="mine.yaml") == {("self", "torch_sdpa"), ("cross", "torch_sdpa")}


@pytest.mark.parametrize("name", ["../secret.json", "/etc/passwd", "gone.yaml"])
def test_a_name_that_is_not_in_the_folder_is_refused_before_anything_runs(
    server: Server, tmp_path: Path, name: str
) -> None:
    folder = server.folder / "user" / "default" / "attention_backends"
    folder.mkdir(parents=True, exist_ok=True)
    (folder.parent / "secret.json").write_text('{"sesame": 1}')
    with pytest.raises(WorkflowError, match="no configuration file") as caught:
        run(server, tmp_path, file=name)
    assert "refused the workflow" in str(caught.value)


def test_an_error_names_its_entry(server: Server, tmp_path: Path, snapshot: SnapshotAssertion) -> None:
    with pytest.raises(WorkflowError) as caught:
        run(server, tmp_path, text="default: torch_sdpa\nper_role:\n  cross: sagee")
    assert without_names(caught.value).splitlines()[:2] == snapshot  # refused before anything runs


ERRORS = {
    "YAML: many merge keys": "merge keys (<<) are not read; write the entries out",
    "YAML: aliases": "more than 10000 entries: no configuration has that many",
    "YAML: brackets": "nested too deeply",
    "JSON: one key in few": "'a' is given twice",
    "JSON: long roles": "a role of 400000 characters > 200",
    "flags: variables inside one another": "nested too deeply",
    "schedule: a name that is tried everywhere": "blocks: more than 1000 characters",
}
MOST_CHECKED = 8192
"""Longest text that is read before the graph runs."""
MOST_SECONDS = 5.0
"""CPU seconds of the server for one such prompt, ComfyUI's own work and the questions in between included."""


def graph(tmp_path: Path, kind: str, **inputs: Any) -> dict[str, Any]:
    nodes = {
        "tiny": {"class_type": "TinyModel", "inputs": {"family": "wan"}},
        "ours": {"class_type": kind, "inputs": {"model": ["tiny", 0], **inputs}},
    }
    return nodes | branch(("ours", 0), "wan", tmp_path / "kept.pt")


def cpu_seconds(server: Server) -> float:
    """What the server has used so far; 0 where the system does not say."""
    try:
        fields = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def failure(server: Server, nodes: dict[str, Any]) -> str:
    """The error that a prompt ends with; the server is asked for its queue meanwhile."""
    before = cpu_seconds(server)
    with pytest.raises(WorkflowError) as caught:
        server.wait(server.queue(nodes), timeout=60, tick=lambda _: server.get("/queue"))
    assert cpu_seconds(server) - before < MOST_SECONDS
    return str(caught.value)


def test_hostile_texts_end_with_the_documented_error(server: Server, tmp_path: Path) -> None:
    texts = {name: (TEXTS[name](), said) for name, said in ERRORS.items()}
    texts["a record"] = (json.dumps(products()["runs"]), "stand for more than 50000 calls")
    for name, (text, said) in texts.items():
        error = failure(server, graph(tmp_path, "AttentionConfigText", text=text)).splitlines()
        refused = len(text) <= MOST_CHECKED  # before anything runs
        line = error[1] if refused else error[0]
        assert line.startswith("node ours (AttentionConfigText)" if refused else "AttentionConfigText: "), name
        assert said in line, name
        assert len(line) < 3000, name
    prompt_id = server.queue(graph(tmp_path, "AttentionConfigText", text=TEXTS["JSON: long roles"]()))
    server.post("/interrupt", {})  # answered while the text is read, or just after
    with pytest.raises(WorkflowError, match=r"interrupted|a role of"):
        server.wait(prompt_id, timeout=60)
    server.run(graph(tmp_path, "AttentionConfigText", text="sdpa_math"))
    assert {row["backend"] for row in last_run(server)["rows"]} == {"sdpa_math"}


def test_null_is_refused_before_anything_runs(server: Server, tmp_path: Path, snapshot: SnapshotAssertion) -> None:
    settings = {"accuracy": "exact", "strict": False, "guard": "off"}
    with pytest.raises(WorkflowError) as caught:
        server.run(graph(tmp_path, "AttentionBackendSelector", backend=None, **settings))
    assert "refused the workflow" in str(caught.value)
    said, _, names = str(caught.value).partition(" - ")[2].partition(" one of: ")
    assert said == snapshot
    assert names
    nodes = graph(tmp_path, "AttentionBackendSelector", backend="auto", **settings)
    nodes["ours"]["inputs"]["model"] = None
    with pytest.raises(WorkflowError, match="model is not connected"):
        server.run(nodes)


def test_required_inputs_alone_are_enough(server: Server, tmp_path: Path) -> None:
    server.run(graph(tmp_path, "PerRoleAttentionConfig", role="cross", backend="sdpa_math"))
    rows = {(row["role"], row["backend"]) for row in last_run(server)["rows"]}
    assert rows == {("self", "torch_sdpa"), ("cross", "sdpa_math")}
    server.run(graph(tmp_path, "AttentionSchedule", backend="sdpa_math", when="steps", window="0"))
    assert "sdpa_math" in {row["backend"] for row in last_run(server)["rows"]}
