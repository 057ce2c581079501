"""Calls of the hook whose tensors disagree, or hold nothing: ComfyUI's function answers them, and no kernel gets them.

What it answers with is compared with stock in `test_hook_against_stock.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from syrupy.assertion import SnapshotAssertion

torch = pytest.importorskip("torch", reason="torch is not installed")

from attention_backends.backends.engine.call_checks import CheckError  # noqa: E402
from attention_backends.backends.values.errors import NoBackendError  # noqa: E402
from attention_calls import as_comfyui_runs  # noqa: E402
from hook_side import compiled, exact, host, model_call, override, sampling, stand_in  # noqa: E402
from test_failed_kernels import Container, Machine  # noqa: E402

BACKENDS = ("auto", "comfy", "sdpa_math")
HEADS, HEAD_DIM = 4, 16


@pytest.fixture(autouse=True)
def _as_comfyui() -> Iterator[None]:
    with as_comfyui_runs():
        yield
    host._outside_runs.clear()


def made(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def flat(batch: int = 2, length: int = 6, heads: int = HEADS, head_dim: int = HEAD_DIM) -> torch.Tensor:
    return made(batch, length, heads * head_dim)


def apart(batch: int = 2, length: int = 6, heads: int = HEADS, head_dim: int = HEAD_DIM) -> torch.Tensor:
    return made(batch, heads, length, head_dim)


EMPTY: dict[str, tuple[list[torch.Tensor], dict[str, Any]]] = {
    "no sample": ([flat(0)] * 3, {}),
    "no query": ([flat(length=0), flat(), flat()], {}),
    "no key": ([flat(), flat(length=0), flat(length=0)], {}),
    "nothing": ([flat(length=0)] * 3, {}),
    "no features": ([flat(head_dim=0)] * 3, {}),
    "no head": ([apart(heads=0)] * 3, {"skip_reshape": True}),
    "no sample, heads apart": ([apart(0)] * 3, {"skip_reshape": True}),
    "no key, heads apart": ([apart(), apart(length=0), apart(length=0)], {"skip_reshape": True}),
    "no value": ([flat(), flat(), flat(length=0)], {}),
    "no key, masked": ([flat(), flat(length=0), flat(length=0)], {"mask": torch.zeros(6, 0)}),
    "no query, masked": ([flat(length=0), flat(), flat()], {"mask": torch.ones(2, 0, 6, dtype=torch.bool)}),
}

ODD: dict[str, tuple[list[torch.Tensor], dict[str, Any]]] = {
    "value in half": ([flat(), flat(), flat().half()], {}),
    "key in half": ([flat(), flat().half(), flat()], {}),
    "query in half": ([flat().half(), flat(), flat()], {"attn_precision": torch.float32}),
    "another device": ([flat(), flat().to("meta"), flat().to("meta")], {}),
    "mask on another device": ([flat()] * 3, {"mask": torch.zeros(6, 6, device="meta")}),
    "keys that cannot be folded": ([flat(), flat(1, 5), flat(1, 5)], {}),
    "key of another size": ([flat(), flat(head_dim=8), flat()], {"enable_gqa": True}),
    "one sample of keys": ([apart(), apart(1), apart(1)], {"skip_reshape": True}),
    "more samples of keys": ([apart(1), apart(2), apart(2)], {"skip_reshape": True}),
    "fewer heads without a word": ([apart(), apart(heads=2), apart(heads=2)], {"skip_reshape": True}),
    "heads that cannot be shared": (
        [apart(), apart(heads=3), apart(heads=3)],
        {"skip_reshape": True, "enable_gqa": True},
    ),
    "heads of values": ([apart(), apart(), apart(heads=1)], {"skip_reshape": True}),
    "head_dim of keys": ([apart(), apart(head_dim=8), apart()], {"skip_reshape": True}),
    "head_dim of values": ([apart(), apart(), apart(head_dim=8)], {"skip_reshape": True}),
    "three dimensions of four": ([flat()] * 3, {"skip_reshape": True}),
    "four dimensions of three": ([apart()] * 3, {}),
    "mask of other keys": ([flat()] * 3, {"mask": torch.zeros(6, 7)}),
    "mask of other samples": ([flat()] * 3, {"mask": torch.zeros(3, 1, 6)}),
    "mask of five dimensions": ([flat()] * 3, {"mask": torch.zeros(1, 1, 1, 6, 6)}),
    "mask of integers": ([flat()] * 3, {"mask": torch.zeros(6, 6, dtype=torch.int64)}),
    "mask in half": ([flat()] * 3, {"mask": torch.zeros(6, 6).half()}),
    "scale as a tensor": ([flat()] * 3, {"scale": torch.tensor(0.5)}),
}

NORMAL: tuple[list[torch.Tensor], dict[str, Any]] = ([flat()] * 3, {})


class Answers:
    """ComfyUI's function, which answers whatever it gets and notes it."""

    def __init__(self) -> None:
        self.got: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.output = torch.ones(1)
        self.__name__ = self.__qualname__ = "attention_pytorch"

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.got.append((args, kwargs))
        return self.output


def hook(ours: Any, func: Callable[..., Any], tensors: list[torch.Tensor], flags: dict[str, Any], run: Any) -> Any:
    options = {sampling.KEY: ours, sampling.OVERRIDE: ours, sampling.RUN_KEY: run}
    return model_call(
        stand_in(["WanModel"], {}), options, lambda: ours(func, *tensors, HEADS, transformer_options=options, **flags)
    )


@pytest.mark.parametrize("after", [False, True], ids=["first", "after calls that agree"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [*ODD, *EMPTY])
def test_comfyuis_function_gets_it_as_it_is(
    monkeypatch: pytest.MonkeyPatch, name: str, backend: str, after: bool
) -> None:
    machine, func = Machine(monkeypatch), Answers()
    tensors, flags = {**ODD, **EMPTY}[name]
    ours = override(backend)
    run = sampling.Run(ours)
    if after:  # plans that are there may not take it for one of theirs
        hook(ours, exact, *NORMAL, run)
        machine.ran.clear()
    assert hook(ours, func, tensors, flags, run) is func.output
    if not (after and "another device" in name):  # only cards have numbers; on the CPU it is the kernel that refuses
        assert machine.ran == []
    args, kwargs = func.got[-1]
    assert [one is other for one, other in zip(args, tensors, strict=True)] == [True] * 3
    assert kwargs["mask"] is flags.get("mask")
    assert {flag: kwargs[flag] for flag in flags} == flags
    assert [row.backend for row in run.run_report.rows.values() if row.calls][-1:] == ["comfy"]
    assert any(note.startswith("ComfyUI's own attention ran: ") for note in run.run_report.notes)


@pytest.mark.parametrize("name", ["value in half", "mask of integers", "scale as a tensor"])
def test_what_comfyuis_function_raises_for_it_is_the_only_error(name: str) -> None:
    """Not one that was raised while ours was handled: a traceback begins with what stock would have raised."""

    def refuses(*args: Any, **kwargs: Any) -> torch.Tensor:
        raise ValueError("as it should")

    tensors, flags = ODD[name]
    ours = override("comfy")
    with pytest.raises(ValueError, match="as it should") as caught:
        hook(ours, refuses, tensors, flags, sampling.Run(ours))
    assert caught.value.__context__ is None


@pytest.mark.parametrize("name", [*ODD, *EMPTY])
def test_strict_stops_what_there_is_to_compute(
    monkeypatch: pytest.MonkeyPatch, name: str, snapshot: SnapshotAssertion
) -> None:
    machine, func = Machine(monkeypatch), Answers()
    ours = override("sdpa_math", strict=True)
    tensors, flags = {**ODD, **EMPTY}[name]
    if name in EMPTY:
        assert hook(ours, func, tensors, flags, sampling.Run(ours)) is func.output
    else:
        with pytest.raises(NoBackendError) as caught:
            hook(ours, func, tensors, flags, sampling.Run(ours))
        assert str(caught.value) == snapshot
    assert machine.ran == []


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("key", "value", "flags"),
    [
        (flat(length=6), flat(length=4), {}),
        (flat(length=4), flat(length=6), {}),
        (apart(length=6), apart(length=4), {"skip_reshape": True}),
        (flat(1, 12), flat(1, 8), {}),
        (flat(heads=2), flat(heads=2, length=4), {"enable_gqa": True}),
    ],
    ids=["fewer values", "more values", "heads apart", "folded", "grouped"],
)
def test_keys_without_a_value_are_refused_in_words(
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    key: torch.Tensor,
    value: torch.Tensor,
    flags: dict[str, Any],
    snapshot: SnapshotAssertion,
) -> None:
    machine, func = Machine(monkeypatch), Answers()
    query = apart() if flags.get("skip_reshape") else flat()
    ours = override(backend)
    with pytest.raises(CheckError) as caught:
        hook(ours, func, [query, key, value], flags, sampling.Run(ours))
    assert str(caught.value) == snapshot
    assert (machine.ran, func.got) == ([], [])


def test_more_arguments_than_there_are_are_refused_in_words(snapshot: SnapshotAssertion) -> None:
    ours = override()
    with pytest.raises(TypeError) as caught:
        ours(exact, *NORMAL[0], HEADS, None, None, False, False, True)
    assert str(caught.value) == snapshot


@pytest.mark.parametrize("names", [("q", "k", "v"), ("query", "key", "value")])
@pytest.mark.parametrize("named", [1, 2, 3])
@pytest.mark.parametrize("foreign", [None, lambda func, q, k, v, *args, **flags: func(q, k, v, *args, **flags)])
def test_tensors_may_be_given_by_name(names: tuple[str, ...], named: int, foreign: Any) -> None:
    tensors = [flat(), flat(length=4), flat(length=4)]
    given = dict(zip(names[3 - named :], tensors[3 - named :], strict=True))
    found = override("reference", foreign)(exact, *tensors[: 3 - named], **given, heads=HEADS)
    torch.testing.assert_close(found, exact(*tensors, HEADS), rtol=0, atol=2e-6)


@pytest.mark.parametrize("backend", ["auto", "torch_sdpa", "comfy", "sdpa_math", "reference"])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_tensors_in_containers_that_differ_after_some_that_agreed_are_comfyuis(
    monkeypatch: pytest.MonkeyPatch, which: int, backend: str
) -> None:
    ours = override(backend)
    monkeypatch.setattr(compiled, "comfys_attention", lambda: exact)
    run = sampling.Run(ours)
    options = {sampling.KEY: ours, sampling.OVERRIDE: ours, sampling.RUN_KEY: run}
    model = stand_in(["WanModel"], {})
    for differs in (False, True, False):
        given = [flat() for _ in range(3)]
        if differs:
            given[which] = given[which].half()
        containers = [Container(tensor) for tensor in given]
        call = lambda held=containers: ours.container_function(*held, heads=HEADS, transformer_options=options)  # noqa: E731
        torch.testing.assert_close(model_call(model, options, call), exact(*given, HEADS), rtol=0, atol=2e-3)
    assert not [row.reason for row in run.run_report.rows.values() if "failed" in (row.reason or "")]


def calling(names: tuple[str, ...], named: int) -> Any:
    """Another pack's override that calls what it is given with so many tensors by name."""

    def foreign(func: Any, *args: Any, **flags: Any) -> torch.Tensor:
        by_name = dict(zip(names[3 - named :], args[3 - named : 3], strict=True))
        return func(*args[: 3 - named], **by_name, **flags)

    return foreign


@pytest.mark.parametrize("way", ["outside", "in a model call", "in a compiled graph"])
@pytest.mark.parametrize("names", [("q", "k", "v"), ("query", "key", "value")])
@pytest.mark.parametrize("named", [1, 2, 3])
def test_another_packs_override_may_give_them_by_name(
    names: tuple[str, ...], named: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = [flat(), flat(length=4), flat(length=4)]
    ours = override("reference", calling(names, named))
    monkeypatch.setattr(compiled, "comfys_attention", lambda: exact)

    def call(*given: torch.Tensor) -> torch.Tensor:
        return ours(exact, *given, heads=HEADS)

    if way == "outside":
        found = call(*tensors)
    elif way == "in a model call":
        options = {sampling.KEY: ours, sampling.OVERRIDE: ours}
        found = model_call(stand_in(["WanModel"], {}), options, lambda: call(*tensors))
    else:
        torch._dynamo.reset()
        found = torch.compile(call, backend="eager", fullgraph=True)(*tensors)
    torch.testing.assert_close(found, exact(*tensors, HEADS), rtol=0, atol=2e-6)


@pytest.mark.parametrize("named", [1, 2, 3])
def test_tensors_by_name_reach_an_override_on_top_of_ours(named: int) -> None:
    """One that computes the call by itself, so that its lengths are looked at for the account."""
    tensors = [flat(), flat(length=4), flat(length=4)]
    names = ("q", "k", "v")
    by_name = dict(zip(names[3 - named :], tensors[3 - named :], strict=True))
    ours = override("reference")

    def other(func: Any, *args: Any, **flags: Any) -> torch.Tensor:
        return exact(*args, **{{"q": "query", "k": "key", "v": "value"}.get(name, name): flags[name] for name in flags})

    options = {sampling.KEY: ours, sampling.OVERRIDE: other, sampling.RUN_KEY: sampling.Run(ours)}
    call = lambda: options[sampling.OVERRIDE](exact, *tensors[: 3 - named], **by_name, heads=HEADS)  # noqa: E731
    found = model_call(stand_in(["WanModel"], {}), options, call)
    torch.testing.assert_close(found, exact(*tensors, HEADS), rtol=0, atol=2e-6)
    assert sum(row.calls for row in options[sampling.RUN_KEY].run_report.rows.values()) == 1


def test_a_tensor_that_is_missing_is_named() -> None:
    with pytest.raises(TypeError, match="no value was given"):
        override()(exact, flat(), k=flat(), heads=HEADS)
