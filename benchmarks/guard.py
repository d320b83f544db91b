"""Whether limits and the ledger hold under load.

    python benchmarks/guard.py [--seconds 120] [--clients 200] [--people 20] [--isolation process]
    python benchmarks/guard.py --quick      10 seconds of 20 clients

A real server with the bundled model, and people whom JWTs name. Each has several clients that ask
again at once when they are answered, so that everybody is at their limits all the time: streams and
JSON, some left amid their answer, some with a deadline. Then every claim is checked against what
the clients saw and against the ledger; where one does not hold the exit code is 1.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import itertools
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import urlsplit

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "scripts")]

import stats  # noqa: E402
from guard_findings import MOST_TOKENS, Findings, Limits, Seen, check_people, stored  # noqa: E402
from kernel_session import RunningServer, running_server  # noqa: E402

from shimmy_jupyter.audit.verify import verify  # noqa: E402

ISSUER, AUDIENCE, KEY = "https://login.test/realms/lab", "jupyter", "bench"
QUESTIONS = ("What does len do?", "What does zip do?", "What is a list?", "Say more about that.")
MODEL = "self-test"
OUTCOMES = {"ok", "left", "limited", "error: deadline_exceeded"}


class Gateway:
    """Who signs for people: a key made here, and its file."""

    def __init__(self, folder: Path) -> None:
        import jwt
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        self._secret = Ed25519PrivateKey.generate()
        public = jwt.algorithms.OKPAlgorithm.to_jwk(self._secret.public_key(), as_dict=True)
        self.file = folder / "jwks.json"
        self.file.write_text(json.dumps({"keys": [{**public, "kid": KEY, "use": "sig"}]}))

    def token(self, user: str) -> str:
        import jwt

        now = int(time.time())
        claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": user, "iat": now, "exp": now + 3600}
        return jwt.encode(claims, self._secret, algorithm="EdDSA", headers={"kid": KEY})

    @property
    def options(self) -> list[str]:
        provider = "shimmy_jupyter.server.gateway.JWTIdentityProvider"
        return [
            f"--ServerApp.identity_provider_class={provider}",
            f"--JWTIdentityProvider.issuer={ISSUER}",
            f"--JWTIdentityProvider.audience={AUDIENCE}",
            f"--JWTIdentityProvider.jwks_file={self.file}",
            "--JWTIdentityProvider.injected=False",
        ]


def probe(url: str, token: str, seconds: float) -> list[float]:
    """Milliseconds of each `GET api/status`, twenty a second. For a process of its own."""
    to = urlsplit(url)
    connection = http.client.HTTPConnection(to.hostname or "", to.port, timeout=60)
    found, until = [], time.perf_counter() + seconds
    while (began := time.perf_counter()) < until:
        connection.request("GET", "/api/status", headers={"Authorization": f"token {token}"})
        answer = connection.getresponse()
        answer.read()
        assert answer.status == 200, answer.status
        found.append((time.perf_counter() - began) * 1e3)
        time.sleep(max(0.0, began + 0.05 - time.perf_counter()))
    connection.close()
    return found


# The clients


class Connection:
    """As little HTTP as will do: the generator must not take the processor from what it measures."""

    def __init__(self, url: str, authorization: str) -> None:
        to = urlsplit(url)
        self._host, self._port = to.hostname or "", to.port
        self._authorization = f"Authorization: {authorization}\r\n"
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def send(self, path: str, body: Any = None, mark: str = "") -> None:
        if self._streams is None:
            self._streams = await asyncio.open_connection(self._host, self._port)
        data = b"" if body is None else json.dumps(body).encode()
        head = (
            f"{'GET' if body is None else 'POST'} /{path} HTTP/1.1\r\nHost: {self._host}\r\n"
            f"{self._authorization}Content-Type: application/json\r\nX-Shimmy-Cell: {mark}\r\n"
            f"Content-Length: {len(data)}\r\n\r\n"
        )
        self._streams[1].write(head.encode() + data)

    async def head(self) -> tuple[int, dict[str, str]]:
        assert self._streams is not None
        lines = (await self._streams[0].readuntil(b"\r\n\r\n")).decode().split("\r\n")
        pairs = (line.partition(":") for line in lines[1:] if line)
        return int(lines[0].split()[1]), {n.lower(): v.strip() for n, _, v in pairs}

    async def body(self, headers: dict[str, str]) -> bytes:
        return b"".join([piece async for piece in self.pieces(headers)])

    async def pieces(self, headers: dict[str, str]) -> Any:
        assert self._streams is not None
        reader = self._streams[0]
        if "chunked" not in headers.get("transfer-encoding", ""):
            yield await reader.readexactly(int(headers["content-length"]))
            return
        while size := int(await self._line(reader), 16):
            yield (await reader.readexactly(size + 2))[:-2]
        await self._line(reader)

    @staticmethod
    async def _line(reader: asyncio.StreamReader) -> bytes:
        if line := await reader.readline():
            return line
        raise EOFError("the server has closed the connection")

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


class Client:
    """Asks, and asks again, until it is time to stop."""

    def __init__(self, server: RunningServer, user: str, number: int, token: str) -> None:
        self._name, self._user, self._asked = f"{user}-{number}", user, 0
        self._random = Random(self._name)
        self._connection = Connection(server.url, f"Bearer {token}")

    async def run(self, until: float, into: list[Seen]) -> None:
        await asyncio.sleep(self._random.random())
        while time.time() < until:
            seen, pause = await self._ask()
            into.append(seen)
            # Whoever heeds all of Retry-After would hardly press on the limit.
            await asyncio.sleep(min(pause, 5.0) * self._random.uniform(0.5, 1.0))
        self._connection.close()

    async def _ask(self) -> tuple[Seen, float]:
        self._asked += 1
        random = self._random
        stream = random.random() < 0.6
        leaves = random.random() < 0.1
        most = random.choice((4, 8, 16, 32, MOST_TOKENS))
        body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": random.choice(QUESTIONS)}],
            "max_tokens": most,
            "min_tokens": most if random.random() < 0.5 else 0,
            "temperature": 1.0,
            "stream": stream,
        }
        if stream:
            body["stream_options"] = {"include_usage": True}
        if random.random() < 0.03:
            body["max_seconds"] = 0.01
        kind = "stream" if stream else "json"
        seen = Seen(self._user, f"{self._name}-{self._asked}", kind, time.time())
        await self._connection.send("shimmy/v1/chat/completions", body, seen.mark)
        pause = 0.0
        try:
            # A stream is left at an event of its answer; JSON at any moment.
            async with asyncio.timeout(random.uniform(0.0, 0.3) if leaves and not stream else None):
                pause = await self._answer(seen, random.randrange(1, 4) if leaves else 0)
        except TimeoutError:
            seen.outcome = "left"
        if seen.outcome == "left":
            self._connection.close()
        seen.ended = time.time()
        return seen, pause

    async def _answer(self, seen: Seen, leave_at: int) -> float:
        """Returns seconds after which to ask again."""
        status, headers = await self._connection.head()
        seen.id = headers.get("x-shimmy-request-id", "")
        if seen.kind == "stream" and status == 200:
            last: list[bytes] = []
            async for piece in self._connection.pieces(headers):
                events = [e for e in piece.split(b"\n\n") if e.startswith(b"data:")]
                seen.events += sum(b'"content":"' in e and b'"content":""' not in e for e in events)
                last = [*last, *events][-4:]
                if 0 < leave_at <= seen.events:
                    seen.outcome = "left"
                    return 0.0
            contents = [json.loads(e[5:]) for e in last if not e.endswith(b"[DONE]")]
            content = next((c for c in contents if "error" in c), contents[-1])
        else:
            content = json.loads(await self._connection.body(headers))
        if "error" in content:
            code = content["error"]["code"]
            seen.outcome = "limited" if status == 429 else f"error: {code}"
            seen.limit = content["error"]["message"].split()[0] if status == 429 else ""
            return float(headers.get("retry-after", 1)) if status == 429 else 0.0
        seen.outcome = "ok"
        seen.usage, seen.receipt = content["usage"], content["shimmy"]["receipt"]
        return 0.0


async def watch(connection: Connection, until: float, problems: list[str]) -> None:
    """What the server itself says of somebody's limits, twice a second."""
    while time.time() < until:
        await connection.send("shimmy/api/limits")
        _, headers = await connection.head()
        for name, row in json.loads(await connection.body(headers))["limits"].items():
            if row["used"] > row["limit"]:
                problems.append(f"shimmy/api/limits: {name} {row['used']} of {row['limit']}")
        await asyncio.sleep(0.5)
    connection.close()


# What must hold


async def press(server: RunningServer, gateway: Gateway, args: argparse.Namespace) -> Any:
    """What clients saw, what the watcher found, when the load began, and milliseconds of `api/status`
    before it and under it.
    """
    people = [f"person-{number:02}" for number in range(args.people)]
    tokens = {user: gateway.token(user) for user in people}
    seen: list[Seen] = []
    problems: list[str] = []
    loop = asyncio.get_running_loop()
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        # The model is loaded.
        await server.request("POST", "shimmy/v1/completions", {"model": MODEL, "prompt": "x"})
        quiet = min(20.0, args.seconds / 3)
        idle = await loop.run_in_executor(pool, probe, server.url, server.token, quiet)
        began = time.time()
        until = began + args.seconds
        clients = [
            Client(server, user, number, tokens[user])
            for number, user in zip(range(args.clients), itertools.cycle(people), strict=False)
        ]
        watcher = Connection(server.url, f"Bearer {tokens[people[-1]]}")
        probing = loop.run_in_executor(pool, probe, server.url, server.token, args.seconds)
        try:
            async with asyncio.timeout(args.seconds + 60):
                running = (client.run(until, seen) for client in clients)
                await asyncio.gather(*running, watch(watcher, until, problems))
        except TimeoutError:
            problems.append("some are not answered a minute after all was over")
        busy = await probing
    return seen, problems, (began, idle, busy)


def bench(args: argparse.Namespace) -> dict[str, Any]:
    limits = Limits(args.requests, args.tokens, args.concurrent, args.queued)
    with tempfile.TemporaryDirectory() as folder:
        gateway = Gateway(Path(folder))
        options = [*gateway.options, *limits.options, f"--ShimmyEngine.isolation={args.isolation}"]
        data = Path(folder, "data")
        before = os.getloadavg()
        with running_server(*options, environment={"JUPYTER_DATA_DIR": str(data)}) as server:
            seen, problems, (began, idle, busy) = asyncio.run(press(server, gateway, args))
            log = server.log.read_text()
        after = os.getloadavg()
        path = data / "shimmy_jupyter" / "audit" / "ledger.sqlite"
        verdict = verify(path)
        records = list(stored(path))
    if not verdict.ok or verdict.open_requests:
        problems.append(f"the ledger does not verify: {verdict}")
    problems += [line for line in log.splitlines() if line.startswith(("[E", "Traceback"))][:5]
    findings = Findings(seen, records)
    findings.check_accounts()
    rows = check_people(findings, limits, began)
    ok = [one for one in seen if one.outcome == "ok"]
    if strange := {one.outcome for one in seen} - OUTCOMES:
        problems.append(f"ended as nothing should: {sorted(strange)}")
    return {
        "clients": args.clients,
        "people": args.people,
        "seconds": args.seconds,
        "isolation": args.isolation,
        "limits": vars(limits),
        "requests": len(seen),
        "outcomes": dict(Counter(one.outcome for one in seen)),
        "refused_by": dict(Counter(one.limit for one in seen if one.limit)),
        "tokens_answered": sum(one.tokens for one in ok),
        "records": len(records),
        "answer_ms": stats.spread([(one.ended - one.sent) * 1e3 for one in ok]),
        "refusal_ms": stats.spread([(o.ended - o.sent) * 1e3 for o in seen if o.limit]),
        "status_idle_ms": {**stats.spread(idle), "n": len(idle)},
        "status_busy_ms": {**stats.spread(busy), "n": len(busy)},
        "by_person": rows,
        "load_average": [before, after],
        "problems": [*problems, *findings.problems],
    }


def show(found: dict[str, Any]) -> None:
    rows = found["by_person"].values()

    def extremes(values: Iterable[float]) -> str:
        each = list(values)
        return f"{min(each):g} to {max(each):g}"

    def times(name: str) -> str:
        each = found[name]
        return f"{each['p50']:.1f} / {each['p99']:.1f}" if each["p50"] is not None else "–"

    limits = found["limits"]
    table = [
        (
            "clients, people, seconds",
            f"{found['clients']}, {found['people']}, {found['seconds']:g}",
        ),
        ("isolation", found["isolation"]),
        ("requests sent", found["requests"]),
        *((f"  {outcome}", count) for outcome, count in sorted(found["outcomes"].items())),
        *((f"  refused by {name}", n) for name, n in sorted(found["refused_by"].items())),
        ("records in the ledger", found["records"]),
        ("answers, by person", extremes(row["answers"] for row in rows)),
        ("tokens answered, by person", extremes(row["tokens"] for row in rows)),
        *(
            (
                f"most {name} in 60 s, by person",
                f"{extremes(r['most'][name] for r in rows)} of {of}",
            )
            for name, of in (
                ("requests", limits["requests"]),
                ("tokens", limits["tokens"]),
                ("tokens_settled", limits["tokens"]),
            )
        ),
        ("longest without an answer, with budget", f"{extremes(r['hunger_s'] for r in rows)} s"),
        ("answers, ms, p50 / p99", times("answer_ms")),
        ("refusals, ms, p50 / p99", times("refusal_ms")),
        ("api/status idle, ms, p50 / p99", times("status_idle_ms")),
        ("api/status under load, ms, p50 / p99", times("status_busy_ms")),
        ("load average before, after", [round(one[0], 2) for one in found["load_average"]]),
    ]
    for name, value in table:
        print(f"{name:<42} {value}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--people", type=int, default=20)
    parser.add_argument("--isolation", choices=["none", "process"], default="process")
    parser.add_argument("--requests", type=int, default=120, help="of each person in a minute")
    parser.add_argument("--tokens", type=int, default=4000, help="of each person in a minute")
    parser.add_argument("--concurrent", type=int, default=4)
    parser.add_argument("--queued", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="10 seconds of 20 clients")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.quick:
        args.seconds, args.clients, args.people = 10.0, 20, 4
    found = bench(args)
    show(found)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(found, indent=2) + "\n")
    for problem in found["problems"][:20]:
        print(f"does not hold: {problem[:600]}")
    sys.exit(bool(found["problems"]))


if __name__ == "__main__":
    main()
