"""One call on a frame, from its options to the frame that is handed back or kept."""

from __future__ import annotations

import asyncio
import sys
import time
import warnings
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from ..errors import (
    AccessDenied,
    InvalidValue,
    Misconfigured,
    ModelNotFound,
    ServerUnreachable,
    ShimmyError,
    from_code,
)
from ..notebook.display import one_line
from .cache import Cache, CacheWarning, Key, Reply
from .columns import JSON, Layout
from .progress import Output, Progress, Quiet, Terminal, displayed
from .rows import Failed, Outcome, Prompts, Table
from .run import Counts, Job, RowFailed, Runner

Ask = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]
"""The body of a chat request to that of its answer."""
Embed = Callable[[list[str]], Awaitable[Sequence[Sequence[float]]]]
Classify = Callable[[str, Sequence[str]], Awaitable[Mapping[str, float]]]
_MOST_AT_ONCE = 256
_TICK = 0.5
"""Seconds."""
_LONGEST = 300
"""Characters of what is said about an answer that does not fit."""


@dataclass(frozen=True, slots=True)
class Wiring:
    """What frames need of the rest. `run` waits for a coroutine in the kernel's thread; on
    `KeyboardInterrupt` it cancels it and waits for its end. `resolve` says which model is meant, for "chat",
    "embed" or "classify"; `identity` what answers depend on by it or an adapter, such as its SHA-256, "" where
    that is not known. `structure` makes of a
    type a JSON schema, and what reads an answer's text as that type and gives it as JSON by the schema's
    names, or raises `ValueError` or `ShimmyError`. `folder` is the cache's; None: there is none.
    """

    run: Callable[[Coroutine[Any, Any, None]], None]
    ask: Ask
    embed: Callable[[str], Embed]
    classify: Callable[[str], Classify]
    resolve: Callable[[str | None, str], Awaitable[str]]
    identity: Callable[[str], Awaitable[str]]
    structure: Callable[[Any], tuple[Mapping[str, Any], Callable[[str], Any]]]
    folder: Path | None = None
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep


class Interrupted(KeyboardInterrupt):
    """The kernel was interrupted while a frame was filled. `partial` is the frame as it is by then."""

    def __init__(self, message: str, partial: Any) -> None:
        super().__init__(message)
        self.partial = partial

    def _render_traceback_(self) -> list[str]:
        """IPython shows this instead of a traceback."""
        return [f"KeyboardInterrupt: {self}"]


class _State:
    wiring: Callable[[], Wiring] | None = None
    last: Any = None


def connect(wiring: Callable[[], Wiring] | None) -> None:
    """From now on frames are filled by this; it is called once for each call. None: by nothing."""
    _State.wiring = wiring
    _State.last = None


def connected() -> Wiring:
    """Raises `Misconfigured`."""
    if _State.wiring is None:
        raise Misconfigured("nothing answers here yet: run %load_ext shimmy first")
    return _State.wiring()


def last() -> Any:
    """The frame of the latest call, as far as it came, if that was interrupted or failed; else None."""
    return _State.last


@dataclass(frozen=True, slots=True)
class Options:
    """What every method takes; see `FrameAccessor.map`."""

    model: str | None = None
    concurrency: int = 32
    cache: bool = True
    progress: bool = True
    errors: Literal["column", "raise"] = "column"
    resume: Any = None
    max_wait: float = 300.0

    def __post_init__(self) -> None:
        if type(self.concurrency) is not int or not 1 <= self.concurrency <= _MOST_AT_ONCE:
            raise InvalidValue(
                f"rows asked at once: a whole number from 1 to {_MOST_AT_ONCE}", param="concurrency"
            )
        if self.errors not in ("column", "raise"):
            raise InvalidValue('"column" or "raise"', param="errors")
        if type(self.max_wait) not in (int, float) or not self.max_wait >= 0:
            raise InvalidValue("seconds, 0 or more", param="max_wait")
        for name in ("cache", "progress"):
            if type(getattr(self, name)) is not bool:
                raise InvalidValue("True or False", param=name)
        if self.model is not None and (not isinstance(self.model, str) or not self.model):
            raise InvalidValue("a model's name, or None for the default", param="model")


@dataclass(frozen=True, slots=True)
class Task:
    """How rows are asked. `call` gets the model; `shared` is what an answer depends on beside it and the
    row's own text. `read` raises `RowFailed`, `ValueError` or `ShimmyError` for an answer that is of no use.
    """

    name: Literal["chat", "embed", "classify"]
    prompts: Prompts
    layout: Layout
    shared: Mapping[str, Any]
    call: Callable[[str, list[str]], Awaitable[list[Reply]]]
    read: Callable[[Reply], tuple[Any, ...]]
    repeatable: bool = True
    batch: int = 1


class Frame(Protocol):
    """`outcomes` looks at rows one after the other; `resume` is a frame to take values from."""

    def __len__(self) -> int: ...

    def outcomes(
        self, prompts: Prompts, layout: Layout, resume: Any
    ) -> Iterator[tuple[int, Outcome]]: ...

    def filled(self, layout: Layout, table: Table, *, errors: bool) -> Any:
        """A native frame with the table's columns."""
        ...


def fill(frame: Frame, wiring: Wiring, options: Options, task: Task) -> Any:
    """The native frame. Whatever ends it before all is done, `last` has it as it is by then."""
    _State.last = None
    table = Table(len(frame), len(task.layout.names))
    outcomes = frame.outcomes(task.prompts, task.layout, options.resume)
    output = _output() if options.progress else Quiet()
    progress = Progress(len(frame), output, clock=wiring.clock)
    heard: list[str] = []
    work = _answered(
        wiring, options, task, table, outcomes, changed=progress.update, warn=heard.append
    )
    try:
        wiring.run(work)
        found = frame.filled(task.layout, table, errors=options.errors == "column")
    except BaseException as error:
        if isinstance(error, AccessDenied):
            heard.clear()  # whoever may not ask has no use for what the cache lacks
        _State.last = partial = _so_far(frame, task.layout, table)
        progress.end(_note(error))
        if isinstance(error, KeyboardInterrupt):
            cached = options.cache and wiring.folder is not None and not heard
            raise Interrupted(_kept(progress, cached=cached), partial) from None
        if isinstance(error, RowFailed):
            raise _told(error, partial) from None
        # In no field of its own: it may be anybody's error, such as that of a function of a row.
        error.__dict__["partial"] = partial
        raise
    finally:
        # Here, as what another thread warns of may be shown in another cell.
        for said in heard:
            warnings.warn(said, CacheWarning, stacklevel=3)
    progress.end()
    return found


def _so_far(frame: Frame, layout: Layout, table: Table) -> Any:
    try:
        return frame.filled(layout, table, errors=True)
    except Exception:  # noqa: BLE001  whatever a column cannot hold, the others were waited for
        anything = (JSON,) * len(layout.kinds)
        return frame.filled(replace(layout, kinds=anything), table, errors=True)


async def _answered(
    wiring: Wiring,
    options: Options,
    task: Task,
    table: Table,
    outcomes: Iterator[tuple[int, Outcome]],
    *,
    changed: Callable[[Counts], None],
    warn: Callable[[str], None],
) -> None:
    model = await wiring.resolve(options.model, task.name)
    cache, identity = None, ""
    if options.cache and wiring.folder is not None:
        identity = await _identity(wiring, model, task.shared.get("adapter"), warn)
        cache = Cache(wiring.folder, warn=warn) if identity else None

    async def call(texts: list[str]) -> list[Reply]:
        return await task.call(model, texts)

    def read(reply: Reply) -> tuple[Any, ...]:
        try:
            return task.read(reply)
        except (ValueError, ShimmyError) as error:
            code = error.code if isinstance(error, ShimmyError) else "generation_failed"
            said = error.message if isinstance(error, ShimmyError) else str(error)
            if isinstance(error, ShimmyError) and error.param:
                said = f"{said} (field {error.param!r})"
            raise RowFailed(Failed(code, one_line(said)[:_LONGEST])) from None

    job = Job(
        outcomes,
        call,
        read,
        Key(task.name, identity, task.shared),
        table,
        cache=cache,
        repeatable=task.repeatable,
        raises=options.errors == "raise",
        concurrency=options.concurrency,
        batch=task.batch,
        max_wait=options.max_wait,
        changed=changed,
        clock=wiring.clock,
        sleep=wiring.sleep,
    )
    runner = Runner(job)
    ticking = asyncio.ensure_future(_tick(lambda: changed(runner.counts)))
    try:
        await runner.run()
    finally:
        ticking.cancel()
        if cache is not None:
            cache.close()


async def _tick(changed: Callable[[], None]) -> None:
    """Of answers that come together only the first is shown at once; and time goes on without any."""
    while True:
        await asyncio.sleep(_TICK)
        changed()


async def _identity(
    wiring: Wiring, model: str, adapter: object, warn: Callable[[str], None]
) -> str:
    """What both are; empty where nobody can tell, which is said."""
    named = [model, adapter] if isinstance(adapter, str) and adapter else [model]
    try:
        found = [await wiring.identity(one) for one in named]
        reason = "" if all(found) else "nobody can tell what the model's bytes are"
    except (AccessDenied, ModelNotFound, ServerUnreachable):
        raise
    except ShimmyError as error:
        found, reason = [], one_line(error.message)
    if reason:
        warn(f"rows are asked without the cache: {reason}")
        return ""
    return " ".join(found)


def _output() -> Output:
    python = sys.modules.get("IPython")
    shell = python.get_ipython() if python is not None else None
    return displayed() if hasattr(shell, "kernel") else Terminal(sys.stderr)


def _note(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "stopped"
    if isinstance(error, RowFailed):
        return f"ended by {error.why.code}"
    return f"ended by {error.code if isinstance(error, ShimmyError) else type(error).__name__}"


def _told(failed: RowFailed, partial: Any) -> ShimmyError:
    where = "" if failed.row is None else f"row {failed.row}: "
    error = from_code(failed.why.code, where + failed.why.message)
    error.__dict__["partial"] = partial
    return error


def _kept(progress: Progress, *, cached: bool) -> str:
    counts = progress.counts
    how = (
        "the same call goes on from the cache, and shimmy.frames.last() is the frame so far"
        if cached
        else "shimmy.frames.last() is the frame so far, to go on from by resume="
    )
    return f"{counts.done} of {counts.total} rows are done: {how}"
