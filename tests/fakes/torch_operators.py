"""The operators of torch's fused CUDA kernels, with their real signatures, computed on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.backends import cuda

from . import arithmetic

SDPA = torch.nn.functional.scaled_dot_product_attention

Op = Callable[..., Any]


class Operators:
    """CUDA's fused operators, computed on the CPU: what each was given is looked at as the card's kernel would.

    The arguments go to the real operator first, on the meta device: a name, number or shape that it does not take
    fails there.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ran: list[str] = []
        self.takes: dict[str, Callable[[Any], bool]] = {}
        for name in ("flash", "efficient", "cudnn"):
            self.takes[name] = lambda facts: True
            operator = f"_scaled_dot_product_{name}_attention"
            monkeypatch.setattr(torch, operator, self._stand_in(name, getattr(torch, operator)))
            monkeypatch.setattr(cuda, f"can_use_{name}_attention", lambda facts, name=name: self.takes[name](facts))

    def _stand_in(self, name: str, real: Op) -> Op:
        def run(q: Any, k: Any, v: Any, *rest: Any, scale: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
            def on_meta(value: Any) -> Any:
                return value.to("meta") if isinstance(value, torch.Tensor) else value

            shape, lse = (
                tensor.shape for tensor in real(*(on_meta(value) for value in (q, k, v, *rest)), scale=scale)[:2]
            )
            bias, *flags = (None, True, *rest) if name == "flash" else rest
            if name == "flash":
                assert q.shape[3] % 8 == k.shape[3] % 8 == v.shape[3] % 8 == 0
            if name == "efficient":
                assert q.shape[1] == k.shape[1] == v.shape[1]
                assert bias is None or (bias.shape == (*q.shape[:3], k.shape[2]) and bias.stride(3) == 1)
                assert bias is None or all(bias.stride(i) % 16 == 0 for i in range(3))
            assert bias is None or bias.dtype is q.dtype
            assert flags[1] == 0.0
            self.ran.append(name)
            out = SDPA(q, k, v, attn_mask=bias, is_causal=flags[2], scale=scale, enable_gqa=q.shape[1] != k.shape[1])
            assert out.shape == shape
            return out, _log_sum_exp(q, k, bias, flags[2], scale, lse)

        return run


def _log_sum_exp(
    q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor | None, causal: bool, scale: float | None, shape: torch.Size
) -> torch.Tensor:
    """In the shape that the operator gives: with rows that fill up, or without any where it is not asked for."""
    lse = torch.full(shape, float("nan"))
    if lse.numel():
        visible = arithmetic.causal_mask(q.shape[2], k.shape[2], bottom_right=False) if causal else None
        found = arithmetic.log_sum_exp(q, k, q.shape[3] ** -0.5 if scale is None else scale, visible, bias)
        lse.view(*shape[:2], -1)[..., : q.shape[2]] = found
    return lse


def on_a_card(monkeypatch: pytest.MonkeyPatch) -> Operators:
    """The operators, each taking what torch's own checks let it have on a recent card."""
    operators = Operators(monkeypatch)
    half = (torch.float16, torch.bfloat16)

    def narrow(facts: Any) -> bool:
        """What flash and cuDNN have in common."""
        q, k, v = facts.query, facts.key, facts.value
        square = not facts.is_causal or q.shape[2] == k.shape[2]
        return q.dtype in half and q.shape[3] == v.shape[3] and q.shape[3] <= 256 and square

    operators.takes["flash"] = lambda facts: narrow(facts) and facts.attn_mask is None
    operators.takes["cudnn"] = lambda facts: narrow(facts) and facts.query.shape[3] % 8 == 0
    operators.takes["efficient"] = lambda facts: (
        facts.query.dtype != torch.float64
        and facts.query.shape[1] == facts.key.shape[1]
        and not any(size * facts.query.element_size() % 16 for size in (facts.query.shape[3], facts.value.shape[3]))
    )
    return operators
