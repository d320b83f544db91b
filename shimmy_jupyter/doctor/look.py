"""Everything that the checks look at, and where it is on this machine. Tests give others."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import site
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jupyter_core import paths
from traitlets.config import Config

from .. import config
from ..engine.isolated import child_environment
from ..models.memory import available_memory, total_memory

_PACKAGE = Path(__file__).parent.parent
_CHILD = (
    sys.executable,
    "-P",
    "-m",
    "shimmy_jupyter.doctor.child",
)  # -P: not from the working folder
_TOLD = ('{"version": ', '{"landlock": ')
_SECONDS = 20.0
_FOLDERS = re.compile(r"(?:[A-Za-z]:)?[/\\][^'\":]*[/\\]")


@dataclass(frozen=True, slots=True)
class Level:
    """A folder of Jupyter's configuration files, and whose it is."""

    name: Literal["user", "environment", "system", "JUPYTER_CONFIG_PATH"]
    folder: Path


@dataclass(frozen=True, slots=True)
class Build:
    """What the engine says of itself. Where it could not, `broken` says why, and `illegal` whether it
    used an instruction that the processor lacks. `amx` is how its use of the processor's matrix instructions
    fails, None where it does not. `landlock` is None where it was not answered.
    """

    version: str = ""
    system: str = ""
    offload: bool = False
    gpu: str | None = None
    amx: str | None = None
    landlock: int | None = None
    broken: str | None = None
    illegal: bool = False


@dataclass(frozen=True, slots=True)
class Process:
    """One that runs: its command line, and the addresses and ports that it listens on. Either is empty
    where this account may not know. The command line can have a secret in it.
    """

    command: tuple[str, ...] = field(default=(), repr=False)
    listening: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What there is to look at. `root` is where `proc` is; `levels` are in the order in which they
    count; `ours` is the file that `import shimmy` should find, `alias` the one that it does.
    Functions are asked once: the build; the version of a distribution, None where there is none;
    the configuration and what it means; whether a path can be used so; free bytes of a folder's disk
    and of memory, of which there are `total`; a process, None where it has ended.
    """

    root: Path
    posix: bool
    python: str
    requirements: tuple[str, ...]
    installed: Callable[[str], str | None]
    build: Callable[[], Build]
    ours: Path
    alias: Path | None
    levels: tuple[Level, ...]
    configuration: Callable[[], Config]
    settings: Callable[[Config], config.Settings]
    data: Path
    runtime: Path
    access: Callable[[Path, int], bool]
    disk: Callable[[Path], int]
    memory: Callable[[], int]
    total: Callable[[], int]
    process: Callable[[int], Process | None]

    @property
    def state(self) -> Path:
        """Where this package keeps what it must remember."""
        return self.data / "shimmy_jupyter"


def this_machine() -> Machine:
    return Machine(
        root=Path("/"),
        posix=os.name == "posix",
        python=platform.python_version(),
        requirements=_requirements(),
        installed=_installed,
        build=ask_engine,
        ours=_PACKAGE.parent / "shimmy.py",
        alias=_alias(),
        levels=_levels(),
        configuration=config.load_config,
        settings=_settings,
        data=Path(paths.jupyter_data_dir()),
        runtime=Path(paths.jupyter_runtime_dir()),
        access=os.access,
        disk=lambda folder: shutil.disk_usage(folder).free,
        memory=available_memory,
        total=total_memory,
        process=_process,
    )


def _settings(found: Config) -> config.Settings:
    """As a server has them: what the administrator has set holds."""
    return config.settings(found, system=config.load_system_config())


def ask_engine(command: Sequence[str] = _CHILD, seconds: float = _SECONDS) -> Build:
    """What the engine says of itself in a process of its own, which has `seconds` for it."""
    try:
        done = subprocess.run(  # noqa: S603  our own module
            command,
            env=child_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Build(broken=f"importing it took longer than {seconds:g} seconds")
    except OSError as error:
        return Build(broken=f"a process to import it in does not start: {error.strerror}")
    told: dict[str, Any] = {}
    for line in done.stdout.decode("utf-8", "replace").splitlines():
        if line.startswith(_TOLD):
            told |= json.loads(line)
    if "version" in told:
        return Build(**told)
    name = _signal(-done.returncode)
    if name is not None:
        return Build(broken=f"importing it ends the process ({name})", illegal=name == "SIGILL")
    said = done.stderr.decode("utf-8", "replace").strip().splitlines()
    return Build(broken=_FOLDERS.sub("", said[-1] if said else "it says nothing")[:300])


def _signal(number: int) -> str | None:
    return next((one.name for one in signal.Signals if one.value == number), None)


def _requirements() -> tuple[str, ...]:
    """What this package asks for; nothing where it is not installed."""
    try:
        return tuple(importlib.metadata.requires("shimmy-jupyter") or ())
    except importlib.metadata.PackageNotFoundError:
        return ()


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _alias() -> Path | None:
    found = importlib.util.find_spec("shimmy")
    return Path(found.origin) if found is not None and found.origin else None


def _levels() -> tuple[Level, ...]:
    base = site.getuserbase()
    users = (paths.jupyter_config_dir(), str(Path(base, "etc", "jupyter")) if base else "")

    def whose(folder: str) -> Level:
        if folder in users:
            return Level("user", Path(folder))
        if folder in paths.ENV_CONFIG_PATH:
            return Level("environment", Path(folder))
        system = folder in paths.SYSTEM_CONFIG_PATH
        return Level("system" if system else "JUPYTER_CONFIG_PATH", Path(folder))

    return tuple(whose(folder) for folder in paths.jupyter_config_path())


def _process(pid: int) -> Process | None:
    import psutil

    try:
        process = psutil.Process(pid)
        command = tuple(process.cmdline())
        # Named so since psutil 6; nothing is connected to, the kernel's table is read.
        ask = getattr(process, "net_connections", None) or process.connections
        sockets = ask(kind="inet")
    except psutil.NoSuchProcess:
        return None
    except psutil.AccessDenied:
        return Process()
    listening = [one.laddr for one in sockets if one.status == psutil.CONN_LISTEN]
    return Process(command, tuple((str(ip), int(port)) for ip, port in listening))
