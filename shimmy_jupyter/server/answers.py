"""From a `Completion` to OpenAI's answer shapes: one JSON body, or the chunks of a stream."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import ShimmyError
from ..models.lifecycle import ModelStatus
from ..service import Completion
from ..types import Ended

if TYPE_CHECKING:  # importing it would load pydantic at the server's start
    from .requests import Parsed

PATIENCE = 1.0
"""Seconds without text until a stream's headers go out, with what it is waiting for."""
# `json.dumps` makes an encoder each time that it is not asked for its defaults.
_quoted = json.JSONEncoder(ensure_ascii=False).encode
DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Shape:
    """What differs between the two endpoints."""

    chat: bool

    @property
    def prefix(self) -> str:
        return "chatcmpl-" if self.chat else "cmpl-"

    @property
    def object(self) -> str:
        return "chat.completion" if self.chat else "text_completion"

    @property
    def chunk_object(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def choice(self, text: str, reason: str | None) -> dict[str, Any]:
        body: dict[str, Any] = (
            {"message": {"role": "assistant", "content": text, "refusal": None}}
            if self.chat
            else {"text": text}
        )
        return {"index": 0, **body, "logprobs": None, "finish_reason": reason}

    def delta(self, delta: dict[str, str], reason: str | None) -> dict[str, Any]:
        body: dict[str, Any] = {"delta": delta} if self.chat else {"text": delta.get("content", "")}
        return {"index": 0, **body, "logprobs": None, "finish_reason": reason}


CHAT, COMPLETION = Shape(chat=True), Shape(chat=False)


def usage(ended: Ended) -> dict[str, Any]:
    used = ended.usage
    return {
        "prompt_tokens": used.prompt_tokens,
        "completion_tokens": used.completion_tokens,
        "total_tokens": used.total_tokens,
        "prompt_tokens_details": {"cached_tokens": used.cached_tokens},
    }


def figures(request_id: str, ended: Ended) -> dict[str, Any]:
    """The `shimmy` object: times in milliseconds, the decode rate in tokens per second."""

    def rounded(value: float | None) -> float | None:
        return None if value is None else round(value, 2)

    timings = ended.timings
    return {
        "request_id": request_id,
        "queue_ms": rounded(timings.queue_ms),
        "ttft_ms": rounded(timings.ttft_ms),
        "tokens_per_second": rounded(timings.tokens_per_second),
        "cached_tokens": ended.usage.cached_tokens,
    }


async def body(shape: Shape, parsed: Parsed, completion: Completion, created: int) -> bytes:
    """The whole answer as one JSON body. Raises what ended the completion."""
    text = await completion.text()
    ended = completion.ended
    request = parsed.request
    return _dump(
        {
            "id": shape.prefix + request.request_id,
            "object": shape.object,
            "created": created,
            "model": request.model,
            "choices": [shape.choice(text, ended.reason.value)],
            "usage": usage(ended),
            "shimmy": figures(request.request_id, ended),
        }
    )


class EventWriter:
    """Server-sent events of one stream. A text event is spliced, not built, as there are many."""

    def __init__(self, shape: Shape, parsed: Parsed, created: int) -> None:
        self._shape, self._parsed = shape, parsed
        mark = "\0"
        head: dict[str, Any] = {
            "id": shape.prefix + parsed.request.request_id,
            "object": shape.chunk_object,
            "created": created,
            "model": parsed.request.model,
        }
        if parsed.include_usage:
            head["usage"] = None
        self._head = head
        template = event(head | {"choices": [shape.delta({"content": mark}, None)]})
        before, _, after = template.partition(json.dumps(mark).encode())
        self._before, self._after = before, after

    async def events(self, completion: Completion) -> AsyncIterator[bytes]:
        """Everything to send, some events at a time. An error before the first is raised; a later
        one is the last event. Comments say what it waits for while there is no text.
        """
        data = self._opening()
        told = False
        while not await completion.wait(PATIENCE):
            yield self._comment(completion)
            told = True
        try:
            texts = await completion.read()
        except ShimmyError as error:
            if not told:
                raise
            yield event(error.to_json(self._parsed.request.request_id))
            return
        while texts:
            yield data + self._texts(texts)
            data = b""
            try:
                texts = await completion.read()
            except ShimmyError as error:
                yield event(error.to_json(self._parsed.request.request_id))
                return
        yield data + self._closing(completion.ended)

    def _comment(self, completion: Completion) -> bytes:
        """A line that clients of server-sent events pass over, and proxies count as activity."""
        progress = completion.waiting()
        if progress is None:
            return b": waiting\n\n"
        state = "prefill" if progress.admitted else "queued"
        return (
            b": "
            + _dump(
                {
                    "state": state,
                    "position": progress.position,
                    "reason": progress.reason,
                    "prompt_done": progress.prompt_done,
                    "prompt_tokens": completion.prompt_tokens,
                }
            )
            + b"\n\n"
        )

    def _opening(self) -> bytes:
        if not self._shape.chat:
            return b""
        role = {"role": "assistant", "content": ""}
        return event(self._head | {"choices": [self._shape.delta(role, None)]})

    def _texts(self, texts: list[str]) -> bytes:
        return b"".join(self._before + _quoted(text).encode() + self._after for text in texts)

    def _closing(self, ended: Ended) -> bytes:
        extra = {"shimmy": figures(self._parsed.request.request_id, ended)}
        last = self._head | {"choices": [self._shape.delta({}, ended.reason.value)]}
        if not self._parsed.include_usage:
            return event(last | extra) + DONE
        counted = self._head | {"choices": [], "usage": usage(ended)} | extra
        return event(last) + event(counted) + DONE


def event(data: dict[str, Any]) -> bytes:
    return b"data: " + _dump(data) + b"\n\n"


def model(status: ModelStatus) -> dict[str, Any]:
    """One model as `/v1/models` lists it."""
    return {
        "id": status.file.id,
        "object": "model",
        "created": status.file.created,
        "owned_by": "shimmy" if status.file.bundled else "local",
        "shimmy": {
            "state": status.state,
            "size_bytes": status.file.size_bytes,
            "error": status.error,
        },
    }


def models(statuses: list[ModelStatus]) -> dict[str, Any]:
    return {"object": "list", "data": [model(status) for status in statuses]}


def _dump(data: dict[str, Any]) -> bytes:
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()
