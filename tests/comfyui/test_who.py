"""Who computed: calls that another pack computed are counted, named, and refused under strict, however it came in.

The stand-ins take over by each way that ComfyUI has: an override put on top in a callback or by a wrapper, a patch that
replaces a block or an attention, a replaced forward, a replaced function. Their names say nothing; only what they do.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import importlib
import inspect
import itertools
import re
import sys
from collections.abc import Iterator
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
from syrupy.assertion import SnapshotAssertion

torch = pytest.importorskip("torch", reason="torch is not installed")

from attention_backends.backends.values.errors import NoBackendError  # noqa: E402
from hook_side import comfyui, counts, last_run, marks_left, nodes_module, plain_comfyui, sampling, selected, with_role  # noqa: E402

pytestmark = pytest.mark.comfy
whose = nodes_module("hook.origins")
FAMILIES = ("wan", "flux", "sd15", "minimax_h3")
STEPS = {"wan": 2, "flux": 2, "sd15": 1, "minimax_h3": 2}  # the UNet has the most calls
BY_ANOTHER = "by another"
ME = "the Python module test_who"


@pytest.fixture(autouse=True, scope="module")
def quick_to_collect() -> Iterator[None]:
    """ComfyUI collects garbage at each run that follows a model's end: what is there by now need not be looked at."""
    comfyui()
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def comfy(monkeypatch: pytest.MonkeyPatch) -> None:
    plain_comfyui(monkeypatch)


@functools.cache
def built(family: str) -> Any:
    import tiny_sampling

    reason = tiny_sampling.unavailable(family)
    if reason:
        pytest.skip(reason)
    return tiny_sampling.build(family)


def sampled(model: Any, family: str) -> dict[str, Any]:
    import tiny_sampling

    latent = tiny_sampling.sample(model, family, steps=STEPS[family])
    assert torch.isfinite(latent).all()
    return last_run()


@functools.cache
def alone(family: str) -> dict[str, int]:
    """Calls of each role where nobody else has a hand in."""
    found = counts(sampled(selected(built(family), "sdpa_math", strict=True), family))
    return {role: calls for (role, _), calls in found.items()}


class Stranger:
    """Computes some attention calls: an override under a name that says nothing."""

    def __init__(self, every: int = 2) -> None:
        self.every = every
        self.seen = self.answered = 0

    def over(self, previous: Any) -> Any:
        def partial(func: Any, *args: Any, **kwargs: Any) -> Any:
            self.seen += 1
            if self.seen % self.every == 0:
                self.answered += 1
                return func(*args, **{**kwargs, "_inside_attn_wrapper": True})
            return func(*args, **kwargs) if previous is None else previous(func, *args, **kwargs)

        return partial

    def install(self, options: dict[str, Any]) -> None:
        top = options.get(sampling.OVERRIDE)
        if getattr(top, "mine", None) is self:
            return
        made = self.over(top)
        made.mine = self
        options[sampling.OVERRIDE] = made


def in_callback(model: Any, stranger: Stranger) -> Any:
    """As ComfyUI's Model Sparse Attention: on top again at each step, wherever its node stands."""
    from comfy.model_patcher import ModelPatcher
    from comfy.patcher_extension import CallbacksMP

    if "model_options" not in inspect.signature(ModelPatcher.prepare_state).parameters:
        pytest.skip("this ComfyUI hands no model options to ON_PREPARE_STATE")
    clone = model.clone()
    clone.add_callback(
        CallbacksMP.ON_PREPARE_STATE,
        lambda patcher, timestep, options: stranger.install(options["transformer_options"]),
    )
    return clone


def as_wrapper(kind: str) -> Any:
    def patch(model: Any, stranger: Stranger) -> Any:
        from comfy.patcher_extension import WrappersMP

        def outer(executor: Any, *args: Any, **kwargs: Any) -> Any:
            stranger.install(executor.class_obj.model_options["transformer_options"])
            return executor(*args, **kwargs)

        def apply_model(executor: Any, *args: Any, **kwargs: Any) -> Any:
            options = dict(kwargs.pop("transformer_options", None) or args[5])
            stranger.install(options)
            return executor(*args[:5], options, **kwargs)

        def diffusion_model(executor: Any, *args: Any, **kwargs: Any) -> Any:
            options = kwargs.get("transformer_options") or args[-1]
            made = {**options}
            stranger.install(made)
            if "transformer_options" in kwargs:
                return executor(*args, **{**kwargs, "transformer_options": made})
            return executor(*(made if one is options else one for one in args), **kwargs)

        clone = model.clone()
        body = {"OUTER_SAMPLE": outer, "APPLY_MODEL": apply_model, "DIFFUSION_MODEL": diffusion_model}[kind]
        clone.add_wrapper(getattr(WrappersMP, kind), body)
        return clone

    return patch


WAYS = {
    "callback": in_callback,
    "outer": as_wrapper("OUTER_SAMPLE"),
    "apply": as_wrapper("APPLY_MODEL"),
    "diffusion": as_wrapper("DIFFUSION_MODEL"),
}


def placed(family: str, order: str, way: str, stranger: Stranger, strict: bool = False) -> Any:
    if order == "before":
        return selected(WAYS[way](built(family), stranger), "sdpa_math", strict=strict)
    return WAYS[way](selected(built(family), "sdpa_math", strict=strict), stranger)


def by_role(record: dict[str, Any]) -> dict[str, int]:
    found: dict[str, int] = {}
    for (role, _), calls in counts(record).items():
        found[role] = found.get(role, 0) + calls
    return found


def by_another(record: dict[str, Any]) -> int:
    return sum(row["calls"] for row in record["rows"] if row["backend"] == BY_ANOTHER)


EVERYWHERE = (("callback", "before"), ("callback", "after"), ("diffusion", "before"), ("apply", "after"))
PLACES = [("wan", way, order) for way in WAYS for order in ("before", "after")] + [
    (family, *place) for family in FAMILIES if family != "wan" for place in EVERYWHERE
]


@pytest.mark.parametrize(("family", "way", "order"), PLACES)
def test_an_override_put_on_top_during_the_run(family: str, way: str, order: str, snapshot: SnapshotAssertion) -> None:
    expected = alone(family)
    stranger = Stranger()
    record = sampled(placed(family, order, way, stranger), family)
    assert stranger.answered
    assert by_another(record) == stranger.answered
    assert by_role(record) == expected
    assert record["outcome"]["text"] == (
        f"Partly used: {ME} computed {stranger.answered} of {sum(expected.values())} attention calls"
    )
    with pytest.raises(NoBackendError) as error:
        sampled(placed(family, order, way, Stranger(), strict=True), family)
    assert str(error.value) == snapshot
    assert last_run()["outcome"]["kind"] == "refused"


@pytest.mark.parametrize("way", WAYS)
def test_one_that_hands_every_call_on_is_composed_with(way: str) -> None:
    stranger = Stranger(every=10**9)
    record = sampled(placed("wan", "after", way, stranger, strict=True), "wan")
    assert stranger.seen
    assert by_another(record) == 0
    assert (record["outcome"]["kind"], record["notes"]) == ("done", [])


# A block or an attention replaced by a patch

FIRST_BLOCK = {"wan": ("double_block", 0), "flux": ("double_block", 0), "minimax_h3": ("double_block", 0)}


def block_of(model: Any, family: str) -> Any:
    inner = model.model.diffusion_model
    return inner.double_blocks[0] if family == "flux" else inner.blocks[0]


@pytest.mark.parametrize("kind", ["computes", "skips", "cached", "calls"])
@pytest.mark.parametrize("family", FIRST_BLOCK)
def test_a_block_patch_counts_where_it_computes(family: str, kind: str) -> None:
    model = selected(built(family), "sdpa_math")
    strict = selected(built(family), "sdpa_math", strict=True)
    kept: dict[str, Any] = {}

    def own(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        if kind == "calls":
            return extra["original_block"](args)
        if kind == "skips":
            return {name: args[name] for name in ("img", "txt") if name in args}
        if kind == "cached":
            if not kept:
                before = args["img"].clone()
                kept.update({name: value.clone() for name, value in extra["original_block"](args).items()})
                kept["img"] -= before
            return {**kept, "img": args["img"] + kept["img"]}
        img = args["img"]  # attention of its own, without a word to anybody
        weights = torch.softmax(img @ img.mT, dim=-1)
        return {**{name: args[name] for name in ("txt",) if name in args}, "img": img + weights @ img}

    for one in (model, strict):
        one.set_model_patch_replace(own, "dit", *FIRST_BLOCK[family])
    expected = alone(family)
    record = sampled(model, family)
    if kind != "computes":
        assert by_another(record) == 0
        kept.clear()
        assert sampled(strict, family)["outcome"]["kind"] == "done"
        return
    assert by_role(record) == expected
    assert {row["block"] for row in record["rows"] if row["backend"] == BY_ANOTHER} == {
        "double_blocks.0" if family == "flux" else "blocks.0"
    }
    with pytest.raises(NoBackendError, match=f"{ME} computed attention"):
        sampled(strict, family)


@pytest.mark.parametrize("kind", ["attn1", "attn2"])
def test_a_replaced_attention_of_a_unet(kind: str, snapshot: SnapshotAssertion) -> None:
    """As IP-Adapter's packs do: ComfyUI's function without the options of the model, twice."""
    from comfy.ldm.modules.attention import optimized_attention

    def own(q: Any, k: Any, v: Any, extra: dict[str, Any]) -> Any:
        out = optimized_attention(q, k, v, extra["n_heads"])
        return out + 0.1 * optimized_attention(q, k[:, :4], v[:, :4], extra["n_heads"])

    expected = alone("sd15")
    role = "self" if kind == "attn1" else "cross"
    model = with_role(selected(built("sd15"), "auto"), "cross", "sdpa_math")
    model.set_model_patch_replace(own, kind, "middle", 0)
    model.set_model_patch_replace(own, kind, "input", 1)
    record = sampled(model, "sd15")
    assert by_role(record) == expected
    assert counts(record)[role, BY_ANOTHER] == 2
    places = {row["block"] for row in record["rows"] if row["backend"] == BY_ANOTHER}
    assert places <= {row["block"] for row in sampled(selected(built("sd15"), "auto"), "sd15")["rows"]}
    assert not any("matched no attention call" in note for note in record["notes"])
    named = selected(built("sd15"), "sdpa_math", strict=True)
    named.set_model_patch_replace(own, kind, "middle", 0)
    with pytest.raises(NoBackendError) as caught:
        sampled(named, "sd15")
    assert str(caught.value) == snapshot


def test_every_cross_attention_replaced_is_no_missing_role() -> None:
    from comfy.ldm.modules.attention import optimized_attention

    def own(q: Any, k: Any, v: Any, extra: dict[str, Any]) -> Any:
        return optimized_attention(q, k, v, extra["n_heads"])

    model = with_role(selected(built("sd15"), "auto"), "cross", "sdpa_math")
    for place in itertools.product(("input", "middle", "output"), range(12)):
        model.set_model_patch_replace(own, "attn2", *place)
    record = sampled(model, "sd15")
    assert by_role(record) == alone("sd15")
    assert {row["backend"] for row in record["rows"] if row["role"] == "cross"} == {BY_ANOTHER}
    (finding,) = [one for one in record["audit"] if one["role"] == "cross"]
    assert (finding["verdict"], finding["asked"]) == ("explained", "sdpa_math")
    assert not any("matched no attention call" in note for note in record["notes"])


def test_a_patch_that_hands_its_call_to_the_hook_is_ours() -> None:
    from comfy.ldm.modules.attention import optimized_attention

    def own(q: Any, k: Any, v: Any, extra: dict[str, Any]) -> Any:
        return optimized_attention(q, k, v, extra["n_heads"], transformer_options=extra)

    model = selected(built("sd15"), "sdpa_math", strict=True)
    model.set_model_patch_replace(own, "attn2", "middle", 0)
    assert by_another(sampled(model, "sd15")) == 0


def test_a_patch_that_asks_us_and_computes_more_beside_it_counts_as_both() -> None:
    from comfy.ldm.modules.attention import optimized_attention

    def own(q: Any, k: Any, v: Any, extra: dict[str, Any]) -> Any:
        out = optimized_attention(q, k, v, extra["n_heads"], transformer_options=extra)
        return out + optimized_attention(q, k[:, :4], v[:, :4], extra["n_heads"])

    model = selected(built("sd15"), "sdpa_math")
    model.set_model_patch_replace(own, "attn2", "middle", 0)
    assert by_another(sampled(model, "sd15")) == 1


# A replaced forward

ATTENTION = {
    "wan": "blocks.0.cross_attn",
    "flux": "double_blocks.0",
    "sd15": "middle_block.1.transformer_blocks.0.attn2",
    "minimax_h3": "blocks.0.attn",
}


def without_options(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != sampling.OVERRIDE}


@pytest.mark.parametrize("kind", ["computes", "own", "calls", "cached"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_replaced_forward(family: str, kind: str) -> None:
    """As NAG's packs do: the forward of an attention module, put there as an object patch."""

    def patched(strict: bool) -> Any:
        model = selected(built(family), "sdpa_math", strict=strict)
        module = model.model.diffusion_model.get_submodule(ATTENTION[family])
        theirs = type(module).forward
        kept: list[Any] = []

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            if kind == "computes":
                kwargs["transformer_options"] = without_options(kwargs["transformer_options"])
            if kind == "own":
                x = args[0] if args else kwargs["img"]
                own = torch.softmax(x @ x.mT, dim=-1) @ x
                return (own, kwargs["txt"]) if family == "flux" else own
            if kind == "cached" and kept:
                return kept[0]
            kept.append(theirs(self, *args, **kwargs))
            return kept[-1]

        model.add_object_patch(f"diffusion_model.{ATTENTION[family]}.forward", MethodType(forward, module))
        return model

    record = sampled(patched(False), family)
    if kind in ("calls", "cached"):
        assert by_another(record) == 0
        assert sampled(patched(True), family)["outcome"]["kind"] == "done"
        return
    assert by_role(record) == alone(family)
    at_once = 2 if family == "minimax_h3" else 1  # which is sampled one prompt after the other
    assert by_another(record) == STEPS[family] * at_once
    with pytest.raises(NoBackendError, match=f"{ME} computed attention"):
        sampled(patched(True), family)


def own_attention(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    return torch.softmax(x @ x.mT, dim=-1) @ x


def test_a_forward_that_is_replaced_between_two_steps(snapshot: SnapshotAssertion) -> None:
    """In a callback: the stand-in of the first step is gone by then, and what was there comes back after the run."""
    from comfy.patcher_extension import CallbacksMP

    def patched(strict: bool) -> Any:
        model = selected(built("wan"), "sdpa_math", strict=strict)
        module = model.model.diffusion_model.get_submodule(ATTENTION["wan"])
        steps: list[int] = []

        def install(patcher: Any, timestep: Any, *options: Any) -> None:
            steps.append(1)
            if len(steps) == 2:
                module.forward = MethodType(own_attention, module)

        model.add_callback(CallbacksMP.ON_PREPARE_STATE, install)
        model.add_callback(CallbacksMP.ON_CLEANUP, lambda patcher: module.__dict__.pop("forward", None))
        return model

    record = sampled(patched(False), "wan")
    assert by_role(record) == alone("wan")
    assert by_another(record) == 1
    with pytest.raises(NoBackendError) as caught:
        sampled(patched(True), "wan")
    assert str(caught.value) == snapshot
    assert marks_left(built("wan").model.diffusion_model) == []


def test_a_forward_that_is_replaced_in_its_class(monkeypatch: pytest.MonkeyPatch, snapshot: SnapshotAssertion) -> None:
    """Before anything of ours saw the class: it is an attention module by its place in a model that we know."""
    from comfy.ldm.wan.model import WanSelfAttention, WanT2VCrossAttention

    callers = nodes_module("hook.callers")
    expected = alone("wan")
    monkeypatch.setattr(WanSelfAttention, "forward", own_attention)
    for kind in (WanSelfAttention, WanT2VCrossAttention):
        monkeypatch.delitem(callers._by_class, kind, raising=False)
    record = sampled(selected(built("wan"), "sdpa_math"), "wan")
    assert by_role(record) == expected
    assert counts(record)["self", BY_ANOTHER] == expected["self"]
    with pytest.raises(NoBackendError) as caught:
        sampled(selected(built("wan"), "sdpa_math", strict=True), "wan")
    assert str(caught.value) == snapshot
    monkeypatch.undo()
    callers._by_class.pop(WanSelfAttention, None)


@pytest.mark.parametrize("family", ["wan", "sd15"])
def test_a_replaced_function(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As old packs do in the whole process: what the model's module calls is another function, which asks nobody."""
    import comfy.ldm.modules.attention
    import comfy.ldm.wan.model

    expected = alone(family)
    module = comfy.ldm.wan.model if family == "wan" else comfy.ldm.modules.attention

    def attention(q: Any, k: Any, v: Any, heads: int, *args: Any, **kwargs: Any) -> Any:
        return torch.zeros_like(q)

    monkeypatch.setattr(module, "optimized_attention", attention)
    record = sampled(selected(built(family), "sdpa_math"), family)
    assert by_role(record) == expected
    assert by_another(record) == sum(expected.values())
    assert record["outcome"]["text"] == f"Not used: {ME} took over attention"
    with pytest.raises(NoBackendError, match=f"{ME} computed attention"):
        sampled(selected(built(family), "sdpa_math", strict=True), family)


# ComfyUI's own nodes


def test_model_attention_backend_after_ours_and_below_another(snapshot: SnapshotAssertion) -> None:
    from comfy_extras import nodes_model_advanced

    if not hasattr(nodes_model_advanced, "ModelAttentionBackend"):
        pytest.skip("this ComfyUI has no Model Attention Backend node")

    def stock(model: Any) -> Any:
        return nodes_model_advanced.ModelAttentionBackend().patch(model, "pytorch attention")[0]

    for family in ("wan", "minimax_h3"):  # which hands tensors over in containers
        record = sampled(stock(selected(built(family), "sdpa_math")), family)
        assert by_another(record) == sum(alone(family).values())
        assert by_role(record) == alone(family)
        assert record["outcome"]["text"] == snapshot(name="after ours")
        with pytest.raises(NoBackendError) as error:
            sampled(stock(selected(built(family), "sdpa_math", strict=True)), family)
        assert str(error.value).splitlines()[-1] == snapshot(name="what to do")

    stranger = Stranger(every=10**9)

    def chain(strict: bool) -> Any:
        model = stock(built("wan")).clone()
        stranger.install(model.model_options["transformer_options"])
        return selected(model, "sdpa_math", strict=strict)

    record = sampled(chain(False), "wan")
    assert by_another(record) == sum(alone("wan").values())
    assert record["outcome"]["text"] == snapshot
    with pytest.raises(NoBackendError) as error:
        sampled(chain(True), "wan")
    assert str(error.value) == snapshot
    assert not any(word in str(error.value) for word in ("<locals>", "partial", "optimized_attention_override"))


def test_a_selector_that_a_callback_puts_on_top_is_not_moved_by_the_order_of_nodes(
    snapshot: SnapshotAssertion,
) -> None:
    """It is there again at each step, so that only taking it away helps."""
    from comfy.patcher_extension import CallbacksMP

    def attention_override_sage(func: Any, *args: Any, **kwargs: Any) -> Any:
        return func(*args, **{**kwargs, "_inside_attn_wrapper": True})

    def patched(order: str, strict: bool) -> Any:
        model = built("wan").clone() if order == "before" else selected(built("wan"), "sdpa_math", strict=strict)
        model.add_callback(
            CallbacksMP.ON_PREPARE_STATE,
            lambda patcher, timestep, options: options["transformer_options"].update(
                {sampling.OVERRIDE: attention_override_sage}
            ),
        )
        return selected(model, "sdpa_math", strict=strict) if order == "before" else model

    in_callback(built("wan"), Stranger())  # skips where callbacks get no options
    for order in ("before", "after"):
        record = sampled(patched(order, strict=False), "wan")
        assert record["outcome"]["text"] == snapshot(name="outcome")
        with pytest.raises(NoBackendError) as error:
            sampled(patched(order, strict=True), "wan")
        assert str(error.value).splitlines()[-1] == snapshot(name="what to do")


# Names


class SpecialGuidance:
    @staticmethod
    def made() -> Any:
        return lambda func, *args, **kwargs: func(*args, **kwargs)


class Other:
    RETURN_TYPES = ("MODEL",)


def test_names_as_a_person_knows_them(monkeypatch: pytest.MonkeyPatch) -> None:
    func = SpecialGuidance.made()
    assert whose.title_of(func) == f"{ME}"
    comfy_nodes = SimpleNamespace(
        NODE_CLASS_MAPPINGS={"Special": SpecialGuidance, "Other": Other},
        NODE_DISPLAY_NAME_MAPPINGS={"Special": "Special Guidance"},
    )
    monkeypatch.setitem(sys.modules, "nodes", comfy_nodes)
    assert whose.title_of(func) == "Special Guidance"
    titled = {"3": {"class_type": "Special", "inputs": {}, "_meta": {"title": "My guidance"}}}
    assert whose.title_of(func, titled) == "My guidance (Special Guidance)"
    assert whose.title_of(functools.partial(func, 1)) == "Special Guidance"
    assert whose.title_of(MethodType(func, 1)) == "Special Guidance"
    assert whose.title_of(Stranger(1).over(None)) == f"{ME}"
    queued = {"3": {"class_type": "Other", "inputs": {}}}
    assert whose.title_of(Stranger(1).over(None), queued) == "Other"  # the only node of that module that is queued


def test_a_pack_is_named_by_its_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    space: dict[str, Any] = {"__name__": "/srv/ComfyUI/custom_nodes/ComfyUI-Some_x_Pack.sub.attention"}
    exec("class Patch:\n    def __call__(self, q): return q\ndef over(func): return func", space)  # noqa: S102
    assert whose.title_of(space["over"]) == "a node of ComfyUI-Some.Pack"
    assert whose.title_of(space["Patch"]()) == "a node of ComfyUI-Some.Pack"

    class Node:
        RETURN_TYPES = ("MODEL",)
        __module__ = "/srv/ComfyUI/custom_nodes/ComfyUI-Some_x_Pack.nodes"

    comfy_nodes = SimpleNamespace(NODE_CLASS_MAPPINGS={"N": Node}, NODE_DISPLAY_NAME_MAPPINGS={"N": "Nice Node"})
    monkeypatch.setitem(sys.modules, "nodes", comfy_nodes)
    queued = {"1": {"class_type": "N", "inputs": {}}}
    assert whose.title_of(space["Patch"](), queued) == "Nice Node (ComfyUI-Some.Pack)"


# ComfyUI's own nodes that have a hand in attention

NOT_STRANGERS = {
    "PerturbedAttentionGuidance": ("nodes_pag", (3.0,)),  # a call in its place that computes nothing
    "NAGuidance": ("nodes_nag", (5.0, 0.5, 1.5)),
    "HyperTile": ("nodes_hypertile", (32, 2, 0, True)),
    "TomePatchModel": ("nodes_tomesd", (0.3,)),
    "FreeU_V2": ("nodes_freelunch", (1.3, 1.4, 0.9, 0.2)),
}


@functools.cache
def comfy_nodes() -> Any:
    """ComfyUI's own module of nodes with the extra ones that these tests need, loaded as ComfyUI loads them."""
    from comfy_location import find_comfyui

    import nodes

    extras = find_comfyui() / "comfy_extras"  # type: ignore[operator]
    for name in ("nodes_sag", "nodes_slg", *(module for module, _ in NOT_STRANGERS.values())):
        if (extras / f"{name}.py").is_file():
            asyncio.run(nodes.load_custom_node(str(extras / f"{name}.py"), module_parent="comfy_extras"))
    return nodes


def patched_by(node_id: str, model: Any, *values: Any) -> Any:
    kind = comfy_nodes().NODE_CLASS_MAPPINGS.get(node_id)
    if kind is None:
        pytest.skip(f"this ComfyUI has no node {node_id}")
    function = getattr(kind, "execute", None) or getattr(kind(), kind.FUNCTION)
    output = function(model, *values)
    return output[0] if isinstance(output, tuple) else output.args[0]


def test_self_attention_guidance(snapshot: SnapshotAssertion) -> None:
    """It computes the middle block's self-attention with functions of its own, to have the weights."""
    model = patched_by("SelfAttentionGuidance", selected(built("sd15"), "sdpa_math"), 0.5, 2.0)
    record = sampled(model, "sd15")
    name = "Self-Attention Guidance (ComfyUI)"
    found = counts(record)[("self", BY_ANOTHER)]
    assert found == 2  # one in each model call, of which it makes one more per step
    total = sum(row["calls"] for row in record["rows"])
    assert record["outcome"]["text"] == f"Partly used: {name} computed {found} of {total} attention calls"
    strict = patched_by("SelfAttentionGuidance", selected(built("sd15"), "sdpa_math", strict=True), 0.5, 2.0)
    with pytest.raises(NoBackendError) as caught:
        sampled(strict, "sd15")
    assert str(caught.value) == snapshot


@pytest.mark.parametrize("node_id", NOT_STRANGERS)
def test_nodes_that_compute_no_attention_of_their_own(node_id: str) -> None:
    model = selected(built("sd15"), "sdpa_math", strict=True)
    record = sampled(patched_by(node_id, model, *NOT_STRANGERS[node_id][1]), "sd15")
    assert by_another(record) == 0
    assert (record["outcome"]["kind"], record["notes"]) == ("done", [])


# Who else has to know


def test_records_and_comparisons_say_that_a_run_is_not_ours_alone() -> None:
    runs, comparison, compare_runs = (
        nodes_module(name) for name in ("history.runs", "compare.comparison", "compare.compare_runs")
    )
    stranger = Stranger()
    record = sampled(placed("wan", "before", "callback", stranger), "wan")
    kept = runs.decisions(record["number"])
    said = [text for text in kept["not_repeated"] if text.startswith(f"{ME} computed calls of role ")]
    assert said
    assert kept["steady"] is False
    text = f"Partly used: {ME} computed 4 of 8 attention calls"
    reports = {1: {"run": record}, 2: {"run": sampled(selected(built("wan"), "sdpa_math"), "wan")}}
    rows = [comparison.make_row(number, "", report) for number, report in reports.items()]
    assert [row.failed for row in rows] == [None, None]
    assert comparison.fallback_notes(rows, reports) == [f"branch 1: {text}"]
    everything = {"run": sampled(placed("wan", "before", "callback", Stranger(every=1)), "wan")}
    assert comparison.make_row(1, "", everything).failed == f"Not used: {ME} took over attention"
    (variant, *_) = compare_runs.make_variants(built("wan"), "sdpa_math", {})
    variant.report = record
    assert variant.note == f"{variant.row.asked}: {text}"
    assert variant.ran == f"sdpa_math + {ME}"


def test_the_report_has_rows_by_another() -> None:
    report = nodes_module("report.report")
    record = sampled(placed("wan", "after", "callback", Stranger()), "wan")
    lines = report.as_text({"run": record}).splitlines()
    assert f"by another: self: {ME} computed it" in lines or f"by another: cross: {ME} computed it" in lines
    assert any(line.split()[1:3] == ["by", "another"] for line in lines)
    assert not any(line.startswith("fallback") for line in lines)
    (summary,) = (one for one in nodes_module("history.runs").summaries() if one["number"] == record["number"])
    assert (summary["by_another"], summary["fallbacks"]) == (4, 0)


# Other ways in


def mixed(x: Any) -> Any:
    """Attention, as a pack may compute it without asking anybody."""
    return torch.softmax(x @ x.mT, dim=-1) @ x


BLOCKS = {
    "wan": "blocks.0",
    "flux": "single_blocks.0",
    "sd15": "middle_block.1.transformer_blocks.0",
    "minimax_h3": "blocks.0",
}


REPLACED_BLOCKS = [*itertools.product(FAMILIES, ("computes", "calls", "cached")), ("wan", "partly")]


@pytest.mark.parametrize(("family", "kind"), REPLACED_BLOCKS)
def test_a_replaced_forward_of_a_block(family: str, kind: str) -> None:
    """What is around attention modules is another pack's: the modules within may never run."""

    def patched(strict: bool) -> Any:
        model = selected(built(family), "sdpa_math", strict=strict)
        block = model.model.diffusion_model.get_submodule(BLOCKS[family])
        theirs = type(block).forward
        kept: list[Any] = []

        def forward(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
            if kind == "computes":
                return x + mixed(x)
            if kind == "partly":
                context = kwargs["context"] if "context" in kwargs else args[1]
                x = x + mixed(x)
                return x + self.cross_attn(x, context, transformer_options=kwargs["transformer_options"])
            if kind == "calls" or not kept:
                output = theirs(self, x, *args, **kwargs)
                kept.append(torch.empty_like(output).copy_(output))  # in memory of its own
                return output
            return torch.add(kept[0], 0.0, out=torch.empty_like(kept[0]))

        model.add_object_patch(f"diffusion_model.{BLOCKS[family]}.forward", MethodType(forward, block))
        return model

    record = sampled(patched(False), family)
    if kind in ("calls", "cached"):
        assert by_another(record) == 0
        assert sampled(patched(True), family)["outcome"]["kind"] == "done"
        return
    assert by_role(record) == alone(family)
    found = {(row["role"], row["block"]) for row in record["rows"] if row["backend"] == BY_ANOTHER}
    assert {block for _, block in found} == {re.sub(r"\.transformer_blocks.*", "", BLOCKS[family])}
    if kind == "partly":
        assert {role for role, _ in found} == {"self"}
    with pytest.raises(NoBackendError, match=f"{ME} computed attention"):
        sampled(patched(True), family)
    left = built(family).model.diffusion_model.get_submodule(BLOCKS[family]).__dict__.get("forward")
    assert left is None or whose.origin(left)[0] == __name__  # ComfyUI takes theirs off with the next model


@pytest.mark.parametrize("kind", ["computes", "calls", "holds"])
def test_a_module_of_a_pack_in_place_of_an_attention_module(
    kind: str, monkeypatch: pytest.MonkeyPatch, snapshot: SnapshotAssertion
) -> None:
    # What a pack's own file has imported says nothing of what its module calls.
    monkeypatch.setitem(
        globals(), "optimized_attention", importlib.import_module("comfy.ldm.wan.model").optimized_attention
    )

    class Theirs(torch.nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.hidden = [inner]
            self.inner = inner if kind == "holds" else None

        def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
            return mixed(x) if kind == "computes" else self.hidden[0](x, *args, **kwargs)

    def patched(strict: bool) -> Any:
        model = selected(built("wan"), "sdpa_math", strict=strict)
        inner = model.get_model_object("diffusion_model.blocks.0.self_attn")
        while hasattr(inner, "hidden"):
            inner = inner.hidden[0]
        model.add_object_patch("diffusion_model.blocks.0.self_attn", Theirs(inner))
        return model

    expected = alone("wan")
    record = sampled(patched(False), "wan")
    assert by_role(record) == expected
    assert by_another(record) == (2 if kind == "computes" else 0)
    if kind != "computes":
        assert sampled(patched(True), "wan")["outcome"]["kind"] == "done"
    else:
        with pytest.raises(NoBackendError) as caught:
            sampled(patched(True), "wan")
        assert str(caught.value) == snapshot
    built("wan").unpatch_model()


def with_block_patch(options: dict[str, Any]) -> dict[str, Any]:
    def own(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        return {**{name: args[name] for name in ("txt",) if name in args}, "img": args["img"] + mixed(args["img"])}

    return {**options, "patches_replace": {"dit": {("double_block", 0): own}}}


def emptied(options: dict[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in ("sigmas", "cond_or_uncond") if name in options}


def changed(model: Any, way: str, change: Any, first: int = 1) -> Any:
    """`model` with its options changed on the way to each model call from the `first` on."""
    from comfy.patcher_extension import WrappersMP

    seen: list[int] = []

    def maybe(options: Any) -> Any:
        seen.append(1)
        return change(options) if len(seen) >= first else options

    def function(apply_model: Any, given: dict[str, Any]) -> Any:
        options = maybe(given["c"]["transformer_options"])
        return apply_model(given["input"], given["timestep"], **{**given["c"], "transformer_options": options})

    def wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
        args = tuple(maybe(one) if isinstance(one, dict) and "sigmas" in one else one for one in args)
        if "transformer_options" in kwargs:
            kwargs["transformer_options"] = maybe(kwargs["transformer_options"])
        return executor(*args, **kwargs)

    clone = model.clone()
    if way == "function":
        clone.set_model_unet_function_wrapper(function)
    else:
        clone.add_wrapper(getattr(WrappersMP, way), wrapper)
    return clone


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("way", ["function", "APPLY_MODEL", "DIFFUSION_MODEL"])
@pytest.mark.parametrize("family", ["wan", "flux"])
def test_a_block_patch_that_a_wrapper_puts_there(family: str, way: str, order: str) -> None:
    def patched(strict: bool) -> Any:
        model = built(family) if order == "after" else changed(built(family), way, with_block_patch)
        model = selected(model, "sdpa_math", strict=strict)
        return changed(model, way, with_block_patch) if order == "after" else model

    record = sampled(patched(False), family)
    assert by_role(record) == alone(family)
    assert {row["block"] for row in record["rows"] if row["backend"] == BY_ANOTHER} == {
        "double_blocks.0" if family == "flux" else "blocks.0"
    }
    with pytest.raises(NoBackendError, match=f"{ME} computed attention"):
        sampled(patched(True), family)


@pytest.mark.parametrize("first", [1, 2])
@pytest.mark.parametrize("way", ["function", "APPLY_MODEL", "DIFFUSION_MODEL"])
def test_options_that_are_taken_out_on_the_way(way: str, first: int) -> None:
    """Nothing of our node is left in them, so that no call comes to us: from some model call on, or at all."""

    def patched(strict: bool) -> Any:
        return changed(selected(built("wan"), "sdpa_math", strict=strict), way, emptied, first)

    record = sampled(patched(False), "wan")
    expected = alone("wan")
    assert by_role(record) == expected
    assert by_another(record) == sum(expected.values()) // first
    assert f"{ME} " in record["outcome"]["text"]
    with pytest.raises(NoBackendError, match=f"{ME} computed attention"):
        sampled(patched(True), "wan")


def test_a_function_that_never_calls_the_model() -> None:
    def patched(strict: bool) -> Any:
        model = selected(built("wan"), "sdpa_math", strict=strict)
        model.set_model_unet_function_wrapper(lambda apply_model, given: given["input"] * 0.5)
        return model

    text = f"no attention call of this model reached this node; {ME} runs the model in its own way"
    assert sampled(patched(False), "wan")["outcome"]["text"] == f"Not used: {text}"
    with pytest.raises(NoBackendError, match=text):
        sampled(patched(True), "wan")


def test_one_call_is_counted_once_where_several_stand_around_it() -> None:
    """An override that answers half of the calls, within a replaced forward, within a replaced block."""
    stranger = Stranger()
    model = placed("wan", "after", "callback", stranger)
    for path in ("blocks.0", "blocks.0.cross_attn", "blocks.0.self_attn"):
        module = model.model.diffusion_model.get_submodule(path)
        own = type(module).forward

        def forward(self: Any, *args: Any, _theirs: Any = own, **kwargs: Any) -> Any:
            return _theirs(self, *args, **kwargs)

        model.add_object_patch(f"diffusion_model.{path}.forward", MethodType(forward, module))
    record = sampled(model, "wan")
    assert by_role(record) == alone("wan")
    assert by_another(record) == stranger.answered == 4


def test_what_is_no_attention() -> None:
    """Projections, and memory that torch's own operators fill; a kernel's output is filled by nobody that is seen."""
    operators = nodes_module("hook.operator_watch")
    x = torch.ones(1, 4, 8)
    for compute in (
        lambda: torch.nn.functional.linear(x, torch.eye(8)),
        lambda: torch.empty_like(x).copy_(x),
        lambda: torch.add(x, x, out=torch.empty_like(x)),
        lambda: torch.nn.functional.layer_norm(x, (8,)) * torch.empty(0).sum(),
    ):
        with torch.inference_mode(), operators.Work() as work:
            compute()
        assert not work.likely
    for compute in (lambda: torch.empty_like(x), lambda: mixed(x)):
        with torch.inference_mode(), operators.Work() as work:
            compute()
        assert work.likely

    def of_a_package(name: str) -> int:
        return operators._kind(SimpleNamespace(name=lambda: name))  # type: ignore[no-any-return]

    assert {of_a_package(f"comfy_kitchen::{name}") for name in ("scaled_mm_nvfp4", "quantize_per_tensor_fp8")} == {0}
    assert of_a_package("sageattention::qk_int8_sv_f16") == operators.KERNEL
    assert of_a_package("comfy_kitchen::int8_attention") == operators.ATTENTION


@pytest.mark.parametrize("way", ["forward", "patch"])
def test_what_others_compute_each_time_is_watched_now_and_then(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A watch costs some microseconds per operator; who took over in every call so far is counted without one."""
    import tiny_sampling

    operators = nodes_module("hook.operator_watch")
    watches: list[int] = []
    enter = operators.Work.__enter__
    monkeypatch.setattr(operators.Work, "__enter__", lambda work: watches.append(1) or enter(work))

    def patched(own: Any) -> Any:
        model = selected(built("wan"), "sdpa_math")
        block = model.model.diffusion_model.blocks[0]
        if way == "forward":
            model.add_object_patch("diffusion_model.blocks.0.forward", MethodType(own, block))
        else:
            model.set_model_patch_replace(
                lambda args, extra: {**args, "img": own(block, args["img"])}, "dit", "double_block", 0
            )
        return model

    tiny_sampling.sample(patched(lambda self, x, *args, **kwargs: x + mixed(x)), "wan", steps=20)
    assert by_another(last_run()) == 2 * 20  # both attention modules of the block, in each model call
    assert len(watches) == 4 + 2  # the first ones, and of the others each eighth
    watches.clear()
    turn = itertools.count()  # one that keeps what it computed for every other step is watched each time
    tiny_sampling.sample(
        patched(lambda self, x, *args, **kwargs: x + mixed(x) if next(turn) % 2 == 0 else x + 0.1), "wan", steps=20
    )
    assert by_another(last_run()) == 20
    assert len(watches) == 20
