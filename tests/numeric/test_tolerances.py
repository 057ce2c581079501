"""One table says how far a kernel may be off, by its arithmetic, and everything that judges kernels reads it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from attention_backends.backends.engine.plan import CallKind
from attention_backends.backends.kernels import BACKENDS
from attention_backends.backends.kernels.backend import FLOATING, Backend, Limits
from attention_backends.backends.values.limits import Causal, Dtypes, ValueHeadDim
from attention_backends.backends.values.platform import KINDS, Platform, parse_platform
from attention_backends.backends.values.tolerance import (
    ACCURACY,
    EARNED,
    EXACT,
    SPARSE,
    TOLERANCES,
    Tolerance,
    accuracy,
    tolerance,
)

torch = pytest.importorskip("torch", reason="torch is not installed")

from attention_backends.backends.config import AttentionConfig, AttentionSpec  # noqa: E402
from attention_backends.backends.doctor.probe import judge  # noqa: E402
from attention_backends.backends.doctor.problems import problems, tensors  # noqa: E402
from attention_backends.backends.engine.router import Router  # noqa: E402
from attention_backends.backends.engine.session import Session  # noqa: E402
from attention_backends.backends.observe import observe  # noqa: E402
from attention_backends.backends.observe.advisories import FP4, QUANTIZED, UNROTATED_INT8  # noqa: E402
from attention_backends.backends.values.request import AttentionCall, AttentionRequest  # noqa: E402
from attention_calls import as_comfyui_runs, call_for, copied  # noqa: E402
from tolerance import _fp4, _int8, _int8_fp8, error, truth  # noqa: E402

ROOT = Path(__file__).parents[2]
CPU = Platform("cpu", torch=torch.__version__)


class Off(Backend):
    """Attention that errs by a share of each row's size, in a random direction."""

    summary = "For a test."
    kinds = KINDS
    limits = Limits(Dtypes(FLOATING), Causal("any"), ValueHeadDim(may_differ=True))

    def __init__(self, backend_id: str, arithmetic: str, share: float, *, sparse: bool = False) -> None:
        self.id, self.arithmetic, self.sparse, self.share = backend_id, arithmetic, sparse, share  # type: ignore[misc]

    def load(self, platform: Platform):
        def run(call: AttentionCall) -> torch.Tensor:
            output = truth(call)
            noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=output.dtype)
            size = output.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
            return (output + self.share * size * noise).to(call.query.dtype)

        return run


IDS = ("sage_attn_3", "sage_attn", "comfy_kitchen_int8", "torch_sdpa", "sol_attn")


@pytest.mark.parametrize(
    ("arithmetic", "share", "good"),
    [
        *(("fp4", 0.19, True), ("fp4", 0.45, False), ("fp8", 0.06, True)),
        *(("fp8", 0.19, False), ("int8", 0.03, True), ("int8", 0.19, False)),
    ],
)
@pytest.mark.parametrize("backend_id", IDS)
def test_an_error_is_judged_the_same_under_any_id_and_by_all(
    backend_id: str, arithmetic: str, share: float, good: bool
) -> None:
    backend = Off(backend_id, arithmetic, share)
    with as_comfyui_runs():
        assert (judge(backend_id, CPU, {backend_id: backend}).status == "ok") is good, "probe"
        router = Router(CPU, {**BACKENDS, backend_id: backend}, use_probe_results=False)
        session = observe(Session(router, (AttentionConfig(AttentionSpec(backend_id), guard="watch"),)))
        call = call_for(AttentionRequest(1, 4, 130, 200, 64, "bfloat16"))
        slot = session.plan(CallKind(call.request(), "self", "self"))
        session.attention(slot, copied(call))
        (row,) = session.run_report.rows.values()
        assert (row.backend, row.guard.checked) == (backend_id, 1)
        assert (row.guard.alarms == 0) is good, f"guard: {row.guard}"
        assert (row.guard.relative_l2_limit, row.guard.row_error_limit) == TOLERANCES[arithmetic]


def test_a_trial_of_measured_has_the_same_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The budget that a candidate's first call is judged by is that of its arithmetic."""
    from attention_backends.backends.observe.autotune import trial_plan

    source = ast.parse(Path(trial_plan.__file__).read_text(encoding="utf-8"))
    names = {node.id for node in ast.walk(source) if isinstance(node, ast.Name)}
    calls = [node.attr for node in ast.walk(source) if isinstance(node, ast.Attribute)]
    assert "BUDGETS" not in names
    assert calls.count("tolerance_on") == 2


def test_every_backend_declares_arithmetic_and_the_class_follows() -> None:
    for backend in BACKENDS.values():
        assert backend.arithmetic in TOLERANCES, backend.id
        assert backend.accuracy == accuracy(backend.arithmetic, sparse=backend.sparse), backend.id
        assert backend.accuracy in ACCURACY
        assert not any("accuracy" in vars(base) for base in type(backend).__mro__[:-1] if base is not Backend)
    assert set(EARNED) == set(TOLERANCES)
    classes = {backend.id: backend.accuracy for backend in BACKENDS.values() if backend.accuracy != "exact"}
    assert classes == {
        **dict.fromkeys(
            ("sage_attn", "sage_fp16_cuda", "sage_fp16_triton", "sage_fp8_cuda", "sage_fp8_sm90"), "quantized"
        ),
        **dict.fromkeys(("sage_attn_3", "comfy_kitchen_int8", "emulated_int8"), "quantized"),
        **dict.fromkeys(("sliding_tile_attn", "video_sparse_attn", "vmoba_attn", "radial_attn"), "sparse"),
        **dict.fromkeys(("sparse_video_gen_2_attn", "sparse_video_gen_attn", "sparge_attn", "sol_attn"), "sparse"),
        **dict.fromkeys(("subblock_attn", "nabla_attn", "ssta_attn", "cube_attn", "custom_sparse_attn"), "sparse"),
    }


def test_a_class_that_is_declared_alone_counts() -> None:
    """As backends of other people may, written before there was an arithmetic."""

    class Quantized(Off):
        accuracy = "quantized"

    class Sparse(Off):
        accuracy = "sparse"

    assert Quantized("x", "half", 0).tolerance_on(CPU) == TOLERANCES["int8"]
    assert Quantized("x", "fp4", 0).tolerance_on(CPU) == TOLERANCES["fp4"]
    assert Sparse("x", "half", 0).tolerance_on(CPU) == SPARSE
    assert Off("x", "half", 0, sparse=True).accuracy == "sparse"


SAGE = "packages=sageattention=={};triton==3.6.0"


@pytest.mark.parametrize(
    ("backend", "machine", "arithmetic"),
    [
        ("sage_attn", f"cuda:8.9,{SAGE.format('1.0.6')}", "int8"),
        ("sage_attn", f"cuda:8.0,{SAGE.format('2.2.0')}", "int8"),
        ("sage_attn", f"cuda:8.6,{SAGE.format('2.2.0')}", "int8"),
        ("sage_attn", f"cuda:8.9,{SAGE.format('2.2.0')}", "fp8"),
        ("sage_attn", f"cuda:9.0,{SAGE.format('2.2.0')}", "fp8"),
        ("sage_attn", f"cuda:12.0,{SAGE.format('2.2.0')}", "fp8"),
        ("flash_attn", "cuda:9.0,packages=flash-attn==2.8.3", "half"),
        ("reference", "cpu", "fp32"),
        ("sage_attn_3", "cuda:12.0,packages=sageattn3==1.0.0;triton==3.6.0", "fp4"),
    ],
)
def test_of_several_kernels_under_one_id_the_one_that_runs_counts(backend: str, machine: str, arithmetic: str) -> None:
    platform = parse_platform(machine)
    assert BACKENDS[backend].arithmetic_on(platform) == arithmetic
    assert BACKENDS[backend].tolerance_on(platform) == TOLERANCES[arithmetic]


def test_every_limit_leaves_room_for_its_arithmetic() -> None:
    """On the probe's own calls, emulated: 1.5 to 3 times what FP8 and FP4 err by, and more for INT8."""
    for request in problems():
        if request.dtype == "float32" or request.kv_len != 256:
            continue
        call = AttentionCall(*tensors(request))
        expected = truth(call)
        for arithmetic, emulated in (("fp8", _int8_fp8), ("fp4", _fp4)):
            made = error(emulated(call), expected)
            assert 1.5 * made.total < TOLERANCES[arithmetic].relative_l2 < 3 * made.total, arithmetic
            assert made.worst_row < TOLERANCES[arithmetic].row_error
        assert 1.5 * error(_int8(call), expected).total < TOLERANCES["int8"].relative_l2


def test_the_table_is_in_order_and_sees_an_empty_row() -> None:
    ordered = [TOLERANCES[name] for name in ("fp32", "half", "int8", "fp8", "fp4")]
    assert ordered == sorted(ordered)
    assert all(limits.row_error < 1 for limits in ordered)
    for name in TOLERANCES:
        assert tolerance(name, sparse=True) == Tolerance(
            max(TOLERANCES[name].relative_l2, SPARSE.relative_l2), max(TOLERANCES[name].row_error, SPARSE.row_error)
        )
    assert [accuracy(name) for name in TOLERANCES] == ["exact"] * len(EXACT) + ["quantized"] * 3


def test_recommendations_follow_from_arithmetic() -> None:
    assert FP4 == ("sage_attn_3",)
    assert set(QUANTIZED) == {*FP4, *UNROTATED_INT8, "comfy_kitchen_int8"}
    assert "emulated_int8" in UNROTATED_INT8


def test_there_is_no_other_table() -> None:
    """No module but the table maps accuracy classes or arithmetics to numbers."""
    names = {*TOLERANCES, *ACCURACY, "int8_fp8"}
    found = []
    for path in [
        *ROOT.glob("backends/**/*.py"),
        *ROOT.glob("comparison/*.py"),
        *ROOT.glob("tests/*.py"),
        *ROOT.glob("tests/*/test_*.py"),
    ]:
        if path.name == "tolerance.py" and path.parent.name == "values":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Dict):
                keys = {key.value for key in node.keys if isinstance(key, ast.Constant)}
                numbers = [
                    each
                    for value in node.values
                    for each in ast.walk(value)
                    if isinstance(each, ast.Constant) and isinstance(each.value, float)
                ]
                if len(keys & names) > 1 and numbers:
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert found == []
