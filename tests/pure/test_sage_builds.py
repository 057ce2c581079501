"""Which SageAttention is installed, by its version, and what it can do: a table of builds, kernel by kernel."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import pytest
from attention_backends.backends.doctor.install import Interpreter, how_to_get
from attention_backends.backends.engine.router import Router
from attention_backends.backends.kernels import BACKENDS, sage_attn
from attention_backends.backends.kernels.support import sage
from attention_backends.backends.values.platform import Platform, parse_platform
from attention_backends.backends.values.request import AttentionRequest
from syrupy.assertion import SnapshotAssertion

KERNELS = ("sage_attn", "sage_fp16_cuda", "sage_fp16_triton", "sage_fp8_cuda", "sage_fp8_sm90")
CALL = AttentionRequest(1, 8, 1024, 1024, 128, "float16")


def machine(version: str, card: str) -> Platform:
    triton = "3.2.0" if card == "7.5" else "3.6.0"
    return parse_platform(f"cuda:{card},cuda=13.0,packages=sageattention=={version};triton=={triton}")


def takes(version: str, card: str, kernel: str, **facts: object) -> bool:
    router = Router(machine(version, card))
    return not router.unavailable(kernel) and not router.reasons_against(kernel, CALL._replace(**facts))  # type: ignore[arg-type]


FORK = {
    "2.1.1+cu128torch2.7.0": "8.0 8.6 8.9 9.0 12.0",
    "2.2.0+cu128torch2.7.1": "8.0 8.6 8.9 9.0 12.0",
    "2.2.0+cu128torch2.7.1.post1": "7.5 8.0 8.6 8.9 9.0 12.0",
    "2.2.0+cu128torch2.8.0.post2": "7.5 8.0 8.6 8.9 9.0 12.0",
    "2.2.0+cu128torch2.9.0.post3": "7.5 8.0 8.6 8.9 9.0 12.0",
    "2.2.0+cu130torch2.9.0andhigher.post4": "7.5 8.0 8.6 8.9 9.0 12.0",
    "2.2.0+cu130torch2.10.0andhigher.post5": "7.5 8.0 8.6 8.7 8.9 9.0 10.0 12.0 12.1",
    "2.2.0+cu130torch2.10.0andhigher.post6": "7.5 8.0 8.6 8.7 8.9 9.0 10.0 12.0 12.1",
    "2.2.0+cu126torch2.8.0.post3": "7.5 8.0 8.6 8.9 9.0",
    "2.2.0+cu126torch2.7.1": "8.0 8.6 8.9 9.0",
    "2.2.0+cu130torch2.12.0andhigher.post9": "7.5 8.0 8.6 8.7 8.9 9.0 10.0 12.0 12.1",
}
"""What `sageattn` dispatches on in each tag; wheels for CUDA before 12.8 are built without Blackwell."""
CARDS = ("7.5", "8.0", "8.6", "8.7", "8.9", "9.0", "10.0", "10.3", "12.0", "12.1")


def post(version: str) -> int:
    return int(version.rpartition(".post")[2]) if ".post" in version else 0


@pytest.mark.parametrize("version", FORK)
def test_the_cards_of_each_wheel(version: str) -> None:
    assert " ".join(card for card in CARDS if takes(version, card, "sage_attn")) == FORK[version]


@pytest.mark.parametrize("version", FORK)
@pytest.mark.parametrize("kernel", KERNELS)
def test_head_sizes_above_128_from_post5_on_but_for_hopper(version: str, kernel: str) -> None:
    for card in CARDS:
        if not takes(version, card, kernel):
            continue
        hopper = kernel == "sage_fp8_sm90" or (kernel == "sage_attn" and card == "9.0")
        assert takes(version, card, kernel, head_dim=256) is (post(version) >= 5 and not hopper), card
        assert takes(version, card, kernel, head_dim=160) is (post(version) >= 5 and not hopper), card
        assert not takes(version, card, kernel, head_dim=257)


@pytest.mark.parametrize("version", FORK)
def test_masks_from_post2_on_in_the_triton_kernel_alone(version: str) -> None:
    for kernel in KERNELS:
        card = "9.0" if kernel == "sage_fp8_sm90" else "8.9"
        for mask in ("bool", "bias", "key_padding"):
            assert takes(version, card, kernel, mask=mask) is (kernel == "sage_fp16_triton" and post(version) >= 2)


@pytest.mark.parametrize(
    ("version", "picked"),
    [
        ("2.2.0+cu128torch2.7.1", "sage_fp16_triton"),
        ("2.2.0+cu128torch2.9.0.post3", "sage_fp16_triton"),
        ("2.2.0+cu130torch2.9.0andhigher.post4", "sage_fp16_cuda"),
        ("2.2.0+cu130torch2.10.0andhigher.post6", "sage_fp16_cuda"),
        ("2.2.0", "sage_fp16_triton"),
    ],
)
def test_what_sageattn_runs_on_sm86(version: str, picked: str) -> None:
    assert sage_attn.dispatched_kernel(machine(version, "8.6")) == picked


@pytest.mark.parametrize(
    "version",
    [
        "2.2.0",
        "2.2.0+torch2.8.0",
        "2.2.0+torch2.8.0.cu128",
        "2.2.0+cu128.torch28",
        "2.2.0+cu128torch28",
        "2.2.0+cu12.8torch2.8.0",
        "2.2.0+cu130torch2.9.0andhigher.post4.local",
        "2.2.0+mytorchbuild",
        "2.2.0+pytorch2.8",
        "2.2.0.post5",
    ],
)
def test_a_build_that_merely_looks_like_it_has_the_limits_of_the_sources(version: str) -> None:
    assert sage.build(machine(version, "8.9")) == sage.BUILDS["thu-ml", "2.2.0", 0]
    assert not takes(version, "8.9", "sage_attn", head_dim=256)
    assert not takes(version, "7.5", "sage_attn")


def test_each_row_of_the_table_is_reached_and_says_something_else_than_its_neighbour() -> None:
    reached = {id(sage.build(machine(version, "8.9"))) for version in (*FORK, "2.1.1", "2.2.0")}
    assert {id(build) for build in sage.BUILDS.values()} <= reached
    ours = [build for (whose, release, _), build in sage.BUILDS.items() if (whose, release) == ("woct0rdho", "2.2.0")]
    assert all(one != other for one, other in pairwise(ours))


def test_doctor_recommends_a_wheel_of_the_table(snapshot: SnapshotAssertion) -> None:
    """Its limits are those that the support table promises."""
    versions: Mapping[str, int] = {version: post(version) for version in FORK}
    (windows_wheel,) = (package for package in sage.SAGE2_PACKAGES if "win32" in package.systems)
    assert windows_wheel.version in versions
    for kernel in KERNELS:
        assert windows_wheel in BACKENDS[kernel].packages
    windows = parse_platform("cuda:8.9,os=windows,torch=2.11.0,cuda=13.0,packages=triton-windows==3.6.0.post25")
    advice = how_to_get(BACKENDS["sage_fp16_triton"], windows, Interpreter("python.exe", "cp312", "win_amd64"))
    assert advice.text.endswith(windows_wheel.page) or windows_wheel.page in advice.text
    assert advice.note == snapshot
