"""A model call inside another one on the same scope leaves the outer one where it was, with everything it holds."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from attention_backends.backends.config import AttentionConfig, AttentionSpec  # noqa: E402
from attention_backends.backends.config.text import parse_config  # noqa: E402
from attention_backends.backends.observe.replay.run_recorder import RunRecorder  # noqa: E402
from attention_calls import as_comfyui_runs  # noqa: E402
from hook_side import (  # noqa: E402
    HEADS,
    host,
    model_call,
    nodes_module,
    optimized_attention,
    override,
    rows,
    sampling,
    sites,
    stand_in,
)

ModelCall = nodes_module("hook.model_call").ModelCall
QUERY, KEY, VALUE = rows(6), rows(9, 1), rows(9, 2)


@pytest.fixture(autouse=True)
def _as_comfyui() -> Iterator[None]:
    with as_comfyui_runs():
        yield


def everything(scope: Any) -> dict[str, Any]:
    """What a scope holds, attribute by attribute, however many there are."""
    return {name: getattr(scope, name) for name in type(scope).__slots__}


def insides(scope: Any) -> dict[str, Any]:
    """What its own objects hold: they must not have been emptied or filled by the inner call."""
    held = scope.masks
    return {"plans": dict(held._plans), "not_kept": held.not_kept, "options": copy.copy(scope.options)}


class Outer:
    """A model call that is in the middle of a block with a mask, and something that happens there."""

    def __init__(self, ours: Any) -> None:
        self.ours = ours
        self.run = sampling.Run(ours)
        self.run.run_report.recorder = RunRecorder()
        self.model = stand_in(["WanModel"], {"blocks.0.self_attn": "WanSelfAttention"})
        self.mask = torch.zeros(1, 1, 9)
        self.mask[..., 7:] = -torch.inf

    def options(self, sigma: float, **more: Any) -> dict[str, Any]:
        ours = self.ours
        schedule = torch.tensor([1.0, 0.6, 0.3, 0.0])
        return {
            **{sampling.KEY: ours, sampling.OVERRIDE: ours, sampling.RUN_KEY: self.run},
            **{"sigmas": torch.tensor([sigma]), "sample_sigmas": schedule, **more},
        }

    def attend(self, options: dict[str, Any]) -> None:
        optimized_attention(QUERY, KEY, VALUE, HEADS, mask=self.mask, transformer_options=options)

    def __call__(self, happens: Callable[[Any], None]) -> None:
        options = self.options(0.3)

        def body() -> None:
            scope = sites.current_model_call()
            scope.mask_source = torch.zeros(1)  # as the mark of a running module has it
            self.attend(options)
            self.attend(options)
            before, within = everything(scope), insides(scope)
            assert before["ordinal"] == before["routed"] == 2
            happens(scope)
            after = everything(scope)
            changed = [name for name in before if after[name] is not before[name]]
            assert changed == []
            assert insides(scope) == within
            assert sites.current_model_call() is scope
            recorder = self.run.run_report.recorder
            assert recorder._windows[-1][1] == scope.window
            assert recorder._model_call == self.run.run_report.timeline.model_calls + 1

        model_call(self.model, options, body)
        self.run.close()


def plain() -> Any:
    return override("torch_sdpa")


def scheduled() -> Any:
    """Another backend for the first step, so that model calls at different sigmas have different windows."""
    text = {"default": "torch_sdpa", "schedule": [{"backend": "sdpa_math", "steps": "0"}]}
    return host.Override((parse_config(text, "node"),))


def nested(outer: Outer, **more: Any) -> Callable[[Any], None]:
    """A whole model call with other options, at another step, on the same scope."""

    def happens(scope: Any) -> None:
        options, window = outer.options(1.0, **more), scope.window

        def body() -> None:
            assert sites.current_model_call() is scope
            assert (scope.window == window) == (outer.run.outside_sampler is None)
            outer.attend(options)

        model_call(outer.model, options, body)

    return happens


def failing(outer: Outer) -> Callable[[Any], None]:
    def happens(scope: Any) -> None:
        def body() -> None:
            raise KeyError("inside")

        with pytest.raises(KeyError):
            model_call(outer.model, outer.options(1.0), body)

    return happens


def of_another_model(outer: Outer) -> Callable[[Any], None]:
    """Two models that share a run, as a refiner inside a model does."""

    def happens(scope: Any) -> None:
        other = stand_in(["QwenImageTransformer2DModel"], {"transformer_blocks.0.attn": "Attention"})
        options = outer.options(1.0)
        model_call(other, options, lambda: outer.attend(options))

    return happens


def through_another_override(outer: Outer) -> Callable[[Any], None]:
    """The outer scope is not the thread's own in between: model A, in it B, in that A again."""

    def happens(scope: Any) -> None:
        ours, run = outer.ours, outer.run
        between = override("sdpa_math")
        other = sampling.Run(between)
        options = {sampling.KEY: between, sampling.OVERRIDE: between, sampling.RUN_KEY: other}
        assert ours is run.override
        model_call(outer.model, options, lambda: nested(outer)(scope))
        other.close()

    return happens


def an_attention_call_outside(outer: Outer) -> Callable[[Any], None]:
    """Of the outer model, from inside another one's call: the outer scope serves it."""

    def happens(scope: Any) -> None:
        between = override("sdpa_math")
        other = sampling.Run(between)
        options = {sampling.KEY: between, sampling.OVERRIDE: between, sampling.RUN_KEY: other}

        def body() -> None:
            assert sites.current_model_call() is not scope
            outer.attend(outer.options(1.0))

        model_call(outer.model, options, body)
        other.close()

    return happens


def a_compiled_call(outer: Outer) -> Callable[[Any], None]:
    """Inside the outer call, at a module of its own; the count of routed calls goes on."""

    def happens(scope: Any) -> None:
        routed = scope.routed
        outer.ours.run_compiled(None, 1, False, optimized_attention, (QUERY, KEY, VALUE), {"heads": HEADS})
        assert scope.routed == routed + 1
        scope.routed, scope.ordinal = routed, scope.ordinal - 1

    return happens


def a_compiled_call_inside_another_model(outer: Outer) -> Callable[[Any], None]:
    def happens(scope: Any) -> None:
        between = override("sdpa_math")
        other = sampling.Run(between)
        options = {sampling.KEY: between, sampling.OVERRIDE: between, sampling.RUN_KEY: other}

        def body() -> None:
            current = sites.current_model_call()
            outer.ours.run_compiled(None, 0, False, optimized_attention, (QUERY, KEY, VALUE), {"heads": HEADS})
            assert sites.current_model_call() is current

        model_call(outer.model, options, body)
        other.close()

    return happens


HAPPENS = (
    *(nested, failing, of_another_model, through_another_override, an_attention_call_outside, a_compiled_call),
    a_compiled_call_inside_another_model,
)


@pytest.mark.parametrize("ours", [plain, scheduled], ids=lambda ours: ours.__name__)
@pytest.mark.parametrize("what", HAPPENS, ids=lambda what: what.__name__)
def test_the_outer_call_goes_on_where_it_was(what: Callable[[Outer], Any], ours: Callable[[], Any]) -> None:
    outer = Outer(ours())
    outer(what(outer))


def test_another_rule_for_masks_holds_in_the_inner_call_alone() -> None:
    """The inner call has another pack's patches: its masks are read at each call, the outer one's are kept."""
    outer = Outer(override("torch_sdpa"))
    seen: list[str] = []

    def happens(scope: Any) -> None:
        options = outer.options(1.0, patches={"attn1_patch": [lambda *given: None]})

        def body() -> None:
            outer.attend(options)
            seen.append(scope.masks.not_kept)

        model_call(outer.model, options, body)
        seen.append(scope.masks.not_kept)

    outer(happens)
    assert seen == [nodes_module("hook.masks").PATCHED, ""]


def test_a_new_attribute_of_a_scope_is_given_back_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is added to the slots is saved by being one of them."""
    scope_module = nodes_module("hook.model_call")
    outer = Outer(override("torch_sdpa"))

    def happens(scope: Any) -> None:
        place = scope.state()
        assert dict(zip(ModelCall.__slots__, place, strict=True)) == everything(scope)
        marks = [object() for _ in place]
        kept = everything(scope)
        for name, mark in zip(ModelCall.__slots__, marks, strict=True):
            setattr(scope, name, mark)
        scope_module.ModelCall.restore(scope, place)
        assert everything(scope) == kept

    outer(happens)


def test_after_the_last_model_call_nothing_of_it_is_held() -> None:
    """Masks and options can be large, and a run lives on until its account is made."""
    outer = Outer(override("torch_sdpa"))
    outer(lambda scope: None)
    (scope,) = outer.run.model_calls()
    assert (scope.options, scope.masks._plans, scope.mask_source, scope.in_model_call) == ({}, {}, None, False)
    assert sites.current_model_call() is None


def test_the_guards_second_try_begins_the_same_model_call_anew() -> None:
    """In mode enforce a model call whose output is not finite is made again; the outer one knows nothing of that."""
    config = AttentionConfig(default=AttentionSpec("torch_sdpa"), guard="enforce", source="node")
    outer = Outer(host.Override((config,)))
    tries: list[dict[str, Any]] = []

    def happens(scope: Any) -> None:
        options = outer.options(1.0)

        def body() -> Any:
            assert (scope.ordinal, scope.routed, scope.attention_module) == (0, 0, None)
            tries.append(everything(scope))
            outer.attend(options)
            return torch.full((1,), float("nan") if len(tries) == 1 else 0.0)

        scope.session.guard._watched = 1  # as if a kernel were watched
        model_call(outer.model, options, body)

    outer(happens)
    first, second = tries
    assert first["masks"] is not second["masks"]
    assert {name for name in first if first[name] is not second[name]} == {"masks"}
