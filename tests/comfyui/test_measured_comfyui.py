"""In a real ComfyUI: a tiny Wan sampled with `measured`, several times, and what its account and the store say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from time import sleep
from typing import Any

import pytest
from syrupy.assertion import SnapshotAssertion

torch = pytest.importorskip("torch", reason="torch is not installed")

import tiny_models  # noqa: E402
import tiny_sampling  # noqa: E402
from attention_backends.backends.engine.router import Router  # noqa: E402
from attention_backends.backends.kernels import BACKENDS  # noqa: E402
from attention_backends.backends.kernels.registry import detect  # noqa: E402
from attention_backends.backends.kernels.support.sdpa import plain_sdpa  # noqa: E402
from attention_backends.backends.observe.autotune import tuner  # noqa: E402
from attention_backends.backends.observe.autotune.store import VARIABLE, Store, shared_store  # noqa: E402
from hook_side import counts, last_run, marks_left, nodes_module, plain_comfyui, sampling  # noqa: E402
from measured_machines import Clock, Costed  # noqa: E402

pytestmark = pytest.mark.comfy
FAMILY = "wan_of_12_blocks"
STEPS = 6
sdpa = plain_sdpa()


@pytest.fixture
def wan(monkeypatch: pytest.MonkeyPatch) -> Any:
    plain_comfyui(monkeypatch)
    monkeypatch.delenv(VARIABLE, raising=False)
    usual = tiny_models.FAMILIES["wan"]
    monkeypatch.setitem(tiny_models.FAMILIES, FAMILY, replace(usual, unet={**usual.unet, "num_layers": 12}))
    return tiny_sampling.build(FAMILY)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Store:
    """The store of a user directory that is new."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path))
    return shared_store(tmp_path / "attention_backends" / "measured.sqlite3")


def measured(model: Any, **settings: Any) -> Any:
    usual = {"accuracy": "exact", "strict": True, "guard": "watch"}
    return nodes_module("hook.patch").set_default(model, "autotune", **{**usual, **settings})


def with_backends(monkeypatch: pytest.MonkeyPatch, **backends: Costed) -> dict[str, Costed]:
    router = Router(detect(torch.device("cpu")), {**backends, "comfy": BACKENDS["comfy"]}, use_probe_results=False)
    monkeypatch.setattr(sampling, "router_for", lambda device: router)
    return backends


def called(backends: dict[str, Costed]) -> dict[str, int]:
    return {name: backend.calls for name, backend in backends.items()}


def per_backend(run: dict[str, Any]) -> dict[str, int]:
    found: dict[str, int] = {}
    for (_, backend), calls in counts(run).items():
        found[backend] = found.get(backend, 0) + calls
    return found


def test_the_first_run_tunes_and_the_second_uses_the_store(
    wan: Any, store: Store, monkeypatch: pytest.MonkeyPatch, snapshot: SnapshotAssertion
) -> None:
    clock = Clock()
    backends = with_backends(
        monkeypatch,
        torch_sdpa=Costed("torch_sdpa", clock, lambda: 3.0, sdpa),
        sdpa_math=Costed("sdpa_math", clock, lambda: 2.0, sdpa),
        xformers=Costed("xformers", clock, lambda: 1.2, lambda call: 1.5 * sdpa(call)),
    )
    monkeypatch.setattr(tuner, "DeviceClock", lambda kind: clock)
    model = measured(wan)
    first = tiny_sampling.sample(model, FAMILY, steps=STEPS)
    run, before = last_run(), called(backends)
    assert per_backend(run) == {name: calls for name, calls in before.items() if name != "xformers"}
    assert before["xformers"] == 2, "one call of each kind, which was computed again"
    assert run["tuning"] == {
        "state": "tuning", "kinds": 2, "open": 0, "decided": 2, "from_store": 0, "not_tuned": 0,
    }  # fmt: skip
    assert [note for note in run["notes"] if note.startswith("autotune: ")] == snapshot
    assert {finding["verdict"] for finding in run["audit"]} == {"as asked"}
    assert {(entry["role"], entry["winner"], entry["here"]) for entry in store.entries()} == {
        ("self", "sdpa_math", True),
        ("cross", "sdpa_math", True),
    }
    second = tiny_sampling.sample(model, FAMILY, steps=STEPS)
    run = last_run()
    assert set(per_backend(run)) == {"sdpa_math"}
    assert sum(per_backend(run).values()) == sum(before.values()) - before["xformers"]
    assert {name: calls - before[name] for name, calls in called(backends).items()} == {
        "torch_sdpa": 0, "sdpa_math": per_backend(run)["sdpa_math"], "xformers": 0,
    }  # fmt: skip
    assert run["tuning"]["state"] == "measured"
    assert run["tuning"]["from_store"] == 2
    assert not any(note.startswith("autotune") for note in run["notes"])
    assert {row["source"] for row in run["rows"]} == snapshot
    assert torch.equal(first, second), "every kernel that may run here gives the same numbers"
    assert marks_left(wan.model.diffusion_model) == []
    record = nodes_module("history.runs").recent()[0]
    assert record["tuning"] == run["tuning"]


def test_with_the_real_clock(wan: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "mine.sqlite3"))

    def slow(seconds: float) -> Any:
        def run(call: Any) -> Any:
            sleep(seconds)
            return sdpa(call)

        return run

    clock = Clock()
    with_backends(
        monkeypatch,
        torch_sdpa=Costed("torch_sdpa", clock, lambda: 0, slow(0.010)),
        sdpa_math=Costed("sdpa_math", clock, lambda: 0, slow(0.002)),
        aiter=Costed("aiter", clock, lambda: 0, slow(0.060)),
    )
    tiny_sampling.sample(measured(wan), FAMILY, steps=STEPS)
    entries = Store(tmp_path / "mine.sqlite3").entries()
    # On a busy machine a call takes longer than it sleeps, and another kernel may win; never less.
    assert entries
    least = {"torch_sdpa": 10, "sdpa_math": 2, "aiter": 60}
    for entry in entries:
        assert entry["winner"] in entry["ms"]
        assert all(ms >= least[name] for name, ms in entry["ms"].items())


def test_a_model_without_measured_has_no_tuner_and_no_store(wan: Any, store: Store) -> None:
    tiny_sampling.sample(nodes_module("hook.patch").set_default(
        wan, "sdpa_math", accuracy="exact", strict=False, guard="off"), FAMILY, steps=2)  # fmt: skip
    assert last_run()["tuning"]["state"] is None
    assert not store.path.exists()


def test_a_patch_that_is_never_invoked_does_not_stop_a_strict_run(
    wan: Any, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Strict is about backends that were named."""
    model = measured(wan)
    options = model.model_options["transformer_options"]
    options[sampling.OVERRIDE] = lambda func, *args, **kwargs: func(*args, **kwargs)
    tiny_sampling.sample(model, FAMILY, steps=1)
    assert {row["backend"] for row in last_run()["rows"]} == {"by another"}
    assert store.entries() == []


def timed_kernels(monkeypatch: pytest.MonkeyPatch) -> dict[str, Costed]:
    clock = Clock()
    monkeypatch.setattr(tuner, "DeviceClock", lambda kind: clock)
    return with_backends(
        monkeypatch,
        torch_sdpa=Costed("torch_sdpa", clock, lambda: 3.0, sdpa),
        sdpa_math=Costed("sdpa_math", clock, lambda: 2.0, sdpa),
    )


def test_in_a_compiled_model(wan: Any, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph holds one op for each call, so trials happen when it runs; nothing is compiled again for them."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from torch._dynamo.utils import counters

    backends = timed_kernels(monkeypatch)
    torch._dynamo.reset()
    counters.clear()
    model = measured(wan).clone()
    set_torch_compile_wrapper(model, backend="eager", fullgraph=True)
    for state in ("tuning", "measured"):
        before = called(backends)
        tiny_sampling.sample(model, FAMILY, steps=5)
        run = last_run()
        assert run["tuning"]["state"] == state
        ran = {name: calls - before[name] for name, calls in called(backends).items() if calls > before[name]}
        assert per_backend(run) == ran
    assert counters["stats"]["unique_graphs"] == 1
    assert {entry["winner"] for entry in store.entries()} == {"sdpa_math"}
    torch._dynamo.reset()


@pytest.mark.parametrize("family", ["ltxv", "qwen_image_masked", "hunyuan_video"])
def test_masks_are_honoured_while_kernels_are_tried(
    wan: Any, store: Store, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    model = tiny_sampling.build(family)
    backends = timed_kernels(monkeypatch)
    patch = nodes_module("hook.patch")
    plain = patch.set_default(model, "torch_sdpa", accuracy="exact", strict=True, guard="off")
    exact = tiny_sampling.sample(plain, family, steps=5)
    calls = sum(per_backend(last_run()).values())
    for _ in range(6):
        before = called(backends)
        found = tiny_sampling.sample(measured(model), family, steps=5)
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-4 * float(exact.abs().max()))
        run = last_run()
        ran = {name: calls - before[name] for name, calls in called(backends).items() if calls > before[name]}
        assert per_backend(run) == ran
        assert sum(ran.values()) == calls
        assert not any(row["reason"] for row in run["rows"])
    assert run["tuning"]["state"] == "measured"
    assert set(per_backend(run)) == {"sdpa_math"}
