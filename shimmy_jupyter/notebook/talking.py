"""Commands about what was said: the history, mending a cell, several models side by side, a dry run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import InvalidValue, ShimmyError
from .asked import Asked, wanted_tokens
from .board import Board, clock_time
from .client import Transport
from .display import inert, one_line, to_html
from .result import figures
from .session import Session

Arguments = Mapping[str, Any]
_RENDERED = {"model", "messages", "thinking", "reasoning_effort", "chat_template_kwargs"}
_SHOWN = 400
"""Characters of a prompt or an answer in the history."""


def history(session: Session, given: Arguments, board: Board) -> None:
    said = list(session.conversation)
    count = given["count"]
    if not said:
        board.say("nothing has been said in this notebook")
        return
    first = max(0, len(said) - count) if count is not None else 0
    rows = [("turn", "prompt", "answer")]
    rows += [
        (str(number + 1), _short(one.prompt), _short(one.answer))
        for number, one in enumerate(said)
        if number >= first
    ]
    board.table(rows, "What was said in this notebook; %shimmy reset forgets it")


def reset(session: Session, _given: Arguments, board: Board) -> None:
    count = session.conversation.reset()
    board.say(f"{count} turn{'s' * (count != 1)} forgotten")


def _short(text: str) -> str:
    line = one_line(text)
    return line if len(line) <= _SHOWN else f"{line[: _SHOWN - 1]}…"


def dry_run(session: Session, asked: Asked, board: Board) -> None:
    """What the model would get, exactly, and what that would cost: nothing is generated."""
    body = asked.body
    wanted: dict[str, Any] = {name: body[name] for name in body.keys() & _RENDERED}
    found = session.transport.post("shimmy/api/apply-template", wanted)
    cached = 0 if body.get("reproducible") else found["cached_tokens"]
    rows: list[tuple[str, str]] = [
        ("model", _called(asked)),
        ("prompt", f"{found['count']:,} tokens, {cached:,} of them computed already"),
        ("answer", _room(session.transport, str(wanted["model"]), body, found["count"])),
        *_left(session.transport),
    ]
    said = {*wanted, "max_tokens", "pin"}
    others = {name: value for name, value in body.items() if name not in said}
    rows += [(name, str(value)) for name, value in others.items()]
    text = "\n".join([*asked.lines, found["prompt"], "", *(f"{a}: {b}" for a, b in rows)])
    page = "".join(f"<p>{inert(line)}</p>" for line in asked.lines)
    page += f"<pre>{inert(found['prompt'])}</pre><table>"
    page += "".join(f'<tr><th scope="row">{inert(a)}</th><td>{inert(b)}</td></tr>' for a, b in rows)
    board.show(text, f"{page}</table>")


def _room(transport: Transport, model: str, body: Mapping[str, Any], count: int) -> str:
    context = transport.get(f"shimmy/api/models/{model}")["usable_context"]
    wanted = wanted_tokens(body)
    most = f"at most {wanted:,} tokens" if wanted is not None else "as many as the server gives"
    if context is None:
        return most
    left = context - count
    # Where nobody says how long an answer is to be, there has to be room for a token.
    over = (1 if wanted is None else 0) - left
    if over > 0:
        return f"none: the prompt is {over:,} tokens too long for a context of {context:,}"
    if wanted is not None and wanted > left:
        return f"{most}, {wanted - left:,} more than the context of {context:,} has room for"
    return f"{most}; the context of {context:,} has room for {left:,}"


def _left(transport: Transport) -> list[tuple[str, str]]:
    found = transport.get("shimmy/api/limits")["limits"]
    return [
        (name, f"{row['remaining']:,} of {row['limit']:,} left" + _until(row))
        for name, row in found.items()
        if row["remaining"] is not None
    ]


def _until(row: Mapping[str, Any]) -> str:
    return "" if row["resets_at"] is None else f" until {clock_time(row['resets_at'])}"


def _called(asked: Asked) -> str:
    """The model that is asked, and by which of the project's names."""
    model = str(asked.body["model"])
    return f"{model} ({asked.note})" if asked.note else model


def compare(session: Session, all_asked: list[Asked], board: Board) -> list[dict[str, Any]]:
    """Answers to the same prompt, one after another so that none slows the other down; side by side."""
    found: list[dict[str, Any]] = []
    for asked in all_asked:
        called = _called(asked)
        board.say(f"asking {called} ({len(found) + 1} of {len(all_asked)})")
        try:
            answer = session.transport.post("shimmy/v1/chat/completions", asked.body)
        except ShimmyError as error:
            answer = {"error": f"{error.message} [{error.code}]"}
        found.append({**answer, "called": called})
    board.show(*_side_by_side(found))
    if all("error" in one for one in found):
        raise InvalidValue("none of them has answered", param="models")
    return found


def _side_by_side(found: list[dict[str, Any]]) -> tuple[str, str]:
    texts, heads, cells, feet = [], [], [], []
    for one in found:
        said = one.get("error") or str(one["choices"][0]["message"]["content"])
        note = _figures(one)
        texts.append(f"── {one_line(one['called'])} ({note})\n{said}")
        heads.append(f'<th scope="col">{inert(one["called"])}</th>')
        shown = f"<p>{inert(said)}</p>" if "error" in one else to_html(said)
        cells.append(f'<td style="vertical-align:top;text-align:left">{shown}</td>')
        feet.append(f"<td><small>{inert(note)}</small></td>")
    rows = (f"<tr>{''.join(row)}</tr>" for row in (heads, cells, feet))
    return "\n\n".join(texts), f"<table>{''.join(rows)}</table>"


def _figures(one: Mapping[str, Any]) -> str:
    if "error" in one:
        return "no answer"
    return figures(one, one["choices"][0]["finish_reason"])
