"""How long KV that nobody uses is worth its place in the cache.

On a processor each row of a step looks past all cells that are taken, whosever they are: 12,000 of them make
a token of a small model take a quarter longer. There are two ways out, each with its price in such rows: to
move the cells to host memory and back costs about a hundred, to compute them again about a hundred times as
much. Whoever waits until a price has been paid in rows has at no time spent more than twice as much as
somebody who knows what will come (ski rental; Karlin, Manasse, Rudolph and Sleator, Algorithmica 1988).

Of what some leave much is taken up again, as a conversation is; of what others leave nothing, as with
the rows of a table. So the second price is by how often that has been so for their owner.
"""

from __future__ import annotations

from collections import deque

from .prefix import Owner, Tokens

IDLE_ROWS = 128
"""Of a small model a cell costs each row 0.3 µs, and to be moved out and back 20 to 80 µs."""
_AGAIN = 125
"""Times as much to compute a cell again: 5 ms."""
_LEFT, _TAKEN_UP = 0.05, 0.5
"""Of the way to 0 at each sequence that is left, and to 1 at each that is gone on from."""
_WORTH_SAVING = 1 / 16
"""Memory that is new to a process costs ten times the copy: then to compute a cell again is some sixteen times as
much as to save it.
"""
_OWNERS = 1000


class Idleness:
    """`rows` is what moving costs; 0: nothing lies in anybody's way."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self._worth: dict[Owner, float] = {}
        self._gone: dict[Owner, deque[tuple[int, int]]] = {}
        """Of what was dropped last: half its length, and a hash of that half."""

    def left(self, owner: Owner) -> None:
        """A sequence has ended, and what it computed is kept."""
        self._set(owner, self.worth(owner) * (1 - _LEFT))

    def taken_up(self, owner: Owner) -> None:
        """Another goes on from most of it."""
        self._set(owner, self.worth(owner) + _TAKEN_UP * (1 - self.worth(owner)))

    def dropped(self, owner: Owner, tokens: Tokens) -> None:
        """Who asks for it again tells as much as if it were still there; else nothing ever could."""
        half = len(tokens) // 2
        self._gone.setdefault(owner, deque(maxlen=8)).append((half, hash(tokens[:half])))
        if len(self._gone) > _OWNERS:
            del self._gone[next(iter(self._gone))]

    def asked(self, owner: Owner, prompt: Tokens) -> None:
        """A prompt has come, perhaps for something that was dropped."""
        gone = self._gone.get(owner, deque())
        for size, beginning in gone:
            if len(prompt) > size and hash(prompt[:size]) == beginning:
                gone.remove((size, beginning))
                self.taken_up(owner)
                return

    def worth(self, owner: Owner) -> float:
        """From 0 to 1: of what the owner leaves, how much is taken up again. 1 until something is known."""
        return self._worth.get(owner, 1.0)

    def staleness(self, owner: Owner, idle: int) -> float:
        """What has the most is missed least: rows since it was of use, by the owner's worth."""
        return (idle + 1) / max(self.worth(owner), 1e-9)

    def worth_saving(self, owner: Owner) -> bool:
        """Whether enough of what the owner leaves is taken up again to be copied to host memory."""
        return self.worth(owner) >= _WORTH_SAVING

    def to_move(self, idle: int) -> bool:
        """Whether it is time, after so many rows."""
        return 0 < self.rows <= idle

    def to_drop(self, owner: Owner, idle: int) -> bool:
        return self.to_move(idle) and idle >= _AGAIN * self.rows * self.worth(owner)

    def _set(self, owner: Owner, worth: float) -> None:
        self._worth.pop(owner, None)
        self._worth[owner] = worth
        if len(self._worth) > _OWNERS:
            del self._worth[next(iter(self._worth))]  # who was not heard of for longest
