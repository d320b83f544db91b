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
    """`cell` is the id of the cell that asked, and `run` that of its execution, where the front end says
    them.
    """

    prompt: str
    answer: str
    cell: str | None = None
    run: str | None = None

    @property
    def size(self) -> int:
        return len(self.prompt) + len(self.answer)

    def messages(self) -> list[dict[str, str]]:
        return [
            {"role": "user", "content": self.prompt},
            {"role": "assistant", "content": self.answer},
        ]


class Conversation:
    """Of one kernel. A cell that is run again answers from what came before it, and not from the answers of
    its earlier run, which its new ones replace where they stood. Questions of one run, as in a loop, go on
    from one another.
    """

    def __init__(self) -> None:
        self._exchanges: deque[Exchange] = deque()

    def __len__(self) -> int:
        return len(self._exchanges)

    def __iter__(self) -> Iterator[Exchange]:
        """The oldest first."""
        return iter(tuple(self._exchanges))

    def before(self, cell: str | None, run: str | None, count: int) -> list[Exchange]:
        """The last `count` exchanges that a prompt of this run of the cell goes on from, the oldest first."""
        found = list(self._exchanges)[: self._place(cell, run)]
        return found[-count:] if count > 0 else []

    def add(self, exchange: Exchange) -> None:
        """An empty answer leaves nothing to go on from, and nothing to replace another by."""
        if not exchange.answer:
            return
        cell, run = exchange.cell, exchange.run
        place = self._place(cell, run)
        said = list(self._exchanges)
        kept = [one for one in said[place:] if cell is None or one.cell != cell]
        self._exchanges = deque([*said[:place], exchange, *kept])
        while len(self._exchanges) > _MOST or (
            len(self._exchanges) > 1 and sum(e.size for e in self._exchanges) > _MOST_CHARACTERS
        ):
            self._exchanges.popleft()

    def reset(self) -> int:
        """Forget all of them; how many there were."""
        count = len(self._exchanges)
        self._exchanges.clear()
        return count

    def _place(self, cell: str | None, run: str | None) -> int:
        """Where the next of this run belongs: behind its last, else where the earlier run began, else last."""
        said = list(enumerate(self._exchanges)) if cell is not None else []
        own = [at for at, one in said if one.cell == cell]
        same = [at for at, one in said if (one.cell, one.run) == (cell, run)]
        return same[-1] + 1 if same else own[0] if own else len(self._exchanges)
