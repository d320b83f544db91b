"""What chooses a sequence's next token: its native sampler chain, and what is done to the logits
before the chain sees them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...core.messages import Sampled
from ...types import Failure, Sampling, Scored
from ..gate import Choice, Gate
from .binding import quick
from .candidates import Candidates, limit
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
        candidates: Candidates | None = None,
    ) -> None:
        self._vocabulary = vocabulary
        self._candidates = candidates
        self._k = None if candidates is None else limit(sampling, vocabulary.size)
        self._sampling = sampling
        self._chain = sampler_chain(sampling, vocabulary.size)
        self._generated = 0
        self._bound = False
        """Whether the last token was the constraint's."""
        self._failure = matcher if isinstance(matcher, Failure) else None
        self.matcher = None if isinstance(matcher, Failure) else matcher
        self._plain = not (
            sampling.min_tokens
            or sampling.ignore_eos
            or sampling.logprobs is not None
            or self.matcher is not None
        )
        """Whether nothing is to be done with the logits before the chain sees them."""
        reasoning = sampling.reasoning
        self._marking: frozenset[int] = frozenset()
        self._gate: Gate | None = None
        if reasoning is not None:
            self._marking = vocabulary.marking(reasoning.markers)
            if self.matcher is not None:
                self._gate = Gate(reasoning, vocabulary.markup, vocabulary.blank)
        for token in recent:
            quick.llama_sampler_accept(self._chain, token)

    def close(self) -> None:
        quick.llama_sampler_free(self._chain)

    def sample(self, context: Any, slot: int, index: int) -> Sampled:
        """Choose a token by the logits at this index of the batch."""
        if self._failure is not None:
            return Sampled(slot, 0, b"", False, self._failure)
        if self._gate is not None and self._gate.open:
            self._gate = None
        if self._gate is None and self.matcher is not None and self.matcher.stopped:
            return Sampled(slot, self._vocabulary.ends[0], b"", True)
        logits = quick.llama_get_logits_ith(context, index)
        scores = None
        if self._plain:
            token = self._chosen(context, index, logits)
        else:
            row = _array(logits, self._vocabulary.size)
            scores = self._scored(row)
            token = self._held(context, index, row)
        if isinstance(token, Failure):
            return Sampled(slot, 0, b"", False, token)
        self._generated += 1
        piece, end = self._vocabulary.piece(token)
        if token in self._marking:
            piece = self._vocabulary.text(token)
        scored = scores.of(token, logits[token]) if scores is not None and not end else None
        return Sampled(slot, token, piece, end, None, scored, self._bound)

    def score(self, logits: Any, token: int) -> Scored:
        """A token of the prompt, by the logits of the one before it."""
        row = _array(logits, self._vocabulary.size)
        scores = _Scores(row, self._sampling.prompt_logprobs or 0, self._vocabulary)
        return scores.of(token, float(row[token]))

    def _chosen(self, context: Any, index: int, logits: Any) -> int | Failure:
        token: int | None = None
        if self._k is not None and self._candidates is not None:
            row = self._candidates.row(logits, self._vocabulary.size) if self._plain else logits
            token = self._candidates.chosen(self._chain, row, self._k)
        if token is None:
            token = int(quick.llama_sampler_sample(self._chain, context, index))
        # Sampling from NaN or -inf logits yields a token without complaint.
        return token if math.isfinite(logits[token]) else NOT_FINITE

    def _scored(self, row: Any) -> _Scores | None:
        """Log-probabilities, if they are wanted, before anything is made impossible."""
        scores = None
        if self._sampling.logprobs is not None:
            scores = _Scores(row, self._sampling.logprobs, self._vocabulary)
        if self._sampling.ignore_eos or self._generated < self._sampling.min_tokens:
            row[list(self._vocabulary.ends)] = -math.inf
        return scores

    def _held(self, context: Any, index: int, row: Any) -> int | Failure:
        """A token that the constraint allows, where there is one and it has begun."""
        if self._gate is not None:
            return self._gated(self._gate, context, index, row)
        if self.matcher is None:
            return self._chosen(context, index, row)
        self._bound = True
        self.matcher.apply(row)
        token = self.matcher.failed() or self._chosen(context, index, row)
        return token if isinstance(token, Failure) else self.matcher.accept(token) or token

    def _gated(self, gate: Gate, context: Any, index: int, row: Any) -> int | Failure:
        """A token where the constraint has not begun, or may begin with it."""
        assert self.matcher is not None
        extra = self._only(gate.choice(), row)
        token = self.matcher.failed() or self._chosen(context, index, row)
        while isinstance(token, int) and gate.overshoots(self._piece(token)):
            row[token] = -math.inf
            token = self._chosen(context, index, row)
        if isinstance(token, Failure):
            return token
        constrained = extra is not None and token not in extra
        self._bound = constrained
        gate.accept(token, self._piece(token), constrained=constrained)
        return (self.matcher.accept(token) if constrained else None) or token

    def _only(self, choice: Choice, row: Any) -> frozenset[int] | None:
        """Make what the choice is not between impossible. Returns the tokens that the constraint
        does not allow, but the choice does; None where it has no say.
        """
        assert self.matcher is not None
        if choice.free:
            # An answer that ended here would be none.
            row[list(self._vocabulary.ends)] = -math.inf
            return None
        extra = sorted(choice.extra)
        logits = row[extra]
        if not choice.constrained:
            row[:] = -math.inf
            row[extra] = logits
            return None
        self.matcher.apply(row)
        # What both allow is the constraint's: what it allows must not be taken for a marker.
        ours = [token for token in extra if row[token] == -math.inf]
        row[extra] = logits
        return frozenset(ours)

    def _piece(self, token: int) -> bytes:
        if token in self._marking:
            return self._vocabulary.text(token)
        return self._vocabulary.piece(token)[0]


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
