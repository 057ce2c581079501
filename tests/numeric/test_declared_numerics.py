"""Every backend that is declared is computed and compared, on every kind of machine and for all that it declares.

Nothing here is a list of backends: what runs is read from `BACKENDS` and from each backend's declarations, so a kernel
that is added and drops an argument fails, and so does one that no machine here can run.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from functools import cache

import pytest
from syrupy.assertion import SnapshotAssertion

torch = pytest.importorskip("torch", reason="torch is not installed")

from attention_backends.backends.config.names import COMFY  # noqa: E402
from attention_backends.backends.engine.router import Router  # noqa: E402
from attention_backends.backends.kernels import BACKENDS, flex_attn, torch_sdpa  # noqa: E402
from attention_backends.backends.kernels.backend import FLOATING, Backend, Limits  # noqa: E402
from attention_backends.backends.kernels.reference import reference_attention  # noqa: E402
from attention_backends.backends.kernels.support.sdpa import expand_kv, plain_sdpa  # noqa: E402
from attention_backends.backends.kernels.support.varlen import VarlenCall  # noqa: E402
from attention_backends.backends.sparse.block_map import BlockMap  # noqa: E402
from attention_backends.backends.sparse.kernel import SparseKernel  # noqa: E402
from attention_backends.backends.sparse.method import Where  # noqa: E402
from attention_backends.backends.values.grid import TokenGrid  # noqa: E402
from attention_backends.backends.values.limits import Causal, Dtypes, Masks, MaskWithCausal, ValueHeadDim  # noqa: E402
from attention_backends.backends.values.platform import KINDS, Platform  # noqa: E402
from attention_backends.backends.values.request import AttentionCall, AttentionRequest, HostedCall  # noqa: E402
from attention_calls import as_comfyui_runs, call_for, copied  # noqa: E402
from declared_features import Feature, features, without  # noqa: E402
from fakes import on_platform, torch_operators, torch_varlen  # noqa: E402
from kernel_machines import places  # noqa: E402
from tolerance import Error, allowed, error, truth  # noqa: E402

EVERYTHING = (Causal("any"), MaskWithCausal(taken=True), ValueHeadDim(may_differ=True))
"""What limits may allow beyond the usual."""

RUN = list(BACKENDS)


@pytest.fixture(autouse=True)
def inference():
    with as_comfyui_runs():
        yield


def stand_in(monkeypatch: pytest.MonkeyPatch, platform: Platform) -> None:
    """Fakes of what this machine has and the CPU lacks."""
    on_platform(monkeypatch, platform)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", torch_varlen.module(platform.torch))
    if platform.kind in ("cuda", "rocm"):
        torch_operators.on_a_card(monkeypatch)
        monkeypatch.setattr(torch_sdpa, "SMALL_QUERY", 0)
    # flex_attn through FlexAttention's own definition; compiled: -m compile.
    from torch.nn.attention import flex_attention

    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(flex_attn, "cpp_compiler", lambda os_name: ("g++", "g++"))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(flex_attn.Variants, "_new", lambda self: flex_attn.attend)


@cache
def expected_of(feature: Feature) -> torch.Tensor:
    return truth(feature.call())


@cache
def limit_of(feature: Feature, arithmetic: str) -> Error:
    if feature.request.dtype == "float64" and arithmetic in ("fp32", "half"):
        return Error(1e-11, 1e-10)
    return allowed(feature.call(), arithmetic)


def faults_of(
    monkeypatch: pytest.MonkeyPatch, backend: Backend, backends: Mapping[str, Backend] = BACKENDS
) -> list[str]:
    """What is wrong with a backend on the machines that it is tested on, and what of it none of them can test."""
    found: list[str] = []
    machines = list(places(backend))
    if backend.lse and all(backend.lse_limits(platform) is None for platform in machines):
        found.append(f"{backend.id} gives a log-sum-exp on no machine of kernel_machines.py")
    covered = {platform.kind for platform in machines}
    for kind in backend.kinds:
        if kind not in covered:
            found.append(
                f"{backend.id} runs on no {kind} machine of kernel_machines.py: its numbers are never looked at"
            )
    for number, platform in enumerate(machines):
        with monkeypatch.context() as patched:
            stand_in(patched, platform)
            router = Router(platform, {**backends, backend.id: backend}, use_probe_results=False)
            found += _faults_on(router, backend, number or None)  # every dtype on the first one, then in turns
    return found


def _faults_on(router: Router, backend: Backend, only: int | None) -> list[str]:
    platform = router.platform
    where = f"{backend.id} on {platform.describe()} with {dict(platform.packages)}"
    if reasons := router.unavailable(backend.id):
        return [f"{where}: {'; '.join(reasons)}"]
    kernel, arithmetic, found = router.kernel(backend.id), backend.arithmetic_on(platform), []
    for feature in features(backend.limits_on(platform), only):
        if reasons := backend.unsupported_reasons(feature.request, platform):
            if feature.declared:
                found.append(f"{where}: {feature.label} is declared and refused: {'; '.join(reasons)}")
            continue
        call, before = feature.call(), feature.call()
        if backend.id == COMFY:
            call = HostedCall(call, reference_attention)
        try:
            output = kernel(call)
        except Exception as failure:
            found.append(f"{where}: {feature.label}: {type(failure).__name__}: {failure}")
            continue
        if (output.shape, output.dtype) != ((*before.query.shape[:3], before.value.shape[3]), before.query.dtype):
            found.append(f"{where}: {feature.label}: {tuple(output.shape)} {output.dtype}")
            continue
        if isinstance(kernel, SparseKernel):
            expected, limit = _of_kept(kernel, before, arithmetic)
        else:
            expected, limit = expected_of(feature), limit_of(feature, arithmetic)
        made = error(output, expected)
        if not made.within(limit):
            found.append(f"{where}: {feature.label}: {made} > {limit}")
        same = (torch.equal(getattr(call, name), getattr(before, name)) for name in ("query", "key", "value"))
        if not all(same):
            found.append(f"{where}: {feature.label}: it changed its inputs")
    found += _lse_faults(router, backend, where, only)
    return found + (_packed_faults(router, backend, where, only) if backend.varlen else [])


def _of_kept(kernel: SparseKernel, call: AttentionCall, arithmetic: str) -> tuple[torch.Tensor, Error]:
    """What a sparse method is to give for a call, all of whose tokens lie in one row, and how far it may be off."""
    where = Where(None, None, None, None, "self", ())
    selected = kernel.method.select_blocks(call, TokenGrid(1, 1, call.query.shape[2]), where, kernel.options)
    if isinstance(selected, BlockMap):
        call.attn_mask = selected.mask()
    exact = call.query.dtype == torch.float64
    return truth(call), Error(1e-11, 1e-10) if exact else allowed(call, arithmetic)


@cache
def expected_lse(feature: Feature) -> torch.Tensor:
    return lse_of(feature.call())


def lse_of(call: AttentionCall) -> torch.Tensor:
    """The log-sum-exp of each row's scores, in float64."""
    scores = call.query.double() @ expand_kv(call)[0].double().transpose(-2, -1)
    scores = scores * (call.query.shape[3] ** -0.5 if call.scale is None else call.scale)
    if call.attn_mask is not None:
        mask = call.attn_mask
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask.double()
    if call.is_causal:
        scores = scores.masked_fill(~torch.ones_like(scores[0, 0], dtype=torch.bool).tril(), float("-inf"))
    return scores.logsumexp(dim=-1)


def _lse_faults(router: Router, backend: Backend, where: str, only: int | None) -> list[str]:
    """The log-sum-exp: of every call that its limits declare, of rows without a key, and of calls without one."""
    platform, found = router.platform, []
    limits = backend.lse_limits(platform)
    if limits is None:
        return []
    kernel = router.lse(backend.id)
    for feature in (*features(limits, only), *_with_empty_rows(limits, only)):
        if limits.reasons(feature.request) or backend.unsupported_reasons(feature.request, platform):
            continue
        call, label = feature.call(), f"{where}, log-sum-exp: {feature.label}"
        output, lse = kernel(call)
        if not error(output, expected_of(feature)).within(limit_of(feature, backend.arithmetic_on(platform))):
            found.append(f"{label}: its output is another one")
        if (lse.shape, lse.dtype) != (call.query.shape[:3], torch.float32):
            found.append(f"{label}: {tuple(lse.shape)} {lse.dtype}")
        elif not torch.allclose(lse.double(), expected_lse(feature), rtol=1e-5, atol=LSE_ERROR):
            found.append(f"{label}: {(lse - expected_lse(feature)).abs().max()} off")
    for lengths in ((0, 64), (48, 0)):
        request = AttentionRequest(2, 4, *lengths, 64, limits[Dtypes].names[0])
        output, lse = kernel(call_for(request))
        if lse.shape != (2, 4, lengths[0]) or not lse.isneginf().all() or output.any():
            found.append(f"{where}, log-sum-exp: lengths {lengths}")
    return found


LSE_ERROR = 1e-3
"""Absolute; scores are sums in float32 of products of half types. The base, the scale and a key are 0.01 at least."""


def _with_empty_rows(limits: Limits, only: int | None) -> Iterator[Feature]:
    """Each kind of mask that can leave a row without a key, one of -inf among them, on the plain calls."""
    plain = (feature for feature in features(limits, only) if feature.label.endswith(": plain"))
    for feature in plain:
        for mask in set(limits[Masks].kinds) - {"none"}:
            yield EmptyRows(f"{feature.label}, {mask} with empty rows", feature.request._replace(mask=mask))


class EmptyRows(Feature):
    """A call whose mask hides every key from the second sample, or from its third row on."""

    def call(self) -> AttentionCall:
        call = call_for(self.request)
        mask = call.attn_mask.expand(2, -1, -1, -1).clone()
        mask[1, :, 2:] = False if mask.dtype == torch.bool else float("-inf")
        if mask.shape[2] == 1:
            mask[1] = False
        call.attn_mask = mask
        return call


def _packed_faults(router: Router, backend: Backend, where: str, only: int | None) -> list[str]:
    """The kernel over packed tokens: two sequences of different lengths, each compared by itself."""
    platform, found = router.platform, []
    limits = backend.varlen_limits(platform)
    if limits is None:
        return []
    kernel = backend.load_varlen(platform)
    for feature in features(limits, only):
        request = feature.request
        if request.is_causal or request.mask != "none" or limits.reasons(request._replace(batch=1)):
            continue
        parts = [call_for(request._replace(batch=1, q_len=q_len, kv_len=kv_len)) for q_len, kv_len in PACKED]
        query, key, value = (
            torch.cat([getattr(part, name)[0].transpose(0, 1) for part in parts]) for name in ("query", "key", "value")
        )
        q_lengths, kv_lengths = zip(*PACKED, strict=True)
        output = kernel(VarlenCall(query, key, value, q_lengths, kv_lengths, request.scale))
        for part, rows in zip(parts, output.split(q_lengths), strict=True):
            made = error(rows.transpose(0, 1)[None], truth(part))
            limit = allowed(part, backend.arithmetic_on(platform))
            if not made.within(limit):
                found.append(f"{where}, packed: {feature.label}: {made} > {limit}")
    return found


PACKED = ((20, 64), (48, 128))
"""Queries and keys of two sequences; whole blocks of 64 keys, which one version asks for."""


@pytest.mark.parametrize("name", RUN)
def test_all_that_is_declared_is_right(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    faults = faults_of(monkeypatch, BACKENDS[name])
    assert not faults, "\n".join(faults[:20])


@pytest.mark.parametrize("name", [name for name in BACKENDS if name not in RUN])
def test_what_is_planned_runs_nowhere(name: str) -> None:
    for kind in KINDS:
        assert Router(Platform(kind, torch="2.13.0")).unavailable(name)


def test_what_a_call_is_about_shows_in_its_result() -> None:
    """Each thing that a kernel could drop is beyond the tolerance of each arithmetic, or no test here would see it."""
    everything = Limits(Dtypes(("bfloat16",)), *EVERYTHING)
    seen = set()
    for feature in features(everything):
        for name, call in without(feature):
            seen.add(name)
            for arithmetic in ("half", "int8", "fp8", "fp4"):
                limit = limit_of(feature, arithmetic)
                assert not error(truth(call), expected_of(feature)).within(limit), (feature.label, name, arithmetic)
    assert seen == {"mask", "causal", "scale", "grouping of heads"}


# A kernel as the guide has it, wrong in one thing each


def _dropping(*names: str):
    def wrong(call: AttentionCall) -> torch.Tensor:
        kept = {name: None if name in names else getattr(call, name) for name in ("attn_mask", "scale")}
        causal = call.is_causal and "is_causal" not in names
        return reference_attention(
            AttentionCall(call.query, call.key, call.value, is_causal=causal, enable_gqa=call.enable_gqa, **kept)
        )

    return wrong


def _heads_in_turns(call: AttentionCall) -> torch.Tensor:
    if not call.enable_gqa:
        return reference_attention(call)
    groups = call.query.shape[1] // call.key.shape[1]
    key, value = (tensor.repeat(1, groups, 1, 1) for tensor in (call.key, call.value))
    return reference_attention(AttentionCall(call.query, key, value, call.attn_mask, call.is_causal, call.scale))


def _without_bias(call: AttentionCall) -> torch.Tensor:
    if call.attn_mask is not None and call.attn_mask.dtype != torch.bool:
        return _dropping("attn_mask")(call)
    return reference_attention(call)


def _mask_of_the_first(dimension: int):
    def wrong(call: AttentionCall) -> torch.Tensor:
        mask = call.attn_mask
        if mask is not None:
            call = copied(call)
            call.attn_mask = mask.narrow(dimension, 0, 1)
        return reference_attention(call)

    return wrong


def _bottom_right(call: AttentionCall) -> torch.Tensor:
    if not call.is_causal:
        return reference_attention(call)
    q_len, kv_len = call.query.shape[2], call.key.shape[2]
    visible = torch.ones(q_len, kv_len, dtype=torch.bool).tril(kv_len - q_len)
    return reference_attention(AttentionCall(call.query, call.key, call.value, visible[None, None], False, call.scale))


def _in_half(call: AttentionCall) -> torch.Tensor:
    key, value = expand_kv(call)
    half = (tensor.bfloat16() for tensor in (call.query, key, value))
    mask = call.attn_mask if call.attn_mask is None or call.attn_mask.dtype == torch.bool else call.attn_mask.bfloat16()
    return plain_sdpa()(AttentionCall(*half, mask, call.is_causal, call.scale)).to(call.query.dtype)


def _narrow_values(call: AttentionCall) -> torch.Tensor:
    output = reference_attention(call)
    head_dim = call.query.shape[3]
    if call.value.shape[3] > head_dim:
        output[..., head_dim:] = 0
    return output


def _memory_order(call: AttentionCall) -> torch.Tensor:
    tensors = (
        tensor if tensor.is_contiguous() else tensor.transpose(1, 2).reshape(tensor.shape)
        for tensor in (call.query, call.key, call.value)
    )
    return reference_attention(AttentionCall(*tensors, call.attn_mask, call.is_causal, call.scale, call.enable_gqa))


def _last_rows(call: AttentionCall) -> torch.Tensor:
    output = reference_attention(call)
    whole = call.query.shape[2] // 64 * 64
    output[:, :, whole:] *= whole == 0
    return output


def _in_place(call: AttentionCall) -> torch.Tensor:
    output = reference_attention(call)
    call.key -= call.key.mean(dim=2, keepdim=True)
    return output


WRONG = {
    "drops mask, scale and causal": _dropping("attn_mask", "scale", "is_causal"),
    "drops the mask": _dropping("attn_mask"),
    "drops the scale": _dropping("scale"),
    "drops causal": _dropping("is_causal"),
    "takes grouped heads in turns": _heads_in_turns,
    "drops a mask of numbers": _without_bias,
    "reads the first sample's mask": _mask_of_the_first(0),
    "reads the first head's mask": _mask_of_the_first(1),
    "reads the first row's mask": _mask_of_the_first(2),
    "ends the triangle in the other corner": _bottom_right,
    "computes float32 in bfloat16": _in_half,
    "leaves out the end of wider values": _narrow_values,
    "reads memory by the shape alone": _memory_order,
    "leaves out the last rows": _last_rows,
    "changes its inputs": _in_place,
}


def _foo(kernel, **declared: object) -> Backend:
    class Foo(Backend):
        id = "foo_attn"
        summary = "For a test."
        kinds = KINDS
        limits = Limits(Dtypes(("float32",)), *EVERYTHING)

        def load(self, platform: Platform):
            return kernel

    for name, value in declared.items():
        setattr(Foo, name, value)
    return Foo()


@pytest.mark.parametrize("what", WRONG)
def test_a_new_kernel_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    kind = ("cpu", "cuda")[list(WRONG).index(what) % 2]
    faults = faults_of(monkeypatch, _foo(WRONG[what], kinds=(kind,)))
    assert faults
    assert all(fault.startswith("foo_attn") for fault in faults)


@pytest.mark.parametrize(
    ("what", "arithmetic"),
    [
        ("drops the mask", "int8"),
        ("drops the scale", "fp8"),
        ("drops causal", "fp4"),
        ("drops a mask of numbers", "fp4"),
    ],
)
def test_nor_does_a_coarse_arithmetic_hide_it(monkeypatch: pytest.MonkeyPatch, what: str, arithmetic: str) -> None:
    assert faults_of(monkeypatch, _foo(WRONG[what], kinds=("cpu",), arithmetic=arithmetic))


def test_a_right_one_has_no_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = Limits(Dtypes(FLOATING), *EVERYTHING)
    assert faults_of(monkeypatch, _foo(reference_attention, limits=limits)) == []


def test_one_that_no_machine_can_run_is_named(monkeypatch: pytest.MonkeyPatch, snapshot: SnapshotAssertion) -> None:
    (fault,) = faults_of(monkeypatch, _foo(reference_attention, kinds=("cuda",), requires=("foo-attn>=1",)))
    assert fault == snapshot


def test_what_is_declared_and_refused_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(type(_foo(reference_attention))):  # type: ignore[misc]
        kinds = ("cpu",)

        def unsupported_reasons(self, request: AttentionRequest, platform: Platform) -> list[str]:
            return ["does not support a bias mask"] if request.mask == "bias" else []

    faults = faults_of(monkeypatch, Refusing())
    assert faults
    assert all("mask bias" in fault and "is declared and refused" in fault for fault in faults)


def test_a_kernel_over_packed_tokens_is_compared_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def by_sequence(scaled: bool):
        def run(call: VarlenCall) -> torch.Tensor:
            split = (
                tensor.split(lengths)
                for tensor, lengths in (
                    (call.query, call.q_lengths),
                    (call.key, call.kv_lengths),
                    (call.value, call.kv_lengths),
                )
            )
            outputs = []
            for tensors in zip(*split, strict=True):
                part = AttentionCall(*(tensor.transpose(0, 1)[None] for tensor in tensors), enable_gqa=True)
                part.scale = call.scale if scaled else None
                outputs.append(reference_attention(part)[0].transpose(0, 1))
            return torch.cat(outputs)

        return run

    for scaled in (True, False):
        foo = _foo(
            reference_attention,
            kinds=("cpu",),
            varlen=True,
            load_varlen=lambda self, platform, s=scaled: by_sequence(s),
        )
        faults = faults_of(monkeypatch, foo)
        assert (not faults) is scaled
        assert all("packed" in fault and "scale" in fault for fault in faults)


def _lse_wrong(what: str):
    def run(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
        asked = copied(call)
        if what == "drops the scale":
            asked.scale = None
        if what == "drops the mask":
            asked.attn_mask = None
        lse = lse_of(asked).float()
        if what == "base 2":
            lse = lse / torch.tensor(2.0).log()
        if what == "zero for an empty row":
            lse = lse.masked_fill(lse.isneginf(), 0.0)
        if what == "the query's dtype":
            lse = lse.to(call.query.dtype)
        if what == "one head for all":
            lse = lse[:, :1].expand_as(lse)
        return reference_attention(call), lse

    return run


@pytest.mark.parametrize(
    "what",
    [*("", "drops the scale", "drops the mask", "base 2"),
     *("zero for an empty row", "the query's dtype", "one head for all")],
)  # fmt: skip
def test_a_log_sum_exp_is_compared_too(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    limits = Limits(Dtypes(("bfloat16",)), Causal("any"))
    load_lse = lambda self, platform: _lse_wrong(what)  # noqa: E731
    foo = _foo(reference_attention, kinds=("cpu",), limits=limits, lse=True, load_lse=load_lse)
    faults = faults_of(monkeypatch, foo)
    assert bool(faults) is bool(what)
    assert all("log-sum-exp" in fault for fault in faults)


def test_a_log_sum_exp_that_no_machine_gives_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    foo = _foo(reference_attention, kinds=("cpu",), lse=True, lse_limits=lambda self, platform: None)
    (fault,) = faults_of(monkeypatch, foo)
    assert "log-sum-exp" in fault
