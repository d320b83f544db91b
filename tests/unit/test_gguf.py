"""Model files are understood or refused by their headers, at a bounded cost, whatever they hold.

Cases: valid files of llama's and other architectures, several vocabularies and types, split, adapters,
encoders, the bundled one: their facts, against gguf's own reader; both versions; values per layer; what is
kept of arrays and texts; a header that is cut at each border; every named edit; parts that are missing or
in disorder; adapters that do not fit themselves; 500 mutations; arbitrary bytes and arbitrary headers;
counts of 2**60; the costliest header there can be; a large file; folders, pipes and what cannot be read.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf as oracle
import minilm_gguf
import mutated_gguf
import numpy as np
import pytest
import random_gguf
from hypothesis import given, settings
from hypothesis import strategies as st
from mutated_gguf import NAMED, RELATIVES, Gguf, Pair, Tensor

from shimmy_jupyter.errors import ModelLoadFailed
from shimmy_jupyter.models import gguf_reader, gguf_vocabulary
from shimmy_jupyter.models.gguf import (
    ArrayInfo,
    GgufError,
    GgufFacts,
    memory_needed,
    read_header,
    validate,
)
from shimmy_jupyter.models.gguf_reader import MAX_KEYS, MAX_TENSORS, MAX_TOKENS
from shimmy_jupyter.models.gguf_vocabulary import TOKENS
from shimmy_jupyter.models.sources import BUNDLED

BOUND = 128 << 20


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return random_gguf.write(tmp_path_factory.mktemp("base") / "base.gguf").read_bytes()


@pytest.fixture
def put(tmp_path: Path) -> Callable[[bytes], Path]:
    def put(data: bytes) -> Path:
        path = tmp_path / "file.gguf"
        path.write_bytes(data)
        return path

    return put


def edited(base: bytes, edit: Callable[[Gguf], object]) -> bytes:
    file, _ = mutated_gguf.parsed(base)
    edit(file)
    return file.pack()


@contextmanager
def bounded(most: int = BOUND) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()


def bert(path: Path) -> Path:
    """An encoder with a WordPiece vocabulary, and tensors enough to be looked at."""
    w = oracle.GGUFWriter(str(path), "bert")
    config = {
        "num_hidden_layers": 1, "max_position_embeddings": 64, "hidden_size": 32,
        "intermediate_size": 64, "num_attention_heads": 2, "layer_norm_eps": 1e-12,
        "type_vocab_size": 2,
    }  # fmt: skip
    minilm_gguf._add_shape(w, config)
    minilm_gguf._add_vocabulary(w, [*minilm_gguf.SPECIAL.values(), "a", "##b"])
    w.add_pooling_type(oracle.PoolingType.MEAN)
    w.add_tensor("token_embd.weight", np.zeros((7, 32), dtype=np.float16))
    w.add_tensor("token_types.weight", np.zeros((2, 32), dtype=np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def value_of(reader: Any, key: str) -> Any:
    return reader.fields[key].contents() if key in reader.fields else None


def agrees(path: Path, facts: GgufFacts) -> None:
    """With gguf's own reader, for a file that is not split."""
    reader = oracle.GGUFReader(path)
    header = read_header(path)
    arch = value_of(reader, "general.architecture")
    assert facts.architecture == arch
    assert facts.name == (value_of(reader, "general.name") or "")
    assert facts.parameters == sum(int(t.n_elements) for t in reader.tensors)
    assert facts.size_bytes == path.stat().st_size
    assert facts.context_size == (value_of(reader, f"{arch}.context_length") or 0)
    assert facts.layers == (value_of(reader, f"{arch}.block_count") or 0)
    assert facts.embedding_width == (value_of(reader, f"{arch}.embedding_length") or 0)
    assert facts.heads == (value_of(reader, f"{arch}.attention.head_count") or 0)
    assert facts.vocabulary == len(value_of(reader, "tokenizer.ggml.tokens") or ())
    assert facts.chat_template == value_of(reader, "tokenizer.chat_template")
    assert (header.alignment, header.data_start) == (reader.alignment, reader.data_offset)
    keys = [key for key in reader.fields if not key.startswith("GGUF.")]
    assert list(header.metadata) == keys
    for key, value in header.metadata.items():
        theirs = value_of(reader, key)
        if isinstance(value, ArrayInfo):
            assert value.count == len(theirs)
        else:
            assert (list(value) if isinstance(value, tuple) else value) == theirs
    for ours, theirs in zip(header.tensors, reader.tensors, strict=True):
        assert (ours.name, ours.type) == (theirs.name, theirs.tensor_type.name)
        assert ours.shape == tuple(map(int, theirs.shape))
        assert header.data_start + ours.offset == theirs.data_offset
        assert ours.size_bytes == theirs.n_bytes


class TestValid:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"quantized": True},
            {"quantized": "Q4_0", "infill": True, "words": True},
            {"template": None, "pre": "llama-bpe", "add_bos": True},
            {"causal": False},
            {"nan": True},
        ],
    )
    def test_random_llamas(self, tmp_path: Path, options: dict[str, Any]) -> None:
        path = random_gguf.write(tmp_path / "a.gguf", **options)
        facts = validate(path)
        agrees(path, facts)
        shape = random_gguf.TINY
        assert facts.kind == ("model" if options.get("causal", True) else "embedding")
        kind = options.get("quantized", "F32")
        assert facts.quantisation == ("Q8_0" if kind is True else kind)
        assert (facts.heads, facts.kv_heads) == (shape.heads, shape.kv_heads)
        assert (facts.key_length, facts.value_length) == (shape.head_width, shape.head_width)
        assert facts.kv_bytes_per_token == shape.kv_bytes
        assert facts.tokenizer == "gpt2"
        assert (facts.split, facts.adapter, facts.file_type) == (None, None, None)
        if facts.chat_template is not None:
            digest = hashlib.sha256(random_gguf.CHATML.encode()).hexdigest()
            assert facts.chat_template_sha256 == digest

    def test_the_bundled_one(self) -> None:
        facts = validate(BUNDLED)
        agrees(BUNDLED, facts)
        assert (facts.kind, facts.quantisation, facts.file_type) == ("model", "Q8_0", 7)
        assert facts.parameters == 3_049_920

    @pytest.mark.parametrize("name", RELATIVES)
    def test_relatives(self, base: bytes, put: Any, name: str) -> None:
        path = put(mutated_gguf.relative(base, name))
        facts = validate(path)
        agrees(path, facts)
        assert facts.kind == "model"
        assert facts.kv_bytes_per_token == (0 if name == "mamba" else random_gguf.TINY.kv_bytes)
        state = 4 * random_gguf.TINY.layers * (3 * 128 + 16 * 128)
        assert facts.state_bytes == (state if name == "mamba" else 0)

    def test_an_encoder(self, tmp_path: Path) -> None:
        path = bert(tmp_path / "bert.gguf")
        facts = validate(path)
        agrees(path, facts)
        assert (facts.kind, facts.tokenizer, facts.quantisation) == ("embedding", "bert", "F16")
        assert (facts.key_length, facts.kv_heads) == (16, 2)

    def test_an_adapter(self, tmp_path: Path) -> None:
        path = random_gguf.write_adapter(tmp_path / "adapter.gguf", rank=4)
        facts = validate(path)
        agrees(path, facts)
        assert facts.kind == "adapter"
        assert facts.adapter is not None
        assert (facts.adapter.type, facts.adapter.alpha, facts.adapter.rank) == ("lora", 4.0, 4)
        assert facts.adapter.base_models == ()
        name = ("general.base_model.0.name", 8, "Some Model")
        path.write_bytes(edited(path.read_bytes(), lambda file: file.set(*name)))
        again = validate(path).adapter
        assert again is not None
        assert again.base_models == ("Some Model",)

    def test_a_projector(self, base: bytes, put: Any) -> None:
        def project(file: Gguf) -> None:
            file.pairs.clear()
            file.set("general.architecture", 8, "clip")
            file.set("general.type", 8, "mmproj")

        facts = validate(put(edited(base, project)))
        assert (facts.kind, facts.vocabulary, facts.layers) == ("projector", 0, 0)

    def test_a_projector_of_so_many_layers(self, base: bytes, put: Any) -> None:
        """What it says of itself costs nothing, as it is no model whose numbers are looked at."""

        def project(file: Gguf) -> None:
            file.set("general.type", 8, "mmproj")
            file.set("llama.block_count", 4, (1 << 32) - 1)

        path = put(edited(base, project))
        with bounded(4 << 20):
            facts = validate(path)
        assert (facts.kind, facts.layers) == ("projector", (1 << 32) - 1)
        assert memory_needed(facts, 8192) > 0

    def test_version_2(self, base: bytes, put: Any) -> None:
        path = put(edited(base, lambda file: setattr(file, "version", 2)))
        assert read_header(path).version == 2
        agrees(path, validate(path))

    def test_values_per_layer(self, tmp_path: Path) -> None:
        """As in models whose layers differ: what counts is the sum, and the largest is named."""

        def vary(file: Gguf) -> None:
            file.rename("openelm")
            pair = file.find("openelm.attention.head_count_kv")
            pair.type, pair.data = 9, struct.pack("<IQ2I", 4, 2, 4, 2)
            for tensor in file.tensors:
                if tensor.name in {"blk.0.attn_k.weight", "blk.0.attn_v.weight"}:
                    tensor.shape, tensor.data = (64, 64), tensor.data * 2

        path = random_gguf.write(tmp_path / "a.gguf")
        path.write_bytes(edited(path.read_bytes(), vary))
        facts = validate(path)
        assert (facts.kv_heads, facts.kv_bytes_per_token) == (4, 2 * (4 + 2) * 32)

    def test_other_alignments(self, base: bytes, put: Any) -> None:
        for alignment in (64, 4096, 65536):

            def align(file: Gguf, alignment: int = alignment) -> None:
                file.layout = alignment
                file.set("general.alignment", 4, alignment)

            path = put(edited(base, align))
            agrees(path, validate(path))

    def test_memory(self, base: bytes, put: Any) -> None:
        facts = validate(put(base))
        more = memory_needed(facts, 2000) - memory_needed(facts, 1000)
        assert more == 1000 * random_gguf.TINY.kv_bytes
        assert memory_needed(facts, 0) > facts.size_bytes


class TestKept:
    def test_short_arrays_and_texts(self, base: bytes, put: Any) -> None:
        def add(file: Gguf) -> None:
            file.pairs += [
                Pair("a", 9, struct.pack("<IQ3f", 6, 3, 1, 2, 3)),
                Pair("b", 9, struct.pack("<IQ", 8, 2) + mutated_gguf.encoded(8, "é") + bytes(8)),
                Pair("c", 9, struct.pack("<IQ", 8, 65) + bytes(8 * 65)),
                Pair("d", 9, struct.pack("<IQ", 0, 600) + bytes(600)),
                Pair("e", 8, mutated_gguf.encoded(8, "x" * (2 << 20))),
                Pair("f", 9, struct.pack("<IQ", 7, 2) + b"\x02\x00"),
                Pair("g", 12, struct.pack("<d", 0.1)),
                Pair("h", 8, struct.pack("<Q", 2) + b"\xff\xfe"),
            ]

        kept = read_header(put(edited(base, add))).metadata
        assert kept["a"] == (1.0, 2.0, 3.0)
        assert kept["b"] == ("é", "")
        assert kept["c"] == ArrayInfo("string", 65)
        assert kept["d"] == ArrayInfo("uint8", 600)
        assert kept["e"] == ArrayInfo("text", 2 << 20)
        assert kept["f"] == (True, False)
        assert kept["g"] == 0.1
        assert kept["h"] == "\ufffd\ufffd"
        with pytest.raises(TypeError):
            kept["a"] = 1  # type: ignore[index]


class TestRefused:
    @pytest.mark.parametrize("name", NAMED)
    def test_named_edits(self, base: bytes, put: Any, name: str) -> None:
        expected, edit = NAMED[name]
        with pytest.raises(GgufError) as caught:
            validate(put(edited(base, edit)))
        assert expected in caught.value.message
        assert len(caught.value.message) < 300
        assert caught.value.code == ModelLoadFailed.code

    def test_cut_anywhere(self, base: bytes, put: Any) -> None:
        """At each border, and one byte on either side."""
        _, borders = mutated_gguf.parsed(base)
        places = {border + step for border in borders for step in (-1, 0, 1)}
        for place in sorted(p for p in places if 0 <= p < len(base)):
            with pytest.raises(GgufError):
                validate(put(base[:place]))

    @pytest.mark.parametrize(
        ("data", "reason"),
        [
            (b"", "only 0 bytes"),
            (b"GGML" + bytes(40), "begins with 47 47 4d 4c"),
            (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big endian"),
            (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1 is outside 2…3"),
            (b"GGUF" + struct.pack("<IQQ", 4, 0, 0), "version 4 is outside 2…3"),
            (b"GGUF" + struct.pack("<IQQ", 0, 0, 0), "version 0 is outside 2…3"),
            (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "general.architecture is missing"),
        ],
    )
    def test_no_gguf(self, put: Any, data: bytes, reason: str) -> None:
        with pytest.raises(GgufError, match=reason):
            validate(put(data))

    @pytest.mark.parametrize(
        ("edit", "reason"),
        [
            (lambda f: f.pairs.append(f.pairs[0]), "the key 'general.architecture' is there twice"),
            (lambda f: f.pairs.append(Pair("x" * 257, 4, bytes(4))), "a key of 257 bytes"),
            (lambda f: f.pairs.append(Pair("", 4, bytes(4))), "a key of 0 bytes"),
            (lambda f: f.pairs.append(Pair("a\nb", 4, bytes(4))), "no printable text"),
            (lambda f: f.pairs.append(Pair("a", 13, bytes(4))), "'a' has the unknown type 13"),
            (lambda f: f.pairs.append(Pair("a", 9, struct.pack("<IQ", 9, 0))), "type 9"),
            (lambda f: f.tensors.append(f.tensors[0]), "'token_embd.weight' is there twice"),
            (lambda f: setattr(f.tensors[1], "name", "x" * 64), "name of 64 bytes"),
            (lambda f: setattr(f.tensors[1], "type", 4), "unknown type 4"),
            (lambda f: setattr(f.tensors[1], "type", 8), "ends at|leaves a gap|overlaps"),
            (lambda f: setattr(f.tensors[1], "shape", (1, 1, 1, 1, 1)), "dimensions 5"),
            (lambda f: setattr(f.tensors[1], "shape", (0,)), "cannot have the shape"),
            (lambda f: setattr(f.tensors[1], "shape", (1 << 32, 1 << 32)), "cannot have the shape"),
            (lambda f: setattr(f.tensors[1], "offset", 0), "offset 0 overlaps another"),
            (lambda f: setattr(f.tensors[1], "offset", 1 << 40), "leaves a gap"),
            (lambda f: setattr(f.tensors[-1], "shape", (64, 1 << 30)), "ends at byte"),
            (lambda f: f.tensors.clear(), "no tensors"),
            (lambda f: f.tensors.append(Tensor("q", (31, 2), 8, bytes(68))), "a multiple of Q8_0's 32"),
            (lambda f: f.set("tokenizer.ggml.tokens", 4, 1), "is no list of tokens"),
            (lambda f: f.set_tokens([b"a\0b", b"a\0c"]), "'a' twice"),
            (lambda f: f.set_tokens([b"", b"[EMPTY_0]"]), r"'\[EMPTY_0\]' twice"),
            (lambda f: f.set_tokens([b"x" * 16385]), "string of 16385 bytes"),
            (lambda f: f.arch("block_count", 8, "two"), "block_count is string, not an integer"),
            (lambda f: f.pairs.remove(f.find("llama.block_count")), "block_count is missing"),
            (lambda f: f.set("general.type", 8, "imatrix"), "'imatrix'"),
            (lambda f: f.set("split.no", 2, 1), "part 2 of a model"),
        ],
    )  # fmt: skip
    def test_single_faults(self, base: bytes, put: Any, edit: Any, reason: str) -> None:
        with pytest.raises(GgufError, match=reason):
            validate(put(edited(base, edit)))

    def test_bytes_of_an_encoder(self, tmp_path: Path) -> None:
        path = bert(tmp_path / "bert.gguf")
        kinds = struct.pack("<IQ7i", 5, 7, 3, 3, 3, 3, 3, 1, 6)

        def edit(file: Gguf) -> None:
            file.find("tokenizer.ggml.token_type").data = kinds

        path.write_bytes(edited(path.read_bytes(), edit))
        with pytest.raises(GgufError, match=r"token_type has 1 bytes, which .* 'bert' cannot have"):
            validate(path)

    @pytest.mark.parametrize(
        ("at", "unit"),
        [
            (0, 1 << 20 << 10 | 512),  # the root's children
            (65, 1000 << 10 | 256 | 65),  # where the replacement's place should be
            (200, 1 << 31 | 500),  # the replacement
            (65, 300 << 10 | 65),  # what follows an A
        ],
    )
    def test_charsmaps_that_lead_outside(self, base: bytes, put: Any, at: int, unit: int) -> None:
        def edit(file: Gguf) -> None:
            pair = file.find(gguf_vocabulary.CHARSMAP)
            data = bytearray(pair.data)
            struct.pack_into("<I", data, 16 + 4 * at, unit)
            pair.data = bytes(data)

        path = put(edited(mutated_gguf.relative(base, "unigrams"), edit))
        with pytest.raises(GgufError, match="precompiled_charsmap points outside itself"):
            validate(path)

    def test_charsmaps_with_odds_and_ends(self, base: bytes, put: Any) -> None:
        """What no text reaches may lead anywhere."""

        def edit(file: Gguf) -> None:
            pair = file.find(gguf_vocabulary.CHARSMAP)
            data = bytearray(pair.data)
            struct.pack_into("<I", data, 16 + 4 * 99, 300 << 10 | 98)
            pair.data = bytes(data)

        validate(put(edited(mutated_gguf.relative(base, "unigrams"), edit)))

    def test_projections_of_other_layers(self, base: bytes, put: Any) -> None:
        """llama.cpp compares those of qwen2 with the first layer only."""

        def vary(file: Gguf) -> None:
            RELATIVES["qwen2"](file)
            pair = file.find("qwen2.attention.head_count_kv")
            pair.type, pair.data = 9, struct.pack("<IQ2I", 4, 2, 2, 1)

        with pytest.raises(GgufError, match=r"blk\.1\.attn_k.* head_count_kv 1 make 16"):
            validate(put(edited(base, vary)))


class TestParts:
    @pytest.fixture
    def parts(self, tmp_path: Path) -> list[Path]:
        random_gguf.write(tmp_path / "m.gguf", split=8)
        found = sorted(tmp_path.glob("m-*.gguf"))
        assert len(found) == 3
        return found

    def test_are_one_model(self, parts: list[Path], base: bytes) -> None:
        facts = validate(parts[0])
        assert facts.split == (1, 3)
        assert facts.parameters == random_gguf.TINY.weights + 5 * 64
        assert facts.size_bytes == sum(part.stat().st_size for part in parts)

    def test_later_ones_are_not_models(self, parts: list[Path]) -> None:
        with pytest.raises(GgufError, match="part 2 of a model"):
            validate(parts[1])

    def test_missing(self, parts: list[Path]) -> None:
        parts[2].unlink()
        with pytest.raises(
            GgufError, match="part 3: the file cannot be read: No such file"
        ) as caught:
            validate(parts[0])
        assert "/" not in caught.value.message

    def test_in_disorder(self, parts: list[Path]) -> None:
        parts[2].write_bytes(parts[1].read_bytes())
        with pytest.raises(GgufError, match=r"part 3: split\.no 1 is not 2"):
            validate(parts[0])

    def test_of_another_kind(self, parts: list[Path]) -> None:
        data = edited(parts[1].read_bytes(), lambda file: file.set("split.no", 4, 1))
        parts[1].write_bytes(data)
        with pytest.raises(GgufError, match=r"part 2: split\.no is uint32, not uint16"):
            validate(parts[0])

    def test_with_the_same_tensor(self, parts: list[Path]) -> None:
        def twin(file: Gguf) -> None:
            file.tensors[0].name = "token_embd.weight"

        parts[1].write_bytes(edited(parts[1].read_bytes(), twin))
        with pytest.raises(GgufError, match=r"'token_embd\.weight' is there twice"):
            validate(parts[0])

    def test_under_another_name(self, parts: list[Path]) -> None:
        other = parts[0].rename(parts[0].with_name("other.gguf"))
        with pytest.raises(GgufError, match=r"end in -00001-of-00003\.gguf"):
            validate(other)


class TestAdapters:
    @pytest.mark.parametrize(
        ("edit", "reason"),
        [
            (lambda f: f.set("adapter.type", 4, 1), "adapter.type is uint32"),
            (lambda f: f.set("adapter.lora.alpha", 6, math.nan), "alpha nan is no finite"),
            (lambda f: f.tensors.pop(), "only one of two tensors"),
            (lambda f: mutated_gguf.retyped(f, 0, 26), "'blk.0.attn_q.weight.lora_a' is I32"),
            (lambda f: setattr(f.tensors[0], "shape", (32, 8)), "do not fit each other"),
        ],
    )
    def test_refused(self, tmp_path: Path, edit: Any, reason: str) -> None:
        path = random_gguf.write_adapter(tmp_path / "a.gguf")
        path.write_bytes(edited(path.read_bytes(), edit))
        with pytest.raises(GgufError, match=reason):
            validate(path)


class TestWhatIsNoFile:
    def test_folder_pipe_and_nothing(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        for name, reason in (
            (".", "no regular file|Is a directory"),
            ("pipe", "no regular file"),
            ("nothing", "No such file"),
            ("\0", "its name"),
        ):
            with pytest.raises(GgufError, match=reason) as caught:
                validate(tmp_path / name)
            assert str(tmp_path) not in caught.value.message

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
    def test_forbidden(self, base: bytes, put: Any) -> None:
        path = put(base)
        path.chmod(0)
        with pytest.raises(GgufError, match="Permission denied"):
            validate(path)

    def test_shorter_meanwhile(
        self, base: bytes, put: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(gguf_reader.os, "pread", lambda *_: b"")
        with pytest.raises(GgufError, match="became shorter"):
            validate(put(base))


def outcome(path: Path) -> str:
    """Accepted, or refused; anything else is a failure of the test."""
    try:
        validate(path)
    except GgufError as error:
        assert error.message.isprintable()
        assert str(path.parent) not in error.message
        return "refused"
    return "accepted"


class TestMutations:
    def test_are_the_same_each_time(self, base: bytes) -> None:
        one, other = (list(mutated_gguf.mutations(base, 7, 30)) for _ in range(2))
        assert one == other
        assert one != list(mutated_gguf.mutations(base, 8, 30))

    def test_five_hundred(self, base: bytes, put: Any) -> None:
        seen = {"accepted": 0, "refused": 0}
        for _, data in mutated_gguf.mutations(base, 0, 500):
            path = put(data)
            began = time.process_time()
            with bounded(8 << 20):
                seen[outcome(path)] += 1
            assert time.process_time() - began < 1
        assert seen["accepted"] > 50
        assert seen["refused"] > 200

    @pytest.mark.parametrize("name", ["experts", "mamba", "pieces"])
    def test_of_relatives(self, base: bytes, put: Any, name: str) -> None:
        for _, data in mutated_gguf.mutations(mutated_gguf.relative(base, name), 0, 60):
            outcome(put(data))

    def test_of_an_adapter(self, tmp_path: Path) -> None:
        base = random_gguf.write_adapter(tmp_path / "a.gguf").read_bytes()
        for _, data in mutated_gguf.mutations(base, 0, 60):
            (tmp_path / "a.gguf").write_bytes(data)
            outcome(tmp_path / "a.gguf")


keys = st.sampled_from(
    """
    general.architecture general.type general.alignment general.name split.no split.count a.block_count
    a.attention.head_count a.attention.head_count_kv a.expert_count a.rope.scaling.type a.context_length
    tokenizer.ggml.model tokenizer.ggml.tokens tokenizer.ggml.token_type tokenizer.chat_template
    adapter.type adapter.lora.alpha
    """.split()
)
texts = st.sampled_from(["a", "adapter", "clip", "llama", "gpt2", "bert", "", "\0", "x" * 100])
plain = st.one_of(
    st.builds(lambda text: (8, mutated_gguf.encoded(8, text)), texts),
    st.builds(lambda n: (4, struct.pack("<I", n)), st.integers(0, (1 << 32) - 1)),
    st.builds(lambda n: (2, struct.pack("<H", n)), st.integers(0, 4)),
    st.builds(lambda x: (6, struct.pack("<f", x)), st.floats(width=32)),
    st.builds(
        lambda items: (9, struct.pack(f"<IQ{len(items)}I", 4, len(items), *items)),
        st.lists(st.integers(0, 9), max_size=9),
    ),
    st.builds(
        lambda items: (
            9,
            struct.pack("<IQ", 8, len(items))
            + b"".join(mutated_gguf.encoded(8, text) for text in items),
        ),
        st.lists(texts, max_size=4),
    ),
)
pairs = st.builds(lambda key, value: Pair(key, *value), keys, plain)
tensors = st.builds(
    lambda name, shape, type, size, offset: Tensor(name, tuple(shape), type, bytes(size), offset),
    st.sampled_from(["a", "b", "blk.0.attn_q.weight", "x.lora_a", "x.lora_b"]),
    st.lists(st.integers(0, 1 << 40), max_size=5),
    st.integers(0, 50),
    st.integers(0, 100),
    st.one_of(st.none(), st.integers(0, 1 << 63)),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("arbitrary") / "a.gguf"


class TestArbitrary:
    @settings(deadline=None, max_examples=300)
    @given(st.binary(max_size=200), st.booleans())
    def test_bytes(self, place: Path, data: bytes, magic: bool) -> None:
        begin = b"GGUF" + struct.pack("<IQQ", 3, len(data) % 3, len(data) % 5)
        place.write_bytes(begin * magic + data)
        outcome(place)

    @settings(deadline=None, max_examples=300)
    @given(st.lists(pairs, max_size=8), st.lists(tensors, max_size=3))
    def test_headers(self, place: Path, some: list[Pair], others: list[Tensor]) -> None:
        place.write_bytes(Gguf(3, some, others).pack())
        outcome(place)


def costliest(path: Path, tensors: int, keys: int, tokens: int) -> None:
    """A file whose header has so many, each as large as it may be."""
    with path.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, tensors, keys))
        for i in range(keys - 1):
            file.write(struct.pack("<Q", 5) + b"%05d" % i + struct.pack("<IIQQ", 9, 10, 1, 1 << 63))
        file.write(struct.pack("<Q", 21) + TOKENS.encode() + struct.pack("<IIQ", 9, 8, tokens))
        names = (b"%x" % (i + (1 << 20)) for i in range(tokens))
        file.write(b"".join(struct.pack("<Q", 6) + name for name in names))
        for i in range(tensors):
            file.write(struct.pack("<Q", 63) + b"%063d" % i)
            file.write(struct.pack("<I4QIQ", 4, 4, 1, 1, 2, 0, 32 * i))
        file.write(bytes(-file.tell() % 32))
        file.truncate(file.tell() + 32 * tensors)


class TestCost:
    @pytest.mark.parametrize("count", [1 << 60, 1 << 40, (1 << 64) - 1, 70_000_000])
    def test_claims_cost_nothing(self, base: bytes, put: Any, count: int) -> None:
        begin = b"GGUF" + struct.pack("<I", 3)
        key = struct.pack("<Q", 1) + b"a"
        one = begin + struct.pack("<QQ", 0, 1)
        number = struct.pack("<Q", count)
        for data in (
            begin + struct.pack("<Q", 0) + number,
            begin + number + struct.pack("<Q", 0),
            one + number,
            one + key + struct.pack("<I", 8) + number,
            *(one + key + struct.pack("<II", 9, kind) + number for kind in (0, 4, 7, 8, 12)),
            one + key + struct.pack("<IIQ", 9, 8, 2) + number,
        ):
            path = put(data + bytes(2000))
            with bounded(1 << 20), pytest.raises(GgufError):
                read_header(path)

    def test_the_costliest(self, tmp_path: Path) -> None:
        """An eighth of the keys, tensors, tokens and kept items that there may be, in an eighth of the
        memory. (All of them take 59 MiB and seven seconds, half a minute while memory is traced.)
        """
        count = MAX_TENSORS // 8, MAX_KEYS // 8, MAX_TOKENS // 8
        costliest(tmp_path / "a.gguf", *count)
        with bounded(BOUND // 8):
            header = gguf_reader.read(tmp_path / "a.gguf", gguf_vocabulary.Words())
        assert (len(header.tensors), len(header.metadata)) == count[:2]

    def test_a_large_file(self, base: bytes, put: Any) -> None:
        """10 GB, of which the header is read."""

        def grow(file: Gguf) -> None:
            file.tensors.append(Tensor("output.weight", (64, 40_000_000), 0, b""))

        path = put(edited(base, grow))
        os.truncate(path, path.stat().st_size + 64 * 40_000_000 * 4)
        began = time.process_time()
        with bounded(4 << 20):
            facts = validate(path)
        assert facts.parameters > 2_560_000_000
        assert facts.size_bytes > 10_000_000_000
        assert time.process_time() - began < 5
