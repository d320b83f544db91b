"""What is used of limits over time, and who may go, by example.

Cases. Requests: the whole of a limit and one more; both ends of the window; refused ones are not counted;
0. Tokens: reserved, settled for less, for nothing and for more; a grant when none is asked for, and its
bounds; several choices; 0 tokens; what never fits; what waits for open requests alone; the day and its
midnight; both limits at once. Several accounts: all or none, and which refusal is told. The clock: small
steps back, large ones, over midnight, forgotten days. What is told of it all. The crowd: one at a time,
waiting in order, passing, refusals, leaving while waiting, twice, strangers, positions.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest

from shimmy_jupyter.core import budgets
from shimmy_jupyter.core.budgets import DAY, Crowd, NotReserved, Refusal, Spent, Standing
from shimmy_jupyter.core.limits import Account, Limits

NOON = 20_000 * DAY + DAY // 2
MIDNIGHT = 20_001 * DAY


def user(name: str = "ann", **limits: int) -> Account:
    return Account(f"user:{name}", Limits(**limits))  # type: ignore[arg-type]


def group(**limits: int) -> Account:
    return Account("group:lab", Limits(**limits))  # type: ignore[arg-type]


class Held:
    """Accounts and what has been used of them, so that a test reads as a story."""

    def __init__(self, *accounts: Account) -> None:
        self.books = {account: Spent() for account in accounts}

    def request(self, now: float) -> Refusal | None:
        return budgets.charge_request(self.books, now)

    def reserve(
        self,
        id: str,
        prompt: int,
        wanted: int | None,
        now: float,
        default: int = 100,
        choices: int = 1,
    ) -> int | Refusal:
        return budgets.reserve(self.books, id, prompt, wanted, default, now, choices=choices)

    def settle(self, id: str, tokens: int, now: float) -> None:
        budgets.settle(self.books.values(), id, tokens, now)

    def use(self, tokens: int, now: float) -> None:
        assert self.reserve("at once", tokens, 0, now) == 0
        self.settle("at once", tokens, now)

    def look(self, now: float) -> dict[str, Standing]:
        (found,) = (budgets.look(account, spent, now) for account, spent in self.books.items())
        return found


def refused(answer: object) -> Refusal:
    assert isinstance(answer, Refusal), answer
    return answer


class TestRequests:
    def test_as_many_as_the_limit(self) -> None:
        held = Held(user(requests_per_minute=2))
        assert held.request(NOON) is None
        assert held.request(NOON + 30.5) is None
        refusal = refused(held.request(NOON + 59.25))
        assert refusal == Refusal(
            "max_requests_per_minute",
            "max_requests_per_minute is 2: 2 used, 1 needed; there is room in 2 s",
            retry_after=1.75,
        )
        # What was refused was not counted.
        assert held.request(NOON + 61) is None
        assert refused(held.request(NOON + 61)).retry_after == 30

    def test_a_second_counts_whole(self) -> None:
        """Whatever is counted late in its second is gone for more than a minute when it is forgotten."""
        held = Held(user(requests_per_minute=1))
        assert held.request(NOON + 0.999) is None
        assert refused(held.request(NOON + 60.999)).never is False
        assert held.request(NOON + 61) is None

    def test_none_at_all(self) -> None:
        refusal = refused(Held(user(requests_per_minute=0)).request(NOON))
        assert (refusal.never, refusal.retry_after) == (True, None)

    def test_without_a_limit_nothing_is_counted(self) -> None:
        held = Held(user(tokens_per_day=1))
        assert held.request(NOON) is None
        assert [*held.books.values()] == [Spent()]


class TestTokens:
    def test_reserved_until_settled_then_for_a_minute(self) -> None:
        held = Held(user(tokens_per_minute=100))
        assert held.reserve("a", 40, 20, NOON) == 20
        assert refused(held.reserve("b", 40, 1, NOON + 1000)).retry_after is None
        held.settle("a", 50, NOON + 1000.5)
        assert held.reserve("b", 40, 10, NOON + 1001) == 10
        held.settle("b", 0, NOON + 1001)
        refusal = refused(held.reserve("c", 50, 1, NOON + 1002))
        assert refusal.retry_after == 59
        assert (
            refusal.message
            == "max_tokens_per_minute is 100: 50 used, 51 needed; there is room in 59 s"
        )
        assert held.reserve("c", 50, 1, NOON + 1061) == 1

    def test_says_what_is_in_progress(self) -> None:
        held = Held(user(tokens_per_minute=100))
        held.use(20, NOON)
        held.reserve("a", 40, 20, NOON)
        refusal = refused(held.reserve("b", 30, 0, NOON + 1))
        assert "80 used (60 by requests in progress), 30 needed; there is room in 60 s" in (
            refusal.message
        )
        refusal = refused(held.reserve("b", 41, 0, NOON + 1))
        assert refusal.message.endswith("there is room when requests in progress end")

    def test_settled_for_more_counts_in_full(self) -> None:
        held = Held(user(tokens_per_minute=100))
        held.reserve("a", 10, 10, NOON)
        held.settle("a", 130, NOON)
        assert held.look(NOON)["max_tokens_per_minute"].used == 130
        assert held.look(NOON)["max_tokens_per_minute"].remaining == 0
        assert refused(held.reserve("b", 0, 1, NOON)).retry_after == 61

    @pytest.mark.parametrize("id", ["a", "b"])
    def test_settled_once(self, id: str) -> None:
        held = Held(user(tokens_per_minute=100), group(tokens_per_day=100))
        held.reserve("a", 10, 10, NOON)
        held.settle("a", 20, NOON)
        before = copy.deepcopy(held.books)
        with pytest.raises(NotReserved, match="nothing is reserved for"):
            held.settle(id, 20, NOON)
        assert held.books == before

    def test_settled_everywhere_or_nowhere(self) -> None:
        held = Held(user(tokens_per_minute=100), group(tokens_per_day=100))
        held.reserve("a", 10, 10, NOON)
        del held.books[group(tokens_per_day=100)].open["a"]
        with pytest.raises(NotReserved, match="nothing is reserved for"):
            held.settle("a", 5, NOON)
        assert held.books[user(tokens_per_minute=100)].reserved == 20

    def test_reserved_once(self) -> None:
        held = Held(user(tokens_per_minute=100))
        held.reserve("a", 10, 10, NOON)
        with pytest.raises(ValueError, match="a has reserved already"):
            held.reserve("a", 1, 1, NOON)

    @pytest.mark.parametrize(
        ("limits", "default", "choices", "granted"),
        [
            ({}, 100, 1, 100),
            ({"tokens_per_minute": 50}, 100, 1, 40),
            ({"tokens_per_minute": 50}, 7, 1, 7),
            ({"tokens_per_day": 50}, 100, 3, 13),
            ({"completion_tokens": 30}, 100, 1, 30),
            ({"completion_tokens": 31}, 100, 3, 10),
            ({"tokens_per_minute": 11}, 100, 1, 1),
            ({"tokens_per_minute": 500}, 0, 1, 1),
        ],
    )
    def test_granted_where_none_is_asked_for(
        self, limits: dict[str, int], default: int, choices: int, granted: int
    ) -> None:
        held = Held(user(**limits))
        answer = held.reserve("a", 10, None, NOON, default=default, choices=choices)
        assert answer == granted
        counted = {10 + choices * granted} if limits.keys() - {"completion_tokens"} else set()
        assert {*held.books[user(**limits)].open.values()} == counted

    def test_granted_what_is_left_now(self) -> None:
        held = Held(user(tokens_per_minute=100))
        held.use(85, NOON)
        assert held.reserve("a", 10, None, NOON) == 5
        assert refused(held.reserve("b", 10, None, NOON)).retry_after is not None

    def test_nothing_is_wanted(self) -> None:
        held = Held(user(tokens_per_minute=10, completion_tokens=0, prompt_tokens=10))
        assert held.reserve("a", 10, 0, NOON) == 0
        refusal = refused(held.reserve("b", 10, None, NOON))
        assert (refusal.limit, refusal.never) == ("max_completion_tokens", True)

    @pytest.mark.parametrize(
        ("limits", "prompt", "wanted", "choices", "name", "size"),
        [
            ({"prompt_tokens": 9}, 10, 0, 1, "max_prompt_tokens", 10),
            ({"completion_tokens": 9}, 0, 10, 1, "max_completion_tokens", 10),
            ({"completion_tokens": 9}, 0, 5, 2, "max_completion_tokens", 10),
            ({"completion_tokens": 1}, 0, None, 2, "max_completion_tokens", 2),
            ({"tokens_per_minute": 9}, 5, 5, 1, "max_tokens_per_minute", 10),
            ({"tokens_per_minute": 9}, 9, None, 1, "max_tokens_per_minute", 10),
            ({"tokens_per_day": 9}, 4, 3, 2, "max_tokens_per_day", 10),
            ({"tokens_per_day": 0}, 0, 1, 1, "max_tokens_per_day", 1),
        ],
    )
    def test_what_never_fits(
        self,
        limits: dict[str, int],
        prompt: int,
        wanted: int | None,
        choices: int,
        name: str,
        size: int,
    ) -> None:
        refusal = refused(Held(user(**limits)).reserve("a", prompt, wanted, NOON, choices=choices))
        assert (refusal.limit, refusal.never, refusal.retry_after) == (name, True, None)
        assert f"{name} is {limits[name.removeprefix('max_')]}" in refusal.message
        assert str(size) in refusal.message

    def test_what_just_fits(self) -> None:
        limits = {"prompt_tokens": 5, "completion_tokens": 4, "tokens_per_minute": 9}
        assert Held(user(**limits, tokens_per_day=9)).reserve("a", 5, 2, NOON, choices=2) == 2


class TestDay:
    def test_a_day_is_used_up_until_midnight(self) -> None:
        held = Held(user(tokens_per_day=100))
        held.use(100, NOON)
        refusal = refused(held.reserve("a", 1, 0, MIDNIGHT - 3600))
        assert (refusal.limit, refusal.retry_after) == ("max_tokens_per_day", 3600)
        assert refusal.message.endswith("there is room in 60 minutes")
        assert refused(held.reserve("a", 1, 0, MIDNIGHT - 0.25)).retry_after == 0.25
        assert held.reserve("a", 100, 0, MIDNIGHT) == 0

    def test_charged_to_the_day_on_which_it_settles(self) -> None:
        held = Held(user(tokens_per_day=100))
        held.use(50, MIDNIGHT - 10)
        held.reserve("a", 10, 40, MIDNIGHT - 1)
        assert refused(held.reserve("b", 60, 0, MIDNIGHT + 1)).retry_after is None
        held.settle("a", 30, MIDNIGHT + 1)
        assert held.look(MIDNIGHT + 1)["max_tokens_per_day"].used == 30
        assert held.reserve("b", 70, 0, MIDNIGHT + 2) == 0

    def test_both_limits_have_to_fit(self) -> None:
        held = Held(user(tokens_per_day=100, tokens_per_minute=50))
        held.use(50, NOON)
        assert refused(held.reserve("a", 1, 0, NOON + 1)).retry_after == 60
        held.use(50, NOON + 61)
        refusal = refused(held.reserve("a", 1, 0, NOON + 62))
        assert refusal.limit == "max_tokens_per_day"
        # Of a minute that lasts longer than the day, that is what is told.
        late = Held(user(tokens_per_day=50, tokens_per_minute=50))
        late.use(50, MIDNIGHT - 10)
        refusal = refused(late.reserve("a", 50, 0, MIDNIGHT - 5))
        assert (refusal.limit, refusal.retry_after) == ("max_tokens_per_minute", 56)


class TestAccounts:
    def test_all_or_none(self) -> None:
        held = Held(
            user(requests_per_minute=9, tokens_per_minute=90),
            group(requests_per_minute=1, tokens_per_minute=50),
        )
        assert held.request(NOON) is None
        assert held.reserve("a", 30, 10, NOON) == 10
        before = copy.deepcopy(held.books)
        refusal = refused(held.request(NOON))
        assert (refusal.scope, refusal.retry_after) == ("group:lab", 61)
        assert refusal.message.startswith("max_requests_per_minute of group lab is 1: ")
        assert refused(held.reserve("b", 10, 10, NOON)).scope == "group:lab"
        assert held.books == before

    def test_granted_by_the_tightest(self) -> None:
        held = Held(user(tokens_per_minute=90), group(tokens_per_day=50))
        assert held.reserve("a", 10, None, NOON) == 40
        assert [spent.open for spent in held.books.values()] == [{"a": 50}, {"a": 50}]

    @pytest.mark.parametrize("turn", [1, -1])
    def test_the_refusal_that_lasts_longest_is_told(self, turn: int) -> None:
        accounts = [user(tokens_per_minute=10), group(tokens_per_minute=10)][::turn]
        first, second = Held(accounts[0]), Held(accounts[1])
        first.use(10, NOON)
        second.use(10, NOON + 5)
        both = Held()
        both.books = first.books | second.books
        refusal = refused(both.reserve("a", 1, 0, NOON + 6))
        assert (refusal.scope, refusal.retry_after) == (accounts[1].scope, 60)
        # Longer still is what only others' ends can help, and longest what can never be.
        first.books[accounts[0]].open["x"] = 10
        assert refused(both.reserve("a", 1, 0, NOON + 6)).scope == accounts[0].scope
        never = Held()
        never.books = both.books | {user("bob", tokens_per_day=0): Spent()}
        assert refused(never.reserve("a", 1, 0, NOON + 6)).never


class TestClock:
    def test_a_small_step_back_is_waited_for(self) -> None:
        held = Held(user(requests_per_minute=2))
        assert held.request(NOON) is None
        assert held.request(NOON - 40) is None
        refusal = refused(held.request(NOON - 40))
        assert refusal.retry_after == 101
        assert refused(held.request(NOON + 60.5)).retry_after == 0.5
        assert held.request(NOON + 61) is None

    def test_small_steps_over_midnight_give_nothing_back(self) -> None:
        held = Held(user(tokens_per_day=10))
        held.use(10, MIDNIGHT + 1)
        assert isinstance(held.reserve("a", 1, 0, MIDNIGHT - 1), Refusal)
        assert isinstance(held.reserve("a", 1, 0, MIDNIGHT + 2), Refusal)

    def test_after_a_large_step_all_keeps_its_age(self) -> None:
        held = Held(user(requests_per_minute=2, tokens_per_minute=10))
        held.request(NOON)
        held.request(NOON + 30)
        held.use(10, NOON + 30)
        now = NOON - 3600
        assert (
            refused(held.request(now)).retry_after == 32
        )  # 61 - 30, and 1 for fractions of seconds
        assert refused(held.reserve("a", 1, 0, now)).retry_after == 62
        assert held.request(now + 32) is None
        assert held.reserve("a", 1, 0, now + 62) == 0

    def test_a_day_that_was_wrong_is_used_today_and_no_longer(self) -> None:
        held = Held(user(tokens_per_day=10))
        held.use(10, NOON + 5000 * DAY)
        refusal = refused(held.reserve("a", 1, 0, NOON))
        assert refusal.retry_after == MIDNIGHT - NOON
        assert held.reserve("a", 1, 0, MIDNIGHT) == 0
        held.settle("a", 1, MIDNIGHT)
        # What was counted on it stays counted on it.
        assert isinstance(held.reserve("b", 1, 0, NOON + 5000 * DAY + 1), Refusal)

    def test_a_large_step_over_midnight_and_forth(self) -> None:
        held = Held(user(tokens_per_day=10))
        held.use(4, MIDNIGHT - 200)
        held.use(10, MIDNIGHT + 200)
        assert refused(held.reserve("a", 1, 0, MIDNIGHT - 100)).retry_after == DAY + 100
        assert isinstance(held.reserve("a", 1, 0, MIDNIGHT + 300), Refusal)
        assert held.reserve("a", 1, 0, MIDNIGHT + DAY) == 0

    def test_yesterday_comes_back_as_it_was(self) -> None:
        held = Held(user(tokens_per_day=10))
        held.use(8, MIDNIGHT - 400)
        held.use(1, MIDNIGHT + 10)
        assert isinstance(held.reserve("a", 3, 0, MIDNIGHT - 300), Refusal)
        assert held.reserve("a", 2, 0, MIDNIGHT - 300) == 0

    def test_old_times_are_forgotten(self) -> None:
        held = Held(user(requests_per_minute=2, tokens_per_day=10))
        (spent,) = held.books.values()
        held.request(NOON)
        held.use(1, NOON)
        spent.advance(NOON + 60.9)
        assert (spent.requests, spent.tokens) == ({NOON: 1}, {NOON: 1})
        spent.advance(NOON + 61)
        assert (spent.requests, spent.tokens, spent.days) == ({}, {}, {20_000: 1})
        spent.advance(MIDNIGHT + DAY - 1)
        assert not spent.is_blank()
        spent.advance(MIDNIGHT + DAY)
        assert spent.is_blank()


class TestLook:
    def test_at_first(self) -> None:
        held = Held(user(requests_per_minute=2, tokens_per_minute=10, tokens_per_day=20, seconds=3))
        assert held.look(NOON) == {
            "max_requests_per_minute": Standing(2, 0, 2, NOON),
            "max_tokens_per_minute": Standing(10, 0, 10, NOON),
            "max_tokens_per_day": Standing(20, 0, 20, MIDNIGHT),
        }

    def test_later(self) -> None:
        held = Held(user(requests_per_minute=2, tokens_per_minute=10, tokens_per_day=20))
        held.request(NOON + 0.5)
        held.use(4, NOON + 10)
        assert held.look(NOON + 20) == {
            "max_requests_per_minute": Standing(2, 1, 1, NOON + 61),
            "max_tokens_per_minute": Standing(10, 4, 6, NOON + 71),
            "max_tokens_per_day": Standing(20, 4, 16, MIDNIGHT),
        }
        held.reserve("a", 1, 2, NOON + 20)
        assert held.look(NOON + 30.5)["max_tokens_per_minute"] == Standing(10, 7, 3, NOON + 91)
        assert held.look(MIDNIGHT)["max_tokens_per_day"] == Standing(20, 3, 17, MIDNIGHT + DAY)

    def test_only_what_is_limited(self) -> None:
        assert Held(user(tokens_per_day=1)).look(NOON).keys() == {"max_tokens_per_day"}
        assert Held(user(concurrent=1)).look(NOON) == {}


def arrive(crowd: Crowd, accounts: Sequence[Account], *ids: str) -> list[bool | Refusal]:
    answers = [crowd.arrive(id, accounts) for id in ids]
    crowd.check_invariants()
    return answers


class TestCrowd:
    def test_one_at_a_time_in_order(self) -> None:
        crowd, ann = Crowd(), [user(concurrent=1)]
        assert arrive(crowd, ann, "a", "b", "c") == [True, False, False]
        assert [crowd.position(id) for id in "abc"] == [0, 0, 1]
        assert crowd.leave("a") == ["b"]
        assert [crowd.position(id) for id in "bc"] == [0, 0]
        assert crowd.leave("b") == ["c"]
        assert crowd.leave("c") == []
        assert arrive(crowd, ann, "d") == [True]

    def test_others_do_not_wait(self) -> None:
        crowd = Crowd()
        assert arrive(crowd, [user(concurrent=1)], "a", "b") == [True, False]
        assert arrive(crowd, [user("bob", concurrent=1)], "c") == [True]
        assert arrive(crowd, [user("eve")], "d", "e") == [True, True]
        assert crowd.leave("c") == []

    def test_who_has_no_room_elsewhere_is_passed(self) -> None:
        crowd, lab = Crowd(), group(concurrent=2)
        ann, bob = [user(concurrent=1), lab], [user("bob", concurrent=1), lab]
        eve = [user("eve", concurrent=1), lab]
        assert arrive(crowd, ann, "a", "b") == [True, False]
        assert arrive(crowd, bob, "c") == [True]
        assert arrive(crowd, eve, "d") == [False]
        assert [crowd.position(id) for id in "abcd"] == [0, 0, 0, 1]
        assert crowd.leave("c") == ["d"]
        assert crowd.leave("a") == ["b"]
        assert crowd.leave("b") == crowd.leave("d") == []

    def test_several_can_go_at_once(self) -> None:
        crowd, lab = Crowd(), group(concurrent=2)
        both = group(concurrent=1), Account("group:two", Limits(concurrent=1))
        assert arrive(crowd, both, "a") == [True]
        assert arrive(crowd, both[:1], "b") == arrive(crowd, both[1:], "c") == [False]
        assert arrive(crowd, [lab], "d") == [True]
        assert crowd.leave("d") == []
        assert crowd.leave("a") == ["b", "c"]

    def test_so_many_may_wait(self) -> None:
        crowd, ann = Crowd(), [user(concurrent=1, queued=2)]
        first, second, third = arrive(crowd, ann, "a", "b", "c")
        assert (first, second) == (True, False)
        assert refused(third) == Refusal(
            "max_queued", "max_queued is 2, and so many wait for their first token"
        )
        crowd.first_token("a")
        crowd.first_token("a")
        assert arrive(crowd, ann, "c") == [False]
        assert refused(arrive(crowd, ann, "d")[0]).retry_after is None
        assert crowd.leave("b") == []
        assert arrive(crowd, ann, "d") == [False]
        assert crowd.leave("a") == ["c"]
        assert isinstance(arrive(crowd, ann, "e")[0], Refusal)

    def test_refused_by_one_account_counts_on_none(self) -> None:
        crowd, lab = Crowd(), group(queued=1)
        assert arrive(crowd, [user("bob"), lab], "a") == [True]
        refusal = refused(arrive(crowd, [user(concurrent=1, queued=1), lab], "b")[0])
        assert refusal.scope == "group:lab"
        assert refusal.message.startswith("max_queued of group lab is 1")
        assert arrive(crowd, [user(concurrent=1, queued=1)], "b") == [True]

    @pytest.mark.parametrize("limit", ["concurrent", "queued"])
    def test_none_at_all(self, limit: str) -> None:
        refusal = refused(Crowd().arrive("a", [user(**{limit: 0})]))
        assert (refusal.limit, refusal.never) == (f"max_{limit}", True)

    def test_tightened_limits_are_for_those_who_come(self) -> None:
        crowd = Crowd()
        assert arrive(crowd, [user(concurrent=2)], "a", "b", "c") == [True, True, False]
        assert arrive(crowd, [user(concurrent=1)], "d") == [False]
        assert crowd.leave("a") == ["c"]
        assert crowd.leave("b") == []
        assert crowd.leave("c") == ["d"]

    def test_each_comes_once_and_goes_once(self) -> None:
        crowd = Crowd()
        assert arrive(crowd, [user()], "a") == [True]
        with pytest.raises(ValueError, match="a is here already"):
            crowd.arrive("a", [user()])
        crowd.leave("a")
        for call in (crowd.leave, crowd.first_token, crowd.position):
            with pytest.raises(KeyError):
                call("a")

    def test_look(self) -> None:
        crowd, ann = Crowd(), user(concurrent=2, queued=5)
        arrive(crowd, [ann], "a", "b", "c")
        crowd.first_token("a")
        assert crowd.look(ann) == {
            "max_concurrent": Standing(2, 2, 0, None),
            "max_queued": Standing(5, 2, 3, None),
        }
        assert crowd.look(user("bob", queued=1)) == {"max_queued": Standing(1, 0, 1, None)}
