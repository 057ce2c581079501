"""Limits as rules: each refuses with an id and values, and says itself what it refuses."""

from __future__ import annotations

import copy
import json
import pickle
from itertools import product

import pytest
from attention_backends.backends.kernels import BACKENDS
from attention_backends.backends.kernels.backend import Backend
from attention_backends.backends.values.limits import (
    COLUMNS,
    DEFAULT_RULES,
    FURTHER,
    NO_MASK,
    Batch,
    Causal,
    Dtypes,
    HeadDim,
    HeadDimIn,
    HeadDimMultiple,
    Limits,
    MaskWithCausal,
    Rule,
    ValueHeadDim,
)
from attention_backends.backends.values.reasons import TEMPLATES, Reason, template
from attention_backends.backends.values.request import DTYPES, MASK_KINDS, AttentionRequest
from attention_backends.devtools.pages.limits import MACHINES, equipped

CALL = AttentionRequest(1, 8, 256, 256, 64, "bfloat16")


def _broken(limits: Limits, **changes: object) -> list[tuple[str, dict[str, object]]]:
    found = limits.reasons(CALL._replace(**changes))
    return [(reason.id, dict(reason.values)) for reason in found if isinstance(reason, Reason)]


def test_a_reason_has_an_id_and_values() -> None:
    limits = Limits(HeadDim(max=128), HeadDimMultiple(8), NO_MASK, Causal("no"), Batch(4))
    assert _broken(limits) == []
    assert _broken(limits, head_dim=132) == [
        ("head_dim.max", {"head_dim": 132, "max": 128}),
        ("head_dim.multiple", {"head_dim": 132, "of": 8}),
    ]
    assert _broken(limits, mask="bias", batch=5) == [
        ("mask", {"mask": "bias", "taken": ("none",)}),
        ("batch", {"batch": 5, "max": 4}),
    ]
    assert [reason_id for reason_id, _ in _broken(limits, is_causal=True)] == ["causal"]


def test_a_multiple_that_the_values_break_names_their_size() -> None:
    limits = Limits(HeadDimMultiple(8), ValueHeadDim(may_differ=True))
    assert _broken(limits, v_head_dim=60) == [("head_dim.multiple", {"head_dim": 60, "of": 8})]


def test_a_reason_is_text_to_everyone_else() -> None:
    (reason,) = Limits(HeadDim(max=32)).reasons(CALL)
    assert reason == "head_dim 64 > 32"
    assert json.loads(json.dumps([reason])) == [reason]
    for made in (copy.copy(reason), copy.deepcopy(reason), pickle.loads(pickle.dumps(reason))):
        assert (made, made.id, made.values) == (reason, "head_dim.max", {"head_dim": 64, "max": 32})


def test_an_id_has_one_text() -> None:
    assert template("batch", TEMPLATES["batch"]) == "batch"
    with pytest.raises(ValueError, match="batch"):
        template("batch", "another text")
    with pytest.raises(KeyError):
        Reason("nobody's id")


def test_a_reason_within_another_keeps_its_id_and_values() -> None:
    (inner,) = Limits(HeadDim(max=32)).reasons(CALL)
    outer = copy.deepcopy(Reason("package.needed", reason=inner, by="sm90"))
    assert outer.startswith(inner)
    assert [(one.id, one.values["max"]) for one in outer.causes()] == [("head_dim.max", 32)]


@pytest.mark.parametrize("backend", list(BACKENDS.values()), ids=lambda one: one.id)
def test_every_refusal_of_a_request_is_a_reason(backend: Backend) -> None:
    odd = {"dtype": "float64", "head_dim": 1031, "mask": "bias", "is_causal": True, "q_len": 2**20, "kv_len": 2**21 + 1}
    changes = [{name: value} for name, value in odd.items()] + [odd, {"num_kv_heads": 2}, {"batch": 2**17}]
    changes.append({"q_len": 46340, "kv_len": 46340, "mask": "bool"})  # 2**31 elements once lengths are filled up
    machines = [one for machine in MACHINES for _, one in equipped(backend, machine)]
    for machine in (one for one in machines if not backend.unavailable_reasons(one)):
        for change in changes:
            for reason in backend.unsupported_reasons(CALL._replace(**change), machine):
                assert isinstance(reason, Reason), (machine, change, reason)
                assert reason.id in TEMPLATES


def test_limits_differ_by_their_rules_and_have_one_of_each_usual_kind() -> None:
    limits = Limits(HeadDim(max=128), Dtypes(("float16",)))
    assert limits.but(HeadDim(max=256)) == Limits(Dtypes(("float16",)), HeadDim(max=256)) != limits
    assert limits.without(HeadDim, Dtypes) == Limits() == Limits(*DEFAULT_RULES)
    assert limits[Dtypes].names == ("float16",)
    assert limits.get(HeadDimIn) is None
    with pytest.raises(KeyError):
        limits[HeadDimIn]


def test_the_words_of_rules_stand_in_their_columns() -> None:
    words = Limits(HeadDim(max=128), HeadDimMultiple(8), MaskWithCausal(taken=True), Batch(2)).described()
    assert tuple(words) == COLUMNS
    assert words["head_dim"] == "to 128, multiples of 8"
    assert words[FURTHER].count(";") == 1


def _all_limits() -> set[Limits]:
    return {
        backend.limits_on(one)
        for backend, machine in product(BACKENDS.values(), MACHINES)
        for _, one in equipped(backend, machine)
    }


def test_every_rule_that_a_kernel_has_refuses_something_and_says_what() -> None:
    """A rule that nothing breaks, or that the table leaves out, would be a limit that is no limit."""
    sizes = [CALL._replace(head_dim=size, dtype=dtype) for size, dtype in product((4, 12, 17, 160, 520), DTYPES)]
    lengths = [
        CALL._replace(q_len=length, kv_len=length, is_causal=causal, mask=mask)
        for length, causal, mask in product((0, 1, 77, 520, 200_000, 2**21), (False, True), MASK_KINDS)
    ]
    many = [
        CALL._replace(batch=70_000, mask="bool"),
        CALL._replace(num_heads=70_000),
        CALL._replace(num_heads=2**16, kv_len=2**16, q_len=2**16),
        CALL._replace(num_kv_heads=2),
        CALL._replace(scale=0.7),
        CALL._replace(q_len=8, is_causal=True),
    ]
    calls = (*sizes, *lengths, *many)
    rules: set[Rule] = {rule for limits in _all_limits() for rule in limits.rules}
    assert len({type(rule) for rule in rules}) >= 18
    for rule in rules:
        broken = [reason for call in calls if (reason := rule.reason(call)) is not None]
        assert all(reason.id and "{" not in reason for reason in broken)
        if rule.column == FURTHER and rule not in DEFAULT_RULES:
            assert rule.describe(), rule
        allows_all = (
            rule in (HeadDim(), *DEFAULT_RULES)
            or rule.describe() in ("yes", "all", "any lengths", "any")
            or (isinstance(rule, MaskWithCausal | ValueHeadDim))
        )
        assert broken or allows_all or isinstance(rule, Dtypes), rule
