"""Commands about what one may use and has used: limits and records."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..errors import InvalidValue
from .board import Board, clock_time
from .session import Session

Arguments = Mapping[str, Any]


def limits(session: Session, given: Arguments, board: Board) -> None:
    wanted = given["limits"]
    transport = session.transport
    if wanted:
        found = transport.put("shimmy/api/limits", dict(wanted))
    else:
        found = transport.get("shimmy/api/limits")
    rows: list[tuple[str, ...]] = [("limit", "at most", "used", "left", "until", "")]
    rows += _limit_rows(found["limits"], found)
    for group, shared in found["shared"].items():
        rows += _limit_rows(shared, found, f"of all in {group}")
    if len(rows) == 1:
        board.say("there are no limits; NAME=VALUE sets one for yourself")
        return
    waiting = found["queue_position"]
    caption = f"{waiting} before your request that waits" if waiting is not None else ""
    board.table(rows, caption)


def _limit_rows(
    limits: Mapping[str, Any], found: Mapping[str, Any], whose: str = ""
) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name, row in limits.items():
        why = found["locked"].get(name, "")
        own = "your own" if name in found["own"] and not whose else ""
        rows.append(
            (
                name,
                f"{row['limit']:,}",
                "" if row["used"] is None else f"{row['used']:,}",
                "" if row["remaining"] is None else f"{row['remaining']:,}",
                "" if row["resets_at"] is None else clock_time(row["resets_at"]),
                "; ".join(filter(None, [whose, own, f"locked: {why}" if why else ""])),
            )
        )
    return rows


def audit(session: Session, given: Arguments, board: Board) -> None:
    action: Callable[[Session, Arguments, Board], None] = _ACTIONS[given["action"] or "show"]
    action(session, given, board)


def _show(session: Session, given: Arguments, board: Board) -> None:
    found = session.transport.get(f"shimmy/api/audit?limit={given['limit'] or 20}")
    rows: list[tuple[str, ...]] = [
        ("number", "time", "what", "user", "model", "outcome", "in", "out", "ms", "request")
    ]
    for record in found["records"]:
        if record.get("erased"):
            rows.append((str(record["seq"]), "", "erased", *[""] * 7))
            continue
        said = (record.get("outcome"), record.get("code"))
        rows.append(
            (
                str(record["seq"]),
                str(record["timestamp"])[:19].replace("T", " "),
                record.get("action") or record["kind"],
                record["user"],
                record.get("model") or "",
                " ".join(filter(None, said)),
                *(
                    "" if record.get(name) is None else f"{record[name]:.0f}"
                    for name in ("prompt_tokens", "tokens_generated", "duration_ms")
                ),
                record["request_id"],
            )
        )
    more = " (there are more: --limit)" if found["next_cursor"] is not None else ""
    board.table(rows, f"Records, the newest first, in UTC{more}")


def _usage(session: Session, given: Arguments, board: Board) -> None:
    since = f"?since={quote(given['since'], safe='')}" if given["since"] else ""
    found = session.transport.get(f"shimmy/api/audit/usage{since}")
    by = found["by"]
    names = ("requests", "prompt_tokens", "cached_tokens", "tokens_generated", "denied", "limited")
    rows = [(*by, *(name.replace("_", " ") for name in names), "errors")]
    rows += [
        (*(row[name] or "–" for name in by), *(f"{row[name]:,}" for name in (*names, "errors")))
        for row in found["usage"]
    ]
    board.table(rows, f"Since {clock_time(found['since'])}")


def _verify(session: Session, _given: Arguments, board: Board) -> None:
    found = session.transport.post("shimmy/api/audit/verify", {})
    if not found["ok"]:
        where = "" if found["first_bad"] is None else f"; first broken record: {found['first_bad']}"
        board.say(f"not verified: {found['problem']}{where}")
        return
    head = found["head"]
    board.say(
        f"verified: {found['records']:,} records, head {head['size']}:{head['root']}",
        "not compared with a head from elsewhere: whoever can write the file could have made all of it "
        "anew (shimmy audit verify --against)",
    )


def _receipt(session: Session, given: Arguments, board: Board) -> None:
    proof = session.transport.get(f"shimmy/api/audit/receipts/{quote(given['id'])}")
    head = proof["head"]
    rows: list[tuple[str, str, str]] = [("number", "leaf hash", "record")]
    rows += [(str(one["seq"]), one["leaf_hash"], one["body"]) for one in proof["records"]]
    board.table(rows, f"In a ledger with the head {head['size']}:{head['root']}")


def _export(session: Session, given: Arguments, board: Board) -> None:
    path = Path(given["file"]).expanduser()
    kind = path.suffix.removeprefix(".").lower()
    if kind not in {"csv", "jsonl"}:
        raise InvalidValue("the file's name ends in .csv or .jsonl", param="file")
    board.say("reading the records")
    pieces = session.transport.fetch(f"shimmy/api/audit/export?format={kind}")
    board.say(f"{path.name}: {_written(path, pieces):,} bytes")


def _written(path: Path, pieces: Iterable[bytes]) -> int:
    """Bytes in a new file that is whole, or not there. Raises `InvalidValue`."""
    try:
        file = path.open("xb")
    except FileExistsError:
        raise InvalidValue(f"{path.name} is there already; name another", param="file") from None
    except OSError as error:
        raise _unwritable(path, error) from None
    try:
        with file:
            return sum(map(file.write, pieces))
    except BaseException as error:
        path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise _unwritable(path, error) from None
        raise


def _unwritable(path: Path, error: OSError) -> InvalidValue:
    return InvalidValue(f"{path} cannot be written: {error.strerror}", param="file")


_ACTIONS: dict[str, Callable[[Session, Arguments, Board], None]] = {
    "show": _show,
    "usage": _usage,
    "verify": _verify,
    "receipt": _receipt,
    "export": _export,
}
