"""Pinned attention of torch: the one implementation and no other, from any number of threads, no switch touched."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
from syrupy.assertion import SnapshotAssertion

torch = pytest.importorskip("torch", reason="torch is not installed")

from attention_backends.backends.kernels import BACKENDS  # noqa: E402
from attention_backends.backends.kernels import torch_sdpa as torch_kernel  # noqa: E402
from attention_backends.backends.kernels.registry import detect  # noqa: E402
from attention_backends.backends.kernels.support import sdpa as kernel_support  # noqa: E402
from attention_backends.backends.values.platform import parse_platform  # noqa: E402
from attention_backends.backends.values.request import AttentionCall  # noqa: E402
from fakes.torch_operators import Operators  # noqa: E402
from torch.backends import cuda  # noqa: E402
from torch.nn import attention  # noqa: E402

CPU = detect(torch.device("cpu"))
CARD = replace(parse_platform("cuda:9.0,cudnn=91002"), torch="2.13.0")
SDPA = torch.nn.functional.scaled_dot_product_attention
torch.manual_seed(0)
Q, K, V = (torch.randn(1, 2, 40, 16) for _ in range(3))
MASK = torch.rand(1, 1, 40, 40) > 0.3

SWITCHES = ("flash_sdp", "mem_efficient_sdp", "math_sdp", "cudnn_sdp")


def switches() -> tuple[Any, ...]:
    return (*(getattr(cuda, f"{name}_enabled")() for name in SWITCHES), *torch._C._get_sdp_priority_order())


def pinned_by_torch(pin: str, call: AttentionCall) -> torch.Tensor:
    with attention.sdpa_kernel([getattr(attention.SDPBackend, pin)]):
        return kernel_support.plain_sdpa()(call)


CALLS = [
    AttentionCall(Q, K, V),
    AttentionCall(Q, K, V, MASK),
    AttentionCall(Q, K, V, torch.randn(1, 2, 40, 40), scale=0.3),
    AttentionCall(Q, K, V, is_causal=True),
    AttentionCall(Q, K[:, :1], V[:, :1], enable_gqa=True),
    AttentionCall(Q, K[:, :1], V[:, :1], MASK, enable_gqa=True),
    AttentionCall(Q.bfloat16(), K.bfloat16(), V.bfloat16(), MASK),
    AttentionCall(*(tensor.transpose(2, 3).contiguous().transpose(2, 3) for tensor in (Q, K, V))),
    AttentionCall(Q, K[:, :, :7], V[:, :, :7], MASK[..., :7]),
]


@pytest.mark.parametrize("name", ["sdpa_flash", "sdpa_math"])
@pytest.mark.parametrize("number", range(len(CALLS)))
def test_the_same_bits_as_with_the_switches_of_torch(name: str, number: int) -> None:
    backend, call = BACKENDS[name], CALLS[number]
    theirs = kernel_support.without_gaps(call)
    if name == "sdpa_math" and call.query.dtype == torch.bfloat16:  # which torch widens only if the process lets it
        theirs = AttentionCall(call.query.float(), call.key.float(), call.value.float(), call.attn_mask)
    assert torch.equal(backend.load(CPU)(call), pinned_by_torch(backend.pin, theirs).to(call.query.dtype))


@pytest.fixture
def before(request: pytest.FixtureRequest) -> Iterator[tuple[Any, ...]]:
    found = switches()
    yield found
    for name, on in zip(SWITCHES, found, strict=False):
        getattr(cuda, f"enable_{name}")(on)


@pytest.mark.parametrize("off", [("flash_sdp",), ("math_sdp",), ("flash_sdp", "mem_efficient_sdp", "cudnn_sdp")])
@pytest.mark.parametrize("name", ["sdpa_flash", "sdpa_math"])
def test_what_others_have_switched_off_neither_matters_nor_changes(
    name: str, off: tuple[str, ...], before: tuple[Any, ...]
) -> None:
    expected = BACKENDS[name].load(CPU)(CALLS[1])
    for switch in off:
        getattr(cuda, f"enable_{switch}")(False)
    left = switches()
    assert torch.equal(BACKENDS[name].load(CPU)(CALLS[1]), expected)
    with pytest.raises(ValueError, match="shapes disagree"):
        BACKENDS["sdpa_flash"].load(CPU)(AttentionCall(Q, K[:, :1], V[:, :1]))
    assert switches() == left


@pytest.mark.parametrize("threads", [2, 8])
def test_threads_keep_each_to_its_own_kernel_and_leave_the_process_as_it_was(threads: int) -> None:
    """5,000 calls of each thread, while another calls torch's own attention with a mask."""
    found = switches()
    kernels = [BACKENDS[name].load(CPU) for name in ("sdpa_flash", "sdpa_math")]
    small = AttentionCall(Q[:, :, :8], K[:, :, :8], V[:, :, :8], MASK[..., :8, :8].float().log())
    # The pins give other bits, so that a call that ran on the other's kernel shows.
    expected = [kernel(small) for kernel in kernels]
    assert not torch.equal(*expected)
    failures: list[str] = []
    finished = threading.Event()

    def pinned(number: int) -> None:
        kernel, output = kernels[number % 2], expected[number % 2]
        for _ in range(5000):
            if not torch.equal(kernel(small), output):
                failures.append(f"thread {number}: another kernel's output")
                return

    def stranger() -> None:
        while not finished.is_set():
            try:
                SDPA(small.query, small.key, small.value, attn_mask=small.attn_mask)
            except RuntimeError as error:
                failures.append(f"plain attention: {error}")
                return

    def guarded(work: Callable[..., None], *args: Any) -> None:
        try:
            work(*args)
        except Exception as error:
            failures.append(repr(error))

    other = threading.Thread(target=guarded, args=(stranger,))
    workers = [threading.Thread(target=guarded, args=(pinned, number)) for number in range(threads)]
    for thread in (other, *workers):
        thread.start()
    for thread in workers:
        thread.join()
    finished.set()
    other.join()
    assert not failures
    assert switches() == found


def test_a_call_stays_on_its_kernel_while_another_thread_moves_the_switches(before: tuple[Any, ...]) -> None:
    kernels = [BACKENDS[name].load(CPU) for name in ("sdpa_flash", "sdpa_math")]
    expected = [kernel(CALLS[1]) for kernel in kernels]
    finished = threading.Event()

    def moving() -> None:
        while not finished.is_set():
            for pin in ("MATH", "FLASH_ATTENTION", "CUDNN_ATTENTION"):
                with attention.sdpa_kernel([getattr(attention.SDPBackend, pin)]):
                    pass

    mover = threading.Thread(target=moving)
    mover.start()
    try:
        for _ in range(500):
            for kernel, output in zip(kernels, expected, strict=True):
                assert torch.equal(kernel(CALLS[1]), output)
    finally:
        finished.set()
        mover.join()


@pytest.mark.parametrize("name", ["sdpa_flash", "sdpa_math"])
@pytest.mark.parametrize("shape", [(0, 2, 4, 4, 8), (1, 0, 4, 4, 8), (1, 2, 0, 4, 8), (1, 2, 4, 0, 8), (1, 2, 4, 4, 0)])
def test_sizes_of_nothing_are_answered_as_torch_answers_them(name: str, shape: tuple[int, ...]) -> None:
    batch, heads, q_len, kv_len, head_dim = shape
    q, k, v = (torch.ones(batch, heads, length, head_dim) for length in (q_len, kv_len, kv_len))
    for mask in (None, torch.ones(1, 1, q_len, kv_len, dtype=torch.bool)):
        output = BACKENDS[name].load(CPU)(AttentionCall(q, k, v, mask))
        assert torch.equal(output, SDPA(q, k, v, attn_mask=mask))


WRONG = {
    "fewer keys of another batch": (torch.ones(2, 2, 8, 16), K[:, :, :8], V[:, :, :8], None),
    "fewer values": (Q, K, V[:, :, :20], None),
    "other heads": (Q, K[:, :1], V[:, :1], None),
    "another head_dim": (Q, K[..., :8], V[..., :8], None),
    "a narrow mask": (Q, K, V, MASK[..., :20]),
    "a short mask": (Q, K, V, MASK[..., :20, :]),
    "a mask of three heads": (Q, K, V, MASK.expand(1, 3, 40, 40)),
    "a mask of two samples": (Q, K, V, MASK.expand(2, 1, 40, 40)),
}


@pytest.mark.parametrize("what", WRONG)
def test_shapes_that_disagree_are_refused_before_the_operator_reads_memory(what: str) -> None:
    q, k, v, mask = WRONG[what]
    for pin, machine in product(("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"), (CPU, CARD)):
        if machine is CARD and pin == "FLASH_ATTENTION" and mask is not None:
            continue  # takes no mask at all
        with pytest.raises(ValueError, match="shapes disagree"):
            kernel_support.implementation(pin, machine)(AttentionCall(q, k, v, mask))


@pytest.mark.parametrize("pin", ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"])
def test_dtypes_that_disagree_are_refused_too(pin: str) -> None:
    for call in (AttentionCall(Q, K.half(), V), AttentionCall(Q.half(), K.half(), V)):
        for machine in (CPU, CARD):
            with pytest.raises(ValueError, match="dtypes disagree"):
                kernel_support.implementation(pin, machine)(call)


def test_a_mask_of_another_floating_type_is_rounded_and_hides_no_more_keys_than_before(
    snapshot: SnapshotAssertion,
) -> None:
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., 0, :], mask[..., 1, 2:], mask[..., 2, 3] = torch.finfo(torch.float32).min, float("-inf"), 1e30
    bias = kernel_support.bias_of(AttentionCall(Q.half(), K.half(), V.half(), mask))
    assert bias is not None
    assert bias.dtype is torch.float16
    assert torch.equal(bias.isinf(), mask.isinf())
    assert kernel_support.bias_of(AttentionCall(Q.double(), K.double(), V.double(), mask)).dtype is torch.float64
    with pytest.raises(ValueError) as caught:
        BACKENDS["sdpa_math"].load(CPU)(AttentionCall(Q, K, V, MASK.long()))
    assert str(caught.value) == snapshot


PINS = {"flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "cudnn": "CUDNN_ATTENTION"}


@pytest.mark.parametrize("name", PINS)
def test_the_fused_operators_of_a_card_are_given_what_torch_gives_them(
    name: str, monkeypatch: pytest.MonkeyPatch, snapshot: SnapshotAssertion
) -> None:
    operators = Operators(monkeypatch)
    kernel = kernel_support.pinned(PINS[name], CARD)
    masks = [None, "bool", "rows", "bias", "heads", "other dtype"] if name != "flash" else [None]
    done = 0
    for head_dim, kv_len, kv_heads, kind, scale in product((8, 20, 64), (16, 33), (1, 4), masks, (None, 0.2)):
        q = torch.randn(2, 4, 33, head_dim, dtype=torch.bfloat16)
        k, v = (torch.randn(2, kv_heads, kv_len, head_dim, dtype=torch.bfloat16) for _ in range(2))
        mask = {
            None: None,
            "bool": torch.rand(2, 1, 33, kv_len) > 0.3,
            "rows": torch.rand(2, 1, 1, kv_len) > 0.3,
            "bias": torch.randn(1, 1, 33, kv_len, dtype=torch.bfloat16),
            "heads": torch.randn(1, 4, 33, kv_len, dtype=torch.bfloat16).transpose(2, 3).contiguous().transpose(2, 3),
            "other dtype": torch.randn(1, 1, 33, kv_len),
        }[kind]
        for causal in (False, True) if mask is None and kv_len == 33 else (False,):
            call = AttentionCall(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=kv_heads != 4)
            whole = None if mask is None or mask.dtype is torch.bool else mask.float()
            wide = AttentionCall(
                *(tensor.float() for tensor in (q, k, v)),
                mask if whole is None else whole,
                is_causal=causal,
                scale=scale,
                enable_gqa=kv_heads != 4,
            )
            torch.testing.assert_close(
                kernel(call).float(), kernel_support.plain_sdpa()(wide), rtol=2e-2, atol=3e-2, msg=f"{kind} {q.shape}"
            )
            done += 1
    assert operators.ran == [name] * done
    bad = AttentionCall(Q, K[:, :, :8], V[:, :, : 8 if name != "efficient" else 7], is_causal=True)
    with pytest.raises(ValueError, match="causal" if name != "efficient" else "shapes"):
        kernel(bad)
    operators.takes[name] = lambda facts: False
    with pytest.raises(ValueError) as caught:
        kernel(AttentionCall(Q, K, V))
    assert str(caught.value) == snapshot


def test_torchs_no_counts_only_where_the_implementation_is_switched_on(
    monkeypatch: pytest.MonkeyPatch, before: tuple[Any, ...]
) -> None:
    operators = Operators(monkeypatch)
    operators.takes["cudnn"] = lambda facts: cuda.cudnn_sdp_enabled()
    cuda.enable_cudnn_sdp(False)
    kernel_support.pinned("CUDNN_ATTENTION", CARD)(AttentionCall(Q, K, V))
    assert operators.ran == ["cudnn"]


ORDER = ("flash", "cudnn", "efficient")


@pytest.mark.parametrize("kind", ["cuda", "rocm"])
@pytest.mark.parametrize("taking", [ORDER, ORDER[1:], ORDER[2:], ()])
def test_comfyuis_order_is_held_without_the_switches(
    kind: str, taking: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    operators = Operators(monkeypatch)
    for name in ORDER:
        operators.takes[name] = lambda facts, name=name: name in taking
    monkeypatch.setattr(torch_kernel, "SMALL_QUERY", 100)
    kernel = BACKENDS["torch_sdpa"].load(replace(CARD, kind=kind))
    found = switches()
    torch.testing.assert_close(kernel(AttentionCall(Q, K, V)), SDPA(Q, K, V))
    assert operators.ran == list(taking[:1])
    assert switches() == found
    kernel(AttentionCall(Q[:, :, :1, :4], K[..., :4], V[..., :4]))  # small: torch's own order
    assert operators.ran == list(taking[:1])


@pytest.mark.parametrize("kind", ["cuda", "rocm"])
def test_grouped_heads_with_a_mask_are_repeated_where_no_fused_kernel_groups(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On ROCm at once, as in ComfyUI."""
    operators = Operators(monkeypatch)
    asked: list[tuple[str, bool]] = []
    for name in ORDER:

        def takes(facts: Any, name: str = name) -> bool:
            asked.append((name, facts.enable_gqa))
            return name == "efficient" and not facts.enable_gqa

        operators.takes[name] = takes
    monkeypatch.setattr(torch_kernel, "SMALL_QUERY", 100)
    grouped = AttentionCall(Q, K[:, :1], V[:, :1], MASK, enable_gqa=True)
    output = BACKENDS["torch_sdpa"].load(replace(CARD, kind=kind))(grouped)
    torch.testing.assert_close(output, kernel_support.plain_sdpa()(grouped))
    assert operators.ran == ["efficient"]
    as_they_are = [(name, True) for name in ORDER] if kind == "cuda" else []
    assert asked == [*as_they_are, *((name, False) for name in ORDER)]
