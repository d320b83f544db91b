"""From token bytes to text: characters are never split, and stop strings never shown."""

from __future__ import annotations

import codecs


class TextAssembler:
    """Turns the bytes of successive tokens into text that is safe to show.

    Bytes that do not complete a UTF-8 character wait for the ones that do; bytes that never can
    become U+FFFD. Text that could be the beginning of a stop string waits until it is or is not.
    """

    def __init__(self, stop: tuple[str, ...] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stop = stop
        self._held = ""
        self.stopped = False

    def push(self, piece: bytes) -> str:
        """Add a token's bytes; returns the text that may be shown now, possibly empty.

        After a stop string has been seen, `stopped` is True and everything further is dropped.
        """
        if self.stopped:
            return ""
        text = self._decoder.decode(piece)
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
        """What was held back, at the end. The bytes of a cut-off character are not text: dropped."""
        held, self._held = self._held, ""
        return "" if self.stopped else held

    def _could_begin_a_stop(self, text: str) -> int:
        longest = max(len(stop) for stop in self._stop) - 1
        for size in range(min(longest, len(text)), 0, -1):
            tail = text[-size:]
            if any(stop.startswith(tail) for stop in self._stop):
                return size
        return 0
