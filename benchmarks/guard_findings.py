"""What the clients of `guard.py` saw, against what they were allowed and what is on record."""

from __future__ import annotations

import contextlib
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from shimmy_jupyter.audit.ledger import Ledger, Query

WINDOW = 60.0
MOST_TOKENS = 48
NEED = 20 + MOST_TOKENS
"""More than any request here reserves."""
PATIENCE = 10.0
"""Seconds after which somebody starves who has budget and clients that ask."""
FAIR = 0.7
"""The least that somebody may get of what another gets, with equal limits."""


@dataclass(frozen=True)
class Limits:
    """Of each person."""

    requests: int
    tokens: int
    concurrent: int
    queued: int

    @property
    def options(self) -> list[str]:
        return [
            f"--ShimmyLimits.max_requests_per_minute={self.requests}",
            f"--ShimmyLimits.max_tokens_per_minute={self.tokens}",
            f"--ShimmyLimits.max_concurrent={self.concurrent}",
            f"--ShimmyLimits.max_queued={self.queued}",
        ]


@dataclass
class Seen:
    """A request as its client saw it. Times are unix seconds; `mark` is what the ledger has as its cell."""

    user: str
    mark: str
    kind: str
    sent: float
    ended: float = 0.0
    outcome: str = ""
    id: str = ""
    limit: str = ""
    """Which one it met, if it did."""
    events: int = 0
    usage: dict[str, Any] = field(default_factory=dict)
    receipt: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return int(self.usage.get("total_tokens", 0))


class Findings:
    """What the ledger has of each request, beside what its client saw."""

    def __init__(self, seen: Sequence[Seen], records: Sequence[dict[str, Any]]) -> None:
        self.seen = seen
        self.problems: list[str] = []
        self.begins: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self.ends: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for record in records:
            if record["kind"] != "act" and record["user"] != "local":
                found = self.begins if record["kind"] == "begin" else self.ends
                found[record.get("cell", "")].append(record)

    def check_accounts(self) -> None:
        marks = {one.mark for one in self.seen}
        if strange := (self.begins.keys() | self.ends.keys()) - marks:
            self.problems.append(f"records of requests that nobody sent: {sorted(strange)[:3]}")
        for one in self.seen:
            begins, ends = self.begins[one.mark], self.ends[one.mark]
            if len(begins) != 1 or len(ends) != 1:
                self.problems.append(f"{one}: {len(begins)} begin, {len(ends)} end")
                continue
            if said := _differs(one, begins[0], ends[0]):
                self.problems.append(f"{one}: {said}: {ends[0]}")
        ledger, clients = (
            sum(
                _tokens(self.ends[one.mark][0]) if which else one.tokens
                for one in self.seen
                if one.outcome == "ok" and self.ends[one.mark]
            )
            for which in (True, False)
        )
        if ledger != clients:
            self.problems.append(f"{ledger} tokens in the ledger, {clients} as clients saw it")

    def most(self, user: str) -> dict[str, int]:
        """Most of requests and of tokens in any 60 seconds: as clients saw it, those that lay wholly
        within them; as the ledger has it, tokens by when they were settled.
        """
        theirs = [one for one in self.seen if one.user == user and one.outcome != "limited"]
        spans = [(one.sent, one.ended) for one in theirs]
        settled = [(end := _time(self._end(one)), end, _tokens(self._end(one))) for one in theirs]
        return {
            "requests": _most([(*span, 1) for span in spans]),
            "tokens": _most([(*span, one.tokens) for span, one in zip(spans, theirs, strict=True)]),
            "tokens_settled": _most(settled),
        }

    def _end(self, one: Seen) -> dict[str, Any]:
        return next(iter(self.ends[one.mark]), {"timestamp": "1970-01-01T00:00:00Z"})

    def hunger(self, user: str, limits: Limits, began: float) -> float:
        """Longest time in seconds without an answer to somebody with a request in progress, or with
        budget for one, from when the load `began`.
        """
        theirs = [one for one in self.seen if one.user == user]
        charged = sorted(one.sent for one in theirs if one.limit != "max_requests_per_minute")
        served = [one for one in theirs if one.outcome != "limited"]
        ends = sorted((_time(self._end(one)), _tokens(self._end(one))) for one in served)
        spans = [(one.sent, _time(self._end(one))) for one in served]
        now, last = began, max(one.ended for one in theirs)
        since, longest = now, 0.0
        answered = [end for end, _ in ends]
        while now < last:
            # A whole second of grace, as amounts count for all of the second in which they came.
            requests = sum(now - WINDOW - 1 <= sent <= now for sent in charged)
            tokens = sum(count for end, count in ends if now - WINDOW - 1 <= end <= now)
            room = requests < limits.requests and tokens + NEED <= limits.tokens
            busy = any(sent <= now < end for sent, end in spans)
            came = max((end for end in answered if end <= now), default=since)
            since = max(since, came) if room or busy else now
            longest = max(longest, now - since)
            now += 0.1
        return longest


def _differs(one: Seen, begin: dict[str, Any], end: dict[str, Any]) -> str:
    """What the records say otherwise than the client saw it."""
    code = end.get("code")
    recorded = f"error: {code}" if end["outcome"] == "error" else end["outcome"]
    # Who leaves does not see how it ended: it may have been over by then.
    left = {"cancelled", "ok", "limited", "error: deadline_exceeded"}
    if recorded not in (left if one.outcome == "left" else {one.outcome}):
        return "another outcome"
    if {begin["user"], end["user"]} != {one.user}:
        return "another's"
    if begin["request_id"] != end["request_id"] or one.id not in ("", end["request_id"]):
        return "another request id"
    if one.outcome == "left" and end.get("tokens_generated", 0) < one.events:
        return "fewer tokens than have been seen"
    if one.outcome != "ok":
        return ""
    counted = (
        end["prompt_tokens"], end["tokens_generated"], end["cached_tokens"], end["seq"],
        end["leaf_hash"],
    )  # fmt: skip
    told = (
        one.usage["prompt_tokens"],
        one.usage["completion_tokens"],
        one.usage["prompt_tokens_details"]["cached_tokens"],
        one.receipt["seq"],
        one.receipt["leaf_hash"],
    )
    return "" if counted == told else f"told {told}, recorded {counted}"


def _tokens(end: dict[str, Any]) -> int:
    return int(end.get("prompt_tokens", 0) + end.get("tokens_generated", 0))


def _time(record: dict[str, Any]) -> float:
    return datetime.fromisoformat(record["timestamp"]).timestamp()


def _most(spans: Sequence[tuple[float, float, int]]) -> int:
    return max(
        (
            sum(n for begin, end, n in spans if begin >= start and end <= start + WINDOW)
            for start, _, _ in spans
        ),
        default=0,
    )


# Two minutes


def stored(path: Path) -> Iterator[dict[str, Any]]:
    with contextlib.closing(Ledger(path)) as ledger:
        last = -1
        while page := ledger.stored(Query(), last):
            for one in page:
                yield {**json.loads(one.body or "{}"), "leaf_hash": one.leaf_hash}
            last = page[-1].seq


def check_people(findings: Findings, limits: Limits, began: float) -> dict[str, dict[str, Any]]:
    say = findings.problems.append
    rows: dict[str, dict[str, Any]] = {}
    for user in sorted({one.user for one in findings.seen}):
        ok = [one for one in findings.seen if one.user == user and one.outcome == "ok"]
        most = findings.most(user)
        hunger = findings.hunger(user, limits, began)
        for name, count in most.items():
            limit = limits.requests if name == "requests" else limits.tokens
            if count > limit:
                say(f"{user}: {count} {name} in 60 s, of {limit}")
        if hunger > PATIENCE:
            say(f"{user} had budget, and no answer for {hunger:.1f} s")
        answers = {"answers": len(ok), "tokens": sum(one.tokens for one in ok)}
        rows[user] = {**answers, "most": most, "hunger_s": round(hunger, 1)}
    shares = [row["tokens"] for row in rows.values()]
    if min(shares) < FAIR * max(shares):
        say(f"with equal limits, {min(shares)} tokens for one and {max(shares)} for another")
    return rows
