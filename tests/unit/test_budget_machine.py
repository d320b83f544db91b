"""Whatever comes in whatever order: budgets against a list of everything that has ever happened.

`Steady` compares each answer with what that list says, and looks at every window there is; the clock goes
forward as it should. `Shaken` has a clock that is set back, by little and by much, beside the time
that really passes: whatever it shows, no 60 real seconds hold more than a minute's limit, and a step back
gives nothing back. `Queues` are requests at once: who waits, for whom, and who is next.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from shimmy_jupyter.core import budgets
from shimmy_jupyter.core.budgets import DAY, Books, Crowd, Refusal, Spent
from shimmy_jupyter.core.limits import Account, Limits

START = 20_000 * DAY - 200.0
STEPS = st.one_of(
    st.floats(0, 3),
    st.floats(0, 100),
    st.sampled_from([0.0, 0.5, 1.0, 59.0, 60.0, 60.5, 61.0, DAY / 2]),
)
RATES = st.builds(
    Limits,
    requests_per_minute=st.none() | st.integers(0, 4),
    tokens_per_minute=st.none() | st.integers(1, 40),
    tokens_per_day=st.none() | st.integers(1, 90),
    prompt_tokens=st.none() | st.integers(5, 30),
    completion_tokens=st.none() | st.integers(1, 30),
)
SHARED = st.builds(
    Limits,
    requests_per_minute=st.none() | st.integers(1, 6),
    tokens_per_minute=st.none() | st.integers(1, 60),
    tokens_per_day=st.none() | st.integers(1, 120),
)
LIMIT_OF = {
    "max_requests_per_minute": "requests_per_minute",
    "max_tokens_per_minute": "tokens_per_minute",
    "max_tokens_per_day": "tokens_per_day",
}


@dataclass
class Used:
    """A request that reserved, as the oracle remembers it."""

    accounts: tuple[Account, ...]
    begun: float
    reserved: int
    ended: float = math.inf
    tokens: int = 0


@dataclass
class Past:
    requests: list[tuple[float, tuple[Account, ...]]] = field(default_factory=list)
    uses: dict[str, Used] = field(default_factory=dict)

    def counted(self, account: Account, name: str, now: float) -> int:
        """What counts at `now`, by the words of the promise: seconds count whole, and open ones count."""
        if name == "max_requests_per_minute":
            return sum(
                account in accounts and math.floor(now) - math.floor(at) <= 60
                for at, accounts in self.requests
            )
        theirs = [use for use in self.uses.values() if account in use.accounts]
        total = sum(use.reserved for use in theirs if use.ended == math.inf)
        for use in theirs:
            if use.ended == math.inf:
                continue
            if name == "max_tokens_per_day":
                total += use.tokens * (now // DAY == use.ended // DAY)
            else:
                total += use.tokens * (math.floor(now) - math.floor(use.ended) <= 60)
        return total

    def check_windows(self, account: Account) -> None:
        """No 60 seconds anywhere, both ends included, hold more than is allowed."""
        if (most := account.limits.requests_per_minute) is not None:
            times = [at for at, accounts in self.requests if account in accounts]
            for end in times:
                assert sum(end - 60 <= at <= end for at in times) <= most
        theirs = [use for use in self.uses.values() if account in use.accounts]
        if (most := account.limits.tokens_per_minute) is not None:
            for end in [time for use in theirs for time in (use.begun, use.ended)]:
                # Whatever may have been generated then: by those in progress at any of its moments.
                inside = [use for use in theirs if use.begun <= end and use.ended >= end - 60]
                assert sum(use.tokens for use in inside) <= most
                settled = [use for use in theirs if end - 60 <= use.ended <= end]
                assert sum(use.tokens for use in settled) <= most

    def check_days(self, account: Account) -> None:
        if (most := account.limits.tokens_per_day) is None:
            return
        days: dict[float, int] = {}
        for use in self.uses.values():
            if account in use.accounts and use.ended < math.inf:
                days[use.ended // DAY] = days.get(use.ended // DAY, 0) + use.tokens
        assert all(used <= most for used in days.values())


class Budgets(RuleBasedStateMachine):
    @initialize(ann=RATES, bob=RATES, lab=SHARED)
    def start(self, ann: Limits, bob: Limits, lab: Limits) -> None:
        self.real = self.clock = START
        self.past = Past()
        self.count = 0
        names = {"user:ann": ann, "user:bob": bob, "group:lab": lab}
        self.spents = {Account(name, limits): Spent() for name, limits in names.items()}

    def books(self, who: str) -> Books:
        return {
            a: spent for a, spent in self.spents.items() if a.key in (f"user:{who}", "group:lab")
        }

    @rule(step=STEPS)
    def wait(self, step: float) -> None:
        self.real += step
        self.clock += step

    @rule(who=st.sampled_from(["ann", "bob"]))
    def request(self, who: str) -> None:
        books = self.books(who)
        needs = {"max_requests_per_minute": 1}
        answer = budgets.charge_request(books, self.clock)
        self.compare(books, needs, answer)
        if answer is None:
            self.past.requests.append((self.real, tuple(books)))
        else:
            self.check_refusal(books, answer, budgets.charge_request)

    @rule(
        who=st.sampled_from(["ann", "bob"]),
        prompt=st.integers(0, 30),
        wanted=st.none() | st.integers(0, 30),
        default=st.integers(1, 40),
        choices=st.sampled_from([1, 1, 1, 2, 3]),
    )
    def reserve(
        self, who: str, prompt: int, wanted: int | None, default: int, choices: int
    ) -> None:
        books = self.books(who)
        self.count += 1
        id = str(self.count)
        before = copy.deepcopy([*books.values()])

        def ask(books: Books, now: float) -> int | Refusal:
            return budgets.reserve(books, id, prompt, wanted, default, now, choices=choices)

        answer = ask(books, self.clock)
        least = choices * (1 if wanted is None else wanted)
        needs = {"max_tokens_per_minute": prompt + least, "max_tokens_per_day": prompt + least}
        single = [
            size > limit
            for a in books
            for size, limit in (
                (prompt, a.limits.prompt_tokens),
                (least, a.limits.completion_tokens),
            )
            if limit is not None
        ]
        if any(single):
            assert isinstance(answer, Refusal)
            assert answer.never
        else:
            self.compare(books, needs, answer)
        if isinstance(answer, Refusal):
            assert [spent.open for spent in books.values()] == [spent.open for spent in before]
            self.check_refusal(books, answer, ask)
            return
        if wanted is not None:
            assert answer == wanted
        else:
            assert 1 <= answer <= default
            self.check_generous(books, id, prompt, answer, default, choices)
        counting = tuple(a for a in books if a.limits.counts_tokens)
        if counting:
            reserved = prompt + choices * answer
            self.past.uses[id] = Used(counting, self.real, reserved)

    def open(self) -> list[str]:
        return [id for id, use in self.past.uses.items() if use.ended == math.inf]

    @precondition(lambda self: self.open())
    @rule(data=st.data(), share=st.sampled_from([0.0, 0.5, 1.0, 1.0]))
    def settle(self, data: st.DataObject, share: float) -> None:
        id = data.draw(st.sampled_from(self.open()))
        use = self.past.uses[id]
        use.tokens, use.ended = int(use.reserved * share), self.real
        budgets.settle([self.spents[a] for a in use.accounts], id, use.tokens, self.clock)

    @precondition(lambda self: len(self.past.uses) > len(self.open()))
    @rule(data=st.data())
    def settle_again(self, data: st.DataObject) -> None:
        id = data.draw(st.sampled_from([*self.past.uses.keys() - {*self.open()}]))
        spents = [self.spents[account] for account in self.past.uses[id].accounts]
        before = copy.deepcopy(spents)
        try:
            budgets.settle(spents, id, 1, self.clock)
        except budgets.NotReserved:
            assert spents == before
        else:
            raise AssertionError("settled twice")

    def compare(self, books: Books, needs: dict[str, int], answer: object) -> None:
        """Before the oracle is told of it."""

    def check_refusal(self, books: Books, refusal: Refusal, ask: object) -> None:
        pass

    def check_generous(
        self, books: Books, id: str, prompt: int, granted: int, default: int, choices: int
    ) -> None:
        pass

    @invariant()
    def windows_hold(self) -> None:
        for account in self.spents:
            self.past.check_windows(account)

    @invariant()
    def what_is_open_is_open_everywhere(self) -> None:
        for account, spent in self.spents.items():
            assert spent.open == {
                id: self.past.uses[id].reserved
                for id in self.open()
                if account in self.past.uses[id].accounts
            }


class Steady(Budgets):
    @invariant()
    def days_hold(self) -> None:
        for account in self.spents:
            self.past.check_days(account)

    @invariant()
    def what_is_told_is_what_happened(self) -> None:
        for account, spent in self.spents.items():
            seen = budgets.look(account, spent, self.clock)
            for name, limit in LIMIT_OF.items():
                most = getattr(account.limits, limit)
                assert (name in seen) == (most is not None)
                if most is not None:
                    used = self.past.counted(account, name, self.clock)
                    assert (seen[name].limit, seen[name].used) == (most, used)
                    assert seen[name].remaining == max(0, most - used)

    def room(self, account: Account, name: str, now: float) -> float:
        most = getattr(account.limits, LIMIT_OF[name])
        return math.inf if most is None else most - self.past.counted(account, name, now)

    def compare(self, books: Books, needs: dict[str, int], answer: object) -> None:
        fits = all(
            need <= self.room(account, name, self.clock)
            for account in books
            for name, need in needs.items()
        )
        assert fits != isinstance(answer, Refusal)

    def check_generous(
        self, books: Books, id: str, prompt: int, granted: int, default: int, choices: int
    ) -> None:
        """One token more would not have been possible."""
        one_more = prompt + choices * (granted + 1)
        rooms = [
            self.room(account, name, self.clock)
            for account in books
            for name in ("max_tokens_per_minute", "max_tokens_per_day")
        ]
        bounds = [a.limits.completion_tokens for a in books]
        short = any(choices * (granted + 1) > bound for bound in bounds if bound is not None)
        assert granted == default or one_more > min(rooms) or short

    def check_refusal(self, books: Books, refusal: Refusal, ask: object) -> None:
        """It says exactly when there is room, if nothing else happens."""
        assert callable(ask)
        if refusal.never:
            assert refusal.retry_after is None
            assert ask({account: Spent() for account in books}, self.clock).never
        elif refusal.retry_after is None:
            assert isinstance(ask(copy.deepcopy(books), self.clock + 10 * DAY), Refusal)
            assert any(spent.open for spent in books.values())
        else:
            assert refusal.retry_after > 0
            at = self.clock + refusal.retry_after
            assert isinstance(ask(copy.deepcopy(books), math.nextafter(at, 0)), Refusal)
            assert not isinstance(ask(copy.deepcopy(books), at), Refusal)


class Shaken(Budgets):
    @rule(
        step=st.one_of(
            st.floats(0, 5), st.floats(0, 200), st.sampled_from([60.0, 61.0, 3600.0, 3.0 * DAY])
        )
    )
    def set_back(self, step: float) -> None:
        before = {a: budgets.look(a, spent, self.clock) for a, spent in self.spents.items()}
        self.clock -= step
        for account, spent in self.spents.items():
            after = budgets.look(account, spent, self.clock)
            for name, standing in after.items():
                assert standing.used >= before[account][name].used

    @precondition(lambda self: not self.open())
    @rule()
    def nobody_is_locked_out(self) -> None:
        """However wrong the clock was, all of a minute's limit is there again after two minutes."""
        later = self.clock + 60 + 1 + 61
        for account, spent in self.spents.items():
            known = copy.deepcopy(spent)
            budgets.look(account, known, self.clock)
            standings = budgets.look(account, known, later)
            standings.pop("max_tokens_per_day", None)
            assert all(standing.used == 0 for standing in standings.values())


class Queues(RuleBasedStateMachine):
    @initialize(
        ann=st.none() | st.integers(1, 3), bob=st.none() | st.integers(1, 3),
        lab=st.none() | st.integers(1, 4), hub=st.none() | st.integers(1, 4),
        queued=st.none() | st.integers(1, 4),
    )  # fmt: skip
    def start(
        self, ann: int | None, bob: int | None, lab: int | None, hub: int | None, queued: int | None
    ) -> None:
        self.crowd = Crowd()
        lab_account = Account("group:lab", Limits(concurrent=lab))
        hub_account = Account("group:hub", Limits(concurrent=hub))
        self.accounts = {
            "ann": (Account("user:ann", Limits(concurrent=ann, queued=queued)), lab_account),
            "bob": (Account("user:bob", Limits(concurrent=bob)), lab_account, hub_account),
            "eve": (Account("user:eve", Limits()), hub_account),
        }
        self.count = 0
        self.here: dict[str, str] = {}
        self.going: set[str] = set()
        self.answered: set[str] = set()

    def in_progress(self, account: Account) -> int:
        return sum(account in self.accounts[self.here[id]] for id in self.going)

    def may_go(self, who: str) -> bool:
        return all(
            a.limits.concurrent is None or self.in_progress(a) < a.limits.concurrent
            for a in self.accounts[who]
        )

    @rule(who=st.sampled_from(["ann", "bob", "eve"]))
    def arrive(self, who: str) -> None:
        self.count += 1
        id = str(self.count)
        answer = self.crowd.arrive(id, self.accounts[who])
        most = self.accounts[who][0].limits.queued
        waiting = [one for one, w in self.here.items() if w == who and one not in self.answered]
        assert isinstance(answer, Refusal) == (most is not None and len(waiting) >= most)
        if isinstance(answer, Refusal):
            return
        assert answer == self.may_go(who)
        self.here[id] = who
        if answer:
            self.going.add(id)

    @precondition(lambda self: self.going)
    @rule(data=st.data())
    def first_token(self, data: st.DataObject) -> None:
        id = data.draw(st.sampled_from(sorted(self.going)))
        self.crowd.first_token(id)
        self.answered.add(id)

    @precondition(lambda self: self.here)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        id = data.draw(st.sampled_from(sorted(self.here)))
        next_ones = self.crowd.leave(id)
        del self.here[id]
        self.going.discard(id)
        expected = []
        for waits, who in self.here.items():  # in order of arrival
            if waits not in self.going and self.may_go(who):
                self.going.add(waits)
                expected.append(waits)
        assert next_ones == expected

    @rule(id=st.sampled_from(["0", "1", "2"]))
    def a_stranger_leaves(self, id: str) -> None:
        if id not in self.here:
            try:
                self.crowd.leave(id)
            except KeyError:
                return
            raise AssertionError("left without being here")

    @invariant()
    def order_and_room(self) -> None:
        self.crowd.check_invariants()
        waiting = [(id, who) for id, who in self.here.items() if id not in self.going]
        for at, (id, who) in enumerate(waiting):
            assert not self.may_go(who)
            before = [
                other
                for _, other in waiting[:at]
                if {*self.accounts[other]} & {*self.accounts[who]}
            ]
            assert self.crowd.position(id) == len(before)
        for account in {a for several in self.accounts.values() for a in several}:
            seen = self.crowd.look(account)
            if (most := account.limits.concurrent) is not None:
                assert seen["max_concurrent"].used == self.in_progress(account) <= most


for machine in (Steady, Shaken, Queues):
    machine.TestCase.settings = settings(
        max_examples=150, stateful_step_count=40, deadline=None, derandomize=True
    )
TestSteady = Steady.TestCase
TestShaken = Shaken.TestCase
TestQueues = Queues.TestCase
