"""What comes in a request: texts to make vectors of, and prompts that have to fit."""

from __future__ import annotations

from collections.abc import Iterator

from ..errors import ContextLengthExceeded, InvalidValue
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


def check_fits(tokens: int, context: int, param: str, *, answer: int = 0) -> None:
    """Raises `ContextLengthExceeded` for a prompt that leaves no room for so many tokens of an `answer`."""
    over = tokens + answer - context
    if over > 0:
        raise ContextLengthExceeded(
            f"the prompt has {tokens} tokens: {over} too many for this model's context of {context}",
            param=param,
        )


def check_ids(tokens: tuple[int, ...], vocabulary: int, param: str) -> None:
    """Raises `InvalidValue` for what is no token where there are so many."""
    wrong = next((token for token in tokens if not 0 <= token < vocabulary), None)
    if wrong is not None:
        raise InvalidValue(
            f"{str(wrong)[:20]} is not a token of this model, which has 0 to {vocabulary - 1}",
            param=param,
        )
