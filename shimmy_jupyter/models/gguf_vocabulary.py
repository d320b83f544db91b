"""What makes llama.cpp end the process in reading a prompt: vocabularies that it did not look at."""

from __future__ import annotations

import struct
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Collection
from typing import Final

from ..errors import GgufError
from .gguf import ArrayInfo, Header, shown

TOKENS: Final = "tokenizer.ggml.tokens"
TYPES: Final = "tokenizer.ggml.token_type"
CHARSMAP: Final = "tokenizer.ggml.precompiled_charsmap"
_BYTE = 6
_MOST_NODES = 65_536


class Words:
    """What a vocabulary's strings must be looked at for, while they pass by: none of them is kept."""

    def __init__(self, wanted: Collection[int] = ()) -> None:
        self.count = 0
        self.byte_tokens = 0
        """Those that stand for a byte, by their type."""
        self.charsmap = b""
        self.found: bytes | None = None
        """The last token whose hash is among those `wanted`."""
        self._wanted = wanted
        self._bytes = 0
        self._heads, self._alone = bytearray(256), bytearray(256)
        self._hashes = [array("q") for _ in range(256)]

    def add(self, raw: bytes) -> None:
        """As llama.cpp sees it: up to the first zero, and never empty."""
        word = raw.partition(b"\0")[0] if b"\0" in raw else raw
        if not word:
            word = b"[EMPTY_%d]" % self.count
        elif len(word) == 1:
            self._bytes |= 1 << word[0]
        elif len(word) == 6 and word.startswith(b"<0x") and word.endswith(b">"):
            digits = word[3:5].decode("latin-1")
            if digits == digits.upper() and set(digits) <= set("0123456789ABCDEF"):
                self._bytes |= 1 << int(digits, 16)
        head, size = _unescaped(word)
        self._heads[head] = 1
        if len(word) == size:
            self._alone[head] = 1
        digest = hash(word)
        self._hashes[digest & 255].append(digest)
        self.count += 1
        if digest in self._wanted:
            self.found = word

    def twin(self) -> int | None:
        """The hash of a token that is there twice. At 64 bits, one of 30 million vocabularies of a
        million tokens has one by chance.
        """
        for bucket in self._hashes:
            if len(set(bucket)) < len(bucket):
                (one, _), *_ = Counter(bucket).most_common(1)
                return one
        return None

    def without_beginning(self) -> list[int]:
        """Bytes with which tokens begin, but which are none themselves, as RWKV writes them."""
        return [b for b in range(256) if self._heads[b] > self._alone[b]]

    def missing_bytes(self) -> list[int]:
        """Those that occur in UTF-8 and have no token."""
        return [b for b in range(0xF5) if b not in {0xC0, 0xC1} and not self._bytes >> b & 1]

    def take(self, key: str, code: str, data: bytes) -> None:
        """An array of numbers, which may be millions: as bytes."""
        if key == TYPES:
            self.byte_tokens = sum(n == _BYTE for (n,) in struct.iter_unpack(f"<{code}", data))
        else:
            self.charsmap = data


def _unescaped(word: bytes) -> tuple[int, int]:
    """The first byte as RWKV's vocabularies write it, and how much of the word that takes."""
    if word[0] != 0x5C or len(word) == 1:
        return word[0], 1
    if word[1:2] == b"x" and len(word) >= 4 and set(word[2:4]) <= set(b"0123456789abcdefABCDEF"):
        return int(word[2:4], 16), 4
    return {b"n": 10, b"r": 13, b"t": 9}.get(word[1:2], word[1]), 2


def check_vocabulary(
    header: Header, words: Words, again: Callable[[Words], object], *, encoder: bool
) -> None:
    """Raises `GgufError`. `again` reads the tokens once more, to name one."""
    model = header.text("tokenizer.ggml.model")
    if model in {"", "none", "no_vocab"}:
        raise GgufError(
            f"tokenizer.ggml.model {shown(model)}: without a vocabulary no prompt can be read"
        )
    if header.kinds.get(TOKENS) != "array[string]" or not words.count:
        raise GgufError(f"{TOKENS} is no list of tokens")
    for key in ("tokenizer.ggml.scores", TYPES):
        value = header.metadata.get(key)
        count = value.count if isinstance(value, ArrayInfo) else None
        count = len(value) if isinstance(value, tuple) else count
        if count is not None and count < words.count:
            raise GgufError(f"{key} has {count} items for {words.count} tokens")
    if (twin := words.twin()) is not None:
        found = Words({twin})
        again(found)
        text = shown((found.found or b"").decode("utf-8", "replace"))
        raise GgufError(f"{TOKENS} has {text} twice")
    _check_bytes(model, words)
    if model == "bert" and not encoder:
        arch = shown(header.text("general.architecture"))
        raise GgufError(f"tokenizer.ggml.model 'bert' does not fit general.architecture {arch}")
    if model == "t5" and words.charsmap:
        _check_charsmap(words.charsmap)


def _check_bytes(model: str, words: Words) -> None:
    missing = words.missing_bytes()
    if model == "llama" and missing:
        raise GgufError(
            f"tokenizer.ggml.model 'llama' needs a token for each byte; {TOKENS} has none for "
            f"<0x{missing[0]:02X}>"
        )
    if model == "rwkv" and (alone := words.without_beginning()):
        # llama.cpp would go on from the text's beginning, for ever.
        raise GgufError(
            f"tokenizer.ggml.model 'rwkv' needs a token for each byte; {TOKENS} has none for "
            f"\\x{alone[0]:02x}"
        )
    if model == "bert" and words.byte_tokens:
        raise GgufError(
            f"{TYPES} has {words.byte_tokens} bytes, which tokenizer.ggml.model 'bert' cannot have"
        )


def _check_charsmap(data: bytes) -> None:
    """SentencePiece's rules for normalization, a double array: https://github.com/s-yata/darts-clone.

    llama.cpp follows them to wherever they lead, and what it throws then leaves through C.
    """
    size = int.from_bytes(data[:4], "little")
    if len(data) < 4 or size + 4 >= len(data):
        raise GgufError(f"{CHARSMAP} of {len(data)} bytes is too short for {size}")
    units = array("I", data[4 : 4 + size // 4 * 4])
    if sys.byteorder == "big":
        units.byteswap()
    # A replacement ends with a zero.
    last = data.rfind(b"\0", 4 + size) - (4 + size)
    if units and not (_is_closed(units, last) or _is_walkable(units, last)):
        raise GgufError(f"{CHARSMAP} points outside itself")


def _base(unit: int) -> int:
    return (unit >> 10) << ((unit & 512) >> 6)


def _leads_outside(units: array[int], last: int, at: int) -> bool:
    """Whether what stands at a place that matched leads to a replacement that is not there."""
    following = at ^ _base(units[at])
    if not units[at] >> 8 & 1:
        return False
    return following >= len(units) or units[following] & 0x7FFFFFFF > last


def _is_closed(units: array[int], last: int) -> bool:
    """Whether nothing leads outside from anywhere, reached or not: so it is as tools make them."""
    if _base(units[0]) | 255 >= len(units):
        return False
    for at, unit in enumerate(units):
        if unit >> 31 or not unit & 255:
            continue
        if (at ^ _base(unit)) | 255 >= len(units) or _leads_outside(units, last, at):
            return False
    return True


def _is_walkable(units: array[int], last: int) -> bool:
    """Whether nothing leads outside that a text can reach."""
    nodes, seen = [_base(units[0])], set[int]()
    while nodes:
        node = nodes.pop()
        for character in range(1, 256):
            at = node ^ character
            if at >= len(units):
                return False
            if units[at] & 0x800000FF != character or at in seen:
                continue
            seen.add(at)
            if _leads_outside(units, last, at) or len(seen) > _MOST_NODES:
                return False
            nodes.append(at ^ _base(units[at]))
    return True
