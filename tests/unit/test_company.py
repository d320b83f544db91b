"""What a step holds, and what becomes of idle KV, where times change and memory is full.

Cases. Of a step: its own cost with much kept and memory full; a memory-bound model, cold; a slice as large
as its time where kinds cost nearly the same; whole batches that have become slow; two adapters, each with
prompts and rows; few rows that are quicker one by one, beside a prompt. Of idle KV: a conversation after a
table; one that grows by little; an answer asked for again with fewer tokens; what cannot be cut short; what
is saved at once; what is dropped for something that is not saved then.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType
from typing import Any

import pytest

from shimmy_jupyter.core import messages as m
from shimmy_jupyter.core.prefix import Entry
from shimmy_jupyter.core.sequence import State

from .test_scheduler import GREEDY, LARGE, Driver

WIDE = replace(LARGE, slots=48, kv_tokens=1_000_000, context_size=50_000, queue=256, sequences=32)
Cost = Callable[[int, int], float]


def ask(
    d: Driver, id: int, prompt: int, max_tokens: int, who: str = "p", adapter: str = ""
) -> None:
    tokens = tuple(range(100_000 * id, 100_000 * id + prompt))
    d.handle(m.Submitted(id, who, tokens, max_tokens, GREEDY, adapter=adapter))


def step(d: Driver, cost: Cost) -> tuple[set[int], int, float]:
    """Who decoded, how many tokens of prompts were read, and the seconds."""
    rows = d.plan()
    decoding = {id for id in rows if d.scheduler.sequences[id].generated}
    prompt = sum(len(row.tokens) for id, row in rows.items() if id not in decoding)
    seconds = cost(len(decoding), prompt)
    d.decode(seconds)
    return decoding, prompt, seconds


@contextmanager
def counted() -> Iterator[list[int]]:
    """How many calls, of Python's and C's functions, were made."""
    calls = [0]

    def count(frame: FrameType, event: str, arg: Any) -> None:
        calls[0] += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        yield calls
    finally:
        sys.setprofile(before)


class TestSteps:
    @pytest.mark.parametrize("saved", [0, 60])
    def test_what_is_kept_costs_a_step_little(self, saved: int) -> None:
        """Of one user, who goes on from all of it, so none of it is dropped."""
        d = Driver(replace(WIDE, slots=100, saved_tokens=251 * saved, idle_rows=128))
        prefixes = d.scheduler.line.room.prefixes
        for id in range(saved):
            prefixes.save(Entry(-1, ("p", ""), tuple(range(-251 * id - 251, -251 * id))))
        for id in range(1, 61):
            ask(d, id, 250, 2)
            d.run(seconds=0.01)
            d.scheduler.line.room.idleness.taken_up(("p", ""))
        ask(d, 100, 10, 10_000)
        most = 0
        for _ in range(200):
            with counted() as calls:
                d.scheduler.handle(m.EngineReady(), 0.0)
            most = max(most, calls[0])
            d.decode(0.01)
        assert most < 6000  # to look around once, every 32 rows

    def test_prompts_are_read_beside_rows_where_reading_weights_costs_most(self) -> None:
        """The first step with company is measured before the rows in it are."""
        d = Driver(WIDE)

        def cost(rows: int, prompt: int) -> float:
            return 0.1 + 0.002 * rows + 0.002 * prompt

        for id in range(1, 9):
            ask(d, id, 10, 40_000)
        for _ in range(12):
            step(d, cost)
        for id in range(9, 40):
            ask(d, id, 8000, 5, "q")
        steps = [step(d, cost) for _ in range(600)][-200:]
        # 56 tokens beside 8 rows take 0.228 s.
        assert sum(prompt for _, prompt, _ in steps) / sum(s for *_, s in steps) > 200

    def test_a_slice_takes_the_time_there_is(self) -> None:
        """Smaller ones cost a little less for each token, but whoever waits has to wait for more steps."""
        d = Driver(WIDE)

        def cost(rows: int, prompt: int) -> float:
            return 0.02 + 0.002 * rows + (0.00032 if rows + prompt >= 64 else 0.0003) * prompt

        for id in range(1, 7):
            ask(d, id, 10, 40_000)
        for _ in range(30):
            step(d, cost)
        ask(d, 8, 2000, 40_000)
        for _ in range(100):
            step(d, cost)
        ask(d, 9, 3000, 5, "q")
        steps = 0
        while d.scheduler.sequences[9].state in (State.QUEUED, State.PREFILL):
            step(d, cost)
            steps += 1
        assert steps <= 20

    def test_whole_batches_that_have_become_slow_are_cut(self) -> None:
        d = Driver(WIDE)
        token = 3e-4

        def cost(rows: int, prompt: int) -> float:
            return 0.02 + 0.002 * rows + token * prompt

        for id in range(1, 5):
            ask(d, id, 10, 40_000)
        for _ in range(8):
            step(d, cost)
        ask(d, 5, 3000, 5, "q")
        for _ in range(12):
            step(d, cost)
        token = 2e-4
        ask(d, 6, 3000, 5, "q")
        for _ in range(20):
            step(d, cost)
        token = 1e-3
        for id in range(7, 13):
            ask(d, id, 8000, 5, "q")
        seconds = [step(d, cost)[2] for _ in range(140)]
        assert max(seconds[-80:]) < 0.3

    def test_with_two_adapters_those_who_decode_go_on_beside_long_prompts(self) -> None:
        d = Driver(WIDE)

        def cost(rows: int, prompt: int) -> float:
            return 0.02 + 0.01 * rows + (0.02 if rows else 0.004) * prompt

        for id in range(1, 13):
            ask(d, id, 10, 40_000, str(id), "x" * (id % 2))
        for _ in range(60):
            step(d, cost)
        now, last = 0.0, dict.fromkeys(range(1, 13), 0.0)
        for id, adapter in ((20, ""), (21, "x")):
            ask(d, id, 4000, 1, f"new{adapter}", adapter)
        for _ in range(300):
            decoding, _, seconds = step(d, cost)
            now += seconds
            for id in decoding & set(last):
                last[id] = now
            assert now - min(last.values()) < 2

    def test_a_prompt_has_no_more_than_the_time_of_the_rows_that_wait_for_it(self) -> None:
        """Four that are quicker one by one: each would wait for four slices."""
        d = Driver(WIDE)

        def cost(rows: int, prompt: int) -> float:
            alone = (0.0, 0.02, 0.05, 0.08, 0.12)[rows]
            return alone + (0.004 * prompt if rows else 0.02 + 0.0015 * prompt)

        for id in range(1, 5):
            ask(d, id, 10, 40_000)
        for _ in range(200):
            step(d, cost)
        for id in range(5, 10):
            ask(d, id, 8000, 1, "q")
        steps = [step(d, cost) for _ in range(400)][200:]
        spent = sum(seconds for *_, seconds in steps)
        assert sum(len(decoding) for decoding, *_ in steps) / spent > 12


class TestIdle:
    SHARED = replace(LARGE, kv_tokens=16384, context_size=4096, saved_tokens=12_000, idle_rows=128)

    def ask(self, d: Driver, id: int, prompt: tuple[int, ...], who: str, most: int = 4) -> int:
        d.handle(m.Submitted(id, who, prompt, most, GREEDY))
        d.run()
        return d.ended(id).ended.usage.cached_tokens

    def others(self, d: Driver, id: int, rows: int = 200) -> None:
        self.ask(d, id, tuple(range(-10, 0)), "ben", rows)

    def talk(self, d: Driver, prompt: int, turns: int, added: int) -> int:
        """Tokens that a conversation had to compute again, with others at work between its turns."""
        said, again = tuple(range(prompt)), 0
        for turn in range(turns):
            found = self.ask(d, 5000 + 2 * turn, said, "ann")
            again += (len(said) - added - 1 - found) if turn else 0
            said = (
                *said,
                7,
                7,
                7,
                7,
                *range(10_000 * turn + 50_000, 10_000 * turn + 50_000 + added),
            )
            self.others(d, 5001 + 2 * turn)
        return again

    def test_a_conversation_is_kept_again_after_a_table(self) -> None:
        """Nothing that was dropped is ever taken up: that says nothing of what it is worth."""
        d = Driver(self.SHARED)
        for id in range(1, 101):
            self.ask(d, id, tuple(range(1000 * id, 1000 * id + 60)), "ann")
        assert self.talk(d, 1000, 10, 60) < 3000

    def test_one_that_grows_by_little_is_not_computed_again_by_and_by(self) -> None:
        assert self.talk(Driver(self.SHARED), 3000, 14, 20) < 300

    def test_an_answer_asked_for_again_with_fewer_tokens(self) -> None:
        d = Driver(self.SHARED)
        prompt = tuple(range(1000))
        self.ask(d, 1, prompt, "ann", 900)
        self.others(d, 2, 300)
        foretold = d.scheduler.line.room.reusable(prompt, ("ann", ""))
        assert self.ask(d, 3, prompt, "ann", 200) == foretold == 999

    def test_what_cannot_be_cut_short_is_no_copy_of_what_is_nearly_the_same(self) -> None:
        d = Driver(replace(self.SHARED, saved_tokens=0, can_trim=False))
        prompt = tuple(range(1000))
        self.ask(d, 1, prompt, "ann", 40)
        self.ask(d, 2, (*prompt[:-1], 7777), "ann", 40)
        self.others(d, 3)
        assert self.ask(d, 4, (*prompt, *[7] * 40, 9), "ann") == 1039

    def test_not_all_is_moved_between_two_steps(self) -> None:
        d = Driver(replace(self.SHARED, slots=80, sequences=32, saved_tokens=16_000))
        for id in range(1, 33):
            ask(d, id, 300, 200, "table")
        for _ in range(60):
            d.plan()
            d.decode(0.01)
        for id in range(1, 33):
            d.handle(m.CancelRequested(id))
        ask(d, 99, 1200, 50, "ann")
        most = 0
        while d.plan():
            saved = [i for i in d.said if isinstance(i, m.SaveSlot)]
            most = max(most, len(saved))
            d.said.clear()
            d.decode(0.01)
        assert 0 < most <= 4

    def test_nothing_is_dropped_for_what_is_not_saved_then(self) -> None:
        d = Driver(replace(LARGE, kv_tokens=1600, context_size=1500, saved_tokens=1000))
        for id, who in enumerate("abc"):
            self.ask(d, id, tuple(range(1000 * id, 1000 * id + 300)), who)
        self.ask(d, 10, tuple(range(9000, 10_400)), "x")
        self.ask(d, 11, tuple(range(20_000, 20_700)), "large")
        for id, who in ((1, "b"), (2, "c")):
            self.ask(d, 20 + id, tuple(range(1000 * id, 1000 * id + 300)), who)
        self.ask(d, 30, tuple(range(30_000, 30_900)), "y")
        saved = {entry.owner[0] for entry in d.scheduler.line.room.prefixes.saved.values()}
        assert saved == {"large"} or {"a", "b", "c"} <= saved
