"""What every route shares: how a request is refused, and how a body is read without trusting it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from aiohttp import web

from ...backends.observe.autotune.entry import MOST_VALUES
from ...backends.values.plain_data import load_json
from ...backends.values.privacy import clean, without_paths
from ...backends.values.reasons import Reason, known, phrases, with_values

PREFIX = "/attention_backends"


def phrases_of(data: object) -> dict[str, Any]:
    """The reasons in an answer, by their texts as they are sent: ids and values, for a page in another language."""
    return {without_paths(text): clean(plain) for text, plain in phrases(data).items()}


def bypass_reason(text: str) -> str:
    """What a run could not count, as the reason of its parts; the text itself where a part is not known."""
    return _joined(text, "; ", "bypass.with", lambda part: _joined(part, ", ", "bypass.and", _bypass_part))


def computed_whole(run: Mapping[str, Any]) -> list[str]:
    """Why calls of a run's sparse backends were computed whole, as reasons where they are known."""
    texts = dict.fromkeys(text for row in run["rows"] for text in row.get("dense") or ())
    return [with_values(text, "whole.") for text in texts]


def _joined(text: str, mark: str, reason_id: str, worded: Callable[[str], str]) -> str:
    whole = worded(text)
    if isinstance(whole, Reason) or mark not in text:
        return whole
    for place in (match.start() for match in re.finditer(re.escape(mark), text)):
        first, rest = worded(text[:place]), text[place + len(mark) :]
        if isinstance(first, Reason):
            return Reason(reason_id, first=first, rest=_joined(rest, mark, reason_id, worded))
    return text


def _bypass_part(text: str) -> str:
    return known(text, "bypass.")


class RefusedError(Exception):
    """A request that is refused, with its status and the reason."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status

    @property
    def answer(self) -> web.Response:
        """The answer that says so."""
        return refused(self.status, str(self))


def refused(status: int, why: str) -> web.Response:
    """An answer that says what was wrong with the request."""
    return web.json_response({"error": why}, status=status)


async def posted(request: web.Request, most_bytes: int, what: str) -> object:
    """The JSON of a request that changes `what`.

    A page of another site cannot send a JSON body unasked, and browsers say from where a request comes.

    Raises:
        RefusedError: it comes from another site, is no JSON, or is longer than `most_bytes`.
    """
    if request.headers.get("Sec-Fetch-Site") == "cross-site":
        raise RefusedError(403, f"{what} are not changed from another site")
    if request.content_type != "application/json":
        raise RefusedError(415, f"expected application/json, not {request.content_type[:40]!r}")
    body = await limited_body(request, most_bytes)
    if body is None:
        raise RefusedError(413, f"more than {most_bytes} bytes")
    try:
        found: object = load_json(body.decode("utf-8"), "the body", most_bytes=most_bytes, most_entries=MOST_VALUES)
    except ValueError as error:
        raise RefusedError(400, str(error)[:200]) from error
    return found


async def limited_body(request: web.Request, most_bytes: int) -> bytes | None:
    """The body, or None where it is longer than `most_bytes`; no more than that is read."""
    body = bytearray()
    async for part in request.content.iter_chunked(4096):
        body += part
        if len(body) > most_bytes:
            return None
    return bytes(body)
