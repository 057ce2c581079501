"""ComfyUI's HyperTile node with each backend: it splits the queries into tiles, and ComfyUI folds the keys by them.

The queries come with the batch of the tiles, keys and values with that of the picture. A backend that viewed keys by
their own batch would let every tile see all keys, or fail.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from syrupy.assertion import SnapshotAssertion

torch = pytest.importorskip("torch", reason="torch is not installed")

from attention_calls import as_comfyui_runs  # noqa: E402
from hook_side import (  # noqa: E402
    compiled,
    counts,
    exact,
    last_run,
    nodes_module,
    override,
    plain_comfyui,
    sampling,
    selected,
)

hook_calls = nodes_module("hook.hook_calls")

BACKENDS = ("torch_sdpa", "comfy", "sdpa_math", "sdpa_flash", "reference", "emulated_int8")
"""Beside these `flex_attn` runs here; it is asked for a single call, as it compiles for every shape."""
LOSSY = {"emulated_int8": 1.5e-2}


@pytest.fixture(scope="module")
def tiled() -> Any:
    """A tiny SD1.5 behind HyperTile, and what it samples without us and without HyperTile, by CFG."""
    with pytest.MonkeyPatch.context() as patch:
        plain_comfyui(patch)
        import tiny_sampling
        from comfy_extras.nodes_hypertile import HyperTile

        model = tiny_sampling.build("sd15")
        tiled = HyperTile.execute(model, 32, 1, 0, False)[0]
        stock = {cfg: (sample(tiled, cfg), sample(model, cfg)) for cfg in (1.0, 3.0)}
    return tiled, stock


def sample(model: Any, cfg: float) -> torch.Tensor:
    import tiny_sampling

    return tiny_sampling.sample(model, "sd15", steps=1, cfg=cfg)


@pytest.mark.comfy
@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_hypertile_is_what_it_is_without_us(tiled: Any, backend: str, cfg: float) -> None:
    model, stock = tiled
    with_tiles, without_tiles = stock[cfg]
    size = with_tiles.norm()
    effect = (with_tiles - without_tiles).norm() / size
    error = (sample(selected(model, backend, strict=True), cfg) - with_tiles).norm() / size
    assert effect > 10 * LOSSY.get(backend, 1e-5), "HyperTile does too little here"
    assert error <= (0 if backend in ("torch_sdpa", "comfy") else LOSSY.get(backend, 1e-5))
    assert {name for _, name in counts(last_run())} == {backend}


@pytest.mark.parametrize(
    ("backend", "batch"),
    [*product(BACKENDS, (1, 2)), ("flex_attn", 2)],
)
def test_keys_are_folded_by_the_batch_of_the_query(backend: str, batch: int) -> None:
    with as_comfyui_runs():
        query, (key, value) = torch.randn(4 * batch, 6, 64), torch.randn(2, batch, 24, 64)
        expected = exact(query, key.reshape(query.shape), value.reshape(query.shape), 4)
        ours = override(backend, strict=True)
        run = sampling.Run(ours)
        options = {sampling.KEY: ours, sampling.OVERRIDE: ours, sampling.RUN_KEY: run}
        found = ours(as_stock, query, key, value, 4, transformer_options=options)
        assert (found - expected).norm() < LOSSY.get(backend, 2e-6) * expected.norm()
    assert [(row.backend, row.calls) for row in run.run_report.rows.values()] == [(backend, 1)]


def as_stock(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """`exact` with keys folded, as ComfyUI's functions have it."""
    shape = (query.shape[0], -1, query.shape[2])
    return exact(query, key.reshape(shape), value.reshape(shape), *args, **kwargs)


def in_a_graph(monkeypatch: pytest.MonkeyPatch, func: Any, *tensors: torch.Tensor, **flags: Any) -> torch.Tensor:
    monkeypatch.setattr(compiled, "comfys_attention", lambda: func)
    ours = override("torch_sdpa", strict=True)
    torch._dynamo.reset()

    def forward(*tensors: torch.Tensor) -> torch.Tensor:
        return ours(func, *tensors, 4, **flags)

    with as_comfyui_runs():
        output: torch.Tensor = torch.compile(forward, backend="eager", fullgraph=True)(*tensors)
    return output


def test_keys_are_folded_in_a_compiled_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    query, (key, value) = torch.randn(4, 6, 64), torch.randn(2, 1, 24, 64)
    found = in_a_graph(monkeypatch, as_stock, query, key, value)
    torch.testing.assert_close(found, as_stock(query, key, value, 4), rtol=0, atol=2e-6)


def test_an_output_that_a_compiled_graph_was_not_made_for_is_refused(
    monkeypatch: pytest.MonkeyPatch, snapshot: SnapshotAssertion
) -> None:
    """One query sample over the keys of two: PyTorch broadcasts, and ComfyUI's function returns twice the tokens."""

    def broadcasts(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **flags: Any) -> Any:
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        return output.transpose(1, 2).reshape(query.shape[0], -1, 64)

    query, (key, value) = torch.randn(1, 4, 6, 16), torch.randn(2, 2, 4, 6, 16)
    monkeypatch.setattr(hook_calls, "count_passed_on", lambda *args: None)  # which strict would stop
    with pytest.raises(ValueError) as caught:
        in_a_graph(monkeypatch, broadcasts, query, key, value, skip_reshape=True)
    assert str(caught.value) == snapshot
