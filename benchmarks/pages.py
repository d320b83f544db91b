"""The tables of docs/performance.md, one function a section; `None` is a dash."""

from __future__ import annotations

from typing import Any

Found = dict[str, Any]


def number(value: float | None, digits: int = 1, unit: str = "") -> str:
    return "–" if value is None else f"{value:,.{digits}f}{unit}"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def steps(found: Found, bandwidth: float | None) -> float | None:
    """How often a second memory lets all weights be read: the limit of steps."""
    return bandwidth * 1e9 / found["weight_bytes"] if bandwidth else None


def limit_line(found: Found, bandwidth: float | None) -> str:
    limit = steps(found, bandwidth)
    size = f"{found['weight_bytes'] / 1e9:.2f} GB of weights"
    if limit is None:
        return f"A token reads {size}; how fast memory is was not measured."
    return (
        f"A step reads {size}, memory {bandwidth:.1f} GB/s: at most {limit:.1f} steps a second, "
        "each with one token for every sequence in it, so n clients have at most n times as many."
    )


def skipped(found: Found) -> str:
    return "".join(f"\n\nNot measured: {k} ({v})." for k, v in found["skipped"].items())


def throughput(found: Found, bandwidth: float | None) -> str:
    labels = list(dict.fromkeys(label for row in found["rows"] for label in row["sides"]))
    limit = steps(found, bandwidth)
    rates, waits, gaps = [], [], []
    for row in found["rows"]:
        sides, clients = row["sides"], str(row["clients"])

        def of(label: str, key: str, sides: Found = sides) -> Any:
            return sides.get(label, {}).get(key)

        rates.append(
            [
                clients,
                *(number(of(label, "rate")) for label in labels),
                f"{number(of('shimmy', 'decode_rate'))} / {number(of('raw loop', 'decode_rate'))}",
                spread(row["to_raw"]),
                spread(row["to_xllamacpp"]),
                spread(row.get("to_llama_server")),
                number(limit and limit * row["clients"], 0),
            ]
        )
        waits.append([clients, *(percentiles(of(label, "first_ms"), 0) for label in labels)])
        gaps.append([clients, *(percentiles(of(label, "gap_ms"), 0) for label in labels)])
    head = ["clients", *labels]
    more = ["decoding: shimmy / raw", "ratio to raw", "ratio to xllamacpp"]
    more += ["ratio to llama-server", "limit"]
    return (
        f"Tokens per second in all, {found['tokens']} tokens an answer, from the first request to the "
        "last token. *Decoding* is while every stream runs; its ratio to the raw loop is the price "
        "of everything that is ours.\n\n"
        + table([*head, *more], rates)
        + "\n\nFirst token, milliseconds, p50 / p95 / p99:\n\n"
        + table(head, waits)
        + "\n\nBetween tokens, milliseconds, p50 / p95 / p99"
        + (f" (the limit is {1e3 / limit:.0f} ms a step)" if limit else "")
        + ":\n\n"
        + table(head, gaps)
    )


def spread(ratio: Found | None) -> str:
    if ratio is None:
        return "–"
    return f"{ratio['median']:.3f} ({ratio['least']:.2f} … {ratio['most']:.2f})"


def percentiles(found: Found | None, digits: int) -> str:
    if not found:
        return "–"
    return " / ".join(number(found[key], digits) for key in ("p50", "p95", "p99"))


def goodput(found: Found, bandwidth: float | None) -> str:
    labels = list(dict.fromkeys(label for row in found["rows"] for label in row["sides"]))
    rows = []
    for row in found["rows"]:
        cells = [f"{row['rate']:.2f}"]
        for label in labels:
            side = row["sides"].get(label)
            cells.append(
                f"{side['good']:.2f} ({side['good_share']:.0%}; "
                f"{number(side['first_p99_ms'], 0)}, {number(side['gap_p99_ms'], 0)})"
                if side
                else "–"
            )
        rows.append(cells)
    best = ", ".join(
        f"{label} {max(row['sides'][label]['good'] for row in found['rows'] if label in row['sides']):.2f}"
        for label in labels
    )
    limit = steps(found, bandwidth)
    slots = 32
    return (
        f"Poisson arrivals, the same for every side, for {found['seconds']:.0f} s, medians of "
        f"{found['repeats']}; {found['tokens']} tokens an answer. Good is a request whose first token came "
        "within 2 s and whose p99 gap is at most 200 ms. In each cell: good requests per second (their "
        "share; p99 first token and p99 gap, ms). A dash: given up, as next to nothing was good at the "
        "two rates before.\n\n"
        + table(["arrivals/s", *labels], rows)
        + f"\n\nMost good requests per second: {best}."
        + (
            f" Memory would let {slots} sequences have {limit * slots / found['tokens']:.1f} answers "
            "a second; arithmetic and the 200 ms do not."
            if limit
            else ""
        )
    )


def prefill(found: Found, bandwidth: float | None) -> str:
    rows = []
    for label, side in found["sides"].items():
        cells = [label, number(side["alone_rate"], 0)]
        for n in (1, 8):
            cells += [
                number(side.get(f"rate_share_{n}"), 2),
                f"{number(side.get(f'quiet_gap_p99_ms_{n}'), 0)} → {number(side.get(f'gap_p99_ms_{n}'), 0)}",
                number(side.get(f"gap_worst_ms_{n}"), 0),
            ]
        rows.append(cells)
    head = ["", "alone, tokens/s"]
    for n in (1, 8):
        head += [f"share beside {n}", f"p99 gap of {n}, ms", f"worst of {n}"]
    limit = steps(found, bandwidth)
    return (
        f"A prompt of {found['long_tokens']:,} tokens arrives while 1 or 8 streams run; medians of "
        f"{found['repeats']}. *Share* is its rate beside them over its rate alone; the gaps are the "
        "streams', before → while it is decoded.\n\n"
        + table(head, rows)
        + (
            f"\n\nMemory lets a prompt have {limit * 512:,.0f} tokens/s in calls of 512: arithmetic is "
            "the limit here, and the raw loop its measure."
            if limit
            else ""
        )
    )


def warm(found: Found, bandwidth: float | None) -> str:
    rows = [
        [
            label,
            number(side["cold_ms"], 0),
            number(side["warm_ms"]),
            number(side["speedup"], 1, " ×"),
            number(found["to_floor"].get(label), 2),
            number(side["cached"], 0),
        ]
        for label, side in found["sides"].items()
        if "cold_ms" in side
    ]
    limit = steps(found, bandwidth)
    floor = found["floor_ms"]
    return (
        f"A prompt of {found['prefix_tokens']:,} tokens and {found['new_tokens']} more, then the same with "
        f"{found['new_tokens']} other ones; medians of {found['repeats']}. In the raw loop those "
        f"{found['new_tokens']} tokens and one step cost {number(floor)} ms"
        + (f"; to read the weights twice takes {2e3 / limit:.1f} ms" if limit else "")
        + ".\n\n"
        + table(["", "cold, ms", "warm, ms", "quicker", "warm / raw cost", "tokens kept"], rows)
    )


def busy(found: Found, bandwidth: float | None) -> str:
    limit = steps(found, bandwidth)
    labels = list(found["rows"][0]["sides"])
    rows = []
    for label in labels:
        cells = [label]
        for row in found["rows"]:
            side, ratio = row["sides"][label], row["ratios"].get(label)
            cells.append(f"{side['rate']:.1f}" + (f" ({ratio['median']:.2f})" if ratio else ""))
            if row["busy"]:
                cells.append(number(side["others"], 2))
        rows.append(cells)
    head = ["tokens/s, and shimmy's over it"]
    for row in found["rows"]:
        head += [f"{row['busy']} busy", "their speed"] if row["busy"] else ["quiet"]
    return (
        f"One client, and beside it processes that compute; runs of {found['seconds']:.0f} s in turn, "
        f"medians of {found['repeats']}. *Their speed* is theirs beside the engine over theirs "
        "alone. Every thread setting worth comparing is there: the best of each peer is in its rows.\n\n"
        + table(head, rows)
        + (f"\n\nThe limit of one stream: {limit:.1f} tokens/s." if limit else "")
    )


def memory(found: Found, bandwidth: float | None) -> str:
    rows = [
        [
            label,
            f"{side['loaded_mib']:,}",
            f"{side['after_mib']:,}",
            str(side["clients"]),
        ]
        for label, side in found["sides"].items()
    ]
    weights, cache = found["weight_bytes"] / (1 << 20), found["kv_bytes"] / (1 << 20)
    return (
        "Resident MiB of each side's process, with the same room for prompts and answers; ours is a "
        "whole Jupyter server.\n\n"
        + table(["", "loaded", "after clients", "clients"], rows)
        + f"\n\nThe least there can be: {weights:,.0f} MiB of weights and {cache:,.0f} MiB for 16,384 tokens of "
        "KV cache, for the sides that have so many; pages count when they are touched."
    )


def frames(found: Found | None) -> str:
    if found is None:
        return "Not measured."
    rounds = [
        [f"{one['map']:.0f}", f"{one['loop']:.0f}", f"{one['map'] / one['loop']:.3f}"]
        for one in found["rounds"]
    ]
    resumed = found["resumed"]
    return (
        f"`df.shimmy.map` of {found['rows']} rows, {found['concurrency']} at once, {found['tokens']} tokens each, "
        f"through a real server, against a loop of single calls; the shape of Qwen3-0.6B, {found['kind']}. "
        f"`llama_decode` alone, with the same prompts and tokens, allows a ratio of {found['raw']:.3f} on this "
        f"machine. Interrupted half-way, {resumed['done']} were done; called again it asked "
        f"{resumed['asked']}, and {resumed['twice']} of them twice.\n\n"
        + table(["map, s", "loop, s", "ratio"], rounds)
    )


def constraints(found: Found | None) -> str:
    if found is None:
        return "Not measured: benchmarks/constrained.py."
    rows = [
        [
            str(row["clients"]),
            row["kind"],
            number(row["rate"]),
            f"{row['overhead']:+.1%} ({row['least']:+.1%} … {row['most']:+.1%})",
        ]
        for row in found["rows"]
    ]
    return (
        f"The shape of Qwen3-0.6B with a vocabulary of {found['vocabulary']:,}, Q8_0, in process: the same "
        f"streams free and held to a schema or an expression, in turns, medians of {found['rounds']} rounds. "
        "The overhead is how much longer a step takes.\n\n"
        + table(["streams", "", "tokens/s", "overhead"], rows)
    )


def lookup(found: Found | None) -> str:
    if found is None:
        return "Not measured: benchmarks/lookup.py."
    rows = [
        [
            row["answer"],
            number(row["rate"]),
            number(row["without"]),
            f"{row['gain']:.2f} ({row['least']:.2f} … {row['most']:.2f})",
            f"{found['in_tokens'][row['answer']]:.2f}",
        ]
        for row in found["rows"]
    ]
    cost = {int(count): times for count, times in found["cost"].items()}
    most = max(cost)
    return (
        "A cell, and what a model makes of it when told to fix it, one stream in the shape of Qwen3-0.6B, "
        "Q8_0: the engine is held to exactly that answer, with guesses by prompt lookup and without, in turns. "
        "There a character is a token; beside it, reckoned from the cost of steps, the gain in the bundled "
        f"model's tokens. A step of {most} tokens takes {cost[most]:.2f} times as long as one of one, so "
        f"{most / cost[most]:.2f} times is the most there can be.\n\n"
        + table(["answer", "tokens/s", "without", "gain", "gain in larger tokens"], rows)
    )
