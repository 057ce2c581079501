"""Roles and blocks come from the module that makes a call, however it makes it.

By its own function or one that it is handed, from `forward` or another method, through what it holds or a base class.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import inspect
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import tiny_sampling  # noqa: E402
from attention_backends.backends.engine.plan import Plan  # noqa: E402
from expected_roles import expected_block  # noqa: E402
from hook_side import (  # noqa: E402
    HEADS,
    compiled,
    exact,
    marks_left,
    model_call,
    nodes_module,
    optimized_attention,
    override,
    plain_comfyui,
    rows,
    sampling,
    sites,
)
from tiny_forwards import FORWARDS, Forward  # noqa: E402

callers, roles, hook_calls = (nodes_module(f"hook.{name}") for name in ("callers", "roles", "hook_calls"))


def attention_of(options: Any) -> Callable[..., torch.Tensor]:
    """An attention function that the model makes for its blocks: a call for each stretch of the query."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
        parts = [
            optimized_attention(q[:, s], k, v, heads, transformer_options=options) for s in (slice(2), slice(2, 6))
        ]
        return torch.cat(parts, dim=1)

    return attend


class Base(torch.nn.Module):
    def forward(self, x: torch.Tensor, options: Any) -> torch.Tensor:
        return optimized_attention(x, x, x, HEADS, transformer_options=options)


class Inherited(Base):
    def forward(self, x: torch.Tensor, options: Any) -> torch.Tensor:
        return super().forward(x, options) + 1


class Handed(torch.nn.Module):
    def forward(self, x: torch.Tensor, options: Any) -> torch.Tensor:
        return self.inner(x, attention_of(options))

    def inner(self, x: torch.Tensor, attend: Any) -> torch.Tensor:
        return attend(x, x, x, HEADS)


class HandedByName(torch.nn.Module):
    """Nothing in its code says that `fn` is attention."""

    def forward(self, x: torch.Tensor, options: Any) -> torch.Tensor:
        return options["table"]["fn"](q=x, k=x, v=x, heads=HEADS)


class Holds(torch.nn.Module):
    def __init__(self, how: Any) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: torch.Tensor, options: Any) -> torch.Tensor:
        return self.how(x, x, x, HEADS, transformer_options=options)


class Processor:
    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.attend(*args, **kwargs)

    def attend(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return optimized_attention(*args, **kwargs)


class OtherMethod(torch.nn.Module):
    def attend_pose(self, x: torch.Tensor, options: Any) -> torch.Tensor:
        return self.helper(x, options)

    def attend_all(self, x: torch.Tensor, options: Any) -> torch.Tensor:
        return self.helper(x, options)

    def helper(self, x: torch.Tensor, options: Any) -> torch.Tensor:
        return optimized_attention(x[:, :2], x, x, HEADS, transformer_options=options)


class Block(torch.nn.Module):
    """A block that makes a call of its own, and has an attention module within."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.self_attn = inner

    def forward(self, x: torch.Tensor, options: Any) -> torch.Tensor:
        inner = self.self_attn
        if isinstance(inner, OtherMethod):
            return torch.cat([inner.attend_pose(x, options), inner.attend_all(x, options)])
        y: torch.Tensor = inner(x, options)
        return y


class WanModel(torch.nn.Module):  # named as ComfyUI's, so that the role table knows it
    def __init__(self, make: Callable[[], torch.nn.Module]) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([Block(make()), Block(make())])

    def forward(self, x: torch.Tensor, options: Any) -> list[torch.Tensor]:
        options = {**options, "table": {"fn": attention_of(options)}}
        return [block(x, options) for block in self.blocks]


KINDS: dict[str, Callable[[], torch.nn.Module]] = {
    "own function": Base,
    "base class": Inherited,
    "handed": Handed,
    "handed in a table, by name": HandedByName,
    "held function": lambda: Holds(optimized_attention),
    "held partial": lambda: Holds(functools.partial(optimized_attention)),
    "held processor": lambda: Holds(Processor()),
    "other methods": OtherMethod,
}


def attention_calls(model: torch.nn.Module, x: torch.Tensor, times: int = 2) -> tuple[Counter[tuple[str, str]], Any]:
    """(role, block) of every call in so many model calls of one run, and the run."""
    ours = override("sdpa_math", strict=True)
    run = sampling.Run(ours)
    options = {sampling.KEY: ours, sampling.OVERRIDE: ours, sampling.RUN_KEY: run}
    seen: Counter[tuple[str, str]] = Counter()
    for _ in range(times):
        model_call(model, options, lambda: model(x, options))
    run.close()
    for row in run.run_report.rows.values():
        seen[row.role, row.block] += row.calls
    return seen, run


@pytest.mark.parametrize("kind", KINDS)
def test_every_call_has_the_role_and_block_of_the_module_that_makes_it(kind: str) -> None:
    callers._learnt.clear()
    model = WanModel(KINDS[kind])
    seen, run = attention_calls(model, rows(6))
    calls = 2 * (2 if "handed" in kind or kind == "other methods" else 1)
    assert seen == {("self", "blocks.0"): calls, ("self", "blocks.1"): calls}
    assert list(run.run_report.notes) == []
    assert marks_left(model) == []
    assert not any({"attend_pose", "attend_all"} & module.__dict__.keys() for module in model.modules())


def test_what_a_call_has_shown_is_marked_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stack is looked at while a kind of call is planned, not at every call."""
    looks: list[int] = []
    look = callers.caller
    monkeypatch.setattr(callers, "caller", lambda: looks.append(1) or look())
    callers._learnt.clear()
    model = WanModel(HandedByName)
    attention_calls(model, rows(6), times=1)
    first = len(looks)
    attention_calls(model, rows(6), times=9)
    assert len(looks) <= 2 * first


class TakesFromAnotherPack(torch.nn.Module):
    """Its attention is replaced by a function of another pack, which makes the call in its stead."""

    def forward(self, x: torch.Tensor, options: Any) -> torch.Tensor:
        y: torch.Tensor = options["patch"](x, options)
        return y


def test_a_function_of_another_pack_is_not_the_modules_own() -> None:
    callers._learnt.clear()
    code = "def patch(x, options):\n    return attend(x, x, x, heads, transformer_options=options)\n"
    pack: dict[str, Any] = {"__name__": "some_pack.nodes", "attend": optimized_attention, "heads": HEADS}
    exec(code, pack)  # noqa: S102  # a function whose globals are another package's
    model = WanModel(TakesFromAnotherPack)
    ours = override("sdpa_math", strict=True)
    run = sampling.Run(ours)
    options = {sampling.KEY: ours, sampling.OVERRIDE: ours, sampling.RUN_KEY: run, "patch": pack["patch"]}
    model_call(model, options, lambda: model(rows(6), options))
    run.close()
    assert TakesFromAnotherPack not in callers._learnt
    assert {row.block for row in run.run_report.rows.values()} == {""}


def test_looking_keeps_no_tensor_alive() -> None:
    import weakref

    gone: list[bool] = []

    class Lets(torch.nn.Module):
        def forward(self, x: torch.Tensor, options: Any) -> torch.Tensor:
            q = x + 1
            watched = weakref.ref(q)
            y = options["table"]["fn"](q, x, x, HEADS)
            del q
            gone.append(watched() is None)
            return y  # type: ignore[no-any-return]

    attention_calls(WanModel(Lets), rows(6), times=1)
    assert gone == [True, True]


class QwenImage21Transformer2DModel(torch.nn.Module):
    """As its blocks are: the model hands each the function that makes a call for the text and one for the picture."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer_blocks = torch.nn.ModuleList(torch.nn.ModuleDict({"attn": Handed()}) for _ in range(2))

    def forward(self, x: torch.Tensor, options: Any) -> list[torch.Tensor]:
        return [block["attn"](x, options) for block in self.transformer_blocks]


def test_qwen_image_21_is_joint_attention_throughout() -> None:
    seen, run = attention_calls(QwenImage21Transformer2DModel(), rows(6))
    assert seen == {("joint", "transformer_blocks.0"): 4, ("joint", "transformer_blocks.1"): 4}
    assert list(run.run_report.notes) == []


def test_in_a_compiled_graph_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """There no stack can be looked at: what code shows is all."""
    monkeypatch.setattr(compiled, "comfys_attention", lambda: exact)
    torch._dynamo.reset()
    model = WanModel(Handed)
    model.blocks[1] = Block(OtherMethod())
    graph = torch.compile(model, backend="eager")
    ours = override("sdpa_math", strict=True)
    run = sampling.Run(ours)
    options = {sampling.KEY: ours, sampling.OVERRIDE: ours, sampling.RUN_KEY: run}
    model_call(model, options, lambda: graph(rows(6), {sampling.OVERRIDE: ours}))
    run.close()
    assert {(row.role, row.block): row.calls for row in run.run_report.rows.values()} == {
        ("self", "blocks.0"): 2,
        ("self", "blocks.1"): 2,
    }


def test_another_method_alone_is_marked_and_its_helper_is_not() -> None:
    assert callers.calling_methods(OtherMethod()) == ("attend_pose", "attend_all")
    assert callers.calling_methods(Handed()) == ("forward",)
    assert callers.calling_methods(torch.nn.Linear(2, 2)) == ()
    assert callers.calling_methods(Block(Base())) == ()


class KeepsAFunction(torch.nn.Module):
    """As ComfyUI's ComfyAttention, which notes at loading which function the checkpoint prefers and calls none."""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.function = optimized_attention
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.function = optimized_attention
        return super()._apply(*args, **kwargs)

    def train(self, mode: bool = True) -> Any:
        self.function = optimized_attention
        return super().train(mode)


class KeepsAndCalls(KeepsAFunction):
    def forward(self, x: torch.Tensor, options: Any) -> torch.Tensor:
        return optimized_attention(x, x, x, HEADS, transformer_options=options)


def test_what_torch_calls_for_loading_and_moving_makes_no_attention_calls() -> None:
    assert callers.calling_methods(KeepsAFunction()) == ()
    assert callers.calling_methods(KeepsAndCalls()) == ("forward",)


# ---- a real ComfyUI


@pytest.fixture(scope="module")
def comfy() -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        plain_comfyui(patch)
        import comfy

        yield Path(next(iter(comfy.__path__)))


def built(row: Forward) -> torch.nn.Module:
    import comfy.ops

    module, name = row.place.split(":")
    try:
        kind = getattr(importlib.import_module(f"comfy.ldm.{module}"), name)
    except (ImportError, AttributeError):
        pytest.skip(f"this ComfyUI has no {row.place}")
    model = kind(**row.build, device="cpu", dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    tiny_sampling._fill(model, 0)
    for buffer in row.stored:
        model.get_buffer(buffer).copy_(torch.linspace(1, 0.1, len(model.get_buffer(buffer))))
    return model  # type: ignore[no-any-return]


@pytest.mark.comfy
@pytest.mark.parametrize("name", FORWARDS)
def test_families_that_are_not_sampled_have_their_roles_and_blocks(
    comfy: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = FORWARDS[name]
    model = built(row)
    ours = override("torch_sdpa", strict=True)
    run = sampling.Run(ours)
    seen: Counter[tuple[str, str]] = Counter()
    paths: list[str] = []
    compute = Plan.compute

    def watched(plan: Plan, call: Any) -> Any:
        found = callers.caller().module
        path = next(path for path, module in model.named_modules() if module is found)
        expected = next(role for pattern, role in row.roles.items() if re.fullmatch(pattern, path))
        assert plan.row.role in expected.split("|"), path
        assert plan.row.block == expected_block(path), path
        paths.append(path)
        seen[plan.row.role, plan.row.block] += 1
        return compute(plan, call)

    monkeypatch.setattr(Plan, "compute", watched)

    def once(options: dict[str, Any]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        given = row.call(lambda *shape: torch.randn(*shape, generator=generator))
        given["transformer_options"] = options
        out = model_call(model, options, lambda: model(**given)) if options else None
        if out is None:
            with torch.inference_mode():
                out = model(**given)
        return out[0] if isinstance(out, list | tuple) else out  # type: ignore[no-any-return]

    if hasattr(model, "clear_kv_cache"):
        model.clear_kv_cache()
    stock = once({})
    if hasattr(model, "clear_kv_cache"):
        model.clear_kv_cache()
    options = {sampling.KEY: ours, sampling.OVERRIDE: ours, sampling.RUN_KEY: run}
    result = once(options)
    run.close()
    torch.testing.assert_close(result, stock, rtol=0, atol=1e-5 * float(stock.abs().max()))
    assert sum(seen.values()) == row.calls
    assert {pattern for pattern in row.roles if any(re.fullmatch(pattern, path) for path in paths)} == set(row.roles)
    assert [note for note in run.run_report.notes if "guessed" in note] == []
    assert marks_left(model) == []


NOT_MARKED = {
    "a VAE": ("*/vae*.py", "*/vae/*", "*_vae.py", "modules/diffusionmodules/model.py", "cosmos/cosmos_tokenizer/*"),
    "a text encoder or a part of one, which runs before sampling": ("minimax_music/ar.py",),
    "a model that no sampler calls": ("sam3/*", "rt_detr/*", "depth_anything_3/*", "supir/*"),
    "ComfyUI's functions themselves": ("modules/attention.py",),
}
"""Files of `comfy.ldm` whose callers no marker has to cover, and why."""


def attention_callers(folder: Path) -> Iterator[tuple[str, str, bool]]:
    """(file, class or function, whether options go with it) of everything in a folder that calls ComfyUI's attention.

    Read from the source by name, without looking at how the pack finds them.
    """
    for file, source in sources(folder).items():
        for node in ast.parse(source).body if "optimized_attention" in source else ():
            for call in ast.walk(node):
                if isinstance(call, ast.Call):
                    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
                    if name.startswith("optimized_attention"):
                        passes = any(keyword.arg in ("transformer_options", None) for keyword in call.keywords)
                        yield file, getattr(node, "name", "?"), passes


@functools.cache
def sources(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.py"))
    }


def is_exempt(file: str) -> bool:
    return any(Path(file).match(pattern) for patterns in NOT_MARKED.values() for pattern in patterns)


def users_of(folder: Path, file: str, function: str) -> set[tuple[str, str]]:
    """Classes in a folder that use a function of one of its files: by import, or in the file itself."""
    found: set[tuple[str, str]] = set()
    imported = re.compile(rf"from [\w.]*\b{Path(file).stem} import [^\n]*\b{function}\b")
    for other, source in sources(folder).items():
        if is_exempt(other) or not (other == file or imported.search(source)):
            continue
        for node in ast.parse(source).body:
            if function not in {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}:
                continue
            if isinstance(node, ast.ClassDef):
                found.add((other, node.name))
            elif isinstance(node, ast.FunctionDef) and node.name != function:
                found |= users_of(folder, other, node.name)
    return found


@pytest.mark.comfy
def test_every_caller_in_comfyuis_models_is_covered_by_a_marker(comfy: Path) -> None:
    folder = comfy / "ldm"
    places: set[tuple[str, str]] = set()
    for file, name, passes in attention_callers(folder):
        if is_exempt(file):
            continue
        module = importlib.import_module("comfy.ldm." + file.removesuffix(".py").replace("/", "."))
        if isinstance(getattr(module, name, None), type):
            places.add((file, name))
        elif passes:
            users = users_of(folder, file, name)
            assert users, f"nothing in comfy.ldm uses {name} of {file}"
            places |= users
    uncovered = []
    for file, name in sorted(places):
        module = importlib.import_module("comfy.ldm." + file.removesuffix(".py").replace("/", "."))
        kind = getattr(module, name)
        if issubclass(kind, torch.nn.Module) and not callers.calling_methods(empty(kind)):
            uncovered.append((file, name))
    assert {place for place in uncovered if place not in COVERED_OTHERWISE} == set()
    assert len(places) > 30


COVERED_OTHERWISE = {
    ("cosmos/predict2.py", "Attention"): "holds its function, as `held function` above; tiny_models.py has two of it",
    ("hidream_o1/model.py", "HiDreamO1Transformer"): "hands its function to the blocks, which are marked",
}


def empty(kind: type[torch.nn.Module]) -> torch.nn.Module:
    module = object.__new__(kind)
    torch.nn.Module.__init__(module)
    return module


COUNTS = ("depth", "layers", "n_layers", "num_blocks", "num_layers", "patch_depth", "pixel_depth", "vace_layers")
"""What ComfyUI's models call the number of their blocks."""


@pytest.mark.comfy
def test_every_diffusion_model_is_known_with_the_roles_of_its_modules(comfy: Path) -> None:
    """Of each class that `model_base` samples: on the meta device, where it can be built without a file."""
    unknown = []
    sizes = []
    for kind in diffusion_models(comfy):
        names = sites.family_of_model(empty(kind))
        if names is None:
            unknown.append(kind.__name__)
            continue
        import comfy.ops

        few = {name: 2 for name in inspect.signature(kind).parameters if name in COUNTS}
        with contextlib.suppress(Exception):  # wants dimensions: those are in tiny_models.py
            model = kind(**few, device="meta", dtype=torch.float16, operations=comfy.ops.disable_weight_init)
            sizes.append(kind)
            unknown += unknown_places(model, names)
    assert sorted(set(unknown)) == []
    assert len(sizes) > 20


def unknown_places(model: torch.nn.Module, family: Any) -> Iterator[str]:
    """Modules of a model that make attention calls and of which the role table says nothing."""
    for path, module in model.named_modules():
        if not path or not family.roles_at_paths or BEYOND_THE_HOOK.search(path) or not callers.calling_methods(module):
            continue
        if not roles.roles_at(family, path, type(module).__name__):
            yield f"{type(model).__name__}:{re.sub(r'[0-9]+', 'N', path)}"


BEYOND_THE_HOOK = re.compile(
    r"joint_blocks\.\d+\.(context_block|x_block).*"  # SD3: its joint block computes with their tensors
    r"|(audio|video)_embeddings_connector\..*"  # LTX-2: before sampling
    r"|face_adapter\..*|audio_injector\..*|music_(injector|encoder)\..*"  # Wan: no options go with their calls
    r"|visual(\..*)?|language_model"  # HiDream-O1: the vision model, and what hands the function on
)
"""Modules of known families whose attention does not reach the hook."""


def diffusion_models(comfy: Path) -> list[type[torch.nn.Module]]:
    import comfy.model_base as model_base

    source = ast.parse((comfy / "model_base.py").read_text(encoding="utf-8"))
    found: list[Any] = []
    for node in ast.walk(source):
        values = [node.value] if isinstance(node, ast.keyword) and node.arg == "unet_model" else []
        if isinstance(node, ast.arguments):
            with_default = node.args[len(node.args) - len(node.defaults) :]
            values += [d for a, d in zip(with_default, node.defaults, strict=True) if a.arg == "unet_model"]
        for value in values:
            text = ast.unparse(value)
            if text != "unet_model":
                found.append(operator.attrgetter(text)(model_base))
    return list(dict.fromkeys(found))
