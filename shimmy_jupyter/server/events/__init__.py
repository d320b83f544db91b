"""Events for administrators' collectors, on the server's own event bus: never a word of a prompt or an
answer. Beside this file are their schemas.

Whoever may read the bus (`execute` on `events`) hears of everybody's requests, and may emit what looks
like one of these: the ledger is the record, and this is its news.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jupyter_events import EventLogger

from ...audit.ledger import Head
from ...audit.records import Entry, iso
from ...guard.guard import Aside
from ...service import CompletionService

log = logging.getLogger("shimmy_jupyter.events")

_ROOT = "https://shimmy-jupyter.readthedocs.io/events"
REQUEST, ACT, HEAD = (f"{_ROOT}/{name}/v1" for name in ("request", "act", "head"))
_FILES = {REQUEST: "request-v1.yaml", ACT: "act-v1.yaml", HEAD: "head-v1.yaml"}
_COMMON = ("request_id", "user", "model", "outcome", "code")
_FIELDS = {
    "end": (
        *_COMMON,
        "model_sha256",
        "prompt_tokens",
        "cached_tokens",
        "tokens_generated",
        "duration_ms",
        "time_to_first_token_ms",
    ),
    "act": (*_COMMON, "action"),
}


def register(event_logger: EventLogger) -> None:
    """Make the schemas known, unless they are."""
    for schema, file in _FILES.items():
        if schema not in event_logger.schemas:
            event_logger.register_event_schema(Path(__file__).with_name(file))


def announce(service: CompletionService, event_logger: EventLogger) -> Callable[[], None]:
    """Emit an event for every request of this service that ends, and for every act. What is returned
    ends that; calling it twice is fine.
    """
    register(event_logger)
    watcher = functools.partial(_heard, event_logger)
    service.guard.watchers.append(watcher)

    def stop() -> None:
        if watcher in service.guard.watchers:
            service.guard.watchers.remove(watcher)

    return stop


def emit_head(event_logger: EventLogger, head: Head) -> None:
    """An anchor of the ledger, for whoever keeps it elsewhere. On the event loop."""
    _emit(event_logger, HEAD, head.to_json())


def _heard(event_logger: EventLogger, entry: Entry, route: str, _aside: Aside) -> None:
    names = _FIELDS.get(entry.kind)
    if names is None:  # of its beginning there is no news
        return
    values = ((name, getattr(entry, name)) for name in names)
    data = {name: value for name, value in values if value is not None}
    if entry.kind == "end":
        _emit(event_logger, REQUEST, {"timestamp": iso(entry.time), "route": route, **data})
    else:
        _emit(event_logger, ACT, {"timestamp": iso(entry.time), **data})


def _emit(event_logger: EventLogger, schema: str, data: Mapping[str, Any]) -> None:
    try:
        event_logger.emit(schema_id=schema, data=dict(data))
    except Exception:  # an administrator's schema or handler must not end a request
        log.exception("an event was not emitted: %s", schema)
