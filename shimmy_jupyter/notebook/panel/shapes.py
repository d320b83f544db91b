"""Answers of the HTTP API as values. Raises `KeyError`, `TypeError` or `ValueError` for what has another shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .fetched import Problem
from .records import Head, Page, Receipt, Record, Usage, UsageRow, Verdict
from .state import Dependency, Figures, Fit, Health, Job, Limit, Limits, Model, Models

Body = Mapping[str, Any]
LIMITS: Mapping[str, str] = {
    "max_requests_per_minute": "requests per minute",
    "max_tokens_per_minute": "tokens per minute",
    "max_tokens_per_day": "tokens per day",
    "max_concurrent": "requests at once",
    "max_queued": "requests that wait",
    "max_prompt_tokens": "tokens of a prompt",
    "max_completion_tokens": "tokens of an answer",
    "max_seconds": "seconds of a request",
}
"""Every limit by its name, and what it is of."""


def models(body: Body) -> Models:
    return Models(tuple(model(one) for one in body["models"]), _text_or_none(body["default"]))


def model(body: Body) -> Model:
    fit = body["fit"]
    return Model(
        id=str(body["id"]),
        kind=str(body["kind"]),
        state=str(body["state"]),
        size_bytes=int(body["size_bytes"]),
        quantisation=_text_or_none(body["quantization"]),
        context=_whole_or_none(body["context"]),
        usable_context=_whole_or_none(body["usable_context"]),
        embedding=body["embedding"],
        fit=None
        if fit is None
        else Fit(int(fit["needed"]), int(fit["available"]), fit["ok"] is True),
        error=_text_or_none(body["error"]),
    )


def jobs(body: Body) -> tuple[Job, ...]:
    return tuple(job(one) for one in body["jobs"])


def job(body: Body) -> Job:
    return Job(
        id=str(body["id"]),
        kind=str(body["kind"]),
        model=str(body["model"]),
        state=str(body["state"]),
        message=str(body["message"]),
        done=int(body["done"]),
        total=_whole_or_none(body["total"]),
        unit=str(body["unit"]),
        problem=None if body["error"] is None else problem(body["error"]),
    )


def problem(body: Body) -> Problem:
    return Problem(
        str(body["code"]),
        str(body["message"]),
        _text_or_none(body["param"]),
        _text_or_none(body["request_id"]),
    )


def limits(body: Body) -> Limits:
    """Every limit there is, also those that are not set."""
    own, locked = body["own"], body["locked"]
    rows = body["limits"]
    return Limits(
        tuple(_limit(name, rows.get(name), own.get(name), locked.get(name)) for name in LIMITS),
        {
            str(group): tuple(_limit(name, theirs[name]) for name in LIMITS if name in theirs)
            for group, theirs in body["shared"].items()
        },
        _whole_or_none(body["queue_position"]),
    )


def _limit(name: str, row: Body | None, own: Any = None, locked: Any = None) -> Limit:
    if row is None:
        return Limit(name, own=_number_or_none(own), locked=_text_or_none(locked))
    return Limit(
        name,
        _number_or_none(row["limit"]),
        _number_or_none(row["used"]),
        _number_or_none(row["remaining"]),
        _number_or_none(row["resets_at"]),
        _number_or_none(own),
        _text_or_none(locked),
    )


def health(body: Body) -> Health:
    return Health(
        str(body["status"]),
        int(body["active"]),
        tuple(
            Dependency(
                str(one["name"]),
                str(one["status"]),
                str(one["detail"]),
                _text_or_none(one["action"]),
            )
            for one in body["dependencies"]
        ),
    )


def page(body: Body) -> Page:
    return Page(tuple(map(record, body["records"])), _whole_or_none(body["next_cursor"]))


def record(body: Body) -> Record:
    return Record(int(body["seq"]), dict(body), body.get("erased") is True)


def usage(body: Body) -> Usage:
    by = tuple(map(str, body["by"]))
    return Usage(by, tuple(_usage_row(by, one) for one in body["usage"]))


def _usage_row(by: tuple[str, ...], body: Body) -> UsageRow:
    return UsageRow(
        tuple("" if body[name] is None else str(body[name]) for name in by),
        *(
            int(body[name])
            for name in (
                "requests",
                "prompt_tokens",
                "cached_tokens",
                "tokens_generated",
                "denied",
                "limited",
                "errors",
            )
        ),
    )


def verdict(body: Body) -> Verdict:
    return Verdict(
        ok=body["ok"] is True,
        records=int(body["records"]),
        problem=_text_or_none(body["problem"]),
        first_bad=_whole_or_none(body["first_bad"]),
        erased=int(body["erased"]),
        open_requests=int(body["open_requests"]),
        anchored=body["anchored"] is True,
        head=None if body["head"] is None else head(body["head"]),
    )


def head(body: Body) -> Head:
    return Head(int(body["size"]), str(body["root"]), str(body["timestamp"]))


def receipt(body: Body) -> Receipt:
    return Receipt(str(body["request_id"]), len(body["records"]), head(body["head"]), dict(body))


def figures(last: Body) -> Figures:
    """Of the chunk of a stream that says what was used."""
    used, said = last["usage"], last["shimmy"]
    receipt = said["receipt"]
    return Figures(
        int(used["prompt_tokens"]),
        int(used["completion_tokens"]),
        int(said["cached_tokens"]),
        _number_or_none(said["tokens_per_second"]),
        _number_or_none(said["ttft_ms"]),
        _number_or_none(said["queue_ms"]),
        None if receipt is None else int(receipt["seq"]),
    )


def _text_or_none(value: Any) -> str | None:
    return None if value is None else str(value)


def _whole_or_none(value: Any) -> int | None:
    return None if value is None else int(value)


def _number_or_none(value: Any) -> float | None:
    if value is None or (type(value) in {int, float} and abs(value) < float("inf")):
        return value  # type: ignore[no-any-return]
    raise ValueError(f"{value!r} is no number")
