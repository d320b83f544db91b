"""The records of what was asked: pages, usage, verification, receipts, files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote, urlencode

from . import messages as m
from . import shapes
from .fetched import Failed, Idle, Pending, Problem, Ready, ready
from .records import FILTERS, GROUPINGS, Exported
from .turn import Turn, pending, read

PAGE = 25
"""Records of a page."""
PATH = "shimmy/api/audit"
_SHAPES: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
    "page": shapes.page,
    "record": shapes.page,
    "usage": shapes.usage,
    "verdict": shapes.verdict,
    "receipt": shapes.receipt,
}


def address(path: str, query: Mapping[str, Any]) -> str:
    """With what the query names and gives."""
    given = {name: value for name, value in query.items() if value not in {None, ""}}
    return f"{path}?{urlencode(given)}" if given else path


def opened(turn: Turn) -> None:
    """The first look at the section."""
    if isinstance(turn.state.audit.page, Idle):
        _turn_to(turn, None, ())


def _turn_to(turn: Turn, cursor: int | None, cursors: tuple[int | None, ...]) -> None:
    """What is still on its way is another page's."""
    turn.drop("page")
    audit = turn.state.audit
    turn.audit(cursor=cursor, cursors=cursors, page=pending(audit.page))
    turn.call("page", "GET", address(PATH, {**audit.filters, "cursor": cursor, "limit": PAGE}))


def refreshed(turn: Turn) -> None:
    _turn_to(turn, turn.state.audit.cursor, turn.state.audit.cursors)


def filtered(turn: Turn, event: m.Filtered) -> None:
    if unknown := set(event.filters) - set(FILTERS):
        turn.fail(Problem("unknown_parameter", f"there are {', '.join(FILTERS)}", min(unknown)))
        return
    given = {name: text.strip() for name, text in event.filters.items() if text.strip()}
    turn.audit(filters=given)
    _turn_to(turn, None, ())


def own_only(turn: Turn, event: m.OwnOnly) -> None:
    user = turn.state.audit.user
    if user is None:
        turn.say("Your name here is not known yet: ask something, then look at its record.")
        return
    filtered(turn, m.Filtered({**turn.state.audit.filters, "user": user}))


def next_page(turn: Turn, event: m.NextPage) -> None:
    audit = turn.state.audit
    page = ready(audit.page)
    if "page" in turn.state.asked.values():
        turn.say("A page is on its way.")
    elif page is None or page.next_cursor is None:
        turn.say("There is no further page.")
    else:
        _turn_to(turn, page.next_cursor, (*audit.cursors, audit.cursor))


def previous_page(turn: Turn, event: m.PreviousPage) -> None:
    audit = turn.state.audit
    if not audit.cursors:
        turn.say("This is the first page.")
        return
    *before, cursor = audit.cursors
    _turn_to(turn, cursor, tuple(before))


def record_wanted(turn: Turn, event: m.RecordWanted) -> None:
    request_id = turn.state.answer.request_id
    if request_id is None:
        turn.say("There is no record to show: nothing has been answered here yet.")
        return
    _wanted(turn, "record", "GET", address(PATH, {"request_id": request_id}))


def usage_wanted(turn: Turn, event: m.UsageWanted) -> None:
    if event.by not in GROUPINGS:
        turn.fail(Problem("invalid_value", f"one of {'; '.join(GROUPINGS)}", "by"))
        return
    turn.audit(by=event.by)
    _wanted(turn, "usage", "GET", address(f"{PATH}/usage", {"by": event.by}))


def verify_wanted(turn: Turn, event: m.VerifyWanted) -> None:
    head = turn.state.audit.head
    against = {"size": head.size, "root": head.root, "timestamp": head.timestamp} if head else None
    _wanted(turn, "verdict", "POST", f"{PATH}/verify", {"against": against} if against else {})


def receipt_wanted(turn: Turn, event: m.ReceiptWanted) -> None:
    if not event.request_id:
        turn.fail(Problem("invalid_value", "choose a record first", "request_id"))
        return
    path = f"{PATH}/receipts/{quote(event.request_id, safe='')}"
    _wanted(turn, "receipt", "GET", path)


def _wanted(
    turn: Turn, what: str, method: str, path: str, body: Mapping[str, Any] | None = None
) -> None:
    turn.drop(what)
    turn.audit(**{what: Pending()})
    turn.call(what, method, path, body)


def export_wanted(turn: Turn, event: m.ExportWanted) -> None:
    problem = wrong_name(event.name)
    if event.format not in {"csv", "jsonl"}:
        problem = Problem("invalid_value", "csv or jsonl", "format")
    if "export" in turn.state.asked.values():
        turn.say("An export is being written already.")
        return
    if problem is not None:
        turn.fail(problem)
        return
    turn.audit(export=Pending())
    number = turn.number("export")
    filters = dict(turn.state.audit.filters)
    turn.requests.append(m.Export(number, filters, event.name.strip(), event.format))


def receipt_saved(turn: Turn, event: m.ReceiptSaved) -> None:
    receipt = ready(turn.state.audit.receipt)
    if receipt is None:
        turn.say("There is no receipt to save: fetch one first.")
        return
    if (problem := wrong_name(event.name)) is not None:
        turn.fail(problem)
        return
    text = json.dumps(receipt.document, ensure_ascii=False, indent=1)
    turn.requests.append(m.Save(turn.number("save"), event.name.strip(), text + "\n"))


def wrong_name(name: str) -> Problem | None:
    """What is wrong with a file's name: it stays in the folder that the kernel works in."""
    name = name.strip()
    odd = any(c in '/\\:"' or not c.isprintable() for c in name)
    if odd or not name or name.startswith(".") or len(name.encode()) > 200:
        said = "a file's name without a folder, such as audit.csv"
        return Problem("invalid_value", said, "name")
    return None


# What comes back


_DOING = {
    "page": "fetching the records",
    "record": "fetching the record",
    "usage": "fetching the usage",
    "verdict": "verifying the records",
    "receipt": "fetching the receipt",
}


def answered(turn: Turn, what: str, body: Mapping[str, Any]) -> None:
    found = read(_SHAPES[what], body)
    turn.audit(**{what: found})
    if isinstance(found, Failed):
        turn.fail(found.problem, _DOING[what])
        return
    if what == "record":
        users = {one.text("user") for one in found.value.records if not one.erased}
        turn.audit(user=users.pop() if len(users) == 1 else turn.state.audit.user)
    if what == "verdict":
        turn.audit(head=found.value.head or turn.state.audit.head)
        verdict = found.value
        said = "the records are as they were written" if verdict.ok else str(verdict.problem)
        turn.say(f"Records verified, {verdict.records}: {said}.")


def refused(turn: Turn, what: str, problem: Problem) -> None:
    turn.audit(**{what: Failed(problem)})
    turn.fail(problem, _DOING[what])


def wrote(turn: Turn, what: str, event: m.Wrote) -> None:
    if what == "export":
        turn.audit(export=Ready(Exported(event.name, event.records, event.whole)))
    if event.whole:
        records = f" (records: {event.records})" if what == "export" else ""
        turn.say(f"{event.name}{records} is written, in the folder that the kernel works in.")


def not_saved(turn: Turn, what: str, problem: Problem) -> None:
    turn.fail(problem, "saving the receipt")


def not_exported(turn: Turn, what: str, problem: Problem) -> None:
    turn.audit(export=Failed(problem))
    turn.fail(problem, "exporting records")


HANDLERS: dict[type, Callable[[Turn, Any], None]] = {
    m.Filtered: filtered,
    m.OwnOnly: own_only,
    m.NextPage: next_page,
    m.PreviousPage: previous_page,
    m.RecordWanted: record_wanted,
    m.UsageWanted: usage_wanted,
    m.VerifyWanted: verify_wanted,
    m.ReceiptWanted: receipt_wanted,
    m.ReceiptSaved: receipt_saved,
    m.ExportWanted: export_wanted,
}
ANSWERED = dict.fromkeys(_SHAPES, answered)
REFUSED = dict.fromkeys(_SHAPES, refused) | {"export": not_exported, "save": not_saved}
