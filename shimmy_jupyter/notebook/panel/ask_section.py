"""Asking the chosen model, with what parameters; its answer, and the record of it."""

from __future__ import annotations

from collections.abc import Callable

from . import controls as c
from . import messages as m
from . import text
from .fetched import Idle, Ready, ready
from .managing import ranges
from .state import State
from .text import paragraph

_LINES = {
    "temperature": ("Temperature", "0 is greedy; empty is the server's default"),
    "max_tokens": ("Most tokens", "Of the answer; empty is the server's default"),
    "seed": ("Seed", "A whole number, for the same answer again; empty is none"),
}


class AskSection:
    title = "Ask"

    def __init__(self, desk: c.Desk, wall: Callable[[], float]) -> None:
        self._wall, self._seen = wall, c.Seen()
        self.prompt = c.text("Prompt", "What the chosen model is asked", 4)
        self.ask = c.button("Ask the model", "Send the prompt to the chosen model")
        self.stop = c.button("Stop", "Stop the answer, here and on the server")
        self.answer, self.left = c.html(), c.html()
        self.record_wanted = c.button("Show its record", "What the audit has of the last answer")
        self.record = c.html()
        self.system = c.text("System", "A system message in front of the prompt; empty is none", 2)
        self.lines = {name: c.line(label, tip) for name, (label, tip) in _LINES.items()}
        self.reproducible = c.tick(
            "Reproducible", "Compute by itself, so that the same request gives the same answer"
        )
        self.allowed = c.html()
        c.pressed(desk, self.ask, lambda: m.Asked(self.prompt.value))
        c.pressed(desk, self.stop, m.AskStopped)
        c.pressed(desk, self.record_wanted, m.RecordWanted)
        for name, control in {**self.lines, "system": self.system}.items():
            c.changed(desk, control, self._set(name, control))
        c.changed(desk, self.reproducible, self._set("reproducible", self.reproducible))
        self.box = c.widgets.VBox(
            [
                self.prompt,
                c.row(self.ask, self.stop, self.record_wanted),
                self.answer,
                self.record,
                self.left,
                self.system,
                *self.lines.values(),
                self.reproducible,
                self.allowed,
            ]
        )

    @staticmethod
    def _set(name: str, control: c.widgets.Widget) -> c.Make:
        return lambda: m.ParameterSet(name, control.value)

    def show(self, state: State) -> None:
        if self._seen.new("answer", state.answer):
            self.answer.value = text.answer(state.answer)
        if self._seen.new("record", state.audit.record):
            self.record.value = self._record(state)
        if self._seen.new("left", state.limits):
            limits = ready(state.limits)
            self.left.value = (
                text.unready(state.limits, "Limits")
                if limits is None
                else paragraph(text.left(limits.limits, self._wall()))
            )
        if self._seen.new("allowed", state.parameters, state.limits):
            self.allowed.value = self._allowed(state)

    @staticmethod
    def _record(state: State) -> str:
        match state.audit.record:
            case Ready(page):
                return text.records(page, "Records of the last answer")
            case Idle():
                return ""
            case other:
                return text.unready(other, "The record")

    @staticmethod
    def _allowed(state: State) -> str:
        said = []
        for name, one in ranges(state).items():
            why = f" ({one.reason})" if one.reason else ""
            ends = f"{one.least:,.0f} to {one.most:,.0f}" if name != "seed" else "of 64 bits"
            whole = "a whole number, " if one.whole else ""
            said.append(f"{_LINES[name][0]}: {whole}{ends}{why}")
        wrong = [text.failed(problem) for problem in state.parameters.problems.values()]
        return paragraph("; ".join(said) + ".") + "".join(wrong)
