"""Native controls, each with a label and a tooltip; and what they have to do with the model.

The only module that imports ipywidgets, beside the one that says that it is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import ipywidgets as widgets  # type: ignore[import-untyped]

from ..display import one_line
from .messages import Act
from .state import State

__all__ = [
    "Desk",
    "Section",
    "Seen",
    "button",
    "changed",
    "choice",
    "choose",
    "html",
    "line",
    "page",
    "pressed",
    "row",
    "shown",
    "text",
    "tick",
    "widgets",
]  # fmt: skip

Make = Callable[[], Act | None]


class Desk(Protocol):
    """Where what a person does is handed in. `make` says what it is; None is nothing."""

    state: State

    def act(self, make: Make) -> None: ...


class Section(Protocol):
    """One section: `box` is what is seen of it."""

    title: str
    box: Any

    def show(self, state: State) -> None:
        """Called after everything that happens: changes what has changed."""
        ...


class Seen:
    """What has been shown already, so that it is not made again."""

    def __init__(self) -> None:
        self._parts: dict[str, tuple[object, ...]] = {}

    def new(self, name: str, *parts: object) -> bool:
        """Whether any of them is another object than the last time."""
        before = self._parts.get(name)
        self._parts[name] = parts
        return before is None or any(a is not b for a, b in zip(before, parts, strict=True))


_STYLE = {"description_width": "9em"}


def html(value: str = "") -> Any:
    return widgets.HTML(value)


def button(label: str, tooltip: str) -> Any:
    return widgets.Button(
        description=label, tooltip=tooltip, layout=widgets.Layout(width="auto", min_width="7em")
    )


def line(label: str, tooltip: str, placeholder: str = "") -> Any:
    """A line of text. It is heard of when it is left, not at each key."""
    return widgets.Text(
        description=label,
        tooltip=tooltip,
        placeholder=placeholder,
        continuous_update=False,
        style=_STYLE,
    )


def text(label: str, tooltip: str, rows: int) -> Any:
    return widgets.Textarea(
        description=label,
        tooltip=tooltip,
        rows=rows,
        continuous_update=False,
        style=_STYLE,
        layout=widgets.Layout(width="99%"),
    )


def choice(label: str, tooltip: str, options: Sequence[tuple[str, str]] = ()) -> Any:
    return widgets.Dropdown(
        description=label,
        tooltip=tooltip,
        options=list(options),
        style=_STYLE,
        layout=widgets.Layout(width="auto", max_width="40em"),
    )


def tick(label: str, tooltip: str) -> Any:
    return widgets.Checkbox(description=label, tooltip=tooltip, indent=False)


def row(*children: Any) -> Any:
    return widgets.HBox(
        list(children), layout=widgets.Layout(flex_flow="row wrap", align_items="center")
    )


def page(title: str, box: Any) -> Any:
    """A section with its heading."""
    return widgets.VBox([html(f'<h3 style="margin:4px 0">{title}</h3>'), box])


def shown(widget: Any, *, yes: bool) -> None:
    widget.layout.display = None if yes else "none"


def choose(dropdown: Any, options: Sequence[tuple[str, str]], value: str | None) -> None:
    """Offer these, and have one of them chosen; where `value` is none of them, the first is."""
    wanted = tuple((one_line(label), one) for label, one in options)
    if tuple(dropdown.options) != wanted:
        dropdown.options = wanted
    offered = [one for _, one in wanted]
    if value not in offered:
        value = offered[0] if offered else None
    if dropdown.value != value:
        dropdown.value = value


def pressed(desk: Desk, button: Any, make: Make) -> None:
    button.on_click(lambda _: desk.act(make))


def changed(desk: Desk, control: Any, make: Make, trait: str = "value") -> None:
    control.observe(lambda _: desk.act(make), trait)
