"""What is offered from a folder, however odd the folder.

Cases: depth and order; parts; second files of a name; names with anything in them; links in, out, in
circles; what is no file; what cannot be looked at; roots that are not there.
"""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

from shimmy_jupyter.models.catalog import SELF_TEST, discover


def ids(*roots: Path) -> list[str]:
    found = discover(roots)
    assert found[-1].id == SELF_TEST
    assert found[-1].bundled
    names = [file.id for file in found]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9._:@-]{1,128}", name) for name in names)
    return names[:-1]


def make(path: Path, size: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)
    return path


def test_any_depth_by_name_first_root_first(tmp_path: Path) -> None:
    for name in ("one/b.gguf", "one/a/c.GGUF", "one/a.gguf", "two/z.gguf", "one/notes.txt"):
        make(tmp_path / name)
    assert ids(tmp_path / "two", tmp_path / "one") == ["z", "c", "a", "b"]
    assert ids() == ids(tmp_path / "not there", Path("~nosuchuser/x"), Path("nul\0l")) == []


def test_of_several_parts_the_first(tmp_path: Path) -> None:
    for i in (1, 2, 3):
        make(tmp_path / f"big-0000{i}-of-00003.gguf")
    assert ids(tmp_path) == ["big"]


def test_second_files_of_a_name(tmp_path: Path) -> None:
    for folder in "abc":
        make(tmp_path / folder / "m.gguf")
    first, *others = ids(tmp_path)
    assert first == "m"
    assert all(re.fullmatch(r"m@[0-9a-f]{8}", name) for name in others)
    make(tmp_path / "0" / f"{others[0]}.gguf")  # somebody's file is called as ours would be
    assert len(ids(tmp_path)) == 4
    make(tmp_path / "d" / "self-test.gguf")
    assert "self-test" not in ids(tmp_path)


def test_any_name_becomes_a_plain_one(tmp_path: Path) -> None:
    for name in (b"a b", b"\xff", b"\xfe", "é漢".encode(), b"n" * 200, b"<script>", b"a\nb"):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name + b".gguf")).touch()
    assert len(ids(tmp_path)) == 7


def test_links(tmp_path: Path) -> None:
    inside, outside = (
        make(tmp_path / "root" / "blobs" / "x.gguf"),
        make(tmp_path / "out" / "y.gguf"),
    )
    root = tmp_path / "root"
    (root / "evil.gguf").symlink_to(outside)
    (root / "self.gguf").symlink_to(root / "self.gguf")
    (root / "gone.gguf").symlink_to(root / "nothing")
    (root / "folder").symlink_to(tmp_path / "out")
    (root / "named.gguf").symlink_to(inside)
    make(tmp_path / "root-evil" / "z.gguf")
    assert ids(root) == ["x"]


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.gguf")
    (tmp_path / "folder.gguf").mkdir()
    (tmp_path / "zero.gguf").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as s:
        before = Path.cwd()
        os.chdir(tmp_path)  # a socket's name must be short
        s.bind("s.gguf")
        os.chdir(before)
        assert ids(tmp_path) == []


def test_deeper_than_anybody_goes(tmp_path: Path) -> None:
    before = Path.cwd()
    os.chdir(tmp_path)
    try:
        for _ in range(600):
            Path("d").mkdir()
            os.chdir("d")
    finally:
        os.chdir(before)
    make(tmp_path / "m.gguf")
    assert ids(tmp_path) == ["m"]
