"""Between a lock's pins and the models that are here: which one an alias stands for, what is added to a
request for it, and what a pin of a model says.

Models are as `GET shimmy/api/models` lists them: mappings with `id`, `kind`, `size_bytes`, `files`,
`sha256`, `chat_template`, `context`, `source`, `origin` and `fit`. A `sha256` is None while nobody has
read the file. Whoever resolves an alias gets the model whose bytes are the pinned ones, or one that
may be it and that the server compares with the pin before it answers; never another.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from ..errors import ModelNotFound, UnsupportedParameter
from .drift import Found, drift
from .fetch_errors import in_words
from .lockfile import NAME, find, read, resolve
from .lockschema import Adapter, Defaults, Pin, Source

Listed = Mapping[str, Any]
"""A model of the list."""
Listing = Mapping[str, Any]
"""The whole answer: `models`, and the version of `engine`."""

_SUFFIX = re.compile(r"(?:-[0-9]{5}-of-[0-9]{5})?\.gguf$", re.IGNORECASE)
_AGAIN = re.compile(r"@(?:[0-9a-f]{8,63}|[0-9a-f]{64}(?:\.[0-9]+)?)$")
"""What ends the id of a second file of one name: it comes of the folder, which is this machine's."""
_NOT_IN_AN_ID = re.compile(r"[^A-Za-z0-9._:@-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REPOSITORY = re.compile(r"[^/]+/[^/]+")
_FIXED = ("model", "pin", "adapter")


def located(pin: Pin, alias: str, listed: Sequence[Listed]) -> str:
    """The id of the model that has the pinned bytes; where there is none, of one that nobody has read
    yet and that is of their size. Raises `ModelNotFound` that says what would help.
    """
    models = [model for model in listed if _answers(model)]
    same = [model for model in models if model["sha256"] == pin.sha256]
    if same:
        # Models that are split may have their first file in common.
        return str(min(same, key=lambda model: model["size_bytes"] != pin.size)["id"])
    unread = [
        model
        for model in models
        if model["sha256"] is None
        and (model["size_bytes"], model["files"]) == (pin.size, 1 + len(pin.parts))
    ]
    if unread:
        return str(min(unread, key=lambda model: model["id"] != _id(pin.file))["id"])
    raise ModelNotFound(_absent(pin, alias, models), param="model")


def located_adapter(adapter: Adapter, alias: str, listed: Sequence[Listed]) -> str:
    """The id of the adapter that has the pinned bytes; where there is none, of one under its name that
    nobody has read yet. Raises `ModelNotFound` that says what would help.
    """
    adapters = [model for model in listed if model["kind"] == "lora"]
    for sha256 in (adapter.sha256, None):
        for model in adapters:
            if model["sha256"] == sha256 and (sha256 or model["id"] == adapter.name):
                return str(model["id"])
    text = (
        f"{NAME} pins the adapter {adapter.name!r} of {alias!r} (sha256 {_short(adapter.sha256)}): "
        "it is not here"
    )
    for model in adapters:
        if model["id"] == adapter.name:
            text += (
                f"; the {adapter.name} that is here has drifted: sha256 {_short(model['sha256'])}"
            )
        elif model["sha256"] is None:
            text += f"; nobody has read {model['id']} yet: `shimmy verify {model['id']}`"
    raise ModelNotFound(text, param="adapter")


def namesake(pin: Pin, listed: Sequence[Listed]) -> Listed | None:
    """The model that has the pinned file's name, whatever its bytes."""
    wanted = _id(pin.file)
    return next((model for model in listed if _answers(model) and model["id"] == wanted), None)


def _answers(model: Listed) -> bool:
    return model["kind"] not in {"lora", "projector"}


def _id(file: str) -> str:
    """As models are named by their files."""
    return _NOT_IN_AN_ID.sub("-", _SUFFIX.sub("", file))[:119] or "model"


def _short(sha256: str) -> str:
    return f"{sha256[:12]}…"


def _absent(pin: Pin, alias: str, models: Sequence[Listed]) -> str:
    text = (
        f"{NAME} pins {alias!r} to {pin.file} ({in_words(pin.size)}, sha256 {_short(pin.sha256)}): "
        "it is not here"
    )
    other = namesake(pin, models)
    if other is not None:
        differs = []
        if other["size_bytes"] != pin.size:
            differs.append(f"{other['size_bytes']} bytes, not {pin.size}")
        if other["files"] != 1 + len(pin.parts):
            differs.append(f"{other['files']} files, not {1 + len(pin.parts)}")
        if other["sha256"] is not None:
            differs.append(f"sha256 {_short(other['sha256'])}, not {_short(pin.sha256)}")
        text += f"; the {other['id']} that is here has drifted: it has {', '.join(differs)}"
    command = pull_command(pin)
    return f"{text}; `{command}`" if command is not None else text


def pull_command(pin: Pin) -> str | None:
    """What a person can type to have the pinned file, where a source is pinned. Quoted for a shell: a
    lock may come from anybody.
    """
    source = pin.source
    if source is None:
        return None
    what = source.url
    if what is None:
        file = "/".join(filter(None, (source.folder, pin.file)))
        what = f"{source.repo}@{source.revision}:{file}"
    # Of a model in several files no single digest is one's.
    digest = "" if pin.parts else f" --sha256 {pin.sha256}"
    return f"shimmy pull {shlex.quote(what)}{digest}"


# Requests


def request_fields(pin: Pin, listed: Sequence[Listed], alias: str) -> dict[str, Any]:
    """What is added to a request: the model's id, what the server is to compare, and defaults. Raises
    `ModelNotFound`, and `UnsupportedParameter` for adapters that the engine cannot have.
    """
    adapter = only_adapter(pin, alias)
    fields = {name: value for name, value in asdict(pin.sampling).items() if value is not None}
    if pin.sampling.seed is not None:
        # Whoever pins a seed wants the same answer again.
        fields["reproducible"] = True
    fields["model"] = located(pin, alias, listed)
    fields["pin"] = {
        "size": pin.size,
        "sha256": pin.sha256,
        "parts": list(pin.parts),
        "chat_template": pin.chat_template,
        "context_size": pin.context_size,
        "adapter": None if adapter is None else adapter.sha256,
    }
    if adapter is not None:
        fields["adapter"] = located_adapter(adapter, alias, listed)
    return fields


def only_adapter(pin: Pin, alias: str) -> Adapter | None:
    """Raises `UnsupportedParameter` for more than one, and for one at another scale than 1."""
    if len(pin.adapters) > 1 or any(adapter.scale != 1 for adapter in pin.adapters):
        pinned = ", ".join(f"{each.name} at scale {each.scale:g}" for each in pin.adapters[:20])
        raise UnsupportedParameter(
            f"{NAME} pins adapters of {alias!r}: {pinned}; one adapter at scale 1 is what the "
            "engine can do",
            param="adapter",
        )
    return pin.adapters[0] if pin.adapters else None


def merged(body: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """A request with these fields: its own values win over pinned defaults, never over the pin."""
    return {**fields, **body, **{name: fields[name] for name in _FIXED if name in fields}}


@dataclass(frozen=True, slots=True)
class Pinned:
    """An alias that a lock has, in the profile where one is named, and what it adds to a request."""

    alias: str
    profile: str | None
    pin: Pin
    fields: Mapping[str, Any]
    engine: str | None

    @property
    def note(self) -> str:
        """Where the model of an answer was taken from, in a few words."""
        profile = f", profile {self.profile}" if self.profile is not None else ""
        return f"{self.alias} of {NAME}{profile}"

    @property
    def warnings(self) -> tuple[str, ...]:
        """What differs and does not stop a request, which is the engine's version alone."""
        pin = Pin(self.pin.file, self.pin.size, self.pin.sha256, engine=self.pin.engine)
        here = Found(pin.size, pin.sha256, 0, self.engine or "")
        return tuple(f"{self.alias} of {NAME}: {each}" for each in drift(pin, here))


class Locks:
    """The locks above a folder. `start` says which folder, `home` is the last one to be looked into
    (see `lockfile.find`), and `profile` is the one to resolve names in.
    """

    def __init__(self, start: Callable[[], Path], home: Path | None, profile: str | None) -> None:
        self._start, self._home, self._profile = start, home, profile

    def pinned(self, alias: str, listed: Callable[[], Listing]) -> Pinned | None:
        """None where there is no lock, or it does not have the name: that is a model's id then.

        The file is read each time; `listed` is called where the lock has the name. Raises `LockError`
        for a lock that cannot be used or lacks the profile, and what `request_fields` does.
        """
        path = find(self._start(), self._home)
        if path is None:
            return None
        lock = read(path)
        if alias not in lock.models:
            return None
        pin = resolve(lock, alias, self._profile)
        listing = listed()
        fields = request_fields(pin, listing["models"], alias)
        return Pinned(alias, self._profile, pin, fields, listing.get("engine"))

    def names(self) -> list[str]:
        """All that the lock has; none where there is no lock. Raises `LockError` as `pinned` does."""
        path = find(self._start(), self._home)
        return [] if path is None else [*read(path).models]

    def fields(self, alias: str, listed: Callable[[], Listing]) -> dict[str, Any] | None:
        """What is added to a request for a name; None as in `pinned`, which says what is raised."""
        found = self.pinned(alias, listed)
        return dict(found.fields) if found is not None else None


# From models to pins


def pin_of(
    model: Listed,
    digests: Sequence[str],
    engine: str | None,
    *,
    file: str | None = None,
    source: Source | None = None,
    context_size: int | None = None,
    sampling: Defaults | None = None,
    adapters: Iterable[Adapter] = (),
    locked_at: datetime | None = None,
) -> Pin:
    """A pin of a listed model as it is. `digests` are of its files, in order; `file` is what its first
    one is called, by its id where nobody says.
    """
    first, *others = digests
    return Pin(
        file=file or file_name(model),
        size=model["size_bytes"],
        sha256=first,
        parts=tuple(others),
        source=source,
        chat_template=model["chat_template"],
        context_size=context_size,
        sampling=sampling or Defaults(),
        adapters=tuple(adapters),
        engine=engine,
        locked_at=locked_at,
    )


def file_name(model: Listed) -> str:
    """What its first file is called, as far as its id says."""
    name, files = _AGAIN.sub("", model["id"]), model["files"]
    return f"{name}-00001-of-{files:05}.gguf" if files > 1 else f"{name}.gguf"


def source_of(model: Listed) -> Source | None:
    """Where it can be had, of what is in the Hugging Face cache, which knows repository and commit."""
    origin = model["origin"]
    if model["source"] != "huggingface" or origin is None or origin["revision"] is None:
        return None
    if not _COMMIT.fullmatch(origin["revision"]) or not _REPOSITORY.fullmatch(origin["name"]):
        return None
    return Source(repo=origin["name"], revision=origin["revision"])


def found_of(
    model: Listed,
    digests: Sequence[str],
    engine: str | None,
    adapters: Mapping[str, str] | None = None,
) -> Found:
    """What a listed model is here, to be compared with a pin. Its context is what it was trained on, or
    less where there is no memory for it. `adapters` are SHA-256 by name.
    """
    fit = model["fit"]
    return Found(
        size=model["size_bytes"],
        sha256=digests[0],
        context_size=fit["max_context"] if fit is not None else model["context"] or 0,
        engine=engine or "",
        parts=tuple(digests[1:]),
        chat_template=model["chat_template"],
        adapters=adapters or {},
    )
