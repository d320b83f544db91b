"""The thread that writes a SQLite file.

Cases: results in order; many threads' work; work that waits goes into one transaction, no more than so
much of it; an error of one piece, of SQLite's in one piece, a cancelled wait. Opening: at the first work,
the schema again, `opened`, one's own folder and modes, loose modes of what is there, blanks and signs in
the name. Versions: newer, another program's, an empty file. Journals: local, network, switched, two at
once; durable. Failures: full disk, a folder that cannot be, a removed, replaced, garbage, locked file; an
`opened` that fails; each with no folder in the message, and going on afterwards. Work apart from
transactions. Reading: cannot write, a file that is not there, one that a killed writer left, a snapshot.
Closing: what waits is committed; twice; never begun; work after it. Mount tables: which file system a
path is on, odd lines, no table.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

import shimmy_jupyter
from shimmy_jupyter.audit import writer as module
from shimmy_jupyter.audit.writer import StoreFailed, Writer, on_network

SCHEMA = "CREATE TABLE IF NOT EXISTS things (name TEXT PRIMARY KEY)"
SOON = 60


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "secret-folder" / "things.db"


@pytest.fixture
def writer(path: Path) -> Iterator[Writer]:
    writer = Writer(path, SCHEMA)
    yield writer
    writer.close()


def add(name: str):
    def work(connection: sqlite3.Connection) -> str:
        connection.execute("INSERT INTO things VALUES (?)", (name,))
        return name.upper()

    return work


def names(writer: Writer) -> list[str]:
    with writer.reading() as connection:
        return [name for (name,) in connection.execute("SELECT name FROM things ORDER BY rowid")]


def pragma(writer: Writer, name: str) -> object:
    return writer.submit(lambda c: c.execute(f"PRAGMA {name}").fetchone()[0]).result(SOON)


def failing(writer: Writer, path: Path, match: str) -> None:
    with pytest.raises(StoreFailed, match=match) as caught:
        writer.submit(add("lost")).result(SOON)
    assert str(path.parent) not in str(caught.value)
    assert "secret-folder" not in str(caught.value)
    assert writer.failure == str(caught.value)


class Held:
    """Work that keeps the thread until it is let go."""

    def __init__(self, writer: Writer) -> None:
        self.begun, self.go = threading.Event(), threading.Event()
        self.done: Future[None] = writer.submit(self.work)
        assert self.begun.wait(SOON)

    def work(self, connection: sqlite3.Connection) -> None:
        self.begun.set()
        assert self.go.wait(SOON)


def test_what_is_acknowledged_is_there(writer: Writer) -> None:
    assert writer.submit(add("one")).result(SOON) == "ONE"
    assert names(writer) == ["one"]
    assert writer.failure is None
    assert writer.lag == 0


def test_threads_together(writer: Writer) -> None:
    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(lambda n: writer.submit(add(f"n{n}")).result(SOON), range(200)))
    assert done == [f"N{n}" for n in range(200)]
    assert sorted(names(writer)) == sorted(f"n{n}" for n in range(200))


def test_what_waits_is_one_transaction(writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST", 10)
    commits: list[str] = []
    writer.submit(lambda c: c.set_trace_callback(commits.append)).result(SOON)
    commits.clear()
    held = Held(writer)
    waiting = [writer.submit(add(f"n{n}")) for n in range(15)]
    assert writer.lag == 16
    held.go.set()
    assert [done.result(SOON) for done in waiting] == [f"N{n}" for n in range(15)]
    assert commits.count("COMMIT") == 3  # held alone, ten, five
    assert names(writer) == [f"n{n}" for n in range(15)]


def test_one_error_is_its_own(writer: Writer) -> None:
    def fail(connection: sqlite3.Connection) -> None:
        connection.execute("INSERT INTO things VALUES ('half')")
        raise KeyError("mine")

    held = Held(writer)
    before, bad, after = writer.submit(add("a")), writer.submit(fail), writer.submit(add("b"))
    twice, wrong = writer.submit(add("a")), writer.submit(lambda c: c.execute("SELECT nonsense"))
    held.go.set()
    assert (before.result(SOON), after.result(SOON)) == ("A", "B")
    with pytest.raises(KeyError, match="mine"):
        bad.result(SOON)
    with pytest.raises(StoreFailed, match="UNIQUE"):
        twice.result(SOON)
    with pytest.raises(StoreFailed, match="nonsense"):
        wrong.result(SOON)
    assert names(writer) == ["a", "b"]


def test_who_no_longer_waits_is_written_all_the_same(writer: Writer) -> None:
    held = Held(writer)
    done = writer.submit(add("a"))
    assert done.cancel()
    held.go.set()
    writer.submit(add("b")).result(SOON)
    assert names(writer) == ["a", "b"]


def test_too_much_that_waits_is_refused(writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_QUEUED", 2)
    held = Held(writer)
    taken = [writer.submit(add(name)) for name in "ab"]
    with pytest.raises(StoreFailed, match="2 records wait"):
        writer.submit(add("c")).result(SOON)
    held.go.set()
    assert [done.result(SOON) for done in taken] == ["A", "B"]


# Opening


def test_it_opens_when_it_is_needed(path: Path) -> None:
    opened: list[sqlite3.Connection] = []
    writer = Writer(path, SCHEMA, opened=opened.append)
    assert not path.parent.exists()
    writer.submit(add("a")).result(SOON)
    writer.submit(add("b")).result(SOON)
    assert len(opened) == 1
    writer.close()
    again = Writer(path, SCHEMA + "; CREATE TABLE IF NOT EXISTS more (x)", opened=opened.append)
    again.submit(lambda c: c.execute("INSERT INTO more VALUES (1)")).result(SOON)
    assert len(opened) == 2
    assert names(again) == ["a", "b"]
    again.close()


def test_its_files_are_the_owners_alone(writer: Writer, path: Path) -> None:
    mask = os.umask(0)
    try:
        writer.submit(add("a")).result(SOON)
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()} == {
        "things.db": 0o600,
        "things.db-wal": 0o600,
        "things.db-shm": 0o600,
    }


def test_a_file_that_others_could_open_is_closed_to_them(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = Writer(path, SCHEMA)
    first.submit(add("a")).result(SOON)
    first.close()
    path.chmod(0o644)
    writer = Writer(path, SCHEMA)
    writer.submit(add("b")).result(SOON)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert writer.notes == ("others could open things.db; now they cannot",)
    assert writer.notes[0] in caplog.text
    writer.close()


def test_odd_names(tmp_path: Path) -> None:
    path = tmp_path / "a b%41?c#d" / "x%00?mode=ro.db"
    writer = Writer(path, SCHEMA)
    writer.submit(add("a")).result(SOON)
    assert names(writer) == ["a"]
    writer.close()


def test_readers_locks_outlive_the_writers_opening(path: Path) -> None:
    """Closing any handle of a file drops all locks of the process on it, by POSIX."""
    first = Writer(path, SCHEMA)
    first.submit(add("a")).result(SOON)
    first.close()
    code = (
        "import sqlite3, sys; c = sqlite3.connect(sys.argv[1], timeout=0, isolation_level=None)\n"
        "c.execute('PRAGMA locking_mode=EXCLUSIVE')\n"
        "try: c.execute('BEGIN EXCLUSIVE'); print('taken')\n"
        "except sqlite3.OperationalError as error: print(error)"
    )
    writer = Writer(path, SCHEMA)
    with writer.reading() as connection:
        connection.execute("BEGIN")
        connection.execute("SELECT * FROM things").fetchall()
        writer.submit(add("b")).result(SOON)
        writer.close()
        other = subprocess.run(
            [sys.executable, "-c", code, path],
            check=False,
            capture_output=True,
            text=True,
            timeout=SOON,
        )
    assert other.stdout.strip() == "database is locked"


def test_a_newer_version_is_left_alone(path: Path) -> None:
    newer = Writer(path, SCHEMA, version=3)
    newer.submit(add("a")).result(SOON)
    newer.close()
    writer = Writer(path, "CREATE TABLE IF NOT EXISTS old (x)", version=2)
    failing(writer, path, "newer version of this package: its format is 3, and 2 is the latest")
    with pytest.raises(StoreFailed, match="newer version"), writer.reading():
        pass
    writer.close()
    again = Writer(path, SCHEMA, version=3)
    with again.reading() as connection:
        assert (
            connection.execute("SELECT name FROM sqlite_master WHERE name='old'").fetchall() == []
        )
    again.close()


def test_another_programs_database_is_left_alone(writer: Writer, path: Path) -> None:
    path.parent.mkdir()
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE theirs (x)")
    other.close()
    before = path.read_bytes()
    failing(writer, path, "things.db is another program's database")
    assert path.read_bytes() == before


def test_an_empty_file_is_none_at_all(writer: Writer, path: Path) -> None:
    path.parent.mkdir()
    path.touch(0o600)
    writer.submit(add("a")).result(SOON)
    assert names(writer) == ["a"]


# Journals


@pytest.mark.parametrize(("durable", "level"), [(False, 1), (True, 2)])
def test_a_local_disk(path: Path, durable: bool, level: int) -> None:
    writer = Writer(path, SCHEMA, durable=durable)
    assert pragma(writer, "journal_mode") == "wal"
    assert pragma(writer, "synchronous") == level
    assert pragma(writer, "secure_delete") == 1
    assert writer.notes == ()
    writer.close()


def test_a_networks_file_system(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = Writer(path, SCHEMA)
    local.submit(add("a")).result(SOON)
    local.close()
    monkeypatch.setattr(module, "on_network", lambda _path: True)
    writer = Writer(path, SCHEMA)
    assert writer.network
    assert pragma(writer, "journal_mode") == "truncate"
    assert pragma(writer, "synchronous") == 2
    writer.submit(add("b")).result(SOON)
    assert names(writer) == ["a", "b"]
    assert not path.with_name("things.db-wal").exists()
    assert len(writer.notes) == 1
    assert "network's file system" in writer.notes[0]
    assert "secret-folder" not in writer.notes[0]
    writer.close()


def test_a_file_system_without_a_shared_log(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite says which journal there is; an in-memory file has none that could be shared."""
    connect = sqlite3.connect
    monkeypatch.setattr(module.sqlite3, "connect", lambda *_, **how: connect(":memory:", **how))
    writer = Writer(path, SCHEMA)
    assert pragma(writer, "synchronous") == 2
    assert writer.notes == ("things.db has no write-ahead log here, so each commit waits for it",)
    writer.close()


def test_many_open_a_new_file_at_once(path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from shimmy_jupyter.audit.writer import Writer\n"
        f"w = Writer(Path(sys.argv[1]), {SCHEMA!r}); print(flush=True); sys.stdin.readline()\n"
        "f = lambda c: c.execute('INSERT INTO things VALUES (?)', (sys.argv[2],)) and None\n"
        "w.submit(f).result(); w.close()"
    )
    where = {**os.environ, "PYTHONPATH": str(Path(shimmy_jupyter.__file__).parents[1])}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code, path, f"n{n}"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=where,
        )
        for n in range(4)
    ]  # fmt: skip
    for child in children:
        assert child.stdout is not None
        child.stdout.readline()
    for child in children:
        assert child.stdin is not None
        child.stdin.write(b"\n")
        child.stdin.flush()
    for child in children:
        _, wrong = child.communicate(timeout=SOON)
        assert (child.returncode, wrong) == (0, b"")
    writer = Writer(path, SCHEMA)
    assert sorted(names(writer)) == ["n0", "n1", "n2", "n3"]
    writer.close()


# Failures


def test_a_full_disk(writer: Writer, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer.submit(add("a")).result(SOON)
    pages = pragma(writer, "page_count")
    writer.submit(lambda c: c.execute(f"PRAGMA max_page_count={pages}")).result(SOON)
    with pytest.raises(StoreFailed, match="full") as caught:
        writer.submit(add("large" * 5000)).result(SOON)
    assert (
        writer.failure
        == str(caught.value)
        == "things.db cannot be written: database or disk is full"
    )
    assert caplog.text.count("disk is full") == 1
    assert writer.submit(add("b")).result(SOON) == "B"  # there is room again
    assert writer.failure is None
    assert names(writer) == ["a", "b"]


def test_a_full_disk_fails_the_whole_transaction(writer: Writer) -> None:
    writer.submit(add("a")).result(SOON)
    pages = pragma(writer, "page_count")
    writer.submit(lambda c: c.execute(f"PRAGMA max_page_count={pages}")).result(SOON)
    held = Held(writer)
    small, large = writer.submit(add("b")), writer.submit(add("large" * 5000))
    held.go.set()
    for done in (small, large):
        with pytest.raises(StoreFailed, match="full"):
            done.result(SOON)
    assert names(writer) == ["a"]


def test_a_folder_that_cannot_be(writer: Writer, path: Path) -> None:
    path.parent.write_text("in its place")
    failing(writer, path, "things.db cannot be written: (Not a directory|File exists)")
    path.parent.unlink()
    assert writer.submit(add("a")).result(SOON) == "A"
    assert writer.failure is None


@pytest.mark.skipif(os.geteuid() != 0, reason="to be somebody else for a while")
def test_a_folder_of_others_where_everybody_may(writer: Writer, path: Path) -> None:
    path.parent.mkdir(mode=0o755)
    os.seteuid(65534)
    try:
        failing(writer, path, "things.db cannot be written: Permission denied")
    finally:
        os.seteuid(0)
    assert writer.submit(add("a")).result(SOON) == "A"


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for this account")
def test_a_read_only_folder(writer: Writer, path: Path) -> None:
    path.parent.mkdir(mode=0o500)
    failing(writer, path, "things.db cannot be written: Permission denied")
    path.parent.chmod(0o700)
    assert writer.submit(add("a")).result(SOON) == "A"


def test_a_removed_file(writer: Writer, path: Path) -> None:
    writer.submit(add("a")).result(SOON)
    for file in path.parent.iterdir():
        file.unlink()
    ran: list[sqlite3.Connection] = []
    with pytest.raises(StoreFailed, match="removed or replaced"):
        writer.submit(ran.append).result(SOON)
    assert ran == []  # nothing is written into what another process may use by now
    for file in path.parent.iterdir():
        file.unlink()
    writer.submit(add("a")).result(SOON)
    path.unlink()
    failing(writer, path, "things.db was removed or replaced while it was in use")
    assert writer.submit(add("b")).result(SOON) == "B"
    assert names(writer) == ["b"]


def test_a_file_that_is_removed_while_it_is_written(writer: Writer, path: Path) -> None:
    """What was committed into it is nowhere, and must not be acknowledged."""
    held = Held(writer)
    path.unlink()
    held.go.set()
    with pytest.raises(StoreFailed, match="removed or replaced"):
        held.done.result(SOON)


def test_a_replaced_file(writer: Writer, path: Path, tmp_path: Path) -> None:
    other = Writer(tmp_path / "other.db", SCHEMA)
    other.submit(add("theirs")).result(SOON)
    other.close()
    writer.submit(add("a")).result(SOON)
    (tmp_path / "other.db").replace(path)
    for end in ("-wal", "-shm"):
        path.with_name(path.name + end).unlink()
    failing(writer, path, "removed or replaced")
    writer.submit(add("b")).result(SOON)
    assert names(writer) == ["theirs", "b"]


def test_garbage(writer: Writer, path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"no database " * 1000)
    failing(writer, path, "things.db cannot be written: file is not a database")
    with pytest.raises(StoreFailed, match=r"things.db cannot be read: file is not a database"):
        names(writer)
    path.unlink()
    assert writer.submit(add("a")).result(SOON) == "A"


def test_a_locked_file(writer: Writer, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BUSY", 0.05)
    writer.submit(add("a")).result(SOON)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    failing(writer, path, "things.db cannot be written: database is locked")
    assert names(writer) == ["a"]  # readers do not wait
    other.execute("ROLLBACK")
    other.close()
    assert writer.submit(add("b")).result(SOON) == "B"


def test_an_opening_that_fails(path: Path) -> None:
    """It must not end the thread, for then nobody would ever be answered."""
    wrong: list[Exception] = [ValueError(f"in {path}"), StoreFailed("not this one")]

    def opened(_connection: sqlite3.Connection) -> None:
        if wrong:
            raise wrong.pop()

    writer = Writer(path, SCHEMA, opened=opened)
    failing(writer, path, "not this one")
    failing(writer, path, "things.db cannot be written: in things.db")
    assert writer.submit(add("a")).result(SOON) == "A"
    writer.close()


def test_a_failure_is_said_once(
    writer: Writer, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path.parent.write_text("in its place")
    for _ in range(3):
        failing(writer, path, "cannot be written")
    assert [r.levelno for r in caplog.records if "cannot be written" in r.message] == [
        logging.ERROR
    ]


# Apart from transactions


def test_work_apart(writer: Writer) -> None:
    held = Held(writer)
    before = writer.submit(add("a"))
    apart = writer.submit_apart(lambda c: (c.in_transaction, c.execute("VACUUM").fetchall()))
    after = writer.submit(add("b"))
    held.go.set()
    assert apart.result(SOON) == (False, [])
    assert (before.result(SOON), after.result(SOON)) == ("A", "B")


def test_work_apart_that_fails(writer: Writer) -> None:
    def fail(connection: sqlite3.Connection) -> None:
        connection.execute("BEGIN IMMEDIATE")
        add("half")(connection)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        writer.submit_apart(fail).result(SOON)
    with pytest.raises(StoreFailed, match="nonsense"):
        writer.submit_apart(lambda c: c.execute("SELECT nonsense")).result(SOON)
    writer.submit(add("a")).result(SOON)
    assert names(writer) == ["a"]


# Reading


def test_a_reader_cannot_write(writer: Writer) -> None:
    writer.submit(add("a")).result(SOON)
    with pytest.raises(StoreFailed, match="readonly"), writer.reading() as connection:
        connection.execute("DELETE FROM things")
    assert names(writer) == ["a"]


def test_there_is_nothing_to_read(writer: Writer, path: Path) -> None:
    with pytest.raises(
        StoreFailed, match=r"^things.db cannot be read: unable to open database file$"
    ):
        names(writer)
    assert not path.parent.exists()


@pytest.mark.parametrize("network", [False, True])
def test_what_a_killed_writer_left_is_read(
    path: Path, network: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a rollback journal, half a transaction is in the file and has to be taken back."""
    mode = "TRUNCATE" if network else "WAL"
    code = (
        "import os, signal, sqlite3, sys\n"
        "c = sqlite3.connect(sys.argv[1], isolation_level=None); c.execute('PRAGMA cache_size=1')\n"
        f"c.execute('PRAGMA journal_mode={mode}'); c.execute('PRAGMA cache_spill=1')\n"
        f"c.executescript('{SCHEMA}; PRAGMA user_version=1')\n"
        "c.execute('INSERT INTO things VALUES (?)', ('kept',)); c.execute('BEGIN IMMEDIATE')\n"
        "for n in range(2000): c.execute('INSERT INTO things VALUES (?)', (f'lost {n}' * 20,))\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    path.parent.mkdir()
    subprocess.run([sys.executable, "-c", code, path], check=False, timeout=SOON)
    left = path.with_name(f"things.db-{'journal' if network else 'wal'}")
    assert left.stat().st_size > 0
    monkeypatch.setattr(module, "on_network", lambda _path: network)
    writer = Writer(path, SCHEMA)
    assert names(writer) == ["kept"]
    writer.close()


# Closing


def test_what_waits_is_committed_at_the_end(path: Path) -> None:
    writer = Writer(path, SCHEMA)
    held = Held(writer)
    waiting = [writer.submit(add(f"n{n}")) for n in range(700)]
    closing = threading.Thread(target=writer.close)
    closing.start()
    held.go.set()
    closing.join(SOON)
    assert all(done.done() for done in waiting)
    assert len(names(writer)) == 700
    writer.close()
    with pytest.raises(StoreFailed, match=r"^things.db is closed$"):
        writer.submit(add("late")).result(SOON)
    assert not path.with_name("things.db-wal").exists()


def test_closing_what_never_began(path: Path) -> None:
    Writer(path, SCHEMA).close()
    assert not path.parent.exists()


def test_who_is_refused_may_ask_again_at_once(path: Path) -> None:
    """Callbacks run in the thread that submits; a lock held then would hold for ever."""
    writer = Writer(path, SCHEMA)
    writer.close()
    again: list[Future[str]] = []
    done = writer.submit(add("a"))
    done.add_done_callback(lambda _: again.append(writer.submit(add("b"))))
    assert isinstance(again[0].exception(SOON), StoreFailed)


# Mount tables

TABLE = r"""
22 1 259:1 / / rw,relatime shared:1 - ext4 /dev/root rw
30 22 0:25 / /home rw - nfs4 server:/home rw
31 30 0:26 / /home/ann/local\040disk rw master:3 - xfs /dev/sdb rw
32 22 0:27 / /mnt/k\303\244se rw - cifs //server/share rw
33 22 0:28 / /mnt/ssh rw - fuse.sshfs me@host: rw
34 22 0:29 / /mnt/ntfs rw - fuseblk /dev/sdc rw
35 22 0:30 / /mnt/over rw - fuse.fuse-overlayfs fuse-overlayfs rw
36 22 0:31 / /twice rw - nfs server:/x rw
37 22 0:32 / /twice rw - tmpfs tmpfs rw
38 22 0:33 / /mnt/nine rw - 9p host rw
39 odd
40 22 0:34 / /mnt/cut rw -
"""


@pytest.mark.parametrize(
    ("path", "network"),
    [
        ("/var/lib/x.db", False),
        ("/home/ann/x.db", True),
        ("/home/ann/local disk/x.db", False),
        ("/homework/x.db", False),
        ("/mnt/käse/x.db", True),
        ("/mnt/ssh/deep/er/x.db", True),
        ("/mnt/ntfs/x.db", False),
        ("/mnt/over/x.db", False),
        ("/twice/x.db", False),
        ("/mnt/nine/x.db", True),
        ("/mnt/cut/x.db", False),
    ],
)
def test_which_file_system_a_path_is_on(tmp_path: Path, path: str, network: bool) -> None:
    table = tmp_path / "mountinfo"
    table.write_bytes(TABLE.strip().encode() + b"\n41 22 0:35 / /mnt/\xff rw - nfs x rw\n")
    assert on_network(Path(path), table) is network


def test_no_mount_table(tmp_path: Path) -> None:
    assert on_network(tmp_path / "x.db", tmp_path / "none") is False
