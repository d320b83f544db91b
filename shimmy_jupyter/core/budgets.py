"""What has been used of limits over time, and whose requests are in progress.

A request is decided on all of its accounts together: either all of them have room for it and are
charged, or none is and a `Refusal` says why.

No 60 seconds hold more generated tokens than a minute's limit, wherever they begin. Take those of length
60 that end at t, and the requests that generated in them. Of these let L be the last to be let in, at
a ≤ t, where its reservation and all that was counted fitted into the limit. Every other one was let in
before. Either it was still open at a, and its reservation, which is at least what it came to use, was
counted; or it had been settled between t - 60 and a, for it generated after t - 60, and what it used was
counted: an amount counts for all of its second and the 60 that follow, so for 60 seconds whenever in
its second it came. So together they used no more than fitted at a. With "settled" for "generated" this
holds for what is settled within 60 seconds, too; with the day that something is settled on for the 60
seconds, it holds for days: what is open counts on every day until it is settled. For requests, an amount
is counted when it comes. All of this as long as a limit stays what it is, and nobody settles more than
was reserved (which is counted in full nevertheless).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from .limits import Account

WINDOW = 60
"""Seconds of a minute's limit. A larger step back of the clock is one that somebody has made."""
DAY = 86_400
_OF_TOKENS = ("max_tokens_per_minute", "max_tokens_per_day")


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request may not go on. `limit` is the name of the trait, `scope` whose limit it is: "user"
    or "group:NAME". `retry_after`: seconds after which it would fit if nothing else happens, open
    reservations staying open; None where that alone does not help. `never`: it is more than the limit
    itself.
    """

    limit: str
    message: str
    retry_after: float | None = None
    never: bool = False
    scope: str = "user"


@dataclass(frozen=True, slots=True)
class Standing:
    """`resets_at`, in unix seconds: when all of the limit remains if nothing more comes and what is
    open ends now; None where only the end of requests frees something.
    """

    limit: int
    used: int
    remaining: int
    resets_at: float | None


class NotReserved(Exception):
    """Nothing is open under this id: it has been settled, or was never reserved."""


@dataclass(slots=True)
class Spent:
    """What one account has used: requests and tokens by unix second in order, tokens by day since 1970,
    and reserved tokens by the id of what is open. `latest` is the last second in which something counted.
    """

    latest: int = 0
    requests: dict[int, int] = field(default_factory=dict)
    tokens: dict[int, int] = field(default_factory=dict)
    days: dict[int, int] = field(default_factory=dict)
    open: dict[str, int] = field(default_factory=dict)

    @property
    def reserved(self) -> int:
        return sum(self.open.values())

    def advance(self, now: float) -> int:
        """Forget what does not count any more; returns the second that it is for this account.

        The clock of an account never goes back. After a small step back of the machine's clock it
        waits; after a larger one, all that was counted keeps its age, and today has used what the day
        had that it was before.
        """
        second = math.floor(now)
        back = self.latest - second - 1  # seconds are rounded so that nothing ages by it
        if back >= WINDOW:
            self.requests = {at - back: count for at, count in self.requests.items()}
            self.tokens = {at - back: count for at, count in self.tokens.items()}
            day, was = (self.latest - back) // DAY, self.latest // DAY
            if used := max(self.days.get(day, 0), self.days.get(was, 0)):
                self.days[day] = used
            self.latest -= back
        second = max(second, self.latest)
        for counted in (self.requests, self.tokens):
            while counted and second - (first := next(iter(counted))) > WINDOW:
                del counted[first]
        # Yesterday is kept in case the clock is set back to it.
        for day in [day for day in self.days if day < second // DAY - 1]:
            del self.days[day]
        return second

    def is_blank(self) -> bool:
        return not (self.requests or self.tokens or self.days or self.open)


Books = Mapping[Account, Spent]
"""A request's accounts, each with what has been used of it; changed in place."""


def charge_request(books: Books, now: float) -> Refusal | None:
    """Count a request on every account that limits them."""
    needs = {"max_requests_per_minute": 1}
    refusals = [one for a, spent in books.items() for one in _no_room(a, spent, needs, now)]
    if refusals:
        return _foremost(refusals)
    for account, spent in books.items():
        if account.limits.counts_requests:
            second = spent.latest = spent.advance(now)
            spent.requests[second] = spent.requests.get(second, 0) + 1
    return None


def reserve(  # noqa: PLR0917  what a request is, in the order in which it comes to be known
    books: Books,
    id: str,
    prompt_tokens: int,
    wanted: int | None,
    default: int,
    now: float,
    *,
    choices: int = 1,
) -> int | Refusal:
    """Set aside what a request may come to use; returns the most tokens that each choice may have.

    `wanted` is what it asks for, and granted in full or not at all. Where it is None, as much is granted
    as there is, up to `default` and at least 1. Raises ValueError where `id` is open already.
    """
    if any(id in spent.open for spent in books.values()):
        raise ValueError(f"{id} has reserved already")
    answer = choices * (1 if wanted is None else wanted)
    need = prompt_tokens + answer
    needs = dict.fromkeys(_OF_TOKENS, need)
    refusals = [one for a in books for one in _too_large(a, prompt_tokens, answer)]
    refusals += [one for a, spent in books.items() for one in _no_room(a, spent, needs, now)]
    if refusals:
        return _foremost(refusals)
    granted = wanted
    if granted is None:
        standings = [look(account, spent, now) for account, spent in books.items()]
        most = [
            one[name].remaining - prompt_tokens for one in standings for name in one.keys() & needs
        ]
        bounds = (account.limits.completion_tokens for account in books)
        most += [bound for bound in bounds if bound is not None]
        granted = max(1, min([default, *(tokens // choices for tokens in most)]))
    for account, spent in books.items():
        if account.limits.counts_tokens:
            spent.open[id] = prompt_tokens + choices * granted
    return granted


def settle(spents: Iterable[Spent], id: str, tokens: int, now: float) -> None:
    """Count what was really used, in place of what was reserved. Raises `NotReserved`, and changes
    nothing, where `id` is not open on all of them.
    """
    spents = list(spents)
    if any(id not in spent.open for spent in spents):
        raise NotReserved(f"nothing is reserved for {id}")
    for spent in spents:
        del spent.open[id]
        second = spent.latest = spent.advance(now)
        if tokens:
            spent.tokens[second] = spent.tokens.get(second, 0) + tokens
            spent.days[second // DAY] = spent.days.get(second // DAY, 0) + tokens


def look(account: Account, spent: Spent, now: float) -> dict[str, Standing]:
    """How things stand with each limit over time that the account has, by the trait's name."""
    second, limits = spent.advance(now), account.limits
    found: dict[str, Standing] = {}

    def add(name: str, limit: int | None, used: int, resets_at: float) -> None:
        if limit is not None:
            found[name] = Standing(limit, used, max(0, limit - used), resets_at)

    last = max(spent.requests, default=None)
    resets_at = now if last is None else float(last + WINDOW + 1)
    add(
        "max_requests_per_minute",
        limits.requests_per_minute,
        sum(spent.requests.values()),
        resets_at,
    )
    last = second if spent.reserved else max(spent.tokens, default=None)
    resets_at = now if last is None else float(last + WINDOW + 1)
    used = sum(spent.tokens.values()) + spent.reserved
    add("max_tokens_per_minute", limits.tokens_per_minute, used, resets_at)
    day = second // DAY
    used = spent.days.get(day, 0) + spent.reserved
    add("max_tokens_per_day", limits.tokens_per_day, used, float((day + 1) * DAY))
    return found


def _too_large(account: Account, prompt_tokens: int, answer: int) -> Iterator[Refusal]:
    """Limits of a single request."""
    limits = account.limits
    for name, limit, size, what in (
        ("max_prompt_tokens", limits.prompt_tokens, prompt_tokens, "the prompt has"),
        ("max_completion_tokens", limits.completion_tokens, answer, "the answer may have"),
    ):
        if limit is not None and size > limit:
            yield _refusal(account, name, f"is {limit}, and {what} {size} tokens", never=True)


def _no_room(
    account: Account, spent: Spent, needs: Mapping[str, int], now: float
) -> Iterator[Refusal]:
    """Limits over time that have less left than is needed, by the trait's name."""
    for name, standing in look(account, spent, now).items():
        need, limit, used = needs.get(name), standing.limit, standing.used
        if need is None or used + need <= limit:
            continue
        if need > limit:
            yield _refusal(account, name, f"is {limit}, and {need} are needed", never=True)
            continue
        when = _when(name, spent, used + need - limit, limit - need, now)
        in_progress = spent.reserved if name in _OF_TOKENS else 0
        by = f" ({in_progress} by requests in progress)" if in_progress else ""
        words = f"is {limit}: {used} used{by}, {need} needed; there is room {_in(when, now)}"
        yield _refusal(account, name, words, None if when is None else when - now)


def _when(name: str, spent: Spent, over: int, bearable: int, now: float) -> float | None:
    """When there is room: `over` less than now is used in a minute, or no more than `bearable` in a day."""
    if name == "max_tokens_per_day":
        if spent.reserved > bearable:
            return None
        day = spent.advance(now) // DAY + 1
        while spent.days.get(day, 0) + spent.reserved > bearable:
            day += 1
        return float(day * DAY)
    counted = spent.requests if name == "max_requests_per_minute" else spent.tokens
    for second, count in counted.items():
        over -= count
        if over <= 0:
            return float(second + WINDOW + 1)
    return None


def _refusal(
    account: Account, name: str, words: str, after: float | None = None, *, never: bool = False
) -> Refusal:
    scope = account.scope
    whose = name if scope == "user" else f"{name} of {scope.replace(':', ' ', 1)}"
    return Refusal(name, f"{whose} {words}", after, never, scope)


def _in(when: float | None, now: float) -> str:
    if when is None:
        return "when requests in progress end"
    seconds = math.ceil(when - now)
    return f"in {seconds} s" if seconds <= 120 else f"in {math.ceil(seconds / 60)} minutes"


def _foremost(refusals: Sequence[Refusal]) -> Refusal:
    """What can never be, else what takes longest: before that it would be refused again."""

    def weight(refusal: Refusal) -> tuple[bool, float]:
        return refusal.never, math.inf if refusal.retry_after is None else refusal.retry_after

    return max(refusals, key=weight)


@dataclass(slots=True)
class _Present:
    accounts: Sequence[Account]
    running: bool
    answered: bool = False
    """Whether its first token has come."""


class Crowd:
    """Requests that are here, in order of arrival: in progress, or waiting for their turn.

    Nobody waits for a turn that could go: whoever is passed lacks room on another account. Limits are
    those of a request's own arrival, so one that waits always waits for another to leave.
    """

    def __init__(self) -> None:
        self._present: dict[str, _Present] = {}
        self._running: dict[str, int] = {}
        self._unanswered: dict[str, int] = {}

    def arrive(self, id: str, accounts: Sequence[Account]) -> Refusal | bool:
        """Whether it may go now; else it waits for its turn, which `leave` says. Raises ValueError
        where it is here already.
        """
        if id in self._present:
            raise ValueError(f"{id} is here already")
        refusals = [one for account in accounts for one in self._refusals(account)]
        if refusals:
            return _foremost(refusals)
        present = _Present(accounts, running=self._has_room(accounts))
        self._present[id] = present
        self._count(self._unanswered, present, 1)
        if present.running:
            self._count(self._running, present, 1)
        return present.running

    def first_token(self, id: str) -> None:
        """It no longer counts as waiting; later tokens change nothing. Raises KeyError for a stranger."""
        present = self._present[id]
        if not present.answered:
            self._count(self._unanswered, present, -1)
            present.answered = True

    def leave(self, id: str) -> list[str]:
        """It has ended, or does not wait any more; returns those who may go now, in order of arrival.

        Raises KeyError for one that is not here.
        """
        gone = self._present.pop(id)
        if not gone.answered:
            self._count(self._unanswered, gone, -1)
        if not gone.running:
            return []
        self._count(self._running, gone, -1)
        going = []
        for other, present in self._present.items():
            if not present.running and self._has_room(present.accounts):
                present.running = True
                self._count(self._running, present, 1)
                going.append(other)
        return going

    def position(self, id: str) -> int:
        """How many that wait for their turn go before it, on any of its accounts; 0 once it may go.

        Raises KeyError for one that is not here.
        """
        asking = self._present[id]
        keys = {account.key for account in asking.accounts}
        before = 0
        for present in self._present.values():
            if present is asking or asking.running:
                break
            theirs = (account.key for account in present.accounts)
            before += not present.running and not keys.isdisjoint(theirs)
        return before

    def look(self, account: Account) -> dict[str, Standing]:
        """How things stand with the account's limits of requests at once, by the trait's name."""
        found = {}
        for name, limit, counted in (
            ("max_concurrent", account.limits.concurrent, self._running),
            ("max_queued", account.limits.queued, self._unanswered),
        ):
            if limit is not None:
                used = counted.get(account.key, 0)
                found[name] = Standing(limit, used, max(0, limit - used), None)
        return found

    def _has_room(self, accounts: Sequence[Account]) -> bool:
        return all(
            limit is None or self._running.get(account.key, 0) < limit
            for account in accounts
            for limit in [account.limits.concurrent]
        )

    def _refusals(self, account: Account) -> Iterator[Refusal]:
        standings = self.look(account)
        for name, standing in standings.items():
            if standing.limit == 0:
                yield _refusal(account, name, "is 0: none is allowed", never=True)
        queued = standings.get("max_queued")
        if queued is not None and queued.remaining == 0 < queued.limit:
            words = f"is {queued.limit}, and so many wait for their first token"
            yield _refusal(account, "max_queued", words)

    @staticmethod
    def _count(counted: dict[str, int], present: _Present, change: int) -> None:
        for account in present.accounts:
            count = counted.pop(account.key, 0) + change
            if count:
                counted[account.key] = count

    def check_invariants(self) -> None:
        everyone = self._present.values()
        for counted, whom in (
            (self._running, [one for one in everyone if one.running]),
            (self._unanswered, [one for one in everyone if not one.answered]),
        ):
            keys = [account.key for one in whom for account in one.accounts]
            assert counted == {key: keys.count(key) for key in keys}
        assert not any(self._has_room(one.accounts) for one in everyone if not one.running)
