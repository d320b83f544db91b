"""What somebody may use: an administrator's tables of limits, and how users tighten their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from ..errors import InvalidValue, UnknownParameter
from ..types import Principal

_LARGEST = 2**53
"""The largest whole number that every reader of JSON has exactly."""


@dataclass(frozen=True, slots=True)
class Limits:
    """None is off, 0 means none at all. Requests that wait are those that wait for their first token,
    so with `queued` 0 no request can begin. `seconds` is of one request, waiting included.
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    tokens_per_day: int | None = None
    """A day begins at midnight UTC."""
    concurrent: int | None = None
    queued: int | None = None
    prompt_tokens: int | None = None
    """Of one request."""
    completion_tokens: int | None = None
    """Of one request, all of its choices together."""
    seconds: float | None = None

    @property
    def counts_requests(self) -> bool:
        """Whether requests have to be counted over time."""
        return self.requests_per_minute is not None

    @property
    def counts_tokens(self) -> bool:
        """Whether tokens have to be counted over time."""
        return self.tokens_per_minute is not None or self.tokens_per_day is not None

    def tightest(self, *others: Limits) -> Limits:
        """Of each limit the least that any of them gives."""
        return _each(min, (self, *others))

    def merged(self, over: Limits) -> Limits:
        """These, with what `over` gives in their place."""
        return Limits(**{**self.given(), **over.given()})

    def given(self) -> dict[str, Any]:
        """Fields that are not off, by name."""
        return {name: value for name in _FIELDS if (value := getattr(self, name)) is not None}


_FIELDS = tuple(one.name for one in fields(Limits))
NAMES = {f"max_{name}": name for name in _FIELDS}
"""The field for each trait's name, which is also what people and clients see."""
_SHARED = {"requests_per_minute", "tokens_per_minute", "tokens_per_day", "concurrent", "queued"}


def _each(choose: Any, several: Sequence[Limits]) -> Limits:
    chosen = {}
    for name in _FIELDS:
        given = [value for one in several if (value := getattr(one, name)) is not None]
        chosen[name] = choose(given, default=None)
    return Limits(**chosen)


@dataclass(frozen=True, slots=True)
class LimitTable:
    """What one source of configuration says.

    `default` is for everybody. What `groups` gives replaces it for each member by themselves, and of
    several groups the most generous counts; a limit cannot be switched off so. `shared` is one budget
    that all members of a group have together. Raises ValueError for what cannot be shared.
    """

    default: Limits = field(default_factory=Limits)
    groups: Mapping[str, Limits] = field(default_factory=dict)
    shared: Mapping[str, Limits] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for group, limits in self.shared.items():
            for name in limits.given().keys() - _SHARED:
                shareable = ", ".join(f"max_{one}" for one in _FIELDS if one in _SHARED)
                raise ValueError(
                    f"max_{name} of group {group!r} cannot be shared, it is of one request; "
                    f"what can be: {shareable}"
                )

    def of(self, principal: Principal) -> Limits:
        """For this user alone."""
        theirs = [self.groups[name] for name in set(principal.groups) if name in self.groups]
        return self.default.merged(_each(max, theirs))

    def shared_of(self, principal: Principal) -> dict[str, Limits]:
        """By group, what this user has together with others."""
        return {name: self.shared[name] for name in sorted(set(principal.groups) & {*self.shared})}


@dataclass(frozen=True, slots=True)
class Account:
    """What a request is counted on: "user:NAME", or "group:NAME" for a budget of several users."""

    key: str
    limits: Limits

    @property
    def scope(self) -> str:
        """ "user", or the group's key: what may be said of it to its users."""
        return "user" if self.key.startswith("user:") else self.key


def effective(
    tables: Sequence[LimitTable], own: Limits, principal: Principal
) -> tuple[Account, ...]:
    """The user's account first, then one for each group with a budget; the tightest of all tables.

    `own` is what the user has tightened.
    """
    user = own.tightest(*(table.of(principal) for table in tables))
    shared: dict[str, Limits] = {}
    for table in tables:
        for group, limits in table.shared_of(principal).items():
            shared[group] = limits.tightest(shared.get(group, limits))
    groups = (Account(f"group:{group}", shared[group]) for group in sorted(shared))
    return (Account(f"user:{principal.name}", user), *groups)


def parsed(given: Mapping[str, Any]) -> Limits:
    """Limits by their traits' names; null is off. Raises UnknownParameter and InvalidValue."""
    return Limits(**{_field(name): _value(name, value) for name, value in given.items()})


def named(limits: Limits) -> dict[str, Any]:
    """The limits that are not off, by their traits' names."""
    return {f"max_{name}": value for name, value in limits.given().items()}


def tightened(current_own: Limits, asked: Mapping[str, Any], ceiling: Limits) -> Limits:
    """A user's own limits after what they ask for; null takes one's own limit back.

    Raises UnknownParameter for a name that is no limit, and InvalidValue for what is no number for it,
    or more than `ceiling`, which is what the administrator allows.
    """
    own = current_own.given()
    for name, value in asked.items():
        wanted = _value(name, value)
        most = getattr(ceiling, _field(name))
        if wanted is not None and most is not None and wanted > most:
            raise InvalidValue(f"{name} can be at most {most}, as configured", param=name)
        own[_field(name)] = wanted
    return Limits(**own)


def _field(name: str) -> str:
    if name not in NAMES:
        raise UnknownParameter(
            f"there is no limit {name[:64]!r}; the limits are {', '.join(NAMES)}", param=name[:64]
        )
    return NAMES[name]


def _value(name: str, value: Any) -> Any:
    whole = _field(name) != "seconds"
    if value is None:
        return None
    right_kind = type(value) is int or (not whole and type(value) is float)
    if not right_kind or not 0 <= value <= _LARGEST:
        kind = "a whole number" if whole else "a number of seconds"
        raise InvalidValue(f"{name} must be {kind}, 0 or more, or null", param=name)
    return value
