"""Feed the reader and the validator of GGUF files what somebody might have made of one.

    python scripts/fuzz_gguf.py [--seconds 60] [--seed N] [--guided] [--keep FOLDER]

Nothing but `GgufError` may come out, nothing may take more than the stated memory. With `--guided`
(atheris, outside this project's own tests) inputs that reach new code are kept and mutated further;
without it they are mutants of valid files, and mutants of these. What fails is kept in a folder.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import resource
import struct
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mutated_gguf
import random_gguf

ROOM = 1 << 20
"""Bytes after a header, so that its tensors are inside the file."""
BOUND = 128 << 20
_MOST, _LARGEST = 300, 1 << 16
"""Of what is mutated further: how many, and of how many bytes."""
_NOT_READ = (ValueError, IndexError, KeyError, OverflowError, RuntimeError, struct.error)
"""What the generator makes of mutants that it cannot read itself."""


@dataclass
class Report:
    """`growth` is in bytes: of the most memory that this process had."""

    inputs: int = 0
    accepted: int = 0
    growth: int = 0
    slowest: float = 0.0


def bases(folder: Path) -> list[bytes]:
    """Headers of valid files of several kinds."""
    from shimmy_jupyter.models.gguf import read_header

    path = folder / "base.gguf"
    whole = random_gguf.write(path).read_bytes()
    files = [
        whole,
        random_gguf.write(path, quantized=True, infill=True).read_bytes(),
        random_gguf.write(path, causal=False).read_bytes(),
        random_gguf.write_adapter(path).read_bytes(),
        *(mutated_gguf.relative(whole, name) for name in mutated_gguf.RELATIVES),
    ]
    headers = []
    for file in files:
        path.write_bytes(file)
        headers.append(file[: read_header(path).data_start])
    return headers


def mutants(found: list[bytes], draw: random.Random) -> Iterator[bytes]:
    """For ever: of a base, by the generator, or two of them spliced, or bytes changed at random."""
    while True:
        base = draw.choice(found)
        kind = draw.random()
        if kind < 0.5:
            try:
                ((_, data),) = mutated_gguf.mutations(base, draw.getrandbits(32), 1)
            except _NOT_READ:
                continue
            yield data
        elif kind < 0.65:
            other = draw.choice(found)
            yield base[: draw.randrange(len(base))] + other[draw.randrange(len(other)) :]
        else:
            yield _scattered(base, draw)


def _scattered(base: bytes, draw: random.Random) -> bytes:
    data = bytearray(base)
    for _ in range(draw.choice((1, 1, 1, 2, 4, 16))):
        at = draw.randrange(len(data))
        match draw.randrange(4):
            case 0:
                data[at] = draw.randrange(256)
            case 1:
                data[at : at + 8] = struct.pack(
                    "<Q", draw.getrandbits(draw.choice((8, 32, 63, 64)))
                )
            case 2:
                del data[at : at + draw.randrange(1, 64)]
            case _:
                data[at:at] = data[at : at + draw.randrange(1, 64)]
        if not data:
            break
    return bytes(data)


def feed(path: Path, data: bytes) -> bool:
    """Whether it was accepted. What is neither accepted nor refused by `GgufError` is raised."""
    from shimmy_jupyter.errors import GgufError
    from shimmy_jupyter.models.gguf import memory_needed, read_header, validate

    path.write_bytes(data)
    os.truncate(path, len(data) + ROOM)
    try:
        read_header(path)
        facts = validate(path)
    except GgufError as error:
        if len(error.message) > 500 or not error.message.isprintable():
            raise AssertionError(f"what it says cannot be shown: {error.message!r}") from error
        return False
    if memory_needed(facts, 8192) < 0:
        raise AssertionError("less memory than nothing")
    return True


def fuzz(seconds: float, seed: int, folder: Path) -> Report:
    """Mutants for so long. Raises what was not to come out; `folder` has the last input."""
    draw, report = random.Random(seed), Report()
    found = bases(folder)
    kept = len(found)
    feed(folder / "input.gguf", found[0])
    before, end = _peak(), time.monotonic() + seconds
    for data in mutants(found, draw):
        began = time.process_time()
        accepted = feed(folder / "input.gguf", data)
        report.slowest = max(report.slowest, time.process_time() - began)
        report.inputs += 1
        report.accepted += accepted
        if accepted and len(data) < _LARGEST:
            if len(found) < _MOST:
                found.append(data)
            else:
                found[draw.randrange(kept, _MOST)] = data
        if time.monotonic() >= end:
            break
    report.growth = _peak() - before
    if report.growth > BOUND:
        raise AssertionError(f"{report.growth >> 20} MiB of memory, more than {BOUND >> 20}")
    return report


def _peak() -> int:
    """Bytes of memory that this process has had at most (Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def guided(seconds: float, seed: int, folder: Path) -> None:
    """By coverage. Ends the process."""
    import atheris

    from shimmy_jupyter.errors import GgufError

    with atheris.instrument_imports(include=["shimmy_jupyter.models"]):
        from shimmy_jupyter.models import gguf, gguf_checks, gguf_reader, gguf_vocabulary

        assert all((gguf, gguf_checks, gguf_reader, gguf_vocabulary))
    corpus = folder / "corpus"
    corpus.mkdir(exist_ok=True)
    for base in bases(folder):
        (corpus / hashlib.sha256(base).hexdigest()[:16]).write_bytes(base)
    draw, scratch = random.Random(seed), folder / "scratch.gguf"

    def mutate(data: bytes, most: int, _seed: int) -> bytes:
        if draw.random() < 0.5:
            return atheris.Mutate(data, most)[:most]  # type: ignore[no-any-return]
        scratch.write_bytes(data)
        os.truncate(scratch, len(data) + ROOM)
        try:
            gguf.read_header(scratch)  # the generator has no bounds of its own
            ((_, changed),) = mutated_gguf.mutations(data, draw.getrandbits(32), 1)
        except (GgufError, *_NOT_READ):
            return _scattered(data or b"GGUF", draw)[:most]
        return changed[:most]

    path = folder / "input.gguf"
    options = [f"-max_total_time={int(seconds)}", f"-seed={seed}", "-max_len=65536", "-timeout=60"]
    options += ["-rss_limit_mb=1024", f"-artifact_prefix={folder}/", "-print_final_stats=1"]
    atheris.Setup(
        [sys.argv[0], *options, str(corpus)], lambda data: feed(path, data), custom_mutator=mutate
    )
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guided", action="store_true", help="by coverage; needs atheris")
    parser.add_argument("--keep", type=Path, help="a folder for what fails; else a temporary one")
    options = parser.parse_args()
    folder = options.keep or Path(tempfile.mkdtemp(prefix="fuzz-gguf-"))
    folder.mkdir(parents=True, exist_ok=True)
    if options.guided:
        guided(options.seconds, options.seed, folder)
        return 0
    try:
        report = fuzz(options.seconds, options.seed, folder)
    except Exception:
        print(f"kept: {folder / 'input.gguf'}", file=sys.stderr)
        raise
    print(
        f"{report.inputs} inputs, {report.accepted} accepted, {report.growth / 2**20:.1f} MiB more "
        f"memory at most, {report.slowest:.2f} s the slowest"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
