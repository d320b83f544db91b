"""What belongs to a request beside its model: a LoRA adapter, and the bytes that it pins."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Generic

from ..errors import ModelDrifted, ModelLoadFailed, UnsupportedParameter
from ..offloop import shared
from ..types import PinnedModel
from .catalog import stamp_of
from .jobs import unheard
from .lifecycle import ModelPool
from .resident import Entry, LoadedAdapter, M
from .sources import Found
from .vetting import Vetted, Vetting, own_adapter, unchanged


class Attached(Generic[M]):
    """For models of a pool. Without `vetting` adapters are loaded as they are, and nothing is pinned."""

    def __init__(self, pool: ModelPool[M], vetting: Vetting | None) -> None:
        self._pool, self._vetting = pool, vetting
        # Not the pool's turn: whoever has a model in use must not wait for it.
        self._turn = asyncio.Lock()

    async def adapter(self, id: str, base_id: str) -> Found | None:
        """The adapter that a request names, or the one that came with its model where it names none.
        Raises `ModelNotFound`, and `ModelLoadFailed` for a model with several.
        """
        find = self._pool.catalog.find
        return await find(id) if id else own_adapter(await find(base_id))

    async def use_adapter(self, model: M, base_id: str, id: str) -> Path | None:
        """Load the adapter, once it has been tried out with the model, which is in use. None where
        there is none. Raises `ModelNotFound`, `ModelLoadFailed`.
        """
        found = await self.adapter(id, base_id)
        if found is None:
            return None
        entry = self._pool.entry_of(model)
        async with self._turn:
            if self._vetting is None or entry.vetted is None:
                await model.use_adapter(str(found.path))
            else:
                await self._vetted(self._vetting, entry, entry.vetted, model, found)
        return found.path

    async def _vetted(
        self, vetting: Vetting, entry: Entry[M], base: Vetted, model: M, found: Found
    ) -> None:
        look = self._pool.look
        stamp = await look(lambda _: stamp_of(found))
        known = entry.adapters.get(found.path)
        if known is None:
            digest = await look(lambda stopped: vetting.adapter(base, found, unheard, stopped))
            loading = asyncio.create_task(self._load(entry, model, found, stamp))
            loading.add_done_callback(lambda done: done.cancelled() or done.exception())
            known = entry.adapters[found.path] = LoadedAdapter(stamp, digest, loading)
        elif known.stamp != stamp:
            name = base.found.id
            raise ModelLoadFailed(f"{found.id} has changed since it was loaded: unload {name}")
        await shared(known.loading)

    async def _load(self, entry: Entry[M], model: M, found: Found, stamp: object) -> None:
        try:
            await model.use_adapter(str(found.path))
        except BaseException:
            del entry.adapters[found.path]  # it may go better another time
            raise
        # Should it have changed it is refused until its model is unloaded, and it with that.
        if await self._pool.look(lambda _: stamp_of(found)) != stamp:
            raise ModelLoadFailed(f"{found.id} was changed while it was loaded")

    async def hold(self, id: str, adapter: str, pin: PinnedModel) -> None:
        """See to it that what is on the disk is what a request pins, before it is loaded. Raises
        `ModelDrifted` with every difference, `ModelNotFound`, `ModelLoadFailed`.
        """
        vetting = self._vetting
        if vetting is None:
            raise UnsupportedParameter("models are not verified here", param="pin")
        found, other = await self._pool.catalog.find(id), await self.adapter(adapter, id)
        drifts = await self._pool.look(
            lambda stopped: vetting.differences(found, other, pin, stopped)
        )
        if drifts:
            said = "; ".join(map(str, drifts))
            raise ModelDrifted(f"{id} is not what is pinned: {said}", param="pin")

    async def hold_loaded(self, model: M, adapter: Path | None, pin: PinnedModel) -> None:
        """The same of what was loaded, which is in use: a file may have been replaced since, or just
        before. Raises `ModelDrifted`.
        """
        entry = self._pool.entry_of(model)
        digests = await self._digests(entry)
        beside = entry.adapters[adapter].digest if adapter is not None else None
        if (digests, beside) != ((pin.sha256, *pin.parts), pin.adapter):
            raise self._another(entry)

    async def _digests(self, entry: Entry[M]) -> tuple[str, ...]:
        """SHA-256 of the files that a model was loaded from."""
        vetted, vetting = entry.vetted, self._vetting
        assert vetted is not None
        assert vetting is not None
        if not vetted.digests:
            found = vetted.found
            read = await self._pool.look(lambda stopped: vetting.digests(found, unheard, stopped))
            before = vetted
            if not await self._pool.look(lambda _: unchanged(before)):
                raise self._another(entry)
            entry.vetted = vetted = replace(vetted, digests=read)
        return vetted.digests

    def _another(self, entry: Entry[M]) -> ModelDrifted:
        return ModelDrifted(
            f"{entry.found.id} in memory is not what is pinned, and another than the file that is "
            "there now: unload it",
            param="pin",
        )
