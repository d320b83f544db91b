"""Pinning a model from a notebook.

Cases: the first lock, beside the notebook; the nearest above it, its comments kept; pinned already, to the same
bytes and to others, replaced; under another name; in several files; from the Hugging Face cache; a model that is
not there, another kind, a name of the lock; a lock that is broken, a link, or cannot be written; bytes that
cannot be read. Nothing is written, nor any bytes read, where it comes to nothing.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from shimmy_jupyter.errors import ModelLoadFailed, ModelNotFound
from shimmy_jupyter.models import lockfile
from shimmy_jupyter.models.lockfile import NAME, LockError
from shimmy_jupyter.models.locking import lock

HEX, OTHER, TEMPLATE = "0a" * 32, "1b" * 32, "2c" * 32
NOW = datetime(2026, 11, 21, 10, 20, 30, 999, UTC)
COMMIT = "0123456789" * 4


def model(id: str, kind: str = "model", **more: Any) -> dict[str, Any]:
    return {
        "id": id, "kind": kind, "size_bytes": 500, "files": 1, "sha256": None, "source": "home",
        "origin": None, "chat_template": None, **more,
    }  # fmt: skip


class Notebook:
    """In a folder of a project; what it has had read."""

    def __init__(self, project: Path) -> None:
        self.project, self.folder = project, project / "lessons"
        self.folder.mkdir()
        self.models = [model("course"), model("style", "lora")]
        self.digests = [HEX]
        self.read: list[str] = []

    def lock(self, name: str = "course", alias: str = "tutor", **more: Any) -> list[str]:
        listing = {"models": self.models, "default": None, "engine": "0.3.36"}
        return lock(
            name, alias, listing, self._read, NOW, start=self.folder, home=self.project, **more
        )

    def _read(self, id: str) -> dict[str, Any]:
        self.read.append(id)
        if not self.digests:
            raise ModelLoadFailed("course changed while it was read")
        return {"sha256": self.digests, "expected": [None], "chat_template": TEMPLATE}


@pytest.fixture
def notebook(tmp_path: Path) -> Notebook:
    return Notebook(tmp_path)


def test_the_first_one(notebook: Notebook) -> None:
    said = notebook.lock()
    pin = lockfile.read(notebook.folder / NAME).models["tutor"]
    assert (pin.file, pin.size, pin.sha256, pin.parts) == ("course.gguf", 500, HEX, ())
    assert (pin.chat_template, pin.engine, pin.source) == (TEMPLATE, "0.3.36", None)
    assert pin.locked_at == NOW.replace(microsecond=0)
    assert said == [
        f"shimmy.lock pins tutor: course.gguf, 500 bytes, sha256 {HEX}, chat template {TEMPLATE[:12]}…",
        "it does not say where others can have the file: `shimmy lock add --source` does",
    ]
    assert notebook.read == ["course"]


def test_the_nearest_above(notebook: Notebook) -> None:
    path = notebook.project / NAME
    path.write_text("# Ask first.\nversion = 1\n")
    assert notebook.lock()[0].startswith("../shimmy.lock pins tutor: ")
    assert path.read_text().startswith("# Ask first.\n")
    assert [*lockfile.read(path).models] == ["tutor"]
    assert not (notebook.folder / NAME).exists()


def test_again(notebook: Notebook) -> None:
    notebook.lock()
    before = (notebook.folder / NAME).read_bytes()
    assert notebook.lock()[0].startswith(
        "shimmy.lock pins tutor to these bytes already: course.gguf"
    )
    notebook.digests = [OTHER]
    with pytest.raises(
        LockError, match=re.escape("`--replace` pins course in its stead")
    ) as caught:
        notebook.lock()
    assert caught.value.key == "models.tutor"
    assert HEX[:12] in caught.value.message
    assert (notebook.folder / NAME).read_bytes() == before
    notebook.lock(replacing=True)
    assert lockfile.read(notebook.folder / NAME).models["tutor"].sha256 == OTHER
    notebook.lock(alias="second")
    assert [*lockfile.read(notebook.folder / NAME).models] == ["second", "tutor"]


def test_in_several_files_from_a_repository(notebook: Notebook) -> None:
    origin = {"name": "me/course-GGUF", "revision": COMMIT}
    notebook.models = [model("course", files=2, source="huggingface", origin=origin)]
    notebook.digests = [HEX, OTHER]
    (said,) = notebook.lock()
    pin = lockfile.read(notebook.folder / NAME).models["tutor"]
    assert (pin.file, pin.parts) == ("course-00001-of-00002.gguf", (OTHER,))
    assert pin.source is not None
    assert (pin.source.repo, pin.source.revision) == ("me/course-GGUF", COMMIT)
    assert "and 1 further files" in said


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("ghost", "there is no model 'ghost'; there are: course"),
        ("style", "style is no model: lora"),
        (
            "tutor",
            "tutor is a name of shimmy.lock: `shimmy lock update tutor` pins it again; there is",
        ),
    ],
)
def test_what_is_no_model(notebook: Notebook, name: str, reason: str) -> None:
    notebook.lock()
    notebook.read.clear()
    with pytest.raises(ModelNotFound, match=f"^{re.escape(reason)}"):
        notebook.lock(name, "new")
    assert not notebook.read


def test_a_lock_that_is_none(notebook: Notebook) -> None:
    path = notebook.folder / NAME
    for make in (lambda: path.write_text("version = 9"), lambda: path.symlink_to("elsewhere")):
        make()
        with pytest.raises(LockError):
            notebook.lock()
        path.unlink()
    assert not notebook.read


def test_one_that_cannot_be_written(notebook: Notebook, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied", str(notebook.folder))

    monkeypatch.setattr(lockfile, "write", refuse)
    with pytest.raises(LockError) as caught:
        notebook.lock()
    assert caught.value.message == "shimmy.lock cannot be written: Permission denied"


@pytest.mark.parametrize("alias", ["", "a b", "x" * 129])
def test_a_bad_name(notebook: Notebook, alias: str) -> None:
    with pytest.raises(LockError):
        notebook.lock(alias=alias)
    assert not notebook.read
    assert not (notebook.folder / NAME).exists()


def test_bytes_that_cannot_be_read(notebook: Notebook) -> None:
    notebook.digests = []
    with pytest.raises(ModelLoadFailed):
        notebook.lock()
    assert not (notebook.folder / NAME).exists()
