"""What one call is: its text form, its facts, and how tensors become facts."""

from __future__ import annotations

import pytest
from attention_backends.backends.values.request import AttentionCall, AttentionRequest, parse_request
from syrupy.assertion import SnapshotAssertion


def test_the_example_of_the_command_line_reads_as_written() -> None:
    text = "batch=1,num_heads=24,q_len=4096,kv_len=4096,head_dim=128,dtype=bfloat16,mask=none"
    assert parse_request(text) == AttentionRequest(1, 24, 4096, 4096, 128, "bfloat16")


def test_defaults_are_a_batch_of_one_self_attention_in_bfloat16() -> None:
    request = parse_request("num_heads=2, q_len=77 , head_dim=64")
    assert (request.batch, request.kv_len, request.dtype, request.mask) == (1, 77, "bfloat16", "none")
    assert not request.grouped
    assert not request.is_causal
    assert request.scale is None


def test_every_field_can_be_given() -> None:
    request = parse_request(
        "batch=2,num_heads=8,q_len=10,kv_len=12,head_dim=64,dtype=fp16,num_kv_heads=2,v_head_dim=32,mask=key_padding,"
        "is_causal=true,scale=0.5,exact_only=1"
    )
    assert request == AttentionRequest(2, 8, 10, 12, 64, "float16", 2, 32, "key_padding", True, 0.5, True)
    assert request.grouped


@pytest.mark.parametrize(
    ("short", "long"), [("bf16", "bfloat16"), ("half", "float16"), ("fp32", "float32"), ("fp64", "float64")]
)
def test_short_names_of_types(short: str, long: str) -> None:
    assert parse_request(f"num_heads=1,q_len=1,head_dim=8,dtype={short}").dtype == long


@pytest.mark.parametrize(
    "text",
    [
        "",
        "num_heads=1,q_len=4",
        "heads=1,q_len=4,head_dim=8",
        "num_heads",
        "num_heads=1,q_len=4,head_dim=eight",
        "num_heads=1,q_len=4,head_dim=",
        "num_heads=1,q_len=4,kv_len=0,head_dim=8",
        "num_heads=1,q_len=-4,head_dim=8",
        "num_heads=1,q_len=4,head_dim=8,dtype=int8",
        "num_heads=1,q_len=4,head_dim=8,mask=causal",
        "num_heads=1,q_len=4,head_dim=8,is_causal=maybe",
        "num_heads=1,q_len=4,head_dim=8,scale=big",
        "num_heads=1,q_len=4,head_dim=8,scale=nan",
        "num_heads=1,q_len=4,head_dim=8,scale=-inf",
        "num_heads=24,num_kv_heads=7,q_len=4,head_dim=8",
        "num_heads=2,num_kv_heads=4,q_len=4,head_dim=8",
    ],
)
def test_bad_requests_say_which_part(text: str, snapshot: SnapshotAssertion) -> None:
    with pytest.raises(ValueError, match=r"^request: ") as caught:
        parse_request(text)
    assert str(caught.value) == snapshot


def test_facts_are_equal_and_hash_alike_when_they_are_the_same() -> None:
    one, other = (parse_request("num_heads=2,q_len=4,head_dim=8,scale=0.25") for _ in range(2))
    assert one == other
    assert {one: "plan"}[other] == "plan"
    assert one != one._replace(scale=0.5)


def test_the_description_names_everything_that_is_not_ordinary(snapshot: SnapshotAssertion) -> None:
    plain = AttentionRequest(1, 24, 4096, 77, 128, "bfloat16").describe()
    assert plain == snapshot
    special = AttentionRequest(1, 8, 4, 4, 64, "float16", 2, 32, "bias", True, 0.5, True).describe()
    assert special == snapshot


def test_tensors_become_facts_without_being_read() -> None:
    torch = pytest.importorskip("torch")
    query = torch.empty(2, 8, 16, 64, dtype=torch.float16, device="meta")  # a meta tensor has no values to read
    key = torch.empty(2, 2, 20, 64, dtype=torch.float16, device="meta")
    value = torch.empty(2, 2, 20, 32, dtype=torch.float16, device="meta")
    padding = torch.empty(2, 1, 1, 20, dtype=torch.bool, device="meta")
    call = AttentionCall(query, key, value, padding, scale=0.1, enable_gqa=True)
    assert call.request(exact_only=True) == AttentionRequest(
        2, 8, 16, 20, 64, "float16", 2, 32, "key_padding", False, 0.1, True
    )


@pytest.mark.parametrize(
    ("shape", "boolean", "kind"),
    [
        ((1, 1, 1, 20), True, "key_padding"),
        ((2, 1, 16, 20), True, "bool"),
        ((2, 8, 1, 20), True, "bool"),
        ((1, 1, 1, 20), False, "bias"),
    ],
)
def test_the_kind_of_a_mask_follows_from_type_and_shape(shape: tuple[int, ...], boolean: bool, kind: str) -> None:
    torch = pytest.importorskip("torch")
    query = torch.empty(2, 8, 16, 64, device="meta")
    key = torch.empty(2, 8, 20, 64, device="meta")
    mask = torch.empty(shape, dtype=torch.bool if boolean else torch.float32, device="meta")
    assert AttentionCall(query, key, key, mask).request().mask == kind


def test_a_padding_mask_that_was_expanded_is_still_key_padding() -> None:
    torch = pytest.importorskip("torch")
    query, key = torch.empty(2, 8, 16, 64, device="meta"), torch.empty(2, 8, 20, 64, device="meta")
    mask = torch.empty(2, 1, 1, 20, dtype=torch.bool, device="meta").expand(2, 8, 16, 20)
    assert AttentionCall(query, key, key, mask).request().mask == "key_padding"
