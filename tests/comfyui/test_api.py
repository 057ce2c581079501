"""The library as functions: what a call computes, what is kept between calls, accounts, and how it is imported."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from syrupy.assertion import SnapshotAssertion

torch = pytest.importorskip("torch", reason="torch is not installed")

from api_calls import K, Q, V, close, nothing_in_force, random  # noqa: E402, F401
from attention_backends.backends import (  # noqa: E402
    CheckError,
    account,
    api,
    attention,
    attention_backend,
    checks,
    force_backend,
    read_environment,
)
from attention_backends.backends.api import calls, context, session  # noqa: E402
from attention_backends.backends.config import AttentionConfig  # noqa: E402
from attention_backends.backends.engine.router import Router  # noqa: E402
from attention_backends.backends.engine.routers import OutsideComfyUI  # noqa: E402
from attention_backends.backends.kernels import BACKENDS  # noqa: E402
from attention_backends.backends.kernels.registry import detect  # noqa: E402
from attention_backends.backends.values.errors import (  # noqa: E402
    ConfigError,
    NoBackendError,
)
from hook_side import Kernel  # noqa: E402
from torch.nn.functional import scaled_dot_product_attention as sdpa  # noqa: E402

pytestmark = pytest.mark.usefixtures("nothing_in_force")
ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


# What a call computes


def test_the_same_as_sdpa_with_every_argument() -> None:
    mask = torch.rand(2, 1, 6, 10, generator=random) > 0.3
    bias = torch.randn(1, 4, 6, 10, generator=random)
    close(attention(Q, K, V), sdpa(Q, K, V))
    close(attention(Q, K, V, mask, scale=0.3), sdpa(Q, K, V, mask, scale=0.3))
    close(attention(Q, K, V, bias), sdpa(Q, K, V, bias))
    close(attention(Q, K, V, mask[0, 0]), sdpa(Q, K, V, mask[0, 0]))
    close(attention(Q, K, V, is_causal=True), sdpa(Q, K, V, is_causal=True))
    grouped = K[:, :2], V[:, :2]
    close(attention(Q, *grouped, enable_gqa=True), sdpa(Q, *grouped, enable_gqa=True))
    close(attention(Q, *grouped, mask, enable_gqa=True), sdpa(Q, *grouped, mask, enable_gqa=True))
    close(attention(Q, K, V, enable_gqa=True), sdpa(Q, K, V))


@pytest.mark.parametrize("backend", [None, "sdpa_math", "reference", "emulated_int8"])
def test_the_output_has_the_callers_layout(backend: str | None) -> None:
    straight = attention(Q, K, V, backend=backend)
    swapped = attention(*(tensor.transpose(1, 2) for tensor in (Q, K, V)), backend=backend, layout="BSHD")
    assert straight.shape == (2, 4, 6, 16)
    assert swapped.shape == (2, 6, 4, 16)
    close(swapped.transpose(1, 2), straight)


def test_a_call_takes_a_configuration_in_any_form() -> None:
    close(attention(Q, K, V, backend={"per_role": {"self": "sdpa_math"}}), sdpa(Q, K, V))
    with account() as run_report:
        for backend in ({"default": "sdpa_math"}, {"backend": "sdpa_math"}, "default=sdpa_math", AttentionConfig()):
            attention(Q, K, V, backend=backend)
    assert {row.backend: row.calls for row in run_report.rows.values() if row.backend == "sdpa_math"} == {
        "sdpa_math": 3
    }
    for wrong, message in ((["sdpa_math"], "expected text or a mapping, not list"), (7, "not int")):
        with pytest.raises(ConfigError, match=rf"^attention\(backend\): .*{message}"):
            attention(Q, K, V, backend=wrong)


def test_every_fact_of_a_call_has_a_plan_of_its_own() -> None:
    half = [tensor.to(torch.bfloat16) for tensor in (Q, K, V)]
    mask = torch.ones(2, 1, 6, 10, dtype=torch.bool)
    mask[..., 7:] = False
    cases: list[tuple[list[torch.Tensor], dict[str, object]]] = [
        ([Q, K, V], {}),
        ([Q, K, V], {"scale": 0.5}),
        ([Q, K, V], {"is_causal": True}),
        ([Q, K, V], {"attn_mask": mask}),
        ([Q, K, V], {"attn_mask": mask.float().log()}),
        ([Q, K[:, :, :7], V[:, :, :7]], {}),
        (half, {}),
    ]
    for _ in range(2):
        for tensors, options in cases:
            expected = sdpa(*tensors, **options)
            torch.testing.assert_close(attention(*tensors, **options), expected, rtol=0, atol=1e-2)
    (session,) = context.thread_local.own.sessions.values()
    assert len(session.slots) == len(cases)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"layout": "SBHD"}, id="layout"),
        pytest.param({"query": Q[0]}, id="dimensions"),
        pytest.param({"key": K[:, :2], "value": V[:, :2]}, id="heads"),
        pytest.param({"value": V[:, :, :5]}, id="kv_len"),
        pytest.param({"key": K[:1], "value": V[:1]}, id="batch"),
        pytest.param({"attn_mask": torch.ones(2, 6, 10)}, id="mask"),
    ],
)
def test_what_could_be_read_in_two_ways_or_beyond_the_tensors_is_refused(
    change: dict[str, object], snapshot: SnapshotAssertion
) -> None:
    with pytest.raises(ValueError) as caught:
        attention(**{"query": Q, "key": K, "value": V, **change})  # type: ignore[arg-type]
    assert str(caught.value) == snapshot


def test_comfy_is_unavailable_outside_comfyui_with_its_reason(snapshot: SnapshotAssertion) -> None:
    with pytest.raises(NoBackendError) as caught, attention_backend("comfy", strict=True):
        pass
    with account() as run_report, attention_backend("comfy"):
        attention(Q, K, V)
    (row,) = run_report.rows.values()
    assert row.backend == "torch_sdpa"
    assert row.reason == snapshot
    assert row.reason in str(caught.value)


# Sessions and failures


def use(monkeypatch: pytest.MonkeyPatch, **kernels: Callable[..., torch.Tensor]) -> None:
    replaced = {name: Kernel(name, run) for name, run in kernels.items()}
    router = Router(detect(CPU), {**BACKENDS, "comfy": OutsideComfyUI(), **replaced})
    for module in (api, session):
        monkeypatch.setattr(module, "router_for", lambda device=None: router)


def test_one_session_is_kept_for_a_configuration_and_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(3):
        with attention_backend("sdpa_math"):
            attention(Q, K, V)
        with attention_backend({"default": "sdpa_math"}):
            attention(Q, K, V)
        attention(Q, K, V)
    sessions = list(context.thread_local.own.sessions.values())
    assert len(sessions) == 2
    assert [sum(row.calls for row in sessions[0].run_report.rows.values()), *map(len, (s.slots for s in sessions))] == [
        9,
        1,
        1,
    ]
    planned: list[object] = []
    monkeypatch.setattr(session.CallSession, "plan", lambda *arguments, **_: planned.append(arguments))
    attention(Q, K, V)
    with attention_backend("sdpa_math"):
        attention(Q, K, V)
    assert planned == []  # the warm path plans nothing


def test_a_bad_call_is_not_held_against_a_backend(snapshot: SnapshotAssertion) -> None:
    bad = Q, K.double(), V  # a request has the query's dtype only, so a good call has the same facts
    with pytest.raises(NoBackendError) as caught:
        attention(*bad)
    reason = next(line for line in str(caught.value).splitlines() if line.lstrip().startswith("torch_sdpa:"))
    ours, error, _ = reason.partition("RuntimeError")  # and what torch says
    assert ours == snapshot
    assert error
    close(attention(Q, K, V, role="cross"), sdpa(Q, K, V))
    with force_backend("sdpa_flash"):
        with pytest.raises(NoBackendError, match="sdpa_flash: failed before"):
            attention(*bad)
        close(attention(Q, K, V, role="cross"), sdpa(Q, K, V))


def test_kernels_are_told_of_grouped_heads_only_where_there_are_some(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[bool] = []
    use(monkeypatch, torch_sdpa=lambda call: told.append(call.enable_gqa) or call.query)
    attention(Q, K, V, enable_gqa=True)
    attention(Q, K[:, :2], V[:, :2], enable_gqa=True)
    attention(Q, K, V)
    assert told == [False, True, False]


def test_running_out_of_memory_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(call: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    use(monkeypatch, sdpa_math=full)
    with attention_backend("sdpa_math"), pytest.raises(torch.OutOfMemoryError):
        attention(Q, K, V)


def test_a_kernel_that_fails_gives_way_and_says_so(
    monkeypatch: pytest.MonkeyPatch, snapshot: SnapshotAssertion
) -> None:
    def broken(call: object) -> torch.Tensor:
        raise ValueError("as it should")

    use(monkeypatch, sdpa_math=broken)
    with account() as run_report, attention_backend("sdpa_math"):
        close(attention(Q, K, V), sdpa(Q, K, V))
    (row,) = [row for row in run_report.rows.values() if row.calls]
    assert row.backend == "torch_sdpa"
    assert row.reason == snapshot


def test_a_compiled_function_asks_again_at_every_run() -> None:
    def doubled(query: torch.Tensor) -> torch.Tensor:
        return attention(query * 2, K, V) + 1

    compiled = torch.compile(doubled, backend="eager")
    seen = []
    for block in (force_backend("sdpa_math"), contextlib.nullcontext(), force_backend("reference")):
        with block, account() as run_report:
            close(compiled(Q), sdpa(Q * 2, K, V) + 1)
        seen.append(run_report.summary())
    assert seen == ["self sdpa_math 1 call", "self torch_sdpa 1 call", "self reference 1 call"]


# Accounts


def test_an_account_has_the_calls_inside_it_and_nested_ones_both() -> None:
    def counts(run_report: object) -> dict[tuple[str, str, str | None], int]:
        return {(row.role, row.backend, row.asked): row.calls for row in run_report.rows.values()}  # type: ignore[attr-defined]

    attention(Q, K, V)
    with account() as outer:
        attention(Q, K, V)
        with account() as inner, attention_backend("sdpa_math"):
            attention(Q, K, V)
            attention(Q, K, V, role="cross")
            assert inner.calls == 2  # while it is open
        attention(Q, K, V)
    attention(Q, K, V)
    assert counts(inner) == {("self", "sdpa_math", "sdpa_math"): 1, ("cross", "sdpa_math", "sdpa_math"): 1}
    assert counts(outer) == {("self", "torch_sdpa", None): 2, **counts(inner)}
    assert outer.device == "cpu"
    assert outer.as_dict()["audit"] == [
        {"role": role, "asked": asked, "source": source, "ran": ran, "reasons": [], "verdict": "as asked"}
        for role, asked, source, ran in (
            ("self", "auto", "platform route", {"torch_sdpa": 2}),
            ("self", "sdpa_math", "attention_backend.default", {"sdpa_math": 1}),
            ("cross", "sdpa_math", "attention_backend.default", {"sdpa_math": 1}),
        )
    ]


def test_an_account_has_the_calls_of_threads_that_it_was_handed_to() -> None:
    async def run() -> int:
        with account() as run_report:
            await asyncio.gather(
                *(asyncio.to_thread(lambda: [attention(Q, K, V) for _ in range(50)]) for _ in range(4))
            )
        return run_report.calls

    assert asyncio.run(run()) == 200


# Checks


def test_checks_are_off_unless_a_block_or_the_environment_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    monkeypatch.setattr(calls, "check", lambda call, only_shapes=False: only_shapes or seen.append(call))
    attention(Q, K, V)
    assert seen == []
    with checks():
        attention(Q, K, V)
        attention(Q, K, V)
        with checks(False):
            attention(Q, K, V)
    assert len(seen) == 2  # each call, also on the warm path
    monkeypatch.setenv("DIFFUSERS_ATTN_CHECKS", "yes")
    read_environment()
    attention(Q, K, V)
    assert len(seen) == 3
    with checks(False):
        attention(Q, K, V)
    assert len(seen) == 3


def test_a_check_comes_before_any_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, torch_sdpa=lambda call: pytest.fail("a kernel saw it"))
    with checks():
        for bad in ({"value": V[:, :, :5]}, {"query": Q[0]}, {"key": K[:, :2], "value": V[:, :2]}, {"key": K.double()}):
            with pytest.raises(CheckError):
                attention(**{"query": Q, "key": K, "value": V, **bad})


# Importing, and what docs/python_api.md shows

SCRIPT = """
import importlib.util, json, pathlib, sys
root = pathlib.Path(sys.argv[1])
spec = importlib.util.spec_from_file_location("attention_backends", root / "__init__.py",
                                              submodule_search_locations=[str(root)])
package = importlib.util.module_from_spec(spec)
sys.modules["attention_backends"] = package
spec.loader.exec_module(package)

import attention_backends.backends as backends
early = "attention_backends.backends.api" in sys.modules
from attention_backends.backends import account, attention, attention_backend, checks, force_backend
from attention_backends.backends import api
print(json.dumps([early, "torch" in sys.modules, callable(api.attention), sorted(backends.__all__)]))
try:
    backends.nothing
except AttributeError as error:
    print(error)
"""


def test_importing_the_functions_imports_no_torch(tmp_path: Path, snapshot: SnapshotAssertion) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(ROOT)], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    functions = ["account", "attention", "attention_backend", "checks", "force_backend", "read_environment"]
    names = ["CheckError", "GroupError", *functions]
    assert json.loads(first) == [False, False, True, names]
    assert second == snapshot


def test_the_example_of_the_page_runs_as_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs" / "python_api.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```\n", text, re.S)
    (example,) = (block for block in blocks if "attention_backends.backends" in block)
    exec(compile(example, "python_api.md", "exec"), {})  # noqa: S102
    printed = re.findall(r"# prints: (.*)", example)
    assert printed
    assert capsys.readouterr().out.splitlines() == printed


@pytest.mark.parametrize("place", range(3))
def test_an_array_is_refused_in_words(place: int) -> None:
    given: list[object] = [torch.ones(1, 2, 4, 8) for _ in range(3)]
    for other, kind in ((torch.ones(1, 2, 4, 8).numpy(), r"numpy\.ndarray"), ([1.0], r"builtins\.list")):
        given[place] = other
        with pytest.raises(CheckError, match=rf"takes torch tensors, not {kind}; torch\.as_tensor"):
            attention(*given)
