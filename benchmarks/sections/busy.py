"""A busy machine: the engine's rate beside other processes that compute, and what it costs them.

One client, always asking. Beside it no process, one, and as many as there are cores.
"""

from __future__ import annotations

import time
from typing import Any

import peers
import psutil
import stats
from child import Child

from . import Plan, in_turn


def labels(plan: Plan) -> dict[str, tuple[str, int]]:
    """Every thread setting worth comparing, 0 being the side's own default."""
    cores = peers.cores()
    fixed = sorted({1, max(1, cores // 2), max(1, cores - 1), cores})
    physical = psutil.cpu_count(logical=False) or cores
    found = {"shimmy": (peers.OURS, 0)}
    # One core fewer is what a single busy process leaves.
    found |= {f"shimmy, {n} threads": (peers.OURS, n) for n in sorted({max(1, cores - 1), cores})}
    # A default is one of the fixed settings under another name.
    for name, default in (
        (peers.SERVER, max(cores // 2, 1)),
        (peers.XLLAMA, physical),
        (peers.LLAMA, physical),
    ):
        found[f"{name}, default ({default})"] = (name, 0)
        found |= {f"{name}, {n}": (name, n) for n in fixed if n != default}
    return {label: one for label, one in found.items() if one[0] in plan.sides}


def run(plan: Plan) -> dict[str, Any]:
    wanted = {
        label: (name, plan.setup(threads=threads, slots=4, kv_tokens=2048, context=1024))
        for label, (name, threads) in labels(plan).items()
    }
    repeats = plan.repeats if plan.quick else max(5, plan.repeats)
    with peers.opened(wanted) as (sides, skipped):
        counts = plan.busy or sorted({0, 1, peers.cores()})
        rows = [_row(plan, sides, busy, repeats) for busy in counts]
    return {
        "rows": rows,
        "skipped": skipped,
        "seconds": plan.full(20),
        "repeats": repeats,
        "threads": {label: threads for label, (_, threads) in labels(plan).items()},
        "names": {label: name for label, (name, _) in labels(plan).items()},
    }


def _row(plan: Plan, sides: dict[str, peers.Side], busy: int, repeats: int) -> dict[str, Any]:
    rounds: list[dict[str, Any]] = []
    for round_ in range(repeats):
        rounds.append({})
        spinners = [Child("spin.py") for _ in range(busy)]
        time.sleep(0.3)
        for label in in_turn(list(sides), round_):
            rounds[-1][label] = _measure(plan, sides[label], spinners, round_)
        for spinner in spinners:
            spinner.close()
    found = {
        label: {key: stats.median(one[label][key] for one in rounds) for key in rounds[0][label]}
        | {"rates": [round(one[label]["rate"], 2) for one in rounds]}
        for label in sides
    }
    ours = peers.OURS
    ratios = {b: stats.ratio(rounds, ours, b, "rate") for b in sides if b != ours}
    for label, figures in found.items():
        others = f"{figures['others']:.2f}" if figures["others"] is not None else "–"
        print(
            f"{busy} busy  {label:<30} {figures['rate']:6.1f} tokens/s   others {others}",
            flush=True,
        )
    return {"busy": busy, "sides": found, "ratios": ratios}


def _measure(
    plan: Plan, side: peers.Side, spinners: list[Child], round_: int
) -> dict[str, float | None]:
    seconds = plan.full(20)
    alone = _speed(spinners, lambda: time.sleep(min(3.0, seconds)))
    requests: list[dict[str, Any]] = []

    def load() -> None:
        job = peers.job(
            "closed", seed=f"busy {round_}", clients=1, seconds=seconds, max_tokens=plan.tokens
        )
        requests.extend(side.ask(job)["requests"])

    beside = _speed(spinners, load)
    return {
        "rate": sum(len(request["times"]) for request in requests) / seconds,
        "gap_p99_ms": stats.percentile(stats.all_gaps(requests), 0.99),
        # What is left of the other processes' speed.
        "others": beside / alone if alone and beside else None,
    }


def _speed(spinners: list[Child], during: Any) -> float | None:
    """Iterations a second of all of them meanwhile."""
    before = [spinner.ask("count") for spinner in spinners]
    during()
    after = [spinner.ask("count") for spinner in spinners]
    if not spinners:
        return None
    return sum(
        (b["iterations"] - a["iterations"]) / (b["at"] - a["at"])
        for a, b in zip(before, after, strict=True)
    )
