"""ComfyUI's MultiGPU CFG Split, the real node: each card of it has its own sessions, rows, guard and record.

Its list of devices is replaced by `cpu` and `cpu:0`, which ComfyUI tells apart and a tensor does not. Each of the two
prompts of a step is then computed in another thread, with another copy of the model.
"""

from __future__ import annotations

import ast
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import tiny_sampling  # noqa: E402
from attention_backends.backends.cards import over  # noqa: E402
from attention_backends.backends.config.record_reader import read  # noqa: E402
from attention_backends.backends.config.text import parse_config  # noqa: E402
from attention_backends.backends.engine.router import Router  # noqa: E402
from attention_backends.backends.kernels import BACKENDS  # noqa: E402
from attention_backends.backends.kernels.registry import detect  # noqa: E402
from attention_backends.backends.observe.guard import Guard  # noqa: E402
from attention_backends.backends.observe.replay.record import as_record  # noqa: E402
from attention_backends.backends.values.errors import ConfigError, NoBackendError  # noqa: E402
from attention_backends.backends.values.reasons import Reason  # noqa: E402
from attention_backends.comparison import replay_command  # noqa: E402
from guarded_runs import LOSSY, Lossy, sdpa  # noqa: E402
from hook_side import (  # noqa: E402
    Kernel,
    comfyui,
    last_run,
    marks_left,
    no_environment,
    nodes_module,
    pass_masks_on,
    sampling,
    selected,
    sites,
)

pytestmark = pytest.mark.comfy
FAMILY = "wan"
CARDS = ("cpu", "cpu:0")
COPIES: list[Any] = []
"""The copies of the model on the other card that a test has made."""
RECORDS: list[str] = []
"""That of `two_kernels`, which is made once."""
Rows = dict[tuple[str, str, str], int]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model of a stock loader: the node loads its copies again from the file."""
    comfyui()
    pytest.importorskip("comfy.multigpu", reason="this ComfyUI has no MultiGPU CFG Split")
    import comfy.sd

    path: Path = tmp_path_factory.mktemp("models") / "wan.safetensors"
    tiny_sampling.save(tiny_sampling.build(FAMILY), FAMILY, path)
    return comfy.sd.load_diffusion_model(str(path))


@pytest.fixture
def model(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The model on a computer with two cards; at the end of the test nothing of ours is on it or on its copy."""
    import comfy.model_management

    no_environment(monkeypatch)
    devices = [torch.device("cpu"), torch.device("cpu", 0)]
    monkeypatch.setattr(comfy.model_management, "get_all_torch_devices", lambda exclude_current=False: devices)
    entries = comfy.model_management.loaded_models
    # The node of ComfyUI 0.33 fails where the patcher of a loaded model is gone, as those of the tests before are.
    alive = lambda **kwargs: [one for one in entries(**kwargs) if one is not None]  # noqa: E731
    monkeypatch.setattr(comfy.model_management, "loaded_models", alive)
    COPIES.clear()
    yield loaded
    for one in (loaded, *COPIES):
        assert marks_left(one.model.diffusion_model) == []


def divided(model: Any) -> Any:
    from comfy_extras.nodes_multigpu import MultiGPUCFGSplitNode

    made = MultiGPUCFGSplitNode.execute(model, 2).args[0]
    COPIES.extend(made.get_additional_models_with_key("multigpu"))
    assert len(COPIES)
    return made


def sampled(model: Any, steps: int = 2) -> torch.Tensor:
    return tiny_sampling.sample(model, FAMILY, steps=steps)


def configured(model: Any, config: Any) -> Any:
    return nodes_module("hook.patch").set_config(model, parse_config(config, "text", read_files=False))


def rows(run: dict[str, Any]) -> Rows:
    """(card, role, backend) -> calls."""
    found: Rows = {}
    for row in run["rows"]:
        key = row.get("card", ""), row["role"], row["backend"]
        found[key] = found.get(key, 0) + row["calls"]
    return found


def each(role_and_backend: dict[tuple[str, str], int], cards: tuple[str, ...] = CARDS) -> Rows:
    return {(card, *key): calls for card in cards for key, calls in role_and_backend.items()}


def of_card(found: Rows, wanted: str) -> dict[tuple[str, str], int]:
    return {(role, backend): calls for (card, role, backend), calls in found.items() if card == wanted}


def card_of_call() -> str:
    """The card on which the calling thread's model call is."""
    name: str = sites.current_model_call().run.run_report.card
    return name


def kernels(monkeypatch: pytest.MonkeyPatch, **replaced: Any) -> None:
    router = Router(detect(torch.device("cpu")), {**BACKENDS, **replaced})
    monkeypatch.setattr(sampling, "router_for", lambda device: router)


def test_each_card_has_its_rows_and_the_result_is_comfyuis_own(model: Any) -> None:
    stock = sampled(divided(model))
    ours = sampled(selected(divided(model), "torch_sdpa"))  # in either order
    assert torch.equal(ours, stock)
    after = rows(last_run())
    ours = sampled(divided(selected(model, "torch_sdpa")))
    assert torch.equal(ours, stock)
    run = last_run()
    assert rows(run) == after
    # 2 steps, 2 blocks, and each card computes one of the two prompts
    assert rows(run) == each({("self", "torch_sdpa"): 4, ("cross", "torch_sdpa"): 4})
    assert run["notes"] == ["cpu: torch_sdpa 8 calls", "cpu:0: torch_sdpa 8 calls"]
    assert {finding["role"]: finding["ran"] for finding in run["audit"]} == {
        "self": {"torch_sdpa": 8}, "cross": {"torch_sdpa": 8}
    }  # fmt: skip
    (found,) = [nodes_module("history.runs").find(run["number"])]
    calls: dict[tuple[int, str], int] = {}
    for window in found["windows"]:
        assert window["steps"][0] == window["steps"][1]
        for row, number, *_ in window["cells"]:
            key = window["steps"][0], found["rows"][row]["card"]
            calls[key] = calls.get(key, 0) + number
    assert calls == {(step, card): 4 for step in range(2) for card in CARDS}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd3", "ltxv", "ltxv_guide", "kandinsky5", "hunyuan_video15", "wan_i2v"])
def test_other_families_give_comfyuis_own_result(
    family: str, tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.sd

    pass_masks_on(monkeypatch)  # shortened calls add up in another order
    path = tmp_path / "model.safetensors"
    tiny_sampling.save(tiny_sampling.build(family), family, path)
    other = comfy.sd.load_diffusion_model(str(path))
    stock = tiny_sampling.sample(divided(other), family, cfg=3.0)
    assert torch.equal(tiny_sampling.sample(divided(selected(other, "torch_sdpa")), family, cfg=3.0), stock)
    found = rows(last_run())
    assert {card for card, *_ in found} == set(CARDS)
    assert of_card(found, "cpu") == of_card(found, "cpu:0")


def test_the_table_names_the_cards(model: Any) -> None:
    sampled(divided(selected(model, "torch_sdpa")), steps=1)
    report = nodes_module("report.report")
    lines = report.as_text({"run": last_run()}).splitlines()
    assert [line.split()[:4] for line in lines if line.startswith("self")] == [
        ["self,", card, "torch_sdpa", "none"] for card in CARDS
    ]
    pictured = nodes_module("report.report_picture").table(last_run()["rows"])
    assert {row[0] for row in pictured} == {f"{role}, {card}" for role in ("self", "cross") for card in CARDS}


def test_on_one_card_no_card_is_named(model: Any) -> None:
    stock, ours = sampled(model, steps=1), sampled(selected(model, "torch_sdpa"), steps=1)
    assert torch.equal(ours, stock)
    run = last_run()
    assert rows(run) == each({("self", "torch_sdpa"): 2, ("cross", "torch_sdpa"): 2}, ("",))
    assert run["notes"] == []
    assert not {"card", "cards"} & record()["runs"][0].keys()


def test_a_kernel_that_fails_on_one_card_is_used_on_the_other(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(call: Any) -> torch.Tensor:
        if card_of_call() == "cpu:0":
            raise ValueError("as it should")
        return sdpa(call)

    kernels(monkeypatch, sdpa_math=Kernel("sdpa_math", kernel))
    sampled(divided(selected(model, "sdpa_math")))
    run = last_run()
    assert rows(run) == {
        **each({("self", "sdpa_math"): 4, ("cross", "sdpa_math"): 4}, ("cpu",)),
        **each({("self", "torch_sdpa"): 4, ("cross", "torch_sdpa"): 4}, ("cpu:0",)),
    }
    assert {row["card"] for row in run["rows"] if row["reason"]} == {"cpu:0"}
    assert [note for note in run["notes"] if "8 calls" in note or note.startswith("cpu:")] == [
        "cpu: sdpa_math 8 calls",
        "cpu:0: torch_sdpa 4 calls: sdpa_math: failed: ValueError: as it should",
        "cpu:0: torch_sdpa 4 calls: sdpa_math: failed before on this call: ValueError: as it should",
    ]


def test_the_guard_refuses_a_kernel_on_one_card_alone(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(call: Any) -> torch.Tensor:
        return torch.zeros_like(call.query) if card_of_call() == "cpu:0" else sdpa(call)

    kernels(monkeypatch, **{LOSSY: Lossy(kernel)})
    patch = nodes_module("hook.patch")
    sampled(divided(patch.set_default(model, LOSSY, accuracy="quantized", strict=False, guard="enforce")))
    found = rows(last_run())
    assert of_card(found, "cpu") == {("self", LOSSY): 4, ("cross", LOSSY): 4}
    assert {backend for card, _, backend in found if card == "cpu:0"} == {"torch_sdpa"}
    assert {entry["card"] for entry in last_run()["guard"] if entry["alarms"]} == {"cpu:0"}
    assert {entry["card"] for entry in last_run()["guard"] if not entry["alarms"]} == {"cpu"}


SCHEDULE = {
    "backend": "torch_sdpa",
    "schedule": [
        {"steps": "1", "backend": "sdpa_math"},
        {"steps": "2", "blocks": "blocks.1", "role": "cross", "backend": "reference"},
        {"steps": "7-9", "backend": "reference"},
    ],
}


def test_a_schedule_holds_on_each_card(model: Any) -> None:
    sampled(divided(configured(model, SCHEDULE)), steps=3)
    assert rows(last_run()) == each(
        {
            ("self", "torch_sdpa"): 4, ("cross", "torch_sdpa"): 3, ("cross", "reference"): 1,
            ("self", "sdpa_math"): 2, ("cross", "sdpa_math"): 2,
        }
    )  # fmt: skip
    never = [note for note in last_run()["notes"] if "never held" in note]
    assert len(never) == 1
    assert "(steps 7-9)" in never[0]


def test_the_sigmas_are_read_once_for_each_card(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A card's model calls get copies of the sampler's sigmas, which are not read again."""
    made: list[int] = []
    timetable = sampling.Timetable

    def counted(*args: Any) -> Any:
        made.append(len(args))
        return timetable(*args)

    original = torch.Tensor.to

    def copied(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        found = original(self, *args, **kwargs)
        # As from one card to another: `cpu` and `cpu:0` share their tensors.
        return found.clone() if args and args[0] == torch.device("cpu", 0) and found is self else found

    model = divided(configured(model, SCHEDULE))
    monkeypatch.setattr(sampling, "Timetable", counted)
    monkeypatch.setattr(torch.Tensor, "to", copied)
    sampled(model, steps=3)
    assert [number for number in made if number > 1] == [4, 4]


def test_strict_stops_the_sampler(model: Any) -> None:
    with pytest.raises(NoBackendError, match="sage_attn"):
        sampled(divided(selected(model, "sage_attn", strict=True)), steps=1)
    assert last_run()["outcome"]["kind"] == "refused"


def _interrupted() -> BaseException:
    import comfy.model_management

    return comfy.model_management.InterruptProcessingException()


@pytest.mark.parametrize(
    ("error", "kind"),
    [(lambda: torch.OutOfMemoryError("no room"), "out_of_memory"), (_interrupted, "cancelled")],
    ids=["out of memory", "cancelled"],
)
def test_what_a_thread_raises_ends_the_run(
    model: Any, monkeypatch: pytest.MonkeyPatch, error: Callable[[], BaseException], kind: str
) -> None:
    raised = error()

    def kernel(call: Any) -> torch.Tensor:
        if card_of_call() == "cpu:0":
            raise raised
        return sdpa(call)

    kernels(monkeypatch, sdpa_math=Kernel("sdpa_math", kernel))
    with pytest.raises(type(raised)) as caught:
        sampled(divided(selected(model, "sdpa_math")), steps=1)
    assert caught.value is raised
    assert last_run()["outcome"]["kind"] == kind


def test_a_thread_that_ends_after_the_run_is_closed_then(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """When one thread has failed, ComfyUI waits 5 seconds for the others, which may take longer."""
    import comfy.multigpu

    may_end = threading.Event()
    pools: list[Any] = []
    monkeypatch.setattr(comfy.multigpu.MultiGPUThreadPool, "shutdown", lambda pool: pools.append(pool))

    def kernel(call: Any) -> torch.Tensor:
        if card_of_call() == "cpu":
            raise torch.OutOfMemoryError("no room")
        assert may_end.wait(20)
        return sdpa(call)

    flushed: list[str] = []
    monkeypatch.setattr(Guard, "flush", lambda guard: flushed.append(guard.run_report.card))
    kernels(monkeypatch, sdpa_math=Kernel("sdpa_math", kernel))
    patch = nodes_module("hook.patch")
    with pytest.raises(torch.OutOfMemoryError):
        sampled(divided(patch.set_default(model, "sdpa_math", accuracy="exact", strict=False, guard="watch")), steps=1)
    assert flushed.count("cpu") == 2  # when its model call began, and at the end of the run
    assert flushed.count("cpu:0") == 1
    del flushed[:]
    for one in (model, *COPIES):
        assert marks_left(one.model.diffusion_model) == []
    may_end.set()
    _, error = pools[0]._result_queues[torch.device("cpu", 0)].get(timeout=60)
    assert error is None
    assert flushed == ["cpu:0"]


def record() -> dict[str, Any]:
    runs = nodes_module("history.runs")
    found: dict[str, Any] = json.loads(json.dumps(as_record([runs.decisions(last_run()["number"])], {})))
    return found


@pytest.fixture
def two_kernels(model: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The record of a run in which the cards ran different kernels, since one failed on `cpu:0`."""

    def kernel(call: Any) -> torch.Tensor:
        if card_of_call() == "cpu:0":
            raise ValueError("as it should")
        return sdpa(call)

    if not RECORDS:
        with monkeypatch.context() as patch:
            kernels(patch, sdpa_math=Kernel("sdpa_math", kernel))
            sampled(divided(selected(model, "sdpa_math")))
        RECORDS.append(json.dumps(record()))
    found: dict[str, Any] = json.loads(RECORDS[0])
    return found


def test_a_record_has_what_ran_on_each_card(two_kernels: dict[str, Any]) -> None:
    (run,) = two_kernels["runs"]
    assert run["card"] == "cpu"
    (other,) = run["cards"]
    assert other["card"] == "cpu:0"
    assert (run["model_calls"], other["model_calls"]) == (2, 2)
    ran = [{part["backend"] for entry in one["decisions"] for part in entry["ran"]} for one in (run, other)]
    assert ran == [{"sdpa_math"}, {"torch_sdpa"}]


def test_a_record_is_repeated_card_by_card(model: Any, two_kernels: dict[str, Any]) -> None:
    sampled(divided(configured(model, json.dumps(two_kernels))))
    assert rows(last_run()) == {
        **each({("self", "sdpa_math"): 4, ("cross", "sdpa_math"): 4}, ("cpu",)),
        **each({("self", "torch_sdpa"): 4, ("cross", "torch_sdpa"): 4}, ("cpu:0",)),
    }
    assert [note for note in last_run()["notes"] if "the record is" in note or "does not know" in note] == []


def test_a_record_of_two_cards_on_one(model: Any, two_kernels: dict[str, Any]) -> None:
    sampled(configured(model, json.dumps(two_kernels)))
    assert {backend for _, _, backend in rows(last_run())} == {"sdpa_math"}
    assert last_run()["notes"] == [
        "the record is of a run that was divided over cpu, cpu:0, and this run was on one GPU: it repeated what ran on "
        "cpu, where other kernels ran than on the others"
    ]


def test_a_record_of_one_card_on_two(model: Any) -> None:
    sampled(selected(model, "sdpa_math"))
    sampled(divided(configured(model, json.dumps(record()))))
    assert rows(last_run()) == each({("self", "sdpa_math"): 4, ("cross", "sdpa_math"): 4})
    notes = [note for note in last_run()["notes"] if "calls" not in note]
    assert notes == ["the record is of a run on one GPU, and this run was divided over cpu, cpu:0: each repeated it"]


def test_the_command_shows_each_card(two_kernels: dict[str, Any]) -> None:
    router = Router(detect(torch.device("cpu")))
    lines = replay_command.as_text(replay_command.report_of(read(two_kernels, "file"), router)).splitlines()
    assert [line.partition(": ")[0] for line in lines if "model calls" in line] == [
        f"WAN21, on {card}" for card in CARDS
    ]
    ran = [line.split()[-2] for line in lines if line.endswith(" yes")]
    assert list(dict.fromkeys(ran)) == ["sdpa_math", "torch_sdpa"]


@pytest.mark.parametrize("card", ["cpu", "cpu:0", None])
def test_a_card_that_is_there_twice_is_refused(two_kernels: dict[str, Any], card: str | None) -> None:
    (run,) = two_kernels["runs"]
    if card is None:
        run["cards"][0]["cards"] = []
    else:
        run["cards"].append({**run["cards"][0], "card": card})
    with pytest.raises(ConfigError, match=r"runs\[0\]\.cards\[[01]\]\.card"):
        read(two_kernels, "file")


def test_autotune_decides_on_each_card(model: Any) -> None:
    sampled(divided(configured(model, {"backend": "autotune"})), steps=3)
    run = last_run()
    assert {row["card"] for row in run["rows"] if row["asked"] == "autotune"} == set(CARDS)
    assert {card: sum(calls for key, calls in rows(run).items() if key[0] == card) for card in CARDS} == {
        "cpu": 12, "cpu:0": 12
    }  # fmt: skip
    assert run["tuning"]["kinds"] == 2


def test_a_sparse_backend_knows_the_step_on_each_card(model: Any) -> None:
    sampled(divided(configured(model, {"default": {"backend": "subblock_attn", "extra": {"dense_steps": 1}}})), steps=3)
    found = {(row["card"], row["block"]): row["dense"] for row in last_run()["rows"] if row["role"] == "self"}
    whole = {"the first 1 steps": 1, "fewer than 4096 tokens": 2}
    assert found == {(card, f"blocks.{block}"): whole for card in CARDS for block in range(2)}


def test_code_is_read_again_after_pythons_error(monkeypatch: pytest.MonkeyPatch) -> None:
    callers, parse = nodes_module("hook.callers"), ast.parse
    failed: list[str] = []

    def fails_once(source: str) -> ast.Module:
        if not failed:
            failed.append(source)
            raise SystemError("AST constructor recursion depth mismatch (before=60, after=54)")
        return parse(source)

    def function(self: Any, attention: Any) -> Any:
        return attention(1, 2, 3)

    monkeypatch.setattr(ast, "parse", fails_once)
    assert callers._calls_what_it_is_handed(function)
    assert failed


def test_over_gpus_is_off(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(over, "KINDS", ("cpu",))
    sampled(divided(configured(model, {"backend": "torch_sdpa", "cards": "all"})), steps=1)
    off = Reason("cards.off", reason=Reason("cards.core"))
    assert [note for note in last_run()["notes"] if "calls" not in note] == [off]
    assert rows(last_run()) == each({("self", "torch_sdpa"): 2, ("cross", "torch_sdpa"): 2})


def test_the_report_is_read_while_it_grows(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = nodes_module("history.runs")
    seen: list[tuple[str, set[str]]] = []

    def kernel(call: Any) -> torch.Tensor:
        live = next(entry for entry in runs.summaries() if entry["state"] == "running")
        found = runs.find(live["number"])
        seen.append((live["outcome"]["kind"], {row["card"] for row in found["rows"]}))
        return sdpa(call)

    kernels(monkeypatch, sdpa_math=Kernel("sdpa_math", kernel))
    sampled(divided(selected(model, "sdpa_math")))
    assert {kind for kind, _ in seen} == {"running"}
    assert seen[-1][1] == set(CARDS)


def test_memory_is_asked_for_on_each_card(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = nodes_module("hook.memory")
    asked: list[str] = []

    def needed(layers: Any, kinds: Any, samples: int, device: torch.device) -> int:
        asked.append(str(device))
        return 0

    monkeypatch.setattr(memory, "needed", needed)
    sampled(divided(selected(model, "torch_sdpa")), steps=1)
    assert asked == list(CARDS)


def test_a_thread_that_goes_on_after_the_run_leaves_nothing(model: Any) -> None:
    """ComfyUI waits 5 seconds for its threads when one has failed; a slow one then ends after the run."""
    run = sampling.Run(selected(model, "torch_sdpa").model_options["transformer_options"][sampling.KEY])
    other = [run.cards.of(torch.device(name)) for name in CARDS][1]
    run.close()
    other.patch_modules(model.model, {})
    assert other.forward_patches() == []
