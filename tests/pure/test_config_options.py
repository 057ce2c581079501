"""Options as other systems write them: where they go, what is checked, and what is recognised and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from attention_backends.backends.config import AttentionSpec
from attention_backends.backends.config.names import RefusedBackendError
from attention_backends.backends.config.text import parse_config
from attention_backends.backends.kernels import BACKENDS
from attention_backends.backends.values.errors import ConfigError
from option_backend import WithOptions
from syrupy.assertion import SnapshotAssertion


@pytest.fixture
def tunable(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(BACKENDS, WithOptions.id, WithOptions())
    return WithOptions.id


@pytest.mark.parametrize(
    "options",
    [
        '--attention-backend-config "share=1e-3,steps=-1,sizes=[4, 4],fast=false"',
        """--attention-backend-config '{"share": 1e-3, "steps": -1, "sizes": [4, 4], "fast": false}'""",
        "--attention-backend-config FILE.json",
        "--attention-backend-config FILE.yaml",
        "--attention-backend-config.share 1e-3 --attention-backend-config.steps -1 "
        "--attention-backend-config.sizes [4,4] --attention-backend-config.fast False",
    ],
)
def test_sglangs_options_reach_the_backend(options: str, tunable: str, tmp_path: Path) -> None:
    expected = {"share": 1e-3, "steps": -1, "sizes": [4, 4], "fast": False}
    (tmp_path / "a.json").write_text(json.dumps(expected))
    (tmp_path / "a.yaml").write_text("share: 1e-3\nsteps: -1\nsizes: [4, 4]\nfast: false\n")
    options = options.replace("FILE", str(tmp_path / "a"))
    assert parse_config(f"--attention-backend {tunable} {options}").default.extra == expected
    config = parse_config(f"--attention-backend fa {options} transformer.self={tunable}")
    assert config.default.extra == {}, "fa has no such options, the backend of self has"
    assert config.per_role["self"].extra == expected


def test_a_spec_keeps_what_it_was_given(tunable: str) -> None:
    extra: dict[str, Any] = {"sizes": [4, 4], "more": {"a": [1]}}
    spec = AttentionSpec(tunable, extra)
    extra["sizes"].append(5)
    extra["more"]["a"] = 2
    assert spec.extra == {"sizes": [4, 4], "more": {"a": [1]}}


PUBLISHED_OPTIONS: dict[str, dict[str, Any]] = {
    "sliding_tile_attn": {"mask_strategy_file_path": "/a.json", "sta_mode": "STA_inference", "skip_time_steps": 15},
    "video_sparse_attn": {"sparsity": 0.9, "fastvideo_vsa_provider": "fastvideo"},
    "vmoba_attn": {
        "temporal_chunk_size": 2,
        "spatial_chunk_size": [3, 4],
        "moba_threshold": 0.25,
        "moba_config": {"st_chunk_size": [2, 3, 4], "st_topk": 2, "first_full_step": 12},
    },
    "sparse_video_gen_2_attn": {"svg2_num_q_centroids": 300, "svg2_zero_step_kmeans_init": False},
    "sparge_attn": {"topk": 0.5},
    "sol_attn": {"tau": 1.5, "kv_splits": "auto", "dense_layers": "0-3,38", "dense_backend": "sage_attn"},
    "radial_attn": {"dense_layers": 1, "dense_timesteps": 12, "decay_factor": 0.2, "use_sage_attention": True},
}


@pytest.mark.parametrize("backend", PUBLISHED_OPTIONS)
def test_options_of_backends_that_are_not_built_are_recognised(backend: str) -> None:
    declared = {option.name: option for option in BACKENDS[backend].options}
    for option in declared.values():
        assert option.default is None or option.problem(option.default) is None, option.name
    assert AttentionSpec(backend, PUBLISHED_OPTIONS[backend]).extra == PUBLISHED_OPTIONS[backend]
    for name in PUBLISHED_OPTIONS[backend]:
        assert declared[name].problem(object()) is not None
        with pytest.raises(ConfigError, match=f"extra of {backend}: {name} "):
            AttentionSpec(backend, {name: object()})
    with pytest.raises(ConfigError, match=rf"no option 'topkk' \(known: {next(iter(declared))}"):
        AttentionSpec(backend, {"topkk": 1})


@pytest.mark.parametrize(
    ("backend", "extra"),
    [
        pytest.param("sparge_attn", {"topk": 0}, id="zero"),
        pytest.param("sparge_attn", {"topk": float("nan")}, id="not finite"),
        pytest.param("vmoba_attn", {"moba_config": {"st_topkk": 1}}, id="slip in a block"),
        pytest.param("vmoba_attn", {"moba_config": {"st_topk": 1.5}}, id="fraction for a count"),
        pytest.param("sol_attn", {"kv_splits": "many"}, id="text for a count"),
        pytest.param("sol_attn", {"dense_layers": 3.5}, id="fraction for text"),
        pytest.param("sparge_attn", {"topk": 2}, id="above 1"),
        pytest.param("sage_attn", {"quant_symmetric": False}, id="one value alone"),
        pytest.param("sage_attn", {"skip_softmax": {}}, id="not implemented"),
    ],
)
def test_options_are_type_checked(backend: str, extra: dict[str, Any], snapshot: SnapshotAssertion) -> None:
    with pytest.raises(ConfigError) as caught:
        AttentionSpec(backend, extra)
    assert str(caught.value) == snapshot


@pytest.mark.parametrize(
    "block",
    [
        pytest.param({"skip_softmax": {"target_sparsity": 0.5}}, id="skip_softmax"),
        pytest.param({"quant": {"dtype_qk": "int8", "q_block_size": 16}}, id="quant"),
        pytest.param({"block_sparse": {"sparsity": 0.8, "skip_layers": "0-3,38"}}, id="block_sparse"),
        pytest.param({"fastvideo_vsa_provider": "vsa"}, id="provider"),
        pytest.param({"fastvideo_vsa_precision": "fp8"}, id="precision"),
        pytest.param({"fastvideo_vsa_topk": "64"}, id="topk as text"),
        pytest.param({"quant": {}, "extra": {"quant": {}}}, id="twice"),
    ],
)
def test_the_blocks_of_vllm_are_recognised(block: dict[str, Any], snapshot: SnapshotAssertion) -> None:
    backend = "FASTVIDEO_VSA" if next(iter(block)).startswith("fastvideo") else "TRTLLM_ATTN"
    for value in ({"default": {"backend": backend, **block}}, {"per_role": {"self": {"backend": backend, **block}}}):
        with pytest.raises(ConfigError) as caught:
            parse_config(value)
        assert str(caught.value) == snapshot


def test_the_example_of_vllms_document_is_refused_for_its_true_reason(snapshot: SnapshotAssertion) -> None:
    text = (
        "--diffusion-attention-config.per_role.self.backend SPARSE_BLOCK "
        "--diffusion-attention-config.per_role.self.extra.block_size 128"
    )
    with pytest.raises(RefusedBackendError) as caught:
        parse_config(text)
    assert str(caught.value) == snapshot
