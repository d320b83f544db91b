"""What prompt lookup gains where an answer copies, and what it costs where it does not.

    python benchmarks/lookup.py [--model FILE] [--depth 600] [--rounds 3]

1. What a step of several tokens of one sequence costs, by the binding alone.
2. Cells and what "fix this cell" makes of them, in the bundled model's tokens: which steps the guesses lead
   to, at these costs.
3. The engine, held to write exactly these answers by a constraint, with guesses and without, in turns. A
   character is a token there.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from shimmy_jupyter.compose import llama_backend
from shimmy_jupyter.core.lookup import Lookup
from shimmy_jupyter.engine.backend import LoadSpec
from shimmy_jupyter.engine.llama.binding import initialise, native
from shimmy_jupyter.engine.model import LoadedModel
from shimmy_jupyter.models.sources import BUNDLED
from shimmy_jupyter.types import Constraint, Sampling

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "scripts")]

from bench import record  # noqa: E402

COUNTS = (1, 2, 3, 4, 5, 6, 7, 8)

LOAD = """\
import pandas as pd
import matplotlib.pyplot as plt

def load(path, column):
    frame = pd.read_csv(path)
    frame = frame.dropna(subset=[column])
    frame[column] = frame[column].astype(float)
    return frame.sort_values(column)

frame = load("measurements.csv", "temperature")
frame.groupby("station")["temperature"].mean().plot.bar()
plt.ylabel("temperature")
plt.show()
"""
TRAIN = """\
def train(model, batches, optimizer, epochs=10):
    losses = []
    for epoch in range(epochs):
        total = 0.0
        for inputs, targets in batches:
            optimizer.zero_grad()
            outputs = model(inputs)
            loss = ((outputs - targets) ** 2).mean()
            loss.backward()
            optimizer.step()
            total += loss.item()
        losses.append(total / len(batches))
        print(f"epoch {epoch}: {losses[-1]:.4f}")
    return losses
"""
PROSE = """\
The error means that one of the rows has more fields than the header. Look at line 42 of the file: there is
a comma within a value that is not quoted. Either quote such values where the file is written, or tell the
reader which separator it should expect. After that the numbers come out as they should, and nothing else
in the notebook has to change.
"""
ANSWERS = {
    "an argument renamed": (LOAD, LOAD.replace("column", "name")),
    "a line added": (
        LOAD, LOAD.replace('plt.ylabel("temp', 'plt.title("Mean by station")\nplt.ylabel("temp'),
    ),
    "a condition added": (
        TRAIN,
        TRAIN.replace("            total +=", "            if torch.isnan(loss):\n"
                      '                raise ValueError("the loss is not a number")\n            total +='),
    ),
    "nothing copied": (TRAIN, PROSE),
}  # fmt: skip


def costs(options: argparse.Namespace) -> dict[int, float]:
    """Times of a step of one token, by the number of tokens."""
    initialise()
    model = native.llama_model_load_from_file(
        os.fsencode(options.model), native.llama_model_default_params()
    )
    params = native.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = options.depth + 64, 512, 512
    params.n_threads = params.n_threads_batch = len(os.sched_getaffinity(0))
    context = native.llama_init_from_model(model, params)
    batch = native.llama_batch_init(64, 0, 1)
    for start in range(0, options.depth, 64):
        _timed(context, batch, start, 64)
    rounds = [
        {
            count: median(_timed(context, batch, options.depth, count, forget=True) for _ in "abc")
            for count in COUNTS
        }
        for _ in range(options.rounds + 2)
    ]
    print("tokens   step, ms   times one   gain if all are right   right ones to break even")
    found = {}
    for count in COUNTS:
        found[count] = median(one[count] / one[1] for one in rounds)
        print(
            f"{count:6}   {1e3 * median(one[count] for one in rounds):8.1f}   {found[count]:9.2f}"
            f"   {count / found[count]:21.2f}   {found[count] - 1:14.1f} of {count - 1}"
        )
    native.llama_batch_free(batch)
    native.llama_free(context)
    native.llama_model_free(model)
    return found


def _timed(context: Any, batch: Any, start: int, count: int, *, forget: bool = False) -> float:
    batch.n_tokens = count
    for i in range(count):
        batch.token[i], batch.pos[i], batch.logits[i] = 99 + i % 20, start + i, forget
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
    began = time.perf_counter()
    if native.llama_decode(context, batch):
        sys.exit("llama.cpp could not decode")
    seconds = time.perf_counter() - began
    if forget:
        native.llama_memory_seq_rm(native.llama_get_memory(context), 0, start, -1)
    return seconds


def simulated(prompt: tuple[int, ...], answer: tuple[int, ...], cost: dict[int, float]) -> float:
    """Steps of one token over what the steps with guesses take, for an answer that is known."""
    lookup, done, spent = Lookup(), 1, 1.0
    while done < len(answer):
        guesses = lookup.guess(prompt, answer[:done], len(answer) - done - 1)
        right = 0
        while right < len(guesses) and guesses[right] == answer[done + right]:
            right += 1
        if guesses:
            lookup.learn(len(guesses), right)
        spent += cost[len(guesses) + 1]
        done += right + 1
    return len(answer) / spent


async def simulate(cost: dict[int, float]) -> dict[str, float]:
    model = await LoadedModel.load(llama_backend, LoadSpec(path=str(BUNDLED)))
    print("\nin tokens of the bundled model, at these costs:")
    found = {}
    for name, (cell, answer) in ANSWERS.items():
        prompt, tokens = await model.encode(cell), await model.encode(answer)
        found[name] = simulated(prompt, tokens, cost)
        print(f"  {name:<20} {len(tokens):4} tokens   {found[name]:.2f} times")
    await model.close()
    return found


async def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    print("\nthe engine, held to these answers:")
    models = {
        lookup: await LoadedModel.load(
            llama_backend,
            LoadSpec(
                path=str(options.model), context_size=1024, kv_tokens=2048, prompt_lookup=lookup
            ),
        )
        for lookup in (True, False)
    }
    for name, (cell, answer) in ANSWERS.items():
        rates: dict[bool, list[float]] = {True: [], False: []}
        for round_ in range(options.rounds):
            for lookup in (True, False) if round_ % 2 else (False, True):
                rates[lookup].append(await _rate(models[lookup], cell, answer))
        gains = [a / b for a, b in zip(rates[True], rates[False], strict=True)]
        print(
            f"  {name:<20} {median(rates[True]):6.1f} tokens/s, without {median(rates[False]):5.1f}"
            f"   {median(gains):.2f} times ({min(gains):.2f} to {max(gains):.2f})",
            flush=True,
        )
        row = {"answer": name, "rate": median(rates[True]), "without": median(rates[False])}
        rows.append({**row, "gain": median(gains), "least": min(gains), "most": max(gains)})
    for model in models.values():
        await model.close()
    return rows


async def _rate(model: LoadedModel, cell: str, answer: str) -> float:
    answer = answer[:300]
    constraint = Constraint("regex", re.escape(answer).replace("\\ ", " ").replace("\\\n", "\\n"))
    await model.compile(constraint)
    sampling = Sampling(temperature=0, constraint=constraint)
    text, times = "", list[float]()
    prompt = tuple(cell.encode())
    async with model.submit("p", prompt, len(answer), sampling, ()) as stream:
        while pieces := await stream.read():
            text += "".join(piece.text for piece in pieces)
            times.append(time.perf_counter())
    if text != answer:
        sys.exit(f"the answer is another one: {text!r}")
    return (len(answer) - 1) / (times[-1] - times[0])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=HERE / "results" / "words-0.6b-q8_0.gguf")
    parser.add_argument("--depth", type=int, default=640)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=HERE / "results" / "bench.json")
    options = parser.parse_args()
    cost = costs(options)
    in_tokens = asyncio.run(simulate(cost))
    rows = asyncio.run(measure(options))
    result = {"depth": options.depth, "cost": cost, "in_tokens": in_tokens, "rows": rows}
    record(options.json, "lookup", None, {**result, "rounds": options.rounds})


if __name__ == "__main__":
    main()
