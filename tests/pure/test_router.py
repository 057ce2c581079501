"""From a request to a decision, with backends that exist only here: pure selection, no torch."""

from __future__ import annotations

import itertools

import pytest
from attention_backends.backends.config.layers import Choice
from attention_backends.backends.config.text import parse_config
from attention_backends.backends.engine.plan import CallKind
from attention_backends.backends.engine.router import NOTHING_MEASURES, Rejection, Router
from attention_backends.backends.kernels import BACKENDS
from attention_backends.backends.kernels.backend import Backend, Kernel, Limits
from attention_backends.backends.values.errors import NoBackendError
from attention_backends.backends.values.limits import Dtypes, HeadDim
from attention_backends.backends.values.platform import KINDS, Platform, parse_platform
from attention_backends.backends.values.request import DTYPES, MASK_KINDS, AttentionRequest, parse_request
from syrupy.assertion import SnapshotAssertion

CALL = parse_request("num_heads=24,q_len=4096,head_dim=128")
WIDE = parse_request("num_heads=24,q_len=4096,head_dim=256")
AUTO = Choice(None, "platform route")
HOPPER = parse_platform("cuda:9.0")


def named(backend: str) -> Choice:
    return Choice(backend, "node.default")


class Fake(Backend):
    """A backend of any accuracy that takes head sizes up to 128 unless told otherwise."""

    kinds = KINDS

    def __init__(
        self,
        backend_id: str,
        accuracy: str = "exact",
        *,
        unavailable: str | None = None,
        broken: Exception | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.id = backend_id  # type: ignore[misc]
        self.accuracy = accuracy  # type: ignore[misc]
        self.limits = limits or Limits(HeadDim(max=128))  # type: ignore[misc]
        self.unavailable = unavailable
        self.broken = broken
        self.loaded = 0

    def unavailable_reasons(self, platform: Platform) -> list[str]:
        return [self.unavailable] if self.unavailable else super().unavailable_reasons(platform)

    def load(self, platform: Platform) -> Kernel:
        self.loaded += 1
        if self.broken:
            raise self.broken
        return lambda call: call.query


def router(*fakes: Fake, platform: Platform = HOPPER) -> Router:
    everything = Limits(Dtypes(DTYPES))
    return Router(platform, {fake.id: fake for fake in (Fake("torch_sdpa", limits=everything), *fakes)})


def test_the_first_backend_of_the_route_that_can_run_the_call_does() -> None:
    decision = router(Fake("flash_attn")).select(CALL, AUTO)
    assert (decision.backend, decision.source, decision.asked) == ("flash_attn", "platform route", None)
    assert decision.rejected == ()
    assert not decision.is_fallback
    assert decision.reason is None


def test_auto_moves_on_with_the_value_and_the_limit() -> None:
    decision = router(Fake("flash_attn")).select(WIDE, AUTO)
    assert decision.backend == "torch_sdpa"
    assert decision.rejected == (Rejection("flash_attn", ("head_dim 256 > 128",)),)
    assert not decision.is_fallback  # nobody asked for flash_attn


def test_a_named_backend_runs_when_it_can() -> None:
    decision = router(Fake("flash_attn"), Fake("sage_attn", "quantized")).select(CALL, named("sage_attn"))
    assert (decision.backend, decision.source, decision.rejected) == ("sage_attn", "node.default", ())


def test_a_named_backend_that_cannot_falls_back_along_the_route_with_its_reason(snapshot: SnapshotAssertion) -> None:
    fakes = (Fake("flash_attn"), Fake("sage_attn", "quantized", unavailable="package sageattention is not installed"))
    decision = router(*fakes).select(WIDE, named("sage_attn"))
    assert (decision.backend, decision.asked, decision.is_fallback) == ("torch_sdpa", "sage_attn", True)
    assert decision.reason == snapshot
    assert [rejection.backend for rejection in decision.rejected] == ["sage_attn", "flash_attn"]


def test_a_refused_backend_is_asked_once_though_it_stands_in_the_route_too() -> None:
    decision = router(Fake("flash_attn")).select(WIDE, named("flash_attn"))
    assert [rejection.backend for rejection in decision.rejected] == ["flash_attn"]


def test_strict_stops_with_the_call_every_reason_and_what_to_do(snapshot: SnapshotAssertion) -> None:
    with pytest.raises(NoBackendError) as caught:
        router(Fake("flash_attn"), Fake("sdpa_math")).select(WIDE, named("flash_attn"), strict=True)
    message = str(caught.value)
    assert WIDE.describe() in message
    assert "sm_90" in message
    assert message == snapshot


def test_where_all_failed_what_to_do_names_none_of_them(snapshot: SnapshotAssertion) -> None:
    here = router(Fake("flash_attn"), Fake("sdpa_math"))
    failed = {(name, (), CALL): "RuntimeError: dtypes differ" for name in ("torch_sdpa", "flash_attn")}
    with pytest.raises(NoBackendError) as caught:
        here.select(CALL, AUTO, failed=failed)
    advice = str(caught.value).splitlines()[-1]
    assert advice == snapshot
    with pytest.raises(NoBackendError) as caught:
        here.select(CALL, named("flash_attn"), strict=True, failed=failed)
    assert str(caught.value) == snapshot


def test_strict_has_nothing_to_say_about_auto() -> None:
    assert router(Fake("flash_attn")).select(WIDE, AUTO, strict=True).backend == "torch_sdpa"


def test_a_model_that_forbids_low_precision_wins_without_breaking_strict(snapshot: SnapshotAssertion) -> None:
    fragile = CALL._replace(exact_only=True)
    for strict in (False, True):
        decision = router(Fake("sage_attn", "quantized")).select(fragile, named("sage_attn"), strict=strict)
        assert decision.backend == "torch_sdpa"
        assert decision.reason == snapshot(name="reason")
    assert router(Fake("flash_attn")).select(fragile, named("flash_attn"), strict=True).backend == "flash_attn"


def test_a_name_that_no_backend_has_is_a_reason(snapshot: SnapshotAssertion) -> None:
    decision = router().select(CALL, named("later_attn"))
    assert decision.reason == snapshot


def test_measured_without_a_measurement_is_auto_with_a_note_and_never_refuses() -> None:
    for strict in (False, True):
        decision = router(Fake("flash_attn")).select(CALL, named("autotune"), strict=strict)
        assert (decision.backend, decision.asked, decision.source) == ("flash_attn", "autotune", "node.default")
        assert decision.notes == (NOTHING_MEASURES,)
        assert not decision.is_fallback
        assert decision.reason is None
    wide = router(Fake("flash_attn")).select(WIDE, named("autotune"), strict=True)
    assert wide.rejected == (Rejection("flash_attn", ("head_dim 256 > 128",)),)
    assert wide.backend == "torch_sdpa"


def test_the_last_resort_is_what_comfyui_would_run(snapshot: SnapshotAssertion) -> None:
    odd = CALL._replace(dtype="float8_e4m3fn")
    decision = Router(
        HOPPER, {"torch_sdpa": Fake("torch_sdpa"), "comfy": Fake("comfy", limits=Limits(Dtypes(DTYPES)))}
    ).select(odd, AUTO)
    assert decision.backend == "comfy"
    assert decision.rejected[-1].backend == "torch_sdpa"
    with pytest.raises(NoBackendError) as caught:
        Router(HOPPER, {"torch_sdpa": Fake("torch_sdpa")}).select(odd, AUTO)
    assert str(caught.value) == snapshot


# What is learnt while running


def test_a_backend_that_failed_on_a_call_is_not_tried_on_it_again(snapshot: SnapshotAssertion) -> None:
    here = router(Fake("flash_attn"))
    failed = {("flash_attn", (), CALL): "RuntimeError: no kernel image"}
    decision = here.select(CALL, named("flash_attn"), failed=failed)
    assert decision.backend == "torch_sdpa"
    assert decision.reason == snapshot
    assert here.select(CALL._replace(q_len=77), named("flash_attn"), failed=failed).backend == "flash_attn"
    assert here.select(CALL, named("flash_attn")).backend == "flash_attn", "another session starts afresh"


@pytest.mark.parametrize(
    "error", [ImportError("undefined symbol: _ZN3c10"), AssertionError("no driver"), OSError("bad DLL")]
)
def test_a_package_that_breaks_while_loading_is_a_reason_and_is_loaded_once(error: Exception) -> None:
    broken = Fake("flash_attn", broken=error)
    here = router(broken, platform=Platform("cuda", capability=(9, 0)))
    for _ in range(3):
        decision = here.select(CALL, named("flash_attn"))
        assert decision.backend == "torch_sdpa"
        assert decision.reason == f"flash_attn: could not be loaded: {error}"
    assert broken.loaded == 1
    with pytest.raises(NoBackendError, match="flash_attn: could not be loaded"):
        here.kernel("flash_attn")


def test_a_described_machine_loads_nothing() -> None:
    fake = Fake("flash_attn", broken=ImportError())
    assert router(fake).select(CALL, AUTO).backend == "flash_attn"
    assert fake.loaded == 0


def test_a_real_machine_hands_out_the_kernel_it_loaded() -> None:
    fake = Fake("flash_attn")
    here = router(fake, platform=Platform("cuda", capability=(9, 0)))
    assert here.select(CALL, AUTO).backend == "flash_attn"
    assert here.kernel("flash_attn") is here.kernel("flash_attn")
    assert fake.loaded == 1


# Accuracy


@pytest.mark.parametrize("accuracy", ["quantized", "sparse"])
def test_the_route_takes_lossy_backends_only_when_they_are_allowed(accuracy: str) -> None:
    here = router(Fake("flash_attn", accuracy))
    decision = here.select(CALL, AUTO)
    assert decision.backend == "torch_sdpa"
    assert decision.rejected == (Rejection("flash_attn", (f"accuracy {accuracy} is not allowed",)),)
    assert here.select(CALL, AUTO, accuracy="sparse").backend == "flash_attn"
    assert (here.select(CALL, AUTO, accuracy="quantized").backend == "flash_attn") == (accuracy == "quantized")


PACKAGES = "flash-attn==2.8.3;flash-attn-3==3.0.0;flash-attn-4==4.0.0b36;flashinfer-python==0.7.2;xformers==0.0.35;" \
    "amd-aiter==0.1.7;sageattention==2.2.0;sageattn3==1.0.0;triton==3.6.0;comfy-kitchen==0.2.40"  # fmt: skip
MACHINES = [
    *(f"cuda:{major}.{minor}" for major, minor in ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0))),
    "cuda:12.1",
    "cuda",
    "rocm:gfx942",
    "cpu",
    "mps",
    "xpu",
    "npu",
    "xla",
]


@pytest.mark.parametrize("packages", ["", PACKAGES], ids=["bare", "everything installed"])
@pytest.mark.parametrize("machine", MACHINES)
def test_auto_is_exact_and_able_on_every_machine(machine: str, packages: str) -> None:
    here = Router(parse_platform(f"{machine},packages={packages}"))
    sizes = itertools.product(
        (64, 72, 128, 160, 512), ("bfloat16", "float16", "float32"), MASK_KINDS, (24, 8), (77, 4096)
    )
    for head_dim, dtype, mask, kv_heads, kv_len in sizes:
        request = AttentionRequest(1, 24, 4096, kv_len, head_dim, dtype, kv_heads, mask=mask)
        decision = here.select(request, AUTO)
        assert BACKENDS[decision.backend].accuracy == "exact"
        assert here.reasons_against(decision.backend, request) == ()
        assert decision.backend in here.priority.order


# Layers of configuration


def test_the_highest_configuration_sets_accuracy_and_strict() -> None:
    lossy = router(Fake("flash_attn", "quantized"))
    assert lossy.decide(CALL, (), "self", "self").backend == "torch_sdpa"
    assert lossy.decide(CALL, (parse_config("accuracy=quantized"),), "self", "self").backend == "flash_attn"
    layers = (parse_config("strict=true", "node"), parse_config("flash_attn", "DIFFUSION_ATTENTION_BACKEND"))
    with pytest.raises(NoBackendError, match=r"via DIFFUSION_ATTENTION_BACKEND\.default"):
        router(Fake("flash_attn")).decide(WIDE, layers, "self", "self")
    assert router(Fake("flash_attn")).decide(WIDE, layers[1:], "self", "self").backend == "torch_sdpa"


def test_roles_of_one_configuration_run_on_different_backends() -> None:
    layers = (parse_config({"default": "flash_attn", "per_role": {"cross": "sdpa_math"}}, "node"),)
    here = router(Fake("flash_attn"), Fake("sdpa_math"))
    assert here.decide(CALL, layers, "self", "self").backend == "flash_attn"
    decision = here.decide(CALL, layers, "ltx2.audio_to_video", "cross")
    assert decision.backend == "sdpa_math"
    assert decision.source == "node.per_role['cross'] (category of 'ltx2.audio_to_video')"


def test_what_a_route_has_against_a_backend_is_a_note_where_a_person_names_it(snapshot: SnapshotAssertion) -> None:
    """flex_attn is compiled at its first call and skips nothing without a mask: it runs all the same, and says so."""
    machine = parse_platform("cuda:9.0,torch=2.11.0,packages=triton==3.6.0")
    router = Router(machine)
    named = router.select(CALL, Choice("flex_attn", "test"))
    assert (named.backend, named.rejected) == ("flex_attn", ())
    assert named.notes == snapshot
    assert router.select(CALL, Choice(None, "test")).notes == ()
    assert router.select(CALL, Choice("torch_sdpa", "test")).notes == ()


def test_the_note_is_in_the_account_once_and_in_explain(
    capsys: pytest.CaptureFixture[str], snapshot: SnapshotAssertion
) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    from attention_backends import cli
    from attention_backends.backends.engine.session import Session
    from attention_backends.backends.kernels import BACKENDS

    class Slow(type(BACKENDS["reference"])):  # type: ignore[misc]
        def avoid_reasons(self, request: AttentionRequest, platform: Platform) -> list[str]:
            return ["slow here"]

    router = Router(Platform("cpu"), {**BACKENDS, "reference": Slow()})
    session = Session(router)
    for q_len in (8, 16, 24):
        session.plan(CallKind(CALL._replace(q_len=q_len), f"role{q_len}", "self"), choice=Choice("reference", "test"))
    assert session.run_report.notes == {"reference: slow here": 1}
    words = ["explain", "--config", "flex", "--platform", "cuda:9.0,packages=triton==3.6.0"]
    assert cli.main(words) == 0
    assert next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Note: flex_attn")) == snapshot


def test_no_reason_is_said_twice(snapshot: SnapshotAssertion) -> None:
    """Two requirements of one package that is missing are one reason."""
    router = Router(parse_platform("cuda:8.9,packages=triton==3.6.0"))
    for backend in ("sage_fp16_cuda", "sage_fp16_triton", "sage_fp8_cuda"):
        (reason,) = router.unavailable(backend)
        assert reason == snapshot(name="reason")
