"""Tables of a page that name, row by row, the tests which hold what the row says."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


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


def table(text: str, heading: str, agreed: Sequence[str]) -> list[Row]:
    """The rows below a heading, of which those that wait must name something of what is `agreed`.

    Raises `Wrong` where there is no such section, or no row in it can be read.
    """
    found = re.search(
        rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE
    )
    if found is None:
        raise Wrong(f"there is no section {heading!r}")
    lines = [line for line in found[1].splitlines() if line.startswith("|")]
    return [_row(line, agreed) for line in lines[2:]]


def _row(line: str, agreed: Sequence[str]) -> Row:
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
    if colon and not any(work in later for work in agreed):
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
