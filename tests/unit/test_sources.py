"""What is found in each place, under which ids, and that nothing is found outside of them.

Cases, own folders: any depth, by name; links in, out, to nothing, in circles; look-alike prefixes;
`..`; hidden and deep folders; FIFOs, sockets, devices; folders that cannot be read; a user's name in
a root, good and evil; places that are not there; too many folders, entries, warnings.
Parts: all, some, the first one missing, impossible numbers, two spellings, one that is no GGUF.
Kinds: by type, by architecture, late in the header, past the first 64 KiB, cut off, nonsense.
Ollama: ids with and without namespace and registry; layers read; two tags of one blob; blobs missing,
short, linked out; manifests that are huge, nested deep, of wrong types, with other digests.
Hugging Face: depth, the main revision first, one blob in two snapshots, links within and out, broken
links, parts behind links, folders of other kinds. LM Studio: two folders down, and no other.
Ids: first source first, plain, unique, the same again, however the disk lists folders.
Again: nothing is listed or opened twice; added, removed, replaced, grown, made unreadable and same in
size and time; a folder that changes in the tick of the look; stopped at every point, and gone on.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import re
import socket
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shimmy_jupyter.errors import Cancelled
from shimmy_jupyter.models import ollama, peek, scan
from shimmy_jupyter.models.sources import Found, Origin, Places, Scan, Scanner

REVISION, OTHER = "a" * 40, "b" * 40


# --- what trees are made of ---


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str, value: str | int | list[str]) -> bytes:
    if isinstance(value, str):
        return text(key) + struct.pack("<I", 8) + text(value)
    if isinstance(value, int):
        return text(key) + struct.pack("<II", 4, value)
    items = b"".join(map(text, value))
    return text(key) + struct.pack("<IIQ", 9, 8, len(value)) + items


def gguf(*pairs: bytes, version: int = 3, count: int | None = None) -> bytes:
    number = len(pairs) if count is None else count
    return b"GGUF" + struct.pack("<IQQ", version, 0, number) + b"".join(pairs)


MODEL = gguf(pair("general.architecture", "llama"), pair("general.type", "model"))


def make(path: Path, data: bytes = MODEL) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def look(places: Places) -> Scan:
    """Without the bundled one, which is always the last."""
    scanned = Scanner(places).scan()
    *found, last = scanned.found
    assert (last.id, last.source, last.problem, last.bundled) == (
        "self-test",
        "bundled",
        None,
        True,
    )
    assert_sound(scanned)
    return Scan(tuple(found), scanned.warnings)


def assert_sound(scanned: Scan) -> None:
    ids = [found.id for found in scanned.found]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[A-Za-z0-9._:@-]{1,128}", id, re.ASCII) for id in ids)
    for found in scanned.found:
        assert found.parts[0] == found.path
        for path in found.parts + found.adapters:
            assert path.is_relative_to(found.root)
            assert path == path.resolve()


def root(path: Path) -> Places:
    return Places(roots=(path,))


def ids(places: Places) -> list[str]:
    return [found.id for found in look(places).found]


def reasons(scanned: Scan) -> dict[str, str]:
    return {Path(warning.place).name: warning.reason for warning in scanned.warnings}


class TestFolders:
    def test_in_the_order_of_places_and_by_name(self, tmp_path: Path) -> None:
        for name in ("z/b", "z/a/c", "z/a", "p/1", "o/unused", "h/home", "s/sys"):
            make(tmp_path / f"{name}.gguf")
        make(tmp_path / "z" / "notes.txt")
        places = Places(
            roots=(tmp_path / "z",),
            model_paths=(tmp_path / "p",),
            home_models=tmp_path / "h",
            system=(tmp_path / "s",),
        )
        found = look(places).found
        assert [file.id for file in found] == ["c", "a", "b", "1", "home", "sys"]
        assert [file.source for file in found] == ["root"] * 3 + ["paths", "home", "system"]
        first = found[0]
        assert first.path == tmp_path / "z" / "a" / "c.gguf"
        assert (first.size_bytes, first.kind, first.problem) == (len(MODEL), "model", None)
        assert first.created == int(first.path.stat().st_mtime)
        assert first.root == tmp_path / "z"

    def test_places_that_are_not_there(self, tmp_path: Path) -> None:
        file = make(tmp_path / "file.gguf")
        gone = tmp_path / "gone"
        named = Places(
            roots=(gone, file, Path("~nosuchuser/x"), Path("nul\0l")), model_paths=(gone,)
        )
        scanned = look(named)
        assert scanned.found == ()
        assert [warning.reason for warning in scanned.warnings] == [
            "does not exist", "is no folder", "is no path", "is no path", "does not exist",
        ]  # fmt: skip
        unnamed = Places(
            ollama=gone, huggingface=gone, lmstudio=(gone,), home_models=gone, system=(gone, file)
        )
        assert look(unnamed) == look(Places()) == Scan((), ())

    def test_links(self, tmp_path: Path) -> None:
        inside = make(tmp_path / "root" / "blobs" / "x.gguf")
        make(tmp_path / "root-evil" / "y.gguf")
        folder = tmp_path / "root"
        (folder / "z-again.gguf").symlink_to(inside)
        (folder / "out.gguf").symlink_to(tmp_path / "root-evil" / "y.gguf")
        (folder / "dots.gguf").symlink_to("../root-evil/y.gguf")
        (folder / "self.gguf").symlink_to("self.gguf")
        (folder / "broken.gguf").symlink_to("nothing")
        (folder / "device.gguf").symlink_to("/dev/zero")
        (folder / "circle").symlink_to(folder)
        (folder / "away").symlink_to(tmp_path / "root-evil")
        (tmp_path / "elsewhere").symlink_to(folder)
        scanned = look(root(tmp_path / "elsewhere"))  # a root itself may be one
        assert [found.id for found in scanned.found] == ["x"]
        said = reasons(scanned)
        assert set(said) == {"out.gguf", "dots.gguf", "self.gguf", "broken.gguf", "device.gguf"}
        assert "leads out" in said["out.gguf"]
        assert "leads out" in said["dots.gguf"]

    def test_a_folder_whose_name_begins_alike(self, tmp_path: Path) -> None:
        make(tmp_path / "models" / "m.gguf")
        make(tmp_path / "models-evil" / "n.gguf")
        (tmp_path / "models" / "n.gguf").symlink_to(tmp_path / "models-evil" / "n.gguf")
        assert ids(root(tmp_path / "models")) == ["m"]

    def test_hidden_and_deep(self, tmp_path: Path) -> None:
        make(tmp_path / ".git" / "m.gguf")
        make(tmp_path / ".m.gguf")
        make(tmp_path / "a" / ".hidden" / "m.gguf")
        make(tmp_path.joinpath(*"d" * 32, "deep.gguf"))
        make(tmp_path.joinpath(*"d" * 33, "deeper.gguf"))
        assert ids(root(tmp_path)) == ["deep"]
        assert ids(root(tmp_path / ".git")) == ["m"]  # when somebody asks for it

    def test_what_is_no_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        os.mkfifo(tmp_path / "fifo.gguf")
        make(tmp_path / "folder.gguf" / "m.gguf")
        monkeypatch.chdir(tmp_path)  # a socket's name must be short
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind("s.gguf")
            scanned = look(root(tmp_path))
        assert [found.id for found in scanned.found] == ["m"]
        assert reasons(scanned) == dict.fromkeys(
            ["fifo.gguf", "s.gguf"], "cannot be read: it is no regular file"
        )

    @pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
    def test_what_cannot_be_read(self, tmp_path: Path) -> None:
        make(tmp_path / "a" / "m.gguf")
        make(tmp_path / "b.gguf").chmod(0)
        (tmp_path / "a").chmod(0)
        scanned = look(root(tmp_path))
        (tmp_path / "a").chmod(0o700)
        assert reasons(scanned) == {"a": "cannot be read: Permission denied"}
        assert [(found.id, found.problem) for found in scanned.found] == [
            ("b", "cannot be read: Permission denied")
        ]
        assert ids(root(tmp_path)) == ["m", "b"]

    def test_what_the_disk_refuses(self, tmp_path: Path) -> None:
        make(tmp_path / "a" / "m.gguf")
        make(tmp_path / "b.gguf")
        opened, refused = os.open, (str(tmp_path / "a"), str(tmp_path / "b.gguf"))

        def failing(path: Any, *rest: Any, **named: Any) -> int:
            if path in refused:
                raise PermissionError(13, "Permission denied")
            return opened(path, *rest, **named)

        scanner = Scanner(root(tmp_path), clock=lambda: 1e12)
        with mock.patch("os.open", failing):
            for _ in range(2):
                scanned = scanner.scan()
                assert reasons(scanned) == {"a": "cannot be read: Permission denied"}
                assert scanned.found[0].problem == "cannot be read: Permission denied"
        assert [found.problem for found in scanner.scan().found] == [None] * 3  # is not remembered

    def test_a_file_that_changes_while_it_is_looked_at(self, tmp_path: Path) -> None:
        path = make(tmp_path / "m.gguf")
        opened = os.open

        def swapping(name: Any, *rest: Any, **named: Any) -> int:
            if name == str(path):
                path.unlink()
                os.mkfifo(path)
            return opened(name, *rest, **named)

        scanner = Scanner(root(tmp_path))
        with mock.patch("os.open", swapping):
            (found, _) = scanner.scan().found
        assert found.problem == "cannot be read: it changed while it was looked at"
        assert len(scanner.scan().found) == 1

    def test_bounds(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(scan, "MOST_FOLDERS", 3)
        monkeypatch.setattr(scan, "MOST_ENTRIES", 4)
        monkeypatch.setattr(scan, "MOST_WARNINGS", 2)
        for name in "abcd":
            make(tmp_path / "folders" / name / f"{name}.gguf")
            (tmp_path / "links").mkdir(exist_ok=True)
            (tmp_path / "links" / f"{name}.gguf").symlink_to("nothing")
        for number in range(5):
            make(tmp_path / "full" / f"{number}.gguf")
        many = look(root(tmp_path / "folders"))
        assert [found.id for found in many.found] == ["a", "b"]
        assert reasons(many) == {"c": "and what comes after it: more than 3 folders"}
        full = look(root(tmp_path / "full"))
        assert full.found == ()
        assert reasons(full) == {"full": "cannot be read: it has more than 4 entries"}
        said = [warning.reason for warning in look(root(tmp_path / "links")).warnings]
        assert said[1:] == [said[0], "and 2 more warnings"]


class TestUsers:
    @pytest.mark.parametrize("name", ["ada", "ada@example.org", "a.b-c_d", "x" * 128])
    def test_a_name_in_a_root(self, tmp_path: Path, name: str) -> None:
        make(tmp_path / name / "mine.gguf")
        make(tmp_path / "other" / "theirs.gguf")
        places = Places(roots=(tmp_path / "{username}",), username=name)
        assert ids(places) == ["mine"]

    @pytest.mark.parametrize(
        "name", ["", ".", "..", "a/b", "../other", ".x", "a..b", "a\n", "a\0", "é", "x" * 129, "a b", "~"]
    )  # fmt: skip
    def test_a_name_that_leads_elsewhere(self, tmp_path: Path, name: str) -> None:
        make(tmp_path / "other" / "theirs.gguf")
        make(tmp_path / "all" / "shared.gguf")
        evil = tmp_path / "users" / "{username}"
        scanned = look(Places(roots=(evil, tmp_path / "all"), username=name))
        assert [found.id for found in scanned.found] == ["shared"]
        assert reasons(scanned) == {"{username}": "the user's name cannot be part of a path"}

    def test_only_in_roots(self, tmp_path: Path) -> None:
        make(tmp_path / "ada" / "mine.gguf")
        places = Places(model_paths=(tmp_path / "{username}",), username="ada")
        assert ids(places) == []


class TestParts:
    def test_all_and_some(self, tmp_path: Path) -> None:
        for number in (1, 2, 3):
            make(tmp_path / f"all-0000{number}-of-00003.gguf")
        for number in (1, 3):
            make(tmp_path / f"some-0000{number}-of-00003.gguf")
        make(tmp_path / "tail-00002-of-00002.GGUF")
        make(tmp_path / "one-00001-of-00001.gguf")
        whole, one, some, tail = look(root(tmp_path)).found
        assert [found.id for found in (whole, some, tail, one)] == ["all", "some", "tail", "one"]
        assert [path.name[4:9] for path in whole.parts] == ["00001", "00002", "00003"]
        assert (whole.size_bytes, whole.missing, whole.problem) == (3 * len(MODEL), (), None)
        assert (some.size_bytes, some.missing) == (2 * len(MODEL), (2,))
        assert some.problem == "lacks 1 of its 3 parts"
        assert (tail.missing, tail.path.name) == ((1,), "tail-00002-of-00002.GGUF")
        assert (one.missing, one.problem) == ((), None)

    def test_odd_numbers(self, tmp_path: Path) -> None:
        make(tmp_path / "m-00000-of-00002.gguf")
        make(tmp_path / "m-00003-of-00002.gguf")
        make(tmp_path / "n-00000-of-00000.gguf")
        make(tmp_path / "many-00001-of-99999.gguf")
        make(tmp_path / "short-1-of-2.gguf")
        make(tmp_path / "-00001-of-00001.gguf")
        scanned = look(root(tmp_path))
        named = {found.id: found for found in scanned.found}
        assert set(named) == {"model", "many", "short-1-of-2"}
        assert named["many"].missing == tuple(range(2, 1002))
        assert named["many"].problem == "lacks 99998 of its 99999 parts"
        assert reasons(scanned) == {
            "m-00000-of-00002.gguf": "is numbered 0 of 2",
            "m-00003-of-00002.gguf": "is numbered 3 of 2",
            "n-00000-of-00000.gguf": "is numbered 0 of 0",
        }

    def test_two_spellings_and_two_counts_are_two_models(self, tmp_path: Path) -> None:
        make(tmp_path / "m-00001-of-00001.gguf")
        make(tmp_path / "m-00001-of-00001.GGUF")
        make(tmp_path / "m-00001-of-00002.gguf")
        first, *others = ids(root(tmp_path))
        assert first == "m"
        assert all(re.fullmatch(r"m@[0-9a-f]{8}", id) for id in others)
        assert len(others) == 2

    def test_a_bad_part_and_a_lost_one(self, tmp_path: Path) -> None:
        make(tmp_path / "bad-00001-of-00002.gguf")
        make(tmp_path / "bad-00002-of-00002.gguf", b"<html>")
        make(tmp_path / "gone-00001-of-00002.gguf")
        (tmp_path / "gone-00002-of-00002.gguf").symlink_to("nothing")
        (tmp_path / "none-00001-of-00001.gguf").symlink_to("nothing")
        bad, gone = look(root(tmp_path)).found
        assert (bad.problem, bad.missing, bad.kind) == (
            "is a web page, saved under a model's name", (), "model",
        )  # fmt: skip
        assert (gone.problem, gone.missing) == ("lacks 1 of its 2 parts", (2,))


KINDS: list[tuple[str, bytes, str, str | None]] = [
    ("type", MODEL, "model", None),
    ("no type", gguf(pair("general.architecture", "bert")), "model", None),
    ("adapter", gguf(pair("general.architecture", "llama"), pair("general.type", "adapter")), "adapter", None),
    ("type first", gguf(pair("general.type", "adapter"), pair("general.architecture", "llama")), "adapter", None),
    ("mmproj", gguf(pair("general.type", "mmproj"), pair("general.architecture", "clip")), "projector", None),
    ("clip", gguf(pair("general.architecture", "clip")), "projector", None),
    ("matrix", gguf(pair("general.type", "imatrix")), "unknown", None),
    ("vocabulary of another kind", gguf(pair("general.architecture", "llama"), pair("general.type", "x")), "unknown", None),
    ("no keys", gguf(), "unknown", None),
    ("past 4 KiB", gguf(pair("a", "x" * 5000), pair("general.architecture", "llama")), "model", None),
    ("after lists", gguf(pair("n", 7), pair("l", ["a", ""]), pair("general.architecture", "llama")), "model", None),
    ("past 64 KiB", gguf(pair("a", "x" * 70000), pair("general.architecture", "llama")), "unknown", None),
    ("before a long list", gguf(pair("general.architecture", "clip"), pair("l", ["tok"] * 9000)), "projector", None),
    ("an older version", gguf(pair("general.architecture", "llama"), version=1), "unknown", None),
    ("big-endian", b"GGUF\0\0\0\3" + bytes(16), "unknown", None),
    ("cut off", MODEL[:-3], "model", None),
    ("magic only", b"GGUF", "unknown", None),
    ("empty", b"", "unknown", "is empty"),
    ("page", b"<!DOCTYPE html>", "unknown", "is a web page, saved under a model's name"),
    ("text", b"not a model", "unknown", "is no GGUF file"),
    ("pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "unknown", "is a Git LFS pointer and not the file itself: `git lfs pull` gets it"),
    ("pairs without end", gguf(pair("general.architecture", "llama"), count=2**64 - 1), "model", None),
    ("string without end", gguf(struct.pack("<Q", 2**64 - 1)), "unknown", None),
    ("list without end", gguf(text("l") + struct.pack("<IIQ", 9, 8, 2**64 - 1)), "unknown", None),
    ("numbers without end", gguf(text("l") + struct.pack("<IIQ", 9, 12, 2**64 - 1)), "unknown", None),
    ("list of lists", gguf(text("l") + struct.pack("<IIQ", 9, 9, 1)), "unknown", None),
    ("no such type", gguf(text("k") + struct.pack("<I", 99)), "unknown", None),
    ("empty strings", gguf(text("l") + struct.pack("<IIQ", 9, 8, 2**40) + bytes(70000)), "unknown", None),
]  # fmt: skip


@pytest.mark.parametrize(
    ("data", "kind", "problem"), [row[1:] for row in KINDS], ids=[row[0] for row in KINDS]
)
def test_kinds(tmp_path: Path, data: bytes, kind: str, problem: str | None) -> None:
    make(tmp_path / "m.gguf", data)
    (found,) = look(root(tmp_path)).found
    assert (found.kind, found.problem) == (kind, problem)


@given(st.binary(max_size=200))
def test_any_header_is_answered(data: bytes) -> None:
    peek._told(b"GGUF\3\0\0\0" + data)


class Ollama:
    """A folder as Ollama makes it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "blobs").mkdir(parents=True)
        self.places = Places(ollama=folder)

    def blob(self, data: bytes, kind: str = "model", **changed: Any) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        (self.folder / "blobs" / f"sha256-{digest}").write_bytes(data)
        type = f"application/vnd.ollama.image.{kind}"
        layer = {"mediaType": type, "digest": f"sha256:{digest}", "size": len(data)}
        return {**layer, **changed}

    def manifest(self, name: str, *layers: Any, raw: bytes | None = None) -> Path:
        fields = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
            "config": {"mediaType": "application/vnd.docker.container.image.v1+json"},
            "layers": list(layers),
        }
        return make(
            self.folder / "manifests" / name,
            raw if raw is not None else json.dumps(fields).encode(),
        )


USUAL = "registry.ollama.ai/library"


@pytest.fixture
def olla(tmp_path: Path) -> Ollama:
    return Ollama(tmp_path / "ollama")


class TestOllama:
    def test_everything_of_a_model(self, olla: Ollama) -> None:
        model = olla.blob(MODEL)
        olla.manifest(
            f"{USUAL}/llava/7b",
            model,
            olla.blob(gguf(pair("general.architecture", "clip")), "projector"),
            olla.blob(b"one", "adapter"),
            olla.blob(b"two", "adapter"),
            olla.blob("{{ .Prompt }} é".encode(), "template"),
            olla.blob(b"Be brief.", "system"),
            olla.blob(b'{"stop": ["<|a|>", "b"], "temperature": 0, "mirostat": true}', "params"),
            olla.blob(b"whatever", "license"),
        )
        (found,) = look(olla.places).found
        digest = model["digest"].removeprefix("sha256:")
        assert (found.id, found.source, found.kind) == ("llava:7b", "ollama", "model")
        assert found.path == olla.folder / "blobs" / f"sha256-{digest}"
        assert (found.expected_sha256, found.size_bytes) == (digest, len(MODEL))
        assert found.origin == Origin("llava:7b")
        assert (found.template, found.system) == ("{{ .Prompt }} é", "Be brief.")
        assert found.params == (
            ("stop", ("<|a|>", "b")), ("temperature", 0), ("mirostat", True),
        )  # fmt: skip
        assert [path.read_bytes() for path in found.adapters] == [b"one", b"two"]
        assert found.projector is not None
        assert found.problem is None

    def test_names(self, olla: Ollama) -> None:
        model = olla.blob(MODEL)
        for name in (
            f"{USUAL}/m/latest", f"{USUAL}/m/8b", "registry.ollama.ai/ada/m/8b", "hf.co/org/m-GGUF/Q4",
            "hf.co/library/m/8b",
        ):  # fmt: skip
            olla.manifest(name, model)
        make(olla.folder / "manifests" / USUAL / "m" / ".DS_Store")
        make(olla.folder / "manifests" / USUAL / "m" / "8b-folder" / "deeper")
        make(olla.folder / "manifests" / "stray")
        found = look(olla.places).found
        assert {file.id: file.origin and file.origin.name for file in found} == {
            "m:latest": "m:latest",
            "m:8b": "m:8b",
            "ada-m:8b": "ada/m:8b",
            "hf.co-org-m-GGUF:Q4": "hf.co/org/m-GGUF:Q4",
            "hf.co-library-m:8b": "hf.co/library/m:8b",
        }
        assert len({file.path for file in found}) == 1

    def test_odd_names(self, olla: Ollama) -> None:
        model = olla.blob(MODEL)
        for name in (b"a\nb", b"\xff", b"n" * 250, b"<script>"):
            olla.manifest(f"{USUAL}/{os.fsdecode(name)}/latest", model)
        found = look(olla.places).found
        assert len(found) == 4
        assert [file.origin for file in found] == [None] * 4

    def test_one_sanitized_name_twice(self, olla: Ollama) -> None:
        model = olla.blob(MODEL)
        olla.manifest("registry.ollama.ai/a/b-c/t", model)
        olla.manifest("registry.ollama.ai/a-b/c/t", model)
        first, second = ids(olla.places)
        assert first == "a-b-c:t"
        assert re.fullmatch(r"a-b-c:t@[0-9a-f]{8}", second)

    def test_blobs_that_are_not_right(self, olla: Ollama, tmp_path: Path) -> None:
        outside = make(tmp_path / "outside", MODEL)
        linked = olla.blob(b"linked" + MODEL)
        blob = olla.folder / "blobs" / linked["digest"].replace(":", "-")
        blob.unlink()
        blob.symlink_to(outside)
        for name, layers in {
            "missing": [olla.blob(MODEL, digest=f"sha256:{'0' * 64}", size=7)],
            "short": [olla.blob(MODEL, size=len(MODEL) + 5)],
            "html": [olla.blob(b"<html>")],
            "linked": [linked],
            "adapter": [olla.blob(MODEL), olla.blob(b"x", "adapter", digest=f"sha256:{'1' * 64}")],
            "params": [olla.blob(MODEL), olla.blob(b"[]", "params")],
            "template": [olla.blob(MODEL), olla.blob(b"\xff", "template")],
            "long": [olla.blob(MODEL), olla.blob(b"x" * 300_000, "system")],
        }.items():
            olla.manifest(f"{USUAL}/{name}/t", *layers)
        loop = olla.folder / "blobs" / f"sha256-{'2' * 64}"
        loop.symlink_to(loop)
        olla.manifest(f"{USUAL}/loop/t", olla.blob(MODEL, digest=f"sha256:{'2' * 64}"))
        scanned = look(olla.places)
        assert [warning.reason for warning in scanned.warnings] == [
            "its model cannot be read: it leads out of its folder",
            "its model cannot be read: Too many levels of symbolic links",
        ]
        found = {file.id.removesuffix(":t"): file for file in scanned.found}
        assert {id: file.problem for id, file in found.items()} == {
            "missing": "its model cannot be read: No such file or directory",
            "short": f"its model has {len(MODEL)} of {len(MODEL) + 5} bytes",
            "html": "its model is a web page, saved under a model's name",
            "adapter": "its adapter cannot be read: No such file or directory",
            "params": "its params is no object of up to 64 parameters",
            "template": "its template is not UTF-8",
            "long": "its system has 300000 bytes, more than 262144",
        }
        assert found["missing"].size_bytes == 7
        assert found["missing"].created > 0

    MANIFESTS: dict[str, bytes] = {
        "empty": b"",
        "list": b"[]",
        "nested": b"[" * 100_000,
        "nested well": b'{"layers": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
        "huge": b" " * 300_000,
        "digits": b'{"layers": [' + b"9" * 9000 + b"]}",
        "utf-16": '{"layers": []}'.encode("utf-16"),
        "no layers": b"{}",
        "layers of text": b'{"layers": "model"}',
        "null layer": b'{"layers": [null]}',
        "many layers": b'{"layers": [' + b"1," * 256 + b"1]}",
        "nothing to load": b'{"layers": []}',
    }

    @pytest.mark.parametrize("name", MANIFESTS)
    def test_manifests_that_say_nothing(self, olla: Ollama, name: str) -> None:
        olla.manifest(f"{USUAL}/bad/t", raw=self.MANIFESTS[name])
        olla.manifest(f"{USUAL}/good/t", olla.blob(MODEL))
        scanned = look(olla.places)
        assert [found.id for found in scanned.found] == ["good:t"]
        assert set(reasons(scanned)) == {"t"}

    @pytest.mark.parametrize(
        "changed",
        [
            {"digest": "sha256:../../../../etc/passwd"},
            {"digest": f"sha256:{'a' * 63}/"},
            {"digest": f"sha256-{'a' * 64}"},
            {"digest": f"sha256:{'A' * 64}"},
            {"digest": f"sha256:{'a' * 64}\n"},
            {"digest": f"sha512:{'a' * 64}"},
            {"digest": 7},
            {"digest": None},
            {"size": -1},
            {"size": 2**63},
            {"size": True},
            {"size": 1.0},
            {"size": "7"},
            {"size": None},
            {"mediaType": None},
            {"mediaType": ["application/vnd.ollama.image.model"]},
            {"mediaType": "application/vnd.ollama.image.tensor"},
        ],
        ids=str,
    )
    def test_layers_that_name_nothing(self, olla: Ollama, changed: dict[str, Any]) -> None:
        olla.manifest(f"{USUAL}/bad/t", olla.blob(MODEL, **changed))
        scanned = look(olla.places)
        assert scanned.found == ()
        assert len(scanned.warnings) == 1

    def test_two_models_in_one(self, olla: Ollama) -> None:
        olla.manifest(f"{USUAL}/two/t", olla.blob(MODEL), olla.blob(MODEL + b"x"))
        scanned = look(olla.places)
        assert scanned.found == ()
        assert "2 models" in scanned.warnings[0].reason

    @pytest.mark.parametrize(
        "params",
        [
            b'{"a": NaN}', b'{"a": 1e999}', b'{"a": {}}', b'{"a": [1]}', b'{"a": null}', b'{"A": 1}',
            b'{"a b": 1}', b'{"a": 99999999999999999999}', b'{"a": "\\ud800"}', b'{"a": [["x"]]}',
            b'{"a": "' + b"x" * 1025 + b'"}', b'{"a": [' + b'"x",' * 64 + b'"x"]}', b"{", b"\xff",
            json.dumps({f"p{i}": i for i in range(65)}).encode(),
        ],
    )  # fmt: skip
    def test_params_that_are_none(self, params: bytes) -> None:
        with pytest.raises(ollama.Malformed):
            ollama._params(params)

    def test_links_out_of_the_folder(self, olla: Ollama, tmp_path: Path) -> None:
        away = Ollama(tmp_path / "away")
        real = away.manifest(f"{USUAL}/m/t", away.blob(MODEL))
        link = olla.folder / "manifests" / USUAL / "m" / "t"
        link.parent.mkdir(parents=True)
        link.symlink_to(real)
        (olla.folder / "manifests" / "other").symlink_to(away.folder / "manifests")
        scanned = look(olla.places)
        assert scanned.found == ()
        assert "leads out" in reasons(scanned)["t"]


class HuggingFace:
    """A cache as huggingface_hub makes it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.places = Places(huggingface=folder)

    def add(self, repo: str, revision: str, name: str, data: bytes = MODEL) -> Path:
        folder = self.folder / f"models--{repo.replace('/', '--')}"
        blob = make(folder / "blobs" / hashlib.sha256(data).hexdigest(), data)
        link = folder / "snapshots" / revision / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
        return link

    def main(self, repo: str, revision: str) -> None:
        folder = self.folder / f"models--{repo.replace('/', '--')}"
        make(folder / "refs" / "main", revision.encode())


@pytest.fixture
def hub(tmp_path: Path) -> HuggingFace:
    return HuggingFace(tmp_path / "hub")


class TestHuggingFace:
    def test_any_depth(self, hub: HuggingFace) -> None:
        hub.add("org/name-GGUF", REVISION, "m-Q4.gguf")
        hub.add("org/name-GGUF", REVISION, "Q8/deep/m-Q8.gguf", MODEL + b"8")
        hub.add("org/name-GGUF", REVISION, "README.md", b"#")
        hub.add("single", REVISION, "s.gguf", MODEL + b"s")
        make(hub.folder / "datasets--org--d" / "snapshots" / REVISION / "d.gguf")
        make(hub.folder / ".locks" / "models--org--l" / "snapshots" / REVISION / "l.gguf")
        make(hub.folder / "version.txt", b"1")
        (hub.folder / "models--org--empty").mkdir()
        found = {file.id: file for file in look(hub.places).found}
        assert set(found) == {"m-Q4", "m-Q8", "s"}
        file = found["m-Q8"]
        assert file.origin == Origin("org/name-GGUF", REVISION)
        assert file.expected_sha256 == hashlib.sha256(MODEL + b"8").hexdigest() == file.path.name
        assert file.root == hub.folder
        assert found["s"].origin == Origin("single", REVISION)

    def test_the_main_revision_first_and_each_blob_once(self, hub: HuggingFace) -> None:
        hub.main("org/name", OTHER + "\n")
        hub.add("org/name", REVISION, "m.gguf", MODEL + b"old")
        hub.add("org/name", REVISION, "same.gguf")
        hub.add("org/name", OTHER, "m.gguf", MODEL + b"new")
        hub.add("org/name", OTHER, "same.gguf")
        first, same, old = look(hub.places).found
        assert (first.id, first.origin) == ("m", Origin("org/name", OTHER))
        assert (same.id, same.origin) == ("same", Origin("org/name", OTHER))
        assert old.origin == Origin("org/name", REVISION)
        assert old.id == f"m@{hashlib.sha256(os.fsencode(old.path)).hexdigest()[:8]}"

    def test_parts_behind_links(self, hub: HuggingFace) -> None:
        for number in (1, 2, 3):
            hub.add("o/n", REVISION, f"Q4/m-0000{number}-of-00003.gguf", MODEL + bytes([number]))
        (whole,) = look(hub.places).found
        assert (whole.id, whole.problem, len(whole.parts)) == ("m", None, 3)
        assert [path.read_bytes()[-1] for path in whole.parts] == [1, 2, 3]
        whole.parts[1].unlink()
        scanned = look(hub.places)
        assert (scanned.found[0].missing, scanned.found[0].id) == ((2,), "m")
        assert list(reasons(scanned)) == ["m-00002-of-00003.gguf"]

    def test_links(self, hub: HuggingFace, tmp_path: Path) -> None:
        hub.add("o/n", REVISION, "broken.gguf").resolve().unlink()
        snapshot = hub.folder / "models--o--n" / "snapshots" / REVISION
        outside = make(tmp_path / "hub-evil" / "m.gguf")
        (snapshot / "out.gguf").symlink_to(outside)
        (snapshot / "other.gguf").symlink_to(hub.add("o/other", REVISION, "x.gguf", MODEL + b"x"))
        (snapshot / "circle").symlink_to(snapshot)
        (hub.folder / "models--o--away").symlink_to(outside.parent)
        make(snapshot / "plain.gguf")  # where a file system has no links
        (tmp_path / "snap" / "m").mkdir(parents=True)
        make(tmp_path / "snap" / "m" / "stolen.gguf")
        (hub.folder / "models--o--s").mkdir()
        (hub.folder / "models--o--s" / "snapshots").symlink_to(tmp_path / "snap")
        scanned = look(hub.places)
        assert [found.id for found in scanned.found] == ["other", "plain"]
        assert set(reasons(scanned)) == {"broken.gguf", "out.gguf", "snapshots"}

    @pytest.mark.parametrize(
        "create",
        [
            lambda path: make(path, b"\xff" * 1000),
            os.mkfifo,
            Path.mkdir,
            lambda path: path.symlink_to("/etc/passwd"),
            lambda path: path.symlink_to(path),
        ],
        ids=["long", "fifo", "folder", "out", "circle"],
    )
    def test_odd_references(self, hub: HuggingFace, create: Callable[[Path], None]) -> None:
        hub.add("o/n", REVISION, "m.gguf")
        hub.add("o/e\nvil", "x y", "n.gguf", MODEL + b"x")
        (hub.folder / "models--o--n" / "refs").mkdir()
        create(hub.folder / "models--o--n" / "refs" / "main")
        scanned = look(hub.places)
        assert {file.id: file.origin for file in scanned.found} == {
            "m": Origin("o/n", REVISION),
            "n": None,
        }
        assert scanned.warnings == ()


class TestLMStudio:
    def test_two_folders_down(self, tmp_path: Path) -> None:
        for name in (
            "pub/repo/m",
            "pub/re po/n",
            "stray",
            "pub/stray",
            "pub/repo/sub/deep",
            ".x/r/h",
        ):
            make(tmp_path / f"{name}.gguf")
        scanned = look(Places(lmstudio=(tmp_path / "gone", tmp_path)))
        assert [(file.id, file.source, file.origin) for file in scanned.found] == [
            ("n", "lmstudio", None),
            ("m", "lmstudio", Origin("pub/repo")),
        ]
        assert scanned.warnings == ()


class TestNames:
    def test_the_first_source_has_the_name(
        self, tmp_path: Path, olla: Ollama, hub: HuggingFace
    ) -> None:
        make(tmp_path / "system" / "m.gguf")
        make(tmp_path / "root" / "m.gguf")
        make(tmp_path / "root" / "self-test.gguf")
        make(tmp_path / "root" / "o:t.gguf")
        hub.add("o/n", REVISION, "m.gguf")
        olla.manifest(f"{USUAL}/o/t", olla.blob(MODEL))
        places = Places(
            roots=(tmp_path / "root",), ollama=olla.folder, huggingface=hub.folder,
            system=(tmp_path / "system",),
        )  # fmt: skip
        found = look(places).found
        assert [file.source for file in found] == ["root"] * 3 + ["ollama", "huggingface", "system"]
        assert [file.id.partition("@")[0] for file in found] == [
            "m", "o:t", "self-test", "o:t", "m", "m",
        ]  # fmt: skip
        assert ["@" in file.id for file in found] == [False, False, True, True, True, True]
        by_manifest = hashlib.sha256(os.fsencode(olla.folder / "manifests" / USUAL / "o" / "t"))
        assert found[3].id == f"o:t@{by_manifest.hexdigest()[:8]}"

    def test_one_file_in_two_places_is_of_the_first(self, tmp_path: Path, hub: HuggingFace) -> None:
        hub.add("o/n", REVISION, "m.gguf")
        make(tmp_path / "a" / "b" / "n.gguf")
        places = Places(
            roots=(tmp_path / "a", tmp_path / "a" / "b", hub.folder), huggingface=hub.folder
        )
        assert [(file.id, file.source) for file in look(places).found] == [
            ("n", "root"),
            ("m", "root"),
        ]

    def test_names_made_to_collide(self, tmp_path: Path) -> None:
        victim = make(tmp_path / "z" / "m.gguf")
        digest = hashlib.sha256(os.fsencode(victim)).hexdigest()
        for size in range(8, 65):
            make(tmp_path / "a" / f"m@{digest[:size]}.gguf")
        make(tmp_path / "a" / "m.gguf")
        make(tmp_path / "a" / f"m@{digest}.2.gguf")
        assert ids(root(tmp_path))[-1] == f"m@{digest}.3"

    def test_any_name_becomes_a_plain_one(self, tmp_path: Path) -> None:
        names = (
            b"a b",
            b"\xff",
            b"\xfe",
            "é漢".encode(),
            b"n" * 249,
            b"<script>",
            b"a\nb",
            b"-",
            b"..",
        )
        for name in (*names, b"a" * 118 + b"\n\n", b"a" * 119 + b"\n"):
            Path(os.fsdecode(os.fsencode(tmp_path) + b"/x" + name + b".gguf")).touch()
        assert len(ids(root(tmp_path))) == 11

    NAMES = st.one_of(
        st.sampled_from([b"m", b"M", b"m@", b"a b", b"a-b", b"a\nb", b"self-test", b"\xff", b"n" * 240]),
        st.binary(min_size=1, max_size=20).filter(lambda name: not set(name) & set(b"/\0")),
        st.builds(lambda n, of: b"s-%05d-of-%05d" % (n, of), st.integers(0, 4), st.integers(0, 4)),
    )  # fmt: skip
    TREES = st.lists(
        st.tuples(st.sampled_from(["", "a", "a/b", "b", "c c", "a/b/c/d"]), NAMES), max_size=12
    )

    @settings(max_examples=60, deadline=None)
    @given(tree=TREES, seed=st.integers(0, 2**32))
    def test_whatever_the_tree(self, tree: list[tuple[str, bytes]], seed: int) -> None:
        chance = random.Random(seed)
        with tempfile.TemporaryDirectory() as name:
            top = Path(name).resolve()
            chance.shuffle(tree)
            for folder, file in tree:
                make(top / folder / (os.fsdecode(file) + ".gguf"))
            places = Places(roots=(top / "a", top, top / "b"))
            scanner = Scanner(places)
            scanned = scanner.scan()
            assert_sound(scanned)
            assert scanner.scan() == Scanner(places).scan() == scanned
            with shuffled(chance):
                assert Scanner(places).scan() == scanned
            others = Scanner(Places(roots=(top, top / "b", top / "a"))).scan()
            assert_sound(others)
            assert {file.parts for file in others.found} == {file.parts for file in scanned.found}


@contextmanager
def shuffled(chance: random.Random) -> Iterator[None]:
    """Folders list what they hold in some other order."""
    real = os.scandir

    @contextmanager
    def scandir(where: Any) -> Iterator[list[os.DirEntry[str]]]:
        with real(where) as entries:
            listed = list(entries)
            chance.shuffle(listed)
            yield listed

    with mock.patch.object(scan.os, "scandir", scandir):
        yield


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """How often folders were listed and files opened."""
    calls = {"scandir": 0, "pread": 0}
    real = {name: getattr(os, name) for name in calls}

    def counting(name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            calls[name] += 1
            return real[name](*args)

        return call

    with mock.patch.multiple(os, **{name: counting(name) for name in calls}):
        yield calls


def later() -> float:
    """A clock long past every change, so that a first look is believed."""
    return 1e12


class TestAgain:
    def test_nothing_is_listed_or_opened_twice(self, tmp_path: Path, olla: Ollama) -> None:
        for number in range(20):
            make(tmp_path / "r" / str(number % 5) / f"{number}.gguf")
        olla.manifest(f"{USUAL}/m/t", olla.blob(MODEL), olla.blob(b"{{}}", "template"))
        scanner = Scanner(Places(roots=(tmp_path / "r",), ollama=olla.folder), clock=later)
        first = scanner.scan()
        with counted() as calls:
            assert scanner.scan() == first
        assert calls == {"scandir": 0, "pread": 0}

    def test_only_what_changed_is(self, tmp_path: Path) -> None:
        for name in ("a/1", "a/2", "b/1", "c/1"):
            make(tmp_path / f"{name}.gguf")
        scanner = Scanner(root(tmp_path), clock=later)
        scanner.scan()
        make(tmp_path / "b" / "new.gguf")
        with counted() as calls:
            scanner.scan()
        assert calls == {"scandir": 1, "pread": 1}

    @pytest.mark.parametrize("clock", [later, lambda: 0.0], ids=["settled", "in the same tick"])
    def test_what_happens_to_files(self, tmp_path: Path, clock: Callable[[], float]) -> None:
        scanner = Scanner(root(tmp_path), clock=clock)

        def now() -> dict[str, Found]:
            scanned = scanner.scan()
            assert scanned == Scanner(root(tmp_path)).scan()
            return {found.id: found for found in scanned.found[:-1]}

        assert now() == {}
        path = make(tmp_path / "d" / "m.gguf", b"downloading")
        assert now()["m"].problem == "is no GGUF file"
        path.write_bytes(MODEL)  # in place: its folder does not change
        assert now()["m"].problem is None
        with path.open("ab") as file:
            file.write(b"grown")
        assert now()["m"].size_bytes == len(MODEL) + 5
        before = path.stat()
        path.write_bytes(MODEL.replace(b"model", b"adapt") + b"grown")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # of the same size and time
        assert now()["m"].kind == "unknown"
        os.utime(path, (7, 7))
        assert now()["m"].created == 7
        other = make(tmp_path / "d" / "other", gguf(pair("general.architecture", "clip")))
        other.rename(path)
        assert now()["m"].kind == "projector"
        path.rename(tmp_path / "moved.gguf")
        assert set(now()) == {"moved"}
        (tmp_path / "d" / "m.gguf").symlink_to(tmp_path / "moved.gguf")
        assert set(now()) == {"m"}  # by the order of paths, the link comes first
        make(tmp_path / "elsewhere" / "x.gguf")
        (tmp_path / "d").rename(tmp_path / "e")
        assert set(now()) == {"m", "x"}
        make(tmp_path / "s-00002-of-00002.gguf")
        assert now()["s"].missing == (1,)
        make(tmp_path / "s-00001-of-00002.gguf")
        assert now()["s"].missing == ()
        (tmp_path / "moved.gguf").unlink()
        (tmp_path / "elsewhere" / "x.gguf").unlink()
        assert set(now()) == {"s"}

    def test_changes_within_a_tick(self, tmp_path: Path) -> None:
        """On a file system whose clock stands still: nothing but the time of the look can tell."""
        still = mock.Mock(return_value=(1, 2, 3, 100 * 10**9, 100 * 10**9))
        with mock.patch.object(scan, "stamp", still), mock.patch.object(peek, "stamp", still):
            soon = Scanner(root(tmp_path), clock=lambda: 101.0)
            long_after = Scanner(root(tmp_path), clock=lambda: 110.0)
            for scanner in (soon, long_after):
                assert len(scanner.scan().found) == 1
            path = make(tmp_path / "m.gguf", b"<html>")
            assert soon.scan().found[0].problem == "is a web page, saved under a model's name"
            path.write_bytes(MODEL)
            assert soon.scan().found[0].problem is None
            assert len(long_after.scan().found) == 1  # which the clock has promised

    def test_a_link_whose_way_changes_elsewhere(self, tmp_path: Path) -> None:
        make(tmp_path / "r" / "v1" / "m.gguf")
        make(tmp_path / "out" / "m.gguf")
        (tmp_path / "current").symlink_to(tmp_path / "r" / "v1")
        (tmp_path / "r" / "link.gguf").symlink_to(tmp_path / "current" / "m.gguf")
        scanner = Scanner(root(tmp_path / "r"), clock=later)
        assert scanner.scan().found[0].id == "link"
        (tmp_path / "current").unlink()
        (tmp_path / "current").symlink_to(tmp_path / "out")
        scanned = scanner.scan()
        assert [found.id for found in scanned.found[:-1]] == ["m"]
        assert "leads out" in reasons(scanned)["link.gguf"]

    def test_a_folder_that_becomes_a_link(self, tmp_path: Path) -> None:
        make(tmp_path / "r" / "d" / "m.gguf")
        make(tmp_path / "out" / "m.gguf")
        scanner = Scanner(root(tmp_path / "r"), clock=later)
        assert len(scanner.scan().found) == 2
        (tmp_path / "r" / "d").rename(tmp_path / "d")
        (tmp_path / "r" / "d").symlink_to(tmp_path / "out")
        assert len(scanner.scan().found) == 1

    def test_what_is_gone_is_forgotten(self, tmp_path: Path) -> None:
        path = make(tmp_path / "d" / "m.gguf")
        scanner = Scanner(root(tmp_path), clock=later)
        scanner.scan()
        path.unlink()
        path.parent.rmdir()
        scanner.scan()
        kept = {**scanner._disk._known, **scanner._disk._before}
        assert not [key for key in kept if key[0].startswith(str(tmp_path / "d"))]

    def test_stopped_anywhere_and_gone_on(self, tmp_path: Path, olla: Ollama) -> None:
        for number in range(6):
            make(tmp_path / "r" / str(number % 3) / f"{number}.gguf")
        olla.manifest(f"{USUAL}/m/t", olla.blob(MODEL))
        places = Places(roots=(tmp_path / "r",), ollama=olla.folder)
        whole = Scanner(places).scan()
        scanner = Scanner(places, clock=later)
        for steps in itertools.count():
            calls = iter([False] * steps + [True] * 1000)
            try:
                assert scanner.scan(lambda calls=calls: next(calls)) == whole
                break
            except Cancelled:
                continue
        assert steps > 8
        with pytest.raises(Cancelled):
            scanner.scan(lambda: True)
        with counted() as calls_made:  # each look kept what the ones before had learned
            assert scanner.scan() == whole
        assert calls_made == {"scandir": 0, "pread": 0}

    def test_two_at_once_take_turns(self, tmp_path: Path) -> None:
        make(tmp_path / "m.gguf")
        scanner = Scanner(root(tmp_path))
        seen: list[Scan] = []
        threads = [threading.Thread(target=lambda: seen.append(scanner.scan())) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert seen == [seen[0]] * 8
