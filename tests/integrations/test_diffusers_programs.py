"""What programs around Diffusers do with a chosen model: copy and save it, patch its classes, replace the scheduler."""

from __future__ import annotations

import contextvars
import copy
import gc
import io
import pickle
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tiny_diffusers as tiny
import torch
from attention_backends.integrations.diffusers import api, apply, attention_backend, reset, routing
from test_diffusers_leaks import calls, ran
from test_diffusers_models import assert_same_state, state


class Loader(pickle.Unpickler):
    """Loads where this package is not installed."""

    def find_class(self, module: str, name: str) -> Any:
        assert not module.startswith("attention_backends"), module
        return super().find_class(module, name)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deep copy": copy.deepcopy,
    "saved and loaded": lambda model: Loader(io.BytesIO(pickle.dumps(model))).load(),
}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_a_chosen_model_can_be_chosen_for_itself(how: str) -> None:
    model, given = tiny.flux()
    expected = tiny.forward(model, given)
    applied = apply(model, "torch_sdpa")
    other = COPIES[how](model)
    of_other = apply(other, "sdpa_math")
    tiny.forward(other, given)
    assert (ran(of_other), calls(of_other), calls(applied)) == ({"sdpa_math"}, 4, 0)
    assert not of_other.reports["model"].bypass
    reset(model)
    reset(other)
    assert torch.equal(tiny.forward(other, given)[0], expected[0])
    for path, module in other.named_modules():
        forward = vars(module).get("forward")
        assert forward is None or forward.__func__ is type(module).forward, path


def test_a_loaded_autoencoder_can_be_called_by_all_its_methods() -> None:
    from diffusers import AutoencoderKL

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4).eval()
    picture = tiny.noise(1, 3, 8, 8)
    with torch.no_grad():
        expected = model.encode(picture).latent_dist.mean
        applied = apply(model, "torch_sdpa")
        for made in COPIES.values():
            assert torch.equal(made(model).encode(picture).latent_dist.mean, expected)
        assert calls(applied) == 0
        assert torch.equal(model.encode(picture).latent_dist.mean, expected)
        assert calls(applied) == 1
    reset(model)


@contextmanager
def replaced(holder: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, before)


def twice(function: Any) -> Any:
    """A function whose tensors are twice those of another."""

    def called(*args: Any, **kwargs: Any) -> Any:
        output = function(*args, **kwargs)
        return tuple(one * 2 for one in output) if isinstance(output, tuple) else output * 2

    return called


def patch(name: str) -> Any:
    """What such programs patch: the place, and its name there."""
    from diffusers.models.transformers import transformer_wan

    return {
        "the model's class": (transformer_wan.WanTransformer3DModel, "forward"),
        "the attention's class": (transformer_wan.WanAttention, "forward"),
        "the processor's class": (transformer_wan.WanAttnProcessor, "__call__"),
        "a function of the module": (transformer_wan, "_get_qkv_projections"),
    }[name]


@pytest.mark.parametrize(
    "name", ["the model's class", "the attention's class", "the processor's class", "a function of the module"]
)
def test_a_patch_of_another_program_is_followed_and_its_end_too(name: str) -> None:
    """As caches do: `FluxTransformer2DModel.forward = cached_forward`."""
    model, given = tiny.wan()
    holder, attribute = patch(name)
    expected = tiny.forward(model, given)
    with replaced(holder, attribute, twice(getattr(holder, attribute))):
        patched = tiny.forward(model, given)
    assert not torch.equal(patched[0], expected[0])
    applied = apply(model, "torch_sdpa")
    assert torch.equal(tiny.forward(model, given)[0], expected[0])
    with replaced(holder, attribute, twice(getattr(holder, attribute))):
        assert torch.equal(tiny.forward(model, given)[0], patched[0])  # patched after `apply`
        reset(model)
        applied = apply(model, "torch_sdpa")
        assert torch.equal(tiny.forward(model, given)[0], patched[0])  # and before
        assert calls(applied) == 4
    assert torch.equal(tiny.forward(model, given)[0], expected[0])
    reset(model)
    with replaced(holder, attribute, twice(getattr(holder, attribute))):
        assert torch.equal(tiny.forward(model, given)[0], patched[0])


def test_a_forward_that_was_replaced_since_is_named() -> None:
    model, given = tiny.wan()
    applied = apply(model, "torch_sdpa")
    assert not applied.reports["model"].bypass
    model.forward = types.MethodType(type(model).forward, model)
    tiny.forward(model, given)
    assert "the forward of WanTransformer3DModel" in applied.summary()
    reset(model)


class Scheduler:
    """As far as schedules read one."""

    def __init__(self) -> None:
        self.timesteps, self.step_index = torch.tensor([]), None

    def set_timesteps(self, count: int) -> None:
        self.timesteps = torch.linspace(1000, 0, count + 1)[:-1]


def test_a_scheduler_that_replaces_the_pipeline_s_counts_the_steps() -> None:
    model, given = tiny.flux()
    pipe = types.SimpleNamespace(components={"transformer": model}, scheduler=Scheduler())
    applied = apply(pipe, {"default": "torch_sdpa", "schedule": [{"backend": "sdpa_math", "steps": "0"}]})
    pipe.scheduler = Scheduler()
    pipe.scheduler.set_timesteps(3)
    for pipe.scheduler.step_index in range(3):
        tiny.forward(model, given)
    counts: dict[str, int] = {}
    for row in applied.reports["transformer"].rows.values():
        counts[row.backend] = counts.get(row.backend, 0) + row.calls
    assert counts == {"sdpa_math": 4, "torch_sdpa": 8}
    assert applied.reports["transformer"].as_dict()["steps"] == 3
    reset(pipe)


def suspended(model: Any) -> Iterator[None]:
    with attention_backend(model, "torch_sdpa"):
        yield


def test_contexts_that_outlive_a_block_keep_no_model() -> None:
    model, given = tiny.flux()
    alive = weakref.ref(model)
    kept = []
    with attention_backend(model, "torch_sdpa"):
        kept.append(contextvars.copy_context())  # as an asyncio task does
        tiny.forward(model, given)
    generator = suspended(model)
    next(generator)
    thread = threading.Thread(target=generator.close)
    thread.start()
    thread.join()
    assert "forward" not in vars(model)
    del model, generator
    gc.collect()
    assert alive() is None


def test_blocks_that_two_threads_open_at_once_are_both_in_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = tiny.flux()
    before = state(model)
    both, end, made, counts = threading.Barrier(2), threading.Barrier(2), api.Chosen, []

    def chosen(*args: Any) -> Any:
        both.wait(10)
        return made(*args)

    monkeypatch.setattr(api, "Chosen", chosen)

    def work() -> None:
        with attention_backend(model, "sdpa_math") as mine:
            tiny.forward(model, given)
            counts.append(calls(mine))
            end.wait(10)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts == [4, 4]
    assert_same_state(before, state(model))


def test_an_interruption_while_stand_ins_are_set_leaves_none(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = tiny.flux()
    before = state(model)

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(routing.Entry, "set", interrupted)
    with pytest.raises(KeyboardInterrupt):
        apply(model, "sdpa_math")
    monkeypatch.undo()
    assert_same_state(before, state(model))
    applied = apply(model, "sdpa_math")
    tiny.forward(model, given)
    assert calls(applied) == 4
    reset(model)
    assert_same_state(before, state(model))


@pytest.mark.parametrize("share", [1, 1000])
@pytest.mark.parametrize("first", [0, 2])
def test_a_loop_that_begins_in_the_middle_begins_with_that_step(first: int, share: float) -> None:
    """As for a picture that a person gives; pipelines tell their schedulers, loops of one's own need not."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    model, given = tiny.flux()
    scheduler = FlowMatchEulerDiscreteScheduler()
    config = {"default": "torch_sdpa", "schedule": [{"backend": "sdpa_math", "steps": "0-1"}]}
    applied = apply(model, config, scheduler=scheduler)
    scheduler.set_timesteps(4)
    latent = given["hidden_states"]
    for time in scheduler.timesteps[first:]:
        output = tiny.forward(model, {**given, "hidden_states": latent, "timestep": time.reshape(1) / share})
        latent = scheduler.step(output[0], time, latent, return_dict=False)[0]
    counts: dict[str, int] = {}
    for row in applied.reports["model"].rows.values():
        counts[row.backend] = counts.get(row.backend, 0) + row.calls
    assert counts == ({"torch_sdpa": 8} if first else {"sdpa_math": 8, "torch_sdpa": 8})
    reset(model)
