"""Texts to make vectors of, as they come in a request."""

from __future__ import annotations

from collections.abc import Iterator

from ..types import EmbeddingInput
from .deep import MAX_TEXT_BYTES

_AT_ONCE = 64


def batches(
    named: list[tuple[EmbeddingInput, str]],
) -> Iterator[list[tuple[EmbeddingInput, str]]]:
    """A turn's worth each: so many inputs, or about so much text as one may be."""
    some: list[tuple[EmbeddingInput, str]] = []
    size = 0
    for one, name in named:
        own = size_of(one)
        if some and (len(some) == _AT_ONCE or size + own > MAX_TEXT_BYTES):
            yield some
            some, size = [], 0
        some.append((one, name))
        size += own
    if some:
        yield some


def size_of(one: EmbeddingInput) -> int:
    """Bytes of text."""
    return sum(len(text.encode()) for text in texts_of(one))


def texts_of(one: EmbeddingInput) -> tuple[str, ...]:
    return tuple(text for text in one if isinstance(text, str))


def ids_of(one: EmbeddingInput) -> tuple[int, ...]:
    return tuple(token for token in one if isinstance(token, int))
