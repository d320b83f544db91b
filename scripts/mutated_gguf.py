"""Mutated GGUF files, made from a valid one: what a header can say wrongly, one thing at a time or two.

`NAMED` are single edits that make llama.cpp end the process, or that a validator must refuse for another
reason; `mutations` draws from those, from random ones that stay well-formed, and from damage to the
bytes. The same base, seed and count give the same files.
"""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
U16, U32, F32, BOOL, STRING, ARRAY = 2, 4, 6, 7, 8, 9
SIZES = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34),
    9: (32, 36), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 30: (1, 2),
    39: (32, 17), 40: (64, 36),
}  # fmt: skip
"""Tensor types by number that are tried: elements and bytes of a block."""
ARCHITECTURES = (
    "llama qwen2 qwen3 gemma phi3 gpt2 falcon bert t5 mamba rwkv6 clip deci llama4 mistral3 minicpm "
    "granite arcee olmo internlm2 smollm3 exaone starcoder2 llama-embed no-such-thing"
).split()


@dataclass
class Pair:
    """A key, its type's number, and its value's bytes as in the file."""

    key: str
    type: int
    data: bytes


@dataclass
class Tensor:
    """With `offset`, that is written whatever the layout."""

    name: str
    shape: tuple[int, ...]
    type: int
    data: bytes
    offset: int | None = None


@dataclass
class Gguf:
    """A file taken apart. `layout` is the alignment it is written with, whatever its key says."""

    version: int = 3
    pairs: list[Pair] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    layout: int = 32

    @property
    def architecture(self) -> str:
        return self.find("general.architecture").data[8:].decode()

    def find(self, key: str) -> Pair:
        return next(pair for pair in self.pairs if pair.key == key)

    def set(self, key: str, type: int, value: object) -> None:
        """The value is a number or a text. A key that is not there is added."""
        data = encoded(type, value)
        for pair in self.pairs:
            if pair.key == key:
                pair.type, pair.data = type, data
                return
        self.pairs.append(Pair(key, type, data))

    def arch(self, key: str, type: int, value: object) -> None:
        self.set(f"{self.architecture}.{key}", type, value)

    def header(self) -> bytes:
        parts = [b"GGUF", struct.pack("<IQQ", self.version, len(self.tensors), len(self.pairs))]
        parts += [_text(p.key) + struct.pack("<I", p.type) + p.data for p in self.pairs]
        at = 0
        for tensor in self.tensors:
            offset = at if tensor.offset is None else tensor.offset
            parts.append(_text(tensor.name))
            parts.append(struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape))
            parts.append(struct.pack("<IQ", tensor.type, offset))
            at += len(tensor.data) + -len(tensor.data) % self.layout
        return b"".join(parts)

    def pack(self) -> bytes:
        header = self.header()
        parts = [header, bytes(-len(header) % self.layout)]
        for tensor in self.tensors:
            parts += [tensor.data, bytes(-len(tensor.data) % self.layout)]
        return b"".join(parts)

    def tokens(self) -> list[bytes]:
        data = self.find("tokenizer.ggml.tokens").data
        _, count = struct.unpack_from("<IQ", data)
        found, at = [], 12
        for _ in range(count):
            (length,) = struct.unpack_from("<Q", data, at)
            found.append(data[at + 8 : at + 8 + length])
            at += 8 + length
        return found

    def set_tokens(self, tokens: list[bytes]) -> None:
        data = b"".join(struct.pack("<Q", len(token)) + token for token in tokens)
        self.find("tokenizer.ggml.tokens").data = struct.pack("<IQ", STRING, len(tokens)) + data

    def rename(self, architecture: str) -> None:
        """Another architecture with the same values."""
        old = self.architecture
        for pair in self.pairs:
            if pair.key.startswith(f"{old}."):
                pair.key = architecture + pair.key[len(old) :]
        self.set("general.architecture", STRING, architecture)


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def encoded(type: int, value: object) -> bytes:
    return _text(str(value)) if type == STRING else struct.pack(f"<{CODES[type]}", value)


def parsed(data: bytes) -> tuple[Gguf, list[int]]:
    """A valid file taken apart, and every place in its header where something begins."""
    version, tensor_count, pair_count = struct.unpack_from("<IQQ", data, 4)
    file, at, borders = Gguf(version), 24, [0, 4, 8, 16, 24]

    def text() -> str:
        nonlocal at
        (length,) = struct.unpack_from("<Q", data, at)
        at += 8 + length
        borders.append(at)
        return data[at - length : at].decode()

    for _ in range(pair_count):
        key = text()
        (type,) = struct.unpack_from("<I", data, at)
        end = _end(data, at + 4, type)
        file.pairs.append(Pair(key, type, data[at + 4 : end]))
        borders += [at + 4, end]
        at = end
        if key == "general.alignment":
            (file.layout,) = struct.unpack("<I", file.pairs[-1].data)
    places = []
    for _ in range(tensor_count):
        name = text()
        (dimensions,) = struct.unpack_from("<I", data, at)
        *shape, type, offset = struct.unpack_from(f"<{dimensions}QIQ", data, at + 4)
        at += 4 + 8 * dimensions + 12
        borders += [at - 12, at - 8, at]
        file.tensors.append(Tensor(name, tuple(shape), type, b""))
        places.append(offset)
    start = at + -at % file.layout
    borders.append(start)
    for tensor, offset in zip(file.tensors, places, strict=True):
        size = _size(tensor)
        tensor.data = data[start + offset : start + offset + size]
        borders.append(start + offset + size)
    return file, borders


def _end(data: bytes, at: int, type: int) -> int:
    if type == STRING:
        return at + 8 + int(struct.unpack_from("<Q", data, at)[0])
    if type != ARRAY:
        return at + struct.calcsize(CODES[type])
    inner, count = struct.unpack_from("<IQ", data, at)
    at += 12
    if inner != STRING:
        return at + int(count) * struct.calcsize(CODES[inner])
    for _ in range(count):
        at = _end(data, at, STRING)
    return at


def _size(tensor: Tensor) -> int:
    block, size = SIZES[tensor.type]
    return math.prod(tensor.shape) // block * size


# Named edits


def _twins(file: Gguf) -> None:
    tokens = file.tokens()
    tokens[5] = tokens[4]
    file.set_tokens(tokens)


def _misaligned(alignment: int) -> Callable[[Gguf], None]:
    def edit(file: Gguf) -> None:
        file.set("general.alignment", U32, alignment)
        # Where both alignments end up at the same byte the file is valid.
        name = "x"
        file.set("general.name", STRING, name)
        while not 1 <= len(file.header()) % 32 <= 24:
            name += "x"
            file.set("general.name", STRING, name)

    return edit


def _short(key: str, type: int) -> Callable[[Gguf], None]:
    def edit(file: Gguf) -> None:
        file.set(key, STRING, "")
        file.find(key).type = ARRAY
        file.find(key).data = struct.pack("<IQ", type, 3) + bytes(12)

    return edit


def _arch(key: str, type: int, value: object) -> Callable[[Gguf], None]:
    return lambda file: file.arch(key, type, value)


def _plain(key: str, type: int, value: object) -> Callable[[Gguf], None]:
    return lambda file: file.set(key, type, value)


def retyped(file: Gguf, index: int, type: int) -> None:
    """The same shape in another type, with room for it."""
    tensor = file.tensors[index]
    changed = replace(tensor, type=type, data=b"")
    size = _size(changed)
    if size > 1 << 26:
        return
    changed.data = (tensor.data * (size // max(1, len(tensor.data)) + 1))[:size]
    file.tensors[index] = changed


def _with_type(name: str, type: int) -> Callable[[Gguf], None]:
    def edit(file: Gguf) -> None:
        for index, tensor in enumerate(file.tensors):
            if tensor.name == name and tensor.shape[0] % SIZES[type][0] == 0:
                retyped(file, index, type)

    return edit


_EPSILON = "attention.layer_norm_rms_epsilon"
_MODEL = "tokenizer.ggml.model"
NAMED: dict[str, tuple[str, Callable[[Gguf], None]]] = {
    "block_count 0": ("block_count 0 is outside 1…512", _arch("block_count", U32, 0)),
    "block_count 513": ("block_count 513 is outside 1…512", _arch("block_count", U32, 513)),
    "block_count most": ("block_count 4294967295 is", _arch("block_count", U32, (1 << 32) - 1)),
    "epsilon nan": (_EPSILON, _arch(_EPSILON, F32, math.nan)),
    "epsilon negative": (f"{_EPSILON} -1 is outside 0…1", _arch(_EPSILON, F32, -1.0)),
    "experts unused": ("expert_used_count 0 is outside 1…8", _arch("expert_count", U32, 8)),
    "experts used": ("expert_used_count 2 is outside 0…0", _arch("expert_used_count", U32, 2)),
    "too many experts": ("expert_count 5000 is outside 0…1024", _arch("expert_count", U32, 5000)),
    "expert groups": ("expert_group_count 2", _arch("expert_group_count", U32, 2)),
    "more nextn": ("nextn_predict_layers 99", _arch("nextn_predict_layers", U32, 99)),
    "rope scaling": ("rope.scaling.type 'odd'", _arch("rope.scaling.type", STRING, "odd")),
    "alignment 1": ("general.alignment 1 is", _misaligned(1)),
    "alignment 8": ("general.alignment 8 lets", _misaligned(8)),
    "alignment kind": ("general.alignment is", _plain("general.alignment", 10, 32)),
    "bert tokenizer": (f"{_MODEL} 'bert'", _plain(_MODEL, STRING, "bert")),
    "no tokenizer": (f"{_MODEL} 'none'", _plain(_MODEL, STRING, "none")),
    "no vocabulary": (f"{_MODEL} 'no_vocab'", _plain(_MODEL, STRING, "no_vocab")),
    "rwkv tokenizer": (f"{_MODEL} 'rwkv' needs", _plain(_MODEL, STRING, "rwkv")),
    "bytes missing": (f"{_MODEL} 'llama'", _plain(_MODEL, STRING, "llama")),
    "same token twice": ("tokenizer.ggml.tokens", _twins),
    "few types": ("tokenizer.ggml.token_type has 3", _short("tokenizer.ggml.token_type", 5)),
    "few scores": ("tokenizer.ggml.scores has 3", _short("tokenizer.ggml.scores", 6)),
    "no context": ("context_length 0 is outside 1…", _arch("context_length", U32, 0)),
    "heads": ("head_count_kv 3 does not divide", _arch("attention.head_count_kv", U32, 3)),
    "value length": ("attention.value_length 8", _arch("attention.value_length", U32, 8)),
    "rope dimensions": ("rope.dimension_count 12", _arch("rope.dimension_count", U32, 12)),
    "wide output": ("embedding_length_out 128 is", _arch("embedding_length_out", U32, 128)),
    "rope base": ("rope.freq_base inf", _arch("rope.freq_base", F32, math.inf)),
    "pooling": ("pooling_type 9 is outside 0…4", _arch("pooling_type", U32, 9)),
    "type's kind": ("general.type is uint32", _plain("general.type", U32, 1)),
    "part's kind": ("split.no is uint32", _plain("split.no", U32, 0)),
    "alpha's kind": ("adapter.lora.alpha is uint32", _plain("adapter.lora.alpha", U32, 4)),
    "parts": ("split.count 3", _plain("split.count", U16, 3)),
    "long template": (
        "tokenizer.chat_template",
        _plain("tokenizer.chat_template", STRING, "x" * (1 << 19)),
    ),
    "norm in F16": ("output_norm.weight", _with_type("output_norm.weight", 1)),
    "integers": ("token_embd.weight", _with_type("token_embd.weight", 26)),
    "integer matrix": ("blk.0.attn_q.weight", _with_type("blk.0.attn_q.weight", 24)),
    "Q8_1": ("blk.0.attn_q.weight", _with_type("blk.0.attn_q.weight", 9)),
}
"""Edits by name, of a model of llama's architecture: what the refusal must contain, and the edit."""


# Random ones

_ODD = (
    0, 1, 2, 3, 5, 7, 8, 9, 16, 31, 32, 33, 63, 64, 100, 127, 128, 255, 256, 511, 512, 513, 1024,
    65535, 65536, 1 << 24, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 60, (1 << 64) - 1,
)  # fmt: skip
_ODD_FLOATS = (
    0.0, -0.0, 1e-5, 1e-30, 0.5, 1.0, -1.0, 2.0, 10000.0, 1e30, -1e30, math.inf, -math.inf, math.nan,
)  # fmt: skip
_ODD_TEXTS = (
    "", "none", "yarn", "longrope", "linear", "llama", "gpt2", "t5", "rwkv", "test", "plamo2",
    "gemma4", "whitespace", "hybriddna", "default", "llama-bpe", "qwen2", "phi-3", "%s%n", "\0",
    "x" * 300,
)  # fmt: skip
_ADDED = (
    ("rope.scaling.factor", F32), ("rope.freq_base", F32), ("rope.scaling.attn_factor", F32),
    ("rope.scaling.original_context_length", U32), ("attention.sliding_window", U32),
    ("attention.causal", BOOL), ("pooling_type", U32), ("expert_count", U32),
    ("expert_used_count", U32), ("feed_forward_length", U32), ("attention.scale", F32),
    ("attention.clamp_kqv", F32), ("attention.max_alibi_bias", F32), ("logit_scale", F32),
    ("final_logit_softcapping", F32), ("attn_logit_softcapping", F32), ("rope.scaling.type", STRING),
    ("embedding_length_out", U32), ("attention.key_length_swa", U32), ("vocab_size", U32),
    ("nextn_predict_layers", U32), ("attention.group_norm_groups", U32), ("embedding_scale", F32),
    ("residual_scale", F32), ("attention.temperature_scale", F32), ("use_parallel_residual", BOOL),
)  # fmt: skip
_ADDED_PLAIN = (
    ("tokenizer.ggml.bos_token_id", U32), ("tokenizer.ggml.eos_token_id", U32),
    ("tokenizer.ggml.eot_token_id", U32), ("tokenizer.ggml.unknown_token_id", U32),
    ("tokenizer.ggml.padding_token_id", U32), ("tokenizer.ggml.add_bos_token", BOOL),
    ("tokenizer.ggml.add_eos_token", BOOL), ("tokenizer.ggml.add_space_prefix", BOOL),
    ("tokenizer.ggml.pre", STRING), ("tokenizer.ggml.model", STRING), ("general.name", STRING),
    ("tokenizer.ggml.token_type_count", U32), ("tokenizer.ggml.fim_pre_token_id", U32),
    ("tokenizer.ggml.remove_extra_whitespaces", BOOL), ("split.count", U16),
    ("general.file_type", U32),
)  # fmt: skip


def _value(draw: random.Random, type: int) -> object:
    if type == STRING:
        return draw.choice(_ODD_TEXTS)
    if type in {F32, 12}:
        return draw.choice(_ODD_FLOATS)
    if type == BOOL:
        return draw.random() < 0.5
    size = 8 * struct.calcsize(CODES[type])
    value = draw.choice(_ODD) % (1 << size)
    signed = CODES[type].islower()
    return value - (1 << size) if signed and value >> (size - 1) else value


def _change_value(file: Gguf, draw: random.Random) -> None:
    pair = draw.choice([p for p in file.pairs if p.type != ARRAY])
    if pair.type in CODES and draw.random() < 0.4 and pair.type not in {F32, BOOL, 12}:
        (value,) = struct.unpack(f"<{CODES[pair.type]}", pair.data)
        near = draw.choice((value + 1, value - 1, value * 2, value // 2, value + 2))
        size = 8 * struct.calcsize(CODES[pair.type])
        pair.data = (near % (1 << size)).to_bytes(size // 8, "little")
    else:
        pair.data = encoded(pair.type, _value(draw, pair.type))


def _add_key(file: Gguf, draw: random.Random) -> None:
    if draw.random() < 0.7:
        key, type = draw.choice(_ADDED)
        file.arch(key, type, _value(draw, type))
    else:
        key, type = draw.choice(_ADDED_PLAIN)
        file.set(key, type, _value(draw, type))


def _change_kind(file: Gguf, draw: random.Random) -> None:
    pair = draw.choice(file.pairs)
    pair.type = draw.choice((*CODES, STRING, ARRAY, 13, 1 << 31))
    if draw.random() < 0.7 and pair.type in (*CODES, STRING):
        pair.data = encoded(pair.type, _value(draw, pair.type))


def _per_layer(file: Gguf, draw: random.Random) -> None:
    key = draw.choice(("attention.head_count", "attention.head_count_kv", "feed_forward_length"))
    count = draw.choice((0, 1, 2, 2, 2, 3, 600))
    file.arch(key, U32, 0)
    pair = file.find(f"{file.architecture}.{key}")
    pair.type, items = ARRAY, [draw.choice((0, 1, 2, 4, 128)) for _ in range(count)]
    pair.data = struct.pack(f"<IQ{count}I", U32, count, *items)


def _change_tokens(file: Gguf, draw: random.Random) -> None:
    tokens = file.tokens()
    at = draw.randrange(len(tokens))
    odd = (b"", b"\0", b"a\0b", b"x" * 20_000, b"\xff\xfe", b"</s>", b"<|end|>", b" ", b"\n")
    match draw.randrange(4):
        case 0:
            tokens[at] = draw.choice(odd)
        case 1:
            tokens[at] = tokens[draw.randrange(len(tokens))]
        case 2:
            del tokens[at]
        case 3:
            tokens[at] = bytes(draw.randrange(256) for _ in range(draw.randrange(1, 9)))
    file.set_tokens(tokens)


def _change_types(file: Gguf, draw: random.Random) -> None:
    pair = file.find("tokenizer.ggml.token_type")
    data = bytearray(pair.data)
    for _ in range(draw.choice((1, 10, 300))):
        at = 12 + 4 * draw.randrange((len(data) - 12) // 4)
        struct.pack_into("<i", data, at, draw.choice((0, 1, 2, 3, 4, 5, 6, 7, -1)))
    pair.data = bytes(data)


def _change_numbers(file: Gguf, draw: random.Random) -> None:
    """Some of an array's."""
    found = [p for p in file.pairs if p.type == ARRAY and p.data[0] != STRING and len(p.data) > 12]
    if not found:
        return
    pair = draw.choice(found)
    data = bytearray(pair.data)
    for _ in range(draw.choice((1, 4, 100))):
        data[draw.randrange(12, len(data))] = draw.randrange(256)
    pair.data = bytes(data)


def _drop_key(file: Gguf, draw: random.Random) -> None:
    file.pairs.remove(draw.choice(file.pairs))


def _double_key(file: Gguf, draw: random.Random) -> None:
    file.pairs.append(replace(draw.choice(file.pairs)))


def _retype(file: Gguf, draw: random.Random) -> None:
    index, type = draw.randrange(len(file.tensors)), draw.choice([*SIZES])
    if file.tensors[index].shape[0] % SIZES[type][0] == 0:
        retyped(file, index, type)


def _mistype(file: Gguf, draw: random.Random) -> None:
    draw.choice(file.tensors).type = draw.choice((*SIZES, 4, 31, 43, 1 << 31))


def _reshape(file: Gguf, draw: random.Random) -> None:
    tensor = draw.choice(file.tensors)
    shape = list(tensor.shape)
    match draw.randrange(4):
        case 0:
            shape.reverse()
        case 1:
            shape.append(1)
        case 2:
            shape[draw.randrange(len(shape))] = draw.choice(_ODD)
        case 3:
            shape = [math.prod(shape)]
    tensor.shape = tuple(shape)


def _change_tensors(file: Gguf, draw: random.Random) -> None:
    index = draw.randrange(len(file.tensors))
    match draw.randrange(4):
        case 0:
            del file.tensors[index]
        case 1:
            file.tensors.append(replace(file.tensors[index]))
        case 2:
            names = ("output.weight", "rope_freqs.weight", "blk.0.attn_q.bias", "x" * 70, "a b")
            file.tensors[index].name = draw.choice(names)
        case 3:
            extra = ("output.weight", "blk.0.attn_q.bias", "blk.0.ffn_norm.bias", "odd.weight")
            file.tensors.append(replace(file.tensors[index], name=draw.choice(extra)))


def _move(file: Gguf, draw: random.Random) -> None:
    draw.choice(file.tensors).offset = draw.choice((0, 1, 32, 64, 4096, 1 << 40, (1 << 64) - 32))


def _rename(file: Gguf, draw: random.Random) -> None:
    if draw.random() < 0.8:
        file.rename(draw.choice(ARCHITECTURES))
    else:
        file.set("general.architecture", STRING, draw.choice(ARCHITECTURES))


_CHANGES: tuple[tuple[int, Callable[[Gguf, random.Random], None]], ...] = (
    (8, _change_value), (5, _add_key), (2, _change_kind), (2, _per_layer), (2, _change_tokens),
    (2, _change_types), (2, _change_numbers), (1, _drop_key), (1, _double_key), (3, _retype), (1, _mistype), (2, _reshape),
    (2, _change_tensors), (1, _move), (3, _rename),
)  # fmt: skip


def _structured(base: bytes, draw: random.Random) -> tuple[str, bytes]:
    file, _ = parsed(base)
    names = []
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        ((_, change),) = draw.choices(_CHANGES, [weight for weight, _ in _CHANGES])
        if _applies(file, change):
            change(file, draw)
        names.append(change.__name__.strip("_"))
    return "+".join(names), file.pack()


def _applies(file: Gguf, change: object) -> bool:
    """Another change may have taken away what this one is about; adapters have no vocabulary."""
    kinds = {pair.key: pair.type for pair in file.pairs}
    wanted = {}
    if change in {_change_tokens, _change_types}:
        wanted = {"tokenizer.ggml.tokens": ARRAY, "tokenizer.ggml.token_type": ARRAY}
    elif change in {_add_key, _per_layer, _rename}:
        wanted = {"general.architecture": STRING}
    return bool(file.tensors) and all(kinds.get(key) == kind for key, kind in wanted.items())


def _damaged(base: bytes, draw: random.Random) -> tuple[str, bytes]:
    _, borders = parsed(base)
    start = max(border for border in borders if border <= borders[-1])
    header = next(b for b in sorted(borders, reverse=True) if b <= start and b <= len(base) // 2)
    match draw.randrange(3):
        case 0:
            cut = min(len(base), max(0, draw.choice(borders) + draw.choice((-1, 0, 0, 1))))
            return f"cut at {cut}", base[:cut]
        case 1:
            data = bytearray(base)
            for _ in range(draw.choice((1, 1, 2, 8))):
                data[draw.randrange(header)] ^= 1 << draw.randrange(8)
            return "flip", bytes(data)
        case _:
            data = bytearray(base)
            at = draw.choice([b for b in borders if b + 8 <= header])
            struct.pack_into("<Q", data, at, draw.choice(_ODD))
            return f"number at {at}", bytes(data)


def mutations(base: bytes, seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """So many mutants of a model's file, each with a name for what was done."""
    draw = random.Random(seed)
    is_model = any(pair.key == "tokenizer.ggml.tokens" for pair in parsed(base)[0].pairs)
    for _ in range(count):
        kind = draw.random()
        if kind < 0.05 and is_model:
            name = draw.choice([*NAMED])
            file, _ = parsed(base)
            NAMED[name][1](file)
            yield name, file.pack()
        elif kind < 0.25:
            yield _damaged(base, draw)
        else:
            yield _structured(base, draw)


# Relatives of a llama, for what other architectures and vocabularies do


def _matrix(name: str, *shape: int) -> Tensor:
    """F32, the same each time."""
    draw = random.Random(name)
    count = math.prod(shape)
    values = (draw.uniform(-0.1, 0.1) for _ in range(count))
    return Tensor(name, shape, 0, struct.pack(f"<{count}f", *values))


def _layers(file: Gguf) -> range:
    (count,) = struct.unpack("<I", file.find(f"{file.architecture}.block_count").data)
    return range(count)


def _as_qwen2(file: Gguf) -> None:
    file.rename("qwen2")
    rows = {tensor.name: tensor.shape[1] for tensor in file.tensors if len(tensor.shape) > 1}
    for i in _layers(file):
        for part in "qkv":
            name = f"blk.{i}.attn_{part}"
            file.tensors.append(_matrix(f"{name}.bias", rows[f"{name}.weight"]))


def _as_qwen3(file: Gguf) -> None:
    file.rename("qwen3")
    (width,) = struct.unpack("<I", file.find("qwen3.attention.key_length").data)
    for i in _layers(file):
        for part in "qk":
            file.tensors.append(_matrix(f"blk.{i}.attn_{part}_norm.weight", width))


def _with_experts(file: Gguf) -> None:
    count = 4
    file.arch("expert_count", U32, count)
    file.arch("expert_used_count", U32, 2)
    for tensor in [t for t in file.tensors if "ffn" in t.name and "norm" not in t.name]:
        tensor.name = tensor.name.replace(".weight", "_exps.weight")
        tensor.shape, tensor.data = (*tensor.shape, count), tensor.data * count
    width = file.tensors[0].shape[0]
    file.tensors += [_matrix(f"blk.{i}.ffn_gate_inp.weight", width, count) for i in _layers(file)]


def _as_mamba(file: Gguf) -> None:
    file.rename("mamba")
    inner, state, rank = 128, 16, 4
    for key, value in (
        ("conv_kernel", 4), ("inner_size", inner), ("state_size", state), ("time_step_rank", rank),
    ):  # fmt: skip
        file.arch(f"ssm.{key}", U32, value)
    for key in ("head_count", "head_count_kv"):
        file.arch(f"attention.{key}", U32, 0)
    width = file.tensors[0].shape[0]
    file.tensors = [t for t in file.tensors if "blk" not in t.name or "attn_norm" in t.name]
    for i in _layers(file):
        for name, *shape in (
            ("in.weight", width, 2 * inner), ("conv1d.weight", 4, inner), ("conv1d.bias", inner),
            ("x.weight", inner, rank + 2 * state), ("dt.weight", rank, inner), ("dt.bias", inner),
            ("a", state, inner), ("d", inner), ("out.weight", inner, width),
        ):  # fmt: skip
            file.tensors.append(_matrix(f"blk.{i}.ssm_{name}", *map(int, shape)))


def _with_pieces(file: Gguf) -> None:
    """A vocabulary as SentencePiece makes them."""
    size = len(file.tokens())
    special = [b"<unk>", b"<s>", b"</s>"]
    tokens = special + [b"<0x%02X>" % i for i in range(256)]
    tokens += ["\u2581".encode(), *(bytes([97 + i]) for i in range(26))]
    tokens += [b"piece%d" % i for i in range(size - len(tokens))]
    file.set_tokens(tokens)
    kinds = [2, 3, 3] + [6] * 256 + [1] * (size - 259)
    file.find("tokenizer.ggml.token_type").data = struct.pack(f"<IQ{size}i", 5, size, *kinds)
    scores = struct.pack(f"<IQ{size}f", F32, size, *(-float(i) for i in range(size)))
    file.pairs.append(Pair("tokenizer.ggml.scores", ARRAY, scores))
    file.set("tokenizer.ggml.model", STRING, "llama")
    for role, id in (("bos", 1), ("eos", 2), ("eot", 2), ("unknown", 0)):
        file.set(f"tokenizer.ggml.{role}_token_id", U32, id)
    file.pairs = [pair for pair in file.pairs if pair.key != "tokenizer.ggml.merges"]


def _with_unigrams(file: Gguf) -> None:
    """With a rule for normalization: A becomes a."""
    _with_pieces(file)
    file.set("tokenizer.ggml.model", STRING, "t5")
    units = [0] * 256
    units[65], units[200] = (65 ^ 200) << 10 | 256 | 65, 1 << 31 | 1
    rules = struct.pack("<I256I", 4 * 256, *units) + b"\0a\0"
    data = struct.pack("<IQ", 0, len(rules)) + rules
    file.pairs.append(Pair("tokenizer.ggml.precompiled_charsmap", ARRAY, data))


RELATIVES: dict[str, Callable[[Gguf], None]] = {
    "qwen2": _as_qwen2,
    "qwen3": _as_qwen3,
    "gemma": lambda file: file.rename("gemma"),
    "experts": _with_experts,
    "mamba": _as_mamba,
    "pieces": _with_pieces,
    "unigrams": _with_unigrams,
}
"""Other architectures and vocabularies, made of a llama of random_gguf's in F32."""


def relative(base: bytes, name: str) -> bytes:
    file, _ = parsed(base)
    RELATIVES[name](file)
    return file.pack()
