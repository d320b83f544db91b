"""Removing bodies. Their leaves' hashes stay, so that the log still verifies, and an act says which
bodies are gone; it stays as long as the ledger, for it is what accounts for them.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import secrets
import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any

from .records import Entry, bounded, iso

log = logging.getLogger("shimmy_jupyter.audit")

ACCOUNTING = ("erase", "prune")
"""Actions whose acts stay."""
_PART = 5000
"""Records in one transaction."""
_RUNS = 400
"""Runs of records that one act lists."""
_WAIT_MS = 1000
"""For which readers that hold the old pages are waited for."""

Chosen = tuple[str, tuple[Any, ...]]
Run = tuple[int, int]


def of_user(user: str, request_ids: Sequence[str] | None) -> Chosen:
    if request_ids is None:
        return "user = ?", (user,)
    names = json.dumps([bounded(request_id) for request_id in request_ids])
    return "user = ? AND request_id IN (SELECT value FROM json_each(?))", (user, names)


def before(time: float) -> tuple[Chosen, dict[str, Any]]:
    when = iso(time)
    return ("timestamp < ?", (when,)), {"before": when}


def by_itself(time: float) -> Entry:
    """Whoever set the retention is not asked each time."""
    return Entry("act", secrets.token_hex(16), time, "", "system", action="prune")


def remove(connection: sqlite3.Connection, chosen: Chosen) -> list[Run]:
    """The next part of what is chosen, as runs of their numbers; none when there is nothing left."""
    where, values = chosen
    rows = connection.execute(
        f"SELECT seq FROM records WHERE {where}"  # noqa: S608  texts of ours
        f" AND (action IS NULL OR action NOT IN {ACCOUNTING}) ORDER BY seq LIMIT {_PART}",
        values,
    ).fetchall()
    connection.executemany("UPDATE records SET body = NULL WHERE seq = ?", rows)
    return runs_of([seq for (seq,) in rows])


def runs_of(numbers: Sequence[int]) -> list[Run]:
    """First and last of each run; the numbers ascend."""
    runs: list[Run] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1] = runs[-1][0], number
        else:
            runs.append((number, number))
    return runs


def acts(by: Entry, action: str, detail: Mapping[str, Any], runs: Sequence[Run]) -> list[Entry]:
    """At least one, also for nothing: that it was asked for is recorded."""
    parts = [runs[start : start + _RUNS] for start in range(0, len(runs), _RUNS)] or [[]]
    return [
        dataclasses.replace(
            by, kind="act", action=action, outcome="ok", detail={**detail, "erased": part}
        )
        for part in parts
    ]


def wipe(connection: sqlite3.Connection) -> bool:
    """Make the file anew, and empty its journal. SQLite overwrites what it removes, but not what it has
    left behind when it moved rows from page to page.
    """
    (patience,) = connection.execute("PRAGMA busy_timeout").fetchone()
    try:
        connection.execute(f"PRAGMA busy_timeout={_WAIT_MS}")
        connection.execute("VACUUM")
        (busy, _, _) = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    except sqlite3.Error as error:
        log.warning("removed records' bytes are still in the ledger's files: %s", error)
        return False
    finally:
        connection.execute(f"PRAGMA busy_timeout={patience}")
    return not busy
