"""How far a frame is, in one line that is shown at most ten times a second: with a bar in a notebook, as
plain text in a terminal. The last line stays. No widget is needed, and a saved notebook shows it, too.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Protocol, TextIO

from ..notebook.display import inert, one_line
from .run import Counts

EVERY = 0.1
"""Seconds from one update to the next, at least."""
_WIDEST = 118
"""Characters of a terminal's line."""


class Output(Protocol):
    def show(self, line: str, done: int, total: int) -> None: ...

    def end(self, line: str, done: int, total: int) -> None: ...


class Quiet:
    def show(self, line: str, done: int, total: int) -> None:
        pass

    def end(self, line: str, done: int, total: int) -> None:
        pass


class Terminal:
    """A line that is written over, where that can be done; else the last one only."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._live = stream, stream.isatty()
        self._length = 0

    def show(self, line: str, done: int, total: int) -> None:
        if self._live:
            self._write(line[:_WIDEST], "")

    def end(self, line: str, done: int, total: int) -> None:
        self._write(line, "\n")

    def _write(self, line: str, after: str) -> None:
        over = f"\r{line.ljust(self._length)}" if self._live else line
        self._length = len(line)
        self._stream.write(over + after)
        self._stream.flush()


class Html:
    """A display that is updated. `put` takes the bundle, and whether it is the first of its display."""

    def __init__(self, put: Callable[[dict[str, str], bool], None]) -> None:
        self._put, self._first = put, True

    def show(self, line: str, done: int, total: int) -> None:
        bar = f'<progress value="{done}" max="{max(total, 1)}" aria-label="rows"></progress> '
        html = f'<div class="shimmy-progress">{bar}<small>{inert(line)}</small></div>'
        self._put({"text/html": html, "text/plain": line}, self._first)
        self._first = False

    def end(self, line: str, done: int, total: int) -> None:
        self.show(line, done, total)


def displayed() -> Html:
    """In the output of the cell that is running. To be called, and shown first, in the kernel's thread."""
    from IPython.display import display, update_display

    id = f"shimmy-rows-{time.time_ns():x}"

    def put(bundle: dict[str, str], first: bool) -> None:  # noqa: FBT001
        if first:
            display(bundle, raw=True, display_id=id)  # type: ignore[no-untyped-call]
        else:
            update_display(bundle, raw=True, display_id=id)  # type: ignore[no-untyped-call]

    return Html(put)


class Progress:
    """`clock` is the job's. Shows itself once at its beginning."""

    def __init__(
        self,
        total: int,
        output: Output,
        label: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._output, self._label, self._clock = output, label, clock
        self._began = clock()
        self._next = self._began + EVERY
        self.counts = Counts(total)
        """As they were last heard of."""
        output.show(self._said(Counts(total), self._began), 0, total)

    def update(self, counts: Counts) -> None:
        self.counts = counts
        now = self._clock()
        if now >= self._next:
            self._next = now + EVERY
            self._output.show(self._said(counts, now), counts.done, counts.total)

    def end(self, note: str = "") -> None:
        """The line that stays. `note` says why not all is done, where that is so."""
        counts = self.counts
        seconds = self._clock() - self._began
        parts = [
            f"{self._label}{note}: {counts.done} of {counts.total} rows"
            if note
            else f"{self._label}{counts.total} rows",
            f"in {span(seconds)}",
            *_rates(counts, seconds),
            *_tallies(counts),
        ]
        self._output.end(one_line(" · ".join(parts)), counts.done, counts.total)

    def _said(self, counts: Counts, now: float) -> str:
        seconds = now - self._began
        share = f"{100 * counts.done // counts.total}%" if counts.total else ""
        parts = [f"{self._label}{counts.done} of {counts.total} rows", *filter(None, [share])]
        if counts.waiting:
            left = max(0, math.ceil(counts.until - now))
            again = f"asking again in {span(left)}" if left else "asking again"
            parts.append(f"{counts.waiting}: {again}, {counts.at_once} at once")
        parts += _rates(counts, seconds)
        if counts.asked and counts.done < counts.total:
            # What came without being asked says nothing about the rest.
            parts.append(f"{span((counts.total - counts.done) * seconds / counts.asked)} left")
        return one_line(" · ".join([*parts, *_tallies(counts)]))


def _rates(counts: Counts, seconds: float) -> list[str]:
    if not counts.asked or seconds <= 0:
        return []
    rate = counts.asked / seconds
    found = [f"{rate:.0f} rows/s" if rate >= 100 else f"{rate:.3g} rows/s"]
    return [*found, f"{counts.tokens / seconds:.0f} tokens/s"] if counts.tokens else found


def _tallies(counts: Counts) -> list[str]:
    named = {
        "from the cache": counts.cached,
        "the same as another": counts.repeated,
        "kept": counts.kept,
        "left out": counts.left_out,
        "cut off at max_tokens": counts.cut_off,
        "without an answer": counts.errors,
    }
    return [f"{number} {name}" for name, number in named.items() if number]


def span(seconds: float) -> str:
    """A time for people."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, rest = divmod(whole, 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"
