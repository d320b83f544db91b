"""The engine that is installed here, and the processor that it runs on: what an answer's bytes depend
on beside the model. Nothing is imported for it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_LIBRARIES = {".so", ".dylib", ".dll", ".pyd"}
_LONGEST = 200
_NAMES = ("model name", "cpu implementer", "cpu part")
_FEATURES = frozenset(
    "pni ssse3 avx avx2 avx_vnni bmi2 f16c fma avx512f avx512bw avx512vbmi avx512_vnni avx512_bf16"
    " amx_int8 amx_bf16 asimd asimdhp asimddp i8mm bf16 sve sve2 svei8mm sme".split()
)
"""Those that llama.cpp has code of its own for, as Linux calls them."""


@dataclass(frozen=True, slots=True)
class Machine:
    """`engine` is the version of the binding, "" where it is not installed; `build` a SHA-256 of its
    native libraries, which another build of one version does not share; `cpu` what the processor is
    called. What this system does not say is None, or no feature.
    """

    engine: str
    build: str | None
    cpu: str | None
    cpu_features: tuple[str, ...]


NOWHERE = Machine("", None, None, ())


def this_machine(
    distribution: str = "llama-cpp-python", cpuinfo: Path = Path("/proc/cpuinfo")
) -> Machine:
    """Takes some milliseconds, and blocks for them."""
    cpu, features = _processor(cpuinfo)
    try:
        found = importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return Machine("", None, cpu, features)
    return Machine(found.version, _build(found), cpu, features)


def _build(found: importlib.metadata.Distribution) -> str | None:
    """By the digests that the installer has noted: the libraries may be gigabytes. Two installations of
    one wheel are the same build, and their sizes tell a library that was replaced by hand.
    """
    lines = list(_libraries(found))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest() if lines else None


def _libraries(found: importlib.metadata.Distribution) -> Iterator[str]:
    for file in sorted(found.files or ()):
        if not _LIBRARIES & set(file.suffixes):
            continue
        try:
            size = Path(str(file.locate())).stat().st_size
        except OSError:
            size = -1
        yield f"{file.as_posix()} {file.hash.value if file.hash else ''} {size}"


def _processor(cpuinfo: Path) -> tuple[str | None, tuple[str, ...]]:
    """Its name, and what it can do; of several kinds all of them."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    names: set[str] = set()
    features: set[str] = set()
    for line in text.splitlines():
        key, _, value = line.partition(":")
        key = key.strip().lower()
        if key in _NAMES:
            names.add(value.strip() if key == "model name" else f"{key[4:]} {value.strip()}")
        elif key in {"flags", "features"}:
            features.update(_FEATURES.intersection(value.split()))
    said = ", ".join(sorted(names)) or platform.processor()
    cpu = " ".join(filter(None, [platform.machine(), said]))[:_LONGEST]
    return cpu or None, tuple(sorted(features))
