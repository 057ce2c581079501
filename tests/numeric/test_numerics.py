"""What backends really compute, against float64: named cases, every dtype, under inference_mode as in ComfyUI.

On the CPU: PyTorch's kernels, the reference and the emulation. With a card, the same cases on whatever is installed.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from attention_backends.backends.kernels import BACKENDS
from attention_backends.backends.kernels.registry import detect
from attention_backends.backends.values.platform import Platform
from attention_backends.backends.values.request import AttentionCall, AttentionRequest

torch = pytest.importorskip("torch", reason="torch is not installed")

from attention_backends.backends.engine.router import Router  # noqa: E402
from attention_backends.backends.values.masks import as_additive  # noqa: E402
from attention_calls import as_comfyui_runs, call_for, copied  # noqa: E402
from kernel_machines import running_on  # noqa: E402
from tolerance import allowed, error, truth  # noqa: E402

SELF = AttentionRequest(1, 4, 200, 200, 64, "float32")


def _no_visible_key(call: AttentionCall) -> AttentionCall:
    call.attn_mask[:, :, 7] = False
    return call


def _no_visible_key_as_bias(call: AttentionCall) -> AttentionCall:
    hidden = ~_no_visible_key(call).attn_mask
    call.attn_mask = torch.zeros_like(hidden, dtype=call.query.dtype).masked_fill(hidden, float("-inf"))
    return call


def _finite_bias(call: AttentionCall) -> AttentionCall:
    call.attn_mask = as_additive(call.attn_mask, call.query.dtype)
    return call


def _views_of_fused_rows(call: AttentionCall) -> AttentionCall:
    rows = torch.stack([tensor.transpose(1, 2) for tensor in (call.query, call.key, call.value)], dim=2)
    call.query, call.key, call.value = (rows[:, :, index].transpose(1, 2) for index in range(3))
    return call


def _last_dimension_with_gaps(call: AttentionCall) -> AttentionCall:
    for name in ("query", "key", "value"):
        setattr(call, name, getattr(call, name).repeat_interleave(2, dim=-1)[..., ::2])
    return call


def _as_it_is(call: AttentionCall) -> AttentionCall:
    return call


CASES: dict[str, tuple[AttentionRequest, Callable[[AttentionCall], AttentionCall]]] = {
    "self": (SELF, _as_it_is),
    "self, causal": (SELF._replace(is_causal=True), _as_it_is),
    "cross, 77 keys": (SELF._replace(kv_len=77), _as_it_is),
    "more keys than queries": (SELF._replace(q_len=33), _as_it_is),
    "one key": (SELF._replace(kv_len=1), _as_it_is),
    "one query": (SELF._replace(q_len=1), _as_it_is),
    "whole blocks": (SELF._replace(q_len=256, kv_len=128), _as_it_is),
    "batch 2": (SELF._replace(batch=2), _as_it_is),
    "grouped heads": (SELF._replace(num_kv_heads=2), _as_it_is),
    "grouped heads, mask": (SELF._replace(num_kv_heads=2, mask="bool"), _as_it_is),
    "head_dim 40": (SELF._replace(head_dim=40), _as_it_is),
    "head_dim 77": (SELF._replace(head_dim=77), _as_it_is),
    "head_dim 128": (SELF._replace(head_dim=128), _as_it_is),
    "head_dim 160": (SELF._replace(head_dim=160), _as_it_is),
    "wider values": (SELF._replace(v_head_dim=96), _as_it_is),
    "own scale": (SELF._replace(scale=0.04), _as_it_is),
    "key-padding mask, batch 2": (SELF._replace(batch=2, mask="key_padding"), _as_it_is),
    "boolean mask": (SELF._replace(mask="bool"), _as_it_is),
    "boolean mask, 77 keys": (SELF._replace(kv_len=77, mask="bool"), _as_it_is),
    "bias": (SELF._replace(mask="bias"), _as_it_is),
    "bias that hides keys": (SELF._replace(mask="bool"), _finite_bias),
    "a row without a visible key": (SELF._replace(mask="bool"), _no_visible_key),
    "a row that -inf hides": (SELF._replace(mask="bool"), _no_visible_key_as_bias),
    "views of fused rows": (SELF, _views_of_fused_rows),
    "last dimension with gaps": (SELF, _last_dimension_with_gaps),
}
DTYPES = ("float32", "bfloat16", "float16")

HERE = running_on("cpu")
WITH_A_CARD = running_on("cuda")


@pytest.fixture(autouse=True)
def inference():
    with as_comfyui_runs():
        yield


def _check(router: Router, backend: str, name: str, dtype: str, device: str) -> str | None:
    """Run one case; None, or why it was refused."""
    request, change = CASES[name]
    call = change(call_for(request._replace(dtype=dtype), device))
    reasons = router.reasons_against(backend, call.request())
    if reasons:
        return "; ".join(reasons)
    before, expected = copied(call), truth(call)
    output = router.kernel(backend)(call)
    assert output.shape == (*call.query.shape[:3], call.value.shape[3])
    assert output.dtype == call.query.dtype
    made, limit = error(output, expected), allowed(before, BACKENDS[backend].arithmetic_on(router.platform))
    assert made.within(limit), f"{made} > {limit}"
    for tensor in ("query", "key", "value"):
        assert torch.equal(getattr(call, tensor), getattr(before, tensor)), f"{tensor} was changed"
    return None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", HERE)
def test_on_the_cpu(backend: str, name: str, dtype: str) -> None:
    refused = _check(Router(Platform("cpu", torch=torch.__version__)), backend, name, dtype, "cpu")
    if (backend, name) == ("sdpa_flash", "wider values"):
        assert refused is not None
        assert refused.endswith("values 96 != 64")
    else:
        assert refused is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", WITH_A_CARD)
def test_on_a_card(backend: str, name: str, dtype: str) -> None:
    router = Router(detect())
    if router.unavailable(backend):
        pytest.skip(f"GPU: {backend}: {'; '.join(router.unavailable(backend))}")
    refused = _check(router, backend, name, dtype, "cuda")
    if refused:
        pytest.skip(f"GPU: {backend} refuses: {refused}")


def test_quantising_shows() -> None:
    """The emulation errs as INT8 does: visibly, by about a percent, and far less than without smoothing the keys."""
    call = call_for(SELF._replace(q_len=512, kv_len=512))
    router = Router(Platform("cpu", torch=torch.__version__))
    made = error(router.kernel("emulated_int8")(copied(call)), truth(call)).total
    exact = error(router.kernel("torch_sdpa")(copied(call)), truth(call)).total
    assert exact < 1e-5
    assert 0.002 < made < 0.05


def test_rounding_to_int8() -> None:
    from attention_backends.backends.kernels.emulated_int8 import round_trip

    tensor = torch.zeros(1, 1, 5, 2)
    tensor[0, 0, :, 0] = torch.tensor([127.0, 0.4, -0.6, 254.0, 3.0])
    rounded = round_trip(tensor, 3)[0, 0, :, 0]
    assert rounded.tolist() == [127.0, 0.0, -1.0, 254.0, 4.0]  # the second block has a step of 2
    assert round_trip(torch.zeros(1, 1, 5, 2), 3).count_nonzero() == 0
