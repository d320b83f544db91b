"""How much memory there is, from trees of files and under limits that the kernel enforces; and fits.

Cases, of what there is: no limit at all; the machine's is the least; a container that sees its own
cgroup as the root; the least of max and high, of each level; other groups'; max, garbage, nothing, 0,
and numbers that stand for no limit; what is used but unknown; more cache than is used; tmpfs and
locked pages; the first version, walked up, in a container without a namespace, and beside the second;
mounts with spaces, elsewhere, unsaid; groups out of sight; bytes that are no text; used beyond its
limit; an address space that is limited; what psutil says, lazily.
Of fits: each kind of model and cache by hand; falsy sizes; contexts that are no multiple of 256,
shorter than 256, unknown, longer than the model's; a pool smaller and larger than a context; a model
without a cache; a reserve of more than there is; sizes and caches that are none. For all: it fits
exactly if there is as much as it needs; more memory takes nothing away; the longest context fits and
the next does not.
Of messages: units, borders of units, differences too small to show, each setting's advice.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shimmy_jupyter.errors import InvalidValue
from shimmy_jupyter.models import memory
from shimmy_jupyter.models.gguf import GgufFacts, memory_needed
from shimmy_jupyter.models.memory import (
    Fit,
    available_memory,
    default_reserve,
    fit,
    total_memory,
    usable_context,
)

MB, GB = 10**6, 10**9
FREE, ALL = 24 * GB, 32 * GB
V2 = "35 24 0:30 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
V1 = "36 24 0:31 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"
CPU = "37 24 0:32 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu"
UNLIMITED = "9223372036854771712"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """24 of 32 GB are free, and the address space is not limited."""

    class Machine:
        available, total = FREE, ALL

    monkeypatch.setattr("psutil.virtual_memory", Machine)
    monkeypatch.setattr(resource, "getrlimit", lambda _which: (-1, -1))


pytestmark = pytest.mark.usefixtures("machine")


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def v2(root: Path, group: str, groups: dict[str, dict[str, object]], mounts: str = V2) -> Path:
    """`groups` are their files, without "memory.", by folder."""
    files = {"proc/self/cgroup": f"0::{group}\n", "proc/self/mountinfo": mounts + "\n"}
    for folder, texts in groups.items():
        files |= {f"sys/fs/cgroup{folder}/memory.{name}": f"{t}\n" for name, t in texts.items()}
    return tree(root, files)


def v1(root: Path, group: str, groups: dict[str, tuple[object, object]], mounts: str = V1) -> Path:
    """`groups` are limit and usage, by folder."""
    cgroup = f"5:cpu:/elsewhere\n4:memory:{group}\n0::/\n"
    files = {"proc/self/cgroup": cgroup, "proc/self/mountinfo": mounts + "\n"}
    for folder, (limit, used) in groups.items():
        files[f"sys/fs/cgroup/memory{folder}/memory.limit_in_bytes"] = f"{limit}\n"
        files[f"sys/fs/cgroup/memory{folder}/memory.usage_in_bytes"] = f"{used}\n"
    return tree(root, files)


class TestWhatThereIs:
    def test_without_limits_what_the_machine_has(self, tmp_path: Path) -> None:
        root = v2(tmp_path, "/a", {"/a": {"max": "max", "high": "max", "current": GB}})
        assert (available_memory(root), total_memory(root)) == (FREE, ALL)

    def test_a_limit_above_what_the_machine_has(self, tmp_path: Path) -> None:
        root = v2(tmp_path, "/a", {"/a": {"max": 100 * GB, "current": GB}})
        assert (available_memory(root), total_memory(root)) == (FREE, ALL)

    def test_a_container_sees_its_own_cgroup_as_the_root(self, tmp_path: Path) -> None:
        root = v2(tmp_path, "/", {"": {"max": 8 * GB, "current": 3 * GB}})
        assert (available_memory(root), total_memory(root)) == (5 * GB, 8 * GB)

    @pytest.mark.parametrize(
        ("most", "high", "expected"),
        [(8, 6, 5), (6, 8, 5), ("max", 4, 3), (4, "max", 3), ("max", "max", 24)],
    )
    def test_what_slows_a_group_down_limits_it_too(
        self, tmp_path: Path, most: int | str, high: int | str, expected: int
    ) -> None:
        texts = [text if isinstance(text, str) else text * GB for text in (most, high)]
        files: dict[str, object] = {"max": texts[0], "high": texts[1], "current": GB}
        assert available_memory(v2(tmp_path, "/", {"": files})) == expected * GB

    @pytest.mark.parametrize(
        ("own", "around", "outer", "expected"),
        [
            ((8, 1), (9, 5), (20, 6), 4),
            ((8, 1), (20, 5), (10, 7), 3),
            ((4, 1), (20, 5), (20, 6), 3),
        ],
    )
    def test_the_group_with_the_least_left_up_the_tree(
        self, tmp_path: Path, own: object, around: object, outer: object, expected: int
    ) -> None:
        levels = dict(zip(["/user/jupyter", "/user", ""], [own, around, outer], strict=True))
        files: dict[str, dict[str, object]] = {
            folder: {"max": pair[0] * GB, "current": pair[1] * GB}  # type: ignore[index]
            for folder, pair in levels.items()
        }
        assert available_memory(v2(tmp_path, "/user/jupyter", files)) == expected * GB

    def test_other_processes_cgroups_do_not_count(self, tmp_path: Path) -> None:
        full: dict[str, object] = {"max": 1, "current": 1}
        assert (
            available_memory(v2(tmp_path, "/a/b", {"/a/b/child": full, "/a/other": full})) == FREE
        )

    @pytest.mark.parametrize(
        "text", ["", "max", "-1", "a", "1 2", "1.5", "\0", "9" * 5000, str(1 << 60), UNLIMITED]
    )
    def test_what_is_no_limit(self, tmp_path: Path, text: str) -> None:
        files: dict[str, object] = {"max": text, "current": GB}
        root = v2(tmp_path, "/a", {"/a": files, "": {"max": 3 * GB, "current": GB}})
        assert available_memory(root) == 2 * GB

    def test_a_limit_of_nothing_is_one(self, tmp_path: Path) -> None:
        assert available_memory(v2(tmp_path, "/", {"": {"max": 0, "current": 0}})) == 0

    def test_the_largest_number_that_is_a_limit(self, tmp_path: Path) -> None:
        root = v2(tmp_path, "/", {"": {"max": (1 << 60) - 1, "current": (1 << 60) - 1 - GB}})
        assert available_memory(root) == GB

    def test_where_what_is_used_is_unknown_the_limit_holds(self, tmp_path: Path) -> None:
        assert available_memory(v2(tmp_path, "/", {"": {"max": 3 * GB}})) == 3 * GB

    def test_used_beyond_its_limit(self, tmp_path: Path) -> None:
        assert available_memory(v2(tmp_path, "/", {"": {"high": GB, "current": 2 * GB}})) == 0

    def test_what_the_kernel_keeps_of_files_can_be_had(self, tmp_path: Path) -> None:
        """But not tmpfs, which `file` counts, nor what is locked."""
        kept = (
            f"anon {GB}\nfile {9 * GB}\nshmem {2 * GB}\ninactive_anon {2 * GB}\nactive_anon {GB}\n"
            f"inactive_file {3 * GB}\nactive_file {GB}\nunevictable {3 * GB}\nslab_reclaimable 5\n"
            "total_inactive_file 7\nodd\nodd 1 2\n"
        )
        files: dict[str, object] = {"max": 12 * GB, "current": 11 * GB, "stat": kept}
        assert available_memory(v2(tmp_path, "/", {"": files})) == 5 * GB

    def test_never_more_than_the_limit(self, tmp_path: Path) -> None:
        """What is used and what is kept are not of the same moment."""
        files: dict[str, object] = {"max": 4 * GB, "current": GB, "stat": f"active_file {2 * GB}"}
        assert available_memory(v2(tmp_path, "/", {"": files})) == 4 * GB

    def test_each_level_has_its_own_cache(self, tmp_path: Path) -> None:
        own: dict[str, object] = {"max": 4 * GB, "current": 3 * GB, "stat": f"inactive_file {GB}"}
        outer: dict[str, object] = {
            "max": 6 * GB,
            "current": 5 * GB,
            "stat": f"active_file {GB // 2}",
        }
        assert available_memory(v2(tmp_path, "/a", {"/a": own, "": outer})) == 3 * GB // 2

    @pytest.mark.parametrize(
        "files",
        [
            {},
            {"proc/self/cgroup": "", "proc/self/mountinfo": ""},
            {
                "proc/self/cgroup": "nonsense\n::\n0:\n0::\n4:memory\n",
                "proc/self/mountinfo": "- - -\n",
            },
        ],
    )
    def test_where_nothing_is_known(self, tmp_path: Path, files: dict[str, str]) -> None:
        assert available_memory(tree(tmp_path, files)) == FREE

    def test_bytes_that_are_no_text(self, tmp_path: Path) -> None:
        root = v2(tmp_path, "/", {"": {"max": 0, "high": 3 * GB, "current": GB}})
        (root / "sys/fs/cgroup/memory.max").write_bytes(b"\xff\xfe 100000")
        assert available_memory(root) == 2 * GB

    def test_a_folder_where_a_file_should_be(self, tmp_path: Path) -> None:
        root = v2(tmp_path, "/", {"": {"max": 3 * GB}, "/memory.current": {"x": 1}})
        assert available_memory(root) == 3 * GB


class TestMounts:
    def test_the_second_version_elsewhere(self, tmp_path: Path) -> None:
        mounts = V2.replace("/sys/fs/cgroup ", "/sys/fs/cgroup/unified ")
        root = v2(tmp_path, "/a", {"/unified/a": {"max": GB}}, mounts)
        assert available_memory(root) == GB

    @pytest.mark.parametrize("folder", ["/a", "/unified/a"])
    def test_without_mountinfo_the_usual_places(self, tmp_path: Path, folder: str) -> None:
        assert available_memory(v2(tmp_path, "/a", {folder: {"max": GB}}, mounts="")) == GB

    def test_a_space_in_the_mount_point(self, tmp_path: Path) -> None:
        mounts = V2.replace("cgroup ", r"cgroup/my\040groups ", 1)
        assert available_memory(v2(tmp_path, "/", {"/my groups": {"max": GB}}, mounts)) == GB

    def test_a_group_out_of_sight(self, tmp_path: Path) -> None:
        root = v2(tmp_path / "in", "/../../other", {"": {"max": 2 * GB}})
        tree(tmp_path, {"other/memory.max": str(GB), "in/sys/other/memory.max": str(GB)})
        assert available_memory(root) == 2 * GB

    @pytest.mark.parametrize("mounts", [f"{CPU}\n{V1}", ""])
    def test_the_first_version_walks_up_as_well(self, tmp_path: Path, mounts: str) -> None:
        groups: dict[str, tuple[object, object]] = {
            "/a/b": (UNLIMITED, GB), "/a": (6 * GB, 2 * GB), "": (UNLIMITED, 5 * GB)
        }  # fmt: skip
        root = v1(tmp_path, "/a/b", groups, mounts)
        assert (available_memory(root), total_memory(root)) == (4 * GB, 6 * GB)

    def test_the_first_version_counts_the_cache_of_groups_below(self, tmp_path: Path) -> None:
        root = v1(tmp_path, "/a", {"/a": (6 * GB, 5 * GB)})
        stat = (
            "cache 1\ninactive_file 7\nactive_file 7\n"
            f"total_cache {4 * GB}\ntotal_inactive_file {GB}\ntotal_active_file {2 * GB}\n"
        )
        tree(root, {"sys/fs/cgroup/memory/a/memory.stat": stat})
        assert available_memory(root) == 4 * GB

    def test_the_first_version_in_a_container_without_a_namespace(self, tmp_path: Path) -> None:
        """The path is the host's, and the mount shows the container's own cgroup."""
        mounts = V1.replace("0:31 / ", "0:31 /docker/abc ")
        groups: dict[str, tuple[object, object]] = {"": (4 * GB, 0), "/inner": (2 * GB, 0)}
        assert available_memory(v1(tmp_path / "own", "/docker/abc", groups, mounts)) == 4 * GB
        inner = v1(tmp_path / "inner", "/docker/abc/inner", groups, mounts)
        assert available_memory(inner) == 2 * GB

    def test_both_versions_count(self, tmp_path: Path) -> None:
        mounts = f"{V1}\n{V2.replace('/sys/fs/cgroup ', '/sys/fs/cgroup/unified ')}"
        root = v1(tmp_path, "/a", {"/a": (4 * GB, GB)}, mounts)
        tree(root, {"sys/fs/cgroup/unified/memory.high": str(2 * GB)})
        assert available_memory(root) == 2 * GB

    def test_another_controllers_mount(self, tmp_path: Path) -> None:
        root = v1(tmp_path, "/a", {"/a": (4 * GB, 0)}, f"{CPU}\n{V1}")
        tree(root, {"sys/fs/cgroup/cpu/a/memory.limit_in_bytes": str(GB)})
        assert available_memory(root) == 4 * GB

    def test_another_controllers_group_of_that_name(self, tmp_path: Path) -> None:
        """`memory` is a controller's whole name, not a part of one."""
        root = tree(tmp_path, {
            "proc/self/cgroup": "4:memory2,xmemory:/a\n",
            "proc/self/mountinfo": f"{V1}\n",
            "sys/fs/cgroup/memory/a/memory.limit_in_bytes": str(GB),
        })  # fmt: skip
        assert available_memory(root) == FREE


class TestAddressSpace:
    def test_what_is_left_of_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            resource, "getrlimit", lambda which: ({resource.RLIMIT_AS: 9 * GB}.get(which, -1), -1)
        )
        monkeypatch.setattr(memory, "_taken", lambda: 2 * GB)
        assert (available_memory(tmp_path), total_memory(tmp_path)) == (7 * GB, 9 * GB)

    @pytest.mark.parametrize("limit", [-1, 1 << 60, (1 << 63) - 1])
    def test_none(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
        monkeypatch.setattr(resource, "getrlimit", lambda _which: (limit, limit))
        assert available_memory(tmp_path) == FREE

    def test_one_that_the_kernel_enforces(self) -> None:
        code = (
            "import resource, psutil\n"
            "from shimmy_jupyter.models.memory import available_memory, total_memory\n"
            f"resource.setrlimit(resource.RLIMIT_AS, ({GB}, {GB}))\n"
            "left, taken = available_memory(), psutil.Process().memory_info().vms\n"
            f"print(total_memory(), {GB} - taken - left)\n"
        )
        total, difference = run(code).split()
        assert int(total) <= GB
        if int(total) == GB:  # else this test runs in a cgroup with less
            assert abs(int(difference)) < 50 * MB


def run(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.stderr == ""
    return done.stdout


def test_psutil_is_imported_when_it_is_needed() -> None:
    code = "import sys, shimmy_jupyter.models.memory; print('psutil' in sys.modules)"
    assert run(code) == "False\n"


LIMIT = 512 << 20
CODE = f"""
import os, sys
from shimmy_jupyter.models.memory import available_memory, total_memory
open(sys.argv[1], "w").write(str(os.getpid()))
at_first = available_memory()
held = b"x" * {100 << 20}
with_memory = available_memory()
with open(sys.argv[2], "wb") as file:
    file.write(held)
    file.flush()
    os.fsync(file.fileno())
print(total_memory(), at_first, with_memory, available_memory())
"""


@pytest.fixture
def group(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A cgroup of `LIMIT` bytes that is really enforced."""
    folder, name = {
        "v1": (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
        "v2": (Path("/sys/fs/cgroup"), "memory.max"),
    }[request.param]
    there = folder / ("cgroup.subtree_control" if request.param == "v2" else name)
    if not there.exists() or not os.access(folder, os.W_OK):
        pytest.skip(f"needs a writable cgroup {request.param} hierarchy with memory (root)")
    made = folder / f"shimmy-test-{os.getpid()}"
    try:
        made.mkdir()
        (made / name).write_text(str(LIMIT))
    except OSError as e:
        if made.is_dir():
            made.rmdir()
        pytest.skip(f"this machine allows no limit of memory: {e}")
    yield made
    made.rmdir()


@pytest.mark.parametrize("group", ["v1", "v2"], indirect=True)
def test_a_limit_that_the_kernel_enforces(group: Path, tmp_path: Path) -> None:
    printed = run(CODE, str(group / "cgroup.procs"), str(tmp_path / "cached"))
    total, at_first, with_memory, with_cache = map(int, printed.split())
    assert total == LIMIT
    assert LIMIT - (100 << 20) < at_first <= LIMIT
    assert (80 << 20) < at_first - with_memory < (120 << 20)
    # What was written stays in the kernel's cache, and could be had.
    assert abs(with_memory - with_cache) < (20 << 20)


FACTS = GgufFacts(
    kind="model",
    architecture="llama",
    name="A model",
    parameters=3 * GB,
    size_bytes=2 * GB,
    quantisation="Q4_K",
    file_type=15,
    context_size=32_768,
    layers=28,
    embedding_width=3072,
    heads=24,
    kv_heads=8,
    key_length=128,
    value_length=128,
    kv_bytes_per_token=2 * 28 * 8 * 256,
    state_bytes=0,
    vocabulary=128_256,
    tokenizer="gpt2",
    chat_template=None,
    chat_template_sha256=None,
    split=None,
    adapter=None,
)
BASE = 2 * GB + (64 << 20) + 512 * 4 * (12 * 3072 + 128_256)
PER_TOKEN = 114_688


def fits(
    facts: GgufFacts = FACTS,
    context_size: int = 0,
    kv_tokens: int = 0,
    kv_type: str = "f16",
    available: int = 100 * GB,
    reserve: int = 0,
) -> Fit:
    return fit(
        facts,
        context_size=context_size,
        kv_tokens=kv_tokens,
        kv_type=kv_type,
        available=available,
        reserve=reserve,
    )


@pytest.mark.parametrize(
    ("trained", "context_size", "kv_tokens", "usable"),
    [
        (1024, 0, 0, 1024),
        (131_072, 0, 0, 8192),
        (131_072, 32_768, 0, 32_768),
        (1024, 128, 0, 128),
        (1024, 0, 300, 512),  # the pool is in whole blocks
        (1024, 300, 256, 256),
        (1024, 128, 16_384, 128),
    ],
)
def test_usable_context(trained: int, context_size: int, kv_tokens: int, usable: int) -> None:
    assert usable_context(trained, context_size=context_size, kv_tokens=kv_tokens) == usable


class TestNeeds:
    @pytest.mark.parametrize(
        ("context_size", "kv_tokens", "cells"),
        [
            (0, 0, 8192),  # the model's own, up to that
            (32_768, 0, 32_768),
            (1, 0, 256),
            (256, 0, 256),
            (257, 0, 512),
            (40_000, 0, 40_192),  # refused when it is loaded, with a reason
            (0, 16_384, 16_384),
            (0, 1000, 1024),  # a context is never longer than the pool
            (8192, 4096, 4096),
            (2048, 16_384, 16_384),
        ],
    )
    def test_the_cache(self, context_size: int, kv_tokens: int, cells: int) -> None:
        one = fits(context_size=context_size, kv_tokens=kv_tokens)
        assert one.needed == BASE + cells * PER_TOKEN

    def test_a_state(self) -> None:
        assert fits(replace(FACTS, state_bytes=1000)).needed == fits().needed + 1000

    @pytest.mark.parametrize(
        ("kv_type", "bytes_"), [("f16", 2), ("q8_0", Fraction(34, 32)), ("q4_0", Fraction(18, 32))]
    )
    def test_how_the_cache_holds_numbers(self, kv_type: str, bytes_: Fraction) -> None:
        one = fits(kv_type=kv_type, context_size=8192)
        assert one.needed == BASE + 8192 * (PER_TOKEN // 2) * bytes_

    def test_the_smallest_cache_is_whole_blocks(self) -> None:
        facts = replace(FACTS, kv_bytes_per_token=2)
        for kv_type, block in (("q8_0", 34), ("q4_0", 18)):
            cache = fits(facts, 1, kv_type=kv_type).needed - memory_needed(facts, 0)
            assert cache == 256 // 32 * block

    def test_as_the_header_says_in_f16(self) -> None:
        assert fits(context_size=4096).needed == memory_needed(FACTS, 4096)

    def test_a_model_that_knows_less(self) -> None:
        assert fits(replace(FACTS, context_size=512)).needed == BASE + 512 * PER_TOKEN
        assert fits(replace(FACTS, context_size=100)).needed == BASE + 256 * PER_TOKEN

    def test_a_model_that_does_not_say(self) -> None:
        one = fits(replace(FACTS, context_size=0))
        assert (one.needed, one.max_context) == (BASE + 8192 * PER_TOKEN, 8192)

    def test_vectors_need_no_cache(self) -> None:
        facts = replace(FACTS, kind="embedding", context_size=512)
        one = fits(facts, kv_tokens=16_384, available=BASE)
        assert (one.needed, one.ok, one.max_context) == (BASE, True, 512)
        assert fits(facts, available=BASE - 1) == Fit(BASE, BASE - 1, ok=False, max_context=0)

    @pytest.mark.parametrize("kind", ["adapter", "projector"])
    def test_what_comes_beside_a_model_needs_its_size(self, kind: str) -> None:
        facts = replace(FACTS, kind=kind, size_bytes=300 * MB)
        assert fits(facts, available=300 * MB) == Fit(300 * MB, 300 * MB, ok=True, max_context=0)
        assert not fits(facts, available=300 * MB - 1).ok

    def test_a_model_without_a_cache(self) -> None:
        facts = replace(FACTS, kv_bytes_per_token=0)
        assert fits(facts, available=BASE) == Fit(BASE, BASE, ok=True, max_context=32_768)
        assert fits(facts, available=BASE - 1).max_context == 0

    @pytest.mark.parametrize("kv_type", ["", "F16", "q5_0"])
    def test_a_cache_that_is_none(self, kv_type: str) -> None:
        with pytest.raises(InvalidValue, match="none of f16, q8_0, q4_0") as caught:
            fits(kv_type=kv_type)
        assert caught.value.param == "kv_type"

    @pytest.mark.parametrize("name", ["context_size", "kv_tokens"])
    def test_sizes_that_are_none(self, name: str) -> None:
        with pytest.raises(InvalidValue, match="-1 is less than 0") as caught:
            fits(**{name: -1})  # type: ignore[arg-type]
        assert caught.value.param == name


class TestFits:
    def test_to_the_byte(self) -> None:
        needed = BASE + 8192 * PER_TOKEN
        assert fits(available=needed + GB, reserve=GB).ok
        assert not fits(available=needed + GB - 1, reserve=GB).ok

    def test_a_reserve_of_more_than_there_is(self) -> None:
        one = fits(available=GB, reserve=2 * GB)
        assert (one.available, one.ok, one.max_context) == (0, False, 0)

    def test_no_reserve(self) -> None:
        assert fits(available=5 * GB).available == 5 * GB

    @pytest.mark.parametrize(
        ("extra", "expected"),
        [
            (-1, 0),
            (0, 0),
            (256 * PER_TOKEN - 1, 0),
            (256 * PER_TOKEN, 256),
            (768 * PER_TOKEN, 768),
            (768 * PER_TOKEN + 1, 768),
            (1024 * PER_TOKEN - 1, 768),
            (1024 * PER_TOKEN, 1000),
            (GB, 1000),
        ],
    )
    def test_the_longest_context_is_the_models_own_at_most(self, extra: int, expected: int) -> None:
        facts = replace(FACTS, context_size=1000)
        assert fits(facts, available=BASE + extra).max_context == expected

    def test_a_model_that_knows_less_than_the_shortest_context(self) -> None:
        facts = replace(FACTS, context_size=100)
        assert fits(facts, available=BASE + 256 * PER_TOKEN).max_context == 100
        assert fits(facts, available=BASE + 256 * PER_TOKEN - 1).max_context == 0

    def test_the_longest_context_is_not_the_one_asked_for(self) -> None:
        room = BASE + 2048 * PER_TOKEN
        for asked in ({"context_size": 512}, {"context_size": 9000}, {"kv_tokens": 512}):
            assert fits(available=room, **asked).max_context == 2048  # type: ignore[arg-type]


facts_of_models = st.builds(
    lambda kind, size, context, per_token, width, words: replace(
        FACTS,
        kind=kind,
        size_bytes=size,
        context_size=context,
        kv_bytes_per_token=per_token,
        embedding_width=width,
        vocabulary=words,
    ),
    st.sampled_from(["model", "embedding", "adapter", "projector"]),
    st.integers(1, 1 << 34),
    st.one_of(st.integers(0, 600), st.integers(0, 1 << 20)),
    st.one_of(st.just(0), st.integers(1, 10), st.integers(1, 1 << 20)),
    st.integers(0, 1 << 14),
    st.integers(0, 1 << 18),
)
wishes = st.fixed_dictionaries(
    {
        "context_size": st.one_of(st.just(0), st.integers(1, 1 << 18)),
        "kv_tokens": st.one_of(st.just(0), st.integers(1, 1 << 18)),
        "kv_type": st.sampled_from(["f16", "q8_0", "q4_0"]),
        "reserve": st.integers(0, 1 << 33),
    }
)
memories = st.integers(0, 1 << 37)


@given(facts_of_models, wishes, memories)
def test_it_fits_if_there_is_as_much_as_it_needs(
    facts: GgufFacts, wish: dict[str, Any], have: int
) -> None:
    one = fits(facts, available=have, **wish)
    assert one.ok == (one.needed <= have - wish["reserve"])
    edge = one.needed + wish["reserve"]
    assert fits(facts, available=edge, **wish).ok
    assert not fits(facts, available=edge - 1, **wish).ok


@given(facts_of_models, wishes, memories, memories)
def test_more_memory_takes_nothing_away(
    facts: GgufFacts, wish: dict[str, Any], one: int, two: int
) -> None:
    less, more = (fits(facts, available=have, **wish) for have in sorted((one, two)))
    assert less.ok <= more.ok
    assert less.max_context <= more.max_context
    assert less.needed == more.needed


@given(facts_of_models, wishes, st.integers(-10, 1 << 20), st.integers(0, 300))
def test_the_longest_context_fits_and_the_next_does_not(
    facts: GgufFacts, wish: dict[str, Any], blocks: int, odd: int
) -> None:
    # Room for so many bytes of cache, of the size that makes it interesting.
    have = wish["reserve"] + memory_needed(facts, 0) + blocks * facts.kv_bytes_per_token + odd
    wish |= {"kv_tokens": 0, "context_size": 0}
    longest = fits(facts, available=have, **wish).max_context
    if facts.kind in {"adapter", "projector"}:
        assert longest == 0
        return
    own = facts.context_size or 8192
    assert longest == own or longest % 256 == 0
    assert longest <= own
    if longest:
        assert fits(facts, available=have, **wish | {"context_size": longest}).ok
    if longest < own:
        following = min(own, longest + 256)
        assert not fits(facts, available=have, **wish | {"context_size": following}).ok


@given(facts_of_models, wishes, memories)
def test_advice_that_is_followed_helps(facts: GgufFacts, wish: dict[str, Any], have: int) -> None:
    one = fits(facts, available=have, **wish)
    if one.ok or not one.max_context:
        assert "would fit" not in one.message
        return
    name = "kv_tokens" if wish["kv_tokens"] else "context_size"
    assert name.partition("_")[0] in one.message
    assert fits(facts, available=have, **wish | {name: one.max_context}).ok


class TestMessages:
    @pytest.mark.parametrize(
        ("one", "expected"),
        [
            (
                Fit(6_090 * MB, 4_870 * MB, ok=False, max_context=2048),
                "needs 6.1 GB, 4.8 GB are available; with a context of 2048 tokens it would fit",
            ),
            (
                Fit(6_090 * MB, 4_870 * MB, ok=False, max_context=2048, kv_tokens=9000),
                "needs 6.1 GB, 4.8 GB are available; with kv_tokens of 2048 it would fit",
            ),
            (
                Fit(6_090 * MB, 4_870 * MB, ok=False, max_context=0),
                "needs 6.1 GB, 4.8 GB are available",
            ),
            (
                Fit(2_010 * MB, 64 * GB, ok=True, max_context=8192),
                "needs 2.1 GB, 64.0 GB are available",
            ),
            (Fit(20_000, GB, ok=True, max_context=0), "needs 1 MB, 1.0 GB are available"),
            (Fit(640 * MB, 0, ok=False, max_context=0), "needs 640 MB, 0 MB are available"),
            (Fit(GB, 999_999_999, ok=False, max_context=0), "needs 1.0 GB, 999 MB are available"),
            (Fit(999_999_999, GB, ok=True, max_context=0), "needs 1.0 GB, 1.0 GB are available"),
            # Too little to show, and nevertheless too little.
            (
                Fit(4 * GB + 1, 4 * GB, ok=False, max_context=0),
                "needs 4.1 GB, 4.0 GB are available",
            ),
            (Fit(4 * GB, 4 * GB + 1, ok=True, max_context=0), "needs 4.0 GB, 4.1 GB are available"),
        ],
    )
    def test_texts(self, one: Fit, expected: str) -> None:
        assert one.message == expected

    @given(st.integers(0, 1 << 50), st.integers(0, 1 << 50))
    def test_they_never_contradict_themselves(self, needed: int, available: int) -> None:
        ok = needed <= available
        words = Fit(needed, available, ok=ok, max_context=0).message.split()
        units = {"MB": MB, "GB,": GB, "GB": GB, "MB,": MB}
        shown = Fraction(words[1]) * units[words[2]], Fraction(words[3]) * units[words[4]]
        assert (shown[0] <= shown[1]) == ok
        assert "0.0" not in words

    def test_json(self) -> None:
        one = Fit(2, 1, ok=False, max_context=256, kv_tokens=9)
        assert one.to_json() == {"needed": 2, "available": 1, "ok": False, "max_context": 256}


class TestReserve:
    @pytest.mark.parametrize(
        ("total", "expected"),
        [
            (0, 512 << 20),
            (1 << 30, 512 << 20),
            (5 << 30, 512 << 20),
            (10 << 30, 1 << 30),
            (40 << 30, 4 << 30),
            (1 << 40, 4 << 30),
        ],
    )
    def test_a_tenth_within_bounds(self, total: int, expected: int) -> None:
        assert default_reserve(total) == expected
