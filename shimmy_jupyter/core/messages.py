"""What goes into the scheduler (events) and what comes out of it (instructions). Plain values.

Rows and sampled tokens are the Backend's messages too, so that the same scheduler drives a
backend in this process or one behind a socket.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..types import Ended, Failure, Sampling


@dataclass(frozen=True, slots=True)
class Capacity:
    """What one loaded model can hold.

    `slots` sequences at a time; `kv_tokens` cells of KV cache shared by all of them;
    `context_size` tokens for any one; `batch_tokens` rows in one step; `queue` waiting sequences;
    `patience` seconds with a reader that does not read.
    """

    slots: int
    kv_tokens: int
    context_size: int
    batch_tokens: int
    queue: int
    patience: float = 60.0


@dataclass(frozen=True, slots=True)
class Row:
    """Consecutive tokens of one sequence to decode in a step.

    `start` is the position of the first. With `sample` the last one's logits choose a token.
    """

    slot: int
    start: int
    tokens: tuple[int, ...]
    sample: bool


@dataclass(frozen=True, slots=True)
class Sampled:
    """The token chosen for a slot and its bytes, or why none could be."""

    slot: int
    token: int
    piece: bytes
    end_of_generation: bool
    failure: Failure | None = None


# Events


@dataclass(frozen=True, slots=True)
class Submitted:
    """A prompt that fits `context_size` together with `max_tokens` (at least 1)."""

    id: int
    principal: str
    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CancelRequested:
    id: int


@dataclass(frozen=True, slots=True)
class ReaderFull:
    """The reader of this sequence has as much unread text as its stream holds."""

    id: int


@dataclass(frozen=True, slots=True)
class ReaderReady:
    id: int


@dataclass(frozen=True, slots=True)
class EngineReady:
    """Nothing is being decoded: the next step may be planned."""


@dataclass(frozen=True, slots=True)
class Stepped:
    sampled: tuple[Sampled, ...]


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
    | ReaderFull
    | ReaderReady
    | EngineReady
    | Stepped
    | StepFailed
    | Halted
)

# Instructions


@dataclass(frozen=True, slots=True)
class OpenSlot:
    """Prepare a slot for a new sequence; `recent` are its last prompt tokens, for penalties."""

    slot: int
    sampling: Sampling
    recent: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CloseSlot:
    """Forget a slot's KV and sampler."""

    slot: int


@dataclass(frozen=True, slots=True)
class Step:
    """Decode these rows in one batch; answered by `Stepped` or `StepFailed`."""

    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class Emit:
    id: int
    text: str


@dataclass(frozen=True, slots=True)
class Finish:
    id: int
    ended: Ended


Instruction = OpenSlot | CloseSlot | Step | Emit | Finish
