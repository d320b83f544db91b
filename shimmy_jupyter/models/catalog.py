"""Which model files this machine offers, and under which names."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger("shimmy_jupyter.models")

SELF_TEST = "self-test"
_DEEPEST = 32
_BUNDLED = Path(__file__).parent.parent / "bundled" / "self-test.gguf"
_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9._:@-]+")
_LATER_SHARD = re.compile(r"-(\d{5})-of-(\d{5})$")
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
    its path's SHA-256. Passed over: roots that are not there, links out of a root, folders deeper
    than 32, whatever is no regular file or cannot be looked at.
    """
    found: list[ModelFile] = []
    taken = {SELF_TEST}
    seen: set[Path] = set()
    for root in roots:
        try:
            resolved_root = root.expanduser().resolve(strict=True)
            if not resolved_root.is_dir():
                raise NotADirectoryError
        except (OSError, RuntimeError, ValueError) as error:
            missing = isinstance(error, FileNotFoundError)
            reason = "does not exist" if missing else "is not a folder that can be read"
            log.warning("ShimmyModels.roots or SHIMMY_MODEL_PATHS: %r %s", str(root), reason)
            continue
        for path in sorted(_files(resolved_root)):
            shard = _LATER_SHARD.search(path.stem)
            if path.suffix.lower() != ".gguf" or (shard and shard[1] != "00001"):
                continue
            try:
                resolved = path.resolve(strict=True)
                status = resolved.stat()
            except (OSError, RuntimeError):  # gone since it was listed, or a link to itself
                continue
            inside = resolved.is_relative_to(resolved_root)
            if inside and stat.S_ISREG(status.st_mode) and resolved not in seen:
                seen.add(resolved)
                size = status.st_size + (_others(resolved, int(shard[2])) if shard else 0)
                found.append(_entry(_name(path, resolved, taken), resolved, status, size))
    bundled = _BUNDLED.stat()
    found.append(_entry(SELF_TEST, _BUNDLED, bundled, bundled.st_size, bundled=True))
    return found


def _others(first: Path, count: int) -> int:
    """Bytes of the other files of a model that is split; of those that are there."""
    size = 0
    for number in range(2, count + 1):
        other = first.with_name(f"{first.name[:-20]}-{number:05}-of-{count:05}.gguf")
        with contextlib.suppress(OSError):
            size += other.stat().st_size
    return size


def _files(root: Path) -> Iterator[Path]:
    folders = [(root, 0)]
    while folders:
        folder, depth = folders.pop()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        if depth < _DEEPEST:
                            folders.append((Path(entry.path), depth + 1))
                    else:
                        yield Path(entry.path)
        except OSError:
            log.warning("the models' folder %r cannot be read", str(folder))


def _entry(
    id: str, path: Path, status: os.stat_result, size: int, *, bundled: bool = False
) -> ModelFile:
    return ModelFile(id, path, size, int(status.st_mtime), bundled)


def _name(path: Path, resolved: Path, taken: set[str]) -> str:
    name = _NOT_IN_A_NAME.sub("-", _LATER_SHARD.sub("", path.stem))[:_LONGEST_NAME] or "model"
    digest = hashlib.sha256(os.fsencode(resolved)).hexdigest()
    # Longer where somebody has named a file after a digest's beginning.
    candidates = [name, *(f"{name}@{digest[:size]}"[-128:] for size in range(8, 65))]
    free = next(candidate for candidate in candidates if candidate not in taken)
    taken.add(free)
    return free
