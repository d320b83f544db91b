"""`%shimmy bench`: a model's speed as this notebook sees it, through everything between; a table and a plot."""

from __future__ import annotations

import secrets
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..types import amount
from .board import Board
from .client import Transport
from .display import inert, one_line

RUNS = 5
_TOKENS = 64
_FIXED = ("model", "pin", "adapter")
_SHORT, _LONG = 16, 256
"""Words of the two prompts."""


@dataclass(frozen=True, slots=True)
class Run:
    """`first_ms` until the first token, `rate` in tokens per second after it, None for a single token."""

    prompt_tokens: int
    tokens: int
    first_ms: float
    rate: float | None


def bench(
    transport: Transport, chosen: Mapping[str, Any], board: Board, runs: int = RUNS
) -> dict[str, list[Run]]:
    """Asks for `_TOKENS` tokens `runs` times after a short and after a long prompt, each of which begins
    with a word of its own so that nothing of it is in the cache. One more before, which does not count.
    `chosen` is a request for the model: of what else is in it, what the bytes are counts, sampling does not.
    Raises what the service refuses a request by.
    """
    model = str(chosen["model"])
    fixed = {name: chosen[name] for name in _FIXED if name in chosen}
    board.say(f"{model}: warming up")
    _asked(transport, fixed, _SHORT)
    found: dict[str, list[Run]] = {}
    for name, words in (("short prompt", _SHORT), ("long prompt", _LONG)):
        for number in range(runs):
            board.say(f"{model}: {name}, {number + 1} of {runs}")
            found.setdefault(name, []).append(_asked(transport, fixed, words))
    listed = transport.get("shimmy/api/models")["models"]
    facts = next((one for one in listed if one["id"] == model), None)
    board.show(*_shown(model, found, _memory(facts)))
    return found


def _memory(facts: dict[str, Any] | None) -> str:
    """What it takes, with its cache and what is computed, where that is known."""
    if facts is None:
        return ""
    weights = f"{amount(facts['size_bytes'])} of weights"
    if facts["fit"] is None:
        return f", {weights}"
    return f", needs {amount(facts['fit']['needed'])} of memory ({weights})"


def _asked(transport: Transport, fixed: Mapping[str, Any], words: int) -> Run:
    own = secrets.token_hex(4)
    body = {
        **fixed,
        "prompt": " ".join(f"{own}-{place}" for place in range(words // 4)),
        "max_tokens": _TOKENS,
        "temperature": 0,
        "ignore_eos": True,
    }
    answer = transport.post("shimmy/v1/completions", body)
    used, times = answer["usage"], answer["shimmy"]
    return Run(
        used["prompt_tokens"],
        used["completion_tokens"],
        times["ttft_ms"] or 0.0,
        times["tokens_per_second"],
    )


def _spread(values: list[float]) -> str:
    """The median, and the least and the most."""
    return f"{statistics.median(values):,.1f} ({min(values):,.1f} to {max(values):,.1f})"


def _shown(model: str, found: dict[str, list[Run]], memory: str) -> tuple[str, str]:
    """As text and as a page."""
    rows = [("", "prompt tokens", "first token, ms", "tokens/s")]
    for name, runs in found.items():
        rates = [run.rate for run in runs if run.rate is not None]
        firsts = [run.first_ms for run in runs]
        rate = _spread(rates) if rates else "–"
        rows.append((name, str(runs[0].prompt_tokens), _spread(firsts), rate))
    times = max(map(len, found.values()))
    head = one_line(f"{model}{memory}: medians of {times}, least to most")
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    text = "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
    lines = "".join(f"<tr>{''.join(f'<td>{inert(c)}</td>' for c in row)}</tr>" for row in rows[1:])
    heads = "".join(f'<th scope="col">{inert(cell)}</th>' for cell in rows[0])
    table = f"<table><caption>{inert(head)}</caption><tr>{heads}</tr>{lines}</table>"
    return f"{head}\n\n{text}", table + _plot(found)


def _plot(found: dict[str, list[Run]]) -> str:
    """A dot for each run, by its rate; what it says is in the table, too."""
    rates = {name: [run.rate for run in runs if run.rate] for name, runs in found.items()}
    most = max((rate for of in rates.values() for rate in of), default=0.0)
    if not most:
        return ""
    scale = 360 / (most * 1.1)
    parts: list[Any] = []
    for row, (name, of) in enumerate(rates.items()):
        y = 24 + 28 * row
        parts.append(f'<text x="0" y="{y + 4}" fill="currentColor">{inert(name)}</text>')
        parts.append(
            f'<line x1="100" x2="460" y1="{y}" y2="{y}" stroke="currentColor" opacity="0.3"/>'
        )
        parts += [
            f'<circle cx="{100 + rate * scale:.1f}" cy="{y}" r="5" fill="#0072b2" opacity="0.6"/>'
            for rate in of
        ]
    bottom = 24 + 28 * len(rates)
    parts.append(f'<text x="100" y="{bottom}" fill="currentColor">0</text>')
    parts.append(
        f'<text x="{100 + most * scale:.1f}" y="{bottom}" text-anchor="middle" fill="currentColor">'
        f"{most:,.0f} tokens/s</text>"
    )
    return (
        f'<svg role="img" aria-label="Tokens per second of each run" width="500" height="{bottom + 8}" '
        f'font-size="12">{"".join(parts)}</svg>'
    )
