"""Who waits, and who is admitted next: between principals by `fairness`, within one in order.

A principal that has as much as one may have at the moment does not wait in the sense of fairness: its
counter is lifted when it may have more again, as if it had been idle. Whoever is next waits until a
slot and its whole KV reservation are free; meanwhile others that fit pass it, up to half of the cache in
all, so that neither a large request nor one that never comes to be holds up everybody.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from . import messages as m
from .fairness import Counters
from .prefix import MIN_SHARED, common
from .room import Room
from .sequence import Sequence, State

Queues = dict[str, deque[Sequence]]

_OPENING_COST = 64
"""Prompt tokens' worth of making a context of its own for a reproducible sequence."""
_SHARE = 3
"""One principal may have so many times the places in the queue that would be left free."""
_PASS = 2
"""One that has no room yet is passed by others with 1 / so much of the cache, and then no more."""


class Line:
    """Sequences in state QUEUED, and the room that they are waiting for.

    Reproducible ones wait by themselves, for the one private slot; their service counts for both.
    """

    def __init__(self, capacity: m.Capacity) -> None:
        self.capacity = capacity
        self.room = Room(capacity)
        self.private: Sequence | None = None
        """The reproducible sequence that is running."""
        self.counters = Counters(capacity.weights)
        self._private_counters = Counters(capacity.weights)
        self._queues: Queues = {}
        self._private_queues: Queues = {}
        self._count = 0
        self._passed: list[Sequence] = []
        """Those whom the sequence that `first` has named would pass."""

    def __len__(self) -> int:
        return self._count

    def waiting(self) -> list[Sequence]:
        queues = [*self._queues.values(), *self._private_queues.values()]
        return [sequence for queue in queues for sequence in queue]

    def could_begin(self) -> int:
        """Of those who wait, as many as there are places in the batch."""
        queued = sum(map(len, self._queues.values()))
        return min(queued, self.room.limit - len(self.room.running))

    def is_full(self, principal: str) -> bool:
        """Whether one more of this principal's would leave too little for others."""
        lanes = (self._queues, self._private_queues)
        own = sum(len(lane[principal]) for lane in lanes if principal in lane)
        left = self.capacity.queue - self._count
        return left <= 0 or own >= _SHARE * left

    def join(self, sequence: Sequence) -> None:
        self._lane(sequence).setdefault(sequence.principal, deque()).append(sequence)
        self._count += 1

    def leave(self, sequence: Sequence) -> None:
        """Take out one that is still waiting."""
        queues = self._lane(sequence)
        queues[sequence.principal].remove(sequence)
        self._left(queues, sequence.principal)

    def position(self, sequence: Sequence) -> tuple[int, str]:
        """How many go before it, as things stand, and what it waits for.

        Principals take turns, so of others' requests about as many as of its own go first.
        """
        queues = self._lane(sequence)
        own = list(queues[sequence.principal]).index(sequence)
        mine = self.counters[sequence.principal]
        before = sum(
            min(len(queue), own + (self.counters[principal] <= mine))
            for principal, queue in queues.items()
            if principal != sequence.principal
        )
        return own + before, self._reason(sequence, own)

    def first(self) -> Sequence | None:
        """The one that may be admitted now; None where nobody waits or whoever is next has no room."""
        heads = {
            principal: queue[0]
            for principal, queue in self._queues.items()
            if self.room.refuses(queue[0]) is None and not self._awaits(queue[0])
        }
        self.counters.wait(heads)
        # A newcomer starts level with those who wait, and goes before those who have something.
        in_order = sorted(
            heads.values(),
            key=lambda s: (self.counters[s.principal], self.room.count(s.principal), s.id),
        )
        for at, sequence in enumerate(in_order):
            if self.room.lacks(sequence) is None and self._may_pass(sequence, in_order[:at]):
                self._passed = in_order[:at]
                return sequence
        return None

    def _may_pass(self, sequence: Sequence, before: list[Sequence]) -> bool:
        """Whether those who are next and have no room yet can bear to be passed once more."""
        most = self.capacity.kv_tokens // _PASS
        return all(waits.passed + sequence.reserved <= most for waits in before)

    def admit(self, sequence: Sequence, now: float, out: list[m.Instruction]) -> None:
        """Move the first one into a slot, with what the backend has to do for it."""
        for waits in self._passed:
            waits.passed += sequence.reserved
        self._take(self._queues, sequence, now)
        out += self.room.place(sequence, self.could_begin())
        self.charge_prompt(sequence, sequence.prompt_left)
        out.append(_opening(sequence))

    def admit_private(self, now: float, out: list[m.Instruction]) -> Sequence | None:
        """The reproducible sequence that runs, after admitting one if none does."""
        if self.private is None and self._private_queues:
            heads = {p: queue[0] for p, queue in self._private_queues.items()}
            self._private_counters.wait(heads)
            sequence = min(
                heads.values(), key=lambda s: (self._private_counters[s.principal], s.id)
            )
            self._take(self._private_queues, sequence, now)
            sequence.slot = self.capacity.private_slot
            self.private = sequence
            self.charge_prompt(sequence, len(sequence.prompt))
            self.charge_prompt(sequence, _OPENING_COST)
            out.append(_opening(sequence, sequence.reserved))
        return self.private

    def others(self) -> float:
        """Weights of those who share the engine with the reproducible sequence, by its principal's."""
        who = {sequence.principal for sequence in self.room.running.values()}
        own = self.counters.weight(self.private.principal) if self.private is not None else 1.0
        return sum(map(self.counters.weight, who)) / own

    def charge(self, completions: Mapping[str, int], *, private: bool) -> None:
        """Count what a step has generated, by principal."""
        for principal, count in completions.items():
            self.counters.charge(principal, completion=count)
            if private:
                self._private_counters.charge(principal, completion=count)

    def charge_prompt(self, sequence: Sequence, tokens: int) -> None:
        """Count tokens of its prompt, or work worth as many; a negative number gives back."""
        self.counters.charge(sequence.principal, tokens)
        if sequence.reproducible:
            self._private_counters.charge(sequence.principal, tokens)

    def release(self, sequence: Sequence, *, keep: bool) -> m.CloseSlot:
        """Take back what a running sequence has. Of its prompt, what was not done is not charged."""
        self.charge_prompt(sequence, -sequence.prompt_left)
        if sequence is self.private:
            self.private = None
            return m.CloseSlot(sequence.slot)
        return self.room.release(sequence, keep=keep)

    def _awaits(self, sequence: Sequence) -> bool:
        """Whether one like it is being read: to wait for that is quicker than to read it twice."""
        if not self.capacity.can_copy or not self.capacity.can_trim or sequence.scores_prompt:
            return False
        return any(
            leader.state is State.PREFILL
            and leader.owner == sequence.owner
            and common(leader.prompt, sequence.prompt[:-1]) >= leader.cached + MIN_SHARED
            for leader in self.room.running.values()
        )

    def _reason(self, sequence: Sequence, own: int) -> str:
        if sequence.reproducible:
            return "another reproducible request is running"
        head = self._queues[sequence.principal][0]
        if reason := self.room.refuses(head):
            return reason
        if own == 0 and self._awaits(head):
            return "a request with the same beginning is being read"
        return self.room.lacks(head) or "its turn"

    def _lane(self, sequence: Sequence) -> Queues:
        return self._private_queues if sequence.reproducible else self._queues

    def _take(self, queues: Queues, sequence: Sequence, now: float) -> None:
        queues[sequence.principal].popleft()
        self._left(queues, sequence.principal)
        sequence.state = State.PREFILL
        sequence.admitted_at = now

    def _left(self, queues: Queues, principal: str) -> None:
        self._count -= 1
        if not queues[principal]:
            del queues[principal]

    def check_invariants(self) -> None:
        waiting = self.waiting()
        assert self._count == len(waiting)
        assert all(s.state is State.QUEUED and s.slot < 0 and not s.in_step for s in waiting)
        assert self.private is None or self.private.slot == self.capacity.private_slot
        self.room.check_invariants()


def _opening(sequence: Sequence, private_tokens: int = 0) -> m.OpenSlot:
    last_n = sequence.sampling.repeat_last_n
    recent = sequence.prompt[-last_n:] if last_n else ()
    return m.OpenSlot(sequence.slot, sequence.sampling, recent, private_tokens)
