"""From a `Completion` to OpenAI's answer shapes: one JSON body, or the chunks of a stream."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from ..audit.ledger import Receipt
from ..completion import Completion, Delta, Echo
from ..errors import ShimmyError
from ..models.jobs import Progress
from ..models.library import Described, ModelLibrary
from ..models.resident import ModelStatus
from ..types import Scored, Usage
from .made import made

if TYPE_CHECKING:  # importing it would load pydantic at the server's start
    from .requests import Parsed

PATIENCE = 1.0
"""Seconds without text until a stream's headers go out, with what it is waiting for."""
# `json.dumps` makes an encoder each time that it is not asked for its defaults.
_quoted = json.encoder.encode_basestring
DONE = b"data: [DONE]\n\n"
_FIELDS = ("content", "reasoning_content")
"""Of a chat's chunk, by whether its text is reasoning."""


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

    def choice(self, index: int, answer: Answer, reason: str | None) -> dict[str, Any]:
        text = "".join(answer.texts)
        message = {"role": "assistant", "content": text, "refusal": None}
        if answer.reasoning:
            message["reasoning_content"] = "".join(answer.reasoning)
        body: dict[str, Any] = {"message": message} if self.chat else {"text": text}
        scores = None
        if answer.prompt is not None:
            scores = prompt_scores(answer.prompt, answer.first, answer.scored)
        elif answer.scored or answer.thought:
            scores = self.scores(answer.scored, 0, answer.thought)
        return {"index": index, **body, "logprobs": scores, "finish_reason": reason}

    def delta(
        self,
        index: int,
        delta: dict[str, str],
        reason: str | None,
        scores: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        body: dict[str, Any] = {"delta": delta} if self.chat else {"text": delta.get("content", "")}
        return {"index": index, **body, "logprobs": scores, "finish_reason": reason}

    def scores(
        self, scored: Sequence[Scored], offset: int, thought: Sequence[Scored] = ()
    ) -> dict[str, Any]:
        """`offset` is the characters of the answer before these tokens; `thought` are those of the
        reasoning.
        """
        if self.chat:
            found = {"content": [_chat_score(one) for one in scored], "refusal": None}
            if thought:
                found["reasoning_content"] = [_chat_score(one) for one in thought]
            return found
        offsets = []
        for one in scored:
            offsets.append(offset)
            offset += len(_shown(one.piece))
        return {
            "tokens": [_shown(one.piece) for one in scored],
            "token_logprobs": [one.logprob for one in scored],
            "top_logprobs": [
                {_shown(piece): logprob for _, piece, logprob in one.top} for one in scored
            ],
            "text_offset": offsets,
        }


CHAT, COMPLETION = Shape(chat=True), Shape(chat=False)


@dataclass(slots=True)
class Answer:
    """One choice, as far as it has come."""

    texts: list[str] = field(default_factory=list)
    scored: list[Scored] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    thought: list[Scored] = field(default_factory=list)
    """The tokens of the reasoning."""
    prompt: Sequence[Scored] | None = None
    """The prompt's tokens but the first, where they are wanted."""
    first: str = ""

    def add(self, delta: Delta) -> None:
        if delta.prompt:
            self.prompt = delta.scored
            return
        (self.reasoning if delta.reasoning else self.texts).append(delta.text)
        scores = self.thought if delta.reasoning else self.scored
        scores += delta.scored


def prompt_scores(
    prompt: Sequence[Scored], first: str, answer: Sequence[Scored] = ()
) -> dict[str, Any]:
    """Of a text completion that begins with its prompt, whose first token has no probability."""
    found = COMPLETION.scores([*prompt, *answer], len(first))
    before = {"tokens": first, "token_logprobs": None, "top_logprobs": None, "text_offset": 0}
    return {name: [value, *found[name]] for name, value in before.items()}


def _shown(piece: bytes) -> str:
    return piece.decode("utf-8", "replace")


def _chat_score(one: Scored) -> dict[str, Any]:
    def token(piece: bytes, logprob: float) -> dict[str, Any]:
        return {"token": _shown(piece), "logprob": logprob, "bytes": list(piece)}

    top = [token(piece, logprob) for _, piece, logprob in one.top]
    return {**token(one.piece, one.logprob), "top_logprobs": top}


def usage(used: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": used.prompt_tokens,
        "completion_tokens": used.completion_tokens,
        "total_tokens": used.total_tokens,
        "prompt_tokens_details": {"cached_tokens": used.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": used.reasoning_tokens},
    }


def figures(completion: Completion, receipt: Receipt | None) -> dict[str, Any]:
    """The `shimmy` object: times in milliseconds, the decode rate in tokens per second."""
    ended = completion.ended

    def rounded(value: float | None) -> float | None:
        return None if value is None else round(value, 2)

    timings = ended.timings
    return {
        "request_id": completion.request.request_id,
        "receipt": asdict(receipt) if receipt is not None else None,
        "queue_ms": rounded(timings.queue_ms),
        "ttft_ms": rounded(timings.ttft_ms),
        "tokens_per_second": rounded(timings.tokens_per_second),
        "cached_tokens": ended.usage.cached_tokens,
        **made(completion),
    }


async def body(shape: Shape, parsed: Parsed, completion: Completion, created: int) -> bytes:
    """The whole answer as one JSON body. Raises what ended the completion."""
    request = parsed.request
    echo = completion.echo
    texts, first = ([echo.text], echo.first) if echo is not None else ([], "")
    choices = [Answer(texts=list(texts), first=first) for _ in range(request.n)]
    while deltas := await completion.read():
        for delta in deltas:
            choices[delta.index].add(delta)
    receipt = await completion.finish()
    return _dump(
        {
            "id": shape.prefix + request.request_id,
            "object": shape.object,
            "created": created,
            "model": request.model,
            "choices": [
                shape.choice(index, answer, ended.reason.value)
                for index, (answer, ended) in enumerate(
                    zip(choices, completion.endings, strict=True)
                )
            ],
            "usage": usage(completion.usage),
            "shimmy": figures(completion, receipt),
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
        # By choice, then by whether it is reasoning.
        self._spliced: list[list[tuple[bytes, bytes]]] = []
        for index in range(parsed.request.n):
            self._spliced.append([])
            for name in _FIELDS:
                template = event(head | {"choices": [shape.delta(index, {name: mark}, None)]})
                before, _, after = template.partition(json.dumps(mark).encode())
                self._spliced[-1].append((before, after))
        self._lengths = [0] * parsed.request.n

    async def events(self, completion: Completion, *, told: bool = False) -> AsyncIterator[bytes]:
        """Everything to send, some events at a time. An error before the first is raised; a later
        one is the last event, as is the first where something has been `told`. Comments say what it
        waits for while there is no text.
        """
        data = self._opening(completion.echo)
        while not await completion.wait(PATIENCE):
            yield self._comment(completion)
            told = True
        try:
            deltas = await completion.read()
        except ShimmyError as error:
            if not told:
                raise
            yield await self.ended(completion, error)
            return
        while deltas:
            for delta in deltas:
                data += self._delta(delta, completion.echo)
            yield data
            data = b""
            try:
                deltas = await completion.read()
            except ShimmyError as error:
                yield await self.ended(completion, error)
                return
        try:
            receipt = await completion.finish()
        except ShimmyError as error:
            yield data + self.failed(error)
        else:
            yield data + self._closing(completion, receipt)

    async def ended(self, completion: Completion, error: ShimmyError) -> bytes:
        """The error is the last event, once it is on record."""
        try:
            await completion.finish(error)
        except ShimmyError as unrecorded:
            error = unrecorded
        return self.failed(error)

    async def loading(
        self, starting: asyncio.Task[Completion], progress: Callable[[], Progress]
    ) -> AsyncIterator[bytes]:
        """Comments, until a request has begun or failed: a model may have to be loaded for it."""
        while not (await asyncio.wait([starting], timeout=PATIENCE))[0]:
            yield b": " + _dump({"state": "loading", **asdict(progress())}) + b"\n\n"

    def failed(self, error: ShimmyError) -> bytes:
        """An error where the answer has begun already."""
        return event(error.to_json(self._parsed.request.request_id))

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

    def _opening(self, echo: Echo | None) -> bytes:
        if echo is not None and self._parsed.request.sampling.prompt_logprobs is None:
            deltas = [Delta(index, echo.text) for index in range(self._parsed.request.n)]
            return b"".join(self._delta(delta, echo) for delta in deltas)
        if not self._shape.chat:
            return b""
        role = {"role": "assistant", "content": ""}
        return b"".join(
            event(self._head | {"choices": [self._shape.delta(index, role, None)]})
            for index in range(self._parsed.request.n)
        )

    def _delta(self, delta: Delta, echo: Echo | None) -> bytes:
        if delta.prompt and echo is not None:
            self._lengths[delta.index] += len(echo.text)
            scores = prompt_scores(delta.scored, echo.first)
            choice = self._shape.delta(delta.index, {"content": echo.text}, None, scores)
            return event(self._head | {"choices": [choice]})
        if not delta.scored:
            self._lengths[delta.index] += len(delta.text)
            before, after = self._spliced[delta.index][delta.reasoning]
            return before + _quoted(delta.text).encode() + after
        answer = Answer()
        answer.add(delta)
        length = self._lengths[delta.index]
        scores = self._shape.scores(answer.scored, length, answer.thought)
        self._lengths[delta.index] += len(delta.text)
        text = {_FIELDS[delta.reasoning]: delta.text}
        choice = self._shape.delta(delta.index, text, None, scores)
        return event(self._head | {"choices": [choice]})

    def _closing(self, completion: Completion, receipt: Receipt | None) -> bytes:
        extra = {"shimmy": figures(completion, receipt)}
        *others, last = [
            self._head | {"choices": [self._shape.delta(index, {}, ended.reason.value)]}
            for index, ended in enumerate(completion.endings)
        ]
        before = b"".join(map(event, others))
        if not self._parsed.include_usage:
            return before + event(last | extra) + DONE
        counted = self._head | {"choices": [], "usage": usage(completion.usage)} | extra
        return before + event(last) + event(counted) + DONE


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


def models(statuses: list[ModelStatus]) -> bytes:
    return b'{"object":"list","data":' + _rows(model(status) for status in statuses) + b"}"


def _rows(rows: Iterable[dict[str, Any]]) -> bytes:
    """A list, a row at a time: all of thousands at once would hold the interpreter's lock for long."""
    return b"[" + b",".join(_dump(row) for row in rows) + b"]"


async def library(
    found: ModelLibrary, models: list[Described], allows: Callable[[str], bool] = lambda _: True
) -> bytes:
    """The models that somebody may use as `shimmy/api/models` lists them, and which one answers where none
    is named.
    """
    models = [one for one in models if allows(one.status.file.id)]
    default = await found.default(allows)

    def listed() -> bytes:
        rows = _rows(one.to_json() for one in models)
        rest = _dump({"default": default, "engine": found.engine})
        return b'{"models":' + rows + b"," + rest[1:]

    return await asyncio.to_thread(listed)


def _dump(data: dict[str, Any]) -> bytes:
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()
