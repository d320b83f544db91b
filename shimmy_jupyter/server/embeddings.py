"""Bodies and answers of `embeddings` (OpenAI's shape) and `rerank` (Jina's and Cohere's)."""

from __future__ import annotations

import base64
import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, WithJsonSchema

from ..engine.model import MOST_INPUT_TOKENS
from ..errors import InvalidValue
from ..service import Vectors
from ..types import EmbeddingInput, EmbeddingRequest, Principal
from .fields import TOKEN_IDS, Body, Name, Text, Tokens, as_prompt, ignored, validated

MOST_INPUTS = 2048


_TEXT: dict[str, Any] = {"type": "string", "minLength": 1}
_IDS = {**TOKEN_IDS, "minItems": 1}
_INPUTS = {
    "type": "array",
    "items": {"anyOf": [_TEXT, _IDS]},
    "minItems": 1,
    "maxItems": MOST_INPUTS,
}


class _Embeddings(Body):
    model: Name
    input: Annotated[Any, WithJsonSchema({"anyOf": [_TEXT, _IDS, _INPUTS]})]
    dimensions: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    encoding_format: Literal["float", "base64"] | None = None


class _Document(Body):
    text: Text


class _Rerank(Body):
    model: Name
    query: Annotated[Text, Field(min_length=1)]
    documents: Annotated[
        list[Text | _Document], Field(min_length=1, max_length=MOST_INPUTS, fail_fast=True)
    ]
    top_n: Annotated[Tokens, Field(ge=1)] | None = None
    return_documents: bool | None = None


@dataclass(frozen=True, slots=True)
class Parsed:
    """What to compute, and how to write it down. `ignored` are names of fields without effect."""

    request: EmbeddingRequest
    answer: Callable[[Vectors], bytes]
    ignored: tuple[str, ...]


def parse_embeddings(body: bytes, request_id: str, principal: Principal) -> Parsed:
    """Raises `InvalidValue`, naming the field."""
    asked = validated(_Embeddings, body)
    inputs, names = _inputs(asked.input)
    request = EmbeddingRequest(
        request_id, principal, asked.model, inputs, names, dimensions=asked.dimensions
    )

    def answer(found: Vectors) -> bytes:
        write = _as_base64 if asked.encoding_format == "base64" else _as_numbers
        # By hand, as a vector is written already.
        data = ",".join(
            f'{{"object":"embedding","index":{i},"embedding":'
            f"{write(_shortened(_numbers(vector), asked.dimensions))}}}"
            for i, vector in enumerate(found.vectors)
        )
        rest = json.dumps({"model": asked.model, "usage": _usage(found)})
        return f'{{"object":"list","data":[{data}],{rest[1:]}'.encode()

    return Parsed(request, answer, ignored(asked.model_extra or {}))


def parse_rerank(body: bytes, request_id: str, principal: Principal) -> Parsed:
    """Raises `InvalidValue`, naming the field."""
    asked = validated(_Rerank, body)
    documents = [one if isinstance(one, str) else one.text for one in asked.documents]
    request = EmbeddingRequest(
        request_id,
        principal,
        asked.model,
        tuple((asked.query, document) for document in documents),
        tuple(f"documents.{i}" for i in range(len(documents))),
        rank=True,
    )

    def answer(found: Vectors) -> bytes:
        scores = [_numbers(vector)[0] for vector in found.vectors]
        best = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[: asked.top_n]
        results: list[dict[str, Any]] = [{"index": i, "relevance_score": scores[i]} for i in best]
        if asked.return_documents:
            for result in results:
                result["document"] = {"text": documents[result["index"]]}
        whole = {"object": "list", "model": asked.model, "results": results, "usage": _usage(found)}
        return json.dumps(whole, ensure_ascii=False).encode()

    return Parsed(request, answer, ignored(asked.model_extra or {}))


def _inputs(value: Any) -> tuple[tuple[EmbeddingInput, ...], tuple[str, ...]]:
    """A text, or tokens, or a list of either; and what the body calls each."""
    single = isinstance(value, str) or (
        isinstance(value, list) and bool(value) and type(value[0]) is int
    )
    values = [value] if single else value
    if not isinstance(values, list) or not values:
        raise InvalidValue("a text, a list of token ids, or a list of these", param="input")
    if len(values) > MOST_INPUTS:
        raise InvalidValue(f"{len(values)} inputs; at most {MOST_INPUTS} at once", param="input")
    total = sum(len(value) for value in values if isinstance(value, list))
    if total > MOST_INPUT_TOKENS:
        raise InvalidValue(f"{total} tokens; at most {MOST_INPUT_TOKENS} at once", param="input")
    names = ("input",) if single else tuple(f"input.{i}" for i in range(len(values)))
    return tuple(_input(one, name) for one, name in zip(values, names, strict=True)), names


def _input(value: Any, name: str) -> EmbeddingInput:
    if not value:
        raise InvalidValue("an empty input has no vector", param=name)
    if isinstance(value, list) and type(value[0]) is not int:
        raise InvalidValue("an input is a text, or a list of token ids", param=name)
    try:
        found = as_prompt(value)
    except ValueError as error:
        raise InvalidValue(str(error), param=name) from None
    return (found,) if isinstance(found, str) else tuple(t for t in found if isinstance(t, int))


def _numbers(vector: bytes) -> tuple[float, ...]:
    return struct.unpack(f"<{len(vector) // 4}f", vector)


def _shortened(vector: tuple[float, ...], dimensions: int | None) -> tuple[float, ...]:
    """The first so many numbers, at length 1 again: what models trained for it expect (Kusupati et al.,
    "Matryoshka Representation Learning", 2022).
    """
    if dimensions is None:
        return vector
    first = vector[:dimensions]
    length = math.hypot(*first)
    return tuple(value / length for value in first) if length else first


def _as_numbers(vector: tuple[float, ...]) -> str:
    # Nine digits tell every float32 from the next.
    return "[" + ",".join([f"{value:.9g}" for value in vector]) + "]"


def _as_base64(vector: tuple[float, ...]) -> str:
    return '"' + base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode() + '"'


def _usage(found: Vectors) -> dict[str, int]:
    return {"prompt_tokens": found.tokens, "total_tokens": found.tokens}
