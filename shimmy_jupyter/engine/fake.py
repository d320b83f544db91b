"""A scripted backend: no model, no native code. For tests, for UI work and for the docs.

A prompt's tokens are its UTF-8 bytes; an answer's tokens are the pieces that the script gives.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from ..core.messages import OpenSlot, Sampled, Step
from ..errors import EngineCrashed
from ..types import Failure, ModelFacts
from .backend import LoadSpec

END = 256
_FIRST_PIECE = 1000

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def echo(prompt: str) -> Sequence[str]:
    """Answer a chat with its last message, one word a token."""
    last = prompt.removesuffix("\n<assistant>").rpartition(">")[2]
    return [word + " " for word in last.split()]


class FakeBackend:
    """`script` maps the prompt's text to the answer's pieces (str, or bytes to split characters).

    `gate`, when given, must be acquired for every step: a test decides when the engine moves on.
    `fail_at` names the step, counted from 1, that fails. `batches` records each step's rows.
    """

    def __init__(
        self,
        script: Callable[[str], Sequence[str | bytes]] = echo,
        *,
        gate: threading.Semaphore | None = None,
        fail_at: int | None = None,
    ) -> None:
        self.script, self.gate, self.fail_at = script, gate, fail_at
        self.batches: list[int] = []
        self.open_slots: dict[int, list[int]] = {}
        self.loaded = False
        self._pieces: list[bytes] = []
        self._ids: dict[bytes, int] = {}
        self._answers: dict[int, list[int]] = {}

    def load(self, spec: LoadSpec) -> ModelFacts:
        self.loaded = True
        context = spec.context_size or 4096
        return ModelFacts(
            architecture="fake",
            description="a scripted backend",
            parameters=0,
            size_bytes=0,
            context_size=context,
            kv_tokens=spec.kv_tokens or 16 * context,
            vocabulary=_FIRST_PIECE,
            chat_template=TEMPLATE,
            longest_token=8,
        )

    def unload(self) -> None:
        self.loaded = False
        self.open_slots.clear()

    def tokenize(self, text: str) -> tuple[int, ...]:
        return tuple(text.encode())

    def open(self, slot: OpenSlot) -> None:
        self.open_slots[slot.slot] = []

    def step(self, step: Step) -> tuple[Sampled, ...]:
        if self.gate is not None:
            self.gate.acquire()
        self.batches.append(len(step.rows))
        if len(self.batches) == self.fail_at:
            raise EngineCrashed("the script says that this step fails")
        sampled = []
        for row in step.rows:
            seen = self.open_slots[row.slot]
            if row.start != len(seen):
                raise AssertionError(f"slot {row.slot} holds {len(seen)}, row starts {row.start}")
            seen.extend(row.tokens)
            if row.sample:
                sampled.append(self._next(row.slot))
        return tuple(sampled)

    def close(self, slot: int) -> None:
        del self.open_slots[slot]
        self._answers.pop(slot, None)

    def _next(self, slot: int) -> Sampled:
        if slot not in self._answers:
            prompt = bytes(self.open_slots[slot]).decode()
            self._answers[slot] = [self._id(piece) for piece in self.script(prompt)][::-1]
        left = self._answers[slot]
        if not left:
            return Sampled(slot, END, b"", True)
        token = left.pop()
        piece = self._pieces[token - _FIRST_PIECE]
        if piece == b"\0nan":
            failure = Failure("generation_failed", "the model's logits are not finite")
            return Sampled(slot, token, b"", False, failure)
        return Sampled(slot, token, piece, False)

    def _id(self, piece: str | bytes) -> int:
        data = piece.encode() if isinstance(piece, str) else piece
        if data not in self._ids:
            self._ids[data] = _FIRST_PIECE + len(self._pieces)
            self._pieces.append(data)
        return self._ids[data]
