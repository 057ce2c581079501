"""Runs of few steps, and split ones, as distilled models have them: as without this pack, and no longer.

What the guard and a schedule do in them is in test_schedule_samplers.py and test_guard_comfyui.py. Nothing here reads a
clock: the length of our way is the number of our frames.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import tiny_sampling  # noqa: E402
from attention_backends.backends.engine.router import Router  # noqa: E402
from attention_backends.backends.kernels import BACKENDS  # noqa: E402
from attention_backends.backends.kernels.registry import detect  # noqa: E402
from attention_backends.backends.kernels.support.sdpa import plain_sdpa  # noqa: E402
from attention_backends.backends.observe.autotune import tuner  # noqa: E402
from attention_backends.backends.observe.autotune.store import VARIABLE  # noqa: E402
from hook_side import last_run, nodes_module, plain_comfyui, sampling  # noqa: E402
from measured_machines import Clock, Costed  # noqa: E402
from tiny_models import FAMILIES  # noqa: E402

pytestmark = pytest.mark.comfy
OURS = "attention_backends."


@pytest.fixture(autouse=True)
def _comfyui(monkeypatch: pytest.MonkeyPatch) -> None:
    plain_comfyui(monkeypatch)


def sampled(models: tuple[Any, ...], family: str, steps: int) -> torch.Tensor:
    """One latent, each model doing its share of the steps, as Wan 2.2's two models do."""
    import comfy.sample

    positive, negative = tiny_sampling.conditioning(family)
    (shape,) = FAMILIES[family].latents
    latent, share = torch.zeros(shape), steps // len(models)
    noise = comfy.sample.prepare_noise(latent, 0)
    for number, model in enumerate(models):
        with torch.inference_mode():
            latent = comfy.sample.sample(
                model, noise, steps, 1.0, "euler", "simple", positive, negative, latent, disable_pbar=True, seed=0,
                disable_noise=number > 0, start_step=number * share, last_step=(number + 1) * share,
                force_full_denoise=number + 1 == len(models),
            )  # fmt: skip
    return latent.clone()


def frames(work: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, int]:
    """What `work` gives, and how many of our frames it took."""
    count = 0

    def noted(frame: FrameType, event: str, arg: object) -> None:
        nonlocal count
        count += event == "call" and str(frame.f_globals.get("__name__", "")).startswith(OURS)

    sys.setprofile(noted)
    try:
        result = work()
    finally:
        sys.setprofile(None)
    return result, count


@pytest.mark.parametrize(("family", "experts", "most"), [("wan", 2, 88), ("qwen_image_masked", 1, 168)])
def test_as_without_the_pack_and_no_longer(family: str, experts: int, most: int) -> None:
    """2 + 2 steps of a distilled Wan 2.2, and 4 of Qwen-Image, equal to the bit.

    most: our frames in one warm model call, with its attention calls (4 of Wan, 2 of Qwen-Image) and its mask's plan.
    """
    plain = tuple(tiny_sampling.build(family, seed) for seed in range(experts))
    stock = sampled(plain, family, 4)
    set_default = nodes_module("hook.patch").set_default
    usual: dict[str, Any] = {"accuracy": "exact", "strict": False, "guard": "watch", "recommended": True}
    ours = tuple(set_default(model, "auto", **usual) for model in plain)
    assert torch.equal(sampled(ours, family, 4), stock)
    result, four = frames(lambda: sampled(ours, family, 4))
    assert torch.equal(result, stock)
    assert sum(row["calls"] for row in last_run()["rows"]) == 8  # of its last sampler
    _, eight = frames(lambda: sampled(ours, family, 8))
    assert eight - four <= most * 4

    bypassed, none = frames(lambda: sampled(plain, family, 4))
    assert torch.equal(bypassed, stock)
    assert none == 0


def test_autotune_goes_on_in_the_second_sampler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With 2 + 2 steps of 2 blocks the trials last seven samplers, of both models; the eighth has their result."""
    import folder_paths

    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path))
    clock = Clock()
    backends = {
        "torch_sdpa": Costed("torch_sdpa", clock, lambda: 3.0, plain_sdpa()),
        "sdpa_math": Costed("sdpa_math", clock, lambda: 2.0, plain_sdpa()),
    }
    router = Router(detect(torch.device("cpu")), {**backends, "comfy": BACKENDS["comfy"]}, use_probe_results=False)
    monkeypatch.setattr(sampling, "router_for", lambda device: router)
    monkeypatch.setattr(tuner, "DeviceClock", lambda kind: clock)
    set_default = nodes_module("hook.patch").set_default
    usual: dict[str, Any] = {"accuracy": "exact", "strict": True, "guard": "watch"}
    experts = tuple(set_default(tiny_sampling.build("wan", seed), "autotune", **usual) for seed in (0, 1))
    found: list[tuple[int, int, int]] = []
    for _ in range(4):
        sampled(experts, "wan", 4)
        both = (run["tuning"] for run in reversed(nodes_module("history.runs").recent()[:2]))
        found += [(tuning["decided"], tuning["open"], tuning["from_store"]) for tuning in both]
    assert found == [(0, 2, 0)] * 6 + [(2, 0, 0), (0, 0, 2)]
    assert {row["backend"] for row in last_run()["rows"]} == {"sdpa_math"}
