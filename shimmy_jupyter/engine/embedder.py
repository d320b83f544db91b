"""Texts become vectors on the engine's thread, between the steps of those who generate.

A request is cut into calls of about the time that a step may take beside others, and users take turns.
"""

from __future__ import annotations

import math
import struct
import time
from collections.abc import Callable

from ..core.governor import Governor
from ..core.messages import Row
from ..core.packing import Packing
from ..errors import EngineLost, GenerationFailed
from ..types import EmbeddingFacts, ModelFacts
from .backend import guess_of
from .turns import Turns
from .worker import Engine

STEP_SECONDS, ALONE_SECONDS = 0.15, 1.0
"""What a call is to take, while others decode and while nobody does."""
_QUICK = 0.3
"""Weight of the newest time for a token."""
_ATTEMPTS = 64


class Embedder:
    """Of one loaded model that makes vectors."""

    def __init__(
        self,
        engine: Engine,
        facts: ModelFacts,
        shape: EmbeddingFacts,
        *,
        max_waiting: int,
        fixed_threads: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.shape = shape
        self.active = 0
        """Requests queued or running."""
        self._engine = engine
        self._turns = Turns(max_waiting)
        # Of its own: a call is other work than a step.
        self._governor = Governor(facts.threads, fixed=fixed_threads)
        self._clock = clock
        self._seconds = guess_of(facts)
        """For a token."""

    async def vectors(self, inputs: tuple[tuple[int, ...], ...], principal: str) -> list[bytes]:
        """A vector of `shape.width` numbers for each input, which has from 1 to `shape.tokens` tokens,
        as little-endian float32.

        Raises `QueueFull`, `GenerationFailed`, or what ended the engine. A caller that gives up stops
        it after the call in progress.
        """
        shape = self.shape
        packing = Packing(
            inputs,
            batch_tokens=shape.batch_tokens,
            sequences=shape.sequences,
            divisible=shape.divisible,
        )
        found: list[bytes] = []
        self.active += 1
        try:
            while len(found) < len(inputs):
                async with self._turns.turn(principal):
                    # What is half done keeps its turn: its slot is not to be another's.
                    going = True
                    while going:
                        found += map(self._checked, await self._call(packing.next(self._budget())))
                        going = not packing.whole
        finally:
            self.active -= 1
        return found

    def _budget(self) -> int:
        seconds = STEP_SECONDS if self._engine.active else ALONE_SECONDS
        return int(seconds / self._seconds)

    async def _call(self, rows: tuple[Row, ...]) -> tuple[bytes, ...]:
        return await self._engine.errand(lambda: self._embed(rows))

    def _embed(self, rows: tuple[Row, ...]) -> tuple[bytes, ...]:
        """On the engine's thread."""
        work = sum(len(row.tokens) for row in rows)
        for _ in range(_ATTEMPTS):
            plan = self._governor.plan(work, self._clock())
            done = self._engine.backend.embed(rows, plan.threads, plan.limit)
            now = self._clock()
            self._governor.observe(plan, done.seconds, now, aborted=done.aborted)
            if not done.aborted:
                self._seconds += _QUICK * (done.seconds / work - self._seconds)
                self._seconds = max(self._seconds, 1e-9)
                return done.vectors
        raise EngineLost("its calls are aborted again and again, though nobody asks for it")

    def _checked(self, data: bytes) -> bytes:
        """What a child says is looked at before it is believed."""
        if len(data) != 4 * self.shape.width:
            raise GenerationFailed("the model made a vector of another length than it says")
        if not all(map(math.isfinite, struct.unpack(f"<{self.shape.width}f", data))):
            raise GenerationFailed(
                "the model computed numbers that are not finite; its file is probably damaged"
            )
        return data
