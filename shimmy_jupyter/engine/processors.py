"""How many processors this process may use: its affinity, and its container's CPU quota."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

V1_MOUNTS = ("/sys/fs/cgroup/cpu", "/sys/fs/cgroup/cpu,cpuacct")
V2_MOUNTS = ("/sys/fs/cgroup", "/sys/fs/cgroup/unified")


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
    found = []
    for version, group in _groups(root):
        for mount, shown in _mounts(root, version):
            inner = _below(group, shown)
            for level in (inner, *inner.parents):
                limit = _limit(root / mount.lstrip("/") / level, version)
                if limit is not None:
                    found.append(limit)
    return min(found, default=None)


def _groups(root: Path) -> Iterator[tuple[int, str]]:
    """The process's own cgroups that can limit its processors: version and path."""
    for line in _lines(root / "proc/self/cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if line.startswith("0::"):
            yield 2, path
        elif "cpu" in controllers.split(","):
            yield 1, path


def _mounts(root: Path, version: int) -> list[tuple[str, str]]:
    """Where that hierarchy is mounted, and which of its cgroups is seen there as the root."""
    found = {}
    for line in _lines(root / "proc/self/mountinfo"):
        left, _, right = line.partition(" - ")
        fields, kind = left.split(), right.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        if kind[0] == "cgroup2" if version == 2 else _holds_cpu(kind):
            found[_unescaped(fields[4])] = _unescaped(fields[3])
    usual = V2_MOUNTS if version == 2 else V1_MOUNTS
    return list(found.items()) or [(mount, "/") for mount in usual]


def _holds_cpu(kind: list[str]) -> bool:
    return kind[0] == "cgroup" and "cpu" in kind[-1].split(",")


def _below(group: str, shown: str) -> PurePosixPath:
    """`group` relative to the cgroup that a mount shows as its root."""
    path = PurePosixPath("/", group)
    if ".." in path.parts:  # outside of this process's cgroup namespace, and out of sight
        return PurePosixPath()
    # A container may see only its own cgroup while its path is still the host's.
    return path.relative_to(shown if path.is_relative_to(shown) else "/")


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
    return " ".join(_lines(path)).split()


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except (OSError, ValueError):
        return []


def _unescaped(field: str) -> str:
    """Spaces and the like are octal in mountinfo."""
    return re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), field)
