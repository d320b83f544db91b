"""The panel as widgets: it shows the view model's state, and says what a person does."""

from __future__ import annotations

import functools
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

from . import controls as c
from . import messages as m
from . import text
from .ask_section import AskSection
from .audit_section import AuditSection
from .compare_section import CompareSection
from .errands import problem_of
from .fetched import ready
from .limits_section import LimitsSection
from .live_section import LiveSection
from .model import handle, next_look
from .models_section import ModelsSection
from .post import Post
from .reach import Transport
from .state import SECTIONS, State
from .work import Work

_ASLEEP = "Nothing is fetched by itself now: {why}. Resume updates, or use anything here."


class Panel(c.widgets.VBox):  # type: ignore[misc]
    """Made by `shimmy.panel()`. `close()` ends it; so do its being collected and the interpreter's end.

    Whether it is in view is told by front ends, which count their views of a widget: an output that is
    cleared, or a notebook that is closed, takes its view away. Of a browser tab behind another, and of a
    page that is gone without a word, nothing is heard; there the five minutes without anybody hold.

    `clock` is steady, `wall` in seconds since 1970. Without `start` it has no thread, and `work.step`
    is for whoever made it to call.
    """

    _end: weakref.finalize[Any, Any] | None = None

    def __init__(
        self,
        transport: Callable[[], Transport],
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        start: bool = True,
    ) -> None:
        self.state = State()
        self._clock = clock
        self._lock, self._rendering = threading.RLock(), False
        self._seen = c.Seen()
        self._make(wall)
        # A front end counts its views of the panel here: without any, nobody looks.
        super().__init__(
            [self.status, self.confirm, self._top, c.row(*self.sections), self._pages],
            _view_count=0,
        )
        self._post = Post(_weakly(self._take))
        self.work = Work(transport, self._post.put, clock, start=start)
        self._end = weakref.finalize(self, self.work.close)
        self.observe(self._viewed, "_view_count")
        self.act(m.Opened)

    def _make(self, wall: Callable[[], float]) -> None:
        self.status = c.html()
        self.question = c.html()
        self.yes = c.button("Yes, do it", "Do what is asked above")
        self.no = c.button("No, leave it", "Leave everything as it is")
        self.confirm = c.row(self.question, self.yes, self.no)
        self.model = c.choice("Model", "The model that is asked")
        self.about = c.html()
        self.refresh = c.button("Refresh", "Fetch what is in view now")
        self.pause = c.button("Pause updates", "Whether anything is fetched by itself")
        self._top = c.widgets.VBox([c.row(self.model, self.refresh, self.pause), self.about])
        self.ask, self.models = AskSection(self, wall), ModelsSection(self)
        self.compare, self.limits = CompareSection(self), LimitsSection(self, wall)
        self.audit, self.live = AuditSection(self), LiveSection()
        self._sections: tuple[c.Section, ...] = (
            self.ask,
            self.models,
            self.compare,
            self.limits,
            self.audit,
            self.live,
        )
        # Buttons, as there are front ends (Notebook 7) in which a keyboard does not reach tabs.
        self.sections = [c.button(one.title, "") for one in self._sections]
        pages = [c.page(one.title, one.box) for one in self._sections]
        self._pages = c.widgets.VBox(pages)
        c.pressed(self, self.yes, m.Confirmed)
        c.pressed(self, self.no, m.Declined)
        c.pressed(self, self.refresh, m.Refreshed)
        c.pressed(self, self.pause, self._toggled)
        c.changed(self, self.model, lambda: m.ModelChosen(self.model.value or ""))
        for section, button in zip(SECTIONS, self.sections, strict=True):
            c.pressed(self, button, functools.partial(m.SectionChosen, section))

    def _toggled(self) -> m.Act:
        return m.Resumed() if self.state.paused or self.state.asleep else m.Paused()

    def _viewed(self, change: dict[str, Any]) -> None:
        self._post.here()
        if change["new"] > change["old"]:
            self.act(m.Shown)
        elif change["new"] <= 0:
            self._take([m.Hidden()])

    # What happens

    def act(self, make: c.Make) -> None:
        """A person has done something: `make` says what. What we show is nobody's doing."""
        self._post.here()
        with self._lock:
            if self._rendering:
                return
            try:
                event = make()
            except Exception as error:  # noqa: BLE001  people see it, with its code
                self._take([m.Defect(problem_of(error))])
                return
            if event is not None:
                self._take([event])

    def _take(self, events: list[m.Event]) -> None:
        with self._lock:
            for event in events:
                self._handle(event)
            if not self.state.closed:
                self._show()
                self.work.tick_at(next_look(self.state))

    def _handle(self, event: m.Event) -> None:
        now = self._clock()
        try:
            self.state, requests = handle(self.state, event, now)
        except Exception as error:  # noqa: BLE001  people see it, with its code
            self.state, requests = handle(self.state, m.Defect(problem_of(error)), now)
        self.work.ask(requests)

    # What is seen

    def _show(self) -> None:
        self._rendering = True
        try:
            for show in (self._show_frame, *(one.show for one in self._sections)):
                self._shown_or_said(show)
        finally:
            self._rendering = False

    def _shown_or_said(self, show: Callable[[State], None]) -> None:
        """What cannot be shown does not keep the rest from it."""
        try:
            show(self.state)
        except Exception as error:  # noqa: BLE001  people see it, with its code
            self.status.value = _said("alert", text.failed(problem_of(error)))

    def _show_frame(self, state: State) -> None:
        if self._seen.new("status", state.notice, state.asleep, state.paused, state.visible):
            self.status.value = _status(state)
            resume = state.paused or state.asleep
            self.pause.description = "Resume updates" if resume else "Pause updates"
        if self._seen.new("section", state.section):
            self._show_section(SECTIONS.index(state.section))
        if self._seen.new("confirm", state.confirm):
            confirm = state.confirm
            self.question.value = text.paragraph(confirm.question) if confirm else ""
            c.shown(self.confirm, yes=confirm is not None)
            if confirm is not None:
                self.no.focus()
        if self._seen.new("models", state.models, state.chosen):
            self._show_model(state)

    def _show_model(self, state: State) -> None:
        models = ready(state.models)
        if models is None:
            self.about.value = text.unready(state.models, "Models")
        else:
            offered = [(one.id, one.id) for one in models.models if one.answers]
            if state.chosen is not None and state.chosen not in {id for _, id in offered}:
                offered.append((state.chosen, state.chosen))
            c.choose(self.model, offered, state.chosen)
            self.about.value = text.model_line(models.find(state.chosen))

    def _show_section(self, index: int) -> None:
        """Which is in view is told by a mark, not by a colour alone."""
        for place, (one, button) in enumerate(zip(self._sections, self.sections, strict=True)):
            button.description = f"{'✓ ' * (place == index)}{one.title}"
            button.tooltip = f"{one.title}: in view" if place == index else f"Show {one.title}"
            button.button_style = "primary" if place == index else ""
            c.shown(self._pages.children[place], yes=place == index)

    # Its end

    def close(self) -> None:
        """Cancel what is on its way, end the thread once its step in progress has returned, and take
        the widgets away. Closing twice is fine.
        """
        if self._end is None:  # it was never whole
            super().close()
            return
        with self._lock:
            if self.state.closed:
                return
            self._take([m.Closed()])
        self._end()
        for one in _below(self):
            one.close()
        super().close()

    def __repr__(self) -> str:
        return f"<shimmy panel, {'closed' if self.state.closed else 'open'}>"


def _status(state: State) -> str:
    """The one place that screen readers are told to watch."""
    notice, parts = state.notice, []
    if notice is not None and notice.problem is not None:
        if notice.text:
            parts.append(text.paragraph(f"This did not work: {notice.text}."))
        parts.append(text.failed(notice.problem))
    elif notice is not None:
        parts.append(text.paragraph(notice.text))
    if state.asleep:
        why = "nobody has used this panel for five minutes" if state.visible else "nobody sees it"
        why = "you have paused it" if state.paused else why
        parts.append(text.paragraph(_ASLEEP.format(why=why)))
    wrong = notice is not None and notice.problem is not None
    return _said("alert" if wrong else "status", "".join(parts))


def _said(role: str, body: str) -> str:
    # The widget replaces its content, of which not every screen reader reads a status out; an alert
    # that appears is read by all.
    live = "assertive" if role == "alert" else "polite"
    return f'<div role="{role}" aria-live="{live}" aria-atomic="true">{body}</div>'


def _weakly(method: Callable[[list[m.Event]], None]) -> Callable[[list[m.Event]], None]:
    """So that the thread does not keep the panel."""
    found = weakref.WeakMethod(method)

    def call(events: list[m.Event]) -> None:
        alive = found()
        if alive is not None:
            alive(events)

    return call


def _below(widget: Any) -> list[Any]:
    """All that are in it, and what they are laid out and styled by."""
    found = []
    for child in getattr(widget, "children", ()):
        found += [*_below(child), child]
    return [
        *found,
        *(getattr(widget, name) for name in ("layout", "style") if hasattr(widget, name)),
    ]
