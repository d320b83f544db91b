"""BERT in NumPy, to compare with: WordPiece, the encoder, the pooling of all-MiniLM-L6-v2."""

from __future__ import annotations

import json
import math
import unicodedata
from pathlib import Path
from typing import Any

import minilm_gguf
import numpy as np

Array = np.ndarray[Any, np.dtype[np.float32]]

_LONGEST_WORD = 100
# In all of Unicode's blocks of unified ideographs.
_IDEOGRAPHS = (
    (0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F),
    (0x2B820, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F),
)  # fmt: skip


class Bert:
    """A checkpoint's folder, computed in float32."""

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        self.weights = minilm_gguf.read_safetensors(folder / "model.safetensors")
        words = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")[:-1]
        self.ids = {word: i for i, word in enumerate(words)}

    # Tokens

    def tokenize(self, text: str) -> tuple[int, ...]:
        inner = (token for word in _words(text) for token in self._pieces(word))
        return (self.ids["[CLS]"], *inner, self.ids["[SEP]"])

    def _pieces(self, word: str) -> list[int]:
        """The longest known beginning, again and again."""
        found: list[int] = []
        start = 0
        while start < len(word) <= _LONGEST_WORD:
            mark = "##" if start else ""
            ends = range(len(word), start, -1)
            end = next((e for e in ends if mark + word[start:e] in self.ids), None)
            if end is None:
                break
            found.append(self.ids[mark + word[start:end]])
            start = end
        return found if start == len(word) else [self.ids["[UNK]"]]

    # Vectors

    def embed(self, tokens: tuple[int, ...]) -> Array:
        mean = self.states(tokens).mean(axis=0)
        return np.asarray(mean / np.linalg.norm(mean))

    def score(self, tokens: tuple[int, ...]) -> float:
        """RoBERTa's classification head on the first token's state."""
        hidden = np.tanh(self._linear("classifier.dense", self.states(tokens)[0]))
        return float(self._linear("classifier.out_proj", hidden)[0])

    def states(self, tokens: tuple[int, ...]) -> Array:
        """The last layer's state of each token."""
        name = "embeddings"
        x = self.weights[f"{name}.word_embeddings.weight"][list(tokens)]
        x = x + self.weights[f"{name}.position_embeddings.weight"][: len(tokens)]
        x += self.weights[f"{name}.token_type_embeddings.weight"][0]
        x = self._norm(f"{name}.LayerNorm", x)
        for i in range(self.config["num_hidden_layers"]):
            layer = f"encoder.layer.{i}"
            attended = self._linear(f"{layer}.attention.output.dense", self._attention(layer, x))
            x = self._norm(f"{layer}.attention.output.LayerNorm", x + attended)
            hidden = _gelu(self._linear(f"{layer}.intermediate.dense", x))
            x = self._norm(
                f"{layer}.output.LayerNorm", x + self._linear(f"{layer}.output.dense", hidden)
            )
        return x

    def _attention(self, layer: str, x: Array) -> Array:
        heads = self.config["num_attention_heads"]
        q, k, v = (
            self._linear(f"{layer}.attention.self.{part}", x)
            .reshape(len(x), heads, -1)
            .swapaxes(0, 1)
            for part in ("query", "key", "value")
        )
        scores = q @ k.swapaxes(1, 2) / math.sqrt(q.shape[-1])
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        scores /= scores.sum(axis=-1, keepdims=True)
        return np.asarray((scores @ v).swapaxes(0, 1).reshape(len(x), -1))

    def _linear(self, name: str, x: Array) -> Array:
        return np.asarray(x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"])

    def _norm(self, name: str, x: Array) -> Array:
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = (centred**2).mean(axis=-1, keepdims=True)
        scaled = centred / np.sqrt(variance + self.config["layer_norm_eps"])
        return np.asarray(scaled * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"])


def _gelu(x: Array) -> Array:
    """With the error function by Abramowitz and Stegun 7.1.26, whose error is below 2e-7."""
    z = np.abs(x) / math.sqrt(2)
    t = 1 / (1 + 0.3275911 * z)
    series = t * (
        0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429)))
    )
    return np.asarray(x * (1 + np.sign(x) * (1 - series * np.exp(-z * z))) / 2)


def _words(text: str) -> list[str]:
    """Lower case without accents; each punctuation mark and each ideograph is a word."""
    spaced = []
    for char in unicodedata.normalize("NFD", text).lower():
        kind = unicodedata.category(char)
        if char.isspace():
            spaced.append(" ")
        elif char == "\ufffd" or kind[0] == "C" or kind == "Mn":
            continue
        elif _stands_alone(char, kind):
            spaced.append(f" {char} ")
        else:
            spaced.append(char)
    return "".join(spaced).split()


def _stands_alone(char: str, kind: str) -> bool:
    ascii_mark = char.isascii() and not char.isalnum()
    ideograph = any(first <= ord(char) <= last for first, last in _IDEOGRAPHS)
    return ascii_mark or kind[0] == "P" or ideograph
