"""Answers are kept from one run to the next, for their owner alone; what is wrong with the file is said."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import stat
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shimmy_jupyter.errors import InvalidValue
from shimmy_jupyter.frames import cache as module
from shimmy_jupyter.frames import rows
from shimmy_jupyter.frames.cache import NAME, Cache, CacheWarning, Key, Reply


class Time:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "private" / "cache"


def filled(folder: Path, n: int = 3, **more) -> list[bytes]:
    keys = [Key("chat", "sha", {}).of(f"prompt {k}") for k in range(n)]
    cache = Cache(folder, **more)
    for k, key in enumerate(keys):
        cache.put(key, Reply(f"answer {k}", k, "stop"))
    cache.close()
    return keys


def statements(path: Path, *texts: str) -> None:
    connection = sqlite3.connect(path)
    for text in texts:
        connection.execute(text)
    connection.commit()
    connection.close()


def unusable(folder: Path, said: str) -> None:
    """It says why, once, and is as one that is empty."""
    cache = Cache(folder)
    key = Key("chat", "sha", {}).of("prompt 0")
    with pytest.warns(CacheWarning, match=said) as caught:
        assert cache.get(key) is None
    assert len(caught) == 1
    assert str(folder) not in str(caught[0].message)
    assert said in str(cache.failure)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache.put(key, Reply("x"))
        assert cache.get(key) is None
        assert cache.size() == (0, 0)
        cache.close()


class TestKeeping:
    def test_what_was_put_in_comes_back(self, folder: Path) -> None:
        keys = filled(folder)
        cache = Cache(folder)
        assert [cache.get(key) for key in keys] == [
            Reply("answer 0", 0), Reply("answer 1", 1), Reply("answer 2", 2),
        ]  # fmt: skip
        assert cache.get(b"another") is None
        assert cache.size()[0] == 3
        cache.close()

    @given(st.text(), st.integers(0, 1 << 40), st.sampled_from(["stop", "length"]))
    @settings(max_examples=30, deadline=None)
    def test_whatever_it_is(self, tmp_path_factory, text: str, tokens: int, finish: str) -> None:
        folder = tmp_path_factory.mktemp("c") / "c"
        for look in (False, True):
            cache = Cache(folder)
            if look:
                assert cache.get(b"k") == Reply(text, tokens, finish)
            else:
                cache.put(b"k", Reply(text, tokens, finish))
            cache.close()

    def test_it_is_there_before_it_is_written(self, folder: Path) -> None:
        cache = Cache(folder)
        cache.put(b"k", Reply("x"))
        assert cache.get(b"k") == Reply("x")
        assert not folder.exists()
        cache.close()

    def test_an_empty_answer_is_one(self, folder: Path) -> None:
        cache = Cache(folder)
        cache.put(b"k", Reply(""))
        assert cache.get(b"k") == Reply("")
        cache.close()
        cache = Cache(folder)
        assert cache.get(b"k") == Reply("")
        cache.close()

    def test_it_is_written_about_once_a_second(self, folder: Path) -> None:
        clock = Time()
        cache, other = Cache(folder, clock=clock), Cache(folder)
        cache.put(b"1", Reply("x"))
        clock.now += 0.9
        cache.put(b"2", Reply("x"))
        assert other.get(b"2") is None
        clock.now += 0.2
        cache.put(b"3", Reply("x"))
        assert [other.get(key) for key in (b"1", b"2", b"3")] == [Reply("x")] * 3
        clock.now -= 1000  # set back
        cache.put(b"4", Reply("x"))
        assert other.get(b"4") is not None
        for k in range(module._MOST):
            cache.put(b"many %d" % k, Reply("x"))
        assert other.get(b"many 0") is not None
        cache.close()
        other.close()

    def test_half_of_a_surrogate_pair_is_not_kept(self, folder: Path) -> None:
        cache = Cache(folder)
        cache.put(b"k", Reply("\ud800"))
        assert cache.get(b"k") is None
        cache.close()
        assert Key("chat", "sha", {"system": "\ud800"}).of("\ud800")

    def test_what_another_has_written_first_stays(self, folder: Path) -> None:
        one, two = Cache(folder), Cache(folder)
        one.put(b"k", Reply("first"))
        two.put(b"k", Reply("second"))
        one.close()
        two.close()
        cache = Cache(folder)
        assert cache.get(b"k") == Reply("first")
        cache.close()

    def test_several_processes_at_once(self, folder: Path) -> None:
        code = (
            "import sys; from pathlib import Path\n"
            "from shimmy_jupyter.frames.cache import Cache, Reply\n"
            "for k in range(30):\n"
            "    cache = Cache(Path(sys.argv[1]))\n"
            "    cache.put(f'{sys.argv[2]} {k}'.encode(), Reply('x'))\n"
            "    assert cache.get(f'{sys.argv[2]} {k}'.encode())\n"
            "    cache.close()\n"
            "    assert cache.failure is None, cache.failure\n"
        )
        command = [sys.executable, "-W", "error", "-c", code, str(folder)]
        started = [subprocess.Popen([*command, str(k)]) for k in range(3)]
        assert [process.wait(120) for process in started] == [0, 0, 0]
        cache = Cache(folder)
        assert cache.size()[0] == 90
        cache.close()

    def test_closing_twice_is_fine(self, folder: Path) -> None:
        cache = Cache(folder)
        cache.put(b"k", Reply("x"))
        cache.close()
        cache.close()


class TestKeys:
    def test_all_that_an_answer_depends_on_is_in_it(self) -> None:
        body = {"temperature": 0, "response_format": {"a": [1]}, "system": None}
        keys = [
            Key("chat", "sha", body).of("x"),
            Key("chat", "sha", body).of("y"),
            Key("chat", "sha", body).of("x", 1),
            Key("chat", "other", body).of("x"),
            Key("embed", "sha", body).of("x"),
            Key("chat", "sha", {**body, "temperature": 0.5}).of("x"),
            Key("chat", "sha", {**body, "seed": 0}).of("x"),
            Key("chat", "sha", {**body, "response_format": {"a": [2]}}).of("x"),
            Key("chat", "sha", {**body, "system": ""}).of("x"),
        ]
        assert len(set(keys)) == len(keys)

    def test_no_two_parts_run_into_each_other(self) -> None:
        key = Key("chat", "sha", {})
        assert key.of("0x", 1) != key.of("x", 10)
        assert key.of("1\0x") != key.of("x", 1)

    def test_the_order_of_parameters_does_not_matter(self) -> None:
        one, two = {"a": 1, "b": {"c": 2, "d": 3}}, {"b": {"c": 2, "d": 3}, "a": 1}
        assert Key("chat", "s", one).of("x") == Key("chat", "s", two).of("x")

    def test_the_order_of_a_schema_s_fields_does(self) -> None:
        text = {"type": "string"}
        keys = {
            Key("chat", "s", rows.body(None, schema, {"temperature": 0})).of("x")
            for schema in (
                {"type": "object", "properties": {"reason": text, "label": text}},
                {"type": "object", "properties": {"label": text, "reason": text}},
            )
        }
        assert len(keys) == 2

    def test_answers_from_before_that_was_told_apart_are_not_found(self) -> None:
        asked = json.dumps([1, "chat", "s", {"seed": 0}], sort_keys=True)
        before = hashlib.sha256(f"{asked}\0".encode() + b"0\0x").digest()
        assert Key("chat", "s", {"seed": 0}).of("x") != before

    def test_it_is_the_same_in_another_process(self) -> None:
        code = "from shimmy_jupyter.frames.cache import Key; print(Key('a', 'b', {'c': 1}).of('d').hex())"
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == Key("a", "b", {"c": 1}).of("d").hex()


class TestPrivacy:
    def test_only_its_owner_can_open_it(self, folder: Path) -> None:
        before = os.umask(0)
        try:
            filled(folder)
        finally:
            os.umask(before)
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {
            NAME: 0o600, f"{NAME}-journal": 0o600,
        }  # fmt: skip

    def test_prompts_are_not_in_it(self, folder: Path) -> None:
        filled(folder)
        content = b"".join(path.read_bytes() for path in folder.iterdir())
        assert b"answer 1" in content
        assert b"prompt" not in content

    def test_a_folder_that_others_can_read_is_not_used(self, folder: Path) -> None:
        filled(folder)
        folder.chmod(0o750)
        unusable(folder, "others can open its folder cache: its mode has to be 0700")

    def test_nor_is_such_a_file(self, folder: Path) -> None:
        filled(folder)
        (folder / NAME).chmod(0o644)
        unusable(folder, "others can open the file: its mode has to be 0600")

    def test_a_link_is_not_followed(self, folder: Path, tmp_path: Path) -> None:
        folder.mkdir(parents=True, mode=0o700)
        (folder / NAME).symlink_to(tmp_path / "elsewhere")
        unusable(folder, "the file is something else")
        assert not (tmp_path / "elsewhere").exists()


class TestWhatIsWrong:
    def test_a_file_that_is_no_database(self, folder: Path) -> None:
        folder.mkdir(parents=True, mode=0o700)
        (folder / NAME).write_bytes(b"no database " * 1000)
        (folder / NAME).chmod(0o600)
        unusable(folder, "not a database")
        assert (folder / NAME).read_bytes().startswith(b"no database")

    def test_a_damaged_one(self, folder: Path) -> None:
        filled(folder, 500)
        content = bytearray((folder / NAME).read_bytes())
        content[4096:] = b"\xaa" * (len(content) - 4096)
        (folder / NAME).write_bytes(content)
        unusable(folder, "malformed")

    def test_another_programs(self, folder: Path) -> None:
        folder.mkdir(parents=True, mode=0o700)
        statements(folder / NAME, "CREATE TABLE answers (key)")
        (folder / NAME).chmod(0o600)
        before = (folder / NAME).read_bytes()
        unusable(folder, "another program's")
        assert (folder / NAME).read_bytes() == before

    def test_that_of_a_newer_version(self, folder: Path) -> None:
        filled(folder)
        statements(folder / NAME, "PRAGMA user_version = 3")
        unusable(folder, "newer version")

    def test_one_that_another_program_holds(self, folder: Path, monkeypatch) -> None:
        monkeypatch.setattr(module, "_BUSY", 0.01)
        filled(folder)
        connection = sqlite3.connect(folder / NAME, isolation_level=None)
        connection.execute("BEGIN EXCLUSIVE")
        unusable(folder, "locked")
        connection.close()

    def test_one_that_is_held_while_answers_come(self, folder: Path, monkeypatch) -> None:
        monkeypatch.setattr(module, "_BUSY", 0.01)
        keys = filled(folder)
        cache = Cache(folder)
        assert cache.get(keys[0]) is not None
        connection = sqlite3.connect(folder / NAME, isolation_level=None)
        connection.execute("BEGIN EXCLUSIVE")
        cache.put(b"new", Reply("x"))
        with pytest.warns(CacheWarning, match="locked"):
            cache.close()
        connection.close()

    def test_a_folder_that_cannot_be_made(self, folder: Path) -> None:
        folder.parent.write_text("in the way")
        unusable(folder, "Not a directory")

    def test_a_folder_in_its_place(self, folder: Path) -> None:
        (folder / NAME).mkdir(parents=True)
        folder.chmod(0o700)
        unusable(folder, "something else")


class TestBounds:
    def test_those_not_wanted_for_the_longest_go(self, folder: Path) -> None:
        clock = Time()
        cache = Cache(folder, max_bytes=1 << 18, clock=clock)
        for k in range(400):
            cache.put(b"%04d" % k, Reply("x" * 2000))
            clock.now += 2
            # Wanted again, after long: it stays.
            if k % 50 == 0:
                clock.now += 4000
                assert cache.get(b"0000") is not None
        cache.flush()
        rows, size = cache.size()
        assert size <= 1 << 18
        assert rows > 60
        assert cache.get(b"0399") is not None
        assert cache.get(b"0001") is None
        assert cache.get(b"0000") is not None
        cache.close()
        # Space is used again.
        assert (folder / NAME).stat().st_size < 1 << 19

    def test_one_that_would_push_all_others_out_is_not_kept(self, folder: Path) -> None:
        cache = Cache(folder, max_bytes=1 << 18)
        cache.put(b"large", Reply("é" * (1 << 13)))
        cache.put(b"small", Reply("x"))
        assert cache.get(b"large") is None
        assert cache.get(b"small") is not None
        cache.close()

    def test_a_bound_below_all_sense_is_refused(self, folder: Path) -> None:
        with pytest.raises(InvalidValue):
            Cache(folder, max_bytes=0)


class TestClearing:
    def test_all_answers_go(self, folder: Path) -> None:
        keys = filled(folder, 50)
        cache = Cache(folder)
        cache.put(b"waiting", Reply("x"))
        assert cache.clear() == 50
        assert [cache.get(key) for key in (*keys, b"waiting")] == [None] * 51
        cache.close()
        assert b"answer 1" not in (folder / NAME).read_bytes()

    def test_under_another_kernel(self, folder: Path) -> None:
        keys = filled(folder)
        other = Cache(folder)
        assert other.get(keys[0]) is not None
        cache = Cache(folder)
        cache.clear()
        cache.close()
        assert other.get(keys[0]) is None
        other.put(b"k", Reply("x"))
        other.close()
        assert other.failure is None

    @pytest.mark.parametrize("start", [0, 4096])
    def test_a_damaged_file_goes(self, folder: Path, start: int) -> None:
        filled(folder, 500)
        content = bytearray((folder / NAME).read_bytes())
        content[start:] = b"\xaa" * (len(content) - start)
        (folder / NAME).write_bytes(content)
        cache = Cache(folder)
        cache.clear()
        cache.put(b"k", Reply("x"))
        cache.close()
        cache = Cache(folder)
        assert cache.get(b"k") == Reply("x")
        cache.close()

    def test_another_programs_file_stays(self, folder: Path) -> None:
        folder.mkdir(parents=True, mode=0o700)
        statements(folder / NAME, "CREATE TABLE theirs (key)")
        (folder / NAME).chmod(0o600)
        with pytest.raises(InvalidValue, match="another program's"):
            Cache(folder).clear()
        assert (folder / NAME).exists()

    def test_after_a_failure_it_is_used_again(self, folder: Path) -> None:
        folder.mkdir(parents=True, mode=0o700)
        (folder / NAME).write_bytes(b"no database " * 1000)
        (folder / NAME).chmod(0o600)
        cache = Cache(folder)
        with pytest.warns(CacheWarning):
            cache.get(b"k")
        cache.clear()
        cache.put(b"k", Reply("x"))
        assert cache.get(b"k") == Reply("x")
        cache.close()
