"""The `Backend` on llama.cpp: one model, one context for everybody, and one for whoever must be
reproducible. Native failures become `errors.py` here and nowhere else.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import threading
import time
from dataclasses import replace
from typing import Any

from ...core.messages import CloseSlot, OpenSlot, Row, SlotChange, Step
from ...core.planning import PRIVATE_SLICE
from ...errors import EngineCrashed, EngineLost, ModelLoadFailed, UnsupportedParameter
from ...types import Constraint, EmbeddingFacts, ModelFacts
from .. import processors
from ..alarm import Alarm
from ..backend import Embedded, LoadSpec, StepResult
from ..deep import MAX_TEXT_BYTES
from . import amx, facts, files, offload
from .aside import BATCH, Asides, possible
from .binding import available_memory, give_back_memory, initialise, listen, native, quick, why
from .constraints import Constraints
from .context import AbortFlag, Context, ContextSpec
from .embedding import EmbeddingContext, embedding_facts, pooling
from .facts import Vocabulary

log = logging.getLogger("shimmy_jupyter.llama")

_DEFAULT_CONTEXT = 8192
_DEFAULT_KV_TOKENS = 16384
_KV_MEMORY_SHARE = 4
_OWN_CACHES_BYTES = 256 << 20
_MOST_SLOTS = 255  # llama.cpp's own limit is one more, which parts of sequences pass through
_MOST_ADAPTERS = 32
"""Freed with the model only, as the KV cache's sequences refer to them."""


class LlamaBackend:
    """A GGUF file loaded by llama.cpp."""

    def __init__(self) -> None:
        self._model: Any = None
        self._vocabulary: Vocabulary
        self._constraints: Constraints | None = None
        self._shared: Context | None = None
        self._private: Context | None = None
        self._private_slot, self._kv = -1, facts.KV_TYPES["f16"]
        self._asides: Asides | None = None
        self._embedding: EmbeddingContext | None = None
        self._embedding_facts: EmbeddingFacts | None = None
        self._flag = AbortFlag()
        self._alarm = Alarm(self._flag.raise_)
        self._adapters: dict[str, Any] = {}
        self._can_trim = True
        self._threads = self._private_threads = 1
        """Of a reproducible sequence always the same: one is left to whoever else is busy, beside whom all
        of them would take many times as long.
        """
        self._in_use = threading.Lock()
        """Held while tokenizing, so that the model is not freed under another thread's hands."""

    # Loading

    def load(self, spec: LoadSpec) -> ModelFacts:
        initialise()
        _be_nice(spec.nice)
        layers = self._load_model(spec)
        try:
            return self._load_context(spec, layers)
        except BaseException:
            self.unload()
            raise

    def _load_model(self, spec: LoadSpec) -> int:
        """Returns the layers that are on a GPU."""
        wanted = offload.layers(spec, _DEFAULT_KV_TOKENS)
        while True:
            params = native.llama_model_default_params()
            params.n_gpu_layers = wanted
            params.use_extra_bufts = amx.usable()
            listen()
            self._model = files.opened(spec, params)
            if self._model:
                return wanted
            if not wanted:
                raise ModelLoadFailed(f"llama.cpp refused the file: {why(spec.path)}")
            log.warning("%d layers do not fit on the GPU: %s", wanted, why(spec.path))
            wanted //= 2

    def _load_context(self, spec: LoadSpec, layers: int) -> ModelFacts:
        model = self._model
        if quick.llama_model_has_encoder(model) or not quick.llama_model_has_decoder(model):
            raise ModelLoadFailed("this model has an encoder: it cannot continue a prompt")
        self._vocabulary = vocabulary = Vocabulary(model)
        self._embedding_facts = embedding_facts(model, spec.context_size or sys.maxsize)
        self._threads = spec.threads or processors.available()
        self._private_threads = spec.threads or max(1, self._threads - 1)
        # Where every token asks for an output, a long prompt would end the process.
        if not facts.is_causal(model) or pooling(model) == "rank":
            return self._load_embedding(layers)
        self._constraints = constraints = Constraints(vocabulary)
        self._can_trim = not (
            quick.llama_model_is_recurrent(model) or quick.llama_model_is_hybrid(model)
        )
        context_size, shape = self._sizes(spec)
        offloaded = layers and quick.llama_supports_gpu_offload()
        pooled = not shape.own and self._can_trim and not offloaded
        shape = replace(shape, moves=pooled and spec.aside_bytes > 0 and possible())
        self._private_slot, self._kv = shape.slots, shape.kv
        self._shared = Context(model, constraints, shape, self._flag)
        if not self._shared.ok:
            raise ModelLoadFailed(
                f"llama.cpp could not make a context of {shape.kv_tokens} tokens"
                f" in {spec.kv_type}; lower ShimmyEngine.kv_tokens or ShimmyEngine.context_size"
                + (", or set ShimmyEngine.kv_type to f16" if spec.kv_type != "f16" else "")
            )
        try:
            wrong = self._shared.works()
        except EngineCrashed as error:
            raise ModelLoadFailed(f"the model failed on its first token: {error}") from error
        if wrong is not None:
            raise ModelLoadFailed(wrong)
        cell = facts.kv_bytes_per_token(model, shape.kv)
        if shape.moves:
            most = spec.aside_bytes // cell
            own = replace(shape, slots=1, batch_tokens=BATCH, kv_tokens=most)
            self._asides = Asides(model, constraints, self._shared, own, cell)
        texts = vocabulary.texts()
        return replace(
            self._facts(layers),
            context_size=context_size,
            kv_tokens=shape.kv_tokens,
            chat_template=facts.chat_template(model),
            special=vocabulary.named(),
            infill=vocabulary.infill(),
            longest_token=max(map(len, texts)),
            special_tokens=tuple(vocabulary.special(texts)),
            slots=shape.slots,
            can_copy=not shape.own,
            can_trim=self._can_trim,
            can_read_aside=shape.moves,
            row_block=1 if offloaded else amx.row_block(native.llama_print_system_info()),
            kv_bytes_per_token=cell,
            state_bytes=facts.state_bytes_of(model),
        )

    def _load_embedding(self, layers: int) -> ModelFacts:
        """Of a model that cannot continue a prompt."""
        if self._embedding_facts is None:
            raise ModelLoadFailed("this model neither continues a prompt nor makes vectors")
        if facts.is_causal(self._model):
            raise ModelLoadFailed("this reranker has a prompt of its own for pairs: not supported")
        wrong = self._embedding_context().works()
        if wrong is not None:
            raise ModelLoadFailed(wrong)
        # A word that is not in the vocabulary is one token, however long.
        return replace(
            self._facts(layers), can_generate=False, slots=1, longest_token=MAX_TEXT_BYTES
        )

    def _facts(self, layers: int) -> ModelFacts:
        model = self._model
        idle = offload.unused()
        if idle is not None:
            log.warning("%s", idle)
        longest = self._embedding_facts.tokens if self._embedding_facts is not None else 1
        return ModelFacts(
            architecture=facts.metadata(model).get("general.architecture", ""),
            description=facts.description(model),
            parameters=quick.llama_model_n_params(model),
            size_bytes=quick.llama_model_size(model),
            context_size=longest,
            kv_tokens=longest,
            vocabulary=self._vocabulary.size,
            chat_template=None,
            embedding=self._embedding_facts,
            threads=self._threads,
            offloaded_layers=layers if quick.llama_supports_gpu_offload() else 0,
            notes=(idle,) if idle is not None else (),
        )

    def _embedding_context(self) -> EmbeddingContext:
        """Made when it is first asked for, as it takes memory of its own."""
        if self._embedding is None:
            if self._embedding_facts is None:
                raise EngineCrashed("this model makes no vectors")
            context = EmbeddingContext(
                self._model,
                self._vocabulary,
                self._embedding_facts,
                threads=self._threads,
                flag=self._flag,
            )
            if not context.ok:
                raise EngineCrashed("there is no memory to make vectors at the moment")
            self._embedding = context
        return self._embedding

    def _sizes(self, spec: LoadSpec) -> tuple[int, ContextSpec]:
        """Context per sequence in tokens, and the shape of the cache that all share.

        What is not set follows the model: its trained context up to 8,192; a whole context for each
        slot where all of them are small, for then the others' cells cannot change an answer; else
        a pool of 16,384 for all, or as much as takes a quarter of the memory that is free. A pool has slots
        to spare for prefixes that are kept; recurrent layers' states take a quarter of what is left at most.
        """
        trained = quick.llama_model_n_ctx_train(self._model)
        context = spec.context_size or min(trained, _DEFAULT_CONTEXT)
        if context > trained:
            raise ModelLoadFailed(
                f"ShimmyEngine.context_size is {context}, but the model knows only {trained}"
            )
        kv = facts.KV_TYPES[spec.kv_type]
        per_token = facts.kv_bytes_per_token(self._model, kv)
        pool, free = spec.kv_tokens, spec.free_bytes or available_memory()
        if pool * per_token > free:
            raise ModelLoadFailed(
                f"ShimmyEngine.kv_tokens {pool} needs "
                f"{pool * per_token / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
            )
        left = max(0, free - quick.llama_model_size(self._model)) // _KV_MEMORY_SHARE
        most = max(1, min(_MOST_SLOTS, left // max(1, facts.state_bytes_of(self._model))))
        slots = min(most, spec.running)
        whole = math.ceil(context / 256) * 256
        if not pool and slots * whole * per_token <= _OWN_CACHES_BYTES:
            own = ContextSpec(
                slots * whole, slots, spec.batch_tokens, self._threads, own=True, kv=kv
            )
            return context, own
        if not pool:
            affordable = free // _KV_MEMORY_SHARE // per_token
            pool = max(context, min(_DEFAULT_KV_TOKENS, affordable))
        pool = math.ceil(pool / 256) * 256
        slots = min(most, 2 * slots)
        shape = ContextSpec(pool, slots, spec.batch_tokens, self._threads, kv=kv)
        return min(context, pool), shape

    def unload(self) -> None:
        self._alarm.close()
        with self._in_use:
            if self._asides is not None:
                self._asides.close()
                self._asides = None
            self._close_private()
            if self._embedding is not None:
                self._embedding.close()
                self._embedding = None
            if self._shared is not None:
                self._shared.close()
                self._shared = None
            self._adapters.clear()
            if self._constraints is not None:
                self._constraints.close()
                self._constraints = None
            if self._model:
                native.llama_model_free(self._model)
                self._model = None
                give_back_memory()

    # Use

    def tokenize(self, text: str) -> tuple[int, ...]:
        with self._in_use:
            if not self._model:
                raise EngineLost("the model has been unloaded")
            tokens = self._vocabulary.tokenize(text)
        if tokens is None:
            raise EngineCrashed("llama.cpp could not tokenize the prompt")
        return tokens

    def tokenize_inputs(self, inputs: tuple[tuple[str, ...], ...]) -> tuple[tuple[int, ...], ...]:
        with self._in_use:
            if not self._model:
                raise EngineLost("the model has been unloaded")
            return tuple(map(self._vocabulary.closed, inputs))

    def detokenize(self, tokens: tuple[int, ...]) -> bytes:
        with self._in_use:
            if not self._model:
                raise EngineLost("the model has been unloaded")
            return self._vocabulary.detokenize(tokens)

    def compile(self, constraint: Constraint) -> None:
        with self._in_use:
            if not self._model:
                raise EngineLost("the model has been unloaded")
            if self._constraints is None:
                raise UnsupportedParameter("this model makes embeddings only", param="model")
            self._constraints.compile(constraint)

    def check(self) -> None:
        if not self._model:
            raise EngineLost("the model has been unloaded")

    def load_adapter(self, path: str) -> None:
        if path in self._adapters:
            return
        if len(self._adapters) >= _MOST_ADAPTERS:
            raise ModelLoadFailed(f"this model has {_MOST_ADAPTERS} adapters already, the most")
        listen()
        adapter = native.llama_adapter_lora_init(self._model, os.fsencode(path))
        if not adapter:
            raise ModelLoadFailed(f"llama.cpp refused the adapter: {why(path)}")
        self._adapters[path] = adapter

    def apply(self, change: SlotChange) -> None:
        shared = self._shared
        if shared is None:
            raise EngineLost("the model has been unloaded")
        match change:
            case OpenSlot(private_tokens=size) if size:
                self._open_private(change)
            case CloseSlot(slot=slot) if slot == self._private_slot:
                self._close_private()
            case _:
                if self._asides is not None and isinstance(change, CloseSlot):
                    self._asides.closing(change.slot)
                shared.apply(change)

    def flush(self) -> tuple[int, ...]:
        return self._shared.take_unsaved() if self._shared is not None else ()

    def step(self, step: Step, threads: int, limit: float | None = None) -> StepResult:
        rows = step.rows
        private = bool(rows) and rows[0].slot == self._private_slot
        context = self._private if private else self._shared
        if context is None:
            raise EngineCrashed("there is no memory for a context of its own at the moment")
        adapter = self._adapters[step.adapter] if step.adapter else None
        aside_seconds = 0.0
        if step.aside is not None and self._asides is not None:
            aside_seconds = self._asides.go(step.aside, threads, adapter)
        began = time.perf_counter()
        if limit is not None and self._can_trim:
            self._alarm.arm(limit)
        try:
            threads = self._private_threads if private else threads
            done = context.decode(rows, threads, adapter) if rows else (0.0, [])
        finally:
            self._alarm.disarm()
            # Not before the step: an abort that comes just then would be lost.
            self._flag.lower()
        if done is None:
            return StepResult((), time.perf_counter() - began, aborted=True)
        seconds, asked = done
        # First, as sampling may change the logits.
        prompts = context.scores(rows)
        sampled = [one for ask in asked for one in context.sample(ask)]
        read = None
        if step.aside is not None and self._asides is not None:
            read = self._asides.collect(aside_seconds)
        return StepResult(
            tuple(sampled), seconds, prompts=prompts, aside=read, unsaved=self.flush()
        )

    def embed(self, rows: tuple[Row, ...], threads: int, limit: float | None = None) -> Embedded:
        began = time.perf_counter()
        context = self._embedding_context()
        if limit is not None:
            self._alarm.arm(limit)
        try:
            done = context.embed(rows, threads)
        finally:
            self._alarm.disarm()
            self._flag.lower()
        if done is None:
            return Embedded((), time.perf_counter() - began, aborted=True)
        return Embedded(tuple(done[1]), done[0])

    def abort(self) -> None:
        # What cannot be cut short cannot be taken back either.
        if self._can_trim:
            self._flag.raise_()

    def _open_private(self, slot: OpenSlot) -> None:
        """A context of its own, each time: nothing that was there before can change a sum."""
        tokens = math.ceil(slot.private_tokens / 256) * 256
        spec = ContextSpec(tokens, 1, PRIVATE_SLICE, self._private_threads, kv=self._kv)
        assert self._constraints is not None
        context = Context(self._model, self._constraints, spec, self._flag)
        if not context.ok:
            return
        self._private = context
        context.apply(slot)

    def _close_private(self) -> None:
        if self._private is not None:
            self._private.close()
            self._private = None


def _be_nice(nice: int) -> None:
    """For this thread and those that it starts, which compute. Elsewhere it is the whole process."""
    if nice and sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)
