"""What goes into the scheduler (events) and what comes out of it (instructions). Plain values.

Rows and sampled tokens are the Backend's messages too, so that the same scheduler drives a
backend in this process or one behind a socket.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ..types import Ended, Failure, Sampling, Scored


@dataclass(frozen=True, slots=True)
class Capacity:
    """What one loaded model can hold, and how it is shared.

    `slots` places in the KV cache, for sequences and for prefixes that are kept; `sequences` that
    one principal may have running; `kv_tokens` cells of KV cache for all slots together;
    `context_size` tokens for any one sequence; `batch_tokens` rows in one step; `queue` waiting
    sequences; `patience` seconds with a reader that does not read.

    `step_seconds` is what a step may take that holds a prompt while others decode,
    `prompt_seconds` while nobody does. `can_copy`: whether a slot may take part of another's KV;
    `can_trim`: whether a slot's KV can be cut short. `saved_tokens` of KV fit into host memory.
    `weights` are the shares of principals; 1 for whoever is not named. With `lookup` a sequence that
    decodes alone has its next tokens guessed. `idle_rows` of steps cost as much as to move what is kept
    out of their way; 0: it stays while there is room. Prompts of which at least `aside_tokens` are
    to be read beside others may be read with `Aside`; 0: none. Of a step's rows, whole blocks of
    `row_block` are computed.
    """

    slots: int
    kv_tokens: int
    context_size: int
    batch_tokens: int
    queue: int
    sequences: int = 32
    patience: float = 60.0
    step_seconds: float = 0.15
    prompt_seconds: float = 1.0
    can_copy: bool = True
    can_trim: bool = True
    saved_tokens: int = 0
    lookup: bool = False
    idle_rows: int = 0
    aside_tokens: int = 0
    row_block: int = 1
    weights: Mapping[str, float] = field(default_factory=dict)

    @property
    def private_slot(self) -> int:
        """The slot that stands for the context that a reproducible sequence has for itself."""
        return self.slots


MOST_SCORES = 32
"""Tokens of a step whose successors are scored: each has logits for the whole vocabulary."""


@dataclass(slots=True)  # not frozen, which takes four times as long to make: each step has many
class Row:
    """Consecutive tokens of one sequence to decode in a step.

    `start` is the position of the first. With `sample` the last one's logits choose a token. `scores`
    are the tokens that follow these, as many as have one, where their log-probabilities are wanted.

    The last `guessed` of the tokens are guesses: the logits before each choose a token, too, as long as
    the guesses before it were right, and in the end one that nobody has guessed.
    """

    slot: int
    start: int
    tokens: tuple[int, ...]
    sample: bool
    scores: tuple[int, ...] = ()
    guessed: int = 0


@dataclass(slots=True)  # not frozen, as rows are not
class Sampled:
    """The token chosen for a slot and its bytes, or why none could be."""

    slot: int
    token: int
    piece: bytes
    end_of_generation: bool
    failure: Failure | None = None
    scored: Scored | None = None
    """With log-probabilities, where the sequence's `Sampling.logprobs` asks for them."""
    held: bool = False
    """To a constraint, which leaves nothing in the answer to be taken for a marker."""


@dataclass(frozen=True, slots=True)
class PromptScores:
    """Log-probabilities of the tokens that follow those of a row."""

    slot: int
    scored: tuple[Scored, ...]


@dataclass(frozen=True, slots=True)
class AsideRead:
    """What became of a step's `Aside` in the `seconds` that it took. Once it is `done`, the KV of its tokens is in
    the slot. Where it is `refused`, it cannot be had, and nothing has been done. While its context is in the
    `making`, which takes a processor's time, nothing is computed.
    """

    seconds: float
    done: bool = False
    refused: bool = False
    making: bool = False


# Events


@dataclass(frozen=True, slots=True)
class Submitted:
    """A prompt that fits `context_size` together with `max_tokens` (at least 1, or 0 for one whose
    log-probabilities are all that is wanted).
    """

    id: int
    principal: str
    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    stop: tuple[str, ...] = ()
    reproducible: bool = False
    adapter: str = ""
    at: float | None = None
    """When that was, where it is not just now."""


@dataclass(frozen=True, slots=True)
class CancelRequested:
    id: int


@dataclass(frozen=True, slots=True)
class DeadlinePassed:
    """The time that this request was given is over."""

    id: int


@dataclass(frozen=True, slots=True)
class ProgressAsked:
    """Somebody would like to know what this sequence is waiting for."""

    id: int


@dataclass(frozen=True, slots=True)
class ReaderFull:
    """The reader of this sequence has as much unread text as its stream holds."""

    id: int


@dataclass(frozen=True, slots=True)
class ReaderReady:
    id: int


@dataclass(frozen=True, slots=True)
class PublicDeclared:
    """Token sequences at the beginning of prompts that all principals may share."""

    prefixes: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class EngineReady:
    """Nothing is being decoded: the next step may be planned."""


@dataclass(frozen=True, slots=True)
class Idle:
    """There was no step to plan, and for a while nothing has happened."""


@dataclass(frozen=True, slots=True)
class Flushed:
    """What was said has been done, without a step; but nothing is saved under these keys, for want of memory."""

    unsaved: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Stepped:
    """The step is done. `seconds` is what it took, as measured around the native call.

    `threads` is how many computed it: times with different numbers are not compared.
    """

    sampled: tuple[Sampled, ...]
    seconds: float = 0.0
    threads: int = 1
    prompts: tuple[PromptScores, ...] = ()
    aside: AsideRead | None = None
    unsaved: tuple[int, ...] = ()
    """As of `Flushed`."""


@dataclass(frozen=True, slots=True)
class StepAborted:
    """The step was stopped amid its work and has left nothing behind; what it read aside may go on.

    Who gave it up has said so before.
    """


@dataclass(frozen=True, slots=True)
class StepFailed:
    """The step failed, in whole or in part. `failure` goes to every sequence that was in it."""

    failure: Failure


@dataclass(frozen=True, slots=True)
class Halted:
    """The engine ends, with this to say to everybody still here."""

    failure: Failure


Event = (
    Submitted
    | CancelRequested
    | DeadlinePassed
    | ProgressAsked
    | ReaderFull
    | ReaderReady
    | PublicDeclared
    | EngineReady
    | Idle
    | Flushed
    | Stepped
    | StepAborted
    | StepFailed
    | Halted
)

# Instructions


@dataclass(frozen=True, slots=True)
class OpenSlot:
    """Give a slot a sampler for a new sequence; `recent` are its last prompt tokens, for penalties.

    The KV that the slot holds stays. `private_tokens` is set for the private slot alone: the size of
    the context to make for it.
    """

    slot: int
    sampling: Sampling
    recent: tuple[int, ...]
    private_tokens: int = 0


@dataclass(frozen=True, slots=True)
class CloseSlot:
    """Free a slot's sampler, and keep the KV of its first `keep` tokens."""

    slot: int
    keep: int = 0


@dataclass(frozen=True, slots=True)
class TrimSlot:
    """Forget a slot's KV from position `tokens` on."""

    slot: int
    tokens: int


@dataclass(frozen=True, slots=True)
class CopyPrefix:
    """Let the empty slot `target` have the KV of the first `tokens` of `source` too."""

    source: int
    target: int
    tokens: int


@dataclass(frozen=True, slots=True)
class SaveSlot:
    """Copy a slot's KV to host memory under `key`."""

    slot: int
    key: int


@dataclass(frozen=True, slots=True)
class RestoreSlot:
    """Fill an empty slot with the KV that was saved under `key`, which stays saved."""

    key: int
    slot: int


@dataclass(frozen=True, slots=True)
class DropSaved:
    key: int


SlotChange = OpenSlot | CloseSlot | TrimSlot | CopyPrefix | SaveSlot | RestoreSlot | DropSaved


@dataclass(frozen=True, slots=True)
class Aside:
    """Tokens of one prompt for a context of its own, which has `seconds` of this step before its rows
    are decoded, and of each that names the same tokens again, until they are done. `end` is the position up to
    which the prompt is to be read there. `making`: as far as is known its context is still being made, by another
    thread.
    """

    slot: int
    start: int
    tokens: tuple[int, ...]
    seconds: float
    end: int
    making: bool = False

    @property
    def last(self) -> bool:
        return self.start + len(self.tokens) >= self.end


@dataclass(frozen=True, slots=True)
class Step:
    """Decode these rows in one native call; answered by `Stepped`, `StepAborted`, `StepFailed`.

    Rows of the private slot are never in one step with others. All are computed with one adapter, or
    with none. There may be no rows where there is something to read `aside`.
    """

    rows: tuple[Row, ...]
    adapter: str = ""
    aside: Aside | None = None

    @property
    def has_company(self) -> bool:
        """Whether its rows share the processors with a thread that nothing can hold."""
        return self.aside is not None and self.aside.making

    def without_time_aside(self) -> Step:
        """To be tried again: what is read aside has had its time."""
        return self if self.aside is None else replace(self, aside=replace(self.aside, seconds=0.0))


@dataclass(slots=True)  # not frozen, as rows are not
class Emit:
    """Text of an answer or of the reasoning before it, with the tokens that it came from where
    log-probabilities are wanted.
    """

    id: int
    text: str
    scored: tuple[Scored, ...] = ()
    reasoning: bool = False
    prompt: bool = False
    """The tokens are the prompt's, and there is no text."""


@dataclass(frozen=True, slots=True)
class Progress:
    """What a sequence without a token is waiting for.

    `position` requests go before it, as things stand; `reason` says for what it waits. Once it is
    `admitted`, `prompt_done` of its prompt's tokens are in the cache.
    """

    id: int
    position: int
    reason: str
    admitted: bool = False
    prompt_done: int = 0


@dataclass(frozen=True, slots=True)
class Finish:
    id: int
    ended: Ended


Instruction = SlotChange | Step | Emit | Progress | Finish
