"""ComfyUI hands over some tensors in containers that only one may empty: a kernel can free them before its end."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
from syrupy.assertion import SnapshotAssertion

torch = pytest.importorskip("torch", reason="torch is not installed")

from attention_backends.backends.config import AttentionConfig, AttentionSpec  # noqa: E402
from hook_side import (  # noqa: E402
    HEADS,
    Kernel,
    exact,
    host,
    model_call,
    nodes_module,
    override,
    rows,
    sampling,
    sites,
    stand_in,
)

compiled = nodes_module("hook.compiled")


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

    def body() -> torch.Tensor:
        output: torch.Tensor = ours.container_function(*containers, HEADS, transformer_options=options)
        return output

    output: torch.Tensor = model_call(stand_in(["WanModel"], {}), options, body)
    assert all(container.tensor is None for container in containers)
    torch.testing.assert_close(output, exact(*(rows(6, seed) for seed in range(3)), HEADS), rtol=0, atol=2e-6)
    return output


def test_a_kernel_can_free_what_it_was_handed(freed: list[bool]) -> None:
    ours = override("sdpa_math", strict=True)
    handed_over(ours)
    handed_over(ours)
    assert freed == [True, True]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt])
def test_a_call_that_stops_the_run_holds_no_tensors(
    error: type[BaseException], freed: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of memory above all: ComfyUI frees what it can then, and cannot free these."""
    watched: list[weakref.ref[torch.Tensor]] = []

    def stops(call: Any) -> torch.Tensor:
        watched.extend(weakref.ref(tensor) for tensor in (call.query, call.key, call.value))
        raise error("as it should")

    router = sampling.router_for(torch.device("cpu"))
    monkeypatch.setitem(router._kernels, ("sdpa_math", ()), stops)
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(error) as caught:
            handed_over(override("sdpa_math"))
        caught.value.__traceback__ = None
        del caught
        assert [reference() is None for reference in watched] == [True] * 3
    finally:
        gc.enable()


def test_tensors_that_the_model_still_holds_are_left_alone(freed: list[bool]) -> None:
    ours = override("sdpa_math", strict=True)
    query, key, value = rows(6), rows(6, 1), rows(6, 2)
    with torch.inference_mode():
        ours(exact, query, key, value, HEADS, transformer_options={sampling.KEY: ours, sampling.OVERRIDE: ours})
    assert freed == [False]


@pytest.mark.parametrize("backend", ["sdpa_math", "comfy"])
def test_tensors_on_another_device_than_the_model_calls_are_left_alone(
    freed: list[bool], monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    """A pack can split a model over cards. The output could not be compared with tensors that are gone."""
    device_session = sampling.DeviceSession

    def on_a_card(*args: Any) -> Any:
        made = device_session(*args)
        made.device_index = 1
        return made

    monkeypatch.setattr(sampling, "DeviceSession", on_a_card)
    monkeypatch.setattr(exact, "container_function", exact, raising=False)
    handed_over(override(backend, strict=True))
    assert freed == ([False] if backend == "sdpa_math" else [])


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
    assert sites.current_model_call() is None
    host._outside_runs.clear()


def storages(tensors: list[torch.Tensor]) -> list[Any]:
    from torch.multiprocessing.reductions import StorageWeakRef

    return [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors]


class LettingGo:
    """A kernel that copies its inputs, lets go of them, and sees whose memory is free before its output exists."""

    def __init__(self) -> None:
        self.watched: list[Any] = []
        self.free: list[list[bool]] = []

    def __call__(self, call: Any) -> torch.Tensor:
        copies = [tensor.clone() for tensor in (call.query, call.key, call.value)]
        mask, causal = call.attn_mask, call.is_causal
        if call.owned:
            call.query = call.key = call.value = None
        self.free.append([storage.expired() for storage in self.watched])
        output: torch.Tensor = torch.nn.functional.scaled_dot_product_attention(*copies, mask, is_causal=causal)
        return output


@pytest.fixture
def letting_go(monkeypatch: pytest.MonkeyPatch) -> LettingGo:
    kernel = LettingGo()
    router = sampling.router_for(torch.device("cpu"))
    for name, accuracy in (("sdpa_math", "exact"), ("emulated_int8", "quantized")):
        monkeypatch.setitem(router.backends, name, Kernel(name, kernel, accuracy))
        monkeypatch.setitem(router._unavailable, name, ())
        monkeypatch.setitem(router._kernels, (name, ()), kernel)
    monkeypatch.setattr(compiled, "comfys_attention", lambda: exact)
    return kernel


def hand_over(
    run: Any, kernel: LettingGo, mask: torch.Tensor | None = None, batch: int = 1, step: torch.Tensor | None = None
) -> None:
    """One call in containers; its output is right, and its tensors are gone after it."""
    tensors = [torch.randn(batch, 24, HEADS * 16) for _ in range(3)]
    expected = exact(*tensors, HEADS, mask)
    containers = [Container(tensors.pop(0)) for _ in range(3)]
    kernel.watched = storages([container.peek() for container in containers])
    ours = run.override
    options = {sampling.KEY: ours, sampling.OVERRIDE: ours, sampling.RUN_KEY: run}
    if step is not None:
        options["sigmas"] = step

    def body() -> torch.Tensor:
        output: torch.Tensor = ours.container_function(*containers, HEADS, mask=mask, transformer_options=options)
        return output

    gc.collect()
    gc.disable()
    try:
        output = model_call(stand_in(["WanModel"], {}), options, body)
        assert all(storage.expired() for storage in kernel.watched), "kept until Python looks for circles"
    finally:
        gc.enable()
    torch.testing.assert_close(output, expected, rtol=0, atol=2e-6)


def hidden(*keys: slice, batch: int = 1) -> torch.Tensor:
    mask = torch.zeros(batch, 1, 24)
    for sample in range(batch):
        for span in keys[sample : sample + 1] if batch > 1 else keys:
            mask[sample, :, span] = float("-inf")
    return mask


MASKS = {
    "none": None,
    "passed on": torch.randn(1, 24, 24),
    "suffix": hidden(slice(15, None)),
    "gap": hidden(slice(5, 15)),
    "per sample": hidden(slice(20, None), slice(11, None), batch=2),
}


@pytest.mark.parametrize("name", MASKS)
def test_memory_is_free_before_the_output_exists(letting_go: LettingGo, name: str) -> None:
    """With a mask too; where each sample runs by itself, with the last one, as they share their memory."""
    mask, run = MASKS[name], sampling.Run(override("sdpa_math", strict=True))
    for _ in range(2):  # the first call of a kind plans
        letting_go.free.clear()
        hand_over(run, letting_go, mask, 1 if mask is None else mask.shape[0])
        assert letting_go.free[-1] == [True] * 3
        assert letting_go.free[:-1] == [[False] * 3] * (1 if name == "per sample" else 0)


@pytest.mark.parametrize("name", ["none", "passed on", "per sample"])
def test_nothing_is_kept_after_the_call_by_kernels_that_free_nothing(letting_go: LettingGo, name: str) -> None:
    mask = MASKS[name]
    hand_over(sampling.Run(override("torch_sdpa")), letting_go, mask, 1 if mask is None else mask.shape[0])


def test_gathered_keys_are_freed_even_by_kernels_that_free_nothing(letting_go: LettingGo) -> None:
    """The copies are all that is needed: the originals go before the kernel runs, which is ComfyUI's SDPA here."""
    free: list[list[bool]] = []
    router = sampling.router_for(torch.device("cpu"))
    plain = router.kernel("torch_sdpa")

    def watching(call: Any) -> torch.Tensor:
        free.append([storage.expired() for storage in letting_go.watched])
        return plain(call)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(router._kernels, ("torch_sdpa", ()), watching)
        hand_over(sampling.Run(override("torch_sdpa")), letting_go, MASKS["gap"])
    assert free == [[False, True, True]]


@pytest.mark.parametrize("mode", ["watch", "enforce"])
def test_the_guard_keeps_what_it_checks_and_no_more(letting_go: LettingGo, mode: str) -> None:
    config = AttentionConfig(default=AttentionSpec("emulated_int8"), accuracy="quantized", guard=mode, source="node")
    run = sampling.Run(host.Override((config,)))
    step = torch.ones(1)  # one of the sampler's, in which not every call is checked
    for _ in range(4):
        hand_over(run, letting_go, step=step)
    assert letting_go.free == [[False] * 3, *[[True] * 3] * 3]


def test_a_fault_of_the_card_after_it_names_the_kernel(
    monkeypatch: pytest.MonkeyPatch, snapshot: SnapshotAssertion
) -> None:
    def faulty(call: Any) -> torch.Tensor:
        call.query = call.key = call.value = None
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(compiled, "comfys_attention", lambda: exact)
    router = sampling.router_for(torch.device("cpu"))
    monkeypatch.setitem(router._unavailable, "sdpa_math", ())
    monkeypatch.setitem(router._kernels, ("sdpa_math", ()), faulty)
    with pytest.raises(RuntimeError) as caught:
        handed_over(override("sdpa_math"))
    assert str(caught.value) == snapshot
