"""Reasoning apart from the answer, on the real engine, with models that say what they are told to.

Cases: reasoning and an answer; markers of special tokens; a prompt that opens it; thinking switched off;
an answer alone; a constraint after the reasoning, without any, and after a marker of several tokens; an
end amid the reasoning of a constrained answer; stop strings; log-probabilities; max_tokens amid it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import random_gguf

from shimmy_jupyter.engine.model import LoadedModel
from shimmy_jupyter.types import ChatOptions, Constraint, Ended, FinishReason, Message, Sampling

from .conftest import GREEDY, loaded

pytestmark = pytest.mark.usefixtures("isolation")

KNOWS = random_gguf.CHATML + "{# </think> #}"
OPENS = KNOWS.replace("assistant\n' }}", "assistant\n<think>\n' }}")
CLOSES = random_gguf.CHATML + (
    "{% if enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\n\n</think>\n' }}{% endif %}"
)
CHANNELS = random_gguf.CHATML + "{# <|channel|>analysis<|message|> #}"
THOUGHTFUL = ("<think>", "why", "ever", "</think>", "Hello", " you")
DIGITS = Constraint("regex", "[0-9]{3}")


async def say(
    model: LoadedModel,
    sampling: Sampling = GREEDY,
    max_tokens: int = 40,
    stop: tuple[str, ...] = (),
    options: ChatOptions | None = None,
) -> tuple[str, str, Ended]:
    """Reasoning, answer, end."""
    chat = (Message("user", "hi"),)
    prompt = await model.prepare(chat, "", options or ChatOptions())
    if sampling.constraint is not None:
        await model.compile(sampling.constraint)
    sampling = replace(sampling, reasoning=prompt.reasoning)
    texts = {True: "", False: ""}
    async with model.submit("p", prompt.tokens, max_tokens, sampling, stop) as stream:
        while pieces := await stream.read():
            for piece in pieces:
                texts[piece.reasoning] += piece.text
    assert stream.ended is not None
    return texts[True], texts[False], stream.ended


def chain(folder: Path, script: Sequence[str], template: str = KNOWS) -> Path:
    return random_gguf.write_chain(folder / "chain.gguf", script, template=template)


async def test_reasoning_and_an_answer(tmp_path: Path) -> None:
    async with loaded(chain(tmp_path, THOUGHTFUL)) as model:
        reasoning, text, ended = await say(model)
    assert (reasoning, text, ended.reason) == ("whyever", "Hello you", FinishReason.STOP)
    assert (ended.usage.completion_tokens, ended.usage.reasoning_tokens) == (7, 4)


async def test_markers_of_special_tokens(tmp_path: Path) -> None:
    script = (
        "<|channel|>", "analysis", "<|message|>", "why", "<|end|>", "<|start|>", "assistant",
        "<|channel|>final<|message|>", "Hello",
    )  # fmt: skip
    # With these two llama.cpp knows that <|end|> does not end an answer here.
    unsaid = ("<|return|>", "<|call|>")
    marks = [text for text in (*script, *unsaid) if text.startswith("<|")]
    path = random_gguf.write_chain(
        tmp_path / "chain.gguf", script, template=CHANNELS, marks=marks, unsaid=unsaid
    )
    async with loaded(path) as model:
        reasoning, text, ended = await say(model)
        assert (reasoning, text) == ("why", "Hello")
        assert ended.usage.reasoning_tokens == 8
        reasoning, text, _ = await say(model, replace(GREEDY, constraint=DIGITS))
        assert reasoning == "why"
        assert len(text) == 3
        assert text.isdigit()


async def test_a_prompt_that_opens_it(tmp_path: Path) -> None:
    async with loaded(chain(tmp_path, THOUGHTFUL[1:], OPENS)) as model:
        reasoning, text, ended = await say(model)
    assert (reasoning, text, ended.usage.reasoning_tokens) == ("whyever", "Hello you", 3)


async def test_thinking_switched_off(tmp_path: Path) -> None:
    async with loaded(chain(tmp_path, THOUGHTFUL, CLOSES)) as model:
        _, text, ended = await say(model, options=ChatOptions(thinking=False))
        assert text == "<think>whyever</think>Hello you"
        assert ended.usage.reasoning_tokens == 0
        reasoning, _, _ = await say(model, options=ChatOptions(thinking=True))
        assert reasoning == "whyever"


async def test_an_answer_alone(tmp_path: Path) -> None:
    async with loaded(chain(tmp_path, ("Hello", "</think>"))) as model:
        reasoning, text, ended = await say(model)
        assert (reasoning, text, ended.usage.reasoning_tokens) == ("", "Hello</think>", 0)
        reasoning, text, _ = await say(model, replace(GREEDY, constraint=DIGITS))
        assert (reasoning, text.isdigit(), len(text)) == ("", True, 3)


@pytest.mark.parametrize(
    "script",
    [
        THOUGHTFUL,
        ("<think>", "why", "ever", "</think>", "\n\n", "Hello"),
        ("<think>", "why", "ever", "</", "think", ">", "Hello"),
        ("<think>", "why", "ever", "</think", ">5Hello"),  # the answer would begin unchecked
    ],
)
async def test_a_constraint_after_it(tmp_path: Path, script: Sequence[str]) -> None:
    async with loaded(chain(tmp_path, script)) as model:
        for seed, temperature in enumerate((0.0, 0.01)):
            sampling = Sampling(temperature=temperature, seed=seed, constraint=DIGITS)
            reasoning, text, ended = await say(model, sampling, 200)
            assert reasoning.startswith("whyever")
            if ended.reason is FinishReason.STOP:
                assert (text.isdigit(), len(text)) == (True, 3)
            else:
                assert script[-1].startswith(">5")
                assert text == ""


@pytest.mark.parametrize(
    ("script", "source", "expected"),
    [
        (THOUGHTFUL, " (yes|no)", (" yes", " no")),
        (THOUGHTFUL, "\n\n(yes|no)\n", ("\n\nyes\n", "\n\nno\n")),
        (("Hello",), "<think>x</think>", ("<think>x</think>",)),
    ],
)
async def test_a_constrained_answer_is_shown_whole(
    tmp_path: Path, script: Sequence[str], source: str, expected: Sequence[str]
) -> None:
    async with loaded(chain(tmp_path, script)) as model:
        sampling = replace(GREEDY, constraint=Constraint("regex", source))
        reasoning, text, ended = await say(model, sampling)
        assert (text in expected, ended.reason) == (True, FinishReason.STOP)
        assert reasoning == ("whyever" if len(script) > 1 else "")


async def test_an_end_amid_the_reasoning(tmp_path: Path) -> None:
    async with loaded(chain(tmp_path, THOUGHTFUL[:3])) as model:
        reasoning, text, ended = await say(model)
        assert (reasoning, text, ended.reason) == ("whyever", "", FinishReason.STOP)
        _, text, ended = await say(model, replace(GREEDY, constraint=DIGITS))
        assert (text, ended.reason) == ("", FinishReason.LENGTH)


async def test_stop_strings_are_for_the_answer(tmp_path: Path) -> None:
    script = ("<think>", "why END", "ever", "</think>", "Hello", " END you")
    async with loaded(chain(tmp_path, script)) as model:
        reasoning, text, ended = await say(model, stop=("END",))
    assert (reasoning, text, ended.reason) == ("why ENDever", "Hello ", FinishReason.STOP)


async def test_max_tokens_amid_it(tmp_path: Path) -> None:
    async with loaded(chain(tmp_path, THOUGHTFUL)) as model:
        reasoning, text, ended = await say(model, max_tokens=2)
    assert (reasoning, text, ended.reason) == ("why", "", FinishReason.LENGTH)
    assert ended.usage.reasoning_tokens == 2


async def test_log_probabilities_go_with_their_text(tmp_path: Path) -> None:
    async with loaded(chain(tmp_path, THOUGHTFUL)) as model:
        prompt = await model.prepare((Message("user", "hi"),))
        sampling = replace(GREEDY, logprobs=0, reasoning=prompt.reasoning)
        found: dict[bool, bytes] = {True: b"", False: b""}
        async with model.submit("p", prompt.tokens, 40, sampling, ()) as stream:
            while pieces := await stream.read():
                for piece in pieces:
                    found[piece.reasoning] += b"".join(one.piece for one in piece.scored)
    assert found == {True: b"<think>whyever</think>", False: b"Hello you"}
