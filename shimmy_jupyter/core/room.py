"""Slots and KV cells: who has them, what is kept for later, and who may have more.

Running sequences have their whole reservation (prompt + max_tokens) set aside. What ended sequences
leave is kept while there is room, then saved to host memory least recently used first, then dropped.
Shared cells are counted for each who shares them, so what is promised is always there.
What has lain there for long is in everybody's way, and goes sooner (`idleness`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from . import messages as m
from .idleness import Idleness
from .prefix import MIN_SHARED, Entry, Match, Owner, PrefixCache, Tokens
from .sequence import Sequence

_SLOT_SHARE = 4
_KV_SHARE = 3
"""A principal with something running may have so many times what is left free (dynamic thresholds,
Choudhury and Hahne, IEEE/ACM Transactions on Networking 1998). So a newcomer finds room."""


def running_limit(sequences: int) -> int:
    """Sequences of all principals together: a quarter more than any one may have."""
    return sequences + max(1, sequences // _SLOT_SHARE)


class Room:
    """`place` and `release` say what the backend has to do; nothing else changes what they own."""

    def __init__(self, capacity: m.Capacity) -> None:
        self.capacity = capacity
        self.prefixes = PrefixCache(whole=not capacity.can_trim)
        self.running: dict[int, Sequence] = {}
        """By slot, without the one in the private slot."""
        self.free_slots = list(range(capacity.slots - 1, -1, -1))
        self.reserved_tokens = 0
        self.computed = 0
        """Rows of steps so far."""
        self._look_at = 0
        self._moved_at = self._moved = 0
        self.idleness = Idleness(capacity.idle_rows if capacity.can_copy else 0)
        self._theirs: dict[str, tuple[int, int]] = {}
        """Running sequences of each principal that has any, and what they have reserved."""
        self.limit = min(capacity.slots, running_limit(capacity.sequences))

    # Questions

    def refuses(self, sequence: Sequence) -> str | None:
        """Why its principal may have no more at the moment; None if it may."""
        theirs = self._theirs.get(sequence.principal)
        if theirs is None:
            return None
        count, tokens = theirs
        free = self.limit - len(self.running)
        if count >= min(self.capacity.sequences, _SLOT_SHARE * free):
            return f"{count} requests of yours are running, as many as one may have now"
        left = self.capacity.kv_tokens - self.reserved_tokens - sequence.reserved
        if tokens + sequence.reserved > _KV_SHARE * left:
            return "your running requests have as much of the KV cache as one may have now"
        return None

    def count(self, principal: str) -> int:
        """Its running sequences."""
        return self._theirs.get(principal, (0, 0))[0]

    def lacks(self, sequence: Sequence) -> str | None:
        """What is not free that the sequence needs, though everything kept were dropped."""
        if len(self.running) >= self.limit:
            return "all places in the batch are taken"
        if self.reserved_tokens + sequence.reserved > self.capacity.kv_tokens:
            return "the KV cache has no room for its prompt and max_tokens yet"
        return None

    def reusable(self, prompt: Tokens, owner: Owner) -> int:
        """How many tokens of a prompt are there already, as far as that can be told before it is placed."""
        match = self.prefixes.match(prompt, owner, self._live())
        return match.tokens if match is not None else 0

    # Changes

    def place(self, sequence: Sequence, others: int = 0) -> list[m.Instruction]:
        """Give a slot and KV room, with as much of the prompt as is there already. So many `others` are
        about to come, each with about as many rows.
        """
        match = None
        self.idleness.asked(sequence.owner, sequence.prompt)
        if not sequence.scores_prompt:
            match = self.prefixes.match(sequence.prompt, sequence.owner, self._live())
        if match is not None and not self._usable(match, sequence):
            match = None
        out: list[m.Instruction] = []
        if match is not None and self._takes_over(match):
            sequence.slot = match.place
            del self.prefixes.kept[match.place]
            self._make_room(sequence.reserved, None, out)
        else:
            source = match.entry if match is not None else None
            whole = source.size if match is not None and match.saved and source is not None else 0
            shared = match.tokens if match is not None else 0
            # Its own cells would lie behind, and what is left free later is looked past as well.
            self._move_idle((sequence.reserved - 1) * (1 + others) - shared, source, out)
            self._make_room(max(sequence.reserved, whole), source, out)
            sequence.slot = self._empty_slot(source, out)
        if match is not None:
            self.prefixes.touch(match)
            if match.entry is not None:
                match.entry.since = self.computed
                if 2 * match.tokens >= match.entry.size:
                    self.idleness.taken_up(match.entry.owner)
            sequence.cached = sequence.reused = match.tokens
            out += self._fill(sequence.slot, match)
        self.running[sequence.slot] = sequence
        self._account(sequence, 1)
        return out

    def release(self, sequence: Sequence, *, keep: bool) -> m.CloseSlot:
        """Take a sequence's slot and room back, keeping what is worth it."""
        del self.running[sequence.slot]
        self._account(sequence, -1)
        size = sequence.cached if keep and sequence.cached >= MIN_SHARED else 0
        if size:
            self.prefixes.keep(sequence.slot, sequence.owner, sequence.computed(), self.computed)
            self.idleness.left(sequence.owner)
        else:
            self.free_slots.append(sequence.slot)
        return m.CloseSlot(sequence.slot, size)

    def move_out(self, out: list[m.Instruction]) -> None:
        """Move what has lain idle for too long to host memory, where there is room, or drop it."""
        if not self.idleness.rows or self.computed < self._look_at:
            return
        self._look_at = self.computed + self.idleness.rows // 4  # to look costs something, too
        self._move_idle(0, None, out)

    def write_back(self) -> list[m.Instruction]:
        """Copy to host memory what is nowhere else, a batch at a time: called while nobody waits for it, so
        that whoever comes has only to drop it. What is long stays: it grows, and all of it would be
        copied again after each answer.
        """
        out: list[m.Instruction] = []
        left = self.capacity.batch_tokens if self.idleness.rows else 0
        for entry in self.prefixes.kept.values():
            if entry.size <= left and not self.prefixes.is_elsewhere(entry):
                left -= entry.size * self._save(entry, out, None, self._is_over)
        return out

    def settle(self, unsaved: tuple[int, ...]) -> None:
        """What was to be saved is, but for what had no memory under these keys: that is computed again."""
        for key in unsaved:
            self.prefixes.saved.pop(key, None)
        self.prefixes.unsure.clear()

    def _move_idle(self, rows: int, source: Entry | None, out: list[m.Instruction]) -> None:
        """Move out what will have lain idle for too long when so many further rows have been computed."""
        has_room = True
        for entry in list(self.prefixes.kept.values()):
            idle = self.computed - entry.since + rows
            if entry is source or not self.idleness.to_move(idle):
                continue
            gone = self.prefixes.has_copy(entry)
            worth_saving = self.idleness.worth_saving(entry.owner)
            if not gone and has_room and worth_saving:
                gone = has_room = self._copy_out(entry, source, out)
            # What is worth it may find room later.
            paid = idle - rows if worth_saving else idle
            if not gone and self.idleness.to_drop(entry.owner, paid):
                self.idleness.dropped(entry.owner, entry.tokens)
                gone = True
            if gone:
                self.free_slots.append(self._drop(entry, out))

    def _copy_out(self, entry: Entry, source: Entry | None, out: list[m.Instruction]) -> bool:
        """To host memory, if there is room without what is missed more than it; before one step no more than
        a batch, so that nobody waits for it for long.
        """
        if self._moved_at != self.computed:
            self._moved_at, self._moved = self.computed, 0
        if self._moved >= self.capacity.batch_tokens:
            return False
        self._moved += entry.size
        return self._save(entry, out, source, self._is_over)

    def _is_over(self, entry: Entry) -> bool:
        return self.idleness.to_drop(entry.owner, self.computed - entry.since)

    def _save(
        self,
        entry: Entry,
        out: list[m.Instruction],
        source: Entry | None,
        may_go: Callable[[Entry], bool],
    ) -> bool:
        """Copy it to host memory, dropping there what may go, but not `source`. False where that is not
        enough, or where it is not worth it; nothing is copied that is nearly all elsewhere, too.
        """
        if self.prefixes.is_elsewhere(entry):
            return True
        if not self.idleness.worth_saving(entry.owner):
            return False
        cap, saved = self.capacity.saved_tokens, self.prefixes.saved
        needed = source.size if source is not None and source in saved.values() else 0
        if entry.size + needed > cap:
            return False
        going = [other for other in self.prefixes.outgrown(entry) if other is not source]
        over = self.prefixes.saved_tokens + entry.size - cap - sum(other.size for other in going)
        if over > 0:
            for other in sorted(
                (o for o in saved.values() if o is not source and o not in going and may_go(o)),
                key=lambda o: (-self._stale(o), o.used),
            ):
                going.append(other)
                over -= other.size
                if over <= 0:
                    break
        if over > 0:
            return False
        for other in going:
            del saved[other.place]
            out.append(m.DropSaved(other.place))
        out.append(m.SaveSlot(entry.place, self.prefixes.save(entry).place))
        return True

    def _account(self, sequence: Sequence, sign: int) -> None:
        self.reserved_tokens += sign * sequence.reserved
        count, tokens = self._theirs.pop(sequence.principal, (0, 0))
        if count + sign:
            now = count + sign, tokens + sign * sequence.reserved
            self._theirs[sequence.principal] = now

    def _live(self) -> Iterator[tuple[int, Owner, Tokens]]:
        if self.capacity.can_copy:
            for slot, sequence in self.running.items():
                # Where nothing can be cut short, a copy of what goes on growing is of no use.
                if self.capacity.can_trim and sequence.cached >= MIN_SHARED:
                    yield slot, sequence.owner, sequence.computed()

    def _usable(self, match: Match, sequence: Sequence) -> bool:
        """Whether the match can be had together with the reservation."""
        if match.entry is None or self._takes_over(match):
            return True
        left = self.capacity.kv_tokens - self.reserved_tokens
        if match.saved:
            # It is restored whole before it is cut short.
            return match.entry.size <= left
        spare_slot = len(self.running) + 1 < self.capacity.slots
        return (
            self.capacity.can_copy and spare_slot and match.entry.size + sequence.reserved <= left
        )

    def _takes_over(self, match: Match) -> bool:
        """Go on in the slot itself rather than in a copy: where little of it would be lost."""
        if match.entry is None or match.saved:
            return False
        return not self.capacity.can_copy or 2 * match.tokens >= match.entry.size

    def _fill(self, slot: int, match: Match) -> Iterator[m.Instruction]:
        if match.saved:
            yield m.RestoreSlot(match.place, slot)
        elif match.place != slot:
            yield m.CopyPrefix(match.place, slot, match.tokens)
            return
        if match.entry is not None and match.tokens < match.entry.size:
            yield m.TrimSlot(slot, match.tokens)

    def _make_room(self, tokens: int, source: Entry | None, out: list[m.Instruction]) -> None:
        """Evict what is kept, but not `source`, which is about to be used, until there is room."""
        left = self.capacity.kv_tokens - self.reserved_tokens - tokens
        while self.prefixes.kept_tokens > left:
            self.free_slots.append(self._evict(source, out))

    def _empty_slot(self, source: Entry | None, out: list[m.Instruction]) -> int:
        return self.free_slots.pop() if self.free_slots else self._evict(source, out)

    def _evict(self, source: Entry | None, out: list[m.Instruction]) -> int:
        """Empty the slot that is least worth keeping, saving its KV where that is worth it."""
        entry = self._stalest(self.prefixes.kept, source)
        assert entry is not None, "there is always room for what may be admitted"
        own = self._stale(entry)
        if not self._save(entry, out, source, lambda other: self._stale(other) >= own):
            self.idleness.dropped(entry.owner, entry.tokens)
        return self._drop(entry, out)

    def _stale(self, entry: Entry) -> float:
        return self.idleness.staleness(entry.owner, self.computed - entry.since)

    def _stalest(self, entries: dict[int, Entry], spare: Entry | None = None) -> Entry | None:
        """What is least worth keeping, of equals what was used least recently; but not `spare`."""
        return min(
            (entry for entry in entries.values() if entry is not spare),
            key=lambda entry: (-self._stale(entry), entry.used),
            default=None,
        )

    def _drop(self, entry: Entry, out: list[m.Instruction]) -> int:
        del self.prefixes.kept[entry.place]
        out.append(m.TrimSlot(entry.place, 0))
        return entry.place

    def check_invariants(self) -> None:
        cap = self.capacity
        slots = [*self.running, *self.prefixes.kept, *self.free_slots]
        assert sorted(slots) == list(range(cap.slots))
        assert len(self.running) <= self.limit
        assert self.reserved_tokens == sum(s.reserved for s in self.running.values())
        assert self.reserved_tokens + self.prefixes.kept_tokens <= cap.kv_tokens
        assert self.prefixes.saved_tokens <= cap.saved_tokens
        for slot, entry in self.prefixes.kept.items():
            assert entry.place == slot
            assert entry.size >= MIN_SHARED
