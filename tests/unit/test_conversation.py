"""A notebook's exchanges: the last ones, in order; a cell that is run again, with as many questions, fewer
and more, with none that was answered; several questions of one run, also at the end; cells without ids;
bounds; reset.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shimmy_jupyter.notebook.conversation import Conversation, Exchange


def said(
    conversation: Conversation, cell: str | None, count: int = 9, run: str = "new"
) -> list[str]:
    return [one.prompt for one in conversation.before(cell, run, count)]


def prompts(conversation: Conversation) -> list[str]:
    return [one.prompt for one in conversation]


def ask(conversation: Conversation, run: str, cell: str | None, *asked: str) -> list[list[str]]:
    """What each of the prompts went on from."""
    found = []
    for prompt in asked:
        found.append(said(conversation, cell, run=run))
        conversation.add(Exchange(prompt, "an answer", cell, run))
    return found


@pytest.fixture
def three() -> Conversation:
    found = Conversation()
    for name in "abc":
        found.add(Exchange(f"ask {name}", f"say {name}", name, f"first {name}"))
    return found


def test_the_last_ones_in_order(three: Conversation) -> None:
    assert said(three, "d", 2) == ["ask b", "ask c"]
    assert said(three, None, 2) == ["ask b", "ask c"]
    assert said(three, "d", 0) == []
    assert said(three, "d") == ["ask a", "ask b", "ask c"]


def test_a_cell_goes_on_from_what_was_before_it(three: Conversation) -> None:
    assert said(three, "b") == ["ask a"]
    assert said(three, "a") == []
    three.add(Exchange("ask again", "say again", "b", "second"))
    assert said(three, "c") == ["ask a", "ask again"]
    assert len(three) == 3


def test_questions_of_one_run_go_on_from_one_another(three: Conversation) -> None:
    before = ["ask a", "ask b", "ask c"]
    assert ask(three, "run", "d", "1", "2", "3") == [before, [*before, "1"], [*before, "1", "2"]]
    assert prompts(three) == [*before, "1", "2", "3"]


@pytest.mark.parametrize("count", [1, 3, 5])
def test_another_run_takes_the_place_of_all_of_the_earlier_one(count: int) -> None:
    found = Conversation()
    ask(found, "1", "a", "first")
    ask(found, "2", "b", "old 1", "old 2", "old 3")
    ask(found, "3", "c", "last")
    new = [f"new {number}" for number in range(count)]
    assert ask(found, "4", "b", *new) == [["first", *new[:number]] for number in range(count)]
    assert prompts(found) == ["first", *new, "last"]


def test_a_run_that_was_stopped_has_replaced_what_it_had_answered_anew() -> None:
    found = Conversation()
    ask(found, "1", "a", "old 1", "old 2")
    ask(found, "2", "b", "last")
    found.add(Exchange("nothing came", "", "a", "3"))
    assert prompts(found) == ["old 1", "old 2", "last"]
    assert said(found, "a", run="3") == []  # still not from the earlier run's
    ask(found, "3", "a", "new")
    assert prompts(found) == ["new", "last"]
    assert ask(found, "4", "a", "newer") == [[]]
    assert prompts(found) == ["newer", "last"]


def test_without_cells_all_of_them_count() -> None:
    found = Conversation()
    ask(found, "1", "a", "of a cell")
    assert ask(found, "2", None, "x") == [["of a cell"]]
    ask(found, "2", None, "y")
    ask(found, "3", None, "x")
    assert said(found, None, run="3") == ["of a cell", "x", "y", "x"]


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


_RUNS = st.tuples(
    st.integers(0, 400_000), st.sampled_from([None, "a", "b", "c"]), st.sampled_from("12")
)


@given(st.lists(_RUNS))
def test_it_stays_small(given: list[tuple[int, str | None, str]]) -> None:
    found = Conversation()
    for size, cell, run in given:
        found.add(Exchange("p", "x" * size, cell, run))
    assert len(found) <= 200
    assert len(found) <= 1 or sum(one.size for one in found) <= 1 << 20
    runs = {(one.cell, one.run) for one in found if one.cell}
    assert len(runs) == len({cell for cell, _ in runs})
    if given and given[-1][0] and given[-1][1] is None:
        assert len(list(found)[-1].answer) == given[-1][0]


def test_many() -> None:
    found = Conversation()
    for number in range(500):
        found.add(Exchange(str(number), "x"))
    assert said(found, None, 1000) == [str(n) for n in range(300, 500)]
