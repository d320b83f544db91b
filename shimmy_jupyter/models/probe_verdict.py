"""What a probe found, the closed schema that it is read by, and the memory of it.

The words and numbers are a child's that may be anybody's by then, and the files may be damaged: types
are checked, sizes bounded, control characters and folders taken out.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import stat
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

log = logging.getLogger("shimmy_jupyter.probe")

Outcome = Literal[
    "ok", "refused", "crashed", "illegal_instruction", "hung", "out_of_memory", "failed"
]
ABOUT_THE_BYTES = frozenset({"ok", "refused", "crashed", "illegal_instruction", "hung"})
"""The others may be different next time."""

_FORMAT = 1
_MOST_NOTE = 1 << 14
_LONGEST_REASON = 300
_LONGEST_TEXT = 2000
_MOST_MECHANISMS = 8
_MECHANISM = re.compile(r"[a-z][a-z ]{1,30}( [0-9]{1,3})?")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_FOLDERS = re.compile(r"(?<![\w.)])(?:[A-Za-z]:)?[/\\](?:[^/\\'\"\n:;,()]*[/\\])*(?=\S)")


class Garbled(ValueError):
    """What was said or stored is not what we say or store. The message completes "it has"."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of the child. `reason` follows "the probe: ", and is empty where all is well.

    "failed" and "out_of_memory" say nothing about the bytes. `confined` is what was in force, as
    `engine/confine.py` names it; `at` is in seconds since 1970. The rest is None unless all is well:
    seconds; bytes of memory at most, with what was mapped of the file; tokens of context that it
    was trained for, and of its vocabulary; the SHA-256 of its chat template's UTF-8, if it has one.
    """

    outcome: Outcome
    reason: str = ""
    confined: tuple[str, ...] = ()
    at: int = 0
    load_seconds: float | None = None
    decode_seconds: float | None = None
    memory_bytes: int | None = None
    architecture: str | None = None
    description: str | None = None
    parameters: int | None = None
    context_size: int | None = None
    vocabulary: int | None = None
    can_generate: bool | None = None
    chat_template_sha256: str | None = None

    @property
    def ok(self) -> bool:
        return self.outcome == "ok"


def plain(text: str, folders: Sequence[str] = (), most: int = _LONGEST_REASON) -> str:
    """One line of printable characters, without these folders and what looks like one."""
    text = text[:_LONGEST_TEXT]
    for folder in sorted(folders, key=len, reverse=True):
        if folder != os.sep:
            text = text.replace(f"{folder}{os.sep}", "").replace(folder, "")
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return _FOLDERS.sub("", text)[:most].strip()


# The schema

_Rule = Callable[[object], Any]


def _whole(most: int) -> _Rule:
    def rule(value: object) -> int:
        if type(value) is not int or not 0 <= value <= most:
            raise ValueError
        return value

    return rule


def _seconds(value: object) -> float:
    if type(value) not in {int, float} or not 0 <= cast("float", value) < 1e9:
        raise ValueError  # not a number is not less, either
    return float(cast("float", value))


def _text(most: int) -> _Rule:
    def rule(value: object) -> str:
        if not isinstance(value, str):
            raise ValueError  # noqa: TRY004  one error for all rules
        return plain(value, most=most)

    return rule


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError  # noqa: TRY004
    return value


def _digest(value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise ValueError
    return value


_FACTS: dict[str, _Rule] = {
    "load_seconds": _seconds,
    "decode_seconds": _seconds,
    "memory_bytes": _whole(1 << 60),
    "architecture": _text(64),
    "description": _text(256),
    "parameters": _whole(1 << 60),
    "context_size": _whole(1 << 32),
    "vocabulary": _whole(1 << 32),
    "can_generate": _flag,
    "chat_template_sha256": _digest,
}


def facts(value: object) -> dict[str, Any]:
    """The fields of a `Verdict` that is "ok". Raises `Garbled`."""
    if not isinstance(value, dict) or value.keys() != _FACTS.keys():
        raise Garbled("other facts than were asked for")
    found = {}
    for name, rule in _FACTS.items():
        try:
            found[name] = rule(value[name])
        except ValueError:
            raise Garbled(f"a {name} that cannot be") from None
    return found


def mechanisms(value: object) -> tuple[str, ...]:
    """Names of what confines the child. Raises `Garbled`."""
    if (
        not isinstance(value, list)
        or len(value) > _MOST_MECHANISMS
        or not all(isinstance(name, str) and _MECHANISM.fullmatch(name) for name in value)
    ):
        raise Garbled("no list of what confines it")
    return tuple(value)


def json_object(text: bytes) -> dict[str, Any]:
    """Raises `Garbled`."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise Garbled("what is no JSON object")
    return found


def _stored(key: str, build: str, verdict: Verdict) -> dict[str, Any]:
    return {
        "format": _FORMAT,
        "key": key,
        "build": build,
        "outcome": verdict.outcome,
        "reason": verdict.reason,
        "confined": list(verdict.confined),
        "at": verdict.at,
        "facts": {name: getattr(verdict, name) for name in _FACTS} if verdict.ok else None,
    }


def _restored(fields: Mapping[str, Any], key: str, build: str) -> Verdict:
    """Raises `Garbled` unless this is what would be stored."""
    outcome, reason, at = (fields.get(name) for name in ("outcome", "reason", "at"))
    if outcome not in get_args(Outcome) or outcome not in ABOUT_THE_BYTES:
        raise Garbled("no outcome that is remembered")
    if not isinstance(reason, str) or type(at) is not int or at < 0:
        raise Garbled("no reason or no time")
    known = facts(fields.get("facts")) if outcome == "ok" else {}
    confined = mechanisms(fields.get("confined"))
    verdict = Verdict(cast("Outcome", outcome), plain(reason), confined, at, **known)
    if _stored(key, build, verdict) != fields:
        raise Garbled("other fields than were stored")
    return verdict


# The memory


class Notes:
    """Verdicts by the bytes' digest, for one build: a small file each, or without a folder, and where
    it cannot be written to, in memory. For any thread.
    """

    def __init__(self, folder: Path | None, build: str) -> None:
        self._folder = folder
        self._build = build
        self._kept: dict[str, Verdict] = {}

    def read(self, key: str) -> Verdict | None:
        """None also where what is there cannot be understood, which the log says."""
        if key in self._kept or self._folder is None:
            return self._kept.get(key)
        name = self._name(key)
        try:
            return _restored(json_object(_contents(self._folder / name)), key, self._build)
        except FileNotFoundError:
            return None
        except Garbled as error:
            log.warning("the verdict in %s counts for nothing: it has %s", name, error)
        except OSError as error:
            log.warning("the verdict in %s counts for nothing: %s", name, error.strerror)
        return None

    def write(self, key: str, verdict: Verdict) -> None:
        text = json.dumps(_stored(key, self._build, verdict))
        if self._folder is not None:
            try:
                _replace(self._folder, self._name(key), text.encode())
            except OSError as error:
                log.warning("a verdict is not kept beyond this process: %s", error.strerror)
            else:
                self._kept.pop(key, None)
                return
        self._kept[key] = verdict

    def remove(self, key: str) -> None:
        """Raises OSError where the file cannot be removed."""
        self._kept.pop(key, None)
        if self._folder is not None:
            (self._folder / self._name(key)).unlink(missing_ok=True)

    def _name(self, key: str) -> str:
        return f"{key}-{hashlib.sha256(self._build.encode()).hexdigest()[:16]}.json"


def _contents(path: Path) -> bytes:
    """Of a regular file that is ours alone to write. Raises OSError, and `Garbled`."""
    # A link is not followed, and a pipe must not hold us up.
    at = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        found = os.fstat(at)
        ours = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid()
        if not ours or found.st_mode & 0o022:
            raise PermissionError(errno.EPERM, "others can write to it")
        if found.st_size > _MOST_NOTE:
            raise Garbled("more than a verdict")
        return os.read(at, _MOST_NOTE)
    finally:
        os.close(at)


def _replace(folder: Path, name: str, data: bytes) -> None:
    """Write the file, or leave what was there. Raises OSError."""
    for one in (folder.parent, folder):
        one.mkdir(mode=0o700, parents=True, exist_ok=True)
    facts = folder.stat()
    if facts.st_uid != os.geteuid():
        raise PermissionError(errno.EPERM, "the folder is somebody else's")
    if stat.S_IMODE(facts.st_mode) & 0o077:
        folder.chmod(0o700)
    at, new = tempfile.mkstemp(dir=folder, prefix=".", suffix=".new")  # readable for us alone
    try:
        with os.fdopen(at, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(at)
        Path(new).replace(folder / name)
    except BaseException:
        Path(new).unlink(missing_ok=True)
        raise
