"""How much of the engine's speed reaches a client: ratios from one run, on a model it makes.

    python benchmarks/bench.py [--clients 1,4,8,16] [--repeats 5] [--tokens 128] [--json FILE]

Three processes take turns: the raw loop, and a bare socket client of a real Jupyter server, whose
authenticated handlers stream from the engine inside it. Same model, same sampler chains, same
threads. Each row's ratio is the median of the ratios of neighbouring measurements.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "scripts"))

import random_gguf  # noqa: E402
from host_cost import costs, host_cost  # noqa: E402
from kernel_session import RunningServer, running_server  # noqa: E402

SHAPE = random_gguf.QWEN_06B
SAMPLING: dict[str, Any] = {
    "temperature": 0.8,
    "seed": 1,
    # A random model ends at a random place; the end tokens are made impossible for both sides.
    "logit_bias": {str(SHAPE.vocabulary - 3): -100.0, str(SHAPE.vocabulary - 1): -100.0},
}
PROMPT = list(range(1000, 1032))


class Child:
    """A process that answers one line of JSON with another."""

    def __init__(self, *command: str, first_line: str | None = None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        if first_line is not None:
            self._write(first_line)

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        self._write(json.dumps(question))
        return self.read()

    def read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args} ended without an answer")
        return dict(json.loads(line))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def _write(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()


@contextlib.contextmanager
def sides(model: Path) -> Iterator[tuple[Child, Child, dict[str, Any]]]:
    """The raw loop and the client of a server, both with the model loaded."""
    raw = Child(str(HERE / "raw_loop.py"), str(model), json.dumps(SAMPLING))
    facts = raw.read()
    same_cache = f"--ShimmyEngine.kv_tokens={facts['kv_tokens']}"
    environment = {"SHIMMY_MODEL_PATHS": str(model.parent)}
    with running_server(same_cache, environment=environment) as server:
        client = _client(server)
        client.ask({"clients": 1, "body": body(model, 8)})
        yield raw, client, facts
        client.close()
    raw.close()


def _client(server: RunningServer) -> Child:
    url = urlsplit(server.url)
    path = url.path + "shimmy/v1/completions"
    # The token goes by standard input: a command line can be read by everybody on the machine.
    return Child(
        str(HERE / "socket_client.py"), "127.0.0.1", str(url.port), path, first_line=server.token
    )


def body(model: Path, tokens: int) -> dict[str, Any]:
    return {
        "model": model.stem,
        "prompt": PROMPT,
        "max_tokens": tokens,
        "stream": True,
        **SAMPLING,
    }


def measure(raw: Child, client: Child, model: Path, clients: int, options: Any) -> dict[str, Any]:
    def http() -> dict[str, Any]:
        return client.ask({"clients": clients, "body": body(model, options.tokens)})

    def loop() -> dict[str, Any]:
        return raw.ask({"clients": clients, "prompt": PROMPT, "tokens": options.tokens})

    http(), loop()  # both warm at this number of rows
    pairs = []
    for i in range(options.repeats):
        if i % 2:
            after = loop()
            pairs.append((http(), after))
        else:
            pairs.append((http(), loop()))
    rate, first = "tokens_per_second", "first_token_ms"
    return {
        "clients": clients,
        "http": statistics.median(h[rate] for h, _ in pairs),
        "raw": statistics.median(r[rate] for _, r in pairs),
        "ratio": statistics.median(h[rate] / r[rate] for h, r in pairs),
        "ratios": [round(h[rate] / r[rate], 3) for h, r in pairs],
        "http_first_token_ms": statistics.median(h[first] for h, _ in pairs),
        "raw_first_token_ms": statistics.median(r[first] for _, r in pairs),
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["clients   HTTP tok/s   raw tok/s   ratio (min…max)        first token HTTP / raw, ms"]
    for r in rows:
        spread = f"{min(r['ratios']):.2f}…{max(r['ratios']):.2f}"
        lines.append(
            f"{r['clients']:>7}   {r['http']:>10.1f}   {r['raw']:>9.1f}   {r['ratio']:>5.3f} "
            f"({spread})   {r['http_first_token_ms']:>10.1f} / {r['raw_first_token_ms']:.1f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--clients", default="1,4,8,16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--json", type=Path, default=HERE / "results" / "http.json")
    options = parser.parse_args()
    folder = HERE / "results"
    folder.mkdir(exist_ok=True)
    model = folder / "random-0.6b-q8_0.gguf"
    if not model.exists():
        print("making a random-weight model of the 0.6B shape, Q8_0 …", flush=True)
        # Under another name until it is whole, in case somebody loses patience.
        random_gguf.write(model.with_suffix(".part"), SHAPE, quantized=True).rename(model)
    rows = []
    with sides(model) as (raw, client, facts):
        for clients in map(int, options.clients.split(",")):
            rows.append(measure(raw, client, model, clients, options))
            print(
                table(rows[-1:]) if len(rows) == 1 else table(rows[-1:]).split("\n")[1], flush=True
            )
    cost = host_cost()
    print(costs(cost))
    result = {
        "rows": rows,
        "host_cost_us_per_step": cost,
        "threads": facts["threads"],
        "model": facts["model"],
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    options.json.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {options.json}")


if __name__ == "__main__":
    main()
