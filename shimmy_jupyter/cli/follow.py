"""A job's progress on a terminal, and its end."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import click

from ..errors import from_code
from .local import Progress

_POLL = 0.1
_TENTHS = 10
_SOON = 0.5
"""Seconds within which nothing is said: most is done by then."""


def follow(local: Any, job: str, pause: Callable[[float], None] = time.sleep) -> dict[str, Any]:
    """A job's result, once it has ended. Raises what it failed by. Interrupting stops the job."""
    view = _View()
    try:
        while (look := local.get(f"shimmy/api/jobs/{job}"))["state"] == "running":
            view.show(look)
            pause(_POLL)
    except KeyboardInterrupt:
        local.delete(f"shimmy/api/jobs/{job}")
        while (look := local.get(f"shimmy/api/jobs/{job}"))["state"] == "running":
            pause(_POLL)
        view.end()
        if look["state"] != "done":
            raise
    view.end()
    if (error := look["error"]) is not None:
        raise from_code(error["code"], error["message"], param=error["param"])
    result: dict[str, Any] = look["result"]
    return result


class _View:
    """One line that changes on a terminal; elsewhere a line for each stage and each tenth of it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._line = Progress()
        self._clock = clock
        self._said = ""
        self._silent = clock() + _SOON
        self._stage, self._began, self._from = "", 0.0, 0

    def show(self, look: dict[str, Any]) -> None:
        if self._clock() < self._silent:
            return
        message, done, total = look["message"], look["done"], look["total"]
        if message != self._stage:
            self._stage, self._began, self._from = message, self._clock(), done
        if not total:
            text = mark = message
        else:
            seconds = self._clock() - self._began
            text = f"{message}  {amounts(done, total)}{_pace(done - self._from, total - done, seconds)}"
            mark = f"{message} {done * _TENTHS // total}"
        if self._line.terminal:
            self._line.say(text)
        elif mark != self._said:
            self._said = mark
            self._line.say(text)

    def end(self) -> None:
        self._line.end()


def amounts(done: int, total: int) -> str:
    """In the units of the larger one."""
    unit, size = next(
        (name, size)
        for name, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("bytes", 1))
        if total >= size or size == 1
    )
    digits = 0 if size == 1 else 1
    return f"{done / size:.{digits}f} of {total / size:.{digits}f} {unit} ({done * 100 // total}%)"


def _pace(done: int, left: int, seconds: float) -> str:
    if seconds < 1 or done <= 0:
        return ""
    rate = done / seconds
    minutes, rest = divmod(round(left / rate), 60)
    return f", {rate / 1e6:.1f} MB/s, {minutes}:{rest:02} left"


def path(name: str) -> str:
    """The route of a model, whatever somebody has typed for its name."""
    return f"shimmy/api/models/{quote(name, safe='')}"


def table(rows: list[list[str]]) -> str:
    """Columns as wide as they need; the first row is their heads."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def said(text: str, **style: Any) -> None:
    click.echo(click.style(text, **style) if style else text, err=True)
