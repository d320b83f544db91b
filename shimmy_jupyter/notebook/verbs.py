"""The magic's commands, by one table, and what their arguments have to be."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from ..errors import InvalidValue
from . import arguments
from .arguments import LIMITS, TASKS, Flag, Word, Wrong, did_you_mean, near, shown

NAMED = frozenset({"dealias", "compat"})
"""Commands that no sentence begins with: what follows them is never a prompt."""

_NAME = r"(?!\.{1,2}$)[A-Za-z0-9._:@-]{1,128}"
_MARKED = re.compile(
    r"(?=.*[A-Za-z])(?=.*(?:[0-9]|[A-Za-z0-9][-:/.@_][A-Za-z0-9]))[A-Za-z0-9_.:/@+~-]*[A-Za-z0-9_+/]"
)
_LIMIT = re.compile(r"([A-Za-z][\w-]*)=(.*)")
_VALUE = re.compile(r"[0-9]{1,16}(?:\.[0-9]{1,16})?")
SAME = 0.8


@dataclass(frozen=True, slots=True)
class Around:
    """What there is. `named`: the command is one that no sentence begins with."""

    known: Callable[[], Collection[str]]
    variables: Callable[[], Collection[str]]
    named: bool


class Plain(Exception):
    """A word that a sentence could have there. It says what is wrong with it as an argument."""


_Judge = Callable[[str, Around], tuple[Any, bool]]
"""Takes a word. Returns what it stands for, and whether it makes certain that a command is meant.
Raises `Plain`, or `InvalidValue` for what is meant as an argument but is a wrong one.
"""


def _close(text: str, names: Collection[str]) -> list[str]:
    """Names that begin with the text, and letters end there; else those written much like it."""
    begun = re.compile(rf"(?:.*/)?{re.escape(text)}(?![a-z])", re.IGNORECASE)
    found = [one for one in names if len(text) > 2 and begun.match(one)]
    return found[:3] or near(text, names, SAME)


def _existing(what: str, there: Callable[[Around], Collection[str]]) -> _Judge:
    def judge(text: str, around: Around) -> tuple[str, bool]:
        names = there(around)
        if text in names:
            return text, True
        close = _close(text, names)
        said = f"there is no {what} {shown(text)}{did_you_mean(close)}"
        if close or _MARKED.fullmatch(text):
            raise InvalidValue(said, param=what)
        raise Plain(said)

    return judge


def _recorded(text: str, around: Around) -> tuple[str, bool]:
    if re.fullmatch(r"[1-9][0-9]{0,8}", text):  # a cell's number
        return text, True
    return _existing("variable", lambda around: around.variables())(text, around)


def _shaped(pattern: str, right: str) -> _Judge:
    def judge(text: str, _around: Around) -> tuple[str, bool]:
        if not re.fullmatch(pattern, text):
            raise Plain(f"{shown(text)} is not {right}")
        return text, True

    return judge


def _choice(*words: str) -> _Judge:
    def judge(text: str, _around: Around) -> tuple[str, bool]:
        if text in words:
            return text, True
        if close := near(text, words, SAME):
            raise InvalidValue(f"there is no {shown(text)}{did_you_mean(close)}")
        raise Plain(f"{shown(text)} is none of {', '.join(words)}")

    return judge


def _new(text: str, _around: Around) -> tuple[str, bool]:
    if not re.fullmatch(_NAME, text):
        raise Plain(f"{shown(text)} is not a name of up to 128 of A-Z a-z 0-9 . _ : @ -")
    return text, False


def _alias(text: str, around: Around) -> tuple[str, bool]:
    if around.named:
        return _new(text, around)
    return _existing("alias", lambda around: around.known())(text, around)


def _reference(text: str, around: Around) -> tuple[str, bool]:
    there = _MARKED.fullmatch(text) or text.startswith("https://") or text in around.known()
    if not there:
        raise Plain("name a suggestion, a repository as OWNER/NAME, or an https address")
    return text, True


def _verb(text: str, around: Around) -> tuple[str, bool]:
    return COMMANDS[_choice(*COMMANDS)(text, around)[0]].name, True


def _count(text: str, _around: Around) -> tuple[int, bool]:
    if not re.fullmatch(r"[1-9][0-9]{0,3}", text):
        said = f"{shown(text)} is not a whole number from 1 to 9999"
        raise InvalidValue(said) if re.fullmatch(r"[+-]?[0-9]+", text) else Plain(said)
    return int(text), True


def _limit(text: str, _around: Around) -> tuple[tuple[str, int | float | None], bool]:
    match = _LIMIT.fullmatch(text)
    if match is None:
        raise Plain(f"{shown(text)} is not NAME=VALUE")
    limit, value = match[1].replace("-", "_"), match[2].lower()
    if limit not in LIMITS:
        close = near(limit, LIMITS, 0.6)
        said = f"there is no limit {shown(limit)}{did_you_mean(close or LIMITS)}"
        raise InvalidValue(said) if close or "_" in limit else Plain(said)
    if value == "none":
        return (limit, None), True
    if not _VALUE.fullmatch(value) or ("." in value and limit != "max_seconds"):
        right = "a number of seconds" if limit == "max_seconds" else "a whole number"
        raise InvalidValue(f"{shown(match[2])} is not {right}, 0 or more, or none", param=limit)
    return (limit, float(value) if "." in value else int(value)), True


def _limits(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise InvalidValue("a limit is there twice", param="limits")
    return dict(pairs)


def _moment(word: Word) -> str:
    try:
        datetime.fromisoformat(word.text)
    except ValueError:
        raise Wrong(f"{shown(word.text)} is not a day or a moment, such as 2026-11-01") from None
    return word.text


def _digest(word: Word) -> str:
    if not re.fullmatch(r"[0-9a-fA-F]{64}", word.text):
        raise Wrong(f"{shown(word.text)} is not a SHA-256: 64 hexadecimal digits")
    return word.text.lower()


@dataclass(frozen=True, slots=True)
class Argument:
    """A word of a command's. `least` of 0 is for one that may be left out; with `gather` there may be
    any number from `least` on. `offers` is what Tab offers: words, or "models", "variables".
    """

    name: str
    metavar: str
    judge: _Judge
    least: int = 1
    gather: Callable[[Sequence[Any]], Any] | None = None
    default: Any = None
    offers: tuple[str, ...] | str = ()


@dataclass(frozen=True, slots=True)
class Form:
    """One way to write a command; `help` where it does something else than the first."""

    arguments: tuple[Argument, ...] = ()
    flags: tuple[Flag, ...] = ()
    help: str = ""


@dataclass(frozen=True, slots=True)
class Verb:
    """A command. Where it `asks`, `-- PROMPT` ends it, which is its argument `prompt`."""

    name: str
    help: str
    example: str
    forms: tuple[Form, ...] = (Form(),)
    synonyms: tuple[str, ...] = ()
    asks: bool = False

    @property
    def flags(self) -> tuple[Flag, ...]:
        return tuple(flag for form in self.forms for flag in form.flags)


def _words(*words: str, least: int = 1, default: str | None = None) -> Argument:
    return Argument("action", "|".join(words), _choice(*words), least, None, default, words)


_MODEL = _existing("model", lambda around: around.known())
_ONE = Argument("model", "MODEL", _MODEL, offers="models")
_MAYBE = Argument("model", "MODEL", _MODEL, least=0, offers="models")
_NEW = Argument("alias", "NAME", _new)

VERBS: tuple[Verb, ...] = (
    Verb("models", "The models there are; with --suggest, those worth downloading.", "models --suggest",
         (Form(flags=(
             Flag(("--suggest",), "suggest", "What is worth downloading, and fits into this machine."),
             Flag(("--task",), "task", f"Only what is good for {', '.join(TASKS)}.", "TASK",
                  arguments.name, needs="suggest", offers=TASKS))),), ("list",)),
    Verb("use", "Ask this model from now on; alone, say which it is.", "use qwen3-1.7b", (Form((_MAYBE,)),)),
    Verb("load", "Load a model before it is needed.", "load qwen3-1.7b", (Form((_ONE,)),)),
    Verb("unload", "Give a model's memory back.", "unload qwen3-1.7b", (Form((_ONE,)),)),
    Verb("pull", "Download a model: a suggestion, OWNER/NAME on Hugging Face, or an https address.",
         "pull qwen3-1.7b", (Form((Argument("model", "MODEL", _reference),), (
             Flag(("--sha256",), "sha256", "What its bytes must be.", "HEX64", _digest),)),)),
    Verb("probe", "Try a model out, in a process of its own.", "probe qwen3-1.7b", (Form((_ONE,)),)),
    Verb("verify", "Compare a model's bytes with its SHA-256.", "verify qwen3-1.7b", (Form((_ONE,)),)),
    Verb("bench", "Measure a model's speed and memory.", "bench qwen3-1.7b", (Form((_MAYBE,)),)),
    Verb("limits", "Your limits and what is left; NAME=VALUE tightens one, none takes that back.",
         "limits max_tokens_per_day=50000", (Form((Argument(
             "limits", "NAME=VALUE", _limit, 0, _limits, {}, tuple(f"{one}=" for one in LIMITS)),)),)),
    Verb("audit", "The records of your requests.",
         "audit show --limit 20", (
             Form((_words("show", least=0, default="show"),), (Flag(
                 ("--limit",), "limit", "How many records.", "N",
                 arguments.whole(1, 1000, "a whole number from 1 to 1000")),)),
             Form((_words("usage"),), (Flag(
                 ("--since",), "since", "From this day or moment on, in UTC; not said: this month.", "2026-11-01",
                 _moment),), help="What you used, by model."),
             Form((_words("verify"),), help="Whether the log is whole."),
             Form((_words("receipt"), Argument("id", "ID", _shaped(
                 "[0-9a-f]{32}", "a request's id: 32 hexadecimal digits"))), help="Of one request."),
             Form((_words("export"), Argument("file", "FILE", _shaped(
                 r"[^\x00-\x1f\x7f]*(?:\.\w+|/[^/]+)", "a file's name, such as usage.csv"))),
                 help="All of them, into a file."))),
    Verb("replay", "Run a recorded answer again, the last or that of a variable or a cell's number: is it "
         "identical, or what has changed?", "replay answer",
         (Form((Argument("variable", "VAR", _recorded, least=0, offers="variables"),)),)),
    Verb("lock", "Pin a model's bytes in shimmy.lock.", "lock qwen3-1.7b --alias tutor", (Form((_MAYBE,), (
        Flag(("--alias",), "alias", "What notebooks call it.", "NAME", arguments.name),)),)),
    Verb("alias", "Give a model another name.", "alias tutor qwen3-1.7b", (Form((_NEW, _ONE)),), ("register",)),
    Verb("dealias", "Take such a name back.", "dealias tutor",
         (Form((Argument("alias", "NAME", _alias, offers="models"),)),), ("delete",)),
    Verb("update", "Give such a name to another model.", "update tutor qwen3-4b", (Form((_NEW, _ONE)),)),
    Verb("fix", "Explain the last exception, and offer a corrected cell below. It is never run.", "fix",
         (Form((_MAYBE,)),), ("error",)),
    Verb("reset", "Forget what was said in this notebook.", "reset"),
    Verb("history", "What was said in this notebook, or the last N turns of it.", "history 3",
         (Form((Argument("count", "N", _count, least=0),)),)),
    Verb("panel", "Models, parameters, limits and records, to click on.", "panel"),
    Verb("doctor", "Find out what is wrong, and what to do about it.", "doctor"),
    Verb("compat", "Answer to others' magics too: %ai and %%ai.", "compat ai", (Form((_words("ai", least=0),)),)),
    Verb("version", "The versions of shimmy and of its engine.", "version"),
    Verb("help", "This, or all about one command.", "help audit",
         (Form((Argument("command", "COMMAND", _verb, least=0, offers="commands"),)),)),
    Verb("compare", "Ask several models the same, and show the answers side by side.",
         "compare qwen3-1.7b qwen3-4b -- Why is the sky blue?",
         (Form((Argument("models", "MODEL", _MODEL, 2, tuple, (), "models"),)),), asks=True),
)  # fmt: skip
COMMANDS: Mapping[str, Verb] = {one: verb for verb in VERBS for one in (verb.name, *verb.synonyms)}
"""By name and by synonym."""
