"""Compare Attention Backends without a server: backends that are wrong on purpose, and the time spent in attention."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
from syrupy.assertion import SnapshotAssertion

torch = pytest.importorskip("torch", reason="torch is not installed")

import tiny_sampling  # noqa: E402
from attention_backends.backends.config import AttentionConfig, AttentionSpec  # noqa: E402
from attention_backends.comparison.report import Row  # noqa: E402
from broken_backends import DROPPED_MASK, NAN, WRONG_SCALE, Wrong, dropped_mask, router, wrong_scale  # noqa: E402
from hook_side import PLACES, last_run, model_call, nodes_module, plain_comfyui, selected, stand_in  # noqa: E402

pytestmark = pytest.mark.comfy


@pytest.fixture(autouse=True)
def _comfy(monkeypatch: pytest.MonkeyPatch) -> None:
    plain_comfyui(monkeypatch)


class Noise:
    """What RandomNoise hands over."""

    seed = 3

    def generate_noise(self, latent: dict[str, Any]) -> Any:
        return torch.randn(latent["samples"].shape, generator=torch.Generator().manual_seed(self.seed))


def set_up(family: str, steps: int = 4) -> Any:
    import comfy.samplers

    setup = nodes_module("compare.compare_setup")
    model = tiny_sampling.build(family)
    positive, negative = tiny_sampling.conditioning(family)
    guider = setup.make_guider(model, positive, negative, tiny_sampling.FAMILIES[family].cfg)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)
    latent = {"samples": torch.zeros(tiny_sampling.FAMILIES[family].latents[0])}
    return setup.SetUp(guider, Noise(), comfy.samplers.sampler_object("euler"), sigmas, latent, "end_to_end")


def compared(family: str, backends: str) -> tuple[dict[str, Any], list[Any]]:
    """The node's work from variants to judged rows and pictures."""
    runs = nodes_module("compare.compare_runs")
    with torch.inference_mode():
        setup = set_up(family)
        model = setup.guider.model_patcher
        report, results = runs.compare(setup, runs.make_variants(model, backends, {}), 1)
        pictures = nodes_module("compare.compare").judge(report, results, model, None)
    return {row.asked: row for row in report.rows}, pictures


class Vae:
    """Makes pictures of 4 x 6 pixels, whatever the latent."""

    def decode(self, samples: torch.Tensor) -> torch.Tensor:
        return torch.full((1, 4, 6, 3), 0.5)


@pytest.mark.parametrize("vae", [None, Vae()], ids=["previews", "vae"])
def test_the_size_is_that_of_the_picture(vae: Vae | None) -> None:
    setup = set_up("wan", steps=2)
    rows = [Row("torch_sdpa"), Row("sdpa_math")]
    report = nodes_module("compare.compare_setup").make_report(setup, rows)
    latent = tuple(setup.latent.shape[-2:])
    nodes_module("compare.compare").judge(report, [setup.latent, None], setup.guider.model_patcher, vae)
    assert (report.height, report.width) == ((4, 6) if vae else (8 * latent[0], 8 * latent[1]))
    assert any("connect a VAE" in note for note in report.notes) is (vae is None)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def nan_in_a_corner(call: Any) -> Any:
        output = wrong_scale(call).clone()
        output[:, :, 3] = float("nan")
        return output

    made = router(Wrong(DROPPED_MASK, dropped_mask), Wrong(WRONG_SCALE, wrong_scale), Wrong(NAN, nan_in_a_corner))
    for module in ("compare.compare_runs", "compare.compare_setup", "hook.run"):
        monkeypatch.setattr(nodes_module(module), "router_for", lambda device: made)


@pytest.mark.parametrize("family", ["flux_masked", "hunyuan_video"])
def test_a_dropped_mask_is_unmistakable_in_the_numbers(broken: None, family: str) -> None:
    """Random weights hardly heed what they attend to; what a trained model draws is in test_comparison_run.py."""
    rows, pictures = compared(family, f"sdpa_math, {DROPPED_MASK}, {WRONG_SCALE}")
    assert rows["sdpa_math"].verdict in ("same to the eye", "bit-identical")
    for name in (DROPPED_MASK, WRONG_SCALE):
        row = rows[name]
        assert row.ran == name
        assert not row.identical
        assert row.relative_l2 > 300 * rows["sdpa_math"].relative_l2
        assert row.psnr < rows["sdpa_math"].psnr - 40
    assert not torch.equal(pictures[0], pictures[list(rows).index(DROPPED_MASK)])


def test_nan_is_named_in_the_row(broken: None) -> None:
    rows, _ = compared("wan", NAN)
    assert "NaN" in rows[NAN].verdict


def test_sparse_backends_with_options_are_rows_on_self_attention_alone() -> None:
    name = "video_sparse_attn sparsity=0.5"
    rows, _ = compared("wan", name)
    assert (rows[name].failed, rows[name].fell_back) == (None, 0)
    assert rows[name].relative_l2 > 1e-3
    runs = nodes_module("compare.compare_runs")
    with torch.inference_mode():
        report = runs.compare_attention(set_up("wan"), name, {}, 1)
    calls = next(row.calls for row in report.rows if row.asked == name)
    assert {call.role: call.relative_l2 > 1e-3 for call in calls} == {"self": True, "cross": False}


def test_cancel_while_attention_alone_is_compared(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, snapshot: SnapshotAssertion
) -> None:
    import comfy.model_management
    import comfy.utils

    runs = nodes_module("compare.compare_runs")
    begun: list[int] = []

    def update(self: Any, done: int, *_: Any) -> None:
        begun.append(done)
        if done == 4:  # three rows: the warm-ups, the first row's first run, then Cancel
            raise comfy.model_management.InterruptProcessingException

    monkeypatch.setattr(comfy.utils.ProgressBar, "update_absolute", update)
    caplog.set_level("INFO", logger="attention_backends")
    with torch.inference_mode(), pytest.raises(comfy.model_management.InterruptProcessingException):
        runs.compare_attention(set_up("wan"), "sdpa_math", {}, 2)
    assert begun == [0, 1, 2, 3, 4]
    table = next(text for text in caplog.messages if text.startswith("the comparison was cancelled"))
    rows = {line.split()[0]: line for line in table.splitlines()[2:] if line}
    assert "interrupted" not in rows["torch_sdpa"], "its first run was finished"
    assert " ".join(rows["sdpa_math"].split()) == snapshot


class Event:
    """A GPU's event on a made-up clock: it is passed when the stream gets there, and read only at rest."""

    clock: ClassVar[float] = 0.0
    at_rest: ClassVar[bool] = False
    passed: float | None = None

    def record(self, stream: Any) -> None:
        self.passed = Event.clock
        Event.clock += 1.5  # milliseconds of whatever comes next

    def elapsed_time(self, end: Event) -> float:
        assert Event.at_rest, "an event was read before the device had come to rest: that is a synchronisation"
        assert self.passed is not None
        assert end.passed is not None
        return end.passed - self.passed


def test_time_in_attention_is_that_between_events_read_at_the_end_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where the account has no times: every call between two events, none of them read in a step."""
    from attention_backends.comparison import rounds

    timed, runs = nodes_module("compare.attention_time"), nodes_module("compare.compare_runs")
    gpu = torch.device("cuda")
    monkeypatch.setattr(timed.Timed, "new_event", Event)
    monkeypatch.setattr(timed.Timed, "times", staticmethod(lambda device: True))

    def at_rest(device: Any) -> None:
        Event.at_rest = True

    def run(variant: Any) -> None:
        Event.at_rest = False
        setup.sample(variant.model)
        variant.report = last_run()
        at_rest(gpu)

    monkeypatch.setattr(rounds, "synchronise", at_rest)
    setup = set_up("wan", steps=2)
    variants = runs.make_variants(setup.guider.model_patcher, "sdpa_math, comfy", {})
    for variant in variants:
        assert variant.attention_ms(gpu) is None, "nothing ran"
        run(variant)
        calls = sum(row["calls"] for row in last_run()["rows"])
        assert calls == 8
        assert variant.attention_ms(gpu) == pytest.approx(1.5 * calls)
        assert variant.attention_ms(gpu) is None, "asked twice of one run"
        run(variant)
        assert variant.attention_ms(gpu) == pytest.approx(1.5 * calls), "of this run alone"


def test_a_run_of_which_not_every_call_was_timed_has_no_share(monkeypatch: pytest.MonkeyPatch) -> None:
    timed, runs = nodes_module("compare.attention_time"), nodes_module("compare.compare_runs")
    monkeypatch.setattr(timed.Timed, "new_event", Event)
    monkeypatch.setattr(timed.Timed, "times", staticmethod(lambda device: True))
    monkeypatch.setattr(Event, "at_rest", True)
    setup = set_up("wan", steps=2)
    variant = runs.make_variants(setup.guider.model_patcher, "sdpa_math", {})[0]
    setup.sample(variant.model)
    variant.report = last_run()
    variant._timed.pairs.pop()
    assert variant.attention_ms(torch.device("cuda")) is None


def test_on_the_cpu_the_account_has_the_times_and_no_event_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    timed, runs = nodes_module("compare.attention_time"), nodes_module("compare.compare_runs")
    monkeypatch.setattr(timed.Timed, "new_event", staticmethod(lambda: pytest.fail("an event on the CPU")))
    setup = set_up("wan", steps=2)
    variant = runs.make_variants(setup.guider.model_patcher, "sdpa_math", {})[0]
    setup.sample(variant.model)
    variant.report = last_run()
    assert variant.attention_ms(torch.device("cpu")) == pytest.approx(sum(row["ms"] for row in last_run()["rows"]))


def test_another_packs_model_is_left_as_it_is() -> None:
    """Where another pack answers the calls, our override is not asked first, so nothing is timed."""
    timed, runs = nodes_module("compare.attention_time"), nodes_module("compare.compare_runs")
    plain = tiny_sampling.build("wan")
    assert timed.timed(plain) == (plain, None)
    ours = selected(plain, "sdpa_math")
    ours.model_options["transformer_options"]["optimized_attention_override"] = lambda func, *args, **kwargs: None
    assert timed.timed(ours) == (ours, None)
    assert runs.Variant(runs.Row("model_1"), ours).attention_ms(torch.device("cuda")) is None


def test_a_timed_model_is_a_clone_that_gives_the_same_picture() -> None:
    setup = set_up("wan", steps=2)
    ours = selected(setup.guider.model_patcher, "torch_sdpa", strict=True)
    clone, override = nodes_module("compare.attention_time").timed(ours)
    assert override is not None
    assert clone is not ours
    assert ours.model_options["transformer_options"]["attention_backends"] is not override
    assert torch.equal(setup.sample(clone), setup.sample(ours))


@pytest.mark.gpu
def test_on_a_card_the_events_give_a_time() -> None:
    """Through the hook's own stand-in for a model, whose calls and tensors lie on the card."""
    timed, sampling = nodes_module("compare.attention_time"), nodes_module("hook.run")
    ours = timed.Timed((AttentionConfig(default=AttentionSpec("sdpa_math"), source="node"),))
    ours.pairs = []
    run = sampling.Run(ours)
    options = {sampling.KEY: ours, sampling.OVERRIDE: ours, sampling.RUN_KEY: run}
    model = stand_in(["WanModel"], PLACES)
    tokens = torch.randn(1, 512, 32, device="cuda")
    calls = [((tokens, tokens, tokens, 2), {"transformer_options": options})] * 5
    model_call(model, options, lambda: model.get_submodule("blocks.0.self_attn")(calls), "cuda")
    run.close()
    torch.cuda.synchronize()
    milliseconds, counted = ours.milliseconds()
    assert counted == 5
    assert milliseconds > 0
    assert ours.milliseconds() == (0, 0)


def test_a_comparison_is_one_entry_of_the_kept_runs_and_warm_ups_are_none() -> None:
    runs, compared = nodes_module("history.runs"), nodes_module("compare.compare_runs")
    setup = set_up("wan", steps=2)
    setup.sample(selected(setup.guider.model_patcher, "sdpa_math"))
    before = [entry["number"] for entry in runs.summaries()]
    # sage_attn cannot run here: without strict its model falls back.
    fallen = selected(setup.guider.model_patcher, "sage_attn")
    variants = compared.make_variants(setup.guider.model_patcher, "sdpa_math, comfy", {"model_1": fallen})
    report, results = compared.compare(setup, variants, 2)
    report.relate()
    assert len(results) == len(report.rows)
    entry, *others = runs.summaries()
    assert [one["number"] for one in others] == before[: len(others)], "one new entry"
    account = runs.find(entry["number"])
    parts = account["compared"]
    rows = [row for row in report.rows if row.failed is None]
    assert entry["compared"] == len(parts) == 2 * len(rows), "every timed run, and no run of one step"
    assert {part["steps"] for part in parts} == {2}
    assert account["notes"][0].startswith(f"the last of {len(parts)} runs of one comparison: ")
    for part in parts:
        assert runs.find(part["number"])["rows"] == part["rows"]
        assert runs.decisions(part["number"]) is not None
    assert runs.recent()[0]["number"] == parts[-1]["number"] == account["number"]

    by_name = {row.asked: row for row in report.rows}
    assert by_name["model_1"].fell_back > 0
    assert by_name["model_1"].speedup is None
    assert by_name["sdpa_math"].fell_back == 0
    assert by_name["sdpa_math"].speedup is not None


def test_runs_outside_of_a_comparison_are_kept_one_by_one_also_after_one_that_failed() -> None:
    runs = nodes_module("history.runs")
    setup = set_up("wan", steps=1)
    model = selected(setup.guider.model_patcher, "sdpa_math")

    def fails() -> None:
        with runs.together() as kept:
            setup.sample(model)
            assert runs.find(kept[0].report["number"]) is not None, "it can be asked for before the end"
            raise ValueError("as it should")

    with pytest.raises(ValueError, match="as it should"):
        fails()
    first = runs.recent()[0]
    assert "compared" not in first, "a single run is an entry of its own"
    setup.sample(model)
    assert runs.recent()[0]["number"] == first["number"] + 1
    assert runs.recent()[1] == first
