"""The node Attention Config From Text in a real ComfyUI: files that come and go, and names that are refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from attention_backends.devtools.server import Server, WorkflowError  # noqa: E402
from server_harness import start_server  # noqa: E402
from test_server_families import NODES, branch, last_run  # noqa: E402

pytestmark = pytest.mark.comfy


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    environ = {"ATTENTION_BACKENDS_TESTS": str(Path(__file__).parent)}
    with start_server(extra_nodes=[NODES], flags=["--use-pytorch-cross-attention"], environ=environ) as running:
        yield running


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
    with pytest.raises(WorkflowError, match=r"(?s)refused the workflow: .*no configuration file"):
        run(server, tmp_path, file=name)


def test_an_error_points_at_the_line(server: Server, tmp_path: Path) -> None:
    with pytest.raises(WorkflowError, match=r"cross.*unknown attention backend 'sagee'.*\(line 3\)"):
        run(server, tmp_path, text="default: torch_sdpa\nper_role:\n  cross: sagee")
