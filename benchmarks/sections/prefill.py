"""A long prompt beside running streams: what it does to their gaps, and they to its speed."""

from __future__ import annotations

import itertools
from typing import Any

import peers
import stats

from . import Plan, in_turn

STREAMS = (1, 8)


def run(plan: Plan) -> dict[str, Any]:
    threads, long = peers.cores(), 400 if plan.quick else plan.long_tokens
    wanted = {
        name: (name, plan.setup(threads=0 if name == peers.OURS else threads))
        for name in plan.among(peers.OURS, peers.XLLAMA, peers.LLAMA, peers.RAW)
    }
    rounds: list[dict[str, Any]] = []
    with peers.opened(wanted) as (sides, skipped):
        for round_ in range(plan.repeats):
            rounds.append({})
            for label in in_turn(list(sides), round_):
                rounds[-1][label] = _measure(sides[label], long, round_)
            print("  ".join(_line(*one) for one in rounds[-1].items()), flush=True)
    keys = {key for one in rounds for found in one.values() for key in found}
    return {
        "long_tokens": long,
        "skipped": skipped,
        "repeats": plan.repeats,
        "threads": threads,
        "sides": {
            label: {
                key: stats.median(one[label].get(key) for one in rounds) for key in sorted(keys)
            }
            for label in sides
        },
    }


def _measure(side: peers.Side, long: int, round_: int) -> dict[str, Any]:
    seed = f"prefill {side.name} {round_}"
    job = peers.job("burst", seed=seed, clients=1, prompt_tokens=long, max_tokens=1)
    wait = stats.first(side.ask(job)["requests"][0])
    assert wait is not None
    found = {"alone_rate": long / wait * 1e3}
    if side.name != peers.RAW:
        for streams in STREAMS:
            found |= _beside(side, long, streams, found["alone_rate"], seed)
    return found


def _beside(side: peers.Side, long: int, streams: int, alone: float, seed: str) -> dict[str, Any]:
    job = peers.job(
        "beside",
        seed=f"{seed} {streams}",
        clients=streams,
        # They outlast the prompt. Ours reserves what is asked for, and lets one user have three quarters
        # of the cache: with more the prompt would not be read, but wait for them.
        max_tokens=960,
        long_tokens=long,
        quiet=2.0,
    )
    requests = side.ask(job)["requests"]
    prompt = next(request for request in requests if request["kind"] == "long")
    running = [request for request in requests if request["kind"] == "stream"]
    begin, end = prompt["sent"], prompt["times"][0]
    during: list[float] = []
    quiet: list[float] = []
    for stream in running:
        times = stream["times"]
        for a, b in itertools.pairwise(times):
            # A gap that began before the prompt and ended within counts to the prompt.
            if b >= begin and a <= end:
                during.append((b - a) * 1e3)
            elif b < begin and b > begin - job["quiet"]:
                quiet.append((b - a) * 1e3)
        if times[-1] < end and stream["ended"] is None:  # still waiting when we stopped looking
            during.append((end - times[-1]) * 1e3)
    rate = long / (end - begin)
    return {
        # Where streams were over before the prompt was, the rest says little.
        f"over_before_{streams}": sum(stream["ended"] is not None for stream in running),
        f"rate_beside_{streams}": rate,
        f"rate_share_{streams}": rate / alone,
        f"gap_p99_ms_{streams}": stats.percentile(during, 0.99),
        f"gap_worst_ms_{streams}": max(during, default=None),
        f"gap_p50_ms_{streams}": stats.percentile(during, 0.5),
        f"quiet_gap_p99_ms_{streams}": stats.percentile(quiet, 0.99),
    }


def _line(label: str, found: dict[str, Any]) -> str:
    text = f"{label}: {found['alone_rate']:.0f} tokens/s alone"
    for n in STREAMS:
        if f"rate_share_{n}" in found:
            share, gap = found[f"rate_share_{n}"], found[f"gap_p99_ms_{n}"] or 0
            text += f", beside {n}: {share:.2f} of it, their p99 gap {gap:.0f} ms"
    return text
