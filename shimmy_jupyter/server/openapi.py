"""Our routes as an OpenAPI 3.1 document, made from the route table, the bodies' models and the table of
operations below. `python -m shimmy_jupyter.server.openapi > docs/openapi.json` writes it down.

A new route needs a line in `OPERATIONS`, and its answer a schema in `openapi_schemas.SCHEMAS`.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from ..errors import all_errors
from ..models.suggest import TASKS
from .handlers import ROUTES
from .handlers.base import ShimmyHandler, UnknownRouteHandler
from .openapi_schemas import COUNT, SCHEMAS, TEXT, Schema, one_of, ref

_METHODS = ("get", "head", "post", "put", "patch", "delete")
_EVERY = (
    "invalid_value policy_denied not_found request_too_large internal_error misconfigured"
    " shutting_down"
).split()
_NAMES = ("model_not_found",)
_USES = (
    *_NAMES,
    *"model_load_failed engine_crashed queue_full deadline_exceeded".split(),
    *"rate_limit_exceeded audit_unavailable".split(),
)
_ENCODES = (*_USES, "context_length_exceeded", "unsupported_parameter")
_GENERATES = (*_ENCODES, "model_drifted", "generation_failed", "constraint_too_complex")
_OWN = "unknown_parameter"
_COUNTED = ("audit_unavailable",)
_RECORDED = ("audit_unavailable",)
_FILTERS: tuple[tuple[str, Schema], ...] = (
    *((name, TEXT) for name in ("user", "model", "request_id", "since", "until")),
    ("outcome", one_of("ok", "accepted", "denied", "limited", "cancelled", "error")),
    ("kind", one_of("begin", "end", "act")),
    ("action", TEXT),
)


@dataclass(frozen=True, slots=True)
class Operation:
    """What a method of a route does. `answer` is the name of a schema, `body` the module and the name
    of the pydantic model that reads the body, and `errors` the codes beside those of every route.
    """

    summary: str
    answer: str
    body: str | None = None
    status: int = 200
    errors: tuple[str, ...] = ()
    query: tuple[tuple[str, Schema], ...] = ()
    id: str = "ModelId"
    """Of what the `{id}` in the path is one."""
    streams: str = ""
    """When the answer is server-sent events."""
    optional: bool = False
    """Whether the body may be left out."""
    also: tuple[int, ...] = ()
    """Further statuses with the same answer."""


def _job(summary: str) -> Operation:
    return Operation(
        summary,
        "Accepted",
        "model_requests.Empty",
        202,
        (_OWN, "queue_full", "audit_unavailable", *_NAMES),
        optional=True,
    )


OPERATIONS: dict[tuple[str, str], Operation] = {
    ("post", "shimmy/v1/chat/completions"): Operation(
        "Answer a chat", "ChatCompletion", "requests.Chat", errors=_GENERATES,
        streams="with `stream: true`",
    ),
    ("post", "shimmy/v1/completions"): Operation(
        "Continue a text", "TextCompletion", "requests.Completion", errors=_GENERATES,
        streams="with `stream: true`",
    ),
    ("post", "shimmy/v1/embeddings"): Operation(
        "Vectors of texts", "Vectors", "embeddings.Embeddings", errors=_ENCODES
    ),
    ("post", "shimmy/v1/rerank"): Operation(
        "How relevant documents are", "Ranking", "embeddings.Rerank", errors=_ENCODES
    ),
    ("get", "shimmy/v1/models"): Operation("Models that a request can name", "ListedModels"),
    ("get", "shimmy/v1/models/{id}"): Operation("One of them", "ListedModel", errors=_NAMES),
    ("post", "shimmy/api/tokenize"): Operation(
        "The tokens of a text or chat", "TokenIds", "token_requests.Tokenize",
        errors=(_OWN, *_ENCODES),
    ),
    ("post", "shimmy/api/detokenize"): Operation(
        "The text of tokens", "Detokenized", "token_requests.Detokenize", errors=(_OWN, *_USES)
    ),
    ("post", "shimmy/api/apply-template"): Operation(
        "A chat as the model's template writes it", "Rendered", "token_requests.Template",
        errors=(_OWN, *_ENCODES),
    ),
    ("get", "shimmy/api/models"): Operation("Every model, adapter and projector", "Models"),
    ("post", "shimmy/api/models/discover"): Operation(
        "Look at the disk again", "Models", "model_requests.Empty", errors=(_OWN,), optional=True
    ),
    ("post", "shimmy/api/models/pull"): Operation(
        "Download a model", "Accepted", "model_requests.Pull", 202,
        (_OWN, "queue_full", "audit_unavailable"),
    ),
    ("get", "shimmy/api/models/{id}"): Operation("One of them", "Model", errors=_NAMES),
    ("post", "shimmy/api/models/{id}/load"): _job("Load a model into memory"),
    ("post", "shimmy/api/models/{id}/unload"): _job("Unload it, once nobody uses it"),
    ("post", "shimmy/api/models/{id}/probe"): _job("Try it out in a process of its own"),
    ("post", "shimmy/api/models/{id}/verify"): _job("Read its bytes again"),
    ("get", "shimmy/api/suggestions"): Operation(
        "What is worth downloading", "Suggestions", query=(("task", one_of(*TASKS)),)
    ),
    ("get", "shimmy/api/jobs"): Operation("One's own jobs", "Jobs"),
    ("get", "shimmy/api/jobs/{id}"): Operation(
        "One of them", "Job", id="JobId", streams="with `Accept: text/event-stream`"
    ),
    ("delete", "shimmy/api/jobs/{id}"): Operation("Stop it", "Job", id="JobId"),
    ("get", "shimmy/api/limits"): Operation("What one has left", "Limits", errors=_COUNTED),
    ("put", "shimmy/api/limits"): Operation(
        "Tighten one's own", "Limits", "limit_requests.Tightened", errors=(_OWN, *_COUNTED)
    ),
    ("get", "shimmy/api/audit"): Operation(
        "What is on record, the newest first", "Records", errors=_RECORDED,
        query=(*_FILTERS, ("cursor", COUNT), ("limit", {**COUNT, "minimum": 1, "maximum": 1000})),
    ),
    ("get", "shimmy/api/audit/export"): Operation(
        "The same as a file", "Export", errors=_RECORDED,
        query=(*_FILTERS, ("format", one_of("csv", "jsonl"))), streams="never; a file",
    ),
    ("get", "shimmy/api/audit/usage"): Operation(
        "Who used what, this month or as asked", "UsageRows", errors=_RECORDED,
        query=(("since", TEXT), ("until", TEXT), ("by", TEXT)),
    ),
    ("post", "shimmy/api/audit/anchor"): Operation(
        "What the ledger is now, to be kept elsewhere", "Anchor", "model_requests.Empty",
        errors=(_OWN, *_RECORDED), optional=True,
    ),
    ("post", "shimmy/api/audit/verify"): Operation(
        "Whether the ledger is whole", "Verdict", "audit_requests.Verify",
        errors=(_OWN, "queue_full", *_RECORDED), optional=True,
    ),
    ("get", "shimmy/api/audit/receipts/{id}"): Operation(
        "A request's records, and the proof that they are in the ledger", "Proof",
        errors=_RECORDED, id="RequestId",
    ),
    ("get", "shimmy/api/openapi.json"): Operation("This document", "OpenApi"),
    ("get", "shimmy/health"): Operation(
        "Whether a prompt could be answered", "Health", also=(503,)
    ),
}  # fmt: skip


def routes() -> list[tuple[str, str]]:
    """Every method and path that the route table has, as `OPERATIONS` writes them."""
    return [
        (method, pattern.replace("([^/]+)", "{id}"))
        for pattern, handler in ROUTES
        if handler is not UnknownRouteHandler
        for method in _METHODS
        if getattr(handler, method) is not getattr(ShimmyHandler, method)
    ]


def build() -> dict[str, Any]:
    """The document. Raises KeyError for a route that `OPERATIONS` lacks."""
    paths: dict[str, dict[str, Any]] = {}
    for method, path in routes():
        paths.setdefault(f"/{path}", {})[method] = _described(method, path)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Shimmy for Jupyter",
            "version": "1",
            "description": "A local language model behind Jupyter's own authentication. What the "
            "fields mean is in docs/design.md.",
        },
        "servers": [
            {
                "url": "{base_url}",
                "description": "A Jupyter server",
                "variables": {"base_url": {"default": "http://localhost:8888"}},
            }
        ],
        "paths": paths,
        "components": {
            "schemas": SCHEMAS | _bodies(),
            "headers": {"RequestId": _REQUEST_ID},
            "securitySchemes": _SECURITY,
        },
    }


_SECURITY: dict[str, Any] = {
    "token": {
        "type": "apiKey",
        "in": "header",
        "name": "Authorization",
        "description": "`token` and the server's token, or that of a JupyterHub user",
    },
    "query": {"type": "apiKey", "in": "query", "name": "token", "description": "The same token"},
    "cookie": {
        "type": "apiKey",
        "in": "cookie",
        "name": "username-localhost-8888",
        "description": "Of a browser that has signed in; its name has the server's host and port",
    },
    "xsrf": {
        "type": "apiKey",
        "in": "header",
        "name": "X-XSRFToken",
        "description": "The value of the cookie `_xsrf`, wherever something may change",
    },
}


def _described(method: str, path: str) -> dict[str, Any]:
    operation = OPERATIONS[method, path]
    safe = method in ("get", "head")
    found: dict[str, Any] = {
        "summary": operation.summary,
        "operationId": "_".join([method, *re.findall(r"\w+", path.removeprefix("shimmy/"))]),
        "tags": ["OpenAI" if path.startswith("shimmy/v1/") else "Shimmy"],
        "security": [
            {"token": []},
            {"query": []},
            {"cookie": []} if safe else {"cookie": [], "xsrf": []},
        ],
        "responses": _responses(operation),
    }
    parameters = [
        {"name": name, "in": "query", "required": False, "schema": schema}
        for name, schema in operation.query
    ]
    if "{id}" in path:
        parameters.append(
            {"name": "id", "in": "path", "required": True, "schema": ref(operation.id)}
        )
    if parameters:
        found["parameters"] = parameters
    if operation.body is not None:
        schema = ref(operation.body.rpartition(".")[2])
        found["requestBody"] = {
            "required": not operation.optional,
            "content": {"application/json": {"schema": schema}},
        }
    return found


def _responses(operation: Operation) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": ref(operation.answer)}}
    said = operation.summary
    if operation.streams:
        content["text/event-stream"] = {}
        said += f"; server-sent events {operation.streams}"
    answer = {"description": said, "headers": _HEADERS, "content": content}
    found: dict[str, Any] = {str(operation.status): answer}
    codes: dict[int, list[str]] = {}
    for cls in all_errors()[1:]:
        known = codes.setdefault(cls.status, [])
        if cls.code in {*_EVERY, *operation.errors} and cls.code not in known:
            known.append(cls.code)
    for status in sorted(status for status, known in codes.items() if known):
        schemas = [ref("Error")] + [ref(operation.answer)] * (status in operation.also)
        found[str(status)] = {
            "description": ", ".join(codes[status]),
            "headers": _HEADERS,
            "content": {
                "application/json": {
                    "schema": schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
                }
            },
            "x-codes": codes[status],
        }
    return found


_HEADERS = {"x-shimmy-request-id": {"$ref": "#/components/headers/RequestId"}}
_REQUEST_ID = {"description": "What the server's log calls this request", "schema": TEXT}


def _bodies() -> dict[str, Schema]:
    """The schemas of all bodies, and of what they are made of."""
    from pydantic.json_schema import models_json_schema

    from .fields import NEUTRAL

    kinds: dict[str, Any] = {}
    for operation in OPERATIONS.values():
        if operation.body is not None:
            module, _, name = operation.body.partition(".")
            kinds[name] = getattr(import_module(f".{module}", __package__), f"_{name}")
    _, made = models_json_schema(
        [(kind, "validation") for kind in kinds.values()],
        ref_template="#/components/schemas/{model}",
    )
    # Models are private to their modules; here their names are what is public.
    text = json.dumps(made["$defs"]).replace("#/components/schemas/_", "#/components/schemas/")
    schemas = {name.lstrip("_"): schema for name, schema in json.loads(text).items()}
    _strip(list(schemas.values()))
    for name, kind in kinds.items():
        if kind.model_config.get("extra") == "allow":
            _add_neutral(schemas[name], NEUTRAL)
    return schemas


def _strip(schemas: list[Any]) -> None:
    """Names that are made of the fields' names, and null as the default of what may be null."""
    for schema in schemas:
        if schema.get("default", 0) is None:
            del schema["default"]
        if isinstance(schema.get("title"), str):
            del schema["title"]
        inside = [*schema.get("properties", {}).values(), *schema.get("anyOf", ())]
        inside += [schema[key] for key in ("items", "additionalProperties") if key in schema]
        _strip([one for one in inside if isinstance(one, dict)])


def _add_neutral(schema: Schema, neutral: dict[str, tuple[Any, ...]]) -> None:
    """Fields of OpenAI's without effect here, at the values that are taken."""
    for name, values in neutral.items():
        schema["properties"].setdefault(name, {"enum": [None, *values]})


def written() -> str:
    """The document as text, the same whenever the code is."""
    return json.dumps(build(), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


@functools.cache
def served() -> bytes:
    """The document as it goes over the wire. Imports pydantic: not for the event loop."""
    return json.dumps(build(), separators=(",", ":"), ensure_ascii=False).encode()


if __name__ == "__main__":
    sys.stdout.write(written())
