"""A scripted backend: no model, no native code. For tests, for UI work and for the docs.

A prompt's tokens are its UTF-8 bytes; an answer's tokens are the pieces that the script gives.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterator, Sequence

from ..core import messages as m
from ..errors import EngineCrashed, EngineLost, InvalidValue, ModelLoadFailed
from ..types import Constraint, EmbeddingFacts, Failure, ModelFacts, Sampling, Scored
from .backend import Embedded, LoadSpec, StepResult

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

    `gate`, when given, must be acquired for every step: a test decides when the engine moves on; an
    abort opens it for the step that waits. `fail_at` names the step, counted from 1, that fails.
    `batches` records each step's rows, `embedded` those of each call that makes vectors, as `embedding`
    says. It holds what slots hold, so that rows at a wrong position,
    or changes of what is not there, are found out.
    """

    def __init__(
        self,
        script: Callable[[str], Sequence[str | bytes]] = echo,
        *,
        gate: threading.Semaphore | None = None,
        fail_at: int | None = None,
        template: str = TEMPLATE,
        embedding: EmbeddingFacts | None = None,
    ) -> None:
        self.script, self.gate, self.fail_at = script, gate, fail_at
        self.batches: list[int] = []
        self.open_slots: set[int] = set()
        self.cells: dict[int, list[int]] = {}
        self.saved: dict[int, list[int]] = {}
        self.adapters: set[str] = set()
        self.loaded = False
        self.template, self.embedding = template, embedding
        self.embedded: list[int] = []
        self._inputs: dict[int, list[int]] = {}
        self._aborted = threading.Event()
        self._pieces: list[bytes] = []
        self._ids: dict[bytes, int] = {}
        self._answers: dict[int, list[int]] = {}
        self._sampling: dict[int, Sampling] = {}
        self._aside: tuple[int, int] | None = None

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
            chat_template=self.template,
            longest_token=8,
            slots=2 * spec.running,
            embedding=self.embedding,
        )

    def unload(self) -> None:
        self.loaded = False
        self.open_slots.clear()
        self.cells.clear()

    def tokenize(self, text: str) -> tuple[int, ...]:
        return tuple(text.encode())

    def tokenize_inputs(self, inputs: tuple[tuple[str, ...], ...]) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple("\n".join(parts).encode()) for parts in inputs)

    def detokenize(self, tokens: tuple[int, ...]) -> bytes:
        known = self._pieces
        return b"".join(
            known[t - _FIRST_PIECE] if t >= _FIRST_PIECE else bytes([t]) if t < END else b""
            for t in tokens
        )

    def compile(self, constraint: Constraint) -> None:
        if "wrong" in constraint.source:
            raise InvalidValue("the script says that this is wrong", param="response_format")

    def check(self) -> None:
        if not self.loaded:
            raise EngineLost("the model has been unloaded")

    def load_adapter(self, path: str) -> None:
        if path.endswith("bad.gguf"):
            raise ModelLoadFailed("the script says that this adapter does not load")
        self.adapters.add(path)

    def apply(self, change: m.SlotChange) -> None:
        match change:
            case m.OpenSlot(slot=slot, sampling=sampling):
                if slot in self.open_slots:
                    raise AssertionError(f"slot {slot} is open")
                self.open_slots.add(slot)
                self.cells.setdefault(slot, [])
                self._sampling[slot] = sampling
            case m.CloseSlot(slot, keep):
                self.open_slots.remove(slot)
                self._answers.pop(slot, None)
                del self.cells[slot][keep:]
            case m.TrimSlot(slot, tokens):
                del self.cells[slot][tokens:]
            case m.CopyPrefix(source, target, tokens):
                self._fill(target, self.cells[source][:tokens])
            case m.SaveSlot(slot, key):
                self.saved[key] = list(self.cells[slot])
            case m.RestoreSlot(key, slot):
                self._fill(slot, list(self.saved[key]))
            case m.DropSaved(key):
                del self.saved[key]

    def flush(self) -> tuple[int, ...]:
        return ()

    def step(self, step: m.Step, threads: int, limit: float | None = None) -> StepResult:
        self._aborted.clear()
        if self.gate is not None:
            self.gate.acquire()
        if self._aborted.is_set():
            return StepResult((), 0.0, aborted=True)
        if step.adapter and step.adapter not in self.adapters:
            raise AssertionError(f"{step.adapter} is not loaded")
        read = self._read_aside(step.aside) if step.aside is not None else None
        self.batches.append(len(step.rows))
        if len(self.batches) == self.fail_at:
            raise EngineCrashed("the script says that this step fails")
        sampled: list[m.Sampled] = []
        for row in step.rows:
            seen = self.cells[row.slot]
            if row.start != len(seen):
                raise AssertionError(f"slot {row.slot} holds {len(seen)}, row starts {row.start}")
            seen.extend(row.tokens)
            if row.sample:
                sampled += self._tokens(row)
        prompts = [
            m.PromptScores(row.slot, tuple(self._prompt_score(row.slot, t) for t in row.scores))
            for row in step.rows
            if row.scores
        ]
        return StepResult(tuple(sampled), 0.0, prompts=tuple(prompts), aside=read)

    def _read_aside(self, part: m.Aside) -> m.AsideRead:
        """Done in the second step that names it."""
        seen = self.cells[part.slot]
        if part.start != len(seen):
            raise AssertionError(f"slot {part.slot} holds {len(seen)}, {part.start} is read aside")
        done = self._aside == (part.slot, part.start)
        self._aside = (part.slot, part.start)
        if done:
            seen.extend(part.tokens)
        return m.AsideRead(part.seconds, done=done)

    def embed(self, rows: tuple[m.Row, ...], threads: int, limit: float | None = None) -> Embedded:
        """The first numbers of a vector are the input's length and its first byte."""
        if self.gate is not None:
            self.gate.acquire()
        self.embedded.append(len(rows))
        size = (self.embedding or EmbeddingFacts("mean", 4, 64, 64, 4)).width
        vectors = []
        for row in rows:
            held = self._inputs.setdefault(row.slot, []) if row.start else []
            if row.start != len(held):
                raise AssertionError(f"slot {row.slot} holds {len(held)}, row starts {row.start}")
            held.extend(row.tokens)
            self._inputs[row.slot] = held
            if row.sample:
                vector = [float(len(held)), float(held[0]), *[0.0] * size][:size]
                vectors.append(struct.pack(f"<{size}f", *vector))
        return Embedded(tuple(vectors), 1e-6)

    def abort(self) -> None:
        self._aborted.set()
        if self.gate is not None:
            self.gate.release()

    def _fill(self, slot: int, tokens: list[int]) -> None:
        if self.cells.get(slot):
            raise AssertionError(f"slot {slot} is not empty")
        self.cells[slot] = tokens

    def _tokens(self, row: m.Row) -> Iterator[m.Sampled]:
        for guess in [*row.tokens[len(row.tokens) - row.guessed :], None]:
            one = self._next(row.slot)
            yield one
            if one.token != guess or one.failure is not None:
                return

    def _next(self, slot: int) -> m.Sampled:
        if slot not in self._answers:
            prompt = bytes(self.cells[slot]).decode()
            self._answers[slot] = [self._id(piece) for piece in self.script(prompt)][::-1]
        left = self._answers[slot]
        if not left:
            return m.Sampled(slot, END, b"", True)
        token = left.pop()
        piece = self._pieces[token - _FIRST_PIECE]
        if piece == b"\0nan":
            failure = Failure("generation_failed", "the model's logits are not finite")
            return m.Sampled(slot, token, b"", False, failure)
        return m.Sampled(slot, token, piece, False, None, self._scored(slot, token, piece))

    def _scored(self, slot: int, token: int, piece: bytes) -> Scored | None:
        """As if every token were a little less likely than the one before it in the vocabulary."""
        count = self._sampling[slot].logprobs
        if count is None:
            return None
        top = tuple((t, bytes([t]), -0.1 * (t + 1)) for t in range(count))
        return Scored(token, piece, -0.001 * token, top)

    def _prompt_score(self, slot: int, token: int) -> Scored:
        count = self._sampling[slot].prompt_logprobs or 0
        top = tuple((t, bytes([t]), -0.1 * (t + 1)) for t in range(count))
        return Scored(token, bytes([token]), -0.001 * token, top)

    def _id(self, piece: str | bytes) -> int:
        data = piece.encode() if isinstance(piece, str) else piece
        if data not in self._ids:
            self._ids[data] = _FIRST_PIECE + len(self._pieces)
            self._pieces.append(data)
        return self._ids[data]
