"""llama-cpp-python's high-level API, no HTTP: one request after another, in a process of its own.

Options as JSON on the command line; each line on standard input is a `burst` job of `load.py`.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import prompts
from llama_cpp import Llama


def burst(llama: Llama, job: dict[str, Any]) -> dict[str, Any]:
    began, requests = time.perf_counter(), []
    for i in range(job["clients"]):
        prompt = prompts.ids(prompts.text(job["prompt_tokens"], f"{job['seed']}/{i}"))
        times: list[float] = []
        for chunk in llama.create_completion(
            prompt, max_tokens=job["max_tokens"], stream=True, seed=1 + i, **prompts.SAMPLING
        ):
            now = time.perf_counter() - began
            times += [now] * sum(map(str.isalpha, chunk["choices"][0]["text"]))
        requests.append({"sent": 0.0, "ended": times[-1], "times": times, "error": None})
    return {"seconds": time.perf_counter() - began, "requests": requests}


def main() -> None:
    options = json.loads(sys.argv[1])
    threads = dict.fromkeys(("n_threads", "n_threads_batch"), options["threads"])
    # Flash attention, as in the other sides: off is its default.
    llama = Llama(
        options["model"],
        n_ctx=options["context"],
        flash_attn=True,
        verbose=False,
        **(threads if options["threads"] else {}),
    )
    print(json.dumps({"threads": llama.n_threads}), flush=True)
    for line in sys.stdin:
        print(json.dumps(burst(llama, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
