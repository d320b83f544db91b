"""What help says of the magic, and how its lines are written: all of it by the tables."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..errors import InvalidValue
from .arguments import FLAGS, Flag, Options, did_you_mean, near, shown
from .grammar import Command, Prompt
from .verbs import COMMANDS, NAMED, VERBS, Argument, Form, Verb

_WIDTH = 96
_PLAIN = re.compile(r"[A-Za-z0-9_./:@,+][A-Za-z0-9_./:@,+-]*")
_STOP = str.maketrans({"\n": "\\n", "\t": "\\t", "\r": "\\r", "\\": "\\\\", '"': '\\"'})

RULE = (
    "The first word of a line is a command only where the whole rest reads as its arguments: "
    "`%shimmy list three colours` is a prompt. A model, an alias or a variable among them must exist. "
    "A word that does not, but is written as names are (with a digit, or with `-`, `:`, `/`, `.`, `@` "
    "or `_` inside) or much like an existing one, is an error; any other makes the line a prompt, as "
    "in `%shimmy load balancing`. "
    f"After {' and '.join(sorted(NAMED))} there is never a prompt. "
    "`%shimmy -- PROMPT` is always a prompt, and so is a line that begins with an option."
)
"""Which lines are commands, in words."""

_HEAD = """\
Ask a local language model.

    %shimmy [OPTIONS] PROMPT
    %shimmy COMMAND

    %%shimmy [MODEL] [OPTIONS]
    PROMPT, as many lines as you like

Where no model is named, the notebook's is asked, or the first that the server lists.
Interrupting the kernel stops the model too.
"""


def _flag(flag: Flag) -> str:
    value = f"[{flag.metavar}]" if flag.optional else flag.metavar
    return f"{', '.join(reversed(flag.names))} {value}".rstrip()


def _argument(argument: Argument) -> str:
    if argument.gather is not None:
        return " ".join([argument.metavar] * argument.least + [f"[{argument.metavar} …]"])
    return argument.metavar if argument.least else f"[{argument.metavar}]"


def _parts(verb: Verb, form: Form) -> Iterator[str]:
    yield verb.name
    yield from map(_argument, form.arguments)
    for flag in form.flags:
        if not flag.needs:
            more = [f" [{_flag(one)}]" for one in form.flags if one.needs == flag.field]
            yield f"[{_flag(flag)}{''.join(more)}]"
    if verb.asks:
        yield "-- PROMPT"


def usages(verb: Verb) -> list[tuple[str, str]]:
    """How a command is written, in each of its forms, and what that does."""
    also = f" (Also: {', '.join(verb.synonyms)}.)" if verb.synonyms else ""
    return [(" ".join(_parts(verb, form)), form.help or verb.help + also) for form in verb.forms]


def _listed(rows: Sequence[tuple[str, str]]) -> str:
    wide = min(30, max(len(left) for left, _ in rows))
    lines = []
    for left, right in rows:
        first, *rest = textwrap.wrap(right, _WIDTH - wide - 4)
        fits = len(left) <= wide
        lines += (
            [f"  {left:<{wide}}  {first}"] if fits else [f"  {left}", f"  {'':<{wide}}  {first}"]
        )
        lines += [f"  {'':<{wide}}  {line}" for line in rest]
    return "\n".join(lines)


def usage() -> str:
    """All of it, as plain text: what `%shimmy?` and `%shimmy help` show."""
    commands = [row for verb in VERBS for row in usages(verb)]
    return "\n".join(
        [
            _HEAD,
            "Options, in any order:",
            _listed([(_flag(flag), flag.help) for flag in FLAGS]),
            "",
            "Values may be quoted. `--` ends the options. {Expressions} in a prompt run in this kernel.",
            "",
            "Commands:",
            _listed(commands),
            "",
            textwrap.fill(RULE, _WIDTH),
        ]
    )


def about(command: str) -> str:
    """One command, by its name or a synonym. Raises `InvalidValue` where there is no such."""
    verb = COMMANDS.get(command)
    if verb is None:
        close = did_you_mean(near(command, COMMANDS))
        raise InvalidValue(f"there is no command {shown(command)}{close}", param="command")
    lines = [_listed([(f"%shimmy {form}", what) for form, what in usages(verb)])]
    if verb.flags:
        lines += ["", _listed([(_flag(flag), flag.help) for flag in verb.flags])]
    return "\n".join([*lines, "", f"For example: %shimmy {verb.example}"])


def _row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def table_markdown() -> str:
    """Two tables, of options and of commands, for the documentation."""
    options = [_row(f"`{_flag(flag)}`", flag.help) for flag in FLAGS]
    commands = [
        _row(f"`{form}`", what, f"`%shimmy {verb.example}`" if n == 0 else "")
        for verb in VERBS
        for n, (form, what) in enumerate(usages(verb))
    ]
    return "\n".join(
        [
            _row("option", "what it does"),
            _row("---", "---"),
            *options,
            "",
            _row("command", "what it does", "for example"),
            _row("---", "---", "---"),
            *commands,
            "",
        ]
    )


# Lines


def quoted(text: str) -> str:
    """The text as a word that reads as it."""
    if _PLAIN.fullmatch(text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _given(flags: Sequence[Flag], values: Mapping[str, Any]) -> Iterator[str]:
    for flag in flags:
        if flag.field not in values:
            continue
        value, long = values[flag.field], flag.names[0]
        if flag.read is None:
            yield long
        elif flag.field == "stop":
            yield from (f'{long} "{one.translate(_STOP)}"' for one in value)
        elif flag.field == "parameters":
            yield f"{long} {quoted(json.dumps(dict(value), ensure_ascii=False))}"
        elif flag.field == "leave_out":
            yield f"{long} {','.join(map(str, value))}"
        else:
            yield f"{long} {quoted(str(value))}"


def written(said: Options | Prompt | Command) -> str:
    """A line that reads as what was said: for `Options` the first line of a cell, else of `%shimmy`."""
    if isinstance(said, Prompt):
        return f"{written(said.options)} -- {said.text}".lstrip(" ")
    if isinstance(said, Options):
        empty = Options()
        values = {flag.field: getattr(said, flag.field) for flag in FLAGS}
        return " ".join(_given(FLAGS, {k: v for k, v in values.items() if v != getattr(empty, k)}))
    verb = COMMANDS[said.name]
    values = {name: value for name, value in said.arguments.items() if value not in (None, False)}
    names = list(dict.fromkeys(one.name for form in verb.forms for one in form.arguments))
    words = [word for name in names if name in values for word in _words(values[name])]
    parts = [verb.name, *words, *_given(verb.flags, values)]
    return " ".join(parts + (["--", values["prompt"]] if verb.asks else []))


def _words(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        yield from (f"{name}={'none' if one is None else one}" for name, one in value.items())
    else:
        yield from (quoted(str(one)) for one in (value if isinstance(value, tuple) else (value,)))
