"""Usage as bars: an inline image, whose numbers stand in the table below it."""

from __future__ import annotations

from collections import Counter

from ..display import inert, one_line
from .records import Usage

_MOST = 12
_ROW, _LABEL, _BAR = 18, 170, 300


def bars(found: Usage) -> str:
    """Tokens, read and written, of each user (or whatever the usage is by first), the most first. Empty
    where there are none.
    """
    counts: Counter[str] = Counter()
    for row in found.rows:
        counts[row.by[0] if row.by else "all"] += row.prompt_tokens + row.tokens_generated
    most = [(name, count) for name, count in counts.most_common(_MOST) if count > 0]
    if not most:
        return ""
    longest = most[0][1]
    lines = []
    for place, (name, count) in enumerate(most):
        top = place * _ROW
        shown = one_line(name or "–")
        shown = shown if len(shown) <= 24 else f"{shown[:23]}…"
        width = max(1, round(_BAR * count / longest))
        lines.append(
            f'<text x="{_LABEL - 6}" y="{top + 13}" text-anchor="end">{inert(shown)}</text>'
            f'<rect x="{_LABEL}" y="{top + 3}" width="{width}" height="{_ROW - 6}"/>'
            f'<text x="{_LABEL + width + 6}" y="{top + 13}">{count:,}</text>'
        )
    what = found.by[0] if found.by else "all"
    title = f"Tokens by {inert(what)} this month; the table below has the numbers"
    height, width = len(most) * _ROW, _LABEL + _BAR + 110
    return (
        f'<svg role="img" aria-label="{title}" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-size="12" fill="currentColor">'
        f"<title>{title}</title>{''.join(lines)}</svg>"
    )
