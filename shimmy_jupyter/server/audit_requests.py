"""Bodies of `shimmy/api/audit/…`."""

from __future__ import annotations

from typing import Any

from pydantic import ConfigDict

from .fields import Body, validated


class _Verify(Body):
    model_config = ConfigDict(extra="forbid", strict=True)

    against: dict[str, Any] | None = None


def parse_verify(body: bytes) -> dict[str, Any] | None:
    """The head that the ledger is to be compared with. Raises `InvalidValue`, `UnknownParameter`."""
    return validated(_Verify, body or b"{}").against
