"""What can go wrong on the way in: see `errors`. Messages name hosts and file names, never a query, a
token or a folder of this machine.
"""

from __future__ import annotations

from ..errors import (
    ChecksumMismatch,
    DiskFull,
    FetchFailed,
    FetchInterrupted,
    FetchRefused,
    FileExists,
)

__all__ = [
    "ChecksumMismatch",
    "DiskFull",
    "FetchFailed",
    "FetchInterrupted",
    "FetchRefused",
    "FileExists",
    "in_words",
]


def in_words(size: int) -> str:
    """A number of bytes for people, in units of 1000."""
    amount = float(size)
    for unit in ("bytes", "kB", "MB"):
        if amount < 1000:
            return f"{amount:.0f} bytes" if unit == "bytes" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} GB"
