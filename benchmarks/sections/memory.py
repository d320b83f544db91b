"""Resident memory, one side at a time: with the model loaded, and after 16 clients."""

from __future__ import annotations

from typing import Any

import peers

from . import Plan

CLIENTS = 16


def run(plan: Plan) -> dict[str, Any]:
    threads = peers.cores()
    rows: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    for name in plan.among(*peers.SIDES):
        setup = plan.setup(threads=0 if name == peers.OURS else threads)
        with peers.opened({name: (name, setup)}) as (sides, reasons):
            skipped |= reasons
            if name in sides:
                rows[name] = _measure(sides[name], plan)
                print(name, rows[name], flush=True)
    return {"sides": rows, "skipped": skipped, "kv_bytes": plan.model.shape.kv_bytes * 16384}


def _measure(side: peers.Side, plan: Plan) -> dict[str, float | None]:
    loaded = side.memory()
    clients = 1 if side.name == peers.HIGH else 4 if plan.quick else CLIENTS
    job = peers.job("burst", seed="memory", clients=clients, max_tokens=min(32, plan.tokens))
    side.ask(job)
    return {"loaded_mib": round(loaded), "after_mib": round(side.memory()), "clients": clients}
