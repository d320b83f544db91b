"""How the server is, and how fast it has answered."""

from __future__ import annotations

from . import controls as c
from . import text
from .fetched import ready
from .state import State
from .text import paragraph

_MISSING = (
    "Tokens per second and the cache are those of your own answers here. The server does not tell users "
    "its total throughput, who waits, or how full its cache is; an administrator finds them among "
    "Jupyter's metrics."
)


def _waiting(place: int | None) -> str:
    if place is None:
        return "None of your requests waits."
    return f"{text.several(place, 'request')} before the first of yours that waits."


class LiveSection:
    title = "Live"

    def __init__(self) -> None:
        self._seen = c.Seen()
        self.health, self.queue, self.rates = c.html(), c.html(), c.html()
        self.box = c.widgets.VBox(
            [self.health, self.queue, self.rates, c.html(paragraph(_MISSING))]
        )

    def show(self, state: State) -> None:
        if self._seen.new("health", state.live):
            health = ready(state.live)
            self.health.value = (
                text.unready(state.live, "The server's state")
                if health is None
                else text.health(health)
            )
        if self._seen.new("queue", state.limits):
            limits = ready(state.limits)
            self.queue.value = (
                text.unready(state.limits, "Your place in the queue")
                if limits is None
                else paragraph(_waiting(limits.queue_position))
            )
        if self._seen.new("rates", state.rates):
            self.rates.value = text.rates(state.rates)
