"""What the panel knows, as plain values. `to_json` writes them for other front ends.

    State
      section       ask | models | compare | limits | audit | live: what is in view
      visible, paused, asleep, closed
                    asleep: nothing is fetched unless a person acts
      models        Fetched[Models]: every model with its size, quantisation, fit and state
      jobs          Fetched[list of Job]: loads, unloads and downloads
      limits        Fetched[Limits]: what may be used, what is left, until when; what is locked, and why
      live          Fetched[Health]: what the server says of itself
      rates         Rate: figures of the last answers that were asked for here
      chosen        id of the model that is asked; None before the models are known
      parameters    what people typed, and what is wrong with it
      answer        Answer
      comparison    one Answer for each model
      audit         filters, a page of records, usage, verdict, receipt, export
      notice        the last thing to tell people, an error with its code or not
      confirm       a question that has to be answered before anything is done
      asked         number of each request on its way -> what it is for

A fetched section is one of `{"state": "idle"}`, `{"state": "pending"}`, `{"state": "ready", "value": …}`
and `{"state": "failed", "problem": {"code", "message", "param", "request_id"}}`. While it is fetched again
it stays what it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from .fetched import NOTHING, PENDING, Failed, Fetched, Idle, Pending, Problem, Ready
from .records import Audit

SECTIONS = ("ask", "models", "compare", "limits", "audit", "live")


@dataclass(frozen=True, slots=True)
class Notice:
    """`problem` where something went wrong; `text` says what, in one line."""

    text: str
    problem: Problem | None = None


@dataclass(frozen=True, slots=True)
class Confirm:
    """`action` on `model` is done once a person says yes to `question`."""

    action: str
    model: str
    question: str


# Models and jobs


@dataclass(frozen=True, slots=True)
class Fit:
    """Bytes of memory."""

    needed: int
    available: int
    ok: bool


@dataclass(frozen=True, slots=True)
class Model:
    """`state`: available, probing, loading, loaded, unloading, failed or quarantined; `context` in tokens
    is what it was trained on, `usable_context` what a request has of it; these and `embedding`
    are None where it is not known yet.
    """

    id: str
    kind: str
    state: str
    size_bytes: int
    quantisation: str | None = None
    context: int | None = None
    embedding: bool | None = None
    fit: Fit | None = None
    error: str | None = None
    usable_context: int | None = None

    @property
    def answers(self) -> bool:
        """Whether it can be asked something."""
        return self.kind == "model" and not self.embedding


@dataclass(frozen=True, slots=True)
class Models:
    """`default` None: the server is still finding out."""

    models: tuple[Model, ...]
    default: str | None

    def find(self, id: str | None) -> Model | None:
        return next((one for one in self.models if one.id == id), None)


@dataclass(frozen=True, slots=True)
class Job:
    """`state`: running, done, failed or cancelled. `done` and `total` are in `unit`; `total` None where
    nobody knows it.
    """

    id: str
    kind: str
    model: str
    state: str
    message: str
    done: int
    total: int | None
    unit: str
    problem: Problem | None = None


# Limits


@dataclass(frozen=True, slots=True)
class Limit:
    """`limit` None: there is none. `used` and `remaining` None: it is of each request by itself.
    `resets_at` in seconds since 1970. `own` is what the user has set for themselves, `locked` why the
    administrator's cannot be raised.
    """

    name: str
    limit: float | None = None
    used: float | None = None
    remaining: float | None = None
    resets_at: float | None = None
    own: float | None = None
    locked: str | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """`shared` is by group; `queue_position` how many go before the first request that waits."""

    limits: tuple[Limit, ...]
    shared: Mapping[str, tuple[Limit, ...]] = field(default_factory=lambda: NOTHING)
    queue_position: int | None = None


# What the server says of itself


@dataclass(frozen=True, slots=True)
class Dependency:
    name: str
    status: str
    detail: str
    action: str | None = None


@dataclass(frozen=True, slots=True)
class Health:
    """`status`: ok, degraded or down; `active` counts requests and jobs."""

    status: str
    active: int
    dependencies: tuple[Dependency, ...]


# Answers


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one answer. Times are in milliseconds, from the request's arrival. `receipt` is the number of its
    record, None where nothing is recorded.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    tokens_per_second: float | None
    ttft_ms: float | None
    queue_ms: float | None
    receipt: int | None


@dataclass(frozen=True, slots=True)
class Answer:
    """`status`: idle, queued, running, stopping, done, stopped or failed. `waiting` says what for, while
    there is no text; `figures` and `reason` (stop or length) are there when it is done, `problem` when it
    failed.
    """

    status: str = "idle"
    model: str = ""
    prompt: str = ""
    text: str = ""
    reasoning: str = ""
    waiting: str = ""
    reason: str | None = None
    figures: Figures | None = None
    problem: Problem | None = None
    request_id: str | None = None

    @property
    def open(self) -> bool:
        return self.status in {"queued", "running", "stopping"}


@dataclass(frozen=True, slots=True)
class Rate:
    model: str
    figures: Figures


@dataclass(frozen=True, slots=True)
class Comparison:
    """The same prompt to several models, one after the other: each has the machine for itself."""

    models: tuple[str, ...] = ()
    prompt: str = ""
    answers: tuple[Answer, ...] = ()


@dataclass(frozen=True, slots=True)
class Range:
    """What a parameter may be, both ends included. `reason` says where a bound comes from, if that is not
    the model's nature.
    """

    least: float
    most: float
    whole: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Parameters:
    """Texts as they were typed; empty is the server's default. `problems` is by name."""

    temperature: str = ""
    max_tokens: str = ""
    system: str = ""
    seed: str = ""
    reproducible: bool = False
    problems: Mapping[str, Problem] = field(default_factory=lambda: NOTHING)


@dataclass(frozen=True, slots=True)
class State:
    """`last_activity` is when a person last did something, in seconds of any steady clock; `fetched` when
    each source last answered, in the same.
    """

    section: str = "ask"
    visible: bool = True
    paused: bool = False
    asleep: bool = False
    closed: bool = False
    last_activity: float = 0.0
    fetched: Mapping[str, float] = field(default_factory=lambda: NOTHING)
    asked: Mapping[int, str] = field(default_factory=lambda: NOTHING)
    numbers: int = 0
    notice: Notice | None = None
    confirm: Confirm | None = None
    models: Fetched[Models] = PENDING
    jobs: Fetched[tuple[Job, ...]] = PENDING
    limits: Fetched[Limits] = PENDING
    live: Fetched[Health] = PENDING
    chosen: str | None = None
    parameters: Parameters = Parameters()
    answer: Answer = Answer()
    comparison: Comparison = Comparison()
    rates: tuple[Rate, ...] = ()
    audit: Audit = field(default_factory=Audit)


def to_json(value: Any) -> Any:
    """A state, or any part of it, as JSON: tags are in `state`, numbers of requests become texts."""
    if isinstance(value, Idle | Pending | Ready | Failed):
        return {"state": value.tag} | _fields(value)
    if is_dataclass(value) and not isinstance(value, type):
        return _fields(value)
    if isinstance(value, Mapping):
        return {str(key): to_json(one) for key, one in value.items()}
    if isinstance(value, tuple | list):
        return [to_json(one) for one in value]
    return value


def _fields(value: Any) -> dict[str, Any]:
    return {one.name: to_json(getattr(value, one.name)) for one in fields(value)}
