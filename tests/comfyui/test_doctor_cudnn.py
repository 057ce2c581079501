"""cuDNN's switch, which any library may turn for the whole process, after the machine was read too."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

torch = pytest.importorskip("torch")

from attention_backends.backends.doctor.doctor import examine  # noqa: E402
from attention_backends.backends.doctor.install import Interpreter  # noqa: E402
from attention_backends.backends.engine.router import Router  # noqa: E402
from attention_backends.backends.kernels.registry import detect  # noqa: E402
from attention_backends.backends.values import platform as platform_module  # noqa: E402
from hook_side import sampling  # noqa: E402

SWITCHED_OFF = "something in this process called torch.backends.cuda.enable_cudnn_sdp(False)"


@pytest.fixture
def _hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch's answers as on a card; the switch is torch's own and works without one."""
    answers = {"is_available": True, "current_device": 0, "get_device_name": "H200", "get_device_capability": (9, 0)}
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    platform_module._machine.cache_clear()
    before = torch.backends.cuda.cudnn_sdp_enabled()
    yield
    torch.backends.cuda.enable_cudnn_sdp(before)
    platform_module._machine.cache_clear()


@pytest.mark.usefixtures("_hopper")
def test_a_switch_that_is_turned_after_the_machine_was_read_is_seen() -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    assert Router(detect()).unavailable("cudnn_attn") == ()
    torch.backends.cuda.enable_cudnn_sdp(False)
    assert Router(detect()).unavailable("cudnn_attn") == (SWITCHED_OFF,)
    (row,) = examine(Router(detect()), Interpreter("python", "cp312", "linux_x86_64"), ["cudnn_attn"])
    assert row.reasons == (SWITCHED_OFF,)
    torch.backends.cuda.enable_cudnn_sdp(True)
    assert Router(detect()).unavailable("cudnn_attn") == ()


@pytest.mark.usefixtures("_hopper")
def test_only_the_switch_is_read_again() -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    assert detect() is detect()


@pytest.mark.usefixtures("_hopper")
def test_the_next_run_of_a_model_sees_it_and_an_unchanged_machine_keeps_its_router() -> None:
    device = torch.device("cuda", 0)
    torch.backends.cuda.enable_cudnn_sdp(True)
    router = sampling.router_for(device)
    assert sampling.router_for(device) is router
    torch.backends.cuda.enable_cudnn_sdp(False)
    assert sampling.router_for(device).unavailable("cudnn_attn") == (SWITCHED_OFF,)
    torch.backends.cuda.enable_cudnn_sdp(True)
    assert sampling.router_for(device) is router
    sampling._router.cache_clear()
