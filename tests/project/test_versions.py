"""Versions are read in one place, and a pre-release counts as its release."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from attention_backends.backends.engine.router import Router
from attention_backends.backends.kernels import BACKENDS
from attention_backends.backends.kernels.support import sage
from attention_backends.backends.values.limits import GroupedHeads, Masks, Scale
from attention_backends.backends.values.platform import Platform
from attention_backends.backends.values.request import AttentionRequest
from attention_backends.backends.values.versions import meets, read
from syrupy.assertion import SnapshotAssertion

ROOT = Path(__file__).parents[2]

MEETS = [
    ("2.7.0", ">=2.7", True),
    ("2.6.3", ">=2.7", False),
    ("2.7.0a0+ecf3bae40a.nv25.02", ">=2.7", True),
    ("2.7.0a0", ">=2.7.1", False),
    ("2.9.0.dev20260101+cu130", ">=2.9", True),
    ("2.9.0.dev20260101", ">=2.10", False),
    ("2.10.0rc2", ">=2.10,<2.11", True),
    ("2.10.0rc2", "<2.10", False),
    ("3.3.0+git7d4c7e5", ">=3.3", True),
    ("3.3.0a1", "<3.3", False),
    ("2.0.0b1", ">=1.0.6,!=2.0.*,!=2.1.0", False),
    ("2.1.0b2", ">=1.0.6,!=2.0.*,!=2.1.0", False),
    ("2.2.0.post1.dev3", ">2.2.0", False),  # PEP 440: a post release is not after its release for `>`
    ("2.2.0.post1.dev3", ">=2.2.0.post1", True),
    ("4.0.0b4", ">=4.0.0b5", False),
    ("4.0.0b36", ">=4.0.0b5", True),
    ("4.0.0", ">=4.0.0b5", True),
    ("2.8.0a0", "==2.8.0", False),  # `==` is about one build
    ("2.8.0+cu128", "==2.8.0", True),
    ("0.7.2.post1", ">=0.6", True),
    ("12.8", "<12.8", False),
    ("12.4", "<12.8", True),
    ("unreadable (OSError)", ">=1", False),
    ("", ">=1", False),
]


@pytest.mark.parametrize(("version", "specifier", "expected"), MEETS)
def test_a_version_meets_a_specifier(version: str, specifier: str, expected: bool) -> None:
    assert meets(version, specifier) is expected


def test_what_is_no_version_is_none() -> None:
    assert read("unreadable (OSError)") is None
    assert str(read("2.9.0.post1.dev4+cu130")) == "2.9.0.post1+cu130"
    assert str(read("2.7.0a0+ecf3bae40a.nv25.02")) == "2.7.0+ecf3bae40a.nv25.2"


SELF = AttentionRequest(1, 4, 256, 256, 96, "bfloat16")
TRITON = ("triton", "3.6.0")


@pytest.mark.parametrize("suffix", ["a0", "a0+ecf3bae40a.nv25.02", "b1", "rc3", ".dev20260101", ".dev20260101+cu130"])
def test_every_version_that_is_asked_about_may_be_a_pre_release(suffix: str) -> None:
    """Each requirement of each backend, met by its lowest version, is met by a pre-release of that version."""
    from packaging.requirements import Requirement

    asked = 0
    for backend in BACKENDS.values():
        for need in backend.requires:
            for lowest in (one for one in Requirement(need).specifier if one.operator == ">="):
                if "b" in lowest.version:
                    continue
                asked += 1
                assert meets(lowest.version + suffix, need[len(Requirement(need).name) :]), (need, suffix)
    assert asked > 8


def test_flex_attn_on_pre_releases(snapshot: SnapshotAssertion) -> None:
    backend = BACKENDS["flex_attn"]

    def on(torch: str, kind: str = "cpu") -> tuple[str, ...]:
        return Router(Platform(kind, torch=torch, described=True, os="linux")).unavailable("flex_attn")

    assert on("2.6.0a0") == ()
    assert on("2.5.0.dev20260101") != ()
    assert on("2.9.0.dev20260101", "xpu") == ()
    seven, six = (Platform("cpu", torch=version) for version in ("2.7.0a0+nv25.02", "2.6.0a0+nv25.02"))
    assert backend.unsupported_reasons(SELF, seven) == []
    assert backend.unsupported_reasons(SELF, six) == snapshot


def test_varlen_of_torch_on_pre_releases() -> None:
    backend = BACKENDS["sdpa_flash"]

    def limits(torch: str):
        return backend.varlen_limits(Platform("cuda", capability=(9, 0), torch=torch))

    assert limits("2.9.1") is None
    assert limits("2.10.0a0")[Scale].taken is False
    assert limits("2.11.0.dev20260101")[Scale].taken is True
    grouped = [limits(version)[GroupedHeads].taken for version in ("2.11.0.dev20260101", "2.12.0rc1")]
    assert grouped == [False, True]


def test_a_function_that_lacks_what_its_version_promises_is_not_loaded(
    monkeypatch: pytest.MonkeyPatch, snapshot: SnapshotAssertion
) -> None:
    """Otherwise a scale would be dropped without a word in an early nightly build."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    monkeypatch.setattr(varlen, "varlen_attn", lambda query, key, value, cu_q, cu_k, max_q, max_k: query)
    platform = Platform("cuda", capability=(9, 0), torch="2.12.0.dev20260101")
    with pytest.raises(NotImplementedError) as caught:
        BACKENDS["sdpa_flash"].load_varlen(platform)
    assert str(caught.value) == snapshot


def test_other_packages_in_pre_releases() -> None:
    def on(capability: tuple[int, int], *packages: tuple[str, str], cuda: str = "13.0") -> Platform:
        return Platform("cuda", capability=capability, torch="2.11.0", cuda=cuda, cudnn=91002, packages=packages)

    assert BACKENDS["flash_attn_2"].unavailable_reasons(on((8, 0), ("flash-attn", "2.6.3rc1"))) == []
    assert BACKENDS["flash_attn_2"].unavailable_reasons(on((12, 0), ("flash-attn", "2.7.3.dev1"))) == []
    assert BACKENDS["flash_attn_4"].unavailable_reasons(on((9, 0), ("flash-attn-4", "4.0.0b4"))) != []
    assert sage.is_sage2(on((8, 9), ("sageattention", "2.2.0a1"), TRITON))
    from attention_backends.backends.kernels import sage_fp8_cuda

    assert sage_fp8_cuda.accumulator(on((8, 9), ("sageattention", "2.2.0rc1"), TRITON)) == "fp32+fp16"
    turing = on((7, 5), ("flashinfer-python", "0.6.16.dev20260101"))
    assert BACKENDS["flashinfer_attn"].unsupported_reasons(SELF._replace(dtype="float16", head_dim=128), turing) == []
    tpu = Platform("xla", torch="2.9.0", packages=(("torch-xla", "2.4.0rc1"),))
    assert BACKENDS["xla_flash"].limits_on(tpu)[Masks].kinds == ("none", "key_padding")


def test_no_other_place_reads_versions() -> None:
    """Only these files of the pack import `packaging`."""
    readers = {}
    for path in sorted(ROOT.glob("**/*.py")):
        if path.relative_to(ROOT).parts[0] in ("tests", ".venv", "benchmarks", "devtools"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("packaging"):
                readers.setdefault(path.relative_to(ROOT).as_posix(), set()).update(name.name for name in node.names)
    assert readers.pop("backends/values/versions.py") >= {"Version", "SpecifierSet"}
    assert readers == {"backends/kernels/backend.py": {"Requirement"}, "backends/kernels/support/sage.py": {"Version"}}


@pytest.mark.parametrize(("torch", "groups"), [("2.13.0", True), ("2.13.0rc2", True), ("2.13.0.dev20260101", False)])
def test_a_nightly_build_is_not_trusted_with_what_would_read_other_memory(
    monkeypatch: pytest.MonkeyPatch, torch: str, groups: bool
) -> None:
    """Grouped heads in torch's CPU operator: before 2.13 it reads past the keys."""
    whole = pytest.importorskip("torch")
    heads = []

    def operator(query, key, value, *_, **__):
        heads.append(key.shape[1])
        return (query,)

    monkeypatch.setattr(whole, "_scaled_dot_product_flash_attention_for_cpu", operator)
    from attention_backends.backends.values.request import AttentionCall

    query, key = whole.zeros(1, 4, 3, 8), whole.zeros(1, 2, 3, 8)
    BACKENDS["sdpa_flash"].load(Platform("cpu", torch=torch))(AttentionCall(query, key, key, enable_gqa=True))
    assert heads == [2 if groups else 4]
