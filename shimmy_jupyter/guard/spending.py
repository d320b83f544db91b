"""Where it is kept what has been used of limits: a file that servers share, and that outlives them.

Each decision reads, decides and writes in one transaction that has the write lock, so servers with one
file have one budget. What a server has reserved is marked with its name, and it holds a lock on a file
of that name for as long as it lives. The system lets go of that lock however a server ends, also in
another container, where process ids mean nothing. So a reservation whose server is gone is found out, by
the next server that opens the file or within a second by one that uses it; as nobody knows how
much of it was used, it is settled in full, at that moment. On macOS, too; there is no Windows version.
"""

from __future__ import annotations

import glob
import json
import logging
import math
import os
import secrets
import sqlite3
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from ..audit.writer import StoreFailed, Writer
from ..core import budgets
from ..core.budgets import DAY, WINDOW, Refusal, Spent, Standing
from ..core.limits import Account, Limits, named, parsed
from .locks import hold, is_at, is_gone, lock_file

T = TypeVar("T")

log = logging.getLogger("shimmy_jupyter.guard")

_SCHEMA = """
CREATE TABLE IF NOT EXISTS clocks (account TEXT PRIMARY KEY, latest INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS seconds (
    account TEXT NOT NULL, second INTEGER NOT NULL, requests INTEGER NOT NULL, tokens INTEGER NOT NULL,
    PRIMARY KEY (account, second)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS days (
    account TEXT NOT NULL, day INTEGER NOT NULL, tokens INTEGER NOT NULL, PRIMARY KEY (account, day)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS reservations (
    account TEXT NOT NULL, id TEXT NOT NULL, tokens INTEGER NOT NULL, owner TEXT NOT NULL,
    PRIMARY KEY (account, id)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS own (user TEXT PRIMARY KEY, limits TEXT NOT NULL) WITHOUT ROWID;
"""
_READ = """
SELECT 'clock', latest, 0, 0 FROM clocks WHERE account = :key
UNION ALL SELECT 'second', second, requests, tokens FROM seconds WHERE account = :key
UNION ALL SELECT 'day', day, tokens, 0 FROM days WHERE account = :key
UNION ALL SELECT 'open', id, tokens, 0 FROM reservations WHERE account = :key
ORDER BY 1, 2
"""
_SETTLED_EVERY, _TIDIED_EVERY = 1.0, 60.0
"""Seconds after which reservations of servers that are gone, and rows that count no more, are looked for."""


class Spending:
    """For any thread. `path` None keeps everything in memory. `now` is in unix seconds.

    Where no account of a request has a limit over time, nothing is read or written. Futures raise
    `StoreFailed` where the file cannot be written, or this is closed; then nothing was counted.
    """

    def __init__(self, path: Path | None) -> None:
        self._memory = _Memory() if path is None else None
        self._lock = threading.Lock()
        self._closed = False
        self._settled = self._tidied = -math.inf
        self._owner = secrets.token_hex(8)
        self._held: int | None = None
        self._writer = None if path is None else Writer(path, _SCHEMA, opened=self._opened)
        self._file: _File
        self._owed: dict[str, tuple[Sequence[Account], int]] = {}
        """What could not be settled, as nothing could be written then."""

    @property
    def failure(self) -> str | None:
        """Why nothing can be written, if that is so."""
        return None if self._writer is None else self._writer.failure

    def arrive(
        self, request_id: str, accounts: Sequence[Account], now: float
    ) -> Future[Refusal | None]:
        """Count a request, or say why it may not go on."""
        counting = [account for account in accounts if account.limits.counts_requests]
        if not counting:
            return _done(None)
        return self._decide(counting, now, lambda books: budgets.charge_request(books, now))

    def reserve(  # noqa: PLR0917  as in `budgets`
        self,
        request_id: str,
        accounts: Sequence[Account],
        prompt_tokens: int,
        wanted: int | None,
        default: int,
        now: float,
        *,
        choices: int = 1,
    ) -> Future[int | Refusal]:
        """Set aside what a request may come to use: `budgets.reserve`.

        Whoever has called this has to settle, with the same accounts: also where they were cancelled
        while they waited for the answer, for it may have been granted nevertheless.
        """

        def decide(books: budgets.Books) -> int | Refusal:
            asked = request_id, prompt_tokens, wanted, default, now
            return budgets.reserve(books, *asked, choices=choices)

        if not any(account.limits.counts_tokens for account in accounts):
            return _done(decide({account: Spent() for account in accounts}))
        return self._decide(accounts, now, decide)

    def settle(
        self, request_id: str, accounts: Sequence[Account], tokens: int, now: float
    ) -> Future[None]:
        """Count what was really used, prompt included. The Future raises `budgets.NotReserved`
        where there is nothing to settle, as the second time.
        """
        counting = [account for account in accounts if account.limits.counts_tokens]
        if not counting:
            return _done(None)
        settled = self._decide(
            counting, now, lambda books: budgets.settle(books.values(), request_id, tokens, now)
        )

        def look(done: Future[None]) -> None:
            if not done.cancelled() and isinstance(done.exception(), StoreFailed):
                with self._lock:
                    self._owed[request_id] = counting, tokens

        settled.add_done_callback(look)
        return settled

    def _settle_owed(self, now: float) -> None:
        """Or what is open would stay so as long as this server lives."""
        with self._lock:
            owed, self._owed = self._owed, {}
            if self._closed:
                return
        for request_id, (accounts, tokens) in owed.items():
            self.settle(request_id, accounts, tokens, now)

    def look(
        self, accounts: Sequence[Account], now: float
    ) -> Future[dict[str, dict[str, Standing]]]:
        """How things stand, by account's key and trait's name."""
        if not any(a.limits.counts_requests or a.limits.counts_tokens for a in accounts):
            return _done({account.key: {} for account in accounts})
        return self._decide(
            accounts, now, lambda books: {a.key: budgets.look(a, s, now) for a, s in books.items()}
        )

    def own(self, user: str) -> Future[Limits]:
        """What a user has tightened for themselves."""
        if self._writer is not None and not self._writer.path.exists():
            return _done(Limits())
        return self._do(lambda book: book.own(user))

    def tighten(self, user: str, limits: Limits) -> Future[Limits]:
        """Keep these in place of what the user had."""
        return self._do(lambda book: book.tighten(user, limits))

    def close(self) -> None:
        """What is open is counted in full, by the next server that opens the file. Twice is fine."""
        with self._lock:
            self._closed = True
        if self._writer is None:
            return
        self._writer.close()
        if self._held is not None:
            os.close(self._held)
            lock_file(self._writer.path, self._owner).unlink(missing_ok=True)
            self._held = None

    def _decide(
        self, accounts: Sequence[Account], now: float, decide: Callable[[budgets.Books], T]
    ) -> Future[T]:
        if self._owed:
            self._settle_owed(now)

        def work(book: _Book) -> T:
            if abs(now - self._settled) >= _SETTLED_EVERY:
                book.settle_gone(now)
                self._settled = now
            if abs(now - self._tidied) >= _TIDIED_EVERY:
                book.tidy(now)
                self._tidied = now
            books = {account: book.read(account.key) for account in accounts}
            result = decide(books)
            for account, spent in books.items():
                book.write(account.key, spent)
            return result

        return self._do(work)

    def _do(self, work: Callable[[_Book], T]) -> Future[T]:
        if self._writer is not None:
            return self._writer.submit(lambda connection: self._file.run(work))
        assert self._memory is not None
        done: Future[T] = Future()
        with self._lock:
            if self._closed:
                done.set_exception(StoreFailed("it is closed"))
                return done
            try:
                result = work(self._memory)
            except Exception as error:  # noqa: BLE001  raised where it is waited for
                done.set_exception(error)
            else:
                done.set_result(result)
        return done

    def _opened(self, connection: sqlite3.Connection) -> None:
        """The file may be another than before, in a folder that is another."""
        assert self._writer is not None
        self._file = _File(connection, self._writer.path, self._owner)
        self._settled = self._tidied = -math.inf
        path = lock_file(self._writer.path, self._owner)
        if self._held is not None and not is_at(self._held, path):
            os.close(self._held)
            self._held = None
        if self._held is None:
            self._held = hold(path)
        for left in path.parent.glob(glob.escape(self._writer.path.name) + ".*.lock"):
            is_gone(left)


def _done(result: T) -> Future[T]:
    done: Future[T] = Future()
    done.set_result(result)
    return done


class _Memory:
    def __init__(self) -> None:
        self._spents: dict[str, Spent] = {}
        self._own: dict[str, Limits] = {}

    def read(self, key: str) -> Spent:
        return self._spents.get(key) or Spent()

    def write(self, key: str, spent: Spent) -> None:
        self._spents[key] = spent

    def own(self, user: str) -> Limits:
        return self._own.get(user, Limits())

    def tighten(self, user: str, limits: Limits) -> Limits:
        self._own[user] = limits
        return limits

    def settle_gone(self, now: float) -> None:
        """Nobody else has reserved anything."""

    def tidy(self, now: float) -> None:
        for key, spent in [*self._spents.items()]:
            spent.advance(now)
            if spent.is_blank():
                del self._spents[key]


class _File:
    """One connection, in a transaction of its thread's. What has been read is known until another server
    has written, for a minute at most; what is written is what has changed.
    """

    def __init__(self, connection: sqlite3.Connection, path: Path, owner: str) -> None:
        self._connection, self._path, self._owner = connection, path, owner
        self._known: dict[str, Spent] = {}
        self._before: dict[str, Spent] = {}
        self._version = -1

    def run(self, work: Callable[[_Book], T]) -> T:
        (version,) = self._connection.execute("PRAGMA data_version").fetchone()
        if version != self._version:
            self._version = version
            self._known.clear()
        try:
            return work(self)
        except Exception:
            self._known.clear()  # its writing is undone
            raise

    def read(self, key: str) -> Spent:
        spent = self._known[key] = self._known.get(key) or self._found(key)
        counted = dict(spent.requests), dict(spent.tokens), dict(spent.days), dict(spent.open)
        self._before[key] = Spent(spent.latest, *counted)
        return spent

    def _found(self, key: str) -> Spent:
        spent = Spent()
        for kind, what, first, second in self._connection.execute(_READ, {"key": key}):
            match kind:
                case "clock":
                    spent.latest = what
                case "second":
                    spent.requests |= {what: first} if first else {}
                    spent.tokens |= {what: second} if second else {}
                case "day":
                    spent.days[what] = first
                case "open":
                    spent.open[what] = first
        return spent

    def write(self, key: str, spent: Spent) -> None:
        before, run = self._before.pop(key), self._connection.execute
        if spent.latest != before.latest:
            run("REPLACE INTO clocks VALUES (?, ?)", (key, spent.latest))
        changed = _changed(before.requests, spent.requests) | _changed(before.tokens, spent.tokens)
        for second in changed:
            counts = spent.requests.get(second, 0), spent.tokens.get(second, 0)
            if any(counts):
                run("REPLACE INTO seconds VALUES (?, ?, ?, ?)", (key, second, *counts))
            else:
                run("DELETE FROM seconds WHERE account = ? AND second = ?", (key, second))
        for day in _changed(before.days, spent.days):
            if day in spent.days:
                run("REPLACE INTO days VALUES (?, ?, ?)", (key, day, spent.days[day]))
            else:
                run("DELETE FROM days WHERE account = ? AND day = ?", (key, day))
        for id in _changed(before.open, spent.open):
            if id in spent.open:
                row = key, id, spent.open[id], self._owner
                run("REPLACE INTO reservations VALUES (?, ?, ?, ?)", row)
            else:
                run("DELETE FROM reservations WHERE account = ? AND id = ?", (key, id))

    def own(self, user: str) -> Limits:
        row = self._connection.execute("SELECT limits FROM own WHERE user = ?", (user,)).fetchone()
        return parsed(json.loads(row[0])) if row else Limits()

    def tighten(self, user: str, limits: Limits) -> Limits:
        if limits == Limits():
            self._connection.execute("DELETE FROM own WHERE user = ?", (user,))
        else:
            row = user, json.dumps(named(limits))
            self._connection.execute("REPLACE INTO own VALUES (?, ?)", row)
        return limits

    def settle_gone(self, now: float) -> None:
        others = self._connection.execute(
            "SELECT DISTINCT owner FROM reservations WHERE owner != ?", (self._owner,)
        )
        for (owner,) in others.fetchall():
            if not is_gone(lock_file(self._path, owner)):
                continue
            left = self._connection.execute(
                "SELECT account, id, tokens FROM reservations WHERE owner = ?", (owner,)
            ).fetchall()
            for key, id, tokens in left:
                spent = self.read(key)
                budgets.settle([spent], id, tokens, now)
                self.write(key, spent)
            log.warning("%s requests of a server that is gone are counted in full", len(left))

    def tidy(self, now: float) -> None:
        run, yesterday = self._connection.execute, math.floor(now) // DAY - 1
        run("DELETE FROM seconds WHERE second < ?", (math.floor(now) - WINDOW,))
        run("DELETE FROM days WHERE day < ?", (yesterday,))
        run("DELETE FROM clocks WHERE latest < ?", (yesterday * DAY,))
        self._known.clear()


_Book = _Memory | _File


def _changed(before: Mapping[T, int], after: Mapping[T, int]) -> set[T]:
    return set() if before == after else {key for key, _ in before.items() ^ after.items()}
