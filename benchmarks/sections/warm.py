"""A warm prefix: the first token of a prompt whose beginning was asked just before."""

from __future__ import annotations

from typing import Any

import peers
import stats

from . import Plan, in_turn

PREFIX, NEW = 1000, 16


def run(plan: Plan) -> dict[str, Any]:
    threads = peers.cores()
    prefix = 200 if plan.quick else PREFIX
    wanted = {
        name: (name, plan.setup(threads=0 if name == peers.OURS else threads, cache=True))
        for name in plan.among(peers.OURS, peers.XLLAMA, peers.LLAMA, peers.SERVER, peers.RAW)
    }
    rounds: list[dict[str, Any]] = []
    with peers.opened(wanted) as (sides, skipped):
        for round_ in range(plan.repeats):
            rounds.append({})
            for label in in_turn(list(sides), round_):
                rounds[-1][label] = _measure(sides[label], prefix, round_)
    floor = rounds[0].get(peers.RAW) and stats.median(one[peers.RAW]["floor_ms"] for one in rounds)
    summary = {
        label: {
            key: stats.median(one[label].get(key) for one in rounds) for key in rounds[0][label]
        }
        for label in sides
    }
    for label, found in summary.items():
        print(label, {key: round(value, 2) for key, value in found.items() if value is not None})
    return {
        "prefix_tokens": prefix,
        "new_tokens": NEW,
        "skipped": skipped,
        "repeats": plan.repeats,
        "floor_ms": floor,
        "to_floor": _to_floor(rounds),
        "sides": summary,
    }


def _measure(side: peers.Side, prefix: int, round_: int) -> dict[str, Any]:
    job = peers.job(
        "warm",
        seed=f"warm {side.name} {round_}",
        prefix_tokens=prefix,
        new_tokens=NEW,
        max_tokens=8,
    )
    answer = side.ask(job)
    if side.name == peers.RAW:
        return {**answer, "floor_ms": answer["new_ms"] + answer["step_ms"]}
    cold, warm = answer["requests"]
    return {
        "cold_ms": stats.first(cold),
        "warm_ms": stats.first(warm),
        "speedup": stats.first(cold) / stats.first(warm),
        "cached": warm.get("cached"),
    }


def _to_floor(rounds: list[dict[str, Any]]) -> dict[str, float | None]:
    """Each side's warm first token over the raw loop's cost of the new tokens and one step."""
    if peers.RAW not in rounds[0]:
        return {}
    return {
        label: stats.median(one[label]["warm_ms"] / one[peers.RAW]["floor_ms"] for one in rounds)
        for label in rounds[0]
        if label != peers.RAW
    }
