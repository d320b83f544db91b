"""The two tables of the security page: every row is there, and every test that it names exists.

Cases: the rows are those of the lists below, once each; a row names a test, or begins with "later:"; what
waits names work that is agreed; each test is a function or a method of a class in its file, and is not
skipped for good; the checks themselves, on tables that are wrong.
"""

from __future__ import annotations

import ast
import functools
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
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


@dataclass(frozen=True, slots=True)
class Row:
    """`tests` as `file::name` or `file::Class::name`; `later` is what it waits for, if anything."""

    key: str
    promise: str
    tests: tuple[str, ...]
    later: str


_LATER = re.compile(r"(^|(?<=\s))later:", re.IGNORECASE)


class Wrong(Exception):
    """The page must be put right; the message says where."""


def table(text: str, heading: str) -> list[Row]:
    """Raises `Wrong` where there is no such section, or no row in it can be read."""
    found = re.search(
        rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE
    )
    if found is None:
        raise Wrong(f"there is no section {heading!r}")
    lines = [line for line in found[1].splitlines() if line.startswith("|")]
    return [row(line) for line in lines[2:]]


def row(line: str) -> Row:
    cells = [cell.strip() for cell in line.strip().strip("|").split(" | ")]
    key = re.fullmatch(r"`([a-z-]+)`", cells[0])
    if key is None or len(cells) != 3 or not cells[1]:
        raise Wrong(f"a row is not a key, a promise and what holds it: {line[:80]}")
    held, colon, later = _LATER.sub("\0", cells[2], count=1).partition("\0")
    tests = tuple(re.findall(r"`([^`]+)`", held))
    if re.sub(r"`[^`]+`|[\s,]", "", held):
        raise Wrong(f"{key[1]}: beside tests there is only what comes later: {held[:80]}")
    if not tests and not later:
        raise Wrong(f"{key[1]} is held by nothing")
    if colon and not any(work in later for work in LATER):
        raise Wrong(f"{key[1]} waits for something that the design does not name: {later}")
    return Row(key[1], cells[1], tests, later.strip())


@functools.cache
def names(path: Path) -> frozenset[str]:
    """Tests in a file, as pytest would name them, without those that are always skipped."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
            found |= {f"{node.name}::{inner}" for inner in map(_test, node.body) if inner}
        elif inner := _test(node):
            found.add(inner)
    return frozenset(found)


def _test(node: ast.stmt) -> str | None:
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return None
    skipped = any(
        ast.unparse(decorator).startswith(("pytest.mark.skip(", "pytest.mark.xfail"))
        or ast.unparse(decorator) == "pytest.mark.skip"
        for decorator in node.decorator_list
    )
    return node.name if node.name.startswith("test_") and not skipped else None


def missing(test: str, root: Path = ROOT) -> str | None:
    """Why a test that a row names is none."""
    file, _, name = test.partition("::")
    if not name:
        return "names a file, and no test in it"
    if not re.fullmatch(r"tests/(unit|component|model)/test_\w+\.py", file):
        return "is no file of tests"
    if not (root / file).is_file():
        return "is in a file that does not exist"
    return None if name in names(root / file) else "does not exist, or is always skipped"


@functools.cache
def page() -> str:
    """The first of the pages that has the tables."""
    for path in PAGES:
        if path.is_file() and f"## {HEADINGS[0]}\n" in (text := path.read_text()):
            return text
    raise Wrong(f"none of {[path.name for path in PAGES]} has the tables")


@pytest.mark.parametrize(("heading", "keys"), [(HEADINGS[0], PROMISES), (HEADINGS[1], INCIDENTS)])
def test_every_row_is_there_once_and_in_order(heading: str, keys: list[str]) -> None:
    assert [row.key for row in table(page(), heading)] == keys


@pytest.mark.parametrize("key", [*PROMISES, *INCIDENTS])
def test_every_test_that_a_row_names_exists(key: str) -> None:
    (found,) = [row for heading in HEADINGS for row in table(page(), heading) if row.key == key]
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
            table(HEAD + line, HEADINGS[0])

    def test_no_section(self) -> None:
        with pytest.raises(Wrong, match="no section"):
            table(HEAD, HEADINGS[1])

    def test_right_ones(self) -> None:
        lines = (
            "| `a` | x | `t::u` `v::w` Later: images |\n| `b` | y | later: the panel |\n\n## Next\n"
        )
        assert table(HEAD + lines, HEADINGS[0]) == [
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
