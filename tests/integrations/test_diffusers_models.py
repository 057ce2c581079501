"""Real models of diffusers with tiny weights: routed, they give the same bits, and roles are right."""

from __future__ import annotations

import inspect
from collections import Counter
from typing import Any

import pytest
import tiny_diffusers as tiny
import torch
from attention_backends.backends.values.errors import NoBackendError
from attention_backends.integrations.diffusers import apply, attention_backend, report, reset

ROLES: dict[str, dict[str, int]] = {
    # Written from the models' own code: calls of one forward.
    "wan": {"self": 2, "cross": 2},
    "wan_image": {"self": 2, "wan.image_cross": 2, "cross": 2},
    "flux": {"flux.double": 2, "flux.single": 2},
    "qwen_image": {"joint": 2},
    "qwen_image_masked": {"joint": 2},
    "sd3": {"joint": 3, "sd3.image_self": 1},
    "sdxl": {"self": 4, "cross": 4},
    "sdxl_masked": {"self": 4, "cross": 4},
    "ltx2": {
        "self": 2, "cross": 2, "ltx2.audio_self": 2, "ltx2.audio_text_cross": 2, "ltx2.audio_to_video": 2,
        "ltx2.video_to_audio": 2,
    },
    "ltx2_masked": {
        "self": 2, "cross": 2, "ltx2.audio_self": 2, "ltx2.audio_text_cross": 2, "ltx2.audio_to_video": 2,
        "ltx2.video_to_audio": 2,
    },
    "hunyuan_video_15": {"text_self": 1, "hunyuan_video.double": 2},
    "z_image": {"image_self": 1, "text_self": 1, "joint": 2},
}  # fmt: skip
MASKED = {
    "qwen_image": {"joint"},  # of True alone
    "qwen_image_masked": {"joint"},
    "sdxl_masked": {"cross"},
    "ltx2_masked": {"cross", "ltx2.audio_text_cross"},
    "hunyuan_video_15": {"text_self", "hunyuan_video.double"},
    "z_image": {"text_self", "joint"},
}


def state(model: Any) -> dict[str, tuple[type, dict[str, Any]]]:
    """Every attribute of every module, and the identity of each processor, as far as the model has them."""
    return {path: (type(module), dict(vars(module))) for path, module in model.named_modules()}


def assert_same_state(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    for path, (kind, attributes) in before.items():
        assert after[path][0] is kind
        assert after[path][1].keys() == attributes.keys(), path
        assert all(after[path][1][name] is value for name, value in attributes.items()), path


def registry() -> dict[str, Any]:
    """Diffusers' registry of backends, and the functions of its modules that processors call."""
    import sys

    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Registry

    facts = {name: getattr(Registry, name) for name in ("_active_backend", "_checks_enabled")}
    facts |= {f"backend {name}": function for name, function in Registry._backends.items()}
    for name, module in list(sys.modules.items()):
        if name.startswith("diffusers.models") and "dispatch_attention_fn" in vars(module):
            facts[name] = vars(module)["dispatch_attention_fn"]
    facts["sdpa"] = torch.nn.functional.scaled_dot_product_attention
    return facts


@pytest.mark.parametrize("name", tiny.MODELS)
def test_every_call_is_routed_and_the_output_is_that_of_the_unpatched_model(name: str) -> None:
    model, given = tiny.MODELS[name]()
    expected, before, of_diffusers = tiny.forward(model, given), state(model), registry()
    applied = apply(model, "torch_sdpa", strict=True)
    output = tiny.forward(model, given)
    assert all(torch.equal(one, other) for one, other in zip(expected, output, strict=True))
    run_report = applied.reports["model"]
    counts: Counter[str] = Counter()
    for row in run_report.rows.values():
        counts[row.role] += row.calls
        assert (row.backend, row.reason) == ("torch_sdpa", None)
        assert (row.mask != "none") == (row.role in MASKED.get(name, ()))
    assert counts == ROLES[name]
    assert not run_report.bypass
    assert not run_report.notes
    assert registry() == of_diffusers
    reset(model)
    assert_same_state(before, state(model))
    assert all(torch.equal(one, other) for one, other in zip(expected, tiny.forward(model, given), strict=True))


@pytest.mark.parametrize("name", tiny.MODELS)
def test_a_routed_processor_tells_its_parameters_without_reading_them_anew(name: str) -> None:
    """Modules of Diffusers ask for them in each forward: by which they choose what they pass on."""
    model, _ = tiny.MODELS[name]()
    apply(model, "torch_sdpa")
    routed = 0
    for path, module in model.named_modules():
        processor = getattr(module, "processor", None)
        found = vars(module).get("_attention_backends")
        if processor is None or found is None or found.routed_processor is processor:
            continue
        call = found.routed_processor.__call__
        assert inspect.signature(call) == inspect.signature(processor.__call__), path
        assert "__signature__" in vars(call.__func__), path
        assert "__signature__" not in vars(processor.__call__.__func__), path
        routed += 1
    assert routed
    reset(model)


def test_a_view_has_all_attributes_of_its_module() -> None:
    model, _ = tiny.flux()
    apply(model, "torch_sdpa")
    module = next(module for module in model.modules() if "_attention_backends" in vars(module))
    view = vars(module)["_attention_backends"].view
    module.register_buffer("a_buffer", torch.zeros(1))
    module.a_parameter = torch.nn.Parameter(torch.zeros(1))
    for name in ("to_q", "a_buffer", "a_parameter", "heads"):
        assert getattr(view, name) is getattr(module, name)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        view.nothing  # noqa: B018
    reset(model)


def test_a_second_forward_runs_as_the_first_did_and_a_closed_run_leaves_no_plan(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from attention_backends.integrations.diffusers import calls

    model, given = tiny.wan()
    applied = apply(model, "torch_sdpa")
    expected = tiny.forward(model, given)
    monkeypatch.setattr(calls, "run", None)  # what plans a call
    assert torch.equal(tiny.forward(model, given)[0], expected[0])
    monkeypatch.undo()
    assert applied.reports["model"].calls == 8
    modules = [found for module in model.modules() if (found := vars(module).get("_attention_backends"))]
    assert all(found.last[0] for found in modules)
    reset(model)
    assert not any(plan for found in modules for plan in found.last)


@pytest.mark.parametrize("name", ["wan", "sdxl_masked", "z_image", "ltx2_masked"])
def test_another_backend_computes_the_same(name: str) -> None:
    model, given = tiny.MODELS[name]()
    expected = tiny.forward(model, given)
    with attention_backend(model, "reference", strict=True) as chosen:
        output = tiny.forward(model, given)
    for one, other in zip(expected, output, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    rows = chosen.reports["model"].rows.values()
    assert {row.backend for row in rows} == {"reference"}
    assert sum(row.calls for row in rows) == sum(ROLES[name].values())


def test_roles_choose_their_backends() -> None:
    model, given = tiny.ltx2()
    entries = {"self": "sdpa_math", "ltx2.audio_to_video": "reference", "cross": "torch_sdpa"}
    applied = apply(model, {"default": "reference", "per_role": entries})
    tiny.forward(model, given)
    ran = {row.role: row.backend for row in applied.reports["model"].rows.values()}
    assert ran == {
        "self": "sdpa_math", "ltx2.audio_self": "sdpa_math", "cross": "torch_sdpa",
        "ltx2.audio_text_cross": "torch_sdpa", "ltx2.audio_to_video": "reference",
        "ltx2.video_to_audio": "torch_sdpa",
    }  # fmt: skip
    reset(model)


class GroupedProcessor:
    """Calls that few models make: grouped heads, causal, a scale, and dropout."""

    _attention_backend = None
    _parallel_config = None

    def __init__(self, **call: Any) -> None:
        self.call = call

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        query = attn.to_q(hidden_states).unflatten(2, (4, -1))
        key = attn.to_k(hidden_states).unflatten(2, (4, -1))[:, :, : 4 // self.call.get("groups", 1)]
        value = attn.to_v(hidden_states).unflatten(2, (4, -1))[:, :, : 4 // self.call.get("groups", 1)]
        more = {name: one for name, one in self.call.items() if name != "groups"}
        output = dispatch_attention_fn(query, key, value, backend=self._attention_backend, **more)
        return attn.to_out[1](attn.to_out[0](output.flatten(2, 3)))


def with_processor(**call: Any) -> tuple[Any, torch.Tensor]:
    """A model with one attention module that makes such calls."""
    from diffusers.models.attention_processor import Attention

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn1 = Attention(16, heads=4, dim_head=4, processor=GroupedProcessor(**call))

        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return self.attn1(hidden_states)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Model()
    return model.eval(), tiny.noise(2, 6, 16)


try:
    from diffusers.models.attention_dispatch import dispatch_attention_fn
except ImportError:
    dispatch_attention_fn = None
MASK = torch.ones(6, 6, dtype=torch.bool).tril()
CALLS: dict[str, dict[str, Any]] = {
    "grouped": {"groups": 2, "enable_gqa": True},
    "grouped, masked": {"groups": 4, "enable_gqa": True, "attn_mask": MASK},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.1},
    "bool mask": {"attn_mask": MASK},
    "float mask": {"attn_mask": torch.where(MASK, 0.5, float("-inf"))},
    "key padding": {"attn_mask": torch.tensor([[True] * 6, [True] * 4 + [False] * 2])},
    "mask by head": {"attn_mask": tiny.noise(2, 4, 6, 6)},
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("backend", ["torch_sdpa", "reference"])
def test_no_argument_is_dropped(name: str, backend: str) -> None:
    model, given = with_processor(**CALLS[name])
    with torch.no_grad():
        expected = model(given)
        model.attn1.processor.call = {key: one for key, one in CALLS[name].items() if key in ("groups", "enable_gqa")}
        assert name == "grouped" or not torch.allclose(expected, model(given), atol=1e-3)  # the argument matters
        model.attn1.processor.call = CALLS[name]
        with attention_backend(model, backend, strict=True) as chosen:
            output = model(given)
    if backend == "torch_sdpa":
        assert torch.equal(output, expected)
    torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-4)
    (row,) = chosen.reports["model"].rows.values()
    assert (row.backend, row.calls) == (backend, 1)


@pytest.mark.parametrize("name", [name for name in CALLS if "grouped" not in name])
def test_a_plain_call_does_not_decide_for_later_ones(name: str) -> None:
    model, given = with_processor(**CALLS[name])
    with torch.no_grad():
        expected = model(given)
        model.attn1.processor.call = {}
        plain = model(given)
        with attention_backend(model, "torch_sdpa"):
            for call, output in (({}, plain), ({}, plain), (CALLS[name], expected), ({}, plain)):
                model.attn1.processor.call = call
                assert torch.equal(model(given), output)


@pytest.mark.parametrize(
    "call", [{"dropout_p": 0.5}, {"attention_kwargs": {"window": 3}}, {"is_causal": True, "attn_mask": MASK}]
)
def test_what_only_diffusers_computes_is_counted_or_refused(call: dict[str, Any]) -> None:
    model, given = with_processor(**call)
    applied = apply(model, "reference")
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        try:
            expected: Any = reference_of(model, given)
            torch.manual_seed(3)
            assert torch.equal(model(given), expected)
        except (RuntimeError, TypeError) as error:  # SDPA refuses it, patched or not
            with pytest.raises(type(error)):
                model(given)
        else:
            (row,) = applied.reports["model"].rows.values()
            assert (row.backend, row.asked) == ("diffusers", "reference")
            assert row.reason
        apply(model, "reference", strict=True)
        with pytest.raises(NoBackendError):
            model(given)
    reset(model)


@pytest.mark.parametrize("again", [False, True])
def test_a_mask_that_is_no_tensor_is_for_diffusers_own_function(again: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A `BlockMask` of flex attention, as AnyFlow, Qwen-Image 2.1 and LTX-2's decoder pass it."""

    class BlockMask:
        pass

    seen: list[Any] = []

    def dispatch(query: torch.Tensor, *others: torch.Tensor, **more: Any) -> torch.Tensor:
        seen.append(more["attn_mask"])
        return query

    monkeypatch.setitem(globals(), "dispatch_attention_fn", dispatch)
    mask = BlockMask()
    model, given = with_processor(attn_mask=mask)
    with torch.no_grad(), attention_backend(model, "reference") as chosen:
        for _ in range(1 + again):
            model(given)
        assert seen == [mask] * (1 + again)
    (row,) = chosen.reports["model"].rows.values()
    assert (row.backend, row.asked, row.calls) == ("diffusers", "reference", 1 + again)
    assert "BlockMask" in row.reason
    with torch.no_grad(), attention_backend(model, "reference", strict=True), pytest.raises(NoBackendError):
        model(given)


def test_a_torch_function_mode_still_answers_attention_calls() -> None:
    """As Diffusers skips attention scores, for perturbed attention guidance; a default device is such a mode too."""
    from diffusers.hooks.layer_skip import AttentionScoreSkipFunctionMode

    model, given = with_processor()
    with torch.no_grad():
        plain = model(given)
        with AttentionScoreSkipFunctionMode():
            expected = model(given)
        assert not torch.allclose(expected, plain, atol=1e-3)
        with attention_backend(model, "reference") as chosen:
            for _ in range(2):
                model(given)
                with AttentionScoreSkipFunctionMode():
                    assert torch.equal(model(given), expected)
                with torch.device("cpu"):
                    model(given)
    assert {row.backend: row.calls for row in chosen.reports["model"].rows.values()} == {"reference": 4, "diffusers": 2}


def test_modules_that_compute_attention_by_themselves_are_named() -> None:
    from diffusers.models.embeddings import AttentionPooling, HunyuanDiTAttentionPool
    from diffusers.models.transformers.consisid_transformer_3d import PerceiverAttention
    from diffusers.models.transformers.transformer_hidream_image import MoEGate

    model, _ = with_processor()
    model.gate = MoEGate(8)  # a softmax that is no attention
    model.linear = torch.nn.Linear(2, 2)
    assert not apply(model, "torch_sdpa").reports["model"].bypass
    model.others = torch.nn.ModuleList(
        [
            HunyuanDiTAttentionPool(4, 8, 2), AttentionPooling(2, 8), PerceiverAttention(8, 4, 2),
            torch.nn.MultiheadAttention(8, 2),
        ]
    )  # fmt: skip
    _, _, named = apply(model, "torch_sdpa").reports["model"].bypass.partition(": ")
    assert named == "AttentionPooling, HunyuanDiTAttentionPool, MultiheadAttention, PerceiverAttention"
    reset(model)


def reference_of(model: Any, given: torch.Tensor) -> torch.Tensor:
    """The unpatched module's output."""
    return type(model.attn1).forward(model.attn1, given)  # type: ignore[no-any-return]


def test_a_call_that_needs_a_gradient_gets_it() -> None:
    model, given = with_processor()
    given.requires_grad_()
    model(given).sum().backward()
    expected, given.grad = given.grad, None
    applied = apply(model, "reference")
    model(given).sum().backward()
    assert torch.equal(given.grad, expected)
    (row,) = (row for row in applied.reports["model"].rows.values() if row.calls)
    assert row.backend == "diffusers"
    reset(model)


def test_report_and_reset_of_a_model_that_was_never_chosen() -> None:
    model, _ = tiny.wan()
    before = state(model)
    assert report(model) == {}
    reset(model)
    assert_same_state(before, state(model))


def test_tensors_of_different_dtypes_are_left_to_diffusers_and_later_ones_are_routed() -> None:
    """Under autocast Diffusers' function casts them; calls of the same shapes need not be such."""
    model, given = tiny.flux()
    for path, module in model.named_modules():
        if path.endswith(("norm_q", "norm_k")):
            module.register_forward_hook(lambda module, given, output: output.float())
    for backend in ("torch_sdpa", "sdpa_math"):
        applied = apply(model, backend)
        with torch.autocast("cpu", torch.bfloat16):
            tiny.forward(model, given)
        tiny.forward(model, given)
        rows = applied.reports["model"].rows.values()
        assert Counter((row.backend, str(row.reason)) for row in rows for _ in range(row.calls)) == {
            ("diffusers", "dtypes differ: float32, float32, bfloat16"): 4, (backend, "None"): 4,
        }  # fmt: skip
        reset(model)
