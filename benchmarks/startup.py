"""What the extension adds to a Jupyter server's start: seconds and resident memory.

    python benchmarks/startup.py [--starts 10]

Starts a server with the extension and one without, in turn, each in a process of its own, and
compares the medians. The time is from the process's start until it has answered a first request.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "scripts"))

from kernel_session import RunningServer, running_server  # noqa: E402


def start(*, extension: bool) -> tuple[float, float]:
    """Seconds and MiB of one start."""
    switch = f"shimmy_jupyter={extension}"
    began = time.perf_counter()
    with running_server(f"--ServerApp.jpserver_extensions={switch}") as server:
        ask(server, "api/status")
        seconds = time.perf_counter() - began
        memory = psutil.Process(server.pid).memory_info().rss / (1 << 20)
        if (ask(server, "shimmy/health") == 200) is not extension:
            raise RuntimeError(f"the extension is {'not ' if extension else ''}enabled")
        return seconds, memory


def ask(server: RunningServer, path: str) -> int:
    request = urllib.request.Request(
        server.url + path, headers={"Authorization": f"token {server.token}"}
    )
    try:
        return int(urllib.request.urlopen(request, timeout=30).status)
    except urllib.error.HTTPError as error:
        return error.code


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--starts", type=int, default=10)
    starts = parser.parse_args().starts
    start(extension=True), start(extension=False)
    found: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for _ in range(starts):
        for extension in (True, False):
            found[extension].append(start(extension=extension))
    medians = {
        which: [statistics.median(column) for column in zip(*rows, strict=True)]
        for which, rows in found.items()
    }
    for which, name in ((False, "without"), (True, "with")):
        seconds, memory = medians[which]
        print(f"{name:<8} {seconds:6.3f} s   {memory:6.1f} MiB")
    added = [a - b for a, b in zip(medians[True], medians[False], strict=True)]
    print(f"added    {added[0]:+6.3f} s   {added[1]:+6.1f} MiB   (medians of {starts} starts)")
    folder = HERE / "results"
    folder.mkdir(exist_ok=True)
    result = {"starts": starts, "added_seconds": added[0], "added_mib": added[1]}
    (folder / "startup.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
