"""Checks mode: what is refused, in which words, and that it costs nothing and changes nothing when it is off."""

from __future__ import annotations

from typing import Any

import pytest
from syrupy.assertion import SnapshotAssertion

torch = pytest.importorskip("torch", reason="torch is not installed")

from attention_backends.backends.config.text import parse_config  # noqa: E402
from attention_backends.backends.engine.call_checks import CheckError, check, checked, checks_from_environment  # noqa: E402
from attention_backends.backends.engine.plan import CallKind  # noqa: E402
from attention_backends.backends.engine.router import Router  # noqa: E402
from attention_backends.backends.engine.session import Session  # noqa: E402
from attention_backends.backends.report import RunReport  # noqa: E402
from attention_backends.backends.values.platform import Platform  # noqa: E402
from attention_backends.backends.values.request import AttentionCall  # noqa: E402
from hook_side import Outcome, override  # noqa: E402


def zeros(*shape: int, dtype: torch.dtype = torch.float16, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def call(**changes: Any) -> AttentionCall:
    """A call that passes, with these arguments in place of its own."""
    tensors = {"query": zeros(2, 8, 6, 32), "key": zeros(2, 8, 10, 32), "value": zeros(2, 8, 10, 16)}
    return AttentionCall(**{**tensors, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"is_causal": True},
        {"attn_mask": zeros(2, 8, 6, 10)},
        {"attn_mask": zeros(1, 1, 1, 10, dtype=torch.bool)},
        {"key": zeros(2, 2, 10, 32), "value": zeros(2, 2, 10, 16), "enable_gqa": True},
        {"query": zeros(2, 6, 8, 32).transpose(1, 2), "key": zeros(2, 10, 8, 64)[..., ::2].transpose(1, 2)},
        {"query": zeros(2, 8, 0, 32)},
    ],
    ids=["plain", "causal", "bias", "key padding", "grouped", "not contiguous", "no queries"],
)
def test_a_sound_call_passes_whatever_its_layout_in_memory(changes: dict[str, Any]) -> None:
    check(call(**changes))


BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "flat": ({"query": zeros(2, 6, 256)}, "query has 3 dimensions, not 4", "give (batch, heads, length, head_dim)"),
    "device": ({"value": zeros(2, 8, 10, 16, device="meta")}, "2 devices: cpu, meta", "move all of them to one device"),
    "device of the mask": (
        {"attn_mask": zeros(2, 1, 6, 10, device="meta")}, "2 devices: cpu, meta", "move all of them to one device",
    ),
    "dtype of the key": (
        {"key": zeros(2, 8, 10, 32, dtype=torch.float32)},
        "dtypes differ: query float16, key float32, value float16",
        "cast key and value to the query's dtype",
    ),
    "batch": ({"key": zeros(1, 8, 10, 32)}, "batch sizes differ: 2, 1, 2", "expand the smaller ones"),
    "heads of the value": ({"value": zeros(2, 4, 10, 16)}, "key has 8 heads, value 4", "give both the same heads"),
    "heads that do not divide": (
        {"key": zeros(2, 3, 10, 32), "value": zeros(2, 3, 10, 16), "enable_gqa": True},
        "8 query heads are not a multiple of 3 key heads",
        "check heads and layout",
    ),
    "heads that nobody shares": (
        {"key": zeros(2, 2, 10, 32), "value": zeros(2, 2, 10, 16)},
        "8 query heads over 2 key heads without enable_gqa",
        "set enable_gqa=True",
    ),
    "kv_len": ({"value": zeros(2, 8, 9, 16)}, "kv_len of key 10 != 9 of value", "give one value for each key"),
    "no keys": (
        {"key": zeros(2, 8, 0, 32), "value": zeros(2, 8, 0, 16)}, "kv_len 0: there is no key", "leave this call out",
    ),
    "head_dim": ({"key": zeros(2, 8, 10, 16)}, "head_dim of key 16 != 32 of query", "project both to the same size"),
    "mask of integers": (
        {"attn_mask": zeros(2, 8, 6, 10, dtype=torch.int64)}, "mask of dtype int64", "make it boolean (True: visible)",
    ),
    "mask of another dtype": (
        {"attn_mask": zeros(2, 8, 6, 10, dtype=torch.float32)},
        "mask of dtype float32, query float16",
        "cast the mask to the query's dtype",
    ),
    "mask that does not fit": (
        {"attn_mask": zeros(2, 4, 6, 10)},
        "mask (2, 4, 6, 10) cannot be broadcast to (2, 8, 6, 10)",
        "give each dimension its size or 1",
    ),
    "flat mask": (
        {"attn_mask": zeros(6, 10)}, "mask (6, 10) cannot be broadcast to (2, 8, 6, 10)", "give each dimension",
    ),
    "causal twice": (
        {"attn_mask": zeros(2, 8, 6, 10), "is_causal": True},
        "is_causal together with a mask",
        "put the causal part into the mask",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_call_is_refused_with_what_was_given_and_what_to_do(name: str, snapshot: SnapshotAssertion) -> None:
    changes, problem, remedy = BAD[name]
    with pytest.raises(CheckError) as caught:
        check(call(**changes))
    first, *lines = str(caught.value).splitlines()
    assert first == snapshot
    assert any(line.startswith(f"  {problem}") and f"; what to do: {remedy}" in line for line in lines), lines
    given = call(**changes)
    shape = tuple(given.query.shape)
    assert lines[0] == f"  query: {shape} float16 on cpu"
    assert any(line.startswith("  mask: ") for line in lines) == (given.attn_mask is not None)


def test_everything_that_is_wrong_is_said_at_once(snapshot: SnapshotAssertion) -> None:
    wrong = call(
        key=zeros(2, 8, 10, 16), value=zeros(2, 8, 9, 16, device="meta"), attn_mask=zeros(2, 8, 6, 9), is_causal=True
    )
    with pytest.raises(CheckError) as caught:
        check(wrong)
    assert str(caught.value) == snapshot


@pytest.mark.parametrize(
    ("value", "on"),
    [
        *((value, True) for value in ("1", "ON", "yes", "True", " on ")),
        *((value, False) for value in ("", "0", "off", "no", "false", "2")),
    ],
)
def test_the_environment_switches_them_on_in_diffusers_words(value: str, on: bool) -> None:
    assert checks_from_environment({"DIFFUSERS_ATTN_CHECKS": value}) is on
    assert checks_from_environment({}) is False


# Inside a session, which is ComfyUI's path


def session(**options: Any) -> Session:
    return Session(Router(Platform("cpu", torch="2.11.0")), (parse_config("sdpa_math"),), **options)


def test_off_the_plan_holds_the_kernel_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DIFFUSERS_ATTN_CHECKS", raising=False)
    request = call().request()._replace(v_head_dim=0)
    off, on = session(run_report=RunReport(mode="off")), session(run_report=RunReport(mode="off"), checks=True)
    assert off.plan(CallKind(request, "self", "self")).plan.kernel is off.router.kernel("sdpa_math")
    assert on.plan(CallKind(request, "self", "self")).plan.kernel is not on.router.kernel("sdpa_math")
    monkeypatch.setenv("DIFFUSERS_ATTN_CHECKS", "1")
    assert not off.checks, "decided when the session began"
    assert session().checks
    assert not session(checks=False).checks


def test_a_refused_call_is_no_failure_of_the_kernel(snapshot: SnapshotAssertion) -> None:
    on = session(checks=True)
    good = call(value=zeros(2, 8, 10, 32))
    slot = on.plan(CallKind(good.request(), "self", "self"))
    bad = AttentionCall(good.query, good.key, good.value[:, :, :9])
    with pytest.raises(CheckError) as caught:
        on.attention(slot, bad)
    assert str(caught.value) == snapshot
    assert (on.failed, slot.plan.row.calls) == ({}, 0)
    on.attention(slot, good)
    assert (slot.plan.decision.backend, slot.plan.row.calls) == ("sdpa_math", 1)


def test_every_call_is_checked_before_the_kernel() -> None:
    seen: list[AttentionCall] = []
    kernel = checked(lambda given: seen.append(given) or given.query)
    good = call()
    kernel(good)
    with pytest.raises(CheckError):
        kernel(call(key=zeros(2, 8, 10, 16)))
    assert seen == [good]


def test_a_call_of_comfyuis_hook_is_checked_where_the_environment_says_so(
    monkeypatch: pytest.MonkeyPatch, snapshot: SnapshotAssertion
) -> None:
    mask = torch.zeros(1, 1, 6, 6, dtype=torch.float64)
    monkeypatch.setenv("DIFFUSERS_ATTN_CHECKS", "true")
    with pytest.raises(CheckError) as caught:
        Outcome(override("reference"), mask=mask, lengths=(6, 6, 6))
    assert str(caught.value) == snapshot
    monkeypatch.delenv("DIFFUSERS_ATTN_CHECKS")
    assert Outcome(override("reference"), mask=mask, lengths=(6, 6, 6)).rows
