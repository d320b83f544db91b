"""The three tables of the habits' page: every row is there, and every test that it names exists.

Cases: the rows are those of the lists below, once each, in their order; a row names a test, or begins with
"later:"; what waits names work that the design has; each test is a function or a method of a class in its file, and
is not skipped for good; formats, commands and options that others have are named; the notebook's page leads here.
"""

from __future__ import annotations

import pytest

from shimmy_jupyter.notebook.arguments import FORMATS

from ..tables import ROOT, missing, table

PAGE = ROOT / "docs" / "habits.md"
DESIGN = (ROOT / "docs" / "design.md").read_text()
AGREED = DESIGN[DESIGN.index("## Agreed, not there yet") :]
KEPT = (
    "format-code format-html format-image format-json format-math format-markdown-and-text values cells list"
    " aliases fix-and-error reset version-and-help model-parameters config inserted-below keys"
).split()
BETTER = (
    "model-optional braces-of-json braces-of-latex braces-of-code where-braces-run output schema seed"
    " max-tokens-and-system image dry-run streams interrupt every-option errors-raise compat"
).split()
OURS = (
    "frames shaped-answers reproducible-cells fair-limits receipts context-honesty memory offline"
    " token-probabilities reused-tokens side-by-side keeps-its-speed"
).split()
TABLES = {
    "Habits that are kept": KEPT,
    "Habits that are made better": BETTER,
    "What others do not have": OURS,
}
"""A row of the page may be reworded, and none may go."""
LATER = ("ghost text", "side panel", "images")
"""Work that the design names as agreed and not there yet."""
NAMED = (
    *(f"-f {format}" for format in FORMATS),
    *("{var}", "{In[3]}", "{Out[3]}", "{Err[3]}", '{"a": 1}', "{}", r"\frac{a}{b}", 'f"{x!r} {name}"'),
    *("list", "alias", "dealias", "update", "fix", "reset", "version", "help", "error", "register", "delete"),
    *("-m", "-o VAR", "--schema", "--seed", "--max-tokens", "--system", "--image", "--dry-run", "--no-interp"),
    *("%config ShimmyMagics.model = …", "%shimmy compat ai", "Retry-After"),
)  # fmt: skip


@pytest.mark.parametrize("heading", TABLES)
def test_every_row_is_there_once_and_in_order(heading: str) -> None:
    assert [row.key for row in table(PAGE.read_text(), heading, LATER)] == TABLES[heading]


@pytest.mark.parametrize(("heading", "key"), [(h, key) for h, keys in TABLES.items() for key in keys])  # fmt: skip
def test_every_test_that_a_row_names_exists(heading: str, key: str) -> None:
    (found,) = [row for row in table(PAGE.read_text(), heading, LATER) if row.key == key]
    assert {test: why for test in found.tests if (why := missing(test))} == {}
    assert len(set(found.tests)) == len(found.tests)


@pytest.mark.parametrize("work", LATER)
def test_what_waits_is_agreed(work: str) -> None:
    assert work in AGREED


@pytest.mark.parametrize("what", NAMED)
def test_what_others_have_is_named(what: str) -> None:
    said = [row.promise for heading in TABLES for row in table(PAGE.read_text(), heading, LATER)]
    assert any(f"`{form}{what}" in row for row in said for form in ("", "%shimmy ")), what


def test_the_notebooks_page_leads_here() -> None:
    assert "(habits.md)" in (ROOT / "docs" / "notebook.md").read_text()
