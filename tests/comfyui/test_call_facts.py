"""The facts of a whole call (causal, scale, grouping, dtype, mask) hold for every call that is made from it.

Every combination of public arguments, on every backend that runs here: the result is that of the definition in
float64, or the call is refused, and which of the two never depends on what the mask's values are.
"""

from __future__ import annotations

import ast
import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from syrupy.assertion import SnapshotAssertion

torch = pytest.importorskip("torch", reason="torch is not installed")

from attention_backends.backends.api import attention, attention_backend  # noqa: E402
from attention_backends.backends.kernels import BACKENDS  # noqa: E402
from attention_backends.backends.kernels.reference import reference_attention  # noqa: E402
from attention_backends.backends.kernels.registry import detect  # noqa: E402
from attention_backends.backends.kernels.support.sdpa import expanded, without_gaps  # noqa: E402
from attention_backends.backends.values.errors import NoBackendError  # noqa: E402
from attention_backends.backends.values.mask_plan import ALL, SubCall, call_of  # noqa: E402
from attention_backends.backends.values.masks import for_kernels  # noqa: E402
from attention_backends.backends.values.request import AttentionCall  # noqa: E402
from attention_calls import as_comfyui_runs  # noqa: E402
from hook_side import model_call, nodes_module, override, sampling, stand_in  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
HEADS, KV_HEADS, SIZE = 4, 2, 8


@pytest.fixture(autouse=True)
def _as_comfyui() -> Iterator[None]:
    with as_comfyui_runs():
        yield


# A call that is made from another one


def full_call() -> AttentionCall:
    """A call none of whose attributes has its default value."""
    call = AttentionCall(*(torch.randn(1, 2, 4, SIZE) for _ in range(3)))
    for number, name in enumerate(AttentionCall.__slots__):
        if name not in ("query", "key", "value"):
            setattr(call, name, f"{name} {number}")
    return call


def test_a_call_that_a_layout_makes_has_every_attribute() -> None:
    """It is made without `__init__`."""
    query = torch.randn(1, 2, 4, SIZE)
    layout = nodes_module("hook.layouts").Layout(query, query, query, {"heads": 2, "skip_reshape": True, "scale": 0.5})
    made, expected = layout.call(query, query, query, None), AttentionCall(query, query, query, scale=0.5)
    for name in AttentionCall.__slots__:
        assert getattr(made, name) is getattr(expected, name) or getattr(made, name) == getattr(expected, name), name


@pytest.mark.parametrize("name", AttentionCall.__slots__)
def test_a_changed_call_has_every_other_attribute_of_the_first(name: str) -> None:
    call = full_call()
    before = {slot: getattr(call, slot) for slot in AttentionCall.__slots__}
    changed = call.changed(**{name: "other"})
    expected: dict[str, Any] = {**before, name: "other"}
    if name == "attn_mask":  # what was made of the mask goes with it
        expected.update(memo=None)
    assert all(getattr(changed, slot) is expected[slot] for slot in AttentionCall.__slots__)
    assert all(getattr(call, slot) is before[slot] for slot in AttentionCall.__slots__)


def test_what_was_made_of_a_mask_can_be_given_with_it() -> None:
    changed = full_call().changed(attn_mask="other", memo={})
    assert changed.memo == {}


def differences(one: AttentionCall, other: AttentionCall) -> set[str]:
    return {name for name in AttentionCall.__slots__ if getattr(one, name) is not getattr(other, name)}


def test_the_ways_of_making_a_call_from_another_one_lose_nothing() -> None:
    call = full_call()
    call.is_causal = False
    tensors = {"query", "key", "value"}
    assert differences(call, expanded(call)) <= {*tensors, "enable_gqa"}
    gaps = call.changed(query=torch.randn(1, 2, 4, 2 * SIZE)[..., ::2])
    assert differences(gaps, without_gaps(gaps)) <= tensors
    part = SubCall(slice(0, 1), slice(0, 2), slice(0, 3), torch.zeros(1, 1, 2, 3), False, {})
    made = call_of(part, call)
    assert differences(call, made) <= {*tensors, "attn_mask", "memo", "parts", "owned"}
    assert (made.attn_mask is part.mask, made.memo is part.memo, made.owned) == (True, True, False)


def test_a_causal_call_is_never_split(snapshot: SnapshotAssertion) -> None:
    call = AttentionCall(*(torch.randn(1, 2, 4, SIZE) for _ in range(3)), is_causal=True)
    with pytest.raises(ValueError) as caught:
        call_of(SubCall(ALL, ALL, slice(1, 4)), call)
    assert str(caught.value) == snapshot


def rebuilt(path: Path) -> Iterator[int]:
    """Lines that build a call from the attributes of another one."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or ast.unparse(node.func).split(".")[-1] != "AttentionCall":
            continue
        given = [*node.args, *(keyword.value for keyword in node.keywords)]
        read = {
            inner.value.id
            for argument in given
            for inner in ast.walk(argument)
            if isinstance(inner, ast.Attribute) and isinstance(inner.value, ast.Name)
            if inner.attr in AttentionCall.__slots__ and inner.value.id not in ("self", "request")
        }
        if read:
            yield node.lineno


def test_no_call_is_built_by_hand_from_another_one(tmp_path: Path) -> None:
    """`AttentionCall.changed` is for that: written out, a new fact would be lost."""
    folders = ("backends", "nodes", "comparison")
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert {str(path.relative_to(ROOT)): found for path in files if (found := list(rebuilt(path)))} == {}
    wrong = tmp_path / "wrong.py"
    wrong.write_text("AttentionCall(q, k, v, call.attn_mask, scale=call.scale)", encoding="utf-8")
    assert list(rebuilt(wrong)) == [1]


# What masks mean


INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("name", ["reference", "torch_sdpa", "sdpa_math", "flex_attn"])
def test_integers_are_added_to_scores_everywhere(name: str, dtype: torch.dtype) -> None:
    """As ComfyUI's sub-quadratic and split attention do, and never read as booleans."""
    if BACKENDS[name].unavailable_reasons(detect(CPU)):
        pytest.skip(f"{name} does not run here")
    if name == "flex_attn" and dtype is not torch.int64:
        pytest.skip("each kind of call is compiled, which takes long")
    query, key, value = (torch.randn(1, 2, 6, 32) for _ in range(3))
    mask = torch.randint(0, 4, (6, 6)).to(dtype)
    output = attention(query, key, value, mask, backend=name)
    assert AttentionCall(query, key, value, mask[None, None]).request().mask == "bias"
    torch.testing.assert_close(output, defined(query, key, value, mask[None, None]), rtol=0, atol=3e-6)


def test_reference_itself_adds_integers() -> None:
    call = AttentionCall(*(torch.randn(1, 2, 6, 8) for _ in range(3)), torch.randint(0, 2, (1, 1, 6, 6)))
    expected = reference_attention(call.changed(attn_mask=call.attn_mask.float()))
    torch.testing.assert_close(reference_attention(call), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("given", [*INTEGERS, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool])
def test_a_mask_in_another_type_keeps_its_numbers(given: torch.dtype, dtype: torch.dtype) -> None:
    numbers = torch.tensor([[[[0, 1, 1, 0]]]]).to(given)
    cast = for_kernels(numbers, dtype)
    assert cast.dtype in (torch.bool, torch.float32, dtype)
    assert cast.double().tolist() == numbers.double().tolist()


def test_numbers_beyond_a_types_range_do_not_become_infinite() -> None:
    """A row of -inf gives zeros, one of most negative numbers the mean of the values."""
    wide = torch.tensor([-1e30, 1e30, float("-inf"), float("nan")], dtype=torch.float64)
    cast = for_kernels(wide, torch.float16)
    assert cast[:3].tolist() == [-65504.0, 65504.0, float("-inf")]
    assert bool(cast[3].isnan())
    assert for_kernels(torch.tensor([-(10**9)]), torch.float16).tolist() == [-65504.0]


# Every combination of arguments


def defined(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention by its definition in float64, BHSD; written here, so that no code of the package checks itself."""
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.double().repeat_interleave(groups, dim=1) for tensor in (key, value))
    scores = query.double() @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    if is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
    return (scores.softmax(-1).nan_to_num(0.0) @ value).to(query.dtype)


VALUES = ("nothing", "suffix", "prefix", "gap", "lengths", "causal", "blocks", "one key", "rows without keys", "random")
"""What a mask hides. A plan makes something else of each: nothing, fewer keys, samples, causal, blocks, booleans."""


def visible(values: str, batch: int, q_len: int, kv_len: int, rng: random.Random) -> torch.Tensor:
    """(batch, HEADS, q_len, kv_len), True where a query sees a key."""
    seen = torch.ones(batch, HEADS, q_len, kv_len, dtype=torch.bool)
    if values == "suffix":
        seen[..., kv_len - 3 :] = False
    elif values == "prefix":
        seen[..., :2] = False
    elif values == "gap":
        seen[..., 1::2] = False
    elif values == "lengths":
        for sample in range(batch):
            seen[sample, ..., kv_len - 1 - sample :] = False
    elif values == "causal":
        seen = seen.tril()
    elif values == "blocks":
        seen[:, :, : q_len // 2, kv_len // 2 :] = False
        seen[:, :, q_len // 2 :, : kv_len // 2] = False
    elif values == "one key":
        seen[..., 1:] = False
    elif values == "rows without keys":
        seen[:, :, 0] = False
    elif values == "random":
        seen &= torch.rand(seen.shape, generator=torch.Generator().manual_seed(rng.getrandbits(30))) > 0.4
    return seen


FORMS = {
    "bool": torch.bool,
    "same": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
    "int64": torch.int64,
    "uint8": torch.uint8,
}
SHAPES = {
    1: ("k",),
    2: ("qk", "1k"),
    3: ("bqk", "b1k"),
    4: ("bhqk", "11qk", "b11k", "1h1k"),
}


def mask_of(values: str, form: str, shape: str, tensors: tuple[torch.Tensor, ...], rng: random.Random) -> torch.Tensor:
    query, key, _ = tensors
    seen = visible(values, query.shape[0], query.shape[2], key.shape[2], rng)
    cut = {
        "k": seen[0, 0, -1],
        "qk": seen[0, 0],
        "1k": seen[0, 0, -1:],
        "bqk": seen[:, 0],
        "b1k": seen[:, 0, -1:],
        "bhqk": seen,
        "11qk": seen[:1, :1],
        "b11k": seen[:, :1, -1:],
        "1h1k": seen[:1, :, -1:],
    }[shape]
    dtype = FORMS[form] or query.dtype
    if dtype == torch.bool:
        return cut
    if not dtype.is_floating_point:
        return cut.to(dtype)
    numbers = torch.zeros(cut.shape, dtype=dtype)
    if rng.random() < 0.3:
        numbers += torch.randn(cut.shape, generator=torch.Generator().manual_seed(rng.getrandbits(30))).to(dtype)
    return numbers.masked_fill(~cut, -torch.inf)


TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6, torch.float16: 6e-3, torch.bfloat16: 5e-2}


def tensors_of(dtype: torch.dtype, grouped: bool, q_len: int, kv_len: int, seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    kv_heads = KV_HEADS if grouped else HEADS
    sizes = ((HEADS, q_len), (kv_heads, kv_len), (kv_heads, kv_len))
    return tuple(torch.randn(2, heads, length, SIZE, generator=generator).to(dtype) for heads, length in sizes)


def outcome(
    name: str, strict: bool, layout: str, tensors: tuple[torch.Tensor, ...], mask: torch.Tensor | None, flags: Any
) -> str:
    """`refused`, or `answered` as the definition says."""
    query, key, _ = tensors
    given = [tensor.transpose(1, 2) for tensor in tensors] if layout == "BSHD" else tensors
    try:
        with attention_backend(name, strict=strict, accuracy="quantized"):
            output = attention(*given, mask, enable_gqa=query.shape[1] != key.shape[1], layout=layout, **flags)
    except (NoBackendError, ValueError):
        return "refused"
    output = output.transpose(1, 2) if layout == "BSHD" else output
    whole = mask
    if mask is not None:
        while whole.ndim < 4:
            whole = whole.unsqueeze(0)
    expected = defined(*tensors, whole, **flags)
    if name != "emulated_int8":
        tolerance = TOLERANCE[query.dtype]
        torch.testing.assert_close(output, expected, rtol=0, atol=tolerance)
    else:
        assert float((output - expected).norm()) <= 0.05 * float(expected.norm()) + 1e-6
    return "answered"


SCALES = (None, 0.3, 0.0, -0.3)
RUN_HERE = ("auto", "torch_sdpa", "sdpa_math", "sdpa_flash", "reference", "emulated_int8")
"""Not `flex_attn`, which compiles each kind of call; `test_flex_attn.py` has it."""


def combinations(count: int, seed: int) -> Iterator[tuple[Any, ...]]:
    """Combinations of arguments in a random order, each pair of them early: every one has all values of a mask."""
    whole = list(
        itertools.product(
            RUN_HERE,
            (False, True),
            ("BHSD", "BSHD"),
            (torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64),
            (False, True),
            (False, True),
            SCALES,
            FORMS,
            [*SHAPES[1], *SHAPES[2], *SHAPES[4]],
        )
    )
    yield from random.Random(seed).sample(whole, count)


def check_combination(combination: tuple[Any, ...], seed: int) -> None:
    name, strict, layout, dtype, grouped, is_causal, scale, form, shape = combination
    rng = random.Random(seed)
    lengths = (8, 8) if rng.random() < 0.5 else (8, 11)
    tensors = tensors_of(dtype, grouped, *lengths, seed)
    flags = {"is_causal": is_causal, "scale": scale}
    found = {
        values: outcome(name, strict, layout, tensors, mask_of(values, form, shape, tensors, rng), flags)
        for values in VALUES
    }
    assert len(set(found.values())) == 1, found
    outcome(name, strict, layout, tensors, None, flags)


@pytest.mark.parametrize("seed", range(3))
def test_any_arguments_give_the_definition_or_are_refused_whatever_a_mask_hides(seed: int) -> None:
    for number, combination in enumerate(combinations(40, seed)):
        try:
            check_combination(combination, 1000 * seed + number)
        except AssertionError as error:
            raise AssertionError(f"{combination}: {error}") from error


def attention_split(*args: Any, **kwargs: Any) -> torch.Tensor:
    """Stands in for ComfyUI's function of this name, which adds masks of any numeric type."""
    raise AssertionError("ComfyUI's own function was called")


def hook_outcome(
    name: str, layout: str, tensors: tuple[torch.Tensor, ...], mask: torch.Tensor | None, flags: dict[str, Any]
) -> str:
    """The same through ComfyUI's hook; `layout` is what of its layouts the caller uses."""
    query, key, _ = tensors
    grouped = query.shape[1] != key.shape[1]
    given: list[torch.Tensor] = list(tensors)
    if layout != "skip_reshape":
        given = [tensor.transpose(1, 2).flatten(2) for tensor in tensors]
    arguments = {**flags, "mask": mask, "skip_output_reshape": True, **({"enable_gqa": True} if grouped else {})}
    if layout == "skip_reshape":
        arguments["skip_reshape"] = True
    ours = override(name)
    made = sampling.Run(ours)
    options = {sampling.KEY: ours, sampling.OVERRIDE: ours, sampling.RUN_KEY: made}
    model = stand_in(["WanModel"], {"blocks.0.self_attn": "WanSelfAttention"})
    outputs: list[torch.Tensor] = []

    def body() -> None:
        outputs.append(ours(attention_split, *given, HEADS, **arguments, transformer_options=options))

    try:
        model_call(model, options, body)
    except (NoBackendError, ValueError, RuntimeError):
        return "refused"
    finally:
        made.close()
    whole = mask
    if whole is not None and whole.ndim == 3:
        whole = whole.unsqueeze(1)
    while whole is not None and whole.ndim < 4:
        whole = whole.unsqueeze(0)
    expected = defined(*tensors, whole, **flags)
    if name != "emulated_int8":
        torch.testing.assert_close(outputs[0], expected, rtol=0, atol=TOLERANCE[query.dtype])
    return "answered"


@pytest.mark.parametrize("name", RUN_HERE)
def test_the_hook_too_whatever_a_mask_hides(name: str) -> None:
    """ComfyUI has no causal argument; its masks have two to four dimensions, others are for its function alone."""
    shapes = [shape for number, some in SHAPES.items() if number > 1 for shape in some]
    rng = random.Random(name)
    for layout, form, shape in rng.sample(list(itertools.product(("", "skip_reshape"), FORMS, shapes)), 12):
        dtype, grouped, scale = rng.choice((torch.float32, torch.bfloat16)), rng.random() < 0.5, rng.choice(SCALES)
        tensors = tensors_of(dtype, grouped, 8, rng.choice((8, 11)), rng.getrandbits(30))
        flags = {} if scale is None else {"scale": scale}
        for values in VALUES:
            mask = mask_of(values, form, shape, tensors, rng)
            assert hook_outcome(name, layout, tensors, mask, flags) == "answered", (layout, form, shape, dtype, values)


@pytest.mark.parametrize("scale", [0.0, -0.3, 0, -1])
@pytest.mark.parametrize("name", RUN_HERE)
def test_no_scale_is_wrong_with_a_causal_call_or_mask(name: str, scale: float) -> None:
    """Torch's fused operators hide keys by -inf before they scale: 0 * -inf is NaN, and -1 * -inf shows them."""
    for grouped in (False, True):
        tensors = tensors_of(torch.float32, grouped, 8, 8, 3)
        assert outcome(name, True, "BHSD", tensors, None, {"is_causal": True, "scale": scale}) == "answered"
        for form in ("bool", "same"):
            mask = mask_of("causal", form, "qk", tensors, random.Random(0))
            assert hook_outcome(name, "skip_reshape", tensors, mask, {"scale": scale}) == "answered"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 140))
def test_many_more_arguments(seed: int) -> None:
    for number, combination in enumerate(combinations(100, seed)):
        try:
            check_combination(combination, 1000 * seed + number)
        except AssertionError as error:
            raise AssertionError(f"{combination}: {error}") from error
