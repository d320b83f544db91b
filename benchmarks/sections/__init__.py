"""One module for each section; `run(plan)` measures one model and returns what goes into the JSON."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peers
from prompts import Model


@dataclass(frozen=True)
class Plan:
    """What to measure, with how much patience. A `quick` run shows that it works, nothing more."""

    model: Model
    file: Path
    quick: bool
    repeats: int
    tokens: int
    sides: tuple[str, ...]
    seconds: float | None
    long_tokens: int
    clients: tuple[int, ...]
    serial_to: int
    busy: tuple[int, ...] = ()

    def setup(self, **changes: Any) -> peers.Setup:
        return peers.Setup(model=self.file, **changes)

    def among(self, *names: str) -> list[str]:
        return [name for name in names if name in self.sides]

    def full(self, seconds: float) -> float:
        """A duration, or the one asked for, or a glimpse."""
        return self.seconds or (2.0 if self.quick else seconds)


def in_turn(labels: list[str], round_: int) -> list[str]:
    """Another side first in every round."""
    at = round_ % len(labels) if labels else 0
    return labels[at:] + labels[:at]
