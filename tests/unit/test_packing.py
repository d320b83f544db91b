"""Which texts are embedded in which call.

Cases: nothing; one that is larger than the budget; as many as fit; more than there are slots; inputs that
may be divided, one over many calls, beside others; any inputs with any budgets: each token once, in order.
"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shimmy_jupyter.core.messages import Row
from shimmy_jupyter.core.packing import Packing


def test_nothing() -> None:
    packing = Packing([], batch_tokens=8, sequences=2)
    assert packing.next(8) == ()
    assert packing.whole


def test_as_many_as_fit() -> None:
    packing = Packing([(1, 2), (3,), (4, 5, 6), (7,)], batch_tokens=8, sequences=4)
    assert packing.next(4) == (Row(0, 0, (1, 2), True), Row(1, 0, (3,), True))
    assert packing.next(1) == (Row(0, 0, (4, 5, 6), True),)  # too large, and not divisible
    assert packing.next(100) == (Row(0, 0, (7,), True),)
    assert packing.next(100) == ()


def test_no_more_than_there_are_slots() -> None:
    packing = Packing([(1,)] * 5, batch_tokens=8, sequences=2)
    assert [len(packing.next(8)) for _ in range(4)] == [2, 2, 1, 0]


def test_one_over_many_calls() -> None:
    packing = Packing([(1,), (2, 3, 4, 5), (6,)], batch_tokens=3, sequences=2, divisible=True)
    # A part is first in its call: with its end a turn may end, too.
    assert packing.next(3) == (Row(0, 0, (1,), True),)
    assert packing.whole
    assert packing.next(3) == (Row(0, 0, (2, 3, 4), False),)
    assert not packing.whole
    assert packing.next(9) == (Row(0, 3, (5,), True), Row(1, 0, (6,), True))
    assert packing.whole
    assert packing.next(9) == ()


inputs = st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=12).map(tuple), max_size=12)


@given(inputs, st.integers(12, 20), st.integers(1, 4), st.booleans(), st.data())
def test_each_token_once_and_in_order(
    inputs: list[tuple[int, ...]], batch: int, sequences: int, divisible: bool, data: st.DataObject
) -> None:
    packing = Packing(inputs, batch_tokens=batch, sequences=sequences, divisible=divisible)
    held: dict[int, list[int]] = {}
    found = []
    while rows := packing.next(data.draw(st.integers(0, 30))):
        assert sum(len(row.tokens) for row in rows) <= batch
        assert len({row.slot for row in rows}) == len(rows)
        assert all(0 <= row.slot < sequences for row in rows)
        # What is not continued is forgotten.
        held = {row.slot: held[row.slot] for row in rows if row.start}
        for row in rows:
            so_far = held.setdefault(row.slot, [])
            assert len(so_far) == row.start
            so_far += row.tokens
            if row.sample:
                found.append(tuple(held.pop(row.slot)))
        assert packing.whole is (not held)
        assert divisible or not held
    assert found == inputs
