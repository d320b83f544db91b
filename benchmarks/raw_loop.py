"""The raw loop: `llama_decode` and the sampler chains, nothing else, in a process of its own.

On the low-level binding only, so that no change of ours can change it. Options as JSON on the command
line; each line on standard input is a job, answered as `load.py` answers.

burst    `clients` prompts, one after another, then all sequences together, a token a step
warm     what the tokens after a prefix cost that is in the cache already, and one step after them
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from typing import Any

import prompts

os.environ.setdefault("GGML_NO_BACKTRACE", "1")

import llama_cpp.llama_cpp as native

BATCH = 512
_quick = ctypes.PyDLL(native._lib._name)
sample = _quick.llama_sampler_sample
sample.argtypes = native.llama_sampler_sample.argtypes
sample.restype = native.llama_sampler_sample.restype


@native.llama_log_callback
def _silent(level: int, text: bytes, _data: object) -> None:
    pass


def sampler(seed: int) -> Any:
    """llama.cpp's usual order, as in engine/llama.py."""
    params = native.llama_sampler_chain_default_params()
    params.no_perf = True
    chain = native.llama_sampler_chain_init(params)
    wanted = prompts.SAMPLING
    for part in (
        native.llama_sampler_init_top_k(wanted["top_k"]),
        native.llama_sampler_init_top_p(wanted["top_p"], 1),
        native.llama_sampler_init_min_p(wanted["min_p"], 1),
        native.llama_sampler_init_temp(wanted["temperature"]),
        native.llama_sampler_init_dist(seed),
    ):
        native.llama_sampler_chain_add(chain, part)
    return chain


class Raw:
    def __init__(self, options: dict[str, Any]) -> None:
        native.llama_log_set(_silent, None)
        native.llama_backend_init()
        self.model = native.llama_model_load_from_file(
            os.fsencode(options["model"]), native.llama_model_default_params()
        )
        if not self.model:
            raise RuntimeError("llama.cpp refused the model")
        params = native.llama_context_default_params()
        params.n_ctx = options["kv_tokens"]
        params.n_batch = params.n_ubatch = BATCH
        params.n_seq_max = params.n_outputs_max = options["slots"]
        params.n_threads = params.n_threads_batch = options["threads"]
        params.flash_attn_type = native.LLAMA_FLASH_ATTN_TYPE_AUTO
        params.kv_unified = params.no_perf = True
        self.context = native.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError("llama.cpp could not make a context")
        self.batch = native.llama_batch_init(BATCH, 0, 1)
        for i in range(BATCH):
            self.batch.n_seq_id[i] = 1

    def prompt(self, slot: int, tokens: list[int], start: int = 0) -> None:
        """The last token's logits are asked for."""
        batch = self.batch
        for begin in range(0, len(tokens), BATCH):
            part = tokens[begin : begin + BATCH]
            for i, token in enumerate(part):
                batch.token[i], batch.seq_id[i][0], batch.logits[i] = token, slot, False
                batch.pos[i] = start + begin + i
            batch.n_tokens = len(part)
            batch.logits[len(part) - 1] = begin + BATCH >= len(tokens)
            self.decode()

    def decode(self) -> None:
        code = native.llama_decode(self.context, self.batch)
        if code:
            raise RuntimeError(f"llama_decode: {code}")

    def burst(self, job: dict[str, Any]) -> dict[str, Any]:
        clients, length = job["clients"], job["prompt_tokens"]
        asked = [prompts.ids(prompts.text(length, f"{job['seed']}/{i}")) for i in range(clients)]
        chains = [sampler(1 + i) for i in range(clients)]
        batch, context, clock = self.batch, self.context, time.perf_counter
        times: list[list[float]] = [[] for _ in range(clients)]
        first, began = [], clock()
        for slot, tokens in enumerate(asked):
            self.prompt(slot, tokens)
            first.append(sample(chains[slot], context, -1))
            times[slot].append(clock() - began)
        batch.n_tokens = clients
        for i, token in enumerate(first):
            batch.token[i], batch.seq_id[i][0], batch.logits[i] = token, i, True
        for position in range(length, length + job["max_tokens"] - 1):
            for i in range(clients):
                batch.pos[i] = position
            self.decode()
            for i in range(clients):
                batch.token[i] = sample(chains[i], context, i)
                times[i].append(clock() - began)
        self._forget(chains)
        return {
            "seconds": clock() - began,
            "requests": [{"sent": 0.0, "ended": t[-1], "times": t, "error": None} for t in times],
        }

    def warm(self, job: dict[str, Any]) -> dict[str, Any]:
        prefix, new = job["prefix_tokens"], job["new_tokens"]
        chain, clock = sampler(1), time.perf_counter
        self.prompt(0, prompts.ids(prompts.text(prefix, f"{job['seed']}/prefix")))
        began = clock()
        self.prompt(0, prompts.ids(prompts.text(new, f"{job['seed']}/warm")), prefix)
        token = sample(chain, self.context, -1)
        middle = clock()
        self.prompt(0, [token], prefix + new)
        sample(chain, self.context, -1)
        end = clock()
        self._forget([chain])
        return {"new_ms": (middle - began) * 1e3, "step_ms": (end - middle) * 1e3}

    def _forget(self, chains: list[Any]) -> None:
        for chain in chains:
            native.llama_sampler_free(chain)
        native.llama_memory_clear(native.llama_get_memory(self.context), False)


def main() -> None:
    raw = Raw(json.loads(sys.argv[1]))
    print(json.dumps({"system": native.llama_print_system_info().decode().strip()}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        print(json.dumps(getattr(raw, job["mode"])(job)), flush=True)


if __name__ == "__main__":
    main()
