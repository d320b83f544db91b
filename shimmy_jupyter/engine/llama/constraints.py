"""Constraints of one model's answers: its tables, made once, and a matcher for each sequence."""

from __future__ import annotations

import functools
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from ...errors import QueueFull, ShimmyError, UnsupportedParameter
from ...types import Constraint
from .facts import Vocabulary

if TYPE_CHECKING:
    from ..constrain import Matcher, Tables

_REMEMBERED = 32
_MOST = 1024
_SECONDS = 4.0
"""What was asked for last is remembered, compiled: so many, and more while to compile them all takes no
longer, about a quarter of a gigabyte then.
"""
_SHORT = 0.01
"""Seconds for which others may wait where something has to be compiled again."""


class Constraints:
    """`compile` may be called by any thread, the rest by the engine's."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._ready: OrderedDict[Constraint, tuple[Matcher, float]] = OrderedDict()
        """With the seconds that it took."""
        self._seconds = 0.0
        self._long: OrderedDict[int, None] = OrderedDict()
        """Hashes of what has been forgotten and takes long to compile."""
        self._lock = threading.Lock()
        self._beside: ThreadPoolExecutor | None = None

    def compile(self, constraint: Constraint) -> None:
        """Raises `InvalidValue` or `UnsupportedParameter`, before anything is decoded."""
        if self._found(constraint) is None:
            self._compiled(constraint)

    def matcher(self, constraint: Constraint) -> Matcher:
        """For a new sequence, at once. Raises as `compile` does, and `QueueFull` for what has been compiled,
        and forgotten for the sake of what came after it.
        """
        ready = self._found(constraint)
        if ready is None:
            if hash(constraint) in self._long:
                raise QueueFull("too many large schemas or grammars are waiting; try again later")
            ready = self._compiled(constraint)
        return ready.fork()

    def _found(self, constraint: Constraint) -> Matcher | None:
        with self._lock:
            if constraint not in self._ready:
                return None
            self._ready.move_to_end(constraint)
            return self._ready[constraint][0]

    def _compiled(self, constraint: Constraint) -> Matcher:
        if self.vocabulary.ends:
            self.tables()  # by whoever is first, and no matter of this one
        began = time.thread_time()
        matcher = self._made(constraint)
        self._remember(constraint, matcher, time.thread_time() - began)
        return matcher

    def _remember(self, constraint: Constraint, matcher: Matcher, seconds: float) -> None:
        with self._lock:
            _, before = self._ready.pop(constraint, (None, 0.0))
            self._ready[constraint] = matcher, seconds
            self._seconds += seconds - before
            self._long.pop(hash(constraint), None)
            while len(self._ready) > (_REMEMBERED if self._seconds > _SECONDS else _MOST):
                forgotten, (_, saved) = self._ready.popitem(last=False)
                self._seconds -= saved
                if saved > _SHORT:
                    self._long[hash(forgotten)] = None
            while len(self._long) > _MOST:
                self._long.popitem(last=False)

    def _made(self, constraint: Constraint) -> Matcher:
        param = "grammar" if constraint.kind in _GRAMMARS else "response_format"
        if not self.vocabulary.ends:
            raise UnsupportedParameter("this model has no token to end an answer with", param=param)
        from ..constrain import Matcher, check

        grammar = check(constraint)
        try:
            return Matcher(self.tables(), grammar)
        except ShimmyError as error:
            error.param = param
            raise

    def prepare(self, matchers: Sequence[Matcher]) -> None:
        """Compute their masks on another thread, while a batch is decoded."""
        if self._beside is None:
            self._beside = ThreadPoolExecutor(1, thread_name_prefix="shimmy-masks")
        self._beside.submit(_prepare, matchers)

    def close(self) -> None:
        if self._beside is not None:
            self._beside.shutdown()
            self._beside = None

    def tables(self) -> Tables:
        """A second's work for a large vocabulary, the first time."""
        with self._lock:
            return self._tables

    @functools.cached_property
    def _tables(self) -> Tables:
        from ..constrain import Tables

        vocabulary = self.vocabulary
        pieces = [vocabulary.piece(token)[0] for token in range(vocabulary.size)]
        _ = (
            vocabulary.blank
        )  # here, for where a sequence begins others wait while all tokens are looked at
        return Tables(pieces, vocabulary.marked, vocabulary.ends, vocabulary.plain)


_GRAMMARS = frozenset(["lark", "regex", "gbnf"])


def _prepare(matchers: Sequence[Matcher]) -> None:
    for matcher in matchers:
        matcher.prepare()
