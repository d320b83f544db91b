"""Whatever is changed in a ledger's tables is found.

Cases: a sound ledger: empty, of every size to a few dozen, with bodies erased, with requests that never
ended, by a connection, while it is written to, with progress. Each column of each table, changed to
another value of the same and of another type; rows deleted, put in, swapped; bodies removed, put back,
moved; the tail cut off, with and without the head; tables, indexes and triggers changed; bytes of the
file. Which record is named. Bodies that are missing: acts that account for others, for later ones, for
too many, for none. History computed anew from an edited, removed or added record on: sound in itself,
found against a head from before, not against none; a shorter ledger; heads of other sizes. A hundred
thousand records in little memory. What cannot be read at all.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import sqlite3
import time
import tracemalloc
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from shimmy_jupyter.audit.ledger import Entry, Head, Ledger, Query
from shimmy_jupyter.audit.merkle import Frontier, leaf_hash
from shimmy_jupyter.audit.store import SCHEMA
from shimmy_jupyter.audit.verify import Verdict, verify
from shimmy_jupyter.audit.writer import StoreFailed

SOON = 60
NOON = 1_795_262_400.0
ADMIN = Entry("act", "e1", NOON, "root", action="erase")
Harm = Callable[[sqlite3.Connection], object]


def fill(ledger: Ledger, requests: int, users: int = 3) -> None:
    for number in range(requests):
        who, when = f"user{number % users}", NOON + number
        ledger.append(
            [
                Entry("begin", f"r{number}", when, who, groups=("g",), model="m"),
                Entry("end", f"r{number}", when + 0.5, who, prompt_tokens=number, outcome="ok"),
            ]
        ).result(SOON)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """37 records: requests of three users, one of whom is erased, acts, and one that is pruned."""
    path = tmp_path_factory.mktemp("made") / "ledger.db"
    ledger = Ledger(path)
    fill(ledger, 15)
    ledger.erase("user1", by=ADMIN).result(SOON)
    ledger.prune(NOON + 2).result(SOON)
    fill(ledger, 2)
    ledger.append([Entry("act", "a1", NOON + 99, "root", action="load")]).result(SOON)
    ledger.close()
    assert verify(path).records == 37
    return path


@pytest.fixture
def path(made: Path, tmp_path: Path) -> Path:
    return shutil.copy(made, tmp_path / "ledger.db")


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """12 records, none of them erased."""
    ledger = Ledger(tmp_path / "plain.db")
    fill(ledger, 6)
    ledger.close()
    return ledger.path


def harm(path: Path, *how: str | Harm, **values: Any) -> Verdict:
    with closing(sqlite3.connect(path)) as connection, connection:
        for one in how:
            if isinstance(one, str):
                connection.execute(one, values)
            else:
                one(connection)
    return verify(path)


def rows(path: Path, query: str) -> list[Any]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(query).fetchall()


# Sound ones


def test_every_size_is_sound(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.db")
    assert ledger.size == 0
    heads = [ledger.head()]
    for number in range(35):
        ledger.append([Entry("begin", f"r{number}", NOON, "ann")]).result(SOON)
        heads.append(ledger.head())
        verdict = verify(ledger.path)
        assert verdict == Verdict(True, number + 1, heads[-1], open_requests=number + 1)
    for head in heads:
        assert verify(ledger.path, head) == Verdict(
            True, 35, heads[-1], open_requests=35, anchored=True
        )
    ledger.close()


def test_what_is_counted(path: Path) -> None:
    verdict = verify(path)
    assert (verdict.ok, verdict.records, verdict.erased, verdict.open_requests) == (True, 37, 12, 0)
    assert verdict.head is not None
    assert verdict.head.to_json()["size"] == 37


def test_requests_that_never_ended_are_no_fault(path: Path) -> None:
    ledger = Ledger(path)
    entries = [Entry("begin", f"x{number % 3}", NOON, "ann") for number in range(5)]
    ledger.append([*entries, Entry("end", "x1", NOON, "ann")]).result(SOON)
    ledger.close()
    verdict = verify(path)
    assert (verdict.ok, verdict.open_requests) == (True, 2)


def test_by_a_connection_and_while_it_is_written_to(path: Path) -> None:
    ledger = Ledger(path)

    def add(done: int, total: int) -> None:
        if done == total:
            fill(ledger, 3)

    with ledger.snapshot() as connection:
        assert verify(connection, None, add).records == 37
        assert connection.in_transaction
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        assert verify(connection).records == 43
        assert not connection.in_transaction
    ledger.close()


def test_progress(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shimmy_jupyter.audit.verify._STEP", 10)
    said: list[tuple[int, int]] = []
    verify(path, progress=lambda *how: said.append(how))
    assert said == [(10, 37), (20, 37), (30, 37), (37, 37)]


# Anything changed

TABLES = {
    "records": ("seq", "leaf_hash", "body"),
    "nodes": ("level", "idx", "hash"),
    "head": ("one", "size", "root", "timestamp"),
}


def another(value: Any, pick: random.Random) -> Any:
    """One that is near, or of another type, or nothing."""
    choices: list[Any] = [None, -1, 7.5, "text", b"bytes", '{"seq":1}', "{}", "[" * 5000]
    if isinstance(value, int):
        choices += [value + 1, value - 1, value + 1000, 1 << 62]
    if isinstance(value, bytes):
        at = pick.randrange(len(value))
        flipped = value[:at] + bytes([value[at] ^ 1 << pick.randrange(8)]) + value[at + 1 :]
        choices += [flipped, value[:-1], value + b"\0", value.hex(), bytes(32)] + [flipped] * 5
    if isinstance(value, str):
        at = pick.randrange(len(value))
        choices += [
            value[:at] + value[at + 1 :],
            value + " ",
            value.encode(),
            value[:at] + "7" + value[at:],
        ]
        choices += [value.replace("user0", "user2"), value.replace('"ok"', '"no"'), value.upper()]
    return pick.choice(
        [choice for choice in choices if (choice, type(choice)) != (value, type(value))]
    )


@pytest.mark.parametrize("column", [(t, c) for t, columns in TABLES.items() for c in columns])
def test_any_value_of_any_row(made: Path, tmp_path: Path, column: tuple[str, str]) -> None:
    table, name = column
    pick = random.Random(f"{table}.{name}")
    key = {"records": "seq", "nodes": "level * 1000 + idx", "head": "one"}[table]
    keys = [key for (key,) in rows(made, f"SELECT {key} FROM {table}")]
    found = refused = 0
    for number in range(120):
        path = tmp_path / f"{number}.db"
        shutil.copy(made, path)
        with closing(sqlite3.connect(path)) as connection:
            row = pick.choice(keys)
            where = f"FROM {table} WHERE {key} = ?"
            (before,) = connection.execute(f"SELECT {name} {where}", (row,)).fetchone()
            value = another(before, pick)
            try:
                connection.execute(f"UPDATE {table} SET {name} = ? WHERE {key} = ?", (value, row))
            except sqlite3.Error:  # a constraint, or a body that is no JSON
                refused += 1
                continue
            connection.commit()
            if connection.execute(f"SELECT {name} {where}", (row,)).fetchone() == (before,):
                continue  # converted to what it was
        verdict = verify(path)
        assert not verdict.ok, (row, before, value)
        assert verdict.problem
        found += 1
        path.unlink()
    assert found > 30 or (name in {"one", "seq", "level", "idx"} and refused)


@pytest.mark.parametrize("table", TABLES)
def test_any_row_deleted_or_doubled(made: Path, tmp_path: Path, table: str) -> None:
    key = {"records": "seq", "nodes": "level * 1000 + idx", "head": "one"}[table]
    for (number,) in rows(made, f"SELECT {key} FROM {table}"):
        path = tmp_path / f"{number}.db"
        shutil.copy(made, path)
        verdict = harm(path, f"DELETE FROM {table} WHERE {key} = :n", n=number)
        assert not verdict.ok, number
        if table == "records":
            assert verdict.first_bad == number
        path.unlink()


@pytest.mark.parametrize(
    "row",
    [
        "INSERT INTO records SELECT 37, leaf_hash, body FROM records WHERE seq = 36",
        "INSERT INTO records SELECT 37, leaf_hash, NULL FROM records WHERE seq = 36",
        "INSERT INTO records SELECT 1000, leaf_hash, body FROM records WHERE seq = 36",
        "INSERT INTO records SELECT -1, leaf_hash, body FROM records WHERE seq = 0",
        "INSERT INTO nodes SELECT 1, 18, hash FROM nodes WHERE level = 1 AND idx = 0",
        "INSERT INTO nodes SELECT 0, 0, leaf_hash FROM records WHERE seq = 0",
        "INSERT INTO nodes SELECT 60, 0, root FROM head",
        "INSERT INTO nodes SELECT -1, 0, root FROM head",
    ],
)
def test_any_row_put_in(path: Path, row: str) -> None:
    with_columns = row.replace("INTO records", "INTO records (seq, leaf_hash, body)")
    assert not harm(path, with_columns).ok


@pytest.mark.parametrize("columns", ["body", "leaf_hash", "body, leaf_hash"])
def test_any_two_records_swapped(made: Path, tmp_path: Path, columns: str) -> None:
    pick = random.Random(columns)
    everything = "SELECT seq, leaf_hash, body FROM records ORDER BY seq"
    for number in range(40):
        path = shutil.copy(made, tmp_path / f"{number}.db")
        one, other = sorted(pick.sample(range(37), 2))
        kept = rows(path, everything)
        found = {seq: values for seq, *values in rows(path, f"SELECT seq, {columns} FROM records")}
        change = (
            f"UPDATE records SET {', '.join(f'{c} = ?' for c in columns.split(', '))} WHERE seq = ?"
        )
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute(change, (*found[other], one))
            connection.execute(change, (*found[one], other))
        if rows(path, everything) == kept:
            continue  # both had no body
        verdict = verify(path)
        assert not verdict.ok, (one, other)
        assert verdict.first_bad in {one, other, one - 1}


@pytest.mark.parametrize("length", [0, 1, 2, 3, 7, 8, 11])
def test_a_tail_that_is_cut_off(plain: Path, length: int) -> None:
    verdict = harm(plain, "DELETE FROM records WHERE seq >= :n", n=length)
    assert verdict.problem == f"records from number {length} on are missing: there were 12"
    assert verdict.first_bad == length


def test_a_head_that_is_moved_as_well(plain: Path) -> None:
    def cut(connection: sqlite3.Connection) -> None:
        connection.execute("DELETE FROM records WHERE seq >= 8")
        connection.execute(
            "UPDATE head SET size = 8, root = (SELECT hash FROM nodes WHERE level = 3)"
        )

    assert not harm(plain, cut).ok  # the nodes above what is gone


@pytest.mark.parametrize(
    "change",
    [
        "DROP INDEX by_user",
        "CREATE INDEX more ON records (leaf_hash)",
        "CREATE TABLE more (x)",
        "CREATE TRIGGER quiet AFTER INSERT ON records BEGIN DELETE FROM records WHERE seq = NEW.seq; END",
        "CREATE VIEW more AS SELECT * FROM records",
        "ALTER TABLE records ADD COLUMN more TEXT",
        "ALTER TABLE records RENAME COLUMN model TO model2",
        "PRAGMA user_version=0",
    ],
)
def test_changed_tables(path: Path, change: str) -> None:
    assert harm(path, change).problem == "its tables are not those of a ledger"


def test_an_index_that_says_something_else(path: Path) -> None:
    """Such as one that does not list a person's records, so that no query finds them."""

    whole = path.read_bytes()
    listed = [one.start() for one in re.finditer(rb"(?<![\"-])user2", whole)]
    assert listed
    for at in listed:
        path.write_bytes(whole[:at] + b"user9" + whole[at + 5 :])
        verdict = verify(path)
        assert verdict.problem is not None
        assert verdict.problem.startswith("the file is damaged: ")
        assert verdict.records == 37


def test_bytes_of_the_file(made: Path, tmp_path: Path) -> None:
    """A bit of a page is in use, or it is not; what is in use is found, and nothing else is raised."""
    pick = random.Random(5)
    whole = made.read_bytes()
    bodies = [one for (one,) in rows(made, "SELECT body FROM records WHERE body IS NOT NULL")]
    for number in range(60):
        path = tmp_path / f"{number}.db"
        if number % 2:
            text = pick.choice(bodies).encode()
            at = whole.index(text) + pick.randrange(len(text))
        else:
            at = pick.randrange(100, len(whole))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        path.chmod(0o600)
        try:
            verdict = verify(path)
        except StoreFailed:
            continue
        assert not verdict.ok or not number % 2, at
        path.unlink()


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    with pytest.raises(
        StoreFailed, match=r"^ledger.db cannot be read: unable to open database file$"
    ):
        verify(path)
    path.write_bytes(b"garbage " * 1000)
    assert verify(path).problem == "the file is damaged: file is not a database"
    path.write_bytes(b"")
    assert verify(path).problem == "its tables are not those of a ledger"


def test_which_record_is_named(plain: Path) -> None:
    body = json.dumps({"v": 1, "seq": 4})
    assert harm(plain, "UPDATE records SET body = :b WHERE seq = 4", b=body).first_bad == 4
    # With its own hash, only the one over it and its neighbour tells.
    leaf = leaf_hash(body.encode())
    verdict = harm(plain, "UPDATE records SET leaf_hash = :l WHERE seq = 4", l=leaf)
    assert verdict.first_bad == 4
    assert "records 4 to 5" in (verdict.problem or "")
    assert verdict.records == 6
    body = json.dumps({"v": 1, "seq": 5})
    leaf = leaf_hash(body.encode())
    verdict = harm(
        plain, "UPDATE records SET leaf_hash = :l, body = :b WHERE seq = 4", l=leaf, b=body
    )
    assert verdict.problem == "record 4 does not say that it is number 4"


def test_the_last_record_may_be_under_no_hash_but_the_head(plain: Path) -> None:
    ledger = Ledger(plain)
    ledger.append([Entry("begin", "r9", NOON, "ann")]).result(SOON)
    ledger.close()
    body = json.dumps({"v": 1, "seq": 12})
    verdict = harm(
        plain,
        "UPDATE records SET body = :b, leaf_hash = :l WHERE seq = 12",
        b=body,
        l=leaf_hash(body.encode()),
    )
    assert (verdict.first_bad, verdict.problem) == (
        12,
        "record 12, or the head, is not what it was",
    )


# Bodies that are missing


def test_a_body_that_nobody_removed(path: Path, plain: Path) -> None:
    verdict = harm(plain, "UPDATE records SET body = NULL WHERE seq = 7")
    assert verdict.first_bad == 7
    assert verdict.problem == "record 7 has no body, and no act says that it was removed"
    last = harm(path, "UPDATE records SET body = NULL WHERE seq = 36")
    assert last.first_bad == 36


def test_a_body_that_was_put_back(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.db")
    fill(ledger, 6)
    (kept,) = [one.body for one in ledger.stored(Query(), 2, 1)]
    ledger.erase("user1", by=ADMIN).result(SOON)
    ledger.close()
    verdict = harm(ledger.path, "UPDATE records SET body = :b WHERE seq = 3", b=kept)
    assert verdict.problem == "record 3 has a body, and an act says that it was removed"
    assert verdict.first_bad == 3


@pytest.mark.parametrize(
    "erased",
    [None, [], [[2, 3]], [[0, 0]], [[1, 2]], [[0, 2]], "01", [[1, 0]], [[0, 1, 1]], [[0, "1"]],
     [[-1, 1]], [[0, 5]], [[0, 12]], [[0, True]], [0, 1], {"0": 1}],
)  # fmt: skip
def test_an_act_for_something_else(plain: Path, erased: object) -> None:
    ledger = Ledger(plain)
    detail = {} if erased is None else {"erased": erased}
    ledger.append([Entry("act", "e", NOON, "root", action="erase", detail=detail)]).result(SOON)
    ledger.close()
    assert not harm(plain, "UPDATE records SET body = NULL WHERE seq IN (0, 1)").ok


def test_an_act_for_what_was_not_there_yet(plain: Path) -> None:
    ledger = Ledger(plain)
    act = Entry("act", "e", NOON, "root", action="erase", detail={"erased": [[13, 13]]})
    ledger.append([act, *[Entry("begin", "r9", NOON, "ann")] * 2]).result(SOON)
    ledger.close()
    verdict = harm(plain, "UPDATE records SET body = NULL WHERE seq = 13")
    assert verdict.problem == "record 12 does not say which records it removed"


def test_acts_that_account_for_it(plain: Path) -> None:
    """In any order, touching and twice."""
    ledger = Ledger(plain)
    for runs in ([[4, 5]], [[0, 1], [2, 2]], [[3, 3], [1, 1]]):
        detail = {"erased": runs}
        ledger.append([Entry("act", "e", NOON, "root", action="prune", detail=detail)]).result(SOON)
    ledger.close()
    assert harm(plain, "UPDATE records SET body = NULL WHERE seq < 6").ok


def test_another_act_accounts_for_nothing(plain: Path) -> None:
    ledger = Ledger(plain)
    act = Entry("act", "e", NOON, "root", action="load", detail={"erased": [[0, 1]]})
    ledger.append([act]).result(SOON)
    ledger.close()
    assert not harm(plain, "UPDATE records SET body = NULL WHERE seq < 2").ok


# History computed anew


def recompute(path: Path, edit: Callable[[list[tuple[bytes, str | None]]], object]) -> None:
    """What somebody with the file and this program can do: everything fits together again."""
    with closing(sqlite3.connect(path)) as connection, connection:
        found = connection.execute("SELECT leaf_hash, body FROM records ORDER BY seq").fetchall()
        edit(found)
        for table in ("records", "nodes", "head"):
            connection.execute(f"DELETE FROM {table}")
        tree, latest = Frontier(), ""
        for kept, text in found:
            leaf, body = kept, text
            record = json.loads(body) if body is not None else None
            if record is not None:
                record["seq"] = tree.size
                body = json.dumps(record, sort_keys=True, separators=(",", ":"))
                leaf, latest = leaf_hash(body.encode()), record["timestamp"]
            connection.execute(
                "INSERT INTO records (seq, leaf_hash, body) VALUES (?, ?, ?)",
                (tree.size, leaf, body),
            )
            connection.executemany("INSERT INTO nodes VALUES (?, ?, ?)", tree.append(leaf))
        values = (tree.size, tree.root(), latest)
        connection.execute("INSERT INTO head VALUES (1, ?, ?, ?)", values)


def edited(number: int) -> Callable[[list[tuple[bytes, str | None]]], None]:
    def edit(found: list[tuple[bytes, str | None]]) -> None:
        found[number] = b"", (found[number][1] or "").replace("user", "eve")

    return edit


@pytest.fixture
def heads(tmp_path: Path) -> tuple[Path, list[Head]]:
    """A ledger of 24 records, and all its heads."""
    ledger = Ledger(tmp_path / "history.db")
    heads = [ledger.head()]
    for number in range(12):
        ledger.append(
            [
                Entry("begin", f"r{number}", NOON + number, "user"),
                Entry("end", f"r{number}", NOON + number, "user"),
            ]
        ).result(SOON)
        heads.append(ledger.head())
    ledger.close()
    return ledger.path, heads


def test_recomputing_nothing_changes_nothing(heads: tuple[Path, list[Head]]) -> None:
    path, before = heads
    recompute(path, lambda _found: None)
    assert all(verify(path, head).ok for head in before)


@pytest.mark.parametrize("number", [0, 1, 10, 13, 22, 23])
def test_a_history_computed_anew_from_an_edited_record(
    heads: tuple[Path, list[Head]], number: int
) -> None:
    path, before = heads
    recompute(path, edited(number))
    assert verify(path).ok  # it cannot tell by itself
    for head in before:
        verdict = verify(path, head)
        assert verdict.ok is (head.size <= number)
        if not verdict.ok:
            wrong = f"rewritten: the first {head.size} records are not those of the head"
            assert verdict.problem == wrong


@pytest.mark.parametrize(
    "edit",
    [
        lambda found: found.pop(5),
        lambda found: found.insert(5, found[4]),
        lambda found: found.reverse(),
        lambda found: found.__setitem__(slice(2, 4), found[3:1:-1]),
    ],
)
def test_a_history_with_records_moved(heads: tuple[Path, list[Head]], edit: Any) -> None:
    path, before = heads
    recompute(path, edit)
    assert verify(path).ok
    assert (verify(path, before[6]).problem or "").startswith("rewritten")
    assert verify(path, before[0]).ok


def test_a_shorter_history(heads: tuple[Path, list[Head]]) -> None:
    path, before = heads
    recompute(path, lambda found: found.__delitem__(slice(15, None)))
    verdict = verify(path)
    assert (verdict.ok, verdict.records) == (True, 15)
    assert verify(path, before[7]).ok
    verdict = verify(path, before[8])
    assert verdict.problem == "shortened: there were 16 records, and there are 15"
    assert (verdict.first_bad, verdict.anchored) == (15, True)


def test_a_body_removed_with_an_act_and_a_history_computed_anew(
    heads: tuple[Path, list[Head]],
) -> None:
    """Erasing as it should be is consistent with every head; its own hash stays where the body goes."""
    path, before = heads
    ledger = Ledger(path)
    ledger.erase("user", by=ADMIN).result(SOON)
    ledger.close()
    assert all(verify(path, head).ok for head in before)
    recompute(path, lambda found: found.__setitem__(3, (leaf_hash(b"another"), None)))
    assert verify(path).ok
    assert not verify(path, before[-1]).ok


def test_another_ledgers_head(heads: tuple[Path, list[Head]], plain: Path) -> None:
    path, _ = heads
    head = verify(plain).head
    assert head is not None
    assert (verify(path, head).problem or "").startswith("rewritten")
    empty = Head(0, "00" * 32, "")
    assert (verify(path, empty).problem or "").startswith("rewritten")


def test_what_is_wrong_by_itself_is_named_before_the_head(heads: tuple[Path, list[Head]]) -> None:
    path, before = heads
    harm(path, "UPDATE records SET body = '{}' WHERE seq = 9")
    assert verify(path, before[-1]).first_bad == 9


# Many


def test_a_hundred_thousand_records(tmp_path: Path) -> None:
    """Below ten seconds of this machine's time for one thread, and in memory that does not grow with them."""
    path, number = tmp_path / "large.db", 100_000
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.executescript(SCHEMA + "; PRAGMA user_version=1; PRAGMA synchronous=OFF")
        tree = Frontier()
        for seq in range(number):
            body = (
                f'{{"kind":"{"end" if seq & 1 else "begin"}","pad":"{"x" * 500}","request_id":"r{seq // 2}",'
                f'"seq":{seq},"timestamp":"2026-11-21T12:00:00.000Z","user":"u{seq % 9}","v":1}}'
            )
            leaf = leaf_hash(body.encode())
            connection.execute(
                "INSERT INTO records (seq, leaf_hash, body) VALUES (?, ?, ?)", (seq, leaf, body)
            )
            connection.executemany("INSERT INTO nodes VALUES (?, ?, ?)", tree.append(leaf))
        values = (number, tree.root(), "2026-11-21T12:00:00.000Z")
        connection.execute("UPDATE head SET size = ?, root = ?, timestamp = ?", values)
    begun = time.thread_time()
    verdict = verify(path)
    assert time.thread_time() - begun < 10
    assert (verdict.ok, verdict.records, verdict.open_requests) == (True, number, 0)
    tracemalloc.start()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("BEGIN")
        connection.execute("DELETE FROM records WHERE seq >= 20000")
        assert verify(connection).first_bad == 20_000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000
