"""What each card starts with, and the log lines that say so."""

from __future__ import annotations

import json
import logging

import pytest
from attention_backends.backends.config.layers import Choice
from attention_backends.backends.config.text import parse_config
from attention_backends.backends.doctor.route_report import route_report
from attention_backends.backends.engine.plan import CallKind
from attention_backends.backends.engine.priorities import PRIORITIES, default_line, priority_for
from attention_backends.backends.engine.router import Router
from attention_backends.backends.engine.session import Session
from attention_backends.backends.kernels import BACKENDS
from attention_backends.backends.values.errors import NoBackendError
from attention_backends.backends.values.platform import KINDS, Platform, parse_platform
from attention_backends.backends.values.request import parse_request
from attention_backends.cli import main
from syrupy.assertion import SnapshotAssertion

CALL = parse_request("num_heads=24,q_len=4096,head_dim=128")
AUTO = Choice(None, "platform route")

AMPERE = ("flash_attn", "torch_sdpa")
BLACKWELL = ("cudnn_attn", "flashinfer_attn", "flash_attn_4", "torch_sdpa")
ORDERS = {
    "cuda:6.1": ("xformers", "torch_sdpa"),
    "cuda:7.5": ("xformers", "torch_sdpa"),
    "cuda:8.0": AMPERE,
    "cuda:8.6": AMPERE,
    "cuda:8.7": AMPERE,
    "cuda:8.9": AMPERE,
    "cuda:9.0": AMPERE,
    "cuda:10.0": BLACKWELL,
    "cuda:10.3": BLACKWELL,
    "cuda:12.0": BLACKWELL,
    "cuda:12.1": BLACKWELL,
    "cuda": ("torch_sdpa",),
    **dict.fromkeys(("rocm:gfx906", "rocm:gfx1100", "rocm:gfx1201"), ("aiter", "flash_attn", "torch_sdpa")),
    "rocm:gfx942": ("aiter", "flash_attn", "torch_sdpa"),
    "xla": ("xla_flash", "torch_sdpa"),
    "cpu": ("torch_sdpa",),
    "mps": ("torch_sdpa",),
    "xpu": ("torch_sdpa",),
    "npu": ("torch_sdpa",),
}


@pytest.mark.parametrize("machine", ORDERS)
def test_the_order_on_each_machine(machine: str) -> None:
    assert priority_for(parse_platform(machine)).order == ORDERS[machine]


@pytest.mark.parametrize("route", PRIORITIES, ids=lambda route: route.title)
def test_every_route_is_exact_founded_and_ends_where_everything_runs(route) -> None:  # type: ignore[no-untyped-def]
    assert all(BACKENDS[backend].accuracy == "exact" for backend in route.order)
    assert route.order[-1] == "torch_sdpa"
    assert len(set(route.order)) == len(route.order)
    assert route.evidence in ("measured", "reported", "assumed")
    assert route.source
    assert set(route.kinds) <= set(KINDS)


@pytest.mark.parametrize("machine", ORDERS)
def test_without_packages_a_card_gets_what_torch_brings(machine: str) -> None:
    blackwell = ORDERS[machine] == BLACKWELL
    assert Router(parse_platform(machine)).select(CALL, AUTO).backend == ("cudnn_attn" if blackwell else "torch_sdpa")


PACKAGES = {
    "flash-attn": "flash-attn==2.8.3",
    "flash-attn-3": "flash-attn-3==3.0.0",
    "flash-attn-4": "flash-attn-4==4.0.0",
    "flashinfer": "flashinfer-python==0.7.2",
    "sageattention": "sageattention==2.2.0;triton==3.6.0",
    "sageattn3": "sageattn3==1.0.0",
    "xformers": "xformers==0.0.35",
    "aiter": "amd-aiter==0.1.5",
    "torch-npu": "torch-npu==2.7.1",
    "torch-xla": "torch-xla==2.8.0",
}
WITHOUT_CUDNN = {"flashinfer": "flashinfer_attn", "flash-attn-4": "flash_attn_4"}
STARTS: dict[str, dict[str, str]] = {
    "cuda:7.5": {"xformers": "xformers"},
    **{f"cuda:{card}": {"flash-attn": "flash_attn"} for card in ("8.0", "8.6", "8.9")},
    "cuda:9.0": dict.fromkeys(("flash-attn", "flash-attn-3", "flash-attn-4"), "flash_attn"),
    **{f"cuda:{card}": dict.fromkeys(PACKAGES, "cudnn_attn") for card in ("10.0", "10.3", "12.0", "12.1")},
    **{f"cuda:{card},cudnn=90400": WITHOUT_CUDNN for card in ("10.0", "10.3", "12.0", "12.1")},
    "rocm:gfx942": {"aiter": "aiter", "flash-attn": "flash_attn"},
    "xla": {"torch-xla": "xla_flash"},
    **{machine: {} for machine in ("rocm:gfx906", "rocm:gfx1100", "rocm:gfx1201", "xpu", "mps", "npu", "cpu")},
}
"""What auto starts with where one package is installed; torch_sdpa with any other."""


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("machine", STARTS)
def test_what_each_package_changes_on_each_machine(machine: str, package: str) -> None:
    platform = parse_platform(f"{machine},packages={PACKAGES[package]}")
    router = Router(platform)
    backend = STARTS[machine].get(package, "torch_sdpa")
    assert router.default_backend() == backend
    call = CALL._replace(dtype="float16") if machine == "cuda:7.5" else CALL  # Turing has no bfloat16
    assert router.select(call, AUTO).backend == backend
    report = route_report(router)
    states = {state["backend"]: state for state in report["exact"]}
    assert list(states) == list(priority_for(platform).order)
    assert report["auto"] == backend == next(name for name, state in states.items() if state["available"])
    assert report["log"] == default_line(platform, backend)
    for state in (*report["exact"], *report["lossy"]):
        assert state["available"] != bool(state["reasons"]), "available, or why not"


def test_all_packages_together_and_the_best_one_first() -> None:
    packages = ";".join(PACKAGES.values())
    starts = {machine: Router(parse_platform(f"{machine},packages={packages}")).default_backend() for machine in STARTS}
    assert starts == {
        "cuda:7.5": "xformers",
        **dict.fromkeys(("cuda:8.0", "cuda:8.6", "cuda:8.9", "cuda:9.0"), "flash_attn"),
        **dict.fromkeys(("cuda:10.0", "cuda:10.3", "cuda:12.0", "cuda:12.1"), "cudnn_attn"),
        **{f"cuda:{card},cudnn=90400": "flashinfer_attn" for card in ("10.0", "10.3", "12.0", "12.1")},
        "rocm:gfx942": "aiter",
        "xla": "xla_flash",
        **dict.fromkeys(("rocm:gfx906", "rocm:gfx1100", "rocm:gfx1201", "xpu", "mps", "npu", "cpu"), "torch_sdpa"),
    }


@pytest.mark.parametrize(
    ("machine", "head_dim", "backend"),
    [
        ("cuda:12.0,cudnn=90500", 128, "cudnn_attn"),
        ("cuda:12.0,cudnn=90500", 72, "cudnn_attn"),
        ("cuda:12.0,cudnn=90500", 12, "torch_sdpa"),
        ("cuda:12.0,cudnn=90500", 320, "torch_sdpa"),
        ("cuda:12.0,cudnn=90499", 128, "torch_sdpa"),
        ("cuda:12.0,cudnn=none", 128, "torch_sdpa"),
        ("cuda:12.0,cudnn_sdp=off", 128, "torch_sdpa"),
        ("cuda:7.5", 128, "torch_sdpa"),
    ],
)
def test_gates_of_the_route(machine: str, head_dim: int, backend: str) -> None:
    assert Router(parse_platform(machine)).select(CALL._replace(head_dim=head_dim), AUTO).backend == backend


@pytest.mark.parametrize(
    ("machine", "request_text"),
    [
        ("cuda:12.0", "num_heads=24,q_len=4096,head_dim=12"),
        ("cuda:12.0", "num_heads=24,q_len=4096,head_dim=320"),
        ("cuda:12.0", "num_heads=24,q_len=4096,head_dim=128,dtype=fp32"),
        ("cuda:12.0", "num_heads=24,q_len=4096,kv_len=1,head_dim=128"),
        ("cuda:12.0,cudnn=90499", "num_heads=24,q_len=4096,head_dim=128"),
        ("cuda:12.0,cudnn=none", "num_heads=24,q_len=4096,head_dim=128"),
        ("cuda:12.0,cudnn_sdp=off", "num_heads=24,q_len=4096,head_dim=128"),
        ("cuda:7.5", "num_heads=24,q_len=4096,head_dim=128"),
        ("cuda", "num_heads=24,q_len=4096,head_dim=128"),
        ("rocm:gfx942", "num_heads=24,q_len=4096,head_dim=128"),
    ],
)
def test_cudnn_by_name_and_strict_says_why_not(machine: str, request_text: str, snapshot: SnapshotAssertion) -> None:
    with pytest.raises(NoBackendError) as caught:
        Router(parse_platform(machine)).select(
            parse_request(request_text), Choice("cudnn_attn", "node.default"), strict=True
        )
    assert next(line for line in str(caught.value).splitlines() if line.startswith("  cudnn_attn: ")) == snapshot


def test_cudnn_by_name_takes_what_it_can() -> None:
    choice = Choice("cudnn_attn", "node.default")
    for machine, head_dim in (("cuda:12.0", 72), ("cuda:8.9", 128), ("cuda:9.0,cudnn=92300", 256)):
        decision = Router(parse_platform(machine)).select(CALL._replace(head_dim=head_dim), choice, strict=True)
        assert decision.backend == "cudnn_attn"


# Log lines, in the words of vLLM-Omni


@pytest.mark.parametrize(
    ("machine", "backend"),
    [
        ("cuda:12.0,cudnn=91002", "cudnn_attn"),
        ("cuda:12.0", "flashinfer_attn"),
        ("cuda:9.0", "flash_attn"),
        ("rocm:gfx942", "aiter"),
        ("cuda:10.3,cudnn=91500", "cudnn_attn"),
        ("cuda:12.1", "flash_attn_4"),
        ("cuda:8.9", "flash_attn"),
        ("cuda:7.5", "xformers"),
        ("xla", "xla_flash"),
        ("cpu", "torch_sdpa"),
    ],
)
def test_the_line_that_says_what_auto_starts_with(machine: str, backend: str, snapshot: SnapshotAssertion) -> None:
    assert default_line(parse_platform(machine), backend) == snapshot


def test_the_default_is_the_first_available_of_the_route() -> None:
    assert Router(parse_platform("cuda:12.0")).default_backend() == "cudnn_attn"
    assert Router(parse_platform("cpu")).default_backend() == "torch_sdpa"


def test_a_role_is_logged_once_and_a_fallback_once_per_reason(
    caplog: pytest.LogCaptureFixture, snapshot: SnapshotAssertion
) -> None:
    pytest.importorskip("torch")
    session = Session(
        Router(Platform("cpu", torch="2.11.0")), (parse_config({"per_role": {"cross": "cudnn"}}, "node"),)
    )
    with caplog.at_level(logging.INFO, logger="attention_backends"):
        for q_len in (4096, 1024):
            session.plan(CallKind(CALL._replace(q_len=q_len), "ltx2.audio_to_video", "cross"))
            session.plan(CallKind(CALL._replace(q_len=q_len), "self", "self"))
    infos = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert infos == snapshot
    assert warnings == snapshot


def test_a_route_keeps_small_queries_off_cudnn_but_a_person_may_ask_for_it(snapshot: SnapshotAssertion) -> None:
    router = Router(parse_platform("cuda:12.0,cudnn=91002"))
    small = parse_request("num_heads=8,q_len=64,kv_len=64,head_dim=128")
    decision = router.select(small, Choice(None, "platform route"))
    assert decision.backend == "torch_sdpa"
    assert str(decision.rejected[0]) == snapshot
    assert router.select(small, Choice("cudnn_attn", "test"), strict=True).backend == "cudnn_attn"


def test_lossy_backends_come_first_only_where_they_are_allowed(snapshot: SnapshotAssertion) -> None:
    packages = "sageattention==2.2.0;triton==3.6.0;flash-attn==2.8.3"
    router = Router(parse_platform(f"cuda:8.9,packages={packages}"))
    call = parse_request("num_heads=8,q_len=4096,head_dim=128")
    auto = Choice(None, "platform route")
    assert router.select(call, auto).backend == "flash_attn"
    assert router.select(call, auto, accuracy="quantized").backend == "sage_attn"
    masked = router.select(call._replace(mask="bool"), auto, accuracy="quantized")
    assert masked.backend == "sage_fp16_triton"
    assert str(masked.rejected[0]) == snapshot
    fragile = router.select(call._replace(exact_only=True), auto, accuracy="quantized")
    assert fragile.backend == "flash_attn"


# The command that prints them


def route(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["route", *arguments]) == 0
    return capsys.readouterr().out


def test_the_command_prints_the_route_of_a_described_machine(
    capsys: pytest.CaptureFixture[str], snapshot: SnapshotAssertion
) -> None:
    text = route(capsys, "--platform", "cuda:12.0,cudnn=91002,packages=flashinfer-python==0.7.2")
    lines = text.splitlines()
    assert lines[0] == snapshot
    assert lines[1] == snapshot
    assert lines[2] == snapshot
    first = next(line for line in lines if line.startswith("  1 cudnn_attn "))
    assert first == snapshot
    assert "  2 flashinfer_attn  available" in lines
    assert next(line for line in lines if line.startswith("  3 flash_attn_4 ")) == snapshot
    lossy = next(index for index, line in enumerate(lines) if line.startswith("Lossy"))
    assert lines[lossy + 1].startswith("  1 sage_attn ")
    assert text.count(first.rpartition("  ")[2]) == 1, "auto starts at one"


def test_the_command_prints_it_as_data(capsys: pytest.CaptureFixture[str], snapshot: SnapshotAssertion) -> None:
    report = json.loads(route(capsys, "--platform", "cuda:12.0,cudnn=90400", "--json"))
    assert (report["title"], report["capabilities"], report["evidence"]) == ("Blackwell", ["10.0", "12.9"], "reported")
    assert report["auto"] == "torch_sdpa"
    assert report["log"] == snapshot
    assert report["exact"][0] == {"backend": "cudnn_attn", "available": False, "reasons": ["cuDNN 90400 < 90500"]}
    assert [state["backend"] for state in report["lossy"]] == ["sage_attn", "sage_fp16_triton"]


def test_the_command_prints_the_whole_table(capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads(route(capsys, "--all", "--json"))["routes"]
    assert [
        (row["title"], tuple(row["exact"]), tuple(row["lossy"]), row["evidence"], row["source"]) for row in rows
    ] == [(row.title, row.order, row.lossy, row.evidence, row.source) for row in PRIORITIES]
    text = route(capsys, "--all")
    for row in PRIORITIES:
        assert f"  evidence: {row.evidence}: {row.source}" in text
        assert f"{row.title} ({', '.join(row.kinds)}" in text


def test_the_command_asks_this_machine_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    torch = pytest.importorskip("torch")
    assert f"torch {torch.__version__.split('+')[0]}" in route(capsys).splitlines()[0]


def test_the_command_refuses_a_machine_that_it_cannot_read(
    capsys: pytest.CaptureFixture[str], snapshot: SnapshotAssertion
) -> None:
    assert main(["route", "--platform", "gpu"]) == 2
    assert capsys.readouterr().err.rstrip() == snapshot
