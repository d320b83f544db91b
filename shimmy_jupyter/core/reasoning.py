"""Reasoning before an answer: which texts mark it, where it ends, and how a template switches it.

Chat templates say none of this. What is known of them stands in tables here, looked up in a
template's text: a template that is in none has an answer that is all content.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto

from ..types import Markers

THINK = Markers("<think>", "</think>")

MARKERS: tuple[tuple[str, Markers], ...] = (
    ("<|channel|>analysis<|message|>", Markers(
        "<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>",
        ("<|channel|>final<|message|>",))),  # gpt-oss
    ("<|start|>assistant to=self<|message|>", Markers(
        "to=self<|message|>", "<|eom|><|start|>assistant to=user<|message|>",
        ("to=user<|message|>",))),  # Muse
    ("<|begin|>assistant<|think|>", Markers(
        "<|think|>", "<|end|><|begin|>assistant<|content|>", ("<|content|>",))),  # Solar Open
    ("<|content_thinking|>", Markers(
        "<|content_thinking|>", "<|end_message|><|message_model|><|content_text|>",
        ("<|content_text|>",), "<|end_message|>")),  # Inkling
    ("open_tag('think'", Markers(
        "<|open|>think<|sep|>", "<|close|>think<|sep|>", ("<|open|>response<|sep|>",),
        "<|close|>response<|sep|><|close|>message<|sep|>")),  # Kimi K3
    ("<|channel>thought", Markers("<|channel>thought", "<channel|>")),  # Gemma 4
    ("<|START_RESPONSE|>", Markers(
        "<|START_THINKING|>", "<|END_THINKING|>", ("<|START_RESPONSE|>",), "<|END_RESPONSE|>")),
    ("<|END_THINKING|>", Markers(
        "<|START_THINKING|>", "<|END_THINKING|>", ("<|START_TEXT|>",), "<|END_TEXT|>")),  # Cohere
    ("[BEGIN FINAL RESPONSE]", Markers(
        "Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]",
        closing="[END FINAL RESPONSE]")),  # Apriel
    ("<response></response>", Markers(
        "<think>", "</think>", ("<response>",), "</response>")),  # Granite 3
    ("<|inner_suffix|>", Markers("<|inner_prefix|>", "<|inner_suffix|>")),  # Apertus
    ("[/THINK]", Markers("[THINK]", "[/THINK]")),  # Mistral
    ("</seed:think>", Markers("<seed:think>", "</seed:think>")),
    ("</mm:think>", Markers("<mm:think>", "</mm:think>", ("</mm:think>",))),  # MiniMax M3
    ("</longcat_think>", Markers("<longcat_think>", "</longcat_think>")),
    ("'</think{}>'.format(", Markers("<think:opensource>", "</think:opensource>")),  # Hunyuan 3
    ("◁/think▷", Markers("◁think▷", "◁/think▷")),  # Kimi VL
    ("</think>", THINK),  # nearly everybody else; some templates write the end alone
)  # fmt: skip
"""A text of the template, and the markers of those that have it. The first one counts."""


def find_markers(template: str) -> Markers | None:
    """The markers that a chat template's source is known for; None where it knows no reasoning."""
    return next((markers for text, markers in MARKERS if text in template), None)


def opens(prompt_end: str, markers: Markers) -> bool:
    """Whether a rendered prompt ends inside reasoning that it has opened itself.

    Only the very end counts: `<think></think>` is over, and what a message says of `<think>` is
    text.
    """
    return prompt_end.rstrip().endswith(markers.start)


class _At(Enum):
    BEGINNING = auto()  # nothing but white space has come
    OPENED = auto()  # after the start marker
    REASONING = auto()
    ENDED = auto()  # after the end marker
    BEGUN = auto()  # after what opens the answer proper
    CONTENT = auto()
    CLOSED = auto()  # after what may have ended the answer


_OVER = frozenset([_At.ENDED, _At.BEGUN, _At.CONTENT, _At.CLOSED])
Part = tuple[bool, str]
"""Whether it is reasoning, and the text."""


class ReasoningSplitter:
    """Splits the text of an answer into reasoning and content, as it comes.

    Reasoning is at the beginning or nowhere: a marker in the answer proper is text, and so is an
    end without a start. White space around the markers is not shown. What could be the beginning
    of a marker waits until it is or is not, as does white space that one may follow. A start that
    follows a start is dropped: some models repeat the one in their prompt.
    """

    def __init__(self, markers: Markers, *, inside: bool) -> None:
        """`inside`: the prompt has already opened the reasoning."""
        self._markers = markers
        self._at = _At.OPENED if inside else _At.BEGINNING
        self._spaces: list[str] = []  # apart, for a model may write them without end
        self._held = ""

    @property
    def thinking(self) -> bool:
        """Between the start marker and the end marker."""
        return self._at in {_At.OPENED, _At.REASONING}

    @property
    def done(self) -> bool:
        """Reasoning is over, or cannot come any more as the answer proper has begun."""
        return self._at in _OVER

    def push(self, text: str) -> list[Part]:
        """Add text of the answer; returns the parts that may be shown now, in order."""
        self._held += text
        parts: list[Part] = []
        going = True
        while going and self._held:
            if self._at is _At.REASONING:
                going = self._reason(parts)
            elif self._at is _At.CONTENT:
                going = self._answer(parts)
            else:
                going = self._between(parts)
        return parts

    def finish(self) -> list[Part]:
        """What was held back, at the end of the answer."""
        spaces, text, self._held = self._take_spaces(), self._held, ""
        if self._at in {_At.BEGINNING, _At.REASONING}:
            text = spaces + text
        reasoning = self._at in {_At.OPENED, _At.REASONING}
        return [(reasoning, text)] if text else []

    def _take_spaces(self) -> str:
        spaces = "".join(self._spaces)
        self._spaces.clear()
        return spaces

    def _between(self, parts: list[Part]) -> bool:
        """Where white space and markers are expected: the next of these, or what is neither."""
        text = self._held.lstrip()
        self._spaces.append(self._held[: len(self._held) - len(text)])
        self._held = text
        after = self._expected()
        found = next((marker for marker in after if text.startswith(marker)), None)
        if found is not None:
            self._take_spaces()
            self._held, self._at = text[len(found) :], after[found]
            return True
        if not text or any(marker.startswith(text) for marker in after):
            return False
        spaces = self._take_spaces()
        if self._at is _At.CLOSED:
            parts.append((False, self._markers.closing + spaces))  # so it was text
        elif self._at is _At.BEGINNING:
            self._held = spaces + text
        self._at = _At.REASONING if self._at is _At.OPENED else _At.CONTENT
        return True

    def _expected(self) -> dict[str, _At]:
        """Markers that may come now, and what comes after them."""
        markers = self._markers
        opening = dict.fromkeys(markers.opening, _At.BEGUN)
        if self._at is _At.BEGINNING:
            return {markers.start: _At.OPENED, **opening}
        if self._at is _At.OPENED:
            return {markers.start: _At.OPENED, markers.end: _At.ENDED}
        return opening if self._at is _At.ENDED else {}

    def _reason(self, parts: list[Part]) -> bool:
        text, found = self._up_to(self._markers.end)
        shown = text.rstrip()
        if shown:
            parts.append((True, self._take_spaces() + shown))
        self._spaces.append(text[len(shown) :])
        if found:
            self._take_spaces()
            self._at = _At.ENDED
        return found

    def _answer(self, parts: list[Part]) -> bool:
        text, found = self._up_to(self._markers.closing)
        if text:
            parts.append((False, text))
        if found:
            self._at = _At.CLOSED
        return found

    def _up_to(self, marker: str) -> tuple[str, bool]:
        """Take what is held up to a marker, that included, or to what could become one."""
        text = self._held
        at = text.find(marker) if marker else -1
        if at >= 0:
            self._held = text[at + len(marker) :]
            return text[:at], True
        longest = min(len(marker) - 1, len(text))
        keep = next((n for n in range(longest, 0, -1) if marker.startswith(text[-n:])), 0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False


@dataclass(frozen=True, slots=True)
class Switch:
    """How a template's thinking is chosen: the variables to render it with. None: it cannot be."""

    off: Mapping[str, object] | None = None
    on: Mapping[str, object] | None = None
    budget: str | None = None
    """The variable that takes a number of tokens."""
    effort: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    """By level."""


_Row = tuple[str, str, object, object]
ON_OR_OFF: tuple[_Row, ...] = (
    ("enable_thinking", "", False, True),
    ("thinking_mode", '"adaptive"', "disabled", "enabled"),  # MiniMax M3
    ("thinking_option", "'off'", "off", "on"),  # Ling
    ("thinking_budget", "thinking_budget == 0", 0, -1),  # Seed
    ("reasoning", "reasoning is not undefined", False, True),  # Cohere
    ("reasoning_effort", "'no_think'", "no_think", "high"),  # Hunyuan 3
    ("reasoning_effort", '["low", "minimal"]', "minimal", "high"),  # Solar Open
    ("thinking", "", False, True),  # DeepSeek, Granite, Kimi
)
"""A variable, a text that the template must have too, and the variable's values for off and on.
The first one counts."""

BUDGETS = ("thinking_budget",)

LEVELS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("reasoning_effort", "'no_think'", ("low", "high")),
    ("reasoning_effort", "reasoning_effort == 'high'", ("high", "max")),  # DeepSeek V4 Flash
    ("reasoning_effort", "reasoning_effort == 'max'", ("max",)),  # DeepSeek V4
    ("reasoning_effort", '"Reasoning: " + reasoning_effort', ("low", "medium", "high")),  # gpt-oss
    ("thinking_effort", "'low', 'high', 'max'", ("low", "high", "max")),  # Kimi K3
    ("reasoning_strength", "Reasoning strength", ("low", "medium", "high", "xhigh")),  # Muse
)
"""A variable, a text that the template must have too, and the levels it knows."""


def switches(template: str) -> Switch | None:
    """How a chat template's source lets thinking be chosen; None where it does not."""
    statements = list(_statements(template))

    def known(variable: str, text: str) -> bool:
        return text in template and _reads(statements, variable)

    switch = next((row for row in ON_OR_OFF if known(*row[:2])), None)
    off, on = ({switch[0]: value} for value in switch[2:]) if switch else (None, None)
    budget = next((name for name in BUDGETS if known(name, "")), None)
    variable, _, levels = next((row for row in LEVELS if known(*row[:2])), ("", "", ()))
    effort = {level: {**(on or {}), variable: level} for level in levels}
    if off is None and budget is None and not effort:
        return None
    return Switch(off, on, budget, effort)


_OPEN = re.compile(r"\{([{%#])[-+]?")
_WORD = re.compile(
    # A text without an end goes on to the template's: looked for again and again, it takes long.
    r"""'(?:[^'\\]|\\.)*(?:'|\Z)|"(?:[^"\\]|\\.)*(?:"|\Z)|\w+|[-+]?%\}|[=!<>]=|[^\w\s]""",
    re.DOTALL,
)
_NESTING = frozenset("if for macro call filter block generation".split())


def _statements(template: str) -> Iterator[list[str]]:
    """The words of each expression or statement, but for texts, of which nothing is left."""
    at = 0
    while opened := _OPEN.search(template, at):
        at = opened.end()
        if opened[1] == "#":
            at = template.find("#}", at) + 2
            if at < 2:
                return
            continue
        words: list[str] = []
        depth = 0
        while word := _WORD.search(template, at):
            at = word.end()
            text = word[0]
            if text[-2:] == "%}" or (text == "}" and depth == 0):
                break
            depth += (text in {"(", "[", "{"}) - (text in {")", "]", "}"})
            words.append("''" if text[0] in "'\"" else text)
        yield words


def _reads(statements: list[list[str]], name: str) -> bool:
    """Whether the template looks at what is given for a variable, before it sets its own."""
    depth = 0
    for words in statements:
        if name in words:
            uses = [i for i, word in enumerate(words) if word == name]
            if any(_is_read(words, i) for i in uses):
                return True
            if depth == 0 and words[0] == "set" and name in words[1:2]:
                return False
        kind = words[0] if words else ""
        depth += (kind in _NESTING) - (kind.removeprefix("end") in _NESTING and kind[:3] == "end")
    return False


def _is_read(words: list[str], at: int) -> bool:
    before = words[at - 1] if at else ""
    after = words[at + 1] if at + 1 < len(words) else ""
    # Not an attribute, a filter's name, an argument's name or what is set.
    return before not in {".", "|"} and after != "="
