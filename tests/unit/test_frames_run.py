"""Rows are answered side by side, and what stands in their way is waited for, noted or raised."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shimmy_jupyter.errors import (
    Cancelled,
    ContextLengthExceeded,
    GenerationFailed,
    InvalidValue,
    QueueFull,
    RateLimitExceeded,
    all_errors,
    from_code,
)
from shimmy_jupyter.frames.cache import Cache, Key, Reply
from shimmy_jupyter.frames.rows import Failed, Kept, Table
from shimmy_jupyter.frames.run import Counts, Job, RowFailed, Runner, Throttle


class Clock:
    """Time that passes when somebody sleeps, and only then."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        until = self.now + seconds
        self.slept.append(seconds)
        await asyncio.sleep(0)
        self.now = max(self.now, until)


class Model:
    """Answers `<prompt>!`. `turn` is awaited before each answer, and may raise."""

    def __init__(
        self, turn: Callable[[str], Awaitable[None] | None] = lambda _prompt: None
    ) -> None:
        self.asked: list[str] = []
        self.running = self.most = 0
        self._turn = turn

    async def __call__(self, prompts: list[str]) -> list[Reply]:
        self.asked += prompts
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await asyncio.sleep(0)
            for prompt in prompts:
                waiting = self._turn(prompt)
                if waiting is not None:
                    await waiting
            return [Reply(f"{prompt}!", 2) for prompt in prompts]
        finally:
            self.running -= 1


def job(outcomes, model, clock: Clock | None = None, **more) -> Job:
    outcomes = list(outcomes)
    clock = clock or Clock()
    return Job(
        enumerate(outcomes),
        model,
        more.pop("read", lambda reply: (reply.text,)),
        Key("chat", "sha", {}),
        Table(len(outcomes), 1),
        clock=clock,
        sleep=clock.sleep,
        **more,
    )


def run(work: Job) -> Counts:
    runner = Runner(work)
    asyncio.run(runner.run())
    return runner.counts


def names(n: int) -> list[str]:
    return [f"p{k}" for k in range(n)]


def sometimes(error, often: int = 1):
    """Raises the error the first `often` times that a prompt is asked."""
    seen: Counter[str] = Counter()

    def turn(prompt: str) -> None:
        seen[prompt] += 1
        if seen[prompt] <= often:
            raise error

    return turn


class TestAnswers:
    @given(st.integers(0, 30), st.integers(1, 8), st.integers(1, 4), st.randoms())
    @settings(max_examples=40, deadline=None)
    def test_stand_in_their_rows_whatever_ends_first(
        self, n: int, concurrency: int, batch: int, chance: random.Random
    ) -> None:
        async def late(_prompt: str) -> None:
            for _ in range(chance.randrange(5)):
                await asyncio.sleep(0)

        model = Model(late)
        work = job(names(n), model, concurrency=concurrency, batch=batch)
        counts = run(work)
        assert work.table.columns == [[f"p{k}!" for k in range(n)]]
        assert sorted(model.asked) == sorted(names(n))
        assert (counts.done, counts.asked, counts.tokens) == (n, n, 2 * n)
        assert model.most <= concurrency

    def test_as_many_at_once_as_wanted_and_none_taken_ahead(self) -> None:
        taken: list[int] = []
        ahead: list[int] = []

        def outcomes():
            for k in range(40):
                taken.append(k)
                yield f"p{k}"

        model = Model(lambda _prompt: ahead.append(len(taken) - len(model.asked)))
        work = job(names(40), model, concurrency=5)
        run(
            Job(
                **{f: getattr(work, f) for f in work.__slots__}
                | {"outcomes": enumerate(outcomes())}
            )
        )
        assert model.most == 5
        assert max(ahead) == 0

    def test_rows_left_out_and_failed_before_are_not_asked(self) -> None:
        model = Model()
        work = job(["a", None, Failed("x", "why"), Kept("b", ("had",)), "b"], model)
        counts = run(work)
        assert model.asked == ["a"]
        assert work.table.columns == [["a!", None, None, "had", "had"]]
        assert list(work.table.said()) == [None, None, "x: why", None, None]
        assert (counts.left_out, counts.errors, counts.kept, counts.repeated) == (1, 1, 1, 1)
        assert counts.done == 5

    def test_texts_go_together_in_batches(self) -> None:
        sizes: list[int] = []
        model = Model()

        async def call(prompts: list[str]) -> list[Reply]:
            sizes.append(len(prompts))
            return await model(prompts)

        run(job(names(10), call, batch=4, concurrency=1))
        assert sizes == [4, 4, 2]

    def test_an_answer_cut_off_is_counted(self) -> None:
        async def call(prompts: list[str]) -> list[Reply]:
            return [Reply("x", 1, "length")]

        assert run(job(["a", "b"], call)).cut_off == 2


class TestTheSamePrompt:
    def test_is_asked_once(self) -> None:
        model = Model()
        work = job(["a", "b", "a", "a"], model, concurrency=1)
        counts = run(work)
        assert model.asked == ["a", "b"]
        assert work.table.columns == [["a!", "b!", "a!", "a!"]]
        assert (counts.asked, counts.repeated, counts.done) == (2, 2, 4)

    def test_is_asked_once_while_it_is_being_answered(self) -> None:
        model = Model()
        work = job(["a"] * 9, model, concurrency=9)
        counts = run(work)
        assert (model.asked, work.table.columns) == (["a"], [["a!"] * 9])
        assert (counts.repeated, counts.done) == (8, 9)

    def test_fails_once(self) -> None:
        model = Model(sometimes(GenerationFailed("nan"), 9))
        work = job(["a", "b", "a"], model, concurrency=3)
        counts = run(work)
        assert sorted(model.asked) == ["a", "b"]
        assert next(iter(work.table.said())) == "generation_failed: nan"
        assert (counts.errors, counts.done) == (3, 3)

    def test_is_asked_each_time_where_answers_differ(self) -> None:
        model = Model()
        counts = run(job(["a", "a", "b"], model, repeatable=False))
        assert sorted(model.asked) == ["a", "a", "b"]
        assert counts.repeated == 0


OWN = """context_length_exceeded request_too_large generation_failed constraint_too_complex
    deadline_exceeded cancelled internal_error engine_crashed""".split()
WAITED_FOR = ["queue_full", "rate_limit_exceeded"]


class TestFailures:
    @pytest.mark.parametrize("code", OWN)
    def test_of_a_row_stay_with_it(self, code: str) -> None:
        error = from_code(code, "why")
        model = Model(lambda prompt: sometimes(error)(prompt) if prompt == "p3" else None)
        work = job(names(8), model, concurrency=2)
        counts = run(work)
        assert work.table.errors == {3: f"{code}: why"}
        assert work.table.columns[0][2:5] == ["p2!", None, "p4!"]
        assert (counts.errors, counts.done) == (1, 8)

    @pytest.mark.parametrize(
        "code",
        sorted({cls.code for cls in all_errors()} - set(OWN) - set(WAITED_FOR) - {"invalid_value"}),
    )
    def test_that_each_row_would_have_end_it(self, code: str) -> None:
        model = Model(lambda _prompt: sometimes(from_code(code, "why"))("x"))
        work = job(names(1000), model, concurrency=4)
        with pytest.raises(type(from_code(code, ""))) as caught:
            run(work)
        assert caught.value.code == code
        assert len(model.asked) <= 4
        assert work.table.errors == {}

    @pytest.mark.parametrize("param", ["messages", "messages[0].content", "input[3]", None])
    def test_a_value_of_the_rows_is_its_own(self, param) -> None:
        error = InvalidValue("odd", param=param)
        work = job(["a", "b"], Model(sometimes(error)), concurrency=1)
        assert run(work).errors == 2

    def test_a_value_of_all_rows_is_not(self) -> None:
        with pytest.raises(InvalidValue):
            run(
                job(
                    names(50),
                    Model(sometimes(InvalidValue("odd", param="temperature"))),
                    concurrency=1,
                )
            )

    @pytest.mark.parametrize(
        "error", [GenerationFailed("broken"), InvalidValue("odd", param="messages.0.content")]
    )
    def test_what_fails_with_everything_is_left_alone(self, error) -> None:
        model = Model(sometimes(error, 99))
        work = job(names(1000), model, concurrency=2)
        with pytest.raises(type(error)):
            run(work)
        assert 20 <= len(model.asked) <= 22
        assert len(work.table.errors) == 19

    def test_one_that_answers_now_and_then_is_not(self) -> None:
        broken = sometimes(GenerationFailed("broken"), 99)
        model = Model(lambda prompt: None if int(prompt[1:]) % 20 == 19 else broken(prompt))
        assert run(job(names(200), model, concurrency=1)).errors == 190

    def test_too_long_rows_are_no_broken_server(self) -> None:
        model = Model(sometimes(from_code("context_length_exceeded", "long"), 99))
        assert run(job(names(100), model)).errors == 100

    def test_more_tokens_than_there_can_be_is_no_rows_length(self) -> None:
        error = ContextLengthExceeded("as many do not fit", param="max_tokens")
        work = job(names(100), Model(sometimes(error, 99)), concurrency=1)
        with pytest.raises(ContextLengthExceeded):
            run(work)
        assert len(work.table.errors) == 19

    def test_the_first_one_can_end_it(self) -> None:
        model = Model(
            lambda prompt: sometimes(GenerationFailed("why"))(prompt) if prompt == "p3" else None
        )
        work = job(names(100), model, concurrency=1, raises=True)
        with pytest.raises(RowFailed) as caught:
            run(work)
        assert (caught.value.row, caught.value.why) == (3, Failed("generation_failed", "why"))
        assert work.table.columns[0][:4] == ["p0!", "p1!", "p2!", None]
        assert len(model.asked) == 4

    def test_so_can_a_row_without_a_prompt_and_an_answer_of_no_use(self) -> None:
        def read(reply: Reply):
            raise RowFailed(Failed("generation_failed", "odd"))

        for outcomes in (["a", Failed("x", "y")], ["a"]):
            more = {"read": read} if len(outcomes) == 1 else {}
            with pytest.raises(RowFailed):
                run(job(outcomes, Model(), raises=True, concurrency=1, **more))

    def test_an_answer_of_no_use_is_an_error(self) -> None:
        def read(reply: Reply):
            if reply.text == "a!":
                raise RowFailed(Failed("generation_failed", "odd"))
            return (reply.text,)

        work = job(["a", "b", "a"], Model(), read=read, concurrency=1)
        assert run(work).errors == 2
        assert list(work.table.said()) == ["generation_failed: odd", None, "generation_failed: odd"]

    def test_in_a_batch_only_the_row_it_belongs_to_fails(self) -> None:
        def turn(prompt: str) -> None:
            if prompt == "p2":
                raise InvalidValue("empty", param="input[2]")

        model = Model(turn)
        work = job(names(6), model, batch=4, concurrency=1)
        assert run(work).errors == 1
        assert work.table.errors == {2: "invalid_value: empty"}
        assert work.table.columns == [["p0!", "p1!", None, "p3!", "p4!", "p5!"]]

    def test_a_prompt_that_cannot_be_made_ends_it(self) -> None:
        def outcomes():
            yield 0, "a"
            raise ZeroDivisionError

        work = job(["a", "b"], Model())
        broken = Job(outcomes(), work.call, work.read, work.key, work.table)
        with pytest.raises(ZeroDivisionError):
            run(broken)

    def test_a_request_that_somebody_else_cancels_is_no_end(self) -> None:
        def turn(prompt: str) -> None:
            if prompt == "p1":
                raise asyncio.CancelledError

        work = job(names(4), Model(turn), concurrency=2)
        with pytest.raises(Cancelled):
            run(work)
        assert work.table.columns == [["p0!", None, "p2!", "p3!"]]


class TestWaiting:
    @pytest.mark.parametrize("error", [QueueFull("full"), RateLimitExceeded("slow", retry_after=7)])
    def test_what_cannot_be_taken_now_is_asked_again(self, error) -> None:
        clock, model = Clock(), Model(sometimes(error))
        work = job(names(4), model, clock, concurrency=2)
        counts = run(work)
        assert work.table.columns == [[f"p{k}!" for k in range(4)]]
        assert Counter(model.asked) == dict.fromkeys(names(4), 2)
        assert (counts.errors, counts.asked) == (0, 4)

    def test_as_long_as_the_server_says(self) -> None:
        clock = Clock()
        refused = sometimes(RateLimitExceeded("slow", retry_after=7))
        times: list[float] = []

        def turn(prompt: str) -> None:
            times.append(clock.now)
            refused(prompt)

        run(job(["a"], Model(turn), clock))
        assert times == [0, 7]

    def test_it_is_said_and_then_not(self) -> None:
        said: list[tuple[str, float, int]] = []

        def changed(counts: Counts) -> None:
            said.append((counts.waiting, counts.until, counts.at_once))

        refusals = iter([RateLimitExceeded("slow", retry_after=7)])

        def turn(_prompt: str) -> None:
            if error := next(refusals, None):
                raise error

        run(job(["a", "b"], Model(turn), concurrency=2, changed=changed))
        assert ("rate_limit_exceeded", 7.0, 1) in said
        assert said[-1][0] == ""

    def test_others_wait_as_well(self) -> None:
        clock, model = Clock(), Model()
        refusals = iter([QueueFull("full")])
        times: list[float] = []

        def turn(_prompt: str) -> None:
            times.append(clock.now)
            if error := next(refusals, None):
                raise error

        model = Model(turn)
        run(job(names(6), model, clock, concurrency=2))
        # The one that was on its way with the refused one, and nothing else before the time.
        assert [when < 0.5 for when in times].count(True) == 2

    @pytest.mark.parametrize("after", [None, 7.0])
    def test_it_has_a_bound(self, after: float | None) -> None:
        clock = Clock()
        error = RateLimitExceeded("slow", retry_after=after)
        work = job(
            names(100), Model(sometimes(error, 10_000)), clock, concurrency=8, max_wait=100.0
        )
        with pytest.raises(RateLimitExceeded):
            run(work)
        assert 60 < clock.now <= 100

    def test_what_takes_longer_than_that_is_not_begun(self) -> None:
        clock = Clock()
        error = RateLimitExceeded("tomorrow", retry_after=40_000)
        with pytest.raises(RateLimitExceeded):
            run(job(names(100), Model(sometimes(error, 99)), clock, max_wait=300))
        assert clock.slept == []

    def test_at_most_so_many_at_once_as_are_allowed(self) -> None:
        """A server with three places, and a client that begins with 32."""
        clock = Clock()

        async def turn(_prompt: str) -> None:
            if model.running > 3:
                raise QueueFull("full")
            for _ in range(3):
                await asyncio.sleep(0)

        model = Model(turn)
        work = job(names(300), model, clock, concurrency=32)
        counts = run(work)
        assert counts.errors == 0
        assert None not in work.table.columns[0]
        # It tries for more, is refused, and halves: few requests are in vain.
        assert len(model.asked) < 500


class TestThrottle:
    def test_requests_that_were_sent_together_count_once(self) -> None:
        throttle = Throttle(32, 300.0)
        begun = [throttle.begin() for _ in range(32)]
        for one in begun:
            assert throttle.refused(one, 1.0, now=10.0)
            throttle.end()
        assert (throttle.at_once, throttle.not_before, throttle.running) == (16, 11.0, 0)

    def test_fewer_each_time_and_never_none(self) -> None:
        throttle, seen = Throttle(32, 1e9), []
        for now in range(8):
            throttle.refused(throttle.begin(), None, float(now))
            throttle.end()
            seen.append(throttle.at_once)
        assert seen == [16, 8, 4, 2, 1, 1, 1, 1]

    def test_more_again_one_by_one(self) -> None:
        throttle, seen = Throttle(4, 300.0), []
        throttle.refused(throttle.begin(), 0, 0.0)
        throttle.end()
        for _ in range(12):
            throttle.answered()
            seen.append(throttle.at_once)
        assert seen == [2, 3, 3, 3, 4, 4, 4, 4, 4, 4, 4, 4]

    def test_pauses_grow_where_nobody_says_how_long(self) -> None:
        throttle, now, pauses = Throttle(1, 1e9), 0.0, []
        for _ in range(9):
            throttle.refused(throttle.begin(), None, now)
            throttle.end()
            pauses.append(throttle.wait(now))
            now = throttle.not_before
        assert pauses == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]

    def test_an_answer_begins_the_bound_anew(self) -> None:
        throttle = Throttle(2, 10.0)
        assert throttle.refused(throttle.begin(), 8, 0.0)
        throttle.answered()
        assert throttle.refused(throttle.begin(), 8, 9.0)
        assert not throttle.refused(throttle.begin(), 8, 12.0)

    @given(
        st.integers(1, 40), st.lists(st.sampled_from(["begin", "ok", "no", "soon"]), max_size=200)
    )
    def test_bounds_hold_whatever_happens(self, most: int, events: list[str]) -> None:
        throttle, begun, now = Throttle(most, 1e9), [], 0.0
        for event in events:
            now += 1
            if event == "begin":
                if throttle.wait(now) == 0:
                    begun.append(throttle.begin())
            elif begun:
                if event == "ok":
                    throttle.answered()
                else:
                    throttle.refused(begun[0], None if event == "no" else 0.5, now)
                begun.pop(0)
                throttle.end()
            assert 1 <= throttle.at_once <= most
            assert throttle.running == len(begun) <= most
            assert throttle.wait(now) >= 0


class TestInterruption:
    def test_what_is_done_is_done_and_the_same_again_repeats_nothing(self, tmp_path: Path) -> None:
        first = Model()
        cancel: list[Callable[[], object]] = []

        def turn(prompt: str) -> None:
            if len(first.asked) == 60:
                cancel[0]()

        first._turn = turn
        work = job(names(100), first, concurrency=8, cache=Cache(tmp_path / "c"))

        async def interrupted() -> None:
            task = asyncio.ensure_future(Runner(work).run())
            cancel.append(task.cancel)
            await task

        with pytest.raises(asyncio.CancelledError):
            asyncio.run(interrupted())
        work.cache.close()
        assert first.running == 0
        done = [text for text in work.table.columns[0] if text is not None]
        assert 50 <= len(done) <= 60

        second = Model()
        again = job(names(100), second, concurrency=8, cache=Cache(tmp_path / "c"))
        counts = run(again)
        again.cache.close()
        assert again.table.columns == [[f"p{k}!" for k in range(100)]]
        assert counts.cached == len(done)
        assert sorted(f"{prompt}!" for prompt in second.asked) == sorted(
            set(again.table.columns[0]) - set(done)
        )

    def test_rows_from_the_cache_do_not_hold_up_the_loop(self, tmp_path: Path) -> None:
        cache = Cache(tmp_path / "c")
        run(job(names(2000), Model(), cache=cache))
        turns = 0

        async def both() -> None:
            nonlocal turns
            task = asyncio.ensure_future(Runner(job(names(2000), Model(), cache=cache)).run())
            while not task.done():
                turns += 1
                await asyncio.sleep(0)
            await task

        asyncio.run(both())
        cache.close()
        assert turns >= 2000 / 64


class TestCaching:
    def caching(self, cache: Cache, outcomes, model, **more) -> Counts:
        return run(job(outcomes, model, cache=cache, **more))

    def test_samples_are_kept_each_for_its_own_row(self, tmp_path: Path) -> None:
        numbers = iter(range(100))

        async def call(prompts: list[str]) -> list[Reply]:
            return [Reply(f"{prompt}{next(numbers)}") for prompt in prompts]

        cache = Cache(tmp_path / "c")
        tables = []
        for _ in range(2):
            work = job(["a", "b", "a"], call, cache=cache, repeatable=False, concurrency=1)
            run(work)
            tables.append(work.table.columns[0])
        cache.close()
        assert tables == [["a0", "b1", "a2"]] * 2

    def test_a_row_that_is_kept_counts_as_one_of_them(self, tmp_path: Path) -> None:
        numbers = iter(range(100))

        async def call(prompts: list[str]) -> list[Reply]:
            return [Reply(f"{prompt}{next(numbers)}") for prompt in prompts]

        cache = Cache(tmp_path / "c")
        run(job(["a", "a"], call, cache=cache, repeatable=False, concurrency=1))
        work = job([Kept("a", ("mine",)), "a"], call, cache=cache, repeatable=False)
        counts = run(work)
        cache.close()
        assert work.table.columns == [["mine", "a1"]]
        assert (counts.asked, counts.cached) == (0, 1)

    @pytest.mark.parametrize("repeatable", [True, False])
    def test_an_answer_of_no_use_is_kept_if_there_is_no_other(
        self, tmp_path: Path, repeatable
    ) -> None:
        def read(reply: Reply):
            raise RowFailed(Failed("generation_failed", "odd"))

        cache = Cache(tmp_path / "c")
        models = [Model(), Model()]
        for model in models:
            assert run(job(["a"], model, read=read, cache=cache, repeatable=repeatable)).errors == 1
        cache.close()
        assert models[1].asked == ([] if repeatable else ["a"])

    def test_a_refusal_is_not_kept(self, tmp_path: Path) -> None:
        cache = Cache(tmp_path / "c")
        run(job(["a"], Model(sometimes(GenerationFailed("x"))), cache=cache))
        model = Model()
        run(job(["a"], model, cache=cache))
        cache.close()
        assert model.asked == ["a"]
