"""What a server was started with is read, reported, and what `comfy` means; `auto` says what it changes there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from syrupy.assertion import SnapshotAssertion

pytest.importorskip("torch", reason="torch is not installed")

from comfy_location import find_comfyui, why_no_comfyui

pytestmark = pytest.mark.comfy

EXPECTED = {
    "--use-sage-attention": ("attention_sage", "quantized", "sage_attn", ["sageattention"]),
    "--use-flash-attention": ("attention_flash", "exact", None, ["flash_attn"]),
    "--use-ck-attention": ("attention_comfy_kitchen_int8", "quantized", "comfy_kitchen_int8", ["comfy_kitchen"]),
    "--use-split-cross-attention": ("attention_split", "exact", None, []),
    "--use-quad-cross-attention": ("attention_sub_quad", "exact", None, []),
    "--use-pytorch-cross-attention": ("attention_pytorch", "exact", None, []),
}


@pytest.fixture(scope="module")
def servers() -> dict[str, Any]:
    folder = find_comfyui()
    if folder is None:
        pytest.skip(why_no_comfyui())
    program = Path(__file__).parents[1] / "server_flags.py"
    done = subprocess.run(
        [sys.executable, str(program), str(folder)], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("flag", EXPECTED)
def test_each_flag_is_read_and_meant_by_comfy(servers: dict[str, Any], flag: str, snapshot: SnapshotAssertion) -> None:
    if flag not in servers:
        pytest.skip("this ComfyUI has no such flag")
    function, accuracy, called, used = EXPECTED[flag]
    found = servers[flag]
    assert (found["function"], found["flag"], found["accuracy"]) == (function, flag, accuracy)
    assert found["stock"] == used
    assert found["comfy"] == {
        "used": used, "backend": "comfy", "member": called, "guarded": accuracy != "exact", "equal": True, "notes": [],
    }  # fmt: skip
    auto = found["auto"]
    assert (auto["used"], auto["backend"], auto["member"], auto["guarded"]) == ([], "torch_sdpa", None, False)
    if accuracy == "exact":
        assert auto["notes"] == []
        assert found["changed"] == ""
    else:
        assert auto["notes"] == [found["changed"]]
        assert f"{called} ({function}, {flag})" in found["changed"]
        assert accuracy in found["changed"]
        assert found["changed"] == snapshot


def test_an_upcast_is_forced_where_comfyui_forces_it(servers: dict[str, Any]) -> None:
    """By --force-upcast-attention for float16; by a model; by nobody after --dont-upcast-attention."""
    forced, forbidden, neither = servers["upcast"]
    assert forced == [True, True, True, False]
    assert forbidden == [False, False, False, False]
    assert neither == [False, True, True, False]
