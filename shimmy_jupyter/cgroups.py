"""Where Linux keeps the limits of this process's cgroup and of all those around it, versions 1 and 2."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

V2_MOUNTS = ("/sys/fs/cgroup", "/sys/fs/cgroup/unified")
V1_MOUNTS = {
    "cpu": ("/sys/fs/cgroup/cpu", "/sys/fs/cgroup/cpu,cpuacct"),
    "memory": ("/sys/fs/cgroup/memory",),
}
"""Where they usually are, for when the list of mounts does not say."""


def levels(controller: str, root: Path) -> Iterator[tuple[int, Path]]:
    """Version and folder of each, its own first. `root` is where `/proc` and `/sys` are looked for."""
    for version, group in _groups(controller, root):
        for mount, shown in _mounts(controller, root, version):
            inner = _below(group, shown)
            for level in (inner, *inner.parents):
                yield version, root / mount.lstrip("/") / level


def lines(path: Path) -> list[str]:
    """None where the file is not there or cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except (OSError, ValueError):
        return []


def _groups(controller: str, root: Path) -> Iterator[tuple[int, str]]:
    """The process's own cgroups that can limit it so: version and path."""
    for line in lines(root / "proc/self/cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if line.startswith("0::"):
            yield 2, path
        elif controller in controllers.split(","):
            yield 1, path


def _mounts(controller: str, root: Path, version: int) -> list[tuple[str, str]]:
    """Where that hierarchy is mounted, and which of its cgroups is seen there as the root."""
    found = {}
    for line in lines(root / "proc/self/mountinfo"):
        left, _, right = line.partition(" - ")
        fields, kind = left.split(), right.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        first = kind[0] == "cgroup" and controller in kind[-1].split(",")
        if kind[0] == "cgroup2" if version == 2 else first:
            found[_unescaped(fields[4])] = _unescaped(fields[3])
    usual = V2_MOUNTS if version == 2 else V1_MOUNTS[controller]
    return list(found.items()) or [(mount, "/") for mount in usual]


def _below(group: str, shown: str) -> PurePosixPath:
    """`group` relative to the cgroup that a mount shows as its root."""
    path = PurePosixPath("/", group)
    if ".." in path.parts:  # outside of this process's cgroup namespace, and out of sight
        return PurePosixPath()
    # A container may see only its own cgroup while its path is still the host's.
    return path.relative_to(shown if path.is_relative_to(shown) else "/")


def _unescaped(field: str) -> str:
    """Spaces and the like are octal in mountinfo."""
    return re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), field)
