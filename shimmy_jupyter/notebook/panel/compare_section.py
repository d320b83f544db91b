"""The same prompt to several models, side by side."""

from __future__ import annotations

from . import controls as c
from . import messages as m
from . import text
from .fetched import ready
from .state import Answer, State
from .text import paragraph

_MOST = 4
_NONE = ("(none)", "")


class CompareSection:
    title = "Compare"

    def __init__(self, desk: c.Desk) -> None:
        self._seen = c.Seen()
        self.models = [
            c.choice(f"Model {place}", "One of the models to compare", [_NONE])
            for place in range(1, _MOST + 1)
        ]
        self.prompt = c.text("Prompt", "What each of these models is asked", 4)
        self.compare = c.button("Compare them", "Ask them one after the other")
        self.stop = c.button("Stop comparing", "Stop the comparison, here and on the server")
        self.figures = c.html()
        self.answers = [
            c.widgets.HTML(layout=c.widgets.Layout(flex="1 1 20em", min_width="0"))
            for _ in range(_MOST)
        ]
        note = (
            "They answer one after the other, so that each has the machine for itself. The time to "
            "the first token counts from the request's arrival: loading a model is part of it."
        )
        c.pressed(desk, self.compare, self._compared)
        c.pressed(desk, self.stop, m.CompareStopped)
        self.box = c.widgets.VBox(
            [
                c.row(*self.models),
                self.prompt,
                c.row(self.compare, self.stop),
                c.html(paragraph(note)),
                self.figures,
                c.row(*self.answers),
            ]
        )

    def _compared(self) -> m.Compared:
        return m.Compared(self.prompt.value, tuple(d.value for d in self.models if d.value))

    def show(self, state: State) -> None:
        models = ready(state.models)
        if models is not None and self._seen.new("models", state.models):
            offered = [_NONE, *((one.id, one.id) for one in models.models if one.answers)]
            for dropdown in self.models:
                c.choose(dropdown, offered, dropdown.value)
        if not self._seen.new("answers", state.comparison):
            return
        answers = state.comparison.answers
        self.figures.value = text.comparison(answers) if answers else ""
        for place, shown in enumerate(self.answers):
            c.shown(shown, yes=place < len(answers))
            if place < len(answers) and self._seen.new(f"answer {place}", answers[place]):
                shown.value = self._answer(answers[place])

    @staticmethod
    def _answer(answer: Answer) -> str:
        return f"<h4>{text.short(answer.model)}</h4>{text.answer(answer)}"
