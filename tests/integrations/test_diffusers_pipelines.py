"""Whole pipelines: schedules, reports, guard, autotune, record, sparse methods, two experts, interruption, compile."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import tiny_diffusers as tiny
import torch
from attention_backends.backends.engine.router import Router
from attention_backends.backends.kernels.registry import detect
from attention_backends.backends.kernels.support.sdpa import plain_sdpa
from attention_backends.backends.observe.autotune import tuner
from attention_backends.backends.observe.autotune.store import VARIABLE, shared_store
from attention_backends.integrations.diffusers import apply, attention_backend, report, reset, runs
from card_workers import reasons_off, second_worker
from measured_machines import Clock, Costed
from test_diffusers_models import ROLES, assert_same_state, state

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "integrations" / "examples"
CALLS: dict[str, dict[str, Any]] = {
    "flux": {
        "prompt_embeds": tiny.noise(1, 5, 32), "pooled_prompt_embeds": tiny.noise(1, 32), "height": 64, "width": 64,
    },
    "wan": {
        "prompt_embeds": tiny.noise(1, 7, 16), "negative_prompt_embeds": tiny.noise(1, 7, 16, seed=2), "height": 64,
        "width": 64, "num_frames": 5,
    },
}  # fmt: skip
PER_STEP = {"flux": 4, "wan": 8}
"""Attention calls of a step; Wan calls the model for the prompt and for the negative one."""


def pipeline(name: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = runpy.run_path(str(EXAMPLES / f"diffusers_{name}.py"))["tiny_pipeline"]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe: Any, name: str, steps: int = 3, **more: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    output = pipe(
        **CALLS[name], num_inference_steps=steps, generator=generator, output_type="latent", return_dict=False, **more
    )
    return output[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_a_pipeline_gives_the_same_bits_and_each_run_has_a_report(name: str) -> None:
    pipe = pipeline(name)
    expected, before = sample(pipe, name), state(pipe.transformer)
    applied = apply(pipe, "torch_sdpa")
    for _ in range(2):
        assert torch.equal(sample(pipe, name), expected)
        run_report = applied.reports["transformer"]
        assert run_report.calls == 3 * PER_STEP[name]
        assert run_report.as_dict()["steps"] == 3
        assert run_report.steps_reached() == 3
    reset(pipe)
    assert_same_state(before, state(pipe.transformer))
    assert torch.equal(sample(pipe, name), expected)


@pytest.mark.parametrize("first", [True, False])
def test_a_pipeline_that_offloads_its_models_is_routed(first: bool) -> None:
    """The CPU stands for the card, so that the hooks are real; each pipeline call sets them anew at its end."""
    pytest.importorskip("accelerate")
    pipe = pipeline("wan")
    expected = sample(pipe, "wan")
    if first:
        pipe.enable_model_cpu_offload(device="cpu")
    applied = apply(pipe, "torch_sdpa")
    if not first:
        pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        assert torch.equal(sample(pipe, "wan"), expected)
        run_report = applied.reports["transformer"]
        assert run_report.calls == 3 * PER_STEP["wan"]
        assert not run_report.bypass
    reset(pipe)
    assert torch.equal(sample(pipe, "wan"), expected)
    pipe.remove_all_hooks()
    assert torch.equal(sample(pipe, "wan"), expected)
    assert run_report is applied.reports["transformer"]


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_a_schedule_goes_by_the_scheduler_s_steps(name: str) -> None:
    pipe = pipeline(name)
    for entry, share in (({"steps": "1-2"}, 2), ({"steps": "last 1"}, 1), ({"percent": "0-0.4"}, 2)):
        applied = apply(pipe, {"default": "torch_sdpa", "schedule": [{"backend": "sdpa_math", **entry}]})
        sample(pipe, name, steps=4)
        counts: dict[str, int] = {}
        for row in applied.reports["transformer"].rows.values():
            counts[row.backend] = counts.get(row.backend, 0) + row.calls
        assert counts["sdpa_math"] == share * PER_STEP[name], entry
        assert counts["torch_sdpa"] == (4 - share) * PER_STEP[name], entry
        reset(pipe)


def test_a_record_repeats_the_decisions() -> None:
    pipe = pipeline("flux")
    applied = apply(pipe, {"default": "sdpa_math", "schedule": [{"backend": "torch_sdpa", "steps": "0"}]})
    first = sample(pipe, "flux")
    record = applied.record()
    reset(pipe)
    applied = apply(pipe, record)
    assert torch.equal(sample(pipe, "flux"), first)
    rows = applied.reports["transformer"].rows.values()
    assert sorted((row.backend, row.calls) for row in rows if row.calls) == sorted(
        [("torch_sdpa", 1)] * 4 + [("sdpa_math", 2)] * 4
    )
    reset(pipe)


def test_the_guard_checks_an_inexact_kernel() -> None:
    pipe = pipeline("flux")
    with attention_backend(pipe, "emulated_int8", guard="watch") as chosen:
        sample(pipe, "flux")
        rows = list(chosen.reports["transformer"].rows.values())
    assert {row.backend for row in rows} == {"emulated_int8"}
    assert all(row.guard is not None for row in rows)


def test_autotune_measures_in_one_run_and_the_next_uses_the_stored_winner(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path, clock = tmp_path / "measured.sqlite3", Clock()
    backends = {
        "torch_sdpa": Costed("torch_sdpa", clock, lambda: 3.0, plain_sdpa()),
        "sdpa_math": Costed("sdpa_math", clock, lambda: 2.0, plain_sdpa()),
    }
    router = Router(detect(torch.device("cpu")), backends, use_probe_results=False)
    monkeypatch.setenv(VARIABLE, str(path))
    monkeypatch.setattr(runs, "router_for", lambda device: router)
    monkeypatch.setattr(tuner, "DeviceClock", lambda kind: clock)
    pipe = pipeline("flux")
    expected = sample(pipe, "flux", steps=16)
    applied = apply(pipe, "autotune")
    found = []
    for _ in range(2):
        before = {name: backend.calls for name, backend in backends.items()}
        assert torch.equal(sample(pipe, "flux", steps=16), expected)
        run_report = applied.reports["transformer"]
        assert {row.asked for row in run_report.rows.values()} == {"autotune"}
        assert run_report.calls == 16 * PER_STEP["flux"]
        tuning: Any = run_report.as_dict()["tuning"]
        tried = {name: backend.calls - before[name] for name, backend in backends.items()}
        found.append((tuning["decided"], tuning["from_store"], tried["torch_sdpa"] > 0, tried["sdpa_math"] > 0))
    assert found == [(2, 0, True, True), (0, 2, False, True)]  # kinds of call: flux.double and flux.single
    assert {(entry["role"], entry["winner"]) for entry in shared_store(path).entries()} == {
        ("flux.double", "sdpa_math"), ("flux.single", "sdpa_math"),
    }  # fmt: skip
    reset(pipe)


def test_a_sparse_method_knows_the_grid() -> None:
    pipe = pipeline("wan")
    config = {"per_role": {"self": {"backend": "custom_sparse_attn", "extra": {"topk": 0.5}}}}
    with attention_backend(pipe, config, strict=True) as chosen:
        pipe(
            **{**CALLS["wan"], "height": 128, "width": 128, "num_frames": 13},
            num_inference_steps=2,
            output_type="latent",
        )
        rows = list(chosen.reports["transformer"].rows.values())
    sparse = [row for row in rows if row.role == "self"]
    assert sum(row.kept.calls for row in sparse if row.kept is not None) == 8
    assert all(row.kept is not None and 0 < float(row.kept.fraction or 0) < 1 for row in sparse)


def two_experts() -> Any:
    """As Wan 2.2: `transformer` computes the first two of four steps, `transformer_2` the others."""
    from diffusers import WanPipeline

    first, second = pipeline("wan"), pipeline("wan")
    with torch.no_grad():
        for parameter in second.transformer.parameters():
            parameter.mul_(0.5)
    pipe = WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=first.scheduler, transformer=first.transformer,
        transformer_2=second.transformer, boundary_ratio=0.5,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ran(run_report: Any) -> dict[tuple[str, str], int]:
    """(role, backend) -> calls of a run."""
    counts: dict[tuple[str, str], int] = {}
    for row in run_report.rows.values():
        if row.calls:
            counts[row.role, row.backend] = counts.get((row.role, row.backend), 0) + row.calls
    return counts


@pytest.mark.parametrize("given", ["pipeline", "mapping"])
def test_each_expert_has_its_own_configuration(given: str) -> None:
    pipe = two_experts()
    expected, before = sample(pipe, "wan", steps=4), [state(pipe.transformer), state(pipe.transformer_2)]
    experts = {"transformer": pipe.transformer, "transformer_2": pipe.transformer_2}
    config = {
        "transformer": {"default": "torch_sdpa", "per_role": {"cross": "sdpa_math"}},
        "transformer_2": {"default": "sdpa_math", "schedule": [{"backend": "reference", "steps": "3"}]},
    }
    target = pipe if given == "pipeline" else experts
    applied = apply(target, config, scheduler=pipe.scheduler)
    output = sample(pipe, "wan", steps=4)
    assert {name: ran(one) for name, one in applied.reports.items()} == {
        "transformer": {("self", "torch_sdpa"): 8, ("cross", "sdpa_math"): 8},
        "transformer_2": {  # step 3 of the scheduler is the second one that this expert computes
            ("self", "sdpa_math"): 4, ("cross", "sdpa_math"): 4, ("self", "reference"): 4, ("cross", "reference"): 4,
        },
    }  # fmt: skip
    torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-4)
    assert report(target).keys() == experts.keys()
    reset(target)
    for expert, original in zip(experts.values(), before, strict=True):
        assert_same_state(original, state(expert))
    assert torch.equal(sample(pipe, "wan", steps=4), expected)


def test_an_expert_that_a_map_does_not_name_is_not_routed() -> None:
    pipe = two_experts()
    before = state(pipe.transformer)
    applied = apply(pipe, {"transformer_2": "sdpa_math"})
    assert_same_state(before, state(pipe.transformer))
    sample(pipe, "wan", steps=4)
    assert {name: ran(one) for name, one in applied.reports.items()} == {
        "transformer_2": {("self", "sdpa_math"): 8, ("cross", "sdpa_math"): 8}
    }
    reset(pipe)
    applied = apply(pipe, "sdpa_math")  # without names: for both
    sample(pipe, "wan", steps=4)
    assert {name: one.calls for name, one in applied.reports.items()} == {"transformer": 16, "transformer_2": 16}
    reset(pipe)


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_an_interrupted_pipeline_leaves_a_model_that_runs_as_before(name: str) -> None:
    pipe = pipeline(name)
    expected, before = sample(pipe, name), state(pipe.transformer)

    def stop(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        raise KeyboardInterrupt

    with attention_backend(pipe, "sdpa_math"), pytest.raises(KeyboardInterrupt):
        sample(pipe, name, callback_on_step_end=stop)
    assert_same_state(before, state(pipe.transformer))
    assert torch.equal(sample(pipe, name), expected)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("diffusers_*.py")), ids=lambda path: path.stem)
def test_each_example_runs_as_it_says(path: Path) -> None:
    summary = runpy.run_path(str(path))["main"]()
    assert {
        "diffusers_flux": "flux.double torch_sdpa 4 calls, flux.single sdpa_math 4 calls",
        "diffusers_wan": "self custom_sparse_attn 12 calls, cross torch_sdpa 12 calls",
        "diffusers_sdxl": "self emulated_int8 8 calls, cross torch_sdpa 8 calls",
        "diffusers_qwen_image": "joint torch_sdpa 2 calls, joint sdpa_math 4 calls",
        "diffusers_sd3": "joint torch_sdpa 6 calls, sd3.image_self torch_sdpa 2 calls, joint emulated_int8 6 calls, "
        "sd3.image_self emulated_int8 2 calls",
        "diffusers_ltx2": "self emulated_int8 4 calls, ltx2.audio_self torch_sdpa 4 calls, cross torch_sdpa 4 calls, "
        "ltx2.audio_text_cross torch_sdpa 4 calls, ltx2.audio_to_video torch_sdpa 4 calls, "
        "ltx2.video_to_audio torch_sdpa 4 calls",
        "diffusers_hunyuan_video_15": "text_self reference 2 calls, hunyuan_video.double sdpa_math 4 calls",
        "diffusers_z_image": "image_self torch_sdpa 2 calls, text_self torch_sdpa 2 calls, joint emulated_int8 4 calls",
    }[path.stem] in summary
    assert "fallback" not in summary
    assert "not reached" not in summary
    assert f"(../integrations/examples/{path.name})" in (ROOT / "docs" / "diffusers.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("compiled", [False, True])
def test_other_cards_compute_heads_except_under_compile(monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    workers = second_worker(monkeypatch)
    model, given = tiny.MODELS["flux"]()
    expected = tiny.forward(model, given)
    applied = apply(model, {"default": "torch_sdpa", "cards": "all"})
    if compiled:
        model.compile_repeated_blocks(backend="eager", fullgraph=True)
    for _ in range(4):
        output = tiny.forward(model, given)
    torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-4)
    notes = applied.reports["model"].notes
    reset(model)
    assert reasons_off(notes) == (["cards.compiled"] if compiled else [])
    assert [worker.sent > 9 for worker in workers] == ([] if compiled else [True])  # nine measure the link


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wan", "flux", "sdxl", "qwen_image_masked"])
@pytest.mark.parametrize("way", ["whole, chosen first", "whole, compiled first", "blocks"])
def test_compiled_models_are_routed_in_one_graph(name: str, way: str) -> None:
    import torch._dynamo

    torch._dynamo.reset()
    model, given = tiny.MODELS[name]()
    expected = tiny.forward(model, given)
    chosen: Any = model
    if way == "whole, compiled first":
        chosen = torch.compile(model, backend="eager", fullgraph=True)
    elif way == "blocks":
        model.compile_repeated_blocks(backend="eager", fullgraph=True)
    applied = apply(chosen, "sdpa_math")
    called = torch.compile(model, backend="eager", fullgraph=True) if way == "whole, chosen first" else chosen
    for _ in range(2):
        output = tiny.forward(called, given)
    torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-4)
    rows = [row for row in applied.reports["model"].rows.values() if row.calls]
    assert {row.backend for row in rows} == {"sdpa_math"}
    assert sum(row.calls for row in rows) == 2 * sum(ROLES[name].values())
    reset(chosen)
    torch.testing.assert_close(tiny.forward(called, given), expected, rtol=1e-3, atol=1e-4)
