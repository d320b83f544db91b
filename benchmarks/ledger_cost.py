"""What two records cost a request, with 100,000 of them there already, and what those take to verify.

python benchmarks/ledger_cost.py [--pairs 1000] [--records 100000] [--isolation process]
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "scripts")]

import stats  # noqa: E402
from kernel_session import RunningServer, running_server  # noqa: E402

from shimmy_jupyter.audit.ledger import Entry, Ledger  # noqa: E402
from shimmy_jupyter.audit.verify import verify  # noqa: E402

MODEL = "self-test"


def filled(folder: Path, records: int) -> tuple[Path, dict[str, float]]:
    """A ledger with so many records; seconds to write and to verify them."""
    path = folder / "audit" / "ledger.sqlite"
    parameters = {"max_tokens": 64, "temperature": 0.2}
    began = time.perf_counter()
    with contextlib.closing(Ledger(path)) as ledger:
        for first in range(0, records // 2, 500):
            futures = []
            for number in range(first, min(first + 500, records // 2)):
                who, now = f"person-{number % 20:02}", 1.7e9 + number
                common: dict[str, Any] = {
                    "user_kind": "gateway", "groups": ("lab",), "client_ip": "127.0.0.1",
                    "request_path": "/shimmy/v1/chat/completions", "model": MODEL,
                    "model_sha256": "0" * 64, "parameters": parameters,
                    "prompt_digest": ledger.digest(str(number), who),
                }  # fmt: skip
                numbers: dict[str, Any] = {
                    "prompt_tokens": 15, "tokens_generated": 11, "cached_tokens": 0,
                    "duration_ms": 23.4, "time_to_first_token_ms": 5.6, "outcome": "ok",
                    "output_digest": ledger.digest("answer", who),
                }  # fmt: skip
                begin = Entry("begin", f"{number:032x}", now, who, **common)
                end = Entry("end", f"{number:032x}", now + 0.02, who, **common, **numbers)
                futures += [ledger.append([begin]), ledger.append([end])]
            for future in futures:
                future.result()
    written = time.perf_counter() - began
    began = time.perf_counter()
    verdict = verify(path)
    assert verdict.ok, verdict
    assert verdict.records == records
    seconds = {"write_s": written, "verify_s": time.perf_counter() - began}
    return path, {**seconds, "file_mib": path.stat().st_size / 2**20}


def ask(server: RunningServer, connection: http.client.HTTPConnection) -> float:
    """Milliseconds of one short answer."""
    body = json.dumps(
        {"model": MODEL, "prompt": "What", "max_tokens": 4, "min_tokens": 4, "temperature": 0}
    )
    headers = {"Authorization": f"token {server.token}", "Content-Type": "application/json"}
    began = time.perf_counter()
    connection.request("POST", "/shimmy/v1/completions", body, headers)
    answer = connection.getresponse()
    content = json.loads(answer.read())
    took = (time.perf_counter() - began) * 1e3
    assert content["usage"]["completion_tokens"] == 4, content
    return took


def ledger_cost(args: argparse.Namespace) -> dict[str, Any]:
    """Two servers, of which one records; asked in turn, each time the other one first."""
    isolation = f"--ShimmyEngine.isolation={args.isolation}"
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        path, seconds = filled(Path(folder), args.records)
        before = os.getloadavg()
        servers = [
            stack.enter_context(running_server(isolation, option))
            for option in ("--ShimmyAudit.enabled=False", f"--ShimmyAudit.path={path}")
        ]
        connections = [
            http.client.HTTPConnection("localhost", urlsplit(server.url).port, timeout=60)
            for server in servers
        ]
        pairs = list(zip(servers, connections, strict=True))
        took: list[list[float]] = [[], []]
        for turn in range(20 + args.pairs):
            for which in (0, 1) if turn % 2 else (1, 0):
                one = ask(*pairs[which])
                if turn >= 20:
                    took[which].append(one)
        for connection in connections:
            connection.close()
        stack.close()
        verdict = verify(path)
    off, on = took
    slower = statistics.median(b - a for a, b in zip(off, on, strict=True))
    by_medians = statistics.median(on) - statistics.median(off)
    problems = []
    if max(slower, by_medians) >= 5:
        problems.append(f"the ledger slows the median request by {max(slower, by_medians):.2f} ms")
    if seconds["verify_s"] >= 10:
        problems.append(f"{args.records} records took {seconds['verify_s']:.1f} s to verify")
    # Two of each request, and the policy's.
    if not verdict.ok or verdict.records != args.records + 2 * (20 + args.pairs) + 1:
        problems.append(f"the ledger does not verify: {verdict}")
    return {
        "isolation": args.isolation,
        "pairs": args.pairs,
        "records": args.records,
        **seconds,
        "off_ms": stats.spread(off),
        "on_ms": stats.spread(on),
        "slower_ms": by_medians,
        "slower_pairwise_ms": slower,
        "load_average": [before, os.getloadavg()],
        "problems": problems,
    }


def show_cost(found: dict[str, Any]) -> None:
    off, on = found["off_ms"], found["on_ms"]
    for name, value in (
        ("isolation", found["isolation"]),
        ("pairs of requests", found["pairs"]),
        ("without a ledger, ms, p50 / p95 / p99", [round(v, 2) for v in off.values()]),
        ("with one, ms, p50 / p95 / p99", [round(v, 2) for v in on.values()]),
        ("slower at the median", f"{found['slower_ms']:.2f} ms"),
        ("median of the differences", f"{found['slower_pairwise_ms']:.2f} ms"),
        (f"{found['records']:,} records: verify", f"{found['verify_s']:.2f} s"),
        ("to write them, two by two", f"{found['write_s']:.2f} s"),
        ("their file", f"{found['file_mib']:.0f} MiB"),
        ("load average before, after", [round(one[0], 2) for one in found["load_average"]]),
    ):
        print(f"{name:<42} {value}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--isolation", choices=["none", "process"], default="process")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = ledger_cost(args)
    show_cost(found)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(found, indent=2) + "\n")
    for problem in found["problems"][:20]:
        print(f"does not hold: {problem[:600]}")
    sys.exit(bool(found["problems"]))


if __name__ == "__main__":
    main()
