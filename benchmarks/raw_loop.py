"""The raw loop: `llama_decode` and the sampler chains, nothing else, in a process of its own.

Reads `{"clients", "prompt", "tokens"}` a line on standard input; answers with the decode phase's
tokens per second in all, and the median milliseconds until a first token, one prompt after another.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any

from shimmy_jupyter.core.messages import OpenSlot, Row, Step
from shimmy_jupyter.engine.backend import LoadSpec
from shimmy_jupyter.engine.llama import LlamaBackend, available_threads, native, quick
from shimmy_jupyter.types import Sampling


def measure(backend: LlamaBackend, wanted: dict[str, Any], sampling: Sampling) -> dict[str, float]:
    clients, prompt = wanted["clients"], tuple(wanted["prompt"])
    for slot in range(clients):
        backend.open(OpenSlot(slot, sampling, ()))
    began = time.perf_counter()
    first, waits = [], []
    for slot in range(clients):
        first.append(backend.step(Step((Row(slot, 0, prompt, sample=True),)))[0].token)
        waits.append((time.perf_counter() - began) * 1e3)
    context, batch, samplers = backend._context, backend._batch, backend._samplers
    decode, sample = native.llama_decode, quick.llama_sampler_sample
    batch.n_tokens = clients
    for i, token in enumerate(first):
        batch.token[i], batch.seq_id[i][0], batch.logits[i] = token, i, True
    began = time.perf_counter()
    for position in range(len(prompt), len(prompt) + wanted["tokens"] - 1):
        for i in range(clients):
            batch.pos[i] = position
        if decode(context, batch):
            raise RuntimeError("llama_decode failed")
        for i in range(clients):
            batch.token[i] = sample(samplers[i], context, i)
    rate = clients * (wanted["tokens"] - 1) / (time.perf_counter() - began)
    for slot in range(clients):
        backend.close(slot)
    return {"tokens_per_second": rate, "first_token_ms": statistics.median(waits)}


def main() -> None:
    backend = LlamaBackend()
    threads = available_threads()
    facts = backend.load(LoadSpec(path=sys.argv[1], slots=32, threads=threads))
    options = json.loads(sys.argv[2])
    bias = tuple((int(token), value) for token, value in options.pop("logit_bias").items())
    sampling = Sampling(logit_bias=bias, **options)
    about = {"threads": threads, "model": facts.description, "kv_tokens": facts.kv_tokens}
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        print(json.dumps(measure(backend, json.loads(line), sampling)), flush=True)
    backend.unload()


if __name__ == "__main__":
    main()
