"""Guesses change when an answer comes, and not what it is.

Cases: an answer that goes round in circles takes a fraction of the steps; random models and the bundled one
say the same with guesses and without, greedy and sampled, with a constraint, with log-probabilities; an end
amid guesses leaves a prefix that is reused; nothing is guessed beside others.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
import random_gguf

from shimmy_jupyter.types import Constraint, Sampling

from .conftest import GREEDY, ask, loaded, self_test_path

pytestmark = pytest.mark.usefixtures("isolation")
SAMPLED = Sampling(temperature=0.7, seed=5, repeat_penalty=1.1)
CELL = "for i in range(10):\n    total = total + i\n    print(total)\n"
COPY = tuple(f"{CELL}# the same again\n{CELL}".encode())


async def test_fewer_steps(tmp_path: Path) -> None:
    path = random_gguf.write_chain(tmp_path / "loop.gguf", list("abcdefgh"), loop=True)
    async with loaded(path) as model:
        text, ended = await ask(model, "hi", 200)
        steps = model.engine.statistics.steps
    assert text == "abcdefgh" * 25
    assert ended.usage.completion_tokens == 200
    assert steps < 60


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("which", ["bundled", "random"])
async def test_the_same_answer(which: str, sampling: Sampling, random_model: Path) -> None:
    path = self_test_path() if which == "bundled" else random_model
    found = []
    for lookup in (True, False):
        async with loaded(path, prompt_lookup=lookup) as model:
            answers = []
            for seed in range(12):
                prompt = tuple((t + seed) % 250 for t in COPY)
                one = replace(sampling, seed=seed, logprobs=0, ignore_eos=True)
                async with model.submit("p", prompt, 60, one, ()) as stream:
                    pieces = []
                    while some := await stream.read():
                        pieces += some
                answers.append("".join(piece.text for piece in pieces))
                scored = [score for piece in pieces for score in piece.scored]
                assert len(scored) == 60
            found.append((answers, model.engine.statistics.steps))
    (guessed, steps), (plain, more) = found
    assert guessed == plain
    assert steps <= more


async def test_a_constraint_holds(random_model: Path) -> None:
    constraint = Constraint("regex", "(abcd[0-9]){12}")
    async with loaded(random_model) as model:
        await model.compile(constraint)
        text, _ = await ask(model, COPY, 100, replace(GREEDY, constraint=constraint))
        steps = model.engine.statistics.steps
    assert len(text) == 60
    assert all(text[i : i + 4] == "abcd" for i in range(0, 60, 5))
    assert steps < 60


async def test_what_is_left_is_reused(tmp_path: Path) -> None:
    path = random_gguf.write_chain(tmp_path / "loop.gguf", list("abcdefgh"), loop=True)
    async with loaded(path) as model:
        prompt = await model.encode("x" * 60 + "\n")
        text, _ = await ask(model, prompt, 99, stop=("habcdefghabcdefgh",))
        again, ended = await ask(model, (*prompt, *text.encode()), 16)
    assert again == ("abcdefgh" * 20)[len(text) :][:16]
    assert ended.usage.cached_tokens >= len(prompt) + len(text) - 1


async def test_nothing_is_guessed_beside_others(tmp_path: Path) -> None:
    path = random_gguf.write_chain(tmp_path / "loop.gguf", list("abcdefgh"), loop=True)
    async with loaded(path) as model:
        found = await asyncio.gather(*(ask(model, "hi", 64, who=str(i)) for i in range(4)))
        assert {text for text, _ in found} == {"abcdefgh" * 8}
