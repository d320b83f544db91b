"""Checks of files and folders: who can write to them, what they lie on, how much room there is."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from ..config import Settings
from ..models.memory import default_reserve
from ..models.suggest import fitting, suggestions
from .look import Level, Machine
from .verdict import Check, gigabytes

_FILES = ("jupyter_config", "jupyter_server_config", "jupyter_shimmy_jupyter_config")
_DISK_WARN, _DISK_FAIL = 10 * 10**9, 10**9
_NETWORK = {
    "9p", "afs", "beegfs", "ceph", "cifs", "fuse.ceph", "fuse.gcsfuse", "fuse.glusterfs", "fuse.rclone",
    "fuse.s3fs", "fuse.sshfs", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs", "nfs4", "smb3", "smbfs",
}  # fmt: skip


def configuration_files(look: Machine) -> Check:
    """Whoever can write to them, or put one beside them, can run code in the server."""
    name = "configuration files"
    files = [(level, file) for level in look.levels for file in _files(level)]
    kept = [(level, folder) for level in look.levels for folder in (level.folder, _more(level))]
    opened = [
        f"{path.name} ({level.name})"
        for level, path in (*kept, *files)
        if look.posix and _mode(path) & stat.S_IWOTH
    ]
    if opened:
        detail = f"everybody on this machine can change {', '.join(opened)}"
        return Check(name, "fail", detail, "chmod o-w these files and folders")
    if not files:
        return Check(name, "ok", "there are none")
    detail = f"{len(files)} were found, none of which everybody can change"
    systems = [file for level, file in files if level.name == "system"]
    if any(look.access(file, os.W_OK) for file in systems):
        detail += "; this account can change the system's, so limits set there are its own choice"
    return Check(name, "ok", detail)


def _more(level: Level) -> Path:
    return level.folder / "jupyter_server_config.d"


def _files(level: Level) -> Iterator[Path]:
    for name in _FILES:
        for suffix in (".py", ".json"):
            if stat.S_ISREG(_mode(file := level.folder / f"{name}{suffix}")):
                yield file
    yield from sorted(_more(level).glob("*.json"))


def _mode(path: Path) -> int:
    """0 where there is nothing, or nothing that this account may look at."""
    try:
        return path.stat().st_mode
    except OSError:
        return 0


def roots(look: Machine, settings: Settings | None) -> list[Check]:
    """Of each of ShimmyModels.roots and SHIMMY_MODEL_PATHS."""
    name = "models folder"
    if settings is None:
        return [Check(name, "skip", "the configuration cannot be read")]
    if not settings.places.named:
        return [Check(name, "skip", "none is named beside the usual ones")]
    isolated = settings.isolation == "process"
    return [_root(look, root, isolated=isolated) for root in settings.places.named]


def _root(look: Machine, root: Path, *, isolated: bool) -> Check:
    name, shown = "models folder", str(root)
    problem, path = _found(look, root)
    if path is None:
        action = "correct ShimmyModels.roots or SHIMMY_MODEL_PATHS, or the folder"
        return Check(name, "fail", f"{shown} {problem}", action)
    if look.posix and _replaceable(path):
        detail = f"everybody on this machine can put and replace models in {shown}"
        return Check(name, "warn", detail, f"chmod o-w {shown}")
    kind = _network(look, path)
    if kind is not None and not isolated:
        detail = f"{shown} is on {kind}: mapped files there can raise SIGBUS, which ends the server"
        action = 'set ShimmyEngine.isolation = "process", or keep models on a local disk'
        return Check(name, "warn", detail, action)
    return Check(name, "ok", shown if kind is None else f"{shown}, on {kind}")


def _found(look: Machine, root: Path) -> tuple[str, Path | None]:
    """The folder that is meant, without links; or what is wrong with it."""
    try:
        path = root.expanduser().resolve(strict=True)
    except FileNotFoundError:
        return "does not exist", None
    except (OSError, RuntimeError, ValueError):  # a user that nobody knows; a NUL; links in circles
        return "is no path", None
    if not stat.S_ISDIR(_mode(path)):
        return "is no folder", None
    if not look.access(path, os.R_OK | os.X_OK):
        return "cannot be read by this account", None
    return "", path


def _replaceable(folder: Path) -> bool:
    """Whether everybody can replace what is in it: with the sticky bit only its owner can."""
    mode = _mode(folder)
    return bool(mode & stat.S_IWOTH) and not mode & stat.S_ISVTX


def state(look: Machine) -> Check:
    name, shown = "state folder", "shimmy_jupyter in Jupyter's data folder"
    there = bool(_mode(look.state))
    folder = look.state if there else _existing(look.state)
    if not stat.S_ISDIR(_mode(folder)) or not look.access(folder, os.W_OK | os.X_OK):
        detail = f"{shown} {'cannot be written to' if there else 'cannot be made'}"
        return Check(name, "fail", detail, "give it to this account, or set JUPYTER_DATA_DIR")
    kind = _network(look, folder)
    if kind is not None:
        detail = f"{shown} is on {kind}, where locks and their files may not hold"
        return Check(name, "warn", detail, "set JUPYTER_DATA_DIR to a folder on a local disk")
    if not there:
        return Check(name, "ok", f"{shown} will be made when it is needed")
    if look.posix and stat.S_IMODE(_mode(folder)) & 0o077:
        detail = f"{shown} can be seen by other accounts"
        return Check(name, "warn", detail, "chmod 700 that folder")
    return Check(name, "ok", f"{shown} can be written to, by this account alone")


def disk(look: Machine, settings: Settings | None) -> Check:
    name = "disk"
    if settings is None:
        return Check(name, "skip", "the configuration cannot be read")
    if settings.places.huggingface is None:
        return Check(name, "skip", "ShimmyModels.search leaves out where models are downloaded to")
    try:
        free = look.disk(_existing(settings.places.huggingface.expanduser()))
    except OSError as error:
        detail = f"the folder that models are fetched into cannot be looked at: {error.strerror}"
        return Check(name, "warn", detail, "set HF_HOME to a folder of this account")
    detail = f"{gigabytes(free)} are free where models are fetched to"
    if free >= _DISK_WARN:
        return Check(name, "ok", detail)
    least = _DISK_FAIL if free < _DISK_FAIL else _DISK_WARN
    action = f"free at least {gigabytes(least)}, or set HF_HOME to a larger disk"
    return Check(name, "fail" if free < _DISK_FAIL else "warn", detail, action)


def memory(look: Machine, settings: Settings | None) -> Check:
    name, available = "memory", look.memory()
    reserve = settings.memory_reserve if settings is not None else None
    kept = default_reserve(look.total()) if reserve is None else reserve
    detail = (
        f"{gigabytes(available)} are available, of which {gigabytes(kept)} are kept for kernels"
    )
    fits = fitting(max(0, available - kept), "chat")
    if fits:
        return Check(name, "ok", f"{detail}; {fits[0].id} is the largest suggestion that fits")
    least = min(suggestions("chat"), key=lambda one: one.memory_bytes)
    action = f"free {gigabytes(least.memory_bytes + kept)}, or use the bundled model only"
    return Check(name, "warn", f"{detail}, which is too little for {least.id}", action)


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next((one for one in (path, *path.parents) if _mode(one)), path)


def _network(look: Machine, path: Path) -> str | None:
    """What kind of network file system the path is on; None where it is on none that is known."""
    try:
        lines = (look.root / "proc/self/mountinfo").read_text(errors="replace").splitlines()
    except OSError:
        return None
    here, found, kind = PurePosixPath(path.resolve()), PurePosixPath(), ""
    for line in lines:
        left, _, right = line.partition(" - ")
        fields = left.split()
        if len(fields) < 5 or not right.split():
            continue
        mount = PurePosixPath(_unescaped(fields[4]))
        # Of two mounts at one place the later one is seen.
        if here.is_relative_to(mount) and len(mount.parts) >= len(found.parts):
            found, kind = mount, right.split()[0]
    return kind if kind in _NETWORK else None


def _unescaped(field: str) -> str:
    """Spaces and the like are octal in mountinfo."""
    return re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), field)
