"""Every model family in a real ComfyUI: the picture stays, each call has its role and block, and nothing is left.

What each call should be is in expected_roles.py; which calls there are comes from the recordings in fixtures/.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from expected_roles import EXPECTED, expected_block, expected_role
from syrupy.assertion import SnapshotAssertion
from tiny_models import FAMILIES

torch = pytest.importorskip("torch", reason="torch is not installed")

import tiny_sampling  # noqa: E402
from attention_backends.backends.engine.session import Session  # noqa: E402
from hook_side import (  # noqa: E402
    comfyui,
    last_run,
    marks_left,
    masks,
    no_environment,
    pass_masks_on,
    selected,
    sites,
    with_role,
)
from record_hook_calls import Recorder  # noqa: E402

pytestmark = [pytest.mark.comfy, pytest.mark.filterwarnings("ignore:torch.get_autocast_gpu_dtype")]
FIXTURES = Path(__file__).parents[1] / "fixtures"

ROUTED = [name for name, expected in EXPECTED.items() if expected]
MIX = ("sdpa_math", "comfy", "reference", "torch_sdpa")


@pytest.fixture(scope="module")
def comfy() -> Iterator[Path]:
    yield comfyui()
    model_and_stock.cache_clear()


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    no_environment(monkeypatch)


@lru_cache(maxsize=1)
def model_and_stock(name: str) -> tuple[Any, Any]:
    """A family's model and what ComfyUI samples with it by itself."""
    patcher = tiny_sampling.build(name)
    return patcher, tiny_sampling.sample(patcher, name)


def built(name: str) -> tuple[Any, Any]:
    reason = tiny_sampling.unavailable(name)
    if reason:
        pytest.skip(reason)
    return model_and_stock(name)


def strictly(patcher: Any, backend: str) -> Any:
    return selected(patcher, backend, strict=True)


def assert_close(ours: Any, stock: Any) -> None:
    torch.testing.assert_close(ours, stock, rtol=0, atol=1e-4 * float(stock.abs().max()))


def recorded_calls(name: str) -> Counter[tuple[str, int, int]]:
    """(path, q_len, kv_len) of every call that this ComfyUI makes, from its recording."""
    import comfyui_version

    path = FIXTURES / f"hook_calls_{comfyui_version.__version__}.json"
    if not path.exists():
        pytest.skip(f"no recording of ComfyUI {comfyui_version.__version__}; make one with record_hook_calls.py")
    calls: Counter[tuple[str, int, int]] = Counter()
    for call in json.loads(path.read_text(encoding="utf-8"))["families"][name]["calls"]:
        calls[call["module"], call["q"]["shape"][-2], call["k"]["shape"][-2]] += call["count"]
    return calls


def test_every_family_is_expected() -> None:
    assert EXPECTED.keys() == FAMILIES.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_torch_sdpa_changes_no_bit_and_leaves_nothing(comfy: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks are passed on as they are here: with fewer keys a kernel groups its sums otherwise."""
    pass_masks_on(monkeypatch)
    patcher, stock = built(name)
    assert torch.equal(tiny_sampling.sample(selected(patcher, "torch_sdpa", strict=name in ROUTED), name), stock)
    assert marks_left(patcher.model.diffusion_model) == []
    assert sites.current_model_call() is None
    assert torch.equal(tiny_sampling.sample(patcher, name), stock)


HONOURED = {
    "qwen_image_masked": ({"bias, gathered"}, 1),
    "ltxv": ({"none", "bias, trimmed"}, 1),
    "ltxv_guide": ({"bias, trimmed", "bias"}, 3),
    "hunyuan_video": ({"bias", "bias, gathered"}, 2),
    "flux_masked": ({"bias"}, 1),  # weaker, not hidden: nothing can be left out
}
"""How each masked family's masks are honoured, and how many are read in one model call at most."""


@pytest.mark.parametrize("name", HONOURED)
def test_masked_families_leave_hidden_keys_out(comfy: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The picture stays but for rounding; each source mask is read once in a model call, however many blocks use it."""
    patcher, stock = built(name)
    read: list[int] = []
    inspect, begin = masks.inspect, masks.Masks.__init__
    monkeypatch.setitem(inspect.__globals__, "CPU_KEPT", 1.0)  # few keys are hidden in tiny models
    monkeypatch.setattr(masks, "inspect", lambda *given: read.append(1) or inspect(*given))
    most: list[int] = []

    def begun(self: Any, *given: Any) -> None:
        most.append(len(read))
        read.clear()
        begin(self, *given)

    monkeypatch.setattr(masks.Masks, "__init__", begun)
    ours = tiny_sampling.sample(strictly(patcher, "torch_sdpa"), name)
    torch.testing.assert_close(ours, stock, rtol=0, atol=1e-5 * float(stock.abs().max()))
    treatments, sources = HONOURED[name]
    assert {row["mask"] for row in last_run()["rows"]} == treatments
    assert max(*most, len(read)) == sources
    assert [note for note in last_run()["notes"] if not note.startswith("recommended for")] == []


@pytest.mark.parametrize("name", ROUTED)
def test_every_call_has_its_role_and_block(comfy: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pass_masks_on(monkeypatch)
    patcher, _ = built(name)
    recorder = Recorder(patcher.model.diffusion_model)
    seen: Counter[tuple[Any, ...]] = Counter()
    attention = Session.attention

    def watched(self: Session, slot: Any, call: Any, *given: Any) -> Any:
        path, _ = recorder.running[-1]  # told by forward hooks of the test's own
        seen[path, call.query.shape[2], call.key.shape[2], slot.plan.row.role, slot.plan.row.block] += 1
        return attention(self, slot, call, *given)

    monkeypatch.setattr(Session, "attention", watched)
    with recorder.watching():
        tiny_sampling.sample(strictly(patcher, "torch_sdpa"), name)
    assert seen == Counter(
        {
            (path, q_len, kv_len, expected_role(name, path, kv_len), expected_block(path)): count
            for (path, q_len, kv_len), count in recorded_calls(name).items()
        }
    )
    assert last_run()["notes"] == []  # no guessed role among others
    assert {row["backend"] for row in last_run()["rows"]} == {"torch_sdpa"}


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("sdpa_flash", "reference", "sdpa_math")]


@pytest.mark.parametrize("backend", ["comfy", *SLOW])
@pytest.mark.parametrize("name", ROUTED)
def test_other_backends_give_the_same_picture(comfy: Path, name: str, backend: str) -> None:
    patcher, stock = built(name)
    ours = tiny_sampling.sample(strictly(patcher, backend), name)
    assert {row["backend"] for row in last_run()["rows"]} == {backend}
    if backend == "comfy":
        assert torch.equal(ours, stock)
    else:
        assert_close(ours, stock)


FORBIDDEN = "emulated_int8: accuracy quantized, and the model forbids low precision for this call"
ROUNDED = (2e-4, 2e-2)
"""Least and most relative L2 of a picture from query and key in INT8: the families give 0.0008 to 0.0083."""


@pytest.mark.parametrize("name", ROUTED)
def test_int8_gives_nearly_the_same_picture(comfy: Path, name: str) -> None:
    """It runs wherever a model allows low precision, with every mask as it was planned, and one sees that it ran."""
    patcher, stock = built(name)
    ours = tiny_sampling.sample(strictly(patcher, "emulated_int8"), name)
    assert ROUNDED[0] < float((ours - stock).norm() / stock.norm()) < ROUNDED[1]
    ran = {(row["role"], row["backend"], row["reason"]) for row in last_run()["rows"]}
    roles = {expected_role(name, path, kv_len) for path, _, kv_len in recorded_calls(name)}
    refused = {"wan_i2v": {"wan.image_cross"}, "ltxv_guide": {"self"}}.get(name, set())
    assert ran == {
        (role, "torch_sdpa", FORBIDDEN) if role in refused else (role, "emulated_int8", None) for role in roles
    }
    assert [note for note in last_run()["notes"] if not note.startswith("recommended for")] == []


# The only other backend that runs on a CPU. One family: it compiles a kernel for each kind of call, which takes tens of
# seconds; what it computes, with masks and grouped heads, is in test_flex_attn.py.
@pytest.mark.compile
def test_flex_attn_gives_the_same_picture(comfy: Path) -> None:
    patcher, stock = built("wan")
    assert_close(tiny_sampling.sample(strictly(patcher, "flex_attn"), "wan"), stock)
    assert {row["backend"] for row in last_run()["rows"]} == {"flex_attn"}


@pytest.mark.parametrize("name", ROUTED)
def test_each_role_gets_its_own_backend(comfy: Path, name: str) -> None:
    patcher, stock = built(name)
    roles = {expected_role(name, path, kv_len) for path, _, kv_len in recorded_calls(name)}
    wanted = {role: MIX[i % len(MIX)] for i, role in enumerate(sorted(roles))}
    model = patcher
    for role, backend in wanted.items():
        model = with_role(model, role, backend)
    assert_close(tiny_sampling.sample(model, name), stock)
    assert {(row["role"], row["backend"]) for row in last_run()["rows"]} == set(wanted.items())
    assert [note for note in last_run()["notes"] if not note.startswith("recommended for")] == []


def test_a_model_that_bypasses_the_hook_is_told(comfy: Path, snapshot: SnapshotAssertion) -> None:
    patcher, stock = built("hunyuan3d2_1")
    assert torch.equal(tiny_sampling.sample(selected(patcher, "reference"), "hunyuan3d2_1"), stock)
    assert last_run()["rows"] == []
    assert last_run()["notes"] == snapshot
    with pytest.raises(RuntimeError) as caught:
        tiny_sampling.sample(strictly(patcher, "reference"), "hunyuan3d2_1")
    assert str(caught.value) == snapshot
