"""Nothing grows over many runs, with masks and shapes that change and ComfyUI's sparse node before and after ours.

120 runs here; 1,008 with `-m slow`. The sparse node is a stand-in for
ComfyUI's, which needs a card (`test_other_packs.FakeSparse`).
"""

from __future__ import annotations

import gc
import inspect
import itertools
import sys
import tracemalloc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from hook_side import (  # noqa: E402
    ROOT,
    compiled,
    host,
    last_run,
    marks_left,
    nodes_module,
    plain_comfyui,
    sampling,
    selected,
    sites,
)
from test_other_packs import FakeSparse  # noqa: E402

pytestmark = pytest.mark.comfy
memory = nodes_module("hook.memory")

SHAPES = [(1, 16, 1, 4 + 2 * (at % 4), 4 + 2 * (at // 4)) for at in range(12)]
"""Latents of 4 to 20 tokens; more of them than are remembered."""
TEXT = 12
ROUND = 24
"""Runs after which everything repeats, and every cache of ours is full: 20 accounts, shapes, kinds of call."""


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """What other tests left in this process is not counted, and not looked through by each of ComfyUI's collections."""
    memory._known.clear()
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    plain_comfyui(monkeypatch)
    import tiny_sampling

    return tiny_sampling.build("qwen_image_masked")


def sample(model: Any, number: int) -> None:
    """One step on a latent and a padded prompt that change from run to run."""
    import comfy.sample

    shape = SHAPES[number % len(SHAPES)]
    visible = 1 + number * 7 % TEXT
    prompts = []
    for seed in (1, 2):
        text = torch.randn(1, TEXT, 64, generator=torch.Generator().manual_seed(seed))
        mask = (torch.arange(TEXT) < min(TEXT, visible + seed)).long().unsqueeze(0)
        prompts.append([[text, {"attention_mask": mask}]])
    with torch.inference_mode():
        latent = torch.zeros(shape)
        noise = comfy.sample.prepare_noise(latent, number)
        comfy.sample.sample(
            model, noise, 1, 3.0, "euler", "simple", prompts[0], prompts[1], latent, disable_pbar=True, seed=number
        )


def settings_of(model: Any) -> list[Any]:
    """Models as people build them: ours alone, with a guard, and with the sparse node on either side."""
    from comfy.model_patcher import ModelPatcher

    patch = nodes_module("hook.patch")
    found = [
        selected(model, "torch_sdpa"),
        patch.set_default(model, "emulated_int8", accuracy="quantized", strict=False, guard="watch"),
    ]
    if "model_options" in inspect.signature(ModelPatcher.prepare_state).parameters:
        found += [selected(FakeSparse().patch(model), "auto"), FakeSparse().patch(selected(model, "sdpa_math"))]
    return found


def sizes() -> dict[str, int]:
    """Everything of ours that lives longer than a run."""
    gc.collect()
    router = sampling.router_for(torch.device("cpu"))
    return {
        "objects": sum(str(type(found).__module__).startswith("attention_backends") for found in gc.get_objects()),
        "marks": len(sites._marks),
        "overrides": len(compiled.overrides._objects),
        "runs outside": len(host._outside_runs),
        "models": len(memory._known),
        "shapes": sum(len(shapes) for shapes in memory._known.values()),
        "kernels": len(router._kernels),
        "packed kernels": len(router._varlen),
    }


def resident() -> int:
    """Bytes of this process in memory; 0 where the system does not say."""
    if sys.platform != "linux":
        return 0
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.parametrize("count", [5 * ROUND, pytest.param(42 * ROUND, marks=pytest.mark.slow)])
def test_many_runs_leave_nothing(model: Any, count: int) -> None:
    numbers = itertools.count()
    marks = len(sites._marks)  # of models in other tests, whose runs never ended
    gone: list[weakref.ref[Any]] = []

    def some(runs: int) -> None:
        """Runs of models that are patched anew now and then, as where a person changes a node."""
        for at in range(runs):
            if at % ROUND == 0:
                patched = settings_of(model)
                gone.extend(weakref.ref(one.model_options["transformer_options"][sampling.KEY]) for one in patched)
            sample(patched[at % len(patched)], next(numbers))

    some(ROUND)
    pack = [tracemalloc.Filter(True, str(ROOT / part / "*")) for part in ("nodes", "backends")]
    tracemalloc.start()
    try:
        some(2 * ROUND)  # so that what is kept of the last runs was made while memory is traced
        before, kept = sizes(), tracemalloc.take_snapshot().filter_traces(pack)
        in_memory = resident()
        some(count)
        assert sizes() == before
        grown = tracemalloc.take_snapshot().filter_traces(pack).compare_to(kept, "filename")
        more = resident() - in_memory
    finally:
        tracemalloc.stop()
    assert before["shapes"] == memory.MOST_SHAPES
    assert before["marks"] == marks
    # Not nothing: of the 20 accounts that are kept the later ones hold larger numbers.
    assert sum(statistic.size_diff for statistic in grown) < 12_000, grown[:5]
    assert more < 32 * 2**20, "the process grew"
    assert all(reference() is None for reference in gone), "an override that nobody uses any more"
    assert marks_left(model.model) == []
    assert {row["role"] for row in last_run()["rows"]} == {"joint"}


def test_a_run_that_kept_something_would_be_seen(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The counting itself: a run that stays alive is more than there was."""
    patched = selected(model, "torch_sdpa")
    sample(patched, 0)
    before, kept = sizes(), []
    run = sampling.Run.__init__
    monkeypatch.setattr(sampling.Run, "__init__", lambda self, override: kept.append(self) or run(self, override))
    sample(patched, 0)
    assert sizes()["objects"] > before["objects"] + 5
