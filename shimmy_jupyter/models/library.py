"""The use-cases of models: what there is, loading and unloading, trying out, downloading. HTTP, kernels
and the command line all come through here.
"""

from __future__ import annotations

import asyncio
import difflib
import hashlib
import logging
import struct
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import AccessDenied, InvalidValue, ModelLoadFailed
from ..types import MadeBy, Principal
from .attached import Attached
from .gguf import GgufFacts
from .jobs import Job, Jobs, Progress, Report, Stopped, in_thread
from .lifecycle import ModelPool
from .machine import NOWHERE, Machine
from .references import HubReference, UrlReference, parse
from .resident import ModelStatus
from .sources import SELF_TEST, Found
from .suggest import first, fitting, suggestions
from .vetting import Vetting, expected

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
    usable_context: int | None

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
            "usable_context": self.usable_context,
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
    needed, or raises `AccessDenied` where nobody may. `machine` is what the models run on.
    """

    def __init__(
        self,
        pool: ModelPool[Any],
        vetting: Vetting | None,
        puller: Callable[[], Puller],
        machine: Machine = NOWHERE,
    ) -> None:
        self.engine = machine.engine
        self._machine = machine
        self.pool, self.jobs = pool, Jobs()
        self.attached: Attached[Any] = Attached(pool, vetting)
        self._vetting = vetting
        self._make_puller = puller
        self._reading: asyncio.Task[None] | None = None
        self._describing = asyncio.Lock()
        self._known = threading.Lock()
        # By path: two tags of Ollama's can have one file.
        self._wrong: dict[Path, str] = {}
        self._facts: dict[Path, GgufFacts] = {}

    # Looking

    async def describe(self, *, wait: bool = False) -> list[Described]:
        """All models. Headers that nobody has read yet are waited for, for two seconds unless `wait`."""
        await self._read_headers(None if wait else _PATIENCE)
        async with self._describing:  # of thousands it takes a while, and all of a processor
            statuses = await self.pool.status()
            return await in_thread(lambda _: self._describe(statuses))

    async def describe_one(self, id: str) -> Described:
        """Raises `ModelNotFound`."""
        found = await self.pool.catalog.find(id)
        await self.pool.look(lambda _: self._read(found))
        status = self.pool.status_of(found)
        (described,) = await in_thread(lambda _: self._describe([status]))
        return described

    async def default(
        self, allows: Callable[[str], bool] = lambda _: True, *, wait: bool = False
    ) -> str | None:
        """The model that answers where none is named: the first that is listed, `allows` allows, chats, has
        not failed, and would fit into this machine's memory if nothing else were there; else the bundled one.
        So it does not change with what else is running. None while headers are being read that decide it,
        unless to `wait` for them.
        """
        await self._read_headers(None if wait else 0.0)
        if self._vetting is None:
            listed = [*await self.pool.catalog.models()]
            return next(filter(allows, reversed(listed)), listed[-1])
        statuses = await self.pool.status()
        with self._known:
            known = dict(self._facts), set(self._wrong)
        return await in_thread(
            lambda _: self._chosen([s for s in statuses if allows(s.file.id)], *known)
        )

    def _chosen(
        self, statuses: list[ModelStatus], facts: dict[Path, GgufFacts], wrong: set[Path]
    ) -> str | None:
        for status in statuses:
            found = status.file
            if found.kind != "model" or status.state in {"failed", "quarantined"}:
                continue
            if found.path not in facts and found.path not in wrong:
                return None
            if found.path in facts and self._chats(facts[found.path]):
                return found.id
        return SELF_TEST

    def _chats(self, facts: GgufFacts) -> bool:
        if facts.kind != "model" or facts.chat_template is None or self._vetting is None:
            return False
        return self._vetting.could_fit(facts)

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
            there = {found.path for found in models}
            with self._known:
                for known in (self._wrong, self._facts):
                    for path in known.keys() - there:
                        del known[path]
            for found in models:
                if stopped():
                    return
                self._read(found)

        await in_thread(work)

    def _read(self, found: Found) -> None:
        if self._vetting is None:
            return
        path = found.path
        try:
            facts = self._vetting.facts(found)
        except ModelLoadFailed as error:
            with self._known:
                self._facts.pop(path, None)
                self._wrong[path] = error.message
        else:
            with self._known:
                self._wrong.pop(path, None)
                self._facts[path] = facts

    def _describe(self, statuses: list[ModelStatus]) -> list[Described]:
        vetting, described = self._vetting, []
        available = vetting.available() + self.pool.freeable if vetting is not None else 0
        with self._known:
            known, bad = dict(self._facts), dict(self._wrong)
        for status in statuses:
            found = status.file
            facts, wrong = known.get(found.path), bad.get(found.path)
            if wrong is not None and status.state == "available":
                status = ModelStatus(found, "failed", wrong)  # noqa: PLW2901
            fit = digests = None
            usable = status.context_size
            if vetting is not None:
                digests = vetting.known(found)
                if facts is not None and found.kind == "model":
                    fit = vetting.fit(facts, available).to_json()
                    usable = usable or vetting.usable_context(facts)
            described.append(Described(status, facts, digests, fit, usable))
        return described

    # Of models in use

    def digest(self, model: Any) -> str | None:
        """SHA-256 of the bytes that are loaded, where somebody has read them."""
        vetted = self.pool.entry_of(model).vetted
        return vetted.digests[0] if vetted is not None and vetted.digests else None

    def made_by(self, model: Any, adapter: str, prompt: tuple[int, ...]) -> MadeBy:
        """What an answer to these tokens is made by; `adapter` is its path, "" for none."""
        entry, facts, machine = self.pool.entry_of(model), model.facts, self._machine
        vetted, beside = entry.vetted, entry.adapters.get(Path(adapter)) if adapter else None
        return MadeBy(
            sha256=(vetted.digests or None) if vetted is not None else None,
            quantization=vetted.facts.quantisation if vetted is not None else None,
            chat_template=vetted.facts.chat_template_sha256 if vetted is not None else None,
            adapter=beside.digest if beside is not None else None,
            prompt=hashlib.sha256(struct.pack(f"<{len(prompt)}i", *prompt)).hexdigest(),
            engine=machine.engine,
            build=machine.build,
            cpu=machine.cpu,
            cpu_features=machine.cpu_features,
            context_size=facts.context_size,
            kv_type=model.engine.spec.kv_type,
            threads=facts.threads,
            gpu_layers=facts.offloaded_layers,
        )

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
                return await self.pool.look(lambda stopped: try_out(report, stopped))

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
                "expected": expected(found),
                "chat_template": facts.chat_template_sha256,
            }

        async def work(report: Report) -> Mapping[str, Any]:
            return await self.pool.look(lambda stopped: read(report, stopped))

        return self.jobs.start("verify", id, principal, work)

    async def check_pulling(self) -> None:
        """Raises `AccessDenied` where nobody may download."""
        await asyncio.to_thread(self._make_puller)

    @staticmethod
    def wanted(reference: str) -> str:
        """What a repository, an address or a suggestion's name stands for, in one form. Raises
        `InvalidValue` for what can be no model.
        """
        return str(ModelLibrary.meant(reference))

    @staticmethod
    def meant(reference: str) -> HubReference | UrlReference:
        """The same, taken apart."""
        suggested = {one.id: one.reference for one in suggestions()}
        try:
            return parse(suggested.get(reference, reference))
        except InvalidValue as error:
            close = difflib.get_close_matches(reference.lower().replace(":", "-"), suggested, n=1)
            hint = f"did you mean the suggestion {close[0]}? " if close else ""
            raise InvalidValue(f"{hint}{error.message}", param="model") from None

    async def pull(self, reference: str, principal: Principal, sha256: str | None = None) -> Job:
        """A repository, an address, or the name of a suggestion. Raises `AccessDenied` where nobody may,
        and `InvalidValue` for what can be no model.
        """
        puller = await asyncio.to_thread(self._make_puller)
        shown = self.wanted(reference)
        wanted = {one.id: one.reference for one in suggestions()}.get(reference, reference)

        def fetch(report: Report, stopped: Stopped) -> Any:
            def progress(now: PullProgress) -> None:
                report(Progress(f"{now.stage}: {now.file}", now.done, now.total, "bytes"))

            pulled = puller.pull(wanted, sha256=sha256, progress=progress, cancelled=stopped)
            return pulled, {path.resolve() for path in pulled.files}

        async def work(report: Report) -> Mapping[str, Any]:
            pulled, paths = await in_thread(lambda stopped: fetch(report, stopped))
            models = await self.pool.catalog.look()
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

        return self.jobs.start("pull", shown[:200], principal, work)

    async def close(self) -> None:
        """End what is running; the pool is its owner's to close."""
        await self.jobs.close()
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)
