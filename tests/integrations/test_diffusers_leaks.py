"""Nothing leaks: threads, nested blocks, exceptions, reset, copies of a model, and models that were never chosen.

Each is a fault of Diffusers' own interface (huggingface/diffusers#14249), or one that a process-wide patch would have.
"""

from __future__ import annotations

import copy
import functools
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import tiny_diffusers as tiny
import torch
from attention_backends.backends.config.names import UnknownBackendError
from attention_backends.backends.values.errors import ConfigError, NoBackendError
from attention_backends.integrations.diffusers import Applied, apply, attention_backend, report, reset
from test_diffusers_models import assert_same_state, registry, state


def ran(applied: Applied) -> set[str]:
    """The backends that computed calls of the latest run."""
    return {row.backend for one in applied.reports.values() for row in one.rows.values() if row.calls}


def calls(applied: Applied) -> int:
    return sum(one.calls for one in applied.reports.values())


def test_two_models_in_two_threads_keep_their_backends() -> None:
    (one, given), (other, _) = tiny.flux(), tiny.flux()
    expected = tiny.forward(one, given)
    chosen = {"torch_sdpa": apply(one, "torch_sdpa"), "sdpa_math": apply(other, "sdpa_math")}
    start, results = threading.Barrier(2), {}

    def work(name: str, model: Any) -> None:
        start.wait()
        results[name] = [tiny.forward(model, given) for _ in range(4)]

    threads = [
        threading.Thread(target=work, args=(name, model)) for name, model in zip(chosen, (one, other), strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(output[0], expected[0]) for output in results["torch_sdpa"])
    for name, applied in chosen.items():
        assert ran(applied) == {name}
        assert calls(applied) == 16
        applied.reset()


def test_one_model_in_two_threads_counts_every_call() -> None:
    model, given = tiny.flux()
    applied = apply(model, "sdpa_math")
    threads = [threading.Thread(target=tiny.forward, args=(model, given)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls(applied) == 12
    reset(model)


def test_a_block_is_for_its_own_thread() -> None:
    model, given = tiny.flux()
    before = state(model)
    with attention_backend(model, "sdpa_math") as chosen:
        thread = threading.Thread(target=tiny.forward, args=(model, given))
        thread.start()
        thread.join()
        assert calls(chosen) == 0
        tiny.forward(model, given)
        assert calls(chosen) == 4
    assert_same_state(before, state(model))


def test_blocks_nest_above_what_is_applied_and_outer_roles_stay() -> None:
    model, given = tiny.flux()
    before, of_diffusers = state(model), registry()
    applied = apply(model, "torch_sdpa")
    with attention_backend(model, {"per_role": {"flux.single": "reference"}}) as outer:
        with attention_backend(model, {"per_role": {"flux.double": "sdpa_math"}}) as inner:
            tiny.forward(model, given)
        tiny.forward(model, given)
    assert {(row.role, row.backend) for row in inner.reports["model"].rows.values()} == {
        ("flux.double", "sdpa_math"), ("flux.single", "reference"),
    }  # fmt: skip
    assert {(row.role, row.backend) for row in outer.reports["model"].rows.values()} == {
        ("flux.double", "torch_sdpa"), ("flux.single", "reference"),
    }  # fmt: skip
    assert calls(applied) == 0
    tiny.forward(model, given)
    assert (ran(applied), calls(applied)) == ({"torch_sdpa"}, 4)
    reset(model)
    assert_same_state(before, state(model))
    assert registry() == of_diffusers


class Cancelled(BaseException):
    """As when a person stops a pipeline."""


@pytest.mark.parametrize("kind", [RuntimeError, Cancelled])
def test_an_exception_in_the_middle_of_a_forward_leaves_nothing(kind: type[BaseException]) -> None:
    model, given = tiny.flux()
    expected, before = tiny.forward(model, given), state(model)

    def stop(*args: Any) -> None:
        raise kind

    handle = model.transformer_blocks[1].ff.register_forward_hook(stop)
    with attention_backend(model, "sdpa_math"), pytest.raises(kind):
        tiny.forward(model, given)
    handle.remove()
    assert_same_state(before, state(model))
    assert torch.equal(tiny.forward(model, given)[0], expected[0])
    applied = apply(model, "sdpa_math")
    tiny.forward(model, given)
    assert calls(applied) == 4  # this thread is in no forward that was left
    reset(model)


def test_a_model_that_shares_a_block_with_a_chosen_one_is_not_routed() -> None:
    (one, given), (other, _) = tiny.flux(), tiny.flux()
    other.transformer_blocks[0] = one.transformer_blocks[0]
    expected = tiny.forward(other, given)
    applied = apply(one, "sdpa_math")
    output = tiny.forward(other, given)
    assert torch.equal(output[0], expected[0])
    assert calls(applied) == 0
    reset(one)


def test_invalid_choices_change_nothing() -> None:
    model, _ = tiny.wan()
    before = state(model)
    with pytest.raises(UnknownBackendError):
        apply(model, "no_such_backend")
    with pytest.raises(NoBackendError):
        apply(model, "sage_attn_3", strict=True)
    with pytest.raises(ConfigError):
        apply(object(), "torch_sdpa")
    assert_same_state(before, state(model))
    assert report(model) == {}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_chosen_model_is_an_unpatched_model(copied: Any) -> None:
    model, given = tiny.flux()
    expected = tiny.forward(model, given)
    applied = apply(model, "sdpa_math")
    other = copied(model)
    with torch.no_grad():
        for parameter in model.parameters():  # the copy has its own weights
            parameter.add_(1)
    assert torch.equal(tiny.forward(other, given)[0], expected[0])
    assert calls(applied) == 0
    reset(model)


def test_processors_that_are_set_later_are_followed() -> None:
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    model, given = tiny.sdxl()
    processors = model.attn_processors
    applied = apply(model, "torch_sdpa")
    assert model.attn_processors == processors  # the originals, so that they can be set on another model
    expected = tiny.forward(model, given)
    model.set_attn_processor(AttnProcessor2_0())
    assert torch.equal(tiny.forward(model, given)[0], expected[0])
    assert calls(applied) == 16
    assert not applied.reports["model"].bypass
    model.set_attn_processor(AttnProcessor())  # multiplies matrices by hand
    tiny.forward(model, given)
    assert calls(applied) == 16
    assert "AttnProcessor" in applied.reports["model"].bypass
    reset(model)
    assert {type(one) for one in model.attn_processors.values()} == {AttnProcessor}


def test_fused_projections_are_followed() -> None:
    model, given = tiny.flux()
    applied = apply(model, "torch_sdpa")
    model.fuse_qkv_projections()
    output = tiny.forward(model, given)
    assert calls(applied) == 4
    reset(model)
    assert torch.equal(tiny.forward(model, given)[0], output[0])
    applied = apply(model, "torch_sdpa")
    model.unfuse_qkv_projections()
    tiny.forward(model, given)
    assert calls(applied) == 4
    reset(model)


def test_a_replaced_projection_is_followed() -> None:
    """As LoRA layers replace projections."""

    class Adapted(torch.nn.Module):
        def __init__(self, base: torch.nn.Module) -> None:
            super().__init__()
            self.base = base

        def forward(self, hidden_states: torch.Tensor) -> Any:
            return self.base(hidden_states) * 2

    model, given = tiny.flux()
    applied = apply(model, "torch_sdpa")
    attention = model.transformer_blocks[0].attn
    attention.to_q = Adapted(attention.to_q)
    output = tiny.forward(model, given)
    assert calls(applied) == 4
    reset(model)
    assert torch.equal(tiny.forward(model, given)[0], output[0])


def accelerate_hook(module: Any) -> None:
    """What accelerate's `add_hook_to_module` does to a module, for its offload hooks."""
    module._hf_hook, module._old_forward = object(), module.forward

    def new_forward(module: Any, *args: Any, **kwargs: Any) -> Any:
        return module._old_forward(*args, **kwargs)

    module.forward = functools.partial(new_forward, module)


def remove_accelerate_hook(module: Any) -> None:
    """As `remove_hook_from_module`."""
    module.forward = module._old_forward
    del module._hf_hook, module._old_forward


def diffusers_hook(module: Any) -> None:
    from diffusers.hooks import HookRegistry, ModelHook

    HookRegistry.check_if_exists_or_initialize(module).register_hook(ModelHook(), "ours")


def remove_diffusers_hook(module: Any) -> None:
    module._diffusers_hook.remove_hook("ours")


HOOKS = {
    "accelerate": (accelerate_hook, remove_accelerate_hook),
    "diffusers": (diffusers_hook, remove_diffusers_hook),
}


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("path", ["", "transformer_blocks.0.attn"])
def test_hooks_before_and_after_are_followed(hook: str, first: bool, path: str) -> None:
    add, take_away = HOOKS[hook]
    model, given = tiny.flux()
    expected = tiny.forward(model, given)
    module = model.get_submodule(path)
    if first:
        add(module)
    applied = apply(model, "torch_sdpa")
    if not first:
        add(module)
    assert torch.equal(tiny.forward(model, given)[0], expected[0])
    assert calls(applied) == 4
    take_away(module)  # as a pipeline does after each call, to add it again
    tiny.forward(model, given)
    assert calls(applied) == 8
    add(module)
    tiny.forward(model, given)
    assert calls(applied) == 12
    assert not applied.reports["model"].bypass
    reset(model)
    tiny.forward(model, given)
    take_away(module)
    assert torch.equal(tiny.forward(model, given)[0], expected[0])
    assert getattr(module.forward, "__func__", None) is type(module).forward
    assert applied.reports["model"].calls == 12


def test_a_forward_from_elsewhere_is_named_as_not_reached() -> None:
    model, given = tiny.flux()
    attention = model.transformer_blocks[0].attn
    inner = attention.forward
    attention.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    applied = apply(model, "torch_sdpa")
    tiny.forward(model, given)
    assert calls(applied) == 3
    assert "transformer_blocks.0.attn" in applied.reports["model"].bypass
    reset(model)


def test_context_parallel_attention_is_refused() -> None:
    from diffusers import ContextParallelConfig
    from diffusers.models._modeling_parallel import ParallelConfig

    model, _ = tiny.flux()
    before = state(model)
    model._parallel_config = ParallelConfig(context_parallel_config=ContextParallelConfig(ulysses_degree=2))
    with pytest.raises(NoBackendError):
        apply(model, "torch_sdpa")
    del model._parallel_config
    assert_same_state(before, state(model))


def test_diffusers_names_and_variables_mean_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = tiny.flux()
    monkeypatch.setenv("DIFFUSERS_ATTN_BACKEND", "_native_math")
    applied = apply(model, {"per_role": {"flux.single": "native"}})
    tiny.forward(model, given)
    backends = {row.role: row.backend for row in applied.reports["model"].rows.values()}
    assert backends == {"flux.double": "sdpa_math", "flux.single": "torch_sdpa"}
    reset(model)


def test_nothing_of_diffusers_is_imported_before_a_model_of_it_comes() -> None:
    import subprocess
    import sys

    code = (
        "import sys; import attention_backends.integrations; assert 'torch' not in sys.modules;"
        "from attention_backends.integrations.diffusers import apply; assert 'diffusers' not in sys.modules"
    )
    root = Path(__file__).resolve().parents[2]
    loader = (
        "import importlib.util, sys;"
        f"spec = importlib.util.spec_from_file_location('attention_backends', {str(root / '__init__.py')!r}, "
        f"submodule_search_locations=[{str(root)!r}]);"
        "sys.modules['attention_backends'] = importlib.util.module_from_spec(spec);"
        "spec.loader.exec_module(sys.modules['attention_backends']);"
    )
    subprocess.run([sys.executable, "-c", loader + code], check=True)


def test_an_ip_adapter_is_followed() -> None:
    """Its processors are modules; the text's keys come first, then the picture's."""
    model, given = tiny.sdxl()
    applied = apply(model, "torch_sdpa")
    processors: dict[str, Any] = {}
    from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0

    for path in model.attn_processors:
        attention = model.get_submodule(path.removesuffix(".processor"))
        if path.endswith("attn2.processor"):
            processors[path] = IPAdapterAttnProcessor2_0(attention.to_q.in_features, 16, num_tokens=(3,))
        else:
            processors[path] = AttnProcessor2_0()
    model.set_attn_processor(processors)
    states = given["encoder_hidden_states"], [tiny.noise(1, 1, 3, 16)]
    with torch.no_grad():
        attention = model.mid_block.attentions[0].transformer_blocks[0].attn2
        hidden = tiny.noise(1, 4, attention.to_q.in_features)
        expected = type(attention).forward(attention, hidden, encoder_hidden_states=states)
        output = tiny.forward(_Around(model, attention), {"hidden": hidden, "states": states})
    assert torch.equal(output[0], expected)
    rows = {row.role: row.calls for row in applied.reports["model"].rows.values() if row.calls}
    assert rows == {"cross": 1, "unet.image_cross": 1}
    reset(model)


class _Around:
    """Calls one attention module inside a forward of the model."""

    def __init__(self, model: Any, attention: Any) -> None:
        self.model, self.attention = model, attention

    def __call__(self, hidden: torch.Tensor, states: Any, return_dict: bool) -> Any:
        entry = self.model.forward.__self__
        original, entry.original = entry.original, lambda **given: (self.attention(hidden, states),)
        try:
            return self.model(sample=hidden)
        finally:
            entry.original = original
