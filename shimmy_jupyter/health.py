"""What the main job depends on, and whether it can be done."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from .audit.ledger import Ledger
from .audit.writer import StoreFailed
from .engine.model import LoadedModel
from .errors import EngineLost, ShuttingDown
from .guard.guard import Guard
from .models.memory import available_memory, default_reserve, total_memory
from .offloop import in_thread
from .service import CompletionService
from .types import amount

T = TypeVar("T")

STALLED = 60.0
"""Seconds that an engine may be at one step; a child that is silent for so long is stopped, too."""
LEAST_FREE = 500_000_000
"""Bytes of a disk below which somebody should know."""
_MANY = 1000
"""Records that wait to be written."""
_WRITABLE = "see that the folder it is in can be written to, and that its disk has room"
_AGAIN = "the next request loads the model again"
_RESTART = (
    'restart the server; ShimmyEngine.isolation = "process" would stop such an engine by itself'
)


@dataclass(frozen=True, slots=True)
class Dependency:
    """`status` is ok, degraded or down; `action` is what a person can do, if there is anything."""

    name: str
    status: str
    detail: str
    action: str | None = None


@dataclass(frozen=True, slots=True)
class Health:
    """`active` counts the requests that are queued or running, and jobs."""

    dependencies: list[Dependency]
    active: int

    @property
    def ok(self) -> bool:
        """Whether a prompt could be answered."""
        return all(dependency.status != "down" for dependency in self.dependencies)

    def to_json(self) -> dict[str, Any]:
        worst = [d.status for d in self.dependencies]
        status = next((s for s in ("down", "degraded") if s in worst), "ok")
        return {
            "status": status,
            "active": self.active,
            "dependencies": [asdict(d) for d in self.dependencies],
        }


def gpu_present(root: Path = Path("/")) -> str | None:
    """A GPU that the machine has, whether or not llama.cpp can use it, which is not loaded to ask."""
    if (root / "proc/driver/nvidia/version").exists() or (root / "dev/nvidia0").exists():
        return "an NVIDIA GPU"
    if (root / "dev/kfd").exists():
        return "an AMD GPU"
    return "Apple's GPU" if sys.platform == "darwin" else None


def free_bytes(folder: Path) -> int:
    """On the disk of a folder that may not be there yet. Raises `OSError`."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


class Surroundings:
    """What health looks at beside the service. Nothing of it is waited for longer than `patience`
    seconds; what blocks longer is asked again only once it has answered, so that threads do not pile up.

    `reserve` is in bytes, None for the default; `folder` is where state is kept.
    """

    def __init__(
        self,
        folder: Path | None = None,
        reserve: int | None = None,
        *,
        disk: Callable[[Path], int] = free_bytes,
        memory: Callable[[], int] = available_memory,
        gpu: Callable[[], str | None] = gpu_present,
        patience: float = 2.0,
    ) -> None:
        self.folder, self.patience = folder, patience
        self.disk, self.memory, self.gpu = disk, memory, gpu
        self._reserve = reserve
        self._asked: dict[str, Future[Any]] = {}

    def reserve(self) -> int:
        """Bytes of memory that are to stay free. Blocking."""
        return default_reserve(total_memory()) if self._reserve is None else self._reserve

    async def ask(self, name: str, work: Callable[[], T]) -> T:
        """What blocking work returns, in a thread of its own. Raises `TimeoutError`."""
        asked = self._asked.get(name)
        if asked is None or asked.done():
            asked = self._asked[name] = in_thread(work, "shimmy-health")
        async with asyncio.timeout(self.patience):
            found: T = await asyncio.wrap_future(asked)
        return found


async def health(
    service: CompletionService,
    around: Surroundings | None = None,
    tell: Callable[[str], bool] = lambda _: True,
) -> Health:
    """Looks, and loads nothing. What cannot be told in time is degraded. Models that `tell` does not allow
    are not named.
    """
    around, loaded = around or Surroundings(), service.pool.loaded()
    looks: dict[str, Awaitable[Dependency]] = {
        "engine": _engine(loaded, around),
        "models": _models(service, around, tell),
        "ledger": _ledger(service.guard, around),
        "limits": _limits(service.guard, around),
        "disk": _disk(service.guard.ledger, around),
        "memory": _memory(around),
        "gpu": _gpu(loaded, around),
    }
    found = await asyncio.gather(*(_in_time(name, look) for name, look in looks.items()))
    return Health(found, service.active)


async def _in_time(name: str, look: Awaitable[Dependency]) -> Dependency:
    try:
        return await look
    except TimeoutError:
        return Dependency(name, "degraded", "not known: it did not answer in time")
    except OSError as error:
        return Dependency(name, "degraded", f"not known: {os.strerror(error.errno or 0)}")


# What answers


async def _engine(loaded: list[LoadedModel], around: Surroundings) -> Dependency:
    name = "engine"
    # What is being unloaded answers nobody, and is in nobody's way.
    loaded = [m for m in loaded if m.failure is None or m.failure.code != ShuttingDown.code]
    if find_spec("llama_cpp") is None:
        return Dependency(
            name, "down", "llama-cpp-python is not installed", "pip install llama-cpp-python"
        )
    if not loaded:
        return Dependency(name, "ok", "not in use yet")
    found = await around.ask(name, lambda: [_trouble(model) or _lost(model) for model in loaded])
    said = [trouble for trouble in found if trouble is not None]
    if not said:
        return Dependency(name, "ok", f"{len(loaded)} models loaded")
    detail = "; ".join(trouble.detail for trouble in said)
    stuck = [trouble for trouble in said if trouble.stuck]
    if not stuck:
        return Dependency(name, "degraded", detail, _AGAIN)
    well = any(trouble is None or not trouble.stuck for trouble in found)
    return Dependency(name, "degraded" if well else "down", detail, _RESTART)


@dataclass(frozen=True, slots=True)
class _Trouble:
    """`stuck`: nothing but a person puts it right."""

    detail: str
    stuck: bool


def _trouble(model: LoadedModel) -> _Trouble | None:
    if model.failure is not None:
        return _Trouble(model.failure.message, stuck=False)
    now = model.engine.snapshot()
    if not now.alive:
        return _Trouble("an engine's thread has ended without a word", stuck=True)
    if now.busy_seconds > STALLED:
        waiting = now.running + now.waiting
        detail = f"an engine with {waiting} sequences has been at one step for "
        return _Trouble(f"{detail}{now.busy_seconds:.0f} s", stuck=True)
    return None


def _lost(model: LoadedModel) -> _Trouble | None:
    """A process of its own may have ended while nobody asked it for anything."""
    try:
        model.engine.backend.check()
    except EngineLost as error:
        return _Trouble(error.message, stuck=False)
    return None


async def _models(
    service: CompletionService, around: Surroundings, tell: Callable[[str], bool]
) -> Dependency:
    name = "models"
    # The first look at the disk may take long; it goes on for whoever asks next.
    async with asyncio.timeout(around.patience):
        statuses = await service.pool.status()
    if not statuses:
        return Dependency(name, "down", "no models", "set ShimmyModels.roots")
    # A broken file that nobody has asked for is no concern of the server's.
    failed = [s for s in statuses if s.error and not s.file.problem]
    if failed:
        said = [f"{s.file.id}: {s.error}" for s in failed if tell(s.file.id)]
        if others := len(failed) - len(said):
            said.append(f"{others} that you may not use")
        return Dependency(name, "degraded", "; ".join(said), "replace the file, or remove it")
    usable = sum(s.file.kind == "model" and not s.file.problem for s in statuses)
    return Dependency(name, "ok", f"{usable} available")


# What is kept


async def _ledger(guard: Guard, around: Surroundings) -> Dependency:
    name, ledger = "ledger", guard.ledger
    if ledger is None:
        return Dependency(name, "ok", "off: requests are not recorded")
    wrong = ledger.failure
    if wrong is None or guard.rules.fail_closed:
        # Where nobody sends requests to a server that is down, nothing else would try again.
        tried = await around.ask(name, lambda: _unusable(ledger))
        wrong = wrong or tried
    if wrong is not None:
        if guard.rules.fail_closed:
            detail = f"nothing is answered, as requests have to be recorded and cannot: {wrong}"
            return Dependency(name, "down", detail, _WRITABLE)
        return Dependency(name, "degraded", f"REQUESTS ARE NOT RECORDED: {wrong}", _WRITABLE)
    if ledger.lag >= _MANY:
        detail = f"{ledger.lag} records wait to be written"
        return Dependency(name, "degraded", detail, "see whether its disk is slow")
    if ledger.notes:
        return Dependency(name, "degraded", "; ".join(ledger.notes), "see the server's log")
    return Dependency(name, "ok", "on")


def _unusable(ledger: Ledger) -> str | None:
    """Why it could not be written to, if that shows. Makes no file, and no record."""
    path = ledger.path
    if path.exists():
        try:
            ledger.append([]).result()
        except StoreFailed as error:
            return str(error)
        return None
    folder = path.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if folder.is_dir() and os.access(folder, os.W_OK):
        return None
    return f"{path.name} cannot be made: its folder cannot be written to"


async def _limits(guard: Guard, around: Surroundings) -> Dependency:
    name, spending = "limits", guard.spending
    failure = spending.failure
    try:
        await around.ask(name, lambda: spending.own("").result())
    except StoreFailed as error:
        failure = failure or str(error)
    if failure is not None:
        # Without limits, too: what a user has tightened for themselves is kept there.
        detail = f"nothing is answered, as what has been used cannot be counted: {failure}"
        return Dependency(name, "down", detail, _WRITABLE)
    return Dependency(name, "ok", "counted" if guard.rules.limits else "none are set")


# What there is


async def _disk(ledger: Ledger | None, around: Surroundings) -> Dependency:
    name = "disk"
    folders = {around.folder, ledger.path.parent if ledger is not None else None} - {None}
    if not folders:
        return Dependency(name, "ok", "nothing is kept on one")
    least = await around.ask(name, lambda: min(around.disk(f) for f in folders if f is not None))
    detail = f"{amount(least)} are free where state is kept"
    if least < LEAST_FREE:
        action = "make room before records and limits cannot be written"
        return Dependency(name, "degraded", detail, action)
    return Dependency(name, "ok", detail)


async def _memory(around: Surroundings) -> Dependency:
    name = "memory"
    free, reserve = await around.ask(name, lambda: (around.memory(), around.reserve()))
    detail = f"{amount(free)} are available, of which {amount(reserve)} are to stay free"
    if free < reserve:
        action = "unload a model, end a kernel, or set ShimmyModels.memory_reserve"
        return Dependency(name, "degraded", f"{detail}: no further model is loaded", action)
    return Dependency(name, "ok", detail)


async def _gpu(loaded: list[LoadedModel], around: Surroundings) -> Dependency:
    name = "gpu"
    notes = sorted({note for model in loaded for note in model.facts.notes})
    if notes:
        return Dependency(name, "degraded", "; ".join(notes), "see docs/install.md")
    used = sum(model.facts.offloaded_layers > 0 for model in loaded)
    if used:
        return Dependency(name, "ok", f"used by {used} of {len(loaded)} models")
    found = await around.ask(name, around.gpu)
    if found is None:
        return Dependency(name, "ok", "there is none")
    if not loaded:
        return Dependency(name, "ok", f"this machine has {found}; nothing is loaded to use it")
    if all(model.engine.spec.gpu_layers == 0 for model in loaded):
        return Dependency(name, "ok", f"{found} is not used: ShimmyEngine.gpu_layers is 0")
    detail = (
        f"this machine has {found}, and NO MODEL USES IT: everything is computed on the processor"
    )
    return Dependency(
        name, "degraded", detail, "see docs/install.md, or set ShimmyEngine.gpu_layers"
    )
