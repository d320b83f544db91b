"""Throughput, first tokens and gaps at 1 to 32 clients: every side answers the same bursts in turn."""

from __future__ import annotations

from typing import Any

import peers
import stats

from . import Plan, in_turn

ALONE = (peers.SERVER, peers.HIGH)
"""They decode one sequence at a time: more clients wait longer, and that is all."""


def run(plan: Plan) -> dict[str, Any]:
    threads = peers.cores()
    wanted = {
        # Ours chooses its threads, as it does for everybody; the others are told the best setting.
        name: (name, plan.setup(threads=0 if name == peers.OURS else threads))
        for name in plan.among(*peers.SIDES)
    }
    with peers.opened(wanted) as (sides, skipped):
        rows = [_row(plan, sides, clients) for clients in plan.clients]
    return {"rows": rows, "skipped": skipped, "threads": threads, "tokens": plan.tokens}


def _row(plan: Plan, sides: dict[str, peers.Side], clients: int) -> dict[str, Any]:
    most = {peers.SERVER: plan.serial_to, peers.HIGH: 1}
    labels = [label for label in sides if clients <= most.get(label, clients)]

    def measure(label: str, round_: object, tokens: int) -> list[dict[str, Any]]:
        seed = f"throughput {clients} {label} {round_}"
        job = peers.job("burst", seed=seed, clients=clients, max_tokens=tokens)
        requests: list[dict[str, Any]] = sides[label].ask(job)["requests"]
        if any(len(request["times"]) != tokens for request in requests):
            raise RuntimeError(f"{label} did not send {tokens} tokens")
        return requests

    for label in labels:
        measure(label, "warm-up", 4)
    rounds: list[dict[str, Any]] = []
    seen: dict[str, list[dict[str, Any]]] = {label: [] for label in labels}
    for round_ in range(plan.repeats):
        rounds.append({})
        for label in in_turn(labels, round_):
            requests = measure(label, round_, plan.tokens)
            seen[label] += requests
            rounds[-1][label] = {
                "rate": stats.rate(requests),
                "decode_rate": stats.decode_rate(requests),
            }
    row = {
        "clients": clients,
        "sides": {label: _summary(label, rounds, seen[label]) for label in labels},
        "to_raw": stats.ratio(rounds, peers.OURS, peers.RAW, "decode_rate"),
        "to_xllamacpp": stats.ratio(rounds, peers.OURS, peers.XLLAMA, "rate"),
        "to_llama_server": stats.ratio(rounds, peers.OURS, peers.LLAMA, "rate"),
        "to_server": stats.ratio(rounds, peers.OURS, peers.SERVER, "rate"),
    }
    print(_line(row), flush=True)
    return row


def _summary(
    label: str, rounds: list[dict[str, Any]], requests: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "rate": stats.median(one[label]["rate"] for one in rounds),
        "decode_rate": stats.median(one[label]["decode_rate"] for one in rounds),
        "first_ms": stats.spread(stats.firsts(requests)),
        "gap_ms": stats.spread(stats.all_gaps(requests)),
    }


def _line(row: dict[str, Any]) -> str:
    parts = [f"{row['clients']:>3} clients, tokens/s:"]
    for label, found in row["sides"].items():
        decode = f" ({found['decode_rate']:.1f} decoding)" if found["decode_rate"] else ""
        parts.append(f"{label} {found['rate']:.1f}{decode}")
    if row["to_raw"]:
        parts.append(f"shimmy / raw {row['to_raw']['median']:.3f}")
    return "  ".join(parts)
