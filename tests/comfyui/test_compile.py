"""Compiled models: one graph for the whole model or for each kind of block, no breaks, nothing compiled twice.

Tiny models of a real ComfyUI are compiled with torch's backend `eager`, which traces, guards and recompiles as any
other. What code inductor makes of our op takes a minute: `-m compile`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from syrupy.assertion import SnapshotAssertion
from tiny_models import FAMILIES

torch = pytest.importorskip("torch", reason="torch is not installed")

import tiny_sampling  # noqa: E402
from attention_backends.backends.config import AttentionConfig, AttentionSpec  # noqa: E402
from attention_backends.backends.config.schedule import ScheduleEntry  # noqa: E402
from attention_backends.backends.values.errors import NoBackendError  # noqa: E402
from hook_side import (  # noqa: E402
    HEADS,
    PLACES,
    ROLES,
    Kernel,
    Outcome,
    Q,
    close,
    comfyui,
    counts,
    exact,
    last_run,
    marks_left,
    model_call,
    no_environment,
    nodes_module,
    override,
    sampling,
    selected,
    sites,
    stand_in,
    with_role,
)
from test_host import use_kernels  # noqa: E402
from torch._dynamo.utils import counters  # noqa: E402

compiled = nodes_module("hook.compiled")
BLOCKS = re.compile(r"(blocks|double_blocks|single_blocks|joint_blocks|layers|transformer_blocks)\.\d+")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    no_environment(monkeypatch)
    torch._dynamo.reset()
    counters.clear()
    # Past its limit dynamo would go on uncompiled, and a test would see no more recompilations.
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "comfys_attention", lambda: exact)


def graphs() -> int:
    """Graphs made so far; none of them may be there because another one broke."""
    assert not counters["graph_break"], dict(counters["graph_break"])
    return int(counters["stats"]["unique_graphs"])


def small(monkeypatch: pytest.MonkeyPatch, name: str, **sizes: int) -> Any:
    family = FAMILIES[name]
    monkeypatch.setitem(FAMILIES, name, dataclasses.replace(family, unet={**family.unet, **sizes}))
    return tiny_sampling.build(name)


def sample_at(name: str, patcher: Any, wider: int) -> Any:
    """Sample a latent that is `wider` columns wider than the family's own."""
    family = FAMILIES[name]
    latents = tuple((*shape[:-1], shape[-1] + wider) for shape in family.latents)
    FAMILIES[name] = dataclasses.replace(family, latents=latents)
    try:
        return tiny_sampling.sample(patcher, name)
    finally:
        FAMILIES[name] = family


def whole(patcher: Any, backend: str = "eager", **options: Any) -> Any:
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    clone = patcher.clone()
    set_torch_compile_wrapper(clone, backend=backend, fullgraph=True, **options)
    return clone


def each_block(patcher: Any, **options: Any) -> Any:
    paths = [path for path, _ in patcher.model.diffusion_model.named_modules() if BLOCKS.fullmatch(path)]
    return whole(patcher, keys=[f"diffusion_model.{path}" for path in paths], **options)


def account() -> list[tuple[Any, ...]]:
    fields = ("role", "block", "backend", "calls", "mask", "asked", "source", "reason")
    return sorted(tuple(str(row[field]) for field in fields) for row in last_run()["rows"])


def same(ours: Any, expected: Any) -> None:
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


# The picture, the account, and how often torch compiles


@pytest.mark.comfy
@pytest.mark.parametrize(
    ("name", "how", "sizes", "made"),
    [
        ("wan", whole, {}, 1),
        ("wan_i2v", each_block, {}, 2),  # the first block's input has other strides
        ("flux", each_block, {"depth": 9, "depth_single_blocks": 9}, 2),
        ("flux_masked", each_block, {}, 2),
        ("z_image", whole, {}, 1),
        ("z_image", each_block, {"n_layers": 12}, 1),
        ("sd3", each_block, {}, 2),
        ("ltxv", each_block, {}, 1),
        ("qwen_image_masked", each_block, {}, 1),
    ],
)
def test_compiled_equals_eager(
    monkeypatch: pytest.MonkeyPatch, name: str, how: Callable[..., Any], sizes: dict[str, int], made: int
) -> None:
    comfyui()
    patcher = small(monkeypatch, name, **sizes)
    ours = with_role(selected(patcher, "sdpa_math", strict=True), "cross", "reference")
    expected = tiny_sampling.sample(ours, name)
    wanted = account()
    one, other = how(ours), how(selected(patcher, "torch_sdpa", strict=True))
    same(tiny_sampling.sample(one, name), expected)
    assert account() == wanted
    assert graphs() == made
    for branch, backend in ((other, "torch_sdpa"), (one, "sdpa_math"), (other, "torch_sdpa")):
        same(tiny_sampling.sample(branch, name), expected)
        assert backend in {used for _, used in counts(last_run())}
    assert graphs() == made, "another branch, backend or run was compiled anew"
    assert marks_left(patcher.model.diffusion_model) == []


@pytest.mark.comfy
def test_a_schedule_does_not_recompile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other backends by step and by block, inside one graph for all blocks."""
    comfyui()
    patcher = small(monkeypatch, "wan", num_layers=4)
    schedule = (ScheduleEntry("reference", steps="1-"), ScheduleEntry("torch_sdpa", blocks="2-3", role="self"))
    config = AttentionConfig(default=AttentionSpec("sdpa_math"), schedule=schedule, strict=True, source="node")
    ours = nodes_module("hook.patch").set_config(patcher, config)
    expected = tiny_sampling.sample(ours, "wan", steps=3)
    wanted = account()
    assert {row[2] for row in wanted} == {"sdpa_math", "reference", "torch_sdpa"}
    same(tiny_sampling.sample(each_block(ours), "wan", steps=3), expected)
    assert account() == wanted
    assert graphs() == 2, "the first block's input has other strides"


@pytest.mark.comfy
def test_fewer_keys_where_a_mask_hides_some(monkeypatch: pytest.MonkeyPatch) -> None:
    comfyui()
    patcher = small(monkeypatch, "ltxv")
    tiny_sampling.sample(each_block(selected(patcher, "sdpa_math")), "ltxv")
    assert {row["mask"] for row in last_run()["rows"] if row["role"] == "cross"} == {"bias, trimmed"}


@pytest.mark.comfy
@pytest.mark.parametrize(("name", "how"), [("z_image", whole), ("wan", each_block), ("flux", each_block)])
def test_other_sizes_of_a_dynamic_model(monkeypatch: pytest.MonkeyPatch, name: str, how: Callable[..., Any]) -> None:
    comfyui()
    patcher = small(monkeypatch, name, **({"n_layers": 1} if name == "z_image" else {}))
    model = how(selected(patcher, "sdpa_math", strict=True), dynamic=True)
    tiny_sampling.sample(model, name)
    made = graphs()
    for wider in (8, 16):
        same(sample_at(name, model, wider), sample_at(name, patcher, wider))
    assert graphs() == made


@pytest.mark.comfy
@pytest.mark.parametrize("ours_last", [False, True])
def test_comfyuis_own_node(monkeypatch: pytest.MonkeyPatch, ours_last: bool) -> None:
    """The node drops every guard on `transformer_options`, so our patch must not be held in the graph by one."""
    comfyui()
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    def node(model: Any) -> Any:
        return TorchCompileModel.execute(model, "eager").result[0]

    def both(model: Any, backend: str) -> Any:
        return selected(node(model), backend, strict=True) if ours_last else node(selected(model, backend, strict=True))

    patcher = small(monkeypatch, "wan", num_layers=1)
    stock = tiny_sampling.sample(patcher, "wan")
    plain, one, other = node(patcher), both(patcher, "sdpa_math"), both(patcher, "torch_sdpa")
    for model, backend in ((plain, ""), (one, "sdpa_math"), (other, "torch_sdpa"), (plain, ""), (one, "sdpa_math")):
        same(tiny_sampling.sample(model, "wan"), stock)
        if backend:
            assert {used for _, used in counts(last_run())} == {backend}
    assert graphs() == 2, "one with our patch, one without"


@pytest.mark.comfy
@pytest.mark.parametrize("what", ["module", "forward"])
@pytest.mark.parametrize("ours_last", [False, True])
def test_blocks_compiled_by_object_patches(monkeypatch: pytest.MonkeyPatch, what: str, ours_last: bool) -> None:
    """As packs do it: a block, or its forward, is replaced for the time of a run. Flux's blocks call attention."""
    comfyui()

    def patched(model: Any) -> Any:
        clone = model.clone()
        for path, block in patcher.model.diffusion_model.named_modules():
            if BLOCKS.fullmatch(path) and what == "module":
                clone.add_object_patch(f"diffusion_model.{path}", torch.compile(block, backend="eager"))
            elif BLOCKS.fullmatch(path):
                run = torch.compile(block.forward, backend="eager", fullgraph=True)
                clone.add_object_patch(f"diffusion_model.{path}.forward", run)
        return clone

    patcher = small(monkeypatch, "flux")
    ours = with_role(selected(patcher, "sdpa_math", strict=True), "flux.single", "reference")
    expected = tiny_sampling.sample(ours, "flux")
    wanted = account()
    model = with_role(selected(patched(patcher), "sdpa_math", strict=True), "flux.single", "reference")
    model = model if ours_last else patched(ours)
    for _ in range(2):
        same(tiny_sampling.sample(model, "flux"), expected)
        assert account() == wanted
    assert graphs() == 2


@pytest.mark.comfy
def test_calls_are_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    comfyui()
    patcher = small(monkeypatch, "wan", num_layers=1)
    model, plain = nodes_module("compare.capture").capturing(patcher)
    tiny_sampling.sample(model, "wan")
    model, calls = nodes_module("compare.capture").capturing(patcher)
    tiny_sampling.sample(each_block(model), "wan")
    assert list(calls) == list(plain)


@pytest.mark.comfy
@pytest.mark.compile
@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor(monkeypatch: pytest.MonkeyPatch, dynamic: bool) -> None:
    comfyui()
    patcher = small(monkeypatch, "z_image", n_layers=1)
    expected = tiny_sampling.sample(patcher, "z_image")
    for backend in ("sdpa_math", "torch_sdpa"):
        model = whole(selected(patcher, backend, strict=True), "inductor", dynamic=dynamic)
        same(tiny_sampling.sample(model, "z_image"), expected)
        assert {used for _, used in counts(last_run())} == {backend}
    assert graphs() == 1


# The op by itself


@pytest.mark.parametrize("skip_reshape", [False, True])
def test_the_op_is_what_it_declares(skip_reshape: bool, hook: None) -> None:
    """Shape, dtype, no output that shares memory with an input, symbolic sizes: torch's own checks of an op."""
    ours = override("sdpa_math")
    tensors = [Q, Q.clone(), Q.clone()]
    if skip_reshape:
        tensors = [tensor.unflatten(2, (2, -1)).transpose(1, 2) for tensor in tensors]
    mask = torch.zeros(1, 1, 6)
    args = (*tensors, mask, 2, skip_reshape, False, None, None, None, ours.handle, None, -1, False)
    torch.library.opcheck(compiled._attention, args, test_utils=("test_schema", "test_faketensor"))


def test_a_graph_that_outlived_its_node(hook: None) -> None:
    handle = override("sdpa_math").handle  # of an object that is gone
    output = compiled._attention(Q, Q, Q, None, 2, False, False, None, None, None, handle, None, -1, False)
    close([output], [exact(Q, Q, Q, 2)])


def test_two_copies_of_the_package_in_one_process(hook: None) -> None:
    """ComfyUI loads the folder under a name of its own; each copy then has its own handles, hence its own ops."""
    spec = importlib.util.spec_from_file_location(f"{compiled.__package__}.another_copy", compiled.__file__)
    assert spec is not None
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    copy.comfys_attention = lambda: exact
    ours = override("reference")  # of a number that the copy has not given out
    arguments = (Q, Q, Q, None, 2, False, False, None, None, None, ours.handle, None, -1, False)
    for module, reached in ((copy, False), (compiled, True)):
        close([module._attention(*arguments)], [exact(Q, Q, Q, 2)])
        assert (ours in nodes_module("hook.override")._outside_runs) is reached


def test_kernels_get_real_sizes(monkeypatch: pytest.MonkeyPatch, hook: None) -> None:
    """A symbolic head_dim would pass limits that the real one does not."""
    seen: list[Any] = []

    def run(call: Any) -> Any:
        seen.append(call.request())
        return torch.nn.functional.scaled_dot_product_attention(call.query, call.key, call.value)

    use_kernels(monkeypatch, Kernel("xformers", run))
    ours = override("xformers")

    @torch.compile(backend="eager", fullgraph=True, dynamic=True)
    def attention(query: Any) -> Any:
        return ours(exact, query, query, query, 2)

    for length, width in ((6, 32), (10, 64), (12, 96)):
        query = torch.randn(1, length, width)
        close([attention(query)], [exact(query, query, query, 2)])
    assert [(facts.q_len, facts.head_dim) for facts in seen] == [(6, 16), (10, 32), (12, 48)]
    assert all(type(size) is int for facts in seen for size in (facts.q_len, facts.head_dim))
    assert graphs() == 1


def test_gradients_are_comfyuis_own(hook: None) -> None:
    query = Q.clone().requires_grad_()
    ours = override("sdpa_math")
    torch.compile(lambda q: ours(exact, q, q, q, 2), backend="eager", fullgraph=True)(query).square().sum().backward()
    wanted = Q.clone().requires_grad_()
    exact(wanted, wanted, wanted, 2).square().sum().backward()
    torch.testing.assert_close(query.grad, wanted.grad)


def test_code_is_counted_for_each_class() -> None:
    """Torch stops compiling a code object after 8 recompilations, however many classes share it."""
    Linear, Identity = torch.nn.Linear, torch.nn.Identity
    one, other, third = Linear(1, 1), Linear(1, 1), Identity()
    codes = [
        sites.AttentionModule(module, "blocks.0", None).wrap(module.forward).__code__ for module in (one, other, third)
    ]
    assert codes[0] is codes[1]
    assert codes[0] is not codes[2]


# Masks


def test_memory_of_a_mask_is_used_again(hook: None) -> None:
    """Compiled code puts one mask where another was, within one model call."""
    ours = override("sdpa_math")
    run = sampling.Run(ours)
    options = {sampling.KEY: ours, sampling.OVERRIDE: ours, sampling.RUN_KEY: run}
    masks = [torch.zeros(1, 1, 6), torch.zeros(1, 1, 6)]
    masks[0][..., 4:] = masks[1][..., :3] = -torch.inf
    kept = torch.empty(1, 1, 6)

    @torch.compile(backend="eager", fullgraph=True)
    def forward(one: Any, other: Any) -> list[Any]:
        outputs = []
        for mask in (one, other):
            outputs.append(ours(exact, Q, Q, Q, 2, kept.copy_(mask), transformer_options=options))
        return outputs

    outputs = model_call(stand_in(["WanModel"], PLACES), options, lambda: forward(*masks))
    run.close()
    close(outputs, [exact(Q, Q, Q, 2, mask) for mask in masks])


def test_no_mask_of_a_compiled_model_is_read_on_an_accelerator() -> None:
    run = sampling.Run(override())
    plans = run.model_call(torch.device("cpu")).masks
    plans.not_kept = nodes_module("hook.masks").COMPILED
    plan = plans.plan(torch.zeros(1, 1, 6, device="meta"), None, 6)  # reading this one would be an error
    assert plan.strategy == "passed on"
    assert any("compiled" in note for note in run.run_report.notes)


# Other packs, unknown arguments, graphs that break: on a stand-in for a Wan model


class Compiled(Outcome):
    fullgraph = True

    def prepare(self, model: Any) -> None:
        for path in ("blocks.0.self_attn", "blocks.0.cross_attn"):
            model.get_submodule(path).compile(backend="eager", fullgraph=self.fullgraph)


def doubles_queries(func: Any, q: Any, *args: Any, **kwargs: Any) -> Any:
    return func(q * 2, *args, **kwargs)


def averages_two(func: Any, q: Any, *args: Any, **kwargs: Any) -> Any:
    return (func(q, *args, **kwargs) + func(q * 2, *args, **kwargs)) / 2


def answers(func: Any, *args: Any, **kwargs: Any) -> Any:
    return torch.zeros_like(args[0])


def breaks_the_graph(func: Any, *args: Any, **kwargs: Any) -> Any:
    torch._dynamo.graph_break()
    return func(*args, **kwargs)


@pytest.mark.usefixtures("hook")
def test_a_foreign_override_is_in_the_graph() -> None:
    outcome = Compiled(override("sdpa_math", doubles_queries))
    close(outcome.outputs, outcome.expected(lambda query: query * 2))
    assert outcome.rows == [(role, "sdpa_math", 1) for role in ROLES]
    assert graphs() == 2


@pytest.mark.usefixtures("hook")
def test_a_foreign_override_that_asks_twice() -> None:
    outcome = Compiled(override("sdpa_math", averages_two))
    halves = zip(outcome.expected(), outcome.expected(lambda query: query * 2), strict=True)
    close(outcome.outputs, [(one + two) / 2 for one, two in halves])
    assert outcome.rows == [(role, "sdpa_math", 2) for role in ROLES]


@pytest.mark.usefixtures("hook")
def test_a_foreign_override_that_never_asks(snapshot: SnapshotAssertion) -> None:
    outcome = Compiled(override("sdpa_math", answers))
    close(outcome.outputs, [torch.zeros_like(Q)] * 3)
    assert list(outcome.notes) == snapshot
    with pytest.raises(NoBackendError) as caught:
        Compiled(override("sdpa_math", answers, strict=True))
    assert str(caught.value) == snapshot


@pytest.mark.usefixtures("hook")
def test_two_of_ours_with_another_between() -> None:
    lower = override("reference")

    def between(func: Any, *args: Any, **kwargs: Any) -> Any:
        return lower(func, *args, **kwargs)

    outcome = Compiled(override("sdpa_math", between))
    close(outcome.outputs, outcome.expected())
    assert outcome.rows == [(role, "sdpa_math", 1) for role in ROLES]


@pytest.mark.usefixtures("hook")
def test_an_argument_of_a_later_comfyui(snapshot: SnapshotAssertion) -> None:
    outcome = Compiled(override("sdpa_math"), brand_new=3)
    close(outcome.outputs, outcome.expected())
    assert outcome.rows == [(role, "comfy", 1) for role in ROLES]
    with pytest.raises(NoBackendError) as caught:
        Compiled(override("sdpa_math", strict=True), brand_new=3)
    assert str(caught.value) == snapshot


@pytest.mark.usefixtures("hook")
@pytest.mark.parametrize(
    "flags", [{"scale": 0.5}, {"attn_precision": torch.float32}, {"low_precision_attention": False}], ids=str
)
def test_what_the_model_says_reaches_the_kernel(flags: dict[str, Any]) -> None:
    plain, outcome = Outcome(override("sdpa_math"), **flags), Compiled(override("sdpa_math"), **flags)
    close(outcome.outputs, plain.outputs)
    assert [plan.slot.plan.request for plan in _plans(outcome)] == [plan.slot.plan.request for plan in _plans(plain)]


def _plans(outcome: Outcome) -> list[Any]:
    (scope,) = outcome.run._model_calls.values()
    return list(scope.session.plans.values())


@pytest.mark.usefixtures("hook")
def test_a_graph_that_breaks_inside_the_module() -> None:
    """The rest of the module's forward then runs uncompiled or in a graph of its own."""

    class Broken(Compiled):
        fullgraph = False

    outcome = Broken(override("sdpa_math", breaks_the_graph))
    close(outcome.outputs, outcome.expected())
    assert counters["graph_break"], "the test is about a graph that breaks"
    assert outcome.rows == [(role, "sdpa_math", 1) for role in ROLES]


@pytest.mark.usefixtures("hook")
def test_threads_share_a_graph() -> None:
    """As with several devices: each thread's calls go by its own configuration, and into its own account."""
    model = stand_in(["WanModel"], PLACES)
    module = model.get_submodule("blocks.0.self_attn")
    module.compile(backend="eager", fullgraph=True)
    found = {}

    def work(backend: str) -> None:
        ours = override(backend)
        run = sampling.Run(ours)
        options = {sampling.KEY: ours, sampling.OVERRIDE: ours, sampling.RUN_KEY: run}
        for _ in range(40):
            model_call(model, options, lambda: module([((Q, Q, Q, HEADS), {"transformer_options": options})]))
        run.close()
        found[backend] = [(row.role, row.backend, row.calls) for row in run.run_report.rows.values()]

    work("sdpa_math")
    backends = ("sdpa_math", "torch_sdpa", "reference")
    threads = [threading.Thread(target=work, args=(backend,)) for backend in backends]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {backend: [("self", backend, 40)] for backend in backends}
    assert marks_left(model) == []
    assert graphs() == 1


@pytest.mark.usefixtures("hook")
def test_outside_a_model_call() -> None:
    """A program that calls a compiled model by itself: what was asked for holds all the same."""
    ours = override("torch_sdpa", cross="reference")
    attention = torch.compile(lambda q, k: ours(exact, q, k, k, 2), backend="eager", fullgraph=True)
    close([attention(Q, Q), attention(Q, Q[:, :4])], [exact(Q, Q, Q, 2), exact(Q, Q[:, :4], Q[:, :4], 2)])
    run_report = nodes_module("hook.override")._outside_runs[ours].run_report
    assert [(row.role, row.backend, row.calls) for row in run_report.rows.values()] == [
        ("self", "torch_sdpa", 1),
        ("cross", "reference", 1),
    ]
