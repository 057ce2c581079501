"""In a real ComfyUI: sparse backends get the token grid that the model has inside, and know where in a run they are."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import replace
from itertools import groupby
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import literal_sparse as literal  # noqa: E402
import tiny_models  # noqa: E402
import tiny_sampling  # noqa: E402
from attention_backends.backends.config.text import parse_config  # noqa: E402
from attention_backends.backends.config.timetable import ALWAYS, Window  # noqa: E402
from attention_backends.backends.observe.replay.record import as_record  # noqa: E402
from attention_backends.backends.report import kept  # noqa: E402
from attention_backends.backends.report.audit import fell_back  # noqa: E402
from attention_backends.backends.sparse import method  # noqa: E402
from attention_backends.backends.values.grid import OFF_GRID, Progress, TokenGrid  # noqa: E402
from attention_backends.backends.values.reasons import TEMPLATES  # noqa: E402
from hook_side import last_run, nodes_module, plain_comfyui, sampling, wrappers  # noqa: E402

memory, progress = nodes_module("hook.memory"), nodes_module("hook.run_progress")

pytestmark = pytest.mark.comfy

SPARSE = {"default": {"backend": "video_sparse_attn", "extra": {"sparsity": 0.5}}}
EVERYWHERE = {**SPARSE, "joint_is_self": True}
VIDEO = (3, 4, 6)
IMAGE = (1, 8, 12)
WAN = {"self": TokenGrid(*VIDEO)}
FLUX = {role: TokenGrid(*IMAGE, 20) for role in ("flux.double", "flux.single")}
LTX = {"self": TokenGrid(*VIDEO)}

GRIDS: dict[str, dict[str, TokenGrid]] = {
    "wan": WAN,
    "wan_i2v": WAN,
    "wan_vace": {**WAN, "wan.vace_self": TokenGrid(*VIDEO)},
    "wan22_5b": WAN,
    "wan_phantom": {"self": TokenGrid(*VIDEO, 0, 48)},
    "wan_context_latents": {"self": TokenGrid(*VIDEO, 0, 24 + 16)},
    "wan_scail": {"self": TokenGrid(*VIDEO, 24, 18)},
    "wan_s2v": {"self": TokenGrid(*VIDEO, 0, 24 + 24 + 6 + 4)},
    "wan_humo": {"self": TokenGrid(*VIDEO, 0, 24)},
    "wan_animate": WAN,
    "flux": FLUX,
    "flux_odd": {role: TokenGrid(1, 8, 12, 20) for role in FLUX},
    "flux_edit": {role: TokenGrid(*IMAGE, 20, 16 + 24) for role in FLUX},
    "flux2": {role: TokenGrid(*IMAGE, 512) for role in FLUX},
    "chroma": FLUX,
    "sd3": {"joint": TokenGrid(*IMAGE, 20), "sd3.image_self": TokenGrid(*IMAGE)},
    "qwen_image": {"joint": TokenGrid(*IMAGE, 20)},
    "qwen_edit": {"joint": TokenGrid(*IMAGE, 20, 16)},
    "ltxv": LTX,
    "ltxv_keyframe": {"self": TokenGrid(2, 4, 6, 0, 24)},
    "ltxav": LTX,
    "hunyuan_video_plain": {
        f"hunyuan_video.{kind}": TokenGrid(*VIDEO, 20) for kind in ("double", "single")
    },
    "hunyuan_video_reference": {f"hunyuan_video.{kind}": TokenGrid(*VIDEO, 20 + 24) for kind in ("double", "single")},
    "hunyuan_video15": {"hunyuan_video.double": TokenGrid(*VIDEO, 27 + 10 + 20)},
    "lumina2": {"image_self": TokenGrid(*IMAGE), "joint": TokenGrid(*IMAGE, 20)},
    "z_image": {"image_self": TokenGrid(*IMAGE), "joint": TokenGrid(*IMAGE, 32)},
    "z_image_edit": {"image_self": TokenGrid(*IMAGE, 32), "joint": TokenGrid(*IMAGE, 32 + 32 + 32)},
    "z_image_padded": {"image_self": TokenGrid(1, 8, 10, 0, 16), "joint": TokenGrid(1, 8, 10, 32, 16)},
    "cosmos1": {"self": TokenGrid(*VIDEO)},
    "cosmos_predict2": {"self": TokenGrid(*IMAGE)},
    "anima": {"self": TokenGrid(*IMAGE)},
    "minimax_video": {"joint": TokenGrid(*VIDEO, 20 + 22)},
    "kandinsky5": {"self": TokenGrid(*VIDEO)},
    "cogvideo": {"joint": TokenGrid(*VIDEO, 20)},
    "cogvideo15": {"joint": TokenGrid(2, 4, 6, 20)},
    "mochi": {"joint": TokenGrid(*VIDEO, 0, 13)},
    "omnigen2": {"joint": TokenGrid(*IMAGE, 20 + 16)},
}  # fmt: skip
"""By hand, from the models' code and the tiny latents: the grid of each role."""


def _references(*sizes: tuple[int, ...]) -> Callable[[Any], dict[str, Any]]:
    return lambda rand: {"reference_latents": [rand(1, 16, *size) for size in sizes]}


def _more(name: str, extras: Callable[[Any], dict[str, Any]], **changes: Any) -> tiny_models.Family:
    family = tiny_models.FAMILIES[name]
    return replace(family, extras=lambda rand: {**family.extras(rand), **extras(rand)}, **changes)


COGVIDEO = {
    "image_model": "cogvideox", "num_attention_heads": 2, "attention_head_dim": 64, "time_embed_dim": 64,
    "text_embed_dim": 64, "num_layers": 2, "use_rotary_positional_embeddings": True,
}  # fmt: skip
MOCHI = {
    "image_model": "mochi_preview", "use_t5": True, "depth": 2, "patch_size": 2, "num_heads": 2, "hidden_size_x": 128,
    "hidden_size_y": 64, "mlp_ratio_x": 96.0, "mlp_ratio_y": 2.0, "learn_sigma": False, "in_channels": 12,
    "qk_norm": True, "qkv_bias": False, "out_bias": True, "attn_drop": 0.0, "patch_embed_bias": True,
    "timestep_mlp_bias": True, "timestep_scale": 1000.0, "t5_feat_dim": 64, "t5_token_length": 20,
    "rope_theta": 10000.0,
}  # fmt: skip


def _wan(config: str, unet: dict[str, Any], extras: Callable[[Any], dict[str, Any]]) -> tiny_models.Family:
    return _more("wan", extras, config=config, unet={**tiny_models.WAN, **unet})


VARIANTS = {
    "wan_phantom": _more("wan", lambda rand: {"time_dim_concat": rand(1, 16, 2, 8, 12)}),
    "wan_context_latents": _more(
        "wan", lambda rand: {"context_latents": [rand(1, 16, 1, 8, 12), rand(1, 16, 1, 8, 8)]}
    ),
    "wan_scail": _wan(
        "WAN21_SCAIL",
        {"model_type": "scail", "in_dim": 20},
        lambda rand: {"reference_latents": [rand(1, 16, 1, 8, 12)], "pose_video_latent": rand(1, 16, 3, 4, 6)},
    ),
    "wan_s2v": _wan(
        "WAN22_S2V",
        {"model_type": "s2v", "audio_inject_layers": [0]},
        lambda rand: {"reference_latents": [rand(1, 16, 1, 8, 12)], "reference_motion": rand(1, 16, 19, 8, 12)},
    ),
    "wan_humo": _wan(
        "WAN21_HuMo",
        {"model_type": "humo"},
        lambda rand: {"reference_latents": [rand(1, 16, 1, 8, 12)], "audio_embed": rand(1, 3, 8, 5, 1280)},
    ),
    "wan_animate": _wan(
        "WAN22_Animate",
        {"model_type": "animate", "in_dim": 36, "num_layers": 5},
        lambda rand: {"pose_video_latent": rand(1, 16, 2, 8, 12)},
    ),
    "cogvideo": tiny_models.Family("CogVideoX_T2V", COGVIDEO, (tiny_models.VIDEO,), (20, 64)),
    "cogvideo15": tiny_models.Family(
        "CogVideoX_T2V", {**COGVIDEO, "patch_size_t": 2, "patch_bias": False}, (tiny_models.VIDEO,), (20, 64)
    ),
    "mochi": tiny_models.Family(
        "GenmoMochi",
        MOCHI,
        ((1, 12, 3, 8, 12),),
        (20, 64),
        lambda rand: {"attention_mask": (torch.arange(20) < 13).long()[None]},
        cfg=1.0,
    ),
    "flux_odd": _more("flux", lambda rand: {}, latents=((1, 16, 15, 23),)),
    "flux_edit": _more("flux", _references((8, 8), (8, 12))),
    "qwen_edit": _more("qwen_image", _references((1, 8, 8))),
    "hunyuan_video_plain": replace(
        tiny_models.FAMILIES["hunyuan_video"], extras=lambda rand: {"pooled_output": rand(1, 768)}
    ),
    "hunyuan_video_reference": replace(
        tiny_models.FAMILIES["hunyuan_video"],
        extras=lambda rand: {"pooled_output": rand(1, 768), "ref_latent": rand(1, 16, 1, 8, 12)},
    ),
    "ltxv_keyframe": _more("ltxv_guide", lambda rand: {"guide_attention_entries": None}),
    "z_image_edit": _more("z_image", _references((8, 8))),
    "z_image_padded": _more("z_image", lambda rand: {}, latents=((1, 16, 16, 20),)),
    "minimax_video": _more("minimax_h3", lambda rand: {}, latents=((1, 24, 3, 8, 12), (1, 32, 2, 11))),
}


class Call(NamedTuple):
    """One call that reached a session."""

    role: str
    category: str
    grid: TokenGrid | None
    backend: str
    reason: str | None
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor
    step: int | None
    steps: int | None
    samples: tuple[object, ...]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """Every call of the runs of a test."""
    plain_comfyui(monkeypatch)
    for name, family in VARIANTS.items():
        monkeypatch.setitem(tiny_models.FAMILIES, name, family)
    found: list[Call] = []
    attention = sampling.DeviceSession.attention

    def spied(session: Any, slot: Any, call: Any, *rest: Any) -> Any:
        tensors = [tensor.clone() for tensor in (call.query, call.key, call.value)]
        output = attention(session, slot, call, *rest)
        kind, row, progress = slot.plan.kind, slot.plan.row, session.progress
        found.append(Call(
            kind.role, kind.category, kind.request.grid, row.backend, row.reason, *tensors, output.clone(),
            progress.step, progress.steps, progress.samples,
        ))  # fmt: skip
        return output

    monkeypatch.setattr(sampling.DeviceSession, "attention", spied)
    return found


def patched(name: str, config: Any = EVERYWHERE, seed: int = 0) -> Any:
    reason = tiny_sampling.unavailable(name)
    if reason is None and name == "wan_context_latents":
        import comfy.ldm.wan.model

        lacks = "context_latents" not in inspect.getsource(comfy.ldm.wan.model)
        reason = "this ComfyUI has no reference streams in Wan" if lacks else None
    if reason:
        pytest.skip(reason)
    return nodes_module("hook.patch").set_config(tiny_sampling.build(name, seed), parse_config(config))


def expected_output(call: Call, grid: TokenGrid) -> torch.Tensor:
    """The call under a mask made from the grid alone."""
    cells = slice(grid.before, grid.before + grid.cells)
    cubes = len(literal.boxes(grid.shape, (4, 4, 4)))
    sees = literal.with_text(
        literal.video_sparse(
            call.query[:, :, cells], call.key[:, :, cells], grid.shape, (4, 4, 4),
            literal.video_sparse_count(0.5, cubes),
        ),
        grid.before, grid.after,
    )  # fmt: skip
    return literal.masked_attention(call.query, call.key, call.value, sees)


@pytest.mark.parametrize("name", GRIDS)
def test_each_family_computes_sparsely_on_its_grid(name: str, calls: list[Call]) -> None:
    model = patched(name)
    tiny_sampling.sample(model, name, steps=1)
    grids = GRIDS[name]
    seen = {call.role for call in calls if call.backend == "video_sparse_attn"}
    assert seen == set(grids), {(call.role, str(call.grid), call.reason) for call in calls}
    for role, grid in grids.items():
        of_role = [call for call in calls if call.role == role]
        assert {call.grid for call in of_role if call.backend == "video_sparse_attn"} == {grid}
        call = of_role[0]
        expected = expected_output(call, grid)
        assert (call.output - expected).norm() <= 1e-5 * expected.norm(), role
    assert all(call.grid is None or call.grid.queries_only for call in calls if call.category == "cross")
    other = [row for row in last_run()["rows"] if row["role"] not in grids]
    assert all(row["expected"] and row["reason"] for row in other), "no failure: it was asked for in all roles"


def first_query(calls: list[Call], model: Any, name: str, role: str, cell: tuple[int, ...] | None) -> torch.Tensor:
    """The query of the first call of a role, where one cell of the model call's latent was changed."""
    calls.clear()

    def change(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if cell is None:
            return None
        latent = args[0][0] if isinstance(args[0], list) else args[0]
        changed = latent.clone()
        changed[(slice(None), slice(None), *cell[-(latent.ndim - 2) :])] += 3.0
        return ([changed, *args[0][1:]] if isinstance(args[0], list) else changed, *args[1:])

    handle = model.model.diffusion_model.register_forward_pre_hook(change)
    try:
        tiny_sampling.sample(model, name, steps=1)
    finally:
        handle.remove()
    return next(call.query for call in calls if call.role == role)


ORDERED = {
    "wan": ("self", (1, 2, 2)),
    "wan_vace": ("wan.vace_self", (1, 2, 2)),
    "wan_context_latents": ("self", (1, 2, 2)),
    "flux_edit": ("flux.double", (1, 2, 2)),
    "qwen_edit": ("joint", (1, 2, 2)),
    "ltxav": ("self", (1, 1, 1)),
    "hunyuan_video_plain": ("hunyuan_video.double", (1, 2, 2)),
    "hunyuan_video15": ("hunyuan_video.double", (1, 1, 1)),
    "z_image_padded": ("image_self", (1, 2, 2)),
    "sd3": ("joint", (1, 2, 2)),
    "cosmos1": ("self", (1, 2, 2)),
    "cosmos_predict2": ("self", (1, 2, 2)),
    "minimax_video": ("joint", (1, 2, 2)),
    "kandinsky5": ("self", (1, 2, 2)),
    "cogvideo": ("joint", (1, 2, 2)),
    "cogvideo15": ("joint", (2, 2, 2)),
    "mochi": ("joint", (1, 2, 2)),
}
"""Family -> a role whose first call sees tokens that no attention has mixed yet, and the patch size by hand."""


ALIKE = ("wan_vace", "qwen_edit", "cosmos_predict2", "cogvideo", "hunyuan_video_plain", "kandinsky5")
"""Families whose patches and order another one has; the normal run leaves them to `-m slow`."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in ALIKE else name for name in ORDERED]
)
def test_a_cell_of_the_latent_is_the_token_that_the_grid_says(name: str, calls: list[Call]) -> None:
    """One cell of the latent is changed: one token of the model's query is another one."""
    model, (role, patch) = patched(name), ORDERED[name]
    grid = GRIDS[name][role]
    place = (grid.frames - 1, 1, 2)
    cell = tuple(at * step for at, step in zip(place, patch, strict=True))
    before = first_query(calls, model, name, role, None)
    after = first_query(calls, model, name, role, cell)
    changed = (before - after).abs().amax((0, 1, 3)) > 1e-5 * before.abs().max()
    token = grid.before + (place[0] * grid.height + place[1]) * grid.width + place[2]
    assert changed.nonzero().flatten().tolist() == [token]


@pytest.mark.parametrize("name", ["lumina2", "z_image_padded", "omnigen2"])
def test_tokens_before_the_grid_do_not_see_the_latent(name: str, calls: list[Call]) -> None:
    """Families whose refiners mix the picture before the joint blocks: its beginning is where the prompt ends."""
    model, grid = patched(name, {}), GRIDS[name]["joint"]  # dense: each token of the picture then sees all of it
    before = first_query(calls, model, name, "joint", None)
    after = first_query(calls, model, name, "joint", (0, 2, 2))
    changed = (before - after).abs().amax((0, 1, 3)) > 1e-5 * before.abs().max()
    assert not changed[: grid.before].any()
    assert changed[grid.before : grid.before + grid.cells].all()


def test_the_order_of_the_prompt_does_not_matter(calls: list[Call], monkeypatch: pytest.MonkeyPatch) -> None:
    """Text sees and is seen by everything: with its tokens in another order the picture is the same."""
    model = patched("flux")
    expected = tiny_sampling.sample(model, "flux", steps=2)
    conditioning = tiny_sampling.conditioning

    def permuted(*args: Any) -> Any:
        prompts = conditioning(*args)
        order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
        return tuple([[prompt[0][0][:, order], prompt[0][1]]] for prompt in prompts)

    monkeypatch.setattr(tiny_sampling, "conditioning", permuted)
    output = tiny_sampling.sample(model, "flux", steps=2)  # FLUX's prompt has no positions
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    assert {call.backend for call in calls} == {"video_sparse_attn"}


def test_of_a_role_that_no_table_names_nothing_is_known() -> None:
    grids = nodes_module("hook.token_grids")
    placed = (grids.Placed(("flux.double",), TokenGrid(1, 2, 3)),)
    found = [grids.grid_of(placed, role, "self", 6) for role in ("flux.double", "text_self", "self")]
    assert found == [TokenGrid(1, 2, 3), OFF_GRID, None], "the last one is guessed"
    assert grids.grid_of((), "text_self", "self", 6) is None


def test_cross_attention_falls_back_with_its_reason(calls: list[Call]) -> None:
    model = patched("wan")
    sparse = tiny_sampling.sample(model, "wan", steps=1)
    cross = [call for call in calls if call.role == "cross"]
    assert {call.backend for call in cross} == {"torch_sdpa"}
    assert {TEMPLATES[method.OTHER_KEYS].format(kv_len=20) in str(call.reason) for call in cross} == {True}
    assert not torch.equal(sparse, tiny_sampling.sample(patched("wan", {}), "wan", steps=1))
    rows = run_rows(back=1)
    assert all(0.3 < row["kept"] < 0.6 for row in rows if row["role"] == "self")  # cubes of 48 and 24 tokens
    assert not any("kept" in row for row in rows if row["role"] == "cross")


def run_rows(back: int = 0) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = last_run(back)["rows"]
    return rows


@pytest.mark.parametrize("name", ["sd15", "hunyuan3d2"])
def test_a_model_without_a_known_grid_is_computed_whole(name: str, calls: list[Call]) -> None:
    output = tiny_sampling.sample(patched(name), name, steps=1)
    assert {call.grid for call in calls} == {None}
    assert "video_sparse_attn" not in {call.backend for call in calls}
    torch.testing.assert_close(output, tiny_sampling.sample(patched(name, {}), name, steps=1))


def easy_cache(model: Any) -> Any:
    from comfy_extras.nodes_easycache import EasyCacheNode

    return EasyCacheNode.execute(model, 3.0, 0.0, 1.0, False).args[0]


def context_windows(model: Any) -> Any:
    from comfy_extras.nodes_context_windows import ContextWindowsManualNode

    return ContextWindowsManualNode.execute(
        model, context_length=4, context_overlap=1, context_schedule="standard_static", context_stride=1,
        closed_loop=False, fuse_method="pyramid", dim=2, freenoise=False,
    ).args[0]  # fmt: skip


CHANGING = {"sparsity": {"from": 0.0, "to": 0.75}, "dense_steps": 1}
BESIDE: dict[str, Callable[[Any], Any]] = {
    "alone": lambda model: model,
    "EasyCache": easy_cache,
    "context windows": context_windows,
}
"""Both together fail in ComfyUI itself where windows differ in length."""


@pytest.mark.parametrize("beside", BESIDE)
def test_batched_and_split_conditions_are_the_same(
    beside: str, calls: list[Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a share that changes by step, also where calls are skipped; and a cancelled run between leaves nothing."""
    import comfy.model_management
    from comfy.model_patcher import ModelPatcher

    if "windows" in beside:
        long_wan(monkeypatch, 6, 8, 12)
    model = BESIDE[beside](configured("selector", "video_sparse_attn", CHANGING))
    steps = 4
    batched = tiny_sampling.sample(model, "wan", steps=steps)
    assert {len(call.samples) for call in calls} == {2}
    seen = {call.step for call in calls}
    assert (len(seen) < steps) == (beside == "EasyCache"), "EasyCache skipped nothing, or something else did"

    attention, left = sampling.DeviceSession.attention, [len(calls) // 2]

    def cancelled(session: Any, *args: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            raise comfy.model_management.InterruptProcessingException
        return attention(session, *args)

    with monkeypatch.context() as during:
        during.setattr(sampling.DeviceSession, "attention", cancelled)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            tiny_sampling.sample(model, "wan", steps=steps)
    calls.clear()
    assert torch.equal(tiny_sampling.sample(model, "wan", steps=steps), batched)

    calls.clear()
    monkeypatch.setattr(ModelPatcher, "get_free_memory", lambda self, device: 0)
    split = tiny_sampling.sample(model, "wan", steps=steps)
    alone = {call.samples for call in calls}
    assert {len(samples) for samples in alone} == {1}
    assert len(alone) >= 2
    assert {call.step for call in calls} == seen
    assert {call.backend for call in calls if call.role == "self"} == {"video_sparse_attn"}
    torch.testing.assert_close(split, batched, rtol=0, atol=1e-4 * float(batched.abs().max()))


def long_wan(monkeypatch: pytest.MonkeyPatch, *shape: int) -> None:
    family = replace(tiny_models.FAMILIES["wan"], latents=((1, 16, *shape),))
    monkeypatch.setitem(tiny_models.FAMILIES, "wan", family)


def test_context_windows_have_their_own_frames(calls: list[Call], monkeypatch: pytest.MonkeyPatch) -> None:
    long_wan(monkeypatch, 9, 8, 12)
    tiny_sampling.sample(context_windows(patched("wan")), "wan", steps=2)
    own = [call for call in calls if call.role == "self"]
    assert {call.backend for call in own} == {"video_sparse_attn"}
    assert {call.grid[:3] for call in own} <= {(4, 4, 6), (5, 4, 6)}  # with a frame before, where ComfyUI adds one
    in_steps = [{call.samples for call in own if call.step == step} for step in (0, 1)]
    assert in_steps[0] == in_steps[1], "a window is the same sample in each step"
    assert len(in_steps[0]) > 2


def test_one_count_of_tokens_two_grids(calls: list[Call], monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide and high, in one run of the program and with the same model."""
    model = patched("wan")
    outputs = []
    for shape in ((3, 8, 12), (3, 12, 8)):
        calls.clear()
        long_wan(monkeypatch, *shape)
        outputs.append(tiny_sampling.sample(model, "wan", steps=1))
        assert {call.grid[:3] for call in calls} == {(3, shape[1] // 2, shape[2] // 2)}
        call = next(call for call in calls if call.role == "self")
        expected = expected_output(call, TokenGrid(3, shape[1] // 2, shape[2] // 2))
        assert (call.output - expected).norm() <= 1e-5 * expected.norm()
    assert outputs[0].shape != outputs[1].shape


def test_the_size_may_change_within_a_run(calls: list[Call], monkeypatch: pytest.MonkeyPatch) -> None:
    """An area of the picture is a model call with another grid of as many tokens; its plans are its own."""
    long_wan(monkeypatch, 3, 12, 12)
    conditioning = tiny_sampling.conditioning

    def in_areas(*args: Any) -> Any:
        positive, negative = conditioning(*args)
        ((text, extras),) = positive
        areas = ((8, 12, 0, 0), (12, 8, 0, 4))
        return [[text, {**extras, "area": area, "strength": 1.0}] for area in areas], negative

    monkeypatch.setattr(tiny_sampling, "conditioning", in_areas)
    tiny_sampling.sample(patched("wan"), "wan", steps=1)
    own = [call for call in calls if call.role == "self"]
    assert {call.grid[:3] for call in own} == {(3, 6, 6), (3, 4, 6), (3, 6, 4)}
    for call in own:
        expected = expected_output(call, call.grid)
        assert (call.output - expected).norm() <= 1e-5 * expected.norm()


def test_without_a_sparse_backend_nothing_is_read(calls: list[Call], monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[Any] = []
    forget = nodes_module("hook.memory").learn
    monkeypatch.setattr(wrappers.memory, "learn", lambda run: keys.extend(plan_keys(run)) or forget(run))
    tiny_sampling.sample(patched("wan", {"default": "sdpa_math"}), "wan", steps=1)
    assert {call.grid for call in calls} == {None}
    assert {(call.step, call.samples) for call in calls} == {(None, ())}
    assert keys
    assert {window for key in keys for window in key if type(window) is Window} == {ALWAYS}


def plan_keys(run: Any) -> list[Any]:
    return [key for model_call in run.model_calls() for key in model_call.session.plans]


def test_steps_are_of_the_whole_schedule(calls: list[Call], monkeypatch: pytest.MonkeyPatch) -> None:
    import comfy.sample

    model = patched("wan")
    tiny_sampling.sample(model, "wan", steps=4, sampler="heun")
    assert [step for step, _ in groupby(call.step for call in calls)] == [0, 1, 2, 3]
    assert {call.steps for call in calls} == {4}
    calls.clear()
    sample = comfy.sample.sample
    monkeypatch.setattr(comfy.sample, "sample", lambda *args, **more: sample(*args, **more, start_step=6, last_step=8))
    tiny_sampling.sample(model, "wan", steps=8)
    assert [(step, steps) for (step, steps), _ in groupby((call.step, call.steps) for call in calls)] == [
        (6, 8), (7, 8),
    ]  # fmt: skip


@pytest.mark.parametrize(("start", "last"), [(0, 20), (0, 10), (10, 20), (5, 8)])
def test_a_part_of_a_schedule_tells_where_it_lies(start: int, last: int) -> None:
    """Shift 5, as Wan has it; steps of equal percent."""
    sigmas = [1.0 - step / 20 for step in range(21)]
    shifted = [5 * sigma / (1 + 4 * sigma) for sigma in sigmas]
    found = progress.whole_schedule(
        shifted[start : last + 1], lambda percent: 5 * (1 - percent) / (1 + 4 * (1 - percent))
    )
    assert (found.before, found.steps) == (start, 20)
    assert progress.whole_schedule(shifted[start : last + 1], None)[1:3] == (0, last - start)
    assert progress.whole_schedule([1.0], None) == progress.NO_SAMPLER


@pytest.mark.parametrize("stopped", [False, True])
def test_nothing_is_kept_after_a_run(stopped: bool, calls: list[Call], monkeypatch: pytest.MonkeyPatch) -> None:
    import comfy.model_management

    sessions: list[Any] = []
    attention = sampling.DeviceSession.attention

    def keeping(session: Any, *args: Any) -> Any:
        sessions.append(session)
        session.progress.kept["some method"] = torch.zeros(1)
        if stopped and len(sessions) == 3:
            raise comfy.model_management.InterruptProcessingException
        return attention(session, *args)

    monkeypatch.setattr(sampling.DeviceSession, "attention", keeping)
    model = patched("wan")
    if stopped:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            tiny_sampling.sample(model, "wan", steps=2)
    else:
        tiny_sampling.sample(model, "wan", steps=2)
    assert {session.progress == Progress() for session in sessions} == {True}


def test_clusters_are_kept_for_each_condition_and_block_until_the_run_ends(
    calls: list[Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[tuple[int, set[object], tuple[str, ...]]] = []
    attention = sampling.DeviceSession.attention

    def watched(session: Any, *args: Any) -> Any:
        output, progress = attention(session, *args), session.progress
        kept.append((len(progress.kept), {place[3] for place in progress.kept}, progress.blocks))
        return output

    monkeypatch.setattr(sampling.DeviceSession, "attention", watched)
    options = {"svg2_first_times_fp": 1.5, "svg2_kmeans_iter_init": 2, "svg2_num_k_centroids": 8}
    svg2 = {"backend": "sparse_video_gen_2_attn", "extra": options}
    model = patched("wan", {"per_role": {"self": svg2}})
    tiny_sampling.sample(model, "wan", steps=3)
    blocks = kept[-1][2]
    assert len(blocks) > 1
    assert {names for _, _, names in kept} == {blocks}
    samples = kept[-1][1]
    assert kept[-1][0] == 2 * len(samples) * len(blocks), "of queries and of keys"
    assert kept[0][0] == 0, "the first step is dense"
    assert len({call.step for call in calls if call.backend == "sparse_video_gen_2_attn"}) == 3


def test_a_compiled_model_computes_the_same(calls: list[Call]) -> None:
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    model = patched("wan")
    expected = tiny_sampling.sample(model, "wan", steps=2)
    whole = model.clone()
    set_torch_compile_wrapper(whole, backend="eager", fullgraph=True)
    calls.clear()
    output = tiny_sampling.sample(whole, "wan", steps=2)
    assert {(call.backend, call.grid) for call in calls if call.role == "self"} == {
        ("video_sparse_attn", TokenGrid(*VIDEO))
    }
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_comfyui_is_told_of_the_executors_workspace(calls: list[Call], monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first run on: the guessed calls have a grid too."""
    estimates: list[int] = []
    needed = memory.needed
    monkeypatch.setattr(memory, "needed", lambda *args: estimates.append(needed(*args)) or estimates[-1])
    model = patched("wan")
    for _ in range(2):
        tiny_sampling.sample(model, "wan", steps=1)
    request = next(call for call in calls if call.role == "self")
    least = request.key.shape[2] * 2 * request.key.shape[3] * 4
    assert estimates[0] == estimates[1] >= least


def configured(node: str, backend: str, extra: dict[str, Any], *, strict: bool = False) -> Any:
    """A tiny Wan with this backend and options by one of our nodes."""
    stock, text = tiny_sampling.build("wan"), json.dumps(extra)
    if node == "selector":
        selector = nodes_module("configure.selector").AttentionBackendSelector
        return selector.execute(stock, backend, "exact", strict, "off", extra=text).args[0]
    if node == "role":
        return nodes_module("configure.per_role").PerRoleAttentionConfig.execute(stock, "self", backend, text).args[0]
    if node == "schedule":
        schedule = nodes_module("configure.schedule").AttentionSchedule
        return schedule.execute(stock, backend, "steps", "1-", role="self", extra=text).args[0]
    whole = json.dumps({"default": {"backend": backend, "extra": extra}})
    return nodes_module("configure.config_text").AttentionConfigText.execute(stock, whole).args[0]


@pytest.mark.parametrize("node", ["selector", "text", "role", "schedule"])
def test_nodes_take_a_sparse_backend_with_its_options(
    node: str, calls: list[Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes_module("hook.run"), "_told", set())
    tiny_sampling.sample(configured(node, "video_sparse_attn", {"sparsity": 0.5}), "wan", steps=2)
    steps = {call.step for call in calls if call.backend == "video_sparse_attn"}
    assert steps == ({1} if node == "schedule" else {0, 1})
    rows = [row for row in last_run()["rows"] if row["backend"] == "video_sparse_attn"]
    assert rows
    assert all(0.4 < row["kept"] < 0.7 for row in rows)  # cubes at borders are smaller
    if node == "selector":
        told = [note for note in last_run()["notes"] if getattr(note, "id", "") == "sparse.now"]
        later = {"sparsity": 0.5, "dense_steps": 1}
        tiny_sampling.sample(configured(node, "video_sparse_attn", later, strict=True), "wan", steps=2)
        assert {one["role"]: one["verdict"] for one in last_run()["audit"]} == {
            "self": "as asked", "cross": "not for this role",
        }  # fmt: skip
        assert not any(fell_back(row) for row in last_run()["rows"])
        again = [note for note in last_run()["notes"] if getattr(note, "id", "") == "sparse.now"]
        assert (len(told), again) == (1, [])
        said = kept.lines(last_run()["rows"])
        assert len(said) == 1
        assert said[0].endswith("the first 1 steps")


def test_only_a_backend_that_was_named_is_news(monkeypatch: pytest.MonkeyPatch) -> None:
    """What autotune took did not fall back before."""
    for asked, told in (("autotune", 0), ("radial_attn", 1)):
        monkeypatch.setattr(nodes_module("hook.run"), "_told", set())
        notes: list[str] = []
        rows = {0: SimpleNamespace(backend="radial_attn", calls=1, asked=asked)}
        sampling.Run.note_sparse_now(
            SimpleNamespace(run_report=SimpleNamespace(rows=rows, split={}), note=notes.append)
        )
        assert len(notes) == told


def test_a_record_repeats_a_sparse_run(calls: list[Call]) -> None:
    model = tiny_sampling.build("wan")
    set_config = nodes_module("hook.patch").set_config
    made = tiny_sampling.sample(set_config(model, parse_config(EVERYWHERE)), "wan", steps=2)
    runs = nodes_module("history.runs")
    run = runs.decisions(last_run()["number"])
    assert run["sparse"] == kept.of_rows(last_run()["rows"])
    assert run["sparse"][0]["kept"] < 0.7
    record = json.dumps(as_record([run], {}))
    calls.clear()
    repeating = set_config(model, parse_config(record, "text", read_files=False))
    again = tiny_sampling.sample(repeating, "wan", steps=2)
    assert torch.equal(again, made)
    assert {call.backend for call in calls if call.role == "self"} == {"video_sparse_attn"}
