"""What the main job depends on, and whether it can be done."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

from .engine.model import LoadedModel
from .models.resident import ModelStatus
from .service import CompletionService


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


def _engine_health(loaded: list[LoadedModel]) -> Dependency:
    failures = [model.failure.message for model in loaded if model.failure is not None]
    if failures:
        again = "the next request loads the model again"
        return Dependency("engine", "degraded", "; ".join(failures), again)
    if find_spec("llama_cpp") is None:
        return Dependency(
            "engine", "down", "llama-cpp-python is not installed", "pip install llama-cpp-python"
        )
    notes = sorted({note for model in loaded for note in model.facts.notes})
    if notes:
        return Dependency("engine", "degraded", "; ".join(notes), "see docs/install.md")
    return Dependency(
        "engine", "ok", f"{len(loaded)} models loaded" if loaded else "not in use yet"
    )


def _models_health(statuses: list[ModelStatus]) -> Dependency:
    if not statuses:
        return Dependency("models", "down", "no models", "set ShimmyModels.roots")
    # A broken file that nobody has asked for is no concern of the server's.
    failed = [f"{s.file.id}: {s.error}" for s in statuses if s.error and not s.file.problem]
    if failed:
        return Dependency("models", "degraded", "; ".join(failed), "replace the file, or remove it")
    usable = sum(s.file.kind == "model" and not s.file.problem for s in statuses)
    return Dependency("models", "ok", f"{usable} available")


async def health(service: CompletionService) -> Health:
    """Looks, and loads nothing."""
    dependencies = [
        _engine_health(service.pool.loaded()),
        _models_health(await service.pool.status()),
    ]
    return Health(dependencies, service.active)
