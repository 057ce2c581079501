"""The ComfyUI side of the pack: nodes, the hook adapter and HTTP routes. Only this package imports ComfyUI."""

from __future__ import annotations

from pathlib import Path

import folder_paths
from comfy_api.latest import ComfyExtension, io

from . import routes
from .benchmark import AttentionBenchmark
from .compare import AttentionCompare
from .comparison import AttentionComparison
from .config_text import AttentionConfigText
from .demo import AttentionDemoCaption, AttentionDemoImage
from .per_role import PerRoleAttentionConfig
from .record import AttentionRecord
from .report import AttentionReport
from .schedule import AttentionSchedule
from .selector import AttentionBackendSelector


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
