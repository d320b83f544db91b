"""Looking at a model: how likely each token of an answer was, in colours.

The less likely, the stronger the colour, in one hue that every kind of sight tells apart from none by
its lightness; the least likely are underlined too. What else was likely stands in each token's
title, and everything again in a table, for who cannot see colours or point at them.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InvalidValue
from .display import inert, one_line

MOST_TOKENS = 5_000
"""Tokens that are shown in colours, at most."""
MOST_ROWS = 1_000
"""Rows of the table, and lines in a terminal."""
LARGEST = 900_000
"""Characters of HTML: a kernel's output channel carries a million bytes in a second."""
_MOST_TOP = 10
_MOST_PARTS = 8
"""Tokens of one character: it has four bytes, but some tokens have none, and others never fit."""
_LONGEST = 200
_SMALL = '<small style="opacity:0.7">'
_STEPS: tuple[tuple[float, str, str], ...] = (
    (0.9, "", "90% and more"),
    (0.5, "background-color:rgba(213,94,0,0.16)", "50 to 90%"),
    (0.1, "background-color:rgba(213,94,0,0.32)", "10 to 50%"),
    (0.01, "background-color:rgba(213,94,0,0.48);border-bottom:2px solid #888", "1 to 10%"),
    (0.0, "background-color:rgba(213,94,0,0.62);border-bottom:3px double #888", "below 1%"),
)
"""From a probability on: the style, and the legend."""
STYLES = frozenset(style for _, style, _ in _STEPS if style)


@dataclass(frozen=True, slots=True)
class Token:
    """A token's bytes, the natural logarithm of its probability, and the likeliest tokens in its place, the
    likeliest first.
    """

    piece: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...] = ()

    @property
    def probability(self) -> float:
        return math.exp(self.logprob)


@dataclass(frozen=True, slots=True)
class Likely:
    """An answer's tokens, to look at."""

    tokens: tuple[Token, ...]
    model: str = ""

    @classmethod
    def of(cls, logprobs: Iterable[Mapping[str, Any]], *, model: str = "") -> Likely:
        """From `choices[0].logprobs.content` of OpenAI's chat API. Raises `InvalidValue`."""
        return cls(tuple(_token(one, at) for at, one in enumerate(logprobs)), model)

    @property
    def perplexity(self) -> float:
        """The exponential of the mean negative log-probability: of how many tokens each was one, as it were.
        Infinite where that is more than a number can hold; NaN without tokens.
        """
        if not self.tokens:
            return math.nan
        mean = -math.fsum(token.logprob for token in self.tokens) / len(self.tokens)
        return math.exp(mean) if mean < 700 else math.inf

    @property
    def mean_probability(self) -> float:
        """The arithmetic mean, from 0 to 1; NaN without tokens."""
        if not self.tokens:
            return math.nan
        return math.fsum(token.probability for token in self.tokens) / len(self.tokens)

    @property
    def caption(self) -> str:
        parts = [one_line(self.model), f"{len(self.tokens)} tokens"]
        if self.tokens:
            parts.append(f"perplexity {self.perplexity:.4g}")
            parts.append(f"mean probability {_percent(self.mean_probability)}")
        return " · ".join(filter(None, parts))

    def to_html(self) -> str:
        spans, told, size = [], 0, 0
        for first, text, tokens in _groups(self.tokens[:MOST_TOKENS]):
            span = _span(first, text, tokens)
            size += len(span)
            if size > LARGEST * 2 // 3:
                break
            spans.append(span)
            told = first + len(tokens)
        legend = " ".join(
            f'<span style="{style}">{name}</span>' if style else f"<span>{name}</span>"
            for _, style, name in _STEPS
        )
        return (
            '<div class="shimmy-likely tex2jax_ignore mathjax_ignore">'
            f"<p>{_SMALL}{inert(self.caption)}{self._cut(told)}</small></p>"
            f"<p><small>Probability: {legend}</small></p>"
            f'<div style="white-space:pre-wrap;line-height:1.8">{"".join(spans)}</div>'
            f"{self._table(LARGEST // 3)}</div>"
        )

    def to_text(self) -> str:
        """A line for each token, those that were likely in its place behind it."""
        lines = [f"[{self.caption}]"]
        for at, token in enumerate(self.tokens[:MOST_ROWS]):
            line = f"{at + 1:>5}  {_percent(token.probability):>6}  {_quoted(token.piece)}"
            lines.append(f"{line}  {_others(token, 3)}".rstrip())
        if len(self.tokens) > MOST_ROWS:
            lines.append(f"[the first {MOST_ROWS} of {len(self.tokens)} tokens]")
        return "\n".join(lines)

    def _cut(self, told: int) -> str:
        whole = len(self.tokens)
        return f" · the first {told} of {whole} are shown" if told < whole else ""

    def _table(self, most: int) -> str:
        rows, size = [], 0
        for at, token in enumerate(self.tokens[:MOST_ROWS]):
            row = (
                f"<tr><td>{at + 1}</td><td>{inert(_quoted(token.piece))}</td>"
                f"<td>{_percent(token.probability)}</td><td>{inert(_others(token, 5))}</td></tr>"
            )
            size += len(row)
            if size > most:
                break
            rows.append(row)
        heads = "".join(
            f'<th scope="col">{name}</th>' for name in ("", "token", "probability", "also likely")
        )
        cut = self._cut(len(rows)).removeprefix(" · ")
        return (
            f"<details><summary>{_SMALL}As a table</small></summary><table><thead><tr>{heads}</tr>"
            f"</thead><tbody>{''.join(rows)}</tbody></table>{cut and f'<p>{_SMALL}{cut}</small></p>'}"
            "</details>"
        )

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"text/html": self.to_html(), "text/plain": self.to_text()}


def scores(logprobs: Mapping[str, Any] | None) -> tuple[Mapping[str, Any], ...] | None:
    """A choice's `logprobs`, of a chat or of a text completion, as the chat's list; None where there are
    none. A prompt's first token, which has no probability, is left out.
    """
    if logprobs is None:
        return None
    if "tokens" not in logprobs:
        return tuple(logprobs.get("content") or ())
    tops = logprobs.get("top_logprobs") or [None] * len(logprobs["tokens"])
    return tuple(
        {
            "token": token,
            "logprob": logprob,
            "bytes": None,
            "top_logprobs": [
                {"token": other, "logprob": of, "bytes": None} for other, of in (top or {}).items()
            ],
        }
        for token, logprob, top in zip(
            logprobs["tokens"], logprobs["token_logprobs"], tops, strict=True
        )
        if logprob is not None
    )


def _token(one: Mapping[str, Any], at: int) -> Token:
    try:
        top = [(_bytes(other), _logprob(other)) for other in one.get("top_logprobs") or ()]
        top.sort(key=lambda other: -other[1])
        return Token(_bytes(one), _logprob(one), tuple(top))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InvalidValue(
            f"a token with its log-probability is wanted here, not {one_line(repr(one))[:80]}",
            param=f"logprobs[{at}]",
        ) from error


def _bytes(one: Mapping[str, Any]) -> bytes:
    piece = one.get("bytes")
    return bytes(piece) if piece is not None else str(one["token"]).encode("utf-8", "replace")


def _logprob(one: Mapping[str, Any]) -> float:
    logprob = float(one["logprob"])
    if math.isnan(logprob):
        raise ValueError("not a number")
    # A little more than nothing can come of rounding.
    return min(logprob, 0.0)


def _groups(tokens: Sequence[Token]) -> Iterator[tuple[int, str, Sequence[Token]]]:
    """Where each begins, its text, and its tokens: as many as it takes to have whole characters."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    first, text = 0, ""
    for at, token in enumerate(tokens):
        text += decoder.decode(token.piece)
        if not decoder.getstate()[0] or at - first == _MOST_PARTS - 1:
            yield first, text, tokens[first : at + 1]
            first, text = at + 1, ""
    if first < len(tokens):
        yield first, text + decoder.decode(b"", final=True), tokens[first:]


def _span(first: int, text: str, tokens: Sequence[Token]) -> str:
    probability = math.exp(math.fsum(token.logprob for token in tokens))
    style = next(style for least, style, _ in _STEPS if probability >= least)
    lines = []
    if len(tokens) > 1:
        lines.append(f"{_percent(probability)} “{_marked(text)}”, of {len(tokens)} tokens:")
    for at, token in enumerate(tokens[:_MOST_TOP]):
        lines.append(f"{first + at + 1}. {_percent(token.probability)} {_quoted(token.piece)}")
        lines += [f"    {_percent(math.exp(of))} {_quoted(o)}" for o, of in token.top[:_MOST_TOP]]
    title = inert("\n".join(lines))
    colour = f' style="{style}"' if style else ""
    return f'<span{colour} title="{title}">{inert(_seen(text))}</span>'


def _others(token: Token, most: int) -> str:
    others = [(o, of) for o, of in token.top if o != token.piece][:most]
    return ", ".join(f"{_quoted(other)} {_percent(math.exp(of))}" for other, of in others)


def _percent(probability: float) -> str:
    if 0 < probability < 0.0005:
        return "<0.1%"
    return f"{probability:.1%}".replace(".0%", "%")


def _quoted(piece: bytes) -> str:
    """A token by itself: its text in quotes, or its bytes where these are part of a character."""
    try:
        return f"“{_marked(piece.decode())}”"
    except UnicodeDecodeError:
        return "bytes " + piece[:_LONGEST].hex(" ")


def _marked(text: str, *, spaces: bool = True) -> str:
    """With a mark for each character that is not seen."""
    text = text[:_LONGEST] + "…" * (len(text) > _LONGEST)
    marks = {" ": "␣" if spaces else " ", "\n": "↵", "\t": "⇥"}
    return "".join(marks.get(c) or (c if c.isprintable() else f"⟨U+{ord(c):04X}⟩") for c in text)


def _seen(text: str) -> str:
    """As it is read in a text: with its line breaks, and spaces marked where there is nothing else."""
    lines = [_marked(line, spaces=text.isspace()) for line in text.split("\n")]
    return "↵\n".join(lines) or "∅"
