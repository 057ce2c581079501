"""Life with other packs on the same hook: composed with, superseded, replaced by them, and noted each time.

Composition is tested on a stand-in for a Wan model; selectors and ComfyUI's sparse node in a real ComfyUI.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from syrupy.assertion import SnapshotAssertion

torch = pytest.importorskip("torch", reason="torch is not installed")

from attention_backends.backends.values.errors import NoBackendError  # noqa: E402
from hook_side import (  # noqa: E402
    ROLES,
    Func,
    Outcome,
    close,
    counts,
    last_run,
    override,
    plain_comfyui,
    sampling,
    selected,
)


def doubles_queries(func: Func, q: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return func(q * 2, *args, **kwargs)


def adds_one(func: Func, *args: Any, **kwargs: Any) -> torch.Tensor:
    return func(*args, **kwargs) + 1


def averages_two(func: Func, q: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return (func(q, *args, **kwargs) + func(q * 2, *args, **kwargs)) / 2


def answers(func: Func, *args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.zeros_like(args[0])


def answers_self_only(func: Func, q: torch.Tensor, k: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.zeros_like(q) if q.shape == k.shape else func(q, k, *args, **kwargs)


def test_a_foreign_override_still_changes_queries() -> None:
    outcome = Outcome(override("sdpa_math", doubles_queries))
    close(outcome.outputs, outcome.expected(lambda query: query * 2))
    assert outcome.rows == [(role, "sdpa_math", 1) for role in ROLES]


def test_a_foreign_override_still_changes_the_output() -> None:
    outcome = Outcome(override("sdpa_math", adds_one))
    close(outcome.outputs, [output + 1 for output in outcome.expected()])
    assert outcome.rows == [(role, "sdpa_math", 1) for role in ROLES]


def test_roles_stay_right_when_the_other_calls_twice() -> None:
    outcome = Outcome(override("sdpa_math", averages_two))
    once, twice = outcome.expected(), outcome.expected(lambda query: query * 2)
    close(outcome.outputs, [(one + two) / 2 for one, two in zip(once, twice, strict=True)])
    assert outcome.rows == [(role, "sdpa_math", 2) for role in ROLES]
    assert outcome.notes == {}


@pytest.mark.parametrize("backend", ["auto", "sdpa_math"])
def test_an_override_that_never_calls_us_is_noted(backend: str) -> None:
    outcome = Outcome(override(backend, answers))
    assert not any(output.any() for output in outcome.outputs)
    assert outcome.rows == [(role, "by another", 1) for role in ROLES]
    text = "the Python module test_other_packs computed attention of role {} by itself"
    assert outcome.notes == {text.format(role): 1 for role in ROLES}


def test_roles_stay_right_when_the_other_answers_some_calls() -> None:
    outcome = Outcome(override("sdpa_math", answers_self_only))
    assert outcome.rows == [("self", "by another", 1), *((role, "sdpa_math", 1) for role in ROLES[1:])]
    assert len(outcome.notes) == 1


def test_strict_stops_when_the_other_never_calls_us(snapshot: SnapshotAssertion) -> None:
    with pytest.raises(NoBackendError) as caught:
        Outcome(override("sdpa_math", answers, strict=True))
    assert str(caught.value) == snapshot
    with pytest.raises(NoBackendError) as caught:
        Outcome(override("auto", answers, strict=True, cross="sdpa_math"))
    assert str(caught.value) == snapshot
    Outcome(override("auto", answers, strict=True))  # no backend was named: nothing to insist on


def test_our_earlier_override_below_another_pack_gives_way() -> None:
    earlier = override("sdpa_math")

    def other(func: Func, *args: Any, **kwargs: Any) -> torch.Tensor:
        return earlier(func, *args, **kwargs) + 1  # it chains to what was on the hook before it

    outcome = Outcome(override("reference", other))
    close(outcome.outputs, [output + 1 for output in outcome.expected()])
    assert outcome.rows == [(role, "reference", 1) for role in ROLES]
    assert outcome.notes == {}


def test_a_later_node_that_replaces_us_is_noted(snapshot: SnapshotAssertion) -> None:
    outcome = Outcome(override("sdpa_math"), installed=answers)
    assert outcome.rows == [(role, "by another", 1) for role in ROLES]
    text = "the Python module test_other_packs computed attention of role {} by itself"
    assert outcome.notes == {text.format(role): 1 for role in ROLES}
    with pytest.raises(NoBackendError) as caught:
        Outcome(override("sdpa_math", strict=True), installed=answers)
    assert str(caught.value) == snapshot
    Outcome(override("auto", strict=True), installed=answers)


@pytest.fixture
def wan(monkeypatch: pytest.MonkeyPatch) -> Any:
    plain_comfyui(monkeypatch)
    import tiny_sampling

    return tiny_sampling.build("wan")


def sampled(model: Any, steps: int = 2) -> tuple[torch.Tensor, dict[str, Any]]:
    import tiny_sampling

    return tiny_sampling.sample(model, "wan", steps=steps), last_run()


def pure_selector(qualname: str) -> Func:
    def chosen(func: Func, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise AssertionError(f"{qualname} was not replaced")

    chosen.__qualname__ = qualname
    return chosen


@pytest.mark.comfy
@pytest.mark.parametrize(
    "qualname",
    [
        "PathchSageAttentionKJ.patch.<locals>.attention_override_sage",
        "PatchFlashAttentionKJ.execute.<locals>.attention_override_flash",
        "CheckpointLoaderKJ.load.<locals>.attention_override_sage",
        "DiffusionModelLoaderKJ.patch_and_load.<locals>.attention_override_sage",
        "attention_override_xformers",
    ],
)
def test_kjnodes_selectors_are_replaced_with_a_note(wan: Any, qualname: str, snapshot: SnapshotAssertion) -> None:
    wan.model_options["transformer_options"][sampling.OVERRIDE] = pure_selector(qualname)
    _, record = sampled(selected(wan, "sdpa_math", strict=True))
    assert counts(record) == {("self", "sdpa_math"): 4, ("cross", "sdpa_math"): 4}
    assert record["notes"] == snapshot


@pytest.mark.comfy
def test_comfyuis_own_selector_before_and_after_ours(wan: Any, snapshot: SnapshotAssertion) -> None:
    from comfy_extras import nodes_model_advanced

    if not hasattr(nodes_model_advanced, "ModelAttentionBackend"):
        pytest.skip("this ComfyUI has no Model Attention Backend node")
    stock = nodes_model_advanced.ModelAttentionBackend()
    (before,) = stock.patch(wan, "pytorch attention")
    _, record = sampled(selected(before, "sdpa_math", strict=True))
    assert counts(record) == {("self", "sdpa_math"): 4, ("cross", "sdpa_math"): 4}
    assert "was replaced by ours" in record["notes"][0]
    (after,) = stock.patch(selected(wan, "sdpa_math"), "pytorch attention")
    _, record = sampled(after)
    assert counts(record) == {("self", "by another"): 4, ("cross", "by another"): 4}
    assert record["notes"] == snapshot
    with pytest.raises(NoBackendError) as caught:
        sampled(stock.patch(selected(wan, "sdpa_math", strict=True), "pytorch attention")[0])
    assert str(caught.value) == snapshot


class FakeSparse:
    """Lives on the hook as ComfyUI's sparse node of later versions does, which needs a card.

    It chains to the override before it, puts itself back on top at each ON_PREPARE_STATE, forgets its state at
    ON_CLEANUP, and answers self-attention from step 1 on, here exactly.
    """

    def __init__(self) -> None:
        self.installed: set[Func] = set()
        self.answered = 0
        self.cleaned = 0

    def patch(self, model: Any) -> Any:
        from comfy.patcher_extension import CallbacksMP

        clone = model.clone()
        self.install(clone.model_options["transformer_options"])
        clone.add_callback(
            CallbacksMP.ON_PREPARE_STATE,
            lambda patcher, timestep, options: self.install(options["transformer_options"]),
        )
        clone.add_callback(CallbacksMP.ON_CLEANUP, lambda patcher: setattr(self, "cleaned", self.cleaned + 1))
        return clone

    def install(self, options: dict[str, Any]) -> None:
        previous = options.get(sampling.OVERRIDE)
        if previous in self.installed:
            return

        def sparse(func: Func, q: torch.Tensor, k: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            options = kwargs["transformer_options"]
            if q.shape == k.shape and options["sigmas"][0] < options["sample_sigmas"][0]:
                self.answered += 1
                return func(q, k, *args, **{**kwargs, "_inside_attn_wrapper": True})
            return func(q, k, *args, **kwargs) if previous is None else previous(func, q, k, *args, **kwargs)

        self.installed.add(sparse)
        options[sampling.OVERRIDE] = sparse


@pytest.mark.comfy
@pytest.mark.parametrize("order", ["sparse first", "ours first", "between two of ours"])
def test_comfyuis_sparse_node_works_in_every_order(wan: Any, order: str) -> None:
    from comfy.model_patcher import ModelPatcher

    if "model_options" not in inspect.signature(ModelPatcher.prepare_state).parameters:
        pytest.skip("this ComfyUI hands no model options to ON_PREPARE_STATE, so it has no sparse node")
    sparse = FakeSparse()
    if order == "sparse first":
        model = selected(sparse.patch(wan), "sdpa_math")
    elif order == "ours first":
        model = sparse.patch(selected(wan, "sdpa_math"))
    else:
        model = selected(sparse.patch(selected(wan, "reference")), "sdpa_math")
    stock, _ = sampled(wan, steps=3)
    for run in (1, 2):  # the second run begins as the first did
        latent, record = sampled(model, steps=3)
        torch.testing.assert_close(latent, stock, rtol=1e-5, atol=1e-5)
        ours = {("self", "sdpa_math"): 2, ("cross", "sdpa_math"): 6}
        assert counts(record) == {**ours, ("self", "by another"): 4}
        assert sparse.answered == 4 * run
        assert sparse.cleaned == run
