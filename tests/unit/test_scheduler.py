"""The scheduler, driven without a clock, a thread or a model.

Stories here; whatever a server and its clients can do in any order is in test_scheduler_machine.py.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from shimmy_jupyter.core import messages as m
from shimmy_jupyter.core.fairness import Counters
from shimmy_jupyter.core.pace import Slice
from shimmy_jupyter.core.scheduler import Scheduler
from shimmy_jupyter.core.sequence import State
from shimmy_jupyter.types import Failure, FinishReason, Sampling, Scored

CAPACITY = m.Capacity(slots=6, kv_tokens=64, context_size=32, batch_tokens=10, queue=4, sequences=3)
LARGE = m.Capacity(
    slots=24, kv_tokens=8192, context_size=1024, batch_tokens=512, queue=64, sequences=8
)
GREEDY = Sampling(temperature=0)


def submitted(
    id: int, prompt: int = 3, max_tokens: int = 4, who: str = "p", **fields: object
) -> m.Submitted:
    return m.Submitted(id, who, tuple(range(prompt)), max_tokens, GREEDY, **fields)  # type: ignore[arg-type]


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

    def decode(self, seconds: float = 0.0) -> list[m.Instruction]:
        step = self.scheduler.step
        assert step is not None
        tokens = tuple(sampled(r.slot) for r in step.rows if r.sample)
        return self.handle(m.Stepped(tokens, seconds))

    def run(self, steps: int = 1000, seconds: float = 0.0) -> None:
        """Step until nothing is left to do."""
        for _ in range(steps):
            if not self.plan():
                return
            self.decode(seconds)
        raise AssertionError("it goes on and on")

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


def test_prompts_and_decoding_take_turns_where_prompts_are_quick() -> None:
    d = Driver()
    d.handle(submitted(1))
    d.plan()
    d.decode()
    d.handle(submitted(2, prompt=6, who="q"))
    d.handle(submitted(3, prompt=6, who="r"))
    # 8 of 10 rows are the least that goes beside one that decodes: the time does not bind here.
    steps = []
    for _ in range(4):
        steps.append(list(d.plan()))
        d.decode()
    assert steps == [[1], [2, 3], [1, 2], [3]]


def test_short_prompts_share_a_call_and_long_ones_do_not() -> None:
    d = Driver(LARGE)
    for id, size in enumerate((100, 200, 10, 20, 40), start=1):
        d.handle(submitted(id, prompt=size, who=str(id)))
    steps = []
    for _ in range(7):
        steps.append(list(d.plan()))
        d.decode()
    assert steps == [[1], [1], [2], [1, 2], [3, 4], [1, 2, 3, 4], [5]]


def test_slices_keep_a_step_within_its_time() -> None:
    d = Driver(replace(LARGE, step_seconds=0.15))
    d.handle(submitted(1, prompt=10, max_tokens=500))
    d.plan()
    d.decode(0.05)  # 5 ms a token
    for _ in range(20):
        d.plan()
        d.decode(0.03)
    d.handle(submitted(2, prompt=900, who="q"))
    sizes = []
    for _ in range(30):
        rows = d.plan()
        assert len(rows[1].tokens) == 1
        sizes.append(len(rows[2].tokens))
        d.decode(0.03 + 0.005 * sizes[-1])
    assert all(0.12 <= 0.03 + 0.005 * size <= 0.16 for size in sizes[5:])


def test_after_a_slice_apart_who_decodes_has_a_step_without_another() -> None:
    d = Driver(replace(LARGE, step_seconds=0.15))
    d.handle(submitted(1, prompt=10, max_tokens=500))
    for _ in range(5):
        d.plan()
        d.decode(0.03)
    d.handle(submitted(2, prompt=900, who="q"))
    steps = []
    for together in (False, True, True, True, False, False):
        chosen = Slice(10, together)
        d.scheduler.pace.prompt_slice = lambda *_, chosen=chosen: chosen  # type: ignore[method-assign]
        steps.append(set(d.plan()))
        d.decode(0.03)
    assert steps == [{2}, {1}, {1, 2}, {1, 2}, {2}, {1}]


def test_a_prompt_gets_as_much_time_as_many_rows_beside_it() -> None:
    d = Driver(replace(LARGE, step_seconds=0.15))
    for id in range(1, 5):
        d.handle(submitted(id, prompt=1, max_tokens=400))
    for _ in range(30):
        d.plan()
        d.decode(0.4)
    d.handle(submitted(9, prompt=900, who="q"))
    for _ in range(20):
        size = len(d.plan()[9].tokens)
        d.decode(0.4 + 0.01 * size)
    assert 0.35 <= 0.01 * size <= 0.42


def paced(d: Driver, seconds: Callable[[int, int], float], steps: int) -> list[tuple[int, int]]:
    """So many steps, each of which takes `seconds` by its rows and its prompt's tokens."""
    found = []
    for _ in range(steps):
        rows = d.plan().values()
        prompt = sum(len(row.tokens) for row in rows if row.start < 900)
        decoding = sum(row.start >= 900 for row in rows)
        found.append((decoding, prompt))
        d.decode(seconds(decoding, prompt))
    return found


class TestCompany:
    """A long prompt beside twelve sequences that decode, each of them after a prompt of 900 tokens."""

    def asking(self, id: int) -> m.Submitted:
        return m.Submitted(id, "p", tuple(range(1000 * id, 1000 * id + 900)), 1000, GREEDY)

    def start(self, seconds: Callable[[int, int], float]) -> Driver:
        d = Driver(replace(LARGE, kv_tokens=80_000, sequences=13, step_seconds=0.3))
        for id in range(1, 13):
            d.handle(self.asking(id))
        while any(s.state is not State.DECODE for s in d.scheduler.sequences.values()):
            paced(d, seconds, 1)
        paced(d, seconds, 5)
        d.handle(self.asking(13))
        return d

    def test_slices_stay_small_where_tiles_look_at_everything(self) -> None:
        def seconds(rows: int, prompt: int) -> float:
            return 0.02 + 0.01 * rows + (0.02 if rows and rows + prompt >= 64 else 0.005) * prompt

        steps = paced(self.start(seconds), seconds, 14)
        assert {rows for rows, _ in steps[4:]} == {12}
        assert all(28 <= prompt <= 33 for _, prompt in steps[4:])

    def test_tiles_where_they_are_quicker(self) -> None:
        def seconds(rows: int, prompt: int) -> float:
            return 0.01 * rows + (0.002 if rows + prompt >= 64 else 0.004) * prompt

        steps = paced(self.start(seconds), seconds, 8)
        assert {(rows + prompt) % 64 for rows, prompt in steps[4:] if prompt} == {0}

    def test_in_turns_where_company_costs_more_than_a_step_of_its_own(self) -> None:
        def seconds(rows: int, prompt: int) -> float:
            return 0.02 + 0.01 * rows + (0.02 if rows else 0.004) * prompt

        steps = paced(self.start(seconds), seconds, 10)
        assert [rows for rows, _ in steps[6:]] == [0, 12] * 2
        assert all((prompt >= 32) == (rows == 0) for rows, prompt in steps[6:])

    def test_never_a_full_tile_that_takes_longer_than_two_steps(self) -> None:
        d = Driver(replace(LARGE, slots=90, kv_tokens=400_000, sequences=70, queue=256))
        for id in range(1, 71):
            d.handle(submitted(id, prompt=1, max_tokens=900, who=str(id % 2)))
        sizes = []
        for _ in range(200):
            rows = d.plan()
            sizes.append(len(rows))
            d.decode(0.01 * len(rows) + (2.0 if len(rows) >= 64 else 0.0))
        assert sizes[-60:].count(63) >= 58
        served = [s.generated for s in d.scheduler.sequences.values()]
        assert max(served) - min(served) <= 5


def test_where_many_wait_for_a_first_token_slices_are_thicker_for_a_while() -> None:
    """A token takes 10 ms as a row, 5 ms in a prompt; and nothing else is ever measured alone."""
    d = Driver(replace(LARGE, step_seconds=0.1, prompt_seconds=0.1))
    for id in range(1, 9):
        d.handle(m.Submitted(id, "p", tuple(range(100 * id, 100 * id + 40)), 60, GREEDY))
    times: dict[int, list[float]] = {}
    while any(s.state in (State.QUEUED, State.PREFILL) for s in d.scheduler.sequences.values()):
        rows = d.plan().values()
        decoding = sum(row.start >= 40 for row in rows)
        prompt = sum(len(row.tokens) for row in rows) - decoding
        seconds = 0.01 * decoding + 0.005 * prompt
        times.setdefault(decoding, []).append(seconds)
        d.decode(seconds)
    assert max(map(max, times.values())) <= 2 * 0.1 + 0.01
    # As long as more wait than decode: more than the usual step. One beside seven: no more.
    assert max(max(times[rows]) for rows in times if rows <= 3) > 0.15
    assert times[7][-1] <= 0.12


def test_with_few_rows_the_faster_number_is_decoded() -> None:
    """Two rows that take more than twice as long as one are decoded in turns."""
    d = Driver(LARGE)
    for id in (1, 2):
        d.handle(submitted(id, max_tokens=800))
    seen: dict[int, int] = {}
    turns: dict[int, int] = {1: 0, 2: 0}
    for _ in range(400):
        rows = d.plan()
        seen[len(rows)] = seen.get(len(rows), 0) + 1
        for id in rows:
            turns[id] += 1
        d.decode({1: 0.010, 2: 0.025}[len(rows)])
    assert seen[1] > 0.95 * 400
    assert abs(turns[1] - turns[2]) <= 10


def test_many_rows_are_decoded_together_where_that_is_faster() -> None:
    d = Driver(LARGE)
    for id in range(1, 5):
        d.handle(submitted(id, max_tokens=800))
    sizes = []
    for _ in range(300):
        sizes.append(len(d.plan()))
        d.decode(0.010 + 0.001 * sizes[-1])
    assert sizes[10:].count(4) > 0.95 * 290


def test_others_pass_one_that_has_no_room_but_not_for_ever() -> None:
    d = Driver(replace(LARGE, kv_tokens=1000, sequences=20))
    d.handle(submitted(1, prompt=10, max_tokens=600, who="a"))
    d.handle(submitted(2, prompt=10, max_tokens=600, who="b"))
    for id in range(3, 30):
        d.handle(submitted(id, prompt=10, max_tokens=40, who="c"))
    for _ in range(300):
        d.plan(), d.decode()
    assert 2 not in d.scheduler.running
    passed = [i.id for i in d.said if isinstance(i, m.Finish)] + list(d.scheduler.running)
    assert len(passed) - 1 == 500 // 50
    d.handle(m.CancelRequested(1))
    for _ in range(60):
        d.plan(), d.decode()
    assert 2 in d.scheduler.running


class TestShares:
    def test_one_principal_leaves_room_for_others(self) -> None:
        d = Driver(LARGE)
        for id in range(1, 31):
            d.handle(submitted(id, prompt=5, max_tokens=50, who="many"))
        for _ in range(40):
            d.plan(), d.decode()
        assert len(d.scheduler.running) == 8
        d.handle(submitted(99, prompt=5, who="few"))
        assert 99 in d.plan() or (d.decode() and 99 in d.plan())

    @pytest.mark.parametrize("token_seconds", [0.0001, 0.004])
    def test_one_who_asks_now_and_then_waits_for_two_slices_and_a_step(
        self, token_seconds: float
    ) -> None:
        """Beside one with 50 requests: whatever the engine is at when the request comes, its prompt of
        one slice is read after the step in progress and at most one more.
        """
        d = Driver(replace(LARGE, slots=80, kv_tokens=65536, sequences=32))

        def step() -> set[int]:
            rows = d.plan()
            tokens = sum(len(row.tokens) for row in rows.values())
            said = d.decode(0.02 + token_seconds * tokens)
            return {i.id for i in said if isinstance(i, m.Emit)}

        count = 0

        def keep_fifty_waiting() -> None:
            nonlocal count
            while len(d.scheduler.line) < 40:
                count += 1
                prompt = tuple(range(1000 * count, 1000 * count + 20 + 37 * count % 400))
                d.handle(m.Submitted(count, "many", prompt, 40, GREEDY))

        for visit in range(40):
            for _ in range(3 + visit % 5):
                keep_fifty_waiting()
                step()
            keep_fifty_waiting()
            rows = d.plan()
            id = 100_000 + visit
            prompt = tuple(range(-100 * visit - 20, -100 * visit))
            d.handle(m.Submitted(id, "few", prompt, 2, GREEDY))
            d.decode(0.02 + token_seconds * sum(len(row.tokens) for row in rows.values()))
            waited = 1
            while id not in step():
                waited += 1
            assert waited <= 2

    def test_nor_does_one_take_all_of_the_cache(self) -> None:
        d = Driver(replace(LARGE, kv_tokens=4096))
        for id in range(1, 9):
            d.handle(submitted(id, prompt=10, max_tokens=990, who="many"))
        for _ in range(10):
            d.plan(), d.decode()
        assert len(d.scheduler.running) == 3
        d.handle(submitted(99, prompt=10, max_tokens=990, who="few"))
        d.plan(), d.decode(), d.plan()
        assert 99 in d.scheduler.running

    def test_least_served_goes_next(self) -> None:
        d = Driver(replace(LARGE, sequences=1))
        order = []
        for id in range(1, 9):
            d.handle(submitted(id, prompt=30, max_tokens=10, who="a" if id < 7 else "b"))
        while d.scheduler.sequences:
            before = set(d.scheduler.running)
            d.plan()
            order += sorted(set(d.scheduler.running) - before)
            d.decode()
        assert order.index(7) <= 1
        assert order.index(8) <= 3

    def test_weights(self) -> None:
        counters = Counters({"b": 3.0})
        counters.wait("abc")
        served = {"a": 0, "b": 0, "c": 0}
        for _ in range(500):
            who = min("abc", key=counters.__getitem__)
            counters.charge(who, prompt=7, completion=5)
            served[who] += 1
        assert served == {"a": 100, "b": 300, "c": 100}

    def test_idleness_saves_up_nothing(self) -> None:
        d = Driver(replace(LARGE, sequences=1))
        for id in range(1, 20):
            d.handle(submitted(id, prompt=30, max_tokens=10, who="busy"))
            d.run()
        for id in range(20, 32):
            d.handle(submitted(id, prompt=30, max_tokens=10, who=("busy", "new")[id % 2]))
        order = []
        while d.scheduler.sequences:
            d.plan()
            order += [i.id for i in d.decode() if isinstance(i, m.Finish)]
        new = [order.index(id) for id in range(21, 32, 2)]
        assert new[2] >= 4

    def test_one_principal_leaves_places_in_the_queue(self) -> None:
        d = Driver(replace(LARGE, queue=16))
        for id in range(1, 30):
            d.handle(submitted(id, who="many"))
        assert len(d.scheduler.line) == 12
        assert d.handle(submitted(99, who="few")) == []

    def test_giving_up_amid_a_prompt_is_not_free(self) -> None:
        """Whoever hangs up in each of its steps must not keep out one who waits."""
        d = Driver(replace(LARGE, sequences=1, prompt_seconds=0.01))
        for id in range(1, 4):
            d.handle(submitted(id, prompt=500, who="rude"))
        d.handle(submitted(100, prompt=500, who="patient"))
        for id in range(4, 40):
            rows = d.plan()
            if 100 in rows:
                return
            d.handle(submitted(id, prompt=500, who="rude"))
            for running in rows:
                d.handle(m.CancelRequested(running))
            d.handle(m.StepAborted())
        raise AssertionError("it was never its turn")

    def test_of_a_prompt_that_is_given_up_only_what_was_read_is_used(self) -> None:
        d = Driver(replace(LARGE, sequences=1, batch_tokens=64))
        d.handle(submitted(1, prompt=300))
        d.handle(submitted(2, prompt=300))
        for _ in range(2):
            d.plan()
            d.decode()
        for id, read in ((1, 128), (2, 0)):
            d.handle(m.DeadlinePassed(id))
            assert d.ended(id).ended.usage.prompt_tokens == read

    def test_a_context_of_one_s_own_is_not_free(self) -> None:
        d = Driver(LARGE)
        for id in range(1, 9):
            d.handle(submitted(id, prompt=100, reproducible=True))
            d.plan()
            d.handle(m.CancelRequested(id))
            d.handle(m.StepAborted())
        assert d.scheduler.line.counters["p"] >= 8 * 64


class TestPrefixes:
    PROMPT = tuple(range(100))

    def ask(self, d: Driver, id: int, prompt: tuple[int, ...], who: str = "a") -> int:
        foretold = d.scheduler.line.room.reusable(prompt, (who, ""))
        d.handle(m.Submitted(id, who, prompt, 4, GREEDY))
        d.run()
        assert foretold == d.ended(id).ended.usage.cached_tokens
        return foretold

    def test_the_same_again_but_for_its_last_token(self) -> None:
        d = Driver(LARGE)
        assert self.ask(d, 1, self.PROMPT) == 0
        assert self.ask(d, 2, self.PROMPT) == 99

    def test_a_conversation_goes_on(self) -> None:
        d = Driver(LARGE)
        self.ask(d, 1, self.PROMPT)
        # Of 4 tokens of the answer the last was never decoded.
        assert self.ask(d, 2, (*self.PROMPT, 7, 7, 7, 7, 500, 501)) == 103
        assert len(d.scheduler.line.room.prefixes.kept) == 1

    def test_others_find_nothing_but_what_is_public(self) -> None:
        d = Driver(LARGE)
        self.ask(d, 1, self.PROMPT)
        assert self.ask(d, 2, self.PROMPT, who="b") == 0
        d.handle(m.PublicDeclared((tuple(range(50)),)))
        assert self.ask(d, 3, self.PROMPT, who="c") == 50

    def test_a_running_sequence_is_shared(self) -> None:
        d = Driver(LARGE)
        d.handle(m.Submitted(1, "a", self.PROMPT, 200, GREEDY))
        d.plan(), d.decode()
        d.handle(m.Submitted(2, "a", (*self.PROMPT[:80], 999, 998), 4, GREEDY))
        d.plan(), d.decode(), d.plan()
        assert d.scheduler.running[2].reused == 80
        assert m.CopyPrefix(d.scheduler.running[1].slot, d.scheduler.running[2].slot, 80) in d.said

    def test_one_that_is_being_read_is_waited_for(self) -> None:
        d = Driver(replace(LARGE, batch_tokens=60))
        for id in range(1, 4):
            d.handle(m.Submitted(id, "a", (*self.PROMPT, id), 4, GREEDY))
        assert list(d.plan()) == [1]
        d.handle(m.ProgressAsked(2))
        assert d.said[-1] == m.Progress(2, 0, "a request with the same beginning is being read")
        d.decode()
        assert list(d.plan()) == [1]
        d.decode()
        d.run()
        assert [d.ended(id).ended.usage.cached_tokens for id in (1, 2, 3)] == [0, 100, 100]

    def test_what_has_no_room_is_saved_and_comes_back(self) -> None:
        d = Driver(replace(LARGE, kv_tokens=300, context_size=250, saved_tokens=1000))
        self.ask(d, 1, self.PROMPT)
        self.ask(d, 2, tuple(range(1000, 1200)), who="b")
        assert [type(i) for i in d.said].count(m.SaveSlot) == 1
        assert self.ask(d, 3, self.PROMPT) == 99
        assert [type(i) for i in d.said].count(m.RestoreSlot) == 1

    def idle(self, d: Driver, rows: int) -> int:
        """How often something is saved while others' steps have so many rows, a few of them a prompt's."""
        before = [type(i) for i in d.said].count(m.SaveSlot)
        d.handle(m.Submitted(99, "z", tuple(range(5000, 5010)), rows - 9, GREEDY))
        d.run()
        d.plan()
        return [type(i) for i in d.said].count(m.SaveSlot) - before

    def test_what_others_have_to_look_past_is_moved_to_memory(self) -> None:
        d = Driver(replace(LARGE, saved_tokens=200, idle_rows=150))
        self.ask(d, 1, self.PROMPT)
        assert self.idle(d, 149) == 0
        assert self.idle(d, 50) == 1
        assert not [e for e in d.scheduler.line.room.prefixes.kept.values() if e.owner[0] == "a"]
        assert self.ask(d, 2, self.PROMPT) == 99

    def test_what_is_of_use_stays(self) -> None:
        d = Driver(replace(LARGE, saved_tokens=200, idle_rows=150))
        self.ask(d, 1, self.PROMPT)
        assert self.idle(d, 149) == 0
        self.ask(d, 2, self.PROMPT)
        assert self.idle(d, 100) == 0

    @pytest.mark.parametrize("fields", [{"saved_tokens": 90}, {"saved_tokens": 0}, {"idle_rows": 0},
                                        {"can_copy": False}])  # fmt: skip
    def test_what_has_no_room_there_or_costs_nothing_stays(self, fields: Any) -> None:
        d = Driver(replace(LARGE, **{"saved_tokens": 200, "idle_rows": 150, **fields}))
        self.ask(d, 1, self.PROMPT)
        assert self.idle(d, 500) == 0
        assert self.ask(d, 2, self.PROMPT) == 99

    def test_what_is_about_to_come_back_is_not_dropped_for_others(self) -> None:
        d = Driver(replace(LARGE, kv_tokens=300, context_size=250, saved_tokens=200))
        self.ask(d, 1, self.PROMPT)
        self.ask(d, 2, tuple(range(1000, 1190)))
        assert self.ask(d, 3, (*self.PROMPT, 9, 9)) == 100

    def test_without_memory_to_save_it_is_dropped(self) -> None:
        d = Driver(replace(LARGE, kv_tokens=300, context_size=250))
        self.ask(d, 1, self.PROMPT)
        self.ask(d, 2, tuple(range(1000, 1200)), who="b")
        assert self.ask(d, 3, self.PROMPT) == 0

    def test_separate_caches_only_go_on_where_they_are(self) -> None:
        d = Driver(replace(LARGE, can_copy=False))
        self.ask(d, 1, self.PROMPT)
        assert self.ask(d, 2, (*self.PROMPT[:60], 999)) == 60
        assert not any(isinstance(i, m.CopyPrefix) for i in d.said)

    def test_what_cannot_be_cut_short_is_used_whole_or_not(self) -> None:
        d = Driver(replace(LARGE, can_trim=False))
        self.ask(d, 1, self.PROMPT)
        assert self.ask(d, 2, self.PROMPT) == 0
        assert self.ask(d, 3, (*self.PROMPT, 7, 7, 7, 7, 8)) == 103

    def test_a_failed_step_leaves_nothing_to_reuse(self) -> None:
        d = Driver(LARGE)
        d.handle(m.Submitted(1, "a", self.PROMPT, 4, GREEDY))
        d.plan(), d.decode(), d.plan()
        d.handle(m.StepFailed(Failure("engine_crashed", "why")))
        assert self.ask(d, 2, self.PROMPT) == 0


class TestReproducible:
    def test_it_has_a_slot_and_slices_of_its_own(self) -> None:
        d = Driver(LARGE)
        d.handle(submitted(1, prompt=100, max_tokens=3, reproducible=True))
        steps = []
        while rows := d.plan():
            steps.append([(row.slot, row.start, len(row.tokens)) for row in rows.values()])
            d.decode()
        private = LARGE.private_slot
        slices = [(private, 0, 32), (private, 32, 32), (private, 64, 32), (private, 96, 4)]
        assert steps == [[row] for row in [*slices, (private, 100, 1), (private, 101, 1)]]
        opened = next(i for i in d.said if isinstance(i, m.OpenSlot))
        assert (opened.slot, opened.private_tokens) == (private, 103)

    def test_its_steps_take_turns_with_the_others(self) -> None:
        d = Driver(LARGE)
        d.handle(submitted(1, prompt=100, max_tokens=40, reproducible=True))
        d.handle(submitted(2, prompt=100, max_tokens=40))
        order = []
        for _ in range(20):
            order += list(d.plan())
            d.decode()
        assert order == [1, 2] * 10

    @pytest.mark.parametrize(
        ("weights", "share"), [({}, 1 / 5), ({"p": 2.0}, 0.03 / 0.13), ({"p0": 4.0}, 1 / 8)]
    )
    def test_of_the_time_it_has_no_more_than_each_of_the_others(
        self, weights: dict[str, float], share: float
    ) -> None:
        """Whatever its weight, its steps at most take turns with the others'."""
        d = Driver(replace(LARGE, weights=weights))
        d.handle(submitted(1, prompt=10, max_tokens=500, reproducible=True))
        for n in range(4):
            d.handle(submitted(2 + n, prompt=10, max_tokens=900, who=f"p{n}"))
        spent = {True: 0.0, False: 0.0}
        for _ in range(500):
            private = 1 in d.plan()
            seconds = 0.03 if private else 0.1
            spent[private] += seconds
            d.decode(seconds)
        assert spent[True] / sum(spent.values()) == pytest.approx(share, rel=0.02)
        assert len(d.scheduler.running) == 5

    def test_alone_again_it_owes_nothing(self) -> None:
        d = Driver(LARGE)
        d.handle(submitted(1, prompt=10, max_tokens=50, reproducible=True))
        d.handle(submitted(2, prompt=10, max_tokens=50, who="q"))
        d.plan(), d.decode(0.1)
        d.plan(), d.decode(0.1)
        assert list(d.plan()) == [1]
        d.decode(1000.0)
        assert list(d.plan()) == [2]
        d.handle(m.CancelRequested(2))
        d.decode(0.1)
        assert list(d.plan()) == [1]

    def test_one_at_a_time_and_nothing_is_reused(self) -> None:
        d = Driver(LARGE)
        for id in (1, 2):
            d.handle(submitted(id, prompt=100, reproducible=True))
        assert list(d.plan()) == [1]
        d.handle(m.ProgressAsked(2))
        assert d.said[-1] == m.Progress(2, 0, "another reproducible request is running")
        d.decode()
        d.run()
        assert d.ended(2).ended.usage.cached_tokens == 0


class TestAdapters:
    def test_each_step_has_one_and_they_take_turns(self) -> None:
        d = Driver(LARGE)
        for id, adapter in enumerate(["", "x", "y", "x"], start=1):
            d.handle(submitted(id, prompt=10 + id, max_tokens=30, adapter=adapter))
        order = []
        for _ in range(30):
            rows = d.plan()
            assert d.scheduler.step is not None
            assert {d.scheduler.running[id].adapter for id in rows} == {d.scheduler.step.adapter}
            order.append(d.scheduler.step.adapter)
            d.decode()
        assert order == ["", "x", "y"] * 10
        d.run()
        assert all(d.ended(id).ended.reason is FinishReason.LENGTH for id in range(1, 5))

    def test_the_same_beginning_is_read_again(self) -> None:
        d = Driver(LARGE)
        prompt = tuple(range(100))
        for id, adapter in enumerate(["", "x", "x", ""], start=1):
            d.handle(m.Submitted(id, "p", prompt, 2, GREEDY, adapter=adapter))
            d.run()
        assert [d.ended(id).ended.usage.cached_tokens for id in range(1, 5)] == [0, 0, 99, 99]

    def test_one_that_has_no_room_keeps_nobody_from_their_turn(self) -> None:
        d = Driver()
        d.handle(submitted(1, prompt=3, max_tokens=20))
        d.plan(), d.decode()
        d.handle(submitted(2, prompt=20, max_tokens=12, adapter="x"))
        d.handle(submitted(3, prompt=20, max_tokens=12, adapter="y"))
        d.run()
        assert all(d.ended(id).ended.reason is FinishReason.LENGTH for id in (1, 2, 3))


class TestGuesses:
    COPY = (1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4)

    def driver(self, **changes: bool) -> Driver:
        return Driver(replace(LARGE, **{"lookup": True, **changes}))

    def ask(self, d: Driver, max_tokens: int = 20, stop: tuple[str, ...] = (), id: int = 1) -> None:
        d.handle(m.Submitted(id, "p", self.COPY, max_tokens, GREEDY, stop))

    def say(self, d: Driver, tokens: tuple[int, ...], piece: bytes = b"x") -> list[m.Instruction]:
        """What the step's one row chooses, as far as its guesses are right."""
        step = d.scheduler.step
        assert step is not None
        (row,) = step.rows
        guesses = row.tokens[len(row.tokens) - row.guessed :]
        right = 0
        while right < min(len(guesses), len(tokens) - 1) and guesses[right] == tokens[right]:
            right += 1
        chosen = tuple(m.Sampled(row.slot, t, piece, False) for t in tokens[: right + 1])
        return d.handle(m.Stepped(chosen, 0.1))

    def test_what_follows_is_guessed_and_what_is_wrong_is_forgotten(self) -> None:
        d = self.driver()
        self.ask(d)
        d.plan()
        self.say(d, (5,))
        row = d.plan()[1]
        assert (row.tokens, row.guessed, row.sample) == ((5, 6, 7, 8, 9, 1, 2, 3), 7, True)
        said = self.say(d, (6, 7, 8, 99))
        assert [i.text for i in said if isinstance(i, m.Emit)] == ["x", "x", "x", "x"]
        assert said[-1] == m.TrimSlot(row.slot, row.start + 4)
        following = d.plan()[1]
        assert (following.start, following.tokens) == (row.start + 4, (99,))
        assert d.scheduler.sequences[1].answer == [5, 6, 7, 8, 99]

    def test_where_all_are_right_nothing_is_forgotten(self) -> None:
        d = self.driver()
        self.ask(d)
        d.plan()
        self.say(d, (5,))
        row = d.plan()[1]
        said = self.say(d, (6, 7, 8, 9, 1, 2, 3, 4))
        assert not any(isinstance(i, m.TrimSlot) for i in said)
        following = d.plan()[1]
        assert (following.start, following.tokens[0]) == (row.start + 8, 4)

    def test_no_more_than_are_wanted(self) -> None:
        d = self.driver()
        self.ask(d, max_tokens=3)
        d.plan()
        self.say(d, (5,))
        assert d.plan()[1].tokens == (5, 6)
        self.say(d, (6, 7))
        ended = d.ended(1).ended
        assert (ended.reason, ended.usage.completion_tokens) == (FinishReason.LENGTH, 3)

    def test_an_end_amid_the_guesses(self) -> None:
        d = self.driver()
        self.ask(d, stop=("yy",))
        d.plan()
        self.say(d, (5,))
        d.plan()
        said = self.say(d, (6, 7, 8), b"y")
        ended = d.ended(1).ended
        assert (ended.reason, ended.usage.completion_tokens) == (FinishReason.STOP, 3)
        (close,) = [i for i in said if isinstance(i, m.CloseSlot)]
        assert close.keep == 0  # too short to keep

    def test_giving_up_amid_the_guesses(self) -> None:
        d = self.driver()
        self.ask(d)
        d.plan()
        self.say(d, (5,))
        assert d.plan()[1].guessed
        d.handle(m.CancelRequested(1))
        self.say(d, (6, 7, 8))
        assert d.ended(1).ended.usage.completion_tokens == 1

    @pytest.mark.parametrize("off", ["lookup", "can_trim"])
    def test_not_where_it_cannot_be(self, off: str) -> None:
        d = self.driver(**{off: False})
        self.ask(d)
        d.plan()
        self.say(d, (5,))
        assert d.plan()[1].guessed == 0

    def test_not_in_company(self) -> None:
        d = self.driver()
        self.ask(d)
        self.ask(d, id=2)
        for _ in range(4):
            assert all(row.guessed == 0 for row in d.plan().values())
            d.decode(0.1)


class TestPromptScores:
    SCORING = Sampling(temperature=0, prompt_logprobs=0)

    def ask(self, d: Driver, id: int, prompt: int, max_tokens: int = 1) -> None:
        tokens = tuple(range(prompt))
        d.handle(m.Submitted(id, "p", tokens, max_tokens, self.SCORING))

    def step(self, d: Driver) -> dict[int, m.Row]:
        rows = d.plan()
        prompts = [
            m.PromptScores(row.slot, tuple(Scored(token, b"", -1.0) for token in row.scores))
            for row in rows.values()
            if row.scores
        ]
        tokens = tuple(sampled(row.slot) for row in rows.values() if row.sample)
        if rows:
            d.handle(m.Stepped(tokens, 0.0, 1, tuple(prompts)))
        return rows

    def test_every_token_but_the_first_in_small_slices(self) -> None:
        d = Driver(LARGE)
        self.ask(d, 1, 70)
        sizes = []
        while rows := self.step(d):
            if scores := rows[1].scores:
                start = rows[1].start + 1
                assert scores == tuple(range(start, start + len(scores)))
                sizes.append(len(scores))
        assert sizes == [32, 32, 5]
        (shown,) = [i for i in d.said if isinstance(i, m.Emit) and i.prompt]
        assert [one.token for one in shown.scored] == list(range(1, 70))
        assert d.ended(1).ended.usage.completion_tokens == 1

    def test_nothing_but_the_prompt(self) -> None:
        d = Driver(LARGE)
        self.ask(d, 1, 1, max_tokens=0)
        self.step(d)
        assert [i.scored for i in d.said if isinstance(i, m.Emit)] == [()]
        ended = d.ended(1).ended
        assert (ended.reason, ended.usage.completion_tokens) == (FinishReason.LENGTH, 0)

    def test_what_is_cached_is_computed_again_and_serves_others(self) -> None:
        d = Driver(LARGE)
        for id in (1, 2):
            self.ask(d, id, 70)
            while self.step(d):
                pass
            assert d.ended(id).ended.usage.cached_tokens == 0
        d.handle(submitted(3, 70))
        d.run()
        assert d.ended(3).ended.usage.cached_tokens == 69

    def test_one_at_a_time(self) -> None:
        d = Driver(LARGE)
        self.ask(d, 1, 20)
        self.ask(d, 2, 20)
        assert set(self.step(d)) == {1}
        assert 2 in self.step(d)


class TestDeadlines:
    @pytest.mark.parametrize("when", ["queued", "in step", "between steps"])
    def test_it_ends_wherever_it_is(self, when: str) -> None:
        d = Driver()
        d.handle(submitted(1))
        if when != "queued":
            d.plan()
        if when == "between steps":
            d.decode()
        said = d.handle(m.DeadlinePassed(1))
        if when == "in step":
            assert said == []
            d.decode()
        failure = d.ended(1).ended.failure
        assert failure is not None
        assert failure.code == "deadline_exceeded"
        assert not d.scheduler.sequences

    def test_an_aborted_step_ends_who_gave_up_and_is_repeated_for_the_rest(self) -> None:
        d = Driver()
        for id, who in ((1, "a"), (2, "b")):
            d.handle(submitted(id, who=who))
        before = d.plan()
        assert list(before) == [1, 2]
        d.handle(m.CancelRequested(1))
        d.handle(m.StepAborted())
        assert d.ended(1).ended.reason is FinishReason.CANCELLED
        assert d.plan() == {2: before[2]}


def test_progress_says_who_goes_before() -> None:
    d = Driver(replace(LARGE, sequences=1))
    for id in range(1, 8):
        d.handle(submitted(id, who="a"))
    d.plan()
    for id in (8, 9):
        d.handle(submitted(id, who="b"))
    for id, position in ((2, 0), (7, 5), (9, 1)):
        (progress,) = d.handle(m.ProgressAsked(id))
        assert isinstance(progress, m.Progress)
        assert position <= progress.position <= position + 2
        assert progress.reason
    assert d.handle(m.ProgressAsked(77)) == []
    (progress,) = d.handle(m.ProgressAsked(1))
    assert isinstance(progress, m.Progress)
    assert progress.admitted


def test_full_queue_is_refused_and_says_so() -> None:
    d = Driver()
    for id, who in enumerate("aaab", start=1):
        d.handle(submitted(id, who=who))
    (finish,) = d.handle(submitted(5, who="c"))
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


def test_patience_with_the_one_reproducible_sequence_adds_up() -> None:
    d = Driver(replace(LARGE, patience=10))
    d.handle(submitted(1, max_tokens=100, reproducible=True))
    for _ in range(5):
        d.plan(), d.decode()
        d.handle(m.ReaderFull(1))
        d.now += 5
        d.handle(m.EngineReady())
        if 1 not in d.scheduler.sequences:
            break
        d.handle(m.ReaderReady(1))
    failure = d.ended(1).ended.failure
    assert failure is not None
    assert failure.code == "deadline_exceeded"


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


def test_what_is_kept_goes_with_it() -> None:
    """At once: it has the tokens of all prompts and answers, and Python seldom looks for cycles."""
    d = Driver(LARGE)
    d.handle(submitted(1, prompt=50))
    d.handle(submitted(2, reproducible=True))
    d.run()
    assert d.scheduler.line.room.prefixes.kept
    scheduler = weakref.ref(d.scheduler)
    gc.disable()
    try:
        del d
        assert scheduler() is None
    finally:
        gc.enable()


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
    assert repr(d.scheduler) == "<Scheduler 1 queued, 1 running, 7/64 KV tokens reserved, 0 kept>"
