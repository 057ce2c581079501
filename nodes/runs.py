"""The accounts of the last sampling runs in this process, newest first."""

from __future__ import annotations

import logging
import threading
from collections import deque
from typing import Any

from ..backends.trace import Trace

log = logging.getLogger("attention_backends")

KEPT = 20

_runs: deque[dict[str, Any]] = deque(maxlen=KEPT)
_lock = threading.Lock()


def add(trace: Trace) -> None:
    """Keep a finished run and log it in one line."""
    from comfy_execution.utils import get_executing_context

    context = get_executing_context()
    record = {
        "prompt_id": context.prompt_id if context else None,
        "node_id": context.node_id if context else None,
        **trace.as_dict(),
    }
    with _lock:
        _runs.appendleft(record)
    log.info("attention of this run: %s", trace.summary())


def recent() -> list[dict[str, Any]]:
    """The last runs, newest first."""
    with _lock:
        return list(_runs)
