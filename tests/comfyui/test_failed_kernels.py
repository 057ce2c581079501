"""A kernel that fails, or returns what is no output of its call: who runs instead, in which order, and what is said.

The order is the named backend, the platform's priorities, then ComfyUI's own function, each once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from syrupy.assertion import SnapshotAssertion

torch = pytest.importorskip("torch", reason="torch is not installed")

from attention_backends.backends import attention, attention_backend  # noqa: E402
from attention_backends.backends.api import calls, context, session  # noqa: E402
from attention_backends.backends.config import AttentionConfig, AttentionSpec  # noqa: E402
from attention_backends.backends.engine.router import Router  # noqa: E402
from attention_backends.backends.engine.routers import OutsideComfyUI  # noqa: E402
from attention_backends.backends.kernels import BACKENDS  # noqa: E402
from attention_backends.backends.kernels.backend import FLOATING, Limits  # noqa: E402
from attention_backends.backends.kernels.registry import detect  # noqa: E402
from attention_backends.backends.values.errors import NoBackendError  # noqa: E402
from attention_backends.backends.values.faults import KernelFaultError, KernelOutputError  # noqa: E402
from attention_backends.backends.values.limits import Causal, Dtypes, ValueHeadDim  # noqa: E402
from attention_calls import as_comfyui_runs  # noqa: E402
from hook_side import HEADS, Kernel, compiled, exact, host, model_call, override, sampling, stand_in  # noqa: E402

CPU = torch.device("cpu")
LENGTH = 9


@pytest.fixture(autouse=True)
def _as_comfyui() -> Iterator[None]:
    with as_comfyui_runs():
        yield
    host._outside_runs.clear()


class Machine:
    """A CPU with the kernels `sdpa_math`, `reference` and `torch_sdpa`, the last two its priorities.

    Each notes its calls in `ran`.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **kernels: Callable[[Any], Any]) -> None:
        self.ran: list[str] = []
        mine = {
            name: self._backend(name, kernels.get(name, right)) for name in ("sdpa_math", "reference", "torch_sdpa")
        }
        self.router = Router(detect(CPU), {**BACKENDS, **mine})
        self.router.priority = self.router.priority._replace(order=("reference", "torch_sdpa"))
        monkeypatch.setattr(sampling, "router_for", lambda device: self.router)
        outside = Router(detect(CPU), {**self.router.backends, "comfy": OutsideComfyUI()})
        outside.priority = self.router.priority
        monkeypatch.setattr(session, "router_for", lambda device=None: outside)
        nobody = threading.local()  # sessions that nobody has used
        for module in (calls, context):
            monkeypatch.setattr(module, "thread_local", nobody)
        self.comfy: Callable[..., Any] = exact

    def _backend(self, name: str, run: Callable[[Any], Any]) -> Kernel:
        def noted(call: Any) -> Any:
            self.ran.append(name)
            return run(call)

        backend = Kernel(name, noted)
        backend.limits = Limits(Dtypes(FLOATING), Causal("any"), ValueHeadDim(may_differ=True))  # type: ignore[misc]
        return backend

    def func(self, *args: Any, **kwargs: Any) -> Any:
        """What ComfyUI would have run."""
        self.ran.append("comfy")
        return self.comfy(*args, **kwargs)


def right(call: Any) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(
        call.query, call.key, call.value, call.attn_mask, is_causal=call.is_causal, scale=call.scale
    )


def broken(call: Any) -> torch.Tensor:
    raise ValueError("as it should")


def tensors(batch: int = 2, length: int = LENGTH) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(batch)
    return [torch.randn(batch, length, HEADS * 16, generator=random) for _ in range(3)]


def keys_by_sample() -> torch.Tensor:
    """Keys that differ by sample: a call for each."""
    mask = torch.zeros(2, 1, LENGTH)
    mask[0, :, 4:] = mask[1, :, 6:] = -torch.inf
    return mask


MASKS: dict[str, torch.Tensor | None] = {
    "no mask": None,
    "passed on": torch.randn(2, LENGTH, LENGTH),
    "one part": torch.tensor([0.0] * 5 + [-torch.inf] * 4).expand(1, 1, LENGTH),
    "a part for each sample": keys_by_sample(),
    "causal": torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(),
}


class Container:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor: torch.Tensor | None = tensor

    def take(self) -> torch.Tensor:
        tensor, self.tensor = self.tensor, None
        assert tensor is not None
        return tensor


def hook(machine: Machine, ours: Any, mask: torch.Tensor | None = None, **flags: Any) -> tuple[torch.Tensor, Any]:
    """One call of the hook; its output and its run."""
    run = flags.pop("run", None) or sampling.Run(ours)
    options = {sampling.KEY: ours, sampling.OVERRIDE: ours, sampling.RUN_KEY: run}
    owned = flags.pop("owned", False)
    given = tensors()
    if owned:
        given = [Container(tensor) for tensor in given]
        call = lambda: ours.container_function(*given, HEADS, mask=mask, transformer_options=options)  # noqa: E731
    else:
        call = lambda: ours(machine.func, *given, HEADS, mask=mask, transformer_options=options, **flags)  # noqa: E731
    return model_call(stand_in(["WanModel"], {}), options, call), run


def rows(run: Any) -> dict[str, str | None]:
    return {row.backend: row.reason for row in run.run_report.rows.values() if row.calls}


# The order


@pytest.mark.parametrize("owned", [False, True], ids=["held", "owned"])
@pytest.mark.parametrize("mask", MASKS)
def test_each_runs_once_and_comfyui_last(monkeypatch: pytest.MonkeyPatch, mask: str, owned: bool) -> None:
    machine = Machine(monkeypatch, sdpa_math=broken, reference=broken, torch_sdpa=broken)
    monkeypatch.setattr(compiled, "comfys_attention", lambda: machine.func)
    ours = override("sdpa_math")
    expected = exact(*tensors(), HEADS, MASKS[mask])
    found, run = hook(machine, ours, MASKS[mask], owned=owned)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    parts = 2 if mask == "a part for each sample" else 1
    assert machine.ran == ["sdpa_math", "reference", "torch_sdpa", "comfy"] * parts
    (reason,) = {row.reason for row in run.run_report.rows.values() if row.calls}
    wanted = [f"{name}: failed: ValueError: as it should" for name in ("sdpa_math", "reference", "torch_sdpa")]
    assert [text for text in wanted if reason.count(text) == 1] == wanted
    assert set(rows(run)) == {"comfy"}
    machine.ran.clear()
    found, _ = hook(machine, ours, MASKS[mask], owned=owned, run=run)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    assert machine.ran == ["comfy"] * parts, "what failed is not tried again in this run"


@pytest.mark.parametrize("failing", [0, 1, 2, 3])
@pytest.mark.parametrize("asked", ["sdpa_math", "auto", "comfy"])
def test_the_next_in_order_runs(
    monkeypatch: pytest.MonkeyPatch, asked: str, failing: int, snapshot: SnapshotAssertion
) -> None:
    order = {
        "sdpa_math": ["sdpa_math", "reference", "torch_sdpa", "comfy"],
        "auto": ["reference", "torch_sdpa", "comfy"],
    }
    wanted = order.get(asked, ["comfy", "reference", "torch_sdpa"])
    machine = Machine(monkeypatch, **{name: broken for name in wanted[:failing] if name != "comfy"})
    if "comfy" in wanted[:failing]:
        machine.comfy = lambda *args, **kwargs: broken(None)
    if failing < len(wanted):
        found, run = hook(machine, override(asked))
        torch.testing.assert_close(found, exact(*tensors(), HEADS), rtol=0, atol=2e-6)
        assert list(rows(run)) == [wanted[failing]]
        assert machine.ran == wanted[: failing + 1]
    else:
        with pytest.raises(NoBackendError) as caught:
            hook(machine, override(asked))
        assert machine.ran == wanted
        lines = str(caught.value).splitlines()
        assert [next(line for line in lines if line.startswith(f"  {name}: ")) for name in wanted] == snapshot


def test_outside_comfyui_the_priorities_are_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, sdpa_math=broken, reference=broken)
    apart = [tensor.unflatten(2, (HEADS, 16)).transpose(1, 2) for tensor in tensors()]
    with attention_backend("sdpa_math"):
        found = attention(*apart)
    assert torch.equal(found, torch.nn.functional.scaled_dot_product_attention(*apart))
    assert machine.ran == ["sdpa_math", "reference", "torch_sdpa"]
    machine = Machine(monkeypatch, sdpa_math=broken, reference=broken, torch_sdpa=broken)
    with attention_backend("sdpa_math"), pytest.raises(NoBackendError, match="torch_sdpa: failed before"):
        attention(*apart)
    assert machine.ran == ["sdpa_math", "reference", "torch_sdpa"]


STOPPERS = {
    "strict": (ValueError("as it should"), NoBackendError),
    "out of memory": (torch.OutOfMemoryError("out of memory"), torch.OutOfMemoryError),
    "a fault of the device": (RuntimeError("CUDA error: device-side assert triggered"), KernelFaultError),
}


@pytest.mark.parametrize("second", [False, True], ids=["the first", "the second"])
@pytest.mark.parametrize("why", STOPPERS)
def test_what_stops_a_run(monkeypatch: pytest.MonkeyPatch, why: str, second: bool) -> None:
    """The first kernel, or the one that runs after it; strict concerns the first alone."""
    error, raised = STOPPERS[why]

    def stops(call: Any) -> torch.Tensor:
        raise error

    if why == "strict" and second:
        pytest.skip("strict stops at the first")
    machine = Machine(monkeypatch, sdpa_math=broken if second else stops, reference=stops)
    with pytest.raises(raised):
        hook(machine, override("sdpa_math", strict=why == "strict"))
    assert machine.ran == (["sdpa_math", "reference"] if second else ["sdpa_math"])


# What is no output of the call


def one_sample(call: Any) -> torch.Tensor:
    return right(call)[:1]


BAD: dict[str, Callable[[Any], Any]] = {
    "one sample for all": one_sample,
    "one head for all": lambda call: right(call)[:, :1],
    "a row short": lambda call: right(call)[:, :, :-1],
    "one row": lambda call: right(call)[:, :, :1],
    "a row more": lambda call: torch.cat([right(call), right(call)[:, :, :1]], 2),
    "padded heads": lambda call: torch.cat([right(call)] * 2, 3),
    "BSHD": lambda call: right(call).transpose(1, 2),
    "three dimensions": lambda call: right(call).flatten(0, 1),
    "half": lambda call: right(call).half(),
    "double": lambda call: right(call).double(),
    "another device": lambda call: right(call).to("meta"),
    "a tuple": lambda call: (right(call), None),
    "a list": lambda call: [right(call)],
    "nothing": lambda call: None,
    "an array": lambda call: right(call).numpy(),
}


@pytest.mark.parametrize("mask", ["no mask", "passed on", "one part", "a part for each sample"])
@pytest.mark.parametrize("bad", BAD)
def test_a_wrong_output_is_a_failure(monkeypatch: pytest.MonkeyPatch, bad: str, mask: str) -> None:
    if bad == "one sample for all" and mask == "a part for each sample":
        pytest.skip("its parts have one sample")
    machine = Machine(monkeypatch, sdpa_math=BAD[bad])
    ours = override("sdpa_math")
    found, run = hook(machine, ours, MASKS[mask])
    torch.testing.assert_close(found, exact(*tensors(), HEADS, MASKS[mask]), rtol=0, atol=2e-6)
    ((backend, reason),) = rows(run).items()
    assert backend == "reference"
    assert reason.startswith("sdpa_math: failed: KernelOutputError: returned ")
    machine.ran.clear()
    hook(machine, ours, MASKS[mask], run=run)
    assert set(machine.ran) == {"reference"}


@pytest.mark.parametrize("bad", BAD)
def test_a_wrong_output_is_a_failure_in_the_python_api(monkeypatch: pytest.MonkeyPatch, bad: str) -> None:
    machine = Machine(monkeypatch, sdpa_math=BAD[bad])
    apart = [tensor.unflatten(2, (HEADS, 16)).transpose(1, 2) for tensor in tensors()]
    with attention_backend("sdpa_math"):
        found = attention(*apart)
    assert torch.equal(found, torch.nn.functional.scaled_dot_product_attention(*apart))
    assert machine.ran == ["sdpa_math", "reference"]


@pytest.mark.parametrize("bad", [bad for bad in BAD if bad != "BSHD"])  # flattened, it has the right shape
def test_comfyuis_own_function_is_looked_at_too(monkeypatch: pytest.MonkeyPatch, bad: str) -> None:
    machine = Machine(monkeypatch)

    def func(query: Any, key: Any, value: Any, heads: int, **flags: Any) -> Any:
        apart = [tensor.unflatten(2, (heads, -1)).transpose(1, 2) for tensor in (query, key, value)]
        output = BAD[bad](type("call", (), dict(zip(("query", "key", "value"), apart, strict=True), **NO_FLAGS)))
        return output.transpose(1, 2).flatten(2) if isinstance(output, torch.Tensor) and output.ndim == 4 else output

    machine.comfy = func
    found, run = hook(machine, override("comfy"))
    torch.testing.assert_close(found, exact(*tensors(), HEADS), rtol=0, atol=2e-6)
    assert list(rows(run)) == ["reference"]


NO_FLAGS = {"attn_mask": None, "is_causal": False, "scale": None}


PACKED: dict[str, Callable[[torch.Tensor], Any]] = {
    "one token for all": lambda output: output[:1],
    "a token short": lambda output: output[:-1],
    "a token more": lambda output: torch.cat([output, output[:1]]),
    "one head for all": lambda output: output[:, :1],
    "heads first": lambda output: output.transpose(0, 1),
    "half": lambda output: output.half(),
    "a tuple": lambda output: (output, None),
    "nothing": lambda output: None,
    "right": lambda output: output,
}


@pytest.mark.parametrize("bad", PACKED)
def test_a_wrong_output_over_packed_tokens_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, bad: str, snapshot: SnapshotAssertion
) -> None:
    machine = Machine(monkeypatch)
    packed: list[str] = []

    def kernel(call: Any) -> Any:
        packed.append("packed")
        each = zip(
            *(
                part.split(lengths)
                for part, lengths in (
                    (call.query, call.q_lengths),
                    (call.key, call.kv_lengths),
                    (call.value, call.kv_lengths),
                )
            ),
            strict=True,
        )
        outputs = [torch.nn.functional.scaled_dot_product_attention(*(t.transpose(0, 1) for t in one)) for one in each]
        return PACKED[bad](torch.cat([output.transpose(0, 1) for output in outputs]))

    backend = machine.router.backends["sdpa_math"]
    backend.varlen, backend.load_varlen = True, lambda platform: kernel  # type: ignore[misc, method-assign]
    run = sampling.Run(ours := override("sdpa_math"))
    for _ in range(2):
        found, _ = hook(machine, ours, MASKS["a part for each sample"], run=run)
        torch.testing.assert_close(found, exact(*tensors(), HEADS, keys_by_sample()), rtol=0, atol=2e-6)
    assert list(rows(run)) == ["sdpa_math"]
    right = bad == "right"
    assert (packed, machine.ran) == (["packed"] * (1 + right), [] if right else ["sdpa_math"] * 4)
    said = [note for note in run.run_report.notes if "KernelOutputError" in note]
    assert len(said) == (not right)
    assert said == snapshot


@pytest.mark.parametrize("gives_up", [False, True], ids=["kept", "given up"])
def test_a_wrong_output_for_tensors_that_nobody_else_holds(monkeypatch: pytest.MonkeyPatch, gives_up: bool) -> None:
    def one_sample(call: Any) -> torch.Tensor:
        output = right(call)[:1]
        if gives_up:
            call.query = call.key = call.value = None
        return output

    machine = Machine(monkeypatch, sdpa_math=one_sample)
    monkeypatch.setattr(compiled, "comfys_attention", lambda: machine.func)
    ours = override("sdpa_math")
    run = sampling.Run(ours)
    if gives_up:
        words = r"returned \(1, 2, 9, 16\) float32 on cpu, not \(2, 2, 9, 16\).*freed"
        with pytest.raises(KernelOutputError, match=words):
            hook(machine, ours, owned=True, run=run)
        assert machine.ran == ["sdpa_math"]
    found, _ = hook(machine, ours, owned=True, run=run)
    torch.testing.assert_close(found, exact(*tensors(), HEADS), rtol=0, atol=2e-6)
    assert machine.ran == ["sdpa_math", "reference"], "the next call of the kind runs elsewhere"


def test_a_wrong_output_below_another_packs_override(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, sdpa_math=one_sample)
    ours = override("sdpa_math", lambda func, *args, **kwargs: func(*args, **kwargs) + 1)
    found, run = hook(machine, ours)
    torch.testing.assert_close(found, exact(*tensors(), HEADS) + 1, rtol=0, atol=2e-6)
    assert list(rows(run)) == ["reference"]


def test_a_wrong_output_in_a_compiled_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, sdpa_math=one_sample)
    monkeypatch.setattr(compiled, "comfys_attention", lambda: machine.func)
    ours = override("sdpa_math")
    given = tensors()

    def forward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return ours(exact, query, key, value, HEADS)

    found = torch.compile(forward, backend="eager", fullgraph=True)(*given)
    torch.testing.assert_close(found, exact(*given, HEADS), rtol=0, atol=2e-6)
    assert machine.ran == ["sdpa_math", "reference"]


@pytest.mark.parametrize("mode", ["watch", "enforce"])
@pytest.mark.parametrize("bad", BAD)
def test_a_wrong_output_is_seen_before_the_guard_reads_it(monkeypatch: pytest.MonkeyPatch, bad: str, mode: str) -> None:
    """Reading rows beyond its end would be a fault of a card."""
    machine = Machine(monkeypatch, sdpa_math=BAD[bad])
    machine.router.backends["sdpa_math"].accuracy = "quantized"  # type: ignore[misc]
    config = AttentionConfig(default=AttentionSpec("sdpa_math"), accuracy="quantized", guard=mode, source="node")
    found, run = hook(machine, host.Override((config,)))
    torch.testing.assert_close(found, exact(*tensors(), HEADS), rtol=0, atol=2e-6)
    ((backend, reason),) = rows(run).items()
    assert (backend, reason.startswith("sdpa_math: failed: KernelOutputError")) == ("reference", True)


@pytest.mark.parametrize("mask", ["no mask", "a part for each sample"])
@pytest.mark.parametrize("then", [broken, lambda call: None, lambda call: right(call).half()])
@pytest.mark.parametrize("changed", ["query", "key", "value"])
def test_with_enforce_the_next_kernel_gets_what_a_failed_one_got(
    monkeypatch: pytest.MonkeyPatch, changed: str, then: Callable[[Any], Any], mask: str
) -> None:
    """A kernel that writes into its inputs, and fails before the guard compares them."""

    def writes(call: Any) -> Any:
        getattr(call, changed).mul_(3)
        return then(call)

    machine = Machine(monkeypatch, sdpa_math=writes)
    machine.router.backends["sdpa_math"].accuracy = "quantized"  # type: ignore[misc]
    config = AttentionConfig(default=AttentionSpec("sdpa_math"), guard="enforce", source="node")
    found, run = hook(machine, host.Override((config,)), MASKS[mask])
    torch.testing.assert_close(found, exact(*tensors(), HEADS, MASKS[mask]), rtol=0, atol=2e-6)
    assert list(rows(run)) == ["reference"]


def test_autocast_changes_what_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's attention returns autocast's dtype there, with and without us."""
    machine = Machine(monkeypatch)
    with torch.autocast("cpu", torch.bfloat16):
        found, run = hook(machine, override("sdpa_math"))
    assert (found.dtype, machine.ran, rows(run)) == (torch.bfloat16, ["sdpa_math"], {"sdpa_math": None})
