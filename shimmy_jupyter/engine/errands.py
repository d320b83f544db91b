"""Work for the engine's thread that is no step: one errand between two steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from ..errors import EngineLost, ShimmyError


@dataclass(frozen=True, slots=True)
class Errand:
    """`done` gets what `work` returns or raises."""

    work: Callable[[], object]
    done: Future[Any] = field(default_factory=Future)

    def run(self) -> None:
        """Raises what nobody foresaw, and `EngineLost`: those end the engine, which then says so."""
        if not self.done.set_running_or_notify_cancel():
            return
        try:
            found = self.work()
        except EngineLost:
            raise
        except ShimmyError as error:
            self.done.set_exception(error)
        else:
            self.done.set_result(found)
        finally:
            del self  # it has the error, whose traceback has this frame: each would keep the other

    def give_up(self, error: ShimmyError) -> None:
        if self.done.running() or self.done.set_running_or_notify_cancel():
            self.done.set_exception(error)


class Errands:
    """Those that wait, in order."""

    def __init__(self) -> None:
        self._waiting: deque[Errand] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, *errands: Errand) -> None:
        self._waiting += errands

    def run_one(self) -> None:
        """One that ends the engine stays: whoever waits for it hears so once that is known to all."""
        if self._waiting:
            self._waiting[0].run()
            self._waiting.popleft()

    def give_up(self, error: ShimmyError) -> None:
        """The engine has ended."""
        while self._waiting:
            self._waiting.popleft().give_up(error)
