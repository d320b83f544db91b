"""The ledger: records in, receipts, queries, figures and proofs out.

Records: every field and no other; canonical, salted; cut texts, surrogates, NULs, depth, large and odd
numbers, what is no JSON; times. Entries that cannot be. Appending: order, several at once, none, receipts,
heads, after a restart, a failure in between, rolled back while another process adds. Processes: two at
once; one killed under load. Failures: full disk, garbage, removed, locked, newer, damaged.
Digests: per user, kept, the key's modes, made by many at once, loose, damaged, another kind of file, no
hard links. Queries: each filter, pages, cursors, limits, erased. Usage: groupings, groups, outcomes, times.
Proofs: of a request, of an act, at an earlier size, of nothing; checked offline, and each part of the
document changed. Consistency between heads. Erasing: whose, which requests, by oneself, nobody's, twice,
in parts, bytes out of the files, while somebody reads; what stays. Pruning: by time, nothing, twice.
Heads from JSON. Durable, network, modes, size and bytes, closing.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import shimmy_jupyter
from shimmy_jupyter.audit import erasure, key, writer
from shimmy_jupyter.audit.key import Digests
from shimmy_jupyter.audit.ledger import Head, Ledger, Query, Receipt
from shimmy_jupyter.audit.merkle import leaf_hash, verify_consistency
from shimmy_jupyter.audit.records import FIELDS, LONGEST, Entry, iso, to_body, to_record
from shimmy_jupyter.audit.verify import verify, verify_receipt
from shimmy_jupyter.audit.writer import StoreFailed

SOON = 60
NOON = 1_795_262_400.0  # 2026-11-21T12:00:00Z
WHERE = {**os.environ, "PYTHONPATH": str(Path(shimmy_jupyter.__file__).parents[1])}
FULL = Entry(
    "end",
    "r1",
    NOON + 0.25,
    "ann",
    "hub",
    ("staff", "lab"),
    "10.0.0.1",
    "/shimmy/v1/completions",
    "work/a.ipynb",
    "c1",
    "tiny",
    "ab" * 32,
    10,
    4,
    7,
    12.34567,
    3.0,
    "error",
    "engine_crashed",
    {"temperature": 0.0, "stop": ["a"], "seed": 0},
    "hmac-sha256:00",
    "hmac-sha256:01",
    None,
    {"note": "x"},
    {"prompt": "hello", "output": "world"},
)
ADMIN = Entry("act", "e1", NOON + 100, "root", client_ip="10.0.0.9", action="erase")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "secret-folder" / "ledger.db"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    ledger = Ledger(path, clock=lambda: NOON + 1000)
    yield ledger
    ledger.close()


def begin(number: int, user: str = "ann", **more: Any) -> Entry:
    return Entry("begin", f"r{number}", NOON + number, user, **more)


def end(number: int, user: str = "ann", **more: Any) -> Entry:
    return Entry("end", f"r{number}", NOON + number + 0.5, user, **{"outcome": "ok", **more})


def add(ledger: Ledger, *entries: Entry) -> list[Receipt]:
    return ledger.append(entries).result(SOON)


def pairs(ledger: Ledger, *users: str) -> list[Receipt]:
    """A request of each, r0 and so on."""
    return add(ledger, *(f(n, user) for n, user in enumerate(users) for f in (begin, end)))


def bodies(ledger: Ledger) -> list[dict[str, Any] | None]:
    return [one.body and json.loads(one.body) for one in ledger.stored(Query())]


def sound(ledger: Ledger, against: Head | None = None) -> int:
    verdict = verify(ledger.path, against)
    assert verdict.problem is None
    assert verdict.ok
    return verdict.records


# Records


def test_a_record_has_every_field_and_no_other() -> None:
    act = dataclasses.replace(FULL, kind="act", action="load")
    record = json.loads(to_body(to_record(act), 5))
    assert set(record) == set(FIELDS)
    assert record["v"] == 1
    assert record["seq"] == 5
    assert record["timestamp"] == "2026-11-21T12:00:00.250Z"
    assert record["groups"] == ["staff", "lab"]
    assert record["duration_ms"] == 12.346
    assert record["parameters"] == {"temperature": 0.0, "stop": ["a"], "seed": 0}
    assert record["content"] == {"prompt": "hello", "output": "world"}


def test_what_is_not_known_is_not_there() -> None:
    record = to_record(Entry("begin", "r1", NOON, "ann", prompt_tokens=0))
    assert set(record) == {
        "v", "timestamp", "kind", "request_id", "user", "user_kind", "prompt_tokens",
    }  # fmt: skip


def test_a_body_is_canonical_and_salted() -> None:
    record = to_record(dataclasses.replace(FULL, user="Änn"))
    one, other = to_body(record, 1), to_body(record, 1)
    assert one != other
    assert "Änn" in one
    assert one == json.dumps(
        json.loads(one), sort_keys=True, separators=(",", ":"), ensure_ascii=False
    )
    assert len(bytes.fromhex(json.loads(one)["salt"])) == 16


def test_texts_are_cut_and_stay_different() -> None:
    for name in ("notebook", "cell", "request_path", "model", "user", "code"):
        long = [to_record(Entry("begin", "r", NOON, **{"user": "u", name: "x" * LONGEST + end}))
                for end in ("", "a", "b")]  # fmt: skip
        texts = [record[name] for record in long]
        assert texts[0] == "x" * LONGEST
        assert len(set(texts)) == 3
        assert all(text.startswith("x" * LONGEST + "… (") for text in texts[1:])
        assert all(len(text) < LONGEST + 30 for text in texts)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters()), inner, max_size=3),
)  # fmt: skip
TEXT = st.text(st.characters(categories=None))


@given(TEXT, TEXT, st.dictionaries(TEXT, JSON, max_size=3))
def test_anything_can_be_stored_and_read(user: str, cell: str, parameters: dict[str, Any]) -> None:
    entry = Entry(
        "begin", "r", NOON, user, cell=cell, parameters=parameters, content={"prompt": cell}
    )
    body = to_body(to_record(entry), 0)
    body.encode()
    connection = sqlite3.connect(":memory:")
    with connection:
        (found,) = connection.execute("SELECT json_extract(?, '$.user')", (body,)).fetchone()
    connection.close()
    assert found == json.loads(body)["user"]


def test_what_json_cannot_say() -> None:
    deep: list[Any] = []
    for _ in range(3000):
        deep = [deep]
    odd = {
        "nan": float("nan"),
        "big": 10**400,
        "deep": deep,
        "half": "\ud800",
        "nul": "a\0b",
        1: (),
    }
    record = json.loads(to_body(to_record(begin(1, parameters=odd)), 0))["parameters"]
    assert record["nan"] == "nan"
    assert record["big"] == "a number of more than 64 bits"
    assert record["half"] == "\\ud800"
    assert record["nul"] == "a\\x00b"
    assert record["1"] == []
    assert json.dumps(record["deep"]).count("[") == 7
    with pytest.raises(TypeError, match="a bytes is not JSON"):
        to_record(begin(1, parameters={"x": b""}))
    assert "duration_ms" not in to_record(end(1, duration_ms=float("inf")))


def test_content_has_two_names() -> None:
    record = to_record(begin(1, content={"prompt": "x" * 5000, "other": "y"}))
    assert record["content"] == {"prompt": "x" * 5000}


@pytest.mark.parametrize("time", [float("nan"), float("inf"), 1e300, -1e300])
def test_no_time(time: float) -> None:
    with pytest.raises(ValueError, match=r"time|NaN"):
        Entry("begin", "r", time, "ann")


def test_times_sort_as_texts() -> None:
    times = [0, 0.0005, 1, 1.5, NOON, NOON + 0.001, NOON + 1]
    assert sorted(map(iso, times)) == [iso(time) for time in times]
    assert {len(iso(time)) for time in times} == {24}


@pytest.mark.parametrize(
    ("kind", "action"), [("start", None), ("begin", "load"), ("act", None), ("", None)]
)
def test_no_entry(kind: str, action: str | None) -> None:
    with pytest.raises(ValueError, match=r"kind|action"):
        Entry(kind, "r", NOON, "ann", action=action)


# Appending


def test_receipts_are_of_what_is_stored(ledger: Ledger) -> None:
    receipts = pairs(ledger, "ann", "bob")
    assert [(r.request_id, r.seq) for r in receipts] == [("r0", 0), ("r0", 1), ("r1", 2), ("r1", 3)]
    for receipt, one in zip(receipts, ledger.stored(Query()), strict=True):
        assert one.body is not None
        assert receipt.leaf_hash == one.leaf_hash == leaf_hash(one.body.encode()).hex()
        assert json.loads(one.body)["seq"] == receipt.seq
    assert ledger.head().timestamp == "2026-11-21T12:00:01.500Z"
    assert ledger.size == 4
    assert sound(ledger) == 4


def test_nothing_appended(ledger: Ledger) -> None:
    assert add(ledger) == []
    assert ledger.head() == Head(
        0, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855", ""
    )
    assert sound(ledger) == 0


def test_it_goes_on_after_a_restart(path: Path) -> None:
    heads = []
    for number in range(5):
        ledger = Ledger(path)
        pairs(ledger, *["ann"] * number)
        heads.append(ledger.head())
        ledger.close()
    assert [head.size for head in heads] == [0, 2, 6, 12, 20]
    for head in heads:
        assert sound(ledger, head) == 20


def test_an_entry_that_is_no_json_fails_alone(ledger: Ledger) -> None:
    with pytest.raises(TypeError):
        ledger.append([begin(0), begin(1, parameters={"x": object()})])
    pairs(ledger, "ann")
    assert sound(ledger) == 2


def test_what_is_rolled_back_is_forgotten(ledger: Ledger, path: Path) -> None:
    """Another process may have added as many records meanwhile."""
    pairs(ledger, "ann")
    pages = ledger._writer.submit(lambda c: c.execute("PRAGMA page_count").fetchone()[0]).result(
        SOON
    )
    ledger._writer.submit(lambda c: c.execute(f"PRAGMA max_page_count={pages}")).result(SOON)
    with pytest.raises(StoreFailed, match=r"ledger.db cannot be written: database or disk is full"):
        add(ledger, begin(5, content={"prompt": "x" * 50_000}))
    assert ledger.failure is not None
    other = Ledger(path)
    add(other, begin(6))
    other.close()
    pairs(ledger, "bob")
    assert ledger.failure is None
    assert sound(ledger) == 5


def test_half_of_what_was_to_be_added(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tree was to become is forgotten with it."""
    add(ledger, begin(0))
    with monkeypatch.context() as patch:
        texts = iter(["{}"])
        patch.setattr("shimmy_jupyter.audit.ledger.to_body", lambda *_: next(texts))
        with pytest.raises(StopIteration):
            add(ledger, begin(1), begin(2))
    add(ledger, begin(3))
    assert sound(ledger) == 2


def test_what_others_have_put_in_its_place_is_built_on(ledger: Ledger, path: Path) -> None:
    """That it is of the same size does not make it the same."""
    other = Ledger(path.with_name("other.db"))
    pairs(other, "bob")
    other.close()
    pairs(ledger, "ann")
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("ATTACH ? AS other", (str(other.path),))
        connection.execute("BEGIN IMMEDIATE")
        for table, columns in (("records", "seq, leaf_hash, body"), ("nodes", "*"), ("head", "*")):
            names = f"({columns})" if columns != "*" else ""
            connection.execute(f"DELETE FROM main.{table}")
            connection.execute(
                f"INSERT INTO main.{table} {names} SELECT {columns} FROM other.{table}"
            )
        connection.execute("COMMIT")
    pairs(ledger, "eve")
    assert sound(ledger, Head.from_json(other.head().to_json())) == 4


def test_two_in_one_process_take_turns(ledger: Ledger, path: Path) -> None:
    other = Ledger(path)
    for number in range(10):
        add(ledger, begin(number))
        add(other, end(number))
    other.close()
    assert [body and body["kind"] for body in bodies(ledger)] == ["begin", "end"] * 10
    assert sound(ledger) == 20


def test_many_threads(ledger: Ledger) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: add(ledger, begin(n), end(n)), range(150)))
    assert all(second.seq == first.seq + 1 for first, second in found)
    assert sorted(r.seq for pair in found for r in pair) == list(range(300))
    assert sound(ledger) == 300


WRITING = """
import sys, threading
from pathlib import Path
from shimmy_jupyter.audit.ledger import Entry, Ledger

ledger = Ledger(Path(sys.argv[1]))
lock = threading.Lock()

def acknowledge(done):
    with lock:
        for receipt in done.result():
            print(receipt.request_id, receipt.seq, receipt.leaf_hash, flush=True)

def load(name, count):
    for number in range(count):
        entry = Entry("begin", f"{name}-{number}", 1e9 + number, name, notebook="x" * 300)
        waiting = ledger.append([entry])
        waiting.add_done_callback(acknowledge)
        if number % 20 == 19:
            waiting.result()

threads = [threading.Thread(target=load, args=(sys.argv[2] + str(n), int(sys.argv[3])), daemon=True)
           for n in range(4)]
sys.stdin.readline()
for thread in threads: thread.start()
for thread in threads: thread.join()
ledger.close()
"""


def write(path: Path, name: str, count: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITING, path, name, str(count)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=WHERE,
    )  # fmt: skip


def test_two_processes_at_once(path: Path) -> None:
    children = [write(path, name, 100) for name in ("a", "b")]
    for child in children:
        assert child.stdin is not None
        child.stdin.write("\n")
        child.stdin.flush()
    lines = []
    for child in children:
        lines += child.communicate(timeout=SOON)[0].splitlines()
        assert child.returncode == 0
    ledger = Ledger(path)
    stored = {one.seq: one for one in ledger.stored(Query())}
    assert sorted(int(line.split()[1]) for line in lines) == list(range(800))
    for line in lines:
        request_id, seq, leaf = line.split()
        one = stored[int(seq)]
        assert one.leaf_hash == leaf
        assert json.loads(one.body or "")["request_id"] == request_id
    assert sound(ledger) == 800
    ledger.close()


@pytest.mark.parametrize("after", [1, 300, 2500])
def test_a_kill_loses_nothing_that_was_acknowledged(path: Path, after: int) -> None:
    child = write(path, "k", 1_000_000)
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write("\n")
    child.stdin.flush()
    lines = [child.stdout.readline() for _ in range(after)]
    child.send_signal(signal.SIGKILL)
    lines += child.stdout.read().splitlines(keepends=True)
    assert child.wait(SOON) == -signal.SIGKILL
    child.stdin.close()
    child.stdout.close()
    whole = [line.split() for line in lines if line.endswith("\n")]
    assert len(whole) >= after
    ledger = Ledger(path)
    with ledger.snapshot() as connection:
        stored = dict(connection.execute("SELECT seq, request_id || hex(leaf_hash) FROM records"))
    for request_id, seq, leaf in whole:
        assert stored[int(seq)] == request_id + leaf.upper()
    assert sound(ledger) == len(stored)
    add(ledger, begin(1))
    assert sound(ledger) == len(stored) + 1
    ledger.close()


# Failures


def failing(ledger: Ledger, match: str) -> None:
    with pytest.raises(StoreFailed, match=match) as caught:
        add(ledger, begin(1))
    assert "secret-folder" not in str(caught.value)
    assert ledger.failure == str(caught.value)


def test_garbage_in_its_place(ledger: Ledger, path: Path) -> None:
    pairs(ledger, "ann")
    other = path.with_name("garbage")
    other.write_bytes(b"garbage " * 1000)
    other.replace(path)
    path.with_name("ledger.db-wal").unlink()  # SQLite would take it for the new file's
    failing(ledger, "removed or replaced")
    failing(ledger, "file is not a database")
    with pytest.raises(StoreFailed, match=r"^ledger.db cannot be read: file is not a database$"):
        ledger.query(Query())
    path.unlink()
    pairs(ledger, "bob")
    assert ledger.failure is None
    assert sound(ledger) == 2


def test_a_removed_ledger_is_no_shorter_one_unseen(ledger: Ledger, path: Path) -> None:
    pairs(ledger, "ann")
    head = ledger.head()
    for file in path.parent.glob("ledger.db*"):
        file.unlink()
    failing(ledger, "removed or replaced")
    add(ledger, begin(1))
    assert verify(path, head).problem == "shortened: there were 2 records, and there are 1"


def test_a_locked_ledger(ledger: Ledger, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "_BUSY", 0.05)
    pairs(ledger, "ann")
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    failing(ledger, "ledger.db cannot be written: database is locked")
    assert ledger.size == 2
    other.close()
    pairs(ledger, "bob")
    assert sound(ledger) == 4


def test_a_newer_ledger_is_refused(ledger: Ledger, path: Path) -> None:
    pairs(ledger, "ann")
    ledger.close()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version=2")
    connection.close()
    newer = Ledger(path)
    failing(newer, "newer version of this package: its format is 2, and 1 is the latest known")
    with pytest.raises(StoreFailed, match="newer version"):
        newer.head()
    with pytest.raises(StoreFailed, match="format 2"):
        verify(path)
    newer.close()


def test_an_old_sqlite_is_refused(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 30, 1))
    failing(ledger, r"needs SQLite 3\.31 or later")


@pytest.mark.parametrize(
    "harm",
    [
        "DELETE FROM head",
        "UPDATE head SET size = 3",
        "UPDATE head SET size = 9",
        "UPDATE head SET root = zeroblob(32)",
        "UPDATE head SET root = 'text'",
        "DELETE FROM nodes",
        "UPDATE nodes SET hash = zeroblob(32)",
        "UPDATE records SET leaf_hash = zeroblob(32) WHERE seq = 4",
        "DELETE FROM records WHERE seq = 4",
        "INSERT INTO records (seq, leaf_hash) VALUES (5, zeroblob(32))",
    ],
)
def test_nothing_is_added_to_a_damaged_ledger(ledger: Ledger, path: Path, harm: str) -> None:
    """Where the harm is below what is needed to add to it, `verify` is who finds it."""
    pairs(ledger, "ann", "bob")
    add(ledger, begin(9))
    ledger.close()
    with sqlite3.connect(path) as connection:
        connection.execute(harm)
    connection.close()
    again = Ledger(path)
    failing(again, "the ledger is damaged|UNIQUE constraint")
    again.close()
    assert not verify(path).ok


# Digests


def test_digests_are_keyed_and_per_user(ledger: Ledger, tmp_path: Path) -> None:
    mine = ledger.digest("hello", "ann")
    assert mine == ledger.digest(b"hello", "ann")
    assert mine.startswith("hmac-sha256:")
    assert len(bytes.fromhex(mine.removeprefix("hmac-sha256:"))) == 32
    others = {ledger.digest("hello", "bob"), ledger.digest("hello"), ledger.digest("hellp", "ann")}
    others |= {ledger.pseudonym("hello"), ledger.pseudonym("ann")}
    others |= {Ledger(tmp_path / "other" / "ledger.db").digest("hello", "ann")}
    assert len(others | {mine}) == 7
    ledger.digest("half \ud800", "half \ud800")


def test_the_key_is_kept(ledger: Ledger, path: Path) -> None:
    mask = os.umask(0)
    try:
        one = ledger.digest("x")
    finally:
        os.umask(mask)
    assert Ledger(path).digest("x") == one
    file = path.with_name("ledger.key")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [found.name for found in path.parent.iterdir()] == ["ledger.key"]
    assert ledger.notes == ()


def test_many_make_the_key_at_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them find none, and have made one, before the first puts it there."""
    ready = threading.Barrier(8)
    read, put = Digests._read, Digests._put

    def make(self: Digests) -> bytes:
        self._make()
        return read(self)

    def late(self: Digests, beside: Path) -> None:
        ready.wait(SOON)
        put(self, beside)

    monkeypatch.setattr(Digests, "_read", make)
    monkeypatch.setattr(Digests, "_put", late)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: Ledger(path).digest("x"), range(8)))
    assert len(set(found)) == 1


def test_no_hard_links(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_args: object) -> None:
        raise PermissionError(1, "not here")

    monkeypatch.setattr(os, "link", link)
    one = Ledger(path).digest("x")
    assert Ledger(path).digest("x") == one
    assert stat.S_IMODE(path.with_name("ledger.key").stat().st_mode) == 0o600


def test_a_key_that_others_could_read(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = Ledger(path).digest("x")
    path.with_name("ledger.key").chmod(0o644)
    ledger = Ledger(path)
    assert ledger.digest("x") == one
    assert stat.S_IMODE(path.with_name("ledger.key").stat().st_mode) == 0o600
    assert "others could read ledger.key; now they cannot" in ledger.notes[0]
    assert ledger.notes[0] in caplog.text


@pytest.mark.parametrize("text", ["", "no key", "0" * 63, "0" * 65, "G" * 64])
def test_a_damaged_key(
    ledger: Ledger, path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key, "_UNWRITTEN", 0.0)
    path.parent.mkdir()
    path.with_name("ledger.key").write_text(text)
    with pytest.raises(StoreFailed, match=r"^ledger.key is damaged: 64 hex digits would be right$"):
        ledger.digest("x")


def test_a_key_that_is_no_file(ledger: Ledger, path: Path, tmp_path: Path) -> None:
    path.parent.mkdir()
    place = path.with_name("ledger.key")
    os.mkfifo(place)
    with pytest.raises(StoreFailed, match=r"^ledger.key is not a file of this account$"):
        ledger.digest("x")
    place.unlink()
    (tmp_path / "elsewhere").write_text("0" * 64)
    place.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(
        StoreFailed, match=r"^ledger.key cannot be used: Too many levels of symbolic"
    ):
        ledger.digest("x")


# Queries


@pytest.fixture
def varied(ledger: Ledger) -> Ledger:
    add(
        ledger,
        begin(0, "ann", model="m1"),
        end(0, "ann", model="m1", groups=("g1", "g2"), prompt_tokens=10, cached_tokens=1),
        begin(1, "bob", model="m2"),
        end(1, "bob", model="m2", outcome="denied", groups=("g2",)),
        Entry("act", "a2", NOON + 2, "root", action="load", model="m1", outcome="accepted"),
        begin(3, "ann", model="m2"),
        end(3, "ann", model="m2", outcome="limited", tokens_generated=3),
        begin(4, "ann", model="m2"),
        end(4, "ann", model="m2", outcome="error", code="x", prompt_tokens=2, groups=("g1",)),
        begin(5, "ann\0x", model="m2"),
    )
    return ledger


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        (Query(), list(range(10))),
        (Query(user="ann"), [0, 1, 5, 6, 7, 8]),
        (Query(user="ann\0x"), [9]),
        (Query(user="none"), []),
        (Query(model="m1"), [0, 1, 4]),
        (Query(outcome="denied"), [3]),
        (Query(kind="act"), [4]),
        (Query(action="load"), [4]),
        (Query(request_id="r3"), [5, 6]),
        (Query(since=NOON + 2), [4, 5, 6, 7, 8, 9]),
        (Query(until=NOON + 2), [0, 1, 2, 3]),
        (Query(since=NOON + 0.5, until=NOON + 3.5), [1, 2, 3, 4, 5]),
        (Query(user="ann", kind="end", model="m2", since=NOON + 4), [8]),
    ],
)
def test_filters(varied: Ledger, query: Query, expected: list[int]) -> None:
    assert [record["seq"] for record in varied.query(query).records] == expected[::-1]
    assert [one.seq for one in varied.stored(query)] == expected


def test_pages(varied: Ledger) -> None:
    found: list[int] = []
    cursor, sizes = None, []
    while True:
        page = varied.query(Query(), cursor, 4)
        found += [record["seq"] for record in page.records]
        sizes.append(len(page.records))
        if (cursor := page.next_cursor) is None:
            break
    assert sizes == [4, 4, 2]
    assert found == list(range(9, -1, -1))
    assert varied.query(Query(), None, 10).next_cursor is None
    assert varied.query(Query(), 0).records == []


def test_a_record_of_a_page(varied: Ledger) -> None:
    record = varied.query(Query(request_id="a2")).records[0]
    stored = varied.stored(Query(request_id="a2"))[0]
    assert record == {**json.loads(stored.body or ""), "leaf_hash": stored.leaf_hash}


@pytest.mark.parametrize(("cursor", "limit"), [(None, 0), (None, 1001), (-2, 10), (1 << 63, 10)])
def test_no_page(varied: Ledger, cursor: int | None, limit: int) -> None:
    with pytest.raises(ValueError, match=r"limit: 1 to 1000|cursor: a record's number"):
        varied.query(Query(), cursor, limit)


def test_indexes_are_used(varied: Ledger) -> None:
    with varied.snapshot() as connection:
        for name in ("user", "model", "outcome", "action", "request_id"):
            plan = connection.execute(
                f"EXPLAIN QUERY PLAN SELECT body FROM records WHERE {name} = ? AND seq < ? ORDER BY seq DESC",
                ("x", 9),
            ).fetchall()
            assert "USING INDEX by_" in plan[0][3]
            assert len(plan) == 1


def test_usage(varied: Ledger) -> None:
    zero = {"prompt_tokens": 0, "cached_tokens": 0, "tokens_generated": 0,
            "denied": 0, "limited": 0, "errors": 0}  # fmt: skip
    assert varied.usage(by=()) == [
        {"requests": 4, "prompt_tokens": 12, "cached_tokens": 1, "tokens_generated": 3,
         "denied": 1, "limited": 1, "errors": 1}
    ]  # fmt: skip
    assert varied.usage(by=["user"]) == [
        {"user": "ann", "requests": 3, **zero, "prompt_tokens": 12, "cached_tokens": 1,
         "tokens_generated": 3, "limited": 1, "errors": 1},
        {"user": "bob", "requests": 1, **zero, "denied": 1},
    ]  # fmt: skip
    groups = varied.usage(by=["group"])
    assert [(row["group"], row["requests"]) for row in groups] == [(None, 1), ("g1", 2), ("g2", 2)]
    assert [(r["user"], r["group"], r["model"]) for r in varied.usage()] == [
        ("ann", None, "m2"), ("ann", "g1", "m1"), ("ann", "g1", "m2"), ("ann", "g2", "m1"),
        ("bob", "g2", "m2"),
    ]  # fmt: skip
    assert varied.usage(NOON + 3, NOON + 4, by=()) == [
        {"requests": 1, **zero, "tokens_generated": 3, "limited": 1}
    ]
    assert varied.usage(NOON + 50, None) == []
    with pytest.raises(ValueError, match="by: user, group, model, not body"):
        varied.usage(by=["user", "body"])


# Proofs


def test_a_proof_stands_alone(varied: Ledger) -> None:
    document = json.loads(json.dumps(varied.proof("r3")))
    assert [record["seq"] for record in document["records"]] == [5, 6]
    assert document["head"] == varied.head().to_json()
    verdict = verify_receipt(document)
    assert (verdict.ok, verdict.records, verdict.anchored) == (True, 2, False)
    verdict = verify_receipt(document, varied.head())
    assert (verdict.ok, verdict.anchored) == (True, True)
    assert verify_receipt(varied.proof("a2")).ok
    assert varied.proof("none") is None


def test_a_proof_at_an_earlier_head(varied: Ledger) -> None:
    anchor = varied.head()
    pairs(varied, *["bob"] * 7)
    late = verify_receipt(varied.proof("r4"), anchor)
    assert not late.ok
    assert "have it made for that size" in (late.problem or "")
    assert verify_receipt(varied.proof("r4", anchor.size), anchor).ok
    assert varied.proof("r6", anchor.size) is None
    assert len((varied.proof("r3", 6) or {})["records"]) == 1
    for size in (0, -1, 25):
        with pytest.raises(ValueError, match="size: 1 to 24"):
            varied.proof("r4", size)


def test_a_proof_is_of_one_history(varied: Ledger, tmp_path: Path) -> None:
    other = Ledger(tmp_path / "other.db")
    pairs(other, *["eve"] * 5)
    verdict = verify_receipt(varied.proof("r3"), other.head())
    assert verdict.problem == "rewritten: the document's head is not the given one"
    other.close()


HARM: list[Any] = [
    lambda d: d["records"][0].update(body=d["records"][0]["body"].replace("ann", "eve")),
    lambda d: d["records"][0].update(body=None),
    lambda d: d["records"][0].update(body="\ud800"),
    lambda d: d["records"][0].update(seq=6),
    lambda d: d["records"][0].update(seq=-1),
    lambda d: d["records"][0].update(seq=True),
    lambda d: d["records"][0].update(seq=None),
    lambda d: d["records"][0].update(leaf_hash="00" * 32),
    lambda d: d["records"][0].pop("leaf_hash"),
    lambda d: d["records"][0].update(path=d["records"][0]["path"][1:]),
    lambda d: d["records"][0].update(path=[*d["records"][0]["path"], "00" * 32]),
    lambda d: d["records"][0]["path"].__setitem__(1, "00" * 32),
    lambda d: d["records"][0]["path"].__setitem__(1, "no hex"),
    lambda d: d["records"][0]["path"].__setitem__(1, 7),
    lambda d: d["records"][0].update(path="00"),
    lambda d: d["records"].__setitem__(0, 7),
    lambda d: d.update(records=[]),
    lambda d: d.update(records={}),
    lambda d: d.update(request_id="r4"),
    lambda d: d.pop("request_id"),
    lambda d: d["head"].update(size=6),
    lambda d: d["head"].update(size=True),
    lambda d: d["head"].update(root="00" * 32),
    lambda d: d["head"].update(root="no"),
    lambda d: d["head"].update(timestamp=7),
    lambda d: d.pop("head"),
    lambda d: d.clear(),
]


@pytest.mark.parametrize("number", range(len(HARM)))
def test_a_changed_document_is_refused(varied: Ledger, number: int) -> None:
    document = json.loads(json.dumps(varied.proof("r3")))
    assert verify_receipt(document).ok
    HARM[number](document)
    verdict = verify_receipt(document)
    assert not verdict.ok
    assert verdict.problem


@pytest.mark.parametrize("value", [None, [], "x", 7])
def test_no_document(value: object) -> None:
    assert not verify_receipt(value).ok


def test_anothers_record_is_not_of_the_request(varied: Ledger) -> None:
    """A body is only believed to be of the request that it says."""
    mine, other = varied.proof("r3"), varied.proof("r1")
    assert mine is not None
    assert other is not None
    verdict = verify_receipt({**mine, "records": [*mine["records"], *other["records"]]})
    assert verdict.problem == "record 2 is not of that request, or not of that number"
    assert (verdict.first_bad, verdict.records) == (2, 2)


def test_heads_follow_each_other(ledger: Ledger) -> None:
    heads = [ledger.head()]
    for number in range(12):
        pairs(ledger, *["ann"] * (number % 3))
        heads.append(ledger.head())
    for old in heads:
        for new in heads:
            if old.size > new.size:
                continue
            path = [bytes.fromhex(hash) for hash in ledger.consistency(old.size, new.size)]
            roots = bytes.fromhex(old.root), bytes.fromhex(new.root)
            assert verify_consistency(old.size, roots[0], new.size, roots[1], path)
    with pytest.raises(ValueError, match="new: at most 24"):
        ledger.consistency(1, 25)
    with pytest.raises(ValueError, match="does not continue"):
        ledger.consistency(25)


def test_heads_as_json() -> None:
    head = Head(3, "ab" * 32, "2026-11-21T12:00:00.000Z")
    assert Head.from_json(json.loads(json.dumps(head.to_json()))) == head
    for wrong, match in [
        ({"size": -1}, "size"), ({"size": "3"}, "size"), ({"size": True}, "size"),
        ({"root": "AB" * 32}, "root"), ({"root": "ab" * 31}, "root"), ({"root": None}, "root"),
        ({"timestamp": None}, "timestamp"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=match):
            Head.from_json({**head.to_json(), **wrong})
    for value in (None, [], "head"):
        with pytest.raises(ValueError, match="size"):
            Head.from_json(value)


# Erasing and pruning


def raw(path: Path) -> bytes:
    return b"".join(file.read_bytes() for file in path.parent.glob("ledger.db*"))


def test_erasing_removes_a_person_and_keeps_the_log(ledger: Ledger, path: Path) -> None:
    anchor_users = ["unique-ann", "bob"] * 20
    pairs(ledger, *anchor_users)
    anchor = ledger.head()
    assert b"unique-ann" in raw(path)
    erased = ledger.erase("unique-ann", by=ADMIN).result(SOON)
    assert (erased.records, erased.wiped) == (40, True)
    assert b"unique-ann" not in raw(path)
    assert b"bob" in raw(path)
    assert sound(ledger, anchor) == 81
    assert verify(path).erased == 40
    act = ledger.query(Query(action="erase")).records[0]
    assert [r.seq for r in erased.acts] == [act["seq"]] == [80]
    assert act["user"] == "root"
    assert act["client_ip"] == "10.0.0.9"
    assert act["outcome"] == "ok"
    assert act["detail"] == {
        "subject": ledger.pseudonym("unique-ann"),
        "erased": [[n, n + 1] for n in range(0, 80, 4)],
    }
    assert ledger.query(Query(user="unique-ann")).records == []
    assert ledger.query(Query(), 5, 2).records[0] == {"seq": 4 + 0, "erased": True}
    assert ledger.proof("r0") is None
    assert ledger.proof("r1") is not None


def test_erasing_again_and_again_leaves_no_bytes(ledger: Ledger, path: Path) -> None:
    """Rows move from page to page, and SQLite leaves what it moved where it was."""
    pick = random.Random(3)
    users = [f"person-{n:03}-unique" for n in range(100)]
    for _ in range(60):
        some = [(user, pick.random(), pick.choice([10, 900])) for user in pick.choices(users, k=50)]
        add(
            ledger,
            *(
                Entry("begin", f"{user}-{id}", NOON, user, notebook="n" * long)
                for user, id, long in some
            ),
        )
    for user in users[::2]:
        assert ledger.erase(user, by=ADMIN).result(SOON).wiped
        assert user.encode() not in raw(path)
    assert sound(ledger) == 3050


def test_erasing_some_requests(ledger: Ledger) -> None:
    pairs(ledger, "ann", "bob", "ann")
    erased = ledger.erase("ann", by=ADMIN, request_ids=["r2", "r1", "r9"]).result(SOON)
    assert erased.records == 2
    assert [body is None for body in bodies(ledger)] == [False] * 4 + [True] * 2 + [False]
    assert ledger.erase("ann", by=ADMIN, request_ids=[]).result(SOON).records == 0
    assert sound(ledger) == 8


def test_who_erases_oneself_is_not_named(ledger: Ledger, path: Path) -> None:
    pairs(ledger, "unique-ann")
    mine = Entry(
        "act", "e1", NOON, "unique-ann", "hub", ("unique-group",), "10.9.9.9", action="erase"
    )
    assert ledger.erase("unique-ann", by=mine).result(SOON).records == 2
    assert not any(text in raw(path) for text in (b"unique-ann", b"unique-group", b"10.9.9.9"))
    act = ledger.query(Query(action="erase")).records[0]
    assert act["user"] == act["detail"]["subject"] == ledger.pseudonym("unique-ann")
    assert sound(ledger) == 3


def test_erasing_nobody_is_recorded(ledger: Ledger) -> None:
    pairs(ledger, "ann")
    erased = ledger.erase("nobody", by=ADMIN).result(SOON)
    assert (erased.records, len(erased.acts), erased.wiped) == (0, 1, True)
    assert sound(ledger) == 3


def test_acts_of_erasing_stay(ledger: Ledger) -> None:
    """They account for the bodies that are missing."""
    pairs(ledger, "ann")
    ledger.erase("ann", by=ADMIN).result(SOON)
    add(ledger, Entry("act", "a1", NOON, "root", action="load"))
    assert (
        ledger.erase("root", by=dataclasses.replace(ADMIN, user="other")).result(SOON).records == 1
    )
    assert ledger.prune(NOON + 10_000).result(SOON).records == 0
    assert [body and body["action"] for body in bodies(ledger)] == [
        None,
        None,
        "erase",
        None,
        "erase",
    ]
    assert sound(ledger) == 5


def test_much_is_erased_in_parts(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(erasure, "_PART", 7)
    monkeypatch.setattr(erasure, "_RUNS", 2)
    pairs(ledger, *["ann", "bob"] * 10)
    erased = ledger.erase("ann", by=ADMIN).result(SOON)
    assert erased.records == 20
    details = [r["detail"]["erased"] for r in ledger.query(Query(action="erase")).records]
    assert all(0 < len(runs) <= 2 for runs in details)
    assert len(details) == len(erased.acts) > 3
    assert sound(ledger) == 40 + len(details)


def test_pruning_by_time(ledger: Ledger, path: Path) -> None:
    pairs(ledger, "unique-ann", "bob", "bob")
    erased = ledger.prune(NOON + 1).result(SOON)
    assert (erased.records, erased.wiped) == (2, True)
    assert b"unique-ann" not in raw(path)
    act = ledger.query(Query(action="prune")).records[0]
    assert act["detail"] == {"before": "2026-11-21T12:00:01.000Z", "erased": [[0, 1]]}
    assert (act["user"], act["user_kind"], act["timestamp"]) == ("", "system", iso(NOON + 1000))
    assert ledger.prune(NOON + 1).result(SOON) == dataclasses.replace(erased, records=0, acts=())
    assert ledger.prune(NOON + 2, by=ADMIN).result(SOON).records == 2
    assert ledger.query(Query(action="prune")).records[0]["user"] == "root"
    assert sound(ledger) == 8


def test_bytes_that_stay_are_said(
    ledger: Ledger, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever reads keeps the pages that they read; what was removed is removed all the same."""
    monkeypatch.setattr(erasure, "_WAIT_MS", 10)
    pairs(ledger, "unique-ann", "bob")
    with ledger.snapshot() as connection:
        assert connection.execute("SELECT count(*) FROM records").fetchone() == (4,)
        erased = ledger.erase("unique-ann", by=ADMIN).result(SOON)
    assert (erased.records, erased.wiped) == (2, False)
    assert "may still be in its files" in ledger.notes[0]
    assert ledger.erase("bob", by=ADMIN).result(SOON).wiped
    assert ledger.notes == ()
    assert b"unique-ann" not in raw(path)
    assert sound(ledger) == 6


def test_erasing_what_cannot_be_written(ledger: Ledger) -> None:
    pairs(ledger, "ann")
    ledger.close()
    with pytest.raises(StoreFailed, match="closed"):
        ledger.erase("ann", by=ADMIN).result(SOON)


def test_erasing_cannot_be_called_off(ledger: Ledger) -> None:
    pairs(ledger, "ann")
    future = ledger.erase("ann", by=ADMIN)
    assert not future.cancel()
    assert future.result(SOON).records == 2


# The rest


def test_files_are_the_owners_alone(ledger: Ledger, path: Path) -> None:
    pairs(ledger, "ann")
    ledger.digest("x")
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()} == {0o600}


def test_it_opens_when_it_is_needed(ledger: Ledger, path: Path) -> None:
    assert (ledger.bytes, ledger.lag, ledger.failure, ledger.notes) == (0, 0, None, ())
    assert not path.parent.exists()
    assert ledger.query(Query()).records == []
    assert ledger.usage() == []
    assert ledger.bytes > 4096


@pytest.mark.parametrize(("durable", "level"), [(False, 1), (True, 2)])
def test_durable(path: Path, durable: bool, level: int) -> None:
    ledger = Ledger(path, durable=durable)
    pragma = ledger._writer.submit(lambda c: c.execute("PRAGMA synchronous").fetchone())
    assert pragma.result(SOON) == (level,)
    ledger.close()


def test_on_a_network(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "on_network", lambda _path: True)
    ledger = Ledger(path)
    pairs(ledger, "unique-ann", "bob")
    assert "network's file system" in ledger.notes[0]
    assert ledger.erase("unique-ann", by=ADMIN).result(SOON).wiped
    assert b"unique-ann" not in raw(path)
    assert sound(ledger) == 5
    ledger.close()


def test_bytes_count_what_is_beside(ledger: Ledger, path: Path) -> None:
    pairs(ledger, *["ann"] * 50)
    there = sum(f.stat().st_size for f in path.parent.iterdir() if not f.name.endswith("-shm"))
    assert ledger.bytes == there


def test_closing_commits(path: Path) -> None:
    ledger = Ledger(path)
    waiting = [ledger.append([begin(n)]) for n in range(100)]
    ledger.close()
    ledger.close()
    assert [done.result(0)[0].seq for done in waiting] == list(range(100))
    assert ledger.size == 100  # reading goes on
    with pytest.raises(StoreFailed, match="closed"):
        add(ledger, begin(1))
