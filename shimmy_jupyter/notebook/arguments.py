"""The options of a magic's line, by one table: parser, help and completion all go by it.

White space parts words. A value may stand in quotes. Between single ones it is as it stands; between
double ones `\\"` is a quote and `\\\\` a backslash, and every other backslash is itself. `--x=1` and
`--x 1` are the same, as are `--max-tokens` and `--max_tokens`. A value that looks like an option, such
as `-x`, has to be quoted or to follow a `=`; a negative number does not.
"""

from __future__ import annotations

import difflib
import json
import keyword
import math
import re
import unicodedata
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from ..errors import InvalidValue

_SPACE = re.compile(r"\s*")
_FLAG = re.compile(r"--?[^\W\d_][^\s=]*")
_END = re.compile(r"--(?!\S)")
_QUOTED = re.compile(r"""'([^']*)'|"((?:[^"\\]|\\.)*+)\"""", re.DOTALL)
_BARE = re.compile(r"\S+")
_WHOLE = re.compile(r"[+-]?[0-9]{1,20}")
_COUNT = re.compile(r"""(["']?)[+-]?[0-9]+\1(?!\S)""")
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?")
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\", '"': '"', "'": "'"}
_PART = re.compile(r"(?:In|Out|Err)\[[1-9][0-9]{0,9}\]")
_LARGEST = 2**31 - 1
_SHOWN_TOKENS = 5
TASKS = ("chat", "code", "reasoning", "embedding", "rerank")
"""What the server has suggestions for; whether it has is for the server to say."""
LIMITS = (
    "max_requests_per_minute", "max_tokens_per_minute", "max_tokens_per_day", "max_concurrent",
    "max_queued", "max_prompt_tokens", "max_completion_tokens", "max_seconds",
)  # fmt: skip
_SENT = frozenset("model seed temperature max_tokens stop stream reproducible logprobs".split())
"""Fields that requests have under the same names."""


class Format(StrEnum):
    """How an answer is shown. `md` is another name of `markdown`."""

    CODE = "code"
    HTML = "html"
    IMAGE = "image"
    JSON = "json"
    MARKDOWN = "markdown"
    MATH = "math"
    TEXT = "text"


FORMATS: Mapping[str, Format] = {
    name: Format("markdown" if name == "md" else name)
    for name in ("code", "html", "image", "json", "markdown", "md", "math", "text")
}


@dataclass(frozen=True, slots=True)
class Options:
    """What a line says; None where it says nothing. `schema` is a name in the user's namespace, with
    dots where it is in something; `leave_out` are cells' numbers, and names of parts; `logprobs` is how many of the
    likeliest tokens to show beside each.
    """

    model: str | None = None
    format: Format | None = None
    output: str | None = None
    schema: str | None = None
    system: str | None = None
    seed: int | None = None
    temperature: float | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)
    context: int | None = None
    leave_out: tuple[int | str, ...] = ()
    interpolate: bool | None = None
    dry_run: bool = False
    stream: bool | None = None
    reproducible: bool | None = None
    logprobs: int | None = None
    profile: str | None = None


class Wrong(Exception):
    """What is wrong with a word; whoever reads it knows the option that it is the value of."""


@dataclass(frozen=True, slots=True)
class Word:
    """`text` is what is meant, `raw` what stands between the quotes, `end` where it ends in the line."""

    text: str
    raw: str
    quoted: bool
    end: int


Read = Callable[[Word], Any]


def shown(text: str) -> str:
    return repr(text if len(text) <= 64 else f"{text[:63]}…")


def skip(line: str, at: int) -> int:
    """Where the next word begins."""
    return _SPACE.match(line, at).end()  # type: ignore[union-attr]  # it always matches


def flag_at(line: str, at: int) -> re.Match[str] | None:
    """An option's name, where one begins. `--`, `---`, `-5` and `- a` are none."""
    return _FLAG.match(line, at)


def next_word(line: str, at: int) -> Word:
    """The word that begins at `at`. Raises `Wrong` for a quote that nothing closes, or that something
    follows.
    """
    if line[at] not in "\"'":
        bare = _BARE.match(line, at)
        assert bare is not None
        return Word(bare[0], bare[0], quoted=False, end=bare.end())
    match = _QUOTED.match(line, at)
    if match is None:
        raise Wrong("the quote is not closed")
    end = match.end()
    if end < len(line) and not line[end].isspace():
        raise Wrong("there must be a space after the closing quote")
    if match[1] is not None:
        return Word(match[1], match[1], quoted=True, end=end)
    return Word(re.sub(r'\\(["\\])', r"\1", match[2]), match[2], quoted=True, end=end)


def near(word: str, choices: Collection[str], cutoff: float = 0.7) -> list[str]:
    """Up to three of the choices that are written much like the word, the most alike first."""
    lower = {choice.lower(): choice for choice in choices}
    found = difflib.get_close_matches(word.lower()[:64], lower, n=3, cutoff=cutoff)
    return [lower[one] for one in found]


def did_you_mean(names: Sequence[str]) -> str:
    return f"; did you mean {' or '.join(names)}?" if names else ""


def whole(low: int, high: int, right: str) -> Read:
    """Reads a whole number of that range; `right` says what would be one."""

    def read(word: Word) -> int:
        if not _WHOLE.fullmatch(word.text) or not low <= int(word.text) <= high:
            raise Wrong(f"{shown(word.text)} is not {right}")
        return int(word.text)

    return read


def name(word: Word) -> str:
    """Reads what names something: printable, not empty, not long."""
    text = word.text.strip()
    if not text or len(text) > 512 or not text.isprintable():
        raise Wrong(f"{shown(text)} is not a name")
    return text


def _temperature(word: Word) -> float:
    value = float(word.text) if _NUMBER.fullmatch(word.text) else math.nan
    if not 0 <= value <= 2:
        raise Wrong(f"{shown(word.text)} is not a number from 0 (greedy) to 2")
    return value + 0.0  # of -0 it makes 0


def _format(word: Word) -> Format:
    if word.text not in FORMATS:
        close = did_you_mean(near(word.text, FORMATS))
        raise Wrong(f"{shown(word.text)} is no format{close}; there are {', '.join(FORMATS)}")
    return FORMATS[word.text]


def _named(right: str, *, dots: bool) -> Read:
    def read(word: Word) -> str:
        text = unicodedata.normalize("NFKC", word.text)  # as Python does it with names
        parts = text.split(".") if dots else [text]
        if not all(part.isidentifier() and not keyword.iskeyword(part) for part in parts):
            raise Wrong(f"{shown(word.text)} is not {right}")
        return text

    return read


def _stop(word: Word) -> tuple[str, ...]:
    text = word.text
    if word.quoted:
        text = re.sub(r"\\(.)", lambda m: _ESCAPES.get(m[1], m[0]), word.raw, flags=re.DOTALL)
    if not text:
        raise Wrong("an empty text would stop every answer before it begins")
    return (text,)


def _cells(word: Word) -> tuple[int | str, ...]:
    read = whole(1, _LARGEST, "a cell's number; between several there are only commas, as in 3,1")
    parts = word.text.split(",")
    found = tuple(p if _PART.fullmatch(p) else read(replace(word, text=p)) for p in parts)
    if len({*found}) < len(found):
        raise Wrong(f"{shown(word.text)} has a number twice")
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice")
    return found


def _parameters(word: Word) -> dict[str, Any]:
    try:
        value = json.loads(word.text, object_pairs_hook=_once)
        # What is no number in JSON, or no text in Unicode, could not be sent.
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise Wrong(
            f"{shown(word.text)} is not a JSON object with each key once; with spaces in it, it needs "
            """quotes, as in '{"top_k": 20}'"""
        )
    return value


@dataclass(frozen=True, slots=True)
class Flag:
    """An option: its long name first. Without `read` it is a switch, and its value is `on`; so it is
    where the value is `optional` and left out. `join` is for one that may be repeated. `needs` is the
    field of one that it makes no sense without. `offers` is what Tab offers as its value: words, or
    "models" or "variables".
    """

    names: tuple[str, ...]
    field: str
    help: str
    metavar: str = ""
    read: Read | None = None
    on: Any = True
    optional: bool = False
    join: Callable[[Any, Any], Any] | None = None
    needs: str = ""
    offers: tuple[str, ...] | str = ()


FLAGS: tuple[Flag, ...] = (
    Flag(("--model",), "model", "The model to ask; in the first line of a cell it can stand by itself.",
         "NAME", name, offers="models"),
    Flag(("--format", "-f"), "format", f"How to show the answer: {', '.join(FORMATS)}.",
         "FORMAT", _format, offers=tuple(FORMATS)),
    Flag(("--output", "-o"), "output", "The variable that the answer goes into.",
         "VAR", _named("a name for a variable", dots=False), offers="variables"),
    Flag(("--schema",), "schema", "The variable that says what shape the answer must have: a pydantic "
         "model, a dataclass, a TypedDict or a JSON schema.", "NAME",
         _named("a variable's name, such as Answer or models.Answer", dots=True), offers="variables"),
    Flag(("--system",), "system", 'A system message in front of the prompt; "" is for none.',
         "TEXT", lambda word: word.text),
    Flag(("--seed",), "seed", "A whole number of 64 bits. The same seed gives the same answer again.",
         "N", whole(-(2**63), 2**63 - 1, "a whole number of 64 bits")),
    Flag(("--temperature",), "temperature", "From 0, which is greedy, to 2.", "X", _temperature),
    Flag(("--max-tokens",), "max_tokens", "Most tokens to generate; 0 is legal.",
         "N", whole(0, _LARGEST, f"a whole number from 0 to {_LARGEST}")),
    Flag(("--stop",), "stop", r"Text to stop before; may be repeated. In quotes, \n, \t and \\ are a "
         "new line, a tab and a backslash.", "TEXT", _stop, join=lambda old, new: old + new),
    Flag(("--model-parameters", "-m"), "parameters", "Other parameters of the request, as a JSON object "
         "in quotes; may be repeated, and the later wins.", "JSON", _parameters,
         join=lambda old, new: {**old, **new}),
    Flag(("--context",), "context", "Send the N cells that ran last, with their outputs, along.",
         "N", whole(1, _LARGEST, "a whole number, 1 or more")),
    Flag(("--leave-out",), "leave_out", "Cells to leave out of that context, by number, or parts of them, as in 3,Out[1].",
         "CELLS", _cells),
    Flag(("--no-interp",), "interpolate", "Send braces as they stand: nothing in them is evaluated.",
         on=False),
    Flag(("--dry-run",), "dry_run", "Show the prompt as the model would get it, and what it would cost."),
    Flag(("--no-stream",), "stream", "Show the answer once, when it is whole.", on=False),
    Flag(("--reproducible",), "reproducible", "The same bytes every time, on one machine and engine."),
    Flag(("--logprobs",), "logprobs", "Colour each token by how likely it was, with the N likeliest "
         f"beside it: 0 to 20, {_SHOWN_TOKENS} if not said.", "N",
         whole(0, 20, "a whole number from 0 to 20"), on=_SHOWN_TOKENS, optional=True),
    Flag(("--profile",), "profile", "The profile of shimmy.lock that names are looked up in.",
         "NAME", name),
)  # fmt: skip


def take(line: str, at: int, flags: Sequence[Flag], given: dict[str, Any]) -> int:
    """Reads the option whose name begins at `at` into `given`, by its field. Returns where it ends.

    Raises `InvalidValue` for one that is not among `flags`, lacks its value, has a wrong one, or is
    there for the second time.
    """
    match = flag_at(line, at)
    assert match is not None
    flag, end = _known(match[0], flags), match.end()
    param = flag.names[0]
    try:
        value, end = _value(line, end, flag)
    except Wrong as wrong:
        raise InvalidValue(str(wrong), param=param) from None
    if flag.field in given:
        if flag.join is None:
            raise InvalidValue("this option is there twice", param=param)
        value = flag.join(given[flag.field], value)
    given[flag.field] = value
    return end


def find(typed: str, flags: Sequence[Flag]) -> Flag | None:
    """The option that has the name."""
    long = typed[:2] + typed[2:].replace("_", "-")
    return next((flag for flag in flags if long in flag.names), None)


def _known(typed: str, flags: Sequence[Flag]) -> Flag:
    flag = find(typed, flags)
    if flag is not None:
        return flag
    names = [one for flag in flags for one in flag.names]
    close = [f"{typed[:2]} {typed[2:]}"] if typed[:2] in names else near(typed, names)
    there = ", ".join(flag.names[0] for flag in flags) or "none here"
    hint = did_you_mean([one[:64] for one in close]) or f"; there are {there}"
    end = " (-- ends the options, before a prompt)" if flags is FLAGS else ""
    raise InvalidValue(f"there is no such option{hint}{end}", param=typed[:64].replace("_", "-"))


def _value(line: str, at: int, flag: Flag) -> tuple[Any, int]:
    attached = line.startswith("=", at)
    if flag.read is None:
        if attached:
            raise Wrong("this option takes no value")
        return flag.on, at
    start = at + 1 if attached else skip(line, at)
    if flag.optional and not attached and not _COUNT.match(line, start):
        return flag.on, at
    there = start < len(line) and not line[start].isspace()
    if not there or (not attached and (flag_at(line, start) or _END.match(line, start))):
        raise Wrong(f"this option needs a value: {flag.names[0]} {flag.metavar}")
    word = next_word(line, start)
    return flag.read(word), word.end


def options(given: dict[str, Any]) -> Options:
    """From fields. Raises `InvalidValue` where `-m` says what another option says too."""
    for one in given.get("parameters", ()):
        if one in _SENT & given.keys():
            flag = next(flag for flag in FLAGS if flag.field == one)
            raise InvalidValue(
                f"{one!r} is there twice: also by {flag.names[0]}", param="--model-parameters"
            )
    return Options(**given)


def _leading(line: str, at: int, given: dict[str, Any]) -> tuple[int, bool]:
    """Reads options. Returns where the rest begins, and whether `--` stands in front of it."""
    at = skip(line, at)
    while flag_at(line, at):
        at = skip(line, take(line, at, FLAGS, given))
    return (at + 2, True) if _END.match(line, at) else (at, False)


def parse_prompt(line: str) -> tuple[Options, str]:
    """Options at the line's beginning, and the prompt. After `--` that is what follows the space, as it
    stands; else it is the rest without the white space around it. Raises `InvalidValue`.
    """
    given: dict[str, Any] = {}
    at, ended = _leading(line, 0, given)
    return options(given), line[at + 1 :] if ended else line[at:].strip()


def parse_cell(line: str) -> Options:
    """The first line of a cell: options and at most one model, in any order. Raises `InvalidValue`."""
    given: dict[str, Any] = {}
    at, ended = _leading(line, 0, given)
    at = skip(line, at)
    if at < len(line):
        try:
            word = next_word(line, at)
            model = name(word)
        except Wrong as wrong:
            raise InvalidValue(str(wrong), param="model") from None
        at = skip(line, word.end) if ended else skip(line, _leading(line, word.end, given)[0])
        if at < len(line) or "model" in given:
            raise InvalidValue(
                f"the first line takes options and one model, not {shown(line.strip())}; "
                "the prompt begins in the line below",
                param="model",
            )
        given["model"] = model
    return options(given)
