"""Masks on their way from ComfyUI's hook to the kernel: right whoever has a hand in, and one call in the account."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from syrupy.assertion import SnapshotAssertion

torch = pytest.importorskip("torch", reason="torch is not installed")

from attention_backends.backends.config.text import parse_config  # noqa: E402
from attention_backends.backends.engine import mask_reader as mask_plan  # noqa: E402
from attention_backends.backends.kernels import BACKENDS  # noqa: E402
from attention_backends.backends.kernels.backend import FLOATING, Limits  # noqa: E402
from attention_backends.backends.observe.replay.record import as_record, of_run  # noqa: E402
from attention_backends.backends.observe.replay.run_recorder import RunRecorder  # noqa: E402
from attention_backends.backends.values.errors import NoBackendError  # noqa: E402
from attention_backends.backends.values.limits import Causal, Dtypes  # noqa: E402
from attention_calls import as_comfyui_runs  # noqa: E402
from hook_side import (  # noqa: E402
    HEADS,
    Kernel,
    exact,
    host,
    masks,
    model_call,
    optimized_attention,
    override,
    rows,
    sampling,
    sites,
    stand_in,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _as_comfyui() -> Iterator[None]:
    with as_comfyui_runs():
        yield


HIDDEN = torch.finfo(torch.float32).min
QUERY, KEY, VALUE = rows(6), rows(9, 1), rows(9, 2)
Calls = list[tuple[tuple[Any, ...], dict[str, Any]]]


def key_mask(*hidden: int, batch: int = 1) -> torch.Tensor:
    mask = torch.zeros(batch, 1, 9)
    mask[..., list(hidden)] = HIDDEN
    return mask


class Qwen(torch.nn.Module):
    """A model that makes its mask anew in each block, from an argument of the module that makes the call."""


class Attn(torch.nn.Module):
    def forward(self, mask: torch.Tensor, encoder_hidden_states_mask: torch.Tensor, options: Any) -> torch.Tensor:
        return optimized_attention(QUERY, KEY, VALUE, HEADS, mask=mask, transformer_options=options)


def qwen() -> torch.nn.Module:
    model = stand_in(["QwenImageTransformer2DModel"], {"transformer_blocks.0.other": "Linear"})
    for block in range(3):
        parent = torch.nn.Module()
        parent.add_module("attn", Attn())
        model.transformer_blocks.add_module(str(block), parent)
    return model


def run(
    ours: Any,
    body: Callable[[torch.nn.Module, dict[str, Any]], Any],
    model: torch.nn.Module | None = None,
    recorder: Any = None,
) -> Any:
    """One model call with the override; the run, closed."""
    made = sampling.Run(ours)
    made.run_report.recorder = recorder
    options = {sampling.KEY: ours, sampling.OVERRIDE: ours, sampling.RUN_KEY: made}
    model = model or stand_in(["WanModel"], {"blocks.0.self_attn": "WanSelfAttention"})
    model_call(model, options, lambda: body(model, options))
    made.close()
    return made


def assert_right(output: torch.Tensor, mask: torch.Tensor | None) -> None:
    torch.testing.assert_close(output, exact(QUERY, KEY, VALUE, HEADS, mask), rtol=0, atol=2e-6)


def test_a_mask_that_each_block_makes_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    inspect = masks.inspect
    monkeypatch.setattr(masks, "inspect", lambda *given: read.append(1) or inspect(*given))
    source = torch.zeros(1, 5)

    def body(model: torch.nn.Module, options: dict[str, Any]) -> None:
        for block in model.transformer_blocks.children():
            if hasattr(block, "attn"):
                mask = key_mask(2, 3, 4)
                assert_right(block.attn(mask=mask, encoder_hidden_states_mask=source, options=options), mask)

    run(override("torch_sdpa"), body, qwen())
    assert read == [1]


@pytest.mark.parametrize("default", ["comfy", "auto"])
def test_a_record_of_sub_calls_is_repeated_whatever_stands_below_it(default: str) -> None:
    """It does not have the masked call itself, so a name below it does not decide how the mask is honoured."""

    def repeated(ours: Any) -> tuple[list[tuple[str, str, int]], Any]:
        def body(model: torch.nn.Module, options: dict[str, Any]) -> None:
            flags = {"mask": key_mask(2, 3, 4), "transformer_options": options}
            model.get_submodule("blocks.0.self_attn")([((QUERY, KEY, VALUE, HEADS), flags)])

        made = run(ours, body, recorder=RunRecorder())
        rows = [(row.backend, row.mask, row.calls) for row in made.run_report.rows.values() if row.calls]
        return rows, of_run(made.run_report)

    first, kept = repeated(override("sdpa_math"))
    assert first == [("sdpa_math", "bias, gathered", 1)]
    record = parse_config(as_record([kept], {"comfyui": "0.33.0"}), "text")
    again, second = repeated(host.Override((record, parse_config(default, "node"))))
    assert again == first
    assert [one["calls"] for one in second["decisions"]] == [one["calls"] for one in kept["decisions"]]


def test_another_packs_mask_does_not_stand_for_the_models_own() -> None:
    """Regional prompting gives each block a mask of its own, through an override that ours is composed with."""
    changed: list[torch.Tensor] = []

    def regional(func: Any, query: Any, key: Any, value: Any, heads: int, **flags: Any) -> torch.Tensor:
        changed.append(key_mask(*range(len(changed), len(changed) + 4)))
        return func(query, key, value, heads, **{**flags, "mask": changed[-1]})

    def body(model: torch.nn.Module, options: dict[str, Any]) -> None:
        for block in model.transformer_blocks.children():
            if hasattr(block, "attn"):
                own = key_mask(2, 3, 4)
                output = block.attn(mask=own, encoder_hidden_states_mask=torch.zeros(1, 5), options=options)
                assert_right(output, changed[-1])

    run(override("torch_sdpa", foreign=regional), body, qwen())
    assert len(changed) == 3


def test_a_call_between_the_blocks_has_its_own_mask() -> None:
    def body(model: torch.nn.Module, options: dict[str, Any]) -> None:
        source, mask, other = torch.zeros(1, 5), key_mask(2, 3, 4), key_mask(0, 1)
        block = model.get_submodule("transformer_blocks.0.attn")
        assert_right(block(mask=mask, encoder_hidden_states_mask=source, options=options), mask)
        between = optimized_attention(QUERY, KEY, VALUE, HEADS, mask=other, transformer_options=options)
        assert_right(between, other)

    run(override("torch_sdpa"), body, qwen())


def test_a_mask_that_another_pack_rewrites_in_place_is_read_again() -> None:
    buffer = key_mask(0)

    def filling(func: Any, *args: Any, **flags: Any) -> torch.Tensor:
        buffer.copy_(buffer.roll(1, dims=-1))
        return func(*args, **{**flags, "mask": buffer})

    def body(model: torch.nn.Module, options: dict[str, Any]) -> None:
        attend = model.get_submodule("blocks.0.self_attn")
        for _ in range(3):
            (output,) = attend([((QUERY, KEY, VALUE, HEADS), {"transformer_options": options})])
            assert_right(output, buffer)

    with torch.inference_mode():
        run(override("torch_sdpa", foreign=filling), body)


def test_masks_are_read_again_where_patches_may_change_them() -> None:
    """A block patch of another pack may fill one buffer anew for each block."""
    buffer = key_mask(0)

    def body(model: torch.nn.Module, options: dict[str, Any]) -> None:
        options["patches"] = {"attn1_patch": [lambda *args: None]}
        attend = model.get_submodule("blocks.0.self_attn")
        sampling_scope = sites.current_model_call()
        sampling_scope.begin(options, in_model_call=True)
        for _ in range(3):
            buffer.copy_(buffer.roll(1, dims=-1))
            (output,) = attend([((QUERY, KEY, VALUE, HEADS, buffer), {"transformer_options": options})])
            assert_right(output, buffer)

    run(override("torch_sdpa"), body)


def wan_call(ours: Any, mask: torch.Tensor, times: int = 1) -> Any:
    """Calls of one Wan module with a mask, each of them right; the run."""

    def body(model: torch.nn.Module, options: dict[str, Any]) -> None:
        attend = model.get_submodule("blocks.0.self_attn")
        size = mask.shape[0] if mask.ndim > 2 else 1
        query, key, value = (tensor.repeat(size, 1, 1) for tensor in (QUERY, KEY, VALUE))
        for _ in range(times):
            (output,) = attend([((query, key, value, HEADS, mask), {"transformer_options": options})])
            torch.testing.assert_close(output, exact(query, key, value, HEADS, mask), rtol=0, atol=2e-6)

    return run(ours, body)


def test_a_call_in_parts_is_one_call_in_the_account() -> None:
    mask = torch.cat([key_mask(7, 8), key_mask(4, 5, 6, 7, 8)])
    run_report = wan_call(override("torch_sdpa"), mask, times=5).run_report
    assert [(row.mask, row.calls) for row in run_report.rows.values()] == [("bias, per sample", 5)]


def test_a_call_whose_keys_are_all_hidden_is_counted() -> None:
    mask = torch.zeros(1, 9, dtype=torch.bool)
    made = run(
        override("torch_sdpa"),
        lambda model, options: model.get_submodule("blocks.0.self_attn")(
            [((QUERY, KEY, VALUE, HEADS, mask), {"transformer_options": options})]
        ),
    )
    assert sum(row.calls for row in made.run_report.rows.values()) == 1


CAUSAL = torch.zeros(9, 9).masked_fill(torch.ones(9, 9).triu(1).bool(), float("-inf"))


class TakesMasksNotCausal(Kernel):
    limits = Limits(Dtypes(FLOATING), Causal("no"))


def causal_call(ours: Any) -> Any:
    def body(model: torch.nn.Module, options: dict[str, Any]) -> None:
        attend = model.get_submodule("blocks.0.self_attn")
        (output,) = attend([((KEY, KEY, VALUE, HEADS, CAUSAL), {"transformer_options": options})])
        torch.testing.assert_close(output, exact(KEY, KEY, VALUE, HEADS, CAUSAL), rtol=0, atol=2e-6)

    return run(ours, body)


def test_a_kernel_that_takes_the_mask_gets_it_where_it_cannot_have_what_it_means(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Strict must not stop because a mask was recognised as causal."""
    kernel = TakesMasksNotCausal(
        "sdpa_math", BACKENDS["torch_sdpa"].load(sampling.router_for(torch.device("cpu")).platform)
    )
    monkeypatch.setitem(sampling.router_for(torch.device("cpu")).backends, "sdpa_math", kernel)
    sampling.router_for(torch.device("cpu"))._unavailable.pop("sdpa_math", None)
    sampling.router_for(torch.device("cpu"))._kernels.pop(("sdpa_math", ()), None)
    run_report = causal_call(override("sdpa_math", strict=True)).run_report
    assert [(row.backend, row.mask, row.calls) for row in run_report.rows.values() if row.calls] == [
        ("sdpa_math", "bias", 1)
    ]


def test_comfyuis_own_attention_is_the_last_resort_of_a_causal_mask_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(call: Any) -> torch.Tensor:
        raise ValueError("broken")

    router = sampling.router_for(torch.device("cpu"))
    monkeypatch.setitem(router._kernels, ("torch_sdpa", ()), broken)
    monkeypatch.setitem(router._unavailable, "torch_sdpa", ())
    run_report = causal_call(override()).run_report
    assert {row.backend for row in run_report.rows.values() if row.calls} == {"comfy"}
    with pytest.raises(NoBackendError, match="broken"):
        causal_call(override("torch_sdpa", strict=True))


def test_a_mask_that_cannot_be_read_is_passed_on(monkeypatch: pytest.MonkeyPatch, snapshot: SnapshotAssertion) -> None:
    def unable(mask: torch.Tensor, kv_len: int, on_grid: bool) -> mask_plan.MaskPlan:
        raise RuntimeError("not implemented on this device")

    monkeypatch.setattr(masks, "inspect", unable)
    made = wan_call(override("torch_sdpa"), key_mask(8))
    assert [(row.mask, row.calls) for row in made.run_report.rows.values()] == [("bias", 1)]
    assert list(made.run_report.notes) == snapshot


def test_a_fault_of_the_gpu_that_shows_while_a_mask_is_read_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    def faulty(mask: torch.Tensor, kv_len: int, on_grid: bool) -> mask_plan.MaskPlan:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(masks, "inspect", faulty)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        wan_call(override("torch_sdpa"), key_mask(8))


def test_runs_outside_model_calls_do_not_pile_up() -> None:
    for _ in range(50):
        ours = override("torch_sdpa")
        options = {sampling.KEY: ours, sampling.OVERRIDE: ours}
        optimized_attention(QUERY, KEY, VALUE, HEADS, mask=key_mask(8), transformer_options=options)
    assert len(host._outside_runs) <= host.MOST_OUTSIDE


def test_a_run_outside_model_calls_knows_no_more_kinds_than_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """It lives as long as its override, however many lengths it is called with; its account goes on."""
    monkeypatch.setattr(host, "MOST_PLANS", 8)
    ours = override("torch_sdpa")
    options = {sampling.KEY: ours, sampling.OVERRIDE: ours}
    for length in range(2, 42):
        key, mask = rows(length, 1), torch.zeros(1, 1, length)
        mask[..., length // 2 :] = HIDDEN
        output = optimized_attention(QUERY, key, key, HEADS, mask=mask, transformer_options=options)
        torch.testing.assert_close(output, exact(QUERY, key, key, HEADS, mask), rtol=0, atol=2e-6)
        (scope,) = host._outside_runs[ours].model_calls()
        assert len(scope.plans) <= 8
        assert len(scope.session.layouts) <= 8
    assert sum(row.calls for row in scope.run.run_report.rows.values()) == 40


def rows_of(*visible: int) -> torch.Tensor:
    """(1, 1, 9) bool that shows so many keys, from the first one on; a sample for each number."""
    return torch.stack([(torch.arange(9) < number)[None] for number in visible])


MISFITS = {
    "samples too few": (4, rows_of(5, 7)),
    "samples too many": (2, rows_of(5, 7, 3)),
    "queries too few": (1, torch.block_diag(torch.ones(2, 4), torch.ones(2, 5)).bool()),
    "queries too many": (1, torch.block_diag(torch.ones(4, 4), torch.ones(4, 5)).bool()),
    "heads too many": (1, rows_of(5)[:, None].repeat(1, 5, 1, 1)),
}


@pytest.mark.parametrize("form", MISFITS)
def test_a_mask_that_does_not_fit_is_refused_as_it_is_without_a_plan(form: str) -> None:
    """Its plan's parts fit: samples and queries that the mask does not have would be zero, and nobody would know."""
    batch, mask = MISFITS[form]

    def body(model: torch.nn.Module, options: dict[str, Any]) -> None:
        query, key, value = (tensor.repeat(batch, 1, 1) for tensor in (QUERY, KEY, VALUE))
        attend = model.get_submodule("blocks.0.self_attn")
        attend([((query, key, value, HEADS, mask), {"transformer_options": options})])

    with pytest.raises(RuntimeError, match="must match"):
        run(override("torch_sdpa"), body)
