"""What a backend is: something that decodes rows. Calls and results are plain messages.

One thread calls `load`, then `open`, `step` and `close`, and at last `unload`. Another may call
`tokenize` meanwhile, as the vocabulary does not change; after `unload` it raises.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ..core.messages import OpenSlot, Sampled, Step
from ..types import ModelFacts


@dataclass(frozen=True, slots=True)
class LoadSpec:
    """How to load a model. Sizes are in tokens; 0 lets the backend choose from the model's facts.

    `threads` 0 is as many as this process may use; `gpu_layers` -1 is all that the build can.
    """

    path: str
    context_size: int = 0
    kv_tokens: int = 0
    slots: int = 32
    batch_tokens: int = 512
    threads: int = 0
    gpu_layers: int = -1


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

    def open(self, slot: OpenSlot) -> None: ...

    def step(self, step: Step) -> tuple[Sampled, ...]:
        """Decode the rows and sample for those that ask, in order. Raises `EngineCrashed`."""
        ...

    def close(self, slot: int) -> None: ...
