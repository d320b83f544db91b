"""From the timestamps of requests to figures. Times in seconds, gaps and waits in milliseconds."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable
from typing import Any

Requests = list[dict[str, Any]]


def percentile(values: list[float], share: float) -> float | None:
    """The smallest value that `share` of all do not exceed."""
    if not values:
        return None
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def spread(values: list[float]) -> dict[str, float | None]:
    return {f"p{p}": percentile(values, p / 100) for p in (50, 95, 99)}


def gaps(request: dict[str, Any]) -> list[float]:
    times = request["times"]
    return [(b - a) * 1e3 for a, b in itertools.pairwise(times)]


def all_gaps(requests: Requests) -> list[float]:
    return [gap for request in requests for gap in gaps(request)]


def first(request: dict[str, Any]) -> float | None:
    return (request["times"][0] - request["sent"]) * 1e3 if request["times"] else None


def firsts(requests: Requests) -> list[float]:
    return [wait for request in requests if (wait := first(request)) is not None]


def rate(requests: Requests) -> float:
    """Tokens a second in all, from the first request to the last token."""
    end = max(request["times"][-1] for request in requests)
    begin = min(request["sent"] for request in requests)
    return sum(len(request["times"]) for request in requests) / (end - begin)


def decode_rate(requests: Requests) -> float | None:
    """Tokens a second in all while every stream runs; None where they never all do."""
    begin = max(request["times"][0] for request in requests)
    end = min(request["times"][-1] for request in requests)
    within = sum(begin < moment <= end for r in requests for moment in r["times"])
    return within / (end - begin) if within >= 2 * len(requests) else None


def median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def ratio(rounds: list[dict[str, Any]], a: str, b: str, key: str) -> dict[str, Any] | None:
    """Median and extremes of the ratios of a's to b's figure, round by round."""
    found = []
    for one in rounds:
        ours, theirs = (one.get(side, {}).get(key) for side in (a, b))
        if ours is not None and theirs:
            found.append(ours / theirs)
    if not found:
        return None
    return {"median": statistics.median(found), "least": min(found), "most": max(found)}
