"""Which rows the next step holds. Each step is one native call.

Sequences that decode go first, as many as the model's measured rate asks for, and prompts go beside
them in slices that keep the step within its time. Where that time does not bind, as a whole batch of
prompt is quick, decoding and prompts take turns instead: a prompt then keeps to calls of its own,
which keeps company from changing what is computed. A reproducible sequence has steps of its own, and
of the engine's time no more than each of those who share the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from . import messages as m
from .line import Line
from .pace import TILE, Pace, Slice
from .sequence import Sequence, State

PRIVATE_SLICE = 32
"""Prompt tokens in a step of a reproducible sequence. Always so many: slices change sums."""


class Planner:
    """Admits whom it has room for in the step, with `admitted` told of each."""

    def __init__(
        self, capacity: m.Capacity, line: Line, pace: Pace, admitted: Callable[[Sequence], None]
    ) -> None:
        self._capacity = capacity
        self._line = line
        self._pace = pace
        self._admitted = admitted
        self._turn = 0
        self._last_was_private = False
        self._prompted: set[str] = set()
        """Adapters whose last step was a prompt's: with each, prompts and decoding take turns."""
        self._adapters: dict[str, int] = {}
        """When each adapter last had a step, of those that have something to do."""
        self._owed = 0.0
        """Seconds of steps for everybody else before the next one of the reproducible sequence."""

    def took(self, rows: Iterable[m.Row], seconds: float, *, private: bool) -> None:
        """A step's time, for the reproducible sequence's share; and what was computed beside what is kept."""
        if private:
            self._owed += seconds * self._line.others()
        else:
            self._line.room.computed += sum(len(row.tokens) for row in rows)
            # What is paid too much counts for the next time, but idleness saves up nothing.
            self._owed = max(-seconds, self._owed - seconds)

    def rows(self, now: float, out: list[m.Instruction]) -> list[m.Row]:
        """The next step's rows, none where there is nothing to do; `out` gets what comes before."""
        self._line.room.move_out(out)
        if self._last_was_private or self._owed > 0:
            rows = self._shared(now, out)
            if rows:
                self._last_was_private = False
                return rows
        # Whoever is alone owes nobody anything.
        self._owed = min(self._owed, 0.0)
        private = self._private(now, out)
        if private:
            self._last_was_private = True
            return private
        self._last_was_private = False
        return self._shared(now, out)

    def _private(self, now: float, out: list[m.Instruction]) -> list[m.Row]:
        fresh = self._line.private is None
        sequence = self._line.admit_private(now, out)
        if sequence is None:
            return []
        if fresh:
            self._admitted(sequence)
        if sequence.state is State.PREFILL:
            return [self._prompt_row(sequence, PRIVATE_SLICE)]
        return [self._decode_row(sequence)] if sequence.state is State.DECODE else []

    def _shared(self, now: float, out: list[m.Instruction]) -> list[m.Row]:
        adapter = self._adapter()
        running = [s for s in self._line.room.running.values() if s.adapter == adapter]
        ready = [s for s in running if s.state is State.DECODE]
        reading = sum(s.state is State.PREFILL for s in running)
        most = self._capacity.batch_tokens - len(ready)
        waiting = reading + self._line.could_begin()
        piece = (
            self._pace.prompt_slice(len(ready), waiting) if waiting else Slice(0, together=False)
        )
        # How a prompt is cut changes sums, and is not to depend on others where each has its own cache.
        room = min(piece.tokens, most) if self._capacity.can_copy else most
        binds = room < most
        together = binds and piece.together
        if ready and not together and adapter in self._prompted:
            prompts: list[m.Row] = []
        else:
            prompts = list(self._prompts(adapter, room, now, out, together=binds))
        self._prompted.discard(adapter)
        if prompts:
            self._prompted.add(adapter)
        if not prompts:
            if len(ready) == 1 and not reading:
                return [self._decode_row(ready[0], self._guesses(ready[0]))]
            # Between two slices each has its turn: in the time of all rows a prompt was read.
            turn = ready if reading and len(ready) < TILE else self._whose_turn(ready)
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
        self, adapter: str, room: int, now: float, out: list[m.Instruction], *, together: bool
    ) -> Iterator[m.Row]:
        """Slices of prompts, whoever was served least first; then of those who are admitted.

        Unless they are `together` with all else, prompts share a call only while they are short.
        """
        total, scoring = 0, False
        counters = self._line.counters
        begun = [
            s
            for s in self._line.room.running.values()
            if s.state is State.PREFILL and s.adapter == adapter
        ]
        begun.sort(key=lambda s: (counters[s.principal], s.id), reverse=True)
        while total < room:
            fresh = self._line.first()
            if fresh is not None and (
                fresh.adapter != adapter or (begun and self._claim(fresh) >= self._claim(begun[-1]))
            ):
                fresh = None
            sequence = fresh or (begun[-1] if begun else None)
            if sequence is None or not (
                not total or together or total + sequence.prompt_left < TILE
            ):
                return
            if sequence.scores_prompt and scoring:
                return  # each of its tokens has logits, for which there is not room without end
            scoring = scoring or sequence.scores_prompt
            if fresh is not None:
                self._line.admit(fresh, now, out)
                self._admitted(fresh)
            else:
                begun.pop()
            row = self._prompt_row(sequence, room - total)
            total += len(row.tokens)
            yield row

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
