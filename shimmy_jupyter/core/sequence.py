"""A sequence: one prompt, the tokens decoded for it, and the state that says what it waits for.

    QUEUED ──admit──▶ PREFILL ──last prompt token decoded──▶ DECODE ◀──reader──▶ PAUSED
      │                  │                                      │                   │
      └──────────────────┴───────────── end ◀───────────────────┴───────────────────┘
                                         │  (cancelled while its rows are being decoded:
                                         ▼   CANCELLING until that step returns)
                                       DONE

| state | waits for | held by |
|---|---|---|
| QUEUED | a slot and KV room | `Scheduler.queue` |
| PREFILL | the rest of its prompt to be decoded | `Scheduler.running` |
| DECODE | its next token | `Scheduler.running` |
| PAUSED | its reader to catch up | `Scheduler.running` |
| CANCELLING | the step in progress to return | `Scheduler.running` |
| DONE | nothing | nobody |
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from ..types import Failure, Sampling, Scored, Timings, Usage
from .lookup import Lookup
from .prefix import Owner
from .text import TextAssembler


class State(StrEnum):
    QUEUED = "queued"
    PREFILL = "prefill"
    DECODE = "decode"
    PAUSED = "paused"
    CANCELLING = "cancelling"
    DONE = "done"


@dataclass(slots=True, eq=False)
class Sequence:
    """Mutable, and mutated by `Scheduler` alone. Positions and lengths are in tokens."""

    id: int
    principal: str
    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    text: TextAssembler
    submitted_at: float
    reproducible: bool = False
    adapter: str = ""
    """The one that its steps are computed with; none where it is empty."""
    state: State = State.QUEUED
    slot: int = -1
    cached: int = 0
    """Tokens, prompt's and answer's, whose KV is in the cache."""
    reused: int = 0
    """Of these, the prompt's that were there already."""
    tried: int = 0
    """Rows of its step in progress, or of one that has come to nothing."""
    answer: list[int] = field(default_factory=list)
    scored: list[Scored] = field(default_factory=list)
    """Tokens whose text has not been shown yet, where log-probabilities are wanted."""
    lookup: Lookup = field(default_factory=Lookup)
    prompt_scored: list[Scored] = field(default_factory=list)
    """Tokens of the prompt, where their log-probabilities are wanted; shown when all have been read."""
    aside_refused: bool = False
    """Whether there was no memory to read its prompt in a context of its own."""
    passed: int = 0
    """Tokens reserved by those who were admitted before it although it was their next."""
    thought: int = 0
    """Tokens of the answer that are reasoning."""
    paused: float = 0.0
    """Seconds that it has waited for its reader."""
    turn: int = 0
    """When it was last in a step; who waits longest goes first."""
    admitted_at: float | None = None
    first_token_at: float | None = None
    last_token_at: float | None = None
    in_step: bool = False
    failure: Failure | None = None
    """Why it ends, once the step it is in returns; None where somebody cancelled it."""
    reader_full: bool = False
    reader_full_since: float = 0.0

    @property
    def owner(self) -> Owner:
        """Whose cache it may use."""
        return self.principal, self.adapter

    @property
    def reserved(self) -> int:
        """KV cells set aside at admission, so that a running sequence never runs out."""
        return len(self.prompt) + self.max_tokens

    @property
    def generated(self) -> int:
        return len(self.answer)

    @property
    def prompt_left(self) -> int:
        """Tokens of the prompt that are still to be decoded."""
        return max(0, len(self.prompt) - self.cached)

    @property
    def scores_prompt(self) -> bool:
        """Whether each token of the prompt has to be computed, and its successor scored."""
        return self.sampling.prompt_logprobs is not None

    def computed(self) -> tuple[int, ...]:
        """The tokens whose KV is in the cache."""
        if self.cached <= len(self.prompt):
            return self.prompt[: self.cached]
        return (*self.prompt, *self.answer[: self.cached - len(self.prompt)])

    def usage(self) -> Usage:
        """Of a prompt that was given up, what had been read, and was about to be: that has taken its time."""
        prompt = (
            len(self.prompt) if self.answer else min(self.cached + self.tried, len(self.prompt))
        )
        return Usage(prompt, self.generated, self.reused, self.thought)

    def timings(self, now: float) -> Timings:
        queued_until = self.admitted_at if self.admitted_at is not None else now
        first, last = self.first_token_at, self.last_token_at
        rate = None
        if first is not None and last is not None and last > first:
            rate = (self.generated - 1) / (last - first)
        return Timings(
            queue_ms=(queued_until - self.submitted_at) * 1e3,
            ttft_ms=None if first is None else (first - self.submitted_at) * 1e3,
            tokens_per_second=rate,
        )

    def check_invariants(self) -> None:
        """Of one that is running."""
        running = State.PREFILL, State.DECODE, State.PAUSED, State.CANCELLING
        assert self.state in running, self.state
        assert self.state is not State.CANCELLING or self.in_step
        assert self.state is not State.PAUSED or (self.reader_full and not self.in_step)
        assert self.generated < max(1, self.max_tokens)
        assert self.reused < len(self.prompt)
        if self.generated:
            assert self.cached == len(self.prompt) + self.generated - 1
        else:
            assert self.reused <= self.cached < len(self.prompt)
        assert (self.state is State.PREFILL) <= (self.generated == 0)
