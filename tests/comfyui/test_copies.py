"""What the path from ComfyUI's hook to the kernel allocates: the kernel's output, and nothing besides."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from attention_backends.backends.config import AttentionConfig, AttentionSpec  # noqa: E402
from attention_calls import as_comfyui_runs  # noqa: E402
from hook_side import exact, host, sampling  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

SDPA = ("aten._scaled_dot_product_flash_attention_for_cpu.default", "aten.scaled_dot_product_attention.default")


@pytest.fixture(autouse=True)
def _as_comfyui() -> Iterator[None]:
    with as_comfyui_runs():
        yield


class Allocations(TorchDispatchMode):
    """Every operation whose result lies in memory of its own, with the bytes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        memory = {leaf.untyped_storage().data_ptr() for leaf in tensors((args, kwargs or {}))}
        for leaf in tensors(output):
            if leaf.untyped_storage().data_ptr() not in memory and leaf.numel():
                self.found.append((str(func), leaf.untyped_storage().nbytes()))
        return output


def tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def allocated(q_len: int, kv_len: int, mask: torch.Tensor | None = None, **flags: Any) -> list[tuple[str, int]]:
    """What the second call of a kind allocates: the first one plans."""
    override = host.Override((AttentionConfig(default=AttentionSpec("torch_sdpa")),))
    options = {sampling.KEY: override, sampling.OVERRIDE: override}
    if flags.get("skip_reshape"):
        query, key, value = (torch.randn(2, 4, length, 64) for length in (q_len, kv_len, kv_len))
    else:
        query, key, value = (torch.randn(2, length, 256) for length in (q_len, kv_len, kv_len))

    def call() -> torch.Tensor:
        return override(exact, query, key, value, 4, mask=mask, **flags, transformer_options=options)

    call()
    with Allocations() as counted:
        call()
    return counted.found


@pytest.mark.parametrize("apart", [False, True], ids=["heads together", "heads apart"])
def test_an_unmasked_call_allocates_its_output_alone(apart: bool) -> None:
    """And the output's own layout: ComfyUI's heads-together output is SDPA's, in its strides."""
    found = allocated(96, 96, skip_reshape=apart, skip_output_reshape=apart)
    assert [name for name, _ in found if name not in SDPA] == []
    output = 2 * 4 * 96 * 64 * 4
    assert max(size for _, size in found) == output
    assert sum(size for _, size in found) <= output + 2 * 4 * 96 * 4  # and the log-sum-exp of each row


def test_a_trimmed_call_copies_no_key() -> None:
    mask = torch.zeros(2, 1, 96)
    mask[..., 48:] = float("-inf")
    found = allocated(96, 96, mask)
    assert sum(size for _, size in found if size >= 2 * 4 * 48 * 64 * 4) == 2 * 4 * 96 * 64 * 4, found


def test_a_gathered_call_copies_the_kept_keys_and_values_once() -> None:
    mask = torch.zeros(2, 1, 96)
    mask[..., 16:64] = float("-inf")
    names = [name for name, size in allocated(96, 96, mask) if size >= 2 * 4 * 48 * 64 * 4]
    assert sorted(set(names) - set(SDPA)) == ["aten.index_select.default"]
    assert names.count("aten.index_select.default") == 2


def test_a_copy_would_be_seen() -> None:
    with Allocations() as counted:
        torch.randn(4, 4).clone()
    assert len(counted.found) == 2
