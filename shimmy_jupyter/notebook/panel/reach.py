"""Where the panel's requests go."""

from __future__ import annotations

from typing import Any, Protocol

from ..client import Transport as _Transport


class Transport(_Transport, Protocol):
    """Synchronous; used by one thread at a time."""

    def put(self, path: str, body: dict[str, Any]) -> dict[str, Any]: ...
