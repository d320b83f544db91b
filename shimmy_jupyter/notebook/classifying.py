"""Which of some labels a text has, by how likely the model finds each as its answer.

A label's score is the sum of its tokens' log-probabilities given the text, less the same given no text:
how much more the text makes one expect it. Without the second term common and short labels win
whatever the text says. Holtzman et al., "Surface Form Competition", EMNLP 2021 (PMI_DC, whose
premise of the domain is here the prompt without a text); Zhao et al., "Calibrate Before Use",
ICML 2021 (contextual calibration by an input without content).
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ..errors import InvalidValue
from .asking import Asker, check_text
from .values import python_value

A = TypeVar("A")
T = TypeVar("T")

_AT_ONCE = 16
"""Requests of one classification under way."""
_NO_TEXT = ""
_TASK = "Which label does the text have? Answer with nothing but one of these: "


@dataclass(frozen=True, slots=True)
class Classification:
    """`label` is the likeliest, the first of several that are level. `probabilities` sum to 1; `scores`
    are what they are the softmax of, in nats.
    """

    label: str
    probabilities: dict[str, float]
    scores: dict[str, float]
    model: str = ""


def calibrated(
    given: Mapping[str, float], neutral: Mapping[str, float], model: str = ""
) -> Classification:
    """From each label's log-probability given the text, and given none. Raises `InvalidValue` for what
    are no numbers.
    """
    scores = {label: given[label] - neutral[label] for label in given}
    for label, score in scores.items():
        if not math.isfinite(score):
            raise InvalidValue(f"the model has no probability for {label!r}", param="labels")
    return Classification(
        max(scores, key=lambda label: scores[label]), softmax(scores), scores, model
    )


def softmax(scores: Mapping[str, float]) -> dict[str, float]:
    """Of finite scores in nats; probabilities that sum to 1."""
    highest = max(scores.values())
    weights = {label: math.exp(score - highest) for label, score in scores.items()}
    total = math.fsum(weights.values())
    return {label: weight / total for label, weight in weights.items()}


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """How many tokens all of them begin with."""
    shortest = min(sequences, key=len)
    for i, token in enumerate(shortest):
        if any(other[i] != token for other in sequences):
            return i
    return len(shortest)


def checked_labels(labels: Sequence[str]) -> tuple[str, ...]:
    """Raises `InvalidValue`, naming the label that is empty, no text, or there twice."""
    labels = python_value(labels)
    if isinstance(labels, str) or not isinstance(labels, Sequence) or len(labels) < 2:
        raise InvalidValue("a list of at least two labels, please", param="labels")
    for i, label in enumerate(labels):
        if not isinstance(label, str) or not label.strip():
            raise InvalidValue("a label is a text, and not empty", param=f"labels.{i}")
        if label in labels[:i]:
            raise InvalidValue(f"{label!r} is there twice", param=f"labels.{i}")
    return tuple(labels)


class Classifier:
    """The same question about any number of texts: what is the same for all of them is computed once."""

    def __init__(
        self,
        asker: Asker,
        labels: Sequence[str],
        *,
        prompt: str | None = None,
        model: str | None = None,
    ) -> None:
        self._asker, self._labels = asker, checked_labels(labels)
        listed = ", ".join(self._labels)
        self._task = f"{_TASK}{listed}." if prompt is None else prompt
        self._model = model
        self._turn = asyncio.Semaphore(_AT_ONCE)
        self._first = asyncio.Lock()
        self._neutral: dict[str, float] | None = None
        self._base: dict[str, Any] = {}

    async def classify(self, text: str) -> Classification:
        """Raises `InvalidValue`, or what the service refuses it with."""
        check_text(text)
        async with self._first:
            if self._neutral is None:
                self._base = await self._asker.prepared({"model": self._model})
                self._neutral = await self._likelihoods(_NO_TEXT)
        given = await self._likelihoods(text)
        return calibrated(given, self._neutral, self._base["model"])

    async def _likelihoods(self, text: str) -> dict[str, float]:
        """The log-probability of each label as the answer.

        The prompt ends where a chat's answer begins. A tokenizer may put the end of it and the
        beginning of a label into one token, so a label's tokens are those after what the prompt alone
        and the prompt with each of the labels have in common: all labels are compared from the same
        place on.
        """
        prompt = await self._rendered(text)
        asked = (prompt, *(prompt + label for label in self._labels))
        alone, *whole = await self._each(self._tokens, asked)
        start = common_prefix([alone, *whole])
        for label, tokens in zip(self._labels, whole, strict=True):
            if not 0 < start < len(tokens):
                raise InvalidValue(f"{label!r} has no tokens of its own here", param="labels")
        found = await self._each(lambda tokens: self._likelihood(tokens, start), whole)
        return dict(zip(self._labels, found, strict=True))

    async def _rendered(self, text: str) -> str:
        content = f"{self._task}\n\n{text}"
        body = {
            "model": self._base["model"],
            "messages": [{"role": "user", "content": content}],
            # A label is the answer, and not the first thing to think.
            "thinking": False,
        }
        return str((await self._asker.post("shimmy/api/apply-template", body))["prompt"])

    async def _tokens(self, text: str) -> list[int]:
        return await self._asker.tokens({"model": self._base["model"], "prompt": text})

    async def _likelihood(self, tokens: list[int], start: int) -> float:
        asked = {"prompt": tokens, "echo": True, "logprobs": 0, "max_tokens": 0}
        answer = await self._asker.post("shimmy/v1/completions", {**self._base, **asked})
        return math.fsum(answer["choices"][0]["logprobs"]["token_logprobs"][start:])

    async def _each(self, work: Callable[[A], Awaitable[T]], items: Iterable[A]) -> list[T]:
        """In order. The first that fails cancels the others."""

        async def one(item: A) -> T:
            async with self._turn:
                return await work(item)

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(item)) for item in items]
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None
        return [task.result() for task in tasks]
