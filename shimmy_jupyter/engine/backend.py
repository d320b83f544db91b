"""What a backend is: something that decodes rows. Calls and results are plain messages.

`load` and `unload` bracket a backend's life; `open`, `step` and `close` are called by one thread
only. `tokenize`, `piece` and the vocabulary's facts do not change after `load` and may be called
from another thread until `unload` begins.
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

    def special_text(self) -> dict[str, str]:
        """The text of special tokens that chat templates name: `bos_token`, `eos_token`."""
        ...

    def open(self, slot: OpenSlot) -> None: ...

    def step(self, step: Step) -> tuple[Sampled, ...]:
        """Decode one batch and sample for the rows that ask. Raises `EngineCrashed`."""
        ...

    def close(self, slot: int) -> None: ...
