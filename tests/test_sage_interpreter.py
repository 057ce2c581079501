"""The real kernels of sageattention 1.0.6 on the CPU, through Triton's interpreter: our backend and the fake, checked.

Needs triton and sageattention==1.0.6 (--no-deps), e.g. triton 3.9.0 with numpy 2.4, or 3.6.0 with numpy 2.2. The
package asks for CUDA tensors; the ones here say that they are, and everything behind that question is real.
"""

from __future__ import annotations

import importlib
import sys
from importlib import metadata
from types import ModuleType

import pytest
from attention_backends.backends.platform import Platform
from attention_backends.backends.request import AttentionCall, AttentionRequest

torch = pytest.importorskip("torch", reason="torch is not installed")

from attention_backends.backends.router import Router  # noqa: E402
from attention_calls import as_comfyui_runs, call_for, copied  # noqa: E402
from fakes import sageattention_1  # noqa: E402
from tolerance import allowed, error, truth  # noqa: E402

pytestmark = pytest.mark.interpreter

BASE = AttentionRequest(1, 2, 130, 192, 64, "float16")


class SaysCuda(torch.Tensor):
    """A tensor on the CPU that says that it is on a card."""

    is_cuda = property(lambda self: True)


@pytest.fixture(scope="module")
def sageattention() -> ModuleType:
    for name in ("triton", "sageattention"):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            pytest.skip(f"interpreter: {name} is not installed")
    if version != "1.0.6":
        pytest.skip(f"interpreter: sageattention {version} != 1.0.6")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")  # read when kernels are defined, and when they are launched
        for loaded in [name for name in sys.modules if name.split(".")[0] == "sageattention"]:
            patch.delitem(sys.modules, loaded)
        try:
            yield importlib.import_module("sageattention")
        except ImportError as error:
            pytest.skip(f"interpreter: sageattention cannot be imported: {error}")


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


def _through_us(call: AttentionCall) -> torch.Tensor:
    packages = (("sageattention", "1.0.6"), ("triton", metadata.version("triton")))
    router = Router(Platform("cuda", capability=(8, 9), packages=packages))
    assert router.refuse("sage_attn", call.request()) == ()
    return router.kernel("sage_attn")(_on_a_card(call)).as_subclass(torch.Tensor)


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
    output = _through_us(call)
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
