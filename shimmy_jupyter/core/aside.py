"""A long prompt beside sequences that decode: in a context of its own, held where its time is over.

Slices of a prompt in the steps of others have to be small to keep those steps short, and far into a
prompt small slices cost a multiple: an attention kernel that goes over all cells for each row instead of
once for a tile of them. A context of its own reads in tiles. What it computes is held between two nodes
of its graph as often as others are to have a step, so that its slices need not fit between two tokens.
Splitting prefill from decoding is known from servers with machines for each (Zhong et al., DistServe, OSDI
2024); here both have the same processors, in turn.
"""

from __future__ import annotations

from dataclasses import replace

from . import messages as m
from .pace import TILE, Pace
from .sequence import Sequence, State

_MOST_TILES = 2
"""In a slice. A node of the graph takes the longer the more there are, and is not held halfway."""


class Aside:
    """At most one prompt at a time. It stays the same one until it is read, or nobody decodes."""

    def __init__(self, pace: Pace, least: int) -> None:
        self._pace = pace
        self._least = least
        self._sequence: Sequence | None = None
        self._slice: m.Aside | None = None
        """What has begun."""
        self._making = False

    def current(self) -> Sequence | None:
        """The one whose prompt is being read; one that has moved on since is forgotten."""
        if self._sequence is not None and self._sequence.state is not State.PREFILL:
            self.stop()
        return self._sequence

    def begun(self) -> bool:
        """Whether a slice has begun and is not done."""
        return self.current() is not None and self._slice is not None

    def unfinished(self, sequence: Sequence) -> int:
        """Tokens of its slice that has begun and is not done, also where it has just been given up."""
        return len(self._slice.tokens) if self._sequence is sequence and self._slice else 0

    def suits(self, sequence: Sequence, left: int) -> bool:
        """Whether `left` tokens of its prompt are better read aside, with one of them for a step."""
        return 0 < self._least <= left and not sequence.scores_prompt and not sequence.aside_refused

    def start(self, sequence: Sequence) -> None:
        self._sequence, self._making = sequence, True

    def stop(self) -> None:
        """What is left of the prompt goes into steps."""
        self._sequence = self._slice = None

    def part(self, rows: int, waiting: int) -> m.Aside:
        """The slice that has begun, or the next one, with its time in a step beside so many rows."""
        sequence = self._sequence
        assert sequence is not None
        seconds = self._pace.aside_seconds(rows, waiting)
        if self._slice is not None:
            self._slice = replace(self._slice, seconds=seconds, making=self._making)
            return self._slice
        # The last token is left to a step, for its logits.
        start, end = sequence.cached, len(sequence.prompt) - 1
        # What is no whole tile costs a multiple.
        usual = TILE if self._pace.asides_are_late() else _MOST_TILES * TILE
        take = usual if end - start >= usual + TILE else end - start
        tokens = sequence.prompt[start : start + take]
        self._slice = m.Aside(sequence.slot, start, tokens, seconds, end, self._making)
        return self._slice

    def took(self, asked: m.Aside, read: m.AsideRead) -> None:
        """What a step's time was enough for."""
        self._making = read.making
        self._pace.observe_aside(asked.seconds, read.seconds)
        if self._sequence is None or self._slice is not asked:
            return
        if read.refused:
            self._sequence.aside_refused = True
        elif read.done:
            self._sequence.cached += len(asked.tokens)
            self._slice = None
        if read.refused or (read.done and asked.last):
            self.stop()
