"""A schedule under torch.compile: the backend changes with the step, and nothing is compiled again for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import tiny_sampling  # noqa: E402
from hook_side import comfyui, counts, last_run, no_environment, nodes_module, selected  # noqa: E402
from torch._dynamo.utils import counters  # noqa: E402

pytestmark = pytest.mark.comfy


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    no_environment(monkeypatch)
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


def whole(patcher: Any, **options: Any) -> Any:
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    clone = patcher.clone()
    set_torch_compile_wrapper(clone, backend="eager", fullgraph=True, **options)
    return clone


def each_block(patcher: Any) -> Any:
    return whole(patcher, keys=["diffusion_model.blocks.0", "diffusion_model.blocks.1"])


@pytest.mark.parametrize("how", [whole, each_block])
def test_switching_compiles_nothing_again(how: Callable[..., Any]) -> None:
    comfyui()
    patcher = selected(tiny_sampling.build("wan"), "sdpa_math")
    tiny_sampling.sample(how(patcher), "wan", steps=4)
    warm = counters["stats"]["unique_graphs"]
    assert warm >= 1
    node = nodes_module("configure.schedule").AttentionSchedule
    ours = node.execute(patcher, "torch_sdpa", "steps", "0,2", "", "").args[0]
    ours = node.execute(ours, "sdpa_flash", "steps", "1-", "last 1", "cross").args[0]
    expected = tiny_sampling.sample(ours, "wan", steps=4)
    wanted = counts(last_run())
    found = tiny_sampling.sample(how(ours), "wan", steps=4)
    assert counts(last_run()) == wanted
    assert wanted == {
        ("self", "torch_sdpa"): 4, ("self", "sdpa_math"): 4,
        ("cross", "torch_sdpa"): 3, ("cross", "sdpa_math"): 2, ("cross", "sdpa_flash"): 3,
    }  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    assert counters["stats"]["unique_graphs"] == warm, "the op is the same in every window"
    assert not counters["graph_break"]
