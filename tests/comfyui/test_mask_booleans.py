"""Masks of numbers that only hide reach kernels that take booleans alone, and say the same there."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from syrupy.assertion import SnapshotAssertion

torch = pytest.importorskip("torch", reason="torch is not installed")

from attention_backends.backends.config import AttentionConfig, AttentionSpec  # noqa: E402
from attention_backends.backends.engine.mask_reader import inspect  # noqa: E402
from attention_backends.backends.engine.plan import CallKind  # noqa: E402
from attention_backends.backends.engine.router import Router  # noqa: E402
from attention_backends.backends.engine.session import Session  # noqa: E402
from attention_backends.backends.engine.sub_calls import calls_of, plan_sub_calls  # noqa: E402
from attention_backends.backends.kernels import BACKENDS  # noqa: E402
from attention_backends.backends.kernels.registry import detect  # noqa: E402
from attention_backends.backends.values import mask_plan as mask_parts  # noqa: E402
from attention_backends.backends.values.limits import Masks  # noqa: E402
from attention_backends.backends.values.mask_plan import AS_BOOLEANS, PASSED_ON  # noqa: E402
from attention_backends.backends.values.masks import as_4d  # noqa: E402
from attention_backends.backends.values.request import AttentionCall  # noqa: E402
from attention_calls import as_comfyui_runs  # noqa: E402
from hook_side import Kernel, Outcome, close, exact, override, sampling  # noqa: E402
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from mask_forms import PATTERNS, SHAPES, filled, shaped, visible_keys  # noqa: E402

NUMBERS = ("-inf", "finfo.min", "-max", "half of min")
sdpa = torch.nn.functional.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def _as_comfyui() -> Iterator[None]:
    with as_comfyui_runs():
        yield


class Booleans(Kernel):
    """A backend that takes no numbers for a mask, as FlashInfer's."""

    limits = Kernel.limits.but(Masks(("none", "key_padding", "bool")))

    def __init__(self) -> None:
        super().__init__("sdpa_math", self.attend)
        self.masks: list[torch.dtype | None] = []

    def attend(self, call: AttentionCall) -> torch.Tensor:
        self.masks.append(None if call.attn_mask is None else call.attn_mask.dtype)
        return sdpa(call.query, call.key, call.value, call.attn_mask, is_causal=call.is_causal)


def session_with(backend: Booleans) -> Session:
    router = Router(detect(torch.device("cpu")), {**BACKENDS, "sdpa_math": backend})
    config = AttentionConfig(default=AttentionSpec("sdpa_math"), source="node")
    return Session(router, (config,))


def routed(session: Session, call: AttentionCall, mask: torch.Tensor) -> torch.Tensor:
    """One call by the plan of its mask, as the hook does it."""
    plan = inspect(as_4d(mask), call.key.shape[2])
    whole = AttentionCall(call.query, call.key, call.value, as_4d(mask))
    calls = calls_of(session, plan, whole, "sdpa_math")
    if not calls:
        return session.attention(session.plan(CallKind(whole.request(), "self", "self")), whole)
    parts = plan_sub_calls(
        session,
        plan,
        whole,
        calls,
        lambda part, words, grid: session.plan(CallKind(part.request(), "self", "self", mask=words)),
    )
    return session.attention(parts, whole, plan)


def expected(call: AttentionCall, mask: torch.Tensor) -> torch.Tensor:
    mask = as_4d(mask)
    output = sdpa(call.query, call.key, call.value, mask)
    return output.masked_fill((mask == float("-inf")).all(-1, keepdim=True), 0.0)  # as for booleans


@given(
    seed=st.integers(0, 2**32),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 40), st.integers(1, 40)),
    pattern=st.sampled_from(PATTERNS),
    shape=st.sampled_from(SHAPES),
    fill=st.sampled_from(NUMBERS),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_mask_that_only_hides_equals_sdpa(
    seed: int, sizes: tuple[int, int, int, int], pattern: str, shape: str, fill: str, dtype: torch.dtype
) -> None:
    rng = random.Random(seed)
    batch, heads, q_len, kv_len = sizes
    generator = torch.Generator().manual_seed(seed)
    call = AttentionCall(
        *(torch.randn(batch, heads, length, 8, generator=generator).to(dtype) for length in (q_len, kv_len, kv_len))
    )
    mask = filled(shaped(visible_keys(pattern, batch, heads, q_len, kv_len, rng), shape), fill, dtype, False, rng)
    backend = Booleans()
    session = session_with(backend)
    output = routed(session, call, mask)
    tolerance = {torch.float32: 3e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    assert float((output.float() - expected(call, mask).float()).abs().max()) <= tolerance
    kept = inspect(as_4d(mask), kv_len)
    if kept.strategy != PASSED_ON or kept.only_hides:
        ran = {row.backend for row in session.run_report.rows.values() if row.calls}
        assert ran == {"sdpa_math"}
    assert set(backend.masks) <= {None, torch.bool}


def window(length: int = 24) -> torch.Tensor:
    keys = torch.arange(length)
    return torch.zeros(length, length).masked_fill((keys[:, None] - keys).abs() > 2, float("-inf"))


def test_a_third_number_stays_a_bias(snapshot: SnapshotAssertion) -> None:
    """Nothing is dropped: the call falls back, and the reason is the mask."""
    mask = window()
    assert inspect(as_4d(mask), 24).only_hides
    mask[0, 0] = -0.5
    assert not inspect(as_4d(mask), 24).only_hides
    backend = Booleans()
    session = session_with(backend)
    call = AttentionCall(*(torch.randn(1, 2, 24, 8) for _ in range(3)))
    torch.testing.assert_close(routed(session, call, mask), expected(call, mask))
    (row,) = [row for row in session.run_report.rows.values() if row.calls]
    assert row.backend != "sdpa_math"
    assert row.reason == snapshot
    assert backend.masks == []


def test_kernels_that_take_numbers_get_them() -> None:
    plan = inspect(as_4d(window()), 24)
    call = AttentionCall(*(torch.randn(1, 2, 24, 8) for _ in range(3)), as_4d(window()))
    session = Session(Router(detect(torch.device("cpu"))), ())
    assert calls_of(session, plan, call, "torch_sdpa") == []
    assert calls_of(session, plan, call, None) == []
    assert "booleans" not in vars(plan)  # no booleans were made for nothing
    with pytest.raises(ValueError, match="does more than hide"):
        inspect(as_4d(window().masked_fill(window() == 0, 0.5)), 24).booleans  # noqa: B018


def test_in_comfyuis_hook_booleans_are_made_once_for_each_model_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strict holds, the account says how the mask was honoured, and both blocks share one mask."""
    backend = Booleans()
    router = sampling.router_for(torch.device("cpu"))
    monkeypatch.setitem(router.backends, "sdpa_math", backend)
    monkeypatch.setitem(router._unavailable, "sdpa_math", ())
    monkeypatch.setitem(router._kernels, ("sdpa_math", ()), backend.attend)
    made: list[int] = []
    visible = mask_parts.visible_keys
    monkeypatch.setattr(mask_parts, "visible_keys", lambda mask: made.append(1) or visible(mask))
    keys = torch.arange(6)
    mask = torch.zeros(6, 6).masked_fill((keys[:, None] + keys) % 2 == 1, float("-inf"))

    class Masked(Outcome):
        def prepare(self, model: torch.nn.Module) -> None:
            self.calls = [(args, {**flags, "mask": mask}) for args, flags in self.calls]

    outcome = Masked(override("sdpa_math", strict=True), lengths=(6, 6, 6))
    close(outcome.outputs, [exact(*args, mask=mask) for args, _ in outcome.calls])
    assert backend.masks == [torch.bool] * 3
    assert made == [1]
    assert {row.mask for row in outcome.run.run_report.rows.values() if row.calls} == {f"bias, {AS_BOOLEANS}"}
