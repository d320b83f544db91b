"""How much goes into a step, from how long steps have taken.

Two questions. How many sequences to decode together: with few rows a quantised model can be slower
than with one, so the rate of each number is measured. How much of a prompt to decode beside them: as
much as keeps a step within its time. Where the rows leave little of that, those who wait for their
first token and those who wait for their next one share the step by their numbers.

Some processors compute whole blocks of rows: one row more than a block takes the time of two. A slice
does not go just beyond one.

Far into a prompt attention takes most of the time, and on a processor llama.cpp computes it in tiles
of `TILE` rows of the batch, at half the cost of single rows, where a batch has as many. A batch that is
no multiple of that pays for its last tile in full. And a tile computes for each of its rows what any of
them looks at: with sequences that decode in it, all that these hold. So a prompt may be better off in
a step of its own, in turn with theirs, although the weights are then read for each. There are times of
each kind, and the one with the most tokens in a second is chosen, where that keeps those who decode
waiting for too long less what that is worth.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

TILE = 64
"""From this many rows on, flash attention on a processor sums in tiles, in another order."""
_SMOOTHING = 0.3
_KEEP = 0.8
"""Of what older slices weigh, at each new one: contexts grow, and with them the time of a token."""
_FEW = 8
"""Beyond so many rows more have always been faster, and nothing else is tried."""
_REFRESH = 64
"""Decode steps after which a time that was not measured again is tried once more."""
_FEW_IN_TILES = 2
"""Where blocks are computed: with more rows that decode, a tile that they are in has taken longer than all
else; how much longer depends on what they hold, so it is not tried."""
_HYSTERESIS = 1.05
_TOGETHER = 1.2
"""So much more is a slice worth that shares a step: who decodes gets more tokens meanwhile, too."""
_MARGINAL = 0.4
"""What a further row adds to the time of one, until a second number of rows has been seen."""
_FRESH = 512
"""Steps for which a time of rows alone is trusted more than what prompts are said to take."""
_STALE = 64
"""Slices after which a kind that was not chosen is taken to be like one that was, and so tried again."""
_LEAST = 4
"""Tokens of a prompt that go into a step in any case."""
_PROMPT_SHARE = 1.0
"""Of the time of the rows beside it: what a prompt gets at least."""
_FIRST, _FIRST_ASIDE = 3, 1
"""Who waits for a first token counts as so many who wait for their next one: of several prompts, and where it is a
long one, whose reader waits for long anyway.
"""
_STRETCH = 2
"""Where many wait for a first token, a step may take so many times its usual time."""
_EXACT = 1.13
"""So many times its usual time, where what is read aside is held: how late that is, is taken off."""
_ASIDE_SHARE = 0.7
"""Of the time of the rows: what is read aside gets at least."""
_NOTICEABLE = 0.2
"""Of a step's usual time, so much is late."""
_LATE = 0.05
"""Of how late it was, so much is forgotten each time that it was not."""


@dataclass(frozen=True, slots=True)
class Slice:
    """`tokens` of prompts for a step: `together` with the rows that decode, or without them."""

    tokens: int
    together: bool


class _Line:
    """Seconds of a slice by its tokens: a straight line through what was measured lately."""

    def __init__(self, guess: float) -> None:
        self.slope, self.base = guess, 0.0
        self.at = 0
        """The slice that it was last of use for."""
        self._sums = [0.0] * 5  # of weights, x, y, x·x, x·y

    def add(self, tokens: int, seconds: float) -> None:
        fresh = (1.0, tokens, seconds, tokens * tokens, tokens * seconds)
        self._sums = [_KEEP * old + new for old, new in zip(self._sums, fresh, strict=True)]
        n, x, y, xx, xy = self._sums
        spread = n * xx - x * x
        slope = (n * xy - x * y) / spread if spread > 0.01 * n * xx else y / x
        # At least half of what a slice takes is for its tokens: what says otherwise is noise, and
        # slices of one size say nothing of the rest.
        self.slope = min(max(slope, 0.5 * y / x), y / x)
        self.base = (y - self.slope * x) / n

    def tokens(self, seconds: float) -> int:
        return int(max(0.0, seconds - self.base) / self.slope)

    def seconds(self, tokens: int) -> float:
        return self.base + self.slope * tokens

    def other(self, seconds: float) -> _Line:
        """What takes so much longer, or less, at what was measured lately."""
        n, _, y, *_ = self._sums
        factor = max(0.5, 1 + seconds * n / y) if y else 1.0
        line = _Line(self.slope * factor)
        line.base = self.base * factor
        return line


class Pace:
    """Measured seconds: of decode steps by their rows, and of slices of prompts by their tokens.

    Thread counts have figures of their own, as they differ by more than what is decided here.
    `guess` is the seconds of a prompt token before anything has been measured. Beyond the first `row_block`
    rows of a batch each such block takes the same time, however few rows are in it.
    """

    def __init__(
        self,
        *,
        batch_tokens: int,
        step_seconds: float,
        prompt_seconds: float,
        guess: float,
        row_block: int = 1,
    ) -> None:
        self._batch_tokens = batch_tokens
        self._row_block = row_block
        self._step_seconds = step_seconds
        self._prompt_seconds = prompt_seconds
        self._guess = guess
        self._slices: dict[tuple[int, bool, bool], _Line] = {}
        """By threads, whether rows were beside it, and whether the batch was large enough for tiles."""
        self._decode: dict[int, dict[int, tuple[float, int]]] = {}
        self._beside: dict[int, dict[int, float]] = {}
        """Seconds of so many rows, also where they were only ever seen beside prompts."""
        self._late = 0.0
        """Seconds after its time was over until what is read aside was held."""
        self._threads = 1
        self._steps = 0
        self._read = 0
        """Slices so far."""

    def observe(self, rows: int, prompt: int, seconds: float, threads: int) -> None:
        """A step of `rows` decoding sequences and `prompt` tokens of prompts."""
        self._threads = threads
        self._steps += 1
        seconds = max(seconds, 1e-7)
        times = self._decode.setdefault(threads, {})
        known = times.get(rows)
        if not prompt:
            mean = seconds if known is None else known[0] + _SMOOTHING * (seconds - known[0])
            times[rows] = (mean, self._steps)
            self._beside.setdefault(threads, {})[rows] = mean
            return
        kind = threads, rows > 0, rows + prompt >= TILE
        self._read += 1
        line = self._slices.get(kind)
        if line is not None:
            line.at = self._read
        if line is not None and rows and (known is None or self._steps - known[1] > _FRESH):
            # What is known less well takes the blame.
            alone = max(seconds - line.seconds(prompt), 0.2 * seconds)
            before = self._time(rows)
            mean = alone if before is None else before + _SMOOTHING * (alone - before)
            self._beside.setdefault(threads, {})[rows] = mean
            return
        line = self._slices.setdefault(kind, _Line(self._guess))
        line.at = self._read
        # Never free: a step that was quicker than its rows alone tells of noise.
        line.add(prompt, max(seconds - (self._time(rows) or 0.0), 0.2 * seconds))

    def rows(self, ready: int) -> int:
        """How many of the sequences that are ready to decode together now."""
        if ready == 1 or _FEW < ready < TILE:
            return ready
        fewer = 1 if ready < TILE else TILE - 1
        times = self._decode.get(self._threads, {})
        for candidate in (ready, fewer):
            known = times.get(candidate)
            if known is None or self._steps - known[1] > _REFRESH:
                return candidate
        best = ready
        for candidate in range(min(ready - 1, TILE - 1), fewer - 1, -1):
            known = times.get(candidate)
            if known and candidate / known[0] > _HYSTERESIS * best / times[best][0]:
                best = candidate
        return best

    def prompt_slice(self, rows: int, waiting: int = 1) -> Slice:
        """What may be read of prompts in the time of a step, or between two of them, while `rows`
        sequences decode and `waiting` others could have had their first token.
        """
        if not rows:
            return Slice(self._alone(self._prompt_seconds), together=False)
        beside = self._time(rows) or 0.0
        due = self._due(rows, waiting, self._step_seconds, _FIRST)
        most_room = max(due - beside, _PROMPT_SHARE * beside)
        most = self._batch_tokens - rows
        # Where whole batches are read alone, only their own time is measured.
        if all(
            self._line(together=one, tiled=True).tokens(most_room) >= most for one in (True, False)
        ):
            return Slice(most, together=False)
        best, chosen = 0.0, Slice(min(_LEAST, most), together=True)
        for room in sorted({due - beside, most_room}):
            for line, piece in self._possible(rows, room):
                cycle = beside + line.seconds(piece.tokens)
                # Who decodes waits for all of it, and so does the prompt between two slices.
                value = piece.tokens / cycle * min(1.0, due / cycle) ** 2
                value *= _TOGETHER if piece.together else 1
                if value > best:
                    best, chosen = value, piece
        return chosen

    def aside_seconds(self, rows: int, waiting: int = 1) -> float:
        """What a prompt that is read aside may have of a step of so many rows."""
        if not rows:
            return self._step_seconds
        beside = self._time(rows) or 0.0
        usual = _EXACT * self._step_seconds - self._late
        due = self._due(rows, waiting, usual, _FIRST_ASIDE)
        return max(due - beside, _ASIDE_SHARE * beside)

    def observe_aside(self, asked: float, seconds: float) -> None:
        """What was read aside was held after `seconds`, or done. Making its context is late, too, but does
        not tell of the next time.
        """
        late = min(seconds - asked, self._step_seconds / 4)
        self._late = max(late, (1 - _LATE) * self._late)

    def asides_are_late(self) -> bool:
        """Whether what is read aside would be held noticeably sooner were its slices small."""
        return self._late > _NOTICEABLE * self._step_seconds

    def _possible(self, rows: int, room: float) -> Iterator[tuple[_Line, Slice]]:
        """The largest slice of each kind that takes so many seconds at most."""
        for together in (True, False):
            in_batch = rows if together else 0
            line = self._line(together=together, tiled=False)
            few = self._whole(in_batch, min(line.tokens(room), TILE - 1 - in_batch))
            if few >= _LEAST:
                yield line, Slice(few, together)
            if self._row_block > 1 and in_batch > _FEW_IN_TILES:
                continue
            line = self._line(together=together, tiled=True)
            most = min(line.tokens(room), self._batch_tokens - rows)
            # Where blocks are computed these cost more than attention does, until that is deep.
            unit = TILE if self._row_block == 1 else self._row_block
            tiles = (most + in_batch) // unit * unit
            if tiles >= TILE and tiles - in_batch >= _LEAST:
                yield line, Slice(tiles - in_batch, together)

    def _due(self, rows: int, waiting: int, usual: float, weight: int) -> float:
        """Seconds after which rows are to have their next token, which is `usual` unless many wait for a
        first one, each of whom counts for so many.
        """
        beside = self._time(rows) or 0.0
        return max(usual, min(beside + weight * waiting / rows * beside, _STRETCH * usual))

    def _alone(self, room: float) -> int:
        """Tokens for a step that nobody else waits for."""
        tiles = max(self._line(together=False, tiled=True).tokens(room), TILE)
        few = min(self._line(together=False, tiled=False).tokens(room), TILE - 1)
        few = self._whole(0, few)
        most = self._batch_tokens
        return min(max(min(tiles, most) // TILE * TILE, few, _LEAST), most)

    def _whole(self, rows: int, tokens: int) -> int:
        """So many tokens, or as many as fill blocks: beside `rows`, theirs."""
        block = self._row_block
        if block == 1:
            return tokens
        # With one row less it is as good as full: what is no tile ends there.
        blocks = -(-rows // block) or (tokens + 1) // block or 1
        return min(tokens, blocks * block - rows)

    def _line(self, *, together: bool, tiled: bool) -> _Line:
        """What has not been measured lately takes as long as what differs least from it. Beside rows
        the weights are read anyway.
        """
        kinds = [(one, of) for one in (together, not together) for of in (tiled, not tiled)]
        known = [
            (one, line) for one, of in kinds if (line := self._slices.get((self._threads, one, of)))
        ]
        if not known:
            return _Line(self._guess)
        fresh = (pair for pair in known if self._read - pair[1].at <= _STALE)
        company, line = next(fresh, None) or max(known, key=lambda pair: pair[1].at)
        if company is together:
            return line
        return line.other((self._time(1) or 0.0) * (-1 if together else 1))

    def _time(self, rows: int) -> float | None:
        """Of a step with so many rows, on a straight line through the nearest known numbers."""
        times = self._beside.get(self._threads) or next(iter(self._beside.values()), None)
        if not rows or not times:
            return None
        if rows in times:
            return times[rows]
        a, *rest = sorted(times, key=lambda known: abs(known - rows))
        slope = _MARGINAL * times[a] / a
        if rest:
            slope = max(0.0, (times[rest[0]] - times[a]) / (rest[0] - a))
        return max(times[a] + slope * (rows - a), 0.1 * times[a])
