"""A data frame mapped through a model against a loop of single calls; and going on after an interrupt.

    python benchmarks/frames.py [--rows 200] [--concurrency 32] [--tokens 64] [--repeats 3]

A real Jupyter server with a model of the shape of Qwen3-0.6B, whose weights are random and whose
answers never end early. Both sides ask the same kind of prompts, in turn, never the same prompt twice;
both go over the same kind of connection, and every answer has as many tokens as are allowed. They are sampled:
a greedy model of random weights repeats itself, and what repeats itself is guessed where one sequence decodes
alone. A round's ratio is the map's time by the loop's; the aim is 0.4. Beside it stands what the raw loop of
`llama_decode` allows on this machine: the same prompts and tokens for all at once, by those for one after
another, with nothing else to do. Then a map is interrupted half-way and called again: no row may be
asked twice. Exit code 1 where either does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import httpx
import pandas as pd

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "scripts")]

import prompts  # noqa: E402
import random_gguf  # noqa: E402
from kernel_session import RunningServer, running_server  # noqa: E402

from shimmy_jupyter import frames  # noqa: E402
from shimmy_jupyter.errors import from_code  # noqa: E402
from shimmy_jupyter.frames.fill import Wiring  # noqa: E402

AIM = 0.4
ROW_TOKENS = 24
"""Of a row's own text: in this model a character is a token."""
SAMPLING = {**prompts.SAMPLING, "seed": 1}
INSTRUCTION = "Say what this customer wants, and what to do about it first: "
PATH = "shimmy/v1/chat/completions"


class Client:
    """Asks one server. Counts what was asked; `stop_after` so many it interrupts the map."""

    def __init__(self, server: RunningServer, model: str, folder: Path) -> None:
        self.server, self.model, self.folder = server, model, folder
        self.asked: Counter[str] = Counter()
        self.answered: set[str] = set()
        self.stop_after: int | None = None
        self.tokens = self.computed = self.answers = 0
        """Tokens that were generated, prompts' tokens that were not in the cache; of how many answers."""

    def wiring(self) -> Wiring:
        async def identity(_model: str) -> str:
            return "0" * 64

        async def resolve(model: str | None, _task: str) -> str:
            return model or self.model

        def none(*_: Any) -> Any:
            raise NotImplementedError

        return Wiring(self.run, self.ask, none, none, resolve, identity, none, self.folder)

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        async def main() -> None:
            self._task = asyncio.current_task()
            async with httpx.AsyncClient(
                timeout=None, limits=httpx.Limits(max_connections=256), **self.reach()
            ) as self._http:
                await work

        try:
            asyncio.run(main())
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None

    def reach(self) -> dict[str, Any]:
        headers = {"Authorization": f"token {self.server.token}"}
        return {"base_url": self.server.url, "headers": headers, "trust_env": False}

    async def ask(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt = body["messages"][-1]["content"]
        self.asked[prompt] += 1
        answer = self.read(await self._http.post(PATH, json=body))
        self.answered.add(prompt)
        if len(self.answered) == self.stop_after and self._task is not None:
            self._task.cancel()
        return answer

    def read(self, response: httpx.Response) -> dict[str, Any]:
        answer = response.json()
        if "error" in answer:
            raise from_code(answer["error"]["code"], answer["error"]["message"])
        used = answer["usage"]
        self.tokens += used["completion_tokens"]
        self.computed += used["prompt_tokens"] - used["prompt_tokens_details"]["cached_tokens"]
        self.answers += 1
        return dict(answer)

    def loop(self, bodies: list[dict[str, Any]]) -> None:
        with httpx.Client(timeout=None, **self.reach()) as client:
            for body in bodies:
                self.read(client.post(PATH, json=body))


def texts(rows: int, name: str) -> list[str]:
    return [prompts.text(ROW_TOKENS, f"{name}/{k}") for k in range(rows)]


def compare(client: Client, options: argparse.Namespace) -> list[dict[str, float]]:
    rounds: list[dict[str, float]] = []
    for number in range(options.repeats + 1):
        rows = options.rows if number else min(options.rows, 4)  # the first loads the model
        frame = pd.DataFrame({"text": texts(rows, f"map {number}")})
        seconds: dict[str, float] = {}
        client.tokens = 0
        began = time.perf_counter()
        frame.shimmy.map(
            INSTRUCTION + "{text}",
            max_tokens=options.tokens,
            concurrency=options.concurrency,
            cache=False,
            progress=False,
            errors="raise",
            **SAMPLING,
        )
        seconds["map"] = time.perf_counter() - began
        bodies = [
            {
                "model": client.model,
                "messages": [{"role": "user", "content": INSTRUCTION + text}],
                "max_tokens": options.tokens,
                **SAMPLING,
            }
            for text in texts(rows, f"loop {number}")
        ]
        began = time.perf_counter()
        client.loop(bodies)
        seconds["loop"] = time.perf_counter() - began
        if client.tokens != 2 * rows * options.tokens:
            raise RuntimeError(f"{client.tokens} tokens came, not {2 * rows * options.tokens}")
        if number:
            rounds.append(seconds)
            ratio = seconds["map"] / seconds["loop"]
            print(
                f"round {number}: map {seconds['map']:.1f} s, loop {seconds['loop']:.1f} s, {ratio:.3f}",
                flush=True,
            )
    return rounds


def raw(model: Path, options: argparse.Namespace, prompt_tokens: int) -> float:
    """What the map's time by the loop's would be if nothing but the model took any: medians of 3."""
    count = min(options.concurrency, options.rows)
    sizes = {"model": str(model), "kv_tokens": 16384, "slots": count, "threads": os.cpu_count()}
    job = {"mode": "burst", "prompt_tokens": prompt_tokens, "max_tokens": options.tokens}
    command = [sys.executable, str(HERE / "raw_loop.py"), json.dumps(sizes)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdout.readline()

        def seconds(clients: int, seed: int) -> float:
            child.stdin.write(json.dumps({**job, "clients": clients, "seed": seed}) + "\n")
            child.stdin.flush()
            return float(json.loads(child.stdout.readline())["seconds"])

        found = [seconds(count, k) / count / seconds(1, k) for k in range(3)]
        child.stdin.close()
    return statistics.median(found)


def go_on(client: Client, options: argparse.Namespace) -> tuple[int, int, int]:
    """Rows answered before the interrupt, rows asked after it, and rows asked although they were answered."""
    frame = pd.DataFrame({"text": texts(options.rows, "again")})
    again = {
        "max_tokens": options.tokens,
        "concurrency": options.concurrency,
        "progress": False,
        **SAMPLING,
    }
    client.stop_after = len(client.answered) + options.rows // 2
    before = set(client.answered)
    try:
        frame.shimmy.map(INSTRUCTION + "{text}", **again)
    except KeyboardInterrupt as stopped:
        done = set(stopped.partial["answer"].dropna().index)  # type: ignore[attr-defined]
    client.stop_after = None
    answered = client.answered - before
    client.asked.clear()
    found = frame.shimmy.map(INSTRUCTION + "{text}", **again)
    if found["answer"].isna().any():
        raise RuntimeError("rows are missing")
    return len(done), client.asked.total(), sum(prompt in answered for prompt in client.asked)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--kind", choices=["Q8_0", "Q4_0", "F32"], default="Q8_0")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "models", "frames-06b.gguf")
        model.parent.mkdir()
        kind = "" if options.kind == "F32" else options.kind
        random_gguf.write(model, random_gguf.QWEN_06B, quantized=kind, words=True)
        environment = {"SHIMMY_MODEL_PATHS": str(model.parent)}
        settings = ["--ShimmyEngine.max_sequences=32", "--ShimmyEngine.kv_tokens=16384"]
        with running_server(*settings, environment=environment) as server:
            client = Client(server, model.stem, Path(folder, "cache"))
            frames.register(client.wiring)
            rounds = compare(client, options)
            each = round(client.computed / client.answers)
            done, asked, twice = go_on(client, options)
        allowed = raw(model, options, each)
    ratios = [one["map"] / one["loop"] for one in rounds]
    result = {
        "rows": options.rows,
        "concurrency": options.concurrency,
        "tokens": options.tokens,
        "kind": options.kind,
        "rounds": rounds,
        "ratio": {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)},
        "raw": allowed,
        "prompt_tokens": each,
        "resumed": {"done": done, "asked": asked, "twice": twice},
    }
    spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
    print(f"ratio {statistics.median(ratios):.3f} ({spread}, {len(ratios)} rounds; aim {AIM})")
    print(
        f"the raw loop allows {allowed:.3f}, with {each} tokens of a prompt to compute for each row"
    )
    print(f"resumed: {done} of {options.rows} were done, {asked} asked afterwards, {twice} twice")
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    (results / "frames.json").write_text(json.dumps(result, indent=2) + "\n")
    return int(statistics.median(ratios) > AIM or twice > 0 or done + asked != options.rows)


if __name__ == "__main__":
    sys.exit(main())
