"""`shimmy lock`: which bytes and settings a project's names for models stand for."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from ..config import home, kernel_environment
from ..errors import ModelNotFound, ShimmyError, UnsupportedParameter
from ..models import lockfile, pinning
from ..models.drift import Drift, Severity, drift
from ..models.lockfile import NAME, Adapter, Defaults, Lock, LockError, Pin, Source
from ..models.lockschema import as_key
from ..notebook.display import clean
from ..types import amount
from .follow import table
from .here import Here, nearest, one_line
from .local import Local

_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON instead.")
_ALIASES = click.argument("aliases", metavar="[ALIAS]...", nargs=-1)
_TYPED = re.compile(r"([^@:]+)@([^:]*)(?::(.*))?")


class _Command(click.Command):
    def invoke(self, ctx: click.Context) -> Any:
        with one_line():
            return super().invoke(ctx)


@click.group("lock")
def lock_command() -> None:
    """Pin models by their bytes in the project's shimmy.lock, and check that they are what they were.

    The lock is looked for here and in the folders above.
    """


# Writing


def _source(_context: Any, _option: Any, text: str | None) -> tuple[Source, str | None] | None:
    """And the file's name, where that is said. What it holds is checked with the rest of a pin."""
    if text is None:
        return None
    if "://" in text:
        return Source(url=text), None
    match = _TYPED.fullmatch(text)
    if match is None:
        raise click.BadParameter("name a commit, as in OWNER/NAME@COMMIT, or give an https address")
    folder, file = match[3], None
    if folder is not None and folder.lower().endswith(".gguf"):
        folder, _, file = folder.rpartition("/")
    return Source(match[1], match[2], folder or None), file


def _own(_context: Any, _option: Any, path: Path | None) -> Path | None:
    if path is not None and path.name != NAME:
        raise click.BadParameter(f"no other file than {NAME} is ever looked for")
    return path


@lock_command.command(cls=_Command)
@click.argument("name")
@click.option("--as", "alias", help="What notebooks call it. Default: NAME.")
@click.option("--context", type=int, help="Tokens of a request that it must have room for.")
@click.option("--temperature", type=float, help="Where a request does not say, as are the next.")
@click.option("--top-k", type=int)
@click.option("--top-p", type=float)
@click.option("--min-p", type=float)
@click.option("--repeat-penalty", type=float)
@click.option("--seed", type=int, help="Answers are reproducible, too.")
@click.option("--adapter", "adapters", multiple=True, help="The LoRA adapter that goes with it.")
@click.option(
    "--source",
    callback=_source,
    help="Where others get it: OWNER/NAME@COMMIT, with :FOLDER or :FILE after it, or an https "
    "address. Default: what the Hugging Face cache says.",
)
@click.option(
    "--file",
    "path",
    type=click.Path(path_type=Path, dir_okay=False),
    callback=_own,
    help=f"The {NAME} to write. Default: the nearest, else a new one here.",
)
@click.option("--replace", "replacing", is_flag=True, help="Where the name is pinned already.")
def add(
    name: str,
    *,
    alias: str | None,
    context: int | None,
    adapters: tuple[str, ...],
    source: tuple[Source, str | None] | None,
    path: Path | None,
    replacing: bool,
    **sampling: Any,
) -> None:
    """Pin the model NAME as it is here. Reads all of its bytes."""
    alias = alias or name
    path = path or lockfile.find(Path(), home()) or Path(NAME)
    origin, file = source or (None, None)
    chosen = Defaults(**sampling)
    # Before gigabytes are read for nothing.
    asked = Pin("x", 1, "0" * 64, source=origin, context_size=context, sampling=chosen)
    lockfile.added(_at(path), alias, asked, replacing=replacing)
    with Local() as local:
        here = Here(local)
        model = _of_kind(here, name, "model")
        for adapter in adapters:
            _of_kind(here, adapter, "lora")
        pin = pinning.pin_of(
            model,
            here.read(name),
            here.engine,
            file=file,
            source=origin or pinning.source_of(model),
            context_size=context,
            sampling=chosen,
            adapters=[Adapter(adapter, here.read(adapter)[0]) for adapter in adapters],
            locked_at=_now(),
        )
        _usable(pin, alias, model)
    lockfile.write(path, lockfile.added(_at(path), alias, pin, replacing=replacing))
    click.echo(f"{os.path.relpath(path)} pins {alias}:")
    click.echo("\n".join(_lines(pin)))


def _at(path: Path) -> Lock:
    return lockfile.read(path) if os.path.lexists(path) else Lock()


def _of_kind(here: Here, id: str, kind: str) -> dict[str, Any]:
    model = here.model(id)
    if model["kind"] != kind:
        raise click.ClickException(f"{id} is no {'adapter' if kind == 'lora' else kind}")
    return model


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


def _usable(pin: Pin, alias: str, model: dict[str, Any]) -> None:
    """Nothing is pinned for which every request would be refused."""
    pinning.only_adapter(pin, alias)
    longest = model["context"]
    if pin.context_size is not None and longest and pin.context_size > longest:
        raise LockError(
            f"{model['id']} has a context of {longest} tokens",
            f"models.{as_key(alias)}.context_size",
        )


def _lines(pin: Pin) -> Iterator[str]:
    """What is pinned, a line each."""
    for each in fields(Pin):
        if text := _shown(getattr(pin, each.name)):
            yield f"  {each.name:<14}{text}"


def _shown(value: Any) -> str:
    """A value of a pin for people; "" for what is not pinned."""
    if isinstance(value, tuple):
        return ", ".join(map(_shown, value))
    if isinstance(value, Source):
        folder = f":{value.folder}" if value.folder else ""
        return value.url or f"{value.repo}@{value.revision}{folder}"
    if isinstance(value, Adapter):
        return f"{value.name} {value.sha256} at scale {value.scale:g}"
    if isinstance(value, Defaults):
        given = {each.name: getattr(value, each.name) for each in fields(Defaults)}
        return ", ".join(f"{name} {number}" for name, number in given.items() if number is not None)
    return "" if value is None else str(value)


@lock_command.command(cls=_Command)
@_ALIASES
@click.option("--all", "everything", is_flag=True, help="Every name of the lock.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def update(aliases: tuple[str, ...], *, everything: bool, yes: bool) -> None:
    """Pin again what is here under the same name. Reads all bytes, and says what changes."""
    if everything == bool(aliases):
        raise click.UsageError("name what to update, or --all")
    path, lock = nearest()
    old = {alias: lockfile.resolve(lock, alias) for alias in aliases or lock.models}
    with Local() as local:
        here = Here(local)
        new = {alias: _again(here, pin, alias) for alias, pin in old.items()}
    changed = lock
    for alias, pin in new.items():
        if rows := list(_changes(old[alias], pin)):
            click.echo("\n".join([f"{alias}:", *rows]))
            changed = lockfile.added(changed, alias, pin, replacing=True)
        else:
            click.echo(f"{alias}: as it is pinned")
    if changed is lock:
        return
    if not yes:
        click.confirm(f"Write this to {os.path.relpath(path)}?", abort=True, err=True)
    if _at(path) != lock:
        raise click.ClickException(f"{NAME} has changed meanwhile; nothing was written")
    lockfile.write(path, changed)


def _again(here: Here, pin: Pin, alias: str) -> Pin:
    """What the pinned bytes are today or, where they are not here, what has their name."""
    try:
        model = here.find(pin, alias)
    except ModelNotFound:
        other = pinning.namesake(pin, here.models)
        if other is None:
            raise
        model = here.model(other["id"])
    digests = here.read(model["id"])
    same = digests == [pin.sha256, *pin.parts]
    new = pinning.pin_of(
        model,
        digests,
        here.engine,
        file=pin.file if len(digests) == 1 + len(pin.parts) else None,
        # Where the pinned bytes are, others are not.
        source=pin.source if same else pinning.source_of(model),
        context_size=pin.context_size,
        sampling=pin.sampling,
        adapters=[here.adapter(each, alias) for each in pin.adapters],
        locked_at=_now(),
    )
    _usable(new, alias, model)
    return replace(new, chat_template=None) if same and pin.chat_template is None else new


def _changes(old: Pin, new: Pin) -> Iterator[str]:
    for each in fields(Pin):
        before, after = getattr(old, each.name), getattr(new, each.name)
        if before != after and each.name != "locked_at":
            yield f"  {each.name}: {_shown(before) or 'none'} → {_shown(after) or 'none'}"


@lock_command.command(cls=_Command)
@click.argument("alias")
def remove(alias: str) -> None:
    """Take the name ALIAS out of the lock."""
    path, lock = nearest()
    lockfile.write(path, lockfile.removed(lock, alias))


@lock_command.command(cls=_Command)
@click.argument("old")
@click.argument("new")
def rename(old: str, new: str) -> None:
    """Call NEW what the lock calls OLD, in its profiles too."""
    path, lock = nearest()
    lockfile.write(path, lockfile.renamed(lock, old, new))


# Looking


@lock_command.command(cls=_Command)
@_JSON
def show(*, as_json: bool) -> None:
    """Print what the lock pins."""
    path, lock = nearest()
    if as_json:
        click.echo(json.dumps(tomllib.loads(lockfile.dump(lock)), indent=2, default=_time))
        return
    click.echo(f"{os.path.relpath(path)}, digest {lockfile.digest(lock)}")
    for alias, pin in lock.models.items():
        click.echo("\n".join(["", f"{alias}:", *_lines(pin)]))
    for name, profile in lock.profiles.items():
        click.echo(f"\nprofile {name}:")
        for alias, override in profile.items():
            use = [f"as {override.use}"] if override.use else []
            context = [f"context {override.context_size}"] if override.context_size else []
            click.echo(f"  {alias}: {', '.join([*use, *context])}")


def _time(value: Any) -> str:
    return str(value.isoformat()).replace("+00:00", "Z")


@lock_command.command(cls=_Command)
def digest() -> None:
    """Print the SHA-256 of all that the lock pins."""
    click.echo(lockfile.digest(nearest()[1]))


@dataclass(frozen=True, slots=True)
class _Row:
    """What `check` found. `model` None: neither the pinned bytes nor their name are here, or cannot be
    read. `errors` are reasons, beside differences, for which a request is refused.
    """

    alias: str
    pin: Pin
    model: str | None
    drifts: Sequence[Drift]
    errors: Sequence[str]

    @property
    def ok(self) -> bool:
        return not self.errors and all(each.severity is Severity.WARN for each in self.drifts)

    @property
    def state(self) -> str:
        if self.ok:
            return "ok, with a warning" if self.drifts else "ok"
        return "refused" if self.model is not None else "not here"

    def to_json(self) -> dict[str, Any]:
        drifts = [{f.name: getattr(each, f.name) for f in fields(Drift)} for each in self.drifts]
        return {
            "alias": self.alias,
            "file": self.pin.file,
            "model": self.model,
            "ok": self.ok,
            "drifts": drifts,
            "errors": [*self.errors],
        }


@lock_command.command(cls=_Command)
@_ALIASES
@click.option("--profile", help="Of the lock. Default: SHIMMY_PROFILE.")
@_JSON
def check(aliases: tuple[str, ...], *, profile: str | None, as_json: bool) -> None:
    """Compare the models that are here with what is pinned. Exit code 1 if one would be refused."""
    profile = profile or kernel_environment().profile
    _, lock = nearest()
    pins = {alias: lockfile.resolve(lock, alias, profile) for alias in aliases or lock.models}
    with Local() as local:
        here = Here(local)
        rows = [_compared(here, pin, alias) for alias, pin in pins.items()]
    ok = all(row.ok for row in rows)
    if as_json:
        found = {"digest": lockfile.digest(lock), "profile": profile, "ok": ok}
        click.echo(json.dumps(found | {"models": [row.to_json() for row in rows]}, indent=2))
    else:
        click.echo(_table(rows))
    if not ok:
        raise click.exceptions.Exit(1)


def _table(rows: list[_Row]) -> str:
    cells = [
        [row.alias, row.pin.file, amount(row.pin.size), row.model or "", row.state] for row in rows
    ]
    notes = [
        f"\n{row.alias}: {clean(str(note))}" for row in rows for note in (*row.drifts, *row.errors)
    ]
    return "\n".join([table([["NAME", "FILE", "SIZE", "HERE", "STATE"], *cells]), *notes])


def _elsewhere(pin: Pin) -> str:
    """What is said beside the differences of a model that has the pinned one's name alone."""
    command = pinning.pull_command(pin)
    return "the pinned bytes are not here" + (f"; `{command}`" if command is not None else "")


def _compared(here: Here, pin: Pin, alias: str) -> _Row:
    """With the model that has the pinned bytes or, where none has, their name."""
    model: Mapping[str, Any] | None = None
    errors = []
    try:
        model = here.find(pin, alias)
    except ModelNotFound as error:
        model = pinning.namesake(pin, here.models)
        errors.append(error.message if model is None else _elsewhere(pin))
    except ShimmyError as error:
        errors.append(error.message)
    try:
        pinning.only_adapter(pin, alias)
    except UnsupportedParameter as error:
        errors.append(error.message)
    if model is None:
        return _Row(alias, pin, None, (), errors)
    id, adapters = str(model["id"]), {}
    try:
        digests = here.digests(id)
        for each in pin.adapters:
            with contextlib.suppress(ModelNotFound):  # one that is missing is a difference
                adapters[each.name] = here.adapter(each, alias).sha256
    except ShimmyError as error:
        errors += [error.message] * (error.message not in errors)
        return _Row(alias, pin, id, (), errors)
    found = pinning.found_of(model, digests, here.engine, adapters)
    return _Row(alias, pin, id, drift(pin, found), errors)
