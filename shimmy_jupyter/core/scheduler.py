"""Which tokens go into the next batch. Events in, instructions out; one mutator, no clock.

Admission is first come, first served: the oldest queued sequence waits until a slot and its whole
KV reservation (prompt + max_tokens) are free, and nobody overtakes it. A step holds one row for
every sequence that is decoding, then the first waiting prompt as far as the batch has room, then
others that can share its native call. So the sequences that decode wait for one prompt at a time.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable

from ..types import Ended, Failure, FinishReason
from . import messages as m
from .grouping import TILE
from .sequence import Sequence, State
from .text import TextAssembler

_RUNNABLE = (State.PREFILL, State.DECODE)


class Scheduler:
    """Owns every `Sequence`. `handle` is the only way in; `now` is seconds on any steady clock."""

    def __init__(self, capacity: m.Capacity) -> None:
        self.capacity = capacity
        self.queue: deque[Sequence] = deque()
        self.running: OrderedDict[int, Sequence] = OrderedDict()
        self.sequences: dict[int, Sequence] = {}
        self.free_slots = list(range(capacity.slots - 1, -1, -1))
        self.reserved_tokens = 0
        self.step: m.Step | None = None
        self.halted: Failure | None = None
        self._handlers: dict[type, Callable[..., list[m.Instruction]]] = {
            m.Submitted: self._submitted,
            m.CancelRequested: self._cancel_requested,
            m.ReaderFull: self._reader_full,
            m.ReaderReady: self._reader_ready,
            m.EngineReady: self._engine_ready,
            m.Stepped: self._stepped,
            m.StepFailed: self._step_failed,
            m.Halted: self._halted,
        }

    def handle(self, event: m.Event, now: float) -> list[m.Instruction]:
        """Apply one event; returns what to do, in order. Events about unknown ids do nothing."""
        return self._handlers[type(event)](event, now)

    def __repr__(self) -> str:
        return (
            f"<Scheduler {len(self.queue)} queued, {len(self.running)} running, "
            f"{self.reserved_tokens}/{self.capacity.kv_tokens} KV tokens reserved>"
        )

    # Events

    def _submitted(self, event: m.Submitted, now: float) -> list[m.Instruction]:
        sequence = Sequence(
            id=event.id,
            principal=event.principal,
            prompt=event.prompt,
            max_tokens=event.max_tokens,
            sampling=event.sampling,
            text=TextAssembler(event.stop),
            submitted_at=now,
        )
        if self.halted is not None:
            return [self._ended(sequence, FinishReason.ERROR, now, self.halted)]
        if len(self.queue) >= self.capacity.queue:
            waiting = f"{len(self.queue)} requests are waiting already; try again later"
            failure = Failure("queue_full", waiting)
            return [self._ended(sequence, FinishReason.ERROR, now, failure)]
        self.sequences[sequence.id] = sequence
        self.queue.append(sequence)
        return []

    def _cancel_requested(self, event: m.CancelRequested, now: float) -> list[m.Instruction]:
        sequence = self.sequences.get(event.id)
        if sequence is None:
            return []
        if sequence.in_step:
            sequence.state = State.CANCELLING
            return []
        return self._end(sequence, FinishReason.CANCELLED, now)

    def _reader_full(self, event: m.ReaderFull, now: float) -> list[m.Instruction]:
        sequence = self.sequences.get(event.id)
        if sequence is not None:
            sequence.reader_full = True
            sequence.reader_full_since = now
            if sequence.state is State.DECODE and not sequence.in_step:
                sequence.state = State.PAUSED
        return []

    def _reader_ready(self, event: m.ReaderReady, now: float) -> list[m.Instruction]:
        sequence = self.sequences.get(event.id)
        if sequence is not None:
            sequence.reader_full = False
            if sequence.state is State.PAUSED:
                sequence.state = State.DECODE
        return []

    def _engine_ready(self, event: m.EngineReady, now: float) -> list[m.Instruction]:
        if self.step is not None or self.halted is not None:
            return []
        instructions = self._give_up_on_readers(now) + self._admit(now)
        rows = self._plan()
        if rows:
            self.step = m.Step(rows)
            instructions.append(self.step)
        return instructions

    def _stepped(self, event: m.Stepped, now: float) -> list[m.Instruction]:
        rows, by_slot = self._take_step(), self._by_slot()
        sampled = {s.slot: s for s in event.sampled}
        instructions: list[m.Instruction] = []
        for row in rows:
            sequence = by_slot[row.slot]
            sequence.in_step = False
            sequence.cached = row.start + len(row.tokens)
            if sequence.state is State.CANCELLING:
                instructions += self._end(sequence, FinishReason.CANCELLED, now)
            elif row.sample:
                instructions += self._token(sequence, sampled[row.slot], now)
        return instructions

    def _step_failed(self, event: m.StepFailed, now: float) -> list[m.Instruction]:
        rows, by_slot = self._take_step(), self._by_slot()
        instructions: list[m.Instruction] = []
        for row in rows:
            sequence = by_slot[row.slot]
            sequence.in_step = False
            cancelled = sequence.state is State.CANCELLING
            reason = FinishReason.CANCELLED if cancelled else FinishReason.ERROR
            instructions += self._end(sequence, reason, now, None if cancelled else event.failure)
        return instructions

    def _halted(self, event: m.Halted, now: float) -> list[m.Instruction]:
        self.halted = event.failure
        self.step = None
        instructions: list[m.Instruction] = []
        for sequence in list(self.sequences.values()):
            sequence.in_step = False
            instructions += self._end(sequence, FinishReason.ERROR, now, event.failure)
        return instructions

    # Planning

    def _give_up_on_readers(self, now: float) -> list[m.Instruction]:
        """A sequence that is paused holds a slot and KV room that others may be waiting for."""
        patience = self.capacity.patience
        failure = Failure("deadline_exceeded", f"the answer was not read for {patience:.0f} s")
        return [
            instruction
            for sequence in list(self.running.values())
            if sequence.state is State.PAUSED and now - sequence.reader_full_since > patience
            for instruction in self._end(sequence, FinishReason.ERROR, now, failure)
        ]

    def _admit(self, now: float) -> list[m.Instruction]:
        instructions: list[m.Instruction] = []
        while self.queue and self.free_slots:
            sequence = self.queue[0]
            if self.reserved_tokens + sequence.reserved > self.capacity.kv_tokens:
                break
            self.queue.popleft()
            sequence.slot = self.free_slots.pop()
            sequence.state = State.PREFILL
            sequence.admitted_at = now
            self.reserved_tokens += sequence.reserved
            self.running[sequence.id] = sequence
            last_n = sequence.sampling.repeat_last_n
            recent = sequence.prompt[-last_n:] if last_n else ()
            instructions.append(m.OpenSlot(sequence.slot, sequence.sampling, recent))
        return instructions

    def _plan(self) -> tuple[m.Row, ...]:
        rows: list[m.Row] = []
        room = self.capacity.batch_tokens
        for sequence in self.running.values():
            if sequence.state is State.DECODE and room:
                rows.append(m.Row(sequence.slot, sequence.cached, (sequence.last_token,), True))
                sequence.in_step = True
                room -= 1
        prefill = 0
        for sequence in self.running.values():
            if sequence.state is not State.PREFILL or not room:
                continue
            left = len(sequence.prompt) - sequence.cached
            take = min(left, room)
            if prefill and (take < left or prefill + take >= TILE):
                continue
            tokens = sequence.prompt[sequence.cached : sequence.cached + take]
            rows.append(m.Row(sequence.slot, sequence.cached, tokens, take == left))
            sequence.in_step = True
            room -= take
            prefill += take
        return tuple(rows)

    # Outcomes

    def _token(self, sequence: Sequence, sampled: m.Sampled, now: float) -> list[m.Instruction]:
        if sampled.failure is not None:
            return self._end(sequence, FinishReason.ERROR, now, sampled.failure)
        sequence.generated += 1
        sequence.last_token = sampled.token
        sequence.last_token_at = now
        if sequence.first_token_at is None:
            sequence.first_token_at = now
        if sampled.end_of_generation:
            return self._end(sequence, FinishReason.STOP, now)
        instructions: list[m.Instruction] = []
        text = sequence.text.push(sampled.piece)
        if text:
            instructions.append(m.Emit(sequence.id, text))
        if sequence.text.stopped:
            return instructions + self._end(sequence, FinishReason.STOP, now)
        if sequence.generated >= sequence.max_tokens:
            return instructions + self._end(sequence, FinishReason.LENGTH, now)
        sequence.state = State.PAUSED if sequence.reader_full else State.DECODE
        return instructions

    def _end(
        self,
        sequence: Sequence,
        reason: FinishReason,
        now: float,
        failure: Failure | None = None,
    ) -> list[m.Instruction]:
        instructions: list[m.Instruction] = []
        if sequence.state is State.QUEUED:
            self.queue.remove(sequence)
        else:
            del self.running[sequence.id]
            self.reserved_tokens -= sequence.reserved
            self.free_slots.append(sequence.slot)
            instructions.append(m.CloseSlot(sequence.slot))
        del self.sequences[sequence.id]
        if reason is not FinishReason.CANCELLED:
            held = sequence.text.finish()
            if held:
                instructions.append(m.Emit(sequence.id, held))
        instructions.append(self._ended(sequence, reason, now, failure))
        return instructions

    def _ended(
        self, sequence: Sequence, reason: FinishReason, now: float, failure: Failure | None = None
    ) -> m.Finish:
        sequence.state = State.DONE
        ended = Ended(reason, sequence.usage(), sequence.timings(now), failure)
        return m.Finish(sequence.id, ended)

    def _take_step(self) -> tuple[m.Row, ...]:
        step, self.step = self.step, None
        return step.rows if step is not None else ()

    def _by_slot(self) -> dict[int, Sequence]:
        return {sequence.slot: sequence for sequence in self.running.values()}

    # Checks

    def check_invariants(self) -> None:
        """Raise AssertionError if the collections and the states they stand for disagree."""
        cap = self.capacity
        queued, running = list(self.queue), list(self.running.values())
        assert {s.id for s in queued} | set(self.running) == set(self.sequences)
        assert len(queued) + len(running) == len(self.sequences)
        assert len(queued) <= cap.queue
        assert all(s.state is State.QUEUED and s.slot < 0 and not s.in_step for s in queued)
        slots = [s.slot for s in running]
        assert sorted(slots + self.free_slots) == list(range(cap.slots))
        assert self.reserved_tokens == sum(s.reserved for s in running) <= cap.kv_tokens
        in_step = {row.slot for row in self.step.rows} if self.step else set()
        assert in_step == {s.slot for s in running if s.in_step}
        for s in running:
            assert s.state in (*_RUNNABLE, State.PAUSED, State.CANCELLING), s.state
            assert s.state is not State.CANCELLING or s.in_step
            assert s.state is not State.PAUSED or (s.reader_full and not s.in_step)
            assert s.generated < s.max_tokens
            if s.generated:
                assert s.cached == len(s.prompt) + s.generated - 1
            else:
                assert s.cached < len(s.prompt)
            assert (s.state is State.PREFILL) <= (s.generated == 0)
        if self.step is not None:
            self._check_step(self.step)

    def _check_step(self, step: m.Step) -> None:
        by_slot = self._by_slot()
        assert len({row.slot for row in step.rows}) == len(step.rows)
        assert 0 < sum(len(row.tokens) for row in step.rows) <= self.capacity.batch_tokens
        for row in step.rows:
            sequence = by_slot[row.slot]
            assert row.start == sequence.cached
            end = row.start + len(row.tokens)
            assert end <= sequence.reserved <= self.capacity.kv_tokens
            assert row.sample == (end >= len(sequence.prompt))
