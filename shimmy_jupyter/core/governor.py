"""How many threads the next step computes with, judged by how long steps took.

llama.cpp's threads wait for each other at barriers by spinning. As soon as another process wants one
of their processors, all of them wait for the thread that was put aside, and one thread less is
many times faster. Nobody says when that is so, but the times show it:

- A step carries a limit. One that runs into it is run again with fewer threads, at once.
- A *trial* runs a few steps one level up or down, and compares their sum with what the current
  level takes for the same amount of work, in the same few moments. Sums, as threads on a busy
  machine are erratic and a lucky step must not win.
- A trial that did not pay is repeated after a longer wait, and the wait is many times what it cost.

Times are kept as seconds per unit of work, by level and power of two of the work.
"""

from __future__ import annotations

from dataclasses import dataclass

OVERHEAD = 8
"""Tokens' worth of work that each step has: a model's weights are read even for one token."""
LIMIT, LIMIT_OTHERS = 3.0, 6.0
"""A step is cut at this many times its usual duration; or, if no step of its size has run at its
level, at this many times that of the level's last one for as much work."""
DEEPER, SHALLOW = 2, 1024
"""Nor is a step cut that looks at so many times the cells of the last one and so many more: nothing is known
of such."""
FLOOR = 0.01
"""Seconds. Below this a step is not cut: any process on the machine delays one by a few ms."""

UP_COST, UP_COST_LONG, LONG = 1.5, 0.75, 0.1
"""A trial upward is given up when it has cost this many steps of the current level. The times of
steps longer than a tenth of a second vary less."""
UP_STEPS, UP_STEPS_MOST = 4, 8
UP_GAIN, UP_LOSS = 0.98, 1.1
UP_WAIT, UP_WAIT_MOST = 0.5, 3.0
"""Seconds until it is tried again, doubling. Most is what a machine may go unnoticed as quiet."""
UP_SHARE = 12.0
"""The wait is at least so many times what the trial has cost."""

DOWN_STEPS, DOWN_STEPS_MOST = 2, 8
DOWN_GAIN, DOWN_GAIN_CLEAR = 0.9, 0.6
"""So much less time is a reason to go down, after all steps of a trial or already after a few."""
DOWN_WAIT, DOWN_WAIT_MOST = 0.25, 60.0
DOWN_SHARE = 250.0
DOWN_NEAR = 1.25
"""Where a lower level takes less than so many times as long, a trial of a yet lower one follows."""
SLOW, SLOWER = 1.5, 1.1
"""Suspiciously slow: so many times the usual, or what the level below took lately."""
SLOW_WAIT, SLOW_SHARE = 1.0, 20.0

FRESH, FRESH_STEPS = 5.0, 16
"""Times are of the same few moments if so many seconds, or steps, lie between them at most."""
QUICK, CALM = 0.25, 0.1
"""Weights of the newest time in the recent mean and in the usual one."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A step's threads, and after how many seconds to abort it. No `work`: nothing is to be learnt of it."""

    threads: int
    limit: float | None
    work: int
    cells: int = 0


class _Times:
    """What a level takes for a unit of work, of one size of steps."""

    __slots__ = ("count", "recent", "run", "until", "usual")

    def __init__(self) -> None:
        self.recent = self.usual = self.until = 0.0
        self.count = self.run = 0

    def add(self, time: float, seconds: float, now: float) -> None:
        if self.count >= DOWN_STEPS:
            time = min(time, LIMIT * self.usual)  # a single hiccup says little
        self.run = self.run + 1 if now <= self.until else 1
        self.count += 1
        self.recent += (time - self.recent) * max(QUICK, 1 / self.run)
        self.usual += (time - self.usual) * max(CALM, 1 / self.count)
        self.until = now + max(FRESH, FRESH_STEPS * seconds)

    def set(self, time: float, seconds: float, now: float) -> None:
        self.recent = self.usual = time
        self.count = self.run = DOWN_STEPS
        self.until = now + max(FRESH, FRESH_STEPS * seconds)

    @property
    def most(self) -> float:
        return max(self.recent, self.usual)

    @property
    def mean(self) -> float:
        return (self.recent + self.usual) / 2


class _Trial:
    """Steps at another level, and what the current one would have taken for them."""

    __slots__ = ("depth", "level", "spent", "steps", "until", "would")

    def __init__(self, level: int, until: float, depth: int = 1) -> None:
        self.level, self.until, self.depth = level, until, depth
        self.steps = 0
        self.spent = self.would = 0.0


class Governor:
    """`plan` each step, run it, and let it `observe` how long that took.

    `fixed` if somebody has set the number: it is never changed, and no step is cut.
    """

    def __init__(self, most: int, *, fixed: bool = False) -> None:
        if most < 1:
            raise ValueError("at least one thread")
        self.levels = (most,) if fixed else ladder(most)
        self.switches = self.aborted = self.trials = 0
        self._fixed = len(self.levels) == 1
        self._level = len(self.levels) - 1
        # By level and size. One more, empty, is what [-1] finds below the lowest level.
        self._times: list[dict[int, _Times]] = [{} for _ in range(len(self.levels) + 1)]
        self._trial: _Trial | None = None
        self._aborts = 0  # in a row
        self._stride = 1  # levels that a trial goes up
        self._gain = 0.0  # seconds won since this level was reached, over the one below
        self._step = 0.0  # seconds, of a typical step
        self._last = [0.0] * len(self.levels)  # each level's last time, of any size
        self._up_at = [0.0] * len(self.levels)
        self._up_wait = [0.0] * len(self.levels)
        self._cells = 0  # that the last step looked at
        self._spent = 0.0  # seconds of steps, by which trials downward are due
        self._down_at = self._slow_at = 0.0
        self._down_wait = DOWN_WAIT

    def __repr__(self) -> str:
        trial = f", trying {self.levels[self._trial.level]}" if self._trial else ""
        return (
            f"<Governor {self.threads} of {self.levels[-1]} threads{trial}, {self.switches} switches, "
            f"{self.trials} trials, {self.aborted} aborted>"
        )

    @property
    def threads(self) -> int:
        """What steps use now, but for those of a trial."""
        return self.levels[self._level]

    def plan(self, work: int, now: float, *, cells: int = 0, beside: bool = False) -> Plan:
        """For a step of so many tokens, which look at so many `cells` of the cache. A step that was
        aborted is planned with fewer threads; one `beside` another thread of ours leaves that a
        processor, and its time is no sign of anything.
        """
        if self._fixed:
            return Plan(self.levels[-1], None, work)
        if beside:
            return Plan(self.levels[max(0, self._level - 1)], None, 0)
        if cells > DEEPER * self._cells + SHALLOW:
            return Plan(self.threads, None, work, cells)
        units, size = work + OVERHEAD, (work - 1).bit_length()
        times = self._times[self._level].get(size)
        trial = self._trial
        if trial is not None and now > trial.until and not self._aborts:
            trial = self._trial = None
        if times is not None and (
            (trial is not None and trial.level < self._level)
            if self._aborts
            else self._comparable(times, units, now)
        ):
            trial = trial or self._begin(times, size, now)
            if trial is not None:
                limit = self._trial_limit(trial, times, size, units)
                return Plan(self.levels[trial.level], limit, work, cells)
        return Plan(self.threads, self._limit(self._level, size, units), work, cells)

    def observe(self, plan: Plan, seconds: float, now: float, *, aborted: bool = False) -> None:
        """What a planned step took; `aborted` if its limit cut it."""
        if self._fixed or not plan.work:
            return
        seconds = max(seconds, 1e-9)
        self._cells = plan.cells
        self._spent += seconds
        self.aborted += aborted
        units, size = plan.work + OVERHEAD, (plan.work - 1).bit_length()
        trial = self._trial
        if trial is not None and plan.threads == self.levels[trial.level]:
            times = self._times[self._level].get(size)
            if times is None:  # not a plan of this trial
                return
            trial.steps += 1
            trial.spent += seconds
            if trial.level > self._level:
                trial.would += 0.0 if aborted else times.mean * units
                self._judge_up(trial, times, plan, now, aborted=aborted)
            else:
                trial.would += times.most * units
                self._judge_down(trial, times, size, now, aborted=aborted)
        elif plan.threads == self.threads:
            self._note(size, units, seconds, now, aborted=aborted)
        self._aborts = self._aborts + 1 if aborted else 0

    def _comparable(self, times: _Times, units: int, now: float) -> bool:
        """Whether a step may be part of a trial: there is a mean to compare with, and it is none of
        those much longer than others, which would make the trial expensive."""
        return (
            times.run >= DOWN_STEPS
            and now <= times.until
            and times.recent * units <= max(2 * self._step, 5 * FLOOR)
        )

    def _begin(self, times: _Times, size: int, now: float) -> _Trial | None:
        up = min(self._level + self._stride, len(self.levels) - 1)
        if now < self._up_at[up]:
            up = min(self._level + 1, up)
        if up > self._level and now >= self._up_at[up]:
            self._trial = _Trial(up, times.until + FRESH)
        elif self._level and (
            (self._spent >= self._down_at and self._cheap(times, size))
            or (now >= self._slow_at and self._slow(times, size))
        ):
            self._trial = _Trial(self._level - 1, times.until + FRESH)
        else:
            return None
        self.trials += 1
        return self._trial

    def _cheap(self, times: _Times, size: int) -> bool:
        """Whether nobody would notice a trial downward: a long step makes everybody's tokens late."""
        known = bool(self._times[self._level - 1])
        return not known or times.recent * ((1 << size) + OVERHEAD) < LONG

    def _slow(self, times: _Times, size: int) -> bool:
        below = self._times[self._level - 1].get(size)
        return times.recent > SLOW * times.usual or (
            below is not None and times.recent > SLOWER * below.recent
        )

    def _limit(self, level: int, size: int, units: int) -> float | None:
        """None at the lowest level, so that every step is done at last."""
        times = self._times[level].get(size)
        if not level:
            return None
        if times is not None:
            return max(FLOOR, LIMIT * times.most * units)
        others = self._last[level]
        return max(FLOOR, LIMIT_OTHERS * others * units) if others else None

    def _trial_limit(self, trial: _Trial, times: _Times, size: int, units: int) -> float | None:
        if trial.level > self._level:
            step = times.recent * units
            excess = max(0.0, trial.spent - trial.would)
            return max(FLOOR, step + _bearable(step) - excess)
        if not trial.level:
            return None
        fewer = self.threads / self.levels[trial.level]
        return self._limit(trial.level, size, units) or max(FLOOR, 2 * fewer * times.most * units)

    def _note(self, size: int, units: int, seconds: float, now: float, *, aborted: bool) -> None:
        """A step at the current level."""
        if aborted:
            self._trial = None
            self._gain -= seconds
            # Each further abort of the same step goes down twice as far: few steps are lost.
            self._fall(max(0, self._level - (1 << self._aborts)), now)
            return
        times = self._times[self._level].get(size)
        if times is None:
            times = self._times[self._level][size] = _Times()
        times.add(seconds / units, seconds, now)
        self._last[self._level] = times.usual
        self._step += (seconds - self._step) * (QUICK if self._step else 1)
        below = self._times[self._level - 1].get(size)
        if below is not None:
            self._gain += below.recent * units - seconds

    def _judge_up(
        self, trial: _Trial, times: _Times, plan: Plan, now: float, *, aborted: bool
    ) -> None:
        steps, cost = trial.steps, trial.spent - trial.would
        step = times.mean * (plan.work + OVERHEAD)
        if not aborted and steps >= UP_STEPS and trial.spent <= UP_GAIN * trial.would:
            self._rise(trial, times, plan, now)
        elif (
            aborted
            or steps >= UP_STEPS_MOST
            or cost >= _bearable(step)
            or (steps >= UP_STEPS and trial.spent > UP_LOSS * trial.would)
        ):
            up, wait = trial.level, UP_WAIT
            if (aborted and steps < UP_STEPS - 1) or cost > step / 2:  # not just some hiccup
                wait = self._up_wait[up] = min(UP_WAIT_MOST, max(UP_WAIT, 2 * self._up_wait[up]))
            self._up_at[up] = now + max(wait, UP_SHARE * cost)
            self._stride = 1
            self._trial = None

    def _rise(self, trial: _Trial, times: _Times, plan: Plan, now: float) -> None:
        self._trial = None
        self._level = trial.level
        self._gain = trial.would - trial.spent
        self._stride *= 2
        self._up_wait[trial.level] /= 2
        self.switches += 1
        self._set(trial.level, (plan.work - 1).bit_length(), trial, times.mean, now)

    def _fall(self, level: int, now: float) -> None:
        """To a lower level. Whether to try this one again at once is by what it has gained."""
        if level == self._level:
            return
        here, wait = self._level, self._up_wait[self._level]
        if self._gain < 0:
            wait = max(UP_WAIT, wait)
        elif self._gain > 10 * self._step:
            wait = 0.0
        self._up_wait[here], self._up_at[here] = wait, now + wait
        self._level, self._gain, self._stride = level, 0.0, 1
        self._down_wait = DOWN_WAIT  # it may not be low enough
        self._down_at = self._spent + DOWN_WAIT
        self.switches += 1

    def _judge_down(
        self, trial: _Trial, times: _Times, size: int, now: float, *, aborted: bool
    ) -> None:
        if aborted:
            # The step has to be run again with yet fewer threads, though it may say little.
            self._trial = _Trial(max(0, trial.level - 1), trial.until, self._level)
            return
        ratio = trial.spent / trial.would
        least = 1 if ratio > 2 else DOWN_STEPS
        most = DOWN_STEPS_MOST if DOWN_GAIN_CLEAR < ratio <= DOWN_GAIN else least
        if trial.steps < most:
            return
        self._trial = None
        self._set(trial.level, size, trial, times.most, now)
        if trial.spent <= DOWN_GAIN * trial.would:
            self._fall(trial.level, now)
            return
        times.usual = times.recent  # slow, but not for the number of threads: the context grows
        cost = max(0.0, trial.spent - trial.would)
        self._down_at = self._spent + max(self._down_wait, DOWN_SHARE * cost)
        self._slow_at = now + max(SLOW_WAIT, SLOW_SHARE * cost)
        deeper = self._level - 2 * trial.depth
        if deeper >= 0 and trial.spent < DOWN_NEAR * trial.would:
            # With many busy processes one thread less is still too many.
            self._trial = _Trial(deeper, trial.until, 2 * trial.depth)
        else:
            self._down_wait = min(DOWN_WAIT_MOST, 2 * self._down_wait)

    def _set(self, level: int, size: int, trial: _Trial, unit: float, now: float) -> None:
        """A trial's result is what is known of its level."""
        times = self._times[level].setdefault(size, _Times())
        times.set(unit * trial.spent / trial.would, trial.spent / trial.steps, now)


def _bearable(step: float) -> float:
    return step * (UP_COST if step < LONG else UP_COST_LONG)


def ladder(most: int) -> tuple[int, ...]:
    """The numbers of threads to choose from: dense near the top, where one busy process costs one
    processor, then by about a fifth."""
    levels = [most]
    gap = 1
    while levels[-1] > 1:
        levels.append(levels[-1] - max(1, min(gap, levels[-1] // 5)))
        gap = gap * 2 if len(levels) > 2 else 1
    return tuple(reversed(levels))
