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
        """Raises what nobody foresaw, and `EngineLost`: those end the engine, too."""
        if not self.done.set_running_or_notify_cancel():
            return
        try:
            self.done.set_result(self.work())
        except BaseException as error:
            self.done.set_exception(error)
            if not isinstance(error, ShimmyError) or isinstance(error, EngineLost):
                raise


class Errands:
    """Those that wait, in order."""

    def __init__(self) -> None:
        self._waiting: deque[Errand] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, errand: Errand) -> None:
        self._waiting.append(errand)

    def run_one(self) -> None:
        if self._waiting:
            self._waiting.popleft().run()

    def give_up(self, error: ShimmyError) -> None:
        """The engine has ended."""
        while self._waiting:
            errand = self._waiting.popleft()
            if errand.done.set_running_or_notify_cancel():
                errand.done.set_exception(error)
