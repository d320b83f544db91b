"""`shimmy models`, `probe`, `verify` and `pull`: what there is, whether it is sound, and more of it."""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.parse import urlencode

import click

from ..notebook.display import clean
from ..types import amount
from .follow import follow, path, said, table
from .local import Local

_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON instead.")


def _dump(found: Any) -> None:
    click.echo(json.dumps(found, indent=2))


@click.command()
@click.option("--suggest", is_flag=True, help="List good models to download that fit this machine.")
@click.option("--task", help="With --suggest: chat, code, reasoning, embedding or rerank.")
@_JSON
def models(*, suggest: bool, task: str | None, as_json: bool) -> None:
    """List the models that this machine offers."""
    if task is not None and not suggest:
        raise click.UsageError("--task goes with --suggest")
    query = f"?{urlencode({'task': task})}" if task is not None else ""
    with Local() as local:
        found = local.get(f"shimmy/api/suggestions{query}" if suggest else "shimmy/api/models")
    if suggest:
        _suggest(found, as_json=as_json)
    elif as_json:
        _dump(found)
    else:
        click.echo(_listed(found))
        if all(model["source"] == "bundled" for model in found["models"]):
            click.echo("\nOnly the self-test is here. `shimmy models --suggest` lists real ones.")


def _listed(found: dict[str, Any]) -> str:
    rows = [["", "NAME", "SIZE", "TYPE", "PARAMETERS", "CONTEXT", "FROM", "STATE"]]
    notes = []
    for model in found["models"]:
        fit, parameters = model["fit"], model["parameters"]
        state = model["state"]
        if fit is not None and not fit["ok"] and state == "available":
            state = "does not fit"
            notes.append(
                f"{model['id']}: needs {amount(fit['needed'])}, {amount(fit['available'])} available"
            )
        if model["error"]:
            notes.append(f"{model['id']}: {clean(model['error'])}")
        kind = "" if model["kind"] == "model" else f"{model['kind']} "
        rows.append(
            [
                "*" if model["id"] == found["default"] else "",
                model["id"],
                amount(model["size_bytes"]),
                f"{kind}{clean(model['quantization'] or '')}".strip() or "?",
                f"{parameters / 1e9:.2f}B"
                if parameters and parameters >= 5e6
                else _number(parameters),
                _number(model["context"]),
                model["source"],
                state,
            ]
        )
    lines = [table(rows), "* answers where no model is named"]
    return "\n".join([*lines, *([""] * bool(notes)), *notes])


def _number(value: int | None) -> str:
    return f"{value:,}" if value else ""


def _suggest(found: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        _dump(found)
        return
    room, chosen = amount(found["memory_bytes"]), found["suggestions"]
    if not chosen:
        raise click.ClickException(f"nothing in the list fits into {room} of memory")
    rows = [["", "NAME", "FOR", "DOWNLOAD", "MEMORY", "LICENCE", "WHAT IT IS"]]
    rows += [
        [
            "✓" if one["here"] else "",
            one["id"],
            ", ".join(one["tasks"]),
            amount(one["size_bytes"]),
            amount(one["memory_bytes"]),
            one["licence"],
            one["note"],
        ]
        for one in chosen
    ]
    click.echo(f"What fits into the {room} of memory that this machine has for models:\n")
    click.echo(table(rows))
    if any(one["here"] for one in chosen):
        click.echo("✓ is here already")
    if found["first"] is not None:
        click.echo(f"\nNext: shimmy pull {found['first']}")


@click.command()
@click.argument("name")
@_JSON
def probe(name: str, *, as_json: bool) -> None:
    """Try out the model NAME in a process of its own, and say what happened."""
    with Local() as local:
        verdict = follow(local, local.post(f"{path(name)}/probe", {})["job"])
        model = local.get(path(name))
    if as_json:
        _dump({"model": name, **verdict})
    else:
        click.echo(_verdict(name, verdict, model))
    if verdict["outcome"] != "ok":
        raise click.exceptions.Exit(1)


def _verdict(name: str, verdict: dict[str, Any], model: dict[str, Any]) -> str:
    if verdict["outcome"] != "ok":
        return f"{name}: {verdict['outcome'].replace('_', ' ')}: {clean(verdict['reason'])}"
    rows = [
        ("load", f"{verdict['load_seconds']:.2f} s" if verdict["load_seconds"] else ""),
        ("memory", amount(verdict["memory_bytes"]) if verdict["memory_bytes"] else ""),
        ("context", f"{_number(verdict['context_size'])} tokens"),
        ("chat template", (verdict["chat_template_sha256"] or "none")[:16]),
        ("sha256", model["sha256"] or ""),
        ("confined by", ", ".join(verdict["confined"]) or "nothing: this system offers no means"),
    ]
    return "\n".join([f"{name}: ok", *(f"  {what:<14}{text}" for what, text in rows if text)])


@click.command()
@click.argument("name")
@click.option("--sha256", help="What it should be; otherwise what its place says, if it does.")
@_JSON
def verify(name: str, sha256: str | None, *, as_json: bool) -> None:
    """Read all bytes of the model NAME again, and compare their SHA-256."""
    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise click.BadParameter("a SHA-256 is 64 hex digits", param_hint="--sha256")
    with Local() as local:
        files = local.get(path(name))["files"]
        if sha256 is not None and files > 1:
            raise click.BadParameter(f"{name} has {files} files", param_hint="--sha256")
        found = follow(local, local.post(f"{path(name)}/verify", {})["job"])
    wanted = [sha256.lower()] if sha256 is not None else found["expected"]
    pairs = list(zip(wanted, found["sha256"], strict=True))
    expected = next((said for said, _ in pairs if said is not None), None)
    same = all(said in {None, digest} for said, digest in pairs)
    if as_json:
        _dump({"model": name, **found, "expected": wanted, "ok": same})
    else:
        for digest in found["sha256"]:
            click.echo(f"{digest}  {name}")
        if expected is None:
            said(
                "nothing says what it should be: compare it with its publisher's, or pin it: "
                f"shimmy lock add {name}"
            )
        elif same:
            said("as it should be")
    if not same:
        raise click.ClickException(f"the bytes of {name} are not those with SHA-256 {expected}")


@click.command()
@click.argument("model")
@click.option("--sha256", help="Refuse anything else (64 hex digits).")
@_JSON
def pull(model: str, sha256: str | None, *, as_json: bool) -> None:
    """Download MODEL: OWNER/NAME from Hugging Face, OWNER/NAME:FILE or OWNER/NAME:QUANTISATION, or an
    https address. What an interrupted download has kept, the same command continues.
    """
    with Local() as local:
        body = {"model": model} if sha256 is None else {"model": model, "sha256": sha256.lower()}
        try:
            found = follow(local, local.post("shimmy/api/models/pull", body)["job"])
        except KeyboardInterrupt:
            said("stopped; what has come is kept, and the same command goes on from there")
            raise click.exceptions.Exit(130) from None
    if as_json:
        _dump(found)
        return
    for file, digest in zip(found["files"], found["sha256"], strict=True):
        click.echo(f"{digest}  {file}")
    for note in found["notes"]:
        said(note)
    was = "downloaded" if found["new"] else "was here already"
    click.echo(f"{amount(found['size_bytes'])} {was}")
    if found["ids"]:
        click.echo(f'\nNext: shimmy generate --model {found["ids"][0]} "What is a list?"')
