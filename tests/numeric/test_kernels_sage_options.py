"""Options of the Sage backends: they reach the kernel's own keywords, and what a version lacks is refused with it.

The packages are fakes whose functions, like the real ones, drop keywords that they do not know.
"""

from __future__ import annotations

import re

import pytest
from attention_backends.backends.config import AttentionConfig, AttentionSpec
from attention_backends.backends.values.errors import ConfigError
from attention_backends.backends.values.platform import Platform
from attention_backends.backends.values.request import AttentionRequest
from kernel_machines import SAGE_1, SAGE_2, SAGE_FORK, TRITON
from syrupy.assertion import SnapshotAssertion

torch = pytest.importorskip("torch", reason="torch is not installed")

from attention_backends.backends.engine.plan import CallKind  # noqa: E402
from attention_backends.backends.engine.router import Router  # noqa: E402
from attention_backends.backends.engine.session import Session  # noqa: E402
from attention_backends.backends.kernels.sage_fp8_cuda import accumulator  # noqa: E402
from attention_backends.backends.values.errors import NoBackendError  # noqa: E402
from attention_calls import as_comfyui_runs, call_for  # noqa: E402
from fakes import machine, sageattention_1, sageattention_2  # noqa: E402
from tolerance import allowed, error, truth  # noqa: E402

PLAIN = AttentionRequest(1, 2, 128, 192, 64, "float16")
SAGE_2_1 = f"sageattention==2.1.1 {TRITON}"


@pytest.fixture(autouse=True)
def inference():
    with as_comfyui_runs():
        yield


def keywords(monkeypatch: pytest.MonkeyPatch, router: Router, backend: str, function: str, **options: object):
    """The keyword arguments that the package's function gets from a backend with these options."""
    seen: list[dict[str, object]] = []
    real = getattr(sageattention_2, function)

    def recorded(q, k, v, **given):
        seen.append(given)
        return real(q, k, v, **given)

    recorded.__wrapped__ = real  # inspect.signature follows it
    monkeypatch.setattr(sageattention_2, function, recorded)
    call = call_for(PLAIN)
    router.kernel(backend, options)(call)
    monkeypatch.setattr(sageattention_2, function, real)
    (given,) = seen
    return given


FP16, FP8, SM90 = (f"sageattn_qk_int8_pv_{name}" for name in ("fp16_cuda", "fp8_cuda", "fp8_cuda_sm90"))
TRITON_KERNEL = "sageattn_qk_int8_pv_fp16_triton"

# Backend, packages, card, options, and the keywords that the kernel must get.
REACH = [
    ("sage_fp16_cuda", SAGE_2, (8, 0), {}, {"qk_quant_gran": "per_thread", "pv_accum_dtype": "fp32"}),
    ("sage_fp16_cuda", SAGE_2, (8, 0), {"qk_quant_gran": "per_warp"}, {"qk_quant_gran": "per_warp"}),
    ("sage_fp16_cuda", SAGE_2, (8, 0), {"pv_accum_dtype": "fp16+fp32"}, {"pv_accum_dtype": "fp16+fp32"}),
    (
        "sage_fp16_cuda",
        SAGE_2_1,
        (8, 0),
        {"pv_accum_dtype": "fp16", "smooth_v": True},
        {"pv_accum_dtype": "fp16", "smooth_v": True, "smooth_k": True},
    ),
    ("sage_fp16_cuda", SAGE_2, (12, 0), {}, {"qk_quant_gran": "per_warp"}),
    ("sage_fp8_cuda", SAGE_2, (8, 9), {}, {"qk_quant_gran": "per_thread", "pv_accum_dtype": "fp32+fp16"}),
    ("sage_fp8_cuda", SAGE_2, (12, 0), {}, {"qk_quant_gran": "per_warp", "pv_accum_dtype": "fp32+fp16"}),
    ("sage_fp8_cuda", SAGE_2, (12, 0), {"qk_quant_gran": "per_thread"}, {"qk_quant_gran": "per_thread"}),
    ("sage_fp8_cuda", SAGE_FORK, (10, 0), {}, {"qk_quant_gran": "per_warp"}),
    ("sage_fp8_cuda", SAGE_2_1, (8, 9), {}, {"pv_accum_dtype": "fp32+fp32"}),
    ("sage_fp8_cuda", SAGE_2_1, (12, 0), {}, {"pv_accum_dtype": "fp32"}),
    ("sage_fp8_cuda", SAGE_2, (8, 9), {"pv_accum_dtype": "fp32+fp32"}, {"pv_accum_dtype": "fp32+fp32"}),
    ("sage_fp8_cuda", SAGE_2, (8, 9), {"smooth_v": True}, {"pv_accum_dtype": "fp32", "smooth_v": True}),
    ("sage_fp8_cuda", SAGE_2, (8, 9), {"smooth_k": False}, {"smooth_k": False}),
    ("sage_fp8_sm90", SAGE_2, (9, 0), {}, {"qk_quant_gran": "per_thread", "pv_accum_dtype": "fp32+fp32"}),
    ("sage_fp8_sm90", SAGE_2, (9, 0), {"smooth_k": False}, {"smooth_k": False}),
    ("sage_fp16_triton", SAGE_2, (8, 9), {}, {"smooth_k": True, "quantization_backend": "triton"}),
    ("sage_fp16_triton", SAGE_2, (8, 9), {"quantization_backend": "cuda"}, {"quantization_backend": "cuda"}),
]
FUNCTIONS = {
    "sage_fp16_cuda": FP16,
    "sage_fp8_cuda": FP8,
    "sage_fp8_sm90": SM90,
    "sage_fp16_triton": TRITON_KERNEL,
}


@pytest.mark.parametrize(("backend", "packages", "capability", "options", "expected"), REACH)
def test_options_reach_the_kernel(monkeypatch, backend, packages, capability, options, expected):
    given = keywords(monkeypatch, machine(monkeypatch, packages, capability), backend, FUNCTIONS[backend], **options)
    assert {name: given[name] for name in expected} == expected
    assert (given["tensor_layout"], given["is_causal"], given["sm_scale"]) == ("NHD", False, 64**-0.5)


@pytest.mark.parametrize("packages", [SAGE_1, SAGE_2])
def test_options_with_one_value_reach_no_kernel(monkeypatch, packages):
    """Those of Smart-Diffusion's page; `sageattn` takes any keyword, and a version may read one."""
    documented = {"quant_bits": 8, "quant_symmetric": True}
    router, call = machine(monkeypatch, packages, (8, 9)), call_for(PLAIN)
    assert torch.equal(router.kernel("sage_attn", documented)(call), router.kernel("sage_attn", {})(call))
    if packages == SAGE_2:
        router = machine(monkeypatch, packages, (8, 9))  # without a loaded kernel
        assert not documented.keys() & keywords(monkeypatch, router, "sage_attn", "sageattn", **documented).keys()


@pytest.mark.parametrize(
    ("packages", "capability", "cuda", "expected"),
    [
        (SAGE_2, (8, 9), "12.4", "fp32+fp16"),
        (SAGE_FORK, (8, 9), "12.6", "fp32+fp32"),
        (SAGE_FORK, (12, 0), "12.6", "fp32"),
        (SAGE_FORK, (8, 9), "12.8", "fp32+fp16"),
        (SAGE_FORK, (8, 9), "13.0", "fp32+fp16"),
        (SAGE_2_1, (8, 9), "13.0", "fp32+fp32"),
    ],
)
def test_the_accumulator_is_the_one_that_sageattn_takes(packages, capability, cuda, expected):
    pairs = tuple(tuple(package.split("==")) for package in packages.split())
    assert accumulator(Platform("cuda", capability=capability, cuda=cuda, packages=pairs)) == expected


@pytest.mark.parametrize("backend", ["sage_fp16_cuda", "sage_fp8_cuda", "sage_fp8_sm90", "sage_fp16_triton"])
def test_smoothing_keys_makes_the_result_more_exact(monkeypatch, backend):
    capability = {"sage_fp16_cuda": (8, 0), "sage_fp8_sm90": (9, 0)}.get(backend, (8, 9))
    router, call = machine(monkeypatch, SAGE_2, capability), call_for(PLAIN)
    call.key = call.key + 32  # what all keys share takes most of the 8 bits, unless it is taken away
    smooth, rough = (error(router.kernel(backend, {"smooth_k": on})(call), truth(call)) for on in (True, False))
    assert smooth.within(allowed(call, "fp8"))
    assert rough.total > 1.5 * smooth.total


def test_version_1_smooths_keys_where_it_is_asked_to(monkeypatch):
    router, call = machine(monkeypatch, SAGE_1), call_for(PLAIN)
    rough = router.kernel("sage_attn", {"smooth_k": False})(call)
    assert torch.equal(rough, sageattention_1.sageattn(call.query, call.key, call.value, smooth_k=False))
    assert error(rough, truth(call)).total > error(router.kernel("sage_attn")(call), truth(call)).total


# What an installed version lacks: refused before its kernel is loaded.
REFUSED = [
    ("sage_fp8_cuda", SAGE_2_1, (8, 9), {"pv_accum_dtype": "fp32+fp16"}, "sageattention 2.1.1 has no pv_accum_dtype"),
    ("sage_attn", SAGE_2, (8, 9), {"smooth_k": False}, "sageattention 2.2.0: sageattn has no option smooth_k"),
    ("sage_attn", SAGE_2_1, (8, 9), {"smooth_k": False}, "sage_fp8_cuda, which it runs here, has one"),
]


@pytest.mark.parametrize(("backend", "packages", "capability", "options", "words"), REFUSED)
def test_what_the_version_lacks_is_refused_with_its_name(monkeypatch, backend, packages, capability, options, words):
    def session(strict: bool) -> Session:
        config = AttentionConfig(default=AttentionSpec(backend, options), strict=strict)
        return Session(machine(monkeypatch, packages, capability), (config,))

    decision = session(strict=False).plan(CallKind(PLAIN, "self", "self")).plan.decision
    assert decision.backend != backend
    assert words in str(decision.reason)
    with pytest.raises(NoBackendError, match=re.escape(words)):
        session(strict=True).plan(CallKind(PLAIN, "self", "self"))
    assert session(strict=False).router.reasons_against(backend, PLAIN) == ()  # without the option it runs


def test_why_2_1_1_is_not_asked_for_fp16_accumulation(monkeypatch):
    """Its function has no branch for it and returns memory that nobody wrote."""
    machine(monkeypatch, SAGE_2_1, (8, 9))
    call = call_for(PLAIN)
    output = sageattention_2.sageattn_qk_int8_pv_fp8_cuda(call.query, call.key, call.value, pv_accum_dtype="fp32+fp16")
    assert not error(output, truth(call)).within(allowed(call, "fp8"))


def test_an_older_build_without_a_parameter(monkeypatch, snapshot: SnapshotAssertion):
    def older(q, k, v, tensor_layout="HND", is_causal=False, pv_accum_dtype="fp32+fp32", sm_scale=None, **kwargs):
        return torch.zeros_like(q)

    router = machine(monkeypatch, SAGE_2, (9, 0))
    monkeypatch.setattr(sageattention_2, SM90, older)
    with pytest.raises(NotImplementedError) as caught:
        router.backends["sage_fp8_sm90"].load(router.platform, smooth_k=False)
    assert str(caught.value) == snapshot


@pytest.mark.parametrize(
    ("backend", "extra"),
    [
        ("sage_fp8_sm90", {"pv_accum_dtype": "fp32"}),
        ("sage_fp8_sm90", {"smooth_v": True}),
        ("sage_fp16_cuda", {"pv_accum_dtype": "fp32+fp16"}),
        ("sage_fp8_cuda", {"qk_quant_gran": "per_block"}),
        ("sage_fp16_cuda", {"smooth_v": True}),
        ("sage_fp16_cuda", {"smooth_v": True, "pv_accum_dtype": "fp16+fp32"}),
        ("sage_fp8_cuda", {"smooth_v": True, "pv_accum_dtype": "fp32+fp16"}),
        ("sage_fp16_cuda", {"smooth_k": "yes"}),
        ("sage_attn", {"qk_quant_gran": "per_warp"}),
    ],
)
def test_options_that_a_kernel_never_has_are_refused_when_read(backend, extra, snapshot: SnapshotAssertion):
    with pytest.raises(ConfigError) as caught:
        AttentionSpec(backend, extra)
    assert str(caught.value) == snapshot


@pytest.mark.parametrize(
    ("backend", "capability", "flag"),
    [
        ("sage_fp16_cuda", (8, 0), "SM80_ENABLED"),
        ("sage_fp8_cuda", (8, 9), "SM89_ENABLED"),
        ("sage_fp8_sm90", (9, 0), "SM90_ENABLED"),
    ],
)
def test_a_build_without_the_kernel(monkeypatch, backend, capability, flag):
    monkeypatch.setattr(sageattention_2.core, flag, False)
    (reason,) = machine(monkeypatch, SAGE_2, capability).unavailable(backend)
    assert f"({flag} is false)" in reason


def test_a_build_that_returns_unwritten_memory_on_sm90(monkeypatch):
    def hides_the_operator() -> None: ...

    name = "qk_int8_sv_f8_accum_f32_fuse_v_scale_attn_inst_buf"
    monkeypatch.setattr(sageattention_2.core.sm90_compile, name, hides_the_operator)
    router = machine(monkeypatch, SAGE_2, (9, 0))
    assert "unwritten memory on sm90" in router.unavailable("sage_fp8_sm90")[0]
    assert router.unavailable("sage_fp8_cuda") == ()
