"""The use-cases of models: what there is, loading and unloading, trying out, downloading. HTTP, kernels
and the command line all come through here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..errors import AccessDenied, ModelDrifted, ModelLoadFailed, UnsupportedParameter
from ..types import PinnedModel, Principal
from .gguf import GgufFacts
from .jobs import Job, Jobs, Progress, Report, Stopped, in_thread
from .lifecycle import ModelPool
from .references import parse
from .resident import ModelStatus
from .sources import SELF_TEST, Found
from .suggest import first, fitting, suggestions
from .vetting import Vetting

if TYPE_CHECKING:  # what opens connections is imported where one is wanted
    from .pull import Puller, PullProgress

log = logging.getLogger("shimmy_jupyter.models")

_PATIENCE = 2.0
"""Seconds for which a list of models waits for headers that nobody has read yet."""
_KINDS = {"adapter": "lora"}


@dataclass(frozen=True, slots=True)
class Described:
    """A model as people look at it. `facts` None: its header is being read, or is wrong, and then the
    status says so.
    """

    status: ModelStatus
    facts: GgufFacts | None
    digests: tuple[str, ...] | None
    fit: dict[str, Any] | None

    def to_json(self) -> dict[str, Any]:
        found, facts = self.status.file, self.facts
        origin = found.origin
        return {
            "id": found.id,
            "state": self.status.state,
            "kind": _KINDS.get(found.kind, found.kind),
            "architecture": facts.architecture if facts else None,
            "quantization": facts.quantisation if facts else None,
            "parameters": facts.parameters if facts else None,
            "context": facts.context_size if facts else None,
            "embedding": facts.kind == "embedding" if facts else None,
            "chat_template": facts.chat_template_sha256 if facts else None,
            "size_bytes": found.size_bytes,
            "files": len(found.parts),
            "sha256": self.digests[0] if self.digests else None,
            "source": found.source,
            "origin": asdict(origin) if origin is not None else None,
            "fit": self.fit,
            "error": self.status.error,
        }


class ModelLibrary:
    """`vetting` None only where nothing real is loaded. `puller` makes what downloads, when it is first
    needed, or raises `AccessDenied` where nobody may. `engine` is its version.
    """

    def __init__(
        self,
        pool: ModelPool[Any],
        vetting: Vetting | None,
        puller: Callable[[], Puller],
        engine: str = "",
    ) -> None:
        self.engine = engine
        self.pool, self.jobs = pool, Jobs()
        self._vetting = vetting
        self._make_puller = puller
        self._reading: asyncio.Task[None] | None = None
        self._wrong: dict[Found, str] = {}
        self._facts: dict[Found, GgufFacts] = {}

    # Looking

    async def describe(self, *, wait: bool = False) -> list[Described]:
        """All models. Headers that nobody has read yet are waited for, for two seconds unless `wait`."""
        await self._read_headers(None if wait else _PATIENCE)
        statuses = await self.pool.status()
        return await asyncio.to_thread(self._describe, statuses)

    async def describe_one(self, id: str) -> Described:
        """Raises `ModelNotFound`."""
        found = await self.pool.catalog.find(id)
        await asyncio.to_thread(self._read, found)
        (described,) = await asyncio.to_thread(self._describe, [self.pool.status_of(found)])
        return described

    async def default(self) -> str:
        """The model that answers where none is named: the first that is listed, chats, and would fit
        into this machine's memory if nothing else were there; else the bundled one. So it does not
        change with what else is running.
        """
        models = tuple((await self.pool.catalog.models()).values())

        def chosen() -> str:
            for found in models:
                self._read(found)
                facts = self._facts.get(found)
                if found.kind == "model" and facts is not None and self._chats(facts):
                    return found.id
            return models[-1].id if self._vetting is None else SELF_TEST

        return await asyncio.to_thread(chosen)

    def _chats(self, facts: GgufFacts) -> bool:
        if facts.kind != "model" or facts.chat_template is None or self._vetting is None:
            return False
        return self._vetting.fit(facts, self._vetting.capacity).ok

    async def suggestions(self, task: str | None = None) -> dict[str, Any]:
        """What is worth downloading that fits into this machine, as JSON. Raises `InvalidValue` for a
        task that there is none for.
        """
        room = 0 if self._vetting is None else self._vetting.room
        chosen = fitting(room, task)
        models = await self.pool.catalog.models()
        here = {found.origin.name for found in models.values() if found.origin is not None}
        begin = first(chosen, here, room)
        rows = [
            asdict(one) | {"reference": one.reference, "here": one.repo in here} for one in chosen
        ]
        return {
            "suggestions": rows,
            "first": begin.id if begin is not None else None,
            "memory_bytes": room,
        }

    async def discover(self) -> list[Described]:
        """What there is after another look at the disk."""
        models = await self.pool.catalog.look()
        if self._vetting is not None:
            self._vetting.headers.keep(models.values())
        return await self.describe()

    async def _read_headers(self, patience: float | None) -> None:
        if self._vetting is None:
            return
        if self._reading is None or self._reading.done():
            models = await self.pool.catalog.models()
            self._reading = asyncio.create_task(self._read_all(tuple(models.values())))
        await asyncio.wait([self._reading], timeout=patience)

    async def _read_all(self, models: tuple[Found, ...]) -> None:
        def work(stopped: Stopped) -> None:
            for found in models:
                if stopped():
                    return
                self._read(found)

        there = set(models)
        self._wrong = {found: why for found, why in self._wrong.items() if found in there}
        self._facts = {found: facts for found, facts in self._facts.items() if found in there}
        await in_thread(work)

    def _read(self, found: Found) -> None:
        if self._vetting is None:
            return
        try:
            self._facts[found] = self._vetting.facts(found)
            self._wrong.pop(found, None)
        except ModelLoadFailed as error:
            self._wrong[found] = error.message
            self._facts.pop(found, None)

    def _describe(self, statuses: list[ModelStatus]) -> list[Described]:
        vetting, described = self._vetting, []
        available = vetting.available() + self.pool.freeable if vetting is not None else 0
        for status in statuses:
            found = status.file
            facts, wrong = self._facts.get(found), self._wrong.get(found)
            if wrong is not None and status.state == "available":
                status = ModelStatus(found, "failed", wrong)  # noqa: PLW2901
            fit = digests = None
            if vetting is not None:
                digests = vetting.known(found)
                if facts is not None and found.kind == "model":
                    fit = vetting.fit(facts, available).to_json()
            described.append(Described(status, facts, digests, fit))
        return described

    async def hold(self, id: str, adapter: str, pin: PinnedModel) -> None:
        """See to it that a model is what a request pins. Raises `ModelDrifted` with every difference,
        `ModelNotFound`, `ModelLoadFailed`.
        """
        vetting = self._vetting
        if vetting is None:
            raise UnsupportedParameter("models are not verified here", param="pin")
        found = await self.pool.catalog.find(id)
        other = await self.pool.catalog.find(adapter) if adapter else None
        drifts = await in_thread(lambda stopped: vetting.differences(found, other, pin, stopped))
        said = [str(one) for one in drifts]
        held = self.pool.status_of(found).vetted
        if held is not None and held.digests not in {(), (pin.sha256, *pin.parts)}:
            said.append(
                "what is in memory is another file than the one that is there now: unload it"
            )
        if said:
            raise ModelDrifted(f"{id} is not what is pinned: {'; '.join(said)}", param="pin")

    # Doing

    async def load(self, id: str, principal: Principal) -> Job:
        """Raises `ModelNotFound`."""
        await self.pool.catalog.find(id)

        async def work(report: Report) -> Mapping[str, Any]:
            async with self.pool.use(id, report, abandon=True):
                return (await self.describe_one(id)).to_json()

        return self.jobs.start("load", id, principal, work)

    async def unload(self, id: str, principal: Principal) -> Job:
        """Raises `ModelNotFound`."""
        await self.pool.catalog.find(id)

        async def work(report: Report) -> Mapping[str, Any]:
            return {"unloaded": await self.pool.unload(id, report)}

        return self.jobs.start("unload", id, principal, work)

    async def probe(self, id: str, principal: Principal) -> Job:
        """Try it out now, whatever is known of it. Raises `ModelNotFound`."""
        found = await self.pool.catalog.find(id)
        vetting = self._vetting
        if vetting is None:
            raise AccessDenied("no model is tried out here")

        def try_out(report: Report, stopped: Stopped) -> dict[str, Any]:
            vetted = vetting.look(found, report, stopped, self.pool.freeable)
            return asdict(vetting.probe(vetted, report, stopped))

        async def work(report: Report) -> Mapping[str, Any]:
            async with self.pool.memory_turn():
                return await in_thread(lambda stopped: try_out(report, stopped))

        return self.jobs.start("probe", id, principal, work)

    async def verify(self, id: str, principal: Principal) -> Job:
        """Read its bytes again, whatever is known of them. Raises `ModelNotFound`."""
        found = await self.pool.catalog.find(id)
        vetting = self._vetting
        if vetting is None:
            raise AccessDenied("nothing is verified here")

        def read(report: Report, stopped: Stopped) -> dict[str, Any]:
            for part in found.parts:
                vetting.hashes.forget(part)
            digests = vetting.digests(found, report, stopped)
            facts = vetting.facts(found)
            return {
                "sha256": list(digests),
                "expected": found.expected_sha256,
                "chat_template": facts.chat_template_sha256,
            }

        async def work(report: Report) -> Mapping[str, Any]:
            return await in_thread(lambda stopped: read(report, stopped))

        return self.jobs.start("verify", id, principal, work)

    async def pull(self, reference: str, principal: Principal, sha256: str | None = None) -> Job:
        """A repository, an address, or the name of a suggestion. Raises `AccessDenied` where nobody may,
        and `InvalidValue` for what can be no model.
        """
        puller = await asyncio.to_thread(self._make_puller)
        suggested = {one.id: one.reference for one in suggestions()}
        wanted = suggested.get(reference, reference)
        parse(wanted)

        def fetch(report: Report, stopped: Stopped) -> Any:
            def progress(now: PullProgress) -> None:
                report(Progress(f"{now.stage}: {now.file}", now.done, now.total, "bytes"))

            return puller.pull(wanted, sha256=sha256, progress=progress, cancelled=stopped)

        async def work(report: Report) -> Mapping[str, Any]:
            pulled = await in_thread(lambda stopped: fetch(report, stopped))
            models = await self.pool.catalog.look()
            paths = {path.resolve() for path in pulled.files}
            ids = [found.id for found in models.values() if found.path in paths]
            return {
                "ids": ids,
                "files": [path.name for path in pulled.files],
                "sha256": list(pulled.sha256),
                "repo": pulled.repo,
                "revision": pulled.revision,
                "size_bytes": pulled.size_bytes,
                "new": pulled.new,
                "notes": list(pulled.notes),
            }

        return self.jobs.start("pull", reference[:200], principal, work)

    async def close(self) -> None:
        """End what is running; the pool is its owner's to close."""
        await self.jobs.close()
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)
