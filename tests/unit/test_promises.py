"""The two tables of the security page: every row is there, and every test that it names exists.

Cases: the rows are those of the lists below, once each; a row names a test, or begins with "later:"; what
waits names work that is agreed; each test is a function or a method of a class in its file, and is not
skipped for good; the checks themselves, on tables that are wrong.
"""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from ..tables import ROOT, Row, Wrong, missing, names, table

PAGES = (ROOT / "docs" / "security.md", ROOT / "docs" / "security-tables.md")
HEADINGS = (
    "What is promised, and the test that holds it",
    "Incidents elsewhere, and the test here",
)
PROMISES = (
    "token-and-localhost rate-and-size audit-record model-checksum jwt metrics-and-health"
    " paths-input-errors sandbox zero-config security-policy every-endpoint fetching private"
    " time-drift-receipts"
).split()
INCIDENTS = (
    "open-sockets forgotten-decorators xsrf root-prefix acting-output output-that-calls-home"
    " template-code model-files odd-parameters images-by-address pickled-cache others-objects"
    " limits-and-revocation exposed-ports pulls-and-digests what-comes-along one-policy prefix-oracle"
).split()
"""A row of the page may be reworded, and none may go. In the order of the documents they come from."""
LATER = ("JupyterHub", "panel", "images", "WebSocket")
"""Work that the design names as agreed and not there yet."""


@functools.cache
def page() -> str:
    """The first of the pages that has the tables."""
    for path in PAGES:
        if path.is_file() and f"## {HEADINGS[0]}\n" in (text := path.read_text()):
            return text
    raise Wrong(f"none of {[path.name for path in PAGES]} has the tables")


@pytest.mark.parametrize(("heading", "keys"), [(HEADINGS[0], PROMISES), (HEADINGS[1], INCIDENTS)])
def test_every_row_is_there_once_and_in_order(heading: str, keys: list[str]) -> None:
    assert [row.key for row in table(page(), heading, LATER)] == keys


@pytest.mark.parametrize("key", [*PROMISES, *INCIDENTS])
def test_every_test_that_a_row_names_exists(key: str) -> None:
    rows = [row for heading in HEADINGS for row in table(page(), heading, LATER)]
    (found,) = [row for row in rows if row.key == key]
    assert {test: why for test in found.tests if (why := missing(test))} == {}
    assert len(set(found.tests)) == len(found.tests)


HEAD = f"## {HEADINGS[0]}\n\n| row | promise | held by |\n|---|---|---|\n"
HERE = "tests/unit/test_promises.py"


class TestWrongTables:
    @pytest.mark.parametrize(
        ("line", "why"),
        [
            ("| `a` | something | |", "held by nothing"),
            ("| `a` | something | soon |", "beside tests"),
            ("| `a` | something | later: when there is time |", "does not name"),
            ("| `a` | something | `x` and more |", "beside tests"),
            ("| a | something | `x` |", "not a key"),
            ("| `a` | `x` |", "not a key"),
        ],
    )
    def test_rows(self, line: str, why: str) -> None:
        with pytest.raises(Wrong, match=why):
            table(HEAD + line, HEADINGS[0], LATER)

    def test_no_section(self) -> None:
        with pytest.raises(Wrong, match="no section"):
            table(HEAD, HEADINGS[1], LATER)

    def test_right_ones(self) -> None:
        lines = (
            "| `a` | x | `t::u` `v::w` Later: images |\n| `b` | y | later: the panel |\n\n## Next\n"
        )
        assert table(HEAD + lines, HEADINGS[0], LATER) == [
            Row("a", "x", ("t::u", "v::w"), "images"),
            Row("b", "y", (), "the panel"),
        ]

    @pytest.mark.parametrize(
        ("test", "why"),
        [
            (f"{HERE}::TestWrongTables::test_rows", None),
            (f"{HERE}::test_every_test_that_a_row_names_exists", None),
            (f"{HERE}::test_rows", "does not exist"),
            (f"{HERE}::TestWrongTables", "does not exist"),
            (f"{HERE}::missing", "does not exist"),
            (HERE, "names a file"),
            ("tests/unit/test_nothing.py::test_x", "file that does not exist"),
            ("scripts/demo.py::test_x", "no file of tests"),
        ],
    )
    def test_names(self, test: str, why: str | None) -> None:
        said = missing(test)
        assert said is None if why is None else why in str(said)

    def test_what_is_always_skipped(self, tmp_path: Path) -> None:
        path = tmp_path / "test_x.py"
        path.write_text(
            "import pytest\n@pytest.mark.skip\ndef test_a(): ...\n@pytest.mark.skip('x')\ndef test_b(): ...\n"
            "@pytest.mark.xfail\ndef test_c(): ...\n@pytest.mark.skipif(False, reason='')\ndef test_d(): ...\n"
        )
        assert names(path) == {"test_d"}
