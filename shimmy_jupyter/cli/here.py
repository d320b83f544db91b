"""What a lock's commands share: the nearest lock, the models that are here with their bytes read, and
names of a lock in front of a request.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from ..config import home, kernel_environment
from ..errors import ModelLoadFailed, ModelNotFound
from ..models import lockfile, pinning
from ..models.lockfile import NAME, Adapter, Lock, LockError, Pin
from ..notebook.display import clean
from .follow import follow, path, said


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """What is wrong with a lock, as the command's error."""
    try:
        yield
    except LockError as error:
        key = f"{NAME}: {error.key}: " if error.key else ""
        raise click.ClickException(f"{key}{clean(error.message)}") from None
    except OSError as error:
        raise click.ClickException(f"{NAME} cannot be written: {error.strerror}") from None


def nearest() -> tuple[Path, Lock]:
    """The lock of this folder, or above it. Raises `ClickException` where there is none."""
    path = lockfile.find(Path(), home())
    if path is None:
        raise click.ClickException(
            f"there is no {NAME} here or in a folder above; `shimmy lock add NAME` begins one"
        )
    return path, lockfile.read(path)


class Here:
    """The models of this machine, as they are listed. `read` and what calls it fill in the SHA-256 of
    those that nobody has read.
    """

    def __init__(self, local: Any) -> None:
        self._local = local
        listing = local.get("shimmy/api/models")
        self.models: list[dict[str, Any]] = listing["models"]
        self.listing: dict[str, Any] = listing
        self.engine: str | None = listing.get("engine")
        self._digests: dict[str, list[str]] = {}

    def model(self, id: str) -> dict[str, Any]:
        """Raises `ModelNotFound`."""
        found = next((model for model in self.models if model["id"] == id), None)
        if found is None:
            names = ", ".join(model["id"] for model in self.models[:20])
            raise ModelNotFound(f"there is no model {id!r}; there are: {names}")
        return found

    def read(self, id: str) -> list[str]:
        """SHA-256 of its files, in order, all bytes read again. Raises `ModelLoadFailed`."""
        if id not in self._digests:
            model = self.model(id)
            job = self._local.post(f"{path(id)}/verify", {})["job"]
            try:
                found = follow(self._local, job)
            except ModelLoadFailed as error:
                raise ModelLoadFailed(f"{id}: {error.message}") from None
            self._digests[id] = found["sha256"]
            model |= {"sha256": found["sha256"][0], "chat_template": found["chat_template"]}
        return self._digests[id]

    def digests(self, id: str) -> list[str]:
        """As they are remembered, where they are."""
        model = self.model(id)
        known = model["sha256"] is not None and model["files"] == 1
        return [model["sha256"]] if known else self.read(id)

    def find(self, pin: Pin, alias: str) -> dict[str, Any]:
        """The model with the pinned bytes. Raises `ModelNotFound`, and `ModelLoadFailed` for one that
        may have them and cannot be read.
        """
        while self.model(id := pinning.located(pin, alias, self.models))["sha256"] is None:
            self.read(id)
        return self.model(id)

    def adapter(self, adapter: Adapter, alias: str) -> Adapter:
        """As it is here: what has its name, where none has its bytes. Raises `ModelNotFound`."""
        named = any((m["id"], m["kind"]) == (adapter.name, "lora") for m in self.models)
        if named:
            self.digests(adapter.name)
        try:
            pinning.located_adapter(adapter, alias, self.models)
        except ModelNotFound:
            if not named:
                raise
            return replace(adapter, sha256=self.digests(adapter.name)[0])
        return adapter


def addressed(local: Any, body: dict[str, Any], profile: str | None) -> dict[str, Any]:
    """A request, with what is pinned where its model is a name of the nearest lock."""
    locks = pinning.Locks(Path, home(), profile or kernel_environment().profile)
    looks: list[Here] = []

    def listed() -> dict[str, Any]:
        if not looks:
            looks.append(Here(local))
        return looks[0].listing

    with one_line():
        found = locks.pinned(body["model"], listed) if "model" in body else None
        if found is not None:
            # Here, with a line that says how far it is; and then another may be the one.
            looks[0].find(found.pin, found.alias)
            found = locks.pinned(found.alias, listed)
    if found is None:
        if profile is not None:
            raise click.UsageError(f"--profile is for a --model that {NAME} has")
        return body
    said(f"{found.fields['model']}: {found.note}")
    for warning in found.warnings:
        said(warning)
    return pinning.merged(body, found.fields)
