"""GGUF files: whether llama.cpp can be given them, and what they are, by their headers alone.

Read within bounds by `gguf_reader`, checked by `gguf_checks` and `gguf_vocabulary`. What a file can cost, whatever it
holds: 128 MiB of memory, and time for 4 million strings. A 10 GB file costs what its header does: with
a vocabulary of 262,144 tokens 6 MiB and most of a second.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import GgufError
from ..recurrent import state_bytes

TEMPLATE = "tokenizer.chat_template"


@dataclass(frozen=True, slots=True)
class ArrayInfo:
    """An array that is not kept, and how many items it has. Of `kind` "text" it is one string that is too
    long to be kept, and `count` its bytes.
    """

    kind: str
    count: int


Scalar = bool | int | float | str
Value = Scalar | tuple[Scalar, ...] | ArrayInfo


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """`shape` has the length of a row first, as in the file. `offset` counts bytes from the header's
    `data_start`.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """`kinds` has each key's type by GGUF's names, such as "uint32" or "array[string]".

    Arrays of up to 64 items are kept, those of numbers up to 512 (one for each layer), while there are
    65,536 items in all. `data_start` and `size_bytes` are in bytes of the file.
    """

    version: int
    alignment: int
    metadata: Mapping[str, Value]
    kinds: Mapping[str, str]
    tensors: tuple[TensorInfo, ...]
    data_start: int
    size_bytes: int

    def text(self, key: str) -> str:
        """A string; "" where there is none, or one that was not kept."""
        value = self.metadata.get(key, "")
        return value if isinstance(value, str) else ""

    def numbers(self, key: str) -> tuple[int, ...]:
        """A number, or one for each layer; none where there is none, or it was not kept."""
        value = self.metadata.get(key, ())
        values = value if isinstance(value, tuple) else (value,)
        return tuple(one for one in values if isinstance(one, int))

    def number(self, key: str, default: int = 0) -> int:
        """The largest, where there is one for each layer."""
        return max(self.numbers(key), default=default)


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """Of a LoRA adapter. `base_models` are the names that its file gives of what it was made for."""

    type: str
    alpha: float
    rank: int
    base_models: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class GgufFacts:
    """What a valid file says of itself, with all parts of a model that is split.

    `kind` is "model", "embedding" (makes vectors only), "adapter" or "projector". Sizes are in tokens,
    elements and bytes; 0 or "" where the file does not say. `kv_heads` is that of the layer with the
    most. `kv_bytes_per_token` is keys and values of all layers in F16, as if each saw the whole context.
    `split` is this part's number, from 1, and how many there are.
    """

    kind: str
    architecture: str
    name: str
    parameters: int
    size_bytes: int
    quantisation: str
    file_type: int | None
    context_size: int
    layers: int
    embedding_width: int
    heads: int
    kv_heads: int
    key_length: int
    value_length: int
    kv_bytes_per_token: int
    state_bytes: int
    """Of each sequence, whatever its length."""
    vocabulary: int
    tokenizer: str
    chat_template: str | None
    chat_template_sha256: str | None
    split: tuple[int, int] | None
    adapter: AdapterFacts | None


def read_header(path: Path) -> Header:
    """What the file's header says. Raises `GgufError` where it is no well-formed GGUF file, version 2
    or 3, little endian. Whether llama.cpp could use it is not looked at.
    """
    from .gguf_reader import read

    return read(path, None)


def validate(path: Path, parts: Sequence[Path] = ()) -> GgufFacts:
    """The facts of a file that llama.cpp can be given, or `GgufError` with the reason why not.

    Refuses what makes llama.cpp end the process, as far as headers tell. Of a model that is split,
    name the first file; the others are read too, and found by their names unless `parts` are all
    files in order.
    """
    from .gguf_checks import checked

    return checked(path, parts)


def memory_needed(facts: GgufFacts, context_tokens: int) -> int:
    """Bytes to run the model with so many tokens of KV cache in F16, for all its requests together.

    The weights, the cache, the state of one sequence where layers are recurrent (the engine has as many as there is
    memory for), and for what is computed 64 MiB and a batch of 512 rows: in each, 12 vectors
    of the model's width and the vocabulary's logits, in F32. An upper bound where layers see only a window.
    """
    computing = (64 << 20) + 512 * 4 * (12 * facts.embedding_width + facts.vocabulary)
    kept = facts.kv_bytes_per_token * context_tokens + facts.state_bytes
    return facts.size_bytes + kept + computing


def spread(values: tuple[int, ...], width: int) -> tuple[int, ...]:
    """One number for all layers becomes one for each."""
    return values * width if len(values) == 1 else values


def facts_of(
    kind: str, parts: Sequence[Header], vocabulary: int, adapter: AdapterFacts | None
) -> GgufFacts:
    """Of a model with all its parts, the first of them first."""
    header = parts[0]
    arch = header.text("general.architecture")
    template = header.metadata.get(TEMPLATE)
    chat = template if isinstance(template, str) else None
    tensors = [tensor for part in parts for tensor in part.tensors]
    layers = header.number(f"{arch}.block_count")
    heads = header.number(f"{arch}.attention.head_count")
    each = header.numbers(f"{arch}.attention.head_count_kv") or (heads,)
    # Not `spread`: of what is no model nobody has seen to it that there are few layers.
    all_kv = each[0] * layers if len(each) == 1 else sum(each)
    width = header.number(f"{arch}.embedding_length")
    usual = width // heads if heads else 0
    key = header.number(f"{arch}.attention.key_length", usual)
    value = header.number(f"{arch}.attention.value_length", usual)
    file_type = header.metadata.get("general.file_type")
    return GgufFacts(
        kind=kind,
        architecture=arch,
        name=header.text("general.name"),
        parameters=sum(math.prod(tensor.shape) for tensor in tensors),
        size_bytes=sum(part.size_bytes for part in parts),
        quantisation=_largest(tensors),
        file_type=file_type if isinstance(file_type, int) else None,
        context_size=header.number(f"{arch}.context_length"),
        layers=layers,
        embedding_width=width,
        heads=heads,
        kv_heads=max(each),
        key_length=key,
        value_length=value,
        kv_bytes_per_token=2 * all_kv * (key + value),
        state_bytes=state_bytes(lambda key: header.number(f"{arch}.{key}")),
        vocabulary=vocabulary,
        tokenizer=header.text("tokenizer.ggml.model"),
        chat_template=chat,
        chat_template_sha256=None if chat is None else hashlib.sha256(chat.encode()).hexdigest(),
        split=(1, len(parts)) if len(parts) > 1 else None,
        adapter=adapter,
    )


def _largest(tensors: Iterable[TensorInfo]) -> str:
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[tensor.type] += tensor.size_bytes
    return sizes.most_common(1)[0][0] if sizes else ""


def within(what: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise GgufError(f"{what} {value} is outside {low}…{high}")


def shown(value: object) -> str:
    """For messages: printable, and short however long it is."""
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
