"""What the extension adds to a Jupyter server's start: seconds and resident memory.

    python benchmarks/startup.py [--starts 10]

Starts a server with the extension and one without, in turn, each in a process of its own, and
compares the medians. The time is from the process's start until it has answered a first request.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import psutil

HERE = Path(__file__).parent


def start(*, extension: bool) -> tuple[float, float]:
    """Seconds and MiB of one start."""
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "JUPYTER_RUNTIME_DIR": folder, "JUPYTER_CONFIG_DIR": folder}
        config = json.dumps({"ServerApp": {"jpserver_extensions": {"shimmy_jupyter": extension}}})
        Path(folder, "jupyter_server_config.json").write_text(config)
        command = [sys.executable, "-m", "jupyter_server", "--no-browser", "--allow-root"]
        command += ["--ServerApp.port=0", f"--ServerApp.root_dir={folder}"]
        began = time.perf_counter()
        process = subprocess.Popen(command, env=env, stdout=-3, stderr=-3)
        record = Path(folder, f"jpserver-{process.pid}.json")
        while not (record.exists() and record.stat().st_size):
            time.sleep(0.002)
        info = json.loads(record.read_text())
        request = urllib.request.Request(
            info["url"] + "api/status", headers={"Authorization": f"token {info['token']}"}
        )
        urllib.request.urlopen(request, timeout=30).read()
        seconds = time.perf_counter() - began
        memory = psutil.Process(process.pid).memory_info().rss / (1 << 20)
        check = urllib.request.Request(
            info["url"] + "shimmy/health", headers={"Authorization": f"token {info['token']}"}
        )
        try:
            there = urllib.request.urlopen(check, timeout=30).status == 200
        except urllib.error.HTTPError:
            there = False
        process.terminate()
        process.wait()
        if there is not extension:
            raise RuntimeError(f"the extension is {'' if there else 'not '}enabled")
        return seconds, memory


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
