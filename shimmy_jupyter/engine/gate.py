"""When an answer's constraint begins, where the model may reason first.

A constraint is for the answer alone. Until it begins a token is chosen freely, or to begin the
reasoning, or to write the rest of a marker. All of that is decided here, token by token; nothing here
knows of logits.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable
from dataclasses import dataclass

from ..core.reasoning import ReasoningSplitter
from ..types import Reasoning


@dataclass(frozen=True, slots=True)
class Choice:
    """What may come next: `extra` tokens, beside what the constraint allows where it is
    `constrained`; anything but an end where it is `free`.
    """

    constrained: bool = True
    free: bool = False
    extra: frozenset[int] = frozenset()


class Gate:
    """Of one sequence. `encode` gives the tokens of a marker; `blank` are the tokens of nothing but
    white space, of which one may stand between a marker and the answer.
    """

    def __init__(
        self, reasoning: Reasoning, encode: Callable[[str], tuple[int, ...]], blank: frozenset[int]
    ) -> None:
        markers = reasoning.markers
        self.open = False
        """Whether the constraint alone says what comes next, from now on."""
        self._openings = [tokens for text in markers.opening if (tokens := encode(text))]
        self._blank = blank
        self._end = markers.end
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._splitter = ReasoningSplitter(markers, inside=reasoning.inside)
        start = encode(markers.start)
        self._branches = [] if reasoning.inside or not start else [start, *self._openings]
        """The markers that may be written next, of which so many tokens are taken already."""
        self._taken = 0
        self._tail = ""
        self._just_ended = False

    def choice(self) -> Choice:
        if self._splitter.thinking:
            return Choice(constrained=False, free=True)
        rest = frozenset(branch[self._taken] for branch in self._branches)
        if self._taken:
            return Choice(constrained=False, extra=rest)
        return Choice(extra=rest | self._blank if self._just_ended else rest)

    def overshoots(self, piece: bytes) -> bool:
        """Whether the reasoning would end within this token, and the answer begin unchecked."""
        if not self._splitter.thinking:
            return False
        state = self._decoder.getstate()
        text = self._tail + self._decoder.decode(piece)
        self._decoder.setstate(state)
        at = text.find(self._end)
        return at >= 0 and bool(text[at + len(self._end) :].strip())

    def accept(self, token: int, piece: bytes, *, constrained: bool) -> None:
        """Take the token that was chosen. `constrained`: it is the constraint's."""
        if constrained:
            self.open = True
            return
        text = self._decoder.decode(piece)
        was_thinking = self._splitter.thinking
        self._splitter.push(text)
        if not was_thinking:
            self._walk(token)
            return
        self._tail = (self._tail + text)[-len(self._end) :]
        if self._splitter.done:
            self._branches, self._just_ended = list(self._openings), True

    def _walk(self, token: int) -> None:
        """One token further in a marker, or white space after the reasoning."""
        self._just_ended = False
        self._branches = [branch for branch in self._branches if branch[self._taken] == token]
        self._taken += 1
        if not self._branches or any(len(branch) == self._taken for branch in self._branches):
            self._branches, self._taken = [], 0
            self.open = not self._splitter.thinking
