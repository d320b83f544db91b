"""Whether limits and the ledger hold under load, and what they cost.

    python benchmarks/guard.py [--seconds 120] [--clients 200] [--people 20] [--isolation process]
    python benchmarks/guard.py --quick      10 seconds of 20 clients
    python benchmarks/guard.py --ledger     what two records cost a request; 100,000 of them

A real server with the bundled model, and people whom JWTs name. Each has several clients that ask
again at once when they are answered, so that everybody is at their limits all the time: streams and
JSON, some left amid their answer, some with a deadline. Then every claim is checked against what
the clients saw and against the ledger; where one does not hold the exit code is 1.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import urlsplit

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "scripts")]

import stats  # noqa: E402
from kernel_session import RunningServer, running_server  # noqa: E402

from shimmy_jupyter.audit.ledger import Entry, Ledger, Query  # noqa: E402
from shimmy_jupyter.audit.verify import verify  # noqa: E402

ISSUER, AUDIENCE, KEY = "https://login.test/realms/lab", "jupyter", "bench"
WINDOW = 60.0
MOST_TOKENS = 48
NEED = 20 + MOST_TOKENS
"""More than any request here reserves."""
PATIENCE = 10.0
"""Seconds after which somebody starves who has budget and clients that ask."""
FAIR = 0.7
"""The least that somebody may get of what another gets, with equal limits."""
QUESTIONS = ("What does len do?", "What does zip do?", "What is a list?", "Say more about that.")
MODEL = "self-test"
OUTCOMES = {"ok", "left", "limited", "error: deadline_exceeded"}


@dataclass(frozen=True)
class Limits:
    """Of each person."""

    requests: int
    tokens: int
    concurrent: int
    queued: int

    @property
    def options(self) -> list[str]:
        return [
            f"--ShimmyLimits.max_requests_per_minute={self.requests}",
            f"--ShimmyLimits.max_tokens_per_minute={self.tokens}",
            f"--ShimmyLimits.max_concurrent={self.concurrent}",
            f"--ShimmyLimits.max_queued={self.queued}",
        ]


@dataclass
class Seen:
    """A request as its client saw it. Times are unix seconds; `mark` is what the ledger has as its cell."""

    user: str
    mark: str
    kind: str
    sent: float
    ended: float = 0.0
    outcome: str = ""
    id: str = ""
    limit: str = ""
    """Which one it met, if it did."""
    events: int = 0
    usage: dict[str, Any] = field(default_factory=dict)
    receipt: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return int(self.usage.get("total_tokens", 0))


# The server


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


class Findings:
    """What the ledger has of each request, beside what its client saw."""

    def __init__(self, seen: Sequence[Seen], records: Sequence[dict[str, Any]]) -> None:
        self.seen = seen
        self.problems: list[str] = []
        self.begins: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self.ends: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for record in records:
            if record["kind"] != "act" and record["user"] != "local":
                found = self.begins if record["kind"] == "begin" else self.ends
                found[record.get("cell", "")].append(record)

    def check_accounts(self) -> None:
        marks = {one.mark for one in self.seen}
        if strange := (self.begins.keys() | self.ends.keys()) - marks:
            self.problems.append(f"records of requests that nobody sent: {sorted(strange)[:3]}")
        for one in self.seen:
            begins, ends = self.begins[one.mark], self.ends[one.mark]
            if len(begins) != 1 or len(ends) != 1:
                self.problems.append(f"{one}: {len(begins)} begin, {len(ends)} end")
                continue
            if said := _differs(one, begins[0], ends[0]):
                self.problems.append(f"{one}: {said}: {ends[0]}")
        ledger, clients = (
            sum(
                _tokens(self.ends[one.mark][0]) if which else one.tokens
                for one in self.seen
                if one.outcome == "ok" and self.ends[one.mark]
            )
            for which in (True, False)
        )
        if ledger != clients:
            self.problems.append(f"{ledger} tokens in the ledger, {clients} as clients saw it")

    def most(self, user: str) -> dict[str, int]:
        """Most of requests and of tokens in any 60 seconds: as clients saw it, those that lay wholly
        within them; as the ledger has it, tokens by when they were settled.
        """
        theirs = [one for one in self.seen if one.user == user and one.outcome != "limited"]
        spans = [(one.sent, one.ended) for one in theirs]
        settled = [(end := _time(self._end(one)), end, _tokens(self._end(one))) for one in theirs]
        return {
            "requests": _most([(*span, 1) for span in spans]),
            "tokens": _most([(*span, one.tokens) for span, one in zip(spans, theirs, strict=True)]),
            "tokens_settled": _most(settled),
        }

    def _end(self, one: Seen) -> dict[str, Any]:
        return next(iter(self.ends[one.mark]), {"timestamp": "1970-01-01T00:00:00Z"})

    def hunger(self, user: str, limits: Limits, began: float) -> float:
        """Longest time in seconds without an answer to somebody with a request in progress, or with
        budget for one, from when the load `began`.
        """
        theirs = [one for one in self.seen if one.user == user]
        charged = sorted(one.sent for one in theirs if one.limit != "max_requests_per_minute")
        served = [one for one in theirs if one.outcome != "limited"]
        ends = sorted((_time(self._end(one)), _tokens(self._end(one))) for one in served)
        spans = [(one.sent, _time(self._end(one))) for one in served]
        now, last = began, max(one.ended for one in theirs)
        since, longest = now, 0.0
        answered = [end for end, _ in ends]
        while now < last:
            # A whole second of grace, as amounts count for all of the second in which they came.
            requests = sum(now - WINDOW - 1 <= sent <= now for sent in charged)
            tokens = sum(count for end, count in ends if now - WINDOW - 1 <= end <= now)
            room = requests < limits.requests and tokens + NEED <= limits.tokens
            busy = any(sent <= now < end for sent, end in spans)
            came = max((end for end in answered if end <= now), default=since)
            since = max(since, came) if room or busy else now
            longest = max(longest, now - since)
            now += 0.1
        return longest


def _differs(one: Seen, begin: dict[str, Any], end: dict[str, Any]) -> str:
    """What the records say otherwise than the client saw it."""
    code = end.get("code")
    recorded = f"error: {code}" if end["outcome"] == "error" else end["outcome"]
    # Who leaves does not see how it ended: it may have been over by then.
    left = {"cancelled", "ok", "limited", "error: deadline_exceeded"}
    if recorded not in (left if one.outcome == "left" else {one.outcome}):
        return "another outcome"
    if {begin["user"], end["user"]} != {one.user}:
        return "another's"
    if begin["request_id"] != end["request_id"] or one.id not in ("", end["request_id"]):
        return "another request id"
    if one.outcome == "left" and end.get("tokens_generated", 0) < one.events:
        return "fewer tokens than have been seen"
    if one.outcome != "ok":
        return ""
    counted = (
        end["prompt_tokens"], end["tokens_generated"], end["cached_tokens"], end["seq"],
        end["leaf_hash"],
    )  # fmt: skip
    told = (
        one.usage["prompt_tokens"],
        one.usage["completion_tokens"],
        one.usage["prompt_tokens_details"]["cached_tokens"],
        one.receipt["seq"],
        one.receipt["leaf_hash"],
    )
    return "" if counted == told else f"told {told}, recorded {counted}"


def _tokens(end: dict[str, Any]) -> int:
    return int(end.get("prompt_tokens", 0) + end.get("tokens_generated", 0))


def _time(record: dict[str, Any]) -> float:
    return datetime.fromisoformat(record["timestamp"]).timestamp()


def _most(spans: Sequence[tuple[float, float, int]]) -> int:
    return max(
        (
            sum(n for begin, end, n in spans if begin >= start and end <= start + WINDOW)
            for start, _, _ in spans
        ),
        default=0,
    )


# Two minutes


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


def stored(path: Path) -> Iterator[dict[str, Any]]:
    with contextlib.closing(Ledger(path)) as ledger:
        last = -1
        while page := ledger.stored(Query(), last):
            for one in page:
                yield {**json.loads(one.body or "{}"), "leaf_hash": one.leaf_hash}
            last = page[-1].seq


def check_people(findings: Findings, limits: Limits, began: float) -> dict[str, dict[str, Any]]:
    say = findings.problems.append
    rows: dict[str, dict[str, Any]] = {}
    for user in sorted({one.user for one in findings.seen}):
        ok = [one for one in findings.seen if one.user == user and one.outcome == "ok"]
        most = findings.most(user)
        hunger = findings.hunger(user, limits, began)
        for name, count in most.items():
            limit = limits.requests if name == "requests" else limits.tokens
            if count > limit:
                say(f"{user}: {count} {name} in 60 s, of {limit}")
        if hunger > PATIENCE:
            say(f"{user} had budget, and no answer for {hunger:.1f} s")
        answers = {"answers": len(ok), "tokens": sum(one.tokens for one in ok)}
        rows[user] = {**answers, "most": most, "hunger_s": round(hunger, 1)}
    shares = [row["tokens"] for row in rows.values()]
    if min(shares) < FAIR * max(shares):
        say(f"with equal limits, {min(shares)} tokens for one and {max(shares)} for another")
    return rows


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


# What the ledger costs


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
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--people", type=int, default=20)
    parser.add_argument("--isolation", choices=["none", "process"], default="process")
    parser.add_argument("--requests", type=int, default=120, help="of each person in a minute")
    parser.add_argument("--tokens", type=int, default=4000, help="of each person in a minute")
    parser.add_argument("--concurrent", type=int, default=4)
    parser.add_argument("--queued", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="10 seconds of 20 clients")
    parser.add_argument("--ledger", action="store_true", help="what the ledger costs, instead")
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.quick:
        args.seconds, args.clients, args.people = 10.0, 20, 4
    found = ledger_cost(args) if args.ledger else bench(args)
    (show_cost if args.ledger else show)(found)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(found, indent=2) + "\n")
    for problem in found["problems"][:20]:
        print(f"does not hold: {problem[:600]}")
    sys.exit(bool(found["problems"]))


if __name__ == "__main__":
    main()
