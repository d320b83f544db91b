"""`shimmy/api/audit`: what is on record, and proof of it."""

from __future__ import annotations

import asyncio
from typing import Any

from jupyter_server.auth.decorator import authorized
from tornado import web
from tornado.iostream import StreamClosedError

from ...auditing import Auditing
from ..events import emit_head
from .base import ShimmyHandler
from .body import BodyHandler
from .queries import file_format, moment, number, of_records

_TYPES = {"csv": "text/csv; charset=utf-8", "jsonl": "application/jsonl"}


class _AuditHandler(ShimmyHandler):
    @property
    def auditing(self) -> Auditing:
        return self.service.auditing


class AuditHandler(_AuditHandler):
    @web.authenticated
    @authorized(action="read", resource="shimmy_jupyter:audit")
    async def get(self) -> None:
        cursor, limit = (number(name, self.query(name)) for name in ("cursor", "limit"))
        page = await self.auditing.page(self.principal, of_records(self.query), cursor, limit)
        await self.finish({"records": page.records, "next_cursor": page.next_cursor})


class AuditExportHandler(_AuditHandler):
    @web.authenticated
    @authorized(action="read", resource="shimmy_jupyter:audit")
    async def get(self) -> None:
        kind = file_format(self.query)
        pieces = self.auditing.exported(self.principal, of_records(self.query), kind)
        piece = await anext(pieces, None)
        self.set_header("Content-Type", _TYPES[kind])
        self.set_header("Content-Disposition", f'attachment; filename="shimmy-audit.{kind}"')
        try:
            while piece is not None:
                await self.still_allowed("read", "shimmy_jupyter:audit")
                self.write(piece)
                await self.flush()
                piece = await anext(pieces, None)
        except StreamClosedError:
            return
        await self.finish(set_content_type=_TYPES[kind])


class AuditUsageHandler(_AuditHandler):
    @web.authenticated
    @authorized(action="read", resource="shimmy_jupyter:audit")
    async def get(self) -> None:
        since, until = (moment(name, self.query(name)) for name in ("since", "until"))
        by = (self.query("by") or "user,group,model").split(",")
        await self.finish(await self.auditing.usage(self.principal, since, until, by))


class AuditReceiptHandler(_AuditHandler):
    @web.authenticated
    @authorized(action="read", resource="shimmy_jupyter:audit")
    async def get(self, request_id: str) -> None:
        await self.finish(await self.auditing.receipt(self.principal, request_id))


class AuditVerifyHandler(_AuditHandler, BodyHandler):
    small_body = True

    @web.authenticated
    @authorized(action="read", resource="shimmy_jupyter:audit")
    async def post(self) -> None:
        against = await asyncio.to_thread(_against, self.take_body())
        await self.finish(await self.auditing.verify(against))


class AuditAnchorHandler(_AuditHandler, BodyHandler):
    small_body = True

    @web.authenticated
    @authorized(action="read", resource="shimmy_jupyter:audit")
    async def post(self) -> None:
        await asyncio.to_thread(_nothing, self.take_body())
        head = await self.auditing.anchor(self.asked("act"))
        emit_head(self.event_logger, head)
        await self.finish({"head": head.to_json()})


# What reads bodies imports pydantic.


def _against(body: bytes) -> dict[str, Any] | None:
    """The head to compare with, if the body names one. Raises `InvalidValue`, `UnknownParameter`."""
    from ..audit_requests import parse_verify

    return parse_verify(body)


def _nothing(body: bytes) -> None:
    from ..model_requests import parse_empty

    parse_empty(body)
