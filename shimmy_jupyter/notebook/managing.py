"""Commands about models: what there is, loading, downloading, checking, and what they are called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import InvalidValue, ModelNotFound
from ..types import amount
from .board import Board, follow
from .display import one_line
from .session import Session

Arguments = Mapping[str, Any]


def models(session: Session, given: Arguments, board: Board) -> None:
    if given["suggest"]:
        _suggest(session, given["task"], board)
        return
    found = session.listed()
    rows = [("", "model", "size", "type", "context", "state")]
    for model in found["models"]:
        fit = model["fit"]
        state = model["state"]
        if state == "available" and fit is not None and not fit["ok"]:
            state = f"needs {amount(fit['needed'])}, {amount(fit['available'])} available"
        rows.append(
            (
                "*" if model["id"] == found["default"] else "",
                model["id"],
                amount(model["size_bytes"]),
                model["quantization"] or model["kind"],
                f"{model['context']:,}" if model["context"] else "",
                model["error"] or state,
            )
        )
    rows += [("", name, "", "alias", "", f"is {model}") for name, model in session.aliases.items()]
    board.table(rows)


def _suggest(session: Session, task: str | None, board: Board) -> None:
    query = f"?task={task}" if task else ""
    found = session.transport.get(f"shimmy/api/suggestions{query}")
    rows = [("", "model", "for", "download", "memory", "licence", "what it is")]
    rows += [
        (
            "✓" if one["here"] else "",
            one["id"],
            ", ".join(one["tasks"]),
            amount(one["size_bytes"]),
            amount(one["memory_bytes"]),
            one["licence"],
            one["note"],
        )
        for one in found["suggestions"]
    ]
    board.table(rows)
    if found["first"] is not None:
        print(f"Next: %shimmy pull {one_line(found['first'])}")


def pull(session: Session, given: Arguments, board: Board) -> None:
    digest = given["sha256"]
    body = {"model": given["model"]} | ({"sha256": digest} if digest is not None else {})
    transport = session.transport
    job = transport.post("shimmy/api/models/pull", body)["job"]
    try:
        found = follow(transport, job, lambda look: board.say(progress(look)))
    except KeyboardInterrupt:
        board.say("stopped; what has come is kept, and the same command goes on from there")
        raise
    was = "downloaded" if found["new"] else "was here already"
    names = ", ".join(found["ids"] or found["files"])
    board.say(" · ".join([f"{names} {was}: {amount(found['size_bytes'])}", *found["notes"]]))


def load(session: Session, given: Arguments, board: Board) -> None:
    model, _ = _worked(session, given, board, "load")
    board.say(f"{model} is in memory")


def unload(session: Session, given: Arguments, board: Board) -> None:
    model, _ = _worked(session, given, board, "unload")
    board.say(f"{model} is not in memory any more; the next request loads it again")


def probe(session: Session, given: Arguments, board: Board) -> None:
    model, found = _worked(session, given, board, "probe")
    board.table([("what", "found"), ("model", model), *_rows(found)])


def verify(session: Session, given: Arguments, board: Board) -> None:
    model, found = _worked(session, given, board, "verify")
    board.table([("what", "found"), ("model", model), *_rows(found)])


def _worked(
    session: Session, given: Arguments, board: Board, verb: str
) -> tuple[str, dict[str, Any]]:
    """A job on a model, shown as it goes on; the model's id and the job's result."""
    model, transport = given["model"], session.transport
    job = transport.post(f"shimmy/api/models/{model}/{verb}", {})["job"]
    try:
        return model, follow(transport, job, lambda look: board.say(progress(look)))
    except KeyboardInterrupt:
        board.say("stopped")
        raise


def _rows(found: Any) -> list[tuple[str, str]]:
    """A job's result, however deep, as lines."""
    if not isinstance(found, dict):
        return [] if found is None else [("result", str(found))]
    rows: list[tuple[str, str]] = []
    for name, value in found.items():
        if value is None or value in ("", [], {}):
            continue
        if isinstance(value, dict):
            rows += [(f"{name}.{inner}", text) for inner, text in _rows(value)]
        elif name.endswith("bytes") and isinstance(value, int):
            rows.append((name, amount(value)))
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            rows.append((name, shown))
    return rows


def progress(look: Mapping[str, Any]) -> str:
    done, total = look["done"], look["total"]
    if not total:
        return str(look["message"])
    if look.get("unit") not in (None, "bytes"):
        return f"{look['message']}: {done} of {total} {look['unit']} ({done * 100 // total}%)"
    return f"{look['message']}: {amount(done)} of {amount(total)} ({done * 100 // total}%)"


# What models are called


def alias(session: Session, given: Arguments, board: Board) -> None:
    """A new name. Raises `InvalidValue` for one that something has already."""
    name, model = given["alias"], given["model"]
    if name in session.aliases:
        raise InvalidValue(
            f"{name} is {session.aliases[name]} already: %shimmy update {name} {model}",
            param="alias",
        )
    if name in {one["id"] for one in session.listed()["models"]}:
        raise InvalidValue(f"there is a model {name} already", param="alias")
    if name in session.tools.names():
        raise InvalidValue(f"shimmy.lock has the name {name} already", param="alias")
    _name(session, name, model)
    board.say(f"{name} is {session.aliases[name]} in this notebook")


def update(session: Session, given: Arguments, board: Board) -> None:
    name, model = given["alias"], given["model"]
    _known(session, name)
    _name(session, name, model)
    board.say(f"{name} is {session.aliases[name]} now")


def dealias(session: Session, given: Arguments, board: Board) -> None:
    name = given["alias"]
    _known(session, name)
    del session.aliases[name]
    board.say(f"{name} names nothing any more")


def _known(session: Session, name: str) -> None:
    if name not in session.aliases:
        there = ", ".join(session.aliases) or "none so far"
        raise InvalidValue(f"there is no alias {name!r}; there are: {there}", param="alias")


def _name(session: Session, name: str, model: str) -> None:
    meant = session.meant(model)
    if meant not in session.names():
        raise ModelNotFound(f"there is no model {meant!r}", param="model")
    session.aliases[name] = meant
