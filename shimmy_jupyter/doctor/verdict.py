"""What a check found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "fail", "skip"]


@dataclass(frozen=True, slots=True)
class Check:
    """`action` is the next step, where something is not as it should be. No text has a secret in it."""

    name: str
    status: Status
    detail: str
    action: str | None = None


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
