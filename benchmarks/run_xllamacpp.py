"""xllamacpp, llama-server's scheduler: a server in a process of its own, until its input ends.

Options as JSON in the first line of standard input, as there is a key among them.
"""

from __future__ import annotations

import json
import sys

import xllamacpp


def main() -> None:
    options = json.loads(sys.stdin.readline())
    params = xllamacpp.CommonParams()
    params.model.path = options["model"]
    params.n_parallel = options["slots"]
    params.n_ctx = options["kv_tokens"]
    params.kv_unified = True
    params.n_threads_http = 128  # else requests wait for one of these, not for the model
    params.api_keys = [options["key"]]
    params.verbosity = 1
    params.warmup = True
    if not options["cache"]:
        params.cache_ram_mib = 0
    if options["threads"]:
        params.cpuparams.n_threads = options["threads"]
        params.cpuparams_batch.n_threads = options["threads"]
    server = xllamacpp.Server(params)
    print(json.dumps({"address": server.listening_address}), flush=True)
    sys.stdin.read()
    del server


if __name__ == "__main__":
    main()
