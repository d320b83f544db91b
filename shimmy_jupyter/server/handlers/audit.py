"""`shimmy/api/audit`: what is on record, and proof of it. Users see their own, administrators all."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, TypeVar

from jupyter_server.auth.decorator import authorized
from tornado import web
from tornado.iostream import StreamClosedError

from ...audit.export import export
from ...audit.ledger import Head, Ledger, Query
from ...audit.verify import verify
from ...audit.writer import StoreFailed
from ...errors import AccessDenied, AuditUnavailable, InvalidValue, NotFound, QueueFull
from .base import ShimmyHandler
from .body import BodyHandler
from .queries import moment, month, number

T = TypeVar("T")

_FILTERS = ("user", "model", "outcome", "kind", "action", "request_id")
_VERIFYING = "shimmy_verifying"
_READING = "shimmy_reading_audit"
_AT_ONCE = 2


class _AuditHandler(ShimmyHandler):
    @property
    def ledger(self) -> Ledger:
        """Raises `NotFound` where nothing is recorded."""
        ledger = self.service.guard.ledger
        if ledger is None:
            raise NotFound("nothing is recorded here: ShimmyAudit.enabled is off")
        return ledger

    async def read(self, work: Callable[[], T]) -> T:
        """Off the event loop. Raises `AuditUnavailable`, and `InvalidValue` for what cannot be asked."""
        turns = self.settings.setdefault(_READING, asyncio.Semaphore(_AT_ONCE))
        try:
            async with turns:  # the loop's threads are few, and others' requests need them
                return await asyncio.to_thread(work)
        except StoreFailed as error:
            raise AuditUnavailable(str(error)) from error
        except ValueError as error:
            name, _, said = str(error).partition(": ")
            raise InvalidValue(said or name, param=name if said else None) from error

    def asked_for(self) -> Query:
        """What the address asks for, of what the user may see. Raises `AccessDenied`."""
        given = {name: self.query(name) for name in _FILTERS}
        wanted = Query(
            **given,
            since=moment("since", self.query("since")),
            until=moment("until", self.query("until")),
        )
        principal = self.principal
        if principal.admin:
            return wanted
        if wanted.user not in (None, principal.name):
            raise AccessDenied("you may see your own records only", param="user")
        return replace(wanted, user=principal.name)


class AuditHandler(_AuditHandler):
    @web.authenticated
    @authorized(action="read", resource="shimmy_jupyter:audit")
    async def get(self) -> None:
        query, ledger = self.asked_for(), self.ledger
        cursor = number("cursor", self.query("cursor"))
        limit = number("limit", self.query("limit"))
        page = await self.read(lambda: ledger.query(query, cursor, 100 if limit is None else limit))
        await self.finish({"records": page.records, "next_cursor": page.next_cursor})


class AuditExportHandler(_AuditHandler):
    @web.authenticated
    @authorized(action="read", resource="shimmy_jupyter:audit")
    async def get(self) -> None:
        query, ledger = self.asked_for(), self.ledger
        kind = self._format(self.query("format"))
        pieces = export(ledger, query, kind)
        piece = await self.read(lambda: next(pieces, None))
        types = {"csv": "text/csv; charset=utf-8", "jsonl": "application/jsonl"}
        self.set_header("Content-Type", types[kind])
        self.set_header("Content-Disposition", f'attachment; filename="shimmy-audit.{kind}"')
        try:
            while piece is not None:
                await self.still_allowed("read", "shimmy_jupyter:audit")
                self.write(piece)
                await self.flush()
                piece = await self.read(lambda: next(pieces, None))
        except StreamClosedError:
            return
        await self.finish(set_content_type=types[kind])

    @staticmethod
    def _format(given: str | None) -> Literal["csv", "jsonl"]:
        match given:
            case None | "jsonl":
                return "jsonl"
            case "csv":
                return "csv"
        raise InvalidValue("csv or jsonl", param="format")


class AuditUsageHandler(_AuditHandler):
    """Who used what: this month, where nothing else is asked for."""

    @web.authenticated
    @authorized(action="read", resource="shimmy_jupyter:audit")
    async def get(self) -> None:
        ledger, principal = self.ledger, self.principal
        since = moment("since", self.query("since"))
        since = month(self.service.guard.clock()) if since is None else since
        until = moment("until", self.query("until"))
        by = tuple((self.query("by") or "user,group,model").split(","))
        wanted = by if principal.admin or "user" in by else ("user", *by)
        rows = await self.read(lambda: ledger.usage(since, until, wanted))
        if not principal.admin:
            rows = [row for row in rows if row["user"] == principal.name]
        await self.finish({"since": since, "until": until, "by": list(wanted), "usage": rows})


class AuditReceiptHandler(_AuditHandler):
    @web.authenticated
    @authorized(action="read", resource="shimmy_jupyter:audit")
    async def get(self, request_id: str) -> None:
        ledger, principal = self.ledger, self.principal
        proof = await self.read(lambda: ledger.proof(request_id))
        if proof is None or not (principal.admin or _is_of(proof, principal.name)):
            raise NotFound("there is no record of such a request of yours")
        await self.finish(proof)


def _is_of(proof: dict[str, Any], user: str) -> bool:
    return all(json.loads(record["body"])["user"] == user for record in proof["records"])


class AuditVerifyHandler(_AuditHandler, BodyHandler):
    small_body = True

    @web.authenticated
    @authorized(action="read", resource="shimmy_jupyter:audit")
    async def post(self) -> None:
        ledger, body = self.ledger, self.take_body()
        against = await self.read(lambda: _against(body))
        if self.settings.get(_VERIFYING):
            raise QueueFull("the ledger is being verified already; one at a time")
        self.settings[_VERIFYING] = True
        try:
            verdict = await self.read(lambda: verify(ledger.path, against))
        finally:
            self.settings[_VERIFYING] = False
        await self.finish(
            {
                "ok": verdict.ok,
                "records": verdict.records,
                "head": verdict.head.to_json() if verdict.head is not None else None,
                "first_bad": verdict.first_bad,
                "problem": verdict.problem,
                "erased": verdict.erased,
                "open_requests": verdict.open_requests,
                "anchored": verdict.anchored,
            }
        )


def _against(body: bytes) -> Head | None:
    """The head to compare with, if the body names one. Raises `InvalidValue`, `UnknownParameter`."""
    from ..audit_requests import parse_verify

    given = parse_verify(body)
    return None if given is None else Head.from_json(given)
