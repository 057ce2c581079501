"""Comparisons on the embedded model: repeatability, honest rows, broken backends, failures in the middle."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from attention_backends.backends.config.names import UnknownBackendError
from attention_backends.backends.kernels.backend import FLOATING
from attention_backends.backends.kernels.support.sdpa import plain_sdpa
from attention_backends.backends.values.limits import NO_MASK, Dtypes
from attention_backends.backends.values.request import AttentionCall
from attention_backends.comparison import metrics
from attention_backends.comparison.calls import CapturedCall, compare_calls
from attention_backends.comparison.contenders import Routed, default_backends, parse_backends, router_for
from attention_backends.comparison.report import LEVEL, ComparisonError, Row
from attention_backends.comparison.run import Comparison, compare, quiet
from attention_backends.comparison.scene import Scene, Settings, picture_of
from attention_backends.demo import captions
from broken_backends import (
    AGAIN,
    CALLS,
    DROPPED_MASK,
    FAULT,
    MEMBER,
    MEMORY,
    NAN,
    RAISING,
    WRONG_SCALE,
    Wrong,
    dropped_mask,
    failing_after,
    fault,
    nan_in_block_2,
    no_memory,
    router,
    wrong_scale,
)  # fmt: skip
from syrupy.assertion import SnapshotAssertion

SMALL = {"width": 16, "height": 16, "steps": 2, "repeat": 2, "device": "cpu"}


def small(**changes: Any) -> Settings:
    return Settings(**{**SMALL, **changes})


def row_of(comparison: Comparison, backend: str) -> Any:
    return next(row for row in comparison.report.rows if row.asked == backend)


@pytest.fixture(scope="module")
def plain() -> Comparison:
    return compare(small(steps=6), ["torch_sdpa", "sdpa_math", "emulated_int8"])


def test_the_same_seed_gives_the_same_picture_to_the_bit(plain: Comparison) -> None:
    again = compare(small(steps=6), ["torch_sdpa", "sdpa_math", "emulated_int8"])
    for one, other in zip(plain.pictures, again.pictures, strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)
    assert [row.repeatable for row in plain.report.rows] == [True, True, True]


def test_methods_keep_what_they_learn_within_a_run_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []

    def begin(self: Routed, samples: tuple[str, ...]) -> None:
        begun.append((self.backend, samples))

    monkeypatch.setattr(Routed, "begin", begin)
    compare(small(steps=1), ["torch_sdpa"])
    assert begun == 2 * [("torch_sdpa", ("with the caption", "without"))]


def test_another_seed_gives_another_picture(plain: Comparison) -> None:
    other = compare(small(steps=6, seed=2), ["torch_sdpa"]).pictures[0]
    assert other is not None
    assert plain.pictures[0] is not None
    assert (other - plain.pictures[0]).abs().max() > 0.1


def test_torch_sdpa_and_sdpa_math_differ_by_rounding_only(plain: Comparison) -> None:
    row = row_of(plain, "sdpa_math")
    assert 0 < row.relative_l2 < 1e-5
    assert row.cosine == pytest.approx(1, abs=1e-9)
    assert row.max_difference < LEVEL / 10
    assert row.psnr > 90
    assert row.ssim > 0.99999
    assert row.verdict in ("same to the eye", "bit-identical")


def test_emulated_int8_differs_a_little_and_not_by_rounding(plain: Comparison) -> None:
    row = row_of(plain, "emulated_int8")
    assert 1e-4 < row.relative_l2 < 0.1
    assert row.relative_l2 > 100 * row_of(plain, "sdpa_math").relative_l2
    assert not row.identical
    assert row.psnr > 30


def test_a_report_has_all_that_was_measured(plain: Comparison, snapshot: SnapshotAssertion) -> None:
    report = plain.report
    first = report.rows[0]
    assert (first.asked, first.ran, first.runs, first.speedup) == ("torch_sdpa", "torch_sdpa", 2, 1.0)
    assert first.identical
    for row in report.rows:
        assert row.total_ms.count == 2
        assert row.step_ms.count == 2 * 6, "every step of every run"
        assert row.total_ms.low <= row.total_ms.median <= row.total_ms.high
        assert 6 * row.step_ms.low <= row.total_ms.high
        assert 0 < row.attention_share < 1
        assert row.peak_memory is None
    assert next(note for note in report.notes if note.startswith("peak memory: ")) == snapshot
    assert report.versions["torch"] == torch.__version__
    assert "sha256" in report.model


def test_two_runs_of_one_backend_agree_within_the_spread() -> None:
    found = compare(small(steps=4, repeat=7), ["torch_sdpa", AGAIN], router=router(Wrong(AGAIN, plain_sdpa())))
    one, other = (row.total_ms for row in found.report.rows)
    assert max(one.low, other.low) <= min(one.high, other.high), f"{one} and {other} do not overlap"
    assert row_of(found, AGAIN).identical


def test_repeats_are_interleaved(snapshot: SnapshotAssertion) -> None:
    told: list[str] = []
    compare(
        small(), ["torch_sdpa", "sdpa_math"], progress=lambda what, done, total: told.append(f"{done}/{total} {what}")
    )
    assert told == snapshot  # fmt: skip


def test_one_step_starts_every_backend_from_the_same_latent() -> None:
    found = compare(small(mode="one_step", steps=6), ["torch_sdpa", "sdpa_math", "emulated_int8"])
    exact, rounded = row_of(found, "sdpa_math"), row_of(found, "emulated_int8")
    assert 0 < exact.relative_l2 < 1e-5 < rounded.relative_l2 < 0.1
    assert found.report.rows[0].step_ms.count == 2, "one step, twice"


def test_a_video_is_compared_frame_by_frame() -> None:
    found = compare(small(frames=3, mode="one_step"), ["torch_sdpa", "emulated_int8"])
    row = row_of(found, "emulated_int8")
    assert len(row.frame_scores) == 3
    assert row.ssim == pytest.approx(sum(frame.ssim for frame in row.frame_scores) / 3)


# Backends that are wrong


def test_a_wrong_scale_is_unmistakable() -> None:
    found = compare(small(steps=6), [WRONG_SCALE], router=router(Wrong(WRONG_SCALE, wrong_scale)))
    row = row_of(found, WRONG_SCALE)
    assert row.psnr < 25
    assert row.relative_l2 > 0.1
    assert row.verdict == "a different picture"


def padded(routed: Routed, visible: int) -> Any:
    """Attention for a context that holds more than the caption: a mask hides the rest from every query."""

    def attention(query: Any, key: Any, value: Any, *, role: str, block: int) -> torch.Tensor:
        mask = None if role != "cross" else (torch.arange(key.shape[2]) < visible)[None, None, None]
        return routed.run(AttentionCall(query, key, value, mask), role, str(block))

    return attention


def test_a_dropped_mask_is_another_picture() -> None:
    """The caption's tokens, then those of another caption as padding: who drops the mask draws both."""
    scene = Scene(small(steps=8), torch.device("cpu"))
    alone = picture_of(scene.sample(Routed(router(), "torch_sdpa")))
    other = captions.encode("a small blue square on the right on black")[None]
    visible = scene.positive.shape[1]
    assert scene.negative.shape[1] == visible
    scene.positive, scene.negative = (torch.cat([part, other], dim=1) for part in (scene.positive, scene.negative))
    made = router(Wrong(DROPPED_MASK, dropped_mask))
    rows = {}
    for name in ("torch_sdpa", "sdpa_math", DROPPED_MASK):
        rows[name] = Row(name)
        metrics.score(rows[name], picture_of(scene.sample(padded(Routed(made, name), visible))), alone)
    for name in ("torch_sdpa", "sdpa_math"):
        assert rows[name].max_difference < LEVEL / 10
        assert rows[name].ssim > 0.9999
    row = rows[DROPPED_MASK]
    assert row.verdict == "a different picture"
    assert row.psnr < 20, row
    assert row.ssim < 0.9
    assert row.max_difference > 0.3


def test_nan_in_one_block_is_named_and_crashes_nothing() -> None:
    found = compare(small(), ["sdpa_math", NAN], router=router(Wrong(NAN, nan_in_block_2())))
    row = row_of(found, NAN)
    assert "NaN in all values" in row.verdict, "attention spreads it over the picture"
    assert row.failed is None
    assert math.isnan(row.psnr)
    assert math.isnan(row.ssim)
    assert row.repeatable
    assert row_of(found, "sdpa_math").psnr > 90


def test_attention_alone_names_the_block_with_the_nan(snapshot: SnapshotAssertion) -> None:
    found = compare(small(mode="attention"), ["sdpa_math", NAN], router=router(Wrong(NAN, nan_in_block_2())))
    row = row_of(found, NAN)
    assert row.broken == snapshot
    assert [call.broken is not None for call in row.calls].count(True) == 1
    assert math.isnan(row.relative_l2)
    assert all(call.relative_l2 < 1e-5 for call in row_of(found, "sdpa_math").calls)


def test_attention_alone_covers_each_role_and_block() -> None:
    found = compare(small(mode="attention", repeat=3), ["torch_sdpa", "sdpa_math", "emulated_int8", WRONG_SCALE],
                    router=router(Wrong(WRONG_SCALE, wrong_scale)))  # fmt: skip
    sites = [(role, str(block)) for block in range(4) for role in ("self", "cross")]
    for row in found.report.rows:
        assert [(call.role, call.block) for call in row.calls] == sites
        assert all(call.ms.count == 3 for call in row.calls)
        assert sum(call.ms.low for call in row.calls) <= row.step_ms.low, "a pass is the sum of its calls"
    worst = {row.asked: row.relative_l2 for row in found.report.rows}
    assert worst["torch_sdpa"] < 1e-6
    assert worst["sdpa_math"] < 4 * worst["torch_sdpa"]
    assert 1e-4 < worst["emulated_int8"] < 0.05
    assert worst[WRONG_SCALE] > 0.1


def masked_call() -> CapturedCall:
    made = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(1, 2, 48, 64, generator=made) for _ in range(3))
    mask = torch.rand(1, 1, 48, 48, generator=made) > 0.5  # each query sees other keys: none can be left out
    return CapturedCall("cross", 0, AttentionCall(query, key, value, mask))


def test_a_dropped_mask_is_unmistakable() -> None:
    made = router(Wrong(DROPPED_MASK, dropped_mask))
    rows, _ = compare_calls([masked_call()], ["torch_sdpa", "sdpa_math", DROPPED_MASK], made, 1, quiet)
    assert rows[0].relative_l2 < 1e-6
    assert rows[1].relative_l2 < 1e-6
    assert rows[2].relative_l2 > 0.3
    assert rows[2].cosine < 0.95
    assert rows[2].calls[0].request.endswith("mask bool")


def without_masks(backend: str = AGAIN) -> Wrong:
    """PyTorch's attention as a library that takes no mask of any kind, and raises where it gets one."""

    def run(call: AttentionCall) -> torch.Tensor:
        assert call.attn_mask is None
        assert not call.is_causal
        return plain_sdpa()(call)

    made = Wrong(backend, run)
    made.limits = type(made.limits)(Dtypes(FLOATING), NO_MASK)  # type: ignore[misc]
    return made


def hiding(kind: str) -> CapturedCall:
    """The masked call with keys hidden from all queries, from each sample's by itself, or only made weaker."""
    call = masked_call().call
    query, key, value = (tensor.expand(2, -1, -1, -1) for tensor in (call.query, call.key, call.value))
    mask = torch.ones(2, 1, 1, 48, dtype=torch.bool)
    mask[0, ..., 30:] = False
    mask[1, ..., 30 if kind == "trimmed" else 20 :] = False
    if kind == "weaker":
        mask = torch.zeros(2, 1, 1, 48).masked_fill(~mask, -0.5)
    return CapturedCall("cross", "0", AttentionCall(query, key, value, mask))


@pytest.mark.parametrize("kind", ["trimmed", "per sample"])
def test_a_backend_that_takes_no_masks_runs_what_they_leave(kind: str) -> None:
    rows, _ = compare_calls([hiding(kind)], ["torch_sdpa", AGAIN], router(without_masks()), 2, quiet)
    for row in rows:
        assert row.failed is None
        assert row.runs == 2
        assert row.relative_l2 < 1e-6
        assert row.calls[0].request.endswith(f"mask key_padding; mask {kind}"), row.calls[0].request


def test_a_mask_of_which_nothing_can_be_left_out_is_refused_by_name(snapshot: SnapshotAssertion) -> None:
    calls = [hiding("weaker")]
    rows, _ = compare_calls(calls, ["torch_sdpa", AGAIN], router(without_masks()), 1, quiet)
    assert rows[0].relative_l2 < 1e-6
    assert rows[0].calls[0].request.endswith("mask bias")
    assert rows[1].failed == snapshot


def test_masks_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from attention_backends.comparison import calls

    read: list[int] = []
    inspect = calls.inspect
    monkeypatch.setattr(calls, "inspect", lambda *given: read.append(1) or inspect(*given))
    compare_calls([hiding("trimmed"), hiding("per sample")], ["torch_sdpa", "sdpa_math"], router(), 3, quiet)
    assert len(read) == 2


def test_a_kernel_that_spoils_its_inputs_spoils_only_its_own_row() -> None:
    def spoiling(call: AttentionCall) -> torch.Tensor:
        output = plain_sdpa()(call)
        call.query.zero_()
        call.scale = 9.0
        return output

    rows, _ = compare_calls([masked_call()], [AGAIN, "sdpa_math"], router(Wrong(AGAIN, spoiling)), 2, quiet)
    assert [row.relative_l2 < 1e-6 for row in rows] == [True, True]


# Backends that cannot run


def test_a_backend_that_is_not_available_is_a_row_that_says_why(snapshot: SnapshotAssertion) -> None:
    found = compare(small(), ["cudnn_attn", "comfy", "sdpa_math"])
    row = row_of(found, "cudnn_attn")
    assert row.failed == snapshot
    assert (row.ran, row.runs, row.step_ms, row.psnr) == (None, 0, None, None)
    assert found.pictures[1] is None
    assert row_of(found, "comfy").failed == "runs only inside ComfyUI"
    assert row_of(found, "sdpa_math").runs == 2


def test_nothing_runs_in_place_of_a_backend_that_raises(snapshot: SnapshotAssertion) -> None:
    raising = Wrong(RAISING, failing_after(0, lambda: ValueError("no such tile")))
    found = compare(small(), [RAISING, "sdpa_math"], router=router(raising))
    row = row_of(found, RAISING)
    assert row.failed == snapshot
    assert (row.ran, row.runs) == (None, 0)
    assert found.pictures[1] is None
    assert row_of(found, "sdpa_math").runs == 2


def test_a_request_that_is_refused_names_the_limit(snapshot: SnapshotAssertion) -> None:
    half_only = Wrong(AGAIN, plain_sdpa())
    half_only.limits = type(half_only.limits)(Dtypes(("float16",)))  # type: ignore[misc]
    row = row_of(compare(small(), [AGAIN], router=router(half_only)), AGAIN)
    assert row.failed == snapshot
    assert row.ran is None


def test_a_family_shows_the_member_that_ran() -> None:
    found = compare(small(), [MEMBER], router=router(Wrong(MEMBER, plain_sdpa(), member="flash_attn_3")))
    assert row_of(found, MEMBER).name == f"{MEMBER} -> flash_attn_3"


# In the middle


def test_out_of_memory_in_the_middle_keeps_what_was_finished(snapshot: SnapshotAssertion) -> None:
    calls_before = CALLS * (1 + 2) + 3  # the warm-up, one run of two steps, and a little more
    made = router(Wrong(MEMORY, failing_after(calls_before, no_memory)))
    found = compare(small(repeat=3), [MEMORY, "sdpa_math"], router=made)
    row = row_of(found, MEMORY)
    assert row.failed == snapshot
    assert row.runs == 1
    assert row.identical
    assert found.pictures[1] is not None
    assert [row_of(found, name).runs for name in ("torch_sdpa", "sdpa_math")] == [3, 3]


def test_a_fault_of_the_device_ends_the_rest_but_keeps_what_was_finished(snapshot: SnapshotAssertion) -> None:
    made = router(Wrong(FAULT, failing_after(CALLS * (1 + 2) + 1, fault)))
    found = compare(small(), ["torch_sdpa", FAULT, "sdpa_math"], router=made)
    assert "illegal memory access" in row_of(found, FAULT).failed
    assert row_of(found, "sdpa_math").failed == snapshot
    assert [row.runs for row in found.report.rows] == [2, 1, 1]


def test_an_interruption_keeps_what_was_finished(snapshot: SnapshotAssertion) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if what == "sdpa_math: run 1 of 2":
            raise KeyboardInterrupt

    found = compare(small(), ["torch_sdpa", "sdpa_math"], progress=stop)
    assert found.interrupted
    assert [row.runs for row in found.report.rows] == [1, 0]
    assert found.report.rows[1].failed == snapshot
    assert found.pictures[0] is not None
    assert any("interrupted" in note for note in found.report.notes)


def test_a_reference_that_fails_leaves_the_others_without_differences(snapshot: SnapshotAssertion) -> None:
    broken = Wrong("torch_sdpa", failing_after(0, no_memory))
    found = compare(small(), ["sdpa_math"], router=router(broken))
    assert found.report.rows[0].failed.startswith("out of memory")
    assert found.report.rows[1].runs == 2
    assert found.report.rows[1].psnr is None
    with pytest.raises(ComparisonError) as caught:
        compare(small(mode="one_step"), ["sdpa_math"], router=router(broken))
    assert str(caught.value) == snapshot
    with pytest.raises(ComparisonError) as caught:
        compare(small(mode="attention"), ["sdpa_math"], router=router(broken))
    assert str(caught.value) == snapshot


# Sparse backends


def test_sparse_backends_are_rows_with_their_options() -> None:
    names = parse_backends(["sparge_attn topk=0.5", " Sparge topk=1.0", "video_sparse_attn sparsity=0.5 dense_steps=9"])
    assert names[1:] == ["sparge_attn topk=0.5", "sparge_attn topk=1.0", "video_sparse_attn sparsity=0.5 dense_steps=9"]
    rows = {row.asked: row for row in compare(small(width=32, height=32, repeat=1), names).report.rows}
    assert list(rows) == names
    assert [rows[name].failed for name in names] == [None] * 4
    assert rows["sparge_attn topk=1.0"].name == "sparge_attn topk=1.0"
    errors = [rows[name].relative_l2 for name in names[1:]]
    assert errors[0] is not None
    assert errors[0] > 1e-3
    assert errors[1:] == [0.0, 0.0], "everything kept; all steps dense"
    calls = compare(small(mode="attention", width=32, height=32, repeat=1), names[:2]).report.rows[1].calls
    wrong = {call.role for call in calls if (call.relative_l2 or 0) > 1e-3}
    assert wrong == {"self"}


def test_options_of_a_row_are_checked() -> None:
    with pytest.raises(ComparisonError, match="twice"):
        parse_backends(["sparge_attn topk=0.5", "sparge topk=0.5"])
    with pytest.raises(ValueError, match=r"topk 2\.0 > 1"):
        parse_backends(["sparge_attn topk=2.0"])


# Bad input


def test_the_reference_always_runs_and_stands_first() -> None:
    assert parse_backends(["sdpa_math"]) == ["torch_sdpa", "sdpa_math"]
    assert parse_backends(["sdpa_math", "sdpa"]) == ["torch_sdpa", "sdpa_math"]
    assert [row.asked for row in compare(small(), ["sdpa_math"]).report.rows] == ["torch_sdpa", "sdpa_math"]


@pytest.mark.parametrize("names", [[], [""], [" ", ""]])
def test_no_backends_chosen(names: list[str]) -> None:
    with pytest.raises(ComparisonError, match="no backends chosen"):
        parse_backends(names)
    with pytest.raises(ComparisonError, match="no backends chosen"):
        compare(small(), [])


def test_the_same_backend_twice(snapshot: SnapshotAssertion) -> None:
    with pytest.raises(ComparisonError) as caught:
        parse_backends(["sdpa_math", "sdpa_math"])
    with pytest.raises(ComparisonError, match="pv_accum_dtype"):
        parse_backends(["sageattn_qk_int8_pv_fp8_cuda++"])
    assert str(caught.value) == snapshot
    with pytest.raises(ComparisonError) as caught:
        parse_backends(["torch_sdpa", "sdpa"])
    assert str(caught.value) == snapshot
    with pytest.raises(ComparisonError) as caught:
        parse_backends(["fa3", "FLASH_ATTN"])
    assert str(caught.value) == snapshot


def test_names_that_are_no_backend(snapshot: SnapshotAssertion) -> None:
    with pytest.raises(UnknownBackendError, match="did you mean sage_attn"):
        parse_backends(["sage_atn"])
    with pytest.raises(ComparisonError) as caught:
        parse_backends(["auto"])
    assert str(caught.value) == snapshot


def test_a_latent_of_another_shape_is_refused(snapshot: SnapshotAssertion) -> None:
    with pytest.raises(ComparisonError) as caught:
        compare(small(), ["sdpa_math"], noise=torch.zeros(1, 4, 16, 16))
    assert str(caught.value) == snapshot


def test_a_given_latent_is_where_sampling_starts() -> None:
    noise = torch.randn(1, 16, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    given, seeded = (compare(small(repeat=1), ["torch_sdpa"], noise=start).pictures[0] for start in (noise, None))
    assert given is not None
    assert seeded is not None
    assert torch.equal(given, seeded)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"mode": "fast"}, id="mode"),
        pytest.param({"width": 17}, id="width"),
        pytest.param({"height": 10}, id="height"),
        pytest.param({"steps": 0}, id="no steps"),
        pytest.param({"steps": 1001}, id="too many steps"),
        pytest.param({"frames": 0}, id="frames"),
        pytest.param({"repeat": 0}, id="repeat"),
        pytest.param({"guidance": math.nan}, id="guidance"),
        pytest.param({"dtype": "int8"}, id="dtype"),
        pytest.param({"prompt": "a zebra"}, id="prompt"),
    ],
)
def test_bad_settings_are_named(changes: dict[str, Any], snapshot: SnapshotAssertion) -> None:
    with pytest.raises(ValueError) as caught:
        small(**changes)
    assert str(caught.value) == snapshot


@pytest.mark.parametrize("device", ["toaster", "meta", pytest.param("cuda:63", id="a card that is not there")])
def test_a_device_that_cannot_be_used(device: str) -> None:
    with pytest.raises(ComparisonError, match=f"device '{device}' cannot be used"):
        router_for(device)


def test_default_backends_are_those_that_run_here() -> None:
    found = default_backends(router())
    assert found[:3] == ["torch_sdpa", "sdpa_math", "emulated_int8"]
    assert len(found) == len(set(found))
    assert not {"reference", "comfy", "cudnn_attn", "sage_attn"} & set(found)


@pytest.mark.gpu
def test_on_a_card_memory_and_attention_time_are_measured() -> None:
    found = compare(Settings(width=16, height=16, steps=2, repeat=2), ["torch_sdpa", "sdpa_math"])
    for row in found.report.rows:
        assert row.failed is None
        assert row.peak_memory > 0
        assert 0 < row.attention_share < 1
    assert found.report.rows[1].memory_reduction is not None
    assert found.report.dtype == "float16"
