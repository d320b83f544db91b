"""CPU quotas as containers have them, from trees of files, and one that the kernel enforces."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shimmy_jupyter.engine import processors
from shimmy_jupyter.engine.processors import affinity, available, quota

V2 = "35 24 0:30 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
V1 = "36 24 0:31 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct"
SETS = "37 24 0:32 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset"


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def v2(root: Path, group: str, limits: dict[str, str], mounts: str = V2) -> Path:
    """`limits` are the texts of `cpu.max`, by folder."""
    return tree(
        root,
        {"proc/self/cgroup": f"0::{group}\n", "proc/self/mountinfo": mounts + "\n"}
        | {f"sys/fs/cgroup{folder}/cpu.max": text for folder, text in limits.items()},
    )


def v1(
    root: Path,
    group: str,
    limits: dict[str, tuple[str, str]],
    mounts: str = V1,
    at: str = "cpu,cpuacct",
) -> Path:
    """`limits` are quota and period, by folder."""
    files = {
        "proc/self/cgroup": f"5:cpuset:/elsewhere\n4:cpu,cpuacct:{group}\n0::/\n",
        "proc/self/mountinfo": mounts + "\n",
    }
    for folder, (share, period) in limits.items():
        files[f"sys/fs/cgroup/{at}{folder}/cpu.cfs_quota_us"] = share
        files[f"sys/fs/cgroup/{at}{folder}/cpu.cfs_period_us"] = period
    return tree(root, files)


def test_a_container_sees_its_own_cgroup_as_the_root(tmp_path: Path) -> None:
    assert quota(v2(tmp_path, "/", {"": "200000 100000\n"})) == 2


@pytest.mark.parametrize(
    ("own", "around", "outer", "expected"),
    [
        ("400000 100000", "200000 100000", "300000 100000", 2),
        ("150000 100000", "max 100000", "max 100000", 1.5),
        ("max 100000", "max 100000", "100000 100000", 1),
        ("max 100000", "max 100000", "max 100000", None),
    ],
)
def test_the_smallest_quota_up_the_tree_wins(
    tmp_path: Path, own: str, around: str, outer: str, expected: float | None
) -> None:
    root = v2(tmp_path, "/user/jupyter", {"/user/jupyter": own, "/user": around, "": outer})
    assert quota(root) == expected


def test_other_processes_cgroups_do_not_count(tmp_path: Path) -> None:
    root = v2(tmp_path, "/a/b", {"/a/b/child": "10000 100000", "/a/other": "10000 100000"})
    assert quota(root) is None


@pytest.mark.parametrize(
    "text",
    ["", "max", "100000", "0 100000", "-1 100000", "100000 0", "a b", "1 2 3", "1.5 1", "\0"],
)
def test_garbage_is_no_quota(tmp_path: Path, text: str) -> None:
    root = v2(tmp_path, "/a", {"/a": text, "": "300000 100000"})
    assert quota(root) == 3


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"proc/self/cgroup": "", "proc/self/mountinfo": ""},
        {"proc/self/cgroup": "nonsense\n::\n0:\n0::\n4:cpu\n", "proc/self/mountinfo": "- - -\nx\n"},
    ],
)
def test_where_nothing_is_known_there_is_no_quota(tmp_path: Path, files: dict[str, str]) -> None:
    root = tree(tmp_path, files)
    assert quota(root) is None
    assert available(root) == affinity() >= 1


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    root = v2(tmp_path, "/", {"": ""})
    (root / "sys/fs/cgroup/cpu.max").write_bytes(b"\xff\xfe 100000")
    assert quota(root) is None


def test_a_hybrid_tree_whose_second_version_is_elsewhere(tmp_path: Path) -> None:
    mounts = V2.replace("/sys/fs/cgroup ", "/sys/fs/cgroup/unified ")
    root = v2(tmp_path, "/a", {"/unified/a": "250000 100000"}, mounts)
    assert quota(root) == 2.5


def test_without_mountinfo_the_usual_places_are_looked_at(tmp_path: Path) -> None:
    assert quota(v2(tmp_path, "/a", {"/a": "200000 100000"}, mounts="")) == 2


@pytest.mark.parametrize("at", ["cpu", "cpu,cpuacct"])
def test_the_first_version_without_mountinfo(tmp_path: Path, at: str) -> None:
    assert quota(v1(tmp_path, "/a", {"/a": ("300000", "100000")}, mounts="", at=at)) == 3


def test_the_first_version_walks_up_as_well(tmp_path: Path) -> None:
    limits = {"/a/b": ("-1", "100000"), "/a": ("75000", "50000"), "": ("-1", "100000")}
    assert quota(v1(tmp_path, "/a/b", limits, f"{SETS}\n{V1}")) == 1.5


def test_the_first_version_in_a_container_without_a_namespace(tmp_path: Path) -> None:
    """The path is the host's, and the mount shows the container's own cgroup."""
    mounts = V1.replace("0:31 / ", "0:31 /docker/abc ")
    limits = {"": ("400000", "100000"), "/inner": ("200000", "100000")}
    assert quota(v1(tmp_path / "own", "/docker/abc", limits, mounts)) == 4
    assert quota(v1(tmp_path / "inner", "/docker/abc/inner", limits, mounts)) == 2
    assert quota(v1(tmp_path / "unsaid", "/docker/abc", limits)) == 4


def test_a_cgroup_out_of_sight(tmp_path: Path) -> None:
    root = v2(tmp_path / "in", "/../../other", {"": "200000 100000"})
    tree(tmp_path, {"other/cpu.max": "100000 100000"})
    assert quota(root) == 2


def test_a_mount_point_with_a_space(tmp_path: Path) -> None:
    root = v2(tmp_path, "/", {"/my groups": "200000 100000"}, V2.replace("cgroup ", r"cgroup/my\040groups ", 1))  # fmt: skip
    assert quota(root) == 2


@pytest.mark.parametrize(
    ("share", "processors_", "expected"),
    [(50_000, 8, 1), (100_000, 8, 1), (150_000, 8, 1), (399_999, 8, 3), (1_600_000, 8, 8)],
)
def test_a_fraction_rounds_down_but_not_to_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: int, processors_: int, expected: int
) -> None:
    monkeypatch.setattr(processors, "affinity", lambda: processors_)
    assert available(v2(tmp_path, "/", {"": f"{share} 100000"})) == expected


def test_affinity_where_the_system_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert affinity() == os.cpu_count()


CODE = """
import os, sys
from pathlib import Path
open(sys.argv[1], "w").write(str(os.getpid()))
from shimmy_jupyter.engine.processors import available, quota
print(quota(Path("/")), available())
"""


@pytest.mark.parametrize(("share", "expected"), [(150_000, "1.5 1"), (50_000, "0.5 1")])
def test_a_quota_that_the_kernel_enforces(share: int, expected: str) -> None:
    folder = Path("/sys/fs/cgroup/cpu")
    if not (folder / "cpu.cfs_quota_us").exists() or not os.access(folder, os.W_OK):
        pytest.skip("needs a writable cgroup v1 hierarchy with the cpu controller (root)")
    group = folder / f"shimmy-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / "cpu.cfs_quota_us").write_text(str(share))
    except OSError as e:
        if group.is_dir():
            group.rmdir()
        pytest.skip(f"this machine allows no CPU quota: {e}")
    try:
        done = subprocess.run(
            [sys.executable, "-c", CODE, group / "cgroup.procs"],
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
    finally:
        group.rmdir()
    assert (done.stdout.strip(), done.stderr) == (expected, "")
