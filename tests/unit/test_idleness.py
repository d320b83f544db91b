"""What becomes of KV that nobody uses.

Cases: the two prices; whose is taken up again and whose is not, which is not saved either; that worth stays between 0 and 1 and
remembers so many owners only; off. And in the scheduler: what nobody takes up is dropped and drives nobody
else's out; what is taken up stays, though memory is full of others'. While nothing is asked for: copied, once,
a batch at a time, without what is long, what is elsewhere and what is worth nothing; what is outgrown goes.
"""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from shimmy_jupyter.core import messages as m
from shimmy_jupyter.core.idleness import Idleness
from shimmy_jupyter.types import Failure

from .test_scheduler import GREEDY, LARGE, Driver

ANN, BEN = ("ann", ""), ("ben", "")


def test_first_it_is_moved_and_much_later_dropped() -> None:
    one = Idleness(10)
    assert [one.to_move(rows) for rows in (0, 9, 10, 10_000)] == [False, False, True, True]
    assert [one.to_drop(ANN, rows) for rows in (10, 1249, 1250)] == [False, False, True]


def test_what_is_never_taken_up_goes_sooner() -> None:
    one = Idleness(10)
    for _ in range(50):
        one.left(ANN)
    assert one.to_drop(ANN, 100)
    assert one.worth_saving(BEN)
    assert one.worth_saving(ANN)
    for _ in range(10):
        one.left(ANN)
    assert not one.worth_saving(ANN)
    assert not one.to_drop(ANN, 9)
    assert not one.to_drop(BEN, 1000)


def test_conversations_stay() -> None:
    one = Idleness(10)
    for _ in range(50):
        one.left(ANN)
        one.taken_up(ANN)
    assert not one.to_drop(ANN, 1000)


def test_one_that_is_taken_up_after_many_that_were_not() -> None:
    one = Idleness(10)
    for _ in range(50):
        one.left(ANN)
    one.taken_up(ANN)
    assert not one.to_drop(ANN, 600)


def test_off() -> None:
    one = Idleness(0)
    assert not one.to_move(10**9)
    assert not one.to_drop(ANN, 10**9)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3000))))
def test_worth_is_a_share_of_owners_who_are_not_forgotten(events: list[tuple[bool, int]]) -> None:
    one = Idleness(10)
    for taken, who in events:
        (one.taken_up if taken else one.left)((str(who), ""))
        assert 0 <= one.worth((str(who), "")) <= 1


def test_only_so_many_owners_are_remembered() -> None:
    one = Idleness(10)
    for _ in range(50):
        one.left(ANN)
    for who in range(999):
        one.left((str(who), ""))
    assert one.worth(ANN) < 0.1
    for who in range(1000, 2001):
        one.left((str(who), ""))
    assert one.worth(ANN) == 1


class TestScheduling:
    def ask(self, d: Driver, id: int, prompt: tuple[int, ...], who: str) -> int:
        d.handle(m.Submitted(id, who, prompt, 4, GREEDY))
        d.run()
        return d.ended(id).ended.usage.cached_tokens

    def rows(self, d: Driver, first: int, count: int) -> None:
        """Rows of a table: nothing of one is of use to another."""
        for id in range(first, first + count):
            assert self.ask(d, id, tuple(range(1000 * id, 1000 * id + 50)), "table") == 0

    def test_a_table_drives_no_conversation_out(self) -> None:
        d = Driver(replace(LARGE, saved_tokens=400, idle_rows=100))
        said = tuple(range(100))
        for id in range(1, 4):
            self.ask(d, id, said, "ann")
            said = (*said, *range(100 * id, 100 * id + 60))
        self.rows(d, 10, 100)
        assert self.ask(d, 200, said, "ann") >= 160
        theirs = [e for e in d.scheduler.line.room.prefixes.kept.values() if e.owner[0] == "table"]
        assert len(theirs) < 10  # they are in nobody's way

    def test_what_is_never_taken_up_is_not_copied(self) -> None:
        d = Driver(replace(LARGE, saved_tokens=100_000, idle_rows=100))
        self.rows(d, 10, 100)
        first, d.said = d.said, []
        self.rows(d, 110, 100)
        assert any(isinstance(said, m.SaveSlot) for said in first)
        assert not any(isinstance(said, m.SaveSlot) for said in d.said)
        # Of this owner's, until something is taken up after all.
        last = tuple(range(1000 * 209, 1000 * 209 + 50))
        assert self.ask(d, 300, (*last, 7), "table") == 50
        self.rows(d, 400, 10)
        assert any(isinstance(said, m.SaveSlot) for said in d.said)

    def test_conversations_stay_where_memory_is_full_of_others(self) -> None:
        d = Driver(replace(LARGE, saved_tokens=110, idle_rows=100))
        for who in ("ann", "ben", "cy"):
            for id in range(2):
                self.ask(
                    d, 10 * ord(who[0]) + id, tuple(range(ord(who[0]), 100 + ord(who[0]))), who
                )
        for who in ("ann", "ben", "cy"):
            again = tuple(range(ord(who[0]), 100 + ord(who[0])))
            assert self.ask(d, 5000 + ord(who[0]), again, who) == 99


class TestBeforeNewcomers:
    """Who is admitted with enough rows to come has what is idle moved out first."""

    def admitted(self, prompt: tuple[int, ...], max_tokens: int, **capacity: int) -> list[str]:
        """What the backend is told when it is, after somebody has left 100 tokens."""
        fields = {"saved_tokens": 200, "idle_rows": 50, **capacity}
        d = Driver(replace(LARGE, **fields))
        d.handle(m.Submitted(1, "ann", tuple(range(100)), 2, GREEDY))
        d.run()
        d.said.clear()
        d.handle(m.Submitted(2, "ann" if prompt[0] == 0 else "ben", prompt, max_tokens, GREEDY))
        d.plan()
        return [type(said).__name__ for said in d.said]

    def test_it_is_moved_out(self) -> None:
        said = self.admitted(tuple(range(1000, 1020)), 31)
        assert said == ["SaveSlot", "TrimSlot", "OpenSlot", "Step"]

    def test_it_stays_where_few_rows_will_come(self) -> None:
        assert self.admitted(tuple(range(1000, 1020)), 30) == ["OpenSlot", "Step"]

    def test_it_stays_where_there_is_no_memory(self) -> None:
        assert self.admitted(tuple(range(1000, 1020)), 500, saved_tokens=99) == ["OpenSlot", "Step"]

    def test_it_stays_where_it_costs_nothing(self) -> None:
        assert self.admitted(tuple(range(1000, 1020)), 500, idle_rows=0) == ["OpenSlot", "Step"]

    def test_what_it_goes_on_from_is_not_moved(self) -> None:
        said = self.admitted((*range(100), 7), 500)
        assert "SaveSlot" not in said

    def test_what_it_shares_with_is_not_moved(self) -> None:
        """A beginning is copied from it, and it stays for others."""
        said = self.admitted((*range(40), 7, 8, 9), 500)
        assert "CopyPrefix" in said
        assert "SaveSlot" not in said

    def test_one_step_moves_no_more_than_a_batch(self) -> None:
        d = Driver(replace(LARGE, saved_tokens=10_000, idle_rows=300, batch_tokens=64))
        for id in range(1, 6):
            d.handle(m.Submitted(id, "ann", tuple(range(1000 * id, 1000 * id + 40)), 2, GREEDY))
        d.run()
        kept = len(d.scheduler.line.room.prefixes.kept)
        assert kept > 3
        d.said.clear()
        d.handle(m.Submitted(9, "ben", tuple(range(9000, 9020)), 400, GREEDY))
        d.plan()
        assert [type(said).__name__ for said in d.said].count("SaveSlot") == 2


class TestWhileIdle:
    """What is left is copied while nobody waits; who comes then has only to drop it."""

    ROOM = replace(LARGE, saved_tokens=1000, idle_rows=900)

    def left(self, *sizes: int, **capacity: int) -> Driver:
        """After so many sequences of ann's, each with so many tokens in the cache, and one row more."""
        d = Driver(replace(self.ROOM, **capacity))
        for id, size in enumerate(sizes, 1):
            prompt = tuple(range(1000 * id, 1000 * id + size))
            d.handle(m.Submitted(id, "ann", prompt, 1, GREEDY))
            d.run()
        d.said.clear()
        return d

    def idle(self, d: Driver) -> list[str]:
        return [type(said).__name__ for said in d.handle(m.Idle())]

    def comes(self, d: Driver, *prompts: tuple[int, ...], max_tokens: int = 950) -> list[str]:
        for id, prompt in enumerate(prompts, 100):
            d.handle(m.Submitted(id, "ann", prompt, max_tokens, GREEDY))
        d.said.clear()
        d.plan()
        return [type(said).__name__ for said in d.said]

    def test_it_is_copied_once(self) -> None:
        d = self.left(100, 60)
        assert self.idle(d) == ["SaveSlot", "SaveSlot"]
        assert self.idle(d) == []

    def test_who_comes_waits_for_no_copy(self) -> None:
        d = self.left(*[100] * 8)
        while self.idle(d):
            pass
        assert self.comes(d, tuple(range(20))) == ["TrimSlot"] * 8 + ["OpenSlot", "Step"]

    def test_it_is_gone_on_from_where_it_lies(self) -> None:
        d = self.left(100)
        self.idle(d)
        again = (*range(1000, 1100), 7)
        assert self.comes(d, again, max_tokens=1) == ["OpenSlot", "Step"]
        d.decode()
        assert d.ended(100).ended.usage.cached_tokens == 100

    def test_or_from_the_copy(self) -> None:
        d = self.left(100)
        self.idle(d)
        self.comes(d, tuple(range(20)))
        d.run()
        assert "RestoreSlot" in self.comes(d, (*range(1000, 1100), 7), max_tokens=5)

    def test_the_copy_of_what_it_has_outgrown_goes(self) -> None:
        d = self.left(100)
        self.idle(d)
        self.comes(d, (*range(1000, 1100), *range(50)), max_tokens=50)
        d.run()
        assert self.idle(d) == ["DropSaved", "SaveSlot"]
        prefixes = d.scheduler.line.room.prefixes
        assert [entry.size for entry in prefixes.saved.values()] == [199]

    def test_another_s_beginning_is_not_outgrown(self) -> None:
        d = self.left(100)
        self.idle(d)
        d.handle(m.Submitted(50, "ben", (*range(1000, 1100), *range(50)), 1, GREEDY))
        d.run()
        assert self.idle(d) == ["SaveSlot"]

    def test_no_more_than_a_batch_at_a_time(self) -> None:
        d = self.left(40, 40, 40, batch_tokens=100)
        assert self.idle(d) == ["SaveSlot"] * 2
        assert self.idle(d) == ["SaveSlot"]
        assert self.idle(d) == []

    def test_what_is_long_stays(self) -> None:
        d = self.left(101, 100, batch_tokens=100)
        assert self.idle(d) == ["SaveSlot"]
        assert self.idle(d) == []

    def test_never_where_somebody_waits(self) -> None:
        d = self.left(100)
        d.handle(m.Submitted(50, "ben", tuple(range(20)), 5, GREEDY))
        assert self.idle(d) == []

    def test_never_after_the_end(self) -> None:
        d = self.left(100)
        d.handle(m.Halted(Failure("engine_crashed", "why")))
        assert self.idle(d) == []

    def test_not_where_it_is_in_nobody_s_way(self) -> None:
        assert self.idle(self.left(100, idle_rows=0)) == []

    def test_not_where_there_is_no_memory(self) -> None:
        assert self.idle(self.left(100, saved_tokens=99)) == []
        d = self.left(100, 60, saved_tokens=110)
        assert self.idle(d) == ["SaveSlot"]
        assert self.idle(d) == []

    def test_not_what_is_never_taken_up(self) -> None:
        assert self.idle(self.left(*[40] * 60, kv_tokens=8192)) == []

    def test_a_copy_that_had_to_go_is_made_again(self) -> None:
        d = self.left(100)
        self.idle(d)
        room = d.scheduler.line.room
        (saved,) = room.prefixes.saved
        del room.prefixes.saved[saved]
        assert self.idle(d) == ["SaveSlot"]


class TestBursts:
    """Who comes with others has their rows counted, too."""

    def said(self, worthless: bool, count: int) -> list[str]:
        d = Driver(replace(LARGE, saved_tokens=1000, idle_rows=128))
        d.handle(m.Submitted(1, "ann", tuple(range(1000, 1100)), 1, GREEDY))
        d.run()
        for _ in range(100 * worthless):
            d.scheduler.line.room.idleness.left(ANN)
        for id in range(10, 10 + count):
            d.handle(m.Submitted(id, "ann", tuple(range(id, id + 40)), 20, GREEDY))
        d.said.clear()
        d.plan()
        return [type(said).__name__ for said in d.said]

    def test_they_have_it_moved(self) -> None:
        assert self.said(False, 2)[0] == "OpenSlot"
        assert self.said(False, 3)[:3] == ["SaveSlot", "TrimSlot", "OpenSlot"]

    def test_what_is_worth_it_and_not_moved_yet_stays(self) -> None:
        d = Driver(replace(LARGE, saved_tokens=1000, idle_rows=200, batch_tokens=100))
        for id in range(1, 4):
            d.handle(m.Submitted(id, "ann", tuple(range(1000 * id, 1000 * id + 90)), 1, GREEDY))
        d.run()
        for _ in range(45):
            d.scheduler.line.room.idleness.left(ANN)
        d.said.clear()
        for id in range(10, 18):
            d.handle(m.Submitted(id, "ann", tuple(range(id, id + 40)), 900, GREEDY))
        d.plan()
        changes = [type(said).__name__ for said in d.said]
        assert (changes.count("SaveSlot"), changes.count("TrimSlot")) == (2, 2)

    def test_or_dropped_where_it_is_worth_nothing(self) -> None:
        assert self.said(True, 3)[:2] == ["TrimSlot", "OpenSlot"]
