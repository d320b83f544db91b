"""Guesses at what comes next in an answer that copies: whatever followed the same tokens before.

Saxena, "Prompt Lookup Decoding", 2023. A step that computes guesses costs more than one without, so how
many are made follows how many were right.
"""

from __future__ import annotations

from collections.abc import Sequence

SAME = 4
"""Tokens that must be the same."""
MOST = 7
"""Guesses in a step. With 8 tokens it takes some three times as long as with one."""
_CAUTIOUS = 2
_LONGEST_WAIT = 64


class Lookup:
    """Of one sequence: its prompt, and its answer as it grows."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        """Where each run of `SAME` tokens was last followed by something."""
        self._size = MOST
        self._wait = self._misses = 0

    def guess(self, prompt: Sequence[int], answer: Sequence[int], most: int) -> tuple[int, ...]:
        """Up to `most` tokens that may follow. None while the last ones were wrong again and again."""
        self._read(prompt, answer)
        if self._wait:
            self._wait -= 1
            return ()
        at = self._after.get(tuple(self._tokens[-SAME:]))
        if at is None:
            return ()
        return tuple(self._tokens[at : at + min(most, self._size)])

    def learn(self, guessed: int, right: int) -> None:
        """How many of the last guesses were right."""
        if right:
            self._misses, self._size = 0, MOST
            return
        # Once may be the place where a copy differs; again and again it is none.
        self._size = _CAUTIOUS
        self._misses += 1
        self._wait = min(_LONGEST_WAIT, 2**self._misses - 2)

    def _read(self, prompt: Sequence[int], answer: Sequence[int]) -> None:
        tokens = self._tokens
        known = len(tokens)
        tokens += prompt[known:]
        tokens += answer[len(tokens) - len(prompt) :]
        for at in range(max(SAME, known), len(tokens)):
            self._after[tuple(tokens[at - SAME : at])] = at
