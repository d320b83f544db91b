"""A native context: KV cache, batch and sampler chains, and the flag that aborts a decode."""

from __future__ import annotations

import ctypes
import logging
import math
import mmap
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ...core.messages import (
    MOST_SCORES,
    CloseSlot,
    CopyPrefix,
    DropSaved,
    OpenSlot,
    PromptScores,
    RestoreSlot,
    Row,
    Sampled,
    SaveSlot,
    SlotChange,
    TrimSlot,
)
from ...errors import EngineCrashed, EngineLost, ShimmyError
from ...types import Failure
from .binding import native, quick
from .candidates import Candidates
from .constraints import Constraints
from .facts import KV_TYPES, KvType
from .slot import NOT_FINITE, SlotSampler

if TYPE_CHECKING:
    from ..constrain import Matcher

log = logging.getLogger("shimmy_jupyter.llama")

_ABORTED = 2
_SLACK = 8
"""Of a saved sequence, a buffer that is used again may be larger by one part in so many."""
Asked = tuple[int, int, tuple[int, ...]]
"""A slot, the batch index whose logits choose its token, and guesses at that and those after it."""


@dataclass(frozen=True, slots=True)
class ContextSpec:
    """Sizes in tokens. With `own` each slot has its own part of the cache; with `moves` there is one more
    sequence, by way of which parts of others come and go.
    """

    kv_tokens: int
    slots: int
    batch_tokens: int
    threads: int
    own: bool = False
    moves: bool = False
    kv: KvType = KV_TYPES["f16"]


class Interrupt(Protocol):
    """What llama.cpp asks between two nodes whether to go on."""

    def attach(self, context: Any) -> None: ...


class AbortFlag:
    """Two bytes that llama.cpp asks about with `strlen`: no Python runs, and no GIL is needed.

    A callback in Python would be called hundreds of times a step.
    """

    def __init__(self) -> None:
        self._bytes = ctypes.create_string_buffer(2)
        self._strlen = ctypes.CDLL(None).strlen

    def attach(self, context: Any) -> None:
        callback = ctypes.cast(self._strlen, native.ggml_abort_callback)
        native.llama_set_abort_callback(context, callback, ctypes.addressof(self._bytes))

    def raise_(self) -> None:
        self._bytes[0] = b"\x01"

    def lower(self) -> None:
        self._bytes[0] = b"\x00"


class Context:
    """One thread uses it. Where llama.cpp could not make it, `ok` is False."""

    def __init__(
        self, model: Any, constraints: Constraints, spec: ContextSpec, flag: Interrupt
    ) -> None:
        params = native.llama_context_default_params()
        params.n_ctx = spec.kv_tokens
        params.n_batch = params.n_ubatch = spec.batch_tokens
        params.n_seq_max = spec.slots + spec.moves
        params.n_outputs_max = spec.slots + MOST_SCORES
        params.n_threads = params.n_threads_batch = spec.threads
        params.flash_attn_type = native.LLAMA_FLASH_ATTN_TYPE_AUTO
        params.kv_unified = not spec.own
        params.type_k = params.type_v = spec.kv.number
        params.no_perf = True
        self.handle = native.llama_init_from_model(model, params)
        self.ok = bool(self.handle)
        self.samplers: dict[int, SlotSampler] = {}
        self.saved: dict[int, tuple[mmap.mmap, int]] = {}
        """By key, a buffer and how much of it is used."""
        self.unsaved: list[int] = []
        """Keys for which there was no memory, and nobody has been told yet."""
        self._candidates = Candidates()
        self._spare: mmap.mmap | None = None
        """The last buffer that was given back: memory that is new to a process costs six times the copy."""
        self._constraints = constraints
        self._vocabulary = constraints.vocabulary
        self._flag = flag
        self._adapter: Any = None
        self._threads = spec.threads
        self._alone = spec.slots == 1
        self._passing = spec.slots
        """The one by way of which parts come and go."""
        self._passed: mmap.mmap | None = None
        if not self.ok:
            return
        self.memory = quick.llama_get_memory(self.handle)
        self.batch = native.llama_batch_init(spec.batch_tokens, 0, 1)
        for i in range(spec.batch_tokens):
            self.batch.n_seq_id[i] = 1
        flag.attach(self.handle)

    def close(self) -> None:
        if not self.ok:
            return
        self.ok = False
        for slot in list(self.samplers):
            self._close_sampler(slot)
        self.saved.clear()
        self._spare = self._passed = None
        native.llama_batch_free(self.batch)
        native.llama_free(self.handle)

    # What a slot holds

    def apply(self, change: SlotChange) -> None:
        match change:
            case OpenSlot():
                self.samplers[change.slot] = self._sampler(change)
            case CloseSlot():
                self._close_sampler(change.slot)
                self.trim(change.slot, change.keep)
            case TrimSlot():
                self.trim(change.slot, change.tokens)
            case CopyPrefix(source, target, tokens):
                quick.llama_memory_seq_cp(self.memory, source, target, 0, tokens)
            case SaveSlot():
                self._save(change.slot, change.key)
            case RestoreSlot():
                self._restore(change.key, change.slot)
            case DropSaved():
                self._spare, _ = self.saved.pop(change.key, (None, 0))

    def _sampler(self, slot: OpenSlot) -> SlotSampler:
        matcher: Matcher | Failure | None = None
        if slot.sampling.constraint is not None:
            try:
                matcher = self._constraints.matcher(slot.sampling.constraint)
            except ShimmyError as error:
                matcher = Failure(error.code, error.message)
        return SlotSampler(slot.sampling, self._vocabulary, slot.recent, matcher, self._candidates)

    def _close_sampler(self, slot: int) -> None:
        self.samplers.pop(slot).close()

    def trim(self, slot: int, tokens: int) -> None:
        """Forget positions from `tokens` on."""
        quick.llama_memory_seq_rm(self.memory, slot, tokens or -1, -1)

    def _save(self, slot: int, key: int) -> None:
        spare, self._spare = self._spare, None
        try:
            self.saved[key] = self._copied(slot, spare)
        except OSError as error:
            log.warning("an earlier prompt's KV is given up, and not saved: %s", error.strerror)
            self.unsaved.append(key)

    def take_unsaved(self) -> tuple[int, ...]:
        keys, self.unsaved = tuple(self.unsaved), []
        return keys

    def _copied(self, slot: int, buffer: mmap.mmap | None) -> tuple[mmap.mmap, int]:
        """Its KV, in the buffer if that is of the right size, and how much of it that is. Raises `OSError`
        where there is no memory for it.
        """
        size = quick.llama_state_seq_get_size(self.handle, slot)
        # No array of ctypes: each size would be a type of its own, which stays for long. And no bytearray: it
        # is set to zero first, which takes longer than the copy, and keeps the GIL.
        if buffer is None or not size <= len(buffer) <= size + size // _SLACK:
            buffer = mmap.mmap(-1, size)
        begin = ctypes.byref(ctypes.c_uint8.from_buffer(buffer))
        if native.llama_state_seq_get_data(self.handle, begin, size, slot) != size:
            raise EngineLost("llama.cpp could not save a sequence's KV")
        return buffer, size

    def _restore(self, key: int, slot: int) -> None:
        self._fill_slot(slot, *self.saved[key])

    def _fill_slot(self, slot: int, data: mmap.mmap, size: int) -> None:
        begin = ctypes.byref(ctypes.c_uint8.from_buffer(data))
        if not native.llama_state_seq_set_data(self.handle, begin, size, slot):
            raise EngineLost("llama.cpp could not restore a sequence's KV")

    def part(self, slot: int, begin: int, end: int) -> tuple[mmap.mmap, int]:
        """The KV of positions `begin` to `end`, in a buffer that holds it until the next call, and its size.
        Raises `OSError` where there is no memory for it.
        """
        quick.llama_memory_seq_cp(self.memory, slot, self._passing, begin, end)
        try:
            self._passed, size = self._copied(self._passing, self._passed)
        finally:
            self.trim(self._passing, 0)
        return self._passed, size

    def add(self, slot: int, data: mmap.mmap, size: int) -> None:
        """Let a slot have what another context's `part` was."""
        self._fill_slot(self._passing, data, size)
        quick.llama_memory_seq_cp(self.memory, self._passing, slot, -1, -1)
        self.trim(self._passing, 0)

    # Decoding

    def decode(
        self, rows: Sequence[Row], threads: int, adapter: Any = None
    ) -> tuple[float, list[Asked]] | None:
        """Seconds and what to sample; None where it was aborted."""
        if threads != self._threads:
            quick.llama_set_n_threads(self.handle, threads, threads)
            self._threads = threads
        if adapter is not self._adapter:
            self._use(adapter)
        asked = self._fill(rows)
        asking = [self.samplers[slot] for slot, _, _ in asked if slot in self.samplers]
        matchers = [one.matcher for one in asking if one.matcher is not None]
        if matchers:
            self._constraints.prepare(matchers)
        began = time.perf_counter()
        code = native.llama_decode(self.handle, self.batch)
        seconds = time.perf_counter() - began
        if code == _ABORTED:
            for row in rows:
                self.trim(0 if self._alone else row.slot, row.start)
            return None
        if code != 0:
            raise EngineCrashed(f"llama.cpp could not decode this batch (llama_decode: {code})")
        return seconds, asked

    def _use(self, adapter: Any) -> None:
        count = int(adapter is not None)
        adapters = (native.llama_adapter_lora_p_ctypes * 1)(adapter)
        scales = (ctypes.c_float * 1)(1.0)
        if native.llama_set_adapters_lora(self.handle, adapters, count, scales):
            raise EngineCrashed("llama.cpp could not use this adapter")
        self._adapter = adapter

    def sample(self, asked: Asked) -> Iterator[Sampled]:
        """A token; and for each guess that was right, the one after it."""
        slot, index, guesses = asked
        for offset, guess in enumerate([*guesses, None]):
            one = self.samplers[slot].sample(self.handle, slot, index + offset)
            yield one
            if one.token != guess or one.failure is not None or one.end_of_generation:
                return

    def scores(self, rows: Sequence[Row]) -> tuple[PromptScores, ...]:
        """Of the rows that ask for them, after the step."""
        found, at = [], 0
        for row in rows:
            if row.scores:
                sampler = self.samplers[row.slot]
                scored = [
                    sampler.score(quick.llama_get_logits_ith(self.handle, at + i), token)
                    for i, token in enumerate(row.scores)
                ]
                found.append(PromptScores(row.slot, tuple(scored)))
            at += len(row.tokens)
        return tuple(found)

    def works(self) -> str | None:
        """Decode one token, so that the first request does not pay for first touches.

        Returns what is wrong with the model, if anything.
        """
        token = max(0, self._vocabulary.bos)
        result = self.decode([Row(0, 0, (token,), sample=True)], self._threads)
        if result is None or not math.isfinite(quick.llama_get_logits_ith(self.handle, 0)[token]):
            return NOT_FINITE.message
        # Zeroing gigabytes of KV takes long enough to let others run meanwhile.
        native.llama_memory_clear(self.memory, True)
        return None

    def _fill(self, rows: Sequence[Row]) -> list[Asked]:
        batch, at = self.batch, 0
        token, position, sequence, logits = batch.token, batch.pos, batch.seq_id, batch.logits
        asked: list[Asked] = []
        for row in rows:
            slot = 0 if self._alone else row.slot
            for offset, value in enumerate(row.tokens):
                token[at] = value
                position[at] = row.start + offset
                sequence[at][0] = slot
                logits[at] = offset < len(row.scores)
                at += 1
            if row.sample:
                first = at - 1 - row.guessed
                for i in range(first, at):
                    logits[i] = True
                asked.append((row.slot, first, row.tokens[len(row.tokens) - row.guessed :]))
        batch.n_tokens = at
        return asked
