"""What a script's prompt may hold in place of a value: refused before anything runs, with a sentence, or the default.

ComfyUI's own check of a prompt is run on each of our nodes in this process; where it accepts what is wrong, the node
is run with it.
"""

from __future__ import annotations

import asyncio
import copy
import importlib
import math
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from syrupy.assertion import SnapshotAssertion

torch = pytest.importorskip("torch", reason="torch is not installed")

import tiny_sampling  # noqa: E402
from hook_side import nodes_module, plain_comfyui  # noqa: E402

pytestmark = pytest.mark.comfy

NODES = {
    "AttentionBackendSelector": "configure.selector",
    "PerRoleAttentionConfig": "configure.per_role",
    "AttentionSchedule": "configure.schedule",
    "AttentionConfigText": "configure.config_text",
    "AttentionOverGPUs": "configure.over_gpus",
    "AttentionReport": "report.report",
    "AttentionRecord": "report.record",
    "AttentionCompare": "compare.compare",
    "AttentionComparison": "compare.comparison",
    "AttentionBenchmark": "compare.benchmark",
    "TinyShapesCaption": "demo",
    "TinyShapesImage": "demo",
}
SLOW = ("AttentionCompare", "AttentionBenchmark")
"""Accepted ones of these are not run here."""
TYPES = ("MODEL", "LATENT", "IMAGE", "NOISE", "SAMPLER", "SIGMAS", "GUIDER", "CONDITIONING", "VAE", "CLIP_VISION",
         "STRING", "COMBO", "INT", "BOOLEAN", "FLOAT")  # fmt: skip
HOSTILE: dict[str, Any] = {
    "null": None,
    "text": "nonsense",
    "the text None": "None",
    "a NUL": "a\0b",
    "a long text": "x" * 100_000,
    "nothing": "",
    "a number": 3,
    "a negative number": -1,
    "a fraction": 1.5,
    "nan": math.nan,
    "infinity": math.inf,
    "a number of 4000 digits": 10**4000,
    "true": True,
    "a mapping": {"a": 1},
    "an empty mapping": {},
    "a list in a mapping": {"__value__": ["a", "b"]},
    "null in a mapping": {"__value__": None},
    "three of a list": [1, 2, 3],
    "an empty list": [],
    "a long text of digits": "9" * 5000,
}


class Source:
    """A node with an output of each type."""

    RETURN_TYPES = TYPES

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}}


@pytest.fixture(autouse=True)
def _comfy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plain_comfyui(monkeypatch)
    import folder_paths

    comfy_nodes = importlib.import_module("nodes")

    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path))
    drawn = (torch.zeros(1, 8, 8, 3), "table")
    monkeypatch.setattr(nodes_module("compare.comparison"), "draw", lambda *_: drawn)  # seconds, and not about inputs
    known = {**comfy_nodes.NODE_CLASS_MAPPINGS, "Source": Source, **{name: class_of(name) for name in NODES}}
    monkeypatch.setattr(comfy_nodes, "NODE_CLASS_MAPPINGS", known)


def class_of(name: str) -> Any:
    return getattr(nodes_module(NODES[name]), name)


@lru_cache(maxsize=1)
def model() -> Any:
    return tiny_sampling.build("wan")


@pytest.fixture(scope="module", autouse=True)
def _no_model_left() -> Iterator[None]:
    yield
    model.cache_clear()


def widgets_and_sockets(name: str, groups: tuple[str, ...] = ("required", "optional")) -> dict[str, Any]:
    """A whole prompt's inputs: defaults, and connections."""
    found: dict[str, Any] = {}
    for group in groups:
        for key, (kind, *more) in class_of(name).INPUT_TYPES().get(group, {}).items():
            said = more[0] if more else {}
            if kind in TYPES[:10] or kind.startswith("COMFY_MATCHTYPE"):
                found[key] = ["source", TYPES.index(kind) if kind in TYPES else 2]
            else:
                options = said.get("options") or [""]
                found[key] = said.get("default", options[0] if kind == "COMBO" else "")
    return found


def checked(name: str, inputs: dict[str, Any]) -> tuple[bool, list[dict[str, Any]], dict[str, Any]]:
    """What ComfyUI says of such a prompt, and the inputs as they are then."""
    import execution

    prompt = {
        "source": {"class_type": "Source", "inputs": {}},
        "node": {"class_type": name, "inputs": copy.deepcopy(inputs)},
    }
    valid, errors, _ = asyncio.run(execution.validate_inputs("p", prompt, "node", {}))
    return valid, errors, prompt["node"]["inputs"]


def run(name: str, inputs: dict[str, Any]) -> None:
    """Run the node with what ComfyUI would hand it."""
    import comfy_api.latest

    picture = torch.zeros(1, 8, 8, 3)
    values: dict[str, Any] = {
        "MODEL": model(), "LATENT": {"samples": torch.zeros(1, 16, 1, 4, 4)}, "IMAGE": picture, "STRING": "",
    }  # fmt: skip
    given = {
        key: values[TYPES[value[1]]] if isinstance(value, list) and value[:1] == ["source"] else value
        for key, value in inputs.items()
    }
    node = class_of(name)
    prompt = {"node": {"class_type": name, "inputs": {}}}
    hidden = comfy_api.latest.io.HiddenHolder(
        unique_id="node", prompt=prompt, extra_pnginfo={}, dynprompt=None, auth_token_comfy_org=None,
        api_key_comfy_org=None, **({"comfy_usage_source": None} if "comfy_usage_source" in _hidden_names() else {}),
    )  # fmt: skip
    clone = type(name, (node,), {"hidden": hidden})
    with torch.inference_mode():
        clone.execute(**given)


def _hidden_names() -> tuple[str, ...]:
    import inspect

    import comfy_api.latest

    return tuple(inspect.signature(comfy_api.latest.io.HiddenHolder).parameters)


@pytest.mark.parametrize("name", NODES)
def test_defaults_and_required_inputs_alone_are_accepted(name: str) -> None:
    whole = widgets_and_sockets(name)
    if name == "AttentionCompare":
        few = {**widgets_and_sockets(name, ("required",)), "guider": ["source", TYPES.index("GUIDER")]}
    elif name == "AttentionComparison":
        few = {name: ["source", TYPES.index("IMAGE")] for name in ("image_1", "image_2")}
    else:
        few = widgets_and_sockets(name, ("required",))
    for inputs in (whole, few):
        valid, errors, after = checked(name, inputs)
        assert valid, errors
        if name not in SLOW:
            run(name, after)


OPTIONAL = {
    "AttentionBackendSelector": ["recommended", "model_2", "extra"],
    "PerRoleAttentionConfig": ["extra"],
    "AttentionSchedule": ["blocks", "role", "extra"],
    "AttentionConfigText": ["file", "component"],
}


@pytest.mark.parametrize("name", OPTIONAL)
def test_what_may_be_left_out_is_optional_and_stands_last(name: str) -> None:
    """So the order of the inputs is the one that saved workflows have."""
    schema = class_of(name).define_schema()
    order = [one.id for one in schema.inputs]
    assert list(class_of(name).INPUT_TYPES()["optional"]) == OPTIONAL[name] == order[-len(OPTIONAL[name]) :]
    run(name, {**widgets_and_sockets(name, ("required",)), **({"text": "fa"} if name == "AttentionConfigText" else {})})


@pytest.mark.parametrize("wrong", HOSTILE)
@pytest.mark.parametrize("name", NODES)
def test_a_wrong_value_is_refused_in_words_or_means_the_default(name: str, wrong: str) -> None:
    whole = widgets_and_sockets(name)
    for key in whole:
        inputs = {**whole, key: HOSTILE[wrong]}
        valid, errors, after = checked(name, inputs)
        if valid and name not in SLOW and key != "text":  # a configuration is read where it may take its time
            run(name, after)
        for error in errors:
            assert "exception" not in error["type"], error
            if error["type"] == "custom_validation_failed":
                assert len(error["details"]) < 3000
        sockets = isinstance(whole[key], list)
        assert not valid or not sockets or wrong in ("null", "null in a mapping"), "a value is no connection"


def ours(error: dict[str, Any]) -> str:
    """What our node says; ComfyUI puts the name of an input before it."""
    return str(error["details"]).partition(" - ")[2]


@pytest.mark.parametrize("name", NODES)
def test_a_required_socket_that_is_null_is_named(name: str, snapshot: SnapshotAssertion) -> None:
    whole = widgets_and_sockets(name)
    required = class_of(name).INPUT_TYPES()["required"]
    for key in (key for key, value in whole.items() if isinstance(value, list) and key in required):
        valid, errors, _ = checked(name, {**whole, key: None})
        assert not valid
        said = [ours(error) for error in errors if f"{key} is not connected" in error["details"]]
        assert [text.rpartition(" ")[0] for text in said[:1]] == snapshot(name=key)  # the last word is ComfyUI's


@pytest.mark.parametrize("name", ["AttentionBackendSelector", "PerRoleAttentionConfig", "AttentionSchedule"])
def test_no_backend_is_refused_with_what_to_write(name: str, snapshot: SnapshotAssertion) -> None:
    valid, errors, _ = checked(name, {**widgets_and_sockets(name), "backend": None})
    assert not valid
    what, _, names = ours(errors[0]).partition(" one of: ")
    assert what == snapshot
    assert names.startswith("auto, autotune, torch_sdpa")
    assert checked(name, {**widgets_and_sockets(name), "backend": ["source", TYPES.index("COMBO")]})[0]


BEFORE_QUEUEING = {
    "topk=1.5": "topk 1.5 > 1",
    "topk=-0.1": "topk -0.1 <",
    '{"topk": "half"}': "topk must be a number",
    "top_k=0.5": "did you mean topk?",
    "topk=0.5 sparsity_ratio=0.5": "topk and sparsity_ratio",
    "block_size=32": "must be 64, not 32",
    '{"topk": [0.5, 2]}': "topk 2 > 1",
    "half": "extra: ",
}


@pytest.mark.parametrize("name", ["AttentionBackendSelector", "PerRoleAttentionConfig", "AttentionSchedule"])
def test_wrong_options_are_refused_before_queueing_with_what_is_allowed(name: str) -> None:
    whole = {**widgets_and_sockets(name), "backend": "sparge_attn", "strict": False, "when": "steps", "window": "1-"}
    whole = {key: value for key, value in whole.items() if key in class_of(name).INPUT_TYPES()["required"]}
    for extra, said in BEFORE_QUEUEING.items():
        valid, errors, _ = checked(name, {**whole, "extra": extra})
        assert not valid, extra
        assert said in ours(errors[0]), extra
    assert said in ours(checked(name, {**whole, "backend": ["source", TYPES.index("COMBO")], "extra": extra})[1][0])
    inputs = nodes_module("inputs")
    for stray in (False, 0, 1.5, "randomize", "null"):  # what other packs store behind our widgets
        assert checked(name, {**whole, "extra": stray})[0], stray
        assert len(inputs.about_options(str(stray))) == 1
    assert not any(inputs.about_options(text) for text in ("", "None", "topk=0.5", "half"))
    tooltip = class_of(name).INPUT_TYPES()["optional"]["extra"][1]["tooltip"]
    example = tooltip.rpartition(": ")[2]
    assert checked(name, {**whole, "backend": "video_sparse_attn", "extra": example})[0]
    assert not checked(name, {**whole, "backend": "auto", "extra": example})[0]


def test_a_wrong_type_that_is_connected_is_refused_as_comfyui_refuses_it() -> None:
    for name in NODES:
        whole = widgets_and_sockets(name)
        for key, value in whole.items():
            if isinstance(value, list) and key != "value":
                other = TYPES.index("NOISE" if TYPES[value[1]] != "NOISE" else "VAE")
                valid, errors, _ = checked(name, {**whole, key: ["source", other]})
                assert not valid, (name, key)
                assert f"{key} takes {TYPES[value[1]]}, and {TYPES[other]} is connected to it" in errors[0]["details"]
