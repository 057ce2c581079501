"""`attention(..., return_lse=True)`: output and log-sum-exp from a backend that gives both, masks whole.

Each kernel's own log-sum-exp is looked at in test_declared_numerics.py.
"""

from __future__ import annotations

import pytest
from syrupy.assertion import SnapshotAssertion

torch = pytest.importorskip("torch", reason="torch is not installed")

from api_calls import K, Q, V, close, nothing_in_force, ran  # noqa: E402, F401
from attention_backends.backends import account, attention, attention_backend  # noqa: E402
from attention_backends.backends.config.layers import Choice  # noqa: E402
from attention_backends.backends.engine.plan import CallKind  # noqa: E402
from attention_backends.backends.engine.router import Router  # noqa: E402
from attention_backends.backends.engine.session import Session  # noqa: E402
from attention_backends.backends.kernels import BACKENDS  # noqa: E402
from attention_backends.backends.kernels.backend import FLOATING, Backend, Limits  # noqa: E402
from attention_backends.backends.kernels.group import BackendGroup  # noqa: E402
from attention_backends.backends.kernels.support.lse import checked  # noqa: E402
from attention_backends.backends.values.errors import NoBackendError  # noqa: E402
from attention_backends.backends.values.faults import KernelOutputError  # noqa: E402
from attention_backends.backends.values.limits import Dtypes, HeadDim  # noqa: E402
from attention_backends.backends.values.platform import Platform  # noqa: E402
from attention_backends.backends.values.request import AttentionCall, AttentionRequest, LseCall, parse_request  # noqa: E402

pytestmark = pytest.mark.usefixtures("nothing_in_force")

HIDDEN = torch.ones(2, 1, 6, 10, dtype=torch.bool)
HIDDEN[0, :, :, 7:] = False
HIDDEN[1, :, 3] = False
REQUEST = AttentionRequest(1, 4, 64, 64, 64, "bfloat16", lse=True)


def _expected(scale: float | None = None, mask: torch.Tensor | None = None) -> torch.Tensor:
    scores = Q.double() @ K.double().transpose(-2, -1) * (0.25 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.logsumexp(-1).float()


@pytest.mark.parametrize("name", ["torch_sdpa", "sdpa_flash", "sdpa_math", "reference"])
@pytest.mark.parametrize("scale", [None, 0.7, -0.3, 0.0])
def test_a_pair_for_each_scale_and_mask(name: str, scale: float | None) -> None:
    for mask in (None, HIDDEN):
        output, lse = attention(Q, K, V, mask, scale=scale, backend=name, return_lse=True)
        close(output, attention(Q, K, V, mask, scale=scale, backend=name))
        close(lse, _expected(scale, mask))
    assert lse.isneginf().sum() == 4
    key, value = K[:, :, :6], V[:, :, :6]
    output, lse = attention(Q, key, value, is_causal=True, scale=scale, backend=name, return_lse=True)
    close(output, attention(Q, key, value, is_causal=True, scale=scale, backend=name))
    close(lse, attention(Q, key, value, torch.ones(6, 6).tril().bool(), scale=scale, return_lse=True)[1])


def test_other_calls_are_as_before_and_after() -> None:
    plain = attention(Q, K, V)
    attention(Q, K, V, return_lse=True)
    assert torch.equal(attention(Q, K, V), plain)


def test_in_the_other_layout_and_with_grouped_heads() -> None:
    turned = [tensor.transpose(1, 2) for tensor in (Q, K, V)]
    output, lse = attention(*turned, layout="BSHD", return_lse=True)
    close(output.transpose(1, 2), attention(Q, K, V))
    close(lse, _expected())
    output, lse = attention(Q, K[:, :2], V[:, :2], enable_gqa=True, return_lse=True)
    each = attention(Q, *(tensor[:, :2].repeat_interleave(2, dim=1) for tensor in (K, V)), return_lse=True)
    close(output, each[0])
    close(lse, each[1])


@pytest.mark.parametrize("name", ["torch_sdpa", "sdpa_flash", "sdpa_math", "reference"])
def test_lengths_of_zero(name: str) -> None:
    output, lse = attention(Q[:, :, :0], K, V, backend=name, return_lse=True)
    assert (output.shape, lse.shape) == ((2, 4, 0, 16), (2, 4, 0))
    kernel = BACKENDS[name].load_lse(Platform("cpu", torch=torch.__version__))
    output, lse = kernel(AttentionCall(Q, K[:, :, :0], V[:, :, :0]))  # the API refuses it
    assert lse.isneginf().all()
    assert not output.any()


def test_one_without_falls_back_with_its_reason() -> None:
    assert ran(backend="emulated_int8", return_lse=True) == "torch_sdpa"
    with account() as run_report:
        attention(Q, K, V, backend="emulated_int8", return_lse=True)
        attention(Q, K, V, backend="emulated_int8")
    first, second = run_report.rows.values()
    assert (first.backend, first.reason) == ("torch_sdpa", "emulated_int8: gives no log-sum-exp")
    assert second.backend == "emulated_int8"
    with attention_backend("emulated_int8", strict=True), pytest.raises(NoBackendError, match="gives no log-sum-exp"):
        attention(Q, K, V, return_lse=True)


def test_a_mask_that_would_be_split_stays_whole() -> None:
    with account() as run_report:
        attention(Q, K, V, HIDDEN, return_lse=True)
    (row,) = run_report.rows.values()
    assert (row.mask, row.calls) == ("bool", 1)


def test_it_has_no_gradient_and_the_output_has_one() -> None:
    query = Q.clone().requires_grad_()
    output, lse = attention(query, K, V, return_lse=True)
    assert not lse.requires_grad
    output.sum().backward()
    assert query.grad is not None


class _Broken(Backend):
    id = "broken"
    summary = "For a test."
    kinds = ("cpu",)
    limits = Limits(Dtypes(FLOATING))
    lse = True
    given: object = None

    def load(self, platform: Platform):
        return lambda call: call.query

    def load_lse(self, platform: Platform):
        if self.given is None:
            raise ImportError("a build without it")
        return checked(lambda call: (call.query, self.given))


def test_a_build_without_it_is_asked_once_and_refused() -> None:
    loads = []

    class Counting(_Broken):
        def load_lse(self, platform: Platform):
            loads.append(platform)
            return super().load_lse(platform)

    router = Router(Platform("cpu", torch="2.13.0"), {**BACKENDS, "broken": Counting()}, use_probe_results=False)
    for _ in range(2):
        decision = router.select(REQUEST, Choice("broken", "a test"))
        assert decision.backend == "torch_sdpa"
        assert "a build without it" in (decision.reason or "")
    assert len(loads) == 1
    assert router.select(REQUEST._replace(lse=False), Choice("broken", "a test")).backend == "broken"


def test_limits_of_the_log_sum_exp_alone_refuse_a_call_that_asks_for_it() -> None:
    class Narrow(_Broken):
        given = torch.ones(2, 4, 6)

        def lse_limits(self, platform: Platform) -> Limits:
            return self.limits.but(HeadDim(max=4))

    router = Router(Platform("cpu", torch="2.13.0"), {**BACKENDS, "broken": Narrow()}, use_probe_results=False)
    assert [len(router.reasons_against("broken", REQUEST._replace(lse=lse))) for lse in (False, True)] == [0, 1]
    described = Router(Platform("cpu", torch="2.13.0", described=True), {"broken": _Broken()}, use_probe_results=False)
    assert described.reasons_against("broken", REQUEST) == (), (
        "what a package lacks is not known of a described machine"
    )


@pytest.mark.parametrize("checks", [False, True])
def test_one_that_fails_in_a_call_gives_way_to_another(checks: bool) -> None:
    class Short(_Broken):
        given = torch.ones(2, 4, 5)

    router = Router(Platform("cpu", torch=torch.__version__), {**BACKENDS, "broken": Short()}, use_probe_results=False)
    session, call = Session(router, checks=checks), LseCall(Q, K, V, scale=-0.3)
    slot = session.plan(CallKind(call.request(lse=True), "self", "self"), choice=Choice("broken", "a test"))
    assert slot.plan.decision.backend == "broken"
    close(session.attention(slot, call), attention(Q, K, V, scale=-0.3))
    assert slot.plan.decision.backend == "torch_sdpa"
    close(call.lse, _expected(-0.3))


@pytest.mark.parametrize("given", [None, 1.0, torch.ones(2, 4, 5), torch.ones(2, 4, 6, 1), torch.ones(2, 6, 4)])
def test_a_result_of_another_shape_is_an_error(given: object) -> None:
    kernel = checked(lambda call: (call.query, given))
    with pytest.raises(KernelOutputError):
        kernel(AttentionCall(Q, K, V))


def test_who_gives_one_on_described_machines(snapshot: SnapshotAssertion) -> None:
    machines = {"sm90": Platform("cuda", capability=(9, 0), torch="2.13.0", cudnn=92300, described=True)}
    machines |= {kind: Platform(kind, torch="2.13.0", described=True) for kind in ("rocm", "cpu", "mps")}
    found = {
        where: [
            name
            for name, backend in BACKENDS.items()
            if not isinstance(backend, BackendGroup) and platform.kind in backend.kinds and backend.lse_limits(platform)
        ]
        for where, platform in machines.items()
    }
    assert found == snapshot


def test_the_request_says_that_it_is_asked_for() -> None:
    asked = parse_request("num_heads=4,q_len=8,head_dim=64,lse=true")
    assert asked.lse
    assert asked.describe().endswith("log-sum-exp")
    assert not asked._replace(lse=False).describe().endswith("log-sum-exp")
