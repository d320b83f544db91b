"""What may be used, what is left and until when; and one's own, stricter limits."""

from __future__ import annotations

from collections.abc import Callable

from . import controls as c
from . import messages as m
from . import text
from .fetched import ready
from .shapes import LIMITS
from .state import Limits, State
from .text import paragraph


class LimitsSection:
    title = "Limits"

    def __init__(self, desk: c.Desk, wall: Callable[[], float]) -> None:
        self._wall, self._seen = wall, c.Seen()
        self.limits, self.note = c.html(), c.html()
        self.name = c.choice(
            "My own limit", "Which limit to tighten for yourself",
            [(words, name) for name, words in LIMITS.items()],
        )  # fmt: skip
        self.value = c.line("At most", "A number, at most what the administrator allows")
        self.set = c.button("Set my own limit", "Tighten this limit for yourself")
        self.unset = c.button("Take it back", "Remove your own limit; the administrator's stays")
        c.pressed(desk, self.set, self._wanted)
        c.pressed(desk, self.unset, lambda: m.LimitSet(self.name.value, ""))
        c.changed(desk, self.name, lambda: self._say(desk.state))
        self.box = c.widgets.VBox(
            [self.limits, c.row(self.name, self.value, self.set, self.unset), self.note]
        )

    def _wanted(self) -> m.LimitSet:
        # An empty text would take the limit back, which has a button of its own.
        return m.LimitSet(self.name.value, self.value.value.strip() or "(empty)")

    def _say(self, state: State) -> None:
        """Why the one that is chosen cannot be raised."""
        limits = ready(state.limits)
        found = (
            next((one for one in limits.limits if one.name == self.name.value), None)
            if limits
            else None
        )
        locked = f"Locked by the administrator: {found.locked}." if found and found.locked else ""
        self.note.value = paragraph(locked) if locked else ""

    def show(self, state: State) -> None:
        if not self._seen.new("limits", state.limits):
            return
        limits = ready(state.limits)
        if limits is None:
            self.limits.value = text.unready(state.limits, "Limits")
        else:
            self.limits.value = self._tables(limits)
        self._say(state)

    def _tables(self, limits: Limits) -> str:
        now = self._wall()
        parts = [text.limits(limits.limits, "Your limits", now)]
        for group, rows in limits.shared.items():
            parts.append(text.limits(rows, f"Shared by the group {group}", now))
        if limits.queue_position is not None:
            parts.append(paragraph(f"{limits.queue_position} requests go before yours."))
        return "".join(parts)
