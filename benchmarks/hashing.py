"""How long the SHA-256 of a model's file takes, and what it costs to have it remembered.

    python benchmarks/hashing.py [--size 4.0] [--folder /tmp]

Makes a file of so many GB, without holes, in a temporary folder, and hashes it: from the disk, from the
kernel's cache, and with `sha256sum` where there is one. Then asks for what is remembered, in this
process and as after a restart. On a busy machine the processor's time says more than the clock's.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from shimmy_jupyter.models.hashes import Hashes
from shimmy_jupyter.models.scan import SETTLED

BLOCK = 1 << 20
LOOKS = 1000


def fill(path: Path, size: int) -> None:
    """Each block is another, so that no file system stores them once."""
    block = bytearray(random.Random(0).randbytes(BLOCK))
    with path.open("wb") as file:
        for number in range(-(-size // BLOCK)):
            block[:8] = number.to_bytes(8, "little")
            file.write(block[: size - number * BLOCK])
        file.flush()
        os.fsync(file.fileno())


def drop(path: Path) -> bool:
    """Has the kernel forget the file's pages, where it can be asked to."""
    if not hasattr(os, "posix_fadvise"):
        return False
    handle = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)
    return True


def line(done: int, total: int) -> None:
    end = "\n" if done == total else ""
    print(f"\r  {done / 1e9:6.2f} of {total / 1e9:.2f} GB", end=end, flush=True)


def timed(name: str, size: int, work: Callable[[], object]) -> float:
    """Seconds; of the processor, those of programs that were run too."""
    before, began = os.times(), time.perf_counter()
    work()
    seconds, after = time.perf_counter() - began, os.times()
    used = sum(after[:4]) - sum(before[:4])
    print(f"{name:28} {seconds:8.3f} s {size / seconds / 1e6:8.0f} MB/s, processor {used:6.3f} s")
    return seconds


def looked(name: str, hashed: float, work: Callable[[], object]) -> None:
    began = time.perf_counter()
    for _ in range(LOOKS):
        assert work()
    seconds = (time.perf_counter() - began) / LOOKS
    print(f"{name:28} {seconds * 1e6:8.1f} µs, {hashed / seconds:,.0f} times faster")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=float, default=4.0, help="GB")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    options = parser.parse_args()
    size = int(options.size * 1e9)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        if shutil.disk_usage(name).free < size + (1 << 30):
            parser.error(f"the disk has less than {options.size} GB free, and one to spare")
        path, folder = Path(name).resolve() / "model.gguf", Path(name) / "digests"
        fill(path, size)
        assert path.stat().st_blocks * 512 >= size, "the file has holes, or is compressed"
        time.sleep(SETTLED + 0.5)  # what has just been made would not be remembered
        hashes, again = Hashes(folder), Hashes(None, always=True)
        cold = drop(path)
        timed(
            "from the disk" if cold else "at first",
            size,
            lambda: hashes.sha256(path, progress=line),
        )
        hashed = timed("from the kernel's cache", size, lambda: again.sha256(path))
        if program := shutil.which("sha256sum"):
            command = [program, str(path)]
            other = timed(
                "sha256sum, from the cache",
                size,
                lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL),
            )
            print(f"  {hashed / other:.2f} times as long as sha256sum")
        looked("known", hashed, lambda: hashes.known(path))
        looked("sha256, when it is known", hashed, lambda: hashes.sha256(path))
        looked("known, as after a restart", hashed, lambda: Hashes(folder).known(path))


if __name__ == "__main__":
    main()
