"""Which models are in memory. A request for one that is loading waits for it; the model that was
asked for is the one that answers, always.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from ..errors import EngineCrashed, ModelLoadFailed, ModelNotFound, ShimmyError, ShuttingDown
from ..types import Failure
from .catalog import ModelFile
from .quarantine import Quarantine

log = logging.getLogger("shimmy_jupyter.models")


class Resident(Protocol):
    """What a loader gives back. `failure` says why it can answer no more, if so."""

    @property
    def failure(self) -> Failure | None: ...

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """`state`: available, loading, loaded, failed or quarantined (then `error` says why)."""

    file: ModelFile
    state: str
    error: str | None = None


M = TypeVar("M", bound=Resident)
_NAMED = 20


class ModelPool(Generic[M]):
    """Loads each file once, on first use, and keeps it until `close` or until it fails."""

    def __init__(
        self,
        catalog: Callable[[], Sequence[ModelFile]],
        loader: Callable[[ModelFile], Awaitable[M]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._catalog = catalog
        self._loader = loader
        self._files: dict[str, ModelFile] | None = None
        # By path and not by id: a file that takes over a name is another model.
        self._loads: dict[Path, asyncio.Task[M]] = {}
        self._errors: dict[Path, str] = {}
        self._quarantine = Quarantine(clock)
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
            names = [*files][:_NAMED] + ["…"] * (len(files) > _NAMED)
            raise ModelNotFound(f"there is no model {id!r}; there are: {', '.join(names)}")
        return files[id]

    async def get(self, id: str) -> M:
        """The loaded model. Raises `ModelNotFound` or `ModelLoadFailed`.

        A caller that gives up does not stop the load that others may be waiting for. A model
        whose engine has failed is loaded again, unless it keeps doing so.
        """
        file = await self.find(id)
        if self._closed:
            raise ShuttingDown("the server is shutting down")
        await self._drop_failed(file.path)
        task = self._loads.get(file.path)
        if task is None:
            if reason := self._quarantine.reason(file.path):
                raise ModelLoadFailed(f"{file.id} is quarantined: {reason}")
            task = self._loads[file.path] = asyncio.create_task(self._load(file))
        return await asyncio.shield(task)

    async def _load(self, file: ModelFile) -> M:
        log.info("loading model %s", file.id)
        self._errors.pop(file.path, None)
        try:
            return await self._loader(file)
        except ShimmyError as error:
            if isinstance(error, EngineCrashed):
                self._quarantine.record(file.path, error.message)
            self._errors[file.path] = error.message
            del self._loads[file.path]
            raise ModelLoadFailed(f"{file.id}: {error.message}") from error
        except BaseException:
            del self._loads[file.path]
            raise

    async def _drop_failed(self, path: Path) -> None:
        model = self._resident(path)
        if model is not None and model.failure is not None:
            log.warning("loading a model again whose engine had ended: %s", model.failure.message)
            del self._loads[path]
            if model.failure.code == EngineCrashed.code:
                self._quarantine.record(path, model.failure.message)
            await model.close()

    def _resident(self, path: Path) -> M | None:
        task = self._loads.get(path)
        if task is None or not task.done() or task.cancelled() or task.exception():
            return None
        return task.result()

    def loaded(self) -> list[M]:
        return [model for path in self._loads if (model := self._resident(path)) is not None]

    async def status(self) -> list[ModelStatus]:
        return [self.status_of(file) for file in (await self.files()).values()]

    def status_of(self, file: ModelFile) -> ModelStatus:
        model = self._resident(file.path)
        if model is not None:
            failure = model.failure
            if failure is None:
                return ModelStatus(file, "loaded")
            return ModelStatus(file, "failed", failure.message)
        if file.path in self._loads:
            return ModelStatus(file, "loading")
        if reason := self._quarantine.reason(file.path):
            return ModelStatus(file, "quarantined", reason)
        error = self._errors.get(file.path)
        return ModelStatus(file, "failed" if error else "available", error)

    async def close(self) -> None:
        """Free every model. A load in progress is waited for: nothing can interrupt it."""
        self._closed = True
        results = await asyncio.gather(*self._loads.values(), return_exceptions=True)
        for model in results:
            if not isinstance(model, BaseException):
                await model.close()
        self._loads.clear()
