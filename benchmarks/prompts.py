"""What is asked: prompts that no two requests share, the sampling, and the models that answer."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

SAMPLING: dict[str, Any] = {
    "temperature": 0.8,
    "top_k": 40,
    "top_p": 0.95,
    "min_p": 0.05,
    "repeat_penalty": 1.0,
}
# Without a and b, whose pair is the vocabulary's one merge: a character is a token.
_LETTERS = "cdefghijklmnopqrstuvwxyz"


def text(tokens: int, seed: object) -> str:
    """Words of six letters. Texts of two seeds have no beginning in common, or a letter or two."""
    random = Random(str(seed))
    return "".join(" " if i % 7 == 6 else random.choice(_LETTERS) for i in range(tokens))


def ids(prompt: str) -> list[int]:
    """As the model tokenizes it: a byte's token is its value."""
    return list(prompt.encode())


@dataclass(frozen=True)
class Model:
    """`tokens` and `repeats` are what a full measurement of it can afford."""

    name: str
    title: str
    shape: Any
    kind: str
    tokens: int
    repeats: int

    @property
    def weight_bytes(self) -> int:
        """What decoding one token reads at least: a block of 32 weights and its scale."""
        return self.shape.weights * {"Q8_0": 34, "Q4_0": 18}[self.kind] // 32

    def file(self, folder: Path) -> Path:
        """Made when it is first needed."""
        import random_gguf

        path = folder / f"words-{self.name}-{self.kind.lower()}.gguf"
        if not path.exists():
            print(f"making random weights: {self.title} …", flush=True)
            folder.mkdir(parents=True, exist_ok=True)
            # Under another name until it is whole, in case somebody loses patience.
            part = path.with_suffix(".part")
            random_gguf.write(part, self.shape, quantized=self.kind, words=True).rename(path)
        return path


def models() -> dict[str, Model]:
    """By name. `check` is no measurement: it shows in seconds that the benchmarks work."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
    import random_gguf

    small = random_gguf.Shape(
        layers=4, width=256, heads=8, head_width=32, hidden=1024, vocabulary=2048, context=32768
    )
    found = (
        Model("0.6b", "the shape of Qwen3-0.6B, Q8_0", random_gguf.QWEN_06B, "Q8_0", 96, 5),
        Model("3b", "the shape of Llama-3.2-3B, Q4_0", random_gguf.LLAMA_3B, "Q4_0", 48, 3),
        Model("check", "four small layers, Q8_0", small, "Q8_0", 96, 5),
    )
    return {model.name: model for model in found}
