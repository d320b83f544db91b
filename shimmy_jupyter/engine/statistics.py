"""What an engine's thread says of itself, for those who look at it from others."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..core.scheduler import Scheduler


@dataclass(slots=True)
class EngineStatistics:
    """Counters since the model was loaded, written by the engine's thread alone."""

    steps: int = 0
    tokens: int = 0
    aborted: int = 0
    rows: dict[int, int] = field(default_factory=dict)
    """`rows[n]` is how many steps held n sequences."""
    beat: float | None = None
    """When the thread last came by between two steps; None while it waits for something to do."""

    def count(self, rows: int, sampled: int) -> None:
        """A step that was done."""
        self.steps += 1
        self.tokens += sampled
        self.rows[rows] = self.rows.get(rows, 0) + 1


@dataclass(frozen=True, slots=True)
class EngineSnapshot:
    """Sequences that run and that wait, and cells of the KV cache. `busy_seconds` is how long the thread
    has been at one thing, such as a step; 0 while it has nothing to do. Of an engine that has ended all
    but `alive` is 0.
    """

    alive: bool
    running: int = 0
    waiting: int = 0
    kv_used: int = 0
    """Set aside for running sequences: of each its prompt and as much as it may still say."""
    kv_total: int = 0
    busy_seconds: float = 0.0


def snapshot_of(scheduler: Scheduler, active: int, *, alive: bool, busy: float) -> EngineSnapshot:
    """For any thread: only numbers are read, which may be of moments a little apart."""
    running = len(scheduler.running)
    return EngineSnapshot(
        alive=alive,
        running=running,
        waiting=max(0, active - running),
        kv_used=scheduler.line.room.reserved_tokens,
        kv_total=scheduler.capacity.kv_tokens,
        busy_seconds=max(0.0, busy),
    )
