"""Checks of what is installed, and of whether it suits the processor, the GPU and the kernel."""

from __future__ import annotations

import shlex
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

from ..config import Settings
from .look import Build, Machine
from .verdict import Check

_SHOWN = ("jupyter-server", "llama-cpp-python")
_ENGINE = "llama-cpp-python"
_INSTALL = "pip install --no-cache-dir --force-reinstall"
_NEEDED_FOR_SPEED = ("AVX2", "FMA", "F16C", "NEON")
_CPUINFO = {
    "SSE3": "pni", "SSSE3": "ssse3", "AVX": "avx", "AVX2": "avx2", "AVX_VNNI": "avx_vnni", "BMI2": "bmi2",
    "F16C": "f16c", "FMA": "fma", "AVX512": "avx512f", "AVX512_VBMI": "avx512vbmi",
    "AVX512_VNNI": "avx512_vnni", "AVX512_BF16": "avx512_bf16", "AMX_INT8": "amx_int8",
    "NEON": "asimd", "DOTPROD": "asimddp", "MATMUL_INT8": "i8mm", "SVE": "sve", "SME": "sme",
}  # fmt: skip
"""What llama.cpp calls an instruction set, and what Linux does."""
_AMX_HEADER = Path(__file__).parents[1] / "engine" / "llama" / "amx_tiles.h"
_GPU_BUILDS = {"an NVIDIA GPU": "-DGGML_CUDA=on", "an AMD GPU": "-DGGML_VULKAN=on"}


def packages(look: Machine) -> Check:
    name = "packages"
    if not look.requirements:
        detail = "shimmy-jupyter runs from its source and is not installed"
        return Check(name, "warn", detail, "pip install shimmy-jupyter")
    wrong = []
    for requirement in map(Requirement, look.requirements):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            found = look.installed(requirement.name)
            if found is None:
                wrong.append((requirement, "is missing"))
            elif not _allows(requirement, found):
                wrong.append((requirement, f"is {found}"))
    if wrong:
        detail = "; ".join(f"{one} is asked for and {what}" for one, what in wrong)
        names = " ".join(f"'{one.name}{one.specifier}'" for one, _ in wrong)
        return Check(name, "fail", detail, f"pip install {names}")
    versions = [f"{one} {look.installed(one)}" for one in ("shimmy-jupyter", *_SHOWN)]
    return Check(name, "ok", f"Python {look.python}, " + ", ".join(versions))


def _allows(requirement: Requirement, found: str) -> bool:
    try:
        return requirement.specifier.contains(Version(found), prereleases=True)
    except InvalidVersion:
        return False


def _pinned(look: Machine) -> str | None:
    """The engine's version that this package was made for."""
    for one in map(Requirement, look.requirements):
        if one.name == _ENGINE and one.marker is None:
            return next((s.version for s in one.specifier if s.operator == "=="), None)
    return None


def _reinstall(look: Machine, cmake: str = "") -> str:
    version = _pinned(look)
    target = f"{_ENGINE}=={version}" if version else _ENGINE
    return (f'CMAKE_ARGS="{cmake}" ' if cmake else "") + f"{_INSTALL} {target}"


def engine(look: Machine, build: Build) -> Check:
    name, pinned = "engine", _pinned(look)
    if build.illegal:
        detail = f"it was built for another processor: {build.broken}"
        return Check(name, "fail", detail, f"build it on this machine: {_reinstall(look)}")
    if build.broken is not None:
        return Check(name, "fail", f"llama.cpp cannot be used: {build.broken}", _reinstall(look))
    if pinned is not None and build.version != pinned:
        detail = f"llama-cpp-python is {build.version}; only {pinned} is known to work"
        return Check(name, "fail", detail, _reinstall(look))
    return Check(name, "ok", f"llama.cpp of llama-cpp-python {build.version}")


def processor(look: Machine, build: Build) -> Check:
    name = "processor"
    if build.broken is not None:
        return Check(name, "skip", "the engine cannot be asked")
    has = _processor_flags(look)
    if not has:
        return Check(name, "skip", "this system does not say what its processor can do")
    uses = _build_flags(build.system)
    lacking = [one for one in _CPUINFO if one in uses and _CPUINFO[one] not in has]
    if lacking:
        detail = f"the engine was built to use {', '.join(lacking)}, which this processor lacks"
        return Check(name, "fail", detail, f"build it on this machine: {_reinstall(look)}")
    if build.amx is not None:
        detail = (
            f"the engine's use of this processor's AMX fails, so it is kept from it: {build.amx}"
        )
        flags = f'CXXFLAGS="-include {shlex.quote(str(_AMX_HEADER))}" '
        return Check(name, "warn", detail, f"build it with {flags}{_reinstall(look)}")
    idle = [one for one in _NEEDED_FOR_SPEED if one not in uses and _CPUINFO[one] in has]
    if idle:
        detail = f"the engine does not use this processor's {', '.join(idle)}: several times slower"
        return Check(name, "warn", detail, f"build it on this machine: {_reinstall(look)}")
    known = ", ".join(one for one in _CPUINFO if one in uses)
    return Check(name, "ok", f"the engine uses {known or 'no instruction that is optional'}")


def _processor_flags(look: Machine) -> set[str]:
    """What the first processor says; all have the same, as processes move between them."""
    try:
        text = (look.root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return set()
    for line in text.splitlines():
        key, _, values = line.partition(":")
        if key.strip() in {"flags", "Features"}:
            return set(values.split())
    return set()


def _build_flags(system: str) -> set[str]:
    """Of "CUDA : ARCHS = 890 | CPU : AVX2 = 1 | FMA = 1 | " what the processor's part has."""
    found, part = set(), ""
    for piece in system.split("|"):
        before, colon, after = piece.partition(" : ")
        part, said = (before.strip(), after) if colon else (part, piece)
        key, _, value = said.partition("=")
        if part == "CPU" and value.strip() == "1":
            found.add(key.strip())
    return found


def gpu(look: Machine, build: Build) -> Check:
    name = "gpu"
    if build.broken is not None:
        return Check(name, "skip", "the engine cannot be asked")
    if build.gpu is None:
        return Check(name, "skip", "none was found")
    if build.offload:
        return Check(name, "ok", f"this machine has {build.gpu}, and the engine can use one")
    detail = f"this machine has {build.gpu}, but the engine was built without support for it"
    return Check(name, "warn", detail, _reinstall(look, _GPU_BUILDS.get(build.gpu, "")))


def import_name(look: Machine) -> Check:
    name = "import name"
    if look.alias is not None and look.alias.resolve() == look.ours.resolve():
        return Check(name, "ok", "%load_ext shimmy finds this package")
    use = "in notebooks, %load_ext shimmy_jupyter"
    if look.alias is None:
        return Check(name, "warn", "there is no module called shimmy", use)
    return Check(name, "warn", "another package is called shimmy, and is found first", use)


def isolation(look: Machine, build: Build, settings: Settings | None) -> Check:
    """Whether models can have a process of their own, and what a process can be locked up with."""
    name = "isolation"
    chosen = settings.isolation if settings is not None else None
    if not look.posix:
        detail = "this system cannot give a model a process of its own"
        if chosen == "process":
            return Check(name, "fail", detail, 'set ShimmyEngine.isolation = "none"')
        return Check(name, "warn", detail, "only load models that you trust")
    locks = [f"Landlock {build.landlock}"] if build.landlock else []
    if (look.root / "proc/sys/kernel/seccomp/actions_avail").exists():
        locks.append("seccomp")
    where = {"process": "in a process of its own", "none": "in the server's process"}.get(
        chosen or "", "as configured"
    )
    if not locks:
        detail = f"a model runs {where}; the kernel has neither Landlock nor seccomp"
        return Check(name, "warn", detail, "only load models that you trust")
    return Check(name, "ok", f"a model runs {where}; the kernel has {' and '.join(locks)}")
