"""Options of sparse backends that are not built yet, as their systems publish them: recognised and type-checked.

From SGLang diffusion 0.5.23 (its documents and the readers in its attention backends) and, for Radial Attention, the
arguments of its own scripts. A backend that gets built takes its options from here into its own file.
"""

from __future__ import annotations

from ...values.options import Option

SLIDING_TILE = (
    Option("mask_strategy_file_path", str, None, "JSON file with the window of each head; required there."),
    Option("sta_mode", str, "STA_inference", "Mode, as SGLang's documents spell it."),
    Option("STA_mode", str, "STA_inference", "Mode, as SGLang's code spells it."),
    Option("skip_time_steps", int, 15, "Dense steps at the beginning.", minimum=0),
)

VIDEO_SPARSE = (
    Option("sparsity", float, 0.0, "Share of tiles left out.", minimum=0, maximum=1),
    Option("VSA_sparsity", float, 0.0, "The same, by its older name.", minimum=0, maximum=1),
)

_VMOBA = (
    Option("temporal_chunk_size", int, None, "Frames in a chunk.", minimum=1),
    Option("temporal_topk", int, None, "Chunks kept.", minimum=1),
    Option("spatial_chunk_size", list, None, "Height and width of a chunk."),
    Option("spatial_topk", int, None, "Chunks kept.", minimum=1),
    Option("st_chunk_size", list, None, "Frames, height and width of a chunk."),
    Option("st_topk", int, None, "Chunks kept.", minimum=1),
    Option("moba_select_mode", str, "threshold", "How chunks are chosen."),
    Option("moba_threshold", float, 0.25, "Threshold of that choice.", minimum=0, maximum=1),
    Option("moba_threshold_type", str, "query_head", "What the threshold is taken over."),
    Option("first_full_step", int, 12, "Dense steps at the beginning.", minimum=0),
    Option("first_full_layer", int, 0, "Dense layers at the beginning.", minimum=0),
    Option("temporal_layer", int, 1, "Temporal layers in a cycle.", minimum=0),
    Option("spatial_layer", int, 1, "Spatial layers in a cycle.", minimum=0),
    Option("st_layer", int, 1, "Spatiotemporal layers in a cycle.", minimum=0),
)
VMOBA = (
    *_VMOBA,
    Option("moba_config", dict, None, "The same options together, where SGLang reads them.", fields=_VMOBA),
)

SPARSE_VIDEO_GEN_2 = (
    Option("svg2_num_q_centroids", int, 300, "Clusters of queries.", minimum=1),
    Option("svg2_num_k_centroids", int, 1000, "Clusters of keys.", minimum=1),
    Option("svg2_top_p_kmeans", float, 0.9, "Share of the attention kept.", minimum=0, maximum=1),
    Option("svg2_min_kc_ratio", float, 0.1, "Least share of key clusters kept.", minimum=0, maximum=1),
    Option("svg2_kmeans_iter_init", int, 50, "Iterations of the first clustering.", minimum=0),
    Option("svg2_kmeans_iter_step", int, 2, "Iterations of each later one.", minimum=0),
    Option("svg2_zero_step_kmeans_init", bool, False, "Cluster from nothing at the first sparse step."),
    Option("svg2_first_layers_fp", float, 0.03, "Dense layers: a number, or a share up to 1.", minimum=0),
    Option("svg2_first_times_fp", float, 0.2, "Dense steps: a number, or a share up to 1.", minimum=0),
)

SPARGE = (Option("topk", float, 0.5, "Share of blocks kept, above 0.", minimum=1e-6, maximum=1),)

SOL = (
    Option("tau", float, 1.0, "Threshold."),
    Option("thresh_type", str, "diag", "What the threshold is compared with."),
    Option("kv_splits", int, "auto", "Parts of the keys.", minimum=1, also=("auto", None)),
    Option("sink_tokens", int, 0, "Tokens that are always kept.", minimum=0),
    Option("sink_start", int, 0, "Where they begin.", minimum=0, also=(None,)),
    Option("dense_steps", int, 10, "Dense steps at the beginning.", minimum=0),
    Option("dense_layers", str, "0,1", "Dense layers, such as 0-3,38.", also=(int, None)),
    Option("dense_backend", str, "fa", "What runs them.", choices=("fa", "sage_attn")),
)

RADIAL = (
    Option("dense_layers", int, 0, "Dense layers at the beginning.", minimum=0),
    Option("dense_timesteps", int, 0, "Dense steps at the beginning.", minimum=0),
    Option("decay_factor", float, 1.0, "Width of the window.", minimum=0),
    Option("use_sage_attention", bool, False, "INT8 arithmetic in the blocks that are kept."),
)
