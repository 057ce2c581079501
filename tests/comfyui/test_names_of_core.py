"""Every name and flag by which ComfyUI itself chooses attention is understood; read from its sources."""

from __future__ import annotations

import re

import pytest
from attention_backends.backends.config.foreign_entries import COMFYUI_FLAGS
from attention_backends.backends.config.names import RefusedBackendError, canonical
from attention_backends.backends.config.systems import row_in
from comfy_location import find_comfyui, why_no_comfyui

pytestmark = pytest.mark.comfy


def written(file: str, pattern: str) -> list[str]:
    """What a pattern finds in a source file of ComfyUI's; none where this version lacks the file."""
    folder = find_comfyui()
    if folder is None:
        pytest.skip(why_no_comfyui())
    path = folder / file
    return re.findall(pattern, path.read_text(encoding="utf-8")) if path.is_file() else []


def test_registered_functions_and_words_of_nodes_have_a_row() -> None:
    registered = written("comfy/ldm/modules/attention.py", r'register_attention_function\("(\w+)"')
    assert {"pytorch", "split", "sub_quad"} <= set(registered)
    words = written("comfy_extras/nodes_model_advanced.py", r'"([\w ]+ attention)": "')
    for name in (*registered, *words):
        row = row_in(name, "comfyui")
        assert row is not None, name
        if row.means is None:
            with pytest.raises(RefusedBackendError):
                canonical(name)
        else:
            assert canonical(name) == row.means


def test_start_up_flags_are_translated() -> None:
    flags = written("comfy/cli_args.py", r'attn_group\.add_argument\("--([\w-]+)"')
    assert len(flags) >= 4
    assert {flag.replace("-", "_") for flag in flags} <= set(COMFYUI_FLAGS)
