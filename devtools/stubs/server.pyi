from collections.abc import Callable
from typing import Any

from aiohttp import web

class PromptServer:
    routes: web.RouteTableDef
    prompt_queue: Any
    def add_on_prompt_handler(self, handler: Callable[[Any], Any]) -> None: ...
