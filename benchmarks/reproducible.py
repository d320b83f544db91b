"""Reproducible requests under load: how many of 200 are the same bytes, and what they cost.

    python benchmarks/reproducible.py [--requests 200] [--tokens 48] [--model PATH]

Beside them a dozen other requests are always running: prompts of all lengths, of three principals, with
beginnings in common, answers that are cancelled. Sampled at temperature 1 from random weights, whose
tokens are as level as can be, unless a model is named.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import sys
import tempfile
import time
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

import random_gguf

from shimmy_jupyter.compose import llama_backend
from shimmy_jupyter.engine.backend import LoadSpec
from shimmy_jupyter.engine.model import LoadedModel
from shimmy_jupyter.types import Sampling

SHAPE = random_gguf.Shape(layers=4, width=256, heads=8, head_width=32, hidden=1024)
WARM = Sampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=3)


async def answer(
    model: LoadedModel, who: str, prompt: tuple[int, ...], tokens: int, *, reproducible: bool
) -> tuple[str, float]:
    began = time.perf_counter()
    stream = model.submit(who, prompt, tokens, WARM, (), reproducible=reproducible)
    async with stream:
        text = "".join([piece async for piece in stream])
    return text, time.perf_counter() - began


async def noise(model: LoadedModel, number: int) -> None:
    random = Random(number)
    beginning = tuple(random.choices(range(256), k=100))
    while True:
        prompt = (*beginning, *random.choices(range(256), k=random.randrange(1, 400)))
        prompt = prompt[random.randrange(100) :]
        work = answer(model, str(number % 3), prompt, random.randrange(1, 80), reproducible=False)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(work, random.choice([0.05, 60, 60]))


async def measure(path: Path, requests: int, tokens: int) -> int:
    """How many differ from the first."""
    model = await LoadedModel.load(llama_backend, LoadSpec(path=str(path), kv_tokens=16384))
    prompt = tuple(Random(0).choices(range(256), k=300))
    exact, _ = await answer(model, "r", prompt, tokens, reproducible=True)
    alone = {
        kind: statistics.median(
            [(await answer(model, "r", prompt, tokens, reproducible=kind))[1] for _ in range(5)]
        )
        for kind in (True, False)
    }
    others = [asyncio.create_task(noise(model, i)) for i in range(12)]
    differing = 0
    for count in range(requests):
        text, _ = await answer(model, "r", prompt, tokens, reproducible=True)
        differing += text != exact
        if count % 20 == 19:
            print(f"{count + 1} requests, {differing} differ", file=sys.stderr, flush=True)
    for other in others:
        other.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await model.close()
    print(f"{requests - differing} of {requests} identical under load")
    print(
        f"alone, {len(prompt)} tokens and {tokens} more: {alone[True] * 1e3:.0f} ms reproducible, "
        f"{alone[False] * 1e3:.0f} ms otherwise with its prompt cached"
    )
    return differing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--model", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "random.gguf"
        path = options.model or random_gguf.write(made, SHAPE, quantized=True)
        sys.exit(bool(asyncio.run(measure(path, options.requests, options.tokens))))


if __name__ == "__main__":
    main()
