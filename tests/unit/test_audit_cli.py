"""`shimmy audit`, over ledgers made here.

Which ledger: none, a name that none has, one out of reach, a folder, garbage, empty, another program's, a newer
one; both options; the configured one, the kernels', none recorded, a configuration that is wrong; nothing is ever
created by reading, and another account's is not written. show: order, each filter, times of each form, limit and more, erased, JSON, nothing found.
usage: this month, a period, groupings, totals, several groups, removed ones, JSON, picture, bad options.
verify: sound, counts, erased, open; tampered, shortened; heads as text, file, lines, several; bad heads.
export: both formats, filters, a file, one that exists, one that cannot be finished. receipt: of a request, at a
size, unknown, erased, a file. verify-receipt: right, tampered, not JSON, against heads. anchor: printed is what was,
appended, recorded after it, a file of another history or of something else. erase and prune: asks, yes, no, dry run,
requests, nothing, the name does not stay, times that make no sense, bytes that may be left.
Control characters reach no terminal, whatever command.
"""

from __future__ import annotations

import csv
import errno
import getpass
import io
import json
import os
import re
import sqlite3
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from shimmy_jupyter.audit.ledger import Entry, Head, Ledger, Query
from shimmy_jupyter.audit.records import FIELDS
from shimmy_jupyter.audit.verify import verify as verified
from shimmy_jupyter.audit.writer import StoreFailed
from shimmy_jupyter.cli import audit_common, audit_proofs, audit_removal, main
from shimmy_jupyter.cli.audit import audit_command
from shimmy_jupyter.cli.local import Progress

SOON = 60
NOON = 1_795_262_400.0  # 2026-11-21T12:00:00Z
DAY = 86_400.0
HOSTILE = "eve\x1b]0;owned\x07\x7f\u202e\r\nroot\x9b2J"
LONG = "x" * 300 + ".svg"
"""Longer than a file's name can be."""
ACTS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")

Run = Callable[..., Result]


def request(id: str, user: str, days: float, **more: Any) -> list[Entry]:
    """A request that took a second, `days` before noon."""
    begin = Entry("begin", id, NOON - days * DAY, user, "hub", model=more.pop("model", "tiny"))
    begin = replace(begin, groups=more.pop("groups", ()))
    if more.pop("open", False):
        return [begin]
    given = {
        "outcome": "ok",
        "prompt_tokens": 10,
        "tokens_generated": 5,
        "duration_ms": 1000,
        **more,
    }
    return [begin, replace(begin, kind="end", time=begin.time + 1, **given)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "ledger.sqlite"
    with closing(Ledger(path)) as ledger:
        entries = [
            *request("r1", "ann", 40, groups=("lab", "staff")),
            *request("r2", "bob", 3, outcome="denied", code="policy_denied", tokens_generated=0),
            *request("r3", "ann", 2, groups=("lab", "staff"), model="large", prompt_tokens=1000),
            Entry(
                "act", "a1", NOON - DAY, "root", action="load", model="large", outcome="accepted"
            ),
            *request("r4", "ann", 0.1, open=True),
        ]
        ledger.append(entries).result(SOON)
    return path


@pytest.fixture(autouse=True)
def at_noon(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (audit_common, audit_proofs, audit_removal):
        monkeypatch.setattr(module, "now", lambda: NOON)


@pytest.fixture
def run(path: Path) -> Run:
    """A command of `shimmy audit` on that ledger."""

    def run(command: str, *arguments: object, **more: Any) -> Result:
        words = ["audit", command, *map(str, arguments), "--ledger", str(path)]
        return CliRunner().invoke(main, words, **more)

    return run


def plain(*arguments: object, **more: Any) -> Result:
    """Without naming a ledger."""
    return CliRunner().invoke(main, ["audit", *map(str, arguments)], **more)


def records(path: Path, **query: Any) -> list[dict[str, Any]]:
    with closing(Ledger(path)) as ledger:
        return ledger.query(Query(**query), limit=1000).records


def head_of(path: Path) -> Head:
    with closing(Ledger(path)) as ledger:
        return ledger.head()


def change(path: Path, statement: str) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(statement)


READING = ("show", "usage", "verify", "export --format csv", "receipt r1")
WRITING = ("anchor", "erase ann --yes", "prune --days 1 --yes")


@pytest.fixture
def unseen(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Makes a file one in a folder that this account may not enter."""
    stat = Path.stat

    def hide(hidden: Path) -> None:
        def look(path: Path, **more: Any) -> os.stat_result:
            if path == hidden:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return stat(path, **more)

        monkeypatch.setattr(Path, "stat", look)

    return hide


class TestWhichLedger:
    @pytest.mark.parametrize("command", [*READING, *WRITING])
    def test_one_that_is_not_there_is_said_and_not_made(self, command: str, tmp_path: Path) -> None:
        file = tmp_path / "none" / "ledger.sqlite"
        file.parent.mkdir()
        done = plain(*command.split(), "--ledger", file)
        assert (done.exit_code, done.stdout) == (1, "")
        assert "there is no ledger.sqlite" in done.stderr
        assert str(tmp_path) not in done.stderr
        assert list(file.parent.iterdir()) == []

    @pytest.mark.parametrize("command", [*READING, *WRITING])
    def test_a_name_that_no_file_has(self, command: str, tmp_path: Path) -> None:
        done = plain(*command.split(), "--ledger", tmp_path / LONG)
        assert (done.exit_code, done.stdout) == (1, "")
        assert "there is no xxx" in done.stderr

    @pytest.mark.parametrize("command", [*READING, *WRITING])
    def test_one_that_cannot_be_looked_at(
        self, command: str, path: Path, unseen: Callable[[Path], None]
    ) -> None:
        unseen(path)
        done = plain(*command.split(), "--ledger", path)
        assert (done.exit_code, done.stdout) == (2, "")
        assert "--ledger: 'ledger.sqlite' cannot be looked at: Permission denied" in done.stderr

    @pytest.mark.parametrize("command", [*READING, *WRITING])
    @pytest.mark.parametrize("content", [b"", b"not a database at all" * 100])
    def test_what_is_no_ledger(self, command: str, content: bytes, tmp_path: Path) -> None:
        file = tmp_path / "ledger.sqlite"
        file.write_bytes(content)
        done = plain(*command.split(), "--ledger", file)
        assert done.exit_code == 1
        assert done.stderr
        assert "Traceback" not in done.stderr
        assert file.read_bytes() == content
        assert not (tmp_path / "ledger.key").exists()

    @pytest.mark.parametrize("command", [*READING, *WRITING])
    def test_another_programs_database(self, command: str, tmp_path: Path) -> None:
        file = tmp_path / "ledger.sqlite"
        change(file, "CREATE TABLE history (line TEXT)")
        before = file.read_bytes()
        done = plain(*command.split(), "--ledger", file)
        assert done.exit_code == 1
        assert "another program's" in done.stderr or "not those of a ledger" in done.stderr
        assert file.read_bytes() == before

    def test_a_newer_one(self, run: Run, path: Path) -> None:
        change(path, "PRAGMA user_version=99")
        assert "newer" in run("show").stderr
        assert "99" in run("verify").stderr

    def test_a_folder(self, tmp_path: Path) -> None:
        done = plain("show", "--ledger", tmp_path)
        assert done.exit_code == 2

    def test_another_accounts_is_not_written(
        self, run: Run, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
        size = len(records(path))
        for command in WRITING:
            done = run(*command.split())
            assert (done.exit_code, "another account's" in done.stderr) == (1, True)
        assert run("show").exit_code == 0
        assert run("erase", "ann", "--dry-run").exit_code == 0
        assert len(records(path)) == size


class TestTheConfiguredLedger:
    @pytest.fixture
    def configured(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
        monkeypatch.setenv("JUPYTER_CONFIG_DIR", str(tmp_path / "config"))
        monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "data"))
        (tmp_path / "config").mkdir()

        def write(line: str) -> None:
            (tmp_path / "config" / "jupyter_config.py").write_text(f"c = get_config()\n{line}\n")

        return write

    @pytest.fixture
    def moved(self, path: Path, tmp_path: Path) -> Callable[[str], None]:
        def move(name: str) -> None:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            path.rename(tmp_path / name)

        return move

    def test_the_default_place(
        self, configured: Callable[[str], None], moved: Callable[[str], None]
    ) -> None:
        assert "ShimmyAudit.path" in plain("show").stderr
        moved("data/shimmy_jupyter/audit/ledger.sqlite")
        assert "r4" in plain("show").stdout
        done = plain("show", "--kernel")
        assert (done.exit_code, "kernel-ledger.sqlite" in done.stderr) == (1, True)

    def test_a_place_of_its_own_and_the_kernels(
        self,
        configured: Callable[[str], None],
        moved: Callable[[str], None],
        tmp_path: Path,
    ) -> None:
        configured(f"c.ShimmyAudit.path = {str(tmp_path / 'own' / 'book.db')!r}")
        moved("own/kernel-book.db")
        done = plain("show")
        assert (done.exit_code, "--kernel" in done.stderr) == (1, True)
        assert "r4" in plain("show", "--kernel").stdout

    def test_nothing_is_recorded(self, configured: Callable[[str], None]) -> None:
        configured("c.ShimmyAudit.enabled = False")
        done = plain("show")
        assert (done.exit_code, "ShimmyAudit.enabled" in done.stderr) == (1, True)

    @pytest.mark.parametrize("line", ["c.ShimmyAudit.retention = 0", "1/0"])
    def test_a_configuration_that_is_wrong(
        self, line: str, configured: Callable[[str], None], path: Path
    ) -> None:
        configured(line)
        done = plain("show")
        assert (done.exit_code, "configuration" in done.stderr) == (1, True)
        assert plain("show", "--ledger", path).exit_code == 0

    def test_not_both(self, path: Path) -> None:
        assert plain("show", "--ledger", path, "--kernel").exit_code == 2


class TestShow:
    def shown(self, run: Run, *options: object) -> list[int]:
        done = run("show", *options, "--json")
        assert done.exit_code == 0, done.stderr
        return [record["seq"] for record in json.loads(done.stdout)["records"]]

    def test_the_newest_first(self, run: Run) -> None:
        done = run("show")
        assert done.exit_code == 0
        head, *lines = done.stdout.splitlines()
        assert head.split()[:4] == ["NUMBER", "TIME", "WHAT", "USER"]
        assert [line.split()[0] for line in lines] == [str(n) for n in range(7, -1, -1)]
        assert lines[1].split() == "6 2026-11-20 12:00:00 load root large accepted a1".split()
        assert lines[2].split()[3:] == "end ann large ok 1,000 5 1,000 r3".split()
        assert "denied policy_denied" in lines[4]

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            (("--user", "bob"), [3, 2]),
            (("--user", "nobody"), []),
            (("--model", "large"), [6, 5, 4]),
            (("--outcome", "denied"), [3]),
            (("--outcome", "accepted"), [6]),
            (("--kind", "act"), [6]),
            (("--kind", "begin", "--user", "ann"), [7, 4, 0]),
            (("--action", "load"), [6]),
            (("--request", "r1"), [1, 0]),
            (("--since", "2026-11-19"), [7, 6, 5, 4]),
            (("--since", "2026-11-19T12:00:01Z"), [7, 6, 5]),
            (("--since", "2026-11-19T13:00:01+01:00"), [7, 6, 5]),
            (("--until", "2026-11-18"), [1, 0]),
            (("--since", "today"), [7]),
            (("--since", "7d"), [7, 6, 5, 4, 3, 2]),
            (("--since", "3h"), [7]),
            (("--since", "this-month"), [7, 6, 5, 4, 3, 2]),
            (("--since", "last-month", "--until", "this-month"), [1, 0]),
            (("--limit", "2"), [7, 6]),
        ],
    )
    def test_filters(self, options: tuple[str, ...], expected: list[int], run: Run) -> None:
        assert self.shown(run, *options) == expected

    @pytest.mark.parametrize(
        "options",
        [
            ("--since", "yesteryear"),
            ("--since", ""),
            ("--since", "2026-13-01"),
            ("--since", "999999d"),
            ("--until", "9999-99"),
            ("--since", "2026-11-02", "--until", "2026-11-01"),
            ("--since", "2026-11-01", "--until", "2026-11-01"),
            ("--limit", "0"),
            ("--kind", "other"),
            ("--outcome", "fine"),
            ("--action", "dance"),
            ("extra",),
        ],
        ids=" ".join,
    )
    def test_wrongly_used(self, options: tuple[str, ...], run: Run) -> None:
        done = run("show", *options)
        assert (done.exit_code, done.stdout) == (2, "")

    def test_a_bad_date_says_what_would_be_good(self, run: Run) -> None:
        assert "2026-11-01" in run("show", "--since", "soon").stderr

    def test_in_utc_wherever_it_runs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TZ", "Pacific/Auckland")
        time.tzset()
        try:
            assert audit_common.moment(None, None, "2026-11-21T12:00") == NOON
            assert audit_common.moment(None, None, "today") == NOON - DAY / 2
            assert audit_common.moment(None, None, "2026-11-21") == NOON - DAY / 2
        finally:
            monkeypatch.undo()
            time.tzset()

    def test_january(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(audit_common, "now", lambda: 1_798_761_600.0 + 5)  # 2027-01-01
        assert audit_common.moment(None, None, "last-month") == 1_796_083_200.0  # 2026-12-01
        assert audit_common.this_month() == 1_798_761_600.0

    def test_more_than_a_page(self, tmp_path: Path) -> None:
        path = tmp_path / "many.sqlite"
        with closing(Ledger(path)) as ledger:
            entry = Entry("begin", "r", NOON, "ann")
            ledger.append([entry] * 1203).result(SOON)
        done = plain("show", "--limit", 1201, "--json", "--ledger", path)
        found = json.loads(done.stdout)
        assert [one["seq"] for one in found["records"]] == [*range(1202, 1, -1)]
        assert found["more"] is True
        done = plain("show", "--limit", 1203, "--json", "--ledger", path)
        assert json.loads(done.stdout)["more"] is False
        assert "there are more" in plain("show", "--ledger", path).stderr

    def test_nothing_found(self, run: Run) -> None:
        done = run("show", "--user", "nobody")
        assert (done.exit_code, done.stdout) == (0, "no such record\n")

    def test_removed_ones(self, run: Run) -> None:
        assert run("erase", "bob", "--yes").exit_code == 0
        lines = run("show").stdout.splitlines()
        assert [line.split() for line in lines if "erased" in line] == [
            ["3", "erased"],
            ["2", "erased"],
        ]

    def test_choices_are_those_of_records(self) -> None:
        for field, choices in (
            ("kind", audit_common.KINDS),
            ("outcome", audit_common.OUTCOMES),
            ("action", audit_common.ACTIONS),
        ):
            assert {*re.findall(r"`([a-z]+)`", FIELDS[field])} == {*choices}


class TestUsage:
    def used(self, run: Run, *options: object) -> dict[str, Any]:
        done = run("usage", *options, "--json")
        assert done.exit_code == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def test_this_month_by_user_group_and_model(self, run: Run) -> None:
        done = run("usage")
        assert done.exit_code == 0
        lines = [line.split() for line in done.stdout.splitlines()]
        assert lines[0][:1] == ["2026-11-01T00:00:00.000Z"]
        assert lines[2][:4] == ["USER", "GROUP", "MODEL", "REQUESTS"]
        assert lines[3] == "ann lab large 1 1,000 0 5 0 0 0".split()
        assert lines[4] == "ann staff large 1 1,000 0 5 0 0 0".split()
        assert lines[5] == "bob – tiny 1 10 0 0 1 0 0".split()
        assert lines[6] == "total 2 1,010 0 5 1 0 0".split()
        assert "several groups" in done.stdout

    def test_a_period_and_groupings(self, run: Run) -> None:
        found = self.used(run, "--since", "last-month", "--until", "this-month", "--by", "user")
        assert found["since"] == "2026-10-01T00:00:00.000Z"
        assert found["until"] == "2026-11-01T00:00:00.000Z"
        (row,) = found["rows"]
        assert (row["user"], row["requests"], row["prompt_tokens"]) == ("ann", 1, 10)
        found = self.used(run, "--since", "2026-01-01", "--by", "model,user")
        assert [(row["model"], row["user"]) for row in found["rows"]] == [
            ("large", "ann"),
            ("tiny", "ann"),
            ("tiny", "bob"),
        ]
        assert found["total"]["requests"] == sum(row["requests"] for row in found["rows"]) == 3
        assert "several groups" not in run("usage", "--by", "user").stdout

    def test_nothing(self, run: Run) -> None:
        found = self.used(run, "--since", "today")
        assert (found["rows"], found["total"]["requests"]) == ([], 0)
        assert run("usage", "--since", "today").stdout.splitlines()[-1].split()[0] == "total"

    def test_that_some_were_removed_is_said(self, run: Run) -> None:
        assert "removed" not in run("usage").stdout
        run("erase", "bob", "--yes")
        assert "removed" in run("usage").stdout

    @pytest.mark.parametrize(
        "options",
        [
            ("--by", "cell"),
            ("--by", ""),
            ("--by", "user,user"),
            ("--since", "x"),
            ("--until", "2026-11-01"),
            ("--plot", "picture.gif"),
            ("--plot", "/no/such/folder/picture.png"),
            ("--plot", LONG),
        ],
        ids=" ".join,
    )
    def test_wrongly_used(self, options: tuple[str, ...], run: Run) -> None:
        assert run("usage", *options).exit_code == 2

    def test_a_picture_where_nothing_can_be_looked_at(
        self, run: Run, tmp_path: Path, unseen: Callable[[Path], None]
    ) -> None:
        unseen(tmp_path / "used.svg")
        done = run("usage", "--plot", tmp_path / "used.svg")
        assert (done.exit_code, done.stdout) == (2, "")
        assert "used.svg' cannot be written: Permission denied" in done.stderr

    def test_a_picture(self, run: Run, path: Path, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        with closing(Ledger(path)) as ledger:
            some = [e for n in range(25) for e in request(f"p{n}", f"user-{n:02} $x$", 1)]
            ledger.append(some).result(SOON)
        picture = tmp_path / "used.svg"
        assert run("usage", "--plot", picture).exit_code == 0
        assert picture.read_text().lstrip().startswith("<?xml")
        png = tmp_path / "used.png"
        assert run("usage", "--plot", png).exit_code == 0
        assert png.read_bytes().startswith(b"\x89PNG")

    def test_bars(self, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        figure = pytest.importorskip("matplotlib.figure")
        drawn = []
        save = figure.Figure.savefig

        def saved(self: Any, *arguments: Any) -> None:
            (axes,) = self.axes
            labels = [label.get_text() for label in axes.get_yticklabels()]
            widths = [bar.get_width() for bar in axes.patches]
            drawn.append((labels, widths))
            save(self, *arguments)

        monkeypatch.setattr(figure.Figure, "savefig", saved)
        with closing(Ledger(path)) as ledger:
            some = [e for n in range(22) for e in request(f"p{n}", f"u{n:02}$", 1)]
            ledger.append(some).result(SOON)
        done = plain("usage", "--plot", tmp_path / "a.svg", "--ledger", path)
        assert done.exit_code == 0
        ((labels, widths),) = drawn
        assert (labels[0], labels[1], labels[-1]) == ("ann", r"u00\$", "4 others")
        assert (widths[0], widths[20], widths[21], widths[41]) == (1000, 40, 5, 15)

    def test_without_matplotlib(
        self, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("shimmy_jupyter.cli.audit.find_spec", lambda name: None)
        done = run("usage", "--plot", tmp_path / "a.png")
        assert (done.exit_code, "pip install matplotlib" in done.stderr) == (2, True)


class TestVerify:
    def test_sound(self, run: Run, path: Path) -> None:
        done = run("verify")
        head = head_of(path)
        assert done.exit_code == 0
        assert f"verified: 8 records, head 8:{head.root}" in done.stdout
        assert "1 request begun and not ended" in done.stdout
        assert "not compared" in done.stdout
        assert "erased" not in done.stdout

    def test_what_was_removed_is_counted(self, run: Run) -> None:
        run("erase", "bob", "--yes")
        assert "2 records erased" in run("verify").stdout

    def test_json(self, run: Run) -> None:
        found = json.loads(run("verify", "--json").stdout)
        assert (found["ok"], found["records"], found["anchored"]) == (True, 8, False)
        assert found["head"]["size"] == 8

    def test_a_changed_record_is_named(self, run: Run, path: Path) -> None:
        change(path, "UPDATE records SET body = replace(body, 'bob', 'rob') WHERE seq = 3")
        done = run("verify")
        assert (done.exit_code, done.stdout) == (1, "")
        assert "record 3 is not what was hashed" in done.stderr
        assert "first broken record: 3" in done.stderr
        done = run("verify", "--json")
        assert (done.exit_code, json.loads(done.stdout)["first_bad"]) == (1, 3)

    def test_a_missing_record_is_named(self, run: Run, path: Path) -> None:
        change(path, "DELETE FROM records WHERE seq = 5")
        assert "first broken record: 5" in run("verify").stderr

    def heads(self, path: Path, tmp_path: Path, run: Run) -> Path:
        """Of 8 records, and of 10: each anchoring is one more."""
        file = tmp_path / "heads.jsonl"
        for user in ("cy", "di"):
            assert run("anchor", "--output", file).exit_code == 0
            with closing(Ledger(path)) as ledger:
                ledger.append([Entry("begin", "r9", NOON, user)]).result(SOON)
        return file

    def test_against_a_head(self, run: Run, path: Path, tmp_path: Path) -> None:
        head = head_of(path)
        file = tmp_path / "head.json"
        file.write_text(json.dumps(head.to_json(), indent=4))
        with closing(Ledger(path)) as ledger:
            ledger.append(request("r9", "ann", 0)).result(SOON)
        for given in (f"8:{head.root}", f"8:{head.root.upper()}", file):
            done = run("verify", "--against", given)
            assert done.exit_code == 0, done.stderr
            assert "begins with the records of 1 head" in done.stdout
            assert "not compared" not in done.stdout
        assert json.loads(run("verify", "--against", file, "--json").stdout)["anchored"] is True

    def test_against_many(self, run: Run, path: Path, tmp_path: Path) -> None:
        file = self.heads(path, tmp_path, run)
        assert "2 heads" in run("verify", "--against", file).stdout

    def test_a_history_made_anew(self, run: Run, path: Path, tmp_path: Path) -> None:
        """All hashes are right, and the records since are others."""
        file = self.heads(path, tmp_path, run)
        small, _ = [json.loads(line) for line in file.read_text().splitlines()]
        path.unlink()
        for beside in tmp_path.glob("ledger.sqlite-*"):
            beside.unlink()
        with closing(Ledger(path)) as ledger:
            some = [Entry("begin", f"s{n}", NOON, "eve") for n in range(12)]
            ledger.append(some).result(SOON)
        assert run("verify").exit_code == 0
        done = run("verify", "--against", file)
        assert done.exit_code == 1
        assert "rewritten: the first 8 records" in done.stderr
        done = run("verify", "--against", f"{small['size']}:{small['root']}", "--json")
        assert (done.exit_code, json.loads(done.stdout)["ok"]) == (1, False)

    def test_how_far_it_is_still_the_same(self, run: Run, path: Path, tmp_path: Path) -> None:
        file = self.heads(path, tmp_path, run)
        lines = file.read_text().splitlines()
        wrong = {**json.loads(lines[1]), "root": "0" * 64}
        file.write_text("\n".join([json.dumps(wrong), lines[0]]))
        done = run("verify", "--against", file)
        assert done.exit_code == 1
        assert "rewritten: the first 10 records" in done.stderr
        assert "the first 8 are those of an earlier head" in done.stderr

    def test_shortened(self, run: Run, path: Path) -> None:
        done = run("verify", "--against", f"99:{'0' * 64}")
        assert done.exit_code == 1
        assert "shortened: there were 99 records, and there are 8" in done.stderr
        assert "first broken record: 8" in done.stderr

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            ("", "no head"),
            ("{}", "size"),
            ('{"size": 1, "root": "00", "timestamp": ""}', "root"),
            ("[1]", "size"),
            ("nonsense", "not JSON"),
            ('{"size": 0, "root": "%s", "timestamp": ""}\n{}' % ("0" * 64), "line 2"),
            ("[" * 100_000, "not JSON"),
        ],
    )
    def test_bad_files_of_heads(self, content: str, said: str, run: Run, tmp_path: Path) -> None:
        file = tmp_path / "heads"
        file.write_text(content)
        done = run("verify", "--against", file)
        assert (done.exit_code, done.stdout) == (2, "")
        assert said in done.stderr

    @pytest.mark.parametrize(
        "text", ["8", "8:12", f"x:{'0' * 64}", "no-such-file", "", LONG, f"8:{'0' * 300}"]
    )
    def test_bad_heads(self, text: str, run: Run) -> None:
        done = run("verify", "--against", text)
        assert (done.exit_code, done.stdout) == (2, "")
        assert "SIZE:ROOT" in done.stderr

    def test_heads_that_cannot_be_looked_at(
        self, run: Run, tmp_path: Path, unseen: Callable[[Path], None]
    ) -> None:
        unseen(tmp_path / "heads")
        done = run("verify", "--against", tmp_path / "heads")
        assert (done.exit_code, done.stdout) == (2, "")
        assert "'--against': 'heads' cannot be looked at: Permission denied" in done.stderr

    def test_how_far_it_is_is_said_on_a_terminal_alone(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "many.sqlite"
        with closing(Ledger(path)) as ledger:
            ledger.append([Entry("begin", "r", NOON, "ann")] * 2500).result(SOON)
        assert "2,000" not in plain("verify", "--ledger", path).stderr

        class Terminal(Progress):
            def __init__(self) -> None:
                self.terminal = True

        monkeypatch.setattr("shimmy_jupyter.cli.audit.Progress", Terminal)
        assert "record 2,000 of 2,500" in plain("verify", "--ledger", path).stderr


class TestExport:
    def test_jsonl_is_what_was_hashed(self, run: Run, path: Path) -> None:
        done = run("export", "--format", "jsonl")
        assert done.exit_code == 0
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        assert [line["seq"] for line in lines] == [*range(8)]
        assert lines[2]["body"]["user"] == "bob"

    def test_csv(self, run: Run) -> None:
        rows = [*csv.DictReader(io.StringIO(run("export", "--format", "csv").stdout))]
        assert [row["user"] for row in rows] == [
            "ann",
            "ann",
            "bob",
            "bob",
            "ann",
            "ann",
            "root",
            "ann",
        ]

    def test_filters(self, run: Run) -> None:
        done = run("export", "--format", "jsonl", "--user", "bob", "--kind", "end")
        assert [json.loads(line)["seq"] for line in done.stdout.splitlines()] == [3]

    def test_a_file_of_ones_own(self, run: Run, tmp_path: Path) -> None:
        file = tmp_path / "out.csv"
        done = run("export", "--format", "csv", "--output", file)
        assert (done.exit_code, done.stdout) == (0, "")
        assert file.read_bytes().count(b"\r\n") == 9
        assert stat.S_IMODE(file.stat().st_mode) == 0o600

    @pytest.mark.parametrize("command", ["export --format csv", "receipt r1"])
    def test_a_file_that_exists_stays(self, command: str, run: Run, tmp_path: Path) -> None:
        file = tmp_path / "out"
        file.write_text("mine")
        done = run(*command.split(), "--output", file)
        assert (done.exit_code, "exists already" in done.stderr) == (1, True)
        assert file.read_text() == "mine"

    def test_a_file_that_cannot_be(self, run: Run, tmp_path: Path) -> None:
        done = run("export", "--format", "csv", "--output", tmp_path / "no" / "out")
        assert (done.exit_code, "cannot be written" in done.stderr) == (1, True)

    @pytest.mark.parametrize("error", [StoreFailed("gone"), OSError(28, "No space left")])
    def test_half_a_file_does_not_stay(
        self, error: Exception, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(*_: object) -> Iterator[bytes]:
            yield b"half"
            raise error

        monkeypatch.setattr("shimmy_jupyter.cli.audit.export", broken)
        file = tmp_path / "out.csv"
        done = run("export", "--format", "csv", "--output", file)
        assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
        assert not file.exists()

    @pytest.mark.parametrize(
        "options", [(), ("--format", "xlsx"), ("--format", "csv", "--kind", "x")]
    )
    def test_wrongly_used(self, options: tuple[str, ...], run: Run) -> None:
        assert run("export", *options).exit_code == 2


class TestReceipts:
    @pytest.fixture
    def file(self, run: Run, tmp_path: Path) -> Path:
        file = tmp_path / "receipt.json"
        assert run("receipt", "r1", "--output", file).exit_code == 0
        return file

    def test_printed_or_written(self, run: Run, file: Path) -> None:
        document = json.loads(run("receipt", "r1").stdout)
        assert document == json.loads(file.read_text())
        assert [one["seq"] for one in document["records"]] == [0, 1]
        assert stat.S_IMODE(file.stat().st_mode) == 0o600

    def test_of_an_earlier_size(self, run: Run) -> None:
        assert json.loads(run("receipt", "r1", "--size", 2).stdout)["head"]["size"] == 2
        done = run("receipt", "r3", "--size", 2)
        assert (done.exit_code, "among the first 2" in done.stderr) == (1, True)
        assert run("receipt", "r1", "--size", 9).exit_code == 2
        assert run("receipt", "r1", "--size", 0).exit_code == 2

    def test_of_nothing(self, run: Run) -> None:
        done = run("receipt", "no\x1bne")
        assert (done.exit_code, "no record of request none" in done.stderr) == (1, True)
        assert run("receipt").exit_code == 2

    def test_of_what_was_erased(self, run: Run) -> None:
        run("erase", "bob", "--yes")
        assert run("receipt", "r2").exit_code == 1

    def test_checked_without_the_ledger(self, file: Path, path: Path) -> None:
        head = head_of(path)
        path.unlink()
        done = plain("verify-receipt", file)
        assert done.exit_code == 0
        assert "2 records of request r1" in done.stdout
        assert "  1: 2026-10-12T12:00:01.000Z, end, ann, tiny, ok" in done.stdout
        assert "the document's own" in done.stdout
        done = plain("verify-receipt", file, "--against", f"8:{head.root}")
        assert done.exit_code == 0
        assert "the head is the one given" in done.stdout
        assert "the document's own" not in done.stdout

    @pytest.mark.parametrize("part", ["user", "leaf_hash", "path", "root", "records"])
    def test_tampered(self, part: str, file: Path) -> None:
        document = json.loads(file.read_text())
        record = document["records"][1]
        if part == "user":
            record["body"] = record["body"].replace("ann", "bob")
        elif part == "leaf_hash":
            record["leaf_hash"] = "0" * 64
        elif part == "path":
            record["path"][0] = "0" * 64
        elif part == "root":
            document["head"]["root"] = "0" * 64
        else:
            document["records"] = []
        file.write_text(json.dumps(document))
        done = plain("verify-receipt", file)
        assert (done.exit_code, done.stdout) == (1, "")
        assert "not verified" in done.stderr
        if part in {"user", "leaf_hash", "path"}:
            assert "first broken record: 1" in done.stderr

    @pytest.mark.parametrize("content", ["", "{", "[" * 100_000, "\xff", "[]", "{}", "1"])
    def test_what_is_no_receipt(self, content: str, tmp_path: Path) -> None:
        file = tmp_path / "receipt.json"
        file.write_text(content, "latin-1")
        done = plain("verify-receipt", file)
        assert (done.exit_code, done.stdout) == (1, "")
        assert "not JSON" in done.stderr or "not verified" in done.stderr

    def test_against_another_head(self, file: Path) -> None:
        done = plain("verify-receipt", file, "--against", f"8:{'0' * 64}")
        assert (done.exit_code, "rewritten" in done.stderr) == (1, True)

    def test_against_a_head_of_another_size(self, run: Run, file: Path, path: Path) -> None:
        assert run("anchor").exit_code == 0
        head = head_of(path)
        done = plain("verify-receipt", file, "--against", f"9:{head.root}")
        assert done.exit_code == 1
        assert "shimmy audit receipt r1 --size 9" in done.stderr
        file.write_text(run("receipt", "r1", "--size", 9).stdout)
        assert plain("verify-receipt", file, "--against", f"9:{head.root}").exit_code == 0

    def test_against_a_file_of_heads(self, file: Path, path: Path, tmp_path: Path) -> None:
        """Those of its size count, all of them."""
        good = head_of(path).to_json()
        heads = tmp_path / "heads"
        other = {"size": 3, "root": "1" * 64, "timestamp": ""}
        heads.write_text(f"{json.dumps(other)}\n{json.dumps(good)}\n")
        assert plain("verify-receipt", file, "--against", heads).exit_code == 0
        both = [json.dumps(good), json.dumps({**good, "root": "1" * 64})]
        for lines in (both, both[::-1]):
            heads.write_text("\n".join(lines))
            assert plain("verify-receipt", file, "--against", heads).exit_code == 1

    def test_wrongly_used(self, file: Path, tmp_path: Path) -> None:
        assert plain("verify-receipt", tmp_path / "none").exit_code == 2
        assert plain("verify-receipt", file, "--against", "x").exit_code == 2
        assert plain("verify-receipt", file, "--ledger", "x").exit_code == 2


class TestAnchor:
    def test_what_is_printed_is_what_was(self, run: Run, path: Path) -> None:
        before = head_of(path)
        done = run("anchor")
        assert done.exit_code == 0
        assert Head.from_json(json.loads(done.stdout)) == before
        (act,) = records(path, action="anchor")
        assert act["seq"] == before.size
        assert act["detail"] == {"size": before.size, "root": before.root}
        assert (act["user"], act["user_kind"]) == (getpass.getuser(), "account")
        assert run("verify", "--against", f"8:{before.root}").exit_code == 0

    def test_appended_to_a_file(self, run: Run, path: Path, tmp_path: Path) -> None:
        file = tmp_path / "heads.jsonl"
        for size in (8, 9, 10):
            done = run("anchor", "--output", file)
            assert (done.exit_code, done.stdout) == (0, "")
            assert f"{size}:" in done.stderr
        sizes = [json.loads(line)["size"] for line in file.read_text().splitlines()]
        assert sizes == [8, 9, 10]
        assert records(path, action="anchor")[0]["detail"]["file"] == "heads.jsonl"

    def test_a_line_without_its_end(self, run: Run, path: Path, tmp_path: Path) -> None:
        file = tmp_path / "heads.jsonl"
        file.write_text(json.dumps(head_of(path).to_json()))
        assert run("anchor", "--output", file).exit_code == 0
        assert len(file.read_text().splitlines()) == 2

    def test_not_beside_heads_of_another_history(
        self, run: Run, path: Path, tmp_path: Path
    ) -> None:
        file = tmp_path / "heads.jsonl"
        for other in (Head(3, "0" * 64, ""), Head(99, "0" * 64, "")):
            text = json.dumps(other.to_json()) + "\n"
            file.write_text(text)
            done = run("anchor", "--output", file)
            assert (done.exit_code, "does not continue" in done.stderr) == (1, True)
            assert file.read_text() == text
        assert records(path, action="anchor") == []

    def test_not_into_something_else(self, run: Run, path: Path, tmp_path: Path) -> None:
        file = tmp_path / "notes.txt"
        file.write_text("dear diary")
        done = run("anchor", "--output", file)
        assert (done.exit_code, "no file of heads" in done.stderr) == (1, True)
        assert file.read_text() == "dear diary"
        assert records(path, action="anchor") == []

    def test_a_file_that_cannot_be(self, run: Run, path: Path, tmp_path: Path) -> None:
        done = run("anchor", "--output", tmp_path / "no" / "heads")
        assert (done.exit_code, "cannot be written" in done.stderr) == (1, True)
        assert records(path, action="anchor") == []


class TestRemoving:
    @pytest.fixture
    def content(self, path: Path) -> Callable[[], list[tuple[int, bool]]]:
        def content() -> list[tuple[int, bool]]:
            return [(one["seq"], "erased" in one) for one in records(path)[::-1]]

        return content

    @pytest.mark.parametrize(
        "command", ["erase ann", "prune --days 1", "prune --before 2026-11-20"]
    )
    @pytest.mark.parametrize(("answer", "code"), [("n\n", 1), ("", 1), ("\n", 1)])
    def test_asks_first(self, command: str, answer: str, code: int, run: Run, path: Path) -> None:
        before = records(path)
        done = run(*command.split(), input=answer)
        assert done.exit_code == code
        assert "Remove what they say, for good?" in done.stderr
        assert records(path) == before
        assert not path.with_name("ledger.key").exists()

    @pytest.mark.parametrize("how", ["yes", "option"])
    def test_erasing(self, how: str, run: Run, path: Path) -> None:
        given = {"input": "y\n"} if how == "yes" else {}
        done = run("erase", "ann", *(["--yes"] if how == "option" else []), **given)
        assert done.exit_code == 0
        assert "5 records of ann, from 2026-10-12T12:00:00.000Z to 2026-11-21" in done.stdout
        assert "removed: 5 records" in done.stdout
        assert [one["seq"] for one in records(path) if "erased" in one] == [7, 5, 4, 1, 0]
        (act,) = records(path, action="erase")
        assert act["detail"]["erased"] == [[0, 1], [4, 5], [7, 7]]
        assert act["user"] == getpass.getuser()
        assert "ann" not in json.dumps(act["detail"])
        assert run("verify").exit_code == 0

    def test_some_requests(self, run: Run, path: Path) -> None:
        done = run("erase", "ann", "--request", "r1", "--request", "r4", "--request", "r2", "--yes")
        assert "3 records of ann" in done.stdout
        assert [one["seq"] for one in records(path) if "erased" in one] == [7, 1, 0]

    @pytest.mark.parametrize("option", ["--days 1", "--before 2026-11-20T12:00:01", "--before 1d"])
    def test_pruning(self, option: str, run: Run, path: Path) -> None:
        done = run("prune", *option.split(), "--yes")
        expected = 7 if "T" in option else 6
        assert f"{expected} records before 2026-11-20T12:00:0" in done.stdout
        assert [one["seq"] for one in records(path) if "erased" in one][::-1] == [*range(expected)]
        (act,) = records(path, action="prune")
        assert act["user"] == getpass.getuser()
        assert run("verify").exit_code == 0

    @pytest.mark.parametrize("command", ["erase ann", "prune --days 1"])
    @pytest.mark.parametrize("more", [(), ("--yes",)])
    def test_a_dry_run_changes_nothing(
        self, command: str, more: tuple[str, ...], run: Run, path: Path
    ) -> None:
        before, files = head_of(path), {one.name for one in path.parent.iterdir()}
        done = run(*command.split(), "--dry-run", *more)
        assert done.exit_code == 0
        assert re.match(r"\d records (of|before) ", done.stdout)
        assert "removed" not in done.stdout
        assert done.stderr == ""
        assert head_of(path) == before
        assert {one.name for one in path.parent.iterdir()} == files

    @pytest.mark.parametrize(
        "command", ["erase nobody --yes", "erase ann --request r2 --yes", "prune --days 99 --yes"]
    )
    def test_nothing_to_remove(self, command: str, run: Run, path: Path) -> None:
        before = head_of(path)
        done = run(*command.split())
        assert (done.exit_code, "nothing was removed" in done.stdout) == (0, True)
        assert head_of(path) == before

    def test_what_accounts_for_removals_is_not_counted(self, run: Run) -> None:
        run("erase", "bob", "--yes")
        done = run("erase", getpass.getuser(), "--dry-run")
        root = getpass.getuser() == "root"
        assert done.stdout.startswith("1 record of" if root else "there are no records")

    @pytest.mark.parametrize(
        "options",
        [
            (),
            ("--days", "1", "--before", "2026-01-01"),
            ("--days", "0"),
            ("--days", "999999"),
            ("--before", "2026-11-22"),
            ("--before", "once"),
        ],
        ids=" ".join,
    )
    def test_wrongly_used(self, options: tuple[str, ...], run: Run) -> None:
        done = run("prune", *options, "--yes")
        assert (done.exit_code, done.stdout) == (2, "")
        assert run("erase", "--yes").exit_code == 2

    def test_bytes_that_may_be_left_are_said(
        self, run: Run, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("shimmy_jupyter.audit.erasure._WAIT_MS", 1)
        with closing(sqlite3.connect(path, isolation_level=None)) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT count(*) FROM records").fetchone()
            done = run("erase", "bob", "--yes")
        assert done.exit_code == 0
        assert "bytes may still be" in done.stderr


class TestControlCharacters:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        path = tmp_path / "ledger.sqlite"
        with closing(Ledger(path)) as ledger:
            some = request("r1\x1b[2J", HOSTILE, 0, model=HOSTILE, groups=(HOSTILE,), code=HOSTILE)
            act = Entry(
                "act", "a", NOON, HOSTILE, action="load", outcome="ok", detail={"x": HOSTILE}
            )
            ledger.append([*some, act]).result(SOON)
        return path

    @pytest.mark.parametrize(
        "command",
        [
            ("show",),
            ("show", "--json"),
            ("show", "--user", HOSTILE),
            ("usage",),
            ("usage", "--json"),
            ("verify",),
            ("receipt", "r1\x1b[2J"),
            ("receipt", HOSTILE),
            ("erase", HOSTILE, "--dry-run"),
            ("erase", HOSTILE, "--yes"),
            ("erase", "\udcff\x1b", "--yes"),
            ("verify", "--against", HOSTILE),
            ("show", "--since", HOSTILE),
        ],
        ids=repr,
    )
    def test_none_comes_through(self, command: tuple[str, ...], run: Run) -> None:
        done = run(*command)
        assert not ACTS.search(done.stdout + done.stderr)
        assert done.exit_code in {0, 1, 2}
        if command[0] in {"show", "usage"} and done.exit_code == 0 and "--json" not in command:
            assert "eve]0;owned" in done.stdout
            assert not [line for line in done.stdout.splitlines() if line.startswith("root")]

    def test_of_a_receipt(self, run: Run, tmp_path: Path) -> None:
        file = tmp_path / "receipt.json"
        run("receipt", "r1\x1b[2J", "--output", file)
        done = plain("verify-receipt", file)
        assert done.exit_code == 0
        assert not ACTS.search(done.stdout + done.stderr)
        document = json.loads(file.read_text())
        for record in document["records"]:
            record["seq"] = 7
        file.write_text(json.dumps(document))
        done = plain("verify-receipt", file)
        assert done.exit_code == 1
        assert not ACTS.search(done.stdout + done.stderr)

    def test_an_export_to_a_terminal(
        self, path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """In a pipe and a file it is as it was hashed."""

        def exported() -> str:
            words = ["export", "--format", "jsonl", "--ledger", str(path)]
            with pytest.raises(SystemExit) as ended:
                audit_command(words)
            assert ended.value.code == 0
            return capsys.readouterr().out

        assert "\u202e" in exported()
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
        assert not ACTS.search(exported())


def test_interrupted(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> Iterator[None]:
        raise KeyboardInterrupt

    monkeypatch.setattr("shimmy_jupyter.cli.audit._newest", interrupt)
    done = run("show")
    assert (done.exit_code, done.stderr) == (130, "stopped\n")


def test_every_command_has_help() -> None:
    for name, command in audit_command.commands.items():
        assert isinstance(command, audit_common.Command), name
        assert command.help
        assert (
            all(option.help for option in command.params if isinstance(option, click.Option))
            or name == "export"
        )


def test_beside_a_server_that_writes(run: Run, path: Path) -> None:
    with closing(Ledger(path)) as server:
        server.append(request("s1", "cy", 0)).result(SOON)
        assert run("verify").exit_code == 0
        assert run("anchor").exit_code == 0
        assert run("erase", "bob", "--yes").exit_code == 0
        server.append(request("s2", "cy", 0)).result(SOON)
        assert run("prune", "--days", 2, "--yes").exit_code == 0
        server.append(request("s3", "cy", 0)).result(SOON)
    assert verified(path).ok
