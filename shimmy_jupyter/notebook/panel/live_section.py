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
            place = limits.queue_position if limits is not None else None
            self.queue.value = paragraph(
                "None of your requests waits." if place is None
                else f"{place} requests go before the first of yours that waits."
            )  # fmt: skip
        if self._seen.new("rates", state.rates):
            self.rates.value = text.rates(state.rates)
