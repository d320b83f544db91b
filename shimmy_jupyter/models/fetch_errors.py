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
from ..types import amount as in_words

__all__ = [
    "ChecksumMismatch",
    "DiskFull",
    "FetchFailed",
    "FetchInterrupted",
    "FetchRefused",
    "FileExists",
    "in_words",
]
