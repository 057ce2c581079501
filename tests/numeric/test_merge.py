"""Partial results of one call, over some of the keys each, join into the result over all of them."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from attention_backends.backends.engine.merge import merge  # noqa: E402
from attention_backends.backends.kernels import BACKENDS  # noqa: E402
from attention_backends.backends.values.platform import Platform  # noqa: E402
from attention_backends.backends.values.request import AttentionCall, AttentionRequest  # noqa: E402
from attention_calls import as_comfyui_runs, call_for, cast  # noqa: E402
from tolerance import Error, allowed, error  # noqa: E402

CPU = Platform("cpu", torch=torch.__version__)
REFERENCE, FLASH = (BACKENDS[name].load_lse(CPU) for name in ("reference", "sdpa_flash"))
Pairs = list[tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture(autouse=True)
def inference():
    with as_comfyui_runs():
        yield


def _cut(call: AttentionCall, parts: int, random: Random) -> list[AttentionCall]:
    """The call over disjoint keys, some of which may be none."""
    kv_len = call.key.shape[2]
    order = torch.randperm(kv_len, generator=torch.Generator().manual_seed(random.randrange(100)))
    ends = [0, *sorted(random.randrange(kv_len + 1) for _ in range(parts - 1)), kv_len]
    made = []
    for begin, end in pairwise(ends):
        keys = order[begin:end]
        mask = call.attn_mask
        mask = mask if mask is None or mask.shape[3] == 1 else mask[..., keys]
        made.append(call.changed(key=call.key[:, :, keys], value=call.value[:, :, keys], attn_mask=mask))
    return made


@pytest.mark.parametrize("seed", range(24))
def test_any_cut_of_the_keys_is_the_whole_call(seed: int) -> None:
    random = Random(seed)
    dtype = random.choice(["float16", "bfloat16", "float32", "float64"])
    mask, heads = random.choice(["none", "key_padding", "bool", "bias"]), random.choice([4, 2, 1])
    call = call_for(AttentionRequest(2, 4, 33, random.randrange(1, 90), 32, dtype, heads, mask=mask), seed=seed)
    if call.attn_mask is not None:  # rows that see no key in any part
        call.attn_mask = call.attn_mask.expand(2, -1, -1, -1).clone()
        call.attn_mask[1, :, -1] = False if mask != "bias" else float("-inf")
    expected, lse = REFERENCE(cast(call, torch.float64))
    for kernel in (REFERENCE, FLASH):
        found, sums = merge([kernel(part) for part in _cut(call, random.randrange(2, 6), random)])
        assert found.dtype == call.query.dtype
        limit = Error(1e-6, 1e-6) if dtype == "float64" else allowed(call, "half")  # that of an LSE in float32
        assert error(found, expected).within(limit)
        torch.testing.assert_close(sums, lse.to(sums.dtype), rtol=1e-5, atol=1e-3)
        empty = lse.isneginf()
        assert torch.equal(sums.isneginf(), empty)
        assert not found[empty].any()


def _pair(lse: float, output: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((1, 1, 1, 2), output), torch.full((1, 1, 1), lse)


@pytest.mark.parametrize(
    ("pairs", "expected", "lse"),
    [
        ([_pair(3.0, 5.0)], 5.0, 3.0),
        ([_pair(0.0, 1.0), _pair(0.0, 3.0)], 2.0, 0.6931472),
        ([_pair(float("-inf"), 0.0), _pair(float("-inf"), 0.0)], 0.0, float("-inf")),
        ([_pair(float("-inf"), float("nan")), _pair(-1e30, 4.0)], 4.0, -1e30),
        ([_pair(1e4, 2.0), _pair(-1e4, 9.0)], 2.0, 1e4),
    ],
)
def test_ends_of_the_range(pairs: Pairs, expected: float, lse: float) -> None:
    output, sums = merge(pairs)
    torch.testing.assert_close(output, torch.full_like(output, expected))
    torch.testing.assert_close(sums, torch.full_like(sums, lse))


def test_what_a_kernel_made_nan_stays_nan() -> None:
    output, lse = merge([_pair(float("nan"), float("nan")), _pair(0.0)])
    assert output.isnan().all()
    assert lse.isnan().all()


def test_joining_in_steps_is_joining_at_once() -> None:
    call = call_for(AttentionRequest(1, 2, 9, 40, 16, "float32"))
    parts = [REFERENCE(part) for part in _cut(call, 4, Random(1))]
    step = parts[0]
    for part in parts[1:]:
        step = merge([step, part])
    for one, other in zip(step, merge(parts), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("pairs", [[], [_pair(0.0), (torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2))]])
def test_parts_that_do_not_fit_are_refused(pairs: Pairs) -> None:
    with pytest.raises(ValueError, match="parts to merge"):
        merge(pairs)
