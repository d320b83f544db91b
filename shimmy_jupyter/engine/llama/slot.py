"""What chooses a sequence's next token: its native sampler chain, and what is done to the logits
before the chain sees them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...core.messages import Sampled
from ...types import Failure, Sampling, Scored
from .binding import quick
from .facts import Vocabulary
from .sampling import sampler_chain

if TYPE_CHECKING:
    from ..constrain import Matcher

NOT_FINITE = Failure(
    "generation_failed",
    "the model computed numbers that are not finite; its file is probably damaged",
)
LEAST_LOGPROB = -9999.0
"""Instead of minus infinity, of which JSON knows nothing; OpenAI's number."""


class SlotSampler:
    """Of one sequence, from its beginning to its end. `recent` are its last prompt tokens. Where its
    constraint could not be had, `matcher` is why.
    """

    def __init__(
        self,
        sampling: Sampling,
        vocabulary: Vocabulary,
        recent: Sequence[int] = (),
        matcher: Matcher | Failure | None = None,
    ) -> None:
        self._vocabulary = vocabulary
        self._sampling = sampling
        self._chain = sampler_chain(sampling, vocabulary.size)
        self._generated = 0
        self._failure = matcher if isinstance(matcher, Failure) else None
        self.matcher = None if isinstance(matcher, Failure) else matcher
        self._plain = not (
            sampling.min_tokens or sampling.ignore_eos or sampling.logprobs is not None
        )
        for token in recent:
            quick.llama_sampler_accept(self._chain, token)

    def close(self) -> None:
        quick.llama_sampler_free(self._chain)

    def sample(self, context: Any, slot: int, index: int) -> Sampled:
        """Choose a token by the logits at this index of the batch."""
        if self._failure is not None:
            return Sampled(slot, 0, b"", False, self._failure)
        if self.matcher is not None and self.matcher.stopped:
            return Sampled(slot, self._vocabulary.ends[0], b"", True)
        logits = quick.llama_get_logits_ith(context, index)
        scores = None
        if not self._plain or self.matcher is not None:
            row = _array(logits, self._vocabulary.size)
            if self._sampling.logprobs is not None:
                scores = _Scores(row, self._sampling.logprobs, self._vocabulary)
            if self._sampling.ignore_eos or self._generated < self._sampling.min_tokens:
                row[list(self._vocabulary.ends)] = -math.inf
            if self.matcher is not None:
                self.matcher.apply(row)
                if (failure := self.matcher.failed()) is not None:
                    return Sampled(slot, 0, b"", False, failure)
        token = quick.llama_sampler_sample(self._chain, context, index)
        # Sampling from NaN or -inf logits yields a token without complaint.
        if not math.isfinite(logits[token]):
            return Sampled(slot, token, b"", False, NOT_FINITE)
        self._generated += 1
        if self.matcher is not None and (failure := self.matcher.accept(token)) is not None:
            return Sampled(slot, token, b"", False, failure)
        piece, end = self._vocabulary.piece(token)
        scored = scores.of(token, logits[token]) if scores is not None and not end else None
        return Sampled(slot, token, piece, end, None, scored)


class _Scores:
    """Log-probabilities of a row of logits: x - log Σ exp x, in double precision."""

    def __init__(self, row: Any, count: int, vocabulary: Vocabulary) -> None:
        import numpy as np

        highest = float(row.max())
        with np.errstate(all="ignore"):  # of what is not finite somebody else complains
            total = np.exp(row.astype(np.float64) - highest).sum()
        self._norm = highest + math.log(total) if total > 0 else math.nan
        self._vocabulary = vocabulary
        found: list[int] = np.argpartition(row, -count)[-count:].tolist() if count else []
        likeliest = sorted(found, key=lambda token: (-float(row[token]), token))
        self._top = tuple(self._one(token, float(row[token])) for token in likeliest)

    def of(self, token: int, logit: float) -> Scored:
        return Scored(*self._one(token, logit), self._top)

    def _one(self, token: int, logit: float) -> tuple[int, bytes, float]:
        logprob = min(0.0, max(LEAST_LOGPROB, logit - self._norm))
        return token, self._vocabulary.text(token), logprob


def _array(logits: Any, size: int) -> Any:
    """A writable view of a row."""
    import numpy as np

    return np.ctypeslib.as_array(logits, (size,))
