"""docs/audit.md is tested: its fields are the records', its snippets run, its queries answer.

Cases: every field and no other, with its meaning; every command and option that is shown exists, and none is missing;
the tables' columns; each snippet of Python against a ledger made here, and against one that was changed;
each SQL query; a copy by SQLite's own backup; links.
"""

from __future__ import annotations

import json
import re
import shlex
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import click
import pytest

from shimmy_jupyter.audit.ledger import Entry, Ledger
from shimmy_jupyter.audit.records import FIELDS
from shimmy_jupyter.audit.verify import verify
from shimmy_jupyter.cli import main
from shimmy_jupyter.cli.audit import audit_command
from shimmy_jupyter.guard.asked import serialized
from shimmy_jupyter.types import Message

SOON = 60
NOON = 1_795_262_400.0
DOCS = Path(__file__).parent.parent.parent / "docs"
TEXT = (DOCS / "audit.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
QUERIES = re.findall(r"```sql\n(.*?)```", TEXT, re.DOTALL)
BY_HAND, DIGEST, PSEUDONYM = SNIPPETS


@pytest.fixture
def ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ledger]:
    monkeypatch.chdir(tmp_path)
    with closing(Ledger(tmp_path / "ledger.sqlite")) as ledger:
        for n in range(11):
            begin = Entry("begin", f"r{n}", NOON + n, "ann", groups=("lab",), model="tiny")
            end = replace(begin, kind="end", outcome="ok", tokens_generated=n, duration_ms=9.0)
            ledger.append([begin, end]).result(SOON)
        yield ledger


def test_every_field_and_no_other() -> None:
    rows = re.search(r"\| field \| \|\n\|---\|---\|\n((?:\|.*\|\n)+)", TEXT)
    assert rows
    found = dict(re.findall(r"\| `(\w+)` \| (.+) \|\n", rows[1]))
    assert found == FIELDS
    assert rows[1].count("\n") == len(FIELDS)


def test_every_command_is_shown_and_exists() -> None:
    shown = re.findall(r"shimmy audit ([a-z-]+)", TEXT)
    assert {*shown} >= {*audit_command.commands}
    assert {*shown} - {"on"} <= {*audit_command.commands}  # "`shimmy audit` on the command line"


@pytest.mark.parametrize("line", re.findall(r"^(shimmy audit .+?)(?:  +#.*)?$", TEXT, re.MULTILINE))
def test_every_line_is_a_command(line: str, ledger: Ledger) -> None:
    """As far as its options: they are parsed, and nothing is run."""
    for one in line.split(" && "):
        name, *words = shlex.split(one)[2:]
        Path("receipt.json").write_text("{}")
        head = json.dumps(ledger.head().to_json())
        Path("heads.jsonl").write_text(head)
        command = audit_command.commands[name]
        with click.Context(main, info_name="shimmy") as parent:
            pytest.importorskip("matplotlib" if "--plot" in words else "click")
            assert command.make_context(name, words, parent=parent).params


def test_the_tables_columns(ledger: Ledger) -> None:
    with ledger.snapshot() as connection:
        names = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        for (name,) in names:
            row = re.search(rf"^\| `{name}` \| (.+) \|$", TEXT, re.MULTILINE)
            assert row, name
            columns = {each[1] for each in connection.execute(f"PRAGMA table_xinfo({name})")}
            assert {*re.findall(r"`(\w+)`", row[1])} - {"records"} == columns


@pytest.mark.parametrize("request_id", ["r0", "r5", "r10"])
@pytest.mark.parametrize("size", [None, 22])
def test_a_receipt_by_hand(
    request_id: str, size: int | None, ledger: Ledger, capsys: pytest.CaptureFixture[str]
) -> None:
    document = ledger.proof(request_id, size)
    assert document is not None
    Path("receipt.json").write_text(json.dumps(document))
    exec(BY_HAND, {})
    seqs = [one["seq"] for one in document["records"]]
    assert capsys.readouterr().out.splitlines() == [f"{seq} True" for seq in seqs]
    document["records"][1]["body"] = document["records"][1]["body"].replace("ann", "bob")
    document["records"][0]["path"][-1] = "0" * 64
    Path("receipt.json").write_text(json.dumps(document))
    exec(BY_HAND, {})
    assert capsys.readouterr().out.splitlines() == [f"{seq} False" for seq in seqs]


def test_the_document_is_as_shown(ledger: Ledger) -> None:
    shown = json.loads(re.findall(r"```json\n(.*?)```", TEXT, re.DOTALL)[0])
    found = ledger.proof("r1")
    assert found is not None
    assert found.keys() == shown.keys()
    assert found["head"].keys() == shown["head"].keys()
    assert found["records"][0].keys() == shown["records"][0].keys()


def test_digests(ledger: Ledger, capsys: pytest.CaptureFixture[str]) -> None:
    text = "What does len do?"
    chat = serialized((Message("user", text),))
    expected = [ledger.digest(chat, "ann"), ledger.digest(text, "ann"), ledger.pseudonym("ann")]
    exec(DIGEST + PSEUDONYM, {})
    assert capsys.readouterr().out.splitlines() == expected


@pytest.mark.parametrize("query", QUERIES)
def test_queries(query: str, ledger: Ledger) -> None:
    with closing(sqlite3.connect(ledger.path)) as connection:
        connection.execute("PRAGMA query_only=ON")
        (row,) = connection.execute(query).fetchall()
    assert row in {(None, 11, 55.0), ("tiny", "2026-11-21", 9.0), ("ann", "lab")}


def test_a_backup_verifies(ledger: Ledger, tmp_path: Path) -> None:
    copy = tmp_path / "copy.sqlite"
    with (
        closing(sqlite3.connect(ledger.path)) as connection,
        closing(sqlite3.connect(copy)) as other,
    ):
        connection.backup(other)
    assert verify(copy, ledger.head()).ok
