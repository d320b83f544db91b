"""Which notebook a request comes from, and notebooks that switch the assistant off.

Cases: the cell that runs, and which run of it; what is sent, and that it can be a header; no session, no kernel; a notebook that says no, yes,
nothing, something else; one that is no notebook, damaged, gone.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shimmy_jupyter.errors import AccessDenied
from shimmy_jupyter.notebook.origin import Origin


def shell(cell: Any) -> Any:
    parent = {"metadata": {"cellId": cell}, "header": {"msg_id": cell}}
    return SimpleNamespace(kernel=SimpleNamespace(get_parent=lambda _: parent))


def test_what_is_sent() -> None:
    found = Origin(shell("a1-b2"), "/home/ann/Über\nuns.ipynb").headers()
    assert found == {
        "x-shimmy-notebook": "/home/ann/%C3%9Cber%0Auns.ipynb",
        "x-shimmy-cell": "a1-b2",
    }


def test_what_is_not_known_is_not_sent() -> None:
    assert Origin(None, None).headers() == {}
    assert Origin(shell(7), None).headers() == {}
    assert Origin(SimpleNamespace(), None).headers() == {}  # type: ignore[arg-type]


def test_a_cell_and_its_run() -> None:
    for one, said in (("a1-b2", "a1-b2"), (7, None)):
        assert (Origin(shell(one), None).cell, Origin(shell(one), None).run) == (said, said)
    nothing = SimpleNamespace(kernel=SimpleNamespace(get_parent=lambda _: None))
    for found in (Origin(None, None), Origin(nothing, None)):  # type: ignore[arg-type]
        assert (found.cell, found.run) == (None, None)


def notebook(path: Path, metadata: object) -> str:
    path.write_text(json.dumps({"cells": [], "metadata": metadata}))
    return str(path)


def test_a_notebook_that_says_no(tmp_path: Path) -> None:
    name = notebook(tmp_path / "a.ipynb", {"shimmy": {"enabled": False}})
    with pytest.raises(AccessDenied, match=r"shimmy\.enabled"):
        Origin(None, name).check()


@pytest.mark.parametrize(
    "metadata", [{}, {"shimmy": {"enabled": True}}, {"shimmy": {}}, {"shimmy": 0}, [], None, "x"]
)
def test_one_that_does_not(tmp_path: Path, metadata: object) -> None:
    Origin(None, notebook(tmp_path / "a.ipynb", metadata)).check()


@pytest.mark.parametrize("text", ["", "[]", "{", "\0"])
def test_one_that_is_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.ipynb"
    path.write_text(text)
    for name in (str(path), str(tmp_path / "gone.ipynb"), str(tmp_path), "a" * 5000 + ".ipynb"):
        Origin(None, name).check()
    Origin(None, None).check()
