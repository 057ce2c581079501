"""ComfyUI hands over some tensors in containers that only one may empty: a kernel can free them before its end."""

from __future__ import annotations

import weakref
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from hook_side import HEADS, Kernel, exact, host, nodes_module, override, rows, sampling, sites  # noqa: E402

compiled = nodes_module("compiled")


class Container:
    """As ComfyUI's AttentionTensorContainer, which the tiny MiniMax model of test_hook_families.py uses."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor: torch.Tensor | None = tensor

    def peek(self) -> torch.Tensor:
        assert self.tensor is not None
        return self.tensor

    def take(self) -> torch.Tensor:
        tensor, self.tensor = self.peek(), None
        return tensor


@pytest.fixture
def freed(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """A backend that gives its inputs up, and for each call whether their memory was free then."""
    seen: list[bool] = []

    def releasing(call: Any) -> torch.Tensor:
        output = torch.nn.functional.scaled_dot_product_attention(call.query, call.key, call.value)
        watched = [weakref.ref(tensor) for tensor in (call.query, call.key, call.value)]
        if call.owned:
            call.query = call.key = call.value = None
        seen.append(all(reference() is None for reference in watched))
        return output

    router = sampling.router_for(torch.device("cpu"))
    monkeypatch.setitem(router.backends, "sdpa_math", Kernel("sdpa_math", releasing))
    monkeypatch.setitem(router._unavailable, "sdpa_math", ())
    monkeypatch.setitem(router._kernels, ("sdpa_math", ()), releasing)
    monkeypatch.setattr(compiled, "comfys_attention", lambda: exact)
    return seen


def handed_over(ours: Any) -> torch.Tensor:
    options = {sampling.KEY: ours, sampling.OVERRIDE: ours}
    containers = [Container(rows(6, seed)) for seed in range(3)]
    with torch.inference_mode():
        output: torch.Tensor = ours.container_function(*containers, HEADS, transformer_options=options)
    assert all(container.tensor is None for container in containers)
    torch.testing.assert_close(output, exact(*(rows(6, seed) for seed in range(3)), HEADS), rtol=0, atol=2e-6)
    return output


def test_a_kernel_can_free_what_it_was_handed(freed: list[bool]) -> None:
    ours = override("sdpa_math", strict=True)
    handed_over(ours)
    handed_over(ours)
    assert freed == [True, True]


def test_tensors_that_the_model_still_holds_are_left_alone(freed: list[bool]) -> None:
    ours = override("sdpa_math", strict=True)
    query, key, value = rows(6), rows(6, 1), rows(6, 2)
    with torch.inference_mode():
        ours(exact, query, key, value, HEADS, transformer_options={sampling.KEY: ours, sampling.OVERRIDE: ours})
    assert freed == [False]


def test_comfyuis_own_attention_gets_tensors(freed: list[bool]) -> None:
    handed_over(override("comfy"))
    assert freed == []


def test_comfyuis_own_attention_is_the_last_resort_here_too(freed: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(call: Any) -> torch.Tensor:
        raise ValueError("broken")

    router = sampling.router_for(torch.device("cpu"))
    monkeypatch.setitem(router._unavailable, "torch_sdpa", ())
    monkeypatch.setitem(router._kernels, ("torch_sdpa", ()), broken)
    handed_over(override("torch_sdpa"))


def test_there_is_none_where_another_pack_has_its_say() -> None:
    """It would be called without a function to compute with."""
    assert hasattr(override("sdpa_math"), "container_function")
    assert not hasattr(
        override("sdpa_math", foreign=lambda func, *args, **flags: func(*args, **flags)), "container_function"
    )


def test_a_kernel_that_fails_after_it_gave_its_inputs_up_is_told_as_it_is(
    freed: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(call: Any) -> torch.Tensor:
        call.query = call.key = call.value = None
        raise ValueError("too late")

    monkeypatch.setitem(sampling.router_for(torch.device("cpu"))._kernels, ("sdpa_math", ()), failing)
    with pytest.raises(ValueError, match="too late"):
        handed_over(override("sdpa_math"))
    assert sites.current_scope() is None
    host._outside_runs.clear()
