"""What a loaded model's file says of it, read through llama.cpp."""

from __future__ import annotations

import ctypes
import functools
import math
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ...recurrent import state_bytes
from ...types import Markers
from .binding import native, quick


def metadata(model: Any) -> dict[str, str]:
    """Scalar metadata; long values (vocabularies, templates) are left out."""
    buffer = ctypes.create_string_buffer(512)
    found = {}
    for i in range(quick.llama_model_meta_count(model)):
        quick.llama_model_meta_key_by_index(model, i, buffer, len(buffer))
        key = buffer.value.decode("utf-8", "replace")
        size = quick.llama_model_meta_val_str_by_index(model, i, buffer, len(buffer))
        if 0 <= size < len(buffer):
            found[key] = buffer.value.decode("utf-8", "replace")
    return found


_BOTH_WAYS = frozenset("gemma-embedding llama-embed dream llada llada-moe rnd1".split())
"""Architectures that llama.cpp computes so whatever their file says, or does not."""


def is_causal(model: Any) -> bool:
    """Whether a token sees only those before it; BERT and its like see all."""
    values = metadata(model)
    arch = values.get("general.architecture", "")
    return arch not in _BOTH_WAYS and values.get(f"{arch}.attention.causal") != "false"


@dataclass(frozen=True, slots=True)
class KvType:
    """A ggml type for keys and values: its number, and bits of an element."""

    number: int
    bits: float


KV_TYPES = {
    "f16": KvType(native.GGML_TYPE_F16, 16),
    # Blocks of 32 with a scale.
    "q8_0": KvType(native.GGML_TYPE_Q8_0, 8.5),
    "q4_0": KvType(native.GGML_TYPE_Q4_0, 4.5),
}


def state_bytes_of(model: Any) -> int:
    """Of each sequence, whatever its length."""
    found = metadata(model)
    arch = found.get("general.architecture", "")

    def number(key: str) -> int:
        text = found.get(f"{arch}.{key}", "")
        return int(text) if text.isdecimal() else 0

    return state_bytes(number)


def kv_bytes_per_token(model: Any, kind: KvType) -> int:
    """Keys and values of all layers."""
    values = metadata(model)
    arch = values.get("general.architecture", "")
    heads = max(1, quick.llama_model_n_head(model))
    width = quick.llama_model_n_embd(model) // heads
    key = int(values.get(f"{arch}.attention.key_length", width))
    value = int(values.get(f"{arch}.attention.value_length", width))
    # Of the first layer, which in a hybrid model may have none: then at most as many as heads.
    kv_heads = int(quick.llama_model_n_head_kv(model)) or heads
    elements = int(quick.llama_model_n_layer(model)) * kv_heads * (key + value)
    return max(1, math.ceil(elements * kind.bits / 8))


def description(model: Any) -> str:
    buffer = ctypes.create_string_buffer(256)
    quick.llama_model_desc(model, buffer, len(buffer))
    return buffer.value.decode("utf-8", "replace")


def chat_template(model: Any) -> str | None:
    template = quick.llama_model_chat_template(model, None)
    return template.decode("utf-8", "replace") if template else None


class Vocabulary:
    """Tokens and their bytes. `pieces` remembers what has been looked up."""

    def __init__(self, model: Any) -> None:
        self.handle = quick.llama_model_get_vocab(model)
        self.size = int(quick.llama_vocab_n_tokens(self.handle))
        self.bos = int(quick.llama_vocab_bos(self.handle))
        self._pieces: dict[int, tuple[bytes, bool]] = {}
        self._texts: dict[int, bytes] = {}
        self._marking: dict[Markers, frozenset[int]] = {}

    def tokenize(self, text: str) -> tuple[int, ...] | None:
        """Special tokens recognised, BOS in front once; None where llama.cpp cannot."""
        data = text.encode()
        tokens = _tokens(len(data) + 2)
        count = native.llama_tokenize(
            self.handle, data, len(data), tokens, len(tokens), False, True
        )
        if count < 0:
            return None
        found = tuple(tokens[:count])
        # Not left to llama.cpp: it adds one even where a chat template has written it already.
        if quick.llama_vocab_get_add_bos(self.handle) and found[:1] != (self.bos,):
            return (self.bos, *found)
        return found

    def plain(self, text: str, *, special: bool = False) -> tuple[int, ...]:
        """The text's own tokens: nothing is added, and nothing in it is special by default."""
        data = text.encode()
        room = len(data) + 2
        while True:
            tokens = _tokens(room)
            count = native.llama_tokenize(
                self.handle, data, len(data), tokens, len(tokens), False, special
            )
            if count >= 0:
                return tuple(tokens[:count])
            room = -count  # one character may become many

    def closed(self, parts: tuple[str, ...]) -> tuple[int, ...]:
        """A text, or two to be compared, as the model was taught to have them as a whole: with the
        tokens before, between and after them. Nothing in the texts is special.
        """
        handle = self.handle
        if quick.llama_vocab_type(handle) == native.LLAMA_VOCAB_TYPE_WPM:
            found, between = [self.bos], []
            end = [int(quick.llama_vocab_sep(handle))]
            # llama.cpp does so itself, but not for Hangul.
            parts = tuple(unicodedata.normalize("NFD", part) for part in parts)
        else:
            found = [self.bos] if quick.llama_vocab_get_add_bos(handle) else []
            between = (
                [quick.llama_vocab_sep(handle)] if quick.llama_vocab_get_add_sep(handle) else []
            )
            end = [quick.llama_vocab_eos(handle)] if quick.llama_vocab_get_add_eos(handle) else []
        for i, part in enumerate(parts):
            found += [*(between if i else ()), *self.plain(part), *end]
        return tuple(found)

    def markup(self, text: str) -> tuple[int, ...]:
        """The tokens of a marker, special ones too."""
        return self.plain(text, special=True)

    def detokenize(self, tokens: tuple[int, ...]) -> bytes:
        """Special tokens as they are written in a prompt."""
        values = _tokens(len(tokens))
        values[: len(tokens)] = tokens
        size = 64 << len(tokens).bit_length()
        while True:
            buffer = ctypes.create_string_buffer(size)
            count = native.llama_detokenize(
                self.handle, values, len(tokens), buffer, size, False, True
            )
            if count >= 0:
                return buffer.raw[:count]
            size = 1 << (-count).bit_length()

    def piece(self, token: int) -> tuple[bytes, bool]:
        """A token's bytes (none for control tokens) and whether it ends a generation."""
        known = self._pieces.get(token)
        if known is None:
            end = bool(quick.llama_vocab_is_eog(self.handle, token))
            known = self._pieces[token] = (self._bytes(token, special=False), end)
        return known

    @functools.cached_property
    def ends(self) -> tuple[int, ...]:
        """Every token that ends a generation."""
        is_end = quick.llama_vocab_is_eog
        return tuple(token for token in range(self.size) if is_end(self.handle, token))

    def text(self, token: int) -> bytes:
        """A token's bytes, those of control tokens as they are written in a prompt."""
        known = self._texts.get(token)
        if known is None:
            known = self._texts[token] = self._bytes(token, special=True)
        return known

    def named(self) -> dict[str, str]:
        """The special tokens that chat templates name."""
        eos = quick.llama_vocab_eos(self.handle)
        return {"bos_token": self._text(self.bos), "eos_token": self._text(eos)}

    def infill(self) -> tuple[str, ...]:
        """The special tokens before prefix, suffix and middle; none where one of them is missing."""
        get = quick.llama_vocab_fim_pre, quick.llama_vocab_fim_suf, quick.llama_vocab_fim_mid
        tokens = [one(self.handle) for one in get]
        return tuple(map(self._text, tokens)) if min(tokens) >= 0 else ()

    def texts(self) -> list[bytes]:
        """As stored: byte-level vocabularies write some bytes as two."""
        get = quick.llama_vocab_get_text
        return [get(self.handle, token) or b"" for token in range(self.size)]

    @functools.cached_property
    def marked(self) -> frozenset[int]:
        """Tokens that are special wherever their text stands in a prompt."""
        marks = native.LLAMA_TOKEN_ATTR_CONTROL | native.LLAMA_TOKEN_ATTR_USER_DEFINED
        attributes = quick.llama_vocab_get_attr
        return frozenset(t for t in range(self.size) if attributes(self.handle, t) & marks)

    def marking(self, markers: Markers) -> frozenset[int]:
        """The special tokens of which these markers are made. Their texts are part of an answer."""
        known = self._marking.get(markers)
        if known is None:
            texts = [markers.start, markers.end, *markers.opening, markers.closing]
            found = ((token, self.text(token).decode("utf-8", "replace")) for token in self.marked)
            known = self._marking[markers] = frozenset(
                token for token, own in found if own and any(own in text for text in texts)
            )
        return known

    @functools.cached_property
    def blank(self) -> frozenset[int]:
        """Tokens of nothing but white space."""
        return frozenset(token for token in range(self.size) if self.piece(token)[0].isspace())

    def special(self, texts: list[bytes]) -> Iterator[str]:
        for token in sorted(self.marked):
            yield texts[token].decode("utf-8", "replace")

    def _text(self, token: int) -> str:
        return self.text(token).decode("utf-8", "replace") if token >= 0 else ""

    def _bytes(self, token: int, *, special: bool) -> bytes:
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            count = quick.llama_token_to_piece(self.handle, token, buffer, size, 0, special)
            if count >= 0:
                return buffer.raw[:count]
            size = 1 << (-count).bit_length()


def _tokens(count: int) -> Any:
    """Room for so many or more. Sizes are powers of two, as each is a type of its own to ctypes."""
    return (native.llama_token * (1 << count.bit_length()))()
