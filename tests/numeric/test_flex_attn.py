"""`flex_attn`: what it refuses and says, how masks reach FlexAttention, and that it never runs uncompiled.

What FlexAttention is given is checked with its own uncompiled definition, which is quick. The compiled kernel takes
seconds for each kind of call: `-m compile`.
"""

from __future__ import annotations

import shutil

import pytest
from attention_backends.backends.config import AttentionConfig, AttentionSpec
from attention_backends.backends.config.layers import Choice
from attention_backends.backends.engine.plan import CallKind
from attention_backends.backends.engine.priorities import PRIORITIES
from attention_backends.backends.kernels import BACKENDS
from attention_backends.backends.values.platform import Platform, parse_platform
from attention_backends.backends.values.request import MASK_KINDS, AttentionCall, AttentionRequest
from syrupy.assertion import SnapshotAssertion

torch = pytest.importorskip("torch", reason="torch is not installed")
flex = pytest.importorskip("torch.nn.attention.flex_attention", reason="this torch has no FlexAttention")

from attention_backends.backends.engine.router import Router  # noqa: E402
from attention_backends.backends.engine.session import Session  # noqa: E402
from attention_backends.backends.kernels import flex_attn  # noqa: E402
from attention_backends.backends.kernels.support import flex_blocks  # noqa: E402
from attention_backends.backends.values.errors import NoBackendError  # noqa: E402
from attention_calls import as_comfyui_runs, call_for, copied  # noqa: E402
from tolerance import allowed, error, truth  # noqa: E402

SELF = AttentionRequest(1, 4, 200, 200, 64, "float32")
CARD = "cuda:9.0,packages=triton==3.6.0"


@pytest.fixture(autouse=True)
def inference():
    with as_comfyui_runs():
        yield


def here() -> Platform:
    return Platform("cpu", torch=torch.__version__.split("+")[0])


# What it says.
UNAVAILABLE = [
    ("cuda:9.0,torch=2.4.1,packages=triton==3.0.0", "package torch 2.4.1 does not meet >=2.5"),
    ("cpu,torch=2.5.1", "package torch 2.5.1 does not meet >=2.6, which cpu needs"),
    ("xpu,torch=2.8.0", "package torch 2.8.0 does not meet >=2.9, which xpu needs"),
    ("cpu,os=darwin", "FlexAttention has no CPU kernel on macOS"),
    ("cuda:9.0", "package triton is not installed"),
    ("cuda:9.0,os=windows", "package triton-windows is not installed"),
    ("mps", "needs an NVIDIA GPU, an AMD GPU, an Intel GPU or a CPU (this is an Apple GPU)"),
]


@pytest.mark.parametrize(("machine", "reason"), UNAVAILABLE)
def test_unavailable_says_why(machine: str, reason: str) -> None:
    assert Router(parse_platform(machine)).unavailable("flex_attn") == (reason,)


@pytest.mark.parametrize(
    "machine",
    [CARD, "cuda:7.5,torch=2.5.0,packages=triton==3.1.0", "rocm:gfx942", "xpu,torch=2.9.0", "cpu,torch=2.6.0"],
)
def test_machines_that_have_it(machine: str) -> None:
    assert Router(parse_platform(machine)).unavailable("flex_attn") == ()


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, snapshot: SnapshotAssertion) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setenv("CXX", "clang++-99")
    (reason,) = Router(here()).unavailable("flex_attn")
    assert reason == snapshot
    assert Router(parse_platform("cpu")).unavailable("flex_attn") == (), "a described machine is taken at its word"


def test_a_cpu_without_avx2(monkeypatch: pytest.MonkeyPatch, snapshot: SnapshotAssertion) -> None:
    monkeypatch.setattr(flex_attn, "cpp_compiler", lambda os: ("g++", "/usr/bin/g++"))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    (reason,) = Router(here()).unavailable("flex_attn")
    assert reason == snapshot


REFUSED = [
    (CARD, {"head_dim": 8}, "head_dim 8 < 16"),
    (CARD, {"head_dim": 64, "v_head_dim": 8}, "head_dim 8 < 16"),
    (CARD, {"head_dim": 320}, "head_dim 320 > 256"),
    (CARD, {"dtype": "float64"}, "does not support float64"),
    (CARD, {"batch": 70_000}, "batch 70000 > 65535"),
    (CARD, {"batch": 20_000}, "80000 heads in all samples > 65535"),
    (CARD, {"num_heads": 48, "q_len": 800_000}, "2457600000 elements in one tensor > 2147483647"),
    ("cuda:9.0,torch=2.6.0,packages=triton==3.2.0", {"head_dim": 96}, "head_dim 96 not in (16, 32, 64, 128, 256)"),
    ("cpu,torch=2.6.0", {"head_dim": 40}, "head_dim 40 not in (16, 32, 64, 128, 256)"),
    ("cpu", {"mask": "bool", "q_len": 50_000, "kv_len": 50_000}, "2500000000 elements in the mask of one head > "),
    ("cpu", {"mask": "bool", "is_causal": True}, "is_causal together with a mask"),
    ("cuda:8.6,torch=2.6.0,packages=triton==3.2.0", {"head_dim": 64, "v_head_dim": 320}, "head_dim 320 > 256"),
    ("cuda:8.6,torch=2.6.0,packages=triton==3.2.0", {"head_dim": 64, "v_head_dim": 8}, "head_dim 8 < 16"),
]


@pytest.mark.parametrize(("machine", "changes", "reason"), REFUSED)
def test_refusals_name_value_and_limit(machine: str, changes: dict[str, object], reason: str) -> None:
    router = Router(parse_platform(machine))
    assert router.reasons_against("flex_attn", SELF) == ()
    reasons = router.reasons_against("flex_attn", SELF._replace(**changes))
    assert any(text.startswith(reason) for text in reasons), reasons


def test_a_padding_mask_may_be_long() -> None:
    """It has one value per key: only a mask per query is counted in 32 bits."""
    request = SELF._replace(q_len=50_000, kv_len=50_000, mask="key_padding")
    assert Router(parse_platform(CARD)).reasons_against("flex_attn", request) == ()


def test_no_route_has_it_and_every_request_says_why() -> None:
    assert all("flex_attn" not in (*route.order, *route.lossy) for route in PRIORITIES)
    backend, platform = BACKENDS["flex_attn"], parse_platform(CARD)
    for mask in MASK_KINDS:
        reasons = backend.avoid_reasons(SELF._replace(mask=mask), platform)
        assert "compiled" in reasons[0]
        assert any("SDPA is faster" in reason for reason in reasons) == (mask in ("none", "bias"))


def test_by_name_it_is_chosen() -> None:
    decision = Router(parse_platform(CARD)).select(SELF, Choice("flex_attn", "test"))
    assert (decision.backend, decision.rejected) == ("flex_attn", ())


# What FlexAttention is given, computed by its uncompiled definition.
def _hidden_rows(call: AttentionCall) -> AttentionCall:
    """Row 7 sees nothing within a block that others see; rows 128 to 255 are a block without any key."""
    call.attn_mask[:, :, 7] = False
    call.attn_mask[:, :, 128:256] = False
    return call


def _hidden_rows_as_bias(call: AttentionCall) -> AttentionCall:
    """As -inf; row 9 has the lowest finite number throughout, which SDPA does not take for hidden."""
    hidden = ~_hidden_rows(call).attn_mask
    call.attn_mask = torch.zeros(hidden.shape).masked_fill(hidden, float("-inf"))
    call.attn_mask[:, :, 9] = torch.finfo(torch.float32).min
    return call


def _per_head(call: AttentionCall) -> AttentionCall:
    call.attn_mask = call.attn_mask & (torch.arange(4)[:, None, None] * 40 <= torch.arange(call.key.shape[2]))
    return call


def _bias_for_all(call: AttentionCall) -> AttentionCall:
    call.attn_mask = call.attn_mask[:, :1, :1]
    return call


def _whole_numbers(call: AttentionCall) -> AttentionCall:
    call.attn_mask = (call.attn_mask * 2).to(torch.int32)  # numbers are added to scores, integers too
    return call


def _expanded(call: AttentionCall) -> AttentionCall:
    call.attn_mask = call.attn_mask.expand(-1, 4, call.query.shape[2], -1)
    return call


def _same(call: AttentionCall) -> AttentionCall:
    return call


CASES = {
    "no mask": (SELF, _same),
    "cross, 77 keys": (SELF._replace(kv_len=77), _same),
    "own scale": (SELF._replace(scale=0.3), _same),
    "causal": (SELF._replace(is_causal=True), _same),
    "causal, more keys": (SELF._replace(is_causal=True, kv_len=300), _same),
    "causal, fewer keys": (SELF._replace(is_causal=True, q_len=300), _same),
    "grouped heads": (SELF._replace(num_kv_heads=2), _same),
    "grouped heads, mask per sample": (SELF._replace(batch=2, num_kv_heads=2, mask="bool"), _same),
    "wider values": (SELF._replace(v_head_dim=96), _same),
    "head_dim 77, bfloat16": (SELF._replace(head_dim=77, dtype="bfloat16"), _same),
    "one query, one key": (SELF._replace(q_len=1, kv_len=1), _same),
    "padding per sample": (SELF._replace(batch=2, mask="key_padding", kv_len=300), _same),
    "padding, expanded": (SELF._replace(batch=2, mask="key_padding", kv_len=300), _expanded),
    "padding, whole blocks": (SELF._replace(mask="key_padding", q_len=256, kv_len=512), _same),
    "boolean": (SELF._replace(mask="bool", q_len=150, kv_len=300), _same),
    "boolean, one key": (SELF._replace(mask="bool", kv_len=1), _same),
    "boolean per head": (SELF._replace(batch=2, mask="bool"), _per_head),
    "boolean, rows without a key": (SELF._replace(mask="bool", q_len=300, kv_len=300), _hidden_rows),
    "bias": (SELF._replace(mask="bias", batch=2), _same),
    "bias, float16": (SELF._replace(mask="bias", dtype="float16"), _same),
    "bias of integers": (SELF._replace(mask="bias"), _whole_numbers),
    "bias, one row for all": (SELF._replace(mask="bias"), _bias_for_all),
    "bias, rows of -inf": (SELF._replace(mask="bool", q_len=300, kv_len=300), _hidden_rows_as_bias),
}


def _case(name: str) -> AttentionCall:
    request, change = CASES[name]
    call = change(call_for(request))
    assert Router(parse_platform("cpu")).reasons_against("flex_attn", call.request()) == ()
    return call


@pytest.mark.parametrize("name", CASES)
def test_what_it_is_given(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    call = _case(name)
    output = flex_attn.attend(*flex_attn.arguments(call))[:, :, : call.query.shape[2]]
    assert output.shape == (*call.query.shape[:3], call.value.shape[3])
    assert error(output, truth(call)).within(allowed(call, "exact"))


def test_a_dropped_mask_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    for name in ("causal", "padding per sample", "boolean per head", "bias"):
        call = _case(name)
        query, key, value, _, _, scale = flex_attn.arguments(call)
        output = flex_attn.attend(query, key, value, None, None, scale)[:, :, : call.query.shape[2]]
        assert not error(output, truth(call)).within(allowed(call, "exact")), name


MASKED = [name for name in CASES if name.startswith(("causal", "padding", "boolean"))]


@pytest.mark.parametrize("name", MASKED)
def test_the_blocks_are_those_of_torch(name: str) -> None:
    """torch's own create_block_mask, which builds every value first, lists the same partial and whole blocks."""
    call = _case(name)
    ours = flex_attn.arguments(call)[4]
    batch, heads = call.query.shape[:2]
    q_len, kv_len = (flex_blocks.bucket(tensor.shape[2]) for tensor in (call.query, call.key))
    theirs = flex.create_block_mask(ours.mask_mod, batch, heads, q_len, kv_len, device="cpu")
    assert ours.seq_lengths == theirs.seq_lengths
    for kind in ("kv", "full_kv"):
        expected = _as_sets(getattr(theirs, f"{kind}_num_blocks"), getattr(theirs, f"{kind}_indices"), batch, heads)
        got = _as_sets(getattr(ours, f"{kind}_num_blocks"), getattr(ours, f"{kind}_indices"), batch, heads)
        assert got == expected, kind


def _as_sets(numbers: torch.Tensor, indices: torch.Tensor, batch: int, heads: int) -> list[list[int]]:
    numbers = numbers.expand(batch, heads, -1).flatten()
    indices = indices.expand(batch, heads, -1, -1).flatten(0, 2)
    return [sorted(row[:count].tolist()) for count, row in zip(numbers.tolist(), indices, strict=True)]


def test_hidden_blocks_are_left_out() -> None:
    """Half of the keys hidden: half of the blocks are listed, which is what the kernel is for."""
    call = _case("padding, whole blocks")  # 307 of 512 keys are visible: 2 whole blocks and 1 partial one of 4
    blocks = flex_attn.arguments(call)[4]
    assert blocks.full_kv_num_blocks.tolist() == [[[2, 2]]]
    assert blocks.kv_num_blocks.tolist() == [[[1, 1]]]


def test_a_padding_mask_is_not_expanded_in_memory() -> None:
    """A million queries and keys: values per query would be a terabyte."""
    mask = torch.ones(1, 1, 1, 2**20, dtype=torch.bool).expand(-1, -1, 2**10, -1)
    blocks = flex_blocks.masked_blocks(mask, 2**10)
    assert int(blocks.full_kv_num_blocks.sum()) == 8 * 2**13


def test_a_mask_beyond_32_bits(snapshot: SnapshotAssertion) -> None:
    call = call_for(SELF._replace(q_len=128, kv_len=128))
    nothing = torch.empty(1, dtype=torch.bool, device="meta")
    call.attn_mask = nothing.as_strided((1, 4, 128, 128), (2**30, 2**30, 1, 1))
    with pytest.raises(ValueError) as caught:
        flex_attn.arguments(call)
    assert str(caught.value) == snapshot


def test_a_low_bias_stays_finite_on_cards() -> None:
    """There scores are multiplied by log2(e) after the bias is added; only a true -inf may be -inf after that."""
    lowest = torch.finfo(torch.float32).min
    bias = torch.tensor([lowest, lowest / 4, float("-inf"), 1.5]).view(1, 1, 1, 4)
    zero, keys = torch.zeros((), dtype=torch.int64), torch.arange(4)
    added = flex_attn.adds(bias)(torch.zeros(()), zero, zero, zero, keys) * 1.4426950408889634
    assert added.isfinite().tolist() == [True, True, False, True]
    assert float(added[3]) == pytest.approx(1.5 * 1.4426950408889634)


# Never uncompiled, never without bound.
def test_it_does_not_run_uncompiled(snapshot: SnapshotAssertion) -> None:
    with pytest.raises(RuntimeError) as caught:
        flex_attn.traced(*flex_attn.arguments(_case("no mask")))
    assert str(caught.value) == snapshot


def test_with_compilation_switched_off_it_falls_back_and_says_why(
    monkeypatch: pytest.MonkeyPatch, snapshot: SnapshotAssertion
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # as TORCH_COMPILE_DISABLE=1 does
    call = _case("no mask")
    session = Session(Router(here()), (AttentionConfig(AttentionSpec("flex_attn")),))
    if session.router.unavailable("flex_attn"):
        pytest.skip(f"flex_attn: {'; '.join(session.router.unavailable('flex_attn'))}")
    slot = session.plan(CallKind(call.request(), "self", "self"))
    assert slot.plan.decision.backend == "flex_attn"
    output = session.attention(slot, copied(call))
    assert slot.plan.decision.backend == "torch_sdpa"
    assert slot.plan.row.reason == snapshot
    assert error(output, truth(call)).within(allowed(call, "exact"))
    strict = Session(session.router, (AttentionConfig(AttentionSpec("flex_attn"), strict=True),))
    with pytest.raises(NoBackendError) as caught:
        strict.attention(strict.plan(CallKind(call.request(), "self", "self")), call)
    assert next(line for line in str(caught.value).splitlines() if line.startswith("  flex_attn: ")) == snapshot


def _variant(variants: flex_attn.Variants, call: AttentionCall) -> object:
    return variants.of(flex_attn.arguments(call))


def test_the_least_used_kind_of_call_gives_way() -> None:
    """A kernel stays usable after any number of kinds, and keeps those that it was given last."""
    variants = flex_attn.Variants(most=2)
    first = _variant(variants, call_for(SELF))
    second = _variant(variants, call_for(SELF._replace(q_len=300)))
    assert second is not first
    assert _variant(variants, call_for(SELF, seed=1)) is first
    assert _variant(variants, call_for(SELF._replace(q_len=400))) not in (first, second)
    assert _variant(variants, call_for(SELF)) is first, "used after the second one"
    assert variants.made == 3
    assert _variant(variants, call_for(SELF._replace(q_len=300))) is not second
    assert variants.made == 4


def test_lengths_are_filled_up_to_few_buckets() -> None:
    buckets = [flex_blocks.bucket(length) for length in range(1, 2**17 + 1)]
    assert buckets[:1024] == [-(-length // 128) * 128 for length in range(1, 1025)]
    assert all(made >= length and made % 128 == 0 for length, made in enumerate(buckets, 1))
    assert all(made - length <= length / 8 for length, made in enumerate(buckets[1024:], 1025))
    assert buckets == sorted(buckets)
    assert len(set(buckets)) == 8 + 7 * 8


@pytest.mark.parametrize(
    ("mask", "causal"), [("none", False), ("none", True), ("key_padding", False), ("bool", False), ("bias", False)]
)
def test_prompts_of_a_hundred_lengths_are_few_kinds(mask: str, causal: bool) -> None:
    """Trimming cuts each prompt to a length of its own; a whole bucket without a mask is a kind beside the others."""
    variants = flex_attn.Variants()
    for kv_len in range(30, 130):
        request = SELF._replace(q_len=140, kv_len=kv_len, num_heads=1, head_dim=16, mask=mask, is_causal=causal)
        _variant(variants, call_for(request))
    assert variants.made <= 3


def test_only_what_is_filled_up_is_copied() -> None:
    whole = call_for(SELF._replace(q_len=256, kv_len=128))
    query, key, value, _, blocks, _ = flex_attn.arguments(whole)
    assert (query, key, value, blocks) == (whole.query, whole.key, whole.value, None)
    backend = BACKENDS["flex_attn"]
    assert backend.workspace_bytes(whole.request(), here()) == 0
    ragged = SELF._replace(q_len=1100, kv_len=77, mask="bool")  # 1,152 queries and 128 keys
    numbers = 4 * 64 * (1152 + 1152 + 128 + 128)
    assert backend.workspace_bytes(ragged, here()) == numbers * 4 + 1152 * 128


def test_a_limit_counts_what_is_filled_up(snapshot: SnapshotAssertion) -> None:
    request = SELF._replace(mask="bool", q_len=46_000, kv_len=46_000)  # 2,116,000,000 elements as they are
    (reason,) = Router(parse_platform("cpu")).reasons_against("flex_attn", request)
    assert reason == snapshot


@pytest.mark.parametrize(("q_len", "kv_len"), [(0, 5), (5, 0)])
def test_nothing_to_compute_compiles_nothing(monkeypatch: pytest.MonkeyPatch, q_len: int, kv_len: int) -> None:
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled"))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    output = BACKENDS["flex_attn"].load(here())(call_for(SELF._replace(q_len=q_len, kv_len=kv_len)))
    assert output.shape == (1, 4, q_len, 64)
    assert not output.any()


def test_each_kind_has_code_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo counts per code object, and goes on uncompiled past its limit."""
    functions = []

    def compile_(function: object, **options: object) -> object:
        assert options == {"fullgraph": True, "dynamic": False}
        functions.append(function)
        return function

    monkeypatch.setattr(torch, "compile", compile_)
    variants = flex_attn.Variants()
    padded = call_for(SELF._replace(mask="key_padding", q_len=256, kv_len=256))
    _variant(variants, padded)
    mask = padded.attn_mask.expand(-1, 4, 256, -1)
    padded.attn_mask = mask.contiguous()  # the same facts with other strides, which the compiler takes as constants
    _variant(variants, padded)
    assert len({id(function.__code__) for function in (*functions, flex_attn.traced)}) == 3


# The compiled kernel: minutes.
@pytest.mark.compile
@pytest.mark.parametrize("name", CASES)
def test_compiled(name: str) -> None:
    router = Router(here())
    if router.unavailable("flex_attn"):
        pytest.skip(f"compile: {'; '.join(router.unavailable('flex_attn'))}")
    call = _case(name)
    before = copied(call)
    output = router.kernel("flex_attn")(call)
    assert output.shape == (*call.query.shape[:3], call.value.shape[3])
    assert output.dtype == call.query.dtype
    made = error(output, truth(before))
    assert made.within(allowed(before, "exact")), made
    for tensor in ("query", "key", "value"):
        assert torch.equal(getattr(call, tensor), getattr(before, tensor)), f"{tensor} was changed"


@pytest.mark.compile
def test_a_mask_changed_in_place_is_seen() -> None:
    """Nothing of a mask is kept: under inference_mode nobody could notice that it changed."""
    router = Router(here())
    if router.unavailable("flex_attn"):
        pytest.skip(f"compile: {'; '.join(router.unavailable('flex_attn'))}")
    kernel, call = router.kernel("flex_attn"), _case("boolean")
    for _ in range(2):
        assert error(kernel(call), truth(call)).within(allowed(call, "exact"))
        call.attn_mask.logical_not_()
        call.attn_mask[..., 0] = True


@pytest.mark.compile
def test_more_kinds_than_dynamo_or_we_keep() -> None:
    """Ten kinds through one kernel that keeps four, where one function would go uncompiled after the eighth."""
    router = Router(here())
    if router.unavailable("flex_attn"):
        pytest.skip(f"compile: {'; '.join(router.unavailable('flex_attn'))}")
    variants = flex_attn.Variants(most=4)
    for heads in (*range(1, 11), 1):
        call = call_for(SELF._replace(num_heads=heads, q_len=50, kv_len=40, head_dim=16))
        given = flex_attn.arguments(call)
        output = variants.of(given)(*given)[:, :, :50]
        assert error(output, truth(call)).within(allowed(call, "exact"))
    assert variants.made == 11
