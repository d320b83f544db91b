"""How much goes into a step, from how long steps have taken.

Two questions. How many sequences to decode together: with few rows a quantised model can be slower
than with one, so the rate of each number is measured. How much of a prompt to decode beside them: as
much as keeps a step within its time. Where the rows leave little of that, those who wait for their
first token and those who wait for their next one share the step by their numbers.

Far into a prompt attention takes most of the time, and on a processor llama.cpp computes it in tiles
of `TILE` rows of the batch, at half the cost of single rows, where a batch has as many. A batch that is
no multiple of that pays for its last tile in full. So there are times of two kinds.
"""

from __future__ import annotations

TILE = 64
"""From this many rows on, flash attention on a processor sums in tiles, in another order."""
_SMOOTHING = 0.3
_KEEP = 0.8
"""Of what older slices weigh, at each new one: contexts grow, and with them the time of a token."""
_FEW = 8
"""Beyond so many rows more have always been faster, and nothing else is tried."""
_REFRESH = 64
"""Decode steps after which a time that was not measured again is tried once more."""
_HYSTERESIS = 1.05
_MARGINAL = 0.4
"""What a further row adds to the time of one, until a second number of rows has been seen."""
_FRESH = 512
"""Steps for which a time of rows alone is trusted more than what prompts are said to take."""
_LEAST = 4
"""Tokens of a prompt that go into a step in any case."""
_PROMPT_SHARE = 1.0
"""Of the time of the rows beside it: what a prompt gets at least."""
_FIRST = 2
"""Who waits for a first token counts as so many who wait for their next one."""
_STRETCH = 2
"""Where many wait for a first token, a step may take so many times its usual time."""


class _Line:
    """Seconds of a slice by its tokens: a straight line through what was measured lately."""

    def __init__(self, guess: float) -> None:
        self.slope, self.base = guess, 0.0
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


class Pace:
    """Measured seconds: of decode steps by their rows, and of slices of prompts by their tokens.

    Thread counts have figures of their own, as they differ by more than what is decided here.
    `guess` is the seconds of a prompt token before anything has been measured.
    """

    def __init__(
        self, *, batch_tokens: int, step_seconds: float, prompt_seconds: float, guess: float
    ) -> None:
        self._batch_tokens = batch_tokens
        self._step_seconds = step_seconds
        self._prompt_seconds = prompt_seconds
        self._guess = guess
        self._slices: dict[tuple[int, bool], _Line] = {}
        """By threads, and whether the batch was large enough for tiles."""
        self._decode: dict[int, dict[int, tuple[float, int]]] = {}
        self._beside: dict[int, dict[int, float]] = {}
        """Seconds of so many rows, also where they were only ever seen beside prompts."""
        self._threads = 1
        self._steps = 0

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
        kind = threads, rows + prompt >= TILE
        line = self._slices.get(kind)
        if line is not None and rows and (known is None or self._steps - known[1] > _FRESH):
            # What is known less well takes the blame.
            alone = max(seconds - line.seconds(prompt), 0.2 * seconds)
            before = self._time(rows)
            mean = alone if before is None else before + _SMOOTHING * (alone - before)
            self._beside.setdefault(threads, {})[rows] = mean
            return
        line = self._slices.setdefault(kind, _Line(self._guess))
        # Never free: a step that was quicker than its rows alone tells of noise.
        line.add(prompt, max(seconds - (self._time(rows) or 0.0), 0.2 * seconds))

    def rows(self, ready: int) -> int:
        """How many of the sequences that are ready to decode together now."""
        if ready == 1 or ready > _FEW:
            return ready
        times = self._decode.get(self._threads, {})
        for candidate in (ready, 1):
            known = times.get(candidate)
            if known is None or self._steps - known[1] > _REFRESH:
                return candidate
        best = ready
        for candidate in range(ready - 1, 0, -1):
            known = times.get(candidate)
            if known and candidate / known[0] > _HYSTERESIS * best / times[best][0]:
                best = candidate
        return best

    def prompt_tokens(self, rows: int, waiting: int = 1) -> int:
        """Tokens of prompts that may go beside `rows` decoding sequences while `waiting` others could
        have had their first token.
        """
        if not rows:
            room = self._prompt_seconds
        else:
            beside = self._time(rows) or 0.0
            room = max(
                self._step_seconds - beside,
                min(_FIRST * waiting / rows * beside, _STRETCH * self._step_seconds - beside),
                _PROMPT_SHARE * beside,
            )
        most = self._batch_tokens - rows
        tiled = self._fitting(room, tiled=True)
        if not rows:
            tiled = max(tiled, TILE)  # nobody waits for its end
        tiled = (min(tiled, most) + rows) // TILE * TILE - rows
        few = min(self._fitting(room, tiled=False), TILE - 1 - rows)
        return min(max(tiled, few, _LEAST), most)

    def _fitting(self, seconds: float, *, tiled: bool) -> int:
        """Tokens that take so long. What has not been measured takes as long as the other kind."""
        line = self._slices.get((self._threads, tiled)) or self._slices.get(
            (self._threads, not tiled)
        )
        return line.tokens(seconds) if line is not None else int(seconds / self._guess)

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
