"""Which texts to embed in the next call, and how much of them."""

from __future__ import annotations

from collections.abc import Sequence

from .messages import Row


class Packing:
    """Of one request's `inputs`, in order; each fits `batch_tokens`, unless they are `divisible`: then
    a call may hold a part of one alone, which the next call goes on with, in the same slot.
    """

    def __init__(
        self,
        inputs: Sequence[tuple[int, ...]],
        *,
        batch_tokens: int,
        sequences: int,
        divisible: bool = False,
    ) -> None:
        self._inputs = inputs
        self._batch_tokens, self._sequences = batch_tokens, sequences
        self._divisible = divisible
        self._at = 0
        self._done = 0
        """Tokens of the next input that former calls have had."""
        self._slot = 0
        """Where they are."""

    @property
    def whole(self) -> bool:
        """Whether the next call begins with an input that no other has begun."""
        return self._done == 0

    def next(self, budget: int) -> tuple[Row, ...]:
        """The rows of a call of about `budget` tokens: at least one input, or a token of it where that
        is divisible. None at the end. A row with `sample` ends its input.
        """
        room = min(self._batch_tokens, max(1, budget))
        rows: list[Row] = []
        free = [s for s in range(self._sequences) if self.whole or s != self._slot]
        while self._at < len(self._inputs) and (self._done or free):
            tokens, start = self._inputs[self._at], self._done
            left = len(tokens) - start
            take = min(left, room) if self._divisible else left
            if take <= 0 or (rows and (take > room or take < left)):
                break
            room -= take
            if not start:
                self._slot = free.pop(0)
            ends = take == left
            rows.append(Row(self._slot, start, tokens[start : start + take], ends))
            self._at, self._done = (self._at + 1, 0) if ends else (self._at, start + take)
        return tuple(rows)
