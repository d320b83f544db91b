"""What the panel says, in words and as inert HTML. Names and messages come from files and models."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, tzinfo
from typing import Any

from ...types import amount
from ..display import inert, one_line, to_html
from .fetched import Failed, Fetched, Idle, Pending, Problem, Ready
from .records import Exported, Page, Receipt, Usage, Verdict
from .shapes import LIMITS
from .state import Answer, Figures, Health, Job, Limit, Model, Models, Rate

_CELL = "line-height:1.4;padding:2px 8px;text-align:left;vertical-align:top"
_SOON = 600
"""Seconds within which a time is said with its seconds."""
_LONGEST = 300


def short(text: object) -> str:
    """One line, without effect in HTML."""
    line = one_line(str(text))
    return inert(line if len(line) <= _LONGEST else f"{line[:_LONGEST]}…")


def table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The cells are HTML. The first of each row is its heading."""
    head = "".join(f'<th scope="col" style="{_CELL}">{inert(one)}</th>' for one in heads)
    lines = []
    for first, *others in rows:
        cells = "".join(f'<td style="{_CELL}">{cell}</td>' for cell in others)
        lines.append(f'<tr><th scope="row" style="{_CELL}">{first}</th>{cells}</tr>')
    if not lines:
        lines = [f'<tr><td colspan="{len(heads)}" style="{_CELL}">none</td></tr>']
    title = f'<caption style="text-align:left;font-weight:bold">{inert(caption)}</caption>'
    return (
        f'<div style="overflow-x:auto"><table style="border-collapse:collapse">{title}'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def paragraph(text: str) -> str:
    return _paragraph(inert(text))


def _paragraph(page: str) -> str:
    return f'<p style="line-height:1.4;margin:4px 0">{page}</p>'


def several(count: int, what: str) -> str:
    """Such as "1 record" and "1,200 records"."""
    return f"{count:,} {what}{'s' * (count != 1)}"


def problem(found: Problem) -> str:
    """In one line: what, which field, and the code."""
    where = f" (field {found.param!r})" if found.param else ""
    return f"{one_line(found.message)}{where} [{found.code}]"


def failed(found: Problem) -> str:
    return _paragraph(f"<strong>Error:</strong> {short(problem(found))}")


def unready(fetched: Fetched[Any], what: str) -> str:
    """What stands there instead of something that is not there."""
    match fetched:
        case Failed(found):
            return failed(found)
        case Pending():
            return paragraph(f"{what}: being fetched…")
        case Idle():
            return paragraph(f"{what}: not fetched yet.")
        case Ready():
            return ""


def until(resets_at: float, now: float, zone: tzinfo | None = None) -> str:
    """Both times in seconds since 1970; `zone` None is the kernel's own."""
    there = datetime.fromtimestamp(resets_at, UTC).astimezone(zone)
    clock = "%H:%M:%S" if resets_at - now < _SOON else "%H:%M"
    day = "" if resets_at - now < 86_400 else f"{there:%Y-%m-%d} "
    return f"until {day}{there.strftime(clock)} {there.tzname()}"


def number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"


# Models and jobs


def memory(model: Model) -> str:
    found = model.fit
    if found is None:
        return ""
    if model.state == "loaded":
        return f"takes about {amount(found.needed)}"
    needs = f"needs {amount(found.needed)}, {amount(found.available)} available"
    return needs if found.ok else f"does not fit: {needs}"


def context(model: Model) -> str:
    """Tokens that a request can have, and of how many where the model was trained on more."""
    trained, usable = model.context, model.usable_context
    whole = f"{trained:,}" if trained else ""
    if not usable or usable == trained:
        return whole
    return f"{usable:,} of {whole}" if whole else f"{usable:,}"


def model_line(model: Model | None) -> str:
    """What there is to say of a model, in one line."""
    if model is None:
        return paragraph("No model is chosen.")
    parts = [model.quantisation, amount(model.size_bytes), model.state, memory(model), model.error]
    room = context(model)
    parts.append(f"{room} tokens of context" if room else None)
    return _paragraph(" · ".join(short(part) for part in parts if part))


def models(found: Models) -> str:
    rows = []
    for one in found.models:
        kind = "embedding" if one.embedding else one.kind
        state = f"{one.state}: {one.error}" if one.error else one.state
        default = " (default)" if one.id == found.default else ""
        cells = [one.quantisation or "", amount(one.size_bytes), kind, context(one)]
        cells += [memory(one), state]
        rows.append([short(one.id) + default, *map(short, cells)])
    heads = ["Model", "Quantisation", "Size", "Kind", "Context, tokens", "Memory", "State"]
    return table(f"Models ({len(rows)})", heads, rows)


def jobs(found: Sequence[Job]) -> str:
    rows = []
    for one in found:
        if one.total:
            share = min(100, one.done * 100 // one.total)
            of = f"{share}%"
            if one.unit == "bytes":
                of += f", {amount(one.done)} of {amount(one.total)}"
            label = inert(f"{one.kind} {one_line(one.model)[:100]}")
            far = f'<progress max="100" value="{share}" aria-label="{label}"></progress> {of}'
        else:
            far = ""
        said = problem(one.problem) if one.problem else one.message
        rows.append([short(f"{one.kind} {one.model}"), short(one.state), far, short(said)])
    return table(f"Jobs ({len(rows)})", ["Job", "State", "Progress", "What it says"], rows)


# Limits


def limits(rows: Sequence[Limit], caption: str, now: float, zone: tzinfo | None = None) -> str:
    lines = []
    for one in rows:
        held = "no limit" if one.limit is None else number(one.limit)
        left = number(one.remaining)
        when = until(one.resets_at, now, zone) if one.resets_at is not None and one.used else ""
        locked = f"locked by the administrator: {one.locked}" if one.locked else ""
        cells = [held, number(one.used), left, when, number(one.own), locked]
        name = LIMITS.get(one.name, one.name)
        lines.append([short(name[:1].upper() + name[1:]), *map(short, cells)])
    heads = ["Limit of", "At most", "Used", "Left", "Until", "Your own", "Locked"]
    return table(caption, heads, lines)


def left(rows: Sequence[Limit], now: float, zone: tzinfo | None = None) -> str:
    """What is left of the limits that are used up over time, in one line."""
    said = []
    for one in rows:
        if one.limit is None or one.remaining is None:
            continue
        when = ""
        if one.resets_at is not None and one.used:
            when = f" ({until(one.resets_at, now, zone)})"
        of = f"{number(one.remaining)} of {number(one.limit)} {LIMITS.get(one.name, one.name)}"
        said.append(of + when)
    return "Left: " + "; ".join(said) if said else "Nothing is limited over time."


# Answers


def figures(found: Figures, reason: str | None = None) -> str:
    parts = [f"{found.prompt_tokens} tokens read, {found.cached_tokens} of them from the cache"]
    parts.append(f"{found.completion_tokens} tokens written")
    if found.tokens_per_second:
        parts.append(f"{found.tokens_per_second:.0f} tokens/s")
    if found.ttft_ms is not None:
        parts.append(f"first token after {found.ttft_ms:.0f} ms")
    if reason == "length":
        parts.append("cut off at max_tokens")
    if found.receipt is not None:
        parts.append(f"record {found.receipt}")
    return " · ".join(parts)


def answer(found: Answer) -> str:
    """What a model has written, by the one renderer for that, and what there is to say of it."""
    parts = []
    if found.reasoning:
        unfolded = "" if found.text else " open"
        thought = to_html(found.reasoning)
        parts.append(f"<details{unfolded}><summary>Reasoning</summary>{thought}</details>")
    parts.append(to_html(found.text))
    if found.problem is not None:
        parts.append(failed(found.problem))
    note = _note(found)
    if note:
        parts.append(_paragraph(f"<small>{short(note)}</small>"))
    return f'<div class="shimmy-answer" style="line-height:1.4">{"".join(parts)}</div>'


def _note(found: Answer) -> str:
    if found.figures is not None:
        return f"{found.model} · {figures(found.figures, found.reason)}"
    return {
        "idle": "",
        "queued": "its turn comes after those before it",
        "running": found.waiting or f"{found.model} is answering…",
        "stopping": "stopping…",
        "stopped": f"{found.model} · stopped",
    }.get(found.status, "")


def comparison(answers: Sequence[Answer]) -> str:
    """Side by side, and each one's figures."""
    heads = ["Model", "State", "Tokens written", "Tokens/s", "First token, ms", "Read", "Cached"]
    rows = []
    for one in answers:
        got = one.figures
        cells = ["", "", "", "", ""]
        if got is not None:
            cells = [
                number(got.completion_tokens),
                number(got.tokens_per_second),
                number(got.ttft_ms),
                number(got.prompt_tokens),
                number(got.cached_tokens),
            ]
        state = problem(one.problem) if one.problem else one.status
        rows.append([short(one.model), short(state), *cells])
    return table(f"Comparison of {len(answers)} models", heads, rows)


# The audit


def _what(record_fields: Sequence[str]) -> str:
    return " ".join(filter(None, record_fields))


def records(found: Page, caption: str) -> str:
    heads = ["Record", "Time", "User", "What", "Outcome", "Tokens read", "Written", "Request"]
    rows = []
    for one in found.records:
        if one.erased:
            rows.append([str(one.seq), "erased", "", "", "", "", "", ""])
            continue
        what = _what([one.text("kind"), one.text("action"), one.text("model")])
        outcome = _what([one.text("outcome"), one.text("code")])
        cells = [one.text("timestamp"), one.text("user"), what, outcome]
        cells += [one.text("prompt_tokens"), one.text("tokens_generated"), one.text("request_id")]
        rows.append([str(one.seq), *map(short, cells)])
    return table(caption, heads, rows)


def usage(found: Usage) -> str:
    heads = [name.capitalize() for name in found.by]
    heads += ["Requests", "Tokens read", "Cached", "Written", "Denied", "Limited", "Errors"]
    rows = []
    for one in found.rows:
        counts = [one.requests, one.prompt_tokens, one.cached_tokens, one.tokens_generated]
        counts += [one.denied, one.limited, one.errors]
        rows.append([*(short(name or "–") for name in one.by), *map(number, counts)])
    return table("Usage this month (UTC)", heads, rows)


def verdict(found: Verdict) -> str:
    parts = [f"{several(found.records, 'record')} read"]
    if found.ok:
        parts.append("all are as they were written")
    else:
        where = "" if found.first_bad is None else f" from record {found.first_bad} on"
        parts.append(f"NOT as they were written{where}: {found.problem}")
    if found.anchored:
        parts.append("the ledger goes on from the one that was verified here before")
    if found.erased:
        parts.append(f"erased, which is on record: {found.erased}")
    if found.open_requests:
        parts.append(f"begun and not ended: {several(found.open_requests, 'request')}")
    if found.head is not None:
        parts.append(f"root {found.head.root} of {found.head.size} records")
    return paragraph("; ".join(parts) + ".")


def receipt(found: Receipt) -> str:
    return paragraph(
        f"Request {found.request_id}: {several(found.records, 'record')}, in a ledger of {found.head.size} with "
        f"the root {found.head.root}. Save it, and check it with: shimmy audit verify-receipt FILE"
    )


def exported(found: Exported) -> str:
    so_far = "" if found.whole else " so far"
    return paragraph(f"{found.name}: {several(found.records, 'record')} written{so_far}.")


# What the server says of itself


def health(found: Health) -> str:
    rows = [
        [short(one.name), short(one.status), short(one.detail), short(one.action or "")]
        for one in found.dependencies
    ]
    busy = f"{found.active} requests and jobs are in progress"
    return table(
        f"The server is {found.status}; {busy}", ["Part", "State", "Detail", "What to do"], rows
    )


def rates(found: Sequence[Rate]) -> str:
    rows = []
    for place, one in enumerate(reversed(found), 1):
        got = one.figures
        share = f"{100 * got.cached_tokens // got.prompt_tokens}%" if got.prompt_tokens else ""
        cells = [short(one.model), number(got.tokens_per_second), number(got.ttft_ms)]
        rows.append([str(place), *cells, number(got.completion_tokens), share])
    heads = ["Answer", "Model", "Tokens/s", "First token, ms", "Tokens", "Prompt from cache"]
    return table("Your last answers here, the newest first", heads, rows)
