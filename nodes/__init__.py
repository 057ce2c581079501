"""The ComfyUI side of the pack: nodes, the hook adapter and HTTP routes. Only this package imports ComfyUI."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import routes
from .per_role import PerRoleAttentionConfig
from .selector import AttentionBackendSelector


class Extension(ComfyExtension):
    """What ComfyUI asks for when it loads the pack."""

    async def on_load(self) -> None:
        routes.register()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [AttentionBackendSelector, PerRoleAttentionConfig]
