"""Answers that must match a JSON schema or a grammar: which tokens may come next, by llguidance.

`check` runs where a request comes in, before anything is computed: what it returns is a grammar
that compiles within bounds, for a `Matcher` of the sequence. All the work that a grammar can make
is bounded too: then that sequence fails, and no other.

llguidance is imported on first use. It lets go of the GIL while it compiles and computes masks,
not while it takes a token; after an error its mask allows only the end, as if all were well.
"""

from __future__ import annotations

import json
import re
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from ..errors import InvalidValue, UnsupportedParameter
from ..types import Constraint, Failure
from .json_schema import translate

if TYPE_CHECKING:
    import numpy as np
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer
    from numpy.typing import NDArray

MAX_SCHEMA_BYTES = 64 << 10
MAX_GRAMMAR_BYTES = 16 << 10
MAX_REGEX_BYTES = 2 << 10
MAX_BRANCHES = 500
"""Rules and brackets: llguidance follows them with its stack, and 600 of them take 2 MB of it."""
MAX_OPTIONAL = 1500
"""Parts of terminals that may be missing: time and memory grow with the square of their number
(to 1 s and 200 MB), and a terminal of two terminals has the parts of both."""
MAX_GBNF_WORK = 1_000_000  # rules times bytes: the converter looks at it all once for each rule
MAX_COMPILE_SECONDS = 0.5  # of the processor, in `check`; each `Matcher` compiles once more
MAX_FORCED = 512  # characters that are tokenized where no other text can follow

TOO_COMPLEX = "constraint_too_complex"
_NOTHING = "nothing can match it"
_JSON_OPTIONS = {
    "whitespace_flexible": False,  # a weak model fills its answer with blanks
    "json_allowed_escapes": 'nrbtf\\"',  # "\u0061" would be the key "a" under another name
}
_SCHEMA_AHEAD = re.compile(r"%json[ \t\r\n]*")
# What is not closed llguidance refuses; here it must not be tried again from each quote within.
_QUOTED = re.compile(r'"(?:\\.|[^"\\\n])*"?|/(?:\\.|[^/\\])+/?|(?:#|//)[^\n]*')
_SPECIAL = re.compile(r"<[^<>\s]+>|%(?:regex|lark)\b")
_DEFINITION = re.compile(r"^[ \t]*(?:%ignore|[!?]*([A-Za-z_][\w-]*)([^\n:]*):)", re.MULTILINE)
_TERMINAL = re.compile(r"\b_?[A-Z][A-Z0-9_-]*")
# The converter drops leading zeros; in a regular expression's class these are operators.
_MISREAD = re.compile(r"\\[uU]0|\[[^\[\]\n]*(?:&&|~~|--)")


def check(constraint: Constraint) -> str:
    """The grammar for `Matcher`. Raises what is wrong with it, and where."""
    kind, source = constraint.kind, constraint.source
    param = "response_format" if kind in ("json_object", "json_schema") else "grammar"
    if not isinstance(source, str):
        raise InvalidValue("the source of a constraint is a string", param=param)
    match kind:
        case "json_object":
            grammar: dict[str, Any] = {"json_schema": _schema({"type": "object"}, param)}
        case "json_schema":
            text = _bounded(source, MAX_SCHEMA_BYTES, param)
            grammar = {"json_schema": _schema(_parsed(text), param)}
        case "lark":
            grammar = {"lark_grammar": _lark(_bounded(source, MAX_GRAMMAR_BYTES, param))}
        case "gbnf":
            grammar = {"lark_grammar": _lark(_gbnf(_bounded(source, MAX_GRAMMAR_BYTES, param)))}
        case "regex":
            grammar = {"lark_grammar": _regex(_bounded(source, MAX_REGEX_BYTES, param))}
        case _:
            raise InvalidValue("a constraint of an unknown kind", param=param)
    return _compiled(json.dumps({"grammars": [grammar]}), param)


def _bounded(source: str, size: int, param: str) -> str:
    try:
        length = len(source.encode())
    except UnicodeEncodeError:
        raise InvalidValue("half of a surrogate pair is no character", param=param) from None
    if not 0 < length <= size:
        raise InvalidValue(f"it has {length} bytes: from 1 to {size} can be", param=param)
    return source


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        why = "it is nested too deeply" if isinstance(e, RecursionError) else str(e)
        raise InvalidValue(f"the schema is no JSON: {why}", param="response_format") from None


def _schema(root: Any, param: str) -> dict[str, Any]:
    return translate(root, param) | {"x-guidance": _JSON_OPTIONS}


def _lark(source: str) -> str:
    """With the schemas in it checked as those of requests are."""
    parts, code, at = [], [], 0
    for ahead in _SCHEMA_AHEAD.finditer(source):
        if ahead.start() < at:
            continue  # within the schema before
        try:
            root, end = json.JSONDecoder().raw_decode(source, ahead.end())
        except (ValueError, RecursionError):
            raise InvalidValue("%json without a schema after it", param="grammar") from None
        code.append(source[at : ahead.start()])
        parts += [code[-1], "%json ", json.dumps(_schema(root, "grammar"))]
        at = end
    code.append(source[at:])
    plain = _QUOTED.sub(_marks, "\n".join(code))
    special = _SPECIAL.search(plain)
    if special:
        what = f"{special[0][:40]}: special tokens, %regex and %lark are not supported"
        raise UnsupportedParameter(what, param="grammar")
    if sum(map("".join(code).count, ":([")) > MAX_BRANCHES:
        raise InvalidValue(f"more than {MAX_BRANCHES} rules and brackets", param="grammar")
    if _optional_parts(plain) > MAX_OPTIONAL:
        raise InvalidValue(f"more than {MAX_OPTIONAL} optional parts", param="grammar")
    return "".join([*parts, source[at:]])


def _marks(quoted: re.Match[str]) -> str:
    """Of a regular expression, what can make a part optional; of strings and comments nothing."""
    regex = quoted[0].startswith("/") and not quoted[0].startswith("//")
    return re.sub(r"[^?*{|]", "", quoted[0]) if regex else " "


def _optional_parts(code: str) -> int:
    """At most so many, in all terminals; what is ignored, and rules with attributes, are too."""
    found = list(_DEFINITION.finditer(code))
    bodies, terminals = {}, set()
    for here, after in zip_longest(found, found[1:]):
        name = here[1] or f"%{here.start()}"
        bodies[name] = code[here.end() : after.start() if after else None]
        if here[1] is None or name.isupper() or "[" in here[2]:
            terminals.add(name)
    known: dict[str, int] = {}

    def count(name: str) -> int:
        if name not in known:
            known[name] = 0  # where it needs itself: llguidance refuses that
            total = sum(map(bodies[name].count, "?*{|~"))
            for other in _TERMINAL.findall(bodies[name]) if name in terminals else ():
                if other in bodies:
                    total += count(other)
            known[name] = total
        return known[name]

    try:
        return sum(count(name) for name in bodies)
    except RecursionError:
        raise InvalidValue("terminals are nested too deeply", param="grammar") from None


def _gbnf(source: str) -> str:
    from llguidance.gbnf_to_lark import gbnf_to_lark

    if _MISREAD.search(source):
        what = r"a code point that begins with 0 (\u00e9), and &&, ~~ or -- in brackets,"
        raise UnsupportedParameter(f"{what} are not supported", param="grammar")
    if source.count("::=") * len(source) > MAX_GBNF_WORK:
        raise InvalidValue("too many rules in too long a grammar", param="grammar")
    try:
        return gbnf_to_lark(source)
    except RecursionError:
        raise InvalidValue("the grammar is nested too deeply", param="grammar") from None
    except Exception as e:  # noqa: BLE001  it raises bare ones for unknown and colliding rules
        raise InvalidValue(f"the grammar is no GBNF: {_line(str(e))}", param="grammar") from None


def _regex(source: str) -> str:
    from llguidance import regex_to_lark

    if (len(source) - len(source.rstrip("\\"))) % 2:
        raise InvalidValue("a regular expression ends in a backslash", param="grammar")
    return f"start: /{regex_to_lark(source, '')}/"


# Compiling


@lru_cache(maxsize=1)
def _limits() -> LLParserLimits:
    """Real schemas stay far within; what does not costs milliseconds, then fails.

    240 optional keys are 1,000 items in a row; a bounded string takes 16 lexer states a token.
    """
    from llguidance import LLParserLimits

    return LLParserLimits(
        max_items_in_row=1000,
        step_max_items=2000,
        step_lexer_fuel=100_000,
        initial_lexer_fuel=200_000,
        max_lexer_states=100_000,
        max_grammar_size=50_000,
        verbose_errors=False,
    )


@lru_cache(maxsize=1)
def _bytes() -> LLTokenizer:
    from llguidance import LLTokenizer

    return LLTokenizer("byte")


def _matcher(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    from llguidance import LLMatcher

    # Its functions that only validate let panics through; this catches them, and is in error.
    return LLMatcher(tokenizer, grammar, log_level=0, limits=_limits())


def _compiled(grammar: str, param: str) -> str:
    """The same, once it has been compiled for a vocabulary of bytes."""
    began = time.thread_time()
    matcher = _matcher(_bytes(), grammar)
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error():
        raise InvalidValue(_said(matcher), param=param)
    if time.thread_time() - began > MAX_COMPILE_SECONDS:
        raise InvalidValue("it takes too long to compile", param=param)
    return grammar


def _said(matcher: LLMatcher) -> str:
    """What is wrong, without the traceback and the paths that a panic brings."""
    error = matcher.get_error()
    if error.startswith("NoExtension"):
        return _NOTHING
    return "llguidance failed on it" if error.startswith("panic") else _line(error)


def _line(text: str) -> str:
    """The first line, and what a regular expression's error says below its picture."""
    found = re.search(r"^error: .*$", text, re.MULTILINE)
    first = re.split(r"\n|\. Enable", text)[0][:300]  # what to enable is nobody's here
    return f"{first} {found[0]}" if found else first


# Decoding


class Tables:
    """llguidance's view of a vocabulary: 70 ms for 32,000 tokens, 0.6 s for 150,000.

    With the GIL held: make it once per model. `pieces` are the bytes of each token; those of
    `special` tokens and `ends` are of no account, for no constraint allows any but the ends.
    `tokenize` splits a text as the model was taught to, without adding anything to it; where its
    tokens do not spell the text, or without it, the longest token that fits comes first.
    """

    def __init__(
        self,
        pieces: Sequence[bytes],
        special: frozenset[int],
        ends: tuple[int, ...],
        tokenize: Callable[[str], tuple[int, ...]] | None = None,
    ) -> None:
        from llguidance import LLTokenizer

        self.size = len(pieces)
        self.ends = frozenset(ends)
        hidden = special | self.ends
        # A piece with byte 255 is nothing in UTF-8, but names a special token in llguidance.
        plain = [
            b"" if i in hidden or b"\xff" in piece else bytes(piece)
            for i, piece in enumerate(pieces)
        ]
        vocabulary: Any = _Vocabulary(plain, min(ends), weakref.ref(self), tokenize)
        self.tokenizer = LLTokenizer(vocabulary, eos_token=sorted(self.ends))


class _Vocabulary:
    """What `LLTokenizer` wants to know, by the names that it wants."""

    is_tokenizer_wrapper = True
    bos_token_id = None
    special_token_ids: Sequence[int] = ()

    def __init__(
        self,
        tokens: list[bytes],
        end: int,
        tables: weakref.ref[Tables],
        tokenize: Callable[[str], tuple[int, ...]] | None,
    ) -> None:
        self.tokens = tokens
        self.eos_token_id = end
        self._tables = tables  # weak: it holds this in native memory, where no cycle is found
        self._tokenize = tokenize

    def __call__(self, text: str) -> list[int]:
        # llama.cpp takes stack for each character, and long texts would be split in each step.
        text = text[:MAX_FORCED]
        if self._tokenize is not None:
            found = self._tokenize(text)
            if found and b"".join([self.tokens[i] for i in found]) == text.encode():
                return list(found)
        tables = self._tables()
        return tables.tokenizer.greedy_tokenize(text) if tables is not None else []


class Matcher:
    """Where one sequence is in its grammar. Any thread may call, one after the other."""

    def __init__(self, tables: Tables, grammar: str, compiled: LLMatcher | None = None) -> None:
        import numpy as np

        self._tables = tables
        self._matcher = compiled or _matcher(tables.tokenizer, grammar)
        if self._matcher.is_error():
            raise InvalidValue(_said(self._matcher))
        self._words = np.zeros((tables.size + 31) // 32, dtype=np.uint32)
        self._forbidden: NDArray[np.bool_] | None = None
        self._failure: Failure | None = None
        self._lock = threading.Lock()

    def fork(self) -> Matcher:
        """Another for the same grammar, which is not compiled again. Of one that was never used."""
        with self._lock:
            return Matcher(self._tables, "", self._matcher.deep_copy())

    def prepare(self) -> None:
        """Computes the mask for the next token, if it is not known: while a batch is decoded."""
        with self._lock:
            self._mask()

    def apply(self, logits: NDArray[np.float32]) -> None:
        """Makes what may not come next impossible. After a failure only the end may."""
        import numpy as np

        with self._lock:
            size = self._tables.size
            np.copyto(logits[:size], -np.inf, where=self._mask())
            logits[size:] = -np.inf

    def accept(self, token: int) -> Failure | None:
        """Takes the token that was chosen."""
        with self._lock:
            if self._failure is None:
                self._forbidden = None
                self._matcher.consume_token(token)
                self._note()
                if token in self._tables.ends and not self._matcher.is_stopped():
                    self._failure = _failed("the answer ended where its constraint goes on")
            return self._failure

    @property
    def stopped(self) -> bool:
        """Whether nothing but the end may follow; also after a failure."""
        with self._lock:
            return self._failure is not None or self._matcher.is_stopped()

    def failed(self) -> Failure | None:
        with self._lock:
            return self._failure

    def _mask(self) -> NDArray[np.bool_]:
        import numpy as np

        if self._forbidden is None:
            words = self._words
            self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
            self._note()
            octets, size = (~words).view(np.uint8), self._tables.size
            self._forbidden = np.unpackbits(octets, count=size, bitorder="little").view(np.bool_)
        return self._forbidden

    def _note(self) -> None:
        if self._failure is not None or not self._matcher.is_error():
            return
        said = _said(self._matcher)
        if "satisfy the grammar" in said:
            self._failure = _failed("a token was chosen that the constraint does not allow")
        elif said == _NOTHING:
            self._failure = _failed("nothing that its constraint allows can follow the answer")
        else:
            self._failure = Failure(TOO_COMPLEX, f"the constraint is too complex: {said}")


def _failed(message: str) -> Failure:
    return Failure("generation_failed", message)
