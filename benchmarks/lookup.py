"""Would speculation by prompt lookup pay here? What a step of several tokens of one sequence costs.

    python benchmarks/lookup.py [--model FILE] [--depth 600] [--rounds 5]

With `k` tokens guessed, a step computes `k + 1` and keeps as many as were right, and one. Its gain is at
most `(k + 1) * t(1) / t(k + 1)`, where every guess is right, and 1 where `t(k + 1) / t(1) - 1` of them are:
that is printed, by the binding alone.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from statistics import median
from typing import Any

from shimmy_jupyter.engine.llama.binding import initialise, native

HERE = Path(__file__).parent
COUNTS = (1, 2, 3, 4, 5, 6, 8, 9, 12, 16)


def timed(context: Any, batch: Any, start: int, count: int) -> float:
    batch.n_tokens = count
    for i in range(count):
        batch.token[i], batch.pos[i], batch.logits[i] = 99 + i, start + i, True
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
    began = time.perf_counter()
    assert native.llama_decode(context, batch) == 0
    seconds = time.perf_counter() - began
    native.llama_memory_seq_rm(native.llama_get_memory(context), 0, start, -1)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=HERE / "results" / "words-0.6b-q8_0.gguf")
    parser.add_argument("--depth", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    initialise()
    model = native.llama_model_load_from_file(
        os.fsencode(options.model), native.llama_model_default_params()
    )
    params = native.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = options.depth + 64, 512, 512
    params.n_threads = params.n_threads_batch = len(os.sched_getaffinity(0))
    context = native.llama_init_from_model(model, params)
    batch = native.llama_batch_init(512, 0, 1)
    for start in range(0, options.depth, 64):
        batch.n_tokens = 64
        for i in range(64):
            batch.token[i], batch.pos[i], batch.logits[i] = 99 + i % 20, start + i, i == 63
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        assert native.llama_decode(context, batch) == 0
    depth = -(-options.depth // 64) * 64 - 1
    native.llama_memory_seq_rm(native.llama_get_memory(context), 0, depth, -1)
    rounds = [
        {count: median(timed(context, batch, depth, count) for _ in range(3)) for count in COUNTS}
        for _ in range(options.rounds)
    ]
    print("guessed   step, ms   times one   gain if all right   right ones to break even")
    for count in COUNTS[1:]:
        times = median(one[count] / one[1] for one in rounds)
        print(
            f"{count - 1:7}   {1e3 * median(one[count] for one in rounds):8.1f}   {times:9.2f}"
            f"   {count / times:17.2f}   {times - 1:10.1f} of {count - 1}"
        )


if __name__ == "__main__":
    main()
