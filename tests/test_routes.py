"""What each card starts with, and the log lines that say so."""

from __future__ import annotations

import logging

import pytest
from attention_backends.backends.config import Choice
from attention_backends.backends.config_text import parse_config
from attention_backends.backends.kernels import BACKENDS
from attention_backends.backends.platform import KINDS, Platform, parse_platform
from attention_backends.backends.request import parse_request
from attention_backends.backends.router import NoBackendError, Router
from attention_backends.backends.routes import ROUTES, default_line, route_for
from attention_backends.backends.session import Session

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
    "rocm:gfx942": ("aiter", "flash_attn", "torch_sdpa"),
    "xla": ("xla_flash", "torch_sdpa"),
    "cpu": ("torch_sdpa",),
    "mps": ("torch_sdpa",),
    "xpu": ("torch_sdpa",),
    "npu": ("torch_sdpa",),
}


@pytest.mark.parametrize("machine", ORDERS)
def test_the_order_on_each_machine(machine: str) -> None:
    assert route_for(parse_platform(machine)).order == ORDERS[machine]


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.title)
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
    ("machine", "request_text", "reason"),
    [
        ("cuda:12.0", "num_heads=24,q_len=4096,head_dim=12", "head_dim 12 is not a multiple of 8"),
        ("cuda:12.0", "num_heads=24,q_len=4096,head_dim=320", "head_dim 320 > 128"),
        ("cuda:12.0", "num_heads=24,q_len=4096,head_dim=128,dtype=fp32", "dtype float32 not in (float16, bfloat16)"),
        ("cuda:12.0", "num_heads=24,q_len=4096,kv_len=1,head_dim=128", "kv_len 1 < 2"),
        ("cuda:12.0,cudnn=90499", "num_heads=24,q_len=4096,head_dim=128", "cuDNN 90499 < 90500"),
        ("cuda:12.0,cudnn=none", "num_heads=24,q_len=4096,head_dim=128", "PyTorch has no cuDNN"),
        ("cuda:12.0,cudnn_sdp=off", "num_heads=24,q_len=4096,head_dim=128", "enable_cudnn_sdp(False)"),
        ("cuda:7.5", "num_heads=24,q_len=4096,head_dim=128", "compute capability 7.5 < 8.0"),
        ("cuda", "num_heads=24,q_len=4096,head_dim=128", "compute capability unknown"),
        ("rocm:gfx942", "num_heads=24,q_len=4096,head_dim=128", "device rocm not in (cuda)"),
    ],
)
def test_cudnn_by_name_and_strict_says_why_not(machine: str, request_text: str, reason: str) -> None:
    with pytest.raises(NoBackendError) as caught:
        Router(parse_platform(machine)).select(
            parse_request(request_text), Choice("cudnn_attn", "node.default"), strict=True
        )
    assert reason in str(caught.value)


def test_cudnn_by_name_takes_what_it_can() -> None:
    choice = Choice("cudnn_attn", "node.default")
    for machine, head_dim in (("cuda:12.0", 72), ("cuda:8.9", 128), ("cuda:9.0,cudnn=92300", 256)):
        decision = Router(parse_platform(machine)).select(CALL._replace(head_dim=head_dim), choice, strict=True)
        assert decision.backend == "cudnn_attn"


# Log lines, in the words of vLLM-Omni


@pytest.mark.parametrize(
    ("machine", "backend", "line"),
    [
        ("cuda:12.0,cudnn=91002", "cudnn_attn", "CUDNN_ATTN (Blackwell sm_120, cuDNN 91002)"),
        ("cuda:12.0", "flashinfer_attn", "FLASHINFER_ATTN (Blackwell sm_120)"),
        ("cuda:9.0", "flash_attn", "FLASH_ATTN (Hopper sm_90)"),
        ("rocm:gfx942", "aiter", "AITER (gfx942)"),
        ("cpu", "torch_sdpa", "SDPA"),
    ],
)
def test_the_line_that_says_what_auto_starts_with(machine: str, backend: str, line: str) -> None:
    assert default_line(parse_platform(machine), backend) == f"Defaulting to diffusion attention backend {line}"


def test_the_default_is_the_first_available_of_the_route() -> None:
    assert Router(parse_platform("cuda:12.0")).default_backend() == "cudnn_attn"
    assert Router(parse_platform("cpu")).default_backend() == "torch_sdpa"


def test_a_role_is_logged_once_and_a_fallback_once_per_reason(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("torch")
    session = Session(
        Router(Platform("cpu", torch="2.11.0")), (parse_config({"per_role": {"cross": "cudnn"}}, "node"),)
    )
    with caplog.at_level(logging.INFO, logger="attention_backends"):
        for q_len in (4096, 1024):
            session.plan(CALL._replace(q_len=q_len), "ltx2.audio_to_video", "cross")
            session.plan(CALL._replace(q_len=q_len), "self", "self")
    infos = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert infos == [
        "Resolved diffusion attention backend 'TORCH_SDPA' for role='ltx2.audio_to_video' (category='cross') via "
        "node.per_role['cross'] (category of 'ltx2.audio_to_video')",
        "Resolved diffusion attention backend 'TORCH_SDPA' for role='self' via platform route",
    ]
    assert warnings == [
        "role ltx2.audio_to_video: torch_sdpa runs instead of cudnn_attn (cudnn_attn: device cpu not in (cuda))"
    ]


def test_a_route_keeps_small_queries_off_cudnn_but_a_person_may_ask_for_it() -> None:
    router = Router(parse_platform("cuda:12.0,cudnn=91002"))
    small = parse_request("num_heads=8,q_len=64,kv_len=64,head_dim=128")
    decision = router.select(small, Choice(None, "platform route"))
    assert decision.backend == "torch_sdpa"
    assert "query of 65536 elements < 131072" in str(decision.rejected[0])
    assert router.select(small, Choice("cudnn_attn", "test"), strict=True).backend == "cudnn_attn"


def test_lossy_backends_come_first_only_where_they_are_allowed() -> None:
    packages = "sageattention==2.2.0;triton==3.6.0;flash-attn==2.8.3"
    router = Router(parse_platform(f"cuda:8.9,packages={packages}"))
    call = parse_request("num_heads=8,q_len=4096,head_dim=128")
    auto = Choice(None, "platform route")
    assert router.select(call, auto).backend == "flash_attn"
    assert router.select(call, auto, accuracy="quantized").backend == "sage_attn"
    masked = router.select(call._replace(mask="bool"), auto, accuracy="quantized")
    assert masked.backend == "sage_fp16_triton"
    assert "mask kind bool not in (none)" in str(masked.rejected[0])
    fragile = router.select(call._replace(exact_only=True), auto, accuracy="quantized")
    assert fragile.backend == "flash_attn"
