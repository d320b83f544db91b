"""Where two answers part, and how near the model was to the other way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, TypeVar

_BEFORE, _AFTER = 24, 40
_S = TypeVar("_S", str, bytes)


@dataclass(frozen=True, slots=True)
class Score:
    """A token's bytes and log-probability, before sampling changes it; `top` are the likeliest, the
    likeliest first.
    """

    piece: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...] = ()

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> Self:
        """As a chat's answer says it."""
        top = tuple((bytes(one["bytes"]), one["logprob"]) for one in said["top_logprobs"])
        return cls(bytes(said["bytes"]), said["logprob"], top)


@dataclass(frozen=True, slots=True)
class Divergence:
    """From `character` on, counted from 0, two texts differ: after `lead`, which both have, one goes on with
    `before` and the other with `after`, each shortened.

    `token` is which of the new answer's that was, counted from 0, None where that is not known. `chosen` is that
    token; `other`, at this `rank` from 1, the likeliest one that the old text goes on with, None
    where it is not among the likeliest.
    """

    character: int
    lead: str
    before: str
    after: str
    token: int | None = None
    chosen: Score | None = None
    other: Score | None = None
    rank: int | None = None

    @property
    def ended(self) -> bool:
        """Whether the old text had ended where this token begins."""
        return not self.before and self.other is None

    @property
    def gap(self) -> float | None:
        """How much likelier the new token was, as the difference of the natural logarithms; below 0
        where the old one was likelier.
        """
        if self.chosen is None or self.other is None:
            return None
        return self.chosen.logprob - self.other.logprob

    def lines(self) -> Iterator[str]:
        which = f", token {self.token}," if self.token is not None else ""
        yield (
            f"diverged at character {self.character}{which} after {self.lead!r}: it was "
            f"{self.before!r}, and is {self.after!r}"
        )
        if self.chosen is None:
            return
        new = f"{_shown(self.chosen)} has log-probability {self.chosen.logprob:.3f}"
        if self.ended:
            yield f"{new}; before, the answer ended here"
        elif self.other is None or self.gap is None:
            yield f"{new}; what was there before is not among the {len(self.chosen.top)} likeliest"
        else:
            yield (
                f"{new}, {_shown(self.other)} {self.other.logprob:.3f} (rank {self.rank}): "
                f"{abs(self.gap):.3f} apart"
            )


def _shown(score: Score) -> str:
    return repr(score.piece.decode("utf-8", "replace"))


def first_difference(one: _S, other: _S) -> int | None:
    """The first place, counted from 0, at which they are not alike; None where they are the same."""
    if one == other:
        return None
    same, most = 0, min(len(one), len(other))
    step = most
    # Slices compare at the speed of memory; a loop over characters does not.
    while same < most and step:
        if one[same : same + step] == other[same : same + step]:
            same += step
        else:
            step //= 2
    return min(same, most)


def divergence(before: str, after: str, scores: Sequence[Score] = ()) -> Divergence | None:
    """Where the texts part; None where they are the same. `scores` are of all tokens of `after`."""
    at = first_difference(before, after)
    if at is None:
        return None
    found = Divergence(
        at,
        before[max(0, at - _BEFORE) : at],
        before[at : at + _AFTER],
        after[at : at + _AFTER],
    )
    old, new = (text.encode("utf-8", "surrogatepass") for text in (before, after))
    place = _token(old, new, scores)
    if place is None:
        return found
    token, start = place
    if token == len(scores):
        return replace(found, token=token)
    found = replace(found, token=token, chosen=scores[token])
    for rank, (piece, logprob) in enumerate(scores[token].top, 1):
        # What the old text has from where this token begins; up to there both are the same.
        if piece and old.startswith(piece, start):
            return replace(found, other=Score(piece, logprob), rank=rank)
    return found


def _token(old: bytes, new: bytes, scores: Sequence[Score]) -> tuple[int, int] | None:
    """In which of the tokens of `new` it parts from `old`, and where that begins in it; one after the
    last where `new` ends. None where the tokens are not the text.
    """
    # Of bytes: tokens can end amid a character.
    at = first_difference(old, new)
    whole = b"".join(score.piece for score in scores)
    offset = whole.find(new)
    if not scores or offset < 0 or at is None:
        return None
    wanted, start = offset + at, 0
    for index, score in enumerate(scores):
        if start <= wanted < start + len(score.piece):
            # Where the text begins amid a token, what it parts in has the text's beginning.
            return index, max(0, start - offset)
        start += len(score.piece)
    return len(scores), at
