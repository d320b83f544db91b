"""`shimmy bench`: how fast one model answers on this machine, through the service that Jupyter uses.

Times are this process's `time.perf_counter`, in seconds. What cannot be measured is None and has its
reason in `left_out`; nothing is ever 0 for want of a number.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import dataclasses
import itertools
import math
import platform
import re
import statistics
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any

import psutil

from . import __version__
from .compose import build_service
from .config import Settings
from .engine import processors
from .engine.isolated import IsolatedBackend
from .engine.model import LoadedModel
from .errors import InvalidValue
from .service import CompletionService
from .types import CompletionRequest, FinishReason, ModelFacts, Principal, Sampling

Found = dict[str, Any]
Say = Callable[[str], None]

SEED = 0
LONG = 4
"""The long prompt is so many times as long as the others, where the context allows it."""
_NEVER = -1000.0
_IN_CACHE = 64 << 20
_READ = 256 << 20
_READS = 5
_NOT_DENSE = re.compile(r"moe|\d+x\d|\bA\d+(\.\d+)?B\b", re.IGNORECASE)
_WORDS = """the river keeps running past old stone houses while children throw small branches from a
wooden bridge and count how long each one takes to reach the mill where bread was made every morning
before anybody in town had heard of electric light or of trains that cross a whole country by night
farmers bring apples honey cheese and wool to market on Saturday then walk home under green trees"""


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """What to measure. `model` None is the first that is listed."""

    model: str | None = None
    clients: tuple[int, ...] = (1, 2, 4, 8)
    tokens: int = 64
    prompt_tokens: int = 256
    repeats: int = 3


def parse_clients(text: str) -> tuple[int, ...]:
    """ "1,2,4" → (1, 2, 4), ascending and each once. Raises ValueError that says what is wrong."""
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"[0-9]{1,4}", part) and int(part) for part in parts):
        raise ValueError(f"{text!r} is not a list of numbers from 1 to 9999, such as 1,2,4,8")
    return tuple(sorted({int(part) for part in parts}))


# Figures


def percentile(values: Sequence[float], percent: int) -> float | None:
    """The smallest value that so many percent do not exceed; None from too few to tell it from the
    largest.
    """
    if len(values) * (100 - percent) < 100 and (percent != 50 or not values):
        return None
    return sorted(values)[max(0, math.ceil(percent * len(values) / 100) - 1)]


def spread(seconds: Sequence[float], percents: Sequence[int]) -> dict[str, float | None]:
    """Percentiles in milliseconds."""
    found = {f"p{percent}": percentile(seconds, percent) for percent in percents}
    return {name: None if value is None else value * 1e3 for name, value in found.items()}


def median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def total_rate(answers: Sequence[Found]) -> float | None:
    """Tokens a second in all, from the first request to the end of the last answer."""
    seconds = max(a["done"] for a in answers) - min(a["sent"] for a in answers)
    tokens = sum(a["completion_tokens"] for a in answers)
    return tokens / seconds if tokens and seconds > 0 else None


def stream_rate(answer: Found) -> float | None:
    """Tokens a second of one answer after its first text."""
    times = answer["times"]
    if len(times) < 2 or times[-1] <= times[0]:
        return None
    return float((answer["completion_tokens"] - 1) / (times[-1] - times[0]))


def summarize(clients: int, rounds: Sequence[Sequence[Found]]) -> Found:
    """A row of the table, from the answers of every round with so many clients."""
    answers = [answer for one in rounds for answer in one]
    gaps = [b - a for answer in answers for a, b in itertools.pairwise(answer["times"])]
    firsts = [a["times"][0] - a["sent"] for a in answers if a["times"]]
    return {
        "clients": clients,
        "tokens_per_second": median([total_rate(one) for one in rounds]),
        "stream_tokens_per_second": median([stream_rate(answer) for answer in answers]),
        "first_token_ms": spread(firsts, (50, 95)),
        "inter_token_ms": spread(gaps, (50, 95, 99)),
        "answers": len(answers),
        "tokens": sum(answer["completion_tokens"] for answer in answers),
        "pieces": sum(len(answer["times"]) for answer in answers),
        "ended_early": sum(answer["reason"] == FinishReason.STOP for answer in answers),
    }


def limit(facts: Found, bandwidth: float | None, alone: float | None) -> tuple[Found | None, str]:
    """Steps a second that memory allows, and the share of it that one client gets; or why not."""
    size = facts["size_bytes"]
    if facts["offloaded_layers"]:
        return None, "layers are on a GPU, whose memory was not measured"
    if bandwidth is None:
        return None, "memory's bandwidth was not measured"
    if size < _IN_CACHE:
        return None, f"{size / 1e6:.1f} MB of weights may stay in the processor's caches"
    if _NOT_DENSE.search(f"{facts['architecture']} {facts['description']}"):
        return None, "a mixture of experts reads a part of its weights for a token"
    rate = bandwidth / size
    share = None if alone is None else alone / rate
    return {"bytes_per_token": size, "tokens_per_second": rate, "share_reached": share}, ""


def layout(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns, flush right."""
    lines = [head, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


# Measuring


class _Bench:
    """One run of a plan: the model, prompts that nobody has asked before, and where they end."""

    def __init__(self, service: CompletionService, model: str, plan: Plan, say: Say) -> None:
        self.service, self.model, self.plan, self.say = service, model, plan, say
        self.ends: list[int] = []
        self._random = Random(SEED)  # noqa: S311  nobody is to be surprised
        self._begin: tuple[int, ...] = ()
        self._words: list[int] = []

    async def learn(self, loaded: LoadedModel) -> None:
        """Ordinary tokens for prompts; and every special one, among which are all that end one."""
        forth = await loaded.encode(_WORDS)
        back = await loaded.encode(" ".join(reversed(_WORDS.split())))
        self._begin = forth[:1] if forth[:1] == back[:1] else ()
        ends = set()
        for text in filter(None, loaded.facts.special_tokens):
            tokens = await loaded.encode(text)
            alone = tokens[1:] if len(tokens) > 1 and tokens[:1] == self._begin else tokens
            if len(alone) == 1:
                ends.add(alone[0])
        self.ends = sorted(ends)
        self._words = sorted({*forth, *back} - ends - {*self._begin})

    def prompt(self, tokens: int) -> tuple[int, ...]:
        """Random words: no two prompts have enough in common to share it."""
        random = self._random.choices(self._words, k=tokens)
        return (*self._begin, *random)[:tokens]

    async def answer(self, prompt: tuple[int, ...], tokens: int) -> Found:
        request = CompletionRequest(
            request_id=uuid.uuid4().hex,
            principal=Principal("bench"),
            model=self.model,
            prompt=prompt,
            max_tokens=tokens,
            sampling=Sampling(seed=SEED, logit_bias=tuple((end, _NEVER) for end in self.ends)),
        )
        times: list[float] = []
        sent = time.perf_counter()
        async with await self.service.start(request) as completion:
            while texts := await completion.read():
                times += [time.perf_counter()] * len(texts)
            done, ended = time.perf_counter(), completion.ended
        usage = dataclasses.asdict(ended.usage)
        return {"sent": sent, "times": times, "done": done, "reason": str(ended.reason), **usage}

    async def together(self, clients: int) -> list[Found]:
        """So many answers at once."""
        plan = self.plan
        prompts = [self.prompt(plan.prompt_tokens) for _ in range(clients)]
        return await asyncio.gather(*(self.answer(p, plan.tokens) for p in prompts))

    async def throughput(self) -> list[Found]:
        """Every number of clients in each round: what changes meanwhile meets all alike."""
        runs = []
        for number in range(1, self.plan.repeats + 1):
            for clients in self.plan.clients:
                self.say(f"round {number} of {self.plan.repeats}: clients {clients}")
                answers = await self.together(clients)
                runs.append({"clients": clients, "round": number, "answers": answers})
        return runs

    async def long(self, context: int) -> list[Found]:
        """A long prompt alone, and at once the same again."""
        size = min(LONG * self.plan.prompt_tokens, context - 1)
        runs = []
        for number in range(1, self.plan.repeats + 1):
            self.say(f"round {number} of {self.plan.repeats}: a prompt of {size} tokens, twice")
            prompt = self.prompt(size)
            cold, warm = await self.answer(prompt, 1), await self.answer(prompt, 1)
            runs.append({"cold": cold, "warm": warm})
        return runs


async def measure(plan: Plan, settings: Settings, say: Say) -> Found:
    """Everything that was measured, as JSON can say it. Raises `ShimmyError`; `InvalidValue` has the
    option at fault as its `param`.
    """
    service = build_service(settings)
    try:
        if max(plan.clients) > settings.max_queue:
            raise InvalidValue(
                f"at most {settings.max_queue} (ShimmyEngine.max_queue)", param="--clients"
            )
        id = plan.model or str(await service.library.default(wait=True))
        say(f"loading {id}")
        # Once before, so that its bytes are known and have been tried out.
        await service.pool.resident(id)
        await service.pool.unload(id)
        before, began = _resident(), time.perf_counter()
        loaded = await service.pool.resident(id)
        load_seconds = time.perf_counter() - began
        _check_sizes(plan, loaded.facts)
        child = _child(loaded)
        memory = {
            "isolated": child is not None,
            "before_bytes": None if child else before,
            "loaded_bytes": _resident(child),
        }
        bench = _Bench(service, id, plan, say)
        await bench.learn(loaded)
        say("warming up")
        await bench.together(1)
        runs = await bench.throughput()
        long = await bench.long(loaded.facts.context_size)
        memory["at_end_bytes"] = _resident(child)
        say("reading memory")
        bandwidth, no_bandwidth = await asyncio.to_thread(read_memory, loaded.facts.threads)
    finally:
        await service.close()
    found = {
        "machine": machine(),
        "settings": _chosen(plan, settings, id, bench.ends),
        "model": _facts(loaded.facts, id),
        "load_seconds": load_seconds,
        "memory": memory,
        "bandwidth_bytes_per_second": bandwidth,
        "left_out": {"bandwidth": no_bandwidth} if no_bandwidth else {},
        "runs": {"throughput": runs, "long_prompt": long},
    }
    return found | conclude(found)


def conclude(found: Found) -> Found:
    """What follows from the raw measurements; adds to `left_out`."""
    left_out, plan = found["left_out"], found["settings"]
    rows = [
        summarize(n, [r["answers"] for r in found["runs"]["throughput"] if r["clients"] == n])
        for n in plan["clients"]
    ]
    colds, warms = (
        [run[side]["done"] - run[side]["sent"] for run in found["runs"]["long_prompt"]]
        for side in ("cold", "warm")
    )
    first = found["runs"]["long_prompt"][0]
    size = first["cold"]["prompt_tokens"]
    cold, warm = statistics.median(colds), statistics.median(warms)
    cached = min(run["warm"]["cached_tokens"] for run in found["runs"]["long_prompt"])
    if not cached:
        left_out["warm prefix"] = "nothing of the same prompt was found again"
    alone = next((r["stream_tokens_per_second"] for r in rows if r["clients"] == 1), None)
    allowed, why = limit(found["model"], found["bandwidth_bytes_per_second"], alone)
    if why:
        left_out["physical limit"] = why
    elif alone is None:
        left_out["share of the physical limit"] = "it needs 1 among the clients, and 2 tokens"
    return {
        "throughput": rows,
        "prefill": {"prompt_tokens": size, "seconds": cold, "tokens_per_second": size / cold},
        "warm_prefix": {"cached_tokens": cached, "seconds": warm, "times_sooner": cold / warm}
        if cached
        else None,
        "limit": allowed,
    }


def _check_sizes(plan: Plan, facts: ModelFacts) -> None:
    context, wanted = facts.context_size, plan.prompt_tokens + plan.tokens
    if wanted > context:
        raise InvalidValue(
            f"{plan.prompt_tokens}, and --tokens {plan.tokens}, are {wanted - context} more than "
            f"the model's context of {context}",
            param="--prompt-tokens",
        )


def _child(loaded: LoadedModel) -> int | None:
    backend = loaded.engine.backend
    return backend.pid if isinstance(backend, IsolatedBackend) else None


def _resident(pid: int | None = None) -> int | None:
    """Bytes in memory; None of a child that has ended."""
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return None


def _facts(facts: ModelFacts, id: str) -> Found:
    names = (
        "architecture", "description", "parameters", "size_bytes", "context_size", "kv_tokens",
        "threads", "offloaded_layers",
    )  # fmt: skip
    return {"id": id, **{name: getattr(facts, name) for name in names}}


def _chosen(plan: Plan, settings: Settings, id: str, ends: Sequence[int]) -> Found:
    names = ("max_sequences", "threads", "gpu_layers", "isolation")
    engine = {name: getattr(settings, name) for name in names}
    ours = {"model": id, "seed": SEED, "forbidden_tokens": len(ends)}
    return dataclasses.asdict(plan) | engine | ours


def read_memory(threads: int) -> tuple[float | None, str]:
    """Bytes a second that so many threads read, the median of a few times; or None, and why."""
    free = psutil.virtual_memory().available
    size = min(_READ, (2 << 30) // threads, free // 4 // threads)
    if size * threads < 2 * _IN_CACHE:
        return None, "too little memory is free to be read from"
    try:
        search = ctypes.CDLL(None).memchr
    except (TypeError, OSError, AttributeError):
        return None, "the C library's memchr was not found"
    search.argtypes, search.restype = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t), None
    # Written, as untouched pages are all the same one.
    blocks = [bytearray(b"\1") * size for _ in range(threads)]
    views = [(ctypes.c_char * size).from_buffer(block) for block in blocks]

    def once() -> float:
        workers = [threading.Thread(target=search, args=(view, 0, size)) for view in views]
        began = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return threads * size / (time.perf_counter() - began)

    return statistics.median(once() for _ in range(_READS)), ""


def machine() -> Found:
    return {
        "processor": _processor(),
        "cores": psutil.cpu_count(),
        "usable_cores": processors.available(),
        "memory_bytes": psutil.virtual_memory().total,
        "os": platform.platform(),
        "python": platform.python_version(),
        "llama_cpp_python": version("llama-cpp-python"),
        "shimmy_jupyter": __version__,
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        if found := re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE):
            return found[1].strip()
    return platform.processor() or platform.machine()
