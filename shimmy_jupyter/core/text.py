"""From token bytes to text: characters are never split, stop strings never shown, and reasoning is
apart from the answer.
"""

from __future__ import annotations

import codecs

from ..types import Reasoning
from .reasoning import Part, ReasoningSplitter


class TextAssembler:
    """Turns the bytes of successive tokens into text that is safe to show.

    Bytes that do not complete a UTF-8 character wait for the ones that do; bytes that never can
    become U+FFFD. Without `reasoning` all text is the answer's.
    """

    def __init__(self, stop: tuple[str, ...] = (), reasoning: Reasoning | None = None) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stop = _StopFinder(stop)
        self._splitter = (
            None
            if reasoning is None
            else ReasoningSplitter(reasoning.markers, inside=reasoning.inside)
        )

    @property
    def stopped(self) -> bool:
        """Whether a stop string has been seen: everything further is dropped."""
        return self._stop.stopped

    @property
    def thinking(self) -> bool:
        """Whether what comes next is reasoning, as far as is known."""
        return self._splitter is not None and self._splitter.thinking

    def push(self, piece: bytes, *, as_is: bool = False) -> list[Part]:
        """Add a token's bytes; returns the texts that may be shown now. Where reasoning ends with
        it and nothing is to be shown, an empty text of reasoning.

        `as_is`: it is the answer's, and so is all that follows, whatever it looks like.
        """
        if as_is and self._splitter is not None:
            self._splitter = None  # with white space that it held back, which was before the answer
        text = self._decoder.decode(piece)
        if self._splitter is None:
            shown = self._stop.push(text)
            return [(False, shown)] if shown else []
        was_thinking = self._splitter.thinking
        parts = self._answered(self._splitter.push(text))
        if was_thinking and self._splitter.done and not any(not r for r, _ in parts):
            parts.append((True, ""))
        return parts

    def finish(self) -> list[Part]:
        """What was held back, at the end. The bytes of a cut-off character are not text: dropped."""
        parts = [] if self._splitter is None else self._answered(self._splitter.finish())
        held = self._stop.finish()
        return [*parts, (False, held)] if held else parts

    def _answered(self, parts: list[Part]) -> list[Part]:
        """Stop strings end the answer, not the reasoning before it."""
        found = [
            (reasoning, text if reasoning else self._stop.push(text)) for reasoning, text in parts
        ]
        return [(reasoning, text) for reasoning, text in found if text]


class _StopFinder:
    """Text that could be the beginning of a stop string waits until it is or is not."""

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = stop
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """What may be shown now; nothing any more after a stop string."""
        if self.stopped:
            return ""
        if not self._stop:
            return text
        text = self._held + text
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = self._could_begin_a_stop(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        held, self._held = self._held, ""
        return "" if self.stopped else held

    def _could_begin_a_stop(self, text: str) -> int:
        longest = max(len(stop) for stop in self._stop) - 1
        for size in range(min(longest, len(text)), 0, -1):
            tail = text[-size:]
            if any(stop.startswith(tail) for stop in self._stop):
                return size
        return 0
