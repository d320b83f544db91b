"""A model from its first request to when its memory is free again."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from ..types import Failure
from .jobs import Progress, Report, settled
from .sources import Found
from .vetting import Vetted

log = logging.getLogger("shimmy_jupyter.models")


class Resident(Protocol):
    """What a loader gives back. `context_size` is the most tokens of one request; `failure` says why it
    can answer no more, if so; `active` counts what it is doing for anybody. `memory_bytes` is what it
    takes, more or less, `mapped_bytes` of them its file's, which the system counts as available.
    """

    @property
    def context_size(self) -> int: ...
    @property
    def failure(self) -> Failure | None: ...
    @property
    def active(self) -> int: ...
    @property
    def memory_bytes(self) -> int: ...
    @property
    def mapped_bytes(self) -> int: ...

    async def use_adapter(self, path: str) -> None: ...
    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """`state`: available, probing, loading, loaded, unloading, failed or quarantined (then `error`
    says why). `context_size` is that of the engine while it is loaded.
    """

    file: Found
    state: str
    error: str | None = None
    context_size: int | None = None


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """A LoRA adapter as it was when it was loaded, or as it is while it is."""

    stamp: object
    digest: str
    loading: asyncio.Task[None]
    """Goes on without whoever asked first."""


M = TypeVar("M", bound=Resident)


class Entry(Generic[M]):
    """`task` loads it; the rest says how far that is, and who has it in use."""

    def __init__(self, found: Found, now: float) -> None:
        self.found = found
        self.task: asyncio.Task[M]
        self.vetted: Vetted | None = None
        self.progress = Progress("waiting")
        self.listeners: list[Report] = []
        self.waiting = 0
        self.users = 0
        """Requests that have the model in their hands and may not have begun yet."""
        self.used = now
        self.gone = asyncio.Event()
        self.adapters: dict[Path, LoadedAdapter] = {}
        self.closing = False

    def report(self, progress: Progress) -> None:
        self.progress = progress
        for listener in tuple(self.listeners):
            listener(progress)

    @property
    def model(self) -> M | None:
        """None while it is loading, and where that failed."""
        task = self.task
        if not task.done() or task.cancelled() or task.exception():
            return None
        return task.result()

    @property
    def busy(self) -> bool:
        model = self.model
        return self.users > 0 or self.waiting > 0 or (model is not None and model.active > 0)


def status_of(found: Found, entry: Entry[M]) -> ModelStatus:
    model = entry.model
    if model is None:
        state = "probing" if entry.progress.message.startswith("probing") else "loading"
        return ModelStatus(found, state)
    if model.failure is not None:
        return ModelStatus(found, "failed", model.failure.message)
    return ModelStatus(found, "loaded", context_size=model.context_size)


async def closed(model: Resident) -> None:
    """Free its memory, whoever gives up meanwhile."""
    task = asyncio.create_task(model.close())
    stopped = await settled(task)
    if (error := task.exception()) is not None:
        log.error("a model could not be closed", exc_info=error)
    if stopped:
        raise asyncio.CancelledError
