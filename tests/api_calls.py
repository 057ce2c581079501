"""Calls through `api.py` for tests: tensors, the backend that a call runs on, and a fixture that finds what is left."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from attention_backends.backends import account, attention, read_environment
from attention_backends.backends.api import context as model_calls
from hook_side import no_environment

random = torch.Generator().manual_seed(3)
Q, K, V = (torch.randn(2, 4, length, 16, generator=random) for length in (6, 10, 10))


@pytest.fixture
def nothing_in_force(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    no_environment(monkeypatch)
    monkeypatch.delenv("DIFFUSERS_ATTN_CHECKS", raising=False)
    read_environment()
    model_calls.thread_local.__dict__.clear()
    yield
    assert model_calls._context.get() is None, "a block is still in force"
    monkeypatch.undo()
    read_environment()


def ran(**options: object) -> str:
    """The backend that a call here runs on."""
    with account() as run_report:
        attention(Q, K, V, **options)  # type: ignore[arg-type]
    (row,) = run_report.rows.values()
    assert row.calls == 1
    return row.backend


def close(output: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(output, expected, rtol=0, atol=3e-6)
