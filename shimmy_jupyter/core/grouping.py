"""Which rows of a step are decoded together, so that company does not change an answer."""

from __future__ import annotations

from .messages import Row

TILE = 64
"""From this many rows on, flash attention on a processor sums in tiles, in another order."""


def calls(rows: tuple[Row, ...]) -> list[list[Row]]:
    """The rows of a step, by the native call that decodes them.

    Sequences that decode share one. A prompt is never mixed with them, and with other prompts
    only while all together stay below the size at which sums change their order.
    """
    decoding = [row for row in rows if len(row.tokens) == 1]
    shared = [decoding] if decoding else []
    prompts: list[Row] = []
    size = 0
    for row in rows:
        if len(row.tokens) == 1:
            continue
        if prompts and size + len(row.tokens) >= TILE:
            shared.append(prompts)
            prompts, size = [], 0
        prompts.append(row)
        size += len(row.tokens)
    return [*shared, prompts] if prompts else shared
