"""`shimmy audit erase` and `prune`: records that must not be kept."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import click

from ..audit import erasure
from ..audit.ledger import Erased, Ledger
from ..audit.records import iso
from .audit_common import (
    Command,
    count,
    moment,
    now,
    of_ledger,
    opened,
    shown,
    the_ledger,
)
from .audit_proofs import act
from .follow import said

_YES = click.option("--yes", is_flag=True, help="Do not ask.")
_DRY = click.option(
    "--dry-run", is_flag=True, help="Say what would be removed, and remove nothing."
)


@click.command("erase", cls=Command)
@click.argument("user")
@click.option("--request", "requests", multiple=True, help="Only this one; may be repeated.")
@_YES
@_DRY
@of_ledger
def erase(
    user: str,
    *,
    requests: tuple[str, ...],
    yes: bool,
    dry_run: bool,
    file: Path | None,
    kernel: bool,
) -> None:
    """Remove what the ledger says of USER. Hashes stay, so that it still verifies.

    Removes their requests and acts. An act without their name says that it was done.
    """
    path = the_ledger(file, kernel=kernel)
    with opened(path, writing=not dry_run) as ledger:
        found = _look(ledger, erasure.of_user(user, requests or None))
        if not _agreed(found, f"of {shown(user)}", yes=yes, dry_run=dry_run):
            return
        _removed(ledger.erase(user, by=act("erase"), request_ids=requests or None))


@click.command("prune", cls=Command)
@click.option(
    "--before", callback=moment, metavar="TIME", help="A date in UTC, this-month, last-month, 90d …"
)
@click.option("--days", type=click.IntRange(1, 1_000_000), help="What is older than that.")
@_YES
@_DRY
@of_ledger
def prune(
    *,
    before: float | None,
    days: int | None,
    yes: bool,
    dry_run: bool,
    file: Path | None,
    kernel: bool,
) -> None:
    """Remove what the ledger says of before a time. Hashes stay, so that it still verifies."""
    time = _time(before, days)
    with opened(the_ledger(file, kernel=kernel), writing=not dry_run) as ledger:
        chosen, _ = erasure.before(time)
        if not _agreed(_look(ledger, chosen), f"before {iso(time)}", yes=yes, dry_run=dry_run):
            return
        _removed(ledger.prune(time, by=act("prune")))


def _time(before: float | None, days: int | None) -> float:
    if (before is None) == (days is None):
        raise click.UsageError("either --before or --days")
    if before is not None and before > now():
        raise click.BadParameter("it is in the future", param_hint="--before")
    time = before if days is None else now() - days * 86_400
    assert time is not None
    try:
        iso(time)
    except ValueError:
        raise click.BadParameter("so long ago there were no dates", param_hint="--days") from None
    return time


@dataclass(frozen=True, slots=True)
class _Found:
    """What is there to remove. Times are as records have them."""

    records: int
    first: str
    last: str


def _look(ledger: Ledger, chosen: erasure.Chosen) -> _Found:
    """What `erasure.remove` will take; acts that account for missing bodies stay."""
    where, values = chosen
    with ledger.snapshot() as connection:
        records, first, last = connection.execute(
            "SELECT count(*), min(timestamp), max(timestamp) FROM records"  # noqa: S608  texts of ours
            f" WHERE {where} AND body IS NOT NULL"
            f" AND (action IS NULL OR action NOT IN {erasure.ACCOUNTING})",
            values,
        ).fetchone()
    return _Found(records, shown(first), shown(last))


def _agreed(found: _Found, whose: str, *, yes: bool, dry_run: bool) -> bool:
    """Whether to go on. Raises `Abort` where the answer is no."""
    if not found.records:
        click.echo(f"there are no records {whose}; nothing was removed")
        return False
    click.echo(f"{count(found.records, 'record')} {whose}, from {found.first} to {found.last}")
    if dry_run:
        return False
    if not yes:
        click.confirm(
            "Remove what they say, for good? Hashes stay, and an act that says so.",
            abort=True,
            err=True,
        )
    return True


def _removed(removing: Future[Erased]) -> None:
    done = removing.result()
    click.echo(f"removed: {count(done.records, 'record')}")
    if not done.wiped:
        said(
            "their bytes may still be in the ledger's files: others were reading it, or the disk was full"
        )
