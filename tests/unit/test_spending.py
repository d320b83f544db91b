"""What has been used is kept in a file that servers share and that outlives them.

Cases: the same answers in memory and in a file; nothing is written without limits over time; restart;
a server killed with an open reservation, seen by the next and by one that was there; one that lives, and
one that closes; two at once never exceed a limit together; reservations that are settled twice, were
refused, or whose caller was cancelled; own limits; rows and files that are of no use any more; modes; a
file that cannot be written, is removed, or closed; locks.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shimmy_jupyter.audit.writer import StoreFailed
from shimmy_jupyter.core.budgets import DAY, NotReserved, Refusal, Standing
from shimmy_jupyter.core.limits import Account, Limits
from shimmy_jupyter.guard import locks, spending
from shimmy_jupyter.guard.spending import Spending

NOON = 20_000 * DAY + DAY // 2
ANN = (
    Account("user:ann", Limits(requests_per_minute=5, tokens_per_minute=100, tokens_per_day=150)),
)
LAB = Account("group:lab", Limits(requests_per_minute=6, tokens_per_day=160))
FREE = (Account("user:ann", Limits(concurrent=1, prompt_tokens=50, seconds=3)),)
PACKAGE = Path(spending.__file__).parents[2]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "limits.sqlite"


@contextlib.contextmanager
def opened(path: Path | None) -> Iterator[Spending]:
    store = Spending(path)
    try:
        yield store
    finally:
        store.close()


def used(store: Spending, now: float) -> tuple[int, int, int]:
    seen = store.look(ANN, now).result(10)["user:ann"]
    return tuple(standing.used for standing in seen.values())  # type: ignore[return-value]


def rows(path: Path) -> dict[str, int]:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return {
            table: connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
            for table in ("clocks", "seconds", "days", "reservations", "own")
        }


@contextlib.contextmanager
def server(path: Path, *lines: str) -> Iterator[subprocess.Popen[str]]:
    """Another server with the file. Its lines are run; it says a line first, and ends by one of ours."""
    code = "\n".join(
        (
            "import sys",
            "from pathlib import Path",
            "from shimmy_jupyter.core.limits import Account, Limits",
            "from shimmy_jupyter.guard.spending import Spending",
            f"store, now = Spending(Path({str(path)!r})), {NOON}",
            f"ann = (Account('user:ann', {ANN[0].limits!r}),)",
            *lines,
            "sys.stdin.readline()",
            "store.close()",
        )
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(PACKAGE)},
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def answered(process: subprocess.Popen[str]) -> None:
    """Let it end as it should."""
    process.communicate("\n", timeout=30)
    assert process.returncode == 0


RESERVES = "print(store.reserve('theirs', ann, 30, 20, 9, now).result(), flush=True)"


class TestSharedFile:
    def test_restart(self, path: Path) -> None:
        with opened(path) as store:
            assert store.arrive("a", ANN, NOON).result(10) is None
            assert store.reserve("a", ANN, 30, 20, 9, NOON).result(10) == 20
            store.settle("a", ANN, 45, NOON + 2).result(10)
        with opened(path) as store:
            assert store.look(ANN, NOON + 3).result(10) == {
                "user:ann": {
                    "max_requests_per_minute": Standing(5, 1, 4, NOON + 61),
                    "max_tokens_per_minute": Standing(100, 45, 55, NOON + 63),
                    "max_tokens_per_day": Standing(150, 45, 105, NOON + DAY // 2),
                }
            }
            refusal = store.reserve("b", ANN, 60, 0, 9, NOON + 3).result(10)
            assert isinstance(refusal, Refusal)
            assert refusal.retry_after == 60
            assert used(store, NOON + DAY // 2) == (0, 0, 0)

    def test_killed_and_found_by_the_next(self, path: Path) -> None:
        with server(path, RESERVES) as process:
            assert said(process) == "20"
            process.send_signal(signal.SIGKILL)
            process.wait(30)
        assert len([*path.parent.glob("*.lock")]) == 1
        with opened(path) as store:
            # From when it is found it counts as used, and no longer than that.
            assert used(store, NOON + 1000) == (0, 50, 50)
            assert used(store, NOON + 1060.9) == (0, 50, 50)
            assert used(store, NOON + 1061) == (0, 0, 50)
            assert rows(path)["reservations"] == 0
            with pytest.raises(NotReserved):
                store.settle("theirs", ANN, 1, NOON).result(10)
            assert len([*path.parent.glob("*.lock")]) == 1

    def test_killed_and_found_by_one_that_was_there(self, path: Path) -> None:
        with opened(path) as store, server(path, RESERVES) as process:
            assert used(store, NOON) == (0, 0, 0)
            assert said(process) == "20"
            # As long as it lives it is open, however long that is.
            assert used(store, NOON + 5000) == (0, 50, 50)
            assert rows(path)["reservations"] == 1
            process.send_signal(signal.SIGKILL)
            process.wait(30)
            assert used(store, NOON + 5000.5) == (0, 50, 50)
            assert rows(path)["reservations"] == 1  # looked for once in a second
            assert used(store, NOON + 5001) == (0, 50, 50)
            assert rows(path)["reservations"] == 0
            assert used(store, NOON + 5062) == (0, 0, 50)

    def test_closed_with_an_open_reservation(self, path: Path) -> None:
        with opened(path) as store:
            assert store.reserve("a", ANN, 30, 20, 9, NOON).result(10) == 20
            held = store._held
            assert held is not None
            os.fstat(held)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(held)
        assert not [*path.parent.glob("*.lock")]
        with opened(path) as store:
            assert used(store, NOON + 1) == (0, 50, 50)
            assert rows(path)["reservations"] == 0

    def test_servers_settle_what_they_have_reserved(self, path: Path) -> None:
        settles = "store.settle('theirs', ann, 35, now + 1).result()"
        with opened(path) as store:
            store.reserve("ours", ANN, 10, 10, 9, NOON).result(10)
            with server(path, RESERVES, settles, "print('done', flush=True)") as process:
                assert said(process) == "20"
                assert said(process) == "done"
                assert used(store, NOON + 2) == (0, 55, 55)
                answered(process)
            store.settle("ours", ANN, 15, NOON + 3).result(10)
            assert used(store, NOON + 3) == (0, 50, 50)

    def test_together_never_more_than_the_limit(self, path: Path) -> None:
        """Each asks for all there is, at once; together they get it once, to the last one."""
        crowded = Account("user:ann", Limits(requests_per_minute=150, tokens_per_minute=1001))
        lines = (
            f"ann = ({crowded!r},)",
            "print('here', flush=True)",
            "sys.stdin.readline()",
            "futures = [store.arrive(str(i), ann, now + i / 100) for i in range(120)]",
            "mine = [f'{id(store)}-{i}' for i in range(120)]",
            "futures += [store.reserve(i, ann, 7, None, 3, now) for i in mine]",
            "answers = [future.result() for future in futures]",
            "let = sum(answer is None for answer in answers[:120])",
            "got = [(i, 7 + a) for i, a in zip(mine, answers[120:]) if type(a) is int]",
            "[store.settle(i, ann, n, now).result() for i, n in got]",
            "print(let, sum(n for _, n in got), flush=True)",
        )
        with (
            server(path, *lines) as one,
            server(path, *lines) as two,
            server(path, *lines) as three,
        ):
            servers = one, two, three
            assert [said(each) for each in servers] == ["here"] * 3
            for each in servers:
                assert each.stdin is not None
                each.stdin.write("\n")
                each.stdin.flush()
            sums = [tuple(map(int, said(each).split())) for each in servers]
            for each in servers:
                answered(each)
        assert sum(let for let, _ in sums) == 150
        # 100 requests of 10 tokens, and 1 is left that is no use to anybody.
        assert sum(tokens for _, tokens in sums) == 1000
        with opened(path) as store:
            seen = store.look((crowded,), NOON + 2).result(10)["user:ann"]
            assert [standing.used for standing in seen.values()] == [150, 1000]

    def test_taking_turns(self, path: Path) -> None:
        """What a server remembers of the file is of no use once another has written to it."""
        with opened(path) as one, opened(path) as two:
            for turn, store in enumerate([one, two, one, one, two]):
                assert store.arrive("x", ANN, NOON + turn).result(10) is None
                assert store.reserve(str(turn), ANN, 10, 5, 9, NOON + turn).result(10) == 5
                store.settle(str(turn), ANN, 10 + turn, NOON + turn).result(10)
            for store in (one, two):
                assert used(store, NOON + 5) == (5, 60, 60)
                assert isinstance(store.arrive("x", ANN, NOON + 5).result(10), Refusal)

    def test_what_is_undone_is_not_remembered(self, path: Path) -> None:
        with opened(path) as store:
            assert used(store, NOON) == (0, 0, 0)
            with opened(path) as other:
                other.reserve("theirs", ANN, 30, 20, 9, NOON).result(10)
            # It settles what the other has left, and then fails, which undoes that.
            with pytest.raises(NotReserved):
                store.settle("never", ANN, 1, NOON + 5).result(10)
            assert rows(path)["reservations"] == 1
            assert used(store, NOON + 5.5) == (0, 50, 50)
            assert used(store, NOON + 6) == (0, 50, 50)
            assert rows(path)["reservations"] == 0
            assert used(store, NOON + 66.9) == (0, 50, 50)
            assert used(store, NOON + 67) == (0, 0, 50)

    def test_threads_of_one_server(self, path: Path) -> None:
        with opened(path) as store:
            let: list[Refusal | None] = []
            threads = [
                threading.Thread(
                    target=lambda: let.extend(
                        store.arrive("x", ANN, NOON).result(10) for _ in range(20)
                    )
                )
                for _ in range(4)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert [len(let), let.count(None)] == [80, 5]


@pytest.fixture(params=["memory", "file"])
def store(request: pytest.FixtureRequest, path: Path) -> Iterator[Spending]:
    with opened(path if request.param == "file" else None) as store:
        yield store


class TestEither:
    def test_all_accounts_or_none(self, store: Spending) -> None:
        both = (*ANN, LAB)
        assert store.reserve("a", both, 30, None, 500, NOON).result(10) == 70
        refusal = store.reserve("b", both, 61, 0, 9, NOON).result(10)
        assert isinstance(refusal, Refusal)
        seen = store.look(both, NOON).result(10)
        assert seen["group:lab"]["max_tokens_per_day"].used == 100
        store.settle("a", both, 80, NOON).result(10)
        seen = store.look(both, NOON).result(10)
        assert seen["group:lab"]["max_tokens_per_day"].used == 80
        assert used(store, NOON) == (0, 80, 80)

    def test_settled_once(self, store: Spending) -> None:
        store.reserve("a", ANN, 30, 20, 9, NOON).result(10)
        store.settle("a", ANN, 10, NOON).result(10)
        for id in ("a", "never"):
            with pytest.raises(NotReserved, match=id):
                store.settle(id, ANN, 10, NOON).result(10)
        assert used(store, NOON) == (0, 10, 10)

    def test_a_refused_one_cannot_be_settled(self, store: Spending) -> None:
        assert isinstance(store.reserve("a", ANN, 101, 0, 9, NOON).result(10), Refusal)
        with pytest.raises(NotReserved):
            store.settle("a", ANN, 10, NOON).result(10)

    def test_reserved_once(self, store: Spending) -> None:
        store.reserve("a", ANN, 30, 20, 9, NOON).result(10)
        with pytest.raises(ValueError, match="reserved already"):
            store.reserve("a", ANN, 1, 1, 9, NOON).result(10)
        assert used(store, NOON) == (0, 50, 50)

    def test_nobody_waits_for_the_answer(self, store: Spending) -> None:
        """The reservation may be there; who has asked settles, and then it is not."""
        store.reserve("a", ANN, 30, 20, 9, NOON).cancel()
        with contextlib.suppress(NotReserved):
            store.settle("a", ANN, 0, NOON).result(10)
        assert used(store, NOON) == (0, 0, 0)

    def test_choices(self, store: Spending) -> None:
        assert store.reserve("a", ANN, 10, None, 500, NOON, choices=4).result(10) == 22
        assert used(store, NOON) == (0, 98, 98)

    def test_own_limits(self, store: Spending) -> None:
        assert store.own("ann").result(10) == Limits()
        mine = Limits(tokens_per_day=5, seconds=0.5, queued=0)
        assert store.tighten("ann", mine).result(10) == mine
        assert store.own("ann").result(10) == mine
        assert store.own("bob").result(10) == Limits()
        assert store.tighten("ann", Limits()).result(10) == Limits()
        assert store.own("ann").result(10) == Limits()

    def test_closed(self, store: Spending) -> None:
        store.close()
        store.close()
        for future in (
            store.arrive("a", ANN, NOON),
            store.reserve("a", ANN, 1, 1, 9, NOON),
            store.settle("a", ANN, 1, NOON),
            store.look(ANN, NOON),
            store.tighten("ann", Limits()),
        ):
            with pytest.raises(StoreFailed, match="closed"):
                future.result(10)  # type: ignore[attr-defined]

    def test_limits_of_one_request(self, store: Spending) -> None:
        assert store.reserve("a", FREE, 50, None, 9, NOON).result(0) == 9
        refusal = store.reserve("a", FREE, 51, None, 9, NOON).result(0)
        assert isinstance(refusal, Refusal)
        assert (refusal.limit, refusal.never) == ("max_prompt_tokens", True)


STEP = st.tuples(
    st.sampled_from(["arrive", "reserve", "settle", "look", "later", "later", "earlier"]),
    st.integers(0, 3),
    st.integers(0, 90),
)


class TestMemory:
    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(st.lists(STEP, max_size=25))
    def test_it_answers_as_a_file_does(self, steps: list[tuple[str, int, int]]) -> None:
        both = (*ANN, LAB)
        now = NOON + DAY // 2 - 100.0

        def ask(store: Spending, what: str, id: int, tokens: int) -> Any:
            try:
                if what == "arrive":
                    return store.arrive(str(id), both, now).result(10)
                if what == "reserve":
                    wanted = None if tokens % 3 == 0 else tokens // 2
                    return store.reserve(str(id), both, tokens, wanted, 20, now).result(10)
                if what == "settle":
                    return store.settle(str(id), both, tokens // 2, now).result(10)
            except (NotReserved, ValueError) as error:
                return str(error)
            return store.look(both, now).result(10)

        with (
            tempfile.TemporaryDirectory() as folder,
            opened(Path(folder, "limits.sqlite")) as file,
            opened(None) as memory,
        ):
            for what, id, tokens in steps:
                now += {"later": tokens + 0.5, "earlier": -5.0 * tokens}.get(what, 0)
                assert ask(file, what, id, tokens) == ask(memory, what, id, tokens)

    def test_what_counts_no_more_is_forgotten(self) -> None:
        with opened(None) as store:
            for name in range(50):
                store.arrive("x", (Account(f"user:{name}", ANN[0].limits),), NOON).result(0)
            store.arrive("x", ANN, NOON + 62).result(0)
            assert store._memory is not None
            assert [*store._memory._spents] == ["user:ann"]


class TestFile:
    def test_nothing_is_written_without_limits_over_time(self, path: Path) -> None:
        with opened(path) as store:
            assert store.arrive("a", FREE, NOON).result(0) is None
            assert store.reserve("a", FREE, 30, None, 9, NOON).result(0) == 9
            assert store.settle("a", FREE, 10, NOON).result(0) is None
            assert store.look(FREE, NOON).result(0) == {"user:ann": {}}
            assert store.own("ann").result(0) == Limits()
            assert store.failure is None
            assert not path.parent.exists()
            # Of several accounts only those are kept that need it.
            store.arrive("a", (*FREE, LAB), NOON).result(10)
            assert rows(path)["clocks"] == 1

    def test_only_ones_own(self, path: Path) -> None:
        with opened(path) as store:
            store.reserve("a", ANN, 30, 20, 9, NOON).result(10)
            modes = {
                p.name.split(".")[-1]: stat.S_IMODE(p.stat().st_mode) for p in path.parent.iterdir()
            }
            assert modes == dict.fromkeys(("sqlite", "sqlite-wal", "sqlite-shm", "lock"), 0o600)
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700

    def test_own_limits_are_every_servers(self, path: Path) -> None:
        with opened(path) as one, opened(path) as two:
            one.tighten("ann", Limits(concurrent=1)).result(10)
            assert two.own("ann").result(10) == Limits(concurrent=1)
            two.tighten("ann", Limits()).result(10)
            assert one.own("ann").result(10) == Limits()
            assert rows(path)["own"] == 0
            one.tighten("bob", Limits(seconds=2.5)).result(10)
        with opened(path) as store:
            assert store.own("bob").result(10) == Limits(seconds=2.5)

    def test_old_rows_go(self, path: Path) -> None:
        with opened(path) as store:
            for name in range(20):
                one = (Account(f"user:{name}", ANN[0].limits),)
                store.arrive("a", one, NOON + name).result(10)
                store.reserve("a", one, 5, 5, 9, NOON + name).result(10)
                store.settle("a", one, 5, NOON + name).result(10)
            store.tighten("ann", Limits(concurrent=1)).result(10)
            assert rows(path) == {
                "clocks": 20,
                "seconds": 20,
                "days": 20,
                "reservations": 0,
                "own": 1,
            }
            # Somebody else comes, later and later.
            store.arrive("b", (LAB,), NOON + 70).result(10)
            assert rows(path)["seconds"] == 1 + 10
            store.arrive("b", (LAB,), NOON + DAY).result(10)
            assert rows(path)["days"] == 20
            store.arrive("b", (LAB,), NOON + 2 * DAY).result(10)
            assert rows(path) == {"clocks": 1, "seconds": 1, "days": 0, "reservations": 0, "own": 1}

    def test_ones_own_old_rows_go_at_once(self, path: Path) -> None:
        with opened(path) as store:
            for second in range(0, 300, 20):
                store.arrive("a", ANN, NOON + second).result(10)
            assert rows(path)["seconds"] == 4

    def test_a_step_back_is_kept(self, path: Path) -> None:
        with opened(path) as store:
            for _ in range(5):
                store.arrive("a", ANN, NOON).result(10)
            assert isinstance(store.arrive("a", ANN, NOON - 3600).result(10), Refusal)
        with opened(path) as store:
            refusal = store.arrive("a", ANN, NOON - 3600 + 30).result(10)
            assert isinstance(refusal, Refusal)
            assert refusal.retry_after == 32
            assert store.arrive("a", ANN, NOON - 3600 + 62).result(10) is None

    def test_it_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "state").write_text("not a folder")
        with opened(tmp_path / "state" / "limits.sqlite") as store:
            for future in (
                store.arrive("a", ANN, NOON),
                store.tighten("ann", Limits(concurrent=1)),
            ):
                with pytest.raises(
                    StoreFailed, match="limits\\.sqlite cannot be written"
                ) as caught:
                    future.result(10)  # type: ignore[attr-defined]
                assert str(tmp_path) not in str(caught.value)
            assert store.failure == str(caught.value)
            # It can be mended, without a restart.
            (tmp_path / "state").unlink()
            assert store.arrive("a", ANN, NOON).result(10) is None
            assert store.failure is None

    def test_it_is_no_database(self, path: Path) -> None:
        path.parent.mkdir()
        path.write_text("something else, and long enough that it is read" * 30)
        with opened(path) as store, pytest.raises(StoreFailed, match="not a database"):
            store.reserve("a", ANN, 1, 1, 9, NOON).result(10)

    def test_its_folder_is_removed(self, path: Path) -> None:
        with opened(path) as store:
            store.reserve("a", ANN, 10, 10, 9, NOON).result(10)
            shutil.rmtree(path.parent)
            with pytest.raises(StoreFailed):  # it must not go unseen that what was counted is gone
                store.reserve("b", ANN, 30, 20, 9, NOON).result(10)
            assert store.reserve("b", ANN, 30, 20, 9, NOON).result(10) == 20
            with opened(path) as other:
                assert used(other, NOON + 1) == (0, 50, 50)
            # Still alive to the other, so still open.
            assert rows(path)["reservations"] == 1

    def test_lock_files_of_servers_without_reservations_go(self, path: Path) -> None:
        with server(
            path, "store.arrive('a', ann, now).result()", "print('here', flush=True)"
        ) as one:
            said(one)
            one.kill()
            one.wait(30)
            (left,) = path.parent.glob("*.lock")
            with opened(path) as store:
                store.arrive("a", ANN, NOON).result(10)
                assert not left.exists()


class TestLocks:
    def test_held_and_let_go(self, tmp_path: Path) -> None:
        lock = tmp_path / "limits.sqlite.x.lock"
        assert locks.is_gone(lock)
        held = locks.hold(lock)
        assert not locks.is_gone(lock)
        os.close(held)
        assert locks.is_gone(lock)
        assert not lock.exists()

    def test_one_that_was_removed_before_it_was_held(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Another server may find the file in the moment before it is locked, and remove it."""
        lock = tmp_path / "limits.sqlite.x.lock"
        flock, calls = locks.fcntl.flock, 0

        def meanwhile(descriptor: int, how: int) -> None:
            nonlocal calls
            calls += 1
            if calls == 1:
                lock.unlink()
            flock(descriptor, how)

        monkeypatch.setattr(locks.fcntl, "flock", meanwhile)
        held = locks.hold(lock)
        assert (calls, lock.exists()) == (2, True)
        assert not locks.is_gone(lock)
        os.close(held)

    def test_one_that_was_replaced_before_it_was_looked_at(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lock = tmp_path / "limits.sqlite.x.lock"
        lock.touch()
        flock = locks.fcntl.flock
        kept: list[int] = []

        def meanwhile(descriptor: int, how: int) -> None:
            monkeypatch.setattr(locks.fcntl, "flock", flock)
            lock.unlink()
            kept.append(locks.hold(lock))
            flock(descriptor, how)

        monkeypatch.setattr(locks.fcntl, "flock", meanwhile)
        assert not locks.is_gone(lock)
        assert lock.exists()
        os.close(kept[0])

    def test_one_that_cannot_be_looked_at_counts_as_held(self, tmp_path: Path) -> None:
        (tmp_path / "limits.sqlite.x.lock").mkdir()
        assert not locks.is_gone(tmp_path / "limits.sqlite.x.lock")
