"""What somebody's paths lead to, with the system's refusals as errors of one line."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import click

_NOTHING = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)
"""What the system says where there is nothing, and can be nothing."""


def mode_of(path: Path, where: str | None = None) -> int | None:
    """As `stat` has it; None where nothing is. Raises `BadParameter`, about what `where` names, for what
    cannot be looked at: `Path.exists` and its like raise or not by the version of Python.
    """
    try:
        return path.stat().st_mode
    except ValueError:  # a null character, which a configuration can have
        return None
    except OSError as error:
        if error.errno in _NOTHING:
            return None
        raise click.BadParameter(
            f"{path.name!r} cannot be looked at: {error.strerror}", param_hint=where
        ) from None


def is_file(path: Path, where: str | None = None) -> bool:
    """Raises `BadParameter`, as `mode_of`."""
    mode = mode_of(path, where)
    return mode is not None and stat.S_ISREG(mode)


def check_writable(path: Path) -> None:
    """That it can be written later: hours may lie between. Raises `BadParameter`."""
    try:
        path.stat()
    except FileNotFoundError:
        path = path.parent
    except OSError as error:
        raise click.BadParameter(f"{str(path)!r} cannot be written: {error.strerror}") from None
    if not os.access(path, os.W_OK):
        raise click.BadParameter(f"{str(path)!r} cannot be written")
