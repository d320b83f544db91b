"""Prompts that are read in a context of their own, beside sequences that decode.

Cases: a long one beside another's answer is, in whole tiles, but for its last token; alone, short, scored, in the cache
already, or where the engine cannot: it is not; one at a time; a slice takes several steps; where nobody decodes any
more the slice that has begun ends and the rest goes into steps; refused: in slices, and not asked for again; given
up amid a slice; steps that fail or are aborted leave it as it is; who has had less goes first, so does a short one that
has begun, otherwise they take turns; a
reproducible request's share counts it; while its context is made nothing is learnt; its time is what is left of a step, less what it is late, and a part of the
rows' at least; slices are small where it is late.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from shimmy_jupyter.core import messages as m
from shimmy_jupyter.core.pace import TILE, Pace
from shimmy_jupyter.types import Failure, FinishReason, Sampling

from .test_scheduler import LARGE, Driver, sampled, submitted

CAPACITY = replace(LARGE, aside_tokens=512)
STEP = 0.15
SLOW = 0.1
"""Seconds of a step of one row: little is left for slices."""


class Reader(Driver):
    """Sequence 1 decodes, and everything takes so long that slices would be small."""

    def __init__(self, capacity: m.Capacity = CAPACITY) -> None:
        super().__init__(capacity)
        self.handle(submitted(1, max_tokens=400))
        self.next(0.01)
        self.next()

    def next(self, seconds: float = SLOW, **read: bool) -> m.Step:
        """Plan a step and answer it, with what became of what was read aside."""
        self.handle(m.EngineReady())
        step = self.scheduler.step
        assert step is not None
        aside = m.AsideRead(step.aside.seconds, **read) if step.aside else None
        tokens = tuple(sampled(row.slot) for row in step.rows if row.sample)
        prompt = sum(len(row.tokens) for row in step.rows if len(row.tokens) > 1)
        self.handle(m.Stepped(tokens, seconds + 0.004 * prompt, 1, aside=aside))
        return step

    def cached(self, id: int) -> int:
        return self.scheduler.running[id].cached


def long(id: int, prompt: int, who: str = "q", max_tokens: int = 4) -> m.Submitted:
    """A prompt that begins like no other."""
    tokens = tuple(range(1000 * id, 1000 * id + prompt))
    return m.Submitted(id, who, tokens, max_tokens, Sampling(temperature=0))


def aside(step: m.Step) -> tuple[int, int]:
    assert step.aside is not None
    return step.aside.start, len(step.aside.tokens)


def test_a_long_prompt_is_read_in_tiles_but_for_its_last_token() -> None:
    d = Reader()
    d.handle(long(2, 800, who="q"))
    asked = [d.next(done=True) for _ in range(6)]
    assert [aside(step) for step in asked] == [
        (0, 128), (128, 128), (256, 128), (384, 128), (512, 128), (640, 159),
    ]  # fmt: skip
    assert [step.aside.last for step in asked if step.aside] == [*[False] * 5, True]
    # Whoever decodes has a token in each.
    assert [len(step.rows) for step in asked] == [1] * 6
    step = d.next()
    assert step.aside is None
    assert any((row.start, len(row.tokens), row.sample) == (799, 1, True) for row in step.rows)
    assert d.scheduler.running[2].generated == 1


def test_a_slice_takes_as_many_steps_as_it_needs() -> None:
    d = Reader()
    d.handle(long(2, 800, who="q"))
    assert [aside(d.next()) for _ in range(3)] == [(0, 128)] * 3
    assert d.cached(2) == 0
    assert aside(d.next(done=True)) == (0, 128)
    assert (d.cached(2), aside(d.next())) == (128, (128, 128))


def test_while_its_context_is_made_nothing_is_learnt_of_times() -> None:
    d = Reader()
    known = d.scheduler.pace.aside_seconds(1)
    d.handle(long(2, 800, who="q"))
    for _ in range(3):
        step = d.next(10.0, making=True)
        assert step.has_company
    step = d.next(SLOW)  # whether it has been made is known afterwards
    assert step.has_company
    assert d.scheduler.pace.aside_seconds(1) == known
    assert not d.next(SLOW, done=True).has_company
    assert not d.next(2 * SLOW).has_company
    assert d.scheduler.pace.aside_seconds(1) != known


@pytest.mark.parametrize(
    ("capacity", "prompt"), [(CAPACITY, 500), (replace(CAPACITY, aside_tokens=0), 900)]
)
def test_short_ones_or_where_it_cannot_be(capacity: m.Capacity, prompt: int) -> None:
    d = Reader(capacity)
    d.handle(long(2, prompt, who="q"))
    for _ in range(5):
        assert d.next().aside is None


def test_not_where_every_token_is_scored() -> None:
    d = Reader()
    scoring = Sampling(temperature=0, prompt_logprobs=0)
    d.handle(m.Submitted(2, "q", tuple(range(800)), 1, scoring))
    d.handle(m.EngineReady())
    assert d.scheduler.step is not None
    assert d.scheduler.step.aside is None


def test_not_where_a_whole_batch_is_quick() -> None:
    d = Driver(CAPACITY)
    d.handle(submitted(1, max_tokens=100))
    for _ in range(3):
        d.plan()
        d.decode(0.001)
    d.handle(long(2, 900, who="q"))
    for _ in range(3):
        d.plan()
        assert d.scheduler.step is not None
        assert d.scheduler.step.aside is None
        d.decode(0.01)


def test_what_is_in_the_cache_already_does_not_count() -> None:
    d = Reader()
    d.handle(submitted(2, prompt=600, who="q", max_tokens=1))
    while 2 in d.scheduler.sequences:
        d.next(done=True)
    d.handle(submitted(3, prompt=900, who="q"))
    for _ in range(3):
        assert d.next().aside is None
    assert d.cached(3) > 600


def test_what_is_far_in_the_cache_begins_there() -> None:
    d = Reader(replace(CAPACITY, aside_tokens=100))
    d.handle(submitted(2, prompt=600, who="q", max_tokens=1))
    while 2 in d.scheduler.sequences:
        d.next(done=True)
    d.handle(submitted(3, prompt=900, who="q"))
    assert aside(d.next())[0] == 600


def test_alone_it_is_read_in_batches() -> None:
    d = Driver(CAPACITY)
    d.handle(submitted(1, prompt=800))
    d.plan()
    assert d.scheduler.step is not None
    assert d.scheduler.step.aside is None


def test_where_nobody_decodes_any_more_the_rest_goes_into_steps() -> None:
    d = Reader(replace(CAPACITY, aside_tokens=200))
    d.handle(long(2, 800, who="q"))
    d.next()
    d.handle(m.CancelRequested(1))
    step = d.next()
    assert (step.rows, aside(step)) == ((), (0, 128))
    d.next(done=True)
    step = d.next()
    assert step.aside is None
    assert step.rows[0].start == 128
    # And aside again, when somebody decodes again.
    d.handle(submitted(3, who="r"))
    while d.scheduler.sequences[3].generated == 0:
        d.next()
    assert d.scheduler.running[2].prompt_left >= 200
    assert aside(d.next()) == (d.cached(2), 128)


def test_one_at_a_time() -> None:
    d = Reader()
    d.handle(long(2, 800, who="q"))
    d.next()
    d.handle(long(3, 900, who="r"))
    slots = set()
    for _ in range(20):
        step = d.next(done=False)
        slots |= {step.aside.slot} if step.aside else set()
    assert slots == {d.scheduler.running[2].slot}
    assert d.cached(3) > 0  # in slices meanwhile


def test_refused_it_is_read_in_slices() -> None:
    d = Reader()
    d.handle(long(2, 800, who="q"))
    assert d.next(refused=True).aside is not None
    for _ in range(5):
        assert d.next().aside is None
    assert d.cached(2) > 0


def test_given_up_amid_a_slice() -> None:
    d = Reader()
    d.handle(long(2, 800, who="q"))
    d.next()
    d.handle(m.EngineReady())
    assert d.scheduler.stepping() == {1, 2}
    before = d.scheduler.line.counters["q"] - 800
    d.handle(m.CancelRequested(2))
    assert 2 in d.scheduler.sequences  # its slot is in use
    step = d.scheduler.step
    assert step is not None
    assert step.aside is not None
    d.handle(m.Stepped((sampled(step.rows[0].slot),), SLOW, 1, aside=m.AsideRead(0.1)))
    assert d.ended(2).ended.reason is FinishReason.CANCELLED
    assert m.CloseSlot(step.aside.slot) in d.said
    assert d.scheduler.line.counters["q"] == before + 128  # or it would be for nothing
    d.handle(long(3, 800, who="q"))
    assert aside(d.next()) == (0, 128)


@pytest.mark.parametrize(
    "event", [m.StepAborted(), m.StepFailed(Failure("engine_crashed", "why"))], ids=["aborted", "failed"]
)  # fmt: skip
def test_a_step_that_came_to_nothing_leaves_it_as_it_was(event: m.Event) -> None:
    d = Reader()
    d.handle(long(2, 800, who="q"))
    d.next(done=True)
    d.handle(m.EngineReady())
    d.handle(event)
    assert (1 in d.scheduler.sequences) == isinstance(event, m.StepAborted)
    assert d.cached(2) == 128
    d.handle(submitted(3, who="r"))
    while d.scheduler.running.get(3) is None or not d.scheduler.running[3].generated:
        step = d.next(done=True)
    assert 2 in d.scheduler.running
    assert step.aside is None or step.aside.slot == d.scheduler.running[2].slot


def test_who_has_had_less_goes_first() -> None:
    d = Reader()
    d.handle(long(2, 800))
    d.next()
    d.handle(long(3, 90, who="r"))
    steps = []
    while not d.scheduler.sequences[3].generated:
        steps.append(d.next())
    assert len(steps) > 1
    assert all(step.aside is None for step in steps)
    assert d.next().aside is not None


def test_of_one_principal_both_have_turns() -> None:
    d = Reader()
    d.handle(long(2, 900))
    for id in range(3, 30):
        d.handle(long(id, 20, max_tokens=1))
    turns = [d.next().aside is not None for _ in range(20)]
    assert 8 <= sum(turns) <= 12
    assert 3 not in d.scheduler.sequences


def test_a_short_one_that_has_begun_ends_first() -> None:
    d = Reader()
    d.handle(long(2, 900))
    d.next()
    d.handle(long(3, 400))
    while d.scheduler.running.get(3) is None:
        d.next()
    while not d.scheduler.sequences[3].generated:
        assert d.next().aside is None


def test_long_ones_of_one_principal_have_turns() -> None:
    d = Reader()
    d.handle(long(2, 900))
    d.next()
    d.handle(long(3, 900))
    turns = [d.next().aside is not None for _ in range(10)]
    assert sum(turns) == 5
    assert d.cached(3) > 0


def test_a_reproducible_request_pays_for_its_time() -> None:
    """It has as much of the engine's time as each of the others, and what is read aside is theirs."""
    d = Reader()
    d.handle(long(2, 900, who="q", max_tokens=1))
    d.handle(submitted(3, who="r", max_tokens=60, reproducible=True))
    private = shared = 0.0
    while d.scheduler.sequences[3].generated < 50:
        d.handle(m.EngineReady())
        step = d.scheduler.step
        assert step is not None
        if step.rows[0].slot == CAPACITY.private_slot:
            d.next(0.1)
            private += 0.1
        else:
            d.next(0.02)
            shared += 0.02 + (step.aside.seconds if step.aside else 0.0)
    assert shared == pytest.approx(2 * private, rel=0.2)


class TestTime:
    def pace(self, row: float) -> Pace:
        pace = Pace(batch_tokens=512, step_seconds=STEP, prompt_seconds=1.0, guess=0.01)
        pace.observe(1, 0, row, 2)
        pace.observe(8, 0, 3 * row, 2)
        return pace

    def test_what_is_left_of_a_step(self) -> None:
        pace = self.pace(0.02)
        assert pace.aside_seconds(1) + 0.02 == pytest.approx(1.13 * STEP)
        assert pace.aside_seconds(8) + 0.06 == pytest.approx(1.13 * STEP)

    def test_less_what_it_is_late(self) -> None:
        pace = self.pace(0.02)
        before = pace.aside_seconds(1)
        pace.observe_aside(0.1, 0.12)
        assert pace.aside_seconds(1) == pytest.approx(before - 0.02)
        for _ in range(100):
            pace.observe_aside(0.1, 0.09)  # done sooner
        assert pace.aside_seconds(1) == pytest.approx(before, abs=1e-3)

    def test_once_very_late_says_little(self) -> None:
        pace = self.pace(0.02)
        pace.observe_aside(0.1, 5.0)
        assert pace.aside_seconds(1) > STEP / 2

    def test_a_part_of_the_rows_time_at_least(self) -> None:
        assert self.pace(0.3).aside_seconds(1) >= 0.7 * 0.3

    def test_alone_a_step(self) -> None:
        assert self.pace(0.02).aside_seconds(0) == STEP


def test_where_it_is_late_slices_are_small() -> None:
    d = Reader()
    d.handle(long(2, 800, who="q"))
    assert aside(d.next(done=True)) == (0, 2 * TILE)
    d.scheduler.pace.observe_aside(0.1, 0.14)
    assert aside(d.next(done=True)) == (2 * TILE, TILE)
