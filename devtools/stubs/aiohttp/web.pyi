from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Protocol, TypeVar, overload

_Handler = TypeVar("_Handler", bound=Callable[[Request], Awaitable[Response]])

class _Query(Protocol):
    @overload
    def get(self, key: str) -> str | None: ...
    @overload
    def get(self, key: str, default: str) -> str: ...
    def getall(self, key: str, default: list[str]) -> list[str]: ...

class _Content(Protocol):
    def iter_chunked(self, n: int) -> AsyncIterator[bytes]: ...

class Request:
    content: _Content
    content_type: str
    headers: Mapping[str, str]
    match_info: Mapping[str, str]
    query: _Query

class Response:
    def __init__(self, *, status: int = ..., text: str | None = ...) -> None: ...

class RouteTableDef:
    def get(self, path: str) -> Callable[[_Handler], _Handler]: ...
    def post(self, path: str) -> Callable[[_Handler], _Handler]: ...

def json_response(data: Any = ..., *, status: int = ...) -> Response: ...
