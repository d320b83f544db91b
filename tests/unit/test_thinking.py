"""Thinking as a request chooses it, and what may come before an answer.

Cases: on, off, for so long, by levels, by the template's own variables; each also where the template
cannot be told, and where it knows no thinking; choices that contradict each other; a prompt that has
opened the reasoning, has closed it, or neither.
"""

from __future__ import annotations

import pytest

from shimmy_jupyter.core.reasoning import THINK
from shimmy_jupyter.engine.thinking import Thinking
from shimmy_jupyter.errors import InvalidValue, ShimmyError, UnsupportedParameter
from shimmy_jupyter.types import ChatOptions, Reasoning

PLAIN = "{{ messages }}"
ALWAYS = "{{ '<think>' }}</think>"
SWITCHED = "{% if enable_thinking %}<think>{% endif %}</think>"
BUDGETED = "{% if thinking_budget == 0 %}x{% endif %}{{ thinking_budget }}</seed:think>"
LEVELLED = '{{ "Reasoning: " + reasoning_effort }}<|channel|>analysis<|message|><|channel|>final<|message|>'


@pytest.mark.parametrize(
    ("template", "options", "expected"),
    [
        (PLAIN, ChatOptions(), {}),
        (SWITCHED, ChatOptions(), {}),
        (SWITCHED, ChatOptions(thinking=True), {"enable_thinking": True}),
        (SWITCHED, ChatOptions(thinking=False), {"enable_thinking": False}),
        (SWITCHED, ChatOptions(thinking=0), {"enable_thinking": False}),
        (SWITCHED, ChatOptions(effort="none"), {"enable_thinking": False}),
        (ALWAYS, ChatOptions(thinking=True), {}),
        (PLAIN, ChatOptions(thinking=False), {}),
        (PLAIN, ChatOptions(effort="none"), {}),
        (BUDGETED, ChatOptions(thinking=100), {"thinking_budget": 100}),
        (LEVELLED, ChatOptions(effort="low"), {"reasoning_effort": "low"}),
        (PLAIN, ChatOptions(variables={"tone": [1]}), {"tone": [1]}),
        (
            SWITCHED,
            ChatOptions(thinking=True, variables={"enable_thinking": True, "x": 1}),
            {"enable_thinking": True, "x": 1},
        ),
    ],
)
def test_variables(template: str, options: ChatOptions, expected: dict[str, object]) -> None:
    assert Thinking(template).variables(options) == expected


@pytest.mark.parametrize(
    ("template", "options", "kind", "param"),
    [
        (PLAIN, ChatOptions(thinking=True), UnsupportedParameter, "thinking"),
        (PLAIN, ChatOptions(thinking=9), UnsupportedParameter, "thinking"),
        (PLAIN, ChatOptions(effort="low"), UnsupportedParameter, "reasoning_effort"),
        (ALWAYS, ChatOptions(thinking=False), UnsupportedParameter, "thinking"),
        (ALWAYS, ChatOptions(effort="none"), UnsupportedParameter, "reasoning_effort"),
        (SWITCHED, ChatOptions(thinking=9), UnsupportedParameter, "thinking"),
        (SWITCHED, ChatOptions(effort="low"), UnsupportedParameter, "reasoning_effort"),
        (LEVELLED, ChatOptions(effort="huge"), UnsupportedParameter, "reasoning_effort"),
        (SWITCHED, ChatOptions(False, "low"), InvalidValue, "reasoning_effort"),
        (SWITCHED, ChatOptions(True, "none"), InvalidValue, "reasoning_effort"),
        (
            SWITCHED,
            ChatOptions(True, None, {"enable_thinking": False}),
            InvalidValue,
            "chat_template_kwargs",
        ),
    ],
)
def test_what_cannot_be_had(
    template: str, options: ChatOptions, kind: type[ShimmyError], param: str
) -> None:
    with pytest.raises(kind) as refused:
        Thinking(template).variables(options)
    assert type(refused.value) is kind
    assert refused.value.param == param


def test_the_levels_are_named() -> None:
    with pytest.raises(UnsupportedParameter, match="low, medium, high"):
        Thinking(LEVELLED).variables(ChatOptions(effort="huge"))


@pytest.mark.parametrize(
    ("template", "prompt", "expected"),
    [
        (PLAIN, "<think>\n", None),
        (SWITCHED, "assistant\n", Reasoning(THINK, inside=False)),
        (SWITCHED, "assistant\n<think>\n", Reasoning(THINK, inside=True)),
        (SWITCHED, "x" * 100_000 + "<think>", Reasoning(THINK, inside=True)),
        (SWITCHED, "assistant\n<think>\n\n</think>\n\n", None),
        (SWITCHED, "", Reasoning(THINK, inside=False)),
    ],
)
def test_what_may_come_before_the_answer(
    template: str, prompt: str, expected: Reasoning | None
) -> None:
    assert Thinking(template).reasoning(prompt) == expected
