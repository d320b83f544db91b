"""IPython reads `%shimmy What does len do?` as a wish for help on `do`. What keeps it from that."""

from __future__ import annotations

import keyword
import tokenize
from collections.abc import Iterator, Sequence
from itertools import groupby
from tokenize import TokenInfo

from IPython.core.inputtransformer2 import (
    ESCAPE_SINGLES,
    TokenTransformBase,
    assemble_continued_line,
    find_end_of_continued_line,
)
from IPython.core.interactiveshell import InteractiveShell

_BLANK = frozenset({tokenize.INDENT, tokenize.DEDENT, tokenize.NEWLINE, tokenize.NL})
_OPERANDS = frozenset({")", "]", "}", "...", "None", "True", "False"})
"""After these and after names a `%` is a modulo."""


class Question(TokenTransformBase):
    """One of IPython's own kind: it looks for one magic at a time and reads the cell's tokens again, so that
    neither text in strings and comments nor an earlier prompt's quotes and brackets mislead it.
    """

    magic = ""
    priority = 1
    """Ahead of help's, which begins at the same place."""

    def __init__(self, start: tuple[int, int], percent: tuple[int, int]) -> None:
        super().__init__(start)  # type: ignore[no-untyped-call]
        self._row, self._column = percent[0] - 1, percent[1]

    @classmethod
    def find(cls, tokens_by_line: Sequence[Sequence[TokenInfo]]) -> Question | None:
        for line in tokens_by_line:
            said = [one for one in line if one.type not in _BLANK]
            for _, row in groupby(said, lambda one: one.start[0]):
                tokens = list(row)
                at = _asking(tokens, cls.magic, first=tokens[0] is said[0])
                if at is not None:
                    return cls(said[0].start, tokens[at].start)
        return None

    def transform(self, lines: list[str]) -> list[str]:
        end = find_end_of_continued_line(lines, self._row)
        start = (self._row, self._column)
        text: str = assemble_continued_line(lines, start, end)
        name, *rest = text[1:].split(maxsplit=1)
        call = f"get_ipython().run_line_magic({name!r}, {''.join(rest)!r})\n"
        before = lines[self._row][: self._column]
        return [*lines[: self._row], before + call, *lines[end + 1 :]]


def _asking(tokens: Sequence[TokenInfo], magic: str, *, first: bool) -> int | None:
    """Where in one row the magic begins, or another one that has it in its text, as `%time` does. `first` is
    whether a statement begins there: further rows of one can begin with a modulo.
    """
    if not first and tokens[-1].string != "?":
        return None
    for at, name in _magics(tokens):
        if at and not _awaits_a_value(tokens[at - 1]):
            continue
        return at if magic in (name, *(inner for _, inner in _magics(tokens[at + 1 :]))) else None
    return None


def _magics(tokens: Sequence[TokenInfo]) -> Iterator[tuple[int, str]]:
    """`%name` by name and place, and not `%name?`, in what may be Python."""
    for at, one in enumerate(tokens[:-1]):
        command = one.string in {"!", "?"} or (not at and one.string in ESCAPE_SINGLES - {"%"})
        if command or one.type == tokenize.ERRORTOKEN:
            return
        name = tokens[at + 1]
        helped = [after for after in tokens[at + 2 : at + 3] if after.string == "?"]
        joined = one.string == "%" and name.type == tokenize.NAME and one.end == name.start
        if joined and not any(after.start == name.end for after in helped):
            yield at, name.string


def _awaits_a_value(token: TokenInfo) -> bool:
    if token.string in _OPERANDS or token.string == "%":
        return False
    return token.type == tokenize.OP or keyword.iskeyword(token.string)


def _of(name: str) -> type[Question]:
    return type("Question", (Question,), {"magic": name})


questions_are_not_help = _of("shimmy")
nor_are_those_of_compat = _of("ai")
"""While `%ai` is ours."""


def install(shell: InteractiveShell, kind: type[Question]) -> None:
    """Doing so again is fine."""
    transformers = shell.input_transformer_manager.token_transformers
    if kind not in transformers:
        transformers.append(kind)


def uninstall(shell: InteractiveShell) -> None:
    transformers = shell.input_transformer_manager.token_transformers
    for kind in (questions_are_not_help, nor_are_those_of_compat):
        while kind in transformers:
            transformers.remove(kind)
