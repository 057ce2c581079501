"""The ComfyUI side of the pack: nodes, the attention hook and HTTP routes. Only this package imports ComfyUI."""

from __future__ import annotations

from pathlib import Path

import folder_paths
from comfy_api.latest import ComfyExtension, io

from .compare.benchmark import AttentionBenchmark
from .compare.compare import AttentionCompare
from .compare.comparison import AttentionComparison
from .configure.config_text import AttentionConfigText
from .configure.over_gpus import AttentionOverGPUs
from .configure.per_role import PerRoleAttentionConfig
from .configure.schedule import AttentionSchedule
from .configure.selector import AttentionBackendSelector
from .demo import AttentionDemoCaption, AttentionDemoImage, TinyShapesCaption, TinyShapesImage
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
            AttentionOverGPUs,
            AttentionReport,
            AttentionRecord,
            AttentionCompare,
            AttentionComparison,
            AttentionBenchmark,
            TinyShapesCaption,
            TinyShapesImage,
            AttentionDemoCaption,
            AttentionDemoImage,
        ]
