"""Pinning a model from a notebook: what `shimmy lock add NAME` does, past no terminal."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from ..errors import ModelNotFound
from . import lockfile, pinning
from .lockfile import NAME, Lock, LockError
from .lockschema import Pin

Read = Callable[[str], Mapping[str, Any]]
"""Takes a model's id; what `POST shimmy/api/models/{id}/verify` comes to, once all bytes are read."""


def lock(
    name: str,
    alias: str,
    listing: pinning.Listing,
    read: Read,
    now: datetime,
    *,
    start: Path,
    home: Path | None,
    replacing: bool = False,
) -> list[str]:
    """Pin a listed model as it is, in the nearest `shimmy.lock` from the folder `start` upwards, else in a
    new one there; `home` is the last folder to be looked into. Says what was done, a line each.

    Raises `ModelNotFound`, what `read` does, and `LockError`: where the alias is pinned already to
    something else, unless `replacing`, and for a lock that is broken or cannot be written.
    """
    path = lockfile.find(start, home) or start / NAME
    before = _at(path)
    model = _model(name, listing, before)
    # Before gigabytes are read for a name that no lock can have.
    lockfile.added(before, alias, Pin("x", 1, "0" * 64), replacing=True)
    found = read(name)
    pin = pinning.pin_of(
        {**model, "chat_template": found["chat_template"]},
        found["sha256"],
        listing.get("engine") or None,
        source=pinning.source_of(model),
        locked_at=now.replace(microsecond=0),
    )
    where = os.path.relpath(path, start)
    old = before.models.get(alias)
    if old is not None and _bytes(old) == _bytes(pin):
        return [f"{where} pins {alias} to these bytes already: {_said(pin)}"]
    if old is not None and not replacing:
        raise LockError(
            f"is pinned to {old.file}, sha256 {old.sha256[:12]}…; `--replace` pins {name} in its stead",
            f"models.{alias}",
        )
    try:
        lockfile.write(path, lockfile.added(_at(path), alias, pin, replacing=replacing))
    except OSError as error:
        raise LockError(f"{NAME} cannot be written: {error.strerror}") from None
    lines = [f"{where} pins {alias}: {_said(pin)}"]
    if pin.source is None:
        lines.append(
            "it does not say where others can have the file: `shimmy lock add --source` does"
        )
    return lines


def _at(path: Path) -> Lock:
    return lockfile.read(path) if os.path.lexists(path) else Lock()


def _model(name: str, listing: pinning.Listing, lock: Lock) -> pinning.Listed:
    model = next((m for m in listing["models"] if m["id"] == name), None)
    if model is None:
        hint = f"{name} is a name of {NAME}: `shimmy lock update {name}` pins it again; "
        there = ", ".join(m["id"] for m in listing["models"][:20] if m["kind"] == "model")
        raise ModelNotFound(
            f"{hint if name in lock.models else ''}there is no model {name!r}; there are: {there}",
            param="model",
        )
    if model["kind"] != "model":
        raise ModelNotFound(f"{name} is no model: {model['kind']}", param="model")
    return dict(model)


def _bytes(pin: Pin) -> tuple[Any, ...]:
    return tuple(getattr(pin, name) for name in ("size", "sha256", "parts", "chat_template"))


def _said(pin: Pin) -> str:
    parts = [f"{pin.file}, {pin.size} bytes", f"sha256 {pin.sha256}"]
    parts += [f"and {len(pin.parts)} further files"] if pin.parts else []
    parts += [f"chat template {pin.chat_template[:12]}…"] if pin.chat_template else []
    return ", ".join(parts)
