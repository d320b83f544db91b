"""Which tokens need not be computed again: longest common prefixes with what the cache holds.

A principal finds only its own sequences, and of others' no more than what an administrator declared
public; a cache shared further would tell one user what another has asked.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

Tokens = tuple[int, ...]
Owner = tuple[str, str]
"""A principal and an adapter: with another adapter the same tokens have other keys and values."""

_SAME = 0.99
"""Of an entry: what has to be elsewhere, too. To compute the rest costs as much as to move all of it."""
MIN_SHARED = 32
"""Fewer tokens are not worth looking after."""


@dataclass(slots=True, eq=False)
class Entry:
    """KV that somebody left: in a slot of the cache, or saved in host memory under a key. `since` is how
    many rows had been computed when it was last of use.
    """

    place: int
    owner: Owner
    tokens: Tokens
    used: int = 0
    since: int = 0
    copy: int | None = None
    """The key under which it was saved last."""

    @property
    def size(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, slots=True)
class Match:
    """`tokens` of a prompt are at `place`: a slot, or a key of saved KV.

    `entry` is None where the slot belongs to a sequence that is running.
    """

    tokens: int
    place: int
    saved: bool = False
    entry: Entry | None = None


def common(a: Tokens, b: Tokens) -> int:
    """Length of the longest common prefix."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    # Slices compare at C's speed: halving beats a loop over thousands of tokens.
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low


class PrefixCache:
    """Entries by place, and what of them a prompt may use. Sizes in tokens."""

    def __init__(self, *, whole: bool) -> None:
        """`whole`: an entry can only be used in full, as it cannot be cut short."""
        self.public: tuple[Tokens, ...] = ()
        self.kept: dict[int, Entry] = {}
        self.saved: dict[int, Entry] = {}
        self.unsure: set[int] = set()
        """Keys of what is saved only if there is memory for it."""
        self._whole = whole
        self._moment = 0
        self._keys = 0

    @property
    def kept_tokens(self) -> int:
        return sum(entry.size for entry in self.kept.values())

    @property
    def saved_tokens(self) -> int:
        return sum(entry.size for entry in self.saved.values())

    def keep(self, slot: int, owner: Owner, tokens: Tokens, since: int = 0) -> None:
        self.kept[slot] = self._touch(Entry(slot, owner, tokens, since=since))

    def save(self, entry: Entry) -> Entry:
        """A copy of a kept entry in host memory, under a new key."""
        self._keys += 1
        saved = Entry(self._keys, entry.owner, entry.tokens, entry.used, entry.since)
        self.saved[self._keys] = saved
        self.unsure.add(self._keys)
        entry.copy = self._keys
        return saved

    def has_copy(self, entry: Entry) -> bool:
        return entry.copy in self.saved

    def touch(self, match: Match) -> None:
        if match.entry is not None:
            self._touch(match.entry)

    def is_elsewhere(self, entry: Entry) -> bool:
        """Whether nearly all of it is in another entry of the same owner too."""
        size = entry.size if self._whole else math.ceil(_SAME * entry.size)
        head = entry.tokens[:size]
        return any(
            other.size >= size
            and other.tokens[size - 1] == head[-1]
            and other is not entry
            and other.owner == entry.owner
            and other.tokens[:size] == head
            for other in self._all()
        )

    def outgrown(self, entry: Entry) -> list[Entry]:
        """What is saved of the same owner that an entry is a continuation of, and so as good as."""
        if self._whole:
            return []
        return [
            other
            for other in self.saved.values()
            if other.owner == entry.owner and entry.tokens[: other.size] == other.tokens
        ]

    def match(
        self, prompt: Tokens, owner: Owner, live: Iterable[tuple[int, Owner, Tokens]]
    ) -> Match | None:
        """The longest part of a prompt that is somewhere, or None where it is not worth it.

        `live` are slots of running sequences, their owners and the tokens they have computed. The
        prompt's last token is never part of it: its logits are still needed.
        """
        usable = prompt[:-1]
        public = max((common(usable, prefix) for prefix in self.public), default=0)
        best: Match | None = None
        for candidate, theirs, tokens in self._candidates(live):
            length = common(usable, tokens)
            if theirs[1] != owner[1]:
                continue
            if theirs != owner:
                length = min(length, public)
            if length < MIN_SHARED or (self._whole and length < len(tokens)):
                continue
            if best is None or length > best.tokens:
                best = Match(length, candidate.place, candidate.saved, candidate.entry)
        return best

    def _candidates(
        self, live: Iterable[tuple[int, Owner, Tokens]]
    ) -> Iterator[tuple[Match, Owner, Tokens]]:
        """Cheapest first, so that of equals the cheapest wins: kept, running, saved."""
        for entry in self.kept.values():
            yield Match(0, entry.place, entry=entry), entry.owner, entry.tokens
        for slot, owner, tokens in live:
            yield Match(0, slot), owner, tokens
        for entry in self.saved.values():
            if entry.place not in self.unsure:
                yield Match(0, entry.place, saved=True, entry=entry), entry.owner, entry.tokens

    def _all(self) -> Iterator[Entry]:
        yield from self.kept.values()
        yield from self.saved.values()

    def _touch(self, entry: Entry) -> Entry:
        self._moment += 1
        entry.used = self._moment
        return entry
