"""What the routes do, for whoever has the service in their own process."""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, unquote

from .administration import Administration
from .errors import AccessDenied, InternalError, NotFound, ShimmyError
from .guard.asked import Asked
from .guard.visit import Visit, result_of
from .health import Surroundings, health
from .notebook.client import written
from .server import answers
from .server.handlers.queries import file_format, moment, number, of_records
from .service import CompletionService
from .types import Principal

log = logging.getLogger("shimmy_jupyter")

_ME = Principal("local")
_GENERATING = {"shimmy/v1/chat/completions": True, "shimmy/v1/completions": False}
"""Whether the route is the chat's."""


@dataclass(frozen=True, slots=True)
class _Call:
    """`path` is without its query; `parts` are what the route's pattern leaves open."""

    path: str
    parts: tuple[str, ...]
    query: Mapping[str, str]
    data: bytes


class InKernel:
    """Bodies and answers are the HTTP API's. `labels` are the headers that say where a request comes from.
    With `may_compute` off no model answers here.
    """

    def __init__(
        self,
        service: CompletionService,
        surroundings: Surroundings,
        *,
        may_compute: bool,
        labels: Callable[[], Mapping[str, str]] = dict,
    ) -> None:
        self.service = service
        self._surroundings, self._may_compute, self._labels = surroundings, may_compute, labels
        self._administration = Administration(service.library, service.guard)

    async def answer(
        self, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Who waits here waits for everything. Raises `NotFound`, and what the route would."""
        place, _, query = path.partition("?")
        for wanted, pattern, work in ROUTES:
            if wanted == method and (match := re.fullmatch(pattern, place)):
                parts = tuple(map(unquote, match.groups()))
                given = dict(parse_qsl(query, keep_blank_values=True))
                return await work(self, _Call(place, parts, given, written(dict(body or {}))))
        raise NotFound(f"there is no {method} {place}")

    async def stream(self, path: str, body: dict[str, Any], put: Callable[[bytes], None]) -> None:
        """The answer's events, as they are made. Raises what comes before the first; a defect of ours as
        `InternalError`.
        """
        if path not in _GENERATING:
            raise NotFound(f"there is no {path}")
        chat = _GENERATING[path]
        body = json.loads(written(body))  # by HTTP the same could be asked, and no more
        visit = self._visit(path, "chat" if chat else "completions")
        try:
            parsed = await self._parsed(visit, _parser(chat=chat), body)
            async with await self.service.start(parsed.request, visit=visit) as completion:
                writer = answers.EventWriter(_shape(chat=chat), parsed, int(time.time()))
                async for piece in writer.events(completion):
                    put(piece)
        except ShimmyError:
            raise
        except Exception as defect:
            log.exception("a request failed in a way that nobody foresaw")
            raise InternalError(f"{type(defect).__name__}: the log says more") from defect

    def _asked(self, path: str, route: str = "act") -> Asked:
        labels = self._labels()
        return Asked(
            _ME,
            uuid.uuid4().hex,
            route,
            request_path=path,
            notebook=labels.get("x-shimmy-notebook"),
            cell=labels.get("x-shimmy-cell"),
        )

    def _visit(self, path: str, route: str) -> Visit:
        return self.service.visit(self._asked(path, route))

    def _check_place(self) -> None:
        """Raises `AccessDenied` where models answer in a server only."""
        if not self._may_compute:
            raise AccessDenied(
                "ShimmyPolicy.allow_in_kernel is off: a model answers in a Jupyter server only"
            )

    async def _parsed(self, visit: Visit, parse: Callable[..., Any], body: Any) -> Any:
        """What is refused here is on record, too."""
        try:
            self._check_place()
            return parse(body, visit.asked.request_id, _ME)
        except Exception as error:
            await visit.end(result_of(error))
            raise

    async def complete(self, call: _Call) -> dict[str, Any]:
        chat = _GENERATING[call.path]
        visit = self._visit(call.path, "chat" if chat else "completions")
        parsed = await self._parsed(visit, _parser(chat=chat), call.data)
        async with await self.service.start(parsed.request, visit=visit) as completion:
            return _read(
                await answers.body(_shape(chat=chat), parsed, completion, int(time.time()))
            )

    async def embed(self, call: _Call) -> dict[str, Any]:
        from .server.embeddings import parse_embeddings

        return await self._vectors(call, parse_embeddings, "embeddings")

    async def rerank(self, call: _Call) -> dict[str, Any]:
        from .server.embeddings import parse_rerank

        return await self._vectors(call, parse_rerank, "rerank")

    async def _vectors(self, call: _Call, parse: Callable[..., Any], route: str) -> dict[str, Any]:
        visit = self._visit(call.path, route)
        wanted = await self._parsed(visit, parse, call.data)
        return _read(wanted.answer(await self.service.embed(wanted.request, visit)))

    async def tokenize(self, call: _Call) -> dict[str, Any]:
        from .server.token_requests import parse_tokenize

        self._check_place()
        asked = parse_tokenize(call.data)
        found = await self.service.tokenize(asked.model, asked.prompt, _ME, asked.options)
        return {"tokens": list(found), "count": len(found)}

    async def detokenize(self, call: _Call) -> dict[str, Any]:
        from .server.token_requests import parse_detokenize

        self._check_place()
        asked = parse_detokenize(call.data)
        return {"text": await self.service.detokenize(asked.model, asked.tokens, _ME)}

    async def apply_template(self, call: _Call) -> dict[str, Any]:
        from .server.token_requests import parse_template

        self._check_place()
        asked = parse_template(call.data)
        found = await self.service.rendered(asked.model, asked.prompt, _ME, asked.options)
        return {"prompt": found.text, "count": found.count, "cached_tokens": found.cached}

    async def listed(self, _call: _Call) -> dict[str, Any]:
        return _read(answers.models(await self.service.models(_ME)))

    async def one_listed(self, call: _Call) -> dict[str, Any]:
        return _read(answers.model(await self.service.model(call.parts[0], _ME)))

    async def models(self, _call: _Call) -> dict[str, Any]:
        return await self._library(await self.service.library.describe(wait=True))

    async def discover(self, call: _Call) -> dict[str, Any]:
        self._check_empty(call)
        return await self._library(await self.service.library.discover())

    async def _library(self, found: Any) -> dict[str, Any]:
        allows = self.service.may_use(_ME)
        return _read(await answers.library(self.service.library, found, allows))

    async def model(self, call: _Call) -> dict[str, Any]:
        (id,) = call.parts
        await self.service.model(id, _ME)
        return (await self.service.library.describe_one(id)).to_json()

    async def pull(self, call: _Call) -> dict[str, Any]:
        from .server.model_requests import parse_pull

        wanted = parse_pull(call.data)
        asked = self._asked(call.path)
        return {"job": (await self._administration.pull(wanted.model, asked, wanted.sha256)).id}

    async def work(self, call: _Call) -> dict[str, Any]:
        id, verb = call.parts
        self._check_empty(call)
        if verb == "load":
            self._check_place()
        return {"job": (await getattr(self._administration, verb)(id, self._asked(call.path))).id}

    @staticmethod
    def _check_empty(call: _Call) -> None:
        """Raises `UnknownParameter`."""
        from .server.model_requests import parse_empty

        parse_empty(call.data)

    async def suggestions(self, call: _Call) -> dict[str, Any]:
        return await self.service.library.suggestions(call.query.get("task"))

    async def jobs(self, _call: _Call) -> dict[str, Any]:
        return {"jobs": [job.to_json() for job in self.service.library.jobs.of(_ME)]}

    async def job(self, call: _Call) -> dict[str, Any]:
        return self.service.library.jobs.get(call.parts[0], _ME).to_json()

    async def cancel(self, call: _Call) -> dict[str, Any]:
        return self.service.library.jobs.cancel(call.parts[0], _ME).to_json()

    async def limits(self, _call: _Call) -> dict[str, Any]:
        guard = self.service.guard
        return await guard.limits(_ME) | {"queue_position": guard.queue_position(_ME)}

    async def tighten(self, call: _Call) -> dict[str, Any]:
        from .server.limit_requests import parse_limits

        await self.service.guard.tighten(self._asked(call.path), parse_limits(call.data))
        return await self.limits(call)

    async def records(self, call: _Call) -> dict[str, Any]:
        given = call.query.get
        cursor, limit = (number(name, given(name)) for name in ("cursor", "limit"))
        page = await self.service.auditing.page(_ME, of_records(given), cursor, limit)
        return {"records": page.records, "next_cursor": page.next_cursor}

    async def usage(self, call: _Call) -> dict[str, Any]:
        since, until = (moment(name, call.query.get(name)) for name in ("since", "until"))
        by = (call.query.get("by") or "user,group,model").split(",")
        return await self.service.auditing.usage(_ME, since, until, by)

    async def receipt(self, call: _Call) -> dict[str, Any]:
        return await self.service.auditing.receipt(_ME, *call.parts)

    async def file(self, path: str, put: Callable[[bytes], None]) -> None:
        """What `audit/export` answers with, in pieces."""
        place, _, query = path.partition("?")
        given = dict(parse_qsl(query, keep_blank_values=True))
        if place != "shimmy/api/audit/export":
            raise NotFound(f"there is no {place}")
        async for piece in self.service.auditing.exported(
            _ME, of_records(given.get), file_format(given.get)
        ):
            put(piece)

    async def verify(self, call: _Call) -> dict[str, Any]:
        from .server.audit_requests import parse_verify

        return await self.service.auditing.verify(parse_verify(call.data))

    async def anchor(self, call: _Call) -> dict[str, Any]:
        self._check_empty(call)
        return {"head": (await self.service.auditing.anchor(self._asked(call.path))).to_json()}

    async def health(self, _call: _Call) -> dict[str, Any]:
        return (await health(self.service, self._surroundings)).to_json()


_ANY = "([^/]+)"
ROUTES: tuple[tuple[str, str, Callable[[InKernel, _Call], Awaitable[dict[str, Any]]]], ...] = (
    ("POST", "shimmy/v1/chat/completions", InKernel.complete),
    ("POST", "shimmy/v1/completions", InKernel.complete),
    ("POST", "shimmy/v1/embeddings", InKernel.embed),
    ("POST", "shimmy/v1/rerank", InKernel.rerank),
    ("GET", "shimmy/v1/models", InKernel.listed),
    ("GET", f"shimmy/v1/models/{_ANY}", InKernel.one_listed),
    ("POST", "shimmy/api/tokenize", InKernel.tokenize),
    ("POST", "shimmy/api/detokenize", InKernel.detokenize),
    ("POST", "shimmy/api/apply-template", InKernel.apply_template),
    ("GET", "shimmy/api/models", InKernel.models),
    ("POST", "shimmy/api/models/discover", InKernel.discover),
    ("POST", "shimmy/api/models/pull", InKernel.pull),
    ("GET", f"shimmy/api/models/{_ANY}", InKernel.model),
    ("POST", f"shimmy/api/models/{_ANY}/(load|unload|probe|verify)", InKernel.work),
    ("GET", "shimmy/api/suggestions", InKernel.suggestions),
    ("GET", "shimmy/api/jobs", InKernel.jobs),
    ("GET", f"shimmy/api/jobs/{_ANY}", InKernel.job),
    ("DELETE", f"shimmy/api/jobs/{_ANY}", InKernel.cancel),
    ("GET", "shimmy/api/limits", InKernel.limits),
    ("PUT", "shimmy/api/limits", InKernel.tighten),
    ("GET", "shimmy/api/audit", InKernel.records),
    ("GET", "shimmy/api/audit/usage", InKernel.usage),
    ("GET", f"shimmy/api/audit/receipts/{_ANY}", InKernel.receipt),
    ("POST", "shimmy/api/audit/verify", InKernel.verify),
    ("POST", "shimmy/api/audit/anchor", InKernel.anchor),
    ("GET", "shimmy/health", InKernel.health),
)
"""Method, pattern, and what is done. Not here: files to be saved (`audit/export`), and the API's description."""


def _parser(*, chat: bool) -> Callable[..., Any]:
    from .server import requests  # it imports pydantic

    return requests.parse_chat if chat else requests.parse_completion


def _shape(*, chat: bool) -> answers.Shape:
    return answers.CHAT if chat else answers.COMPLETION


def _read(body: bytes | dict[str, Any]) -> dict[str, Any]:
    if isinstance(body, dict):
        return body
    found: dict[str, Any] = json.loads(body)
    return found
