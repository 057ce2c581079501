"""The hook's two sides for tests: our `nodes` modules without ComfyUI, and a model that calls attention as it does.

`nodes_module` imports one module of `nodes/` without running `nodes/__init__.py`, which needs ComfyUI.
`stand_in` builds a model with given module paths and class names, `model_call` runs attention calls at them, and
`Outcome` is one model call of a small Wan. `comfyui` is for the tests that need the real one.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from attention_backends.backends.config import AttentionConfig, AttentionSpec
from attention_backends.backends.kernels.backend import FLOATING, Backend, Limits
from attention_backends.backends.values.limits import Dtypes, ValueHeadDim
from attention_backends.backends.values.mask_plan import passed_on
from attention_backends.backends.values.platform import KINDS
from comfy_location import find_comfyui, why_no_comfyui

ROOT = Path(__file__).resolve().parent.parent
FLAG = "--use-pytorch-cross-attention"
ENVIRONMENT = (
    *("ATTENTION_BACKENDS_CONFIG", "ATTENTION_BACKENDS_TRACE", "DIFFUSION_ATTENTION_BACKEND", "DIFFUSERS_ATTN_BACKEND"),
)


def nodes_module(name: str) -> ModuleType:
    """`attention_backends.nodes.<name>`, loaded under a bare package that is gone again afterwards."""
    package = "attention_backends.nodes"
    bare = types.ModuleType(package)
    bare.__path__ = [str(ROOT / "nodes")]
    missing = package not in sys.modules
    if missing:
        sys.modules[package] = bare
    try:
        return importlib.import_module(f"{package}.{name}")
    finally:
        if missing:
            del sys.modules[package]


compiled, host, sampling, sites, masks, wrappers = (
    nodes_module(f"hook.{name}") for name in ("compiled", "override", "run", "attention_modules", "masks", "wrappers")
)


def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a person may have set for daily use must not decide a test."""
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)


def plain_comfyui(monkeypatch: pytest.MonkeyPatch) -> None:
    """`comfyui`, and nothing of ours set around it."""
    comfyui()
    no_environment(monkeypatch)


def pass_masks_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave masks as they are, so that kernels get the very calls of the model."""
    monkeypatch.setattr(masks, "inspect", lambda mask, *_: passed_on(mask))


def comfyui() -> Path:
    """Make `import comfy` work, always with the same flags; skip where there is no ComfyUI."""
    import tiny_sampling

    folder = find_comfyui()
    if folder is None:
        pytest.skip(why_no_comfyui())
    try:
        tiny_sampling.prepare(folder, FLAG)
        import comfy.sd  # noqa: F401
    except ModuleNotFoundError as error:
        pytest.skip(f"this Python lacks {error.name}, which the ComfyUI in {folder} needs")
    return folder


def marks_left(model: torch.nn.Module) -> list[str]:
    """Modules of a model that still carry something of ours, or any hook."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    return [
        path
        for path, module in model.named_modules()
        if "forward" in module.__dict__ or any(getattr(module, name) for name in hooks)
    ]


def exact(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    heads: int,
    mask: torch.Tensor | None = None,
    attn_precision: torch.dtype | None = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    scale: float | None = None,
    **_: Any,
) -> torch.Tensor:
    """What ComfyUI's hook asks for, in float64 from the definition; heads of keys are told by their size."""
    if not skip_reshape:
        head_dim = query.shape[-1] // heads
        query, key, value = (t.reshape(*t.shape[:2], -1, head_dim).transpose(1, 2) for t in (query, key, value))
    dtype = query.dtype
    groups = query.shape[1] // key.shape[1]
    key, value = (t.double().repeat_interleave(groups, dim=1) for t in (key, value))
    scores = query.double() @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        while mask.ndim < 4:
            mask = mask.unsqueeze(-3)  # (Lq, Lk) and (B, Lq, Lk) lack the heads, then the batch
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    output = (scores.softmax(-1) @ value).to(dtype)
    return output if skip_output_reshape else output.transpose(1, 2).flatten(2)


def optimized_attention(*args: Any, **kwargs: Any) -> torch.Tensor:
    """The hook as ComfyUI's attention functions have it: an override is asked unless it is the one that calls."""
    override = kwargs.get("transformer_options", {}).get(sampling.OVERRIDE)
    if override is None or "_inside_attn_wrapper" in kwargs:
        return exact(*args, **kwargs)
    return override(exact, *args, **kwargs, _inside_attn_wrapper=True)


class AttentionModule(torch.nn.Module):
    """Makes the attention calls that it is handed; the pack finds it by the function that its forward names."""

    def forward(self, calls: Iterable[tuple[tuple[Any, ...], dict[str, Any]]]) -> list[torch.Tensor]:
        outputs = []
        for args, kwargs in calls:
            outputs.append(optimized_attention(*args, **kwargs))
        return outputs


def stand_in(mro: Iterable[str], places: dict[str, str]) -> torch.nn.Module:
    """A model whose class has these names, first its own, with an AttentionModule at each path of `places`.

    `places` gives the class name of the module at each path.
    """
    kind: type = torch.nn.Module
    for name in reversed([name for name in mro if name not in ("Module", "ABC")]):
        kind = type(name, (kind,), {})
    model = kind()
    for path, class_name in places.items():
        node = model
        *parents, last = path.split(".")
        for parent in parents:
            if not hasattr(node, parent):
                node.add_module(parent, torch.nn.Module())
            node = getattr(node, parent)
        node.add_module(last, type(class_name, (AttentionModule,), {})())
    return model


class ModelExecutor:
    """What ComfyUI hands to a wrapper around a model call. One class for all: Python keeps a list of every class."""

    def __init__(self, model: torch.nn.Module, body: Callable[[], Any]) -> None:
        self.class_obj = SimpleNamespace(diffusion_model=model)
        self.body = body

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.body()


def model_call(model: torch.nn.Module, options: dict[str, Any], body: Callable[[], Any], device: str = "cpu") -> Any:
    """Run `body` as ComfyUI runs a model call, inside our wrapper around it."""
    executor = ModelExecutor(model, body)
    with torch.inference_mode():
        return wrappers.apply_model_wrapper(executor, torch.zeros(1, device=device), None, None, None, None, options)


Func = Callable[..., torch.Tensor]
PLACES = {"blocks.0.self_attn": "WanSelfAttention", "blocks.0.cross_attn": "WanI2VCrossAttention"}
ROLES = ["self", "wan.image_cross", "cross"]
HEADS = 2


def rows(length: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(1, length, HEADS * 16, generator=torch.Generator().manual_seed(seed)).to(dtype)


Q = rows(6)


def override(backend: str = "auto", foreign: Func | None = None, strict: bool = False, **per_role: str) -> Any:
    specs = {role: AttentionSpec(name) for role, name in per_role.items()}
    config = AttentionConfig(default=AttentionSpec(backend), per_role=specs, strict=strict, source="node")
    return host.Override((config,), foreign)


class Outcome:
    """One model call of a stand-in Wan: a self call, then an image and a text call of one cross-attention.

    `lengths` are their numbers of keys; `flags` go with every call.
    """

    def __init__(
        self,
        ours: Any,
        installed: Any = None,
        dtype: torch.dtype = torch.float32,
        lengths: tuple[int, int, int] = (6, 9, 4),
        **flags: Any,
    ) -> None:
        self.run = sampling.Run(ours)
        options = {sampling.KEY: ours, sampling.OVERRIDE: installed or ours, sampling.RUN_KEY: self.run}
        self.calls = [
            (
                (Q.to(dtype), rows(length, 1, dtype), rows(length, 2, dtype), HEADS),
                {**flags, "transformer_options": options},
            )
            for length in lengths
        ]
        self.model = stand_in(["WanModel"], PLACES)
        self.prepare(self.model)
        self.outputs: list[torch.Tensor] = []
        model_call(self.model, options, self._forward)
        self.run.close()

    def prepare(self, model: torch.nn.Module) -> None:
        """For subclasses: change the model before it runs."""

    def _forward(self) -> None:
        self_attn, cross_attn = (self.model.get_submodule(path) for path in PLACES)
        self.outputs = [*self_attn(self.calls[:1]), *cross_attn(self.calls[1:])]

    def expected(self, change: Callable[[torch.Tensor], torch.Tensor] = lambda query: query) -> list[torch.Tensor]:
        return [exact(change(args[0]), *args[1:]) for args, _ in self.calls]

    @property
    def rows(self) -> list[tuple[str, str, int]]:
        return [(row.role, row.backend, row.calls) for row in self.run.run_report.rows.values() if row.calls]

    @property
    def notes(self) -> dict[str, int]:
        return self.run.run_report.notes


class Kernel(Backend):
    """A backend for one test: `run` is its kernel."""

    kinds = KINDS
    limits = Limits(Dtypes(FLOATING), ValueHeadDim(may_differ=True))

    def __init__(self, name: str, run: Func, accuracy: str = "exact") -> None:
        self.id, self.run, self.accuracy = name, run, accuracy  # type: ignore[misc]

    def load(self, platform: Any) -> Func:
        return self.run


def close(ours: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-6)


def selected(model: Any, backend: str, strict: bool = False) -> Any:
    """What the Attention Backend Selector gives for a ComfyUI MODEL."""
    return nodes_module("hook.patch").set_default(model, backend, accuracy="exact", strict=strict, guard="off")


def with_role(model: Any, role: str, backend: str) -> Any:
    """What the Per-Role Attention Config gives for a ComfyUI MODEL."""
    return nodes_module("hook.patch").set_role(model, role, AttentionSpec(backend))


def last_run(back: int = 0) -> dict[str, Any]:
    """The account of the last sampling run, or of one before it."""
    return nodes_module("history.runs").recent()[back]


def counts(record: dict[str, Any]) -> dict[tuple[str, str], int]:
    """Calls of each role and backend."""
    found: dict[tuple[str, str], int] = {}
    for row in record["rows"]:
        found[row["role"], row["backend"]] = found.get((row["role"], row["backend"]), 0) + row["calls"]
    return found
