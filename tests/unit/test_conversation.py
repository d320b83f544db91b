"""A notebook's exchanges: the last ones, in order; a cell that is run again; bounds; reset."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shimmy_jupyter.notebook.conversation import Conversation, Exchange


def said(conversation: Conversation, cell: str | None, count: int = 9) -> list[str]:
    return [one.prompt for one in conversation.before(cell, count)]


@pytest.fixture
def three() -> Conversation:
    found = Conversation()
    for name in "abc":
        found.add(Exchange(f"ask {name}", f"say {name}", name))
    return found


def test_the_last_ones_in_order(three: Conversation) -> None:
    assert said(three, "d", 2) == ["ask b", "ask c"]
    assert said(three, None, 2) == ["ask b", "ask c"]
    assert said(three, "d", 0) == []
    assert said(three, "d") == ["ask a", "ask b", "ask c"]


def test_a_cell_goes_on_from_what_was_before_it(three: Conversation) -> None:
    assert said(three, "b") == ["ask a"]
    assert said(three, "a") == []
    three.add(Exchange("ask again", "say again", "b"))
    assert said(three, "c") == ["ask a", "ask again"]
    assert len(three) == 3


def test_without_cells_all_of_them_count() -> None:
    found = Conversation()
    found.add(Exchange("x", "1"))
    found.add(Exchange("x", "2"))
    assert said(found, None) == ["x", "x"]


def test_messages() -> None:
    assert Exchange("q", "a").messages() == [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    ]


def test_an_empty_answer_is_none() -> None:
    found = Conversation()
    found.add(Exchange("x", ""))
    assert len(found) == 0


def test_reset(three: Conversation) -> None:
    assert three.reset() == 3
    assert (len(three), said(three, "d")) == (0, [])
    assert three.reset() == 0


@given(st.lists(st.tuples(st.integers(0, 400_000), st.sampled_from([None, "a", "b", "c"]))))
def test_it_stays_small(given: list[tuple[int, str | None]]) -> None:
    found = Conversation()
    for size, cell in given:
        found.add(Exchange("p", "x" * size, cell))
    assert len(found) <= 200
    assert len(found) <= 1 or sum(one.size for one in found) <= 1 << 20
    cells = [one.cell for one in found if one.cell]
    assert len(cells) == len(set(cells))
    if given and given[-1][0] and given[-1][1] is None:
        assert len(list(found)[-1].answer) == given[-1][0]


def test_many() -> None:
    found = Conversation()
    for number in range(500):
        found.add(Exchange(str(number), "x"))
    assert said(found, None, 1000) == [str(n) for n in range(300, 500)]
