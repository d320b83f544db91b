"""Which models are in memory. A request for one that is loading waits for it; the model that was
asked for is the one that answers, always.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from ..errors import ModelLoadFailed, ModelNotFound, ShimmyError, ShuttingDown
from .catalog import ModelFile

log = logging.getLogger("shimmy_jupyter.models")


class Resident(Protocol):
    """What a loader gives back."""

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """`state`: available, loading, loaded or failed (then `error` says why)."""

    file: ModelFile
    state: str
    error: str | None = None


M = TypeVar("M", bound=Resident)


class ModelPool(Generic[M]):
    """Loads each model once, on first use, and keeps it until `close`."""

    def __init__(
        self,
        catalog: Callable[[], Sequence[ModelFile]],
        loader: Callable[[ModelFile], Awaitable[M]],
    ) -> None:
        self._catalog = catalog
        self._loader = loader
        self._files: dict[str, ModelFile] | None = None
        self._loads: dict[str, asyncio.Task[M]] = {}
        self._errors: dict[str, str] = {}
        self._closed = False

    async def files(self) -> dict[str, ModelFile]:
        """The catalogue by id, read once, off the event loop."""
        if self._files is None:
            found = await asyncio.to_thread(self._catalog)
            self._files = {file.id: file for file in found}
        return self._files

    async def find(self, id: str) -> ModelFile:
        """Raises `ModelNotFound`. Looks at the disk again before it says so."""
        if id not in await self.files():
            self._files = None
        files = await self.files()
        if id not in files:
            raise ModelNotFound(f"there is no model {id!r}; there are: {', '.join(files)}")
        return files[id]

    async def get(self, id: str) -> M:
        """The loaded model. Raises `ModelNotFound` or `ModelLoadFailed`.

        A caller that gives up does not stop the load that others may be waiting for.
        """
        file = await self.find(id)
        if self._closed:
            raise ShuttingDown("the server is shutting down")
        task = self._loads.get(id)
        if task is None:
            task = self._loads[id] = asyncio.create_task(self._load(file))
        return await asyncio.shield(task)

    async def _load(self, file: ModelFile) -> M:
        log.info("loading model %s", file.id)
        try:
            model = await self._loader(file)
        except ShimmyError as error:
            self._errors[file.id] = error.message
            del self._loads[file.id]
            raise ModelLoadFailed(f"{file.id}: {error.message}") from error
        except BaseException:
            del self._loads[file.id]
            raise
        self._errors.pop(file.id, None)
        return model

    def loaded(self) -> dict[str, M]:
        return {
            id: task.result()
            for id, task in self._loads.items()
            if task.done() and not task.cancelled() and task.exception() is None
        }

    async def status(self) -> list[ModelStatus]:
        return [self.status_of(file) for file in (await self.files()).values()]

    def status_of(self, file: ModelFile) -> ModelStatus:
        task = self._loads.get(file.id)
        if task is not None:
            return ModelStatus(file, "loaded" if task.done() else "loading")
        error = self._errors.get(file.id)
        return ModelStatus(file, "failed" if error else "available", error)

    async def close(self) -> None:
        """Free every model. A load in progress is waited for: nothing can interrupt it."""
        self._closed = True
        results = await asyncio.gather(*self._loads.values(), return_exceptions=True)
        for model in results:
            if not isinstance(model, BaseException):
                await model.close()
        self._loads.clear()
