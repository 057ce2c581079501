"""Attention Over GPUs: the node, and where the hook switches it off. The division itself: test_local_cards.py."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import tiny_sampling  # noqa: E402
from attention_backends.backends.config import AttentionConfig, AttentionSpec  # noqa: E402
from attention_backends.backends.config.text import parse_config  # noqa: E402
from card_workers import reasons_off, second_worker  # noqa: E402
from hook_side import Outcome, exact, host, nodes_module, plain_comfyui, selected  # noqa: E402


def over_gpus() -> Any:
    return host.Override((AttentionConfig(AttentionSpec("torch_sdpa"), source="node", cards=("all",)),))


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    second_worker(monkeypatch)


def test_a_model_on_the_cpu_stays_there() -> None:
    outcome = Outcome(over_gpus())
    assert reasons_off(outcome.notes) == ["cards.device"]


@pytest.mark.usefixtures("here")
def test_a_run_takes_the_other_cards() -> None:
    outcome = Outcome(over_gpus())
    assert reasons_off(outcome.notes) == []
    assert list(outcome.run.run_report.cards) == ["cuda:1"]


@pytest.mark.usefixtures("here")
def test_cores_split_switches_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    import hook_side

    def in_a_split(model: Any, options: dict[str, Any], body: Any) -> Any:
        return plain(model, {**options, "multigpu_thread_device": torch.device("cuda", 1)}, body)

    plain = hook_side.model_call
    monkeypatch.setattr(hook_side, "model_call", in_a_split)
    assert reasons_off(Outcome(over_gpus()).notes) == ["cards.core"]


@pytest.mark.usefixtures("here")
def test_a_compiled_model_switches_it_off() -> None:
    class Compiled(Outcome):
        def _forward(self) -> None:
            (query, key, value, heads), _ = self.calls[0]
            self.outputs = [
                self.run.override.run_compiled(None, -1, False, exact, (query, key, value), {"heads": heads})
            ]

    assert reasons_off(Compiled(over_gpus()).notes) == ["cards.compiled"]


@pytest.mark.comfy
def test_the_node_stacks_and_the_last_one_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    plain_comfyui(monkeypatch)
    node, patch = nodes_module("configure.over_gpus").AttentionOverGPUs, nodes_module("hook.patch")
    model = tiny_sampling.build("wan")
    for devices, cards in (("all", ("all",)), ("cuda:1", ("cuda:1",)), (" ", ("all",)), ("off", ())):
        model = node.execute(model, devices).args[0]
        assert patch.current_config(model).cards == cards
    model = selected(node.execute(model, "0, 1").args[0], "sdpa_math")
    assert patch.current_config(model).cards == ("cuda:0", "cuda:1")
    model = patch.set_config(model, parse_config("accuracy=exact", "text"))
    assert patch.current_config(model).cards == ("cuda:0", "cuda:1")
    model = patch.set_config(model, parse_config({"cards": "cuda:3"}, "text"))
    config = patch.current_config(model)
    assert (config.default.backend, config.cards) == ("sdpa_math", ("cuda:3",))


@pytest.mark.comfy
def test_a_wrong_name_is_refused_before_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    plain_comfyui(monkeypatch)
    node = nodes_module("configure.over_gpus").AttentionOverGPUs
    link = {"model": "MODEL"}
    assert node.validate_inputs(devices="cuda:0, cuda:1", input_types=link) is True
    assert node.validate_inputs(devices="", input_types=link) is True
    assert node.validate_inputs(input_types={**link, "devices": "STRING"}) is True
    wrong = node.validate_inputs(devices="gpu 1", input_types=link)
    assert str(wrong).startswith("devices: gpu is not ")
