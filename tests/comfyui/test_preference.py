"""A checkpoint's own preference: found wherever it sits, run as ComfyUI runs it, called what it is, guarded.

ComfyUI 0.37 and newer make a call with `preferred_attention`, a module that holds the function, and take it out before
an override is asked. The stand-ins here do the same, written from that description.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from syrupy.assertion import SnapshotAssertion

torch = pytest.importorskip("torch", reason="torch is not installed")

from attention_backends.backends.config import AttentionConfig, AttentionSpec  # noqa: E402
from attention_backends.backends.report.audit import asked_and_ran, unexplained  # noqa: E402
from hook_side import HEADS, compiled, exact, host, model_call, nodes_module, plain_comfyui, rows, sampling  # noqa: E402
from torch.multiprocessing.reductions import StorageWeakRef  # noqa: E402

comfy_functions = nodes_module("hook.comfy_functions")

ran: list[str] = []
alive: list[bool] = []
watched: list[Any] = []


class Container:
    """As ComfyUI's AttentionTensorContainer."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor: torch.Tensor | None = tensor

    def peek(self) -> torch.Tensor:
        assert self.tensor is not None
        return self.tensor

    def take(self) -> torch.Tensor:
        tensor, self.tensor = self.peek(), None
        return tensor


def wrapped(func: Callable[..., torch.Tensor]) -> Any:
    """A function of ComfyUI's as its newest versions make it one."""

    @functools.wraps(func)
    def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
        preferred_attention = kwargs.pop("preferred_attention", None)
        in_containers = isinstance(args[0], Container)
        if "_inside_attn_wrapper" not in kwargs:
            kwargs["_inside_attn_wrapper"] = True
            override = kwargs.get("transformer_options", {}).get("optimized_attention_override")
            if override is not None:
                if in_containers and hasattr(override, "container_function"):
                    return override.container_function(*args, **kwargs)  # type: ignore[no-any-return]
                if in_containers:
                    args = tuple(one.take() for one in args[:3]) + args[3:]
                return override(func, *args, **kwargs)  # type: ignore[no-any-return]
            if preferred_attention is not None and preferred_attention.function is not None:
                return preferred_attention.function(*args, **kwargs)  # type: ignore[no-any-return]
        if in_containers:
            if wrapper.container_function is not None:  # type: ignore[attr-defined]
                return wrapper.container_function(*args, **kwargs)  # type: ignore[attr-defined,no-any-return]
            args = tuple(one.take() for one in args[:3]) + args[3:]
        return func(*args, **kwargs)

    wrapper.container_function = None  # type: ignore[attr-defined]
    return wrapper


@wrapped
def attention_pytorch(*args: Any, **kwargs: Any) -> torch.Tensor:
    ran.append("pytorch")
    return exact(*args, **kwargs)


@wrapped
def attention_comfy_kitchen_int8(*args: Any, **kwargs: Any) -> torch.Tensor:
    ran.append("int8")
    return exact(*args, **kwargs)


def _int8_in_containers(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Takes the tensors, makes its small copies, lets go, and computes."""
    ran.append("int8 in containers")
    q, k, v = q.take(), k.take(), v.take()
    copies = q.clone(), k.clone(), v.clone()
    del q, k, v
    alive.extend(not memory.expired() for memory in watched)
    return exact(*copies, *args, **kwargs)


attention_comfy_kitchen_int8.container_function = _int8_in_containers


@wrapped
def attention_comfy_kitchen_sol(*args: Any, tau: float = 1.0, **kwargs: Any) -> torch.Tensor:
    ran.append(f"sol {tau}")
    return exact(*args, **kwargs)


INT8 = SimpleNamespace(function=attention_comfy_kitchen_int8)
SOL = SimpleNamespace(function=functools.partial(attention_comfy_kitchen_sol, tau=0.5))
NONE = SimpleNamespace(function=None)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(compiled, "comfys_attention", lambda: attention_pytorch)
    ran.clear()
    alive.clear()
    watched.clear()
    yield
    host._outside_runs.clear()


class Own(torch.nn.Module):
    """The usual place: at the module that makes the call."""

    def __init__(self, holder: Any) -> None:
        super().__init__()
        self.comfy_attention = holder

    def forward(self, x: torch.Tensor, options: Any, **flags: Any) -> torch.Tensor:
        return optimized_attention(
            x, x, x, HEADS, transformer_options=options, preferred_attention=self.comfy_attention, **flags
        )  # type: ignore[no-any-return]


class Elsewhere(torch.nn.Module):
    """SD3's place: its joint block computes with what its parts hold, each call with another one's."""

    def __init__(self, first: Any, second: Any) -> None:
        super().__init__()
        self.context_block, self.x_block = torch.nn.Module(), torch.nn.Module()
        self.context_block.attn, self.x_block.attn, self.x_block.attn2 = (torch.nn.Module() for _ in range(3))
        self.context_block.attn.comfy_attention = NONE
        self.x_block.attn.comfy_attention, self.x_block.attn2.comfy_attention = first, second

    def forward(self, x: torch.Tensor, options: Any) -> torch.Tensor:
        for part in (self.x_block.attn, self.x_block.attn2):
            x = optimized_attention(
                x, x, x, HEADS, transformer_options=options, preferred_attention=part.comfy_attention
            )
        return x


class Borrows(torch.nn.Module):
    """Makes its calls with what a module beside it holds, and holds nothing."""

    def __init__(self, other: torch.nn.Module) -> None:
        super().__init__()
        self.other = [other]

    def forward(self, x: torch.Tensor, options: Any) -> torch.Tensor:
        holder = self.other[0].comfy_attention
        return optimized_attention(x, x, x, HEADS, transformer_options=options, preferred_attention=holder)  # type: ignore[no-any-return]


optimized_attention = attention_pytorch


class WanModel(torch.nn.Module):
    def __init__(self, part: torch.nn.Module, name: str = "self_attn") -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([torch.nn.ModuleDict({name: part})])
        self.part = [part]

    def forward(self, x: torch.Tensor, options: Any, **flags: Any) -> torch.Tensor:
        return self.part[0](x, options, **flags)  # type: ignore[no-any-return]


def run_on(model: torch.nn.Module, x: torch.Tensor, times: int = 1, flags: Any = None, **said: Any) -> Any:
    """So many model calls with this configuration; the run."""
    default = AttentionSpec(said.pop("backend", "auto"))
    ours = host.Override((AttentionConfig(default=default, source="node", **said),))
    run = sampling.Run(ours)
    options = {sampling.KEY: ours, sampling.OVERRIDE: ours, sampling.RUN_KEY: run}
    for _ in range(times):
        model_call(model, options, lambda: model(x, options, **(flags or {})))
    run.close()
    return run


def rows_of(run: Any) -> list[tuple[str, str | None, str | None]]:
    return [(row.backend, row.asked, row.reason) for row in run.run_report.rows.values() if row.calls]


def test_int8_and_sparse_ones_run_under_their_own_names_and_are_guarded(snapshot: SnapshotAssertion) -> None:
    for holder, called, function in ((INT8, "comfy_kitchen_int8", "int8"), (SOL, "comfy_kitchen_sol", "sol 0.5")):
        ran.clear()
        run = run_on(WanModel(Own(holder)), rows(6), times=2)
        assert ran == [function] * 2
        assert rows_of(run) == [(called, called, None)]
        (row,) = run.run_report.rows.values()
        assert row.source == snapshot(name=called)
        assert row.guard is not None
        assert row.guard.checked > 0
        assert list(run.run_report.notes) == []


def test_strict_is_content_with_what_the_checkpoint_prefers() -> None:
    run = run_on(WanModel(Own(SOL)), rows(6), strict=True)
    assert rows_of(run) == [("comfy_kitchen_sol", "comfy_kitchen_sol", None)]
    assert unexplained(asked_and_ran(run.run_report)) is None


def test_it_is_found_on_another_module() -> None:
    run = run_on(WanModel(Elsewhere(INT8, SOL)), rows(6), times=2)
    assert ran == ["int8", "sol 0.5"] * 2
    assert sorted(rows_of(run)) == [(name, name, None) for name in ("comfy_kitchen_int8", "comfy_kitchen_sol")]


def test_it_is_found_on_a_module_that_is_not_within() -> None:
    """Only the call itself tells it."""
    part = Own(SOL)
    run = run_on(WanModel(Borrows(part)), rows(6), times=2)
    assert ran == ["sol 0.5"] * 2
    assert rows_of(run) == [("comfy_kitchen_sol", "comfy_kitchen_sol", None)]


@pytest.mark.parametrize("model", ["MMDiT", "SomeModel"])
def test_it_is_found_there_without_a_stack_too(model: str) -> None:
    """In a compiled graph: by the role table, or among the modules within."""
    sites, roles = nodes_module("hook.attention_modules"), nodes_module("hook.roles")
    module = Elsewhere(INT8, SOL)
    site = sites.AttentionModule(module, "joint_blocks.0", roles.family_of((model,)))
    assert site.preferred_attention(0) is INT8.function
    assert site.preferred_attention(1) is SOL.function


def test_a_lora_may_bring_it_and_take_it_away() -> None:
    """ComfyUI puts another holder at the module for as long as the LoRA is on the model."""
    part = Own(NONE)
    model = WanModel(part)
    run_on(model, rows(6))
    assert ran == []
    part.comfy_attention = INT8
    assert rows_of(run_on(model, rows(6))) == [("comfy_kitchen_int8", "comfy_kitchen_int8", None)]
    part.comfy_attention = NONE
    assert [row[0] for row in rows_of(run_on(model, rows(6)))] == ["torch_sdpa"]


def test_a_named_backend_goes_first_and_comfy_means_it(snapshot: SnapshotAssertion) -> None:
    run = run_on(WanModel(Own(INT8)), rows(6), backend="sdpa_math")
    assert ran == []
    assert list(run.run_report.notes) == snapshot
    run = run_on(WanModel(Own(INT8)), rows(6), backend="comfy", strict=True)
    assert ran == ["int8"]
    assert rows_of(run) == [("comfy", "comfy", None)]
    (row,) = run.run_report.rows.values()
    assert row.member == "comfy_kitchen_int8"
    assert row.guard is not None
    assert list(run.run_report.notes) == []
    assert unexplained(asked_and_ran(run.run_report)) is None


FORBIDDEN = {
    "the model's own flag": ({"low_precision_attention": False}, torch.float32),
    "a forced upcast": ({"attn_precision": torch.float32}, torch.float16),
}


@pytest.mark.parametrize("why", FORBIDDEN)
@pytest.mark.parametrize("strict", [False, True])
def test_what_the_model_forbids_is_forbidden_to_it_too(why: str, strict: bool) -> None:
    flags, dtype = FORBIDDEN[why]
    run = run_on(WanModel(Own(SOL)), rows(6, dtype=dtype), flags=flags, strict=strict)
    assert ran == []
    reason = "comfy_kitchen_sol: accuracy sparse, and the model forbids low precision for this call"
    assert rows_of(run) == [("torch_sdpa", "comfy_kitchen_sol", reason)]
    assert list(run.run_report.notes) == []
    assert unexplained(asked_and_ran(run.run_report)) is None


@pytest.mark.parametrize("why", FORBIDDEN)
@pytest.mark.parametrize("strict", [False, True])
def test_comfy_by_name_is_comfyuis_own_function_there(why: str, strict: bool, snapshot: SnapshotAssertion) -> None:
    """ComfyUI hands such calls to the checkpoint's function all the same, which takes no notice of the flag."""
    flags, dtype = FORBIDDEN[why]
    run = run_on(WanModel(Own(SOL)), rows(6, dtype=dtype), flags=flags, backend="comfy", strict=strict)
    assert ran == ["pytorch"]
    assert rows_of(run) == [("comfy", "comfy", None)]
    (row,) = run.run_report.rows.values()
    assert row.member is None
    assert list(run.run_report.notes) == snapshot
    assert unexplained(asked_and_ran(run.run_report)) is None


def test_force_upcast_attention_forbids_lossy_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """ComfyUI decides it from its command line, for models that say nothing."""
    hook_plans = nodes_module("hook.hook_plans")
    monkeypatch.setattr(hook_plans, "forces_upcast", lambda precision, dtype: dtype == torch.float16)
    assert rows_of(run_on(WanModel(Own(INT8)), rows(6, dtype=torch.float16)))[0][0] == "torch_sdpa"
    run = run_on(WanModel(Own(NONE)), rows(6, dtype=torch.float16), backend="emulated_int8", accuracy="quantized")
    assert rows_of(run)[0][0] == "torch_sdpa"
    assert rows_of(run_on(WanModel(Own(INT8)), rows(6, dtype=torch.bfloat16)))[0][0] == "comfy_kitchen_int8"


def test_one_that_is_caught_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: Any, **kwargs: Any) -> torch.Tensor:
        return exact(*args, **kwargs) * 1.5

    holder = SimpleNamespace(function=wrapped(functools.update_wrapper(wrong, attention_comfy_kitchen_int8)))
    run = run_on(WanModel(Own(holder)), rows(6), times=2, guard="enforce")
    names = [row[0] for row in rows_of(run)]
    assert names == ["torch_sdpa"]
    assert "comfy_kitchen_int8: guard: " in rows_of(run)[0][2]


def test_a_function_that_no_table_knows_is_watched() -> None:
    def attention_of_tomorrow(*args: Any, **kwargs: Any) -> torch.Tensor:
        return exact(*args, **kwargs)

    run = run_on(WanModel(Own(SimpleNamespace(function=wrapped(attention_of_tomorrow)))), rows(6))
    (row,) = run.run_report.rows.values()
    assert (row.backend, row.guard.checked > 0) == ("comfy", True)
    assert "attention_of_tomorrow" in row.source


class InContainers(torch.nn.Module):
    """As nearly every family hands its tensors over by now."""

    def __init__(self, holder: Any) -> None:
        super().__init__()
        self.comfy_attention = holder

    def forward(self, x: torch.Tensor, options: Any) -> torch.Tensor:
        q, k, v = (Container(x + n) for n in range(3))
        watched[:] = [StorageWeakRef(one.peek().untyped_storage()) for one in (q, k, v)]
        output: torch.Tensor = optimized_attention(
            q, k, v, HEADS, transformer_options=options, preferred_attention=self.comfy_attention
        )
        assert all(memory.expired() for memory in watched), "kept until Python looks for circles"
        return output


@pytest.mark.parametrize("said", [{}, {"backend": "comfy"}], ids=["auto", "comfy"])
def test_containers_are_handed_on_and_nothing_of_them_is_kept(said: dict[str, Any]) -> None:
    """INT8 makes its copies and goes on with them alone, as in ComfyUI; at the first call too, which is planned."""
    gc.collect()
    gc.disable()
    try:
        run_on(WanModel(InContainers(INT8)), rows(6), times=3, guard="off", **said)
    finally:
        gc.enable()
    assert ran == ["int8 in containers"] * 3
    assert alive == [False] * 9


def test_containers_of_comfyuis_own_function_too() -> None:
    gc.collect()
    gc.disable()
    try:
        run_on(WanModel(InContainers(NONE)), rows(6), times=2, backend="comfy")
    finally:
        gc.enable()
    assert ran == ["pytorch"] * 2


def test_the_guard_looks_at_some_of_them_and_hands_the_others_on() -> None:
    class Repeats(WanModel):
        def forward(self, x: torch.Tensor, options: Any, **flags: Any) -> torch.Tensor:
            return [self.part[0](x, options) for _ in range(12)][-1]  # type: ignore[no-any-return]

    run = run_on(Repeats(InContainers(INT8)), rows(6))
    (row,) = run.run_report.rows.values()
    assert ran.count("int8") == row.guard.checked > 0
    assert ran.count("int8 in containers") == 12 - row.guard.checked > 0
    assert not any(alive)


# ---- what the server was started with


@pytest.mark.parametrize(
    ("name", "called", "accuracy"),
    [
        ("attention_sage", "sage_attn", "quantized"),
        ("attention_comfy_kitchen_int8", "comfy_kitchen_int8", "quantized"),
        ("attention_flash", None, "exact"),
        ("attention_split", None, "exact"),
        ("attention_sub_quad", None, "exact"),
    ],
)
def test_comfy_is_what_the_server_was_started_with(
    name: str, called: str | None, accuracy: str, monkeypatch: pytest.MonkeyPatch, snapshot: SnapshotAssertion
) -> None:
    """Named, it is that function and called so; auto with accuracy exact says what it changes."""

    def func(*args: Any, **kwargs: Any) -> torch.Tensor:
        ran.append(name)
        return exact(*args, **kwargs)

    func.__name__ = func.__qualname__ = name
    function = wrapped(func)
    monkeypatch.setattr(compiled, "comfys_attention", lambda: function)
    monkeypatch.setitem(globals(), "optimized_attention", function)
    run = run_on(WanModel(Own(NONE)), rows(6), backend="comfy", strict=True)
    assert ran == [name]
    (row,) = run.run_report.rows.values()
    assert (row.backend, row.member, row.guard is not None) == ("comfy", called, accuracy != "exact")
    assert unexplained(asked_and_ran(run.run_report)) is None
    run = run_on(WanModel(Own(NONE)), rows(6))
    assert [row[0] for row in rows_of(run)] == ["torch_sdpa"]
    notes = [note for note in run.run_report.notes if "ComfyUI's own attention on this server is" in note]
    assert len(notes) == (accuracy != "exact")
    if notes:
        assert f"{called} ({name}" in notes[0]
        assert notes[0].partition("), ")[2] == snapshot  # before it, the flag that this process was started with
    assert list(run_on(WanModel(Own(NONE)), rows(6), backend="sdpa_math").run_report.notes) == []


@pytest.mark.comfy
@pytest.mark.parametrize("part", [InContainers, Own])
def test_calls_are_captured_whatever_they_come_in(part: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """For comparisons, which then run what the checkpoint asks for where ComfyUI's own is compared."""
    plain_comfyui(monkeypatch)
    capture = nodes_module("compare.capture")
    ours = capture.Capturing((AttentionConfig(default=AttentionSpec("sdpa_math"), source="node", guard="off"),))
    ours.calls = {}
    run = sampling.Run(ours)
    options = {sampling.KEY: ours, sampling.OVERRIDE: ours, sampling.RUN_KEY: run}
    model = WanModel(part(INT8))
    for _ in range(2):
        model_call(model, options, lambda: model(rows(6), options))
    run.close()
    assert ran == []
    (kept,) = ours.calls.values()
    assert (kept.role, kept.block) == ("self", "blocks.0")
    kept.host(kept.call)
    assert ran == ["int8"]
