"""Which rows the next step holds. Each step is one native call.

Sequences that decode go first, as many as the model's measured rate asks for, and prompts go beside
them in slices that keep the step within its time. Where that time does not bind, as a whole batch of
prompt is quick, decoding and prompts take turns instead: a prompt then keeps to calls of its own,
which keeps company from changing what is computed. A long prompt, whose slices would be small, is read
aside. A reproducible sequence has steps of its own, and
of the engine's time no more than each of those who share the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from . import messages as m
from .aside import Aside
from .line import Line
from .pace import TILE, Pace, Slice
from .sequence import Sequence, State

PRIVATE_SLICE = 32
"""Prompt tokens in a step of a reproducible sequence. Always so many: slices change sums."""


@dataclass(frozen=True, slots=True)
class _Work:
    """What there is to do for those who share the cache, with one adapter: sequences that are `ready` to decode,
    others whose prompts are `reading`, and how much of these suits a step.
    """

    adapter: str
    ready: list[Sequence]
    reading: list[Sequence]
    piece: Slice


class Planner:
    """Admits whom it has room for in the step, to those who are `running`."""

    def __init__(
        self, capacity: m.Capacity, line: Line, pace: Pace, running: dict[int, Sequence]
    ) -> None:
        self._capacity = capacity
        self._line = line
        self._pace = pace
        self._running = running
        self._aside = Aside(pace, capacity.aside_tokens)
        self._aside_turn = False
        """Whether the last step with several prompts to read was for the one that is read aside."""
        self._turn = 0
        self._last_was_private = False
        self._prompted: set[str] = set()
        """Adapters whose last step was a prompt's alone: who decodes with them has the next one."""
        self._adapters: dict[str, int] = {}
        """When each adapter last had a step, of those that have something to do."""
        self._owed = 0.0
        """Seconds of steps for everybody else before the next one of the reproducible sequence."""

    def took(self, step: m.Step, event: m.Stepped, *, private: bool) -> None:
        """A step's time, for the reproducible sequence's share; and what was computed beside what is kept."""
        if private:
            self._owed += event.seconds * self._line.others()
            return
        tokens, seconds = sum(len(row.tokens) for row in step.rows), event.seconds
        if step.aside is not None and event.aside is not None:
            self._aside.took(step.aside, event.aside)
            tokens += len(step.aside.tokens) * event.aside.done
            seconds += event.aside.seconds
        self._line.room.computed += tokens
        # What is paid too much counts for the next time, but idleness saves up nothing.
        self._owed = max(-seconds, self._owed - seconds)

    def unfinished(self, sequence: Sequence) -> int:
        """Tokens of its prompt that are being read aside."""
        return self._aside.unfinished(sequence)

    def step(self, now: float, out: list[m.Instruction]) -> m.Step | None:
        """The next step, None where there is nothing to do; `out` gets what comes before."""
        self._line.room.move_out(out)
        if self._last_was_private or self._owed > 0:
            step = self._shared(now, out)
            if step is not None:
                self._last_was_private = False
                return step
        # Whoever is alone owes nobody anything.
        self._owed = min(self._owed, 0.0)
        private = self._private(now, out)
        self._last_was_private = private is not None
        return private or self._shared(now, out)

    def _private(self, now: float, out: list[m.Instruction]) -> m.Step | None:
        fresh = self._line.private is None
        sequence = self._line.admit_private(now, out)
        if sequence is None:
            return None
        if fresh:
            self._running[sequence.id] = sequence
        if sequence.state is State.PREFILL:
            return m.Step((self._prompt_row(sequence, PRIVATE_SLICE),), sequence.adapter)
        if sequence.state is State.DECODE:
            return m.Step((self._decode_row(sequence),), sequence.adapter)
        return None

    def _shared(self, now: float, out: list[m.Instruction]) -> m.Step | None:
        adapter = self._adapter()
        running = [s for s in self._line.room.running.values() if s.adapter == adapter]
        ready = [s for s in running if s.state is State.DECODE]
        reading = [s for s in running if s.state is State.PREFILL]
        waiting = len(reading) + self._line.could_begin()
        piece = (
            self._pace.prompt_slice(len(ready), waiting) if waiting else Slice(0, together=False)
        )
        work = _Work(adapter, ready, reading, piece)
        self._choose_aside(work, now, out)
        reader = self._aside.current()
        if reader in reading:
            reading.remove(reader)
            if self._is_asides_turn(work, reader):
                return self._step_aside(work, reader, waiting)
        rows = self._batch(work, now, out)
        return m.Step(tuple(rows), adapter) if rows else None

    def _choose_aside(self, work: _Work, now: float, out: list[m.Instruction]) -> None:
        """Begin to read a prompt aside where slices of it would be small, and end where nobody else
        decodes: alone, whole batches are as quick.
        """
        aside = self._aside
        current = aside.current()
        if current is not None:
            if current in work.reading and not work.ready and not aside.begun():
                aside.stop()
            return
        small = self._capacity.aside_tokens and 0 < work.piece.tokens < 2 * TILE
        sequence = self._next_prompt(work) if work.ready and small else None
        if sequence is None:
            return
        left = sequence.prompt_left
        if sequence.state is State.QUEUED:
            left -= self._line.room.reusable(sequence.prompt, sequence.owner)
        if aside.suits(sequence, left):
            if sequence.state is State.QUEUED:
                self._admit(sequence, now, out)
                work.reading.append(sequence)
            aside.start(sequence)

    def _is_asides_turn(self, work: _Work, reader: Sequence) -> bool:
        """Of another principal, whoever has not had more goes first; otherwise both have turns. A short
        prompt that has begun ends first.
        """
        other = self._next_prompt(work)
        if other is None:
            return True
        if other.state is State.PREFILL and other.prompt_left < self._capacity.aside_tokens:
            return False
        counters, own = self._line.counters, reader.principal
        if other.principal != own and counters[other.principal] <= counters[own]:
            return False
        self._aside_turn = not self._aside_turn
        return self._aside_turn

    def _step_aside(self, work: _Work, reader: Sequence, waiting: int) -> m.Step:
        ready = work.ready
        rows = ready if len(ready) < TILE else self._whose_turn(ready)
        self._prompted.discard(work.adapter)
        self._in_step(reader)
        part = self._aside.part(len(rows), waiting)
        return m.Step(tuple(map(self._decode_row, rows)), work.adapter, part)

    def _batch(self, work: _Work, now: float, out: list[m.Instruction]) -> list[m.Row]:
        """Rows that decode, slices of prompts, or both."""
        adapter, ready, piece = work.adapter, work.ready, work.piece
        most = self._capacity.batch_tokens - len(ready)
        # How a prompt is cut changes sums, and is not to depend on others where each has its own cache.
        room = min(piece.tokens, most) if self._capacity.can_copy else most
        binds = room < most
        together = binds and piece.together
        if ready and adapter in self._prompted:
            prompts: list[m.Row] = []
        else:
            prompts = list(self._prompts(work, room, now, out, together=binds))
        self._prompted.discard(adapter)
        if prompts and not together:
            self._prompted.add(adapter)
        if not prompts:
            if len(ready) == 1 and not work.reading:
                return [self._decode_row(ready[0], self._guesses(ready[0]))]
            # Between two slices each has its turn: in the time of all rows a prompt was read.
            turn = ready if work.reading and len(ready) < TILE else self._whose_turn(ready)
            return [self._decode_row(s) for s in turn]
        return [*(self._decode_row(s) for s in ready if together), *prompts]

    def _adapter(self) -> str:
        """Of those that have something to do, the one whose last step was longest ago."""
        busy = (State.PREFILL, State.DECODE)
        found = {s.adapter for s in self._line.room.running.values() if s.state in busy}
        fresh = self._line.first()
        if fresh is not None:
            found.add(fresh.adapter)
        adapter = min(found, key=lambda one: (self._adapters.get(one, 0), one), default="")
        self._adapters = {one: self._adapters.get(one, 0) for one in found} if found else {}
        self._prompted &= found
        self._adapters[adapter] = self._turn + 1
        return adapter

    def _whose_turn(self, ready: list[Sequence]) -> list[Sequence]:
        if not ready:
            return []
        count = self._pace.rows(len(ready))
        if count == len(ready):
            return ready
        counters = self._line.counters
        return sorted(ready, key=lambda s: (counters[s.principal], s.turn))[:count]

    def _prompts(
        self, work: _Work, room: int, now: float, out: list[m.Instruction], *, together: bool
    ) -> Iterator[m.Row]:
        """Slices of prompts, whoever was served least first; then of those who are admitted.

        Unless they are `together` with all else, prompts share a call only while they are short.
        """
        total, scoring = 0, False
        left = replace(work, reading=list(work.reading))
        while total < room:
            sequence = self._next_prompt(left)
            if sequence is None or not (
                not total or together or total + sequence.prompt_left < TILE
            ):
                return
            if sequence.scores_prompt and scoring:
                return  # each of its tokens has logits, for which there is not room without end
            scoring = scoring or sequence.scores_prompt
            if sequence.state is State.QUEUED:
                self._admit(sequence, now, out)
            else:
                left.reading.remove(sequence)
            row = self._prompt_row(sequence, room - total)
            total += len(row.tokens)
            yield row

    def _admit(self, sequence: Sequence, now: float, out: list[m.Instruction]) -> None:
        self._line.admit(sequence, now, out)
        self._running[sequence.id] = sequence

    def _next_prompt(self, work: _Work) -> Sequence | None:
        """Of those whose prompts have begun and whoever could be admitted, the one that goes first."""
        counters, fresh = self._line.counters, self._line.first()
        first = min(work.reading, key=lambda s: (counters[s.principal], s.id), default=None)
        if (
            fresh is None
            or fresh.adapter != work.adapter
            or (first is not None and self._claim(fresh) >= self._claim(first))
        ):
            return first
        return fresh

    def _claim(self, sequence: Sequence) -> tuple[float, int]:
        """Lower goes first: who was served least, and of equals who has the least running."""
        who = sequence.principal
        return self._line.counters[who], self._line.room.count(who)

    def _prompt_row(self, sequence: Sequence, room: int) -> m.Row:
        at = sequence.cached
        take = min(sequence.prompt_left, room)
        scores: tuple[int, ...] = ()
        if sequence.scores_prompt:
            take = min(take, m.MOST_SCORES)
            scores = sequence.prompt[at + 1 : at + take + 1]
        tokens = sequence.prompt[at : at + take]
        self._in_step(sequence)
        sequence.tried = take
        return m.Row(sequence.slot, at, tokens, take == sequence.prompt_left, scores)

    def _guesses(self, sequence: Sequence) -> tuple[int, ...]:
        if not (self._capacity.lookup and self._capacity.can_trim):
            return ()
        left = sequence.max_tokens - sequence.generated - 1
        return sequence.lookup.guess(sequence.prompt, sequence.answer, left)

    def _decode_row(self, sequence: Sequence, guesses: tuple[int, ...] = ()) -> m.Row:
        self._in_step(sequence)
        tokens = (sequence.answer[-1], *guesses)
        return m.Row(sequence.slot, sequence.cached, tokens, sample=True, guessed=len(guesses))

    def _in_step(self, sequence: Sequence) -> None:
        self._turn += 1
        sequence.turn = self._turn
        sequence.in_step = True

    def check_step(self, step: m.Step, by_slot: Mapping[int, Sequence]) -> None:
        private, slots = self._capacity.private_slot, {row.slot for row in step.rows}
        assert step.rows or step.aside
        assert len(slots) == len(step.rows)
        assert private not in slots or slots == {private}
        assert sum(len(row.tokens) for row in step.rows) <= self._capacity.batch_tokens
        for row in step.rows:
            sequence = by_slot[row.slot]
            assert sequence.adapter == step.adapter
            assert row.start == sequence.cached
            assert row.tokens
            end = row.start + len(row.tokens)
            assert end <= sequence.reserved
            assert row.sample == (end >= len(sequence.prompt))
            assert bool(row.scores) <= sequence.scores_prompt
        if step.aside is not None:
            reader, begin = by_slot[step.aside.slot], step.aside.start
            end = begin + len(step.aside.tokens)
            assert step.aside.slot not in slots | {private}
            assert reader.adapter == step.adapter
            assert begin == reader.cached < end < len(reader.prompt)
            assert step.aside.tokens == reader.prompt[begin:end]
            assert not reader.scores_prompt
