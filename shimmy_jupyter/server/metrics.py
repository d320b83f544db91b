"""What is counted, for Jupyter's own `/metrics`. No label says who somebody is.

Counters are the process's, as Prometheus has it: they outlive a service. What is looked at when
somebody asks is read at once; the ledger's file is read in a thread, and not waited for.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections import Counter as Counts
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import REGISTRY, Counter, Histogram
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector, CollectorRegistry

from ..audit.ledger import Ledger
from ..audit.records import Entry
from ..audit.writer import StoreFailed
from ..engine.statistics import EngineStatistics
from ..guard.guard import Aside
from ..models.jobs import Job
from ..service import CompletionService

log = logging.getLogger("shimmy_jupyter.metrics")

_PATIENCE = 0.05
"""Seconds for which a look at the ledger's file is waited for; then the look before it counts."""
_BATCHES = (1, 2, 4, 8, 16, 32, 64)
_FIRST = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_BETWEEN = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_WHOLE = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

_GAUGES = {
    "shimmy_queue_depth": "Sequences that wait for a place in a batch, and requests that wait for "
    "others of their user's",
    "shimmy_kv_tokens_used": "Cells of KV caches that are set aside for running sequences: of each its "
    "prompt and as much as it may still say",
    "shimmy_kv_tokens_capacity": "Cells of the KV caches of all resident models",
    "shimmy_models_resident": "Models in memory",
    "shimmy_models_resident_bytes": "What they take, weights and KV caches, about",
    "shimmy_ledger_records": "Records of the ledger, erased ones included",
    "shimmy_ledger_bytes": "Size of the ledger's file and of the journals beside it",
    "shimmy_ledger_lag": "Pieces of work that the ledger has not committed yet, about",
}
_BATCH = "shimmy_batch_size", "Sequences in a step of an engine"
_FAILURES = (
    "shimmy_ledger_failures",
    "Times that records of a request or an act could not be written",
)
_JOBS = {"probe": "probes", "pull": "pulls", "load": "loads"}


class Metrics(Collector):
    """Of every service that is attached; in `registry` while there is one."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._registry = registry
        self._attached: dict[CompletionService, _Attached] = {}
        self._lock = threading.Lock()
        self._engines: dict[int, EngineStatistics] = {}
        """All that there ever were, a few numbers each, by their ids."""
        self._unwritten = 0
        self.requests = _counter("requests", "Requests that have ended", "route", "code")
        self.denied = _counter("denied", "Requests and acts that were refused", "reason")
        self.tokens = _counter("tokens", "Tokens of requests that have ended", "kind")
        self.jobs = {
            kind: _counter(name, f"Jobs that have ended: {kind}", "outcome")
            for kind, name in _JOBS.items()
        }
        self.first = _histogram(
            "time_to_first_token_seconds", "Of each answer, from its arrival", _FIRST
        )
        self.between = _histogram(
            "inter_token_seconds", "Mean time between two tokens, once for each request", _BETWEEN
        )
        self.whole = _histogram(
            "request_seconds", "From a request's arrival to its end", _WHOLE, "route"
        )

    def attach(self, service: CompletionService) -> Callable[[], None]:
        """Count what it does from now on. What is returned ends that; both may be called twice."""
        with self._lock:
            if service not in self._attached:
                if not self._attached:
                    self._registry.register(self)
                self._attached[service] = attached = _Attached(self, service)
                service.guard.watchers.append(attached.heard)
                service.library.jobs.watchers.append(self.job_ended)
        return functools.partial(self._detach, service)

    def _detach(self, service: CompletionService) -> None:
        with self._lock:
            attached = self._attached.pop(service, None)
            if attached is None:
                return
            service.guard.watchers.remove(attached.heard)
            service.library.jobs.watchers.remove(self.job_ended)
            self._unwritten += service.guard.unwritten - attached.unwritten_before
            if not self._attached:
                self._registry.unregister(self)

    # What happens

    def ended(self, entry: Entry, route: str, aside: Aside) -> None:
        """A request has."""
        self.requests.labels(route, entry.code or "ok").inc()
        for kind, count in (
            ("prompt", entry.prompt_tokens),
            ("completion", entry.tokens_generated),
            ("cached", entry.cached_tokens),
        ):
            self.tokens.labels(kind).inc(count or 0)
        if entry.duration_ms is not None:
            self.whole.labels(route).observe(entry.duration_ms / 1000)
        if entry.time_to_first_token_ms is not None:
            self.first.observe(entry.time_to_first_token_ms / 1000)
        if aside.token_seconds is not None:
            self.between.observe(aside.token_seconds)

    def refused(self, reason: str) -> None:
        self.denied.labels(reason).inc()

    def job_ended(self, job: Job) -> None:
        if (counter := self.jobs.get(job.kind)) is not None:
            outcome = job.state
            if job.kind == "probe" and job.result is not None:
                outcome = job.result["outcome"]
            counter.labels(outcome).inc()

    def remember(self, engines: Iterable[EngineStatistics]) -> None:
        """What these have counted stays counted when they are gone."""
        with self._lock:
            self._engines.update((id(statistics), statistics) for statistics in engines)

    # What is asked

    def describe(self) -> Iterator[Metric]:
        yield from self._kept()
        for name, text in _GAUGES.items():
            yield GaugeMetricFamily(name, text)
        yield HistogramMetricFamily(*_BATCH)
        yield CounterMetricFamily(*_FAILURES)

    def collect(self) -> Iterator[Metric]:
        yield from self._kept()
        with self._lock:
            attached = [*self._attached.values()]
            unwritten = self._unwritten
        values: Counts[str] = Counts()
        for one in attached:
            values.update(one.gauges())
            unwritten += one.service.guard.unwritten - one.unwritten_before
        for name, text in _GAUGES.items():
            yield GaugeMetricFamily(name, text, value=values.get(name))
        yield self._batches(attached)
        yield CounterMetricFamily(*_FAILURES, value=unwritten)

    def _kept(self) -> Iterator[Metric]:
        kept = (self.requests, self.denied, self.tokens, *self.jobs.values())
        for counter in (*kept, self.first, self.between, self.whole):
            yield from counter.collect()

    def _batches(self, attached: list[_Attached]) -> Metric:
        for one in attached:
            self.remember(one.engines())
        with self._lock:
            engines = [*self._engines.values()]
        rows: Counts[int] = Counts()
        for statistics in engines:
            rows.update(dict(statistics.rows))
        below = [sum(n for size, n in rows.items() if size <= most) for most in _BATCHES]
        buckets = [*zip(map(str, map(float, _BATCHES)), below, strict=True), ("+Inf", rows.total())]
        weight = sum(size * n for size, n in rows.items())
        return HistogramMetricFamily(*_BATCH, buckets=buckets, sum_value=weight)


class _Attached:
    """A service, and what is known of its ledger."""

    def __init__(self, metrics: Metrics, service: CompletionService) -> None:
        self.service = service
        self.unwritten_before = service.guard.unwritten
        self._metrics = metrics
        ledger = service.guard.ledger
        self._ledger = None if ledger is None else _LedgerSize(ledger)

    def heard(self, entry: Entry, route: str, aside: Aside) -> None:
        if aside.reason is not None and entry.kind != "begin":
            self._metrics.refused(aside.reason)
        if entry.kind == "end":
            self._metrics.ended(entry, route, aside)
            self._metrics.remember(self.engines())

    def engines(self) -> list[EngineStatistics]:
        return [model.engine.statistics for model in self.service.pool.loaded()]

    def gauges(self) -> dict[str, int]:
        guard, loaded = self.service.guard, self.service.pool.loaded()
        now = [model.engine.snapshot() for model in loaded]
        found = {
            "shimmy_queue_depth": sum(one.waiting for one in now) + len(guard.turns),
            "shimmy_kv_tokens_used": sum(one.kv_used for one in now),
            "shimmy_kv_tokens_capacity": sum(one.kv_total for one in now),
            "shimmy_models_resident": len(loaded),
            "shimmy_models_resident_bytes": sum(model.memory_bytes for model in loaded),
            "shimmy_ledger_lag": 0,
        }
        if guard.ledger is not None and self._ledger is not None:
            found["shimmy_ledger_lag"] = guard.ledger.lag
            if (size := self._ledger.look()) is not None:
                found["shimmy_ledger_records"], found["shimmy_ledger_bytes"] = size
        return found


class _LedgerSize:
    """Records and bytes of a ledger, which may be on a disk that hangs."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._known: tuple[int, int] | None = None
        self._looking: threading.Thread | None = None

    def look(self) -> tuple[int, int] | None:
        """As it is now, or was when it last answered; None where it cannot be read."""
        if self._looking is None or not self._looking.is_alive():
            self._looking = threading.Thread(target=self._look, name="shimmy-metrics", daemon=True)
            self._looking.start()
        self._looking.join(_PATIENCE)
        return self._known

    def _look(self) -> None:
        ledger = self._ledger
        try:
            # To ask it makes the file, which is for the first record to do.
            there = ledger.path.exists()
            self._known = (ledger.size, ledger.bytes) if there else (0, 0)
        except (StoreFailed, OSError) as error:
            self._known = None
            log.debug("the ledger's size is not known: %s", error)


def _counter(name: str, text: str, *labels: str) -> Counter:
    return Counter(f"shimmy_{name}", text, labels, registry=None)


def _histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
    return Histogram(f"shimmy_{name}", text, labels, buckets=buckets, registry=None)


METRICS = Metrics()
"""Jupyter's `/metrics` shows the process's one registry."""
