"""Long work that can be looked at and stopped.

Cases: done with a result; failed by a typed error, by a defect; stopped, and only once the work has
noticed; reports from another thread, and faster than anybody looks; looks end with the end; others'
jobs; too many; forgotten after their time; closing; a thread's own error, result and cancellation.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from typing import Any

import pytest

from shimmy_jupyter.errors import Cancelled, ModelLoadFailed, NotFound, QueueFull, ShuttingDown
from shimmy_jupyter.models.jobs import (
    KEEP,
    MOST_RUNNING,
    Job,
    Jobs,
    Progress,
    Report,
    Stopped,
    in_thread,
)
from shimmy_jupyter.types import Principal

ME, OTHER = Principal("me"), Principal("other")
ADMIN = Principal("root", admin=True)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def jobs(clock: Clock) -> Jobs:
    return Jobs(clock)


async def nothing(_report: Report) -> None:
    return None


async def for_ever(_report: Report) -> Mapping[str, Any]:
    await asyncio.Event().wait()
    raise AssertionError


async def seen(job: Job) -> list[dict[str, Any]]:
    return [look async for look in job.looks(pause=0.0)]


async def test_done_with_a_result(jobs: Jobs) -> None:
    async def work(report: Report) -> Mapping[str, Any]:
        report(Progress("hashing", 3, 9, "bytes"))
        return {"ids": ["m"]}

    job = jobs.start("load", "m", ME, work)
    assert job.to_json()["state"] == "running"
    last = (await seen(job))[-1]
    assert (last["state"], last["result"], last["error"]) == ("done", {"ids": ["m"]}, None)
    assert (last["message"], last["done"], last["total"], last["unit"]) == (
        "done", 3, 9, "bytes",
    )  # fmt: skip
    assert (last["kind"], last["model"], last["id"]) == ("load", "m", job.id)


async def test_failed(jobs: Jobs) -> None:
    async def work(_report: Report) -> None:
        raise ModelLoadFailed("it needs 6.1 GB", param="model")

    job = jobs.start("load", "m", ME, work)
    await job.wait()
    found = job.to_json()
    assert found["state"] == "failed"
    assert found["error"]["code"] == "model_load_failed"
    assert found["error"]["message"] == "it needs 6.1 GB"
    assert found["error"]["request_id"] == job.id


async def test_a_defect_says_nothing_of_the_server(
    jobs: Jobs, caplog: pytest.LogCaptureFixture
) -> None:
    async def work(_report: Report) -> None:
        raise OSError("/home/somebody/secret")

    job = jobs.start("load", "m", ME, work)
    await job.wait()
    assert job.to_json()["error"]["code"] == "internal_error"
    assert "secret" not in str(job.to_json())
    assert "secret" in caplog.text


async def test_stopped_once_the_work_has_noticed(jobs: Jobs) -> None:
    began, may_end = threading.Event(), threading.Event()

    def work(stopped: Stopped) -> None:
        began.set()
        while not stopped():
            pass
        may_end.wait()
        raise Cancelled("stopped")

    job = jobs.start("pull", "m", ME, lambda _report: in_thread(work))
    await asyncio.to_thread(began.wait)
    jobs.cancel(job.id, ME)
    await asyncio.sleep(0)
    assert job.state == "running"
    may_end.set()
    await job.wait()
    assert job.to_json()["error"]["code"] == "cancelled"
    assert job.state == "cancelled"
    assert jobs.cancel(job.id, ME).state == "cancelled"


async def test_reports_from_a_thread_are_passed_on_in_order(jobs: Jobs) -> None:
    def work(report: Report) -> None:
        for done in range(10_000):
            report(Progress("downloading", done, 10_000, "bytes"))

    job = jobs.start("pull", "m", ME, lambda report: in_thread(lambda _: work(report)))
    looks = await seen(job)
    done = [look["done"] for look in looks]
    assert done == sorted(done)
    assert done[-1] == 9_999
    assert [look["state"] for look in looks[:-1]] == ["running"] * (len(looks) - 1)


async def test_a_late_report_changes_nothing(jobs: Jobs) -> None:
    kept: list[Report] = []

    async def work(report: Report) -> None:
        kept.append(report)

    job = jobs.start("load", "m", ME, work)
    await job.wait()
    kept[0](Progress("late", 5))
    await asyncio.sleep(0)
    assert job.to_json()["message"] != "late"


async def test_a_quiet_job_is_shown_now_and_then(jobs: Jobs) -> None:
    job = jobs.start("load", "m", ME, for_ever)
    looks = job.looks(most=0.0)
    assert [(await anext(looks))["state"] for _ in range(3)] == ["running"] * 3
    await looks.aclose()
    await jobs.close()


async def test_each_sees_their_own(jobs: Jobs) -> None:
    job = jobs.start("load", "m", ME, nothing)
    assert jobs.get(job.id, ADMIN) is jobs.get(job.id, ME) is job
    for look in (jobs.get, jobs.cancel):
        with pytest.raises(NotFound):
            look(job.id, OTHER)
    assert jobs.of(OTHER) == []
    assert jobs.of(ME) == jobs.of(ADMIN) == [job]
    await job.wait()


async def test_so_many_of_one_user(jobs: Jobs) -> None:
    for _ in range(MOST_RUNNING):
        jobs.start("load", "m", ME, for_ever)
    with pytest.raises(QueueFull, match=str(MOST_RUNNING)):
        jobs.start("load", "m", ME, for_ever)
    jobs.start("load", "m", OTHER, for_ever)
    assert jobs.active == MOST_RUNNING + 1
    await jobs.close()
    assert jobs.active == 0
    assert {job.state for job in jobs.of(ADMIN)} == {"cancelled"}
    with pytest.raises(ShuttingDown):
        jobs.start("load", "m", ME, nothing)


async def test_forgotten_after_their_time(jobs: Jobs, clock: Clock) -> None:
    ended, running = jobs.start("load", "m", ME, nothing), jobs.start("load", "n", ME, for_ever)
    await ended.wait()
    clock.now += KEEP
    assert jobs.of(ME) == [ended, running]
    clock.now += 1
    assert jobs.of(ME) == [running]
    with pytest.raises(NotFound):
        jobs.get(ended.id, ME)
    await jobs.close()


async def test_those_that_ended_last_are_kept(jobs: Jobs, clock: Clock) -> None:
    """Of each user, however many others have begun since."""
    door = asyncio.Event()

    async def long(_report: Report) -> None:
        await door.wait()

    pull = jobs.start("pull", "m", ME, long)
    for _ in range(100):
        await jobs.start("load", "m", OTHER, nothing).wait()
        await jobs.start("load", "m", ME, nothing).wait()
        clock.now += 0.001
    door.set()
    await pull.wait()
    assert jobs.get(pull.id, ME) is pull
    assert len(jobs.of(ME)) == len(jobs.of(OTHER)) + 0 == 64


async def test_however_often_it_is_stopped() -> None:
    noticed, ended = threading.Event(), threading.Event()

    def work(stopped: Stopped) -> None:
        while not stopped():
            pass
        noticed.wait()
        ended.set()

    task = asyncio.create_task(in_thread(work))
    await asyncio.sleep(0)
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
    assert not task.done()
    noticed.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()


async def test_in_thread() -> None:
    names: set[str] = set()

    def work(stopped: Stopped) -> int:
        names.add(threading.current_thread().name)
        assert not stopped()
        return 7

    assert await in_thread(work) == 7
    assert names == {"shimmy-work"}

    def wrong(_stopped: Stopped) -> None:
        raise ModelLoadFailed("no")

    with pytest.raises(ModelLoadFailed, match="no"):
        await in_thread(wrong)


async def test_who_gives_up_waits_until_the_thread_has_noticed() -> None:
    ended = threading.Event()

    def work(stopped: Stopped) -> None:
        while not stopped():
            pass
        ended.set()

    task = asyncio.create_task(in_thread(work))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()
