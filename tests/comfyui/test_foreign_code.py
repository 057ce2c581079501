"""A mask's plan is kept from block to block only where no other pack's code runs between them.

Each way that another pack has to run code inside a model call writes into a mask between blocks, in real tiny models
of ComfyUI; the picture must be what it is without our node. With our node alone each mask is read once.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import tiny_sampling  # noqa: E402
from hook_side import masks, nodes_module, plain_comfyui, selected, wrappers  # noqa: E402
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook  # noqa: E402

foreign_code = nodes_module("hook.foreign_code")


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    plain_comfyui(monkeypatch)


# Writing into a mask between blocks

FAMILIES = {
    "hunyuan_video": ("attn_mask", "double_blocks", "DoubleStreamBlock", "comfy.ldm.hunyuan_video.model"),
    "qwen_image_masked": (
        "encoder_hidden_states_mask",
        "transformer_blocks",
        "QwenImageTransformerBlock",
        "comfy.ldm.qwen_image.model",
    ),
}
"""For each family the local variable with the mask, or with what each block makes one from; its blocks; their class."""
MADE: list[int] = []


def write(name: str) -> None:
    """Hide one more key in the mask of the model call that is running, which is found on the stack."""
    frame = sys._getframe(1)
    while frame is not None:
        mask = frame.f_locals.get(name)
        if isinstance(mask, torch.Tensor) and mask.is_floating_point():
            shown = (mask.flatten(0, -2)[0] == 0).nonzero().flatten()
            mask[..., int(shown[0])] = torch.finfo(mask.dtype).min
            MADE.append(1)
            return
        frame = frame.f_back


class Around(torch.nn.Module):
    """A module that another pack puts in place of a block."""

    def __init__(self, block: torch.nn.Module, write: Callable[[], None]) -> None:
        super().__init__()
        self.block, self.write = block, write

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.write()
        return self.block(*args, **kwargs)


class Forward:
    """A callable object in place of a forward."""

    def __init__(self, forward: Callable[..., Any], write: Callable[[], None]) -> None:
        self.forward, self.write = forward, write

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.write()
        return self.forward(*args, **kwargs)


class Means:
    """What one way of having code run between blocks needs: the model, its last block, and what to run."""

    def __init__(self, patcher: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        local, self.blocks, self.class_name, self.module = FAMILIES[name]
        self.patcher, self.monkeypatch = patcher, monkeypatch
        self.write = functools.partial(write, local)
        self.diffusion_model = patcher.model.diffusion_model
        self.block = getattr(self.diffusion_model, self.blocks)[-1]
        self.path = f"diffusion_model.{self.blocks}.{len(getattr(self.diffusion_model, self.blocks)) - 1}"
        self.ends: list[Callable[[], None]] = []

    def before(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def writing(*args: Any, **kwargs: Any) -> Any:
            self.write()
            return forward(*args, **kwargs)

        return writing

    def patched(self, run: Callable[[], Any]) -> Any:
        """Run something while the block's forward is replaced, and put it back."""
        self.block.forward = self.before(self.block.forward)
        try:
            return run()
        finally:
            del self.block.forward


def object_patch(means: Means) -> None:
    means.patcher.add_object_patch(f"{means.path}.forward", means.before(means.block.forward))


def object_patch_of_an_attention(means: Means) -> None:
    """Of a module that our own mark stands on too."""
    name = "attn" if hasattr(means.block, "attn") else "img_attn.norm"
    module = means.block.get_submodule(name)
    means.patcher.add_object_patch(f"{means.path}.{name}.forward", means.before(module.forward))


def callable_object(means: Means) -> None:
    means.patcher.add_object_patch(f"{means.path}.forward", Forward(means.block.forward, means.write))


def forward_that_looks_like_the_models_own(means: Means) -> None:
    forward = functools.wraps(means.block.forward)(means.before(means.block.forward))
    means.patcher.add_object_patch(f"{means.path}.forward", forward)


def forward_under_a_decorator_of_torch(means: Means) -> None:
    means.patcher.add_object_patch(f"{means.path}.forward", torch.no_grad()(means.before(means.block.forward)))


def partial_forward(means: Means) -> None:
    def writing(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        means.write()
        return forward(*args, **kwargs)

    means.patcher.add_object_patch(f"{means.path}.forward", functools.partial(writing, means.block.forward))


def replaced_module(means: Means) -> None:
    means.patcher.add_object_patch(means.path, Around(means.block, means.write))


def class_patch(means: Means) -> None:
    kind = getattr(sys.modules[means.module], means.class_name, None) or type(means.block)
    block, forward = means.block, kind.forward

    def writing(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self is block:
            means.write()
        return forward(self, *args, **kwargs)

    means.monkeypatch.setattr(kind, "forward", writing)


def class_patch_of_a_base(means: Means) -> None:
    """Every module's call goes through torch's own method."""
    block, call = means.block, torch.nn.Module.__call__

    def writing(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self is block:
            means.write()
        return call(self, *args, **kwargs)

    means.monkeypatch.setattr(torch.nn.Module, "__call__", writing)


def pre_hook(means: Means) -> None:
    means.ends.append(means.block.register_forward_pre_hook(lambda *args: means.write()).remove)


def pre_hook_with_kwargs(means: Means) -> None:
    hook = means.block.register_forward_pre_hook(lambda module, args, kwargs: means.write(), with_kwargs=True)
    means.ends.append(hook.remove)


def hook_after_the_first_block(means: Means) -> None:
    first = getattr(means.diffusion_model, means.blocks)[0]
    means.ends.append(first.register_forward_hook(lambda *args: means.write()).remove)


def global_pre_hook(means: Means) -> None:
    hook = register_module_forward_pre_hook(lambda module, args: means.write() if module is means.block else None)
    means.ends.append(hook.remove)


def global_hook(means: Means) -> None:
    first = getattr(means.diffusion_model, means.blocks)[0]
    hook = register_module_forward_hook(lambda module, args, output: means.write() if module is first else None)
    means.ends.append(hook.remove)


def _wrapper(means: Means, kind: str) -> None:
    def wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
        return means.patched(lambda: executor(*args, **kwargs))

    means.patcher.add_wrapper_with_key(kind, "another", wrapper)


def diffusion_model_wrapper(means: Means) -> None:
    _wrapper(means, "diffusion_model")


def apply_model_wrapper(means: Means) -> None:
    _wrapper(means, "apply_model")


def model_function_wrapper(means: Means) -> None:
    """Only at the second step, when the model was looked through already."""
    calls: list[int] = []

    def around(apply_model: Callable[..., Any], given: dict[str, Any]) -> Any:
        calls.append(1)
        run = functools.partial(apply_model, given["input"], given["timestep"], **given["c"])
        return means.patched(run) if len(calls) > 1 else run()

    means.patcher.set_model_unet_function_wrapper(around)


def sampler_wrapper_that_patches_later(means: Means) -> None:
    """The first model call finds nothing; the hook comes with the second step."""
    calls: list[int] = []

    def wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return means.patched(lambda: executor(*args, **kwargs)) if len(calls) > 1 else executor(*args, **kwargs)

    means.patcher.add_wrapper_with_key("predict_noise", "another", wrapper)


def sampler_wrapper_that_hooks_later(means: Means) -> None:
    def wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
        output = executor(*args, **kwargs)
        pre_hook(means)
        return output

    means.patcher.add_wrapper_with_key("predict_noise", "another", wrapper)


def callback_that_hooks(means: Means) -> None:
    means.patcher.add_callback_with_key("on_pre_run", "another", lambda patcher: pre_hook(means))


def mode_of_torch(means: Means) -> None:
    from torch.overrides import TorchFunctionMode

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.nn.functional.gelu:
                with torch._C.DisableTorchFunction():
                    means.write()
            return func(*args, **(kwargs or {}))

    def wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
        with Mode():
            return executor(*args, **kwargs)

    means.patcher.add_wrapper_with_key("outer_sample", "another", wrapper)


def replaced_function(means: Means) -> None:
    """A function that the model's own module calls by its name."""
    if means.module == "comfy.ldm.qwen_image.model":
        target, name = sys.modules[means.module], "apply_rope1"
    else:
        target, name = sys.modules["comfy.ldm.flux.layers"], "apply_mod"
    means.monkeypatch.setattr(target, name, means.before(getattr(target, name)))


def replaced_method(means: Means) -> None:
    """Not `forward`, but what `forward` of the model calls."""
    name = "forward_orig" if hasattr(means.diffusion_model, "forward_orig") else "process_img"
    inner = getattr(means.diffusion_model, name)

    def hooking(*args: Any, **kwargs: Any) -> Any:
        if not means.ends:
            pre_hook(means)
        return inner(*args, **kwargs)

    means.patcher.add_object_patch(f"diffusion_model.{name}", hooking)


MEANS = (
    *(object_patch, object_patch_of_an_attention, callable_object, forward_that_looks_like_the_models_own),
    *(forward_under_a_decorator_of_torch, partial_forward, replaced_module, class_patch, class_patch_of_a_base),
    *(pre_hook, pre_hook_with_kwargs, hook_after_the_first_block, global_pre_hook, global_hook),
    *(diffusion_model_wrapper, apply_model_wrapper, model_function_wrapper, sampler_wrapper_that_patches_later),
    *(sampler_wrapper_that_hooks_later, callback_that_hooks, mode_of_torch, replaced_function, replaced_method),
)


@pytest.fixture(scope="module")
def built() -> Iterator[dict[str, Any]]:
    """Models that were built, and pictures that were made without anybody's code."""
    found: dict[str, Any] = {}
    yield found
    found.clear()  # ComfyUI's patchers do not like to be forgotten only when the process ends


def model_of(name: str, built: dict[str, Any]) -> Any:
    if name not in built:
        built[name] = tiny_sampling.build(name)
    return built[name].clone()


def sampled(patcher: Any, name: str, means: Callable[[Means], None] | None, monkeypatch: pytest.MonkeyPatch) -> Any:
    """One run with another pack's code in the model, which is gone again afterwards."""
    MADE.clear()
    with monkeypatch.context() as patch:
        used = Means(patcher, name, patch)
        if means is not None:
            means(used)
        try:
            return tiny_sampling.sample(patcher, name)
        finally:
            for end in used.ends:
                end()
            patcher.unpatch_model()
            for module in used.diffusion_model.modules():  # ComfyUI leaves the bound method where a patch was
                for attribute in ("forward", "forward_orig", "process_img"):
                    module.__dict__.pop(attribute, None)


QUICK = (object_patch_of_an_attention, class_patch, pre_hook, sampler_wrapper_that_patches_later, replaced_function)
"""What the normal run tries on Qwen-Image too, whose plans are kept under what its masks are made from."""


@pytest.mark.parametrize(
    ("name", "means"),
    [
        *(pytest.param("hunyuan_video", means, id=f"hunyuan-{means.__name__}") for means in MEANS),
        *(
            pytest.param(
                *("qwen_image_masked", means),
                id=f"qwen-{means.__name__}",
                marks=[] if means in QUICK else pytest.mark.slow,
            )
            for means in MEANS
        ),
    ],
)
def test_a_mask_that_another_pack_writes_into_is_read_again(
    name: str, means: Callable[[Means], None], built: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = sampled(model_of(name, built), name, means, monkeypatch)
    assert MADE, "nothing was written, so this proves nothing"
    if f"{name} alone" not in built:
        built[f"{name} alone"] = sampled(model_of(name, built), name, None, monkeypatch)
    effect = float((stock - built[f"{name} alone"]).abs().max())
    ours = sampled(selected(model_of(name, built), "torch_sdpa"), name, means, monkeypatch)
    assert MADE
    assert float((stock - ours).abs().max()) <= min(2e-5, effect / 10), effect


# A plain graph keeps its plans


@pytest.mark.parametrize(("name", "inspections"), [("qwen_image_masked", 2), ("hunyuan_video", 4), ("wan", 0)])
def test_with_our_nodes_alone_each_mask_is_read_once_in_a_model_call(
    name: str, inspections: int, built: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps: Qwen-Image has one mask, HunyuanVideo that of its text and that of its blocks; Wan has none."""
    read: list[int] = []
    inspect, guarded, reasons = masks.inspect, wrappers._guarded, []

    def counted(*given: Any) -> Any:
        read.append(1)
        return inspect(*given)

    def run(model_call: Any, *given: Any) -> Any:
        output = guarded(model_call, *given)
        reasons.append(model_call._masks_not_kept())
        return output

    monkeypatch.setattr(masks, "inspect", counted)
    monkeypatch.setattr(wrappers, "_guarded", run)
    tiny_sampling.sample(selected(model_of(name, built), "torch_sdpa"), name)
    assert (len(read), set(reasons)) == (inspections, {""})


def test_a_model_is_looked_through_once_in_a_run(built: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    look = foreign_code.ForeignCode._look
    monkeypatch.setattr(foreign_code.ForeignCode, "_look", lambda self: looks.append(1) or look(self))
    tiny_sampling.sample(selected(model_of("qwen_image_masked", built), "torch_sdpa"), "qwen_image_masked", steps=6)
    assert looks == [1]
    tiny_sampling.sample(selected(model_of("wan", built), "torch_sdpa"), "wan", steps=2)
    assert looks == [1], "without a mask nobody asks"


def test_comfyuis_own_code_is_not_another_packs() -> None:
    from comfy.patcher_extension import WrappersMP
    from comfy_extras import nodes_easycache

    options = {"wrappers": {WrappersMP.DIFFUSION_MODEL: {"easycache": [nodes_easycache.easycache_forward_wrapper]}}}
    assert foreign_code.in_a_call(options) == ""
    options["wrappers"][WrappersMP.DIFFUSION_MODEL]["other"] = [lambda executor: executor()]
    assert foreign_code.in_a_call(options).startswith(f"a wrapper ({__name__}.")


@pytest.mark.parametrize(
    ("module", "package"),
    [
        ("comfy.ldm.wan.model", "comfy"),
        ("/home/me.you/ComfyUI/comfy_extras/nodes_easycache", "comfy_extras"),
        (r"C:\ComfyUI\comfy_extras\nodes_easycache", "comfy_extras"),
        ("/home/me/ComfyUI/custom_nodes/comfy_extras.nodes", "custom_nodes/comfy_extras"),
        ("/home/me/ComfyUI/custom_nodes/comfy", "custom_nodes/comfy"),
        ("/home/me_x_you/ComfyUI/custom_nodes/pack.part.other", "custom_nodes/pack"),
        (r"C:\ComfyUI\custom_nodes\pack.part", "custom_nodes/pack"),
        ("pack.part", "pack"),
    ],
)
def test_packages_are_told_by_the_names_that_comfyui_gives_modules(module: str, package: str) -> None:
    assert foreign_code.package_of(module) == package


def test_another_packs_layers_hold_weights_and_see_no_mask() -> None:
    """Quantised weights come with classes of their own for linear layers; a replaced forward on one counts."""
    layer = type("Quantised", (torch.nn.Linear,), {"forward": lambda self, rows: rows})
    comfys = type("Model", (torch.nn.Module,), {"__module__": "comfy.ldm.wan.model"})
    model = comfys()
    model.add_module("linear", layer(2, 2))
    code = foreign_code.ForeignCode(model)
    assert code.found() == ""
    model.linear.forward = lambda rows: rows
    assert code.found().startswith(f"forward of linear ({__name__}.")
    del model.linear.forward
    assert code.found() == ""
    model.linear.add_module("inner", torch.nn.Identity())
    assert code.found() == f"the module linear ({__name__}.Quantised)"


@pytest.mark.parametrize("name", ["__compiled_fn_1_9c23a0ab", "__resume_at_24_3", "attention"])
def test_what_the_compiler_adds_to_a_module_is_not_another_packs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import comfy.ldm.wan.model as wan_model

    monkeypatch.setattr(wan_model, name, lambda *args: None, raising=False)
    found = foreign_code.ForeignCode(tiny_sampling.build("wan").model.diffusion_model).found()
    assert bool(found) == (name == "attention"), found


@pytest.mark.parametrize("name", sorted(tiny_sampling.FAMILIES))
def test_no_family_of_comfyui_has_another_packs_code(name: str) -> None:
    if tiny_sampling.unavailable(name):
        return  # an older ComfyUI
    assert foreign_code.ForeignCode(tiny_sampling.build(name).model.diffusion_model).found() == ""


def test_a_mask_that_was_written_to_where_torch_counts_is_read_again() -> None:
    """Outside inference mode a tensor knows how often it was written to, whoever did it."""
    run = SimpleNamespace(note=lambda text: None, asks_for_sparse=False)
    kept = masks.Masks(run, lambda: "")
    mask = torch.zeros(1, 1, 1, 8)
    assert kept.plan(mask, None, 8).strategy == "nothing hidden"
    mask[..., 6:] = -torch.inf
    assert kept.plan(mask, None, 8).strategy == "trimmed"
    source = torch.zeros(1, 8)
    assert kept.plan(mask.clone(), source, 8).strategy == "trimmed"
    source += 1
    assert kept.plan(torch.zeros(1, 1, 1, 8), source, 8).strategy == "nothing hidden"
