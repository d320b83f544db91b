"""How many processors this process may use: its affinity, and its container's CPU quota."""

from __future__ import annotations

import os
from pathlib import Path

from .. import cgroups


def available(root: Path = Path("/")) -> int:
    """How many threads can compute at the same time; at least 1.

    A fractional quota rounds down: the kernel stops all threads of a group that has used up its
    share, and threads that wait for each other at barriers use up a share by waiting.
    """
    limit = quota(root)
    return max(1, affinity() if limit is None else min(affinity(), int(limit)))


def affinity() -> int:
    """How many processors the operating system may put this process on."""
    try:
        return len(os.sched_getaffinity(0)) or 1
    except (AttributeError, OSError):
        return os.cpu_count() or 1


def quota(root: Path = Path("/")) -> float | None:
    """The smallest CPU quota over this process's cgroup and all those around it, in processors.

    `root` is where `/proc` and `/sys` are looked for.
    """
    found = [_limit(folder, version) for version, folder in cgroups.levels("cpu", root)]
    return min((limit for limit in found if limit is not None), default=None)


def _limit(folder: Path, version: int) -> float | None:
    try:
        if version == 2:
            share, period = _words(folder / "cpu.max")
        else:
            (share,) = _words(folder / "cpu.cfs_quota_us")
            (period,) = _words(folder / "cpu.cfs_period_us")
        used, of = int(share), int(period)  # `max` is no number, and -1 no quota
    except ValueError:
        return None
    return used / of if used > 0 and of > 0 else None


def _words(path: Path) -> list[str]:
    return " ".join(cgroups.lines(path)).split()
