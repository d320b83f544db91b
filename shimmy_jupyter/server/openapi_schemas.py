"""What our answers look like, as JSON Schema, by the names that `openapi.OPERATIONS` uses. Clients must
expect more fields than these.
"""

from __future__ import annotations

from typing import Any

from ..errors import ShimmyError, all_errors

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number"}
YES: Schema = {"type": "boolean"}
ANY: Schema = {}
DIGEST: Schema = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
REQUEST_ID: Schema = {"type": "string", "pattern": "^[0-9a-f]{32}$"}


def fields(**properties: Schema) -> Schema:
    """An object that has all of these."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def also(schema: Schema, **properties: Schema) -> Schema:
    """An object that may have these, too."""
    return {**schema, "properties": schema["properties"] | properties}


def several(schema: Schema) -> Schema:
    return {"type": "array", "items": schema}


def or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def one_of(*texts: str) -> Schema:
    return {"type": "string", "enum": list(texts)}


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def error_schema(codes: tuple[str, ...]) -> Schema:
    return fields(
        error=fields(
            message=TEXT,
            type=one_of(*sorted({cls.type for cls in all_errors()})),
            code=one_of(*codes),
            param=or_null(TEXT),
            request_id=TEXT,
        )
    )


_STANDINGS: Schema = {
    "type": "object",
    "additionalProperties": fields(
        limit=NUMBER,
        used=or_null(COUNT),
        remaining=or_null(COUNT),
        resets_at=or_null(NUMBER),
    ),
}
_HEAD = fields(size=COUNT, root=DIGEST, timestamp=TEXT)
_RECORD = fields(seq=COUNT, leaf_hash=DIGEST)
_ROW = fields(
    requests=COUNT,
    prompt_tokens=COUNT,
    cached_tokens=COUNT,
    tokens_generated=COUNT,
    denied=COUNT,
    limited=COUNT,
    errors=COUNT,
)
CODES = tuple(sorted({cls.code for cls in all_errors() if cls is not ShimmyError}))
_STATES = "available probing loading loaded unloading failed quarantined".split()
_MODEL = fields(
    id=ref("ModelId"),
    state=one_of(*_STATES),
    kind=one_of("model", "lora", "projector", "unknown"),
    architecture=or_null(TEXT),
    quantization=or_null(TEXT),
    parameters=or_null(COUNT),
    context=or_null(COUNT),
    usable_context=or_null(COUNT),
    embedding=or_null(YES),
    chat_template=or_null(DIGEST),
    size_bytes=COUNT,
    files=COUNT,
    sha256=or_null(DIGEST),
    source=TEXT,
    origin=or_null(fields(name=TEXT, revision=or_null(TEXT))),
    fit=or_null(fields(needed=COUNT, available=COUNT, ok=YES, max_context=COUNT)),
    error=or_null(TEXT),
)
_LISTED = fields(
    id=ref("ModelId"),
    object=one_of("model"),
    created=COUNT,
    owned_by=TEXT,
    shimmy=fields(state=one_of(*_STATES), size_bytes=COUNT, error=or_null(TEXT)),
)
_JOB = fields(
    id=ref("JobId"),
    kind=one_of("load", "unload", "probe", "verify", "pull"),
    model=TEXT,
    state=one_of("running", "done", "failed", "cancelled"),
    message=TEXT,
    done=COUNT,
    total=or_null(COUNT),
    unit=TEXT,
    error=or_null(error_schema(CODES)["properties"]["error"]),
    result=or_null({"type": "object"}),
)
_SUGGESTION = fields(
    id=TEXT,
    tasks=several(TEXT),
    repo=TEXT,
    file=or_null(TEXT),
    quantisation=or_null(TEXT),
    reference=TEXT,
    licence=TEXT,
    parameters=COUNT,
    size_bytes=COUNT,
    memory_bytes=COUNT,
    note=TEXT,
    here=YES,
)
_USAGE = fields(
    prompt_tokens=COUNT,
    completion_tokens=COUNT,
    total_tokens=COUNT,
    prompt_tokens_details=fields(cached_tokens=COUNT),
    completion_tokens_details=fields(reasoning_tokens=COUNT),
)
_READ = fields(prompt_tokens=COUNT, total_tokens=COUNT)
_FIGURES = fields(
    request_id=REQUEST_ID,
    receipt=or_null(fields(request_id=TEXT, seq=COUNT, leaf_hash=DIGEST)),
    queue_ms=or_null(NUMBER),
    ttft_ms=or_null(NUMBER),
    tokens_per_second=or_null(NUMBER),
    cached_tokens=COUNT,
    made_by=or_null(
        fields(
            sha256=or_null(several(DIGEST)),
            quantization=or_null(TEXT),
            chat_template=or_null(DIGEST),
            adapter=or_null(DIGEST),
            prompt=DIGEST,
            engine=TEXT,
            build=or_null(DIGEST),
            cpu=or_null(TEXT),
            cpu_features=several(TEXT),
            context_size=COUNT,
            kv_type=TEXT,
            threads=COUNT,
            gpu_layers=COUNT,
        )
    ),
    parameters=fields(
        temperature=NUMBER,
        top_k=COUNT,
        top_p=NUMBER,
        min_p=NUMBER,
        repeat_penalty=NUMBER,
        repeat_last_n=COUNT,
        presence_penalty=NUMBER,
        frequency_penalty=NUMBER,
        seed=or_null({"type": "integer"}),
        min_tokens=COUNT,
        ignore_eos=YES,
        max_tokens=COUNT,
        reproducible=YES,
    ),
)


def _scored(**more: Schema) -> Schema:
    return fields(token=TEXT, logprob=NUMBER, bytes=several(COUNT), **more)


_CHAT_SCORES = also(
    fields(content=several(_scored(top_logprobs=several(_scored()))), refusal={"type": "null"}),
    reasoning_content=several(_scored(top_logprobs=several(_scored()))),
)
_TEXT_SCORES = fields(
    tokens=several(TEXT),
    token_logprobs=several(or_null(NUMBER)),
    top_logprobs=several(or_null({"type": "object", "additionalProperties": NUMBER})),
    text_offset=several(COUNT),
)


def _completion(kind: str, scores: Schema, **said: Schema) -> Schema:
    choice = fields(
        index=COUNT, **said, logprobs=or_null(scores), finish_reason=one_of("stop", "length")
    )
    return fields(
        id=TEXT,
        object=one_of(kind),
        created=COUNT,
        model=TEXT,
        choices=several(choice),
        usage=_USAGE,
        shimmy=_FIGURES,
    )


SCHEMAS: dict[str, Schema] = {
    "ModelId": {"type": "string", "pattern": "^[A-Za-z0-9._:@-]{1,128}$"},
    "RequestId": REQUEST_ID,
    "JobId": {"type": "string", "pattern": "^[0-9a-f]{32}$"},
    "Error": error_schema(CODES),
    "Model": _MODEL,
    "Models": fields(models=several(ref("Model")), default=or_null(ref("ModelId")), engine=TEXT),
    "ListedModel": _LISTED,
    "ListedModels": fields(object=one_of("list"), data=several(ref("ListedModel"))),
    "Job": _JOB,
    "Jobs": fields(jobs=several(ref("Job"))),
    "Accepted": fields(job=ref("JobId")),
    "Suggestions": fields(
        suggestions=several(_SUGGESTION), first=or_null(TEXT), memory_bytes=COUNT
    ),
    "ChatCompletion": _completion(
        "chat.completion",
        _CHAT_SCORES,
        message=also(
            fields(role=one_of("assistant"), content=TEXT, refusal={"type": "null"}),
            reasoning_content=TEXT,
        ),
    ),
    "TextCompletion": _completion("text_completion", _TEXT_SCORES, text=TEXT),
    "Vectors": fields(
        object=one_of("list"),
        data=several(
            fields(
                object=one_of("embedding"),
                index=COUNT,
                embedding={"anyOf": [several(NUMBER), TEXT]},
            )
        ),
        model=TEXT,
        usage=_READ,
    ),
    "Ranking": fields(
        object=one_of("list"),
        model=TEXT,
        results=several(
            also(fields(index=COUNT, relevance_score=NUMBER), document=fields(text=TEXT))
        ),
        usage=_READ,
    ),
    "TokenIds": fields(tokens=several(COUNT), count=COUNT),
    "Detokenized": fields(text=TEXT),
    "Rendered": fields(prompt=TEXT, count=COUNT, cached_tokens=COUNT),
    "Health": fields(
        status=one_of("ok", "degraded", "down"),
        active=COUNT,
        dependencies=several(
            fields(
                name=TEXT,
                status=one_of("ok", "degraded", "down"),
                detail=TEXT,
                action=or_null(TEXT),
            )
        ),
    ),
    "Limits": fields(
        limits=_STANDINGS,
        shared={"type": "object", "additionalProperties": _STANDINGS},
        own={"type": "object", "additionalProperties": NUMBER},
        locked={"type": "object", "additionalProperties": TEXT},
        queue_position=or_null(COUNT),
    ),
    "Records": fields(records=several(_RECORD), next_cursor=or_null(COUNT)),
    "Export": TEXT,
    "UsageRows": fields(
        since=or_null(NUMBER), until=or_null(NUMBER), by=several(TEXT), usage=several(_ROW)
    ),
    "Verdict": fields(
        ok=YES,
        records=COUNT,
        head=or_null(_HEAD),
        first_bad=or_null(COUNT),
        problem=or_null(TEXT),
        erased=COUNT,
        open_requests=COUNT,
        anchored=YES,
    ),
    "Anchor": fields(head=_HEAD),
    "Proof": fields(
        version=COUNT,
        request_id=TEXT,
        records=several(fields(seq=COUNT, leaf_hash=DIGEST, body=TEXT, path=several(DIGEST))),
        head=_HEAD,
    ),
    "OpenApi": fields(openapi=TEXT, info={"type": "object"}, paths={"type": "object"}),
}
