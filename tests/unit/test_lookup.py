"""Guesses at what comes next.

Cases: nothing to go by; a copy of the prompt; of the answer itself; the latest of several; no more than are
wanted; fewer and rarer after they were wrong; at any time the same as by search.
"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shimmy_jupyter.core.lookup import MOST, SAME, Lookup


def test_nothing_to_go_by() -> None:
    assert Lookup().guess((1, 2), (), 7) == ()
    assert Lookup().guess((1, 2, 3, 4), (5,), 7) == ()
    assert Lookup().guess((1, 2, 3), (1, 2), 7) == ()


def test_a_copy() -> None:
    lookup = Lookup()
    assert lookup.guess((1, 2, 3, 4, 5, 6), (1, 2, 3, 4), 7) == (5, 6, 1, 2, 3, 4)
    lookup.learn(6, 2)
    assert lookup.guess((1, 2, 3, 4, 5, 6), (1, 2, 3, 4, 5, 6, 3, 4), 7) == ()
    assert lookup.guess((1, 2, 3, 4, 5, 6), (1, 2, 3, 4, 5, 6, 3, 4, 5, 6), 3) == (3, 4, 5)


def test_the_latest_counts() -> None:
    assert Lookup().guess((1, 2, 3, 4, 5, 1, 2, 3, 4, 6), (1, 2, 3, 4), 1) == (6,)


def test_as_many_as_are_wanted() -> None:
    prompt = tuple(range(100))
    lookup = Lookup()
    assert lookup.guess(prompt, (5, 6, 7, 8), 1) == (9,)
    assert lookup.guess(prompt, (5, 6, 7, 8), 0) == ()
    assert len(lookup.guess(prompt, (5, 6, 7, 8), 99)) == MOST


def test_after_being_wrong_it_is_careful_and_waits_longer_and_longer() -> None:
    prompt = tuple(range(100))
    lookup = Lookup()
    waits = []
    for _ in range(8):
        lookup.learn(1, 0)
        wait = 0
        while not (guesses := lookup.guess(prompt, (5, 6, 7, 8), 99)):
            wait += 1
        waits.append(wait)
        assert guesses == (9, 10)
    assert waits == [0, 2, 6, 14, 30, 62, 64, 64]
    lookup.learn(2, 1)
    assert len(lookup.guess(prompt, (5, 6, 7, 8), 99)) == MOST


few = st.lists(st.integers(0, 1), max_size=30)


@given(few, few)
def test_the_same_as_by_search(prompt: list[int], answer: list[int]) -> None:
    lookup = Lookup()
    for size in range(len(answer) + 1):
        tokens = prompt + answer[:size]
        ends = [at for at in range(SAME, len(tokens)) if tokens[at - SAME : at] == tokens[-SAME:]]
        expected = tokens[ends[-1] : ends[-1] + 2] if ends and len(tokens) >= SAME else []
        assert list(lookup.guess(prompt, answer[:size], 2)) == expected
