"""Real Triton kernels of SageAttention on the CPU, through Triton's interpreter: our backends and the fakes, checked.

Needs triton, e.g. 3.9.0 with numpy 2.4, or 3.6.0 with numpy 2.2. Version 1 is the package sageattention==1.0.6 from
PyPI. Version 2.2 is on no index: SAGEATTENTION_SOURCE names a folder with its sources, of which no compiled part is
needed. In an environment of their own, so that the one for development stays without triton:

    pip install --no-deps triton==3.9.0 sageattention==1.0.6
    git clone https://github.com/thu-ml/SageAttention
    SAGEATTENTION_SOURCE=SageAttention python -m pytest tests/numeric/test_sage_interpreter.py

The packages ask for CUDA tensors; the ones here say that they are, and everything behind that question is real.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
from attention_backends.backends.values.platform import Platform
from attention_backends.backends.values.request import AttentionCall, AttentionRequest

torch = pytest.importorskip("torch", reason="torch is not installed")

from attention_backends.backends.engine.router import Router  # noqa: E402
from attention_calls import as_comfyui_runs, call_for, copied  # noqa: E402
from fakes import sageattention_1, sageattention_2  # noqa: E402
from tolerance import allowed, error, truth  # noqa: E402

pytestmark = pytest.mark.interpreter

BASE = AttentionRequest(1, 2, 130, 192, 64, "float16")


class SaysCuda(torch.Tensor):
    """A tensor on the CPU that says that it is on a card."""

    is_cuda = property(lambda self: True)


def _installed(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        pytest.skip(f"interpreter: {name} is not installed")


@contextmanager
def _imported(source: str | None = None) -> Iterator[ModuleType]:
    """The package with its kernels interpreted, from `source` or as it is installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")  # read when kernels are defined, and when they are launched
        for loaded in [name for name in sys.modules if name.split(".")[0] == "sageattention"]:
            patch.delitem(sys.modules, loaded)
        if source is not None:
            patch.syspath_prepend(source)
            patch.setitem(sys.modules, "sageattention._fused", ModuleType("sageattention._fused"))  # compiled
            patch.setattr(torch.cuda, "set_device", lambda device: None)
        try:
            yield importlib.import_module("sageattention")
        except ImportError as error:
            pytest.skip(f"interpreter: sageattention cannot be imported: {error}")


@pytest.fixture
def sageattention() -> Iterator[ModuleType]:
    _installed("triton")
    if _installed("sageattention") != "1.0.6":
        pytest.skip(f"interpreter: sageattention {_installed('sageattention')} != 1.0.6")
    with _imported() as module:
        yield module


@pytest.fixture
def second() -> Iterator[ModuleType]:
    _installed("triton")
    source = os.environ.get("SAGEATTENTION_SOURCE")
    if not source:
        pytest.skip("interpreter: SAGEATTENTION_SOURCE names no folder with the sources of SageAttention 2.2")
    if not (Path(source) / "sageattention" / "core.py").is_file():
        pytest.fail(f"SAGEATTENTION_SOURCE={source} has no sageattention/core.py")
    with _imported(source) as module:
        yield module


@pytest.fixture(autouse=True)
def inference():
    with as_comfyui_runs():
        yield


def _on_a_card(call: AttentionCall) -> AttentionCall:
    call = copied(call)
    call.query, call.key, call.value = (tensor.as_subclass(SaysCuda) for tensor in (call.query, call.key, call.value))
    return call


def _directly(sageattention: ModuleType, call: AttentionCall) -> torch.Tensor:
    """The package's own function on copies."""
    cuda = _on_a_card(call)
    output = sageattention.sageattn(cuda.query, cuda.key, cuda.value, is_causal=call.is_causal, sm_scale=call.scale)
    return output.as_subclass(torch.Tensor)


def _through_us(call: AttentionCall, backend: str, version: str, **options: object) -> torch.Tensor:
    packages = (("sageattention", version), ("triton", metadata.version("triton")))
    router = Router(Platform("cuda", capability=(8, 9), packages=packages))
    assert router.reasons_against(backend, call.request()) == ()
    return router.kernel(backend, options)(_on_a_card(call)).as_subclass(torch.Tensor)


@pytest.mark.parametrize(
    "request_",
    [
        BASE,
        BASE._replace(dtype="bfloat16"),
        BASE._replace(dtype="float32"),
        BASE._replace(head_dim=96),
        BASE._replace(head_dim=128),
        BASE._replace(batch=2, num_heads=4, num_kv_heads=2),
        BASE._replace(q_len=77, kv_len=77, is_causal=True),
        BASE._replace(scale=0.05),
        BASE._replace(q_len=1, kv_len=64),
    ],
    ids=AttentionRequest.describe,
)
def test_our_backend_on_real_kernels(sageattention: ModuleType, request_: AttentionRequest) -> None:
    call = call_for(request_)
    output = _through_us(call, "sage_attn", "1.0.6")
    made, limit = error(output, truth(call)), allowed(call, "int8")
    assert made.within(limit), f"{made} > {limit}"
    assert torch.equal(output, _directly(sageattention, call))


@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("kv_len", [77, 200])
def test_the_tail_defect_is_real(sageattention: ModuleType, kv_len: int, head_dim: int) -> None:
    call = call_for(BASE._replace(kv_len=kv_len, head_dim=head_dim))
    made, limit = error(_directly(sageattention, call), truth(call)), allowed(call, "int8")
    assert not made.within(limit)
    assert made.total > 2 * limit.total


def test_the_change_of_key_is_real(sageattention: ModuleType) -> None:
    call = call_for(BASE)
    card = _on_a_card(call)
    sageattention.sageattn(card.query, card.key, card.value)
    assert not torch.equal(card.key.as_subclass(torch.Tensor), call.key)


@pytest.mark.parametrize(
    "request_",
    [
        BASE,
        BASE._replace(kv_len=77),
        BASE._replace(kv_len=200, head_dim=96, dtype="bfloat16"),
        BASE._replace(q_len=77, kv_len=77, is_causal=True),
        BASE._replace(batch=2, num_heads=4, num_kv_heads=2, head_dim=128, scale=0.05),
    ],
    ids=AttentionRequest.describe,
)
def test_the_fake_computes_what_the_package_computes(sageattention: ModuleType, request_: AttentionRequest) -> None:
    """Defects included; what is left is the order of sums and single INT8 steps, well under the quantisation itself."""
    call = call_for(request_)
    fake = copied(call)
    theirs = _directly(sageattention, call)
    ours = sageattention_1.sageattn(fake.query, fake.key, fake.value, is_causal=call.is_causal, sm_scale=call.scale)
    assert error(ours, theirs.double()).total < 0.2 * allowed(call, "int8").total


# Version 2.2


def _second_directly(second: ModuleType, call: AttentionCall, **options: object) -> torch.Tensor:
    """The package's own function, given the mask as it is."""
    card = _on_a_card(call)
    output = second.sageattn_qk_int8_pv_fp16_triton(
        card.query,
        card.key,
        card.value,
        is_causal=call.is_causal,
        sm_scale=call.scale,
        attn_mask=call.attn_mask,
        **options,
    )
    return output.as_subclass(torch.Tensor)


SECOND = [
    BASE,
    BASE._replace(kv_len=77),
    BASE._replace(q_len=1, kv_len=1),
    BASE._replace(kv_len=200, head_dim=128, dtype="bfloat16"),
    BASE._replace(head_dim=40),
    BASE._replace(head_dim=96, scale=0.05),
    BASE._replace(q_len=77, kv_len=77, is_causal=True),
    BASE._replace(batch=2, num_heads=4, num_kv_heads=2, kv_len=77),
    *(BASE._replace(mask=mask, kv_len=length) for mask in ("key_padding", "bool", "bias") for length in (77, 192)),
    BASE._replace(mask="bias", kv_len=77, dtype="bfloat16"),
    BASE._replace(mask="bool", batch=2, num_heads=4, num_kv_heads=2, kv_len=130, dtype="bfloat16"),
]


@pytest.mark.parametrize("request_", SECOND, ids=AttentionRequest.describe)
def test_our_backend_on_the_real_second_kernel(second: ModuleType, request_: AttentionRequest) -> None:
    call = call_for(request_)
    made = error(_through_us(call, "sage_fp16_triton", "2.2.0"), truth(call))
    assert made.within(allowed(call, "int8")), f"{made} > {allowed(call, 'int8')}"


@pytest.mark.parametrize("kv_len", [77, 192])
def test_that_a_bias_is_in_log2_units_is_real(second: ModuleType, kv_len: int) -> None:
    call = call_for(BASE._replace(mask="bias", kv_len=kv_len))
    as_it_is = _second_directly(second, call)
    assert not error(as_it_is, truth(call)).within(allowed(call, "int8"))
    meant = copied(call)
    meant.attn_mask = call.attn_mask.float() * torch.log(torch.tensor(2.0))
    assert error(as_it_is, truth(meant)).within(allowed(meant, "int8"))


@pytest.mark.parametrize("kv_len", [77, 192])
@pytest.mark.parametrize("as_bias", [False, True])
def test_a_row_without_a_key_is_zero(second: ModuleType, as_bias: bool, kv_len: int) -> None:
    call = call_for(BASE._replace(mask="bool", kv_len=kv_len))
    call.attn_mask[:, :, 5] = False
    if as_bias:
        call.attn_mask = torch.zeros(call.attn_mask.shape).masked_fill(~call.attn_mask, float("-inf")).half()
    else:
        assert _second_directly(second, call)[0, 0, 5].norm() > 0.1  # a mean over hidden keys
    output = _through_us(call, "sage_fp16_triton", "2.2.0")
    assert output[:, :, 5].count_nonzero() == 0
    assert error(output, truth(call)).within(allowed(call, "int8"))


def test_that_a_first_block_of_minus_infinity_gives_nan_is_real(second: ModuleType) -> None:
    call = call_for(BASE)
    call.attn_mask = torch.zeros(1, 1, 1, 192, dtype=torch.float16)
    call.attn_mask[..., :64] = float("-inf")
    assert _second_directly(second, call).isnan().all()
    assert error(_through_us(call, "sage_fp16_triton", "2.2.0"), truth(call)).within(allowed(call, "int8"))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_row_of_most_negative_numbers_gives_what_sdpa_gives(second: ModuleType, dtype: str) -> None:
    """The kernel gives -1e6 to what fills the last block, which in bfloat16 is far above the most negative number."""
    call = call_for(BASE._replace(kv_len=77, dtype=dtype))
    lowest = torch.finfo(call.query.dtype).min
    call.attn_mask = torch.zeros(1, 1, 130, 77, dtype=call.query.dtype)
    call.attn_mask[:, :, 5] = lowest
    theirs = _second_directly(second, call)
    assert (dtype == "bfloat16") is not bool(theirs[:, :, 5].any())
    fake = sageattention_2.sageattn_qk_int8_pv_fp16_triton(call.query, call.key, call.value, attn_mask=call.attn_mask)
    assert error(fake, theirs.double()).total < 0.2 * allowed(call, "int8").total
    output = _through_us(call, "sage_fp16_triton", "2.2.0")
    assert error(output, truth(call)).within(allowed(call, "int8"))


def test_the_option_reaches_the_real_kernel(second: ModuleType) -> None:
    call = call_for(BASE)
    rough = _through_us(call, "sage_fp16_triton", "2.2.0", smooth_k=False)
    assert torch.equal(rough, _second_directly(second, call, smooth_k=False))
    smooth = _through_us(call, "sage_fp16_triton", "2.2.0", smooth_k=True)
    assert error(smooth, truth(call)).total < error(rough, truth(call)).total


@pytest.mark.parametrize("request_", SECOND, ids=AttentionRequest.describe)
def test_the_second_fake_computes_what_the_package_computes(second: ModuleType, request_: AttentionRequest) -> None:
    call = call_for(request_)
    theirs = _second_directly(second, call)
    ours = sageattention_2.sageattn_qk_int8_pv_fp16_triton(
        call.query,
        call.key,
        call.value,
        is_causal=call.is_causal,
        attn_mask=call.attn_mask,
        sm_scale=call.scale,
    )
    assert error(ours, theirs.double()).total < 0.2 * allowed(call, "int8").total
