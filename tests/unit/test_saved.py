"""Answers out of a saved notebook.

Cases: the last, by number, by variable, by id, and which of these goes first; of several outputs in a cell; where there
is none, with what there is. The answer's own text among an output's representations: as it is, in lines,
with figures below it, within an object, and none. Other outputs, cells, keys and types beside them. One that
is damaged is only told of when it is the one. Files: none, no notebook, a folder, a pipe, a link, not JSON, deep,
large, anything; none of the errors says where it lies.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from shimmy_jupyter.errors import InvalidValue, NotFound, ShimmyError
from shimmy_jupyter.notebook import saved
from shimmy_jupyter.notebook.display import Answer
from shimmy_jupyter.notebook.provenance import Kept
from shimmy_jupyter.notebook.saved import answer_of, names_of, pick

from .test_provenance import JSON, made

TEXT = "Because *of* it.\n[sic]\n\nAnd so on."


def output(text: str = TEXT, data: dict[str, Any] | None = None, **said: Any) -> dict[str, Any]:
    bundle = Answer(text, "course · 4 tokens").bundle() if data is None else data
    metadata = {"shimmy": made(text, **said).to_json()}
    return {"output_type": "display_data", "data": bundle, "metadata": metadata}


def cell(number: int | None, id: str, *outputs: dict[str, Any]) -> dict[str, Any]:
    return {
        "cell_type": "code", "execution_count": number, "id": id, "metadata": {}, "source": "",
        "outputs": list(outputs),
    }  # fmt: skip


def write(folder: Path, *cells: Any) -> Path:
    path = folder / "lesson.ipynb"
    path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4}))
    return path


PLAIN = {"output_type": "stream", "name": "stdout", "text": "hello"}


class TestWhich:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return write(
            tmp_path,
            {"cell_type": "markdown", "id": "m", "source": "# Why"},
            cell(3, "a1", PLAIN, output("one", variable="x"), output("two", variable="7")),
            cell(7, "x", output("three", variable="y")),
            cell(None, "b2", output("four", variable="x")),
            cell(9, "c3", PLAIN, {"output_type": "display_data", "data": {}, "metadata": {}}),
        )

    @pytest.mark.parametrize(
        ("which", "text", "number", "id"),
        [
            ("", "four", None, "b2"),
            ("3", "two", 3, "a1"),
            ("7", "three", 7, "x"),  # before the variable
            ("x", "four", None, "b2"),  # before the cell's id
            ("y", "three", 7, "x"),
            ("a1", "two", 3, "a1"),
            ("b2", "four", None, "b2"),
        ],
    )
    def test_one(self, path: Path, which: str, text: str, number: int | None, id: str) -> None:
        found = answer_of(path, which)
        assert (found.text, found.cell, found.id) == (text, number, id)
        assert found.provenance.answer_sha256 == made(text).answer_sha256

    @pytest.mark.parametrize("which", ["9", "c3", "z", "03", " 3"])
    def test_none_of_these(self, path: Path, which: str) -> None:
        with pytest.raises(NotFound) as caught:
            answer_of(path, which)
        said = f"no answer of {which!r}; there are those of cells 3, 7"
        assert caught.value.message == f"the saved notebook has {said}"

    def test_each_name_that_there_is_finds_one(self, path: Path) -> None:
        found = names_of(path)
        assert {*found} == {"3", "7", "a1", "x", "b2", "y"}
        for name in found:
            answer_of(path, name)

    def test_no_names_where_there_is_no_notebook(self, tmp_path: Path) -> None:
        assert names_of(tmp_path / "none.ipynb") == names_of(tmp_path / "a.txt") == []

    def test_nor_where_it_cannot_be_read(self, tmp_path: Path) -> None:
        path = tmp_path / "bad.ipynb"
        path.write_text('{"cells": [')
        assert names_of(path) == []

    def test_none_at_all(self, tmp_path: Path) -> None:
        with pytest.raises(NotFound) as caught:
            answer_of(write(tmp_path, cell(1, "a", PLAIN)))
        assert caught.value.message.endswith("has no answer that says what made it")

    def test_of_a_kernel_too(self) -> None:
        kept = [Kept(made(str(i), variable="xyx"[i]), str(i), i, f"c{i}") for i in range(3)]
        assert pick(kept, "") is kept[2]
        assert pick(kept, "x") is kept[2]
        assert pick(kept, "y") is pick(kept, "1") is pick(kept, "c1") is kept[1]
        assert pick(kept, "5") is None
        assert pick([], "") is None


class TestTheText:
    @pytest.mark.parametrize("text", ["", "plain", TEXT, "[x]", "\n[x]", "ends\n[1]", "ends\n"])
    @pytest.mark.parametrize("note", ["", "course · 4 tokens · [odd]"])
    def test_below_figures(self, tmp_path: Path, text: str, note: str) -> None:
        path = write(tmp_path, cell(1, "a", output(text, Answer(text, note).bundle())))
        assert answer_of(path).text == text

    @pytest.mark.parametrize(
        "data",
        [
            {"text/plain": TEXT.splitlines(keepends=True)},
            {"text/html": "<p>", "application/x": {"text": TEXT}},
            {
                "application/x": {"text": 3},
                "text/plain": ["x", 3],
                "y": None,
                "text/markdown": TEXT,
            },
            {"bad": "\ud800", "text/plain": f"{TEXT}\n[done]"},
        ],
        ids=["in lines", "in an object", "among others", "beside what is no text"],
    )
    def test_where_it_lies(self, tmp_path: Path, data: dict[str, Any]) -> None:
        assert answer_of(write(tmp_path, cell(1, "a", output(data=data)))).text == TEXT

    @pytest.mark.parametrize("data", [{}, {"text/plain": f"{TEXT}!"}, {"text/html": ["<b>"]}])
    def test_that_is_not_there(self, tmp_path: Path, data: dict[str, Any]) -> None:
        found = answer_of(write(tmp_path, cell(1, "a", output(data=data))))
        assert found.text is None
        assert found.provenance == made(TEXT)


class TestAmongOthers:
    def test_what_is_none_of_ours_is_passed_over(self, tmp_path: Path) -> None:
        odd = [None, 3, "x", [], {}, {"outputs": None}, {"outputs": [None, 3, {}]}]
        odd += [cell(1, "a", {"metadata": m, "data": {}}) for m in (None, [], {"shimmy": 3})]
        odd += [cell(1, "a", {"metadata": {"shimmy": {}}, "data": d}) for d in (None, [], "x")]
        path = write(tmp_path, *odd, cell(2, "b", output()), *odd)
        assert answer_of(path).text == TEXT

    @pytest.mark.parametrize(("number", "id"), [("3", 3), (True, None), (1.0, [])])
    def test_names_of_other_types(self, tmp_path: Path, number: Any, id: Any) -> None:
        found = answer_of(write(tmp_path, cell(number, id, output(variable="x"))))
        assert (found.cell, found.id) == (None, None)

    def test_one_that_is_damaged(self, tmp_path: Path) -> None:
        bad, odd = output(), output()
        bad["metadata"]["shimmy"]["usage"] = []
        odd["metadata"]["shimmy"] |= {"variable": 3, "version": 2}
        path = write(tmp_path, cell(1, "a", bad), cell(2, "b", output()), cell(3, "c", odd))
        assert answer_of(path, "2").text == TEXT
        with pytest.raises(InvalidValue) as caught:
            answer_of(path, "1")
        assert caught.value.param == "usage"
        with pytest.raises(InvalidValue, match="newer release"):
            answer_of(path)


class TestFiles:
    def refused(self, path: Path, kind: type[ShimmyError], reason: str) -> None:
        with pytest.raises(kind) as caught:
            answer_of(path)
        assert type(caught.value) is kind
        assert reason in caught.value.message
        assert str(path.parent) not in caught.value.message

    def test_none(self, tmp_path: Path) -> None:
        self.refused(tmp_path / "new.ipynb", NotFound, "new.ipynb is not saved yet")

    def test_no_notebook(self, tmp_path: Path) -> None:
        (tmp_path / "x.py").write_text("{}")
        self.refused(tmp_path / "x.py", NotFound, "'x.py' is no notebook")

    def test_a_folder_and_a_pipe(self, tmp_path: Path) -> None:
        (tmp_path / "folder.ipynb").mkdir()
        os.mkfifo(tmp_path / "pipe.ipynb")
        self.refused(tmp_path / "folder.ipynb", InvalidValue, "folder.ipynb is no regular file")
        self.refused(tmp_path / "pipe.ipynb", InvalidValue, "pipe.ipynb is no regular file")

    def test_a_link_is_followed(self, tmp_path: Path) -> None:
        path = write(tmp_path, cell(1, "a", output()))
        (tmp_path / "other.ipynb").symlink_to(path)
        assert answer_of(tmp_path / "other.ipynb").text == TEXT

    def test_one_that_may_not_be_read(self, tmp_path: Path, monkeypatch: Any) -> None:
        def refuse(*_: Any) -> int:
            raise PermissionError(13, "Permission denied", "/secret")

        path = write(tmp_path)
        monkeypatch.setattr(saved.os, "open", refuse)
        self.refused(path, NotFound, "lesson.ipynb cannot be read: Permission denied")

    @pytest.mark.parametrize(
        "data", [b"", b"x", b"\xff", b"{", b'{"cells": ' + b"9" * 5000 + b"}", b"[" * 100_000],
        ids=["empty", "x", "no UTF-8", "cut off", "a long number", "deep"],
    )  # fmt: skip
    def test_no_json(self, tmp_path: Path, data: bytes) -> None:
        path = tmp_path / "bad.ipynb"
        path.write_bytes(data)
        self.refused(path, InvalidValue, "bad.ipynb is no notebook, or is damaged")

    @pytest.mark.parametrize("data", [b"[]", b"3", b"null", b"{}", b'{"cells": {"x": 1}}'])
    def test_json_without_cells(self, tmp_path: Path, data: bytes) -> None:
        path = tmp_path / "odd.ipynb"
        path.write_bytes(data)
        self.refused(path, NotFound, "has no answer")

    def test_as_much_as_is_looked_into(self, tmp_path: Path, monkeypatch: Any) -> None:
        path = write(tmp_path, cell(1, "a", output()))
        monkeypatch.setattr(saved, "LARGEST", path.stat().st_size)
        assert answer_of(path).text == TEXT
        monkeypatch.setattr(saved, "LARGEST", path.stat().st_size - 1)
        self.refused(path, InvalidValue, "lesson.ipynb has more than")

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(JSON, JSON, JSON)
    def test_anything(self, tmp_path: Path, one: Any, metadata: Any, data: Any) -> None:
        odd = {"outputs": [{"metadata": {"shimmy": metadata}, "data": data}], "id": one}
        for cells in ([one], [odd], [{"outputs": one}], [{"outputs": [metadata]}]):
            try:
                answer_of(write(tmp_path, *cells))
            except (InvalidValue, NotFound) as error:
                assert error.message
