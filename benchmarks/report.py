"""Write docs/performance.md from the JSON of the last `make bench`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "performance.md"


def main() -> None:
    http = json.loads((HERE / "results" / "http.json").read_text())
    startup = json.loads((HERE / "results" / "startup.json").read_text())
    PAGE.write_text(page(http, startup))
    print(f"written to {PAGE}")


def page(http: dict[str, Any], startup: dict[str, Any]) -> str:
    rows = "\n".join(
        f"| {r['clients']} | {r['http']:.1f} | {r['raw']:.1f} | {r['ratio']:.3f} "
        f"| {min(r['ratios']):.2f} … {max(r['ratios']):.2f} "
        f"| {r['http_first_token_ms']:.0f} / {r['raw_first_token_ms']:.0f} |"
        for r in sorted(http["rows"], key=lambda r: r["clients"])
    )
    cost = "\n".join(
        f"| {name} | " + " | ".join(f"{us:.0f}" for us in by_rows.values()) + " |"
        for name, by_rows in http["host_cost_us_per_step"].items()
    )
    return f"""# Performance

Made by `make bench` from one run; do not edit. Ratios carry over to other machines, the figures
beside them do not: this one is shared and noisy.

Machine: {http["cores"]} cores ({http["machine"]}), {http["threads"]} threads, Python {http["python"]}.
Model: random weights in the shape of Qwen3-0.6B, Q8_0, made by the benchmark.

## What reaches a client

Tokens per second in all, while every stream is running: read by a bare socket client in a process of
its own from a real Jupyter server's authenticated handlers, against the raw loop (`llama_decode` and
the same sampler chains, nothing else) on as many threads. The two take turns; the ratio is the
median of those of neighbouring measurements.

| clients | HTTP | raw loop | ratio | its spread | first token, HTTP / raw loop, ms |
|---|---|---|---|---|---|
{rows}

The physical limit of one stream is memory: each token reads all weights once. Between it and the HTTP
column lie the engine (raw loop) and our own work for each step (below), most of which overlaps
with the next step's decoding on another thread, which it slows down as cores are scarce. First tokens
of many clients at once come later than in the raw loop because the prompts are decoded in the order
in which they come, one beside each step of the sequences that decode already, whose tokens go on
meanwhile; sizing these slices by time is the next piece of work.

## What a step costs besides the model

Microseconds a step, with a backend that decodes in no time, through streams, server-sent events,
tornado's HTTP server and a socket. In lockstep nothing overlaps and nothing is sent together; flat out,
what has gathered goes in one write, as it does when the engine is faster than the reader.

| | 1 sequence | 16 | 64 |
|---|---|---|---|
{cost}

## What the extension adds to a Jupyter server's start

{startup["added_seconds"]:+.3f} s and {startup["added_mib"]:+.1f} MiB (medians of {startup["starts"]}
starts each, in turn). The engine is loaded when somebody first asks.
"""


if __name__ == "__main__":
    main()
