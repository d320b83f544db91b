"""Events on the server's bus, as an administrator's collector has them.

Cases: a request that was answered, denied, limited, cancelled, not readable, for vectors, and with no
ledger; acts, allowed and denied; a head; each is valid by the schema that is shipped, which takes nothing
else; no word of a prompt, an answer or a notebook; nobody listens; a collector's handler, and a schema,
that fail end no request; known twice; after a restart once each; the schemas are in the package.
"""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path
from typing import Any

import pytest
from jsonschema import ValidationError
from jupyter_events import EventLogger

from shimmy_jupyter.administration import Administration
from shimmy_jupyter.audit.ledger import Head
from shimmy_jupyter.audit.records import FIELDS
from shimmy_jupyter.core.limits import Limits, LimitTable
from shimmy_jupyter.core.policy import Policy, Rule
from shimmy_jupyter.engine.fake import FakeBackend
from shimmy_jupyter.errors import AccessDenied
from shimmy_jupyter.guard.asked import Asked
from shimmy_jupyter.guard.guard import Guard, Rules
from shimmy_jupyter.server import events
from shimmy_jupyter.server.events import ACT, HEAD, REQUEST, announce, emit_head, register
from shimmy_jupyter.types import EmbeddingFacts, Principal

from .conftest import MODEL, Fakes, chat
from .test_metrics import (
    CHAT,
    NAME,
    drained,
    extension_of,
    guard,
    ledger,
    refused,
    request,
    rules,
    service,
    service_of,
)

__all__ = ["guard", "ledger", "rules", "service"]  # fixtures

pytestmark = pytest.mark.parametrize("fakes", ["in process"], indirect=True)
SECRET = "a-word-of-the-prompt"


class Collector(logging.Handler):
    """As `EventLogger.handlers` would have one."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(self.format(record))

    def take(self, schema: str) -> list[dict[str, Any]]:
        """What has come since, without what every event has."""
        found = [json.loads(text) for text in self.texts]
        self.texts.clear()
        return [
            {name: value for name, value in event.items() if not name.startswith("__")}
            for event in found
            if event["__schema__"] == schema
        ]


@pytest.fixture
def collector(jp_serverapp: Any) -> Collector:
    collector = Collector()
    jp_serverapp.event_logger.handlers = []
    jp_serverapp.event_logger.register_handler(collector)
    return collector


class TestRequests:
    async def test_answered(
        self, service: Any, jp_fetch: Any, collector: Collector, ledger: Any
    ) -> None:
        response = await jp_fetch(*CHAT, method="POST", body=chat(SECRET + " two"))
        usage = json.loads(response.body)["usage"]
        await drained(service.guard)
        assert SECRET not in "".join(collector.texts)
        (event,) = collector.take(REQUEST)
        assert event.pop("duration_ms") > 0
        assert event.pop("time_to_first_token_ms") > 0
        assert event.pop("timestamp").endswith("Z")
        assert event == {
            "request_id": response.headers["x-shimmy-request-id"],
            "route": "chat",
            "user": "local",
            "model": MODEL,
            "outcome": "ok",
            "prompt_tokens": usage["prompt_tokens"],
            "cached_tokens": 0,
            "tokens_generated": usage["completion_tokens"],
        }

    @pytest.mark.parametrize("ledger", [None])
    async def test_without_a_ledger(
        self, service: Any, jp_fetch: Any, collector: Collector
    ) -> None:
        await jp_fetch(*CHAT, method="POST", body=chat(SECRET))
        (event,) = collector.take(REQUEST)
        assert (event["model"], event["outcome"]) == (MODEL, "ok")

    @pytest.mark.parametrize("rules", [Rules([Policy((Rule(allow=False, models=("fa*",)),))])])
    async def test_denied(self, service: Any, jp_fetch: Any, collector: Collector) -> None:
        await refused(jp_fetch, *CHAT, body=chat(SECRET))
        assert SECRET not in "".join(collector.texts)
        (event,) = collector.take(REQUEST)
        assert (event["outcome"], event["code"]) == ("denied", "policy_denied")
        assert "prompt_tokens" not in event

    @pytest.mark.parametrize("rules", [Rules(limits=[LimitTable(Limits(requests_per_minute=0))])])
    async def test_limited(self, service: Any, jp_fetch: Any, collector: Collector) -> None:
        await refused(jp_fetch, *CHAT, body=chat(SECRET))
        (event,) = collector.take(REQUEST)
        assert (event["outcome"], event["code"]) == ("limited", "rate_limit_exceeded")

    async def test_not_readable(self, service: Any, jp_fetch: Any, collector: Collector) -> None:
        await refused(jp_fetch, *CHAT, body=json.dumps({"messages": SECRET}))
        assert SECRET not in "".join(collector.texts)
        (event,) = collector.take(REQUEST)
        assert event["outcome"] == "error"
        assert "model" not in event

    async def test_cancelled(
        self, service: Any, collector: Collector, fakes: Fakes, guard: Guard
    ) -> None:
        gate = threading.Semaphore(2)
        fakes.make = lambda: FakeBackend(gate=gate)
        asked = Asked(Principal(NAME), "an-id", "chat", "192.0.2.1", "/x", "secret.ipynb", "cell-9")
        prompt = f"{SECRET} b c d e f"
        async with await service.start(request(prompt), visit=service.visit(asked)) as completion:
            await completion.read()
        await drained(guard)
        text = "".join(collector.texts)
        (event,) = collector.take(REQUEST)
        assert (event["outcome"], event["user"]) == ("cancelled", NAME)
        assert event["tokens_generated"] == completion.usage.completion_tokens > 0
        for word in (SECRET, "secret.ipynb", "cell-9", "192.0.2.1"):
            assert word not in text
        gate.release(100)

    async def test_vectors(
        self, service: Any, jp_fetch: Any, collector: Collector, fakes: Fakes
    ) -> None:
        fakes.make = lambda: FakeBackend(embedding=EmbeddingFacts("mean", 4, 64, 64, 4))
        body = json.dumps({"model": MODEL, "input": [SECRET]})
        await jp_fetch("shimmy", "v1", "embeddings", method="POST", body=body)
        assert SECRET not in "".join(collector.texts)
        (event,) = collector.take(REQUEST)
        assert (event["route"], event["prompt_tokens"]) == ("embeddings", len(SECRET))


class TestActs:
    @pytest.mark.parametrize("rules", [Rules([Policy((Rule(allow=False, actions=("load",)),))])])
    async def test_allowed_and_denied(self, service: Any, collector: Collector) -> None:
        work = Administration(service.library, service.guard)
        asked = Asked(Principal(NAME), "an-id", "act", "192.0.2.1", "/x", "notes.ipynb", "cell-9")
        with pytest.raises(AccessDenied):
            await work.load(MODEL, asked)
        await (await work.unload(MODEL, asked)).wait()
        denied, allowed = collector.take(ACT)
        common = {"request_id": "an-id", "user": NAME, "model": MODEL}
        assert denied.pop("timestamp")
        assert allowed.pop("timestamp")
        assert allowed == common | {"action": "unload", "outcome": "accepted"}
        assert denied == common | {
            "action": "load",
            "outcome": "denied",
            "code": "policy_denied",
        }


async def test_a_head(service: Any, jp_fetch: Any, collector: Collector) -> None:
    answer = await jp_fetch("shimmy", "api", "audit", "anchor", method="POST", body="{}")
    assert collector.take(HEAD) == [json.loads(answer.body)["head"]]


class TestListeners:
    async def test_nobody_listens(self, service: Any, jp_serverapp: Any, monkeypatch: Any) -> None:
        """Nothing is validated, copied or written then."""
        logger = jp_serverapp.event_logger
        assert not logger.handlers
        monkeypatch.setattr(logger.schemas, "validate_event", None)
        monkeypatch.setattr(logger, "_logger", None)
        assert logger.emit(schema_id=REQUEST, data={}) is None
        async with await service.start(request()) as completion:
            await completion.text()
            await completion.finish()

    async def test_a_listener(self, service: Any, jp_serverapp: Any) -> None:
        heard = []

        async def listener(logger: Any, schema_id: str, data: dict[str, Any]) -> None:
            heard.append((schema_id, data["outcome"]))

        jp_serverapp.event_logger.add_listener(schema_id=REQUEST, listener=listener)
        async with await service.start(request()) as completion:
            await completion.text()
            await completion.finish()
        await jp_serverapp.event_logger.gather_listeners()
        assert heard == [(REQUEST, "ok")]

    async def test_one_that_fails_ends_no_request(
        self, service: Any, jp_serverapp: Any, collector: Collector, caplog: Any, monkeypatch: Any
    ) -> None:
        def failing(*_args: Any, **_named: Any) -> None:
            raise ValidationError("no such field")

        monkeypatch.setattr(jp_serverapp.event_logger.schemas, "validate_event", failing)
        async with await service.start(request()) as completion:
            assert await completion.text()
            assert await completion.finish() is not None
        await drained(service.guard)
        assert "an event was not emitted" in caplog.text
        emit_head(jp_serverapp.event_logger, Head(0, "", ""))

    async def test_after_a_restart_once_each(
        self, service: Any, jp_serverapp: Any, jp_fetch: Any, collector: Collector, fakes: Fakes
    ) -> None:
        extension = extension_of(jp_serverapp)
        await extension.stop_extension()
        extension.service = other = service_of(fakes, Guard())
        extension.watch()
        jp_serverapp.web_app.settings["shimmy_service"] = other
        await jp_fetch(*CHAT, method="POST", body=chat())
        assert len(collector.take(REQUEST)) == 1


class TestSchemas:
    def test_known_twice(self, fakes: Fakes) -> None:
        logger = EventLogger()
        register(logger)
        register(logger)
        stop = announce(service_of(fakes, Guard()), logger)
        stop()
        stop()
        assert {REQUEST, ACT, HEAD} <= set(logger.schemas.schema_ids)

    @pytest.mark.parametrize("schema", [REQUEST, ACT, HEAD])
    def test_nothing_else_is_taken(self, schema: str, fakes: Fakes) -> None:
        logger = EventLogger()
        register(logger)
        found = logger.schemas.get(schema)
        assert found.version == "1"
        least = dict.fromkeys(found._schema["required"], "x") | {"outcome": "ok"}
        if schema == HEAD:
            least = {"size": 1, "root": "ab", "timestamp": ""}
        logger.schemas.validate_event(schema, least)
        with pytest.raises(ValidationError, match="prompt"):
            logger.schemas.validate_event(schema, least | {"prompt": "hello"})
        for name in least:
            with pytest.raises(ValidationError):
                logger.schemas.validate_event(schema, {**least, name: ["x"]})

    def test_names_are_the_ledgers(self, fakes: Fakes) -> None:
        """A collector's reader has met them before."""
        logger = EventLogger()
        register(logger)
        for schema in (REQUEST, ACT):
            assert set(logger.schemas.get(schema).properties) - {"route"} <= set(FIELDS)

    def test_they_are_where_the_code_is(self, fakes: Fakes) -> None:
        folder = Path(events.__file__).parent
        assert {path.name for path in folder.glob("*.yaml")} == set(events._FILES.values())
