"""flash-attn's Triton backend on AMD's consumer cards: only where the package's own variable is set, and said so."""

from __future__ import annotations

import pytest
from attention_backends.backends.doctor.install import Interpreter, how_to_get
from attention_backends.backends.engine.router import Router
from attention_backends.backends.kernels import BACKENDS
from attention_backends.backends.measure.environment import environment_of, probe_key
from attention_backends.backends.values.platform import Platform, parse_platform
from attention_backends.backends.values.request import AttentionRequest
from syrupy.assertion import SnapshotAssertion

CALL = AttentionRequest(1, 8, 1024, 1024, 128, "bfloat16")
RDNA = ("gfx1100", "gfx1103", "gfx1151", "gfx1200", "gfx1201")
OTHERS = ("gfx1030", "gfx1036", "gfx906")
HERE = Interpreter("python", "cp312", "linux_x86_64")


def card(gfx: str, variable: bool, version: str = "2.8.3") -> Platform:
    packages = f",packages=flash-attn=={version}" if version else ""
    return parse_platform(f"rocm:{gfx},flash_triton={'on' if variable else 'off'}{packages}")


@pytest.mark.parametrize("gfx", RDNA)
def test_it_runs_where_the_variable_is_set_and_is_marked_as_reported(gfx: str) -> None:
    router = Router(card(gfx, True))
    for name in ("flash_attn", "flash_attn_2"):
        assert router.unavailable(name) == ()
        assert router.backends[name].kernel_name(CALL, router.platform) == "flash_attn_2 (Triton, reported)"
        assert router.reasons_against(name, CALL._replace(mask="bool"))
        assert router.reasons_against(name, CALL._replace(head_dim=512))


@pytest.mark.parametrize("gfx", RDNA)
def test_without_the_variable_the_reason_names_it(gfx: str) -> None:
    (reason,) = Router(card(gfx, False)).unavailable("flash_attn_2")
    assert gfx in reason
    assert "FLASH_ATTENTION_TRITON_AMD_ENABLE=TRUE is not set" in reason
    assert "reported" in reason


@pytest.mark.parametrize("gfx", OTHERS)
@pytest.mark.parametrize("variable", [False, True])
def test_older_cards_are_refused_as_before(gfx: str, variable: bool, snapshot: SnapshotAssertion) -> None:
    (reason,) = Router(card(gfx, variable)).unavailable("flash_attn_2")
    assert reason == snapshot


def test_the_first_version_with_that_backend(snapshot: SnapshotAssertion) -> None:
    assert Router(card("gfx1100", True, "2.7.1")).unavailable("flash_attn_2") == ()
    (reason,) = Router(card("gfx1100", True, "2.6.3")).unavailable("flash_attn_2")
    assert reason == snapshot


def test_mi300_is_as_it_was() -> None:
    for variable in (False, True):
        router = Router(card("gfx942", variable))
        assert router.unavailable("flash_attn_2") == ()
        assert router.backends["flash_attn_2"].kernel_name(CALL, router.platform) is None


def test_doctor_says_what_would_help(snapshot: SnapshotAssertion) -> None:
    backend = BACKENDS["flash_attn_2"]
    set_it = how_to_get(backend, card("gfx1100", False), HERE)
    assert set_it.text == snapshot
    get_it = how_to_get(backend, card("gfx1100", False, ""), HERE)
    assert get_it.kind == "page"
    assert "FLASH_ATTENTION_TRITON_AMD_ENABLE=TRUE" in get_it.note
    assert "reported" in set_it.note
    assert "reported" in get_it.note
    assert how_to_get(backend, card("gfx1030", False), HERE).text == snapshot


def test_what_was_measured_or_probed_with_the_variable_does_not_count_without_it() -> None:
    for of in (environment_of, lambda machine: probe_key("flash_attn_2", machine)):
        assert of(card("gfx942", True)) != of(card("gfx942", False))
