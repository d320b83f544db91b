"""`shimmy audit receipt`, `verify-receipt` and `anchor`: what can be shown to others."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from ..audit.ledger import Entry, Head, Ledger
from ..audit.merkle import root_of
from ..audit.store import node_in, read_head
from ..audit.verify import Verdict
from ..audit.verify import verify_receipt as verified
from .audit_common import (
    FILE,
    Command,
    against,
    as_json,
    count,
    heads_in,
    new_file,
    now,
    of_ledger,
    opened,
    short,
    shown,
    the_ledger,
)
from .follow import said


def act(action: str, detail: Mapping[str, Any] | None = None) -> Entry:
    """Of whoever runs the command: the account, which nobody can choose as they can a variable."""
    return Entry(
        "act",
        secrets.token_hex(16),
        now(),
        _account(),
        "account",
        action=action,
        outcome="ok",
        detail=detail,
    )


def _account() -> str:
    try:
        import pwd

        return pwd.getpwuid(os.geteuid()).pw_name
    except (ImportError, KeyError):  # no such system, or an account that has no name
        return f"uid {os.geteuid()}"


@click.command("receipt", cls=Command)
@click.argument("request_id")
@click.option("--output", type=FILE, help="A new file. Default: standard output.")
@click.option(
    "--size",
    type=click.IntRange(min=1),
    help="Of an earlier head, to check it against. Default: the ledger as it is now.",
)
@of_ledger
def receipt(
    request_id: str, *, output: Path | None, size: int | None, file: Path | None, kernel: bool
) -> None:
    """Print the records of REQUEST_ID with the proof that they are in the ledger."""
    with opened(the_ledger(file, kernel=kernel)) as ledger:
        try:
            document = ledger.proof(request_id, size)
        except ValueError as error:
            raise click.BadParameter(shown(error), param_hint="--size") from None
    if document is None:
        among = "" if size is None else f" among the first {size}"
        raise click.ClickException(
            f"there is no record of request {shown(request_id)}{among}, or it was removed"
        )
    text = as_json(document)
    if output is None:
        click.echo(text)
        return
    with new_file(output) as target:
        target.write(f"{text}\n".encode())


@click.command("verify-receipt", cls=Command)
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@against
def verify_receipt(file: Path, *, heads: tuple[Head, ...]) -> None:
    """Check a receipt in FILE without its ledger. Exit code 1 if it does not hold."""
    try:
        document = json.loads(file.read_bytes())
    except OSError as error:
        raise click.ClickException(f"{shown(file)} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise click.ClickException(f"{shown(file)} is not JSON") from None
    verdict = _checked(document, heads)
    if not verdict.ok:
        said(f"not verified: {shown(verdict.problem)}")
        if verdict.first_bad is not None:
            said(f"first broken record: {verdict.first_bad}")
        raise click.exceptions.Exit(1)
    click.echo("\n".join(_holds(document, verdict)))


def _checked(document: Any, heads: tuple[Head, ...]) -> Verdict:
    """With every head of its size; the others say nothing of it."""
    verdict = verified(document)
    if not verdict.ok or not heads:
        return verdict
    assert verdict.head is not None
    size = verdict.head.size
    fitting = [head for head in heads if head.size == size]
    if not fitting:
        sizes = ", ".join(str(head.size) for head in heads[-5:])
        request = shown(document["request_id"])
        raise click.ClickException(
            f"the receipt is for a head of {size} records, and what is given is of {sizes}: "
            f"shimmy audit receipt {request} --size {heads[-1].size}"
        )
    for head in fitting:
        verdict = verified(document, head)
        if not verdict.ok:
            break
    return verdict


def _holds(document: Any, verdict: Verdict) -> Iterator[str]:
    """Of a document that is known to be in order."""
    assert verdict.head is not None
    request = shown(document["request_id"])
    number = count(verdict.records, "record")
    yield f"verified: {number} of request {request} in a ledger with the head {short(verdict.head)}"
    for each in document["records"]:
        record = json.loads(each["body"])
        parts = [record.get(name) for name in ("timestamp", "kind", "user", "model", "outcome")]
        yield f"  {each['seq']}: {', '.join(shown(part, 80) for part in parts if part is not None)}"
    if verdict.anchored:
        yield "the head is the one given: these records were in the ledger when it was published"
    else:
        yield (
            "the head is the document's own: this shows that the document agrees with itself, not that "
            "any ledger has it. --against a head from elsewhere shows that"
        )
    yield "it does not show that what a record says is true, nor that there are no other records"


@click.command("anchor", cls=Command)
@click.option("--output", type=FILE, help="Append it to this file, a line of JSON each time.")
@of_ledger
def anchor(*, output: Path | None, file: Path | None, kernel: bool) -> None:
    """Publish what the ledger is now: its size and the hash over all of it.

    Where it is kept beyond the reach of whoever can write the ledger, nothing before it can be changed
    unnoticed: `shimmy audit verify --against`.
    """
    with opened(the_ledger(file, kernel=kernel), writing=True) as ledger:
        head, text = _published(ledger, output)
        if output is None:
            click.echo(text)
        else:
            said(f"{shown(output)}: {short(head)}")
        # Afterwards, or it would be a record that the head lacks and that says what it is.
        detail = {"size": head.size, "root": head.root}
        if output is not None:
            detail["file"] = output.name
        ledger.append([act("anchor", detail)]).result()


def _published(ledger: Ledger, output: Path | None) -> tuple[Head, str]:
    """The head, and its line. Nothing is added to a file whose heads are of another history."""
    earlier = _earlier(output)
    with ledger.snapshot() as connection:
        (size, root, timestamp), node = read_head(connection), node_in(connection)
        head = Head(size, root.hex(), timestamp)
        for one in earlier:
            if one.size > head.size or root_of(node, one.size).hex() != one.root:
                raise click.ClickException(
                    f"the ledger does not continue the head {short(one)} of {shown(output)}: see "
                    "shimmy audit verify --against"
                )
    text = json.dumps(head.to_json())
    if output is not None:
        _append(output, text)
    return head, text


def _earlier(output: Path | None) -> tuple[Head, ...]:
    if output is None:
        return ()
    try:
        text = output.read_text("utf-8")
        return heads_in(text) if text.strip() else ()
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise click.ClickException(f"{shown(output)} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise click.ClickException(f"{shown(output)} is no file of heads: {error}") from None


def _append(output: Path, text: str) -> None:
    try:
        with output.open("a+b") as file:
            file.seek(0, os.SEEK_END)
            if file.tell():
                file.seek(-1, os.SEEK_END)
            line = f"{text}\n" if file.read(1) in {b"", b"\n"} else f"\n{text}\n"
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise click.ClickException(f"{shown(output)} cannot be written: {error.strerror}") from None
