"""Vectors of token sequences, and scores of rerankers: a context that pools instead of generating.

It stands beside the one that generates, on the same weights, and the same thread uses it. Models
without a cache (BERT and its relatives) compute an input in one piece. Others whose last token is the
vector may have theirs in several.
"""

from __future__ import annotations

import math
import struct
import time
from collections.abc import Sequence
from typing import Any

from ...core.messages import Row
from ...errors import EngineCrashed, InternalError
from ...types import EmbeddingFacts
from .binding import native, quick
from .context import AbortFlag
from .facts import Vocabulary, is_causal, metadata

POOLINGS = ("none", "mean", "cls", "last", "rank")
"""`llama_pooling_type`, by its numbers."""
_ABORTED = 2
_SEQUENCES, _SEQUENCES_DIVISIBLE = 32, 8
_TOKENS, _TOKENS_CAUSAL, _SLICE = 2048, 512, 128
"""The longest input there may be, as what a call needs grows with it; and a slice, where inputs may be
divided. A model that can generate computes logits of each token, and keeps them: 4 bytes for each word
of the vocabulary.
"""


def pooling(model: Any) -> str:
    """How the model makes one vector of a sequence; "none" where it makes none.

    As its file says; a number that llama.cpp does not know would abort the process. Where the file
    says nothing: with classifier labels it is a reranker, as llama.cpp's converter writes it. A
    model with causal attention has its last token pooled, which alone has seen the whole text, and
    for which E5-Mistral and Qwen3-Embedding were trained. Else the mean, as sentence-transformers
    does with a bare encoder. Encoders that hand on to a decoder (T5) pool nothing.
    """
    if quick.llama_model_has_encoder(model) or not quick.llama_model_has_decoder(model):
        return "none"
    values = metadata(model)
    arch = values.get("general.architecture", "")
    said = values.get(f"{arch}.pooling_type")
    if said is not None:
        return POOLINGS[int(said)] if said in {"0", "1", "2", "3", "4"} else "none"
    if quick.llama_model_cls_label(model, 0) is not None:
        return "rank"
    return "mean" if values.get(f"{arch}.attention.causal") == "false" else "last"


def embedding_facts(model: Any, most: int = _TOKENS) -> EmbeddingFacts | None:
    """How the model makes vectors of at most `most` tokens; None where it makes none."""
    kind = pooling(model)
    if kind == "none":
        return None
    classes = kind == "rank"
    get_width = quick.llama_model_n_cls_out if classes else quick.llama_model_n_embd_out
    # Beyond what it was trained on BERT has no position to look up, which would abort the process.
    causal = is_causal(model)
    trained = int(quick.llama_model_n_ctx_train(model))
    recurrent = quick.llama_model_is_recurrent(model) or quick.llama_model_is_hybrid(model)
    divisible = kind == "last" and causal and not recurrent
    longest = min(most, trained, _TOKENS if divisible or not causal else _TOKENS_CAUSAL)
    sequences = _SEQUENCES_DIVISIBLE if divisible else _SEQUENCES
    batch = _SLICE if divisible else longest
    # More sequences than tokens would abort the process.
    return EmbeddingFacts(
        kind, int(get_width(model)), longest, batch, min(sequences, batch), divisible
    )


class EmbeddingContext:
    """One thread uses it. Where there is no memory for it `ok` is False."""

    def __init__(
        self,
        model: Any,
        vocabulary: Vocabulary,
        facts: EmbeddingFacts,
        *,
        threads: int,
        flag: AbortFlag,
    ) -> None:
        self.facts = facts
        self._vocabulary = vocabulary
        self._threads = threads
        self._handle = native.llama_init_from_model(model, self._params())
        self.ok = bool(self._handle)
        if not self.ok:
            return
        # None for models without a cache; clearing that does nothing.
        self._memory = quick.llama_get_memory(self._handle)
        self._batch = native.llama_batch_init(facts.batch_tokens, 0, 1)
        for i in range(facts.batch_tokens):
            self._batch.n_seq_id[i] = 1
            # Of a batch that is pooled every token is an output.
            self._batch.logits[i] = True
        flag.attach(self._handle)

    def _params(self) -> Any:
        facts = self.facts
        params = native.llama_context_default_params()
        # llama.cpp aborts the process where attention without a direction does not have its whole
        # batch in one piece; and where it takes a mean, if the sequences do not divide the tokens.
        size = math.ceil(facts.batch_tokens / facts.sequences) * facts.sequences
        params.n_ctx = size + (facts.tokens if facts.divisible else 0)
        params.n_batch = params.n_ubatch = size
        params.n_seq_max = facts.sequences
        params.n_threads = params.n_threads_batch = self._threads
        params.flash_attn_type = native.LLAMA_FLASH_ATTN_TYPE_AUTO
        params.embeddings = True
        params.pooling_type = POOLINGS.index(facts.pooling)
        # With a cache of its own for each, llama.cpp would cut sequences of unlike length.
        params.kv_unified = True
        params.no_perf = True
        return params

    def close(self) -> None:
        if not self.ok:
            return
        self.ok = False
        native.llama_batch_free(self._batch)
        native.llama_free(self._handle)

    # Use

    def works(self) -> str | None:
        """Embed something, so that the first request does not pay for first touches.

        Returns what is wrong with the model, if anything.
        """
        token = (max(0, self._vocabulary.bos),)
        count = min(2, self.facts.sequences)
        try:
            done = self._compute(
                [Row(slot, 0, token, True) for slot in range(count)], self._threads
            )
        except EngineCrashed as error:
            return error.message
        if done is None or self.facts.pooling != "rank":
            return None
        # Without a classification head, scores would be parts of the first input's state.
        first, last = done[1][0], done[1][-1]
        if math.dist(first, last) <= 1e-3 + 1e-2 * math.hypot(*first):
            return None
        return "the file calls the model a reranker, but has no classification head"

    def embed(self, rows: Sequence[Row], threads: int) -> tuple[float, list[bytes]] | None:
        """Seconds, and the vector of each row that ends its input, as little-endian float32; None
        where it was aborted.

        One native call. A row from position 0 is a new input; what is not continued is forgotten.
        Vectors have length 1; a reranker's are its classes' scores, as they are: the first says how
        relevant a document is to its query. Raises `EngineCrashed` where it failed, also on a vector
        that is not finite.
        """
        done = self._compute(rows, threads)
        if done is None:
            return None
        seconds, vectors = done
        if self.facts.pooling != "rank":
            vectors = [_unit(vector) for vector in vectors]
        return seconds, [struct.pack(f"<{len(vector)}f", *vector) for vector in vectors]

    def _compute(self, rows: Sequence[Row], threads: int) -> tuple[float, list[list[float]]] | None:
        self._check(rows)
        if threads != self._threads:
            quick.llama_set_n_threads(self._handle, threads, threads)
            self._threads = threads
        going_on = {row.slot for row in rows if row.start}
        for slot in range(self.facts.sequences):
            if slot not in going_on:
                self._forget(slot, 0)
        self._fill(rows)
        began = time.perf_counter()
        # Encodes, where there is no cache.
        code = native.llama_decode(self._handle, self._batch)
        seconds = time.perf_counter() - began
        if code == _ABORTED:
            for row in rows:
                self._forget(row.slot, row.start)
            return None
        if code != 0:
            raise EngineCrashed(f"llama.cpp could not embed this batch (llama_decode: {code})")
        return seconds, [self._vector(row.slot) for row in rows if row.sample]

    def _forget(self, slot: int, start: int) -> None:
        if self._memory:
            quick.llama_memory_seq_rm(self._memory, slot, start, -1)

    def _check(self, rows: Sequence[Row]) -> None:
        """What llama.cpp would answer by ending the process, or with somebody else's numbers."""
        facts = self.facts
        tokens = [token for row in rows for token in row.tokens]
        if not self.ok:
            raise InternalError("there is no context to embed with")
        if not rows or not all(row.tokens for row in rows):
            raise InternalError("an input to embed has no tokens")
        if any(row.start + len(row.tokens) > facts.tokens for row in rows):
            raise InternalError(f"an input is longer than {facts.tokens} tokens")
        if len(tokens) > facts.batch_tokens:
            raise InternalError("more inputs than fit into one call")
        slots = {row.slot for row in rows}
        if len(slots) < len(rows) or min(slots) < 0 or max(slots) >= facts.sequences:
            raise InternalError("a slot that does not exist, or twice")
        if not facts.divisible and not all(row.sample and row.start == 0 for row in rows):
            raise InternalError("this model has its inputs in one piece")
        if min(tokens) < 0 or max(tokens) >= self._vocabulary.size:
            raise InternalError("an input has a token that the model does not know")

    def _fill(self, rows: Sequence[Row]) -> None:
        batch, at = self._batch, 0
        token, position, sequences = batch.token, batch.pos, batch.seq_id
        for row in rows:
            for offset, value in enumerate(row.tokens):
                token[at] = value
                position[at] = row.start + offset
                sequences[at][0] = row.slot
                at += 1
        batch.n_tokens = at

    def _vector(self, slot: int) -> list[float]:
        pointer = quick.llama_get_embeddings_seq(self._handle, slot)
        vector: list[float] = pointer[: self.facts.width] if pointer else []
        if vector and all(map(math.isfinite, vector)):
            return vector
        # Masked cells are multiplied with 0, which leaves NaN what it is: not even they may stay.
        quick.llama_memory_clear(self._memory, True)
        raise EngineCrashed(
            "the model computed a vector that is not finite; its file may be damaged"
        )


def _unit(row: list[float]) -> list[float]:
    """The same direction, with length 1; of nothing but zeros there is none."""
    length = math.hypot(*row)
    return [value / length for value in row] if length else row
