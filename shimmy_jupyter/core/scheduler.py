"""What happens to sequences. Events in, instructions out; one mutator, no clock.

Who is admitted is decided in `line`, what goes into a step in `planning`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from ..types import Ended, Failure, FinishReason
from . import messages as m
from .line import Line
from .pace import Pace
from .planning import Planner
from .reasoning import Part
from .sequence import Sequence, State
from .text import TextAssembler


class Scheduler:
    """Owns every `Sequence`. `handle` is the only way in; `now` is seconds on any steady clock.

    `guess` is the seconds that a prompt token takes, until that has been measured.
    """

    def __init__(self, capacity: m.Capacity, *, guess: float = 1e-4) -> None:
        self.capacity = capacity
        self.line = Line(capacity)
        self.running: dict[int, Sequence] = {}
        self.sequences: dict[int, Sequence] = {}
        self.step: m.Step | None = None
        self.halted: Failure | None = None
        self.pace = Pace(
            batch_tokens=capacity.batch_tokens,
            step_seconds=capacity.step_seconds,
            prompt_seconds=capacity.prompt_seconds,
            guess=guess,
            row_block=capacity.row_block,
        )
        self._planner = Planner(capacity, self.line, self.pace, self.running)

    def handle(self, event: m.Event, now: float) -> list[m.Instruction]:
        """Apply one event; returns what to do, in order. Events about unknown ids do nothing."""
        return self._HANDLERS[type(event)](self, event, now)

    def __repr__(self) -> str:
        room = self.line.room
        return (
            f"<Scheduler {len(self.line)} queued, {len(self.running)} running, "
            f"{room.reserved_tokens}/{self.capacity.kv_tokens} KV tokens reserved, "
            f"{room.prefixes.kept_tokens} kept>"
        )

    def stepping(self) -> frozenset[int]:
        """The sequences in the step in progress."""
        if self.step is None:
            return frozenset()
        return frozenset(sequence.id for sequence in self._in_step(self.step))

    # Events

    def _submitted(self, event: m.Submitted, now: float) -> list[m.Instruction]:
        sequence = Sequence(
            id=event.id,
            principal=event.principal,
            prompt=event.prompt,
            max_tokens=event.max_tokens,
            sampling=event.sampling,
            text=TextAssembler(event.stop, event.sampling.reasoning),
            submitted_at=now if event.at is None else event.at,
            reproducible=event.reproducible,
            adapter=event.adapter,
        )
        if self.halted is not None:
            return [self._ended(sequence, FinishReason.ERROR, now, self.halted)]
        if self.line.is_full(event.principal):
            waiting = f"{len(self.line)} requests are waiting already; try again later"
            failure = Failure("queue_full", waiting)
            return [self._ended(sequence, FinishReason.ERROR, now, failure)]
        self.sequences[sequence.id] = sequence
        self.line.join(sequence)
        return []

    def _cancel_requested(self, event: m.CancelRequested, now: float) -> list[m.Instruction]:
        return self._give_up(self.sequences.get(event.id), None, now)

    def _deadline_passed(self, event: m.DeadlinePassed, now: float) -> list[m.Instruction]:
        failure = Failure("deadline_exceeded", "the request took longer than its max_seconds")
        return self._give_up(self.sequences.get(event.id), failure, now)

    def _give_up(
        self, sequence: Sequence | None, failure: Failure | None, now: float
    ) -> list[m.Instruction]:
        if sequence is None or sequence.state is State.CANCELLING:
            return []
        sequence.failure = failure
        if sequence.in_step:
            sequence.state = State.CANCELLING
            return []
        return self._end_unwanted(sequence, now)

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
                sequence.paused += now - sequence.reader_full_since
                sequence.state = State.DECODE
        return []

    def _progress_asked(self, event: m.ProgressAsked, now: float) -> list[m.Instruction]:
        sequence = self.sequences.get(event.id)
        if sequence is None or sequence.generated:
            return []
        if sequence.state is State.QUEUED:
            position, reason = self.line.position(sequence)
            return [m.Progress(sequence.id, position, reason)]
        reading = "its prompt is being read"
        done = sequence.cached
        return [m.Progress(sequence.id, 0, reading, admitted=True, prompt_done=done)]

    def _public_declared(self, event: m.PublicDeclared, now: float) -> list[m.Instruction]:
        self.line.room.prefixes.public = event.prefixes
        return []

    def _engine_ready(self, event: m.EngineReady, now: float) -> list[m.Instruction]:
        if self.step is not None or self.halted is not None:
            return []
        instructions = self._give_up_on_readers(now)
        self.step = self._planner.step(now, instructions)
        if self.step is not None:
            instructions.append(self.step)
        return instructions

    def _idle(self, event: m.Idle, now: float) -> list[m.Instruction]:
        return [] if self.sequences or self.halted is not None else self.line.room.write_back()

    def _flushed(self, event: m.Flushed, now: float) -> list[m.Instruction]:
        self.line.room.settle(event.unsaved)
        return []

    def _stepped(self, event: m.Stepped, now: float) -> list[m.Instruction]:
        step, by_slot = self._take_step(), self._by_slot()
        rows = step.rows
        self.line.room.settle(event.unsaved)
        sampled: dict[int, list[m.Sampled]] = {}
        for one in event.sampled:
            sampled.setdefault(one.slot, []).append(one)
        for prompts in event.prompts:
            by_slot[prompts.slot].prompt_scored += prompts.scored
        private = bool(rows) and rows[0].slot == self.capacity.private_slot
        self._planner.took(step, event, private=private)
        instructions = self._left_aside(step, now)
        completions: dict[str, int] = {}
        prompt = decoding = 0
        for row in rows:
            sequence = by_slot[row.slot]
            if sequence.answer:
                decoding += 1
            else:
                prompt += len(row.tokens)
            sequence.in_step, sequence.tried = False, 0
            sequence.cached = row.start + len(row.tokens) - row.guessed
            if sequence.state is State.CANCELLING:
                instructions += self._end_unwanted(sequence, now)
            elif row.sample:
                who, before = sequence.principal, sequence.generated
                self._tokens(sequence, row, sampled[row.slot], now, instructions)
                completions[who] = completions.get(who, 0) + sequence.generated - before
        self.line.charge(completions, private=private)
        # Guesses are other work than a row of each sequence, and what is delayed tells of something else.
        usual = not (private or step.has_company or any(row.guessed for row in rows))
        if event.seconds and usual:
            self.pace.observe(decoding, prompt, event.seconds, event.threads)
        return instructions

    def _step_aborted(self, event: m.StepAborted, now: float) -> list[m.Instruction]:
        step, by_slot = self._take_step(), self._by_slot()
        instructions = self._left_aside(step, now)
        for row in step.rows:
            sequence = by_slot[row.slot]
            sequence.in_step = False
            if sequence.state is State.CANCELLING:
                # Its time was taken, or giving up amid one's own prompt would cost nothing.
                self.line.charge_prompt(sequence, len(row.tokens))
                instructions += self._end_unwanted(sequence, now)
            elif sequence.state is State.DECODE and sequence.reader_full:
                sequence.state = State.PAUSED
        return instructions

    def _step_failed(self, event: m.StepFailed, now: float) -> list[m.Instruction]:
        step, by_slot = self._take_step(), self._by_slot()
        instructions = self._left_aside(step, now)
        for row in step.rows:
            sequence = by_slot[row.slot]
            sequence.in_step = False
            cancelled = sequence.state is State.CANCELLING and sequence.failure is None
            reason = FinishReason.CANCELLED if cancelled else FinishReason.ERROR
            failure = None if cancelled else sequence.failure or event.failure
            # What its slot holds after a failure is anybody's guess.
            instructions += self._end(sequence, reason, now, failure, keep=False)
        return instructions

    def _halted(self, event: m.Halted, now: float) -> list[m.Instruction]:
        self.halted = event.failure
        self.step = None
        instructions: list[m.Instruction] = []
        for sequence in list(self.sequences.values()):
            sequence.in_step = False
            instructions += self._end(sequence, FinishReason.ERROR, now, event.failure, keep=False)
        return instructions

    def _give_up_on_readers(self, now: float) -> list[m.Instruction]:
        """A sequence that is paused holds a slot and KV room that others may be waiting for; and the
        one slot for reproducible sequences is not for a reader that is slow again and again.
        """
        patience = self.capacity.patience
        failure = Failure("deadline_exceeded", f"the answer was not read for {patience:.0f} s")
        return [
            instruction
            for sequence in list(self.running.values())
            if sequence.state is State.PAUSED
            and now - sequence.reader_full_since + sequence.paused * sequence.reproducible
            > patience
            for instruction in self._end(sequence, FinishReason.ERROR, now, failure)
        ]

    # Of functions, not of bound methods: those and `self` would keep each other, and all tokens of a
    # cache whose engine has ended, until Python next looks for cycles.
    _HANDLERS: ClassVar[dict[type, Callable[..., list[m.Instruction]]]] = {
        m.Submitted: _submitted,
        m.CancelRequested: _cancel_requested,
        m.DeadlinePassed: _deadline_passed,
        m.ReaderFull: _reader_full,
        m.ReaderReady: _reader_ready,
        m.ProgressAsked: _progress_asked,
        m.PublicDeclared: _public_declared,
        m.EngineReady: _engine_ready,
        m.Idle: _idle,
        m.Flushed: _flushed,
        m.Stepped: _stepped,
        m.StepAborted: _step_aborted,
        m.StepFailed: _step_failed,
        m.Halted: _halted,
    }

    # Outcomes

    def _tokens(
        self,
        sequence: Sequence,
        row: m.Row,
        sampled: list[m.Sampled],
        now: float,
        out: list[m.Instruction],
    ) -> None:
        """A step's tokens for a sequence, as many as it still wants."""
        if row.guessed:
            sequence.lookup.learn(row.guessed, len(sampled) - 1)
        for one in sampled:
            self._token(sequence, one, now, out)
            if sequence.state is State.DONE:
                return
            sequence.cached += 1  # the guess that was this token, if there was one
        sequence.cached -= 1
        if len(sampled) <= row.guessed:
            out.append(m.TrimSlot(sequence.slot, sequence.cached))

    def _token(
        self, sequence: Sequence, sampled: m.Sampled, now: float, out: list[m.Instruction]
    ) -> None:
        if sampled.failure is not None:
            out += self._end(sequence, FinishReason.ERROR, now, sampled.failure, keep=False)
            return
        if sequence.scores_prompt and not sequence.generated:
            out.append(m.Emit(sequence.id, "", tuple(sequence.prompt_scored), prompt=True))
        if sequence.max_tokens == 0:
            out += self._end(sequence, FinishReason.LENGTH, now)
            return
        sequence.answer.append(sampled.token)
        sequence.last_token_at = now
        if sequence.first_token_at is None:
            sequence.first_token_at = now
        if sampled.end_of_generation:
            out += self._end(sequence, FinishReason.STOP, now)
            return
        was_thinking = sequence.text.thinking
        parts = sequence.text.push(sampled.piece, as_is=sampled.held)
        if was_thinking or sequence.text.thinking:
            sequence.thought = sequence.generated
        if sampled.scored is not None:
            sequence.scored.append(sampled.scored)
        out += self._shown(sequence, parts)
        if sequence.text.stopped:
            out += self._end(sequence, FinishReason.STOP, now)
        elif len(sequence.answer) == sequence.max_tokens:
            out += self._end(sequence, FinishReason.LENGTH, now)
        else:
            sequence.state = State.PAUSED if sequence.reader_full else State.DECODE

    def _end_unwanted(self, sequence: Sequence, now: float) -> list[m.Instruction]:
        reason = FinishReason.CANCELLED if sequence.failure is None else FinishReason.ERROR
        return self._end(sequence, reason, now, sequence.failure)

    def _end(
        self,
        sequence: Sequence,
        reason: FinishReason,
        now: float,
        failure: Failure | None = None,
        *,
        keep: bool = True,
    ) -> list[m.Instruction]:
        """Free what the sequence holds and say the last word."""
        instructions: list[m.Instruction] = []
        thinking, held = sequence.text.thinking, sequence.text.finish()
        if not held and sequence.scored and not sequence.text.stopped:
            # Tokens without text of their own, such as a character's first bytes, were chosen, too.
            held = [(thinking, "")]
        if reason in (FinishReason.STOP, FinishReason.LENGTH):
            instructions += self._shown(sequence, held)
        if sequence.state is State.QUEUED:
            self.line.leave(sequence)
        else:
            # What is read aside and not done has taken its time, too.
            self.line.charge_prompt(sequence, self._planner.unfinished(sequence))
            instructions.append(self.line.release(sequence, keep=keep))
            del self.running[sequence.id]
        del self.sequences[sequence.id]
        instructions.append(self._ended(sequence, reason, now, failure))
        return instructions

    def _shown(self, sequence: Sequence, parts: list[Part]) -> list[m.Emit]:
        """The tokens that have come go with the last part."""
        if not parts:
            return []
        scored, sequence.scored = tuple(sequence.scored), []
        *others, (reasoning, text) = parts
        shown = [m.Emit(sequence.id, before, (), of) for of, before in others]
        if text or scored:
            shown.append(m.Emit(sequence.id, text, scored, reasoning))
        return shown

    def _ended(
        self, sequence: Sequence, reason: FinishReason, now: float, failure: Failure | None
    ) -> m.Finish:
        sequence.state = State.DONE
        ended = Ended(reason, sequence.usage(), sequence.timings(now), failure)
        return m.Finish(sequence.id, ended)

    def _take_step(self) -> m.Step:
        step, self.step = self.step, None
        return step or m.Step(())

    def _in_step(self, step: m.Step) -> list[Sequence]:
        by_slot = self._by_slot()
        slots = [row.slot for row in step.rows]
        return [by_slot[slot] for slot in [*slots, *([step.aside.slot] if step.aside else [])]]

    def _left_aside(self, step: m.Step, now: float) -> list[m.Instruction]:
        """The sequence whose prompt was read aside is in no step any more."""
        if step.aside is None:
            return []
        sequence = self._by_slot()[step.aside.slot]
        sequence.in_step = False
        cancelled = sequence.state is State.CANCELLING
        return self._end_unwanted(sequence, now) if cancelled else []

    def _by_slot(self) -> dict[int, Sequence]:
        return {sequence.slot: sequence for sequence in self.running.values()}

    # Checks

    def check_invariants(self) -> None:
        """Raise AssertionError if the collections and the states they stand for disagree."""
        cap, line = self.capacity, self.line
        line.check_invariants()
        running = list(self.running.values())
        placed = [*line.room.running.values(), *([line.private] if line.private else [])]
        assert {s.id for s in placed} == set(self.running)
        assert {s.id for s in line.waiting()} | set(self.running) == set(self.sequences)
        assert len(line) + len(running) == len(self.sequences)
        assert len(line) <= cap.queue
        in_step = self._in_step(self.step) if self.step else []
        assert {s.id for s in in_step} == {s.id for s in running if s.in_step}
        for s in running:
            s.check_invariants()
        if self.step is not None:
            self._planner.check_step(self.step, self._by_slot())
