"""Rows are answered by a fixed number of workers, each of which takes the next one that has to be asked.

What the server cannot take at the moment is not a failure: it is asked again when the server says, by
fewer workers, and by more again as answers come. What would be the same for every row ends it all at once.

Beside the table, what is kept for each row is a digest of its prompt and the row's number. With it and the
columns that are made of it, a row costs under 250 bytes more than its answer has.
"""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ..errors import Cancelled, ShimmyError
from .cache import Cache, Key, Reply
from .rows import Failed, Kept, Outcome, Table

_ROWS_ALONE = frozenset(
    """context_length_exceeded request_too_large generation_failed constraint_too_complex deadline_exceeded
    cancelled internal_error engine_crashed""".split()
)
"""Codes that say something of one row. What else there is would be the same for each."""
_BUSY = frozenset(("queue_full", "rate_limit_exceeded"))
_OWN_VALUES = ("messages", "prompt", "input", "texts")
"""Parameters that an `invalid_value` can name which are the row's; `texts` is where a kernel refuses one."""
_TOO_LONG = frozenset(("context_length_exceeded", "request_too_large"))
_BROKEN_AFTER = 20
"""Different prompts in a row that have failed, for anything but their own length: then it is not they."""
_BACK_OFF, _LONGEST_BACK_OFF = 0.5, 30.0
"""Seconds, where the server does not say how long."""
_BREATH = 64
"""Rows that need not be asked, before others get their turn."""


class RowFailed(Exception):
    """Why a row has no values. `row` is its number, from 0, where that is known."""

    def __init__(self, why: Failed, row: int | None = None) -> None:
        super().__init__(str(why))
        self.why, self.row = why, row


def is_rows_own(error: ShimmyError) -> bool:
    """Whether another row may fare better."""
    if error.code == "invalid_value":
        return error.param is None or re.split(r"[.\[]", error.param)[0] in _OWN_VALUES
    return error.code in _ROWS_ALONE


@dataclass(slots=True)
class Counts:
    """How far it is. `done` are rows with an outcome; of these `cached` are from an earlier run, `repeated`
    from an earlier row, `kept` from the frame to resume, and `left_out` were not to be asked. `waiting`
    says why nothing is sent at the moment; `until` is on the job's clock.
    """

    total: int
    done: int = 0
    asked: int = 0
    cached: int = 0
    repeated: int = 0
    kept: int = 0
    left_out: int = 0
    errors: int = 0
    cut_off: int = 0
    tokens: int = 0
    at_once: int = 0
    waiting: str = ""
    until: float = 0.0


@dataclass(slots=True)
class Throttle:
    """How many requests there may be at once, and from when on. `now` is passed in, in seconds."""

    most: int
    max_wait: float
    at_once: int = field(init=False)
    running: int = 0
    not_before: float = -math.inf
    _round: int = 0
    _good: int = 0
    _refusals: int = 0
    _since: float | None = None

    def __post_init__(self) -> None:
        self.at_once = self.most

    def wait(self, now: float) -> float:
        """Seconds until one more may be sent; infinite: until another has ended."""
        if self.not_before > now:
            return self.not_before - now
        return 0.0 if self.running < self.at_once else math.inf

    def begin(self) -> int:
        """What to give back to `refused`."""
        self.running += 1
        return self._round

    def end(self) -> None:
        self.running -= 1

    def answered(self) -> None:
        self._refusals, self._since = 0, None
        self._good += 1
        if self._good >= self.at_once and self.at_once < self.most:
            self.at_once, self._good = self.at_once + 1, 0

    def refused(self, begun: int, retry_after: float | None, now: float) -> bool:
        """Whether to try again. Those that were sent together are refused together, and count once."""
        if begun == self._round:
            self._round += 1
            self._refusals += 1
            self._good = 0
            self.at_once = max(1, self.at_once // 2)
        if self._since is None:
            self._since = now
        exponent = min(self._refusals - 1, 16)
        pause = (
            min(_BACK_OFF * 2**exponent, _LONGEST_BACK_OFF) if retry_after is None else retry_after
        )
        if now + pause - self._since > self.max_wait:
            return False
        self.not_before = max(self.not_before, now + pause)
        return True


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be done. `outcomes` has each row's number and what it comes to; `call` answers as many
    prompts as it is given, at most `batch`; `read` makes a row's values of an answer, or raises `RowFailed`.
    `repeatable`: the same prompt is asked once. With `raises` the first row that fails ends it.
    """

    outcomes: Iterable[tuple[int, Outcome]]
    call: Callable[[list[str]], Awaitable[list[Reply]]]
    read: Callable[[Reply], tuple[Any, ...]]
    key: Key
    table: Table
    cache: Cache | None = None
    repeatable: bool = True
    raises: bool = False
    concurrency: int = 32
    batch: int = 1
    max_wait: float = 300.0
    changed: Callable[[Counts], None] = lambda _counts: None
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep


@dataclass(frozen=True, slots=True)
class _Ask:
    row: int
    prompt: str
    key: bytes


class Runner:
    """Does one job, once. Whatever ends it, what is in the table by then is right, and in the cache, too."""

    def __init__(self, job: Job) -> None:
        self.counts = Counts(len(job.table), at_once=job.concurrency)
        self._job = job
        self._throttle = Throttle(job.concurrency, job.max_wait)
        self._ended = asyncio.Event()
        """Set whenever a request has ended or the throttle has changed."""
        self._first: dict[bytes, int] = {}
        """By digest, the first row with this prompt; or how often it has come, where each is asked."""
        self._followers: dict[bytes, list[int]] = {}
        """Rows that wait for the answer to another with the same prompt."""
        self._broken = 0
        self._looking = asyncio.Lock()
        self._pending = self._to_ask()

    async def run(self) -> None:
        """Raises what ends it: an error that is no row's own, that of a row if the job `raises`, or what a
        row's prompt could not be made for.
        """
        job = self._job
        workers = min(job.concurrency, max(1, -(-len(job.table) // job.batch)))
        failure: BaseException | None = None
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(workers):
                    group.create_task(self._work())
        except BaseExceptionGroup as several:
            failure = several.exceptions[0]  # the others were cancelled for its sake
        finally:
            if job.cache is not None:
                job.cache.flush()
        if failure is not None:
            raise failure
        if self.counts.done < self.counts.total:
            raise Cancelled("a request was cancelled, and not by whoever asked")

    async def _work(self) -> None:
        while asks := await self._next():
            await self._answer(asks)

    async def _next(self) -> list[_Ask]:
        asks: list[_Ask] = []
        # One at a time, or each would look at as many rows before it lets the event loop go on.
        async with self._looking:
            for ask in self._pending:
                if ask is None:
                    await asyncio.sleep(0)
                    continue
                asks.append(ask)
                if len(asks) == self._job.batch:
                    break
        return asks

    def _to_ask(self) -> Iterator[_Ask | None]:
        """Rows that need asking. The others are settled on the way; None now and then, if there are many."""
        for n, (row, outcome) in enumerate(self._job.outcomes):
            ask = self._settle(row, outcome)
            if ask is not None:
                yield ask
            elif n % _BREATH == 0:
                yield None

    def _settle(self, row: int, outcome: Outcome) -> _Ask | None:
        job, counts = self._job, self.counts
        match outcome:
            case None:
                job.table.put(row, [None] * len(job.table.columns))
                counts.left_out += 1
            case Failed():
                self._fail(row, outcome)
            case Kept():
                job.table.put(row, outcome.values)
                counts.kept += 1
                if job.repeatable:
                    self._first.setdefault(job.key.of(outcome.prompt), row)
                else:
                    self._occurrence(outcome.prompt)
            case str():
                return self._ask_unless_known(row, outcome)
        self._count()
        return None

    def _ask_unless_known(self, row: int, prompt: str) -> _Ask | None:
        job, counts = self._job, self.counts
        key = job.key.of(prompt, 0 if job.repeatable else self._occurrence(prompt))
        if job.repeatable:
            first = self._first.setdefault(key, row)
            if first != row and job.table.state(first) != Table.OPEN:
                self._repeat(first, row)
                return None
            if first != row:
                self._followers.setdefault(key, []).append(row)
                return None
        reply = job.cache.get(key) if job.cache is not None else None
        if reply is None:
            return _Ask(row, prompt, key)
        counts.cached += 1
        self._store(row, reply)
        return None

    def _occurrence(self, prompt: str) -> int:
        digest = self._job.key.of(prompt)
        self._first[digest] = count = self._first.get(digest, 0) + 1
        return count

    def _repeat(self, first: int, row: int) -> None:
        self._job.table.copy(first, row)
        self.counts.repeated += 1
        self.counts.errors += self._job.table.state(row) == Table.FAILED
        self._count()

    async def _answer(self, asks: list[_Ask]) -> None:
        while True:
            begun = await self._turn()
            replies: list[Reply] = []
            refusal: ShimmyError | None = None
            try:
                replies = await self._job.call([ask.prompt for ask in asks])
            except ShimmyError as error:
                refusal = error
            finally:
                # Before anything comes of it: rows of a batch may be asked again, one by one.
                self._throttle.end()
                self._ended.set()
            if refusal is None:
                self._answered(asks, replies)
            elif refusal.code not in _BUSY:
                await self._failed(asks, refusal)
            else:
                self._refused(begun, refusal)
                continue
            return

    def _answered(self, asks: list[_Ask], replies: list[Reply]) -> None:
        self._broken = 0
        self._throttle.answered()
        self.counts.waiting, self.counts.at_once = "", self._throttle.at_once
        for ask, reply in zip(asks, replies, strict=True):
            self._take(ask, reply)

    def _refused(self, begun: int, refusal: ShimmyError) -> None:
        after = getattr(refusal, "retry_after", None)
        if not self._throttle.refused(begun, after, self._job.clock()):
            raise refusal
        self.counts.waiting, self.counts.until = refusal.code, self._throttle.not_before
        self.counts.at_once = self._throttle.at_once
        self._job.changed(self.counts)

    async def _turn(self) -> int:
        while (pause := self._throttle.wait(self._job.clock())) > 0:
            if math.isinf(pause):
                self._ended.clear()
                await self._ended.wait()
            else:
                await self._job.sleep(pause)
        return self._throttle.begin()

    async def _failed(self, asks: list[_Ask], error: ShimmyError) -> None:
        if not is_rows_own(error):
            raise error
        if len(asks) > 1:
            for ask in asks:  # which one it is shows when they are alone
                await self._answer([ask])
            return
        if error.code not in _TOO_LONG or error.param == "max_tokens":
            self._broken += 1
            if self._broken >= _BROKEN_AFTER:
                raise error
        self.counts.asked += 1
        self._fail(asks[0].row, Failed(error.code, error.message))
        self._count()
        self._tell_followers(asks[0])

    def _take(self, ask: _Ask, reply: Reply) -> None:
        self.counts.asked += 1
        self.counts.tokens += reply.tokens
        usable = self._store(ask.row, reply)
        # The same request would have the same answer. Another sample may be better.
        if self._job.cache is not None and (usable or self._job.repeatable):
            self._job.cache.put(ask.key, reply)
        self._tell_followers(ask)

    def _store(self, row: int, reply: Reply) -> bool:
        try:
            self._job.table.put(row, self._job.read(reply))
            self.counts.cut_off += reply.finish == "length"
        except RowFailed as failed:
            self._fail(row, failed.why)
            return False
        finally:
            self._count()
        return True

    def _tell_followers(self, ask: _Ask) -> None:
        for row in self._followers.pop(ask.key, ()):
            self._repeat(ask.row, row)

    def _fail(self, row: int, why: Failed) -> None:
        if self._job.raises:
            raise RowFailed(why, row)
        self._job.table.fail(row, why)
        self.counts.errors += 1

    def _count(self) -> None:
        self.counts.done += 1
        self._job.changed(self.counts)
