"""How long it takes to find the model files on a machine: at first, and again.

    python benchmarks/discovery.py [--files 10000] [--repeats 5]

Makes files in nested folders of a temporary folder, with headers such as real models have, and looks
for them. Cold is a scanner that knows nothing, with the folders in the kernel's cache; warm is one
that has seen all of it. The longest pause is the time between two questions whether to stop. Medians;
on a busy machine the processor's time says more than the clock's.
"""

from __future__ import annotations

import argparse
import statistics
import struct
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from shimmy_jupyter.models.scan import SETTLED
from shimmy_jupyter.models.sources import Places, Scan, Scanner

PER_FOLDER = 20
DEPTH = 4


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def header() -> bytes:
    """What a converter writes first, and then a vocabulary that is longer than what is read."""
    pairs = [
        (b"general.architecture", b"llama"),
        (b"general.type", b"model"),
        (b"general.name", b"A model"),
    ]
    keys = b"".join(text(key) + struct.pack("<I", 8) + text(value) for key, value in pairs)
    tokens = text(b"tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 32_000)
    return b"GGUF" + struct.pack("<IQQ", 3, 291, len(pairs) + 1) + keys + tokens + bytes(70_000)


def fill(top: Path, files: int) -> int:
    """Files in folders of `PER_FOLDER`, each folder `DEPTH` deep. Returns how many folders."""
    folders = {top}
    data = header()
    for number in range(files):
        folder = top
        place = number // PER_FOLDER
        for level in range(DEPTH):
            folder /= f"folder-{place // 8 ** (DEPTH - 1 - level)}"
            if folder not in folders:
                folder.mkdir()
                folders.add(folder)
        (folder / f"model-{number % 997}-Q4_K_M.gguf").write_bytes(data)
    return len(folders)


@dataclass
class Look:
    """Seconds: in all, of the processor, and the longest without a question."""

    seconds: float
    cpu: float
    pause: float
    scan: Scan


def look(scanner: Scanner) -> Look:
    longest = 0.0
    began = asked = time.perf_counter()

    def stop() -> bool:
        nonlocal longest, asked
        now = time.perf_counter()
        longest, asked = max(longest, now - asked), now
        return False

    cpu = time.process_time()
    scan = scanner.scan(stop)
    cpu, ended = time.process_time() - cpu, time.perf_counter()
    return Look(ended - began, cpu, max(longest, ended - asked), scan)


def report(name: str, looks: list[Look]) -> None:
    def median(values: Iterable[float]) -> float:
        return statistics.median(values)

    print(
        f"{name:21} {median(one.seconds for one in looks):6.3f} s"
        f" (up to {max(one.seconds for one in looks):.3f}),"
        f" processor {median(one.cpu for one in looks):6.3f} s,"
        f" longest pause {median(one.pause for one in looks) * 1000:6.1f} ms"
        f" (up to {max(one.pause for one in looks) * 1000:.1f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        top = Path(name).resolve()
        began = time.perf_counter()
        folders = fill(top, options.files)
        print(
            f"{options.files} files in {folders} folders, made in {time.perf_counter() - began:.1f} s"
        )
        time.sleep(SETTLED + 0.5)  # what has just been made is looked at again
        places = Places(roots=(top,))
        cold = [look(Scanner(places)) for _ in range(options.repeats)]
        scanner = Scanner(places)
        scanner.scan()
        warm = [look(scanner) for _ in range(options.repeats)]
        assert all(one.scan == cold[0].scan for one in cold + warm)
        assert len(cold[0].scan.found) == options.files + 1
        report("cold", cold)
        report("warm", warm)
        changed = []
        for number in range(options.repeats):
            (top / f"new-{number}.gguf").write_bytes(header())
            changed.append(look(scanner))
        report("warm, one file added", changed)


if __name__ == "__main__":
    main()
