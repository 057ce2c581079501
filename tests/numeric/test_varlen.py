"""Masks that leave samples or blocks keys of their own run as one call over packed tokens, where a backend has that."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial, wraps
from typing import Any

import pytest
from syrupy.assertion import SnapshotAssertion

torch = pytest.importorskip("torch", reason="torch is not installed")

from attention_backends.backends import api, attention, attention_backend  # noqa: E402
from attention_backends.backends.api import session  # noqa: E402
from attention_backends.backends.api.session import CallSession  # noqa: E402
from attention_backends.backends.cards.heads import HeadsOverCards  # noqa: E402
from attention_backends.backends.config.text import parse_config  # noqa: E402
from attention_backends.backends.engine.mask_reader import inspect  # noqa: E402
from attention_backends.backends.engine.plan import CallKind  # noqa: E402
from attention_backends.backends.engine.router import Router  # noqa: E402
from attention_backends.backends.engine.session import Session  # noqa: E402
from attention_backends.backends.engine.sub_calls import calls_of, plan_sub_calls  # noqa: E402
from attention_backends.backends.kernels.support.layout import Elements  # noqa: E402
from attention_backends.backends.report import RunReport  # noqa: E402
from attention_backends.backends.values.errors import NoBackendError  # noqa: E402
from attention_backends.backends.values.faults import KernelFaultError  # noqa: E402
from attention_backends.backends.values.platform import Platform  # noqa: E402
from attention_backends.backends.values.request import AttentionCall, AttentionRequest  # noqa: E402
from attention_calls import as_comfyui_runs, call_for  # noqa: E402
from fakes import arithmetic, flash_attn_2, on_platform, torch_varlen  # noqa: E402
from kernel_machines import SAGE_1, SAGE_2, SAGE_FORK  # noqa: E402
from tolerance import allowed, error, truth  # noqa: E402

MACHINES = [
    ("flash_attn_2", "flash-attn==2.8.3", (8, 6), "flash_attn_varlen_func", "exact"),
    ("flash_attn", "flash-attn==2.8.3", (8, 6), "flash_attn_varlen_func", "exact"),
    ("flash_attn_3", "flash-attn-3==3.0.0", (9, 0), "flash_attn_3.flash_attn_varlen_func", "exact"),
    ("flash_attn_4", "flash-attn-4==4.0.0b36", (10, 0), "flash_attn_4.flash_attn_varlen_func", "exact"),
    ("flashinfer_attn", "flashinfer-python==0.7.2", (9, 0), "run", "exact"),
    ("sdpa_flash", "", (9, 0), "varlen_attn", "exact"),
    ("sage_attn", SAGE_1, (8, 9), "sageattention_1.sageattn_varlen", "int8"),
    ("sage_attn", SAGE_2, (8, 9), "sageattention_2.sageattn_varlen", "int8"),
    ("sage_attn", SAGE_FORK, (8, 6), "sageattention_2.sageattn_varlen", "int8"),
    ("sage_fp16_triton", SAGE_2, (8, 9), "sageattention_2.sageattn_varlen", "int8"),
]


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with as_comfyui_runs():
        yield


def router_on(
    monkeypatch: pytest.MonkeyPatch, packages: str, capability: tuple[int, int], version: str = "2.12.0"
) -> Router:
    pairs = tuple(tuple(package.split("==")) for package in packages.split())
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", torch_varlen.module(version))
    platform = Platform("cuda", capability=capability, torch=version, cuda="13.0", cudnn=91002, packages=pairs)
    return on_platform(monkeypatch, replace(platform, os="linux"))


def request(**changes: object) -> AttentionRequest:
    sizes = {"batch": 4, "num_heads": 4, "q_len": 70, "kv_len": 192, "head_dim": 64, "dtype": "float16"}
    return AttentionRequest(**{**sizes, **changes})  # type: ignore[arg-type]


def run(
    router: Router, backend: str, call: AttentionCall, config: str = "", divider: Callable[[Session], Any] | None = None
) -> tuple[torch.Tensor, Session]:
    """The call as its mask is read, twice, as in two steps of a run."""
    session = Session(router, (parse_config(config or backend, "test"),))
    session.divider = None if divider is None else divider(session)
    mask_plan = inspect(call.attn_mask, call.key.shape[2])
    calls = calls_of(session, mask_plan, call, backend)
    parts = plan_sub_calls(
        session,
        mask_plan,
        call,
        calls,
        lambda part, words, grid: session.plan(CallKind(part.request(), "self", "self", mask=words)),
    )
    arithmetic.CALLS.clear()
    session.attention(parts, call, mask_plan)
    return session.attention(parts, call, mask_plan), session


def masked(call: AttentionCall, visible: torch.Tensor) -> AttentionCall:
    return AttentionCall(
        call.query, call.key, call.value, visible[:, None, None, :], scale=call.scale, enable_gqa=call.enable_gqa
    )


def random_keys(rng: random.Random, batch: int, kv_len: int, block: int, gaps: bool) -> torch.Tensor:
    """(batch, kv_len): prefixes of different lengths, one of them empty now and then, or keys with gaps."""
    visible = torch.zeros(batch, kv_len, dtype=torch.bool)
    counts = [*rng.sample(range(block, kv_len + 1, block), batch - 1), rng.choice((0, block))]
    for sample, count in enumerate(counts):
        taken = rng.sample(range(kv_len), count) if gaps else range(count)
        visible[sample, list(taken)] = True
    return visible


@pytest.mark.parametrize("case", MACHINES, ids=lambda case: f"{case[0]} with {case[1]}")
@pytest.mark.parametrize("gaps", [False, True], ids=["prefixes", "gaps"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_random_lengths_are_one_call_and_equal_sdpa_with_the_mask(
    monkeypatch: pytest.MonkeyPatch, case: tuple, gaps: bool, kv_heads: int
) -> None:
    backend, packages, capability, function, arithmetic_class = case
    router = router_on(monkeypatch, packages, capability)
    rng = random.Random(f"{backend} {gaps} {kv_heads}")
    block = 32 if "1.0.6" not in packages else 64  # 1.0.6 is right for full blocks of 64 keys only
    for number in range(3):
        batch = rng.randint(3, 4) if block < 64 else 3
        facts = request(batch=batch, q_len=rng.randint(1, 90), num_kv_heads=kv_heads, scale=rng.choice((None, 0.2)))
        facts = facts._replace(kv_len=256)
        call = masked(call_for(facts, seed=number), random_keys(rng, batch, 256, block, gaps))
        output, session = run(router, backend, call)
        assert output.shape == call.query.shape
        assert error(output, truth(call)).within(allowed(call, arithmetic_class)), (number, facts.describe())
        assert arithmetic.CALLS.count(function) == 2, arithmetic.CALLS
        (row,) = (row for row in session.run_report.rows.values() if row.calls)
        assert (row.backend, row.mask, row.calls) == (backend, "key_padding, per sample, varlen", 2)
        assert not session.run_report.notes


FLASH = ("flash-attn==2.8.3", (8, 6))


def lengths_call(*counts: int, **changes: object) -> AttentionCall:
    facts = request(batch=len(counts), **changes)
    visible = torch.arange(facts.kv_len)[None] < torch.tensor(counts)[:, None]
    return masked(call_for(facts), visible)


def rows_of(session: Session) -> list[tuple[str, str, int]]:
    return [(row.backend, row.mask, row.calls) for row in session.run_report.rows.values() if row.calls]


@pytest.mark.parametrize("batch", [1, 2])
def test_blocks_on_the_diagonal_are_one_call(monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    facts = request(batch=batch, q_len=96, kv_len=160, num_kv_heads=2)
    call = call_for(facts)
    mask = torch.zeros(1, 1, 96, 160, dtype=torch.bool)
    for rows, keys in ((slice(0, 20), slice(0, 40)), (slice(20, 60), slice(40, 70)), (slice(70, 96), slice(90, 160))):
        mask[..., rows, keys] = True  # queries 60 to 69 see nothing
    call.attn_mask = mask
    output, session = run(router_on(monkeypatch, *FLASH), "flash_attn_2", call)
    assert error(output, truth(call)).within(allowed(call, "exact"))
    assert arithmetic.CALLS == ["flash_attn_varlen_func"] * 2
    assert rows_of(session) == [("flash_attn_2", "bool, per block, varlen", 2)]


def test_the_report_says_that_a_packed_call_is_not_divided_over_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    router, call = router_on(monkeypatch, *FLASH), lengths_call(192, 128, 64, 32)
    divided = partial(HeadsOverCards, cards=lambda like: pytest.fail("no call is divided"))
    _, session = run(router, "flash_attn_2", call, divider=divided)
    ((note, count),) = session.run_report.notes.items()
    assert "70 x 192 tokens" in note
    assert "one varlen call" in note
    assert count == 1
    assert rows_of(session) == [("flash_attn_2", "key_padding, per sample, varlen", 2)]


def test_a_sample_without_keys_gets_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    call = lengths_call(192, 0, 64)
    output, _ = run(router_on(monkeypatch, *FLASH), "flash_attn_2", call)
    assert not output[1].any()
    assert output[0].any()


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_a_varlen_kernel_gets_a_positive_scale(monkeypatch: pytest.MonkeyPatch, scale: float) -> None:
    """As kernels of whole calls: they take the row maximum before they scale."""
    given: list[float] = []
    varlen = flash_attn_2.flash_attn_varlen_func

    @wraps(varlen)
    def noted(*args: Any, **kwargs: Any) -> torch.Tensor:
        given.append(kwargs["softmax_scale"])
        return varlen(*args, **kwargs)

    monkeypatch.setattr(flash_attn_2, "flash_attn_varlen_func", noted)
    call = lengths_call(192, 64, 128, scale=scale)
    output, session = run(router_on(monkeypatch, *FLASH), "flash_attn_2", call)
    assert error(output, truth(call)).within(allowed(call, "exact"))
    assert rows_of(session) == [("flash_attn_2", "key_padding, per sample, varlen", 2)]
    assert [each > 0 for each in given] == [True, True]


def test_samples_that_get_different_backends_run_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """1.0.6 takes full blocks of 64 keys only, so the sample of 77 keys is not its own."""
    call = lengths_call(64, 77, 128)
    output, session = run(router_on(monkeypatch, SAGE_1, (8, 9)), "sage_attn", call)
    assert "sageattention_1.sageattn_varlen" not in arithmetic.CALLS
    assert error(output, truth(call)).within(allowed(call, "int8"))
    assert {backend for backend, _, _ in rows_of(session)} == {"sage_attn", "torch_sdpa"}
    assert all(mask == "key_padding, per sample" for _, mask, _ in rows_of(session))


@pytest.mark.parametrize(
    ("version", "changes", "packed"),
    [
        ("2.9.1", {}, False),
        ("2.10.0", {}, True),
        ("2.10.0", {"scale": 0.2}, False),
        ("2.10.0", {"num_kv_heads": 2}, False),
        ("2.12.0", {"scale": 0.2, "num_kv_heads": 2}, True),
    ],
)
def test_what_each_torch_can(monkeypatch: pytest.MonkeyPatch, version: str, changes: dict, packed: bool) -> None:
    router = router_on(monkeypatch, "", (9, 0), version)
    (limits,) = [router.backends["sdpa_flash"].varlen_limits(router.platform)]
    facts = request(batch=1, **changes)
    assert (limits is not None and not limits.reasons(facts)) == packed
    if packed:
        call = lengths_call(192, 50, **changes)
        output, _ = run(router, "sdpa_flash", call)
        assert error(output, truth(call)).within(allowed(call, "exact"))
        assert arithmetic.CALLS == ["varlen_attn"] * 2


def test_torchs_kernel_is_for_cuda_only() -> None:
    backend = Router(Platform("cpu", torch="2.13.0")).backends["sdpa_flash"]
    for kind in ("cpu", "rocm"):
        assert backend.varlen_limits(Platform(kind, torch="2.13.0", gfx="gfx942" if kind == "rocm" else None)) is None


def test_sages_kernel_is_not_for_sm12x(monkeypatch: pytest.MonkeyPatch) -> None:
    call = lengths_call(192, 50)
    _, session = run(router_on(monkeypatch, SAGE_2, (12, 0)), "sage_attn", call)
    assert rows_of(session) == [("sage_attn", "key_padding, per sample", 2)]


def test_options_that_the_packed_kernel_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    call = lengths_call(192, 50)
    config = '{"default": {"backend": "sage_fp16_triton", "extra": {"quantization_backend": "cuda"}}}'
    _, session = run(router_on(monkeypatch, SAGE_2, (8, 9)), "sage_fp16_triton", call, config)
    assert rows_of(session) == [("sage_fp16_triton", "key_padding, per sample", 2)]


def test_the_keys_of_the_caller_stay_what_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    call = lengths_call(192, 64)
    before = call.key.clone()
    run(router_on(monkeypatch, SAGE_1, (8, 9)), "sage_attn", call)
    assert torch.equal(call.key, before)


def test_a_build_without_it_runs_sample_by_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(flash_attn_2, "flash_attn_varlen_func")
    call = lengths_call(192, 50)
    output, session = run(router_on(monkeypatch, *FLASH), "flash_attn_2", call)
    assert arithmetic.CALLS == ["flash_attn_func"] * 4
    assert rows_of(session) == [("flash_attn_2", "key_padding, per sample", 2)]
    assert error(output, truth(call)).within(allowed(call, "exact"))


def test_one_that_fails_gives_way_to_a_call_each_once(
    monkeypatch: pytest.MonkeyPatch, snapshot: SnapshotAssertion
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        arithmetic.CALLS.append("broken")
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(flash_attn_2, "flash_attn_varlen_func", broken)
    call = lengths_call(192, 50)
    output, session = run(router_on(monkeypatch, *FLASH), "flash_attn_2", call, "backend=flash_attn_2 strict=true")
    assert " ".join(arithmetic.CALLS) == "broken" + " flash_attn_func" * 4
    assert error(output, truth(call)).within(allowed(call, "exact"))
    assert list(session.run_report.notes) == snapshot


@pytest.mark.parametrize(
    ("words", "raised"),
    [("CUDA out of memory", RuntimeError), ("an illegal memory access was encountered", KernelFaultError)],
)
def test_errors_after_which_nothing_may_run(
    monkeypatch: pytest.MonkeyPatch, words: str, raised: type[Exception]
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError(words)

    monkeypatch.setattr(flash_attn_2, "flash_attn_varlen_func", broken)
    with pytest.raises(raised, match=words):
        run(router_on(monkeypatch, *FLASH), "flash_attn_2", lengths_call(192, 50))


def test_too_many_tokens_in_one_row_run_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    router = router_on(monkeypatch, *FLASH)
    backend = router.backends["flash_attn_2"]
    limits = backend.limits.but(Elements(4 * 64 * 192))
    monkeypatch.setattr(type(backend), "limits", limits)
    _, session = run(router, "flash_attn_2", lengths_call(192, 50))
    assert rows_of(session) == [("flash_attn_2", "key_padding, per sample", 2)]


def test_on_the_cpu_one_call_each() -> None:
    call = lengths_call(192, 50)
    _, session = run(Router(Platform("cpu", torch=torch.__version__)), "torch_sdpa", call)
    assert rows_of(session) == [("torch_sdpa", "key_padding, per sample", 2)]


def test_a_plan_of_flashinfer_for_each_set_of_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    router = router_on(monkeypatch, "flashinfer-python==0.7.2", (9, 0))
    run(router, "flashinfer_attn", lengths_call(192, 50))
    assert arithmetic.CALLS == ["BatchPrefillWithRaggedKVCacheWrapper", "plan", "run", "run"]
    run(router, "flashinfer_attn", lengths_call(192, 51))
    assert arithmetic.CALLS.count("plan") == 1


# attention() of the Python API
@pytest.fixture
def on_fakes(monkeypatch: pytest.MonkeyPatch) -> Router:
    router = router_on(monkeypatch, *FLASH)
    for module in (api, session):
        monkeypatch.setattr(module, "router_for", lambda device=None: router)
    return router


@pytest.mark.usefixtures("on_fakes")
def test_attention_reads_a_mask_for_a_backend_that_takes_none() -> None:
    call = lengths_call(192, 50, 0, num_kv_heads=2)
    arithmetic.CALLS.clear()
    with api.account() as account, attention_backend("flash_attn_2", strict=True):
        for _ in range(2):
            output = attention(call.query, call.key, call.value, call.attn_mask, enable_gqa=True)
    assert error(output, truth(call)).within(allowed(call, "exact"))
    assert arithmetic.CALLS == ["flash_attn_varlen_func"] * 2
    assert [(row.backend, row.mask, row.calls) for row in account.rows.values() if row.calls] == [
        ("flash_attn_2", "key_padding, per sample, varlen", 2)
    ]


@pytest.mark.usefixtures("on_fakes")
def test_attention_with_a_mask_that_changes_between_calls() -> None:
    """The same memory, other values: a mask is read at every call."""
    call = lengths_call(192, 50)
    with attention_backend("flash_attn_2", strict=True):
        for counts in ((192, 50), (10, 192), (64, 64), (192, 192)):
            call.attn_mask[:] = (torch.arange(192)[None] < torch.tensor(counts)[:, None])[:, None, None]
            output = attention(call.query, call.key, call.value, call.attn_mask)
            assert error(output, truth(call)).within(allowed(call, "exact")), counts


@pytest.mark.usefixtures("on_fakes")
def test_a_mask_that_must_stay_is_refused_strictly() -> None:
    call = call_for(request(mask="bool"))
    with attention_backend("flash_attn_2", strict=True), pytest.raises(NoBackendError, match="a bool mask"):
        attention(call.query, call.key, call.value, call.attn_mask)
    with attention_backend("flash_attn_2"):
        output = attention(call.query, call.key, call.value, call.attn_mask)
    assert error(output, truth(call)).within(allowed(call, "exact"))


def test_when_an_accelerator_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    router = router_on(monkeypatch, *FLASH)

    def reads(backend: str, device: str, **changes: object) -> bool:
        layers = (parse_config(backend, "test"),) if backend else ()
        session = CallSession(router, layers, torch.device(device), False, RunReport())
        return session.reads_mask(CallKind(request(**changes), "self", "self"))

    assert reads("", "cpu", mask="bool")
    assert not reads("flash_attn_2", "cpu")
    assert not reads("", "cuda", mask="key_padding")  # auto takes what takes the mask
    assert not reads("torch_sdpa", "cuda", mask="key_padding")
    assert reads("flash_attn_2", "cuda", mask="key_padding")
    assert not reads("flash_attn_2", "cuda", mask="key_padding", dtype="float32")  # refused without a mask too


def test_explain_says_that_a_described_mask_has_no_values(
    capsys: pytest.CaptureFixture[str], snapshot: SnapshotAssertion
) -> None:
    from attention_backends import cli

    words = ["explain", "--config", "flash_varlen", "--platform", "cuda:8.6,packages=flash-attn==2.8.3"]
    facts = "batch=2,num_heads=4,q_len=64,head_dim=64"
    assert cli.main([*words, "--request", f"{facts},mask=key_padding"]) == 0
    said = capsys.readouterr().out
    meant = ("Note: a ", "  flash_attn_2: ")
    assert [line for line in said.splitlines() if line.startswith(meant)] == snapshot
    assert cli.main([*words, "--request", facts]) == 0
    said = capsys.readouterr().out
    assert "flash_attn_2 would run" in said
    assert "no mask values" not in said
