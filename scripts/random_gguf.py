"""A random-weight llama-architecture GGUF, made in a moment. It answers nonsense, for real.

With a byte-level vocabulary of the shape that is asked for, any chat template, and weights in
F32, Q8_0 or Q4_0. The same seed gives the same bytes. The benchmarks use it too.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
INFILL = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
_PLAIN = 257  # the bytes and the one merge


@dataclass(frozen=True)
class Shape:
    """Widths must be multiples of 32. `vocabulary` is at least 260: bytes, one merge, three specials."""

    layers: int = 2
    width: int = 64
    heads: int = 4
    kv_heads: int = 2
    head_width: int = 16
    hidden: int = 128
    vocabulary: int = 320
    context: int = 2048

    @property
    def weights(self) -> int:
        """Elements of all matrices. A token reads each once: the tied embedding as the output."""
        attention = 2 * self.width * self.head_width * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.width * self.hidden) + (
            self.vocabulary * self.width
        )

    @property
    def kv_bytes(self) -> int:
        """Keys and values of one token in F16."""
        return 4 * self.layers * self.kv_heads * self.head_width


TINY = Shape()
QWEN_06B = Shape(
    layers=28, width=1024, heads=16, kv_heads=8, head_width=128, hidden=3072, vocabulary=151936,
    context=32768,
)  # fmt: skip
"""The shape of Qwen3-0.6B: 0.6 billion parameters, a quarter of them in the tied embedding."""
LLAMA_3B = Shape(
    layers=28, width=3072, heads=24, kv_heads=8, head_width=128, hidden=8192, vocabulary=128256,
    context=32768,
)  # fmt: skip
"""The shape of Llama-3.2-3B: 3.2 billion parameters."""

CHAIN = Shape(layers=1, width=352, heads=1, kv_heads=1, head_width=32, hidden=32)
"""At least as wide as its vocabulary is large: each token has a direction of its own."""

_UNLIKELY = 0.125
"""A token whose row of the tied embedding is this much smaller is never among the likely ones."""


def byte_tokens() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, by byte."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in kept]
    table = {b: chr(b) for b in kept} | {b: chr(256 + i) for i, b in enumerate(others)}
    return [table[b] for b in range(256)]


def write(
    path: Path,
    shape: Shape = TINY,
    *,
    quantized: bool | str = False,
    words: bool = False,
    template: str | None = CHATML,
    seed: int = 0,
    nan: bool = False,
    add_bos: bool = False,
    pre: str = "gpt-2",
    infill: bool = False,
    causal: bool = True,
    split: int = 0,
) -> Path:
    """Write the model; with `nan` its last norm is not a number, and so is every logit. With `infill`
    its vocabulary has tokens to fill in the middle. One that is not `causal` is for embeddings. With `split`
    no file has more tensors than that; the first one's path is returned.

    `quantized` is "Q8_0" (or True) or "Q4_0". With `words` every sampled token (top-k) is a letter
    and a number: no answer ends by itself, all of it is ASCII, and its letters count its tokens.
    """
    kind = gguf.GGMLQuantizationType["Q8_0" if quantized is True else quantized or "F32"]
    random = np.random.default_rng(seed)
    w = _begun(path, shape, split)
    if not causal:
        w.add_causal_attention(False)
    _add_vocabulary(w, shape.vocabulary, add_bos=add_bos, pre=pre, infill=infill)
    if template is not None:
        w.add_chat_template(template)

    def matrix(name: str, rows: int, columns: int) -> None:
        data = random.standard_normal((rows, columns), dtype=np.float32)
        data *= columns**-0.5
        if words and name == "token_embd.weight":
            data[:_PLAIN] *= _UNLIKELY
            data[-len(SPECIAL) :] *= _UNLIKELY
        if quantized:
            w.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)
        else:
            w.add_tensor(name, data)

    def ones(name: str, value: float = 1.0) -> None:
        w.add_tensor(name, np.full(shape.width, value, dtype=np.float32))

    inner = shape.heads * shape.head_width
    kv_inner = shape.kv_heads * shape.head_width
    matrix("token_embd.weight", shape.vocabulary, shape.width)
    ones("output_norm.weight", float("nan") if nan else 1.0)
    for i in range(shape.layers):
        ones(f"blk.{i}.attn_norm.weight")
        ones(f"blk.{i}.ffn_norm.weight")
        matrix(f"blk.{i}.attn_q.weight", inner, shape.width)
        matrix(f"blk.{i}.attn_k.weight", kv_inner, shape.width)
        matrix(f"blk.{i}.attn_v.weight", kv_inner, shape.width)
        matrix(f"blk.{i}.attn_output.weight", shape.width, inner)
        matrix(f"blk.{i}.ffn_gate.weight", shape.hidden, shape.width)
        matrix(f"blk.{i}.ffn_up.weight", shape.hidden, shape.width)
        matrix(f"blk.{i}.ffn_down.weight", shape.width, shape.hidden)
    return _ended(w, path)


def write_chain(
    path: Path,
    script: Sequence[str],
    *,
    template: str = CHATML,
    marks: Collection[str] = (),
    unsaid: Sequence[str] = (),
    loop: bool = False,
    shape: Shape = CHAIN,
) -> Path:
    """Write a model that says the script's tokens, one after the other, whatever it was asked: each
    follows the one before it, the first a line's end, and <|im_end|> the last. No token comes
    twice. Those of `marks` are special, those `unsaid` are words of the vocabulary as well.
    In a `loop` the first one follows the last.
    """
    words = [text for text in (*script, *unsaid) if len(text.encode()) > 1]
    w = _begun(path, shape)
    singles = byte_tokens()
    tokens = _add_vocabulary(w, shape.vocabulary, words=words, marks=marks)
    w.add_chat_template(template)
    # A byte is stored as its stand-in, a word that is no result of merges as it is.
    ids = [tokens.index(text if text in words else singles[ord(text)]) for text in script]
    chain = [tokens.index(singles[10]), *ids, ids[0] if loop else shape.vocabulary - 1]
    size = shape.vocabulary
    after = np.zeros((size, shape.width), dtype=np.float32)
    for token, following in itertools.pairwise(chain):
        after[following, token] = 1
    w.add_tensor("token_embd.weight", np.eye(size, shape.width, dtype=np.float32))
    w.add_tensor("output.weight", after)
    w.add_tensor("output_norm.weight", np.ones(shape.width, dtype=np.float32))
    inner, kv_inner = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    for i in range(shape.layers):
        for name, rows, columns in (
            ("attn_q", inner, shape.width),
            ("attn_k", kv_inner, shape.width),
            ("attn_v", kv_inner, shape.width),
            ("attn_output", shape.width, inner),
            ("ffn_gate", shape.hidden, shape.width),
            ("ffn_up", shape.hidden, shape.width),
            ("ffn_down", shape.width, shape.hidden),
        ):
            w.add_tensor(f"blk.{i}.{name}.weight", np.zeros((rows, columns), dtype=np.float32))
        for name in ("attn_norm", "ffn_norm"):
            w.add_tensor(f"blk.{i}.{name}.weight", np.ones(shape.width, dtype=np.float32))
    return _ended(w, path)


def write_adapter(path: Path, shape: Shape = TINY, *, seed: int = 1, rank: int = 4) -> Path:
    """Write a LoRA adapter for a model of this shape, strong enough to change every answer."""
    random = np.random.default_rng(seed)
    w = gguf.GGUFWriter(str(path), "llama")
    w.add_type(gguf.GGUFType.ADAPTER)
    w.add_string(gguf.Keys.Adapter.TYPE, "lora")
    w.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))
    inner = shape.heads * shape.head_width
    for i in range(shape.layers):
        for name, rows, columns in (
            ("attn_q", inner, shape.width),
            ("ffn_down", shape.width, shape.hidden),
        ):
            a = random.standard_normal((rank, columns), dtype=np.float32) * columns**-0.5
            b = random.standard_normal((rows, rank), dtype=np.float32)
            w.add_tensor(f"blk.{i}.{name}.weight.lora_a", a)
            w.add_tensor(f"blk.{i}.{name}.weight.lora_b", b)
    return _ended(w, path)


def _begun(path: Path, shape: Shape, split: int = 0) -> gguf.GGUFWriter:
    w = gguf.GGUFWriter(str(path), "llama", split_max_tensors=split)
    w.add_name("random")
    w.add_block_count(shape.layers)
    w.add_context_length(shape.context)
    w.add_embedding_length(shape.width)
    w.add_feed_forward_length(shape.hidden)
    w.add_head_count(shape.heads)
    w.add_head_count_kv(shape.kv_heads)
    w.add_key_length(shape.head_width)
    w.add_value_length(shape.head_width)
    w.add_rope_dimension_count(shape.head_width)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_vocab_size(shape.vocabulary)
    return w


def _ended(w: gguf.GGUFWriter, path: Path) -> Path:
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    parts = len(w.tensors)
    return path if parts == 1 else path.with_name(f"{path.stem}-00001-of-{parts:05}.gguf")


def _add_vocabulary(
    w: gguf.GGUFWriter,
    size: int,
    *,
    add_bos: bool = False,
    pre: str = "gpt-2",
    infill: bool = False,
    words: Sequence[str] = (),
    marks: Collection[str] = (),
) -> list[str]:
    """Returns the tokens. `words` are some of them; those in `marks` are special."""
    singles = byte_tokens()
    special = (*INFILL, *SPECIAL) if infill else SPECIAL
    most = size - len(singles) - len(special) - len(words) - 1
    filler = [f"{singles[97 + i % 26]}{i}" for i in range(most)]
    tokens = [*singles, "ab", *filler, *words, *special]
    kinds = [gguf.TokenType.NORMAL] * (size - len(special) - len(words))
    kinds += [
        gguf.TokenType.CONTROL if word in marks else gguf.TokenType.USER_DEFINED for word in words
    ]
    kinds += [gguf.TokenType.CONTROL] * len(special)
    if infill:
        w.add_uint32("tokenizer.ggml.fim_pre_token_id", size - 6)
        w.add_uint32("tokenizer.ggml.fim_suf_token_id", size - 5)
        w.add_uint32("tokenizer.ggml.fim_mid_token_id", size - 4)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre(pre)
    w.add_token_list(tokens)
    w.add_token_types(kinds)
    w.add_token_merges(["a b"])
    w.add_bos_token_id(size - 3)
    w.add_eos_token_id(size - 3)
    w.add_eot_token_id(size - 1)
    w.add_add_bos_token(add_bos)
    return tokens
