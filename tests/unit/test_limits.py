"""Which limits hold for whom, and how users tighten their own.

Cases: the tightest of several, None and 0; what a group gives replaces the default, also upwards; of
several groups the most generous; groups that the table does not know, or that are named twice; what can
be shared; several tables; what a user may ask for, and every way of asking wrongly.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shimmy_jupyter.core.limits import (
    NAMES,
    Account,
    Limits,
    LimitTable,
    effective,
    named,
    parsed,
    tightened,
)
from shimmy_jupyter.errors import InvalidValue, UnknownParameter
from shimmy_jupyter.types import Principal

ANY = st.builds(
    Limits,
    **{one.name: st.none() | st.integers(0, 5) for one in fields(Limits)},  # type: ignore[arg-type]
)
ANN = Principal("ann", ("students", "lab"))


class TestLimits:
    def test_none_is_off_and_zero_is_none_at_all(self) -> None:
        several = Limits(concurrent=3, queued=0), Limits(concurrent=2, seconds=0.5)
        assert Limits().tightest(*several) == Limits(concurrent=2, queued=0, seconds=0.5)

    @given(ANY, ANY)
    def test_the_tightest_is_field_by_field(self, one: Limits, other: Limits) -> None:
        both = one.tightest(other)
        assert both == other.tightest(one) == both.tightest(one, other)
        for name in NAMES.values():
            mine, theirs = getattr(one, name), getattr(other, name)
            known = [value for value in (mine, theirs) if value is not None]
            assert getattr(both, name) == min(known, default=None)

    def test_merged_replaces_what_is_given(self) -> None:
        base = Limits(concurrent=1, tokens_per_day=5)
        assert base.merged(Limits(tokens_per_day=9, queued=0)) == Limits(
            concurrent=1, tokens_per_day=9, queued=0
        )
        assert base.merged(Limits()) == base

    @pytest.mark.parametrize(
        ("limits", "requests", "tokens"),
        [
            (Limits(concurrent=1, queued=1, prompt_tokens=1, completion_tokens=1, seconds=1), 0, 0),
            (Limits(requests_per_minute=0), 1, 0),
            (Limits(tokens_per_minute=0), 0, 1),
            (Limits(tokens_per_day=0), 0, 1),
        ],
    )
    def test_what_has_to_be_counted(self, limits: Limits, requests: int, tokens: int) -> None:
        assert (limits.counts_requests, limits.counts_tokens) == (bool(requests), bool(tokens))

    def test_names_are_the_traits(self) -> None:
        assert list(NAMES) == [
            "max_requests_per_minute", "max_tokens_per_minute", "max_tokens_per_day", "max_concurrent",
            "max_queued", "max_prompt_tokens", "max_completion_tokens", "max_seconds",
        ]  # fmt: skip
        assert list(NAMES.values()) == [one.name for one in fields(Limits)]


class TestTable:
    def test_a_group_replaces_the_default_up_and_down(self) -> None:
        table = LimitTable(
            Limits(concurrent=2, queued=2, seconds=9),
            {"students": Limits(concurrent=1, queued=5), "staff": Limits(seconds=1)},
        )
        assert table.of(ANN) == Limits(concurrent=1, queued=5, seconds=9)
        assert table.of(Principal("ann")) == table.default

    def test_the_most_generous_group_counts(self) -> None:
        table = LimitTable(
            Limits(concurrent=9),
            {"students": Limits(concurrent=0, queued=1), "lab": Limits(concurrent=3)},
        )
        assert table.of(ANN) == Limits(concurrent=3, queued=1)

    def test_shared_budgets_are_of_ones_groups(self) -> None:
        table = LimitTable(shared={"lab": Limits(concurrent=1), "staff": Limits(concurrent=2)})
        twice = Principal("ann", ("lab", "lab"))
        assert table.shared_of(ANN) == table.shared_of(twice) == {"lab": Limits(concurrent=1)}

    @pytest.mark.parametrize("name", ["prompt_tokens", "completion_tokens", "seconds"])
    def test_what_is_of_one_request_cannot_be_shared(self, name: str) -> None:
        wrong = {"lab": Limits(concurrent=1, **{name: 1})}  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=rf"max_{name} of group 'lab'.*max_concurrent"):
            LimitTable(shared=wrong)

    def test_all_others_can(self) -> None:
        LimitTable(shared={"lab": Limits(1, 1, 1, 1, 1)})


class TestEffective:
    def test_the_tightest_of_everything(self) -> None:
        system = LimitTable(
            Limits(concurrent=2), shared={"lab": Limits(tokens_per_day=50, queued=9)}
        )
        user = LimitTable(
            Limits(concurrent=5, queued=4),
            shared={
                "lab": Limits(tokens_per_day=70, queued=3),
                "a": Limits(),
                "students": Limits(1),
            },
        )
        assert effective((system, user), Limits(queued=1, seconds=3), ANN) == (
            Account("user:ann", Limits(concurrent=2, queued=1, seconds=3)),
            Account("group:lab", Limits(tokens_per_day=50, queued=3)),
            Account("group:students", Limits(requests_per_minute=1)),
        )

    def test_own_limits_do_not_loosen(self) -> None:
        (account,) = effective((LimitTable(Limits(concurrent=2)),), Limits(concurrent=7), ANN)
        assert account.limits.concurrent == 2

    def test_without_tables_or_limits(self) -> None:
        assert effective((), Limits(), ANN) == (Account("user:ann", Limits()),)

    def test_a_user_called_like_a_group_is_not_one(self) -> None:
        (account,) = effective((), Limits(), Principal("group:lab"))
        assert (account.key, account.scope) == ("user:group:lab", "user")
        assert Account("group:lab", Limits()).scope == "group:lab"


class TestTightening:
    CEILING = Limits(requests_per_minute=60, seconds=30.0)

    def test_given_replaces_null_removes_others_stay(self) -> None:
        own = Limits(requests_per_minute=10, concurrent=1, seconds=5)
        asked = {"max_requests_per_minute": None, "max_concurrent": 2, "max_queued": 0}
        assert tightened(own, asked, self.CEILING) == Limits(concurrent=2, queued=0, seconds=5)

    @pytest.mark.parametrize("value", [0, 59, 60])
    def test_up_to_the_ceiling(self, value: int) -> None:
        own = tightened(Limits(), {"max_requests_per_minute": value}, self.CEILING)
        assert own == Limits(requests_per_minute=value)

    @pytest.mark.parametrize(
        ("name", "value", "most"),
        [("max_requests_per_minute", 61, "60"), ("max_seconds", 30.1, "30")],
    )
    def test_never_above_it(self, name: str, value: float, most: str) -> None:
        with pytest.raises(InvalidValue, match=f"{name} can be at most {most}") as caught:
            tightened(Limits(), {name: value}, self.CEILING)
        assert caught.value.param == name

    @pytest.mark.parametrize(
        "value", [-1, True, False, 1.0, "5", float("nan"), 10**400, 2**53 + 1, [], {}]
    )
    def test_whole_numbers(self, value: Any) -> None:
        with pytest.raises(InvalidValue, match="a whole number, 0 or more") as caught:
            tightened(Limits(), {"max_queued": value}, Limits())
        assert caught.value.param == "max_queued"

    @pytest.mark.parametrize("value", [-0.1, True, float("nan"), float("inf"), "5", 10**400])
    def test_seconds(self, value: Any) -> None:
        with pytest.raises(InvalidValue, match="a number of seconds, 0 or more") as caught:
            tightened(Limits(), {"max_seconds": value}, Limits())
        assert caught.value.param == "max_seconds"

    @pytest.mark.parametrize("value", [0, 3, 0.25])
    def test_seconds_may_be_a_fraction(self, value: float) -> None:
        assert tightened(Limits(), {"max_seconds": value}, Limits()).seconds == value

    @pytest.mark.parametrize("name", ["requests_per_minute", "max_everything", "x" * 9999])
    @pytest.mark.parametrize("value", [None, 1])
    def test_unknown_names(self, name: str, value: int | None) -> None:
        with pytest.raises(UnknownParameter, match="max_tokens_per_day") as caught:
            tightened(Limits(), {name: value}, Limits())
        assert caught.value.param == name[:64]
        assert len(str(caught.value)) < 400

    @given(ANY)
    def test_names_there_and_back(self, limits: Limits) -> None:
        assert parsed(named(limits)) == limits
        assert parsed(dict.fromkeys(NAMES)) == Limits()
