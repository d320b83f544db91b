"""Carrying out one request: a few blocking steps, each of which may have something to tell."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

from ...errors import InternalError, ShimmyError
from ..client import events
from ..display import Pace
from . import messages as m
from . import shapes
from .fetched import Problem
from .files import Exporting, Saving
from .reach import Transport
from .state import Figures

_MARKUP = 3
"""Bytes of HTML, at most, for a character of an answer, more or less."""


class Errand(Protocol):
    """`steps` may be closed between two of them; then `stopped` says what there was until then."""

    def steps(self, transport: Transport) -> Iterator[m.Event | None]: ...

    def stopped(self) -> m.Event: ...


def errand_of(request: m.Request, clock: Callable[[], float]) -> Errand:
    match request:
        case m.Call():
            return _Calling(request)
        case m.Generate():
            return _Generating(request, clock)
        case m.Export():
            return Exporting(request)
        case m.Save():
            return Saving(request)
    raise ValueError(f"{type(request).__name__} is no errand")


class _Calling:
    def __init__(self, call: m.Call) -> None:
        self._call = call

    def steps(self, transport: Transport) -> Iterator[m.Event | None]:
        call, body = self._call, dict(self._call.body or {})
        match call.method:
            case "GET":
                found = transport.get(call.path)
            case "DELETE":
                found = transport.delete(call.path)
            case "PUT":
                found = transport.put(call.path, body)
            case _:
                found = transport.post(call.path, body)
        yield m.Answered(call.number, found)

    def stopped(self) -> m.Event:
        return m.Stopped(self._call.number)


class _Generating:
    """Shows the answer at most ten times a second, as `Pace` has it."""

    def __init__(self, request: m.Generate, clock: Callable[[], float]) -> None:
        self._request, self._clock = request, clock
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._reason: str | None = None
        self._last: Mapping[str, Any] = {}

    def steps(self, transport: Transport) -> Iterator[m.Event | None]:
        body = dict(self._request.body)
        with transport.stream("shimmy/v1/chat/completions", body) as chunks:
            yield from self._followed(chunks)
        yield self._ended()

    def _followed(self, chunks: Iterable[bytes]) -> Iterator[m.Event | None]:
        pace, number = Pace(), self._request.number
        try:
            for item in events(chunks):
                if "waiting" in item:
                    yield m.Waited(number, waiting(item["waiting"]))
                    continue
                if not self._take(item):
                    yield None
                    continue
                now = self._clock()
                if pace.due(now):
                    grown = self._grown()
                    pace.shown(now, _MARKUP * (len(grown.text) + len(grown.reasoning)))
                    yield grown
                else:
                    yield None
        except ShimmyError:
            # What had come is an answer, too.
            yield self._grown()
            raise

    def _take(self, item: Mapping[str, Any]) -> bool:
        """Whether there is more to show."""
        before = len(self._text) + len(self._reasoning)
        for choice in item["choices"]:
            self._reason = choice["finish_reason"] or self._reason
            delta = choice["delta"]
            self._text += filter(None, [delta.get("content")])
            self._reasoning += filter(None, [delta.get("reasoning_content")])
        if "shimmy" in item:
            self._last = item
        return len(self._text) + len(self._reasoning) > before

    def _grown(self) -> m.Grew:
        return m.Grew(self._request.number, "".join(self._text), "".join(self._reasoning))

    def _ended(self) -> m.Event:
        grown, last = self._grown(), self._last
        try:
            figures: Figures = shapes.figures(last)
            id = str(last["shimmy"]["request_id"])
        except (KeyError, TypeError, ValueError) as error:
            raise InternalError("the answer ended without its figures") from error
        return m.Ended(grown.number, grown.text, grown.reasoning, self._reason, id, figures)

    def stopped(self) -> m.Event:
        grown = self._grown()
        return m.Stopped(grown.number, grown.text, grown.reasoning)


def waiting(said: Mapping[str, Any]) -> str:
    """What an answer without text yet waits for, in words."""
    state = said.get("state")
    if state == "loading":
        done, total = said.get("done") or 0, said.get("total")
        share = f", {done * 100 // total}%" if total else ""
        return f"loading the model: {said.get('message', '')}{share}"
    if state == "prefill":
        done, total = said.get("prompt_done"), said.get("prompt_tokens")
        return f"reading the prompt: {done} of {total} tokens"
    position = said.get("position") or 0
    before = f"{position} request{'s' * (position != 1)} before this one; " if position else ""
    return f"waiting: {before}{said.get('reason') or 'for its turn'}"


def problem_of(error: BaseException) -> Problem:
    """An exception as people see it; what nobody foresaw is a defect of ours, and says its kind."""
    if isinstance(error, ShimmyError):
        return Problem(error.code, error.message, error.param, error.request_id)
    said = str(error)[:300]
    return Problem("internal_error", f"{type(error).__name__}{': ' * bool(said)}{said}")
