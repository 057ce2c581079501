"""Every command line and option that the systems' documents name for the sparse methods here pastes and runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from attention_backends.backends import account, attention  # noqa: E402
from attention_backends.backends.config import AttentionSpec  # noqa: E402
from attention_backends.backends.config.text import parse_config, parse_extra  # noqa: E402
from attention_backends.backends.kernels import BACKENDS  # noqa: E402
from attention_backends.comparison.blocks_command import METHODS  # noqa: E402

SGLANG = 'sglang generate \\\n  --model-path <MODEL_PATH_OR_ID> \\\n  --prompt "..." \\\n  --attention-backend {} \\\n'
STA, VSA = SGLANG.format("sliding_tile_attn"), SGLANG.format("video_sparse_attn")
DOCUMENTED: dict[str, tuple[str, dict[str, Any]]] = {
    # SGLang
    STA + '  --attention-backend-config "mask_strategy_file_path={file}"': (
        "sliding_tile_attn",
        {"mask_strategy_file_path": "{file}"},
    ),
    STA + '  --attention-backend-config "sta_mode=STA_inference,skip_time_steps=15"': (
        "sliding_tile_attn",
        {"sta_mode": "STA_inference", "skip_time_steps": 15},
    ),
    VSA + "  --attention-backend-config '{\"sparsity\": 0.5}'": ("video_sparse_attn", {"sparsity": 0.5}),
    VSA + '  --attention-backend-config "sparsity=0.5"': ("video_sparse_attn", {"sparsity": 0.5}),
    VSA + "  --attention-backend-config {options}": ("video_sparse_attn", {"sparsity": 0.75}),
    # Its default keeps everything.
    VSA + "  --attention-backend-config sparsity=0.0": ("video_sparse_attn", {"sparsity": 0.0}),
    SGLANG.format("vmoba_attn")
    + '  --attention-backend-config \'{"temporal_chunk_size": 2, "temporal_topk": 1, "spatial_chunk_size": [4, 13], '
    '"spatial_topk": 6, "st_chunk_size": [4, 4, 13], "st_topk": 18, "moba_select_mode": "topk", '
    '"moba_threshold": 0.25, "moba_threshold_type": "query_head", "first_full_step": 12, "first_full_layer": 0, '
    '"temporal_layer": 1, "spatial_layer": 1, "st_layer": 1}\'': (
        "vmoba_attn",
        {
            **{"temporal_chunk_size": 2, "temporal_topk": 1, "spatial_chunk_size": [4, 13], "spatial_topk": 6},
            **{"st_chunk_size": [4, 4, 13], "st_topk": 18, "moba_select_mode": "topk", "moba_threshold": 0.25},
            **{"moba_threshold_type": "query_head", "first_full_step": 12, "first_full_layer": 0},
            **{"temporal_layer": 1, "spatial_layer": 1, "st_layer": 1},
        },
    ),
    SGLANG.format("vmoba_attn")
    + '  --attention-backend-config \'{"moba_config": {"moba_threshold": 0.1, "temporal_chunk_size": 1}}\'': (
        "vmoba_attn",
        {"moba_config": {"moba_threshold": 0.1, "temporal_chunk_size": 1}},
    ),
    SGLANG.format("sparse_video_gen_2_attn")
    + '  --attention-backend-config "svg2_num_q_centroids=30,svg2_num_k_centroids=100,svg2_top_p_kmeans=0.5,'
    "svg2_min_kc_ratio=0.1,svg2_kmeans_iter_init=5,svg2_kmeans_iter_step=2,svg2_zero_step_kmeans_init=false,"
    'svg2_first_layers_fp=0.03,svg2_first_times_fp=0.2"': (
        "sparse_video_gen_2_attn",
        {
            **{"svg2_num_q_centroids": 30, "svg2_num_k_centroids": 100, "svg2_top_p_kmeans": 0.5},
            **{"svg2_min_kc_ratio": 0.1, "svg2_kmeans_iter_init": 5, "svg2_kmeans_iter_step": 2},
            **{"svg2_zero_step_kmeans_init": False, "svg2_first_layers_fp": 0.03, "svg2_first_times_fp": 0.2},
        },
    ),
    SGLANG.format("sol_attn")
    + '  --attention-backend-config "tau=1.5,thresh_type=diag,kv_splits=auto,sink_tokens=64,sink_start=0,'
    'dense_steps=10,dense_layers=0-1,dense_backend=fa"': (
        "sol_attn",
        {
            **{"tau": 1.5, "thresh_type": "diag", "kv_splits": "auto", "sink_tokens": 64, "sink_start": 0},
            **{"dense_steps": 10, "dense_layers": "0-1", "dense_backend": "fa"},
        },
    ),
    # Smart-Diffusion
    "args.infer.attn_type = 'sparge'\nargs.infer.attn_config.sparsity_ratio = 0.5  # 50% sparse\n"
    "args.infer.attn_config.block_size = 64  # Block size for sparsity": (
        "sparge_attn",
        {"sparsity_ratio": 0.5, "block_size": 64},
    ),
    # vLLM-Omni
    "--diffusion-attention-config.per_role.self.backend SPARGE "
    "--diffusion-attention-config.per_role.self.extra.block_size 64": ("sparge_attn", {"block_size": 64}),
    # The nodes of WanVideoWrapper and ComfyUI-RadialAttn, as a configuration
    "default: radial_attn\n": ("radial_attn", {}),
    '{"default": {"backend": "radial_attn", "extra": {"dense_layers": 1, "dense_timesteps": 2, "decay_factor": 0.2, '
    '"block_size": 64}}}': (
        "radial_attn",
        {"dense_layers": 1, "dense_timesteps": 2, "decay_factor": 0.2, "block_size": 64},
    ),
}


@pytest.mark.parametrize("text", DOCUMENTED, ids=lambda text: text[-60:].strip())
def test_a_documented_command_pastes_and_runs(text: str, tmp_path: Path) -> None:
    backend, extra = DOCUMENTED[text]
    file, options = tmp_path / "mask_strategy.json", tmp_path / "options.json"
    file.write_text(json.dumps({"0_0_0": [1, 1, 3], "0_0_1": [1, 3, 1]}))
    options.write_text('{"sparsity": 0.75}')
    config = parse_config(text.replace("{file}", str(file)).replace("{options}", str(options)))
    (spec,) = {spec for spec in (config.default, *config.per_role.values()) if not spec.is_auto}
    wanted = {name: value if value != "{file}" else str(file) for name, value in extra.items()}
    assert (spec.backend, dict(spec.extra)) == (backend, wanted)
    query = torch.randn(1, 2, 4 * 32 * 40, 8)
    with account() as run_report:
        output = attention(query, query, query, backend=config, grid=(4, 32, 40))
    (row,) = run_report.as_dict()["rows"]
    assert (row["backend"], row["reason"]) == (backend, None)
    # A mask strategy file is by layer, which is unknown outside a model.
    if extra.get("sparsity") == 0.0 or "mask_strategy_file_path" in extra:
        assert torch.equal(output, attention(query, query, query))
        assert sum(row["dense"].values()) == 1
    else:
        assert row["kept"] < 0.9


def test_an_option_of_a_sparse_backend_without_its_name_says_whose_it_is() -> None:
    with pytest.raises(ValueError, match=r"sparsity_ratio .* sparge_attn"):
        parse_config("args.infer.attn_config.sparsity_ratio = 0.5")


PAGE = (Path(__file__).resolve().parents[2] / "docs" / "sparse.md").read_text(encoding="utf-8")


def test_the_page_knows_every_method_and_its_options() -> None:
    rows = {name: row for name, row in re.findall(r"^\| `(\w+_attn)` (\|.*)$", PAGE, re.M)}
    assert rows.keys() == METHODS.keys()
    for name, row in rows.items():
        known = {option.name: option.default for option in BACKENDS[name].options}
        how_much = row.split("|")[2]
        named = re.findall(r"`(\w+)`(?: ([\d.]+)(?![\d.]*x))?", how_much)
        assert named
        for option, default in named:
            assert option in known, (name, option)
            if default and known[option] is not None:
                assert float(default) == float(str(known[option])), (name, option)


def test_the_page_has_examples_that_paste() -> None:
    block = re.search(r"((?:^    .*\n)+)", PAGE.partition("## How to say how much")[2], re.M)
    assert block is not None
    pairs, written, flags = (line.strip() for line in block[1].strip().splitlines())
    assert parse_extra(pairs) == parse_extra(written)
    examples = [pairs, written, *re.findall(r'`(\{"topk".*?\}+)`', PAGE, re.S)]
    assert len(examples) == 4
    for example in examples:
        assert AttentionSpec("sparge_attn", parse_extra(example)).extra["topk"]
    assert parse_config(flags).default == AttentionSpec("sparge_attn", {"topk": 0.25})
    rules = re.findall(r"^ +(\{.*\})$", PAGE.partition("## A rule of your own")[2].partition("##")[0], re.M)
    assert len(rules) == 3
    for rule in rules:
        assert AttentionSpec("custom_sparse_attn", parse_extra(rule)).extra
