"""The ComfyUI side of the pack: nodes, the hook adapter and HTTP routes. Only this package imports ComfyUI.

Files, by what they are for; a call of a patched model goes through the first three groups:
    patch    puts a configuration on a clone of a model: `host` as ComfyUI's hook, and wrappers
    a run    `wrappers` begin and end it, `sampling` is its state, `scope` the model call in it,
             `sampler_loop` its step, `runs` the account
             that is kept; `memory`, with `sizes`, tells ComfyUI what it takes
    a call   `hook_calls`, with `layouts` and `masks`, ComfyUI's functions (`comfy_functions`), the place in the model
             (`callers`, `sites`) and its role (`roles`); `compiled` is what torch.compile sees of it; `others` counts
             what other packs compute, `whose` names them, `foreign_code` finds what else of theirs runs in a model
    nodes    a file for each in the list below; `graph` is what stands around one in a graph, `inputs` a look at what
             it was given. To Compare Attention Backends belong `compare_setup`, `compare_runs`, `capture`, `timed`,
             `pictures` and `similarity`, to the report `report_picture`
    routes   under `routes`: `machine`, `machine_settings`, `measured_routes`, `recommended_routes`, `queued_by`;
             `answers` and `privacy` are what they share
"""

from __future__ import annotations

from pathlib import Path

import folder_paths
from comfy_api.latest import ComfyExtension, io

from .compare.benchmark import AttentionBenchmark
from .compare.compare import AttentionCompare
from .compare.comparison import AttentionComparison
from .configure.config_text import AttentionConfigText
from .configure.per_role import PerRoleAttentionConfig
from .configure.schedule import AttentionSchedule
from .configure.selector import AttentionBackendSelector
from .demo import AttentionDemoCaption, AttentionDemoImage
from .http import routes
from .report.record import AttentionRecord
from .report.report import AttentionReport


class Extension(ComfyExtension):
    """What ComfyUI asks for when it loads the pack."""

    async def on_load(self) -> None:
        routes.register()
        # So that the stock Load Diffusion Model node offers the embedded model; the pack's only effect on loading.
        folder_paths.add_model_folder_path("diffusion_models", str(Path(__file__).parent.parent / "demo" / "weights"))

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            AttentionBackendSelector,
            PerRoleAttentionConfig,
            AttentionSchedule,
            AttentionConfigText,
            AttentionReport,
            AttentionRecord,
            AttentionCompare,
            AttentionComparison,
            AttentionBenchmark,
            AttentionDemoCaption,
            AttentionDemoImage,
        ]
