"""An answer in the making: one stream for each choice, read as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

from .audit.ledger import Receipt
from .core.messages import Progress
from .engine.stream import TokenStream
from .errors import Cancelled, QueueFull, ShimmyError
from .guard.visit import Result, Visit, result_of
from .types import CompletionRequest, Ended, FinishReason, MadeBy, Scored, Timings, Usage

_WHOLE = (FinishReason.STOP, FinishReason.LENGTH)


@dataclass(slots=True)  # one for each token, and to freeze it takes as long as to make it
class Delta:
    """Text of one choice, or of the reasoning before it, with the tokens it came from where
    log-probabilities were asked for.
    """

    index: int
    text: str
    scored: tuple[Scored, ...] = ()
    reasoning: bool = False
    prompt: bool = False
    """The tokens are the prompt's, all but the first, and there is no text."""


@dataclass(frozen=True, slots=True)
class Echo:
    """The prompt's text, and that of its first token, which has no log-probability."""

    text: str
    first: str


def settled(request: CompletionRequest, max_tokens: int) -> CompletionRequest:
    """With what it gets where it does not say."""
    sampling = request.sampling
    if sampling.seed is None and request.reproducible:
        sampling = replace(sampling, seed=0)
    return replace(request, max_tokens=max_tokens, sampling=sampling)


class Completion:
    """Read it; then `endings` holds each choice's reason, and `usage` the exact counts.

    It owns its sequences: leaving the `async with` block, or `close`, frees them. `bell` rings when
    something has arrived on one of `streams`, one for each choice; without any, every choice is empty.
    `request` has what it gets where it did not say, and `made` is what computes it.
    """

    def __init__(
        self,
        request: CompletionRequest,
        prompt_tokens: int,
        streams: tuple[TokenStream, ...] = (),
        bell: asyncio.Event | None = None,
        *,
        visit: Visit | None = None,
        echo: Echo | None = None,
        made: MadeBy | None = None,
    ) -> None:
        self.visit = visit
        self._output: list[str] = []
        self._spoken = False
        self.request = request
        self.prompt_tokens = prompt_tokens
        self.streams = streams
        self.echo, self.made = echo, made
        self._bell = bell or asyncio.Event()
        if visit is not None and streams:
            visit.waits(self._place)

    async def read(self) -> list[Delta]:
        """All that has arrived since the last call, waiting for some; empty at the end.

        Raises the error that ended a sequence, or `Cancelled` if somebody closed it.
        """
        found: list[Delta] = []
        while not found:
            over = self._over()
            if not (over or self._bell.is_set()):  # else there may be something already
                await self._bell.wait()
            self._bell.clear()
            found = self._arrived()
            if over:
                break
        if not found and any(e.reason is FinishReason.CANCELLED for e in self.endings):
            raise Cancelled("the request was cancelled")
        if found and self.visit is not None:
            self._hear(found, self.visit)
        return found

    def _hear(self, found: list[Delta], visit: Visit) -> None:
        if not self._spoken:
            self._spoken = True
            visit.first_token()
        if visit.keeps_output:
            self._output += [delta.text for delta in found]

    async def finish(self, error: BaseException | None = None) -> Receipt | None:
        """When all has been read, or nothing more is wanted: what was used is settled, and how it ended is
        on record. The record's receipt, None where nothing is recorded. Raises `AuditUnavailable`.
        """
        if self.visit is None:
            return None
        self.close()
        # What it has used is known when the engine has let go of it.
        while any(stream.ended is None for stream in self.streams):
            await self._ring()
        return await self.visit.end(self._result(error))

    def _result(self, error: BaseException | None) -> Result:
        if error is None and any(e.reason not in _WHOLE for e in self.endings):
            error = Cancelled("nobody read it to its end")
        came = Result("ok") if error is None else result_of(error)
        usage, rate = self.usage, self.ended.timings.tokens_per_second
        if isinstance(error, QueueFull) and not usage.completion_tokens:
            return came  # it was not let in: nothing has been computed
        aside = replace(came.aside, token_seconds=1 / rate if rate else None)
        return replace(came, usage=usage, output="".join(self._output), aside=aside)

    async def wait(self, seconds: float) -> bool:
        """Whether there is something to read, the end too, within so many seconds."""
        try:
            async with asyncio.timeout(seconds):
                while not (self._over() or any(stream.arrived for stream in self.streams)):
                    await self._ring()
        except TimeoutError:
            return False
        return True

    def waiting(self) -> Progress | None:
        """What it waited for a moment ago, None if that is not known yet; asks again."""
        for stream in self.streams:
            stream.ask()
        return self.streams[0].progress if self.streams else None

    def _place(self) -> int | None:
        progress = self.waiting()
        return None if progress is None or progress.admitted else progress.position

    async def __aiter__(self) -> AsyncIterator[str]:
        """The first choice's text, without reasoning."""
        while found := await self.read():
            for delta in found:
                if not (delta.index or delta.reasoning):
                    yield delta.text

    async def text(self) -> str:
        """The whole answer, of the first choice."""
        return "".join([text async for text in self])

    @property
    def ended(self) -> Ended:
        """How the first choice ended."""
        return self.endings[0]

    @property
    def endings(self) -> list[Ended]:
        """How each choice ended; only meaningful once everything has been read."""
        nothing, never = Usage(self.prompt_tokens, 0), Timings(0.0, None, None)
        if not self.streams:
            return [Ended(FinishReason.LENGTH, nothing, never)] * self.request.n
        gone = Ended(FinishReason.CANCELLED, nothing, never)
        return [stream.ended or gone for stream in self.streams]

    @property
    def usage(self) -> Usage:
        """Of all choices together; the prompt, which they share, counts once: as much of it as one has read."""
        each = [ended.usage for ended in self.endings]
        generated = sum(usage.completion_tokens for usage in each)
        thought = sum(usage.reasoning_tokens for usage in each)
        prompt = max(usage.prompt_tokens for usage in each)
        return Usage(prompt, generated, each[0].cached_tokens, thought)

    def close(self) -> None:
        for stream in self.streams:
            stream.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
        if self.visit is None or self.visit.ended:
            return
        if isinstance(error, ShimmyError) and not isinstance(error, Cancelled):
            await self.finish(error)  # on record before it is answered
        else:
            self.visit.later(self.finish(error))

    def _arrived(self) -> list[Delta]:
        return [
            Delta(index, piece.text, piece.scored, piece.reasoning, piece.prompt)
            for index, stream in enumerate(self.streams)
            for piece in stream.take()
        ]

    def _over(self) -> bool:
        return all(stream.over for stream in self.streams)

    async def _ring(self) -> None:
        self._bell.clear()
        await self._bell.wait()
