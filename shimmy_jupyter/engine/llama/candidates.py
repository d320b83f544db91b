"""The few tokens that a sampler chain has to look at, found quicker than it finds them itself.

A chain that begins with top-k, or is greedy, makes a record of each token of the vocabulary and sorts
those. But of the largest logits in each of some hundreds of columns, the k-th largest is a bound: k
logits at least are as large. What is as large as that are a few tokens more than k, in as many columns,
and the chain comes to the same with them. Of 150,000 tokens that takes a third of the time, most of which
is that the logits are read.

NumPy gives up the GIL now and then, which `quick` avoids: while somebody else computes in Python, each time
may cost 5 ms. So where it took long, the chain does it all for a while.
"""

from __future__ import annotations

import ctypes
import math
import time
from typing import Any

from ...types import Sampling
from .binding import native, quick
from .sampling import changes_logits

_ROWS = 128
_LEAST_TOKENS = 8192
"""Of a vocabulary. The chain is quick enough with fewer."""
_ROOM, _MOST_ROWS = 2048, 1024
_LATE = 0.001
"""Seconds after which somebody else must have had the GIL."""
_REST, _REST_MOST = 32, 4096
"""Tokens for which the chain then does it all: twice as many where it is late again."""


class Candidates:
    """Of one thread, which samples for everybody. `k` 0 is greedy."""

    def __init__(self) -> None:
        import numpy as np

        kind = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
        self._data = np.zeros(_ROOM, kind)
        self._at: Any = self._data.ctypes.data_as(native.llama_token_data_p)
        self._array = native.llama_token_data_array()
        self._resting, self._rest = 0, _REST
        self._rows: dict[int, Any] = {}

    def row(self, logits: Any, size: int) -> Any:
        """A view of so many logits. llama.cpp has them in the same few places, step after step."""
        address = ctypes.addressof(logits.contents)
        found = self._rows.get(address)
        if found is None:
            import numpy as np

            if len(self._rows) >= _MOST_ROWS:
                self._rows.clear()
            found = self._rows[address] = np.ctypeslib.as_array(logits, (size,))
        return found

    def chosen(self, chain: Any, logits: Any, k: int) -> int | None:
        """What the chain chooses of a row of logits; None where it has to look at all of it."""
        if self._resting:
            self._resting -= 1
            return None
        began = time.perf_counter()
        token = int(logits.argmax()) if k == 0 else self._sampled(chain, logits, k)
        late = time.perf_counter() - began > _LATE
        if late:
            self._resting = self._rest
        self._rest = min(2 * self._rest, _REST_MOST) if late else _REST
        return token

    def _sampled(self, chain: Any, logits: Any, k: int) -> int | None:
        import numpy as np

        columns = len(logits) // _ROWS
        grid, rest = logits[: columns * _ROWS].reshape(_ROWS, columns), logits[columns * _ROWS :]
        largest = grid.max(axis=0)
        if not math.isfinite(largest.max()):
            return None
        bound = np.partition(largest, columns - k)[columns - k]
        those = np.flatnonzero(largest >= bound)
        if len(those) > _ROOM:
            return None
        row, which = np.divmod(np.flatnonzero(grid.take(those, axis=1) >= bound), len(those))
        found = row * columns + those[which]
        if len(rest):
            found = np.append(found, np.flatnonzero(rest >= bound) + columns * _ROWS)
        # All, where fewer than k are possible.
        if not k <= len(found) <= _ROOM:
            return None
        data, array = self._data, self._array
        data["id"][: len(found)] = found
        data["logit"][: len(found)] = logits[found]
        array.data = self._at
        array.size, array.selected, array.sorted = len(found), -1, False
        quick.llama_sampler_apply(chain, ctypes.byref(array))
        if array.selected < 0:
            return None
        token = int(array.data[array.selected].id)
        quick.llama_sampler_accept(chain, token)
        return token


def limit(sampling: Sampling, vocabulary: int) -> int | None:
    """The k of a request's chain, of a vocabulary of so many tokens; None: not for `Candidates`."""
    if vocabulary < _LEAST_TOKENS or changes_logits(sampling):
        return None
    if sampling.greedy:
        return 0
    # With fewer columns the bound lets too many through.
    return sampling.top_k if 0 < 4 * sampling.top_k <= vocabulary // _ROWS else None
