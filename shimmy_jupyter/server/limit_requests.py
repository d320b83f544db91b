"""The body of `PUT shimmy/api/limits`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import ConfigDict, Field

from .fields import Body, validated

_Count = Annotated[int, Field(ge=0, le=2**53)] | None


class _Tightened(Body):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    max_requests_per_minute: _Count = None
    max_tokens_per_minute: _Count = None
    max_tokens_per_day: _Count = None
    max_concurrent: _Count = None
    max_queued: _Count = None
    max_prompt_tokens: _Count = None
    max_completion_tokens: _Count = None
    max_seconds: Annotated[float, Field(ge=0, le=2**53)] | None = None


def parse_limits(body: bytes) -> dict[str, Any]:
    """Those that are named; null takes one's own back. Raises `InvalidValue`, `UnknownParameter`."""
    return validated(_Tightened, body).model_dump(exclude_unset=True)
