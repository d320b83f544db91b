"""Finding a vocabulary's special tokens in a text, before that is tokenized."""

from __future__ import annotations

import re

_LONGEST_SPECIAL = 64

_Node = dict[str, "_Node"]


def any_of(tokens: tuple[str, ...]) -> re.Pattern[str] | None:
    """Matches the longest of the texts. Common beginnings are tried once: some vocabularies have
    thousands, and a plain alternation looks at each of them at each character.
    """
    root: _Node = {}
    for token in tokens:
        node = root
        if len(token) > _LONGEST_SPECIAL:
            continue  # the count is a lower bound, and a regular expression must not nest for ever
        for character in token:
            node = node.setdefault(character, {})
        if token:
            node[""] = {}
    return re.compile(_pattern(root)) if root else None


def _pattern(node: _Node) -> str:
    """The rest of the texts, from this common beginning on."""
    # A chain without a branch is written at once, so that depth is that of the branches.
    chain = ""
    while len(node) == 1 and "" not in node:
        ((character, node),) = node.items()
        chain += re.escape(character)
    rest = [re.escape(c) + _pattern(after) for c, after in node.items() if c]
    if not rest:
        return chain
    return f"{chain}(?:{'|'.join(rest)})" + ("?" if "" in node else "")
