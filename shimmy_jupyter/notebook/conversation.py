"""What a notebook has asked and been answered, so that the next prompt can go on from there."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

_MOST = 200
"""Exchanges that are remembered."""
_MOST_CHARACTERS = 1 << 20
"""Of all of them together; the oldest go first."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """`cell` is the id of the cell that asked, where the front end says it."""

    prompt: str
    answer: str
    cell: str | None = None

    @property
    def size(self) -> int:
        return len(self.prompt) + len(self.answer)

    def messages(self) -> list[dict[str, str]]:
        return [
            {"role": "user", "content": self.prompt},
            {"role": "assistant", "content": self.answer},
        ]


class Conversation:
    """Of one kernel. A cell that is run again answers from what came before it, and not from its own
    earlier answer, which its new one replaces.
    """

    def __init__(self) -> None:
        self._exchanges: deque[Exchange] = deque()

    def __len__(self) -> int:
        return len(self._exchanges)

    def __iter__(self) -> Iterator[Exchange]:
        """The oldest first."""
        return iter(tuple(self._exchanges))

    def before(self, cell: str | None, count: int) -> list[Exchange]:
        """The last `count` exchanges that a prompt of this cell goes on from, the oldest first."""
        found = list(self._exchanges)
        place = self._place(cell)
        if place is not None:
            found = found[:place]
        return found[-count:] if count > 0 else []

    def add(self, exchange: Exchange) -> None:
        """An empty answer leaves nothing to go on from."""
        if not exchange.answer:
            return
        place = self._place(exchange.cell)
        if place is None:
            self._exchanges.append(exchange)
        else:
            self._exchanges[place] = exchange
        while len(self._exchanges) > _MOST or (
            len(self._exchanges) > 1 and sum(e.size for e in self._exchanges) > _MOST_CHARACTERS
        ):
            self._exchanges.popleft()

    def reset(self) -> int:
        """Forget all of them; how many there were."""
        count = len(self._exchanges)
        self._exchanges.clear()
        return count

    def _place(self, cell: str | None) -> int | None:
        if cell is None:
            return None
        return next((i for i, one in enumerate(self._exchanges) if one.cell == cell), None)
