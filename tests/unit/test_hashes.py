"""Digests of files: that they are right, remembered as long as they hold, and read once.

Cases, of the digest: sizes around the chunk, none; reads that give less; little memory.
Of what is remembered: one stat and no open; after a restart; by other ways to the file; each of the
five numbers changed alone; real edits: longer, the same size with the time set back, touched, replaced
by a copy; changed just before, by either time, also in the future; the clock is read before the file.
Of the store: names, contents, modes; records damaged in each way, links and folders in their place;
its folder missing, unreadable, another user's, open to others, a file; a disk that is full.
Of `always` and `forget`: with and without a folder; a file that is gone, a record that stays.
Of refusals: links, also put there late; pipes, folders, devices; missing, forbidden, failing; growing
without end, cut, written over, replaced while it is read. No path in any message.
Of progress: first, last, how often, remembered, an error in it. Of cancelling: before, midway, waiting.
Of threads: two on one file, by another name, one that fails, too fresh, `always`; two on two.
Of keys: one, several, order, what is no digest.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import socket
import stat
import subprocess
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shimmy_jupyter.errors import Cancelled, ModelLoadFailed
from shimmy_jupyter.models import hashes
from shimmy_jupyter.models.hashes import Hashes, ignored, key_of
from shimmy_jupyter.models.scan import SETTLED, never

CHUNK = 1 << 10
DATA = bytes(range(256)) * 40 + b"end"
DIGEST = hashlib.sha256(DATA).hexdigest()
SOON = 60
"""Seconds that a test may wait for what is about to happen."""


def later() -> float:
    """The time of day in a minute: every file that a test has written has settled."""
    return time.time() + 60


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashes, "CHUNK_BYTES", CHUNK)
    monkeypatch.setattr(hashes, "REPORT_SECONDS", 0)
    monkeypatch.setattr(hashes, "POLL_SECONDS", 0.001)


@pytest.fixture(autouse=True)
def nothing_stays_open() -> Iterator[None]:
    handles = Path("/proc/self/fd")
    before = set(handles.iterdir()) if handles.exists() else None
    yield
    assert before is None or set(handles.iterdir()) == before


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "models" / "model.gguf"
    path.parent.mkdir()
    path.write_bytes(DATA)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data" / "digests"


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are opened from now on."""
    names: list[str] = []
    real = os.open

    def watched(path: Any, *arguments: Any, **options: Any) -> int:
        names.append(Path(path).name)
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", watched)
    return names


def record_of(path: Path, folder: Path) -> Path:
    return folder / hashlib.sha256(os.fsencode(path.resolve())).hexdigest()


def edit(path: Path, act: Callable[[], object]) -> None:
    """At once, if the file system's clock has ticked since the last change; else until it has."""
    before = path.lstat().st_ctime_ns
    while path.lstat().st_ctime_ns == before:
        act()


class TestDigests:
    @pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 5 * CHUNK + 7])
    def test_sizes_around_the_chunk(self, tmp_path: Path, size: int) -> None:
        path = tmp_path / "a"
        path.write_bytes(DATA[:size])
        assert Hashes(None).sha256(path) == hashlib.sha256(DATA[:size]).hexdigest()

    def test_reads_that_give_less(self, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        real = os.readv
        monkeypatch.setattr(os, "readv", lambda handle, to: real(handle, [to[0][:77]]))
        assert Hashes(None).sha256(model) == DIGEST

    def test_little_memory_is_used(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(hashes, "CHUNK_BYTES", 1 << 20)
        path = tmp_path / "large"
        with path.open("wb") as file:
            file.truncate(64 << 20)
        tracemalloc.start()
        try:
            Hashes(None).sha256(path)
            assert tracemalloc.get_traced_memory()[1] < 2 << 20
        finally:
            tracemalloc.stop()

    @pytest.mark.parametrize("missing", [True, False])
    def test_without_the_hint(
        self, model: Path, monkeypatch: pytest.MonkeyPatch, missing: bool
    ) -> None:
        def refused(*_arguments: object) -> None:
            raise OSError(errno.EINVAL, "no hints here")

        if missing:
            monkeypatch.delattr(os, "posix_fadvise", raising=False)
        else:
            monkeypatch.setattr(os, "posix_fadvise", refused, raising=False)
        assert Hashes(None).sha256(model) == DIGEST


class TestRemembering:
    def test_a_second_time_costs_one_stat(
        self, model: Path, folder: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        known = Hashes(folder, clock=later)
        assert known.known(model) is None
        assert known.sha256(model) == DIGEST
        opened.clear()
        looks: list[object] = []
        real = os.lstat

        def watched(path: Any) -> os.stat_result:
            looks.append(path)
            return real(path)

        monkeypatch.setattr(os, "lstat", watched)
        assert known.known(model) == DIGEST
        assert (opened, looks) == ([], [model])
        assert known.sha256(model) == DIGEST
        assert (opened, looks) == ([], [model, model])

    def test_in_memory_only(self, model: Path) -> None:
        known = Hashes(None, clock=later)
        known.sha256(model)
        assert known.known(model) == DIGEST
        assert Hashes(None, clock=later).known(model) is None

    def test_after_a_restart(self, model: Path, folder: Path, opened: list[str]) -> None:
        Hashes(folder, clock=later).sha256(model)
        opened.clear()
        again = Hashes(folder)
        assert again.known(model) == again.sha256(model) == DIGEST
        assert model.name not in opened
        # The record is read once, too.
        assert opened == [folder.name, record_of(model, folder).name]

    def test_what_another_process_has_hashed_since(self, model: Path, folder: Path) -> None:
        ours, theirs = Hashes(folder, clock=later), Hashes(folder, clock=later)
        ours.sha256(model)
        edit(model, lambda: model.write_bytes(DATA[::-1]))
        assert ours.known(model) is None
        digest = theirs.sha256(model)
        assert ours.known(model) == digest == hashlib.sha256(DATA[::-1]).hexdigest()

    @pytest.mark.parametrize("restart", [True, False])
    def test_other_ways_to_the_file(
        self, model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, restart: bool
    ) -> None:
        known = Hashes(folder, clock=later)
        known.sha256(model)
        linked = model.parent.with_name("linked")
        linked.symlink_to(model.parent, target_is_directory=True)
        monkeypatch.chdir(model.parent)
        for path in (linked / model.name, Path(model.name), Path("../linked") / model.name):
            assert (Hashes(folder) if restart else known).known(path) == DIGEST

    def test_two_files_of_one_name(self, model: Path, folder: Path) -> None:
        other = model.parent / "other" / model.name
        other.parent.mkdir()
        other.write_bytes(b"else")
        known = Hashes(folder, clock=later)
        assert known.sha256(model) != known.sha256(other)
        again = Hashes(folder)
        assert (again.known(model), again.known(other)) == (known.known(model), known.known(other))
        assert again.known(other) != DIGEST

    @pytest.mark.parametrize("field", ["st_dev", "st_ino", "st_size", "st_mtime_ns", "st_ctime_ns"])
    @pytest.mark.parametrize("restart", [True, False])
    def test_each_number_counts(
        self, model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, field: str, restart: bool
    ) -> None:
        known = Hashes(folder, clock=later)
        known.sha256(model)
        known = Hashes(folder) if restart else known
        real = os.lstat
        names = ("st_mode", "st_dev", "st_ino", "st_size", "st_mtime_ns", "st_ctime_ns")

        def changed(path: Any) -> Any:
            status = real(path)
            if Path(path) != model:
                return status
            found = {name: getattr(status, name) for name in names}
            return SimpleNamespace(**found | {field: found[field] + 1})

        with monkeypatch.context() as patched:
            patched.setattr(os, "lstat", changed)
            assert known.known(model) is None
        assert known.known(model) == DIGEST

    @pytest.mark.parametrize("restart", [True, False])
    @pytest.mark.parametrize("what", ["longer", "same size", "replaced", "touched"])
    def test_real_edits(self, model: Path, folder: Path, what: str, restart: bool) -> None:
        known = Hashes(folder, clock=later)
        known.sha256(model)
        times = model.stat()

        def change() -> None:
            match what:
                case "longer":
                    model.write_bytes(DATA + b"more")
                case "same size":
                    model.write_bytes(DATA[::-1])
                case "replaced":
                    copy = model.with_name("copy")
                    copy.write_bytes(DATA[::-1])
                    copy.replace(model)
                case "touched":
                    model.touch()
            if what in {"same size", "replaced"}:
                os.utime(model, ns=(times.st_atime_ns, times.st_mtime_ns))

        edit(model, change)
        status = model.stat()
        assert (status.st_size == len(DATA)) == (what != "longer")
        assert (status.st_mtime_ns == times.st_mtime_ns) == (what in {"same size", "replaced"})
        known = Hashes(folder, clock=later) if restart else known
        assert known.known(model) is None
        assert known.sha256(model) == hashlib.sha256(model.read_bytes()).hexdigest()
        assert known.known(model) == Hashes(folder).known(model) is not None

    def test_another_file_that_comes_back(self, model: Path, folder: Path) -> None:
        """What is remembered of a path is of the last file that had it."""
        known = Hashes(folder, clock=later)
        known.sha256(model)
        away = model.with_name("away")
        model.rename(away)
        model.write_bytes(b"else")
        assert known.sha256(model) == hashlib.sha256(b"else").hexdigest()
        away.replace(model)
        assert known.sha256(model) == Hashes(folder, clock=later).sha256(model) == DIGEST


class TestFresh:
    @pytest.mark.parametrize("folder_too", [True, False])
    @pytest.mark.parametrize(
        ("age", "kept"), [(SETTLED - 0.1, False), (SETTLED + 0.1, True), (-5, False)]
    )
    def test_what_was_just_changed_is_hashed_again(
        self, model: Path, folder: Path, age: float, kept: bool, folder_too: bool
    ) -> None:
        os.utime(model, (0, 0))  # whoever sets this time does not hide the other
        changed = model.lstat().st_ctime_ns / 1e9
        known = Hashes(folder if folder_too else None, clock=lambda: changed + age)
        assert known.sha256(model) == DIGEST
        assert known.known(model) == (DIGEST if kept else None)
        assert record_of(model, folder).exists() == (kept and folder_too)
        assert known.sha256(model) == DIGEST

    def test_a_time_in_the_future(self, model: Path) -> None:
        os.utime(model, (later(), later()))
        known = Hashes(None, clock=lambda: later() - 10)
        known.sha256(model)
        assert known.known(model) is None

    def test_the_clock_is_read_before_the_file(self, model: Path) -> None:
        now = [model.lstat().st_ctime_ns / 1e9 + 1]

        def wait(_done: int, _total: int) -> None:
            now[0] += 100

        known = Hashes(None, clock=lambda: now[0])
        known.sha256(model, wait)
        assert known.known(model) is None


def damaged(**changes: object) -> bytes:
    """A record of the right shape, but for what is changed; None is for left out."""
    record = {
        "version": 1, "device": 1, "inode": 2, "size": 3, "mtime_ns": 4, "ctime_ns": 5,
        "sha256": DIGEST,
    } | changes  # fmt: skip
    return json.dumps({name: value for name, value in record.items() if value is not None}).encode()


class TestStore:
    def test_names_contents_and_modes(self, model: Path, folder: Path) -> None:
        before = os.umask(0)
        try:
            Hashes(folder, clock=later).sha256(model)
        finally:
            os.umask(before)
        assert list(folder.iterdir()) == [record_of(model, folder)]
        status = model.lstat()
        assert json.loads(record_of(model, folder).read_bytes()) == {
            "version": 1,
            "device": status.st_dev,
            "inode": status.st_ino,
            "size": len(DATA),
            "mtime_ns": status.st_mtime_ns,
            "ctime_ns": status.st_ctime_ns,
            "sha256": DIGEST,
        }
        assert stat.S_IMODE(record_of(model, folder).stat().st_mode) == 0o600
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700

    def test_looking_makes_no_folder(self, model: Path, folder: Path) -> None:
        known = Hashes(folder)
        assert known.known(model) is None
        known.forget(model)
        assert not folder.parent.exists()

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"{",
            b"null",
            b"[]",
            b"7",
            b"\xff{}",
            b"[" * 4000,
            b"1" * 4090,
            damaged(size=None),
            damaged(sha256=None),
            damaged(more=1),
            damaged(version=2),
            damaged(version=True),
            damaged(version="1"),
            damaged(size=True),
            damaged(inode=2.0),
            damaged(device="1"),
            damaged(mtime_ns=[]),
            damaged(sha256=7),
            damaged(sha256=DIGEST.upper()),
            damaged(sha256=DIGEST[1:]),
            damaged(sha256=DIGEST + "\n"),
        ],
    )
    def test_a_damaged_record_is_as_none(
        self, model: Path, folder: Path, content: bytes, caplog: pytest.LogCaptureFixture
    ) -> None:
        folder.mkdir(mode=0o700, parents=True)
        record_of(model, folder).write_bytes(content)
        known = Hashes(folder, clock=later)
        assert known.known(model) is None
        assert known.known(model) is None
        assert [entry.levelno for entry in caplog.records] == [logging.WARNING]
        assert "what is known of 'model.gguf' is damaged" in caplog.text
        assert str(folder) not in caplog.text
        assert known.sha256(model) == DIGEST
        assert Hashes(folder).known(model) == DIGEST

    @pytest.mark.parametrize(
        "change", [{"version": True}, {"more": 1}, {"sha256": DIGEST + "\n"}, {"size": "10243"}]
    )
    def test_damaged_with_the_files_own_numbers(
        self, model: Path, folder: Path, change: dict[str, object]
    ) -> None:
        Hashes(folder, clock=later).sha256(model)
        record = record_of(model, folder)
        record.write_text(json.dumps(json.loads(record.read_bytes()) | change))
        assert Hashes(folder).known(model) is None

    def test_a_record_that_is_too_long(self, model: Path, folder: Path) -> None:
        Hashes(folder, clock=later).sha256(model)
        record = record_of(model, folder)
        content = record.read_bytes()
        record.write_bytes(content.ljust(4096))
        assert Hashes(folder).known(model) == DIGEST
        record.write_bytes(content.ljust(4097))
        assert Hashes(folder).known(model) is None

    @pytest.mark.parametrize("kind", ["link", "folder", "pipe"])
    def test_something_else_in_a_records_place(
        self, model: Path, folder: Path, kind: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        Hashes(folder, clock=later).sha256(model)
        record = record_of(model, folder)
        if kind == "link":
            record.rename(folder / "real")
            record.symlink_to(folder / "real")
        else:
            record.unlink()
            record.mkdir() if kind == "folder" else os.mkfifo(record)
        known = Hashes(folder, clock=later)
        assert known.known(model) is None
        assert caplog.text.count("WARNING") == 1
        assert known.sha256(model) == DIGEST
        assert known.known(model) == DIGEST
        # A folder is not renamed over; anything else is.
        assert (Hashes(folder).known(model) is None) == (kind == "folder")
        assert not [path for path in folder.iterdir() if path.name.startswith(".")]

    @pytest.mark.parametrize("mode", [0o770, 0o720, 0o702, 0o777, 0o1777])
    def test_a_folder_that_others_may_write_to_is_not_believed(
        self, model: Path, folder: Path, mode: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        Hashes(folder, clock=later).sha256(model)
        folder.chmod(mode)
        known = Hashes(folder, clock=later)
        assert known.known(model) is None
        assert "others may write" in caplog.text
        before = record_of(model, folder).stat()
        assert known.sha256(model) == DIGEST
        assert record_of(model, folder).stat() == before
        assert known.known(model) == DIGEST  # in memory
        folder.chmod(0o755)
        assert Hashes(folder).known(model) == DIGEST

    def test_another_users_folder_is_not_believed(
        self,
        model: Path,
        folder: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        Hashes(folder, clock=later).sha256(model)
        monkeypatch.setattr(os, "geteuid", lambda: 4711)
        known = Hashes(folder, clock=later)
        assert known.known(model) is None
        assert "another user's" in caplog.text
        assert known.sha256(model) == DIGEST
        assert known.known(model) == DIGEST

    def test_a_folder_that_cannot_be_read(
        self,
        model: Path,
        folder: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        Hashes(folder, clock=later).sha256(model)
        real = os.open

        def forbidden(path: Any, *arguments: Any, **options: Any) -> int:
            if Path(path) == folder:  # as root nothing is forbidden
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return real(path, *arguments, **options)

        monkeypatch.setattr(os, "open", forbidden)
        known = Hashes(folder, clock=later)
        for _ in range(3):
            assert known.known(model) is None
        assert known.sha256(model) == DIGEST
        assert known.known(model) == DIGEST
        texts = [entry.getMessage() for entry in caplog.records]
        assert texts == [
            "known digests of models cannot be read: Permission denied",
            "digests of models are lost when the server ends: Permission denied",
        ]

    def test_a_file_in_the_folders_place(
        self, model: Path, folder: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        folder.parent.mkdir()
        folder.write_text("mine")
        known = Hashes(folder, clock=later)
        assert known.sha256(model) == known.known(model) == DIGEST
        assert folder.read_text() == "mine"
        assert "Not a directory" in caplog.text

    def test_a_disk_that_is_full(
        self,
        model: Path,
        folder: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        def full(*_arguments: object, **_options: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "rename", full)
        known = Hashes(folder, clock=later)
        assert known.sha256(model) == known.known(model) == DIGEST
        assert list(folder.iterdir()) == []
        assert "No space left" in caplog.text

    def test_a_linked_folder(self, model: Path, folder: Path, tmp_path: Path) -> None:
        real = tmp_path / "elsewhere"
        real.mkdir(mode=0o700)
        folder.parent.mkdir()
        folder.symlink_to(real, target_is_directory=True)
        Hashes(folder, clock=later).sha256(model)
        assert record_of(model, real).exists()


class TestAlways:
    def test_nothing_is_remembered(self, model: Path, folder: Path, opened: list[str]) -> None:
        Hashes(folder, clock=later).sha256(model)
        content = record_of(model, folder).read_bytes()
        opened.clear()
        always = Hashes(folder, always=True, clock=later)
        for _ in range(2):
            assert always.known(model) is None
            assert always.sha256(model) == DIGEST
        assert opened == [model.name, model.name]
        assert record_of(model, folder).read_bytes() == content

    def test_no_folder_is_made(self, model: Path, folder: Path) -> None:
        Hashes(folder, always=True, clock=later).sha256(model)
        assert not folder.exists()


class TestForgetting:
    @pytest.mark.parametrize("way", ["itself", "linked folder", "link"])
    def test_it_is_hashed_again(self, model: Path, folder: Path, way: str) -> None:
        known = Hashes(folder, clock=later)
        known.sha256(model)
        path = model
        if way == "link":
            path = model.with_name("link")
            path.symlink_to(model)
        elif way == "linked folder":
            path = model.parent.with_name("linked") / model.name
            path.parent.symlink_to(model.parent, target_is_directory=True)
        known.forget(path)
        assert known.known(model) is None
        assert Hashes(folder).known(model) is None
        assert known.sha256(model) == known.known(model) == DIGEST

    def test_in_memory(self, model: Path) -> None:
        known = Hashes(None, clock=later)
        known.forget(model)
        known.sha256(model)
        known.forget(model)
        assert known.known(model) is None

    def test_a_file_that_is_gone(self, model: Path, folder: Path) -> None:
        known = Hashes(folder, clock=later)
        known.sha256(model)
        model.unlink()
        known.forget(model)
        assert list(folder.iterdir()) == []
        known.forget(model)

    def test_only_that_one(self, model: Path, folder: Path) -> None:
        other = model.with_name("other.gguf")
        other.write_bytes(b"else")
        known = Hashes(folder, clock=later)
        known.sha256(model)
        known.sha256(other)
        known.forget(other)
        assert (known.known(model), known.known(other)) == (DIGEST, None)

    def test_a_record_that_cannot_be_removed(
        self, model: Path, folder: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        Hashes(folder, clock=later).sha256(model)
        folder.chmod(0o777)
        Hashes(folder).forget(model)
        assert "the known digest of 'model.gguf' cannot be removed" in caplog.text


def refusal(path: Path, **options: Any) -> str:
    """The message of the error, which names the file and no folder."""
    known = Hashes(None, clock=later)
    with pytest.raises(ModelLoadFailed) as caught:
        known.sha256(path, **options)
    assert str(path.parent) not in caught.value.message
    assert caught.value.__cause__ is None
    assert known.known(path) is None
    assert not known._turns
    return caught.value.message


class TestRefusals:
    @pytest.mark.parametrize("dangling", [True, False])
    def test_a_link(self, model: Path, dangling: bool) -> None:
        link = model.with_name("link.gguf")
        link.symlink_to("nowhere" if dangling else model.name)
        assert refusal(link) == "'link.gguf' is a link; name the file that it leads to"

    def test_a_pipe(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        assert refusal(tmp_path / "pipe") == "'pipe' is no regular file"

    def test_a_folder(self, model: Path) -> None:
        assert refusal(model.parent) == "'models' is no regular file"

    def test_a_socket(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)  # its name would be too long
        with socket.socket(socket.AF_UNIX) as one:
            one.bind("socket")
        assert refusal(tmp_path / "socket") == "'socket' is no regular file"

    def test_a_device(self) -> None:
        with pytest.raises(ModelLoadFailed, match="'zero' is no regular file"):
            Hashes(None).sha256(Path("/dev/zero"))

    def test_a_file_that_is_not_there(self, model: Path) -> None:
        text = "cannot be read: No such file or directory"
        assert refusal(model.with_name("no")) == f"'no' {text}"
        assert refusal(model.parent / "no" / "file") == f"'file' {text}"

    def test_a_name_with_line_breaks(self, tmp_path: Path) -> None:
        assert "\n" not in refusal(tmp_path / "a\nb")
        assert refusal(tmp_path / os.fsdecode(b"\xff")).isprintable()

    @pytest.mark.parametrize("late", ["link", "pipe", "folder"])
    def test_put_there_after_it_was_looked_at(
        self, model: Path, monkeypatch: pytest.MonkeyPatch, late: str
    ) -> None:
        real = os.open

        def exchanged(path: Any, *arguments: Any, **options: Any) -> int:
            model.rename(model.with_name("real"))
            match late:
                case "link":
                    model.symlink_to("real")
                case "pipe":
                    os.mkfifo(model)
                case _:
                    model.mkdir()
            return real(path, *arguments, **options)

        monkeypatch.setattr(os, "open", exchanged)
        expected = {"link": "cannot be read: it is a link"}.get(late, "is no regular file")
        assert refusal(model) == f"'model.gguf' {expected}"

    def test_a_file_that_may_not_be_read(
        self, model: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def forbidden(path: object, *_arguments: object, **_options: object) -> int:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

        monkeypatch.setattr(os, "open", forbidden)
        assert refusal(model) == "'model.gguf' cannot be read: Permission denied"

    def test_a_disk_that_fails(self, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        real = os.readv
        reads: list[int] = []

        def failing(handle: int, to: Any) -> int:
            reads.append(handle)
            if len(reads) == 3:
                raise OSError(errno.EIO, "Input/output error")
            return real(handle, to)

        monkeypatch.setattr(os, "readv", failing)
        assert refusal(model) == "'model.gguf' cannot be read: Input/output error"


class Calls:
    """Progress, as it was told."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def __call__(self, done: int, total: int) -> None:
        self.seen.append((done, total))


class TestChanges:
    CHANGED = "'model.gguf' changed while it was read"

    def test_one_that_grows_without_end(self, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        real = os.readv
        reads: list[int] = []

        def grow(handle: int, to: Any) -> int:
            reads.append(handle)
            assert len(reads) <= len(DATA) // CHUNK + 2
            with model.open("ab") as file:
                file.write(DATA)
            return real(handle, to)

        monkeypatch.setattr(os, "readv", grow)
        calls = Calls()
        assert refusal(model, progress=calls) == self.CHANGED
        assert all(done < total == len(DATA) for done, total in calls.seen)

    def test_one_that_has_grown_by_the_end(self, model: Path) -> None:
        size = model.stat().st_size

        def grow(done: int, total: int) -> None:
            if total - done < CHUNK:
                model.write_bytes(DATA + b"x")

        assert refusal(model, progress=grow) == self.CHANGED
        assert model.stat().st_size == size + 1

    def test_one_that_is_cut(self, model: Path) -> None:
        def cut(_done: int, _total: int) -> None:
            os.truncate(model, 2 * CHUNK)

        assert refusal(model, progress=cut) == self.CHANGED

    def test_one_that_ends_early_without_a_trace(
        self, model: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As over a network, from a server that has other ideas."""
        first, real = iter([True]), os.readv
        monkeypatch.setattr(
            os, "readv", lambda handle, to: real(handle, to) if next(first, False) else 0
        )
        assert refusal(model) == self.CHANGED

    @pytest.mark.parametrize("back", [True, False])
    def test_one_that_is_written_over(self, model: Path, back: bool) -> None:
        times = model.stat()

        def over(done: int, _total: int) -> None:
            with model.open("r+b") as file:
                file.write(b"another beginning")
            if back:
                os.utime(model, ns=(times.st_atime_ns, times.st_mtime_ns))

        def write(done: int, total: int) -> None:
            if done == CHUNK:
                edit(model, lambda: over(done, total))

        assert refusal(model, progress=write) == self.CHANGED

    def test_one_that_is_replaced(self, model: Path) -> None:
        def replace(done: int, _total: int) -> None:
            if done == CHUNK:
                copy = model.with_name("copy")
                handle = os.open(model, os.O_RDONLY)
                try:
                    before = os.fstat(handle).st_ctime_ns
                    while os.fstat(handle).st_ctime_ns == before:
                        # Its own names' coming and going changes it.
                        copy.unlink(missing_ok=True)
                        os.link(model, copy)
                finally:
                    os.close(handle)
                copy.unlink()
                copy.write_bytes(DATA)
                copy.replace(model)

        assert refusal(model, progress=replace) == self.CHANGED

    def test_what_is_written_before_and_after_is_none_of_it(self, model: Path) -> None:
        known = Hashes(None, clock=later)

        def write_at_the_end(done: int, total: int) -> None:
            if done == total:
                edit(model, lambda: model.write_bytes(DATA[::-1]))

        assert known.sha256(model, write_at_the_end) == DIGEST
        assert known.known(model) is None


class TestProgress:
    def test_it_rises_to_the_end(self, model: Path) -> None:
        calls = Calls()
        Hashes(None).sha256(model, calls)
        steps = [*range(CHUNK, len(DATA), CHUNK), len(DATA)]
        assert calls.seen == [(step, len(DATA)) for step in steps]

    def test_at_most_so_often(self, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A chunk takes 0.01 s here, and there are 200."""
        model.write_bytes(bytes(200 * CHUNK))
        now = [1000.0]

        def tick() -> float:
            now[0] += 0.01
            return now[0]

        monkeypatch.setattr(hashes, "time", SimpleNamespace(monotonic=tick))
        monkeypatch.setattr(hashes, "REPORT_SECONDS", 0.0499)
        calls = Calls()
        Hashes(None).sha256(model, calls)
        assert len(calls.seen) == 200 / 5 + 1
        assert calls.seen[0] == (CHUNK, 200 * CHUNK)
        assert calls.seen[-1] == (200 * CHUNK, 200 * CHUNK)

    @pytest.mark.parametrize("size", [0, 1, CHUNK])
    def test_one_call_for_one_chunk(self, tmp_path: Path, size: int) -> None:
        (tmp_path / "a").write_bytes(bytes(size))
        calls = Calls()
        Hashes(None).sha256(tmp_path / "a", calls)
        assert calls.seen == [(size, size)]

    def test_what_is_remembered_is_done(self, model: Path) -> None:
        known = Hashes(None, clock=later)
        known.sha256(model)
        calls = Calls()
        known.sha256(model, calls)
        assert calls.seen == [(len(DATA), len(DATA))]

    def test_an_error_in_it(self, model: Path) -> None:
        class Ours(OSError):
            pass

        def fail(_done: int, _total: int) -> None:
            raise Ours(errno.EPIPE, "nobody listens")

        known = Hashes(None, clock=later)
        with pytest.raises(Ours):
            known.sha256(model, fail)
        assert not known._turns
        assert known.sha256(model) == DIGEST


class TestCancelling:
    @pytest.mark.parametrize("after", [0, 1, 5, len(DATA) // CHUNK])
    def test_midway(self, model: Path, folder: Path, after: int) -> None:
        asked = []
        calls = Calls()

        def cancelled() -> bool:
            asked.append(1)
            return len(asked) > after

        known = Hashes(folder, clock=later)
        with pytest.raises(Cancelled, match=r"the hashing of 'model\.gguf' was stopped"):
            known.sha256(model, calls, cancelled)
        assert len(calls.seen) == after
        assert known.known(model) is None
        assert not folder.exists()
        assert not known._turns
        assert known.sha256(model) == DIGEST

    def test_what_is_remembered_is_not_stopped(self, model: Path) -> None:
        known = Hashes(None, clock=later)
        known.sha256(model)
        assert known.sha256(model, cancelled=lambda: True) == DIGEST


class Held:
    """A thread that hashes, stopped at its first report until it is let go."""

    def __init__(self, known: Hashes, path: Path, pool: ThreadPoolExecutor) -> None:
        self._at_it, self._go = threading.Event(), threading.Event()
        self.stop = False
        self.digest: Future[str] = pool.submit(known.sha256, path, self._wait, lambda: self.stop)
        assert self._at_it.wait(SOON)

    def _wait(self, _done: int, _total: int) -> None:
        self._at_it.set()
        assert self._go.wait(SOON)

    def go(self, *, stop: bool = False) -> None:
        self.stop = stop
        self._go.set()


class Waiting:
    """A thread that wants the same, until it is seen to wait."""

    def __init__(self, known: Hashes, path: Path, pool: ThreadPoolExecutor) -> None:
        self._waits = threading.Event()
        self.stop = False
        self.calls = Calls()
        self.digest: Future[str] = pool.submit(known.sha256, path, self.calls, self._cancelled)
        assert self._waits.wait(SOON)
        assert not self.digest.done()

    def _cancelled(self) -> bool:
        self._waits.set()
        return self.stop


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


class TestThreads:
    @pytest.mark.parametrize("waiting", [1, 5])
    def test_one_reads_for_all(
        self, model: Path, pool: ThreadPoolExecutor, opened: list[str], waiting: int
    ) -> None:
        known = Hashes(None, clock=later)
        first = Held(known, model, pool)
        others = [Waiting(known, model, pool) for _ in range(waiting)]
        first.go()
        assert first.digest.result(SOON) == DIGEST
        assert {one.digest.result(SOON) for one in others} == {DIGEST}
        assert opened == [model.name]
        assert all(one.calls.seen == [(len(DATA), len(DATA))] for one in others)
        assert not known._turns

    def test_by_another_name(
        self, model: Path, pool: ThreadPoolExecutor, opened: list[str]
    ) -> None:
        other = model.with_name("other.gguf")
        os.link(model, other)
        known = Hashes(None, clock=later)
        first = Held(known, model, pool)
        second = Waiting(known, other, pool)
        first.go()
        assert second.digest.result(SOON) == DIGEST
        assert opened == [model.name]

    def test_who_waits_can_be_stopped(
        self, model: Path, pool: ThreadPoolExecutor, opened: list[str]
    ) -> None:
        known = Hashes(None, clock=later)
        first = Held(known, model, pool)
        second, third = (Waiting(known, model, pool) for _ in range(2))
        second.stop = True
        with pytest.raises(Cancelled):
            second.digest.result(SOON)
        assert not first.digest.done()
        assert not third.digest.done()
        first.go()
        assert first.digest.result(SOON) == third.digest.result(SOON) == DIGEST
        assert opened == [model.name]
        assert not known._turns

    def test_where_the_first_is_stopped_the_second_reads(
        self, model: Path, pool: ThreadPoolExecutor, opened: list[str]
    ) -> None:
        known = Hashes(None, clock=later)
        first = Held(known, model, pool)
        second = Waiting(known, model, pool)
        first.go(stop=True)
        with pytest.raises(Cancelled):
            first.digest.result(SOON)
        assert second.digest.result(SOON) == DIGEST
        assert opened == [model.name, model.name]
        assert not known._turns

    @pytest.mark.parametrize("always", [True, False])
    def test_what_is_not_remembered_each_reads(
        self, model: Path, pool: ThreadPoolExecutor, opened: list[str], always: bool
    ) -> None:
        """What the first has read may be older than the second's question."""
        known = Hashes(None, always=always, clock=later if always else time.time)
        first = Held(known, model, pool)
        second = Waiting(known, model, pool)
        first.go()
        assert first.digest.result(SOON) == second.digest.result(SOON) == DIGEST
        assert opened == [model.name, model.name]

    def test_a_change_while_the_second_waits(self, model: Path, pool: ThreadPoolExecutor) -> None:
        known = Hashes(None, clock=later)
        first = Held(known, model, pool)
        second = Waiting(known, model, pool)
        edit(model, lambda: model.write_bytes(DATA[::-1]))
        first.go()
        with pytest.raises(ModelLoadFailed, match="changed while it was read"):
            first.digest.result(SOON)
        assert second.digest.result(SOON) == hashlib.sha256(DATA[::-1]).hexdigest()

    def test_two_files_do_not_wait_for_each_other(
        self, model: Path, pool: ThreadPoolExecutor
    ) -> None:
        other = model.with_name("other.gguf")
        other.write_bytes(b"else")
        known = Hashes(None, clock=later)
        first = Held(known, model, pool)
        assert known.sha256(other) == hashlib.sha256(b"else").hexdigest()
        assert known.known(other) is not None
        first.go()
        assert first.digest.result(SOON) == DIGEST


digests = st.binary(max_size=3).map(lambda data: hashlib.sha256(data).hexdigest())


class TestKeys:
    @given(digests)
    def test_of_one_file_it_is_its_digest(self, digest: str) -> None:
        assert key_of([digest]) == digest

    @given(st.lists(digests, min_size=1, max_size=4), st.lists(digests, min_size=1, max_size=4))
    def test_two_keys_are_equal_for_the_same_files_in_the_same_order(
        self, one: list[str], two: list[str]
    ) -> None:
        assert (key_of(one) == key_of(two)) == (one == two)

    @given(st.lists(digests, min_size=1, max_size=4))
    def test_it_is_like_a_digest(self, some: list[str]) -> None:
        key = key_of(tuple(some))
        assert key_of([key]) == key

    def test_anybody_can_compute_it(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            (tmp_path / name).write_text(name)
        command = "sha256sum a b | cut -c1-64 | sha256sum | cut -c1-64"
        done = subprocess.run(
            command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        if done.stderr:
            pytest.skip(f"needs sha256sum: {done.stderr}")
        some = Hashes(None)
        assert key_of([some.sha256(tmp_path / name) for name in "ab"]) == done.stdout.strip()

    @pytest.mark.parametrize(
        "some", [[], [""], [DIGEST, ""], [DIGEST.upper()], [DIGEST + "\n"], ["g" * 64]]
    )
    def test_what_is_no_digest(self, some: list[str]) -> None:
        with pytest.raises(ValueError, match="64 hex digits"):
            key_of(some)


def test_what_is_left_out_does_nothing() -> None:
    ignored(1, 2)
    assert never() is False
