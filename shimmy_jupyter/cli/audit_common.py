"""What the commands of `shimmy audit` share: which ledger, which times, which heads; and texts out of
records, which whoever asked has written, in a form that does nothing to a terminal.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import click
from traitlets import TraitError

from ..audit.ledger import Head, Ledger, Query
from ..audit.records import iso
from ..audit.writer import StoreFailed
from ..auditing import month
from ..notebook.display import clean
from .files import is_file, mode_of
from .follow import said

F = TypeVar("F", bound=Callable[..., Any])

FILE = click.Path(dir_okay=False, path_type=Path)
KINDS = ("begin", "end", "act")
OUTCOMES = ("ok", "denied", "limited", "cancelled", "error", "accepted")
ACTIONS = (
    "load", "unload", "pull", "probe", "verify", "limits", "policy", "erase", "prune", "anchor",
)  # fmt: skip
_HEAD = re.compile(r"([0-9]{1,18}):([0-9a-fA-F]{64})")
_AGO = re.compile(r"([0-9]{1,6})([dh])")
_SECONDS = {"d": 86_400, "h": 3600}


class Command(click.Command):
    """What is wrong with a ledger is the command's error, in one line."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except StoreFailed as error:
            raise click.ClickException(shown(error)) from None
        except KeyboardInterrupt:
            said("stopped")
            raise click.exceptions.Exit(130) from None


# Texts


def shown(value: Any, longest: int = 1000) -> str:
    """On one line, and without what would act on a terminal."""
    text = "" if value is None else str(value)
    text = " ".join(text.encode("utf-8", "backslashreplace").decode().split())
    text = clean(text)
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def as_json(value: Any) -> str:
    """In ASCII, so that a terminal can show whatever is in it."""
    return json.dumps(value, indent=2)


def count(number: int, what: str) -> str:
    """Such as "1 record" and "2 records"."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def short(head: Head) -> str:
    return f"{head.size}:{head.root}"


# Which ledger


def of_ledger(command: F) -> F:
    """The options that name it; `the_ledger` reads them."""
    for option in (
        click.option(
            "--kernel", is_flag=True, help="The one of kernels without a server, not the server's."
        ),
        click.option(
            "--ledger", "file", type=FILE, help="Default: ShimmyAudit.path of the configuration."
        ),
    ):
        command = option(command)
    return command


def the_ledger(file: Path | None, *, kernel: bool) -> Path:
    """One that is there. Raises `ClickException`."""
    if file is not None and kernel:
        raise click.UsageError("either --ledger or --kernel")
    path = file or _configured(kernel=kernel)
    where = "--ledger" if file is not None else "ShimmyAudit.path"
    if is_file(path, where):
        return path
    name = shown(path.name)
    if mode_of(path, where) is not None:
        raise click.ClickException(f"{name} is no file")
    other = file is None and not kernel and is_file(path.with_name(f"kernel-{path.name}"), where)
    hint = "; kernels without a server have one: --kernel" if other else ""
    raise click.ClickException(
        f"there is no {name} where {where} says: nothing has been recorded there{hint}"
    )


def _configured(*, kernel: bool) -> Path:
    from ..config import load_config, load_system_config, settings

    try:
        chosen = settings(load_config(), system=load_system_config(), kernel=kernel)
    except TraitError as error:
        raise click.ClickException(f"in Jupyter's configuration: {error}") from error
    except Exception as error:  # a configuration file is a program of somebody else's
        from ..doctor.checks import where

        raise click.ClickException(f"in Jupyter's configuration: {where(error)}") from error
    path = chosen.guard.audit.path
    if path is None:
        raise click.ClickException(
            "nothing is recorded here: ShimmyAudit.enabled is False. --ledger FILE for an earlier one"
        )
    return path


@contextlib.contextmanager
def opened(path: Path, *, writing: bool = False) -> Iterator[Ledger]:
    """Beside a server that has it open, too. What is written survives a power cut."""
    if writing and path.stat().st_uid != os.geteuid():
        raise click.ClickException(
            f"{shown(path.name)} is another account's: only that one can change it and its key"
        )
    ledger = Ledger(path, durable=True)
    try:
        yield ledger
    finally:
        ledger.close()


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """The owner's alone, and gone again where it could not be finished. Raises `ClickException`."""
    name = shown(path)
    try:
        number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise click.ClickException(f"{name} exists already") from None
    except OSError as error:
        raise click.ClickException(f"{name} cannot be written: {error.strerror}") from None
    try:
        with os.fdopen(number, "wb") as file:
            yield file
    except OSError as error:
        path.unlink()
        raise click.ClickException(f"{name} cannot be written: {error.strerror}") from None
    except BaseException:
        path.unlink()
        raise


# Which times


def now() -> float:
    return time.time()


def moment(_context: Any, _option: Any, text: str | None) -> float | None:
    """Seconds since 1970 of what was typed; times without an offset are in UTC."""
    if text is None:
        return None
    try:
        found = _moment(text)
        iso(found)
    except (ValueError, OverflowError):
        raise click.BadParameter(
            f"{shown(text)!r} is no time: 2026-11-01, 2026-11-01T09:30, today, this-month, last-month, "
            "7d or 12h would be one"
        ) from None
    return found


def _moment(text: str) -> float:
    today = datetime.fromtimestamp(now(), UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    if text == "today":
        return today.timestamp()
    if text == "this-month":
        return this_month()
    if text == "last-month":
        return (today.replace(day=1) - timedelta(days=1)).replace(day=1).timestamp()
    if match := _AGO.fullmatch(text):
        return now() - int(match[1]) * _SECONDS[match[2]]
    found = datetime.fromisoformat(text)
    return (found if found.tzinfo is not None else found.replace(tzinfo=UTC)).timestamp()


def this_month() -> float:
    """When it began."""
    return month(now())


def between(command: F) -> F:
    """The options for a period; `check_period` looks at them together."""
    for option in (
        click.option("--until", callback=moment, metavar="TIME", help="Before this time."),
        click.option(
            "--since",
            callback=moment,
            metavar="TIME",
            help="From this time on: a date in UTC, today, this-month, last-month, 7d or 12h.",
        ),
    ):
        command = option(command)
    return command


def check_period(since: float | None, until: float | None) -> None:
    if since is not None and until is not None and since >= until:
        raise click.UsageError("--since is not before --until")


def filtered(command: F) -> F:
    """The options that choose records; `query_of` makes them one."""
    for option in (
        click.option("--request", "request_id", help="Of this request alone."),
        click.option("--action", type=click.Choice(ACTIONS), help="Only acts of this kind."),
        click.option("--kind", type=click.Choice(KINDS), help="Only such records."),
        click.option("--outcome", type=click.Choice(OUTCOMES), help="Only what ended so."),
        click.option("--model", help="The model's id."),
        click.option("--user", help="The user's name."),
    ):
        command = option(command)
    return between(command)


def query_of(chosen: dict[str, Any]) -> Query:
    check_period(chosen["since"], chosen["until"])
    return Query(**chosen)


# Which heads


def against(command: F) -> F:
    """The option that names heads from elsewhere."""
    return click.option(
        "--against",
        "heads",
        callback=_heads,
        metavar="HEAD",
        help="From elsewhere: SIZE:ROOT, or a file of heads that `shimmy audit anchor` has written.",
    )(command)


def _heads(_context: Any, _option: Any, text: str | None) -> tuple[Head, ...]:
    if text is None:
        return ()
    if match := _HEAD.fullmatch(text):
        return (Head(int(match[1]), match[2].lower(), ""),)
    if not is_file(Path(text)):
        raise click.BadParameter(f"{shown(text)!r} is neither SIZE:ROOT nor a file")
    try:
        return heads_in(Path(text).read_text("utf-8"))
    except OSError as error:
        raise click.BadParameter(f"{shown(text)} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise click.BadParameter(f"{shown(text)}: {shown(error)}") from None


def heads_in(text: str) -> tuple[Head, ...]:
    """Raises `ValueError`, also where there is none."""
    try:
        return (Head.from_json(_loaded(text)),)
    except ValueError as error:
        lines = [(at, line) for at, line in enumerate(text.splitlines(), 1) if line.strip()]
        if not lines:
            raise ValueError("there is no head in it") from None
        if len(lines) == 1:
            raise ValueError(f"no head: {error}") from None
    found = []
    for at, line in lines:
        try:
            found.append(Head.from_json(_loaded(line)))
        except ValueError as error:
            raise ValueError(f"line {at} is no head: {error}") from None
    return tuple(found)


def _loaded(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError("it is not JSON") from error
