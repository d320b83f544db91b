"""What can go wrong on the way in. Messages name hosts and file names, never a query, a token or a
folder of this machine.

ShimmyError
├── FetchFailed              502  fetch_failed: the other side, the network or the file's bytes
│   ├── FetchInterrupted     502  fetch_interrupted: the same call again goes on where this one ended
│   └── ChecksumMismatch     502  checksum_mismatch: the bytes are not those that were asked for
├── FetchRefused             403  fetch_refused: our own policy; nothing was connected to, or no more
├── FileExists               409  file_exists: another file has the name
└── DiskFull                 507  disk_full
"""

from __future__ import annotations

from ..errors import ShimmyError


class FetchFailed(ShimmyError):
    code = "fetch_failed"
    status = 502


class FetchInterrupted(FetchFailed):
    """What has come is kept; the same request again continues from there."""

    code = "fetch_interrupted"


class ChecksumMismatch(FetchFailed):
    code = "checksum_mismatch"


class FetchRefused(ShimmyError):
    code = "fetch_refused"
    status = 403
    type = "permission_error"


class FileExists(ShimmyError):
    code = "file_exists"
    status = 409
    type = "invalid_request_error"


class DiskFull(ShimmyError):
    code = "disk_full"
    status = 507


def in_words(size: int) -> str:
    """A number of bytes for people, in units of 1000."""
    amount = float(size)
    for unit in ("bytes", "kB", "MB"):
        if amount < 1000:
            return f"{amount:.0f} bytes" if unit == "bytes" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} GB"
