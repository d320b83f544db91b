"""What data frames ask the service for.

Cases of what answers depend on, by which they are kept: bytes that are known, that are read first, that cannot be
read, and that one may not have read; a model that is not there; what a lock adds; names that are no part of a
path; an answer that its type refuses.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import BaseModel

from shimmy_jupyter import framing
from shimmy_jupyter.errors import AccessDenied, AnswerInvalid, QueueFull, ShimmyError
from shimmy_jupyter.notebook.asking import Asker

ROW = {"id": "m", "sha256": "aa", "chat_template": "bb"}


class Server:
    """It has one model, whose bytes can be read, unless that is refused or fails."""

    def __init__(self, **row: Any) -> None:
        self.row = ROW | row
        self.refusal: ShimmyError | None = None
        self.job: dict[str, Any] = {"state": "done", "error": None, "result": {"sha256": ["cc"]}}
        self.asked: list[str] = []
        self.added: dict[str, Any] = {}

    async def request(
        self, method: str, path: str, body: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        self.asked.append(path)
        if path == "shimmy/api/models":
            return {"models": [self.row], "engine": "0.3", "default": "m"}
        if method == "GET":
            return self.job
        if self.refusal is not None:
            raise self.refusal
        return {"job": "j"}

    async def prepare(self, body: dict[str, Any]) -> dict[str, Any]:
        return {**self.added, **body}

    async def identity(self, model: str = "m") -> str:
        return await framing._identity(Asker(lambda: self, prepare=self.prepare), model)


async def test_bytes_template_and_engine() -> None:
    server = Server()
    assert await server.identity() == "aa:bb:0.3"
    assert server.asked == ["shimmy/api/models"]


async def test_bytes_are_read_where_nobody_has() -> None:
    server = Server(sha256=None, id="a#b")
    assert await server.identity("a#b") == "cc:bb:0.3"
    assert server.asked[1:] == ["shimmy/api/models/a%23b/verify", "shimmy/api/jobs/j"]


async def test_what_nobody_can_tell() -> None:
    server = Server(sha256=None)
    assert await server.identity("other") == ""
    server.job["error"] = {"code": "not_found", "message": "gone"}
    assert await server.identity() == ""


async def test_whoever_may_use_a_model_and_not_verify_it_can_still_ask() -> None:
    server = Server(sha256=None)
    server.refusal = AccessDenied("verify is denied")
    assert await server.identity() == ""
    server.refusal = QueueFull("busy")
    with pytest.raises(QueueFull):
        await server.identity()


async def test_what_a_lock_adds_counts() -> None:
    server, found = Server(), set()
    for added in ({}, {"top_p": 0.5}, {"top_p": 0.6}, {"adapter": "x", "pin": {"adapter": "dd"}}):
        server.added = added
        found |= {await server.identity()}
    assert len(found) == 4


def test_what_a_type_refuses_names_the_field(monkeypatch: pytest.MonkeyPatch) -> None:
    class Person(BaseModel):
        age: int

    session = SimpleNamespace(asker=Asker(Server), portal=None)
    monkeypatch.setattr("shimmy_jupyter.api.session", lambda: session)
    schema, read = framing.wiring().structure(Person)
    assert schema["required"] == ["age"]
    assert read('{"age": 3}') == {"age": 3}
    with pytest.raises(AnswerInvalid, match="not a valid Person") as caught:
        read('{"age": "old"}')
    assert caught.value.param == "age"
