"""Pinned attention of torch: the one implementation and no other, every switch as it was afterwards, no context."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from attention_backends.backends.kernel_support import sdpa as kernel_support  # noqa: E402
from attention_backends.backends.kernels import BACKENDS  # noqa: E402
from attention_backends.backends.platform import detect  # noqa: E402
from attention_backends.backends.request import AttentionCall  # noqa: E402
from torch.backends import cuda  # noqa: E402
from torch.nn import attention  # noqa: E402

NAMES = ("cudnn_attn", "sdpa_flash", "sdpa_efficient", "sdpa_math")
CPU = detect(torch.device("cpu"))
Q = torch.randn(1, 2, 8, 16)


def switches() -> dict[str, bool]:
    return {name: getattr(cuda, f"{name}_enabled")() for name in kernel_support.SWITCHES.values()}


@pytest.fixture(params=[(), ("flash_sdp", "math_sdp"), ("cudnn_sdp",)], ids=str)
def before(request: pytest.FixtureRequest) -> Iterator[dict[str, bool]]:
    """The switches as another pack may have left them."""
    found = switches()
    for name in request.param:
        getattr(cuda, f"enable_{name}")(False)
    yield switches()
    for name, on in found.items():
        getattr(cuda, f"enable_{name}")(on)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_one_switch_is_on_for_the_call_and_all_are_put_back(
    name: str, fails: bool, before: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, bool]] = []

    def watching(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(switches())
        if fails:
            raise RuntimeError("as it should")
        return query

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watching)
    kernel = BACKENDS[name].load(CPU)
    if fails:
        with pytest.raises(RuntimeError, match="as it should"):
            kernel(AttentionCall(Q, Q, Q))
    else:
        kernel(AttentionCall(Q, Q, Q))
    with attention.sdpa_kernel([getattr(attention.SDPBackend, BACKENDS[name].pin)]):
        assert seen == [switches()], "what torch's own context switches"
    assert switches() == before


def test_the_context_runs_only_where_the_switches_are_not_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """It costs 12 us a call; an XPU has an implementation that no public switch turns off."""
    entered: list[Any] = []

    @contextmanager
    def counted(pinned: Any) -> Iterator[None]:
        entered.append(pinned)
        yield

    monkeypatch.setattr(attention, "sdpa_kernel", counted)
    BACKENDS["sdpa_math"].load(CPU)(AttentionCall(Q, Q, Q))
    assert not entered
    BACKENDS["sdpa_math"].load(replace(CPU, kind="xpu"))(AttentionCall(Q, Q, Q))
    assert entered == [[attention.SDPBackend.MATH]]
