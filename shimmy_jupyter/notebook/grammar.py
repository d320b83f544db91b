"""Which of the magic's lines are meant as a command.

The first word of `%shimmy …` is a command only where the whole rest of the line reads as its
arguments: as many as it takes, each of its kind. So `%shimmy list three colours` is a prompt. Where a
sentence could begin in the same way, what the words are settles it:

- A model, an alias, a project's name or a variable is one that exists. A word that does not exist, but
  is written as names are (letters with a digit among them, or with `-`, `:`, `/`, `.`, `@` or `_`
  inside) or much like an existing one, is meant as one, and an error says so; any other word makes the line a prompt.
  So `%shimmy load balancing` is a prompt, and `%shimmy load qwen3-1.7` an error, not a silent prompt.
- What can be one of a few words is one of them; what is nearly one is an error.
- A command's own option, or another argument that is certain, makes the line a command, and what else
  is wrong in it an error; so does a command alone that lacks its arguments.

In doubt an error is better than a prompt: it costs nothing and says what to write. `%shimmy -- …` is
always a prompt, and so is a line that begins with an option. A line that would be a command, were its
first word written as one, is a prompt, too; which command that is is said beside it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from ..errors import InvalidValue
from . import arguments
from .arguments import Options, Wrong, near, skip
from .verbs import COMMANDS, NAMED, SAME, Argument, Around, Form, Plain, Verb


@dataclass(frozen=True, slots=True)
class Command:
    """`name` is the canonical one. `arguments` has every argument and option of the command: None,
    False, () or {} where the line does not say.
    """

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Prompt:
    """`meant` is the command that the line would be, were its first word not mistyped; "" for none."""

    options: Options
    text: str
    meant: str = ""


@dataclass(slots=True)
class _Said:
    """What stands after a command's name. `error` is of an option; `sure`, whether one is its own."""

    words: list[str] = field(default_factory=list)
    given: dict[str, Any] = field(default_factory=dict)
    sure: bool = False
    error: InvalidValue | None = None
    prompt: str | None = None


def _said(verb: Verb, line: str) -> _Said | None:
    """None where there are quotes or a `--` that no arguments have."""
    said, at = _Said(), skip(line, 0)
    while at < len(line):
        if flag := arguments.flag_at(line, at):
            said.sure = said.sure or arguments.find(flag[0], verb.flags) is not None
            try:
                at = skip(line, arguments.take(line, at, verb.flags, said.given))
            except InvalidValue as error:
                said.error = said.error or error
                # What follows could be its value, and is no argument of ours.
                rest = re.sub(r"^\S*\s*(?!-)\S*\s*", "", line[flag.end() :])
                at = len(line) - len(rest)
            continue
        try:
            word = arguments.next_word(line, at)
        except Wrong:
            return None
        if word.text == "--" and not word.quoted:
            said.prompt = line[word.end + 1 :]
            return said if verb.asks else None
        said.words.append(word.text)
        at = skip(line, word.end)
    return said


def slots_of(form: Form, words: int) -> list[Argument]:
    """The argument that each word is, and those that none is."""
    slots = [one for one in form.arguments for _ in range(max(one.least, 1))]
    if slots and slots[-1].gather is not None:
        slots += [slots[-1]] * (words - len(slots))
    return slots


def _fit(form: Form, said: _Said, around: Around) -> dict[str, Any] | InvalidValue | None:
    """Arguments by name, what is wrong with them, or None where the words are no such arguments."""
    slots = slots_of(form, len(said.words))
    if len(said.words) > len(slots):
        return None
    values: dict[str, list[Any]] = {}
    wrong, plain, sure = [], [], said.sure or around.named or not said.words
    for argument, word in zip(slots, said.words, strict=False):
        try:
            value, certain = argument.judge(word, around)
        except Plain as odd:
            plain.append(InvalidValue(str(odd), param=argument.name))
        except InvalidValue as odd:
            wrong.append(InvalidValue(odd.message, param=odd.param or argument.name))
        else:
            values.setdefault(argument.name, []).append(value)
            sure = sure or certain
    missing = [one for one in slots[len(said.words) :] if one.least]
    plain += [InvalidValue(f"{one.metavar} is missing", param=one.name) for one in missing]
    if wrong or plain:
        return (wrong + plain)[0] if wrong or sure else None
    gather = {one.name: one.gather for one in form.arguments}
    return {one: g(found) if (g := gather[one]) else found[0] for one, found in values.items()}


def _meant(verb: Verb, said: _Said, around: Around) -> dict[str, Any] | InvalidValue | None:
    """By the first form that fits, options and all; else by what is wrong with the line."""
    found = [(form, _fit(form, said, around)) for form in verb.forms]
    fits = [(form.flags, values) for form, values in found if isinstance(values, dict)]
    errors = [error for _, error in found if isinstance(error, InvalidValue)]
    if not fits or said.error is not None:
        return (said.error or errors[0]) if fits or errors else None
    if verb.asks and not (said.prompt or "").strip():
        return InvalidValue("-- PROMPT is missing", param="prompt")
    for flags, values in fits:
        needs = {flag.field: flag.needs for flag in flags}
        if all(one in needs and needs[one] in {"", *said.given} for one in said.given):
            return values | said.given | ({"prompt": said.prompt} if verb.asks else {})
    odd = next(flag for flag in reversed(verb.flags) if flag.field in said.given)
    return InvalidValue("this option does not go with the rest", param=odd.names[0])


def parse_line(
    line: str,
    known: Callable[[], Collection[str]] = tuple,
    variables: Callable[[], Collection[str]] = tuple,
) -> Command | Prompt:
    """What `%shimmy` is asked for. `known` are the models that the server lists, all of them, aliases and
    a project's names; `variables` the names that the user has, or that answers went into. They are
    called where a word depends on it, and what they raise is raised. Raises `InvalidValue`.
    """
    first, rest = (*line.split(maxsplit=1), "", "")[:2]
    verb = COMMANDS.get(first)
    if verb is None:
        meant = _nearly(first, rest, known, variables)
        return Prompt(*arguments.parse_prompt(line), meant)
    around = Around(cache(known), cache(variables), first in NAMED)
    said = _said(verb, rest)
    found = None if said is None else _meant(verb, said, around)
    if found is None and around.named:
        found = InvalidValue("these are no arguments of it", param=verb.name)
    if isinstance(found, InvalidValue):
        hint = f"(see %shimmy help {verb.name}; with -- in front, the line is a prompt)"
        raise InvalidValue(f"{found.message} {hint}", param=found.param)
    if found is None:
        return Prompt(*arguments.parse_prompt(line))
    slots = {one.name: one.default for form in reversed(verb.forms) for one in form.arguments}
    unsaid = {flag.field: None if flag.read else False for flag in verb.flags}
    return Command(verb.name, slots | unsaid | ({"prompt": None} if verb.asks else {}) | found)


def _nearly(
    first: str,
    rest: str,
    known: Callable[[], Collection[str]],
    variables: Callable[[], Collection[str]],
) -> str:
    """The command that a line would be with its first word written right. Capitals and full stops are
    a sentence's.
    """
    if not (first.isalpha() and first.islower()):
        return ""
    for name in near(first, COMMANDS.keys() - NAMED, SAME):
        try:
            found = parse_line(f"{name} {rest}", known, variables)
        except InvalidValue:
            continue
        if isinstance(found, Command):
            return name
    return ""
