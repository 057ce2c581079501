"""The hook adapter: what it hands on to ComfyUI's functions, what it honours of the model's wishes, and its marks.

All but the last group runs on a stand-in for a Wan model, without ComfyUI.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from syrupy.assertion import SnapshotAssertion

torch = pytest.importorskip("torch", reason="torch is not installed")

from attention_backends.backends.config.schedule import step_of  # noqa: E402
from attention_backends.backends.engine.router import Router  # noqa: E402
from attention_backends.backends.kernels import BACKENDS  # noqa: E402
from attention_backends.backends.kernels.registry import detect  # noqa: E402
from attention_backends.backends.values.errors import NoBackendError  # noqa: E402
from hook_side import (  # noqa: E402
    HEADS,
    PLACES,
    ROLES,
    Func,
    Kernel,
    Outcome,
    Q,
    close,
    comfyui,
    exact,
    marks_left,
    model_call,
    override,
    rows,
    sampling,
    sites,
    stand_in,
    wrappers,
)

VISIBLE = torch.tensor([True, True, False, True, False, True]).expand(1, 6, 6)


def recorder(name: str, seen: list[Any]) -> Func:
    """One of ComfyUI's functions, by name, that keeps what it was called with."""

    def func(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append((args, kwargs))
        mask = kwargs.get("mask")
        return exact(*args[:3], heads=HEADS, mask=mask)

    func.__qualname__ = func.__name__ = name
    return func


def use_kernels(monkeypatch: pytest.MonkeyPatch, *kernels: Kernel) -> None:
    router = Router(detect(torch.device("cpu")), {**BACKENDS, **{kernel.id: kernel for kernel in kernels}})
    monkeypatch.setattr(sampling, "router_for", lambda device: router)


def broken(call: Any) -> torch.Tensor:
    raise ValueError("as it should")


# What ComfyUI's own functions are handed


@pytest.mark.parametrize("unknown", [{}, {"brand_new": 3}, {"brand_new": [3]}], ids=["comfy", "unknown", "unhashable"])
@pytest.mark.parametrize("name", ["attention_sub_quad", "attention_split", "attention_basic", "attention_pytorch"])
def test_bool_masks_become_additive(name: str, unknown: dict[str, Any]) -> None:
    seen: list[Any] = []
    with torch.inference_mode():
        output = override("comfy")(recorder(name, seen), Q, Q, Q, HEADS, VISIBLE, **unknown)
    ((_, kwargs),) = seen
    assert kwargs["_inside_attn_wrapper"] is True  # else ComfyUI's wrapper would ask us again
    kept = name == "attention_pytorch"
    assert kwargs["mask"].dtype == (torch.bool if kept else torch.float32)
    assert torch.equal(kwargs["mask"] if kept else kwargs["mask"] == 0, VISIBLE)
    torch.testing.assert_close(output, exact(Q, Q, Q, HEADS, VISIBLE), rtol=0, atol=2e-6)


@pytest.mark.parametrize("skip_output_reshape", [False, True])
def test_comfy_gets_every_argument(skip_output_reshape: bool) -> None:
    seen: list[Any] = []
    flags = {"scale": 0.5, "attn_precision": None, "low_precision_attention": False, "enable_gqa": False}
    flags |= {"skip_output_reshape": skip_output_reshape, "transformer_options": {"block_index": 3}}

    def func(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(kwargs)
        return exact(*args, **kwargs)

    output = override("comfy")(func, Q, Q, Q, HEADS, **flags, _inside_attn_wrapper=True)
    assert seen == [{**flags, "heads": HEADS, "mask": None, "_inside_attn_wrapper": True}]
    assert torch.equal(output, exact(Q, Q, Q, HEADS, **flags))


@pytest.mark.parametrize("value", [3, [3], torch.ones(2)], ids=["hashable", "unhashable", "tensor"])
def test_an_unknown_argument_sends_the_call_to_comfyui(value: Any, snapshot: SnapshotAssertion) -> None:
    seen: list[Any] = []
    ours = override("sdpa_math")
    run = sampling.Run(ours)
    options = {sampling.KEY: ours, sampling.OVERRIDE: ours, sampling.RUN_KEY: run}
    func = recorder("attention_pytorch", seen)

    def body() -> None:
        for _ in range(2):
            ours(func, Q, Q, Q, HEADS, brand_new=value, transformer_options=options, _inside_attn_wrapper=True)

    model_call(stand_in(["WanModel"], PLACES), options, body)
    assert [kwargs["brand_new"] is value for _, kwargs in seen] == [True, True]
    assert [kwargs["_inside_attn_wrapper"] for _, kwargs in seen] == [True, True]
    assert run.run_report.notes == snapshot
    rows = [(row.role, row.backend, row.asked, row.calls) for row in run.run_report.rows.values()]
    assert rows == [("self", "comfy", "sdpa_math", 2)]


def test_an_unknown_argument_stops_a_strict_choice(snapshot: SnapshotAssertion) -> None:
    ours = override("sdpa_math", strict=True)
    options = {sampling.KEY: ours, sampling.OVERRIDE: ours, sampling.RUN_KEY: sampling.Run(ours)}
    func = recorder("attention_pytorch", [])

    def body() -> None:
        ours(func, Q, Q, Q, HEADS, brand_new=3, transformer_options=options, _inside_attn_wrapper=True)

    with pytest.raises(NoBackendError) as caught:
        model_call(stand_in(["WanModel"], PLACES), options, body)
    assert str(caught.value) == snapshot


def test_comfyui_is_the_last_resort(monkeypatch: pytest.MonkeyPatch, snapshot: SnapshotAssertion) -> None:
    use_kernels(monkeypatch, Kernel("torch_sdpa", broken))
    outcome = Outcome(override())
    close(outcome.outputs, outcome.expected())
    assert outcome.rows == [(role, "comfy", 1) for role in ROLES]
    assert {row.reason for row in outcome.run.run_report.rows.values() if row.calls} == snapshot


# What is planned once and what is not


def test_calls_of_one_module_are_told_apart_by_their_order() -> None:
    outcome = Outcome(override("reference", **{"wan.image_cross": "sdpa_math"}), lengths=(6, 6, 6))
    assert outcome.rows == [("self", "reference", 1), ("wan.image_cross", "sdpa_math", 1), ("cross", "reference", 1)]


FACTS: dict[str, tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], dict[str, Any]]] = {
    "plain": ((Q, Q, Q), {}),
    "batch": ((Q.repeat(2, 1, 1), Q.repeat(2, 1, 1), Q.repeat(2, 1, 1)), {}),
    "queries": ((Q[:, :4], Q, Q), {}),
    "keys": ((Q, Q[:, :4], Q[:, :4]), {}),
    "dtype": ((Q.double(), Q.double(), Q.double()), {}),
    "bias": ((Q, Q, Q), {"mask": VISIBLE.float()}),
    "bool": ((Q, Q, Q), {"mask": VISIBLE.expand(1, 6, 6).clone()}),
    "key padding": ((Q, Q, Q), {"mask": VISIBLE[:, :1]}),
    "scale": ((Q, Q, Q), {"scale": 0.5}),
    "wish": ((Q, Q, Q), {"low_precision_attention": False}),
}


def test_calls_that_differ_in_one_fact_have_plans_of_their_own() -> None:
    ours = override()
    run = sampling.Run(ours)
    options = {sampling.KEY: ours, sampling.OVERRIDE: ours, sampling.RUN_KEY: run}
    model = stand_in(["WanModel"], PLACES)
    twice = [*FACTS.values(), *FACTS.values()]
    outputs = []

    def body() -> None:
        for qkv, flags in twice:
            calls = [((*qkv, HEADS), {**flags, "transformer_options": options})]
            outputs.extend(model.get_submodule("blocks.0.self_attn")(calls))

    model_call(model, options, body)
    for output, (qkv, flags) in zip(outputs, twice, strict=True):
        expected = exact(*qkv, HEADS, **flags)
        assert output.dtype == expected.dtype
        torch.testing.assert_close(output, expected, rtol=0, atol=2e-6)
    plans = run.model_call(torch.device("cpu")).session.plans.values()
    assert len(plans) == len(FACTS)


@pytest.mark.parametrize("stops", [False, True])
def test_a_run_is_published_and_leaves_the_options_as_they_were(stops: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    published: list[Any] = []
    add = wrappers.runs.add
    monkeypatch.setattr(wrappers.runs, "add", lambda run_report: published.append(run_report) or add(run_report))
    options = {sampling.KEY: override(), "other": 1}
    before = dict(options)

    class Executor:
        class_obj = SimpleNamespace(model_options={"transformer_options": options})

        def __call__(self) -> str:
            assert options[sampling.RUN_KEY].override is options[sampling.KEY]
            if stops:
                raise KeyboardInterrupt
            return "latent"

    if stops:
        with pytest.raises(KeyboardInterrupt):
            wrappers.outer_sample_wrapper(Executor())
    else:
        assert wrappers.outer_sample_wrapper(Executor()) == "latent"
    assert options == before
    assert len(published) == 1


def test_options_of_a_run_that_is_over_leave_no_marks() -> None:
    """Another pack that keeps the options of a model call, and calls the model with them later."""
    options = {sampling.KEY: override("torch_sdpa")}
    options[sampling.OVERRIDE] = options[sampling.KEY]
    model, marks, kept = stand_in(["WanModel"], PLACES), len(sites._marks), []

    def call(options: dict[str, Any]) -> None:
        calls = [((Q, rows(6, 1), rows(6, 2), HEADS), {"transformer_options": options})]
        model_call(model, options, lambda: model.get_submodule("blocks.0.self_attn")(calls))

    class Executor:
        class_obj = SimpleNamespace(model_options={"transformer_options": options})

        def __call__(self) -> None:
            kept.append(dict(options))
            call(options)

    wrappers.outer_sample_wrapper(Executor())
    call(kept[0])
    assert len(sites._marks) == marks
    assert marks_left(model) == []
    assert [row.calls for row in kept[0][sampling.RUN_KEY].run_report.rows.values()] == [1], "of a run that is over"


def test_marks_go_whatever_fails_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(sampling.RunReport, "collect", fails)
    marks = len(sites._marks)
    with pytest.raises(OSError, match="no space"):
        Outcome(override("torch_sdpa"))
    assert len(sites._marks) == marks


# What the model and the checkpoint say


def lossy(call: Any) -> torch.Tensor:
    raise AssertionError("a lossy kernel ran")


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    ("flags", "dtype"),
    [({"low_precision_attention": False}, torch.float32), ({"attn_precision": torch.float32}, torch.float16)],
    ids=["low_precision_attention", "attn_precision"],
)
def test_a_lossy_backend_gives_way_to_the_models_wish(
    flags: dict[str, Any],
    dtype: torch.dtype,
    strict: bool,
    monkeypatch: pytest.MonkeyPatch,
    snapshot: SnapshotAssertion,
) -> None:
    use_kernels(monkeypatch, Kernel("emulated_int8", lossy, accuracy="quantized"))
    outcome = Outcome(override("emulated_int8", strict=strict), dtype=dtype, **flags)
    assert outcome.rows == [(role, "torch_sdpa", 1) for role in ROLES]
    reasons = {row.reason for row in outcome.run.run_report.rows.values()}
    assert reasons == snapshot


class Preferring(Outcome):
    """The checkpoint asks for a function of its own at every module."""

    @staticmethod
    def attention_of_the_checkpoint(*args: Any, **kwargs: Any) -> torch.Tensor:
        return exact(*args, **kwargs) + 1

    def prepare(self, model: torch.nn.Module) -> None:
        for path in PLACES:
            model.get_submodule(path).comfy_attention = SimpleNamespace(function=self.attention_of_the_checkpoint)


PREFERENCE = "the checkpoint's own preference (Preferring.attention_of_the_checkpoint)"


@pytest.mark.parametrize("strict", [False, True])
def test_the_checkpoints_preference_stands_in_for_auto(strict: bool) -> None:
    outcome = Preferring(override(strict=strict))
    close(outcome.outputs, [output + 1 for output in outcome.expected()])
    assert outcome.rows == [(role, "comfy", 1) for role in ROLES]
    assert {row.source for row in outcome.run.run_report.rows.values()} == {PREFERENCE}
    assert outcome.notes == {}


def test_a_named_backend_goes_before_the_checkpoints_preference(snapshot: SnapshotAssertion) -> None:
    outcome = Preferring(override(cross="sdpa_math"))
    assert outcome.rows == [("self", "comfy", 1), ("wan.image_cross", "sdpa_math", 1), ("cross", "sdpa_math", 1)]
    assert set(outcome.notes) == snapshot


# Marks on the model


def test_overlapping_runs_leave_no_mark() -> None:
    model = SimpleNamespace(diffusion_model=stand_in(["WanModel"], PLACES))
    first, second = sampling.Run(override()), sampling.Run(override())
    first.patch_modules(model, {})
    second.patch_modules(model, {})
    first.close()
    assert marks_left(model.diffusion_model) == list(PLACES)
    second.close()
    assert marks_left(model.diffusion_model) == []


def test_somebody_elses_forward_is_put_back_or_left_alone() -> None:
    model = SimpleNamespace(diffusion_model=stand_in(["WanModel"], PLACES))
    self_attn, cross_attn = (model.diffusion_model.get_submodule(path) for path in PLACES)
    earlier, later = (lambda calls: "earlier"), (lambda calls: "later")
    self_attn.forward = earlier
    run = sampling.Run(override())
    run.patch_modules(model, {})
    assert self_attn([]) == "earlier"
    cross_attn.forward = later
    run.close()
    assert self_attn.forward is earlier
    assert cross_attn.forward is later


def test_an_exception_in_a_module_restores_the_place() -> None:
    ours = override()
    run = sampling.Run(ours)
    options = {sampling.KEY: ours, sampling.OVERRIDE: ours, sampling.RUN_KEY: run}
    model = stand_in(["WanModel"], PLACES)

    def body() -> None:
        with pytest.raises(TypeError):
            model.get_submodule("blocks.0.self_attn")(None)
        assert sites.current_model_call().attention_module is None

    model_call(model, options, body)
    assert sites.current_model_call() is None


@pytest.mark.parametrize(
    ("sigma", "step"), [(10.0, 0), (9.9995, 0), (9.0, 0), (5.0, 1), (4.9998, 1), (3.0, 1), (0.5, 2), (0.0, 3), (99, 0)]
)
def test_the_step_is_the_last_sigma_not_below(sigma: float, step: int) -> None:
    assert step_of(sigma, [10.0, 5.0, 1.0, 0.0]) == step


@pytest.mark.comfy
@pytest.mark.parametrize("shape", [(1, 6, 6), (2, 1, 6), (2, 6, 6), (6, 6), (2, HEADS, 6, 6)], ids=str)
@pytest.mark.parametrize("name", ["attention_sub_quad", "attention_split", "attention_basic", "attention_pytorch"])
def test_comfyuis_functions_are_right_with_bool_masks(name: str, shape: tuple[int, ...]) -> None:
    comfyui()
    from comfy.ldm.modules import attention

    query, key, value = (torch.cat([rows(6, seed), rows(6, seed + 9)]) for seed in range(3))
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(5)) > 0.5
    mask[..., 0] = True
    with torch.inference_mode():
        ours = override("comfy")(getattr(attention, name).__wrapped__, query, key, value, HEADS, mask)
    torch.testing.assert_close(ours, exact(query, key, value, HEADS, mask), rtol=0, atol=1e-5)


@pytest.mark.comfy
@pytest.mark.parametrize("name", ["attention_sub_quad", "attention_split"])
def test_comfyuis_functions_are_wrong_with_bool_masks_by_themselves(name: str) -> None:
    """The reason for the conversion; when this fails, ComfyUI has mended it."""
    comfyui()
    from comfy.ldm.modules import attention

    plain = getattr(attention, name)(Q, Q, Q, HEADS, VISIBLE)
    assert (plain - exact(Q, Q, Q, HEADS, VISIBLE)).abs().max() > 0.01
