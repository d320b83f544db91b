"""What has been fetched, or not: one of four."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Generic, TypeVar

T = TypeVar("T")
NOTHING: Mapping[Any, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Problem:
    """An error as people see it: `code` is one of `errors.py`, `param` the field to blame, if any."""

    code: str
    message: str
    param: str | None = None
    request_id: str | None = None


@dataclass(frozen=True, slots=True)
class Idle:
    """Nobody has asked for it yet."""

    tag: ClassVar[str] = "idle"


@dataclass(frozen=True, slots=True)
class Pending:
    tag: ClassVar[str] = "pending"


@dataclass(frozen=True, slots=True)
class Ready(Generic[T]):
    value: T
    tag: ClassVar[str] = "ready"


@dataclass(frozen=True, slots=True)
class Failed:
    problem: Problem
    tag: ClassVar[str] = "failed"


IDLE, PENDING = Idle(), Pending()
Fetched = Idle | Pending | Ready[T] | Failed


def ready(fetched: Fetched[T]) -> T | None:
    """What there is, if there is anything."""
    return fetched.value if isinstance(fetched, Ready) else None
