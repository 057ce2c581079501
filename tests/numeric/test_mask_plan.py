"""A mask's plan says what the mask says: the same output with fewer keys, one read-back, no call without keys."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterator

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from attention_backends.backends.engine.mask_reader import inspect  # noqa: E402
from attention_backends.backends.kernels.reference import reference_attention  # noqa: E402
from attention_backends.backends.values.mask_plan import (  # noqa: E402
    ALL,
    MaskPlan,
    write_part,
)
from attention_backends.backends.values.masks import as_4d  # noqa: E402
from attention_backends.backends.values.request import AttentionCall  # noqa: E402
from attention_calls import as_comfyui_runs  # noqa: E402
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from mask_forms import FILLS, PATTERNS, SHAPES, filled, random_mask, shaped, visible_keys  # noqa: E402

CASES = int(os.environ.get("MASK_CASES", "10000"))
sdpa = torch.nn.functional.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def _as_comfyui() -> Iterator[None]:
    with as_comfyui_runs():
        yield


def call_of(
    rng: random.Random, batch: int, heads: int, kv_heads: int, q_len: int, kv_len: int, dtype: torch.dtype
) -> AttentionCall:
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    query = torch.randn(batch, heads, q_len, 8, generator=generator).to(dtype)
    key, value = (torch.randn(batch, kv_heads, kv_len, 8, generator=generator).to(dtype) for _ in range(2))
    return AttentionCall(query, key, value, None, False, None, heads != kv_heads)


def run(plan: MaskPlan, call: AttentionCall) -> torch.Tensor:
    """The output by the plan, every part on SDPA; a part without keys fails here."""
    outputs = []
    for part in plan.calls(call):
        if part is None:
            outputs.append(None)
            continue
        assert part.key.shape[2] > 0
        assert part.query.shape[2] > 0
        outputs.append(
            sdpa(part.query, part.key, part.value, part.attn_mask, is_causal=part.is_causal, enable_gqa=part.enable_gqa)
        )
    whole = plan.empty_output(call)
    for part, output in zip(plan.sub_calls, outputs, strict=True):
        if output is not None:
            whole = write_part(output, part, whole)
    assert whole is not None
    return whole


def stock(call: AttentionCall, mask: torch.Tensor) -> torch.Tensor:
    """What ComfyUI's PyTorch attention gives; rows that -inf leaves without keys are zeros, as for a boolean mask."""
    output = sdpa(call.query, call.key, call.value, as_4d(mask), enable_gqa=call.enable_gqa)
    if mask.dtype.is_floating_point:
        empty = (as_4d(mask) == float("-inf")).all(-1, keepdim=True)
        output = output.masked_fill(empty, 0.0)
    return output


def worst(output: torch.Tensor, expected: torch.Tensor) -> float:
    assert output.isfinite().all()
    return float((output.float() - expected.float()).abs().max())


def test_random_masks_of_every_form_equal_sdpa() -> None:
    """10,000 by default (MASK_CASES); the tolerance is the rounding of a few sums of numbers around 1."""
    rng, seen = random.Random(0), Counter()
    for number in range(CASES):
        dtype = rng.choice((torch.float32, torch.float32, torch.bfloat16, torch.float16))
        batch, kv_heads = rng.randint(1, 4), rng.choice((1, 2))
        heads = kv_heads * rng.choice((1, 3))
        q_len, kv_len = rng.randint(1, 24), rng.randint(1, 24)
        if rng.random() < 0.4:
            kv_len = q_len
        call = call_of(rng, batch, heads, kv_heads, q_len, kv_len, dtype)
        mask, words = random_mask(rng, batch, heads, q_len, kv_len, dtype)
        plan = inspect(as_4d(mask), kv_len)
        seen[plan.strategy] += 1
        tolerance = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
        assert worst(run(plan, call), stock(call, mask)) <= tolerance, (number, words, plan.strategy, q_len, kv_len)
    if CASES >= 10_000:
        assert set(seen) == {
            "nothing hidden", "trimmed", "gathered", "per sample", "causal", "per block", "passed on",
        }  # fmt: skip
        assert min(seen.values()) >= 50, seen


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32 - 1),
    pattern=st.sampled_from(PATTERNS),
    shape=st.sampled_from(SHAPES),
    fill=st.sampled_from(FILLS),
    bias=st.booleans(),
    q_len=st.integers(1, 12),
    kv_len=st.integers(1, 12),
    batch=st.integers(1, 3),
)
def test_any_mask_equals_the_definition(
    seed: int, pattern: str, shape: str, fill: str, bias: bool, q_len: int, kv_len: int, batch: int
) -> None:
    """Against attention by its definition, which knows no plan; the seed of a failing mask is shrunk and kept."""
    rng = random.Random(seed)
    call = call_of(rng, batch, 2, 2, q_len, kv_len, torch.float32)
    mask = filled(shaped(visible_keys(pattern, batch, 2, q_len, kv_len, rng), shape), fill, torch.float32, bias, rng)
    expected = reference_attention(AttentionCall(call.query, call.key, call.value, as_4d(mask)))
    assert worst(run(inspect(as_4d(mask), kv_len), call), expected) <= 2e-6


PLANS = {
    "nothing hidden": (torch.ones(1, 1, 1, 6).bool(), "nothing hidden", ALL),
    "zeros hide nothing": (torch.zeros(1, 1, 4, 6), "nothing hidden", ALL),
    "suffix": (torch.tensor([1, 1, 1, 1, 0, 0]).bool()[None, None, None], "trimmed", slice(0, 4)),
    "prefix": (torch.tensor([0, 0, 1, 1, 1, 1]).bool()[None, None, None], "trimmed", slice(2, 6)),
    "expanded": (torch.tensor([1, 1, 1, 1, 0, 0]).bool().expand(2, 3, 5, 6), "trimmed", slice(0, 4)),
    "copied for every query": (torch.tensor([1, 1, 0, 0]).bool().repeat(1, 1, 4, 1), "trimmed", slice(0, 2)),
}


@pytest.mark.parametrize("case", PLANS)
def test_keys_that_lie_together_are_views(case: str) -> None:
    mask, treatment, keys = PLANS[case]
    plan = inspect(mask, mask.shape[3])
    (part,) = plan.sub_calls
    assert (plan.strategy, part.keys, part.mask) == (treatment, keys, None)
    call = call_of(random.Random(0), 2, 3, 3, 5, mask.shape[3], torch.float32)
    (taken,) = plan.calls(call)
    assert taken is not None
    assert taken.key.untyped_storage().data_ptr() == call.key.untyped_storage().data_ptr()


def test_a_gap_is_gathered() -> None:
    plan = inspect(torch.tensor([1, 0, 0, 1, 1]).bool()[None, None, None], 5)
    assert plan.strategy == "gathered"
    assert plan.sub_calls[0].keys.tolist() == [0, 3, 4]


def test_a_hidden_suffix_changes_no_bit() -> None:
    """Where the kept keys fill the kernel's own blocks of keys, so that sums are grouped alike."""
    rng = random.Random(1)
    for dtype in (torch.float32, torch.bfloat16):
        call = call_of(rng, 2, 4, 4, 300, 1024, dtype)
        mask = torch.zeros(2, 1, 1024, dtype=dtype)
        mask[..., 512:] = torch.finfo(dtype).min
        assert torch.equal(run(inspect(as_4d(mask), 1024), call), stock(call, mask))


PATTERN_NAMES = {
    "causal": ("causal", 6, 6, "causal", ""),
    "bottom right": ("bottom right", 3, 6, "per block", ""),
    "window": ("window", 40, 40, "passed on", "sliding window"),
    "bottom right, long": ("bottom right", 30, 40, "passed on", "causal, bottom right"),
}


@pytest.mark.parametrize("case", PATTERN_NAMES)
def test_patterns_are_recognised(case: str) -> None:
    pattern, q_len, kv_len, treatment, name = PATTERN_NAMES[case]
    visible = visible_keys(pattern, 1, 1, q_len, kv_len, random.Random(4))
    plan = inspect(visible, kv_len)
    assert plan.strategy == treatment
    assert plan.pattern.startswith(name) if name else plan.pattern == ""


@pytest.mark.parametrize(("before", "after"), [(2, 0), (0, 3), (2, 3)])
def test_a_triangle_among_hidden_keys_is_causal_over_the_others(before: int, after: int) -> None:
    mask = torch.zeros(1, 1, 5, before + 5 + after, dtype=torch.bool)
    mask[..., before : before + 5] = torch.ones(5, 5, dtype=torch.bool).tril()
    plan = inspect(mask, mask.shape[3])
    (part,) = plan.sub_calls
    assert (plan.strategy, part.keys, part.is_causal) == ("causal", slice(before, before + 5), True)


def test_numbers_that_hide_scattered_keys_are_known_to_hide_alone() -> None:
    mask = torch.zeros(1, 1, 1, 64)
    mask[..., [3, 40]] = float("-inf")
    plan = inspect(mask, 64)
    assert (plan.strategy, plan.only_hides) == ("passed on", True)
    assert plan.booleans.sub_calls[0].mask.dtype is torch.bool


@pytest.mark.parametrize("visible", [True, False])
def test_one_value_for_all_keys_is_read_for_each_of_them(visible: bool) -> None:
    plan = inspect(torch.full((1, 1, 1, 1), visible).expand(2, 3, 4, 5), 5)
    rows = torch.tensor([True, False, True, False])[:, None]
    per_row = inspect(rows.expand(1, 1, 4, 5), 5)
    assert plan.strategy == ("nothing hidden" if visible else "passed on")
    assert [(part.rows, part.keys) for part in per_row.sub_calls] == [
        (slice(row, row + 1), None if row % 2 else slice(0, 5)) for row in range(4)
    ]


def test_a_window_among_hidden_keys_is_recognised() -> None:
    rows = torch.arange(40)
    mask = torch.zeros(1, 1, 40, 45, dtype=torch.bool)
    mask[..., 3:43] = (rows[None] - rows[:, None]).abs() <= 4
    plan = inspect(mask, 45)
    assert (plan.strategy, plan.pattern) == ("trimmed", "sliding window, 4 before and 4 after")


def test_rows_of_finite_lowest_numbers_keep_what_sdpa_gives() -> None:
    """Such a row attends to everything alike: leaving the keys out would change it."""
    mask = torch.zeros(1, 1, 2, 4)
    mask[0, 0, 1] = torch.finfo(torch.float32).min
    assert inspect(mask, 4).strategy == "passed on"
    mask[0, 0, 1] = float("-inf")
    assert inspect(mask, 4).strategy == "per block"


def test_numbers_above_half_of_the_lowest_are_a_bias() -> None:
    plan = inspect(torch.tensor([0.0, -1e9])[None, None, None], 2)
    assert plan.strategy == "passed on"
    assert plan.sub_calls[0].mask is not None


def test_a_pattern_that_samples_and_heads_share_is_recognised() -> None:
    """With guidance both prompts go through the model as one batch, often with a mask that was copied for each."""
    visible = visible_keys("causal", 1, 1, 40, 40, random.Random(0))
    assert inspect(visible.repeat(2, 3, 1, 1), 40).strategy == "causal"
    differing = visible.repeat(2, 3, 1, 1)
    differing[1, 2, 30, 35] = True
    assert inspect(differing, 40).strategy == "passed on"


def test_a_mask_that_hides_everything_is_passed_on() -> None:
    assert inspect(torch.zeros(2, 1, 1, 5, dtype=torch.bool), 5).strategy == "passed on"


def test_nan_is_passed_on() -> None:
    assert inspect(torch.tensor([0.0, float("nan")])[None, None, None], 2).strategy == "passed on"


@pytest.mark.parametrize("shape", [(1, 1, 1, 0), (0, 1, 1, 5), (1, 1, 0, 5), (2, 0, 3, 5)], ids=str)
def test_a_mask_without_numbers_is_passed_on(shape: tuple[int, ...]) -> None:
    for dtype in (torch.bool, torch.float32):
        assert inspect(torch.zeros(shape, dtype=dtype), shape[3]).strategy == "passed on"


def test_facts_are_equal_for_equal_shapes_only() -> None:
    def facts(*visible: int) -> tuple[object, ...]:
        return inspect(torch.tensor(visible).bool()[None, None, None], len(visible)).facts

    assert facts(1, 0, 1, 0) == facts(0, 1, 0, 1)
    assert facts(1, 1, 0, 0) != facts(1, 1, 1, 0)
    assert facts(1, 1, 0, 0) != facts(0, 1, 0, 1)
    assert hash(facts(1, 1, 0, 0)) == hash(facts(1, 1, 0, 0))


def test_one_read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that would wait for a GPU is counted, for every form; slices and sizes are free."""
    waits: list[str] = []
    for name in ("tolist", "item", "__bool__", "__int__", "__float__", "nonzero", "cpu", "numpy"):
        before = getattr(torch.Tensor, name)

        def counted(self, *args, _name=name, _before=before, **kwargs):  # type: ignore[no-untyped-def]
            waits.append(_name)
            return _before(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)
    rng = random.Random(2)
    for _ in range(300):
        batch, heads, q_len, kv_len = rng.randint(1, 3), 2, rng.randint(1, 9), rng.randint(1, 9)
        mask, words = random_mask(rng, batch, heads, q_len, kv_len, torch.float32)
        waits.clear()
        plan = inspect(as_4d(mask), kv_len)
        plan.calls(call_of(rng, batch, heads, heads, q_len, kv_len, torch.float32))
        assert waits in ([], ["tolist"]), (words, waits)
