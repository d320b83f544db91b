"""The panel's view model: what happens goes in, what is to be seen and what is to be asked for comes out.

Pure: no widget, no thread, no clock. `now` is seconds on any steady clock, and the requests are carried out
elsewhere (`work.py`), so that another front end, in another language, can do the same from the same messages.
A front end calls `handle` for every event, shows the state, carries out the requests, and sends a `Tick` at
`next_look`. Nothing is fetched by itself while nothing is in view, while it is paused, or when no person has
done anything for five minutes: then the server is as idle as it looks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from . import asking, auditing, managing
from . import messages as m
from .state import State
from .turn import IDLE_SECONDS, SOURCES, Turn, awake, due_at

_HANDLERS: Mapping[type, Callable[[Turn, Any], None]] = {
    **managing.HANDLERS,
    **asking.HANDLERS,
    **auditing.HANDLERS,
}
_ANSWERED: Mapping[str, Callable[[Turn, str, Mapping[str, Any]], None]] = {
    **managing.ANSWERED,
    **auditing.ANSWERED,
}
_REFUSED: Mapping[str, Callable[[Turn, str, Any], None]] = {
    **managing.REFUSED,
    **auditing.REFUSED,
}
_STREAMED = {"ask", "compare"}
_LONG = m.Waited | m.Grew


def handle(state: State, event: m.Event, now: float) -> tuple[State, tuple[m.Request, ...]]:
    """The state after an event, and what is to be asked for because of it."""
    if state.closed:
        return state, ()
    turn = Turn(state, now)
    match event:
        case m.Closed():
            turn.change(closed=True, asleep=True, asked={}, confirm=None)
            return turn.state, ()
        case m.Act():
            turn.change(last_activity=now, visible=True)
            _HANDLERS[type(event)](turn, event)
            _audit_in_view(turn, event)
        case m.Hidden():
            turn.change(visible=False)
        case m.Defect(problem):
            turn.fail(problem)
        case m.Tick():
            pass
        case _:
            _came_back(turn, event)
    turn.look_around()
    turn.change(asleep=not awake(turn.state, now))
    return turn.state, tuple(turn.requests)


def _audit_in_view(turn: Turn, event: m.Act) -> None:
    """Records do not change under a reader: they are fetched when a person turns to them."""
    if turn.state.section == "audit":
        if isinstance(event, m.Refreshed):
            auditing.refreshed(turn)
        auditing.opened(turn)


def _came_back(turn: Turn, event: m.OfRequest) -> None:
    """What nobody waits for any more changes nothing."""
    purpose = turn.state.asked.get(event.number)
    if purpose is None:
        return
    unfinished = isinstance(event, _LONG) or (isinstance(event, m.Wrote) and not event.whole)
    if not unfinished:
        left = {n: what for n, what in turn.state.asked.items() if n != event.number}
        turn.change(asked=left)
    name = purpose.partition(":")[0]
    if name in _STREAMED:
        asking.streamed(turn, purpose, event)
        return
    match event:
        case m.Answered(_, body):
            _ANSWERED[name](turn, purpose, body)
        case m.Refused(_, problem):
            _REFUSED[name](turn, purpose, problem)
        case m.Wrote():
            auditing.wrote(turn, purpose, event)


def next_look(state: State) -> float | None:
    """When a `Tick` is due; None: nothing happens until something else does."""
    if state.asleep or not awake(state, state.last_activity):
        return None
    times = [due_at(state, source) for source in SOURCES[state.section]]
    # A source that has never answered is asked at any event; there is no time to wait for.
    later = [at for at in times if at is not None and at > float("-inf")]
    return min([state.last_activity + IDLE_SECONDS, *later])


def check_invariants(state: State) -> None:
    """What holds after every event. Raises AssertionError."""
    purposes = list(state.asked.values())
    assert all(0 < number <= state.numbers for number in state.asked)
    assert not state.closed or (state.asleep and not purposes)
    several = {what for what in purposes if purposes.count(what) > 1}
    assert all(what.startswith(("act:", "tighten", "save")) for what in several), several
    for purpose, answer in asking.answers(state):
        assert answer.open == (purpose in purposes) or state.closed, (purpose, answer.status)
        assert (answer.problem is not None) == (answer.status == "failed")
        assert answer.status != "done" or answer.figures is not None
    statuses = [one.status for one in state.comparison.answers]
    assert statuses.count("running") <= 1
    assert len(statuses) == len(state.comparison.models)
    assert "queued" not in statuses or statuses.index("queued") > 0
    audit = state.audit
    assert (audit.cursor is None) == (not audit.cursors)
    assert len(state.rates) <= 20
