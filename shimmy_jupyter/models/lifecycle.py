"""Which models are in memory. A request for one that is loading waits for it; the model that was
asked for is the one that answers, always.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Generic

from ..errors import EngineCrashed, ModelLoadFailed, ShimmyError, ShuttingDown
from .catalog import Catalog
from .jobs import Progress, Report, in_thread, unheard
from .quarantine import Quarantine
from .residency import Held, leaving, unused
from .resident import Entry, M, ModelStatus, status_of
from .sources import Found
from .vetting import Vetted, Vetting, unchanged

log = logging.getLogger("shimmy_jupyter.models")

_POLL = 0.05
"""Seconds between two looks at whether a model that is to go is still in use."""
_LOADING = Progress("loading")


class ModelPool(Generic[M]):
    """Loads each file on first use, and keeps it until its room is needed, nobody has used it for
    `idle_unload` seconds (0: however long), or it fails.

    `budget` is the most bytes of all models together, 0 where only the machine's memory counts.
    Without `vetting` files are loaded as they are.
    """

    def __init__(
        self,
        catalog: Catalog,
        loader: Callable[[Found], Awaitable[M]],
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
        # By path and not by id: a file that takes over a name is another model.
        self._entries: dict[Path, Entry[M]] = {}
        self._leaving: dict[Path, Entry[M]] = {}
        self._errors: dict[Path, str] = {}
        self._quarantine = Quarantine(clock)
        self._turn = asyncio.Lock()
        """Held by the load that takes memory: one at a time, those that came first before others."""
        self._sweeper: asyncio.Task[None] | None = None
        self._closed = False

    @contextlib.asynccontextmanager
    async def use(
        self, id: str, report: Report = unheard, *, abandon: bool = False
    ) -> AsyncIterator[M]:
        """The loaded model, which stays in memory until the block is left, and while it is active.

        Raises `ModelNotFound` or `ModelLoadFailed`. A caller that gives up does not stop the load,
        unless it is to `abandon` it and nobody else waits. A model whose engine has failed is loaded
        again, unless it keeps doing so.
        """
        entry = await self._wanted(id)
        entry.waiting += 1
        entry.listeners.append(report)
        report(entry.progress)
        try:
            model = await asyncio.shield(entry.task)
            entry.users += 1
        except asyncio.CancelledError:
            if abandon and entry.waiting == 1 and not entry.task.done():
                entry.task.cancel()
                await asyncio.wait([entry.task])
            raise
        finally:
            entry.waiting -= 1
            entry.listeners.remove(report)
        try:
            yield model
        finally:
            entry.users -= 1
            entry.used = self._clock()

    async def resident(self, id: str) -> M:
        """The loaded model, which may leave memory as soon as its room is needed."""
        async with self.use(id) as model:
            return model

    async def adapter(self, base_id: str, id: str) -> Path | None:
        """The file of a LoRA adapter, once it has been tried out with a model that is loaded; of one that
        came with the model where `id` is "". None where there is none. Raises `ModelNotFound`,
        `ModelLoadFailed`.
        """
        base = await self.catalog.find(base_id)
        if id:
            found = await self.catalog.find(id)
        elif not base.adapters:
            return None
        elif len(base.adapters) > 1:
            raise ModelLoadFailed(f"{base_id} has {len(base.adapters)} adapters; one can be used")
        else:
            (own,) = base.adapters
            found = replace(base, id=f"{base_id}'s adapter", path=own, parts=(own,), kind="adapter")
            found = replace(found, expected_sha256=None, problem=None, adapters=())
        entry, vetting = self._entries.get(base.path), self.vetting
        if vetting is None or entry is None or entry.vetted is None or found.path in entry.adapters:
            return found.path
        vetted = entry.vetted
        async with self._turn:
            await in_thread(lambda stopped: vetting.adapter(vetted, found, unheard, stopped))
        entry.adapters.add(found.path)
        return found.path

    async def _wanted(self, id: str) -> Entry[M]:
        found = await self.catalog.find(id)
        if self._closed:
            raise ShuttingDown("the server is shutting down")
        path = found.path
        await self._drop_failed(path)
        entry = self._entries.get(path)
        if entry is None:
            if reason := self._quarantine.reason(path):
                raise ModelLoadFailed(f"{found.id} is quarantined: {reason}")
            entry = self._entries[path] = Entry(found, self._clock())
            entry.task = asyncio.create_task(self._load(entry))
            # Who asked may be gone when it fails.
            entry.task.add_done_callback(lambda task: task.cancelled() or task.exception())
            if self._idle_unload and self._sweeper is None:
                self._sweeper = asyncio.create_task(self._sweep())
        return entry

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
            self._errors[found.path] = error.message
            self._forget(entry)
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
        vetted = await in_thread(
            lambda stopped: vetting.look(found, entry.report, stopped, self.freeable)
        )
        entry.vetted = vetted
        entry.report(Progress("waiting for memory"))
        async with self._turn:
            await self._make_room(vetted, vetting)
            await in_thread(lambda stopped: vetting.try_out(vetted, entry.report, stopped))
            model = await self._native(entry)
        if not await asyncio.to_thread(unchanged, vetted):
            await model.close()
            raise ModelLoadFailed("its file was changed while it was loaded; try again")
        return model

    async def _native(self, entry: Entry[M]) -> M:
        """Nothing can interrupt it: whoever gives up meanwhile waits for its end."""
        log.info("loading model %s", entry.found.id)
        entry.report(_LOADING)
        task = asyncio.ensure_future(self._loader(entry.found))
        try:
            model = await asyncio.shield(task)
        except asyncio.CancelledError:
            await asyncio.wait([task])
            if not task.cancelled() and task.exception() is None:
                await task.result().close()
            raise
        entry.used = self._clock()
        return model

    @contextlib.asynccontextmanager
    async def memory_turn(self) -> AsyncIterator[None]:
        """No model takes memory meanwhile; what asks for it waits."""
        async with self._turn:
            yield

    # Leaving

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
        """Unload what has to go for it; what is in use is waited for. Raises `ModelLoadFailed` where
        not even all of it would be enough.
        """
        held = self._held()
        mapped = sum(model.mapped_bytes for model in self.loaded())
        missing = await asyncio.to_thread(vetting.shortfall, vetted, mapped)
        if self._budget:
            taken = sum(one.size_bytes for one in held)
            missing = max(missing, taken + vetted.needed - self._budget)
            if vetted.needed > self._budget:
                raise ModelLoadFailed(
                    f"it needs {vetted.needed / 1e9:.1f} GB, and ShimmyModels.memory_budget is "
                    f"{self._budget / 1e9:.1f} GB"
                )
        chosen = leaving(held, missing)
        if chosen is None:
            fit = await asyncio.to_thread(vetting.fit, vetted.facts)
            raise ModelLoadFailed(f"it {fit.message}")
        for path in chosen:
            log.info("unloading a model to make room for %s", vetted.found.id)
            if entry := self._entries.get(path):
                await self._unload(entry)

    async def unload(self, id: str, report: Report = unheard) -> bool:
        """Free a model's memory once nobody uses it; those who ask for it meanwhile wait, and have it
        loaded again. Whether there was anything to free. Raises `ModelNotFound`.

        Who gives up leaves the model as it was, unless somebody waits for it to be loaded again.
        """
        found = await self.catalog.find(id)
        entry = self._entries.get(found.path)
        if entry is None:
            return False
        with contextlib.suppress(ShimmyError):  # a load that failed has nothing to free
            report(Progress("waiting until it is loaded"))
            await asyncio.shield(entry.task)
            report(Progress("waiting until nobody uses it"))
            await self._unload(entry)
            return True
        return False

    async def _unload(self, entry: Entry[M]) -> None:
        path, model = entry.found.path, entry.model
        if self._entries.get(path) is not entry or model is None:
            return
        self._leaving[path] = self._entries.pop(path)
        while entry.busy and not self._closed:
            try:
                await asyncio.sleep(_POLL)
            except asyncio.CancelledError:
                if path not in self._entries:
                    self._entries[path] = self._leaving.pop(path)
                    raise
        try:
            await model.close()
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
                held = self._entries.get(path)
                if held is not None and not held.busy:
                    await self._unload(held)

    async def _drop_failed(self, path: Path) -> None:
        entry = self._entries.get(path)
        model = entry.model if entry is not None else None
        if model is not None and model.failure is not None:
            log.warning("loading a model again whose engine had ended: %s", model.failure.message)
            del self._entries[path]
            if model.failure.code == EngineCrashed.code:
                self._quarantine.record(path, model.failure.message)
            await model.close()

    # Looking

    def loaded(self) -> list[M]:
        entries = [*self._entries.values(), *self._leaving.values()]
        return [entry.model for entry in entries if entry.model is not None]

    async def status(self) -> list[ModelStatus]:
        return [self.status_of(found) for found in (await self.catalog.models()).values()]

    def status_of(self, found: Found) -> ModelStatus:
        if (entry := self._entries.get(found.path)) is not None:
            return status_of(found, entry)
        if (entry := self._leaving.get(found.path)) is not None:
            return ModelStatus(found, "unloading", vetted=entry.vetted)
        if reason := self._quarantine.reason(found.path):
            return ModelStatus(found, "quarantined", reason)
        error = self._errors.get(found.path) or found.problem
        return ModelStatus(found, "failed" if error else "available", error)

    async def close(self) -> None:
        """Free every model. A load in progress is stopped, or waited for where nothing can stop it."""
        self._closed = True
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.gather(self._sweeper, return_exceptions=True)
        loads = [entry.task for entry in self._entries.values()]
        for load in loads:
            load.cancel()
        await asyncio.gather(*loads, return_exceptions=True)
        # A load that was making room has put back what it was unloading.
        for entry in self._entries.values():
            if entry.model is not None:
                await entry.model.close()
        self._entries.clear()
        for leaving_entry in tuple(self._leaving.values()):
            await leaving_entry.gone.wait()
        await self.catalog.close()
