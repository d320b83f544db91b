"""The scheduler, driven without a clock, a thread or a model.

A state machine does whatever a server and its clients can do, in any order, and after every step
checks the invariants, and that everything a sequence was promised came: exactly one end, text in
order, no more tokens than asked, KV opened and closed once.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from shimmy_jupyter.core import messages as m
from shimmy_jupyter.core.scheduler import Scheduler
from shimmy_jupyter.core.sequence import State
from shimmy_jupyter.types import Failure, FinishReason, Sampling

CAPACITY = m.Capacity(slots=3, kv_tokens=64, context_size=32, batch_tokens=10, queue=4)
GREEDY = Sampling(temperature=0)


def submitted(id: int, prompt: int = 3, max_tokens: int = 4, **fields: object) -> m.Submitted:
    return m.Submitted(id, "p", tuple(range(prompt)), max_tokens, GREEDY, **fields)  # type: ignore[arg-type]


def sampled(slot: int, piece: bytes = b"x", **fields: object) -> m.Sampled:
    return m.Sampled(slot, 7, piece, False, **fields)  # type: ignore[arg-type]


class Driver:
    """A scheduler and what it said, for tests that read like a story."""

    def __init__(self, capacity: m.Capacity = CAPACITY) -> None:
        self.scheduler = Scheduler(capacity)
        self.now = 0.0
        self.said: list[m.Instruction] = []

    def handle(self, event: m.Event) -> list[m.Instruction]:
        self.now += 1.0
        instructions = self.scheduler.handle(event, self.now)
        self.scheduler.check_invariants()
        self.said += instructions
        return instructions

    def plan(self) -> dict[int, m.Row]:
        """The next step's rows by sequence id."""
        self.handle(m.EngineReady())
        slots = {s.slot: id for id, s in self.scheduler.running.items()}
        step = self.scheduler.step
        return {slots[row.slot]: row for row in step.rows} if step else {}

    def decode(self) -> list[m.Instruction]:
        step = self.scheduler.step
        assert step is not None
        return self.handle(m.Stepped(tuple(sampled(r.slot) for r in step.rows if r.sample)))

    def ended(self, id: int) -> m.Finish:
        (finish,) = [i for i in self.said if isinstance(i, m.Finish) and i.id == id]
        return finish


def test_nothing_to_do() -> None:
    assert Driver().plan() == {}


def test_prompt_then_one_row_a_token_then_length() -> None:
    d = Driver()
    d.handle(submitted(1, prompt=3, max_tokens=3))
    d.plan()
    (row,) = d.scheduler.step.rows  # type: ignore[union-attr]
    assert (row.start, row.tokens, row.sample) == (0, (0, 1, 2), True)
    assert d.decode() == [m.Emit(1, "x")]
    assert d.plan()[1].start == 3
    assert d.plan() == {1: d.scheduler.step.rows[0]}  # type: ignore[union-attr]
    d.decode()
    assert (d.plan()[1].start, d.plan()[1].tokens) == (4, (7,))
    d.decode()
    finish = d.ended(1).ended
    assert finish.reason is FinishReason.LENGTH
    assert (finish.usage.prompt_tokens, finish.usage.completion_tokens) == (3, 3)
    assert d.plan() == {}


def test_end_of_generation_is_stop_and_counts() -> None:
    d = Driver()
    d.handle(submitted(1))
    row = d.plan()[1]
    d.handle(m.Stepped((m.Sampled(row.slot, 9, b"", end_of_generation=True),)))
    assert d.ended(1).ended.reason is FinishReason.STOP
    assert d.ended(1).ended.usage.completion_tokens == 1


def test_a_prompt_larger_than_a_batch_takes_several_steps() -> None:
    d = Driver()
    d.handle(submitted(1, prompt=25))
    assert [len(d.plan()[1].tokens)] == [10]
    assert d.handle(m.Stepped(())) == []
    row = d.plan()[1]
    assert (row.start, len(row.tokens), row.sample) == (10, 10, False)
    d.handle(m.Stepped(()))
    row = d.plan()[1]
    assert (row.start, len(row.tokens), row.sample) == (20, 5, True)


def test_decoding_rows_go_before_prompts_and_a_second_prompt_is_not_split() -> None:
    d = Driver()
    d.handle(submitted(1))
    d.plan()
    d.decode()
    d.handle(submitted(2, prompt=6))
    d.handle(submitted(3, prompt=6))
    rows = d.plan()
    assert list(rows) == [1, 2]
    assert [len(rows[i].tokens) for i in rows] == [1, 6]
    d.decode()
    assert {i: len(r.tokens) for i, r in d.plan().items()} == {1: 1, 2: 1, 3: 6}


def test_one_large_prompt_a_step_and_small_ones_together() -> None:
    d = Driver(m.Capacity(slots=8, kv_tokens=4096, context_size=512, batch_tokens=512, queue=8))
    for id, size in enumerate((100, 200, 10, 20, 40), start=1):
        d.handle(submitted(id, prompt=size))
    assert list(d.plan()) == [1]
    d.decode()
    assert list(d.plan()) == [1, 2]
    d.decode()
    assert list(d.plan()) == [1, 2, 3, 4]
    d.decode()
    assert list(d.plan()) == [1, 2, 3, 4, 5]


def test_nobody_overtakes_the_one_that_waits_for_room() -> None:
    d = Driver()
    d.handle(submitted(1, prompt=10, max_tokens=22))
    d.handle(submitted(2, prompt=10, max_tokens=22))
    d.handle(submitted(3, prompt=1, max_tokens=1))
    d.plan()
    assert set(d.scheduler.running) == {1, 2}
    d.handle(m.CancelRequested(3))
    d.handle(submitted(4, prompt=1, max_tokens=1))
    d.handle(m.CancelRequested(1))
    d.handle(m.Stepped(tuple(sampled(r.slot) for r in d.scheduler.step.rows if r.sample)))  # type: ignore[union-attr]
    d.plan()
    assert set(d.scheduler.running) == {2, 4}


def test_full_queue_is_refused_and_says_so() -> None:
    d = Driver()
    for id in range(1, 5):
        d.handle(submitted(id))
    (finish,) = d.handle(submitted(5))
    assert isinstance(finish, m.Finish)
    assert finish.ended.failure is not None
    assert finish.ended.failure.code == "queue_full"


@pytest.mark.parametrize("when", ["queued", "in step", "between steps", "paused", "ended", "never"])
def test_cancel_in_each_state(when: str) -> None:
    d = Driver()
    if when != "never":
        d.handle(submitted(1))
    if when not in ("queued", "never"):
        d.plan()
    if when in ("between steps", "paused", "ended"):
        d.decode()
    if when == "paused":
        d.handle(m.ReaderFull(1))
        assert d.scheduler.sequences[1].state is State.PAUSED
    if when == "ended":
        d.handle(m.CancelRequested(1))
    before = len(d.said)
    said = d.handle(m.CancelRequested(1))
    if when in ("ended", "never"):
        assert said == []
        return
    if when == "in step":
        assert said == []
        assert d.scheduler.sequences[1].state is State.CANCELLING
        said = d.decode()
    kinds = [type(i) for i in said]
    assert kinds == ([m.Finish] if when == "queued" else [m.CloseSlot, m.Finish])
    assert d.ended(1).ended.reason is FinishReason.CANCELLED
    assert not d.scheduler.sequences
    assert len(d.said) == before + len(said)


def test_a_slow_reader_pauses_only_itself() -> None:
    d = Driver()
    d.handle(submitted(1, max_tokens=20))
    d.handle(submitted(2, max_tokens=20))
    d.plan()
    d.decode()
    d.handle(m.ReaderFull(1))
    assert set(d.plan()) == {2}
    d.decode()
    d.handle(m.ReaderReady(1))
    assert set(d.plan()) == {1, 2}


def test_full_while_in_a_step_pauses_after_it() -> None:
    d = Driver()
    d.handle(submitted(1, max_tokens=20))
    d.plan()
    d.handle(m.ReaderFull(1))
    d.decode()
    assert d.scheduler.sequences[1].state is State.PAUSED
    assert d.plan() == {}


def test_patience_with_a_reader_ends() -> None:
    d = Driver(replace(CAPACITY, patience=10))
    d.handle(submitted(1, max_tokens=20))
    d.handle(submitted(2, max_tokens=20))
    d.plan()
    d.decode()
    d.handle(m.ReaderFull(1))
    d.now += 9
    assert set(d.plan()) == {2}
    assert 1 in d.scheduler.sequences
    d.decode()
    d.now += 1
    assert set(d.plan()) == {2}
    failure = d.ended(1).ended.failure
    assert failure is not None
    assert failure.code == "deadline_exceeded"
    assert not d.handle(m.ReaderReady(1))


def test_failed_step_ends_those_in_it_only() -> None:
    d = Driver()
    d.handle(submitted(1))
    d.plan()
    d.handle(submitted(2))
    d.handle(m.StepFailed(Failure("engine_crashed", "why")))
    assert d.ended(1).ended.failure == Failure("engine_crashed", "why")
    assert set(d.plan()) == {2}


def test_halt_ends_everybody_and_whoever_comes_later() -> None:
    d = Driver()
    for id in (1, 2):
        d.handle(submitted(id))
    d.plan()
    d.handle(submitted(3))
    d.handle(m.Halted(Failure("shutting_down", "bye")))
    d.handle(submitted(4))
    for id in (1, 2, 3, 4):
        failure = d.ended(id).ended.failure
        assert failure is not None
        assert failure.code == "shutting_down"
    assert d.plan() == {}


def test_timings() -> None:
    d = Driver()
    d.handle(submitted(1, max_tokens=3))  # at 1
    d.plan()  # admitted at 2
    d.decode()  # first token at 3
    d.plan()
    d.decode()  # second at 5
    d.plan()
    d.decode()  # third at 7
    timings = d.ended(1).ended.timings
    assert timings.queue_ms == 1000
    assert timings.ttft_ms == 2000
    assert timings.tokens_per_second == 0.5


def test_repr_says_where_things_stand() -> None:
    d = Driver()
    d.handle(submitted(1))
    d.plan()
    d.handle(submitted(2))
    assert repr(d.scheduler) == "<Scheduler 1 queued, 1 running, 7/64 KV tokens reserved>"


class Machine(RuleBasedStateMachine):
    ids = Bundle("ids")

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(CAPACITY)
        self.now = 0.0
        self.count = 0
        self.asked: dict[int, m.Submitted] = {}
        self.text: dict[int, str] = {}
        self.ends: dict[int, m.Finish] = {}
        self.slots: set[int] = set()
        self.produced: dict[int, int] = {}

    def send(self, event: m.Event) -> None:
        self.now += 0.5
        for instruction in self.scheduler.handle(event, self.now):
            self.obey(instruction)

    def obey(self, instruction: m.Instruction) -> None:
        match instruction:
            case m.OpenSlot(slot=slot):
                assert slot not in self.slots
                self.slots.add(slot)
            case m.CloseSlot(slot=slot):
                self.slots.remove(slot)
            case m.Emit(id=id, text=text):
                assert id not in self.ends
                assert text
                self.text[id] += text
            case m.Finish(id=id):
                assert id not in self.ends
                self.ends[id] = instruction

    @rule(
        target=ids,
        prompt=st.integers(1, 24),
        max_tokens=st.integers(1, 8),
        stop=st.sampled_from([(), ("ab",), ("b", "aab")]),
    )
    def submit(self, prompt: int, max_tokens: int, stop: tuple[str, ...]) -> int:
        self.count += 1
        event = m.Submitted(self.count, "p", tuple(range(prompt)), max_tokens, GREEDY, stop)
        self.asked[event.id], self.text[event.id] = event, ""
        self.send(event)
        return event.id

    @rule(id=ids)
    def cancel(self, id: int) -> None:
        self.send(m.CancelRequested(id))

    @rule(id=ids)
    def reader_full(self, id: int) -> None:
        self.send(m.ReaderFull(id))

    @rule(id=ids)
    def reader_ready(self, id: int) -> None:
        self.send(m.ReaderReady(id))

    @rule()
    def ready(self) -> None:
        self.send(m.EngineReady())

    @rule(choices=st.lists(st.sampled_from(["a", "b", "é", "end", "nan"]), min_size=3, max_size=3))
    def stepped(self, choices: list[str]) -> None:
        if self.scheduler.step is None:
            return
        results = []
        for row, choice in zip(self.scheduler.step.rows, choices, strict=False):
            if row.sample:
                failure = Failure("generation_failed", "nan") if choice == "nan" else None
                piece = b"" if choice in ("end", "nan") else choice.encode()
                results.append(m.Sampled(row.slot, 5, piece, choice == "end", failure))
        self.send(m.Stepped(tuple(results)))

    @rule()
    def step_failed(self) -> None:
        if self.scheduler.step is not None:
            self.send(m.StepFailed(Failure("engine_crashed", "why")))

    @invariant()
    def agrees_with_itself(self) -> None:
        self.scheduler.check_invariants()
        assert self.slots == {s.slot for s in self.scheduler.running.values()}

    @invariant()
    def everybody_is_accounted_for(self) -> None:
        assert set(self.asked) == set(self.ends) | set(self.scheduler.sequences)
        assert not set(self.ends) & set(self.scheduler.sequences)
        for id, finish in self.ends.items():
            usage, asked = finish.ended.usage, self.asked[id]
            assert usage.prompt_tokens == len(asked.prompt)
            assert usage.completion_tokens <= asked.max_tokens
            if finish.ended.reason is FinishReason.LENGTH:
                assert usage.completion_tokens == asked.max_tokens
            assert (finish.ended.reason is FinishReason.ERROR) == (finish.ended.failure is not None)
        for id, text in self.text.items():
            assert not any(stop in text for stop in self.asked[id].stop)

    def teardown(self) -> None:
        """Whatever happened, those who are left can still be served to their end."""
        for id in list(self.scheduler.sequences):
            self.send(m.ReaderReady(id))
        for _ in range(2000):
            self.send(m.EngineReady())
            if self.scheduler.step is None:
                break
            rows = self.scheduler.step.rows
            self.send(m.Stepped(tuple(m.Sampled(r.slot, 5, b"z", False) for r in rows if r.sample)))
        assert not self.scheduler.sequences
        assert set(self.ends) == set(self.asked)
        assert self.scheduler.reserved_tokens == 0


Machine.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestMachine = Machine.TestCase
