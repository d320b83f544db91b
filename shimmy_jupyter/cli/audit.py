"""`shimmy audit`: what was asked, by whom, and whether the record of it is what it was."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import sqlite3
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import click

from ..audit import verify as verifying
from ..audit.export import export
from ..audit.ledger import Head, Ledger, Query
from ..audit.merkle import root_of
from ..audit.reading import MOST
from ..audit.reading import usage as usage_of
from ..audit.records import iso
from ..audit.store import node_in
from ..audit.verify import Verdict
from ..audit.writer import open_for_reading
from ..notebook.display import clean
from .audit_common import (
    FILE,
    Command,
    against,
    as_json,
    between,
    check_period,
    count,
    filtered,
    new_file,
    of_ledger,
    opened,
    query_of,
    short,
    shown,
    the_ledger,
    this_month,
)
from .audit_proofs import anchor, receipt, verify_receipt
from .audit_removal import erase, prune
from .files import check_writable
from .follow import said, table
from .local import Progress

_JSON = click.option("--json", "json_wanted", is_flag=True, help="Print JSON instead.")
_BY = ("user", "group", "model")
_BARS = 20
_WIDE = 40


@click.group("audit")
def audit_command() -> None:
    """Read and check the ledger of what was asked, remove from it, and publish what it is.

    All times are in UTC.
    """


# Looking


@audit_command.command("show", cls=Command)
@filtered
@click.option("--limit", type=click.IntRange(min=1), default=50, show_default=True, help="At most.")
@of_ledger
@_JSON
def show(*, file: Path | None, kernel: bool, limit: int, json_wanted: bool, **chosen: Any) -> None:
    """Print records, the newest first."""
    query = query_of(chosen)
    with opened(the_ledger(file, kernel=kernel)) as ledger:
        records, more = _newest(ledger, query, limit)
    if json_wanted:
        click.echo(as_json({"records": records, "more": more}))
    elif not records:
        click.echo("no such record")
    else:
        click.echo(listed(records))
        if more:
            said(f"the newest {len(records):,}; there are more: --limit")


def _newest(ledger: Ledger, query: Query, limit: int) -> tuple[list[dict[str, Any]], bool]:
    records: list[dict[str, Any]] = []
    cursor = None
    while True:
        page = ledger.query(query, cursor, min(MOST, limit - len(records)))
        records += page.records
        cursor = page.next_cursor
        if cursor is None or len(records) >= limit:
            return records, cursor is not None


def listed(records: Sequence[dict[str, Any]]) -> str:
    """A line for each record."""
    rows = [["NUMBER", "TIME", "WHAT", "USER", "MODEL", "OUTCOME", "IN", "OUT", "MS", "REQUEST"]]
    for record in records:
        if record.get("erased") is True:
            rows.append([shown(record["seq"]), "", "erased", *[""] * 7])
            continue
        outcome = [shown(record.get(name), _WIDE) for name in ("outcome", "code")]
        rows.append(
            [
                shown(record["seq"]),
                shown(record.get("timestamp"))[:19].replace("T", " "),
                shown(record.get("action") or record.get("kind"), _WIDE),
                shown(record.get("user"), _WIDE),
                shown(record.get("model"), _WIDE),
                " ".join(filter(None, outcome)),
                *(_number(record.get(n)) for n in ("prompt_tokens", "tokens_generated")),
                _number(record.get("duration_ms")),
                shown(record.get("request_id"), 2 * _WIDE),
            ]
        )
    return table(rows)


def _number(value: Any) -> str:
    return f"{value:,.0f}" if isinstance(value, int | float) else shown(value, _WIDE)


# Using


def _grouping(_context: Any, _option: Any, text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if len(set(names)) != len(names) or not set(names) <= set(_BY):
        raise click.BadParameter(f"some of {', '.join(_BY)}, each once, with commas between them")
    return names


def _picture(_context: Any, _option: Any, path: Path | None) -> Path | None:
    """Asked before anything is read."""
    if path is None:
        return None
    if path.suffix not in {".png", ".svg"}:
        raise click.BadParameter(f"{shown(path)} ends neither in .png nor in .svg")
    check_writable(path)
    if find_spec("matplotlib") is None:
        raise click.BadParameter("matplotlib is not installed: pip install matplotlib")
    return path


@audit_command.command("usage", cls=Command)
@between
@click.option(
    "--by",
    default=",".join(_BY),
    show_default=True,
    callback=_grouping,
    help="A row for each combination.",
)
@click.option(
    "--plot", type=FILE, callback=_picture, help="A picture, by user (.png or .svg); needs "
    "matplotlib.",
)  # fmt: skip
@of_ledger
@_JSON
def usage(
    *,
    since: float | None,
    until: float | None,
    by: tuple[str, ...],
    plot: Path | None,
    file: Path | None,
    kernel: bool,
    json_wanted: bool,
) -> None:
    """Print who used what: this month, where --since says nothing else.

    Counts requests that have ended. Records whose bodies were removed count nowhere.
    """
    since = this_month() if since is None else since
    check_period(since, until)
    with opened(the_ledger(file, kernel=kernel)) as ledger, ledger.snapshot() as connection:
        rows = usage_of(connection, since, until, by)
        (total,) = usage_of(connection, since, until, ())
        users = usage_of(connection, since, until, ("user",)) if plot is not None else []
        incomplete = connection.execute(
            "SELECT EXISTS (SELECT 1 FROM records WHERE action IN ('erase', 'prune'))"
        ).fetchone()[0]
    period = f"{iso(since)} to {'now' if until is None else iso(until)}"
    if json_wanted:
        found = {"since": iso(since), "until": None if until is None else iso(until), "by": by}
        click.echo(as_json({**found, "rows": rows, "total": total}))
    else:
        click.echo(f"{period}:\n\n{_used(rows, total, by)}")
        if "group" in by and sum(row["requests"] for row in rows) > total["requests"]:
            click.echo("\nWhoever is in several groups counts in each; the total counts once.")
        if incomplete:
            click.echo("\nSome records were removed from this ledger; they count nowhere.")
    if plot is not None:
        _draw(users, period, plot)


def _used(rows: Sequence[dict[str, Any]], total: dict[str, Any], by: Sequence[str]) -> str:
    names = [name for name in total if name not in by]
    heads = [*(name.upper() for name in by), *(name.replace("_", " ").upper() for name in names)]
    cells = [
        [*(shown(row[name], _WIDE) or "–" for name in by), *(f"{row[name]:,}" for name in names)]
        for row in rows
    ]
    whole = ["total", *[""] * (len(by) - 1), *(f"{total[name]:,}" for name in names)]
    return table([heads, *cells, whole])


def _draw(rows: Sequence[dict[str, Any]], period: str, file: Path) -> None:
    """Those who used most; the rest are one bar."""
    rows = sorted(rows, key=_tokens, reverse=True)
    names = [_label(row["user"]) for row in rows]
    prompts, answers = ([row[n] for row in rows] for n in ("prompt_tokens", "tokens_generated"))
    if len(rows) > _BARS:
        names[_BARS:] = [f"{len(rows) - _BARS} others"]
        prompts[_BARS:], answers[_BARS:] = [sum(prompts[_BARS:])], [sum(answers[_BARS:])]
    height = 1.6 + 0.3 * len(names)
    figure = importlib.import_module("matplotlib.figure").Figure((8, height), layout="constrained")
    axes = figure.subplots()
    places = range(len(names), 0, -1)
    axes.barh(places, prompts, label="prompts")
    axes.barh(places, answers, left=prompts, label="answers")
    axes.set_yticks(list(places), names)
    axes.set(xlabel="tokens", title=period)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    try:
        figure.savefig(file)
    except OSError as error:
        raise click.ClickException(f"{shown(file)}: {error.strerror}") from None


def _tokens(row: dict[str, Any]) -> int:
    return int(row["prompt_tokens"] + row["tokens_generated"])


def _label(user: Any) -> str:
    """As it stands: a dollar sign would begin a formula."""
    return shown(user, _WIDE).replace("$", r"\$")


# Checking


@audit_command.command("verify", cls=Command)
@against
@of_ledger
@_JSON
def verify(*, heads: tuple[Head, ...], file: Path | None, kernel: bool, json_wanted: bool) -> None:
    """Compute everything in the ledger again. Exit code 1 if it is not what it was."""
    line = Progress()

    def progress(done: int, total: int) -> None:
        if line.terminal:
            line.say(f"record {done:,} of {total:,}")

    path = the_ledger(file, kernel=kernel)
    try:
        verdict = _verified(path, heads, progress)
    finally:
        line.end()
    if json_wanted:
        click.echo(as_json(dataclasses.asdict(verdict)))
    elif verdict.ok:
        click.echo("\n".join(_sound(verdict, len(heads))))
    else:
        said(f"not verified: {shown(verdict.problem)}")
        if verdict.first_bad is not None:
            said(f"first broken record: {verdict.first_bad}")
    if not verdict.ok:
        raise click.exceptions.Exit(1)


def _verified(path: Path, heads: Sequence[Head], progress: verifying.Progress) -> Verdict:
    with contextlib.closing(open_for_reading(path)) as connection:
        connection.execute("BEGIN")
        verdict = verifying.verify(connection, None, progress)
        if verdict.ok and heads:
            return _compared(connection, verdict, heads)
        return verdict


def _compared(connection: sqlite3.Connection, verdict: Verdict, heads: Sequence[Head]) -> Verdict:
    """With each head, the shortest first: so it is known how far the history is still that of then."""
    node, good = node_in(connection), 0
    for head in sorted(heads, key=lambda one: one.size):
        if head.size > verdict.records:
            problem = f"shortened: there were {head.size} records, and there are {verdict.records}"
        elif root_of(node, head.size).hex() != head.root:
            problem = f"rewritten: the first {head.size} records are not those of the head"
        else:
            good = head.size
            continue
        if good:
            problem += f"; the first {good} are those of an earlier head"
        bad = verdict.records if head.size > verdict.records else None
        return dataclasses.replace(verdict, ok=False, problem=problem, first_bad=bad, anchored=True)
    return dataclasses.replace(verdict, anchored=True)


def _sound(verdict: Verdict, heads: int) -> list[str]:
    assert verdict.head is not None
    lines = [f"verified: {count(verdict.records, 'record')}, head {short(verdict.head)}"]
    if verdict.erased:
        lines.append(f"{count(verdict.erased, 'record')} erased; their hashes are as they were")
    if verdict.open_requests:
        lines.append(
            f"{count(verdict.open_requests, 'request')} begun and not ended: still running, or cut off "
            "by a crash"
        )
    if verdict.anchored:
        lines.append(f"it begins with the records of {count(heads, 'head')} given")
    else:
        lines.append(
            "not compared with a head from elsewhere: whoever can write the file could have made all of "
            "it anew (--against)"
        )
    return lines


# Taking along


@audit_command.command("export", cls=Command)
@click.option("--format", "kind_of_file", type=click.Choice(["csv", "jsonl"]), required=True)
@click.option("--output", type=FILE, help="A new file. Default: standard output.")
@filtered
@of_ledger
def export_command(
    *,
    kind_of_file: Literal["csv", "jsonl"],
    output: Path | None,
    file: Path | None,
    kernel: bool,
    **chosen: Any,
) -> None:
    """Write records for other programs, the oldest first."""
    query = query_of(chosen)
    with opened(the_ledger(file, kernel=kernel)) as ledger:
        pieces = export(ledger, query, kind_of_file)
        if output is not None:
            with new_file(output) as target:
                target.writelines(pieces)
            return
        terminal = sys.stdout.isatty()
        for piece in pieces:
            click.echo(clean(piece.decode()) if terminal else piece, nl=False)


for command in (receipt, verify_receipt, anchor, erase, prune):
    audit_command.add_command(command)
