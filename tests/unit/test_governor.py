"""The governor on machines that are written down: a random generator with a seed, and no clock.

The machines are worse than real ones: every time has a noise of a fifth, one step in a hundred takes
up to twelve times as long, and prompts lie between the tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shimmy_jupyter.core.governor import FLOOR, Governor, Plan, ladder

PHASE = 20.0


@dataclass
class Machine:
    """What a step takes with so many threads, while so many other processes compute."""

    cores: int
    seed: int = 0
    busy: int = 0
    token: float = 0.026  # seconds, with one thread
    serial: float = 0.18
    context: float = 1.0
    heavy: float = 0.01
    lucky: float = 0.0  # of the steps with too many threads, these are none the worse
    mild: tuple[float, float] = (0.04, 0.5)
    random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def seconds(self, threads: int, work: int) -> float:
        dice = self.random
        alone = self.token * max(1.0, work / 4) * self.context
        time = alone * (self.serial + (1 - self.serial) / threads) * dice.lognormvariate(0, 0.2)
        if dice.random() < self.heavy:
            time += min(0.25, 0.03 * dice.paretovariate(1.0))
        if threads + self.busy > self.cores and threads > 1 and dice.random() >= self.lucky:
            slices = 1 + int(time / 0.05)
            time *= sum(1 / dice.uniform(*self.mild) for _ in range(slices)) / slices
        elif self.busy >= self.cores:
            time *= (self.busy + 1) / self.cores
        return time


def tokens(dice: random.Random) -> Iterator[int]:
    """Decoding one sequence, or some, and now and then a prompt."""
    rows = 1
    yield from [1] * 10  # a model is warmed up when it is loaded
    while True:
        yield dice.choice((16, 40, 130, 200)) if dice.random() < 0.01 else rows
        if dice.random() < 0.01:
            rows = dice.choice((1, 1, 1, 2, 3, 6))


class Run:
    """Decodes on a machine, with a governor or with a fixed number of threads."""

    def __init__(self, machine: Machine, governor: Governor | int, *, prompts: bool = True) -> None:
        self.machine, self.governor = machine, governor
        self.now = 0.0
        dice = random.Random(machine.seed + 1)
        self.works = tokens(dice) if prompts else iter(lambda: 1, 0)

    def step(self, work: int) -> int:
        """Runs it until it is done, and says how often it was aborted."""
        if isinstance(self.governor, int):
            self.now += self.machine.seconds(self.governor, work)
            return 0
        for aborts in range(100):
            plan = self.governor.plan(work, self.now)
            seconds = self.machine.seconds(plan.threads, work)
            aborted = plan.limit is not None and seconds > plan.limit
            seconds = plan.limit + 0.001 if aborted and plan.limit else seconds
            self.now += seconds
            self.governor.observe(plan, seconds, self.now, aborted=aborted)
            if not aborted:
                return aborts
        raise AssertionError("aborted without end")

    def rate(self, seconds: float = PHASE, grow: float = 1.0) -> float:
        """Work done for a second: in units of what it takes at the start with one thread."""
        start, done = self.now, 0.0
        while self.now < start + seconds:
            work = next(self.works)
            self.step(work)
            done += max(1.0, work / 4)
            self.machine.context *= grow
        return done / (self.now - start)


@cache
def best(cores: int, busy: int, *, prompts: bool, grow: float = 1.0, **facts: float) -> float:
    """The rate of the best fixed number of threads."""
    return max(
        Run(Machine(cores, 999, busy, **facts), n, prompts=prompts).rate(  # type: ignore[arg-type]
            PHASE if grow > 1 else 5 * PHASE, grow
        )
        for n in ladder(cores)
    )


SEEDS = range(8)


def ratios(
    cores: int, phases: list[int], *, prompts: bool = True, **facts: float
) -> list[list[float]]:
    """For each phase of so many busy processes, and each seed: the governor's rate by the best."""
    found: list[list[float]] = [[] for _ in phases]
    for seed in SEEDS:
        machine = Machine(cores, seed, **facts)  # type: ignore[arg-type]
        run = Run(machine, Governor(cores), prompts=prompts)
        for phase, busy in enumerate(phases):
            machine.busy = busy
            found[phase].append(run.rate() / best(cores, busy, prompts=prompts, **facts))
    return found


@pytest.mark.parametrize("serial", [0.05, 0.18, 0.25])
def test_a_quiet_machine_loses_less_than_a_twentieth(serial: float) -> None:
    """Without hiccups, as cutting those short is a gain that would hide the cost."""
    for phase in ratios(2, [0, 0, 0], serial=serial, heavy=0.0, prompts=False):
        assert fmean(phase) >= 0.97
        assert min(phase) >= 0.95


def test_exact_times_on_a_quiet_machine_lose_one_percent() -> None:
    run = Story()
    run.steps(6000)
    assert run.now < 6000 * QUIET[2] * 1.01


TWO: list[tuple[list[int], dict[str, float]]] = [
    ([0, 1, 0], {}),
    ([1, 1, 0], {}),
    ([0, 1, 0], {"serial": 0.05}),
    ([0, 2, 0], {}),
    ([0, 1, 0], {"heavy": 0.0}),
    ([0, 1, 0], {"heavy": 0.03}),
    ([1, 1, 0], {"lucky": 0.2}),
    ([1, 1, 0], {"lucky": 0.5}),
]


@pytest.mark.parametrize("prompts", [False, True])
@pytest.mark.parametrize(("phases", "facts"), TWO)
def test_two_processors(phases: list[int], facts: dict[str, float], prompts: bool) -> None:
    for phase in ratios(2, phases, prompts=prompts, **facts):
        assert fmean(phase) >= 0.93
        assert min(phase) >= (0.8 if "lucky" in facts else 0.85)


@pytest.mark.parametrize(
    ("cores", "phases", "token", "serial"),
    [
        (4, [0, 1, 2, 0], 0.05, 0.1),
        (8, [0, 1, 3, 0], 0.1, 0.05),
        (16, [0, 1, 0], 0.2, 0.03),
        (16, [1, 5, 0], 0.2, 0.03),
        (16, [0, 1, 0], 0.05, 0.3),
    ],
)
def test_more_processors(cores: int, phases: list[int], token: float, serial: float) -> None:
    for phase in ratios(cores, phases, token=token, serial=serial, prompts=False):
        assert fmean(phase) >= 0.92
        assert min(phase) >= 0.8


def test_steps_of_three_milliseconds() -> None:
    for phase in ratios(2, [0, 1, 0], token=0.003, prompts=False):
        assert min(phase) >= 0.85


def test_steps_of_a_third_of_a_second() -> None:
    """A large model gives few times to judge by, and each trial is expensive."""
    for phase in ratios(2, [0, 1, 0], token=0.35, prompts=False):
        assert fmean(phase) >= 0.8
        assert min(phase) >= 0.7


@pytest.mark.parametrize("busy", [0, 1])
def test_a_growing_context(busy: int) -> None:
    """Steps become three times as long within 20 s, and shorter at once where the next one begins."""
    grow = 3.0 ** (1 / (800 if busy == 0 else 450))
    found = []
    for seed in SEEDS:
        run = Run(Machine(2, seed, busy), Governor(2), prompts=False)
        run.rate(5)
        for _ in range(2):
            run.machine.context = 1.0
            found.append(run.rate(grow=grow) / best(2, busy, prompts=False, grow=grow))
    assert fmean(found) >= 0.92
    assert min(found) >= 0.8


QUIET = {1: 0.027, 2: 0.016}
BUSY = {1: 0.027, 2: 0.25}


class Story:
    """A governor of two threads, steps of one token, and times without noise."""

    def __init__(self, most: int = 2) -> None:
        self.governor = Governor(most)
        self.now = 0.0
        self.plans: list[Plan] = []
        self.aborted: list[float] = []

    def step(self, seconds: Callable[[int], float], work: int = 1) -> None:
        while True:
            plan = self.governor.plan(work, self.now)
            needed = seconds(plan.threads)
            aborted = plan.limit is not None and needed > plan.limit
            spent = plan.limit if aborted and plan.limit else needed
            self.now += spent
            self.governor.observe(plan, spent, self.now, aborted=aborted)
            self.plans.append(plan)
            if not aborted:
                return
            self.aborted.append(self.now)

    def steps(self, number: int, times: dict[int, float] = QUIET, factor: float = 1.0) -> list[int]:
        """Runs them, and says with how many threads."""
        start = len(self.plans)
        for _ in range(number):
            self.step(lambda threads: times[threads] * factor)
        return [plan.threads for plan in self.plans[start:]]

    def until(self, end: float, times: dict[int, float]) -> None:
        while self.now < end:
            self.steps(1, times)


def test_a_quiet_machine_keeps_all_its_threads() -> None:
    story = Story()
    assert story.steps(2) == [2, 2]
    assert story.steps(3000).count(1) <= 24  # it did look what fewer do
    assert story.governor.threads == 2
    assert story.governor.switches == 0


def test_the_first_bad_step_is_cut_and_run_again_with_fewer() -> None:
    story = Story()
    story.steps(500)
    began = story.now
    assert story.steps(1, BUSY) == [2, 1]
    assert story.now - began < 4 * QUIET[2] + BUSY[1]
    assert story.governor.threads == 1


def test_a_busy_machine_is_noticed_at_the_start() -> None:
    story = Story()
    assert story.steps(10, BUSY)[2:].count(2) <= 1
    assert story.governor.threads == 1
    assert story.plans[-1].limit is None


def test_while_it_is_busy_two_threads_are_tried_seldom_and_briefly() -> None:
    story = Story()
    story.steps(500)
    busy = story.now
    story.until(busy + 60, BUSY)
    assert 10 <= len(story.aborted) <= 30
    waits = [later - earlier for earlier, later in pairwise(story.aborted)]
    assert max(waits) < 3.5
    assert sum(plan.limit or 0 for plan in story.plans[500:] if plan.threads == 2) < 0.05 * 60


def test_when_it_is_quiet_again_all_threads_are_back() -> None:
    story = Story()
    story.steps(200)
    story.until(story.now + 60, BUSY)
    quiet = story.now
    story.until(quiet + 3.5, QUIET)
    assert story.governor.threads == 2
    assert story.steps(600).count(1) < 20


def test_one_hiccup_costs_a_few_steps() -> None:
    story = Story()
    story.steps(500)
    story.steps(1, BUSY)
    assert story.steps(30).count(1) <= 3
    assert story.governor.threads == 2


def test_a_lucky_step_does_not_win() -> None:
    """Every other step is as fast as on a quiet machine; their mean is not."""
    story = Story()
    for number in range(2000):
        story.step(lambda threads: (QUIET, BUSY)[number % 2][threads])  # noqa: B023
    assert story.governor.threads == 1
    assert story.now < 2000 * BUSY[1] * 1.1


def test_twice_as_slow_is_noticed_without_an_abort() -> None:
    story = Story()
    story.steps(1500)
    story.steps(60, {1: 0.027, 2: 0.036})
    assert story.governor.threads == 1
    assert not story.aborted


def test_a_growing_context_is_not_trouble() -> None:
    story = Story()
    for number in range(3000):
        story.steps(1, factor=1 + number / 1000)
    story.steps(500)  # the next one is short again
    story.steps(500, factor=2.5)  # and a long one takes its place
    assert not story.aborted
    assert story.governor.switches == 0
    assert sum(plan.threads == 1 for plan in story.plans) < 60


def test_prompts_are_not_compared_with_tokens() -> None:
    story = Story()
    story.steps(100)
    for _ in range(50):
        story.step(lambda threads: 60 * QUIET[threads], work=512)
        story.steps(20)
    assert not story.aborted
    assert story.governor.switches == 0


def test_a_prompt_of_a_new_size_is_cut_as_well() -> None:
    story = Story()
    story.steps(100)
    story.step(lambda threads: 20 * BUSY[threads] * threads, work=100)
    assert [plan.threads for plan in story.plans[-2:]] == [2, 1]


def test_what_looks_at_far_more_than_before_is_not_cut() -> None:
    story = Story()
    story.steps(100)
    governor = story.governor
    assert governor.plan(1, story.now, cells=1024).limit is not None
    deep = governor.plan(1, story.now, cells=1025)
    assert (deep.threads, deep.limit) == (2, None)
    governor.observe(deep, 8 * QUIET[2], story.now)
    assert governor.threads == 2
    # Now it is known how that is.
    assert governor.plan(1, story.now, cells=3000).limit is not None
    assert governor.plan(1, story.now, cells=5000).limit is None


def test_beside_another_thread_of_ours() -> None:
    """That has a processor, and what a step takes says nothing."""
    story = Story()
    story.steps(100)
    governor = story.governor
    before = repr(governor)
    for _ in range(100):
        plan = governor.plan(1, story.now, beside=True)
        assert (plan.threads, plan.limit) == (1, None)
        governor.observe(plan, BUSY[1], story.now)
    assert repr(governor) == before
    assert governor.plan(1, story.now).threads == 2
    assert Governor(2, fixed=True).plan(1, 0.0, beside=True).threads == 2
    assert Governor(1).plan(1, 0.0, beside=True).threads == 1


def test_after_an_idle_hour() -> None:
    story = Story()
    story.steps(100)
    story.until(story.now + 10, BUSY)
    story.now += 3600
    story.steps(10)
    assert story.governor.threads == 2


def test_sixteen_threads_beside_one_process() -> None:
    quiet = {n: 0.2 / n for n in range(1, 17)}
    story = Story(16)
    story.steps(500, quiet)
    story.steps(300, quiet | {16: 0.2})
    assert story.governor.threads == 15
    story.steps(300, quiet)
    assert story.governor.threads == 16


def test_a_number_that_somebody_set_is_kept() -> None:
    governor = Governor(4, fixed=True)
    for number in range(100):
        plan = governor.plan(1, number)
        assert plan == Plan(4, None, 1)
        governor.observe(plan, 0.01 if number < 50 else 5.0, number + 0.5)
    assert (governor.threads, governor.switches, governor.trials) == (4, 0, 0)


def test_one_thread_is_never_cut() -> None:
    assert Governor(1).plan(512, 0.0) == Plan(1, None, 512)
    with pytest.raises(ValueError, match="at least one"):
        Governor(0)


def test_it_says_how_it_is() -> None:
    story = Story()
    story.steps(10)
    story.steps(1, BUSY)
    assert repr(story.governor) == ("<Governor 1 of 2 threads, 1 switches, 1 trials, 1 aborted>")


@given(st.integers(1, 512))
def test_ladders(most: int) -> None:
    levels = ladder(most)
    assert levels[0] == 1
    assert levels[-1] == most
    assert max(1, most - 1) in levels
    assert all(0 < b - a <= max(1, b // 5) for a, b in pairwise(levels))
    assert len(levels) <= 40
    if most <= 8:
        assert levels == tuple(range(1, most + 1))


class AnyMachine(RuleBasedStateMachine):
    """Whatever steps take: each is done at last, and only with threads that are allowed."""

    @initialize(most=st.sampled_from((1, 2, 3, 4, 8, 16, 64)))
    def begin(self, most: int) -> None:
        self.most, self.governor = most, Governor(most)
        self.now = 0.0

    @rule(
        work=st.sampled_from((1, 1, 1, 2, 3, 7, 64, 500, 512)),
        times=st.lists(
            st.one_of(st.floats(0, 100), st.sampled_from((0.0, 0.016, 0.027, 0.4))),
            min_size=1,
            max_size=6,
        ),
        repeat=st.integers(1, 4),
    )
    def run(self, work: int, times: list[float], repeat: int) -> None:
        """Steps with these times, from the next of which each attempt takes its own."""
        for number in range(len(times) * repeat):
            threads = self.most + 1
            for attempt in range(len(self.governor.levels)):
                plan = self.governor.plan(work, self.now)
                assert plan.threads in self.governor.levels
                assert plan.threads < threads
                assert plan.work == work
                assert (plan.limit is None) or (plan.threads > 1 and plan.limit >= FLOOR)
                assert self.governor.plan(work, self.now) == plan
                seconds = times[(number + attempt) % len(times)]
                aborted = plan.limit is not None and seconds > plan.limit
                seconds = plan.limit if aborted and plan.limit else seconds
                self.now += seconds
                self.governor.observe(plan, seconds, self.now, aborted=aborted)
                threads = plan.threads
                if not aborted:
                    break
            else:
                raise AssertionError("aborted without end")

    @rule(seconds=st.floats(0, 1e5))
    def idle(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: self.most > 1)
    @rule()
    def quiet(self) -> None:
        """After anything, a quiet machine gets to where it belongs: the top is not out of reach."""
        for _ in range(60):
            plan = self.governor.plan(1, self.now)
            self.now += 1 / plan.threads
            self.governor.observe(plan, 1 / plan.threads, self.now)

    @invariant()
    def consistent(self) -> None:
        assert self.governor.threads in self.governor.levels


AnyMachine.TestCase.settings = settings(max_examples=250, stateful_step_count=40, deadline=None)
test_any_machine = AnyMachine.TestCase
