"""Write docs/notebook.md's tables anew from the magics' own: `python scripts/notebook_docs.py`."""

from __future__ import annotations

import re
from pathlib import Path

from shimmy_jupyter.notebook.helptext import table_markdown

PAGE = Path(__file__).resolve().parent.parent / "docs" / "notebook.md"


def written(page: str) -> str:
    """The page with the tables below its headings `Options` and `Commands` as they should be."""
    for name, table in zip(("Options", "Commands"), table_markdown().split("\n\n"), strict=True):
        page = re.sub(
            rf"(## {name}\n\n)(?:\|[^\n]*\n)*",
            lambda match, table=table: f"{match[1]}{table.strip()}\n",
            page,
        )
    return page


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
