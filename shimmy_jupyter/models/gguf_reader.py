"""The container: keys, values and tensors' places of a GGUF file, read within bounds.

After https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, and as strictly as llama.cpp's own
reader. Only the header is read, and with `pread`: a mapped file that somebody cuts short would end
the process.
"""

from __future__ import annotations

import math
import os
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Final

from ..errors import GgufError
from .gguf import TEMPLATE, ArrayInfo, Header, TensorInfo, Value, shown, within
from .gguf_vocabulary import CHARSMAP, TOKENS, TYPES, Words

MAX_KEYS: Final = 65_536
MAX_TENSORS: Final = 100_000
MAX_STRINGS: Final = 1 << 22
"""In all arrays together. The largest vocabularies known have 262,144 tokens and twice as many merges."""
MAX_TOKENS: Final = 1 << 20
LONGEST_KEY: Final = 256
LONGEST_TOKEN: Final = 16 << 10
LONGEST_TEMPLATE: Final = 256 << 10
ALIGNMENTS: Final = (8, 65_536)
_LONGEST_STRING = 1 << 20
"""Of those in arrays. A single string, such as a whole tokenizer as JSON, may be longer."""
_KEPT_STRING, _KEPT_TEXT = 64 << 10, 4 << 20
_KEPT_ITEMS, _KEPT_LAYERS, _KEPT_IN_ALL = 64, 512, 65_536
_LONGEST_NAME = 63  # GGML_MAX_NAME, with its zero
_WINDOW = 1 << 20


_KINDS = {
    0: ("uint8", "B"), 1: ("int8", "b"), 2: ("uint16", "H"), 3: ("int16", "h"), 4: ("uint32", "I"),
    5: ("int32", "i"), 6: ("float32", "f"), 7: ("bool", "?"), 10: ("uint64", "Q"),
    11: ("int64", "q"), 12: ("float64", "d"),
}  # fmt: skip
_STRING, _ARRAY = 8, 9

TENSOR_TYPES: Final = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 36),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4),
    27: ("I64", 1, 8), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18), 42: ("Q2_0", 64, 18),
}  # fmt: skip
"""ggml's types of tensors by number: name, elements of a block, bytes of a block."""


class _File:
    """A descriptor, a window on its contents, and where in the file we are."""

    def __init__(self, descriptor: int, size: int) -> None:
        self._descriptor = descriptor
        self.size = size
        self._window = b""
        self._start = self._at = 0

    @property
    def position(self) -> int:
        return self._start + self._at

    def _need(self, count: int) -> None:
        """Have so many bytes in the window, at most its size."""
        if self._at + count <= len(self._window):
            return
        if count > self.size - self.position:
            raise GgufError(f"the file ends within its header, after {self.size} bytes")
        self._start, self._at = self.position, 0
        pieces = bytearray()
        missing = min(max(count, _WINDOW), self.size - self._start)
        while missing:
            piece = os.pread(self._descriptor, missing, self._start + len(pieces))
            if not piece:
                raise GgufError("the file became shorter while it was read")
            pieces += piece
            missing -= len(piece)
        self._window = bytes(pieces)

    def take(self, count: int) -> bytes:
        self._need(count)
        self._at += count
        return self._window[self._at - count : self._at]

    def number(self, code: str) -> int:
        (value,) = struct.unpack(f"<{code}", self.take(struct.calcsize(code)))
        assert isinstance(value, int)
        return value

    def skip(self, count: int) -> None:
        if count > self.size - self.position:
            raise GgufError(f"the file ends within its header, after {self.size} bytes")
        self._at += count
        if self._at > len(self._window):
            self._start, self._at, self._window = self.position, 0, b""

    def strings(self, count: int, longest: int, what: str) -> Iterator[bytes]:
        for _ in range(count):
            if self._at + 8 > len(self._window):
                self._need(8)
            begin = self._at + 8
            length = int.from_bytes(self._window[self._at : begin], "little")
            if length > longest:
                raise GgufError(f"{what} has a string of {length} bytes; {longest} are the most")
            if begin + length > len(self._window):
                self._need(8 + length)
                begin = self._at + 8
            self._at = begin + length
            yield self._window[begin : self._at]


@contextmanager
def _opened(path: Path) -> Iterator[_File]:
    try:
        # A pipe in a file's place would otherwise be waited for.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "its name is not one"
        raise GgufError(f"the file cannot be read: {reason}") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise GgufError("it is no regular file")
        yield _File(descriptor, status.st_size)
    except OSError as error:
        raise GgufError(f"the file cannot be read: {error.strerror}") from None
    finally:
        os.close(descriptor)


def read(path: Path, words: Words | None) -> Header:
    """As `read_header`; the vocabulary's strings are shown to `words`."""
    with _opened(path) as file:
        return _Reader(file, words).header()


@dataclass(slots=True)
class _Reader:
    file: _File
    words: Words | None
    metadata: dict[str, Value] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    text: int = 0
    items: int = 0
    strings: int = 0

    def header(self) -> Header:
        version, tensors, keys = self._begin()
        for _ in range(keys):
            self._key()
        alignment = self._alignment()
        found = self._tensors(tensors)
        start = self.file.position
        if found:
            start += -start % alignment
        _check_layout(found, start, alignment, self.file.size)
        return Header(
            version,
            alignment,
            MappingProxyType(self.metadata),
            MappingProxyType(self.kinds),
            tuple(found),
            start,
            self.file.size,
        )

    def _begin(self) -> tuple[int, int, int]:
        file = self.file
        if file.size < 24:
            raise GgufError(f"the file has only {file.size} bytes: it is no GGUF file")
        if (magic := file.take(4)) != b"GGUF":
            raise GgufError(f"it is no GGUF file: it begins with {magic.hex(' ')}")
        version = file.number("I")
        if not version & 0xFFFF and version:
            raise GgufError("the file is big endian; only little endian ones can be used here")
        if version not in {2, 3}:
            raise GgufError(f"GGUF version {version} is outside 2…3")
        tensors, keys = file.number("Q"), file.number("Q")
        within("the number of tensors", tensors, 0, MAX_TENSORS)
        within("the number of keys", keys, 0, MAX_KEYS)
        return version, tensors, keys

    def _name(self, what: str, longest: int) -> str:
        length = self.file.number("Q")
        if not 1 <= length <= longest:
            raise GgufError(f"{what} of {length} bytes is outside 1…{longest}")
        try:
            name = self.file.take(length).decode()
        except UnicodeDecodeError:
            name = "\0"
        if not name.isprintable():
            raise GgufError(f"{what} is no printable text")
        self.text += length
        if self.text > 2 * _KEPT_TEXT:
            raise GgufError(f"the file has more than {2 * _KEPT_TEXT} bytes of names")
        return name

    def _key(self) -> None:
        key = self._name("a key", LONGEST_KEY)
        if key in self.metadata:
            raise GgufError(f"the key {shown(key)} is there twice")
        number = self.file.number("I")
        if number == _STRING:
            self.metadata[key], self.kinds[key] = self._string(key), "string"
        elif number == _ARRAY:
            self._array(key)
        elif number in _KINDS:
            self.kinds[key], code = _KINDS[number]
            (self.metadata[key],) = struct.unpack(
                f"<{code}", self.file.take(struct.calcsize(f"<{code}"))
            )
        else:
            raise GgufError(f"{shown(key)} has the unknown type {number}")

    def _string(self, key: str) -> Value:
        length = self.file.number("Q")
        if key == TEMPLATE:
            within(f"{TEMPLATE}, in bytes,", length, 0, LONGEST_TEMPLATE)
        elif length > _KEPT_STRING or self.text + length > _KEPT_TEXT:
            self.file.skip(length)
            return ArrayInfo("text", length)
        self.text += length
        return self.file.take(length).decode("utf-8", "replace")

    def _array(self, key: str) -> None:
        number, count = self.file.number("I"), self.file.number("Q")
        if number == _STRING:
            self.kinds[key] = "array[string]"
            self.metadata[key] = self._strings(key, count)
        elif number in _KINDS:
            kind, code = _KINDS[number]
            self.kinds[key] = f"array[{kind}]"
            self.metadata[key] = self._numbers(key, kind, code, count)
        else:
            raise GgufError(f"{shown(key)} is an array of the type {number}, which there is not")

    def _strings(self, key: str, count: int) -> Value:
        if key == TOKENS:
            within(f"the length of {TOKENS}", count, 0, MAX_TOKENS)
        self.strings += count
        if self.strings > MAX_STRINGS or 8 * count > self.file.size:
            raise GgufError(f"{shown(key)} has {count} strings, more than there can be")
        longest = LONGEST_TOKEN if key == TOKENS else _LONGEST_STRING
        found = self.file.strings(count, longest, shown(key))
        see: Callable[[bytes], None] | None = None
        if self.words is not None and key == TOKENS:
            see = self.words.add
        keep = count <= _KEPT_ITEMS and self.items + count <= _KEPT_IN_ALL
        kept = []
        for raw in found:
            if see is not None:
                see(raw)
            if keep:
                self.text += len(raw)
                keep = self.text <= _KEPT_TEXT
                kept.append(raw.decode("utf-8", "replace"))
        if not keep:
            return ArrayInfo("string", count)
        self.items += count
        return tuple(kept)

    def _numbers(self, key: str, kind: str, code: str, count: int) -> Value:
        size = struct.calcsize(f"<{code}") * count
        if self.words is not None and key in {TYPES, CHARSMAP}:
            within(f"{key}, in bytes,", size, 0, 4 * MAX_TOKENS)
            self.words.take(key, code, self.file.take(size))
            return ArrayInfo(kind, count)
        if count <= _KEPT_LAYERS and self.items + count <= _KEPT_IN_ALL:
            self.items += count
            return struct.unpack(f"<{count}{code}", self.file.take(size))
        self.file.skip(size)
        return ArrayInfo(kind, count)

    def _alignment(self) -> int:
        value = self.metadata.get("general.alignment", 32)
        if self.kinds.get("general.alignment", "uint32") != "uint32" or not isinstance(value, int):
            raise GgufError(f"general.alignment is no uint32 but {self.kinds['general.alignment']}")
        low, high = ALIGNMENTS
        if not low <= value <= high or value & (value - 1):
            raise GgufError(f"general.alignment {value} is no power of two within {low}…{high}")
        return value

    def _tensors(self, count: int) -> list[TensorInfo]:
        names: set[str] = set()
        found = []
        for _ in range(count):
            tensor = self._tensor()
            if tensor.name in names:
                raise GgufError(f"the tensor {shown(tensor.name)} is there twice")
            names.add(tensor.name)
            found.append(tensor)
        return found

    def _tensor(self) -> TensorInfo:
        name = self._name("a tensor's name", _LONGEST_NAME)
        dimensions = self.file.number("I")
        within(f"the tensor {shown(name)}'s number of dimensions", dimensions, 0, 4)
        shape = tuple(self.file.number("Q") for _ in range(dimensions))
        elements = math.prod(shape)
        if not 1 <= elements < 1 << 63:
            raise GgufError(f"the tensor {shown(name)} cannot have the shape {shown(shape)}")
        number = self.file.number("I")
        if number not in TENSOR_TYPES:
            raise GgufError(f"the tensor {shown(name)} has the unknown type {number}")
        type, block, size = TENSOR_TYPES[number]
        row = shape[0] if shape else 1
        if row % block:
            raise GgufError(
                f"the tensor {shown(name)} has rows of {row}, not a multiple of {type}'s {block}"
            )
        return TensorInfo(name, shape, type, self.file.number("Q"), elements // block * size)


def _check_layout(tensors: list[TensorInfo], start: int, alignment: int, size: int) -> None:
    """One after the other, without gaps, as llama.cpp wants them."""
    expected = 0
    for tensor in tensors:
        if tensor.offset != expected:
            how = "overlaps another" if tensor.offset < expected else "leaves a gap"
            raise GgufError(
                f"the tensor {shown(tensor.name)} at offset {tensor.offset} {how}: by its order and "
                f"general.alignment {alignment} it begins at {expected}"
            )
        if start + tensor.offset + tensor.size_bytes > size:
            raise GgufError(
                f"the tensor {shown(tensor.name)} ends at byte "
                f"{start + tensor.offset + tensor.size_bytes}, the file at {size}"
            )
        expected += tensor.size_bytes + -tensor.size_bytes % alignment
