"""Bodies of our own routes about models. What they do not define is refused, not ignored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import ConfigDict, Field

from .fields import Body, Digest, Text, validated


class _Empty(Body):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Pull(_Empty):
    model: Annotated[Text, Field(min_length=1, max_length=2048)]
    sha256: Digest | None = None


@dataclass(frozen=True, slots=True)
class Pull:
    """What to download: a repository, or an address; and the SHA-256 that it must have."""

    model: str
    sha256: str | None


def parse_pull(body: bytes) -> Pull:
    """Raises `InvalidValue` or `UnknownParameter`, naming the field."""
    asked = validated(_Pull, body)
    return Pull(asked.model, asked.sha256)


def parse_empty(body: bytes) -> None:
    """Nothing, or an object without fields. Raises `InvalidValue` or `UnknownParameter`."""
    if body.strip():
        validated(_Empty, body)
