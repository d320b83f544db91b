"""`%shimmy models`, `%shimmy models --suggest` and `%shimmy pull`: commands beside prompts. A line is one only where all of it reads as
one, so that `%shimmy models of the atom` is a prompt.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from typing import Any

from IPython.display import display, update_display

from ..errors import from_code
from ..types import amount
from .client import Transport
from .display import inert, one_line

_PULL = re.compile(r"pull\s+(\S+)(?:\s+--sha256[=\s]([0-9a-fA-F]{64}))?")
_SUGGEST = re.compile(r"models\s+--suggest(?:\s+--task[=\s]([a-z]+))?")
_POLL = 0.2
Show = Callable[[str, str], None]
"""Takes a text, and the same as HTML; each time in place of the last."""


def command(line: str) -> Callable[[Transport, Show], None] | None:
    """What a line asks for, if it is a command."""
    text = line.strip()
    if text == "models":
        return _models
    if match := _SUGGEST.fullmatch(text):
        task = match[1]
        return lambda transport, show: _suggest(transport, show, task)
    if match := _PULL.fullmatch(text):
        model, digest = match[1], match[2]

        def pull(transport: Transport, show: Show) -> None:
            _pull(transport, show, model, digest.lower() if digest else None)

        return pull
    return None


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


class Board:
    """Where a command shows how far it is: one output that changes, or lines in a terminal, of which
    those that only count on are left out.
    """

    def __init__(self, *, rich: bool) -> None:
        self._rich = rich
        self._id: str | None = None
        self._stage = ""

    def show(self, text: str, page: str) -> None:
        if self._rich:
            self._display({"text/plain": text, "text/html": page})
        elif (stage := text.partition(": ")[0]) != self._stage:
            self._stage = stage
            print(text)

    def _display(self, bundle: dict[str, str]) -> None:
        if self._id is None:
            self._id = f"shimmy-{time.time_ns():x}"
            display(bundle, raw=True, display_id=self._id)  # type: ignore[no-untyped-call]
        else:
            update_display(bundle, raw=True, display_id=self._id)  # type: ignore[no-untyped-call]


def _models(transport: Transport, show: Show) -> None:
    found = transport.get("shimmy/api/models")
    rows = [("", "model", "size", "type", "context", "state")]
    for model in found["models"]:
        fit = model["fit"]
        state = model["state"]
        if state == "available" and fit is not None and not fit["ok"]:
            state = f"needs {amount(fit['needed'])}, {amount(fit['available'])} available"
        rows.append(
            (
                "*" if model["id"] == found["default"] else "",
                model["id"],
                amount(model["size_bytes"]),
                model["quantization"] or model["kind"],
                f"{model['context']:,}" if model["context"] else "",
                model["error"] or state,
            )
        )
    _show_rows(rows, show)


def _suggest(transport: Transport, show: Show, task: str | None) -> None:
    query = f"?task={task}" if task else ""
    found = transport.get(f"shimmy/api/suggestions{query}")
    rows = [("", "model", "for", "download", "memory", "licence", "what it is")]
    rows += [
        (
            "✓" if one["here"] else "",
            one["id"],
            ", ".join(one["tasks"]),
            amount(one["size_bytes"]),
            amount(one["memory_bytes"]),
            one["licence"],
            one["note"],
        )
        for one in found["suggestions"]
    ]
    _show_rows(rows, show)
    if found["first"] is not None:
        print(f"Next: %shimmy pull {one_line(found['first'])}")


def _pull(transport: Transport, show: Show, model: str, digest: str | None) -> None:
    body = {"model": model} | ({"sha256": digest} if digest is not None else {})
    job = transport.post("shimmy/api/models/pull", body)["job"]

    def say(text: str) -> None:
        shown = one_line(text)
        show(shown, f"<p>{inert(shown)}</p>")

    try:
        found = follow(transport, job, lambda look: say(_progress(look)))
    except KeyboardInterrupt:
        say("stopped; what has come is kept, and the same command goes on from there")
        raise
    was = "downloaded" if found["new"] else "was here already"
    names = ", ".join(found["ids"] or found["files"])
    say(" · ".join([f"{names} {was}: {amount(found['size_bytes'])}", *found["notes"]]))


def _progress(look: dict[str, Any]) -> str:
    done, total = look["done"], look["total"]
    if not total:
        return str(look["message"])
    return f"{look['message']}: {amount(done)} of {amount(total)} ({done * 100 // total}%)"


def _show_rows(rows: Sequence[tuple[str, ...]], show: Show) -> None:
    """A cell is one line: names and errors come from files."""
    lines = [tuple(one_line(str(cell)) for cell in row) for row in rows]
    show(_plain(lines), _table(lines))


def _plain(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    head, *body = (
        "".join(f"<{tag}>{inert(cell)}</{tag}>" for cell in row)
        for tag, row in zip(["th"] + ["td"] * len(rows), rows, strict=False)
    )
    lines = "".join(f"<tr>{row}</tr>" for row in body)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"
