"""What Tab offers on the magic's lines: commands, models, options and their values, and the user's
variables where they are wanted. A matcher of IPython's, beside its own.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import overload

from IPython.core.completer import (
    CompletionContext,
    SimpleCompletion,
    SimpleMatcherResult,
    context_matcher,
)
from IPython.core.interactiveshell import InteractiveShell

from ..errors import ShimmyError
from .arguments import FLAGS, Flag, Wrong, find, flag_at, next_word, skip
from .grammar import slots_of
from .helptext import quoted
from .verbs import COMMANDS, VERBS, Argument, Verb

Names = Callable[[], Sequence[str]]

_IDENTIFIER = "shimmy"
_FIRST = 100
_HISTORY = ("In[", "Out[", "Err[")
_TEXT = frozenset({
    "IPCompleter.latex_name_matcher", "IPCompleter.unicode_name_matcher",
    "IPCompleter.fwd_unicode_matcher", "back_latex_name_matcher", "back_unicode_name_matcher",
})  # fmt: skip
r"""Matchers that only act after a backslash: `\alpha` is as welcome in a prompt as anywhere."""


@dataclass(frozen=True, slots=True)
class _Found:
    """`fragment` is the text before the cursor that one of the words would replace."""

    fragment: str
    words: Sequence[str] = ()


@dataclass(slots=True)
class _Typed:
    """What stands before the cursor: whole words, fields of options, and the word that is being typed.
    `of` is the option that this is the value of, or "flag" for an option's name, "word", or "quote"
    within quotes. `rest` is what follows `--`.
    """

    words: list[str] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    fragment: str = ""
    of: Flag | str = "word"
    rest: str | None = None


def _typed(line: str, flags: Sequence[Flag], *, prompt: bool = False) -> _Typed:
    """Where a `prompt` may follow, the first word that belongs to no option begins it, as `--` does."""
    typed, at = _Typed(), skip(line, 0)
    while at < len(line):
        match = flag_at(line, at)
        if match is None and re.match(r"--?$", line[at:]):
            typed.fragment, typed.of = line[at:], "flag"
            break
        if match is None and (prompt or re.match(r"--\s", line[at:])):
            typed.rest = re.sub(r"^--(?!\S)", "", line[at:])
            break
        if match is not None and match.end() == len(line):
            typed.fragment, typed.of = match[0], "flag"
            break
        at = _word(line, at, typed) if match is None else _option(line, match, flags, typed)
    return typed


def _word(line: str, at: int, typed: _Typed) -> int:
    """Where the next one begins."""
    try:
        word = next_word(line, at)
    except Wrong:
        typed.of = "quote"
        return len(line)
    if word.end < len(line):
        typed.words.append(word.text)
    else:
        typed.fragment, typed.of = line[at:], "quote" if word.quoted else typed.of
    return skip(line, word.end)


def _option(line: str, match: re.Match[str], flags: Sequence[Flag], typed: _Typed) -> int:
    flag, end = find(match[0], flags), match.end()
    attached = line[end] == "="
    start = end + 1 if attached else skip(line, end)
    if flag is not None:
        typed.used.add(flag.field)
    if attached and line[start : start + 1].isspace():
        return skip(line, start)
    if not attached:
        value = flag is not None and flag.read is not None and not flag_at(line, start)
        if not value or (
            flag is not None and flag.optional and not line[start : start + 1].isdigit()
        ):
            return start
    before = len(typed.words)
    typed.of = flag or "quote"
    at = _word(line, start, typed) if start < len(line) else start
    if len(typed.words) > before:
        typed.words.pop()
        typed.of = "word"
    return at


@dataclass(frozen=True, slots=True)
class _Offer:
    """What there is to offer."""

    models: Names
    variables: Names

    def of(self, offers: tuple[str, ...] | str) -> Sequence[str]:
        if isinstance(offers, tuple):
            return offers
        if offers == "commands":
            return tuple(COMMANDS)
        if offers == "variables":
            return self.variables()
        try:
            return [quoted(name) for name in self.models()]
        except ShimmyError:
            return ()


def _begin(fragment: str, words: Iterable[str]) -> _Found:
    """Of the words those that begin like it, in capitals or not, each once."""

    def plain(text: str) -> str:
        return text.replace("_", "-").lower()

    return _Found(
        fragment, [w for w in dict.fromkeys(words) if plain(w).startswith(plain(fragment))]
    )


def _flags(typed: _Typed, flags: Sequence[Flag]) -> _Found:
    used = typed.used
    left = (one for one in flags if one.join or one.field not in used)
    return _begin(typed.fragment, [one.names[0] for one in left if one.needs in {"", *used}])


def _braces(line: str, variables: Names) -> _Found | None:
    """In an expression in braces, the variables; None where IPython knows better, and no words where
    there is no expression.
    """
    opened: list[int] = []
    for at, character in enumerate(line):
        if character == "{":
            opened.append(at)
        elif character == "}" and opened:
            opened.pop()
    inner = line[opened[-1] + 1 :] if opened else '"'
    if inner.count('"') % 2 or inner.count("'") % 2 or re.search(r"[\w)\]}\"']\s+$", inner):
        return _Found("")
    tail = re.search(r"[\w.]*$", inner)
    assert tail is not None
    found = [one for one in (*variables(), *_HISTORY) if one.startswith(tail[0])]
    return _Found(tail[0], found) if found else None


def _cell(line: str, offer: _Offer) -> _Found:
    typed = _typed(line, FLAGS)
    typed.used |= {"model"} if typed.words else set()
    if isinstance(typed.of, Flag):
        return _begin(typed.fragment, offer.of(typed.of.offers))
    if typed.of == "flag":
        return _flags(typed, FLAGS)
    if typed.of == "quote" or (typed.rest is not None and typed.rest.strip()):
        return _Found("")
    if "model" not in typed.used:
        found = _begin(typed.fragment, offer.of("models"))
        if found.words or typed.fragment:
            return found
    return _Found("") if typed.fragment else _flags(typed, FLAGS)


def _line(line: str, offer: _Offer) -> _Found | None:
    first, *rest = re.split(r"\s", line.lstrip(), maxsplit=1)
    if not rest and not first.startswith("-"):
        names = COMMANDS if first else [verb.name for verb in VERBS]
        return _begin(first, names) if "{" not in first else _braces(first, offer.variables)
    verb = COMMANDS.get(first)
    if verb is None or "{" in rest[0]:
        typed = _typed(line, FLAGS, prompt=True)
        if isinstance(typed.of, Flag):
            return _begin(typed.fragment, offer.of(typed.of.offers))
        if typed.of == "flag":
            return _flags(typed, FLAGS)
        return _braces(typed.rest or "", offer.variables)
    return _command(verb, rest[0], offer)


def _command(verb: Verb, line: str, offer: _Offer) -> _Found | None:
    typed = _typed(line, verb.flags)
    if typed.rest is not None:
        return _braces(typed.rest, offer.variables)
    if isinstance(typed.of, Flag):
        return _begin(typed.fragment, offer.of(typed.of.offers))
    if typed.of == "quote":
        return _Found("")
    words: list[str] = []
    flags: list[Flag] = []
    for form in verb.forms:
        slots = slots_of(form, len(typed.words) + 1)
        pairs = zip(slots, typed.words, strict=False)
        if len(slots) < len(typed.words) or any(not _can_be(slot, word) for slot, word in pairs):
            continue
        words += [word for slot in slots[len(typed.words) :][:1] for word in offer.of(slot.offers)]
        flags += form.flags
    if typed.of == "flag":
        return _flags(typed, flags)
    left = [one for one in words if one not in typed.words]
    return _begin(typed.fragment, left) if left or typed.fragment else _flags(typed, flags)


def _can_be(slot: Argument, word: str) -> bool:
    fixed = isinstance(slot.offers, tuple) and slot.offers and slot.gather is None
    return not fixed or word in slot.offers


def _found(text: str, offer: _Offer, magics: Collection[str]) -> _Found | None:
    """None where the cursor is on no line of ours, or IPython knows better."""
    names = "|".join(map(re.escape, magics))
    first, *below = text.lstrip().split("\n")
    cell = re.fullmatch(rf"%%(?:{names})(?:\s(.*))?", first)
    if cell is not None and below:
        return _braces(below[-1], offer.variables)
    if cell is not None:
        return None if cell[1] is None else _cell(cell[1], offer)
    line = re.fullmatch(rf"(?:[^=%]*=\s*|\s*)%(?:{names})\s(.*)", [first, *below][-1])
    return None if line is None else _line(line[1], offer)


def matches(text_before_cursor: str, models: Names, variables: Names) -> list[str]:
    """What Tab offers in a cell, given its text up to the cursor: whole words, of which one replaces
    the word that is being typed. A `ShimmyError` of `models` is as no models.
    """
    found = _found(text_before_cursor, _Offer(models, variables), ("shimmy",))
    return [] if found is None else list(found.words)


class Remembered:
    """Names from a server that may be slow, so that nobody waits for it.

    Asks in a thread of its own, at most one at a time, and waits `wait` seconds; what has not come
    by then is there for the next Tab. Names are good for `keep` seconds, and shown until there are
    newer ones. A `ShimmyError` is as no names.
    """

    def __init__(
        self,
        ask: Names,
        wait: float = 0.2,
        keep: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ask, self._wait, self._keep, self._clock = ask, wait, keep, clock
        self._names: Sequence[str] = ()
        self._until = -1.0
        self._thread: threading.Thread | None = None

    def __call__(self) -> Sequence[str]:
        if self._clock() >= self._until:
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._look, name="shimmy-names", daemon=True)
                self._thread.start()
            self._thread.join(self._wait)
        return self._names

    def _look(self) -> None:
        try:
            self._names = tuple(self._ask())
        except ShimmyError:
            self._names = ()
        self._until = self._clock() + self._keep


class _Nothing(Sequence[SimpleCompletion]):
    """No completions. IPython lets only a matcher that has some keep the others away, and tells by the
    length; without this, files and Python's names would be offered for the words of a prompt.
    """

    def __len__(self) -> int:
        return 1

    def __bool__(self) -> bool:
        return False

    def __iter__(self) -> Iterator[SimpleCompletion]:
        return iter(())

    @overload
    def __getitem__(self, index: int) -> SimpleCompletion: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[SimpleCompletion]: ...
    def __getitem__(self, index: int | slice) -> SimpleCompletion | Sequence[SimpleCompletion]:
        raise IndexError(index)


def install(
    shell: InteractiveShell,
    models: Names,
    variables: Names | None = None,
    magics: Collection[str] = ("shimmy",),
) -> None:
    """Makes Tab complete the magics' lines, in the place of what was installed before. `variables` are
    the user's own unless they are given. `models` is called in the kernel's main thread: see
    `Remembered`.
    """

    def own() -> list[str]:
        hidden = shell.user_ns_hidden
        return sorted(n for n in list(shell.user_ns) if n not in hidden and not n.startswith("_"))

    offer = _Offer(models, variables or own)

    def matcher(context: CompletionContext) -> SimpleMatcherResult:
        above = context.full_text.split("\n")[: context.cursor_line]
        found = _found("\n".join([*above, context.text_until_cursor]), offer, magics)
        if found is None:
            return {"completions": [], "suppress": False}
        words = [SimpleCompletion(word, type="shimmy") for word in found.words]
        return {
            "completions": words or _Nothing(),
            "matched_fragment": found.fragment,
            "suppress": True,
            "do_not_suppress": set(_TEXT),
            "ordered": True,
        }

    uninstall(shell)
    marked = context_matcher(identifier=_IDENTIFIER, priority=_FIRST)(matcher)
    shell.Completer.custom_matchers.append(marked)


def uninstall(shell: InteractiveShell) -> None:
    """Takes it out again, whoever has put it in."""
    there = shell.Completer.custom_matchers
    there[:] = [one for one in there if getattr(one, "matcher_identifier", "") != _IDENTIFIER]
