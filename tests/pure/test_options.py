"""Options of a backend: checked when they are read, handed to `load`, and part of what a kernel is kept under."""

from __future__ import annotations

import inspect

import pytest
from attention_backends.backends.config import AttentionConfig, AttentionSpec
from attention_backends.backends.config.names import MENU
from attention_backends.backends.config.text import parse_config
from attention_backends.backends.engine.plan import CallKind
from attention_backends.backends.engine.router import Router
from attention_backends.backends.engine.session import Session
from attention_backends.backends.kernels import BACKENDS
from attention_backends.backends.kernels.backend import Backend
from attention_backends.backends.sparse.method import SparseMethod
from attention_backends.backends.values.errors import ConfigError, NoBackendError
from attention_backends.backends.values.options import Option, problems
from attention_backends.backends.values.platform import Platform, parse_platform
from attention_backends.backends.values.request import AttentionCall, AttentionRequest
from syrupy.assertion import SnapshotAssertion

OPTIONS = (
    Option("smooth", bool, True, "Subtract the mean of the keys."),
    Option("steps", int, 4, "How many.", minimum=1, maximum=8),
    Option("share", float, 0.5, "How much.", minimum=0, maximum=1),
    Option("mode", str, "fast", "Which.", choices=("fast", "good")),
)

WRONG = {
    "smooth=1": ({"smooth": 1}, "smooth must be true or false, not 1"),
    "steps=true": ({"steps": True}, "steps must be a whole number, not True"),
    "steps=1.5": ({"steps": 1.5}, "steps must be a whole number, not 1.5"),
    "steps=0": ({"steps": 0}, "steps 0 < 1 (from 1 to 8)"),
    "steps=9": ({"steps": 9}, "steps 9 > 8 (from 1 to 8)"),
    "share=text": ({"share": "half"}, "share must be a number, not 'half'"),
    "mode=best": ({"mode": "best"}, "mode 'best' is not one of fast, good"),
    "unknown": ({"smoth": True}, "no option 'smoth' (known: smooth, steps, share, mode); did you mean smooth?"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named_with_what_is_known(case: str) -> None:
    given, problem = WRONG[case]
    assert problems(OPTIONS, given) == [problem]


def test_right_options_have_no_problems() -> None:
    assert problems(OPTIONS, {"smooth": False, "steps": 8, "share": 1, "mode": "good"}) == []
    assert problems(OPTIONS, {}) == []


def test_every_problem_is_told() -> None:
    assert len(problems(OPTIONS, {"smooth": 1, "steps": 0, "x": 1})) == 3


def test_a_choice_takes_no_options(snapshot: SnapshotAssertion) -> None:
    with pytest.raises(ConfigError) as caught:
        AttentionSpec("auto", {"smooth": True})
    assert str(caught.value) == snapshot


def test_the_message_says_where(snapshot: SnapshotAssertion) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"per_role": {"self": {"backend": "sdpa_math", "extra": {"x": 1}}}})
    assert str(caught.value) == snapshot


def test_specs_with_other_options_differ(tunable: Backend) -> None:
    one, two = AttentionSpec(tunable.id, {"steps": 1}), AttentionSpec(tunable.id, {"steps": 2})
    assert one != two
    assert hash(one) != hash(two)
    assert hash(one) == hash(AttentionSpec(tunable.id, {"steps": 1}))


def test_declared_options_are_keywords_of_load_with_the_same_defaults() -> None:
    for backend in BACKENDS.values():
        if isinstance(backend, SparseMethod):  # it takes any of its options by name
            continue
        keywords = {
            name: parameter.default
            for name, parameter in inspect.signature(backend.load).parameters.items()
            if parameter.kind is parameter.KEYWORD_ONLY
        }
        assert keywords == {option.name: option.default for option in backend.options}, backend.id
        assert problems(backend.options, keywords) == [], backend.id


class Tunable(Backend):
    id = "sdpa_math"  # a name that a configuration accepts
    summary = "A backend with options."
    kinds = ("cpu",)
    options = OPTIONS

    def load(self, platform, *, smooth=True, steps=4, share=0.5, mode="fast"):  # type: ignore[no-untyped-def]
        if mode == "good":
            raise NotImplementedError("this version has no good mode")
        settings = (smooth, steps, share, mode)
        return lambda call: settings


@pytest.fixture
def tunable(monkeypatch: pytest.MonkeyPatch) -> Backend:
    backend = Tunable()
    monkeypatch.setitem(BACKENDS, backend.id, backend)
    return backend


REQUEST = AttentionRequest(1, 2, 16, 16, 64, "float16")


def test_each_set_of_options_is_a_kernel_of_its_own(tunable: Backend) -> None:
    router = Router(Platform("cpu", torch="2.11.0"))
    assert router.kernel(tunable.id)(None) == (True, 4, 0.5, "fast")  # type: ignore[arg-type, comparison-overlap]
    changed = router.kernel(tunable.id, {"steps": 2})
    assert changed(None) == (True, 2, 0.5, "fast")  # type: ignore[arg-type, comparison-overlap]
    assert router.kernel(tunable.id, {"steps": 2}) is changed
    assert router.kernel(tunable.id) is not changed


def test_options_reach_the_role_that_asked(tunable: Backend) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    config = AttentionConfig(
        default=AttentionSpec(tunable.id), per_role={"cross": AttentionSpec(tunable.id, {"steps": 7})}
    )
    session = Session(Router(Platform("cpu", torch="2.11.0")), (config,))
    assert session.plan(CallKind(REQUEST, "self", "self")).plan.kernel(None)[1] == 4  # type: ignore[arg-type, index]
    assert session.plan(CallKind(REQUEST, "cross", "cross")).plan.kernel(None)[1] == 7  # type: ignore[arg-type, index]


def test_a_failure_with_some_options_says_nothing_of_others(tunable: Backend, snapshot: SnapshotAssertion) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    good, plain = AttentionSpec(tunable.id, {"mode": "good"}), AttentionSpec(tunable.id)
    roles = {"self": good, "cross": plain, "other": AttentionSpec(tunable.id, {"steps": 2})}
    session = Session(Router(Platform("cpu", torch="2.11.0")), (AttentionConfig(per_role=roles),))
    assert session.plan(CallKind(REQUEST, "self", "self")).plan.decision.backend == "torch_sdpa"
    assert session.plan(CallKind(REQUEST, "cross", "cross")).plan.decision.backend == tunable.id, "the sound one runs"
    assert session.plan(CallKind(REQUEST, "other", "cross")).plan.decision.options == {"steps": 2}
    assert session.plan(CallKind(REQUEST, "self", "self")).plan.decision.reason == snapshot


def test_a_fallback_that_fails_too_does_not_bring_back_the_backend_without_its_options(
    tunable: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    router = Router(Platform("cpu", torch="2.11.0"), {**BACKENDS, tunable.id: tunable})
    config = AttentionConfig(default=AttentionSpec(tunable.id, {"mode": "good"}))
    session = Session(router, (config,))
    slot = session.plan(CallKind(REQUEST, "self", "self"))
    assert slot.plan.decision.backend == "torch_sdpa"

    def fails(call: object) -> None:
        raise RuntimeError("no kernel image")

    slot.plan.kernel = fails  # type: ignore[assignment]
    q = torch.zeros(1, 2, 16, 64, dtype=torch.float16)  # as the request has it
    session.attention(slot, AttentionCall(q, q, q), host=lambda call: q)
    assert slot.plan.decision.backend == "comfy", "not the backend that was asked for with other options"


def test_options_that_a_version_lacks_are_known_before_anything_is_loaded(snapshot: SnapshotAssertion) -> None:
    card = "cuda:8.9,packages=sageattention=={};triton==3.6.0"
    for version, extra in (
        ("2.2.0", {"backend": "sage_attn", "extra": {"smooth_k": False}}),
        ("2.1.1", {"backend": "sage_fp8_cuda", "extra": {"pv_accum_dtype": "fp32+fp16"}}),
    ):
        router = Router(parse_platform(card.format(version)))
        decision = router.decide(REQUEST, (parse_config({"default": extra}),), "self", "self")
        assert decision.is_fallback
        assert decision.reason == snapshot(name=version)
        with pytest.raises(NoBackendError) as caught:
            router.decide(REQUEST, (parse_config({"default": extra, "strict": True}),), "self", "self")
        assert str(decision.reason) in str(caught.value)
    newer = Router(parse_platform(card.format("2.2.0")))
    assert not newer.decide(REQUEST, (parse_config({"default": extra}),), "self", "self").is_fallback


def test_an_option_that_the_package_refuses_is_a_fallback_with_its_reason(
    tunable: Backend, snapshot: SnapshotAssertion
) -> None:
    pytest.importorskip("torch", reason="torch is not installed")

    def session(strict: bool) -> Session:
        config = AttentionConfig(default=AttentionSpec(tunable.id, {"mode": "good"}), strict=strict)
        listed = {name: backend for name, backend in BACKENDS.items() if name in MENU}  # a new kernel is not in it
        return Session(Router(Platform("cpu", torch="2.11.0"), listed), (config,))

    decision = session(strict=False).plan(CallKind(REQUEST, "self", "self")).plan.decision
    assert decision.backend == "torch_sdpa"
    assert decision.reason == snapshot
    with pytest.raises(NoBackendError) as caught:
        session(strict=True).plan(CallKind(REQUEST, "self", "self"))
    assert str(caught.value) == snapshot


def test_out_of_memory_while_options_load_is_passed_on(tunable: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch", reason="torch is not installed")

    def load(platform: Platform, **options: object) -> None:
        if options:
            raise MemoryError("out of memory")

    monkeypatch.setattr(tunable, "load", load)
    config = AttentionConfig(default=AttentionSpec(tunable.id, {"steps": 2}))
    session = Session(Router(Platform("cpu", torch="2.11.0")), (config,))
    with pytest.raises(MemoryError):
        session.plan(CallKind(REQUEST, "self", "self"))
