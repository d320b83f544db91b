"""Which model files this machine offers, and under which names."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

SELF_TEST = "self-test"
_BUNDLED = Path(__file__).parent.parent / "bundled" / "self-test.gguf"
_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9._:@-]+")
_LATER_SHARD = re.compile(r"-(\d{5})-of-\d{5}$")
_LONGEST_NAME = 119  # leaves room for "@" and 8 hex digits within 128


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A GGUF file under the name that requests use. `created` is seconds since 1970, in UTC."""

    id: str
    path: Path
    size_bytes: int
    created: int
    bundled: bool = False


def discover(roots: Iterable[Path]) -> list[ModelFile]:
    """Every `*.gguf` below the roots, in the order of the roots and then by name, and at the end
    the bundled model. A second file of a name that is taken becomes `name@` and 8 hex digits of
    its path's SHA-256. Roots that are not there are passed over; links out of a root too.
    """
    found: list[ModelFile] = []
    taken = {SELF_TEST}
    seen: set[Path] = set()
    for root in roots:
        resolved_root = root.expanduser().resolve()
        for path in sorted(resolved_root.rglob("*.gguf")):
            resolved = path.resolve()
            if resolved in seen or not resolved.is_relative_to(resolved_root):
                continue
            shard = _LATER_SHARD.search(path.stem)
            if shard and shard[1] != "00001":
                continue
            try:
                status = resolved.stat()
            except OSError:  # gone since it was listed, or not ours to look at
                continue
            if stat.S_ISREG(status.st_mode):
                seen.add(resolved)
                found.append(_entry(_name(path, resolved, taken), resolved, status))
    found.append(_entry(SELF_TEST, _BUNDLED, _BUNDLED.stat(), bundled=True))
    return found


def _entry(id: str, path: Path, status: os.stat_result, *, bundled: bool = False) -> ModelFile:
    return ModelFile(id, path, status.st_size, int(status.st_mtime), bundled)


def _name(path: Path, resolved: Path, taken: set[str]) -> str:
    name = _NOT_IN_A_NAME.sub("-", _LATER_SHARD.sub("", path.stem))[:_LONGEST_NAME] or "model"
    if name in taken:
        name += "@" + hashlib.sha256(str(resolved).encode()).hexdigest()[:8]
    taken.add(name)
    return name
