"""Which models leave memory: those that nobody has used for long, and those whose room another needs.

Pure: what is held and what time it is are passed in.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Held(Generic[K]):
    """A model in memory: its bytes, when it was last used, and whether somebody uses it now."""

    key: K
    size_bytes: int
    used: float
    busy: bool


def unused(held: Iterable[Held[K]], now: float, limit: float) -> list[K]:
    """Those that nobody has used for `limit` seconds."""
    return [one.key for one in held if not one.busy and now - one.used >= limit]


def leaving(held: Iterable[Held[K]], shortfall: int) -> list[K] | None:
    """Which have to go so that `shortfall` bytes more are free: those that nobody uses before those in
    use, of each the one whose last use is longest ago first, and none that need not. None where all of
    them together are not enough.
    """
    chosen: list[Held[K]] = []
    freed = 0
    for one in sorted(held, key=lambda one: (one.busy, one.used)):
        if freed >= shortfall:
            break
        chosen.append(one)
        freed += one.size_bytes
    if freed < shortfall:
        return None
    # The last one may be large enough to spare earlier ones: the latest used is spared first.
    for one in sorted(chosen, key=lambda one: (not one.busy, -one.used)):
        if freed - one.size_bytes >= shortfall:
            chosen.remove(one)
            freed -= one.size_bytes
    return [one.key for one in chosen]
