"""Which models are in memory. A request for one that is loading waits for it; the model that was
asked for is the one that answers, always.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any, Generic, TypeVar

from ..errors import (
    EngineCrashed,
    EngineLost,
    ModelLoadFailed,
    NotEnoughMemory,
    RequestError,
    ShimmyError,
    ShuttingDown,
)
from ..offloop import in_turns, shared
from .catalog import Catalog
from .jobs import Progress, Report, Stopped, asked_to_stop, in_thread, settled, unheard
from .quarantine import Quarantine
from .residency import Held, leaving, unused
from .resident import Entry, M, ModelStatus, closed, status_of
from .sources import Found
from .vetting import Vetted, Vetting, unchanged

log = logging.getLogger("shimmy_jupyter.models")

_POLL = 0.05
"""Seconds between two looks at whether a model is still in use."""
_LOADING = Progress("loading")
_LOOKS = 4
"""Models whose headers and bytes are read at a time."""
T = TypeVar("T")


class ModelPool(Generic[M]):
    """Loads each file on first use, and keeps it until its room is needed, nobody has used it for
    `idle_unload` seconds (0: however long), or it fails.

    `budget` is the most bytes of all models together, 0 where only the machine's memory counts.
    Without `vetting` files are loaded as they are.
    """

    def __init__(
        self,
        catalog: Catalog,
        loader: Callable[[Found], Coroutine[Any, Any, M]],
        *,
        vetting: Vetting | None = None,
        budget: int = 0,
        idle_unload: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.catalog = catalog
        self.vetting = vetting
        self._loader = loader
        self._budget, self._idle_unload = budget, idle_unload
        self._clock = clock
        # By path: a file that takes over a name is another model.
        self._entries: dict[Path, Entry[M]] = {}
        self._leaving: dict[Path, Entry[M]] = {}
        self._loads: set[asyncio.Task[M]] = set()
        self._errors: dict[Path, tuple[int, int, str]] = {}
        self._quarantine = Quarantine(clock)
        self._turn = asyncio.Lock()
        """Held by the load that takes memory, one at a time, those that came first before others. It
        waits for models to be out of use: whoever has one in use must not wait for it.
        """
        self._looks = asyncio.Semaphore(_LOOKS)
        self._sweeper: asyncio.Task[None] | None = None
        self._closed = False

    # Using

    @contextlib.asynccontextmanager
    async def use(
        self, id: str, report: Report = unheard, *, abandon: bool = False
    ) -> AsyncIterator[M]:
        """The loaded model, which stays in memory until the block is left, and while it is active.

        Raises `ModelNotFound` or `ModelLoadFailed`. A caller that gives up does not stop the load,
        unless it is to `abandon` it and nobody else waits. A model whose engine has failed is loaded
        again, unless it keeps doing so.
        """
        entry, model = await self._got(id, report, abandon=abandon)
        try:
            yield model
        finally:
            entry.users -= 1
            entry.used = self._clock()

    async def _got(self, id: str, report: Report, *, abandon: bool) -> tuple[Entry[M], M]:
        while True:
            entry = await self._wanted(id)
            entry.waiting += 1
            entry.listeners.append(report)
            report(entry.progress)
            try:
                model = await shared(entry.task)
            except asyncio.CancelledError:
                if not asked_to_stop():
                    continue  # it is the load that was stopped
                if abandon and entry.waiting == 1 and not entry.task.done():
                    # Who asks from now on has it loaded anew.
                    self._forget(entry)
                    entry.task.cancel()
                    await settled(entry.task)
                raise
            finally:
                entry.waiting -= 1
                entry.listeners.remove(report)
            entry.users += 1
            return entry, model

    async def resident(self, id: str) -> M:
        """The loaded model, which may leave memory as soon as its room is needed."""
        async with self.use(id) as model:
            return model

    async def look(self, work: Callable[[Stopped], T]) -> T:
        """What blocking work with files returns; so many at a time."""
        async with self._looks:
            return await in_thread(work)

    def entry_of(self, model: M) -> Entry[M]:
        """Of a model that is in use. Raises `EngineLost` where it is gone."""
        entries = (*self._entries.values(), *self._leaving.values())
        found = next((entry for entry in entries if entry.model is model), None)
        if found is None:
            raise EngineLost("the model has been unloaded")
        return found

    # Loading

    async def _wanted(self, id: str) -> Entry[M]:
        found = await self.catalog.find(id)
        path = found.path
        await self._drop_failed(path)
        if self._closed:
            raise ShuttingDown("the server is shutting down")
        entry = self._entries.get(path)
        if entry is None:
            if reason := self._quarantine.reason(path):
                raise ModelLoadFailed(f"{found.id} is quarantined: {reason}")
            entry = self._entries[path] = Entry(found, self._clock())
            entry.task = asyncio.create_task(self._load(entry))
            self._loads.add(entry.task)
            entry.task.add_done_callback(self._ended)
            if self._idle_unload and self._sweeper is None:
                self._sweeper = asyncio.create_task(self._sweep())
        return entry

    def _ended(self, load: asyncio.Task[M]) -> None:
        self._loads.discard(load)
        if not load.cancelled():
            load.exception()  # who asked may be gone when it fails

    async def _load(self, entry: Entry[M]) -> M:
        found = entry.found
        self._errors.pop(found.path, None)
        try:
            if before := self._leaving.get(found.path):
                entry.report(Progress("waiting until it has been unloaded"))
                await before.gone.wait()
            return await self._vetted_load(entry)
        except ShimmyError as error:
            if isinstance(error, EngineCrashed):
                self._quarantine.record(found.path, error.message)
            self._forget(entry)
            if isinstance(error, NotEnoughMemory):  # of the moment
                raise NotEnoughMemory(f"{found.id}: {error.message}") from error
            if isinstance(error, RequestError):
                raise type(error)(f"{found.id}: {error.message}", param=error.param) from error
            self._errors[found.path] = found.size_bytes, found.created, error.message
            raise ModelLoadFailed(f"{found.id}: {error.message}") from error
        except BaseException:
            self._forget(entry)
            raise

    def _forget(self, entry: Entry[M]) -> None:
        if self._entries.get(entry.found.path) is entry:
            del self._entries[entry.found.path]

    async def _vetted_load(self, entry: Entry[M]) -> M:
        found, vetting = entry.found, self.vetting
        if vetting is None:
            async with self._turn:
                return await self._native(entry)
        entry.report(Progress("checking"))
        vetted = await self.look(
            lambda stopped: vetting.look(found, entry.report, stopped, self.freeable)
        )
        entry.vetted = vetted
        entry.report(Progress("waiting for memory"))
        async with self._turn:
            await self._make_room(vetted, vetting)
            await in_thread(lambda stopped: vetting.try_out(vetted, entry.report, stopped))
            model = await self._native(entry)
        try:
            same = await in_thread(lambda _: unchanged(vetted))
        except BaseException:
            await closed(model)
            raise
        if not same:
            await closed(model)
            raise ModelLoadFailed("its file was changed while it was loaded; try again")
        return model

    async def _native(self, entry: Entry[M]) -> M:
        """Nothing can interrupt it: who gives up meanwhile waits for its end."""
        log.info("loading model %s", entry.found.id)
        entry.report(_LOADING)
        task = asyncio.create_task(self._loader(entry.found))
        if await settled(task):
            if not task.cancelled() and task.exception() is None:
                await closed(task.result())
            raise asyncio.CancelledError
        entry.used = self._clock()
        return task.result()

    # Leaving

    @contextlib.asynccontextmanager
    async def memory_turn(self) -> AsyncIterator[None]:
        """No model takes memory meanwhile; what asks for it waits."""
        async with self._turn:
            yield

    @property
    def freeable(self) -> int:
        """Bytes that would be available, beside those that are, if every model were unloaded."""
        return sum(model.memory_bytes - model.mapped_bytes for model in self.loaded())

    def _held(self) -> list[Held[Path]]:
        return [
            Held(path, entry.model.memory_bytes, entry.used, entry.busy)
            for path, entry in self._entries.items()
            if entry.model is not None
        ]

    async def _make_room(self, vetted: Vetted, vetting: Vetting) -> None:
        """Unload what has to go for it; what is in use is waited for. Raises `NotEnoughMemory` where
        not even all of it would be enough.
        """
        if self._budget and vetted.needed > self._budget:
            raise NotEnoughMemory(
                f"it needs {vetted.needed / 1e9:.1f} GB, and ShimmyModels.memory_budget is "
                f"{self._budget / 1e9:.1f} GB"
            )
        while True:
            going = next(iter(self._leaving.values()), None)
            missing = await self._missing(vetted, vetting)
            if not missing:
                return
            if going is not None:  # it may be enough, and was counted
                await going.gone.wait()
                continue
            if (chosen := leaving(self._held(), missing)) is None:
                fit = await asyncio.to_thread(vetting.fit, vetted.facts)
                raise NotEnoughMemory(f"it {fit.message}")
            for path in chosen:
                log.info("unloading a model to make room for %s", vetted.found.id)
                if entry := self._entries.get(path):
                    await self._unload(entry)

    async def _missing(self, vetted: Vetted, vetting: Vetting) -> int:
        mapped = sum(model.mapped_bytes for model in self.loaded())
        missing = await asyncio.to_thread(vetting.shortfall, vetted, mapped)
        if self._budget:
            taken = sum(model.memory_bytes for model in self.loaded())
            missing = max(missing, taken + vetted.needed - self._budget)
        return missing

    async def unload(self, id: str, report: Report = unheard) -> bool:
        """Free a model's memory once nobody uses it; those who ask for it meanwhile wait, and have it
        loaded again. Whether there was anything to free. Raises `ModelNotFound`.

        Who gives up leaves the model as it was, unless somebody waits for it to be loaded again.
        """
        found = await self.catalog.find(id)
        entry = self._entries.get(found.path)
        if entry is None:
            going = self._leaving.get(found.path)
            if going is not None:
                report(Progress("waiting until nobody uses it"))
                await going.gone.wait()
            return going is not None
        report(Progress("waiting until it is loaded"))
        await asyncio.wait([entry.task])
        if entry.model is None:  # it failed
            return False
        report(Progress("waiting until nobody uses it"))
        await self._unload(entry)
        return True

    async def _unload(self, entry: Entry[M]) -> None:
        path = entry.found.path
        if self._entries.get(path) is not entry or entry.model is None:
            return
        self._leaving[path] = self._entries.pop(path)
        drain = asyncio.create_task(self._drain(entry, entry.model))
        try:
            await asyncio.shield(drain)
        except asyncio.CancelledError:
            if not entry.closing:
                drain.cancel()
            raise

    async def _drain(self, entry: Entry[M], model: M) -> None:
        """A task of the pool's own, so that nobody's patience ends it. To cancel it puts the model
        back, unless somebody waits for it to be loaded again.
        """
        path = entry.found.path
        while entry.busy and model.failure is None and not self._closed:
            try:
                await asyncio.sleep(_POLL)
            except asyncio.CancelledError:
                if path not in self._entries and not self._closed:
                    self._entries[path] = self._leaving.pop(path)
                    raise
        entry.closing = True
        try:
            await closed(model)
        finally:
            del self._leaving[path]
            entry.gone.set()
        log.info("unloaded model %s", entry.found.id)

    async def _sweep(self) -> None:
        """Unloads what nobody has used for long."""
        while True:
            await asyncio.sleep(min(30.0, self._idle_unload / 4))
            now = self._clock()
            for entry in self._entries.values():
                if entry.busy:
                    entry.used = now
            for path in unused(self._held(), now, self._idle_unload):
                if (held := self._entries.get(path)) and not held.busy:
                    await self._unload(held)

    async def _drop_failed(self, path: Path) -> None:
        entry = self._entries.get(path)
        if entry and (model := entry.model) and model.failure:
            log.warning("loading a model again whose engine had ended: %s", model.failure.message)
            del self._entries[path]
            if model.failure.code == EngineCrashed.code:
                self._quarantine.record(path, model.failure.message)
            await closed(model)

    # Looking

    def loaded(self) -> list[M]:
        entries = [*self._entries.values(), *self._leaving.values()]
        return [entry.model for entry in entries if entry.model is not None]

    async def status(self) -> list[ModelStatus]:
        models = (await self.catalog.models()).values()
        return [self.status_of(found) async for found in in_turns(models)]

    def status_of(self, found: Found) -> ModelStatus:
        if (entry := self._entries.get(found.path)) is not None:
            return status_of(found, entry)
        if found.path in self._leaving:
            return ModelStatus(found, "unloading")
        if reason := self._quarantine.reason(found.path):
            return ModelStatus(found, "quarantined", reason)
        error = found.problem
        if (said := self._errors.get(found.path)) and said[:2] == (found.size_bytes, found.created):
            error = said[2]
        return ModelStatus(found, "failed" if error else "available", error)

    def begin_close(self) -> None:
        """Nothing is loaded from now on, and nobody's use of a model is waited for."""
        self._closed = True

    async def close(self) -> None:
        """Free every model. A load in progress is stopped, or waited for where nothing can stop it."""
        self.begin_close()
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.gather(self._sweeper, return_exceptions=True)
        for load in tuple(self._loads):
            load.cancel()
        await asyncio.gather(*self._loads, return_exceptions=True)
        # A load that was making room has put back what it was unloading.
        while self._entries:
            _, entry = self._entries.popitem()
            if entry.model is not None:
                await closed(entry.model)
        for going in tuple(self._leaving.values()):
            await going.gone.wait()
        await self.catalog.close()
