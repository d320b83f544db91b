"""What is on record, for whoever may see it: users see their own records, administrators all."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Literal, TypeVar

from .audit.export import export
from .audit.ledger import Head, Ledger, Page, Query
from .audit.verify import verify
from .audit.writer import StoreFailed
from .errors import AccessDenied, AuditUnavailable, InvalidValue, NotFound, QueueFull
from .guard.asked import Asked
from .guard.guard import Guard
from .offloop import off_loop
from .types import Principal

T = TypeVar("T")

_AT_ONCE = 2


class Auditing:
    """For one event loop. Everything raises `NotFound` where nothing is recorded, `AuditUnavailable` where
    the ledger cannot be read, and `InvalidValue` for what cannot be asked of it.
    """

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._turns = asyncio.Semaphore(_AT_ONCE)  # a read may be long, and the disk is everybody's
        self._verifying = False

    async def page(
        self, principal: Principal, query: Query, cursor: int | None, limit: int | None
    ) -> Page:
        """The newest first. Raises `AccessDenied` for others' records."""
        wanted, ledger = self._seen(principal, query), self._ledger()
        return await self._read(
            lambda: ledger.query(wanted, cursor, 100 if limit is None else limit)
        )

    async def exported(
        self, principal: Principal, query: Query, kind: Literal["csv", "jsonl"]
    ) -> AsyncIterator[bytes]:
        """The pieces of a file, the oldest record first. Raises `AccessDenied` for others' records."""
        wanted, ledger = self._seen(principal, query), self._ledger()
        pieces = export(ledger, wanted, kind)
        while (piece := await self._read(lambda: next(pieces, None))) is not None:
            yield piece

    async def usage(
        self,
        principal: Principal,
        since: float | None = None,
        until: float | None = None,
        by: Sequence[str] = ("user", "group", "model"),
    ) -> dict[str, Any]:
        """Who used what: this month, unless something else is asked for."""
        ledger = self._ledger()
        since = month(self._guard.clock()) if since is None else since
        all_see = self._sees_all(principal)
        wanted = tuple(by) if all_see or "user" in by else ("user", *by)
        rows = await self._read(lambda: ledger.usage(since, until, wanted))
        if not all_see:
            rows = [row for row in rows if row["user"] == principal.name]
        return {"since": since, "until": until, "by": list(wanted), "usage": rows}

    async def receipt(self, principal: Principal, request_id: str) -> dict[str, Any]:
        """A request's records with their proof. Raises `NotFound`, for others' too."""
        ledger = self._ledger()
        proof = await self._read(lambda: ledger.proof(request_id))
        if proof is None or not (self._sees_all(principal) or _is_of(proof, principal.name)):
            raise NotFound("there is no record of such a request of yours")
        return proof

    async def verify(self, against: object = None) -> dict[str, Any]:
        """Whether the ledger is what it was: in itself, and by a head from earlier if one is given. Raises
        `QueueFull` while it is being done already.
        """
        ledger = self._ledger()
        head = None if against is None else await self._read(lambda: Head.from_json(against))
        if self._verifying:
            raise QueueFull("the ledger is being verified already; one at a time")
        self._verifying = True
        try:
            found = await self._read(lambda: verify(ledger.path, head))
        finally:
            self._verifying = False
        return {
            "ok": found.ok,
            "records": found.records,
            "head": found.head.to_json() if found.head is not None else None,
            "first_bad": found.first_bad,
            "problem": found.problem,
            "erased": found.erased,
            "open_requests": found.open_requests,
            "anchored": found.anchored,
        }

    async def anchor(self, asked: Asked) -> Head:
        """What the ledger is now, for somebody to keep elsewhere. That it was asked for is recorded
        afterwards: before, the head would have to be of a record that says what it is.
        """
        head = await self._read(self._ledger().head)
        await self._guard.record(asked, "anchor", detail={"size": head.size, "root": head.root})
        return head

    def _ledger(self) -> Ledger:
        ledger = self._guard.ledger
        if ledger is None:
            raise NotFound("nothing is recorded here: ShimmyAudit.enabled is off")
        return ledger

    def _sees_all(self, principal: Principal) -> bool:
        return self._guard.rules.known(principal).admin

    def _seen(self, principal: Principal, wanted: Query) -> Query:
        if self._sees_all(principal):
            return wanted
        if wanted.user not in (None, principal.name):
            raise AccessDenied("you may see your own records only", param="user")
        return replace(wanted, user=principal.name)

    async def _read(self, work: Callable[[], T]) -> T:
        try:
            async with self._turns:
                return await off_loop(work)
        except StoreFailed as error:
            raise AuditUnavailable(str(error)) from error
        except ValueError as error:
            name, _, said = str(error).partition(": ")
            raise InvalidValue(said or name, param=name if said else None) from error


def _is_of(proof: dict[str, Any], user: str) -> bool:
    return all(json.loads(record["body"])["user"] == user for record in proof["records"])


def month(now: float) -> float:
    """When this month began, in UTC; seconds since 1970, both."""
    first = datetime.fromtimestamp(now, UTC).replace(
        day=1, hour=0, minute=0, second=0, microsecond=0
    )
    return first.timestamp()
