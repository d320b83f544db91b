"""What a backend is: something that decodes rows. Calls and results are plain messages, so that the
same backend can sit in this process or behind a socketpair.

One thread calls `load`, then `load_adapter`, `apply`, `step` and `embed`, and at last `unload`. Another
may call `tokenize`, `tokenize_inputs`, `detokenize`, `compile`, `check` and `abort` meanwhile, as the
vocabulary does not change; after `unload` all but `abort` raise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from ..core.idleness import IDLE_ROWS
from ..core.messages import AsideRead, Capacity, PromptScores, Row, Sampled, SlotChange, Step
from ..core.room import running_limit
from ..types import Constraint, ModelFacts

_ASIDE_TOKENS = 512
"""Of a prompt, from which on it is worth a context of its own."""
_FLOPS = 5e10
"""Of a modest processor."""


@dataclass(frozen=True, slots=True)
class LoadSpec:
    """How to load a model. Sizes are in tokens; 0 lets the backend choose from the model's facts.

    `parts` are the further files of a model that is split, in order. `sequences` that one principal may
    have running; `threads` 0 is as many as this process may use; `gpu_layers` -1 is as many as fit; `nice` is added to the scheduling priority of the threads
    that compute. `kv_type` is how the KV cache holds its numbers: f16, q8_0 or q4_0. With
    `prompt_lookup` a sequence that decodes alone has its next tokens guessed. `free_bytes` of memory are
    what a cache of no set size may be a part of; 0: what the system says. `aside_bytes` of KV are the most for a
    prompt that is read aside.
    """

    path: str
    parts: tuple[str, ...] = ()
    context_size: int = 0
    kv_tokens: int = 0
    sequences: int = 32
    batch_tokens: int = 512
    threads: int = 0
    gpu_layers: int = -1
    nice: int = 0
    kv_type: str = "f16"
    prompt_lookup: bool = True
    free_bytes: int = 0
    aside_bytes: int = 1 << 30

    @property
    def running(self) -> int:
        """Sequences of all principals together."""
        return running_limit(self.sequences)


@dataclass(frozen=True, slots=True)
class Sharing:
    """How principals share a loaded model.

    `weights` are their shares, 1 for whoever is not named; `saved_bytes` of host memory hold KV that
    the cache has no room for; `public` are texts at the beginning of prompts, or system messages,
    whose KV all principals may share.
    """

    weights: Mapping[str, float] = field(default_factory=dict)
    saved_bytes: int = 0
    public: tuple[str, ...] = ()


def capacity_of(facts: ModelFacts, spec: LoadSpec, sharing: Sharing, queue: int) -> Capacity:
    """What the scheduler may do with a loaded model, for which `queue` requests may wait."""
    # Not of a recurrent state, which has a size of its own.
    saved = sharing.saved_bytes // facts.kv_bytes_per_token if facts.can_trim else 0
    return Capacity(
        slots=facts.slots,
        sequences=spec.sequences,
        kv_tokens=facts.kv_tokens,
        context_size=facts.context_size,
        batch_tokens=spec.batch_tokens,
        queue=queue,
        can_copy=facts.can_copy,
        can_trim=facts.can_trim,
        saved_tokens=saved,
        weights=sharing.weights,
        lookup=spec.prompt_lookup and facts.can_copy,  # guesses change sums
        idle_rows=0 if facts.offloaded_layers else IDLE_ROWS,
        aside_tokens=_ASIDE_TOKENS if facts.can_read_aside else 0,
        row_block=facts.row_block,
    )


def guess_of(facts: ModelFacts) -> float:
    """Seconds of a prompt's token, until that has been measured: two operations for each parameter."""
    return 2 * max(facts.parameters, 1) / _FLOPS


@dataclass(frozen=True, slots=True)
class StepResult:
    """`sampled` in the order of the rows that asked, several for one with right guesses; `seconds` around
    the native call.

    An `aborted` step has sampled nothing and left every slot's KV as it was.
    """

    sampled: tuple[Sampled, ...]
    seconds: float
    aborted: bool = False
    prompts: tuple[PromptScores, ...] = ()
    """Of the rows that have `scores`, in their order."""
    aside: AsideRead | None = None
    """Where the step had something to read aside and was not aborted."""
    unsaved: tuple[int, ...] = ()
    """Keys under which nothing could be saved, for want of memory, since that was last told: not by a step
    that was aborted or failed.
    """


@dataclass(frozen=True, slots=True)
class Embedded:
    """Vectors of the inputs that ended, in order, each as little-endian float32. An `aborted` call has
    none, and has left what came before it as it was.
    """

    vectors: tuple[bytes, ...]
    seconds: float
    aborted: bool = False


class Backend(Protocol):
    def load(self, spec: LoadSpec) -> ModelFacts:
        """Load the model. Raises `ModelLoadFailed` with a reason that can be shown."""
        ...

    def unload(self) -> None:
        """Free everything. Calling it twice is fine."""
        ...

    def tokenize(self, text: str) -> tuple[int, ...]:
        """Token ids of a whole prompt, special tokens recognised, the model's BOS in front once."""
        ...

    def tokenize_inputs(self, inputs: tuple[tuple[str, ...], ...]) -> tuple[tuple[int, ...], ...]:
        """Token ids of each text, or of two that are to be compared, as the model wants them to
        make a vector of; nothing in them is special.
        """
        ...

    def detokenize(self, tokens: tuple[int, ...]) -> bytes:
        """The tokens' text, special tokens as they are written in a prompt. All are of the
        vocabulary."""
        ...

    def compile(self, constraint: Constraint) -> None:
        """See whether answers of this model can be held to it. Raises `InvalidValue` or
        `UnsupportedParameter`, which say what is wrong, and where.
        """
        ...

    def check(self) -> None:
        """Raises `EngineLost` if nothing can be asked any more, as far as that is known."""
        ...

    def load_adapter(self, path: str) -> None:
        """Load a LoRA adapter, which steps then name by its path; once loaded it stays. Raises
        `ModelLoadFailed`.
        """
        ...

    def apply(self, change: SlotChange) -> None:
        """Change what a slot holds. May be deferred until the next `step` or `flush`, whose errors it has."""
        ...

    def flush(self) -> tuple[int, ...]:
        """Carry out what has been deferred, before nothing is done for a while. Returns what a step's
        `unsaved` would have.
        """
        ...

    def step(self, step: Step, threads: int, limit: float | None = None) -> StepResult:
        """Decode the rows on so many threads, and sample for those that ask, in order.

        Raises `EngineCrashed` when this step failed, `EngineLost` when the engine has. A step that
        takes longer than `limit` seconds, where there is one, is aborted; what it reads aside does not count.
        """
        ...

    def embed(self, rows: tuple[Row, ...], threads: int, limit: float | None = None) -> Embedded:
        """Compute the rows, and a vector for each that ends its input, which is the one with `sample`.

        A row from position 0 is a new input; what is not continued is forgotten. Raises as `step`
        does.
        """
        ...

    def abort(self) -> None:
        """Abort the step in progress, if there is one, from any thread and without the GIL."""
        ...
