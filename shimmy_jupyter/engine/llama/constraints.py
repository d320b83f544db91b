"""Constraints of one model's answers: its tables, made once, and a matcher for each sequence."""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from ...errors import ShimmyError, UnsupportedParameter
from ...types import Constraint
from .facts import Vocabulary

if TYPE_CHECKING:
    from ..constrain import Matcher, Tables

_REMEMBERED = 32
"""Of what was asked for, compiled: an engine's thread must not do that while others wait."""


class Constraints:
    """`compile` may be called by any thread, the rest by the engine's."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._ready: OrderedDict[Constraint, Matcher] = OrderedDict()
        self._lock = threading.Lock()
        self._beside: ThreadPoolExecutor | None = None

    def compile(self, constraint: Constraint) -> None:
        """Raises `InvalidValue` or `UnsupportedParameter`, before anything is decoded."""
        self.matcher(constraint)

    def matcher(self, constraint: Constraint) -> Matcher:
        """For a new sequence. Raises as `compile` does; after that it takes no time."""
        with self._lock:
            ready = self._ready.get(constraint)
            if ready is not None:
                self._ready.move_to_end(constraint)
        if ready is None:
            ready = self._compiled(constraint)
            with self._lock:
                self._ready[constraint] = ready
                if len(self._ready) > _REMEMBERED:
                    self._ready.popitem(last=False)
        return ready.fork()

    def _compiled(self, constraint: Constraint) -> Matcher:
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
