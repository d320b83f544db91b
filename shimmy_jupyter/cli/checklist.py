"""`shimmy doctor`: whether this machine is ready, as a table."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from ..notebook.display import clean

if TYPE_CHECKING:
    from ..doctor import Check

_MARKS = {"ok": "✓", "warn": "!", "fail": "✗", "skip": "–"}
_WORDS = {"ok": "ok", "warn": "to look at", "fail": "failed", "skip": "skipped"}


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def doctor_command(*, as_json: bool) -> None:
    """Check this machine: the engine, Jupyter's configuration, folders and servers.

    Changes nothing and connects to nothing. Exit code 1 if a check failed.
    """
    from ..doctor import checks, this_machine

    found = checks(this_machine())
    failed = any(check.status == "fail" for check in found)
    if as_json:
        body = {"checks": [asdict(check) for check in found], "ok": not failed}
        click.echo(json.dumps(body, indent=2))
    else:
        click.echo("\n".join(table(found)))
    if failed:
        raise click.exceptions.Exit(1)


def table(found: list[Check]) -> Iterator[str]:
    """A line for each check, and below it what to do; at the end, how many there were of each kind."""
    width = max(len(check.name) for check in found)
    for check in found:
        yield _line(f"{_MARKS[check.status]} {check.name:<{width}}  {check.detail}")
        if check.action is not None:
            yield _line(f"  {'':<{width}}  → {check.action}")
    statuses = [check.status for check in found]
    counts = [f"{statuses.count(s)} {word}" for s, word in _WORDS.items() if s in statuses]
    yield f"{len(found)} checks: {', '.join(counts)}"


def _line(text: str) -> str:
    """Without what would act on a terminal: folders are named by whoever made them."""
    return clean(text).replace("\n", " ")
