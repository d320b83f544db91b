"""`shimmy.lock`: which bytes and settings a project's names for models stand for.

TOML with a closed schema (lockschema.py; for users, docs/lock.md). It comes with a notebook from
anywhere, so it is hostile until parsed: nothing in it is ignored, and nothing in it names a place on
this machine. Whoever resolves an alias gets its pin or a `LockError`, never another model.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
from datetime import datetime
from itertools import takewhile
from pathlib import Path

from .lockschema import (
    SCHEMA,
    Adapter,
    Defaults,
    Lock,
    LockError,
    Override,
    Pin,
    Profile,
    Source,
    as_key,
    unknown,
)

__all__ = [
    "LARGEST",
    "NAME",
    "Adapter",
    "Defaults",
    "Lock",
    "LockError",
    "Override",
    "Pin",
    "Profile",
    "Source",
    "added",
    "digest",
    "dump",
    "find",
    "parse",
    "read",
    "removed",
    "renamed",
    "resolve",
    "update_text",
    "write",
]

NAME = "shimmy.lock"
LARGEST = 1 << 20
"""Bytes of a lock file, at most."""
_VERSION = 1
_DEEPEST = 8
_STRING_OR_COMMENT = re.compile(  # possessive, so that it is linear on any text
    r'"""|\'\'\'|"(?:\\.|[^"\\\n]++)*+"?|\'[^\'\n]*+\'?|#[^\n]*+'
)
_NOT_IN_A_KEY = re.compile(r'[^A-Za-z0-9_."-]+')


def parse(text: str) -> Lock:
    """The lock that a text holds, all of it checked. Raises `LockError`, and nothing else."""
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise LockError(f"{NAME} is not UTF-8") from None
    if size > LARGEST:
        raise LockError(f"{NAME} has {size} bytes; {LARGEST} are the most")
    _refuse_long_keys(text)
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError alone: a number of 5,000 digits
        raise LockError(f"{NAME} is not TOML: {str(error)[:200]}") from None
    version = data.pop("version", None)
    if type(version) is not int or version != _VERSION:
        raise LockError(f"must be {_VERSION}, which is what this release reads", "version")
    lock = SCHEMA(data, "")
    assert isinstance(lock, Lock)
    return lock


def _refuse_long_keys(text: str) -> None:
    """Before tomllib, whose time and memory grow with the square of a dotted key's parts: 100 KB of
    `a.a.a…` take gigabytes. Nothing in a lock is deeper than four.
    """

    def stand_in(found: re.Match[str]) -> str:
        if found[0] in {'"""', "'''"}:
            # Within these, what looks like a string or a comment need not be one.
            raise LockError(f"{NAME} holds a text in three quotation marks; one is enough")
        return '"'

    for number, line in enumerate(_STRING_OR_COMMENT.sub(stand_in, text).split("\n"), 1):
        pieces = _NOT_IN_A_KEY.split(line.replace(" ", "").replace("\t", ""))
        if any(piece.count(".") > _DEEPEST for piece in pieces):
            raise LockError(f"{NAME} holds a key of too many parts (at line {number})")


def dump(lock: Lock) -> str:
    """The one spelling of a lock: names sorted, keys in the schema's order. Raises `LockError` where
    it could not be parsed again.
    """
    # Parsed between: that sorts the names, makes 1 and -0.0 of code the 1.0 and 0.0 they equal, and
    # refuses what could not be read.
    return "".join(_lines(parse("".join(_lines(lock)))))


def _lines(lock: Lock) -> Iterator[str]:
    yield f"version = {_VERSION}\n"
    for alias, pin in lock.models.items():
        yield f"\n[models.{as_key(alias)}]\n"
        for name, value in _given(pin):
            yield f"{name} = {_several(value) if isinstance(value, tuple) else _value(value)}\n"
    for profile, overrides in lock.profiles.items():
        yield f"\n[profiles.{as_key(profile)}]\n"
        for alias, override in overrides.items():
            yield f"{as_key(alias)} = {_value(override)}\n"


def _given(holder: object) -> Iterator[tuple[str, object]]:
    assert is_dataclass(holder)
    for each in fields(holder):
        value = getattr(holder, each.name)
        if value not in {None, (), Defaults()}:
            yield each.name, value


def _several(values: tuple[object, ...]) -> str:
    return "".join(["[\n", *(f"    {_value(value)},\n" for value in values), "]"])


def _value(value: object) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)  # TOML has JSON's escapes
    if isinstance(value, datetime):
        return value.isoformat().replace("+00:00", "Z")
    if is_dataclass(value):
        inner = ", ".join(f"{name} = {_value(part)}" for name, part in _given(value))
        return f"{{ {inner} }}"
    return repr(value)


def digest(lock: Lock) -> str:
    """SHA-256, in hex, of what a lock pins: of its canonical form without times and engine versions."""
    bare = {alias: replace(pin, engine=None, locked_at=None) for alias, pin in lock.models.items()}
    return hashlib.sha256(dump(replace(lock, models=bare)).encode()).hexdigest()


def update_text(old: str, lock: Lock) -> str:
    """The lock's canonical form under the comments that `old` begins with; comments further down are
    not kept. Raises `LockError` where `old` is no lock: nobody's broken file is written over.
    """
    parse(old)
    lines = (line.strip() for line in old.split("\n"))
    head = "\n".join(takewhile(lambda line: not line or line.startswith("#"), lines)).strip("\n")
    text = f"{head}\n\n{dump(lock)}" if head else dump(lock)
    parse(text)
    return text


def resolve(lock: Lock, alias: str, profile: str | None = None) -> Pin:
    """What an alias stands for, in a profile where one is named. A profile's `use` leads on through
    the same profile; of several contexts on the way the first holds. Raises `LockError`.
    """
    if alias not in lock.models:
        raise LockError(unknown("model", alias, lock.models))
    if profile is not None and profile not in lock.profiles:
        raise LockError(unknown("profile", profile, lock.profiles))
    overrides = lock.profiles[profile] if profile is not None else {}
    context = None
    while override := overrides.get(alias):
        context = context or override.context_size
        if override.use is None:
            break
        alias = override.use
    pin = lock.models[alias]
    return pin if context is None else replace(pin, context_size=context)


def added(lock: Lock, alias: str, pin: Pin, *, replacing: bool = False) -> Lock:
    """Raises `LockError` where the alias is pinned already, unless replacing; and for a bad pin."""
    if alias in lock.models and not replacing:
        raise LockError("is pinned already", f"models.{as_key(alias)}")
    return _checked(replace(lock, models={**lock.models, alias: pin}))


def removed(lock: Lock, alias: str) -> Lock:
    """Raises `LockError` where the alias is not pinned, or a profile needs it."""
    if alias not in lock.models:
        raise LockError(unknown("model", alias, lock.models))
    for name, overrides in lock.profiles.items():
        if alias in overrides or alias in {override.use for override in overrides.values()}:
            raise LockError(f"is named by the profile {name}", f"models.{as_key(alias)}")
    models = {name: pin for name, pin in lock.models.items() if name != alias}
    return _checked(replace(lock, models=models))


def renamed(lock: Lock, old: str, new: str) -> Lock:
    """In profiles, too. Raises `LockError` where `old` is not pinned, or `new` is."""
    if old not in lock.models:
        raise LockError(unknown("model", old, lock.models))
    if new in lock.models:
        raise LockError("is pinned already", f"models.{as_key(new)}")

    def name(alias: str) -> str:
        return new if alias == old else alias

    models = {name(alias): pin for alias, pin in lock.models.items()}
    profiles = {
        profile: {
            name(alias): replace(each, use=name(each.use)) if each.use else each
            for alias, each in overrides.items()
        }
        for profile, overrides in lock.profiles.items()
    }
    return _checked(Lock(models, profiles))


def _checked(lock: Lock) -> Lock:
    return parse(dump(lock))


def find(start: Path, home: Path | None) -> Path | None:
    """The nearest `shimmy.lock`, from the folder `start` upwards; None where there is none.

    The last folder looked into is the user's home, or the last before another file system, before a
    folder like /tmp in which anybody may put a file, or the root. Links on the way to `start` are
    resolved first. Raises `LockError` where the nearest is none that `read` would open, and where
    that cannot be told: one further up is not taken in its stead.
    """
    try:
        first = start.resolve(strict=True)
        device = first.stat().st_dev
        last = home.resolve() if home is not None else None
    except (OSError, RuntimeError, ValueError):
        raise LockError("the folder to look from is not there, or cannot be read") from None
    for up, folder in enumerate((first, *first.parents)):
        where = f"{NAME}, {up} folder{'s' * (up > 1)} up," if up else NAME
        try:
            here = folder.stat()
            shared = here.st_mode & stat.S_ISVTX and here.st_mode & stat.S_IWOTH
            if up and (here.st_dev != device or shared):
                return None
            _refuse_odd((folder / NAME).lstat(), where)
        except FileNotFoundError:
            if folder == last:
                return None
        except OSError as error:
            raise LockError(f"{where} cannot be looked at: {error.strerror}") from None
        else:
            return folder / NAME
    return None


def read(path: Path) -> Lock:
    """Raises `LockError`, also for a link, for what is no regular file, and over 1 MiB."""
    return parse(_text_of(path))


def _text_of(path: Path) -> str:
    try:
        # A link put there since `find` is not followed, a named pipe not waited for.
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            _refuse_odd(os.fstat(handle), NAME)
            with os.fdopen(handle, "rb", closefd=False) as file:
                data = file.read(LARGEST + 1)
        finally:
            os.close(handle)
        if len(data) > LARGEST:
            raise LockError(f"{NAME} has more than {LARGEST} bytes")
        return data.decode()
    except UnicodeDecodeError:
        raise LockError(f"{NAME} is not UTF-8") from None
    except OSError as error:
        why = "it is a link" if error.errno == errno.ELOOP else error.strerror
        raise LockError(f"{NAME} cannot be read: {why}") from None


def _refuse_odd(status: os.stat_result, where: str) -> None:
    if stat.S_ISLNK(status.st_mode):
        raise LockError(f"{where} is a link; links are not followed")
    if not stat.S_ISREG(status.st_mode):
        raise LockError(f"{where} is no regular file")
    if status.st_size > LARGEST:
        raise LockError(f"{where} has {status.st_size} bytes; {LARGEST} are the most")


def write(path: Path, lock: Lock) -> None:
    """Puts the lock in the place of what is there, in one step, readable by all; the comments at the
    top stay. Raises `LockError` for a bad lock and where what is there is none, and `OSError`;
    what was there is then as it was.
    """
    text = update_text(_text_of(path), lock) if os.path.lexists(path) else dump(lock)
    handle, name = tempfile.mkstemp(prefix=f".{NAME}.", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(text.encode())
            file.flush()
            os.fchmod(handle, 0o644)
            os.fsync(handle)
        temporary.replace(path)
    finally:
        with suppress(FileNotFoundError):  # where it has its name
            temporary.unlink()
    # So that the name outlives a power cut, too. The lock is in its place, with or without.
    with suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
