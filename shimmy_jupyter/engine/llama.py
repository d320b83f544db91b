"""The backend on llama-cpp-python's low-level API, and the only importer of `llama_cpp`.

One context holds every sequence; one `llama_decode` serves all that decode, and others the prompts
(`core.grouping`); each slot has its own sampler chain. Native failures become `errors.py` here and nowhere
else. Short native calls keep the GIL (`ctypes.PyDLL`): giving it up for 150 ns would hand it to
whatever else is running Python in the server for up to 5 ms. Only decoding, loading and
tokenizing release it.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import math
import os
import re
import secrets
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..core.grouping import calls
from ..core.messages import OpenSlot, Row, Sampled, Step
from ..errors import EngineCrashed, ModelLoadFailed
from ..types import Failure, ModelFacts, Sampling
from .backend import LoadSpec

# A failing native assertion would otherwise attach a debugger to the server. Must precede loading.
os.environ.setdefault("GGML_NO_BACKTRACE", "1")

import llama_cpp.llama_cpp as native

log = logging.getLogger("shimmy_jupyter.llama")

_DEFAULT_CONTEXT = 8192
_DEFAULT_KV_TOKENS = 16384
_KV_MEMORY_SHARE = 4
_OWN_CACHES_BYTES = 256 << 20
_SEED_SPACE = 2**32 - 1  # llama.cpp reads 2**32 - 1 itself as "random"
_NOT_FINITE = Failure(
    "generation_failed",
    "the model computed numbers that are not finite; its file is probably damaged",
)


class _Native:
    """The same functions as `native`, bound to a handle that keeps the GIL during the call."""

    def __init__(self) -> None:
        self._library = ctypes.PyDLL(native._lib._name)  # noqa: SLF001  the handle has no other name

    def __getattr__(self, name: str) -> Any:
        typed = getattr(native, name)
        quick = getattr(self._library, name)
        quick.argtypes, quick.restype = typed.argtypes, typed.restype
        setattr(self, name, quick)
        return quick


quick = _Native()

# One step quieter than llama.cpp: what stops us is raised, and says more than its log line.
_LEVELS = {2: logging.DEBUG, 3: logging.INFO, 4: logging.WARNING}


_ERROR = 4
_said = threading.local()


@native.llama_log_callback
def _log(level: int, text: bytes, _user_data: object) -> None:
    line = text.decode("utf-8", "replace").rstrip()
    if level in _LEVELS and line:
        log.log(_LEVELS[level], "%s", line)
        if level == _ERROR:
            _said.first_error = getattr(_said, "first_error", None) or line


def _why(path: str) -> str:
    """What llama.cpp first complained of in this thread, without its prefixes and our paths."""
    line = getattr(_said, "first_error", None) or "it gave no reason"
    reason = line.rpartition("error loading model: ")[2].replace(path, Path(path).name)
    # Also of other files, such as a model's further parts.
    return re.sub(r"(?:[A-Za-z]:)?[/\\][^'\"]*[/\\]", "", reason)


@functools.cache
def _initialise() -> None:
    native.llama_log_set(_log, None)
    native.llama_backend_init()


class LlamaBackend:
    """A GGUF file loaded by llama.cpp. One thread calls `open`, `step`, `close` and `unload`."""

    def __init__(self) -> None:
        self._model: Any = None
        self._context: Any = None
        self._memory: Any = None
        self._batch: Any = None
        self._samplers: dict[int, Any] = {}
        self._pieces: dict[int, tuple[bytes, bool]] = {}
        self._vocabulary: Any = None
        self._vocabulary_size = 0
        self._in_use = threading.Lock()
        """Held while tokenizing, so that the model is not freed under another thread's hands."""

    def load(self, spec: LoadSpec) -> ModelFacts:
        _initialise()
        params = native.llama_model_default_params()
        params.n_gpu_layers = spec.gpu_layers
        _said.first_error = None
        self._model = native.llama_model_load_from_file(os.fsencode(spec.path), params)
        if not self._model:
            raise ModelLoadFailed(f"llama.cpp refused the file: {_why(spec.path)}")
        try:
            return self._load_context(spec)
        except BaseException:
            self.unload()
            raise

    def _load_context(self, spec: LoadSpec) -> ModelFacts:
        if quick.llama_model_has_encoder(self._model) or not quick.llama_model_has_decoder(
            self._model
        ):
            raise ModelLoadFailed("this model has an encoder: it cannot continue a prompt")
        self._vocabulary = quick.llama_model_get_vocab(self._model)
        self._vocabulary_size = quick.llama_vocab_n_tokens(self._vocabulary)
        context_size, kv_tokens, own = self._sizes(spec)
        threads = spec.threads or available_threads()
        params = native.llama_context_default_params()
        params.n_ctx = kv_tokens
        params.n_batch = params.n_ubatch = spec.batch_tokens
        params.n_seq_max = spec.slots
        params.n_outputs_max = spec.slots
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = native.LLAMA_FLASH_ATTN_TYPE_AUTO
        params.kv_unified = not own
        params.no_perf = True
        self._context = native.llama_init_from_model(self._model, params)
        if not self._context:
            raise ModelLoadFailed(
                f"llama.cpp could not make a context of {kv_tokens} tokens; "
                "lower ShimmyEngine.kv_tokens or ShimmyEngine.context_size"
            )
        self._memory = quick.llama_get_memory(self._context)
        self._batch = native.llama_batch_init(spec.batch_tokens, 0, 1)
        for i in range(spec.batch_tokens):
            self._batch.n_seq_id[i] = 1
        self._warm_up()
        metadata = dict(self._metadata())
        texts = self._texts()
        return ModelFacts(
            architecture=metadata.get("general.architecture", ""),
            description=self._description(),
            parameters=quick.llama_model_n_params(self._model),
            size_bytes=quick.llama_model_size(self._model),
            context_size=context_size,
            kv_tokens=kv_tokens,
            vocabulary=self._vocabulary_size,
            chat_template=self._chat_template(),
            special={
                "bos_token": self._token_text(quick.llama_vocab_bos(self._vocabulary)),
                "eos_token": self._token_text(quick.llama_vocab_eos(self._vocabulary)),
            },
            # As stored: byte-level vocabularies write some bytes as two, so this errs upwards.
            longest_token=max(map(len, texts)),
            special_tokens=tuple(self._special(texts)),
        )

    def _sizes(self, spec: LoadSpec) -> tuple[int, int, bool]:
        """Context per sequence and KV pool, in tokens, and whether each slot has its own part of it.

        What is not set follows the model: its trained context up to 8,192; a whole context for each
        slot where all of them are small, for then the others' cells cannot change an answer; else
        a pool of 16,384 for all, or as much as takes a quarter of the memory that is free.
        """
        trained = quick.llama_model_n_ctx_train(self._model)
        context = spec.context_size or min(trained, _DEFAULT_CONTEXT)
        if context > trained:
            raise ModelLoadFailed(
                f"ShimmyEngine.context_size is {context}, but the model knows only {trained}"
            )
        pool = spec.kv_tokens
        free = _available_memory()
        if pool * self._kv_bytes_per_token() > free:
            raise ModelLoadFailed(
                f"ShimmyEngine.kv_tokens {pool} needs "
                f"{pool * self._kv_bytes_per_token() / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
            )
        whole = math.ceil(context / 256) * 256
        if not pool and spec.slots * whole * self._kv_bytes_per_token() <= _OWN_CACHES_BYTES:
            return context, spec.slots * whole, True
        if not pool:
            affordable = free // _KV_MEMORY_SHARE // self._kv_bytes_per_token()
            pool = max(context, min(_DEFAULT_KV_TOKENS, affordable))
        pool = math.ceil(pool / 256) * 256
        return min(context, pool), pool, False

    def _kv_bytes_per_token(self) -> int:
        """Keys and values of all layers, 2 bytes an element (F16, the cache's default type)."""
        metadata = dict(self._metadata())
        arch = metadata.get("general.architecture", "")
        heads = max(1, quick.llama_model_n_head(self._model))
        width = quick.llama_model_n_embd(self._model) // heads
        key = int(metadata.get(f"{arch}.attention.key_length", width))
        value = int(metadata.get(f"{arch}.attention.value_length", width))
        kv_heads = int(quick.llama_model_n_head_kv(self._model))
        layers = int(quick.llama_model_n_layer(self._model))
        return max(1, 2 * layers * kv_heads * (key + value))

    def _warm_up(self) -> None:
        """Decode one token, so that the first request does not pay for first touches."""
        token = max(0, quick.llama_vocab_bos(self._vocabulary))
        self._fill(0, token, 0, 0, logits=True)
        self._batch.n_tokens = 1
        code = native.llama_decode(self._context, self._batch)
        if code != 0:
            raise ModelLoadFailed(f"the model failed on its first token (llama_decode: {code})")
        if not math.isfinite(quick.llama_get_logits_ith(self._context, 0)[token]):
            raise ModelLoadFailed(_NOT_FINITE.message)
        quick.llama_memory_clear(self._memory, True)

    def unload(self) -> None:
        with self._in_use:
            for slot in list(self._samplers):
                quick.llama_sampler_free(self._samplers.pop(slot))
            if self._batch is not None:
                native.llama_batch_free(self._batch)
                self._batch = None
            if self._context:
                native.llama_free(self._context)
                self._context = self._memory = None
            if self._model:
                native.llama_model_free(self._model)
                self._model = self._vocabulary = None

    def tokenize(self, text: str) -> tuple[int, ...]:
        data = text.encode()
        with self._in_use:
            if not self._model:
                raise EngineCrashed("the model has been unloaded")
            room = len(data) + 2
            tokens = (native.llama_token * room)()
            count = native.llama_tokenize(
                self._vocabulary, data, len(data), tokens, room, False, True
            )
            if count < 0:
                raise EngineCrashed("llama.cpp could not tokenize the prompt")
            found = tuple(tokens[:count])
            bos = quick.llama_vocab_bos(self._vocabulary)
            # Not left to llama.cpp: it adds one even where a chat template has written it already.
            if quick.llama_vocab_get_add_bos(self._vocabulary) and found[:1] != (bos,):
                return (bos, *found)
            return found

    def open(self, slot: OpenSlot) -> None:
        self._samplers[slot.slot] = chain = sampler_chain(slot.sampling, self._vocabulary_size)
        for token in slot.recent:
            quick.llama_sampler_accept(chain, token)

    def step(self, step: Step) -> tuple[Sampled, ...]:
        return tuple(sampled for rows in calls(step.rows) for sampled in self._decode(rows))

    def _decode(self, rows: list[Row]) -> list[Sampled]:
        at = 0
        asked: list[tuple[int, int]] = []
        for row in rows:
            last = len(row.tokens) - 1
            for offset, token in enumerate(row.tokens):
                sampled = row.sample and offset == last
                self._fill(at, token, row.start + offset, row.slot, logits=sampled)
                at += 1
            if row.sample:
                asked.append((row.slot, at - 1))
        self._batch.n_tokens = at
        code = native.llama_decode(self._context, self._batch)
        if code != 0:
            raise EngineCrashed(f"llama.cpp could not decode this batch (llama_decode: {code})")
        return [self._sample(slot, index) for slot, index in asked]

    def close(self, slot: int) -> None:
        quick.llama_sampler_free(self._samplers.pop(slot))
        quick.llama_memory_seq_rm(self._memory, slot, -1, -1)

    def _fill(self, at: int, token: int, position: int, slot: int, *, logits: bool) -> None:
        batch = self._batch
        batch.token[at] = token
        batch.pos[at] = position
        batch.seq_id[at][0] = slot
        batch.logits[at] = logits

    def _sample(self, slot: int, index: int) -> Sampled:
        token = quick.llama_sampler_sample(self._samplers[slot], self._context, index)
        # Sampling from NaN or -inf logits yields a token without complaint.
        if not math.isfinite(quick.llama_get_logits_ith(self._context, index)[token]):
            return Sampled(slot, token, b"", False, _NOT_FINITE)
        piece, end = self._piece(token)
        return Sampled(slot, token, piece, end)

    def _piece(self, token: int) -> tuple[bytes, bool]:
        """A token's bytes (none for control tokens) and whether it ends a generation."""
        known = self._pieces.get(token)
        if known is None:
            end = bool(quick.llama_vocab_is_eog(self._vocabulary, token))
            known = self._pieces[token] = (self._bytes(token, special=False), end)
        return known

    def _bytes(self, token: int, *, special: bool) -> bytes:
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            count = quick.llama_token_to_piece(self._vocabulary, token, buffer, size, 0, special)
            if count >= 0:
                return buffer.raw[:count]
            size = -count

    def _token_text(self, token: int) -> str:
        return self._bytes(token, special=True).decode("utf-8", "replace") if token >= 0 else ""

    def _texts(self) -> list[bytes]:
        get = quick.llama_vocab_get_text
        return [get(self._vocabulary, token) or b"" for token in range(self._vocabulary_size)]

    def _special(self, texts: list[bytes]) -> Iterator[str]:
        marked = native.LLAMA_TOKEN_ATTR_CONTROL | native.LLAMA_TOKEN_ATTR_USER_DEFINED
        for token, text in enumerate(texts):
            if quick.llama_vocab_get_attr(self._vocabulary, token) & marked:
                yield text.decode("utf-8", "replace")

    def _chat_template(self) -> str | None:
        template = quick.llama_model_chat_template(self._model, None)
        return template.decode("utf-8", "replace") if template else None

    def _description(self) -> str:
        buffer = ctypes.create_string_buffer(256)
        quick.llama_model_desc(self._model, buffer, len(buffer))
        return buffer.value.decode("utf-8", "replace")

    def _metadata(self) -> Iterator[tuple[str, str]]:
        """Scalar metadata; long values (vocabularies, templates) are left out."""
        buffer = ctypes.create_string_buffer(512)
        for i in range(quick.llama_model_meta_count(self._model)):
            quick.llama_model_meta_key_by_index(self._model, i, buffer, len(buffer))
            key = buffer.value.decode("utf-8", "replace")
            size = quick.llama_model_meta_val_str_by_index(self._model, i, buffer, len(buffer))
            if 0 <= size < len(buffer):
                yield key, buffer.value.decode("utf-8", "replace")


def sampler_chain(sampling: Sampling, vocabulary: int) -> Any:
    """A native sampler chain in llama.cpp's usual order, without the stages that are off."""
    params = native.llama_sampler_chain_default_params()
    params.no_perf = True
    chain = quick.llama_sampler_chain_init(params)

    def add(sampler: Any) -> None:
        quick.llama_sampler_chain_add(chain, sampler)

    if sampling.logit_bias:
        entries = [native.llama_logit_bias(*entry) for entry in sampling.logit_bias]
        biases = (native.llama_logit_bias * len(entries))(*entries)
        add(quick.llama_sampler_init_logit_bias(vocabulary, len(biases), biases))
    repeat, frequency, presence = (
        sampling.repeat_penalty,
        sampling.frequency_penalty,
        sampling.presence_penalty,
    )
    if sampling.repeat_last_n and (repeat != 1 or frequency or presence):
        add(
            quick.llama_sampler_init_penalties(
                vocabulary, sampling.repeat_last_n, repeat, frequency, presence
            )
        )
    if sampling.temperature == 0:
        add(quick.llama_sampler_init_greedy())
        return chain
    if sampling.top_k:
        add(quick.llama_sampler_init_top_k(sampling.top_k))
    if sampling.top_p < 1:
        add(quick.llama_sampler_init_top_p(sampling.top_p, 1))
    if sampling.min_p > 0:
        add(quick.llama_sampler_init_min_p(sampling.min_p, 1))
    add(quick.llama_sampler_init_temp(sampling.temperature))
    seed = secrets.randbelow(_SEED_SPACE) if sampling.seed is None else sampling.seed % _SEED_SPACE
    add(quick.llama_sampler_init_dist(seed))
    return chain


def available_threads() -> int:
    """Processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _available_memory() -> int:
    import psutil

    return int(psutil.virtual_memory().available)
