"""Goodput: answered requests per second that nobody would complain about, as load rises.

Poisson arrivals, the same for every side. A request is good if its first token came within 2 s, and
99 of 100 gaps between its tokens were at most 200 ms. What is not answered soon after the last
arrival is not good.
"""

from __future__ import annotations

import time
from typing import Any

import peers
import stats

from . import Plan, in_turn

FIRST_MS, GAP_MS = 2000, 200
SHARES = (0.25, 0.5, 0.75, 1.0, 1.25)
"""Of the arrivals that the quickest, but one that serves one at a time, can just answer."""


def run(plan: Plan) -> dict[str, Any]:
    threads = peers.cores()
    names = plan.among(peers.OURS, peers.XLLAMA, peers.LLAMA, peers.SERVER)
    wanted = {
        name: (name, plan.setup(threads=0 if name == peers.OURS else threads)) for name in names
    }
    with peers.opened(wanted) as (sides, skipped):
        capacity = max(
            _capacity(plan, side) for label, side in sides.items() if label != peers.SERVER
        )
        print(f"capacity: about {capacity:.2f} requests/s", flush=True)
        rows: list[dict[str, Any]] = []
        for share in SHARES[1:4:2] if plan.quick else SHARES:
            rows.append(_row(plan, sides, round(share * capacity, 3), rows))
    return {
        "rows": rows,
        "skipped": skipped,
        "capacity": capacity,
        "tokens": plan.tokens,
        "seconds": plan.full(30),
        "repeats": _repeats(plan),
        "limits_ms": {"first": FIRST_MS, "gap_p99": GAP_MS},
    }


def _repeats(plan: Plan) -> int:
    return min(plan.repeats, 3)


def _capacity(plan: Plan, side: peers.Side) -> float:
    """Requests a second in a burst of 16."""
    seed = f"capacity {side.name}"
    job = peers.job("burst", seed=seed, clients=16, prompt_tokens=64, max_tokens=plan.tokens)
    return stats.rate(side.ask(job)["requests"]) / plan.tokens


def _row(
    plan: Plan, sides: dict[str, peers.Side], rate: float, before: list[dict[str, Any]]
) -> dict[str, Any]:
    # Who has answered next to nothing well at two lower rates will not at this one.
    given_up = {
        label
        for label in sides
        if len(before) >= 2
        and all(
            row["sides"].get(label, {"good_share": 0})["good_share"] < 0.05 for row in before[-2:]
        )
    }
    labels = [label for label in sides if label not in given_up]
    found: dict[str, list[dict[str, Any]]] = {label: [] for label in labels}
    for round_ in range(_repeats(plan)):
        for label in in_turn(labels, round_):
            found[label].append(_measure(plan, sides[label], rate, round_))
    row = {
        "rate": rate,
        "sides": {
            label: {key: stats.median(one[key] for one in found[label]) for key in found[label][0]}
            for label in labels
        },
    }
    parts = [
        f"{label} {r['good']:.2f} ({r['good_share']:.0%})" for label, r in row["sides"].items()
    ]
    print(f"{rate:.2f} arrivals/s, good:  " + "  ".join(parts), flush=True)
    return row


def _measure(plan: Plan, side: peers.Side, rate: float, round_: int) -> dict[str, Any]:
    seconds = plan.full(30)
    job = peers.job(
        "open",
        # The same arrivals for every side.
        seed=f"goodput {rate} {round_}",
        rate=rate,
        seconds=seconds,
        drain=min(10.0, seconds),
        prompt_tokens=64,
        max_tokens=plan.tokens,
    )
    requests = side.ask(job)["requests"]
    good = sum(_is_good(request, plan.tokens) for request in requests)
    _settle(side)
    return {
        "arrivals": len(requests),
        "good": good / seconds,
        "good_share": good / len(requests) if requests else 1.0,
        "first_p99_ms": stats.percentile(stats.firsts(requests), 0.99),
        "gap_p99_ms": stats.percentile(stats.all_gaps(requests), 0.99),
    }


def _is_good(request: dict[str, Any], tokens: int) -> bool:
    wait, gap = stats.first(request), stats.percentile(stats.gaps(request), 0.99)
    whole = len(request["times"]) == tokens
    return whole and wait is not None and wait <= FIRST_MS and (gap or 0) <= GAP_MS


def _settle(side: peers.Side) -> None:
    """Until what was given up is gone from the server, too: a request is answered at once again."""
    for attempt in range(20):
        began = time.monotonic()
        side.ask(peers.job("burst", seed=f"{began}", clients=1, prompt_tokens=8, max_tokens=2))
        if time.monotonic() - began < 1:
            return
        time.sleep(0.1 * attempt)
