"""A request's way past the guard: decided, counted, recorded; and settled once, however it ends."""

from __future__ import annotations

import asyncio
import contextlib
import math
import uuid
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any

from ..audit.ledger import Receipt
from ..audit.records import Entry
from ..audit.writer import StoreFailed
from ..core import policy
from ..core.budgets import NotReserved, Refusal
from ..core.limits import Account
from ..errors import (
    AccessDenied,
    AuditUnavailable,
    Cancelled,
    ContextLengthExceeded,
    InvalidValue,
    RateLimitExceeded,
    ShimmyError,
)
from ..offloop import off_loop, shared
from ..types import CompletionRequest, EmbeddingRequest, Message, Usage
from .asked import Asked, Subject, of_completion, of_embedding
from .guard import NOTHING, Aside, Guard, counted, raise_denied, reason_of

_LARGE = 64 * 1024
"""Bytes of prompt that are digested off the event loop."""
Waiting = Callable[[int], None]
"""Hears how many go before."""


@dataclass(frozen=True, slots=True)
class Result:
    """How a request ended, and what it has used; `aside` is for counting only."""

    outcome: str
    code: str | None = None
    usage: Usage | None = None
    output: str = ""
    aside: Aside = NOTHING


def result_of(error: BaseException) -> Result:
    """What an error means for the record."""
    if isinstance(error, asyncio.CancelledError | Cancelled):
        return Result("cancelled", Cancelled.code)
    code = error.code if isinstance(error, ShimmyError) else ShimmyError.code
    if isinstance(error, AccessDenied):
        return Result("denied", code, aside=Aside(reason_of(error)))
    if isinstance(error, RateLimitExceeded):
        return Result("limited", code, aside=Aside(reason_of(error)))
    return Result("error", code)


class Visit:
    """`check`, `arrive`, `reserve`, then the work, then `end`; `end` alone where it came to nothing.

    `model_sha256` is set once it is known; `usage` where it is known before the end, for an end that
    knows none; and `refused` where somebody ends it for a reason, which its own end does not know.
    """

    def __init__(self, guard: Guard, asked: Asked) -> None:
        self.asked = asked
        # In a process a request's id is whatever its caller says; two at once may have the same.
        self._id = f"{asked.request_id}:{uuid.uuid4().hex[:8]}"
        self.ended = False
        self.receipt: Receipt | None = None
        self.model_sha256: str | None = None
        self.usage: Usage | None = None
        self.refused: Result | None = None
        self._guard = guard
        self._principal = guard.rules.known(asked.principal)
        self._began = guard.clock()
        self._accounts: tuple[Account, ...] = ()
        self._subject: Subject | None = None
        self._model: str | None = None
        self._digest: str | None = None
        self._beginning: asyncio.Future[Receipt | None] | None = None
        self._present = self._reserved = False
        self._ttft_ms: float | None = None
        self._field = "prompt"
        guard.opened(self._id)

    # Before the work

    async def check(self, request: CompletionRequest | EmbeddingRequest) -> None:
        """Whether it may be asked at all, and what it is counted on. Raises `AccessDenied`."""
        self._field, self._model = _field(request), request.model
        await self._describe(request)
        self._decide(request)
        self._accounts = await self._guard.accounts(self._principal)

    async def arrive(self, waiting: Waiting) -> None:
        """Whether it may be asked now; waits for its turn. Its beginning is on the way to the ledger
        afterwards. Raises `RateLimitExceeded`.
        """
        guard, id = self._guard, self._id
        refused = await counted(guard.spending.arrive(id, self._accounts, guard.clock()))
        if refused is not None:
            raise self._refusal(refused)
        admitted = guard.crowd.arrive(id, self._accounts)
        if isinstance(admitted, Refusal):
            raise self._refusal(admitted)
        self._present = True
        if not admitted:
            await self._turn(waiting)
        self._begin()

    def _decide(self, request: CompletionRequest | EmbeddingRequest) -> None:
        policies = self._guard.rules.policies
        if isinstance(request, CompletionRequest):
            known = replace(request, principal=self._principal)
            raise_denied(policy.decide_request(policies, known))
            return
        raise_denied(policy.decide(policies, self._principal, "use", request.model))
        raise_denied(policy.feature(policies, "rerank" if request.rank else "embeddings"))

    async def _describe(self, request: CompletionRequest | EmbeddingRequest) -> None:
        ledger = self._guard.ledger
        user = self._principal.name

        def digest(data: bytes | str) -> str:
            assert ledger is not None
            return ledger.digest(data, user)

        def describe() -> tuple[Subject, str | None]:
            if isinstance(request, EmbeddingRequest):
                subject = of_embedding(request)
            else:
                subject = of_completion(request, digest)
            return subject, digest(subject.prompt)

        if ledger is None:
            return
        size = len(request.prompt) if isinstance(request, CompletionRequest) else _LARGE
        try:
            if isinstance(request, CompletionRequest) and size < _LARGE and _is_short(request):
                found = describe()
            else:
                found = await off_loop(describe)
        except StoreFailed as error:
            if self._guard.rules.fail_closed:
                raise AuditUnavailable("requests cannot be recorded, and have to be") from error
            return
        self._subject, self._digest = found

    async def _turn(self, waiting: Waiting) -> None:
        guard, id = self._guard, self._id
        turn = guard.turns[id] = asyncio.Event()
        self.waits(lambda: guard.crowd.position(id))
        try:
            while not turn.is_set():
                waiting(guard.crowd.position(id))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(1.0):
                        await turn.wait()
        finally:
            del guard.turns[id]
            guard.waiting.pop(id, None)

    def _begin(self) -> None:
        guard = self._guard
        writing = guard.write([self._entry("begin")], self.asked.route)
        self._beginning = asyncio.create_task(guard.written(writing))
        # Where nobody comes to wait for it.
        self._beginning.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def reserve(
        self, prompt_tokens: int, wanted: int | None, default: int, *, choices: int = 1
    ) -> int:
        """How many tokens each choice may have; then its beginning is on record. `wanted` None is for as
        many as `default`, or what is left. Raises `RateLimitExceeded`, `InvalidValue` or
        `ContextLengthExceeded` where it can never be, and `AuditUnavailable`.
        """
        guard = self._guard
        if wanted is None:
            ceiling = policy.ceiling(guard.rules.policies, "max_tokens")
            default = default if ceiling is None else max(1, min(default, int(ceiling)))
        self._reserved = True
        granted = await counted(
            guard.spending.reserve(
                self._id,
                self._accounts,
                prompt_tokens,
                wanted,
                default,
                guard.clock(),
                choices=choices,
            )
        )
        if isinstance(granted, Refusal):
            self._reserved = False
            raise self._refusal(granted)
        if self._beginning is not None:
            await shared(self._beginning)
        return granted

    def waits(self, place: Callable[[], int | None]) -> None:
        """`place` says how many go before it, None where it does not wait."""
        if not self.ended:  # one that was ended meanwhile would be counted for ever
            self._guard.waiting[self._id] = self._principal.name, place

    def first_token(self) -> None:
        """It no longer waits."""
        if self._ttft_ms is None:
            self._ttft_ms = self._elapsed_ms()
        self._guard.waiting.pop(self._id, None)
        if self._present:
            self._guard.crowd.first_token(self._id)

    @property
    def keeps_output(self) -> bool:
        """Whether `end` wants the answer's text."""
        return self._guard.ledger is not None

    @property
    def seconds(self) -> float | None:
        """The most that it may take."""
        limits = [a.limits.seconds for a in self._accounts if a.limits.seconds is not None]
        ceiling = policy.ceiling(self._guard.rules.policies, "max_seconds")
        return min([*limits, *([ceiling] if ceiling is not None else [])], default=None)

    async def headers(self) -> dict[str, str]:
        """What is left, as `x-ratelimit-…` headers; empty where nothing is limited by the minute."""
        guard = self._guard
        if not any(a.limits.counts_requests or a.limits.counts_tokens for a in self._accounts):
            return {}
        now = guard.clock()
        standing = await counted(guard.spending.look(self._accounts, now))
        found: dict[str, str] = {}
        for name in ("requests", "tokens"):
            rows = [
                rows[f"max_{name}_per_minute"]
                for rows in standing.values()
                if f"max_{name}_per_minute" in rows
            ]
            if not rows:
                continue
            tightest = min(rows, key=lambda row: row.remaining)
            found[f"x-ratelimit-limit-{name}"] = str(tightest.limit)
            found[f"x-ratelimit-remaining-{name}"] = str(tightest.remaining)
            if tightest.resets_at is not None:
                wait = max(0, math.ceil(tightest.resets_at - now))
                found[f"x-ratelimit-reset-{name}"] = f"{wait}s"
        return found

    # After it

    async def end(self, result: Result) -> Receipt | None:
        """Settle what was used and record how it ended; once, however often it is called. Then it is
        committed. Raises `AuditUnavailable` where it has to be and cannot.
        """
        if self.ended:
            return self.receipt
        self.ended = True
        try:
            return await self._end(result)
        finally:
            self._guard.ended(self._id)

    async def _end(self, result: Result) -> Receipt | None:
        if self.refused is not None and result.outcome == "cancelled":
            result = replace(self.refused, usage=result.usage, output=result.output)
        result = replace(result, usage=result.usage or self.usage)
        guard, id = self._guard, self._id
        guard.waiting.pop(id, None)
        if self._present:
            guard.may_go(guard.crowd.leave(id))
        settling = None
        if self._reserved:
            tokens = result.usage.total_tokens if result.usage is not None else 0
            settling = guard.spending.settle(id, self._accounts, tokens, guard.clock())
        entries = [self._finished(result)]
        if self._beginning is None:
            entries.insert(0, self._entry("begin"))
        writing = guard.write(entries, self.asked.route, result.aside)
        if settling is not None:
            with contextlib.suppress(NotReserved):  # cancelled before it was granted
                await counted(settling)
        self.receipt = await guard.written(writing)
        return self.receipt

    def later(self, work: Coroutine[Any, Any, Any]) -> None:
        """Work at whose end `end` is called, and for which nobody waits."""
        self._guard.later(work)

    def end_later(self, result: Result) -> None:
        """As `end`, where nobody waits for it."""
        if not self.ended:
            self._guard.later(self.end(result))

    def _entry(self, kind: str) -> Entry:
        entry = self._guard.entry(self.asked, kind)
        if self._subject is None:
            return replace(entry, model=self._model, model_sha256=self.model_sha256)
        content = {"prompt": self._subject.text} if self._guard.rules.record_content else None
        return replace(
            entry,
            time=self._began if kind == "begin" else entry.time,
            model=self._subject.model,
            model_sha256=self.model_sha256,
            parameters=self._subject.parameters,
            prompt_digest=self._digest,
            content=content if kind == "begin" else None,
        )

    def _finished(self, result: Result) -> Entry:
        guard, usage = self._guard, result.usage
        content = {"output": result.output} if guard.rules.record_content else None
        digest = None
        if guard.ledger is not None and self._digest is not None and result.output:
            with contextlib.suppress(StoreFailed):  # then the record itself cannot be written
                digest = guard.ledger.digest(result.output, self._principal.name)
        return replace(
            self._entry("end"),
            outcome=result.outcome,
            code=result.code,
            prompt_tokens=usage.prompt_tokens if usage is not None else None,
            cached_tokens=usage.cached_tokens if usage is not None else None,
            tokens_generated=usage.completion_tokens if usage is not None else None,
            duration_ms=self._elapsed_ms(),
            time_to_first_token_ms=self._ttft_ms,
            output_digest=digest,
            content=content,
        )

    def _elapsed_ms(self) -> float:
        return 1000 * max(0.0, self._guard.clock() - self._began)

    def _refusal(self, refusal: Refusal) -> ShimmyError:
        """Where waiting helps, or other requests' end, 429; what can never be is a wrong request."""
        if refusal.limit == "max_prompt_tokens":
            return ContextLengthExceeded(refusal.message, param=self._field)
        if refusal.never and "tokens" in refusal.limit:
            whole = "max_tokens" if self._field in {"prompt", "messages"} else self._field
            return InvalidValue(refusal.message, param=whole)
        return RateLimitExceeded(
            refusal.message, limit=refusal.limit, retry_after=refusal.retry_after
        )


def _field(request: CompletionRequest | EmbeddingRequest) -> str:
    """Where the prompt is."""
    if isinstance(request, EmbeddingRequest):
        return "documents" if request.rank else "input"
    return "messages" if isinstance(next(iter(request.prompt), None), Message) else "prompt"


def _is_short(request: CompletionRequest) -> bool:
    prompt = request.prompt
    if isinstance(prompt, str):
        return True
    turns = [turn for turn in prompt if isinstance(turn, Message)]
    return sum(len(turn.content) for turn in turns) < _LARGE
