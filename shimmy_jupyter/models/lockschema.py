"""What a lock may hold: its values, and the closed schema that they are read by. See lockfile.py."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from datetime import UTC, datetime, timedelta
from typing import Any

from ..errors import InvalidValue

_SHARD = re.compile(r"-([0-9]{5})-of-([0-9]{5})\.gguf$", re.IGNORECASE)
_URL = re.compile(
    r"https://(?:[A-Za-z0-9][A-Za-z0-9.-]*|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?"
    r"/[A-Za-z0-9._~!$&'()*+,;=:@%/-]+"
)


class LockError(InvalidValue):
    """What is wrong with a lock, or with what was asked of it. `key`, which is the field that is named
    to users too, is the path of the key, such as `models.tutor.sha256`; empty where there is none.
    Messages name no folder of this machine.
    """

    def __init__(self, message: str, key: str = "") -> None:
        super().__init__(f"{key}: {message}" if key else message, param=key or None)
        self.message = message
        self.key = key


@dataclass(frozen=True, slots=True)
class Source:
    """Where a file can be had: a repository of a hub at a commit, and the folder in it; or a URL."""

    repo: str | None = None
    revision: str | None = None
    folder: str | None = None
    url: str | None = None


@dataclass(frozen=True, slots=True)
class Defaults:
    """Sampling where a request does not say; None is left to the server. As in `types.Sampling`."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter, by the SHA-256 of its file, and what its weights are multiplied by."""

    name: str
    sha256: str
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Pin:
    """What an alias stands for. `size` is in bytes, of all files of a split model; `parts` are the
    SHA-256 of those after the first, in order; `chat_template` is that of the template's UTF-8;
    `context_size` is in tokens. What is None is not pinned. Adapters are sorted by name.
    """

    file: str
    size: int
    sha256: str
    parts: tuple[str, ...] = ()
    source: Source | None = None
    chat_template: str | None = None
    context_size: int | None = None
    sampling: Defaults = field(default_factory=Defaults)
    adapters: tuple[Adapter, ...] = ()
    engine: str | None = None
    locked_at: datetime | None = None

    def __post_init__(self) -> None:
        ordered = tuple(sorted(self.adapters, key=lambda adapter: adapter.name))
        object.__setattr__(self, "adapters", ordered)


@dataclass(frozen=True, slots=True)
class Override:
    """What a profile has for an alias: another alias' pin, another context in tokens, or both."""

    use: str | None = None
    context_size: int | None = None


Profile = Mapping[str, Override]
"""By alias; what it does not name is as pinned."""


@dataclass(frozen=True, slots=True)
class Lock:
    """Pins by alias, profiles by name. Raises `LockError` for profiles that lead nowhere."""

    models: Mapping[str, Pin] = field(default_factory=dict)
    profiles: Mapping[str, Profile] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, profile in self.profiles.items():
            _check_profile(profile, self.models, _at("profiles", name))


# The schema. A rule takes a value and the path of its key, and returns what the lock holds.

_Rule = Callable[[Any, str], Any]


def _text(pattern: str, right: str) -> _Rule:
    compiled = re.compile(pattern)

    def rule(value: Any, key: str) -> str:
        if not isinstance(value, str) or not compiled.fullmatch(value):
            raise LockError(f"must be {right}", key)
        return value

    return rule


def _whole(low: int, high: int) -> _Rule:
    def rule(value: Any, key: str) -> int:
        if type(value) is not int or not low <= value <= high:
            raise LockError(f"must be a whole number from {low} to {high}", key)
        return value

    return rule


def _real(low: float, high: float, *, above: bool = False) -> _Rule:
    def rule(value: Any, key: str) -> float:
        if type(value) not in {int, float} or not low <= value <= high or (above and value == low):
            begins = f"above {low:g}, up" if above else f"from {low:g}"
            raise LockError(f"must be a number {begins} to {high:g}", key)
        return float(value) + 0.0  # no -0.0, which equals 0.0 and is written otherwise

    return rule


@dataclass(frozen=True, slots=True)
class _Table:
    """A table of known keys. `check` looks at what was made of it as a whole."""

    kind: Any
    rules: Mapping[str, _Rule]
    check: Callable[[Any, str], None] = lambda made, key: None

    def __call__(self, value: Any, key: str) -> Any:
        for name in _table(value, key):
            if name not in self.rules:
                known = ", ".join(self.rules)
                raise LockError(f"there is no such key; there are {known}", _at(key, name))
        for name in self.required():
            if name not in value:
                raise LockError("is missing", _at(key, name))
        given = [name for name in self.rules if name in value]
        made = self.kind(**{name: self.rules[name](value[name], _at(key, name)) for name in given})
        self.check(made, key)
        return made

    def required(self) -> list[str]:
        kinds = fields(self.kind)
        return [f.name for f in kinds if f.default is MISSING and f.default_factory is MISSING]


@dataclass(frozen=True, slots=True)
class _Named:
    """A table whose keys are the user's."""

    rule: _Rule

    def __call__(self, value: Any, key: str) -> dict[str, Any]:
        found = sorted(_table(value, key).items())
        return {_ALIAS(n, _at(key, n)): self.rule(v, _at(key, n)) for n, v in found}


@dataclass(frozen=True, slots=True)
class _Array:
    rule: _Rule

    def __call__(self, value: Any, key: str) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise LockError("must be an array", key)
        return tuple(self.rule(v, f"{key}[{i}]") for i, v in enumerate(value))


def as_key(name: str) -> str:
    """As TOML writes it; of one that no lock can have, something that fails to parse or is refused."""
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name)


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """That there is no such model or profile, and which there are."""
    there = ", ".join(sorted(known)[:20]) or "none"
    return f"there is no {kind} {name[:128]!r} in the lock; there are: {there}"


def _at(key: str, name: str) -> str:
    shown = as_key(name[:128])
    return f"{key}.{shown}" if key else shown


def _table(value: Any, key: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise LockError("must be a table", key)
    return value


def _file(value: Any, key: str) -> str:
    # What is not printable includes line ends, and what turns the direction of writing around.
    plain = isinstance(value, str) and value.isprintable() and 0 < len(value.encode()) < 256
    if not plain or value in {".", ".."} or re.search(r"[/\\]|^~|^[A-Za-z]:", value):
        raise LockError("must be a file's name, without folders", key)
    return str(value)


def _folder(value: Any, key: str) -> str:
    parts = value.split("/") if isinstance(value, str) else [value]
    try:
        return "/".join(_file(part, key) for part in parts)
    except LockError:
        right = "must be a folder of the repository, without '..' and a '/' at either end"
        raise LockError(right, key) from None


def _url(value: Any, key: str) -> str:
    good = isinstance(value, str) and len(value) <= 2048 and _URL.fullmatch(value)
    if not good or value.endswith("/") or ".." in value.split("/"):
        # The value is not repeated: what is wrong with it may be that it holds a password.
        right = "an https URL of a file, without user, password, query, fragment and '..'"
        raise LockError(f"must be {right}", key)
    return str(value)


def _time(value: Any, key: str) -> datetime:
    if isinstance(value, datetime) and value.utcoffset() == timedelta(0) and not value.microsecond:
        return value.astimezone(UTC)
    raise LockError("must be a time in UTC in whole seconds, as 2026-01-31T12:00:00Z", key)


def _check_source(source: Source, key: str) -> None:
    hub = (source.repo, source.revision)
    if (None in hub) if source.url is None else (hub != (None, None) or source.folder is not None):
        raise LockError("must have either repo and revision, or url", key)


def _check_pin(pin: Pin, key: str) -> None:
    shard = _SHARD.search(pin.file)
    if shard and shard[1] != "00001":
        raise LockError("must name the first file of the split model", _at(key, "file"))
    others = max(int(shard[2]) - 1, 0) if shard else 0
    if len(pin.parts) != others:
        right = f"must have {others} hashes, one for each further file of the model"
        raise LockError(right, _at(key, "parts"))
    names = [adapter.name for adapter in pin.adapters]
    if len(set(names)) < len(names):
        raise LockError("must name each adapter once", _at(key, "adapters"))


def _check_override(override: Override, key: str) -> None:
    if override == Override():
        raise LockError("must have use, context_size or both", key)


def _check_profile(profile: Profile, models: Mapping[str, Pin], key: str) -> None:
    for alias, override in profile.items():
        if alias not in models:
            raise LockError(unknown("model", alias, models), _at(key, alias))
        if override.use is not None and override.use not in models:
            raise LockError(unknown("model", override.use, models), _at(_at(key, alias), "use"))
    done: set[str] = set()  # none of them leads into a circle; each is walked once
    for alias in profile:
        seen: dict[str, None] = {}
        at: str | None = alias
        while at is not None and at in profile and at not in done:
            if at in seen:
                circle = " → ".join([*list(seen)[:5], "…"])
                raise LockError(f"goes in a circle: {circle}", _at(_at(key, at), "use"))
            seen[at] = None
            at = profile[at].use
        done.update(seen)


_ALIAS = _text(
    r"(?!\.{1,2}$)[A-Za-z0-9._:@-]{1,128}", "a name of up to 128 of A-Z a-z 0-9 . _ : @ -"
)
_SHA256 = _text(r"[0-9a-f]{64}", "a SHA-256: 64 hex digits in lower case")
_TOKENS = _whole(1, 2**31 - 1)
_PIN = _Table(
    Pin,
    {
        "file": _file,
        "size": _whole(1, 2**63 - 1),
        "sha256": _SHA256,
        "parts": _Array(_SHA256),
        "source": _Table(
            Source,
            {
                "repo": _text(
                    r"(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}",
                    "owner/name",
                ),
                "revision": _text(
                    r"[0-9a-f]{40}", "a commit: 40 hex digits; branches and tags move"
                ),
                "folder": _folder,
                "url": _url,
            },
            _check_source,
        ),
        "chat_template": _SHA256,
        "context_size": _TOKENS,
        "sampling": _Table(
            Defaults,
            {
                "temperature": _real(0, 2),
                "top_k": _whole(0, 2**31 - 1),
                "top_p": _real(0, 1),
                "min_p": _real(0, 1),
                "repeat_penalty": _real(0, 10, above=True),
                "seed": _whole(-(2**63), 2**63 - 1),
            },
        ),
        "adapters": _Array(
            _Table(Adapter, {"name": _ALIAS, "sha256": _SHA256, "scale": _real(-100, 100)})
        ),
        "engine": _text(r"[A-Za-z0-9][A-Za-z0-9._+ -]{0,63}", "a version, as 0.3.36"),
        "locked_at": _time,
    },
    _check_pin,
)
_OVERRIDE = _Table(Override, {"use": _ALIAS, "context_size": _TOKENS}, _check_override)
SCHEMA = _Table(Lock, {"models": _Named(_PIN), "profiles": _Named(_Named(_OVERRIDE))})
"""Takes what tomllib made of a lock, without its version, and ""; raises `LockError`."""
