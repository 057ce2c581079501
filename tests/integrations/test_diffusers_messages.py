"""The messages that a user of Diffusers reads: names that fit no model, and the summary of a run."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import tiny_diffusers as tiny
import torch
from attention_backends.backends.values.errors import ConfigError, NoBackendError
from attention_backends.integrations.diffusers import apply, attention_backend, report, reset
from syrupy.assertion import SnapshotAssertion
from test_diffusers_models import assert_same_state, state
from test_diffusers_pipelines import pipeline, ran, sample

FIRST_STEP = {"default": "torch_sdpa", "schedule": [{"backend": "sdpa_math", "steps": "0"}]}


@pytest.mark.parametrize("name", ["text_encoder", "vae", "transformer_2", "scheduler", "transformr"])
@pytest.mark.parametrize("beside", [{}, {"transformer": "torch_sdpa"}], ids=["alone", "beside another"])
def test_a_name_without_a_model_is_refused_and_nothing_is_changed(
    name: str, beside: dict[str, str], snapshot: SnapshotAssertion
) -> None:
    pipe = pipeline("flux")
    before = state(pipe.transformer)
    with pytest.raises(ConfigError) as raised:
        apply(pipe, {**beside, name: "sdpa_math"})
    assert str(raised.value) == snapshot
    assert_same_state(before, state(pipe.transformer))
    assert report(pipe) == {}


def test_a_mapping_of_models_takes_its_own_names_only(snapshot: SnapshotAssertion) -> None:
    with pytest.raises(ConfigError) as raised:
        apply({"mine": pipeline("flux").transformer}, {"transformer": "sdpa_math"})
    assert str(raised.value) == snapshot


def test_a_configuration_by_name_may_be_given_to_the_model_itself() -> None:
    model, given = tiny.flux()
    applied = apply(model, {"transformer": {"default": "sdpa_math"}})
    tiny.forward(model, given)
    assert {backend for _, backend in ran(applied.reports["model"])} == {"sdpa_math"}
    reset(model)


@pytest.mark.parametrize("call", [lambda model: apply(model, "torch_sdpa"), report, reset])
@pytest.mark.parametrize("model", ["some/name", None, []], ids=repr)
def test_what_is_no_model_is_refused_with_what_to_give(call: Any, model: Any, snapshot: SnapshotAssertion) -> None:
    with pytest.raises(ConfigError) as raised:
        call(model)
    assert str(raised.value) == snapshot


def test_a_summary_gives_the_reasons_before_the_run_is_closed(snapshot: SnapshotAssertion) -> None:
    pipe = pipeline("flux")
    config = {
        "default": "sage_attn", "per_role": {"flux.singel": "sdpa_math"},
        "schedule": [{"backend": "sdpa_math", "steps": "7"}],
    }  # fmt: skip
    applied = apply(pipe, config)
    assert applied.summary() == snapshot(name="not run")
    assert repr(applied) == snapshot(name="repr")
    sample(pipe, "flux", steps=2)
    assert applied.summary() == snapshot(name="run")
    assert repr(report(pipe)) == snapshot(name="repr of reports")
    before = applied.summary()
    reset(pipe)
    assert sorted(applied.summary().splitlines()) == sorted(before.splitlines())


def test_a_summary_has_the_guard_and_entries_without_effect(snapshot: SnapshotAssertion) -> None:
    pipe = pipeline("flux")
    for config in ("--component-attention-backends transformer=torch_sdpa,vae=torch_sdpa", "emulated_int8"):
        with attention_backend(pipe, config) as chosen:
            sample(pipe, "flux", steps=1)
        assert chosen.summary() == snapshot(name=config)


def test_a_scheduler_that_the_pipeline_exchanges_is_followed() -> None:
    pipe = pipeline("flux")
    applied = apply(pipe, FIRST_STEP)
    for _ in range(2):
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        sample(pipe, "flux", steps=2)
        assert set(ran(applied.reports["transformer"]).values()) == {2}
    model, kept = pipe.transformer, weakref.ref(pipe)
    del pipe
    gc.collect()
    assert kept() is None
    reset(model)


@pytest.mark.parametrize("steps", ["0", "last 1"])
@pytest.mark.parametrize("has_run", [False, True])
def test_a_scheduler_that_does_not_run_is_reported(steps: str, has_run: bool, snapshot: SnapshotAssertion) -> None:
    pipe, other = pipeline("flux"), pipeline("flux")
    other.transformer = pipe.transformer
    applied = apply(pipe, {"default": "torch_sdpa", "schedule": [{"backend": "sdpa_math", "steps": steps}]})
    if has_run:
        sample(pipe, "flux", steps=2)
        assert applied.summary() == snapshot(name="its own run")
    sample(other, "flux", steps=2)
    assert applied.summary() == snapshot(name="the other's run")
    reset(pipe)


def test_a_schedule_without_a_scheduler_says_what_to_give(snapshot: SnapshotAssertion) -> None:
    model, given = tiny.flux()
    applied = apply(model, FIRST_STEP)
    tiny.forward(model, given)
    assert applied.summary() == snapshot
    reset(model)


def test_a_strict_refusal_begins_with_the_backends_that_cannot_run(snapshot: SnapshotAssertion) -> None:
    with pytest.raises(NoBackendError) as raised:
        apply(tiny.flux()[0], {"default": "sage_attn", "per_role": {"flux.single": "flash_attn_3"}}, strict=True)
    assert str(raised.value).splitlines()[0] == snapshot


def test_a_call_that_needs_a_gradient_says_how_it_does_not(snapshot: SnapshotAssertion) -> None:
    model, given = tiny.flux()
    applied = apply(model, "auto")
    with torch.enable_grad():
        model(**given)
    assert applied.summary() == snapshot  # and no note about another system's `auto`
    reset(model)


def test_the_attention_of_a_vae_has_a_role_of_the_table(snapshot: SnapshotAssertion) -> None:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        block_out_channels=(8,), down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
        latent_channels=4, norm_num_groups=4, sample_size=8,
    )  # fmt: skip
    applied = apply({"vae": vae}, {"vae": "sdpa_math"})
    with torch.no_grad():
        vae.decode(vae.encode(tiny.noise(1, 3, 8, 8)).latent_dist.mode())
    assert applied.summary() == snapshot
    applied.reset()
