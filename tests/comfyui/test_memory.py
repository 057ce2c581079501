"""What kernels say that they take is what they take, and ComfyUI makes room for it, for that run alone."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from attention_backends.backends.engine import mask_reader as mask_plan  # noqa: E402
from attention_backends.backends.kernels import BACKENDS  # noqa: E402
from attention_backends.backends.kernels.registry import detect  # noqa: E402
from attention_backends.backends.kernels.support.workspace import (  # noqa: E402
    item_bytes,
    output_size,
)
from attention_backends.backends.values.request import AttentionRequest  # noqa: E402
from attention_calls import as_comfyui_runs, call_for  # noqa: E402
from hook_side import (  # noqa: E402
    exact,
    host,
    last_run,
    marks_left,
    nodes_module,
    plain_comfyui,
    sampling,
    selected,
    with_role,
)
from test_bench_suite import script  # noqa: E402

measured = script("memory")
memory = nodes_module("hook.memory")
sizes = nodes_module("hook.estimated_calls")
CPU = detect(torch.device("cpu"))
LONG = AttentionRequest(batch=2, num_heads=4, q_len=384, kv_len=512, head_dim=64, dtype="float32")
REQUESTS = {
    "plain": LONG,
    "half": LONG._replace(dtype="bfloat16"),
    "double": LONG._replace(dtype="float64"),
    "bool": LONG._replace(mask="bool"),
    "half with bool": LONG._replace(mask="bool", dtype="bfloat16"),
    "padding": LONG._replace(mask="key_padding"),
    "causal": LONG._replace(is_causal=True, kv_len=384),
    "grouped": LONG._replace(num_kv_heads=2),
}


@pytest.fixture
def math_in_half() -> Iterator[Any]:
    """Whether torch's plain attention computes half types as they are; importing ComfyUI lets it."""
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    yield torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)


@pytest.mark.parametrize("name", ["sdpa_math", "reference", "emulated_int8"])
@pytest.mark.parametrize("kind", REQUESTS)
@pytest.mark.parametrize("in_half", [False, True])
def test_a_kernel_takes_what_it_says(name: str, kind: str, in_half: bool, math_in_half: Any) -> None:
    """Never more, but for a few KB, and most of what it says; as torch is by itself, and as ComfyUI sets it."""
    math_in_half(in_half)
    request, backend = REQUESTS[kind], BACKENDS[name]
    kernel = backend.load(CPU)
    with as_comfyui_runs():
        call = call_for(request)
        taken = measured.peak_bytes(lambda: kernel(call)) - output_size(request) * item_bytes(request)
    said = backend.workspace_bytes(request, CPU)
    assert taken <= said + 65_536, f"{taken} > {said}"
    assert taken > 0.6 * said, f"{taken} is far less than {said}"


def test_every_backend_can_be_asked_for_every_kind_of_call() -> None:
    for backend in BACKENDS.values():
        for request in REQUESTS.values():
            said = backend.workspace_bytes(request, CPU)
            assert type(said) is int
            assert said >= 0
    fused = ("torch_sdpa", "cudnn_attn", "flash_attn_2", "comfy")
    assert all(BACKENDS[name].workspace_bytes(LONG, CPU) == 0 for name in fused)


# In ComfyUI


class Loaded:
    """What ComfyUI was asked to make room for, at each run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import comfy.model_management

        self.asked: list[tuple[float, float]] = []
        load = comfy.model_management.load_models_gpu

        def listening(models: Any, memory_required: float = 0, **more: Any) -> Any:
            self.asked.append((memory_required, more["minimum_memory_required"]))
            return load(models, memory_required, **more)

        monkeypatch.setattr(comfy.model_management, "load_models_gpu", listening)

    def last(self) -> tuple[float, float]:
        return self.asked[-1]


@pytest.fixture
def comfy(monkeypatch: pytest.MonkeyPatch) -> Any:
    plain_comfyui(monkeypatch)
    import tiny_sampling

    return tiny_sampling


def workspace(kind: Any) -> int:
    return BACKENDS["sdpa_math"].workspace_bytes(kind.request, CPU)


def assert_told(model: Any, told: float, wanted: float, shape: tuple[int, ...], at: int = -1) -> None:
    """What was told is `wanted` or up to a column of the latent more, since shapes are whole numbers."""
    wider = list(shape)
    wider[at] += 1
    column = model.model.memory_required(wider) - model.model.memory_required(list(shape))
    assert 0 <= told - wanted + 1e-9 * wanted < column, (told, wanted, column)


def kinds_of(model: Any, shape: tuple[int, ...]) -> Any:
    return memory._known[model.model.diffusion_model][shape]


WAN = (16, 3, 8, 12)
ONE, BOTH = (1, *WAN), (2, *WAN)


@pytest.mark.comfy
def test_comfyui_is_told_what_the_chosen_kernel_takes(comfy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first run by a guess, which is right here, and after it from the calls that were made."""
    stock, loaded = comfy.build("wan"), Loaded(monkeypatch)
    comfy.sample(stock, "wan", steps=1)
    before = dict(vars(stock.model)), copy.deepcopy(stock.model_options)
    both, one = loaded.last()
    hungry = AttentionRequest(1, 2, 72, 72, 128, "float32")
    extra = BACKENDS["sdpa_math"].workspace_bytes(hungry, CPU)
    assert extra > 2 * 72 * 72 * 2 * 4
    for _ in range(2):
        comfy.sample(selected(stock, "sdpa_math"), "wan", steps=1)
        assert_told(stock, loaded.last()[0], both + 2 * extra, BOTH)
        assert_told(stock, loaded.last()[1], one + extra, ONE)
    assert max(map(workspace, kinds_of(stock, WAN))) == extra
    for model in (selected(stock, "auto"), selected(stock, "comfy"), stock):
        comfy.sample(model, "wan", steps=1)
        assert loaded.last() == (both, one)
    comfy.sample(with_role(stock, "cross", "sdpa_math"), "wan", steps=1)
    crossed = max(workspace(kind) for kind in kinds_of(stock, WAN) if kind.role.name == "cross")
    assert_told(stock, loaded.last()[0], both + 2 * crossed, BOTH)
    assert_told(stock, loaded.last()[1], one + crossed, ONE)
    assert vars(stock.model).keys() == before[0].keys()
    changed = [name for name, value in before[0].items() if vars(stock.model)[name] is not value]
    assert set(changed) <= {"latent_shapes"}  # which ComfyUI's own sampler writes
    assert stock.model_options == before[1]


@pytest.mark.comfy
def test_a_kernel_of_some_steps_counts_as_well(comfy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from attention_backends.backends.config import AttentionSpec
    from attention_backends.backends.config.schedule import ScheduleEntry

    stock, loaded = comfy.build("wan"), Loaded(monkeypatch)
    entry = ScheduleEntry(AttentionSpec("sdpa_math"), percent="0.5-1", role="self")
    comfy.sample(nodes_module("hook.patch").add_to_schedule(stock, entry), "wan", steps=1)
    told = loaded.last()
    comfy.sample(stock, "wan", steps=1)
    extra = BACKENDS["sdpa_math"].workspace_bytes(AttentionRequest(1, 2, 72, 72, 128, "float32"), CPU)
    assert_told(stock, told[1], loaded.last()[1] + extra, ONE)


@pytest.mark.comfy
def test_gathered_keys_are_counted_from_the_second_run_on(comfy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text first and padded: the hidden keys are a gap."""
    monkeypatch.setattr(mask_plan, "CPU_KEPT", 1.0)
    stock, loaded = comfy.build("qwen_image_masked"), Loaded(monkeypatch)
    model = selected(stock, "torch_sdpa")
    comfy.sample(model, "qwen_image_masked", steps=1)
    first = loaded.last()
    comfy.sample(model, "qwen_image_masked", steps=1)
    kept = 96 + 13
    (shape,) = memory._known[stock.model.diffusion_model]
    copied = 2 * kept * 2 * 128 * 4  # keys and values of 2 heads of 128
    assert_told(stock, loaded.last()[1], first[1] + copied, (1, *shape))


@pytest.mark.comfy
@pytest.mark.parametrize("lengths", [(40, 24), (40, 40)], ids=["a length for each sample", "one length"])
def test_samples_that_run_one_by_one_need_memory_for_one(comfy: Any, lengths: tuple[int, int]) -> None:
    """Other lengths in each sample make a call for each; one length for all leaves them together."""
    from attention_backends.backends.config import AttentionConfig, AttentionSpec

    sites = nodes_module("hook.attention_modules")
    override = host.Override((AttentionConfig(default=AttentionSpec("sdpa_math")),))
    run = sampling.Run(override)
    run.samples = 2
    model_call = run.model_call(torch.device("cpu"))
    model_call.begin({}, in_model_call=True)
    query, mask = torch.randn(2, 48, 64), torch.ones(2, 1, 1, 48, dtype=torch.bool)
    for sample, length in enumerate(lengths):
        mask[sample, ..., length:] = False
    previous = sites.set_model_call(model_call)
    try:
        override(exact, query, query, query, 2, mask=mask, transformer_options={sampling.OVERRIDE: override})
    finally:
        sites.set_model_call(previous)
    kinds = frozenset(memory._kinds(run))
    apart = lengths[0] != lengths[1]
    assert {(kind.request.batch, kind.apart) for kind in kinds} == {(1, apart)}
    of_one, of_four = (memory.needed(override.layers, kinds, samples, torch.device("cpu")) for samples in (1, 4))
    copied = max(kind.copied for kind in kinds)
    assert of_four - 4 * copied == (of_one - copied) * (1 if apart else 4)


@pytest.mark.comfy
def test_prompts_are_not_batched_where_the_kernel_needs_the_memory(comfy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """ComfyUI batches what it expects to fit; with so much free memory as one prompt takes, that is one by one."""
    from comfy import model_management

    stock, loaded = comfy.build("wan"), Loaded(monkeypatch)
    batches: list[int] = []
    apply_model = type(stock.model).apply_model

    def watched(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        batches.append(x.shape[0])
        assert type(self) is type(stock.model)
        return apply_model(self, x, *args, **kwargs)

    monkeypatch.setattr(type(stock.model), "apply_model", watched)
    comfy.sample(stock, "wan", steps=1)
    both = loaded.last()[0]
    free = 1.5 * both + 1000  # two prompts just fit
    monkeypatch.setattr(model_management, "get_free_memory", lambda *args, **kwargs: free)
    patcher = type(stock)
    if hasattr(patcher, "get_free_memory"):
        monkeypatch.setattr(patcher, "get_free_memory", lambda self, device: free)
    for model, expected in ((stock, [2]), (selected(stock, "auto"), [2]), (selected(stock, "sdpa_math"), [1, 1])):
        batches.clear()
        comfy.sample(model, "wan", steps=1)
        assert batches == expected


@pytest.mark.comfy
@pytest.mark.parametrize(
    "family",
    [
        "wan", "flux", "chroma", "sd3", "qwen_image", "ltxv", "lumina2", "cosmos1", "cosmos_predict2", "hunyuan3d2",
        "kandinsky5", "omnigen2", "sd15", "sdxl",
    ],
)  # fmt: skip
def test_the_guess_before_the_first_run(comfy: Any, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the calls that the model then makes: the largest of its roles; OmniGen2 has a picture as input too."""
    if reason := comfy.unavailable(family):
        pytest.skip(reason)
    guessed: list[Any] = []
    guess = sizes.expected_requests
    monkeypatch.setattr(memory, "expected_requests", lambda *args: guessed.extend(guess(*args)) or guessed)
    model = comfy.build(family)
    comfy.sample(selected(model, "torch_sdpa"), family, steps=1)
    (kinds,) = memory._known[model.model.diffusion_model].values()

    def size(request: Any) -> int:
        return request.num_heads * request.q_len * request.kv_len

    largest = max((kind.request for kind in kinds), key=size)
    expected = max((request for _, request in guessed), key=size)
    same = ["num_heads", "head_dim", "dtype"] + ([] if family == "omnigen2" else ["q_len"])
    assert [getattr(largest, name) for name in same] == [getattr(expected, name) for name in same]
    assert size(largest) <= 1.4 * size(expected)


@pytest.mark.comfy
def test_nothing_is_guessed_of_a_latent_that_does_not_tell(comfy: Any) -> None:
    """Video and audio in one row; after one run it is known."""
    if reason := comfy.unavailable("minimax_h3"):
        pytest.skip(reason)
    model = comfy.build("minimax_h3")
    place = memory.key_of(model.model, (1, 1, 999))
    assert memory.expected(place, model.model, {}) == frozenset()
    comfy.sample(selected(model, "torch_sdpa"), "minimax_h3", steps=1)
    (kinds,) = memory._known[model.model.diffusion_model].values()
    assert {kind.request.q_len for kind in kinds} == {60}


@pytest.mark.comfy
def test_a_run_that_fails_teaches_too_and_models_are_not_kept_alive(
    comfy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An out-of-memory error above all: the next attempt is told."""
    model = comfy.build("wan")

    def full(call: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("as it should")

    router = sampling.router_for(torch.device("cpu"))
    monkeypatch.setitem(router._kernels, ("sdpa_math", ()), full)
    with pytest.raises(torch.OutOfMemoryError):
        comfy.sample(selected(model, "sdpa_math"), "wan", steps=1)
    assert kinds_of(model, WAN)
    gone = weakref.ref(model.model.diffusion_model)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.comfy
@pytest.mark.parametrize("dim", [2, 4])
def test_context_windows_are_what_the_model_sees(comfy: Any, dim: int) -> None:
    """ComfyUI's own wrapper comes after ours, and cuts the shape too."""
    from comfy import context_windows, patcher_extension

    model = comfy.build("wan")
    patched = selected(model, "sdpa_math")
    window = [1, 16, 9, 8, 12]
    window[dim] = 4
    handler = SimpleNamespace(dim=dim, context_length=4)
    options = {**patched.model_options, "context_handler": handler}
    told: list[Any] = []
    executor = patcher_extension.WrapperExecutor.new_executor(
        lambda model, shape, conds, **more: told.append(shape),
        [memory.prepare_sampling_wrapper, context_windows._prepare_sampling_wrapper],
    )
    executor.execute(patched, (1, 16, 9, 8, 12), {}, model_options=options)
    tokens = window[2] * (window[3] // 2) * (window[4] // 2)
    request = AttentionRequest(1, 2, tokens, tokens, 128, "float32")
    required = model.model.memory_required
    extra = BACKENDS["sdpa_math"].workspace_bytes(request, CPU)
    assert_told(model, required(told[0]), required(window) + extra, tuple(window), at=-2 if dim == 4 else -1)
    assert all(type(number) is int for number in told[0])  # other packs read them


@pytest.mark.comfy
@pytest.mark.parametrize("broken", ["expected_requests", "_shape_for", "key_of", "_kinds"])
def test_an_estimate_that_fails_costs_no_run(comfy: Any, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model, a latent or a prompt of a kind that nobody thought of."""

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise KeyError("unheard of")

    stock, loaded = comfy.build("wan"), Loaded(monkeypatch)
    expected = comfy.sample(stock, "wan", steps=1)
    before = loaded.last()
    monkeypatch.setattr(memory, broken, fails)
    output = comfy.sample(selected(stock, "sdpa_math"), "wan", steps=1)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-4)
    assert marks_left(stock.model) == []
    if broken != "_kinds":
        assert loaded.last() == before
        assert any(note.startswith(memory.ESTIMATE_FAILED) and "unheard of" in note for note in last_run()["notes"])


@pytest.mark.comfy
def test_few_shapes_are_remembered(comfy: Any) -> None:
    model = comfy.build("wan")
    override = selected(model, "auto").model_options["transformer_options"][sampling.KEY]
    comfy.sample(selected(model, "auto"), "wan", steps=1)
    run = sampling.Run(override)
    kinds = kinds_of(model, WAN)
    monkey = pytest.MonkeyPatch()
    monkey.setattr(memory, "_kinds", lambda run: kinds)
    for frames in range(20):
        run.memory_key = memory.key_of(model.model, (1, 16, frames, 8, 12))
        memory.learn(run)
    monkey.undo()
    shapes = list(memory._known[model.model.diffusion_model])
    assert shapes == [(16, frames, 8, 12) for frames in range(20 - memory.MOST_SHAPES, 20)]
