"""Labels by their log-probabilities: the arithmetic, and what is asked for it.

Cases: probabilities sum to 1, keep their order, do not move with all scores, do not overflow; what is
the same without the text counts for nothing; level ones, the first; no numbers; common beginnings;
labels that are refused; a label's tokens are those after what all have in common, also where its
beginning melts into the prompt's end; the empty text is asked about once; a refusal is the caller's,
and the rest is cancelled.
"""

from __future__ import annotations

import asyncio
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from shimmy_jupyter.errors import AccessDenied, InvalidValue
from shimmy_jupyter.notebook.asking import Asker
from shimmy_jupyter.notebook.classifying import (
    Classifier,
    calibrated,
    checked_labels,
    common_prefix,
    softmax,
)

FINITE = st.floats(-1e6, 1e6)
SCORES = st.dictionaries(st.text(max_size=3), FINITE, min_size=1, max_size=6)


class TestArithmetic:
    @given(SCORES)
    def test_probabilities(self, scores: dict[str, float]) -> None:
        found = softmax(scores)
        assert list(found) == list(scores)
        assert math.fsum(found.values()) == pytest.approx(1)
        assert all(0 <= p <= 1 for p in found.values())
        ranked = sorted(scores, key=lambda label: scores[label])
        assert [found[label] for label in ranked] == sorted(found.values())

    @given(SCORES, st.floats(-1000, 1000))
    def test_only_differences_count(self, scores: dict[str, float], more: float) -> None:
        moved = softmax({label: score + more for label, score in scores.items()})
        assert moved == pytest.approx(softmax(scores), abs=1e-6)

    @given(st.floats(-500, 0), st.floats(-500, 0))
    def test_two_are_the_logistic_function(self, a: float, b: float) -> None:
        assert softmax({"a": a, "b": b})["a"] == pytest.approx(
            1 / (1 + math.exp(min(b - a, 700))), abs=1e-12
        )

    @given(SCORES, st.data())
    def test_what_is_so_without_the_text_counts_for_nothing(
        self, given_text: dict[str, float], data: Any
    ) -> None:
        neutral = {label: data.draw(FINITE) for label in given_text}
        found = calibrated(given_text, neutral, "m")
        assert found.scores == {label: given_text[label] - neutral[label] for label in given_text}
        assert found.probabilities == softmax(found.scores)
        assert found.scores[found.label] == max(found.scores.values())
        same = calibrated(given_text, given_text)
        assert set(same.probabilities.values()) == {1 / len(given_text)}
        assert same.label == next(iter(given_text))
        assert found.model == "m"

    @pytest.mark.parametrize("odd", [math.nan, -math.inf, math.inf])
    def test_what_is_no_number(self, odd: float) -> None:
        with pytest.raises(InvalidValue, match="'b'"):
            calibrated({"a": 0.0, "b": odd}, {"a": 0.0, "b": -1.0})
        with pytest.raises(InvalidValue):
            calibrated({"a": 0.0, "b": 1.0}, {"a": odd, "b": -1.0})

    @given(st.lists(st.lists(st.integers(0, 2), max_size=6), min_size=1, max_size=4))
    def test_common_beginnings(self, sequences: list[list[int]]) -> None:
        length = common_prefix(sequences)
        assert len({tuple(one[:length]) for one in sequences}) == 1
        if all(len(one) > length for one in sequences):
            assert len({one[length] for one in sequences}) > 1


@pytest.mark.parametrize(
    ("labels", "param"),
    [
        ([], "labels"), (["a"], "labels"), ("ab", "labels"), (["a", ""], "labels.1"),
        (["a", " "], "labels.1"), (["a", "b", "a"], "labels.2"), (["a", 3], "labels.1"),
        (5, "labels"), ({"a", "b"}, "labels"), (pd.Series(["a", "a"], index=[5, 6]), "labels.1"),
    ],
)  # fmt: skip
def test_labels_that_are_refused(labels: Any, param: str) -> None:
    with pytest.raises(InvalidValue) as caught:
        checked_labels(labels)
    assert caught.value.param == param


@pytest.mark.parametrize("kind", [list, tuple, np.array, pd.Series])
def test_labels_in_whatever_is_in_order(kind: Any) -> None:
    assert checked_labels(kind(["a", "b"])) == ("a", "b")


class Model:
    """Of characters as tokens, where "xy" is one. A character costs as many thousandths as its number;
    a label's first costs nothing where the text has the label.
    """

    def __init__(self, end: str = ">", refuse: str = "") -> None:
        self.end, self.refuse = end, refuse
        self.asked: list[tuple[str, Any]] = []
        self.cancelled = 0

    async def request(
        self, method: str, path: str, body: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        if method == "GET":
            return {"default": "m", "models": []}
        assert body is not None
        self.asked.append((path, body))
        match path.rpartition("/")[2]:
            case "apply-template":
                return {"prompt": f"<{body['messages'][0]['content']}{self.end}", "count": 0}
            case "tokenize":
                return {"tokens": self._tokens(body["prompt"]), "count": 0}
            case _:
                return await self._scored(body)

    async def _scored(self, body: dict[str, Any]) -> dict[str, Any]:
        tokens = body["prompt"]
        text = "".join("xy" if token == 999 else chr(token) for token in tokens)
        if self.refuse and text.endswith(self.refuse):
            raise AccessDenied("not this one")
        if self.refuse:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        body_text, _, label = text.rpartition(self.end)
        known = label and label in body_text.rpartition("\n")[2]
        scores: list[float | None] = [None, *(-0.001 * token for token in tokens[1:])]
        if known:
            scores[len(tokens) - len(label)] = 0.0
        return {"choices": [{"logprobs": {"token_logprobs": scores}}]}

    @staticmethod
    def _tokens(text: str) -> list[int]:
        return [999 if one == "\0" else ord(one) for one in text.replace("xy", "\0")]

    async def stream(self, *_: Any) -> Any:
        raise AssertionError


def classifier(played: Model, *labels: str, **more: Any) -> Classifier:
    return Classifier(Asker(lambda: played), labels, **more)  # type: ignore[arg-type,return-value]


class TestAsking:
    async def test_the_label_that_the_text_makes_likelier(self) -> None:
        found = await classifier(Model(), "yes", "no", "maybe").classify("well, no")
        assert found.label == "no"
        assert found.scores == pytest.approx({"yes": 0, "no": 0.001 * ord("n"), "maybe": 0})
        assert found.probabilities == softmax(found.scores)
        assert found.model == "m"

    async def test_what_is_asked(self) -> None:
        model = Model()
        await classifier(model, "a", "b", prompt="Which?", model="n").classify("text")
        rendered = [body for path, body in model.asked if path.endswith("template")]
        assert [one["messages"][0]["content"] for one in rendered] == [
            "Which?\n\n",
            "Which?\n\ntext",
        ]
        assert all(one["thinking"] is False and one["model"] == "n" for one in rendered)
        scored = [body for path, body in model.asked if path.endswith("completions")]
        assert len(scored) == 4
        for body in scored:
            assert {k: body[k] for k in ("echo", "logprobs", "max_tokens", "model")} == {
                "echo": True, "logprobs": 0, "max_tokens": 0, "model": "n",
            }  # fmt: skip

    async def test_our_own_question_names_the_labels(self) -> None:
        model = Model()
        await classifier(model, "good", "bad").classify("t")
        content = model.asked[0][1]["messages"][0]["content"]
        assert "good, bad" in content

    async def test_the_empty_text_is_asked_about_once(self) -> None:
        model = Model()
        one = classifier(model, "a", "b")
        found = await asyncio.gather(*(one.classify(text) for text in ("a", "b", "c")))
        assert [each.label for each in found] == ["a", "b", "a"]
        rendered = [body for path, body in model.asked if path.endswith("template")]
        assert len(rendered) == 4

    async def test_a_label_that_melts_into_the_prompts_end(self) -> None:
        """The prompt ends in "x", and with "y" that is one token: it belongs to the label, for all."""
        model = Model(end="x")
        one = classifier(model, "y", "z")
        prompts = []

        async def scored(body: dict[str, Any]) -> dict[str, Any]:
            prompts.append(body["prompt"])
            return {
                "choices": [
                    {"logprobs": {"token_logprobs": [None, *[-1.0] * (len(body["prompt"]) - 1)]}}
                ]
            }

        model._scored = scored  # type: ignore[method-assign]
        one._base = {"model": "m"}
        found = await one._likelihoods("t")
        # "xy" is one token after the common beginning, "x" "z" are two.
        (melted,) = [p for p in prompts if p[-1] == 999]
        (apart,) = [p for p in prompts if p[-1] == ord("z")]
        assert len(apart) == len(melted) + 1
        assert apart[:-2] == melted[:-1]
        assert found == {"y": -1, "z": -2}

    @given(st.text(max_size=5), st.text("xyz", min_size=1, max_size=4))
    def test_tokens_are_counted_from_one_place(self, text: str, label: str) -> None:
        assume("\0" not in text)
        other = label + "z"
        starts = []

        async def run() -> None:
            one = classifier(Model(end="x"), label, other)
            one._base = {"model": "m"}

            async def likelihood(tokens: list[int], start: int) -> float:
                starts.append((tuple(tokens[:start]), len(tokens) - start))
                return 0.0

            one._likelihood = likelihood  # type: ignore[method-assign]
            await one._likelihoods(text)

        asyncio.run(run())
        assert len({before for before, _ in starts}) == 1
        assert all(own > 0 for _, own in starts)

    async def test_a_label_without_tokens_of_its_own(self) -> None:
        model = Model()
        model._tokens = lambda text: [1, 2, 3]  # type: ignore[method-assign]
        with pytest.raises(InvalidValue) as caught:
            await classifier(model, "a", "b").classify("t")
        assert caught.value.param == "labels"

    async def test_a_refusal_cancels_the_rest(self) -> None:
        model = Model(refuse="b")
        with pytest.raises(AccessDenied):
            await asyncio.wait_for(classifier(model, "a", "b", "c").classify("t"), 5)
        assert model.cancelled == 2

    @pytest.mark.parametrize("text", [None, math.nan, 5, ["a"]])
    async def test_what_is_no_text(self, text: Any) -> None:
        model = Model()
        with pytest.raises(InvalidValue, match=f"not {type(text).__name__}") as caught:
            await classifier(model, "a", "b").classify(text)
        assert (caught.value.param, model.asked) == ("text", [])

    async def test_after_a_failure_the_empty_text_is_asked_about_again(self) -> None:
        model = Model(refuse="b")
        one = classifier(model, "a", "b")
        with pytest.raises(AccessDenied):
            await one.classify("t")
        model.refuse = ""
        assert (await one.classify("b")).label == "b"
