"""One event on its way through the model: what it changes, and what is to be asked for because of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from . import shapes
from .fetched import Failed, Fetched, Pending, Problem, Ready, ready
from .messages import Call, Request
from .state import Models, Notice, State

T = TypeVar("T")
IDLE_SECONDS = 300.0
"""Without a person's doing anything, after which nothing is fetched by itself."""
_EVERY = {"models": 15.0, "jobs": 15.0, "limits": 15.0, "live": 2.0}
_SOON = 1.0
_AGAIN = 15.0
"""Seconds after which a source is asked again that has failed."""
PATHS = {
    "models": "shimmy/api/models",
    "jobs": "shimmy/api/jobs",
    "limits": "shimmy/api/limits",
    "live": "shimmy/health",
}
SHAPES: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
    "models": shapes.models,
    "jobs": shapes.jobs,
    "limits": shapes.limits,
    "live": shapes.health,
}
SOURCES = {
    "ask": ("models", "limits"),
    "models": ("models", "jobs"),
    "compare": ("models",),
    "limits": ("limits",),
    "audit": (),
    "live": ("live", "limits"),
}
"""What each section shows that changes by itself."""


class Turn:
    """`state` is as it is so far; nothing else is kept between events."""

    def __init__(self, state: State, now: float) -> None:
        self.state, self.now = state, now
        self.requests: list[Request] = []

    def change(self, **changes: Any) -> None:
        self.state = dataclasses.replace(self.state, **changes)

    def audit(self, **changes: Any) -> None:
        self.change(audit=dataclasses.replace(self.state.audit, **changes))

    def say(self, text: str) -> None:
        self.change(notice=Notice(text))

    def fail(self, problem: Problem, doing: str = "") -> None:
        self.change(notice=Notice(doing, problem))

    def number(self, purpose: str) -> int:
        """For a request that is about to be made."""
        number = self.state.numbers + 1
        self.change(numbers=number, asked={**self.state.asked, number: purpose})
        return number

    def call(
        self, purpose: str, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> None:
        self.requests.append(Call(self.number(purpose), method, path, body))

    def drop(self, purpose: str) -> None:
        """Whatever is on its way for it is of no interest any more."""
        left = {n: what for n, what in self.state.asked.items() if what != purpose}
        self.change(asked=left)

    def stale(self, *sources: str) -> None:
        """They are to be fetched again as soon as anything is."""
        left = {name: at for name, at in self.state.fetched.items() if name not in sources}
        self.change(fetched=left)

    def fetch(self, source: str) -> None:
        if source not in self.state.asked.values():
            self.call(source, "GET", PATHS[source])

    def took(self, source: str) -> None:
        """It has answered, or refused to."""
        self.change(fetched={**self.state.fetched, source: self.now})

    def look_around(self) -> None:
        """Fetch what is in view and old, if a person may be looking."""
        if awake(self.state, self.now):
            for source in SOURCES[self.state.section]:
                due = due_at(self.state, source)
                if due is not None and due <= self.now:
                    self.fetch(source)


def awake(state: State, now: float) -> bool:
    """Whether anything may be fetched that nobody has asked for just now."""
    there = state.visible and not state.paused and not state.closed
    return there and now - state.last_activity < IDLE_SECONDS


def due_at(state: State, source: str) -> float | None:
    """When it is to be fetched again; None while it is on its way."""
    if source in state.asked.values():
        return None
    at = state.fetched.get(source)
    return float("-inf") if at is None else at + _every(state, source)


def _every(state: State, source: str) -> float:
    if isinstance(getattr(state, source), Failed):
        return _AGAIN
    models, jobs = ready(state.models), ready(state.jobs)
    if source == "models" and models is not None and _moving(models):
        return _SOON
    if source == "jobs" and jobs is not None and any(job.state == "running" for job in jobs):
        return _SOON
    return _EVERY[source]


def _moving(models: Models) -> bool:
    busy = {"probing", "loading", "unloading"}
    return models.default is None or any(one.state in busy for one in models.models)


def read(shape: Callable[[Mapping[str, Any]], T], body: Mapping[str, Any]) -> Ready[T] | Failed:
    """An answer as a value, or that it cannot be read."""
    try:
        return Ready(shape(body))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        said = f"the server's answer has another shape ({type(error).__name__}: {error})"
        return Failed(Problem("internal_error", f"{said}: are both of the same version?"))


def pending(before: Fetched[T]) -> Fetched[T]:
    """While it is fetched again what there was is still to be seen."""
    return before if isinstance(before, Ready) else Pending()
