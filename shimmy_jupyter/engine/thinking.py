"""Thinking as a request chooses it, in the words of the model's own chat template."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

from ..core.reasoning import Switch, find_markers, opens, switches
from ..errors import InvalidValue, UnsupportedParameter
from ..types import ChatOptions, Reasoning
from .template import MAX_TEMPLATE_BYTES, VARIABLES

NO_EFFORT = "none"
_END = 512
"""Characters of a prompt whose end is looked at."""


class Thinking:
    """What a chat template knows of reasoning."""

    def __init__(self, template: str) -> None:
        if len(template.encode()) > MAX_TEMPLATE_BYTES:
            template = ""  # it is refused as soon as somebody asks for it
        self._markers = find_markers(template)
        self._switch = switches(template) if self._markers is not None else None

    def variables(self, options: ChatOptions) -> Mapping[str, object]:
        """Those to render the template with. Raises `UnsupportedParameter` for what this template
        cannot be told, and `InvalidValue` for choices that contradict each other.
        """
        thinking, effort = options.thinking, options.effort
        off = thinking is not None and not thinking
        if effort is not None and effort != NO_EFFORT and off:
            raise InvalidValue("thinking is switched off", param="reasoning_effort")
        if effort == NO_EFFORT and thinking:
            raise InvalidValue("thinking is switched on", param="reasoning_effort")
        chosen: dict[str, object] = {}
        if thinking is not None:
            chosen |= self._switched(None if thinking is True else int(thinking))
        if effort == NO_EFFORT:
            chosen |= self._off("reasoning_effort")
        elif effort is not None:
            chosen |= self._with_effort(effort)
        for name, value in options.variables.items():
            if chosen.setdefault(name, value) != value:
                raise InvalidValue(
                    f"{name[:50]!r} contradicts what thinking or reasoning_effort ask for",
                    param=VARIABLES,
                )
        return chosen

    def reasoning(self, prompt: str) -> Reasoning | None:
        """What may come before the answer to a rendered prompt; None where nothing may."""
        markers = self._markers
        end = prompt[-_END:]
        if markers is None or end.rstrip().endswith(markers.end):
            return None
        return Reasoning(markers, opens(end, markers))

    def _switched(self, budget: int | None) -> Mapping[str, object]:
        """On, for so many tokens at most; off where that is 0."""
        if budget == 0:
            return self._off("thinking")
        if self._markers is None:
            _refuse("thinking", "this model's chat template knows no thinking")
        switch = self._switch or Switch()
        on = switch.on or {}
        if budget is None:
            return on
        if switch.budget is None:
            _refuse("thinking", "this model's chat template cannot be told how long to think")
        return {**on, switch.budget: budget}

    def _off(self, param: str) -> Mapping[str, object]:
        if self._markers is None:
            return {}
        if self._switch is None or self._switch.off is None:
            _refuse(param, "this model's chat template has no way to switch thinking off")
        return self._switch.off

    def _with_effort(self, effort: str) -> Mapping[str, object]:
        levels = self._switch.effort if self._switch is not None else {}
        if effort not in levels:
            known = ", ".join(levels) or "none"
            _refuse("reasoning_effort", f"the levels of this model's chat template are: {known}")
        return levels[effort]


def _refuse(param: str, message: str) -> NoReturn:
    raise UnsupportedParameter(message, param=param)
