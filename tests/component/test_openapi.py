"""Our OpenAPI document, and what the server does with requests that are made from it.

Cases: every method of every route is described, and nothing else; the committed file is what the code
makes; every code, and names that mean one thing; valid JSON Schema; served and cached; answers with all
that they can have; generated requests, as described and not, to a model that is there and to others:
never a defect, always an answer that is described, and 4xx for a body that is not.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import jsonschema
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import load_all_checks
from schemathesis.core import NotSet
from schemathesis.core.transport import Response
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from tornado.httpclient import HTTPClientError

from shimmy_jupyter import errors
from shimmy_jupyter.engine.fake import FakeBackend
from shimmy_jupyter.server import openapi
from shimmy_jupyter.server.handlers import ROUTES
from shimmy_jupyter.server.openapi_schemas import SCHEMAS

from .conftest import MODEL, Fakes
from .test_access import METHODS, OURS, token_header
from .test_embeddings import RANKS, SHAPE
from .test_reasoning import SWITCHED, THOUGHTS

load_all_checks()

ROOT = Path(__file__).parent.parent.parent
DOCUMENT = openapi.build()
ASKED = schemathesis.openapi.from_dict(json.loads(json.dumps(DOCUMENT)))
OPERATIONS = {found.ok().label: found.ok() for found in ASKED.get_all_operations()}
CHECKS = [
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


def test_every_method_of_every_route_is_described() -> None:
    described = {
        (path.removeprefix("/"), method)
        for path, methods in DOCUMENT["paths"].items()
        for method in methods
    }
    ours = {
        (path.replace(f"/{MODEL}", "/{id}"), method.lower())
        for path, method in OURS
        if not path.endswith("/nothing")
    }
    assert described == ours
    assert {method.upper() for _, method in described} <= set(METHODS)
    assert len(openapi.OPERATIONS) == len(described)


def test_a_new_route_needs_its_description(monkeypatch: Any) -> None:
    _, handler = ROUTES[0]
    monkeypatch.setattr(openapi, "ROUTES", [*ROUTES, ("shimmy/api/new", handler)])
    with pytest.raises(KeyError, match="shimmy/api/new"):
        openapi.build()


def test_the_file_is_what_the_code_makes() -> None:
    saved = (ROOT / "docs" / "openapi.json").read_text(encoding="utf-8")
    assert saved == openapi.written(), "python -m shimmy_jupyter.server.openapi > docs/openapi.json"


def test_how_it_is_written_down() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "shimmy_jupyter.server.openapi"],
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    assert done.stdout == openapi.written()


def test_codes_and_names() -> None:
    schemas = DOCUMENT["components"]["schemas"]
    codes = set(schemas["Error"]["properties"]["error"]["properties"]["code"]["enum"])
    assert codes == {cls.code for cls in errors.all_errors()}
    assert not SCHEMAS.keys() & openapi._bodies().keys()
    assert not [name for name in schemas if name.startswith("_")]
    for methods in DOCUMENT["paths"].values():
        for operation in methods.values():
            for status, answer in operation["responses"].items():
                for code in answer.get("x-codes", ()):
                    assert str(errors.from_code(code, "").status) == status
    ids = [op["operationId"] for methods in DOCUMENT["paths"].values() for op in methods.values()]
    assert len(set(ids)) == len(ids)


def test_schemas_are_schemas() -> None:
    for schema in DOCUMENT["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)


async def test_served(server: Any, jp_fetch: Any) -> None:
    response = await jp_fetch("shimmy", "api", "openapi.json")
    assert response.headers["Content-Type"] == "application/json"
    assert json.loads(response.body) == DOCUMENT
    assert openapi.served() is openapi.served()


# Generated requests


@pytest.fixture
def fakes() -> Fakes:
    return Fakes()


@pytest.fixture
def send(server: Any, http_server_client: Any, jp_base_url: str, jp_asyncio_loop: Any) -> Any:
    """Sends a generated request with the server's token, and waits for the answer."""

    def send(case: Any) -> Response:
        case.query.pop("token", None)
        case.headers.update(token_header(server))
        case.headers.pop("Cookie", None)
        case.cookies.clear()
        made = case.as_transport_kwargs(base_url="http://x" + jp_base_url.rstrip("/"))
        made.pop("cookies", None)
        request = requests.Request(**made).prepare()
        body = request.body.encode() if isinstance(request.body, str) else request.body
        fetching = http_server_client.fetch(
            request.path_url, method=request.method, headers=dict(request.headers),
            body=body, allow_nonstandard_methods=True, request_timeout=30.0,
        )  # fmt: skip
        try:
            got = jp_asyncio_loop.run_until_complete(fetching)
        except HTTPClientError as error:
            assert error.response is not None, error
            got = error.response
        headers = {name: got.headers.get_list(name) for name in got.headers}
        return Response(got.code, headers, got.body, request, got.request_time, verify=False)

    return send


def documented(case: Any, status: int) -> list[str]:
    responses = DOCUMENT["paths"][case.operation.path][case.operation.method.lower()]["responses"]
    found: list[str] = responses.get(str(status), {}).get("x-codes", [])
    return found


def described_body(case: Any) -> dict[str, Any]:
    described = DOCUMENT["paths"][case.operation.path][case.operation.method.lower()]
    (kind,) = described["requestBody"]["content"].values()
    found: dict[str, Any] = kind["schema"]
    return found


def matches(case: Any) -> bool:
    """Whether the body is one that the document describes."""
    schema = {**described_body(case), "components": DOCUMENT["components"]}
    return jsonschema.Draft202012Validator(schema).is_valid(case.body)


def check(case: Any, response: Response) -> None:
    case.validate_response(response, checks=CHECKS)
    if response.headers["content-type"][0].startswith("text/event-stream"):
        check_events(response.content)
        return
    answer = json.loads(response.content)
    if response.status_code >= 400 and "error" in answer:
        error = answer["error"]
        assert set(error) == {"message", "type", "code", "param", "request_id"}
        assert error["message"]
        assert error["code"] != "internal_error"
        assert error["code"] in documented(case, response.status_code)
        assert [error["request_id"]] == response.headers["x-shimmy-request-id"]


def check_events(body: bytes) -> None:
    for block in body.decode().split("\n\n"):
        if block.startswith("data: {"):
            error = json.loads(block.removeprefix("data: ")).get("error")
            assert error is None or error["code"] != "internal_error"


def plain(case: Any, some: Random) -> None:
    """The same with a model that is there, and few of the fields that may be left out."""
    if not isinstance(body := case.body, dict):
        return
    schema = DOCUMENT["components"]["schemas"][described_body(case)["$ref"].rpartition("/")[2]]
    names = list(schema["properties"])
    kept = {*schema.get("required", ()), *some.sample(names, min(3, len(names)))}
    case.body = body = {name: value for name, value in body.items() if name in kept}
    if "model" in body:
        body["model"] = MODEL
    if {"prompt", "messages"} <= set(names):  # either
        case.body = {"model": MODEL, "prompt": body.get("prompt") or "hello"}
    for message in body.get("messages") or ():
        message["content"] = message.get("content") or "hello"
        for name in message.keys() - {"role", "content", "name"}:
            del message[name]


def there(case: Any, job: str) -> None:
    """The same with what the server has."""
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
        case.body["model"] = MODEL
    if "id" in case.path_parameters:
        case.path_parameters["id"] = job if "/jobs/" in case.operation.path else MODEL


GENERATED = settings(
    database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.name.lower())
@pytest.mark.parametrize("label", OPERATIONS)
def test_no_request_finds_a_defect(
    send: Any, server: Any, fakes: Fakes, label: str, mode: GenerationMode
) -> None:
    if label.endswith(("embeddings", "rerank")):
        shape = SHAPE if label.endswith("embeddings") else RANKS
        fakes.make = lambda: FakeBackend(embedding=shape)
    operation = OPERATIONS[label]
    positive = mode is GenerationMode.POSITIVE
    examples = 50 if operation.body and "{id}" not in label else 20
    statuses: Counter[int] = Counter()

    @seed(20_261_121)
    @settings(GENERATED, max_examples=examples)
    @given(operation.as_strategy(generation_mode=mode), st.integers(0, 1 << 32))
    def run(case: Any, number: int) -> None:
        some = Random(number)
        if positive and some.random() < 0.6:
            plain(case, some)
        if some.random() < 0.7:
            there(case, started(send) if "/jobs/" in label else "")
        response = send(case)
        statuses[response.status_code] += 1
        check(case, response)
        if operation.body and not isinstance(case.body, NotSet):
            assert matches(case) or 400 <= response.status_code < 500, case.body

    run()
    allowed = {403} if label.endswith(("pull", "probe", "}/verify")) else {200, 202}
    if label.endswith("pull"):  # most of what is made up names nothing
        allowed = {400, 403}
    if "/audit" in label:  # nothing is recorded by this server
        allowed = {404}
    assert not positive or allowed & statuses.keys(), statuses


USER = {"messages": [{"role": "user", "content": "one two"}]}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("v1/chat/completions", USER | {"logprobs": True, "top_logprobs": 2, "n": 2}),
        ("v1/chat/completions", USER | {"stream": True, "stream_options": {"include_usage": True}}),
        ("v1/chat/completions", USER | {"max_tokens": 0}),
        ("v1/completions", {"prompt": "one", "logprobs": 2, "echo": True}),
        ("v1/completions", {"prompt": "one", "logprobs": 0, "max_tokens": 1}),
        ("v1/embeddings", {"input": ["one", [1]], "encoding_format": "base64"}),
        ("v1/embeddings", {"input": "one", "dimensions": 2}),
        ("api/tokenize", USER),
        ("api/apply-template", USER),
        ("api/detokenize", {"tokens": [62]}),
    ],
)
def test_answers_are_as_described(send: Any, fakes: Fakes, path: str, body: dict[str, Any]) -> None:
    shape = SHAPE if path.endswith("embeddings") else None
    fakes.make = lambda: FakeBackend(embedding=shape)
    case = OPERATIONS[f"POST /shimmy/{path}"].Case(
        body={"model": MODEL, **body}, query={}, headers={}, cookies={}, path_parameters={},
        media_type="application/json",
    )  # fmt: skip
    assert matches(case)
    response = send(case)
    assert response.status_code == 200
    check(case, response)


def test_reasoning_is_as_described(send: Any, fakes: Fakes) -> None:
    fakes.make = lambda: FakeBackend(lambda _: THOUGHTS, template=SWITCHED)
    case = OPERATIONS["POST /shimmy/v1/chat/completions"].Case(
        body={"model": MODEL, **USER, "logprobs": True}, query={}, headers={}, cookies={},
        path_parameters={}, media_type="application/json",
    )  # fmt: skip
    response = send(case)
    assert "reasoning_content" in json.loads(response.content)["choices"][0]["message"]
    check(case, response)


def started(send: Any) -> str:
    """A job's id."""
    case = OPERATIONS["POST /shimmy/api/models/{id}/load"].Case(
        path_parameters={"id": MODEL}, query={}, headers={}, cookies={}, media_type=None
    )
    found: str = json.loads(send(case).content)["job"]
    return found
