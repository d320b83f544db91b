"""What goes into a step where the processor computes whole blocks of rows.

Cases: a slice beside rows ends with a block or within the first one; rows that are beyond a block themselves
have what is left of theirs; alone, as well; beside one row, as many blocks as there is time for, also where they
end amid a tile; blocks of one row change nothing; and with times as such a processor has them nobody waits longer
than a step may take.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shimmy_jupyter.core.pace import TILE, Pace, Slice

BLOCK = 32
STEP = 0.15
PER_ROW, PER_BLOCK = 0.0033, 0.09


def seconds(rows: int, block: int = BLOCK) -> float:
    """Of a batch: as measured with AMX, the shape of a 0.6B model and two cores."""
    if rows <= block or block == 1:
        return 0.01 + PER_ROW * rows
    return 0.01 + PER_BLOCK * -(-rows // block)


def trained(rows: int, block: int, sizes: list[int]) -> Pace:
    """It has seen the rows alone, and slices of these sizes beside them."""
    pace = Pace(
        batch_tokens=512, step_seconds=STEP, prompt_seconds=1.0, guess=0.003, row_block=block
    )
    for size in sizes:
        pace.observe(rows, 0, seconds(rows, block), 2)
        pace.observe(rows, size, seconds(rows + size, block), 2)
    return pace


def is_whole(rows: int, tokens: int) -> bool:
    """Whether it adds no block to those of the rows; or alone, none that is not full."""
    if rows and rows + tokens < TILE:
        return -(-(rows + tokens) // BLOCK) == -(-rows // BLOCK)
    return tokens <= BLOCK or (tokens + 1) % BLOCK < 2 or (rows + tokens) % BLOCK == 0


@given(
    st.integers(0, 63),
    st.lists(st.integers(1, 200), min_size=1, max_size=12),
    st.integers(1, 9),
)
def test_no_slice_begins_a_block_that_it_does_not_fill(
    rows: int, sizes: list[int], waiting: int
) -> None:
    piece = trained(rows, BLOCK, sizes).prompt_slice(rows, waiting)
    beside = rows if piece.together else 0
    assert piece.tokens > 0
    # Of few rows' time nothing may be left; a prompt gets a little all the same.
    assert is_whole(beside, piece.tokens) or piece.tokens <= 4


def test_beside_rows_a_slice_ends_where_the_block_does() -> None:
    for rows in range(1, 24):
        piece = trained(rows, BLOCK, [2, 5, 8]).prompt_slice(rows)
        assert piece.together
        assert rows + piece.tokens == BLOCK


def test_rows_beyond_a_block_have_what_is_left_of_it() -> None:
    for rows in range(33, 56):
        piece = trained(rows, BLOCK, [2, 4]).prompt_slice(rows)
        assert piece.together
        assert 4 < piece.tokens <= 2 * BLOCK - rows


@pytest.mark.parametrize(("waiting", "blocks"), [(1, 1), (7, 3)])
def test_where_many_wait_a_slice_has_all_the_blocks_that_there_is_time_for(
    waiting: int, blocks: int
) -> None:
    """A tile and a half, too: two would take longer than a step may be stretched."""
    pace = trained(1, BLOCK, [31, 63, 95])
    assert pace.prompt_slice(1, waiting) == Slice(blocks * BLOCK - 1, together=True)


@given(st.integers(1, 20))
def test_without_blocks_the_time_alone_decides(rows: int) -> None:
    piece = trained(rows, 1, [10, 20, 30]).prompt_slice(rows)
    beside = rows if piece.together else 0
    room = (STEP - seconds(rows, 1)) / PER_ROW
    assert piece.tokens == pytest.approx(min(room, TILE - 1 - beside), abs=4)
    assert beside + piece.tokens > BLOCK


def test_what_is_too_long_has_to_be_worth_it() -> None:
    """Beside rows that take two thirds of a step alone, 32 tokens apart read a little more than 20 together,
    and double the time until those who decode have their next token.
    """
    pace = Pace(
        batch_tokens=512, step_seconds=STEP, prompt_seconds=1.0, guess=0.003, row_block=BLOCK
    )
    for _ in range(4):
        pace.observe(12, 0, 0.1, 2)
        pace.observe(12, 20, 0.15, 2)
        pace.observe(0, 32, 0.1, 2)
    assert pace.prompt_slice(12) == Slice(20, together=True)


def test_many_who_decode_have_no_tile_with_a_prompt() -> None:
    """Nor is it tried: what it takes depends on what they hold."""
    for rows in range(3, 60):
        pace = trained(rows, BLOCK, [60, 90])  # a tile has looked quick
        for _ in range(200):
            piece = pace.prompt_slice(rows)
            assert not piece.together or rows + piece.tokens < TILE
            took = 0.02 * piece.tokens  # and all else is slow
            pace.observe(rows if piece.together else 0, piece.tokens, took, 2)


def test_steps_keep_their_time() -> None:
    """Going by its own choices: from the first measurements on no step is longer than it may be."""
    pace = trained(8, BLOCK, [16])
    taken = []
    for _ in range(200):
        piece = pace.prompt_slice(8)
        took = seconds(8 + piece.tokens) if piece.together else seconds(piece.tokens)
        pace.observe(8 if piece.together else 0, piece.tokens, took, 2)
        pace.observe(8, 0, seconds(8), 2)
        taken.append(took if piece.together else took + seconds(8))
    assert max(taken[10:]) <= STEP
