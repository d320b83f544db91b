"""Records as CSV and JSONL.

Cases: nothing, one page and several, filters, erased ones; what is added meanwhile; another format.
JSONL: bodies byte for byte, so that their hashes can be computed. CSV: its columns, values of each type,
quotes, commas, line ends and other scripts, and cells that a spreadsheet would take for formulas.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shimmy_jupyter.audit import export as module
from shimmy_jupyter.audit.export import COLUMNS, export
from shimmy_jupyter.audit.ledger import Entry, Ledger, Query
from shimmy_jupyter.audit.merkle import leaf_hash
from shimmy_jupyter.audit.records import FIELDS
from shimmy_jupyter.audit.writer import StoreFailed

SOON = 60
NOON = 1_795_262_400.0


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    ledger = Ledger(tmp_path / "ledger.db")
    yield ledger
    ledger.close()


def add(ledger: Ledger, *users: str, **more: Any) -> None:
    entries = [Entry("end", f"r{n}", NOON + n, user, **more) for n, user in enumerate(users)]
    ledger.append(entries).result(SOON)


def lines(ledger: Ledger, query: Query | None = None) -> list[dict[str, Any]]:
    text = b"".join(export(ledger, query or Query(), "jsonl")).decode()
    return [json.loads(line) for line in text.splitlines()]


def table(ledger: Ledger, query: Query | None = None) -> list[dict[str, str]]:
    text = b"".join(export(ledger, query or Query(), "csv")).decode()
    return list(csv.DictReader(io.StringIO(text, newline="")))


def test_nothing(ledger: Ledger) -> None:
    assert lines(ledger) == []
    assert b"".join(export(ledger, Query(), "csv")).decode() == ",".join(COLUMNS) + "\r\n"


def test_columns_are_the_fields() -> None:
    assert COLUMNS[:2] == ("seq", "leaf_hash")
    assert {*COLUMNS, "v", "salt"} == {*FIELDS, "leaf_hash"}


def test_bodies_are_as_they_were_hashed(ledger: Ledger) -> None:
    add(ledger, "ann", "Änn\u2028x", parameters={"x": 1.5e-7})
    text = b"".join(export(ledger, Query(), "jsonl"))
    for seq, line in enumerate(text.split(b"\n")[:-1]):
        body = line[line.index(b'"body":') + 7 : -1]
        assert json.loads(line)["leaf_hash"] == leaf_hash(body).hex()
        assert json.loads(line)["seq"] == json.loads(body)["seq"] == seq


@pytest.mark.parametrize("number", [1, 6, 7, 8, 20])
def test_pages(ledger: Ledger, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PAGE", 7)
    add(ledger, *["ann"] * number)
    assert [line["seq"] for line in lines(ledger)] == list(range(number))
    assert [row["seq"] for row in table(ledger)] == [str(seq) for seq in range(number)]
    pieces = list(export(ledger, Query(), "jsonl"))
    assert [piece.count(b"\n") for piece in pieces] == [7] * (number // 7) + [number % 7] * (
        number % 7 > 0
    )


def test_filters(ledger: Ledger) -> None:
    add(ledger, "ann", "bob", "ann", "bob")
    query = Query(user="bob", since=NOON + 2)
    assert [line["seq"] for line in lines(ledger, query)] == [3]
    assert [row["user"] for row in table(ledger, query)] == ["bob"]


def test_erased_ones(ledger: Ledger) -> None:
    add(ledger, "ann", "bob")
    ledger.erase("ann", by=Entry("act", "e", NOON, "root", action="erase")).result(SOON)
    assert [line["body"] is None for line in lines(ledger)] == [True, False, False]
    first, second, act = table(ledger)
    assert first["leaf_hash"] == lines(ledger)[0]["leaf_hash"]
    assert {name for name, value in first.items() if value} == {"seq", "leaf_hash"}
    assert second["user"] == "bob"
    assert json.loads(act["detail"])["erased"] == [[0, 0]]


def test_what_comes_meanwhile_is_for_the_next_one(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An export of a busy ledger has an end."""
    monkeypatch.setattr(module, "_PAGE", 2)
    add(ledger, "ann", "ann", "ann")
    found = []
    for piece in export(ledger, Query(), "jsonl"):
        found.append(piece.count(b"\n"))
        add(ledger, "ann", "ann", "ann")
    assert found == [2, 1]


def test_values_of_each_type(ledger: Ledger) -> None:
    add(
        ledger, 'a "quoted", \r\n käse', groups=("x", "y"), prompt_tokens=0, duration_ms=1.5,
        parameters={"temperature": -0.5, "a": ["ä"]}, content={"prompt": "p"}, outcome="ok",
    )  # fmt: skip
    (row,) = table(ledger)
    assert row["user"] == 'a "quoted", \r\n käse'
    assert json.loads(row["groups"]) == ["x", "y"]
    assert (row["prompt_tokens"], row["duration_ms"], row["cached_tokens"]) == ("0", "1.5", "")
    assert row["parameters"] == '{"a": ["ä"], "temperature": -0.5}'
    assert json.loads(row["content"]) == {"prompt": "p"}
    assert row["timestamp"] == "2026-11-21T12:00:00.000Z"


@pytest.mark.parametrize("sign", ["=", "+", "-", "@", "\t", "\r", "\n"])
def test_no_cell_is_a_formula(ledger: Ledger, sign: str) -> None:
    text = f'{sign}HYPERLINK("https://example.invalid")'
    add(ledger, text, notebook=text, cell=f"x{text}", groups=(text,))
    (row,) = table(ledger)
    assert row["user"] == row["notebook"] == "'" + text
    assert row["cell"] == f"x{text}"
    assert json.loads(row["groups"]) == [text]
    assert not any(value.startswith(sign) for value in row.values())


def test_another_format(ledger: Ledger) -> None:
    with pytest.raises(ValueError, match="format: csv or jsonl, not 'xml'"):
        export(ledger, Query(), "xml")  # type: ignore[arg-type]


def test_a_ledger_that_cannot_be_read(ledger: Ledger, tmp_path: Path) -> None:
    (tmp_path / "ledger.db").write_bytes(b"garbage " * 1000)
    with pytest.raises(StoreFailed, match="not a database"):
        list(export(ledger, Query(), "csv"))
