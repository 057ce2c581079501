"""The recorded hook calls of every family, replayed through the adapter and the role table.

Tensors have the recorded shapes, strides and dtypes and random values; the model is a stand-in whose module paths
and class names are the recorded ones. The result is compared with attention written out in hook_side.py, and with
ComfyUI's own function where there is one. A second group asks for each argument of the hook by itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from expected_roles import expected_block, expected_role

torch = pytest.importorskip("torch", reason="torch is not installed")

from attention_backends.backends.config import AttentionConfig, AttentionSpec  # noqa: E402
from hook_side import comfyui, compiled, exact, host, model_call, pass_masks_on, sampling, stand_in  # noqa: E402

FIXTURES = sorted((Path(__file__).parents[1] / "fixtures").glob("hook_calls_*.json"))
RECORDED = {path.stem.removeprefix("hook_calls_"): json.loads(path.read_text(encoding="utf-8")) for path in FIXTURES}
CASES = [
    pytest.param(version, name, id=f"{version}-{name}")
    for version, recording in RECORDED.items()
    for name, facts in recording["families"].items()
    if facts.get("calls")
]


def strided(facts: dict[str, Any], make: Callable[[int], torch.Tensor]) -> torch.Tensor:
    """A tensor in the recorded layout over the storage that `make(size)` fills."""
    size = 1 + sum((length - 1) * stride for length, stride in zip(facts["shape"], facts["stride"], strict=True))
    return make(size).to(getattr(torch, facts["dtype"])).as_strided(facts["shape"], facts["stride"])


def tensor(facts: dict[str, Any], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return strided(facts, lambda size: torch.randn(size, generator=generator))


def mask_of(facts: dict[str, Any] | None) -> torch.Tensor | None:
    """A mask that alternates between the recorded extremes, the visible one first."""
    if facts is None:
        return None
    low, high = float(facts["min"]), float(facts["max"])
    return strided(facts, lambda size: torch.tensor([high, low]).repeat(size)[:size])


def arguments(call: dict[str, Any], options: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of a recorded call, each in the form that the model used: by position or by name."""
    named = {"heads": call["heads"], "mask": mask_of(call["mask"]), **call["flags"], "transformer_options": options}
    args: list[Any] = [tensor(call[which], seed) for seed, which in enumerate("qkv")]
    args += [named.pop(name) for name in compiled.POSITIONAL[: call["positional"] - 3]]
    return args, {name: named[name] for name in call["keywords"] if name != "_inside_attn_wrapper"}


class Replay:
    """One family's recorded calls through an override with `backend`, in one model call."""

    def __init__(self, facts: dict[str, Any], backend: str = "torch_sdpa") -> None:
        override = host.Override((AttentionConfig(default=AttentionSpec(backend)),))
        self.run = sampling.Run(override)
        self.options = {sampling.KEY: override, sampling.OVERRIDE: override, sampling.RUN_KEY: self.run}
        self.calls: dict[str, list[Any]] = {}
        for call in facts["calls"]:
            self.calls.setdefault(call["module"], []).append((call, arguments(call, self.options)))
        places = {path: calls[0][0]["class"] for path, calls in self.calls.items()}
        self.model = stand_in(facts["mro"], places)
        self.outputs: dict[str, list[torch.Tensor]] = {}
        model_call(self.model, self.options, self._forward)
        self.run.close()

    def _forward(self) -> None:
        for path, calls in self.calls.items():
            self.outputs[path] = self.model.get_submodule(path)([args for _, args in calls])

    def pairs(self) -> list[tuple[dict[str, Any], list[Any], dict[str, Any], torch.Tensor]]:
        """Each recorded call with its arguments and our output."""
        return [
            (call, args, kwargs, output)
            for path, calls in self.calls.items()
            for (call, (args, kwargs)), output in zip(calls, self.outputs[path], strict=True)
        ]


@pytest.mark.parametrize(("version", "name"), CASES)
def test_results_and_layouts(version: str, name: str) -> None:
    for call, args, kwargs, output in Replay(RECORDED[version]["families"][name]).pairs():
        expected = exact(*args, **kwargs)
        assert output.shape == expected.shape, call["module"]
        assert output.dtype == expected.dtype
        assert call["flags"].get("skip_output_reshape") or output.is_contiguous()
        torch.testing.assert_close(output, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("version", "name"), CASES)
def test_roles_blocks_and_flags(version: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pass_masks_on(monkeypatch)
    replay = Replay(RECORDED[version]["families"][name])
    plans = [plan.slot.plan for plan in replay.run.model_call(torch.device("cpu")).session.plans.values()]
    found = {(plan.row.role, plan.row.block, plan.request.q_len, plan.request.kv_len) for plan in plans}
    expected, forbidding = set(), set()
    for call, args, _, _ in replay.pairs():
        q_len, kv_len = args[0].shape[-2], args[1].shape[-2]
        role = expected_role(name, call["module"], kv_len)
        expected.add((role, expected_block(call["module"]), q_len, kv_len))
        if call["flags"].get("low_precision_attention") is False:
            forbidding.add((role, q_len, kv_len))
        request = next(plan.request for plan in plans if (plan.request.q_len, plan.request.kv_len) == (q_len, kv_len))
        assert (request.num_heads, request.num_kv_heads) == (call["heads"], heads_of_keys(call, args))
        assert (request.mask == "bias") == (call["mask"] is not None)
    assert found == expected
    exact_only = {(p.row.role, p.request.q_len, p.request.kv_len) for p in plans if p.request.exact_only}
    assert exact_only == forbidding
    assert not replay.run.run_report.notes


def heads_of_keys(call: dict[str, Any], args: list[Any]) -> int:
    return args[1].shape[1] if call["flags"].get("skip_reshape") else call["heads"]


@pytest.mark.comfy
@pytest.mark.parametrize("name", list(dict.fromkeys(case.values[1] for case in CASES)))
def test_results_equal_comfyuis_own_function(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pass_masks_on(monkeypatch)
    comfyui()
    import comfyui_version
    from comfy.ldm.modules.attention import attention_pytorch

    families = RECORDED.get(comfyui_version.__version__, {"families": {}})["families"]
    if not families.get(name, {}).get("calls"):
        pytest.skip(f"ComfyUI {comfyui_version.__version__} has no recorded calls of {name}")
    for call, args, kwargs, output in Replay(families[name]).pairs():
        stock = attention_pytorch(*args, **{**kwargs, "transformer_options": {}})
        assert output.stride() == stock.stride(), call["module"]
        assert torch.equal(output, stock), call["module"]


# Each argument of the hook by itself: batch 2, 4 heads of 16, 10 queries, 7 keys.
def rows(length: int, heads: int, seed: int) -> torch.Tensor:
    return torch.randn(2, length, heads * 16, generator=torch.Generator().manual_seed(seed))


def split(rows: torch.Tensor) -> torch.Tensor:
    return rows.unflatten(2, (-1, 16)).transpose(1, 2)


Q, K, V = rows(10, 4, 0), rows(7, 4, 1), rows(7, 4, 2)
K2, V2 = rows(7, 2, 3), rows(7, 2, 4)
HEADS = {"skip_reshape": True}
BIAS = torch.linspace(-3, 3, 2 * 4 * 10 * 7).view(2, 4, 10, 7)
SEEN = (torch.arange(70).view(10, 7) % 3 != 0).logical_or(torch.arange(7) == 0)
ARGUMENTS = {
    "plain": ((Q, K, V, 4), {}),
    "heads_by_name": ((Q, K, V), {"heads": 4}),
    "all_by_position": ((split(Q), split(K), split(V), 4, BIAS, None, True, True), {}),
    "heads_apart": ((split(Q), split(K), split(V), 4), HEADS),
    "heads_stay_apart": ((Q, K, V, 4), {"skip_output_reshape": True}),
    "values_with_four_dimensions": ((Q, K, V.unflatten(2, (4, 16)), 4), {}),
    "not_contiguous": ((Q[:, ::2], rows(14, 4, 1)[:, ::2], rows(14, 4, 2)[:, ::2], 4), {}),
    "scale": ((Q, K, V, 4), {"scale": 0.5}),
    "scale_none": ((Q, K, V, 4), {"scale": None}),
    "grouped_heads": ((Q, K2, V2, 4), {"enable_gqa": True}),
    "grouped_heads_apart": ((split(Q), split(K2), split(V2), 4), {"enable_gqa": True, **HEADS}),
    "grouped_heads_masked": ((Q, K2, V2, 4, BIAS), {"enable_gqa": True}),
    "mask_queries_keys": ((Q, K, V, 4), {"mask": BIAS[0, 0]}),
    "mask_keys": ((Q, K, V, 4), {"mask": BIAS[0, 0, :1]}),
    "mask_batch_queries_keys": ((Q, K, V, 4), {"mask": BIAS[:, 0]}),
    "mask_batch_keys": ((Q, K, V, 4), {"mask": BIAS[:, 0, :1]}),
    "mask_every_head": ((Q, K, V, 4), {"mask": BIAS}),
    "mask_bool": ((Q, K, V, 4), {"mask": SEEN}),
    "mask_bool_batch": ((Q, K, V, 4), {"mask": SEEN.expand(2, 10, 7)}),
    "mask_bool_keys": ((Q, K, V, 4), {"mask": SEEN[1:2]}),
    "attn_precision": ((Q, K, V, 4), {"attn_precision": torch.float32}),
    "low_precision": ((Q, K, V, 4), {"low_precision_attention": False}),
}


@pytest.mark.parametrize("backend", ["torch_sdpa", "sdpa_math", "reference", "comfy"])
@pytest.mark.parametrize("case", ARGUMENTS)
def test_each_argument_is_honoured(case: str, backend: str) -> None:
    args, flags = ARGUMENTS[case]
    override = host.Override((AttentionConfig(default=AttentionSpec(backend), strict=True),))
    options = {sampling.KEY: override, sampling.OVERRIDE: override}
    with torch.inference_mode():
        output = override(exact, *args, **flags, transformer_options=options, _inside_attn_wrapper=True)
    names = dict(zip(compiled.POSITIONAL, args[3:], strict=False)) | flags
    expected = exact(*args[:3], **names)
    assert output.shape == expected.shape
    torch.testing.assert_close(output, expected, rtol=0, atol=2e-6)
    plain = exact(*args[:3], heads=4, skip_reshape=names.get("skip_reshape", False))
    if names.get("mask") is not None or names.get("scale"):
        assert (output.flatten() - plain.flatten()).norm() > 1e-2


@pytest.mark.parametrize(
    ("dtype", "flags", "forbidden"),
    [
        (torch.float16, {"attn_precision": torch.float32}, True),
        (torch.float16, {"attn_precision": torch.float16}, False),
        (torch.float16, {"attn_precision": None}, False),
        (torch.float32, {"attn_precision": torch.float32}, False),  # nothing to be gained: it is fp32 already
        (torch.float32, {"low_precision_attention": False}, True),
        (torch.float32, {"low_precision_attention": True}, False),
    ],
)
def test_low_precision_is_forbidden_when_the_model_says_so(
    dtype: torch.dtype, flags: dict[str, Any], forbidden: bool
) -> None:
    override = host.Override((AttentionConfig(),))
    run = sampling.Run(override)
    options = {sampling.KEY: override, sampling.OVERRIDE: override, sampling.RUN_KEY: run}
    model = stand_in(["WanModel"], {"blocks.0.self_attn": "WanSelfAttention"})
    qkv = [rows.to(dtype) for rows in (Q, K, V)]
    calls = [((*qkv, 4), {**flags, "transformer_options": options})]
    model_call(model, options, lambda: model.get_submodule("blocks.0.self_attn")(calls))
    (plan,) = run.model_call(torch.device("cpu")).session.plans.values()
    assert plan.slot.plan.request.exact_only is forbidden
