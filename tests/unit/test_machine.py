"""What the engine that is installed here is, and the processor.

Cases: this machine; an engine that is not installed; installed twice alike, rebuilt, replaced by hand, its
libraries gone, without digests, without libraries; processors of x86 and ARM, of several kinds, that say nothing.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from shimmy_jupyter.models.machine import NOWHERE, Machine, this_machine

X86 = """processor\t: 0
vendor_id\t: Abacus
model name\t: Abacus 9
flags\t\t: fpu avx2 fma sse
bogus line

processor\t: 1
model name\t: Abacus 9
flags\t\t: fpu avx2 fma
"""
ARM = """processor\t: 0
Features\t: fp asimd asimddp
CPU implementer\t: 0x41
CPU part\t: 0xd0c
processor\t: 1
Features\t: fp asimd
CPU implementer\t: 0x41
CPU part\t: 0xd05
"""
NONE = Path("/nonexistent/cpuinfo")


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "m64")
    monkeypatch.setattr("platform.processor", lambda: "")


def install(folder: Path, record: str, **files: bytes) -> Machine:
    """A distribution of the name `engine`, and what is seen of it."""
    info = folder / "engine-1.2.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: engine\nVersion: 1.2\n")
    (info / "RECORD").write_text(record)
    for name, data in files.items():
        (folder / f"{name}.so").write_bytes(data)
    return seen(folder)


def seen(folder: Path) -> Machine:
    finder = importlib.metadata.MetadataPathFinder
    context = importlib.metadata.DistributionFinder.Context(name="engine", path=[str(folder)])
    (found,) = finder.find_distributions(context)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.metadata, "distribution", lambda name: found)
        return this_machine("engine", NONE)


RECORD = "a.so,sha256=AAA,3\nb.so,sha256=BBB,3\npure.py,sha256=CCC,9\n"


def test_this_one() -> None:
    found = this_machine()
    assert found.engine == importlib.metadata.version("llama-cpp-python")
    assert found.build is not None
    assert len(found.build) == 64
    assert found == this_machine()


def test_none_installed() -> None:
    found = this_machine("no-such-distribution", NONE)
    assert (found.engine, found.build) == ("", None)
    assert Machine("", None, None, ()) == NOWHERE


class TestBuilds:
    def test_two_installations_of_one(self, tmp_path: Path) -> None:
        one = install(tmp_path / "one", RECORD, a=b"xxx", b=b"yyy")
        other = install(tmp_path / "other", RECORD, b=b"yyy", a=b"xxx")
        assert one.engine == "1.2"
        assert one.build is not None
        assert one == other

    def test_what_is_no_library_does_not_count(self, tmp_path: Path) -> None:
        one = install(tmp_path / "one", RECORD, a=b"xxx", b=b"yyy")
        record = RECORD.replace("CCC", "DDD")
        assert install(tmp_path / "other", record, a=b"xxx", b=b"yyy") == one
        assert install(tmp_path / "pure", "pure.py,sha256=CCC,9\n").build is None

    @pytest.mark.parametrize(
        "record", [RECORD.replace("BBB", "B2"), RECORD.replace("b.so", "c.so"), RECORD[:18]]
    )
    def test_another_one(self, tmp_path: Path, record: str) -> None:
        one = install(tmp_path / "one", RECORD, a=b"xxx", b=b"yyy", c=b"yyy")
        other = install(tmp_path / "other", record, a=b"xxx", b=b"yyy", c=b"yyy")
        assert None not in (one.build, other.build)
        assert one.build != other.build

    def test_replaced_by_hand_and_gone(self, tmp_path: Path) -> None:
        one = install(tmp_path, RECORD, a=b"xxx", b=b"yyy")
        (tmp_path / "b.so").write_bytes(b"yyyy")
        two = seen(tmp_path)
        (tmp_path / "b.so").unlink()
        three = seen(tmp_path)
        assert len({one.build, two.build, three.build}) == 3

    def test_without_digests(self, tmp_path: Path) -> None:
        found = install(tmp_path, "a.so,,\nb.so,,\n", a=b"x", b=b"y")
        assert found.build is not None


class TestProcessors:
    def found(self, folder: Path, text: str) -> tuple[str | None, tuple[str, ...]]:
        path = folder / "cpuinfo"
        path.write_text(text)
        found = this_machine("no-such-distribution", path)
        return found.cpu, found.cpu_features

    def test_x86(self, tmp_path: Path) -> None:
        assert self.found(tmp_path, X86) == ("m64 Abacus 9", ("avx2", "fma"))

    def test_arm_with_two_kinds(self, tmp_path: Path) -> None:
        name = "m64 implementer 0x41, part 0xd05, part 0xd0c"
        assert self.found(tmp_path, ARM) == (name, ("asimd", "asimddp"))

    def test_that_says_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.found(tmp_path, "") == ("m64", ())
        monkeypatch.setattr("platform.processor", lambda: "arm")
        assert this_machine("no-such-distribution", NONE).cpu == "m64 arm"
        monkeypatch.setattr("platform.processor", lambda: "")
        monkeypatch.setattr("platform.machine", lambda: "")
        assert this_machine("no-such-distribution", NONE).cpu is None

    def test_that_says_too_much(self, tmp_path: Path) -> None:
        name, _ = self.found(tmp_path, f"model name: {'x' * 5000}\n")
        assert name is not None
        assert len(name) == 200
