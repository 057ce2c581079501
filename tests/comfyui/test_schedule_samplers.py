"""In a real ComfyUI: the backend of each model call is the one that the step rule gives, for every sampler.

Each test keeps, for every model call, the sigma that ComfyUI gave the model and the kernels that ran in it. What should
have run is worked out here again: the step is the one that the sampler's own progress bar counts; of a sampler without
one, the last step whose sigma is not below the call's, within 1e-4.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
from syrupy.assertion import SnapshotAssertion

torch = pytest.importorskip("torch", reason="torch is not installed")

import tiny_sampling  # noqa: E402
from attention_backends.backends.config import AttentionConfig, AttentionSpec  # noqa: E402
from attention_backends.backends.config.schedule import ScheduleEntry  # noqa: E402
from attention_backends.backends.config.windows import parse_numbers  # noqa: E402
from attention_backends.backends.engine.router import Router  # noqa: E402
from attention_backends.backends.kernels import BACKENDS  # noqa: E402
from attention_backends.backends.kernels.registry import detect  # noqa: E402
from hook_side import (  # noqa: E402
    Kernel,
    comfyui,
    exact,
    host,
    last_run,
    model_call,
    nodes_module,
    plain_comfyui,
    sampling,
    selected,
    stand_in,
)
from tiny_models import FAMILIES  # noqa: E402

# Kernels that stand in for the backends of a test, so that each call tells which of them it had.
BASE, FIRST, SECOND, THIRD = "torch_sdpa", "sdpa_math", "sdpa_efficient", "sdpa_flash"
BLOCKS = ("blocks.0", "blocks.1")


class Call(NamedTuple):
    """One call of the model."""

    sigma: float
    schedule: tuple[float, ...]
    ran: frozenset[str]
    """Backends; with the block and the role behind them where a test asks for it."""
    counted: int | None = None
    """The step that the sampler's progress bar counts."""

    @property
    def step(self) -> int:
        """The step by the rule; the last sigma of a schedule ends the last step."""
        if self.counted is not None:
            return self.counted
        known = [i for i, sigma in enumerate(self.schedule[:-1]) if sigma >= self.sigma * (1 - 1e-4)]
        return known[-1] if known else 0


class Recorder:
    """The model calls of the runs of a test."""

    def __init__(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.model = model
        self.calls: list[Call] = []
        self.skipped: frozenset[int] = frozenset()
        self.places = False
        self.counted: int | None = None
        self._seen: set[str] = set()
        import comfy.k_diffusion.sampling

        monkeypatch.setattr(comfy.k_diffusion.sampling, "trange", self._progress)
        kernels = {name: Kernel(name, self._kernel(name)) for name in (BASE, FIRST, SECOND, THIRD)}
        router = Router(detect(torch.device("cpu")), {**BACKENDS, **kernels})
        monkeypatch.setattr(sampling, "router_for", lambda device: router)

    def _progress(self, steps: int, **_: Any) -> Iterator[int]:
        """In place of the progress bar that ComfyUI's samplers count their steps with."""
        for self.counted in range(steps):
            yield self.counted

    def _kernel(self, name: str) -> Any:
        def run(call: Any) -> torch.Tensor:
            scope = nodes_module("hook.attention_modules").current_model_call()
            block = scope.attention_module.block
            # The text is the only other length in these models.
            role = "self" if call.query.shape[2] == call.key.shape[2] else "cross"
            self._seen.add(f"{name} {block} {role}" if self.places else name)
            return torch.nn.functional.scaled_dot_product_attention(call.query, call.key, call.value)

        return run

    def patched(self, *entries: dict[str, str], before: Any = None) -> Any:
        """The model after a Selector and one Attention Schedule node for each entry, its calls kept."""
        model = before or selected(self.model, BASE)
        node = nodes_module("configure.schedule").AttentionSchedule
        for entry in entries:
            said = {"when": "steps", "window": "", "blocks": "", "role": "", **entry}
            model = node.execute(model, **said).args[0]
        model = model.clone()
        model.set_model_unet_function_wrapper(self._around)
        return model

    def _around(self, apply_model: Any, arguments: dict[str, Any]) -> torch.Tensor:
        number = len(self.calls)
        self._seen = set()
        options = arguments["c"]["transformer_options"]
        if number in self.skipped:  # as a caching pack does
            output = torch.zeros_like(arguments["input"])
        else:
            output = apply_model(arguments["input"], arguments["timestep"], **arguments["c"])
        schedule = tuple(options["sample_sigmas"].tolist())
        self.calls.append(Call(float(arguments["timestep"].max()), schedule, frozenset(self._seen), self.counted))
        return output

    def sample(
        self, model: Any, sampler: str = "euler", steps: int = 5, name: str = "wan", **more: Any
    ) -> torch.Tensor:
        """A whole run by ComfyUI's KSampler; `latent` and what KSamplerAdvanced has can be given."""
        import comfy.sample

        self.calls.clear()
        self.counted = None
        with torch.inference_mode():
            positive, negative = tiny_sampling.conditioning(name)
            latent = more.pop("latent", torch.zeros(FAMILIES[name].latents[0]))
            noise = comfy.sample.prepare_noise(latent, 0)
            return comfy.sample.sample(
                model, noise, steps, more.pop("cfg", 1.0), sampler, more.pop("scheduler", "simple"), positive, negative,
                latent, disable_pbar=True, seed=0, **more,
            ).clone()  # fmt: skip

    def sample_by(self, model: Any, function: Any, steps: int = 6, cfg: float = 1.0, **options: Any) -> torch.Tensor:
        """A whole run by a sampler function, or by a `Sampler`, as SamplerCustom runs it; simple schedule."""
        import comfy.sample
        import comfy.samplers

        self.calls.clear()
        self.counted = None
        sampler = comfy.samplers.KSAMPLER(function, options) if callable(function) else function
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)
        with torch.inference_mode():
            positive, negative = tiny_sampling.conditioning("wan")
            latent = torch.zeros(FAMILIES["wan"].latents[0])
            noise = comfy.sample.prepare_noise(latent, 0)
            return comfy.sample.sample_custom(
                model, noise, cfg, sampler, sigmas, positive, negative, latent, disable_pbar=True, seed=0
            ).clone()

    def backends(self) -> list[str]:
        """The one backend of each model call."""
        assert all(len(call.ran) == 1 for call in self.calls), self.calls
        return [next(iter(call.ran)) for call in self.calls]


@pytest.fixture
def wan(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    plain_comfyui(monkeypatch)
    return Recorder(tiny_sampling.build("wan"), monkeypatch)


def notes() -> list[str]:
    return list(last_run()["notes"])


ENTRIES = (
    {"backend": SECOND, "when": "percent", "window": "40%-75%"},
    {"backend": THIRD, "when": "sigmas", "window": "0.85-0.6"},
    {"backend": FIRST, "window": "0,last 1"},
)


def expected(call: Call, percent_to_sigma: Any) -> str:
    """What ENTRIES say about a model call; the later entry wins."""
    near = 1e-4
    if call.step in (0, len(call.schedule) - 2):
        return FIRST
    if 0.6 * (1 - near) <= call.sigma <= 0.85 * (1 + near):
        return THIRD
    begin, end = float(percent_to_sigma(0.4)), float(percent_to_sigma(0.75))
    return SECOND if end * (1 - near) <= call.sigma <= begin * (1 + near) else BASE


@pytest.mark.comfy
@pytest.mark.filterwarnings("ignore")  # some samplers warn about few steps
def test_every_sampler_uses_the_backend_that_the_rule_gives(wan: Recorder) -> None:
    import comfy.samplers

    model = wan.patched(*ENTRIES)
    percent_to_sigma = model.get_model_object("model_sampling").percent_to_sigma
    ran: dict[str, list[str]] = {}
    own: set[str] = set()
    for sampler in comfy.samplers.SAMPLER_NAMES:
        assert wan.sample(model, sampler).isfinite().all(), sampler
        ran[sampler] = wan.backends()
        assert ran[sampler] == [expected(call, percent_to_sigma) for call in wan.calls], sampler
        said = notes()
        between = [c for c in wan.calls if not any(abs(c.sigma - s) <= 1e-4 * s for s in c.schedule)]
        by_sigma = [note for note in said if "steps became sigma windows" in note]
        assert len(by_sigma) == (wan.counted is None and bool(between)), (sampler, said)
        own |= {sampler} if by_sigma else set()
        divided = {str(n) for n, call in enumerate(wan.calls, 1) if is_divided(call, percent_to_sigma)}
        listed = [re.search(r"model calls ([\d, ]+) were not", note) for note in said]
        assert {number for match in listed if match for number in match[1].split(", ")} == divided, (sampler, said)
    # By hand, so that the rule above is not its own judge: simple schedule of 5 steps, shift 8.
    assert ran["euler"] == [FIRST, BASE, SECOND, THIRD, FIRST]
    assert ran["heun"] == [FIRST, FIRST, BASE, SECOND, SECOND, THIRD, THIRD, THIRD, FIRST]
    assert own == {"dpm_fast", "dpm_adaptive"}
    assert set(ran) == set(comfy.samplers.SAMPLER_NAMES)


def is_divided(call: Call, percent_to_sigma: Any) -> bool:
    """Whether a window over percent or sigmas holds at this call but not where its step begins, or the other way."""
    if call.counted is None:
        return False

    def inside(sigma: float) -> tuple[bool, bool]:
        begin, end = float(percent_to_sigma(0.4)), float(percent_to_sigma(0.75))
        spans = ((end, begin), (0.6, 0.85))
        return tuple(low * (1 - 1e-4) <= sigma <= high * (1 + 1e-4) for low, high in spans)  # type: ignore[return-value]

    return inside(call.sigma) != inside(call.schedule[call.counted])


@pytest.mark.comfy
@pytest.mark.filterwarnings("ignore")
def test_every_model_call_of_a_step_is_in_the_window_of_that_step(wan: Recorder) -> None:
    model = wan.patched({"backend": FIRST, "window": "first 2"})
    drawn = {
        "euler": "XX----",
        "uni_pc": "XX----",
        "heun": "XXXX-------",
        "exp_heun_2_x0": "XXXX-------",
        "dpm_2_ancestral": "XXXX-------",
        "heunpp2": "XXXXXX---------",
        "sa_solver_pece": "XXX--------",  # its first step corrects nothing
    }
    for sampler, expected in drawn.items():
        wan.sample(model, sampler, steps=6)
        assert "".join("X" if name == FIRST else "-" for name in wan.backends()) == expected, sampler


def own_heun(model: Any, x: Any, sigmas: Any, extra_args: Any, callback: Any, disable: Any) -> Any:
    """A sampler of another pack, in the manner of k-diffusion."""
    for i in range(len(sigmas) - 1):
        first = model(x, sigmas[i] * x.new_ones(len(x)), **extra_args)
        x2 = first + (x - first) * sigmas[i + 1] / sigmas[i]
        if sigmas[i + 1] > 0:
            first = (first + model(x2, sigmas[i + 1] * x.new_ones(len(x)), **extra_args)) / 2
        x = first + (x - first) * sigmas[i + 1] / sigmas[i]
    return x


def nested_loops(model: Any, x: Any, sigmas: Any, extra_args: Any, callback: Any, disable: Any) -> Any:
    """Its loop is a frame further out than the model call, and a loop inside counts something else in `i`."""

    def twice(x: Any, sigma: Any, sigmas: Any) -> Any:
        for i in range(2):
            x = 0.9 * x + 0.1 * i * model(x, sigma * x.new_ones(len(x)), **extra_args)
        return x

    for i in range(len(sigmas) - 1):
        x = twice(x, sigmas[min(i + 1, len(sigmas) - 2)], sigmas)
    return x


def hidden_loop(model: Any, x: Any, sigmas: Any, extra_args: Any, callback: Any, disable: Any) -> Any:
    """Heun's method by a loop that does not count."""
    for now, after in itertools.pairwise(sigmas):
        first = model(x, now * x.new_ones(len(x)), **extra_args)
        if after > 0:
            model(x, after * x.new_ones(len(x)), **extra_args)
        x = first + (x - first) * after / now
    return x


@pytest.mark.comfy
@pytest.mark.parametrize(
    ("function", "drawn"), [(own_heun, "XXXX-------"), (nested_loops, "XXXX--------"), (hidden_loop, "XXX--------")]
)
@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_samplers_of_other_packs(
    wan: Recorder, function: Any, drawn: str, cfg: float, snapshot: SnapshotAssertion
) -> None:
    model = wan.patched({"backend": FIRST, "window": "first 2"})
    wan.sample_by(model, function, cfg=cfg)
    assert "".join("X" if name == FIRST else "-" for name in wan.backends()) == drawn
    said = [note for note in notes() if "its loop was not found" in note]
    if function is not hidden_loop:
        assert said == []
        return
    # The second call of each step, and the first of the next, are at one sigma: which is which is not known.
    assert said == snapshot


@pytest.mark.comfy
def test_noise_that_is_added_before_a_step_does_not_move_the_step(wan: Recorder) -> None:
    import comfy.k_diffusion.sampling

    model = wan.patched({"backend": FIRST, "window": "first 3"})
    wan.sample_by(model, comfy.k_diffusion.sampling.sample_euler, s_churn=2.0)
    assert any(call.sigma > call.schedule[max(call.counted - 1, 0)] for call in wan.calls), "above the step before"
    assert wan.backends() == [FIRST] * 3 + [BASE] * 3


@pytest.mark.comfy
def test_a_sampler_class_with_a_loop_of_its_own(wan: Recorder) -> None:
    import comfy.samplers

    class Own(comfy.samplers.Sampler):
        def sample(
            self, model_wrap: Any, sigmas: Any, extra_args: Any, callback: Any, noise: Any, *_: Any, **__: Any
        ) -> Any:
            options, ones = extra_args["model_options"], noise.new_ones(len(noise))
            for i in range(len(sigmas) - 1):
                model_wrap(noise, sigmas[i] * ones, model_options=options, seed=0)
                noise = model_wrap(noise, sigmas[max(i, 1)] * ones, model_options=options, seed=0)
            return noise

    model = wan.patched({"backend": FIRST, "window": "0"})
    wan.sample_by(model, Own(), steps=4)
    assert wan.backends() == [FIRST] * 2 + [BASE] * 6


@pytest.mark.comfy
def test_the_account_tells_the_same_steps(wan: Recorder) -> None:
    wan.sample(wan.patched({"backend": FIRST, "window": "first 2"}), "heun", steps=4)
    steps = [window["steps"] for window in nodes_module("history.runs")._runs[0].windows]
    assert steps == [[0, 0], [0, 0], [1, 1], [1, 1], [2, 2], [2, 2], [3, 3]]


@pytest.mark.comfy
@pytest.mark.parametrize(("denoise", "steps"), [(0.5, 4), (0.3, 3)])
def test_partial_denoise_counts_the_steps_that_are_run(wan: Recorder, denoise: float, steps: int) -> None:
    model = wan.patched({"backend": FIRST, "window": "0"}, {"backend": SECOND, "window": "last 1"})
    picture = torch.randn(FAMILIES["wan"].latents[0], generator=torch.Generator().manual_seed(1))
    wan.sample(model, steps=steps, denoise=denoise, latent=picture)
    assert wan.calls[0].sigma < 0.99, "a picture is changed, not made"
    assert wan.backends() == [FIRST, *[BASE] * (steps - 2), SECOND]


@pytest.mark.comfy
def test_percent_is_of_the_whole_run_under_partial_denoise(wan: Recorder) -> None:
    model = wan.patched({"backend": FIRST, "when": "percent", "window": "0%-60%"})
    picture = torch.ones(FAMILIES["wan"].latents[0])
    wan.sample(model, steps=4, denoise=0.5, latent=picture)  # from 50 %: 50, 62.5, 75, 87.5 %
    assert wan.backends() == [FIRST, BASE, BASE, BASE]


@pytest.mark.comfy
def test_two_stages_have_steps_of_their_own(wan: Recorder) -> None:
    """As Wan 2.2 samples: a model for high noise, then another for low noise, one schedule on each."""
    high = wan.patched({"backend": FIRST, "window": "0"})
    latent = wan.sample(high, steps=6, start_step=0, last_step=3, force_full_denoise=False)
    assert wan.backends() == [FIRST, BASE, BASE]
    low = wan.patched({"backend": SECOND, "window": "last 2"}, {"backend": THIRD, "when": "percent", "window": "0-0.6"})
    wan.sample(low, steps=6, start_step=3, last_step=6, latent=latent, disable_noise=True)
    assert wan.backends() == [THIRD, SECOND, SECOND], "percent of the whole run, steps of this stage"
    assert any("never held" in note for note in notes()) is False


@pytest.mark.comfy
def test_a_stage_that_stops_early_ends_with_its_last_step(wan: Recorder) -> None:
    model = wan.patched({"backend": FIRST, "window": "last 1"})
    wan.sample(model, "heun", steps=6, last_step=2)  # its last call is at the sigma where it stops
    assert wan.backends() == [BASE, BASE, FIRST, FIRST]
    assert wan.calls[-1].sigma == pytest.approx(wan.calls[-1].schedule[-1])


@pytest.mark.comfy
def test_skipped_model_calls_do_not_move_the_steps(wan: Recorder) -> None:
    model = wan.patched({"backend": FIRST, "window": "0-1,last 1"})
    wan.skipped = frozenset({1, 3})
    wan.sample(model, steps=6)
    assert [sorted(call.ran) for call in wan.calls] == [[FIRST], [], [BASE], [], [BASE], [FIRST]]


@pytest.mark.comfy
def test_a_pack_that_calls_the_model_twice_does_not_move_the_steps(wan: Recorder) -> None:
    inner = wan.patched({"backend": FIRST, "window": "0"})
    around = inner.model_options["model_function_wrapper"]

    def twice(apply_model: Any, arguments: dict[str, Any]) -> torch.Tensor:
        around(apply_model, arguments)
        return around(apply_model, arguments)

    inner.set_model_unet_function_wrapper(twice)
    wan.sample(inner, steps=3)
    assert wan.backends() == [FIRST] * 2 + [BASE] * 4


@pytest.mark.comfy
def test_blocks_and_roles(wan: Recorder, snapshot: SnapshotAssertion) -> None:
    wan.places = True
    model = wan.patched(
        {"backend": FIRST, "blocks": "last 1"},
        {"backend": SECOND, "blocks": "0", "role": "cross", "window": "1-"},
    )
    wan.sample(model, steps=2)
    late = {f"{FIRST} blocks.1 self", f"{FIRST} blocks.1 cross", f"{BASE} blocks.0 self"}
    assert [set(call.ran) for call in wan.calls] == [
        late | {f"{BASE} blocks.0 cross"},
        late | {f"{SECOND} blocks.0 cross"},
    ]
    assert {row["source"] for row in last_run()["rows"]} == snapshot


@pytest.mark.comfy
def test_the_preset_keeps_the_first_and_last_steps_precise(wan: Recorder, snapshot: SnapshotAssertion) -> None:
    node = nodes_module("configure.schedule")
    model = wan.patched({"backend": FIRST, "when": node.PRECISE, "window": "2"})
    wan.sample(model, steps=6)
    assert wan.backends() == [FIRST, FIRST, BASE, BASE, FIRST, FIRST]
    with pytest.raises(ValueError) as caught:
        wan.patched({"backend": "sage_attn", "when": node.PRECISE, "window": "2"})
    assert str(caught.value) == snapshot
    with pytest.raises(ValueError) as caught:
        wan.patched({"backend": FIRST, "when": node.PRECISE, "window": "0-3"})
    assert str(caught.value) == snapshot


@pytest.mark.comfy
@pytest.mark.parametrize(
    ("steps", "count", "faster"),
    [(2, 1, []), (3, 1, [1]), (4, 1, [1, 2]), (3, 2, []), (4, 2, []), (6, 2, [2, 3]), (8, 2, [2, 3, 4, 5])],
)
def test_the_preset_in_a_short_run_leaves_the_stated_steps(
    wan: Recorder, steps: int, count: int, faster: list[int]
) -> None:
    """The table of docs/schedule.md."""
    model = wan.patched({"backend": FIRST, "when": nodes_module("configure.schedule").PRECISE, "window": f"{count}"})
    wan.sample(model, steps=steps)
    assert [step for step, ran in enumerate(wan.backends()) if ran == BASE] == faster


@pytest.mark.comfy
def test_a_split_run_of_two_and_two_steps(wan: Recorder) -> None:
    """Each sampler is a run of its own: the preset covers both steps, and the guard checks each role and block once."""
    set_default = nodes_module("hook.patch").set_default
    lossy = set_default(wan.model, "emulated_int8", accuracy="exact", strict=False, guard="watch")
    precise = wan.patched({"backend": FIRST, "when": nodes_module("configure.schedule").PRECISE, "window": "1"})
    for first in (0, 2):
        stage: dict[str, Any] = {"steps": 4, "start_step": first, "last_step": first + 2, "disable_noise": first > 0}
        wan.sample(lossy, **stage)
        checked = {(row["role"], row["block"]): row["checked"] for row in last_run()["guard"]}
        assert checked == {(role, block): 1 for role in ("self", "cross") for block in BLOCKS}
        wan.sample(precise, **stage)
        assert wan.backends() == [FIRST] * 2


@pytest.mark.comfy
def test_the_later_of_two_windows_wins_and_the_account_says_it_once(wan: Recorder, snapshot: SnapshotAssertion) -> None:
    model = wan.patched({"backend": FIRST, "window": "0-2"}, {"backend": SECOND, "window": "2-3"})
    wan.sample(model)
    assert wan.backends() == [FIRST, FIRST, SECOND, SECOND, BASE]
    assert notes() == snapshot


@pytest.mark.comfy
def test_a_window_that_never_holds_is_named(wan: Recorder, snapshot: SnapshotAssertion) -> None:
    model = wan.patched({"backend": FIRST, "window": "7-9"}, {"backend": SECOND, "blocks": "2"})
    wan.sample(model)
    assert wan.backends() == [BASE] * 5
    steps, blocks = notes()
    assert steps == snapshot
    assert blocks == snapshot


@pytest.mark.comfy
def test_without_windows_over_time_no_sigma_is_read(wan: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[Any] = []
    maximum = torch.Tensor.max

    def counting(tensor: torch.Tensor, *args: Any) -> Any:
        if tensor.numel() <= 2 and not args:
            reads.append(tensor)
        return maximum(tensor, *args)

    monkeypatch.setattr(torch.Tensor, "max", counting)
    wan.sample(wan.patched({"backend": FIRST, "blocks": "0"}))
    ours = len(reads)
    wan.sample(wan.patched({"backend": FIRST, "window": "0"}))
    assert len(reads) - 2 * ours == len(wan.calls) == 5, "one read for each model call"


@pytest.mark.comfy
def test_discrete_noise_levels_too(monkeypatch: pytest.MonkeyPatch) -> None:
    comfyui()
    unet = Recorder(tiny_sampling.build("sd15"), monkeypatch)
    model = unet.patched(
        {"backend": FIRST, "window": "0,last 1"}, {"backend": SECOND, "when": "percent", "window": "40%-60%"}
    )
    percent_to_sigma = model.get_model_object("model_sampling").percent_to_sigma
    for sampler in ("euler", "dpmpp_2m_sde", "ddim", "uni_pc", "dpm_2"):
        unet.sample(model, sampler, name="sd15", scheduler="karras")
        for call in unet.calls:
            inside = float(percent_to_sigma(0.6)) <= call.sigma <= float(percent_to_sigma(0.4))
            outside = FIRST if call.step in (0, len(call.schedule) - 2) else BASE
            assert call.ran == {SECOND if inside else outside}, (sampler, call)


# Without ComfyUI's sampler around


def stand_in_calls(window: str, *calls: dict[str, torch.Tensor]) -> tuple[list[str], list[str]]:
    """Model calls of one run with these transformer options, on a stand-in: what ran in each, and the notes."""
    schedule = (ScheduleEntry(AttentionSpec(FIRST), steps=parse_numbers(window, "steps")),)
    ours = host.Override((AttentionConfig(AttentionSpec(BASE), schedule=schedule, source="node"),))
    run = sampling.Run(ours)
    options = {sampling.KEY: ours, sampling.OVERRIDE: ours, sampling.RUN_KEY: run}
    model = stand_in(["WanModel"], {"blocks.0.self_attn": "WanSelfAttention"})
    query = torch.randn(1, 6, 16)
    ran = []
    for call in calls:
        before = {row.backend: row.calls for row in run.run_report.rows.values()}
        model_call(model, {**options, **call}, lambda: ours(exact, query, query, query, 2))
        now = {row.backend: row.calls for row in run.run_report.rows.values()}
        ran += [name for name, count in now.items() if count > before.get(name, 0)]
    run.note_unmatched_roles()
    return ran, list(run.run_report.notes)


def at(sigma: float, *sigmas: float) -> dict[str, torch.Tensor]:
    return {"sigmas": torch.tensor([sigma, sigma]), "sample_sigmas": torch.tensor(sigmas)}


def test_another_sampler_in_the_same_run_has_steps_of_its_own() -> None:
    first, second = (1.0, 0.5, 0.0), (0.6, 0.5, 0.4, 0.0)
    ran, said = stand_in_calls(
        "1", at(1.0, *first), at(0.5, *first), at(0.6, *second), at(0.5, *second), at(0.4, *second)
    )
    assert ran == [BASE, FIRST, BASE, FIRST, BASE]
    assert not [note for note in said if "never held" in note]


def test_a_model_call_without_a_sampler_has_no_step(snapshot: SnapshotAssertion) -> None:
    ran, said = stand_in_calls("0-", {}, {"sigmas": torch.tensor([0.5])})
    assert ran == [BASE, BASE]
    assert said == snapshot


@pytest.mark.comfy
@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_each_context_window_is_in_the_window_of_its_step(wan: Recorder, cfg: float) -> None:
    """ComfyUI's node calls the model for overlapping parts of a video in each step, and makes wrappers of its own."""
    windows = pytest.importorskip("comfy_extras.nodes_context_windows", reason="this ComfyUI has no Context Windows")
    model = windows.ContextWindowsManualNode.execute(
        wan.model, 4, 1, "standard_static", 1, False, "pyramid", 2, False
    ).args[0]
    model = wan.patched({"backend": FIRST, "window": "first 2"}, before=selected(model, BASE))
    latent = torch.zeros(1, 16, 10, 8, 8)
    assert wan.sample(model, "heun", steps=4, cfg=cfg, latent=latent).isfinite().all()
    assert len(wan.calls) == 3 * 7
    assert "".join("X" if name == FIRST else "-" for name in wan.backends()) == "X" * 12 + "-" * 9
    assert not [note for note in notes() if "computed" in note], notes()
