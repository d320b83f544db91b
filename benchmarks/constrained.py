"""What a constraint costs a decode step: the same streams free, and held to a schema, in turns.

    python benchmarks/constrained.py [--clients 1,16] [--tokens 64] [--rounds 5] [--vocabulary 32000]

In process, on random weights in the shape of Qwen3-0.6B. Tokens per second are of all streams together,
between the first token of the last stream and the last one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "scripts")]

import random_gguf  # noqa: E402
from bench import record  # noqa: E402

from shimmy_jupyter.compose import llama_backend  # noqa: E402
from shimmy_jupyter.engine.backend import LoadSpec  # noqa: E402
from shimmy_jupyter.engine.model import LoadedModel  # noqa: E402
from shimmy_jupyter.types import Constraint, Sampling  # noqa: E402

SCHEMA = {
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 1},
            "kind": {"enum": ["alpha", "beta", "gamma"]},
            "size": {"type": "integer", "minimum": 0, "maximum": 10000},
            "tags": {"type": "array", "items": {"type": "string"}, "minItems": 1},
            "more": {"anyOf": [{"type": "null"}, {"type": "boolean"}]},
        },
        "required": ["name", "kind", "size", "tags", "more"],
        "additionalProperties": False,
    },
}
KINDS = {
    "free": None,
    "schema": Constraint("json_schema", json.dumps(SCHEMA)),
    "regex": Constraint("regex", "([a-z]+ [0-9]+, ){1000}"),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--clients", default="1,16")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--layers", type=int, default=random_gguf.QWEN_06B.layers)
    parser.add_argument("--folder", type=Path, default=HERE / "results")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "bench.json")
    return parser.parse_args()


def shape(options: argparse.Namespace) -> Path:
    from dataclasses import replace

    wanted = replace(random_gguf.QWEN_06B, vocabulary=options.vocabulary, layers=options.layers)
    path: Path = options.folder / f"vocabulary-{options.vocabulary}-{options.layers}.gguf"
    if not path.exists():
        options.folder.mkdir(parents=True, exist_ok=True)
        random_gguf.write(path.with_suffix(".part"), wanted, quantized=True).rename(path)
    return path


async def rate(model: LoadedModel, clients: int, tokens: int, kind: str, round_: int) -> float:
    constraint = KINDS[kind]
    if constraint is not None:
        await model.compile(constraint)
    times: list[list[float]] = []

    async def one(client: int) -> None:
        prompt = tuple(f"{round_} {client} ".encode() * 2)
        sampling = Sampling(
            temperature=1.0, top_p=1.0, min_p=0.0, seed=client, constraint=constraint,
            ignore_eos=constraint is None,
        )  # fmt: skip
        mine: list[float] = []
        async with model.submit(str(client), prompt, tokens, sampling, ()) as stream:
            while pieces := await stream.read():
                mine += [time.perf_counter()] * len(pieces)
        times.append(mine)

    await asyncio.gather(*map(one, range(clients)))
    start = max(mine[0] for mine in times)
    end = max(mine[-1] for mine in times)
    return sum(start < at for mine in times for at in mine) / (end - start)


async def main() -> None:
    options = arguments()
    spec = LoadSpec(path=str(shape(options)), context_size=1024)
    model = await LoadedModel.load(llama_backend, spec)
    rows: list[dict[str, Any]] = []
    try:
        for clients in map(int, options.clients.split(",")):
            rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
            for round_ in range(options.rounds + 1):
                for kind in KINDS:
                    found = await rate(model, clients, options.tokens, kind, round_)
                    if round_:  # the first one pays for tables and first touches
                        rates[kind].append(found)
            for kind, each in rates.items():
                overhead = [free / one - 1 for free, one in zip(rates["free"], each, strict=True)]
                print(
                    f"{clients:3} streams  {kind:<12} {median(each):7.1f} tokens/s"
                    f"   overhead {median(overhead):+6.1%}"
                    f"  ({min(overhead):+.1%} to {max(overhead):+.1%})",
                    flush=True,
                )
                row = {"clients": clients, "kind": kind, "rate": median(each)}
                spread = {"least": min(overhead), "most": max(overhead)}
                rows.append({**row, "overhead": median(overhead), **spread})
    finally:
        await model.close()
    shape_of = {"vocabulary": options.vocabulary, "layers": options.layers}
    record(options.json, "constraints", None, {**shape_of, "rounds": options.rounds, "rows": rows})


if __name__ == "__main__":
    asyncio.run(main())
