"""Policy, limits and the ledger together: one visit for each request, one record for each act."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from ..audit.ledger import Ledger, Query, Receipt
from ..audit.records import Entry
from ..audit.writer import StoreFailed
from ..core import policy
from ..core.budgets import Crowd, Standing
from ..core.limits import NAMES, Account, Limits, LimitTable, effective, named, tightened
from ..core.policy import Policy
from ..errors import AccessDenied, AuditUnavailable, RateLimitExceeded, ShimmyError
from ..offloop import off_loop
from ..types import Principal
from .asked import Asked
from .spending import Spending

T = TypeVar("T")

log = logging.getLogger("shimmy_jupyter.guard")

_PRUNE_EVERY = 3600.0
_PATIENCE = 5.0
"""Seconds for which the end of the service waits for requests to be settled: a client may read nothing."""
_DAY = 86_400


@dataclass(frozen=True, slots=True)
class Aside:
    """What is counted of a record, and not written in it."""

    reason: str | None = None
    """Why it was refused, in one of few words: `policy`, `policy:FIELD` or `limit:NAME`."""
    token_seconds: float | None = None
    """The mean time between two tokens of the first choice; None below two."""


Watcher = Callable[[Entry, str, Aside], None]
"""Hears of every record that is to be, with the route of its request; on the event loop."""
NOTHING = Aside()


@dataclass(frozen=True, slots=True)
class Rules:
    """What has been set. `retention` is in days; `locked` says why users cannot raise a limit."""

    policies: Sequence[Policy] = ()
    limits: Sequence[LimitTable] = ()
    admins: frozenset[str] = frozenset()
    admin_groups: frozenset[str] = frozenset()
    locked: Mapping[str, str] = field(default_factory=dict)
    record_content: bool = False
    fail_closed: bool = False
    retention: int | None = None

    def known(self, principal: Principal) -> Principal:
        """As this server sees them: an administrator by its own settings, too."""
        if principal.name in self.admins or not self.admin_groups.isdisjoint(principal.groups):
            return replace(principal, admin=True)
        return principal

    def fingerprint(self) -> dict[str, str]:
        """Of the policies and of the limits, to see whether they have changed."""
        return {
            name: hashlib.sha256(repr(_settled(value)).encode()).hexdigest()
            for name, value in (("policy", self.policies), ("limits", self.limits))
        }


def _settled(value: Any) -> Any:
    """The same for equal settings: sets have no order of their own."""
    if isinstance(value, Mapping):
        return sorted((key, _settled(one)) for key, one in value.items())
    if isinstance(value, frozenset):
        return sorted(value)
    if isinstance(value, list | tuple):
        return [_settled(one) for one in value]
    if hasattr(value, "__dataclass_fields__"):
        return _settled({name: getattr(value, name) for name in value.__dataclass_fields__})
    return value


class Guard:
    """`ledger` None: nothing is recorded. For one event loop."""

    def __init__(
        self,
        rules: Rules | None = None,
        spending: Spending | None = None,
        ledger: Ledger | None = None,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.rules = rules or Rules()
        self.spending = spending or Spending(None)
        self.ledger = ledger
        self.crowd = Crowd()
        self.clock = clock
        self.watchers: list[Watcher] = []
        self.unwritten = 0
        """How often records could not be written."""
        self.turns: dict[str, asyncio.Event] = {}
        """Of requests that wait for their turn, by id; set when it has come."""
        self.waiting: dict[str, tuple[str, Callable[[], int | None]]] = {}
        """Of open requests, by id: whose it is, and what says how many go before it."""
        self._open: set[str] = set()
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._own: dict[str, Limits] = {}
        self._tightening: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._pruned = -_PRUNE_EVERY
        self._announced = False

    # What may be

    def check(
        self, principal: Principal, action: str, model: str, also: Sequence[str] = ()
    ) -> None:
        """Raises `AccessDenied`."""
        known = self.rules.known(principal)
        raise_denied(policy.decide(self.rules.policies, known, action, model, also))

    def allows(self, principal: Principal, action: str, model: str) -> bool:
        known = self.rules.known(principal)
        return policy.decide(self.rules.policies, known, action, model).allowed

    def check_feature(self, name: str) -> None:
        """Raises `AccessDenied`."""
        raise_denied(policy.feature(self.rules.policies, name))

    # Limits

    async def accounts(self, principal: Principal) -> tuple[Account, ...]:
        """What a request of theirs is counted on; the user's own first."""
        return effective(self.rules.limits, await self._tightened(principal), principal)

    async def count(self, principal: Principal) -> None:
        """A request that computes no tokens. Raises `RateLimitExceeded`."""
        accounts = await self.accounts(self.rules.known(principal))
        found = await counted(self.spending.arrive("", accounts, self.clock()))
        if found is not None:
            raise RateLimitExceeded(found.message, limit=found.limit, retry_after=found.retry_after)

    async def _tightened(self, principal: Principal) -> Limits:
        # Read once: only this server writes it, or another of the same user's, whose word is heard
        # when this one starts again.
        if principal.name not in self._own:
            self._own[principal.name] = await counted(self.spending.own(principal.name))
        return self._own[principal.name]

    async def tighten(self, asked: Asked, wanted: Mapping[str, Any]) -> None:
        """Raises `InvalidValue` for more than the administrator allows, `UnknownParameter`, and
        `AuditUnavailable` where it cannot be kept.
        """
        name = asked.principal.name
        ceiling = effective(self.rules.limits, Limits(), asked.principal)[0].limits
        # What is on record and kept is the whole set, so it has to have in it what came before.
        async with self._tightening.setdefault(name, asyncio.Lock()):
            own = tightened(await self._tightened(asked.principal), wanted, ceiling)
            await self.record(asked, "limits", detail={"own": named(own)})
            self._own[name] = await counted(self.spending.tighten(name, own))

    async def limits(self, principal: Principal) -> dict[str, Any]:
        """What there is left, as `shimmy/api/limits` shows it."""
        own, *shared = accounts = await self.accounts(principal)
        standing = await counted(self.spending.look(accounts, self.clock()))
        return {
            "limits": self._shown(own, standing),
            "shared": {
                account.key.removeprefix("group:"): self._shown(account, standing)
                for account in shared
            },
            "own": named(await self._tightened(principal)),
            "locked": dict(self.rules.locked),
        }

    def _shown(
        self, account: Account, standing: Mapping[str, Mapping[str, Standing]]
    ) -> dict[str, Any]:
        counted = {**standing.get(account.key, {}), **self.crowd.look(account)}
        rows: dict[str, Any] = {}
        for name, given in NAMES.items():
            limit = getattr(account.limits, given)
            if name in counted:
                rows[name] = asdict(counted[name])
            elif limit is not None:
                # Of one request: there is nothing to use up.
                rows[name] = {"limit": limit, "used": None, "remaining": None, "resets_at": None}
        return rows

    def queue_position(self, principal: Principal) -> int | None:
        """How many go before the first of theirs that waits, as far as that has been heard; None where
        none waits.
        """
        places = [
            place
            for name, ask in self.waiting.values()
            if name == principal.name and (place := ask()) is not None
        ]
        return min(places, default=None)

    # Records

    async def act(
        self,
        asked: Asked,
        action: str,
        model: str | None = None,
        detail: Mapping[str, Any] | None = None,
    ) -> None:
        """Whether this may be done, on record before it is. Raises `AccessDenied`."""
        try:
            self.check(asked.principal, action, model or "")
        except AccessDenied as error:
            await self.record(asked, action, model, detail, error)
            raise
        await self.record(asked, action, model, detail)

    async def record(
        self,
        asked: Asked,
        action: str,
        model: str | None = None,
        detail: Mapping[str, Any] | None = None,
        error: ShimmyError | None = None,
    ) -> None:
        """What is about to be done, or was denied, on record."""
        entry = replace(
            self.entry(asked, "act", action),
            model=model,
            detail=detail,
            outcome="accepted" if error is None else "denied",
            code=None if error is None else error.code,
        )
        await self.written(self.write([entry], "act", Aside(reason_of(error))))

    def entry(self, asked: Asked, kind: str, action: str | None = None) -> Entry:
        """What all records have in common."""
        principal = self.rules.known(asked.principal)
        return Entry(
            kind,
            asked.request_id,
            self.clock(),
            principal.name,
            user_kind=principal.kind,
            groups=principal.groups,
            client_ip=asked.client_ip,
            request_path=asked.request_path,
            notebook=asked.notebook,
            cell=asked.cell,
            action=action,
        )

    def write(
        self, entries: Sequence[Entry], route: str, aside: Aside = NOTHING
    ) -> Future[list[Receipt]] | None:
        """Begin to write them; None where nothing is recorded."""
        for entry in entries:
            for watcher in self.watchers:
                try:
                    watcher(entry, route, aside)
                except Exception:  # who listens must not keep a record from being written
                    log.exception("a record was not heard of by all")
        if self.ledger is None:
            return None
        self._announce()
        self._prune()
        return self.ledger.append(entries)

    async def written(self, writing: Future[list[Receipt]] | None) -> Receipt | None:
        """The last one's receipt, once all are committed. Raises `AuditUnavailable` where they cannot be
        and have to be; otherwise the log and `shimmy/health` say so, and None is the receipt.
        """
        if writing is None:
            return None
        try:
            return (await awaited(writing))[-1]
        except StoreFailed as error:
            self.unwritten += 1
            if self.rules.fail_closed:
                raise AuditUnavailable(
                    "requests are answered only where they can be recorded, and they cannot"
                ) from error
        return None

    def _announce(self) -> None:
        """A change of the rules is an act of whoever changed the configuration: recorded at first use."""
        if self._announced or self.ledger is None:
            return
        self._announced = True
        self.later(self._announced_rules(self.ledger))

    async def _announced_rules(self, ledger: Ledger) -> None:
        now = self.rules.fingerprint()
        try:
            await awaited(ledger.append([]))  # what there is to read is there from then on
            last = Query(kind="act", action="policy")
            page = await off_loop(lambda: ledger.query(last, None, 1))
            before = page.records[0].get("detail", {}) if page.records else None
            if before != now:
                asked = Asked(Principal("server", kind="server"), "policy")
                entry = replace(self.entry(asked, "act", "policy"), detail=now, outcome="accepted")
                await awaited(ledger.append([entry]))
        except StoreFailed as error:
            log.error("the policy is not on record: %s", error)  # noqa: TRY400

    def _prune(self) -> None:
        days, now = self.rules.retention, self.clock()
        if days is None or self.ledger is None or now - self._pruned < _PRUNE_EVERY:
            return
        self._pruned = now
        self.later(self._pruned_before(self.ledger, now - days * _DAY))

    async def _pruned_before(self, ledger: Ledger, before: float) -> None:
        try:
            await awaited(ledger.prune(before))
        except StoreFailed as error:
            log.error("old records stay: %s", error)  # noqa: TRY400

    # Its own work

    def later(self, work: Coroutine[Any, Any, Any]) -> None:
        """Work that nobody waits for, but the end of the service does."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("what was to be settled was not", exc_info=error)

    def opened(self, id: str) -> None:
        """A request that will be settled and recorded; then it is `ended`."""
        self._open.add(id)
        self._quiet.clear()

    def ended(self, id: str) -> None:
        self._open.discard(id)
        if not self._open:
            self._quiet.set()

    def may_go(self, ids: Sequence[str]) -> None:
        """Their turn has come."""
        for id in ids:
            if (turn := self.turns.get(id)) is not None:
                turn.set()

    async def close(self) -> None:
        """Settle what is open, and write what is to be written."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_PATIENCE):
                await self._quiet.wait()
        while self._tasks:
            await asyncio.wait(self._tasks)
        await off_loop(self.spending.close)
        if self.ledger is not None:
            await off_loop(self.ledger.close)


def reason_of(error: BaseException | None) -> str | None:
    """Why something was refused, as `Aside` has it; None for any other error."""
    if isinstance(error, AccessDenied):
        return f"policy:{error.param}" if error.param else "policy"
    if isinstance(error, RateLimitExceeded):
        return f"limit:{error.limit}" if error.limit else "limit"
    return None


def raise_denied(decision: policy.Decision) -> None:
    """Raises `AccessDenied` with the decision's reason, unless it allows."""
    if not decision.allowed:
        raise AccessDenied(decision.reason, param=decision.param)


async def awaited(future: Future[T]) -> T:
    # What is done already need not go round the loop.
    return future.result() if future.done() else await asyncio.wrap_future(future)


async def counted(work: Future[T]) -> T:
    """Raises `AuditUnavailable` where what has been used cannot be kept: then nothing is given away."""
    try:
        return await awaited(work)
    except StoreFailed as error:
        raise AuditUnavailable(f"what has been used cannot be counted: {error}") from error
