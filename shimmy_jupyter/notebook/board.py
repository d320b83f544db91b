"""Where commands show what they have found: tables, and how far long work is."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

from IPython.display import display, update_display

from ..errors import from_code
from .client import Transport
from .display import inert, one_line

_POLL = 0.2


class Board:
    """One output that changes, or lines in a terminal, of which those that only count on are left out."""

    def __init__(self, *, rich: bool) -> None:
        self._rich = rich
        self._id: str | None = None
        self._stage = ""

    def show(self, text: str, page: str) -> None:
        """A text, and the same as HTML; each time in place of the last."""
        if self._rich:
            self._display({"text/plain": text, "text/html": page})
        elif (stage := text.partition(": ")[0]) != self._stage:
            self._stage = stage
            print(text)

    def say(self, *lines: str) -> None:
        """Lines of text; what is in them is shown and does nothing."""
        shown = [one_line(line) for line in lines]
        self.show("\n".join(shown), "".join(f"<p>{inert(line)}</p>" for line in shown))

    def table(self, rows: Sequence[Sequence[object]], caption: str = "") -> None:
        """The first row is the head. A cell is one line: names and errors come from files."""
        lines = [tuple(one_line(str(cell)) for cell in row) for row in rows]
        said = one_line(caption)
        plain = _plain(lines)
        self.show(f"{said}\n\n{plain}" if said else plain, _table(lines, said))

    def _display(self, bundle: dict[str, str]) -> None:
        if self._id is None:
            self._id = f"shimmy-{time.time_ns():x}"
            display(bundle, raw=True, display_id=self._id)  # type: ignore[no-untyped-call]
        else:
            update_display(bundle, raw=True, display_id=self._id)  # type: ignore[no-untyped-call]


def follow(
    transport: Transport,
    id: str,
    show: Callable[[dict[str, Any]], None],
    pause: Callable[[float], None] = time.sleep,
) -> dict[str, Any]:
    """A job's result, once it has ended. Raises what it failed by; interrupting stops it."""
    path = f"shimmy/api/jobs/{id}"
    try:
        while (look := transport.get(path))["state"] == "running":
            show(look)
            pause(_POLL)
    except KeyboardInterrupt:
        transport.delete(path)
        raise
    if (error := look["error"]) is not None:
        raise from_code(error["code"], one_line(error["message"]), param=error["param"])
    found: dict[str, Any] = look["result"]
    return found


def clock_time(seconds: float) -> str:
    """In the kernel's own time zone; with the day where it is not today."""
    at = datetime.fromtimestamp(seconds).astimezone()
    today = datetime.now().astimezone().date()
    return at.strftime("%H:%M:%S" if at.date() == today else "%Y-%m-%d %H:%M")


def _plain(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _table(rows: Sequence[tuple[str, ...]], caption: str) -> str:
    head = "".join(f'<th scope="col">{inert(cell)}</th>' for cell in rows[0])
    lines = "".join(
        f"<tr>{''.join(f'<td>{inert(cell)}</td>' for cell in row)}</tr>" for row in rows[1:]
    )
    said = f"<caption>{inert(caption)}</caption>" if caption else ""
    return f"<table>{said}<thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"
