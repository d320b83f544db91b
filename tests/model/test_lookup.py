"""Guesses change when an answer comes, and not what it is.

Cases: an answer that goes round in circles takes a fraction of the steps; random models and the bundled one
say the same with guesses and without, greedy and sampled, with a constraint, with log-probabilities; an end
amid guesses leaves a prefix that is reused; nothing is guessed beside others, nor where each slot has its own
cache.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
import random_gguf

from shimmy_jupyter.engine.model import LoadedModel
from shimmy_jupyter.types import Constraint, Sampling, Scored

from .conftest import GREEDY, ask, loaded, self_test_path
from .test_sharing import LEVEL

pytestmark = pytest.mark.usefixtures("isolation")
SAMPLED = Sampling(temperature=0.7, seed=5, repeat_penalty=1.1)
CELL = "for i in range(10):\n    total = total + i\n    print(total)\n"
COPY = tuple(f"{CELL}# the same again\n{CELL}".encode())


async def test_fewer_steps(tmp_path: Path) -> None:
    path = random_gguf.write_chain(tmp_path / "loop.gguf", list("abcdefgh"), loop=True)
    async with loaded(path, kv_tokens=8192) as model:
        text, ended = await ask(model, "hi", 200)
        steps = model.engine.statistics.steps
    assert text == "abcdefgh" * 25
    assert ended.usage.completion_tokens == 200
    assert steps < 60


async def answers(model: LoadedModel, sampling: Sampling) -> list[list[Scored]]:
    """Each one's tokens, with the likeliest at their places."""
    found = []
    for seed in range(12):
        prompt = tuple((t + seed) % 250 for t in COPY)
        one = replace(sampling, seed=seed, logprobs=5, ignore_eos=True)
        scored: list[Scored] = []
        async with model.submit("p", prompt, 60, one, ()) as stream:
            while pieces := await stream.read():
                scored += [score for piece in pieces for score in piece.scored]
        assert len(scored) == 60
        found.append(scored)
    return found


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("which", ["bundled", "random"])
async def test_the_same_answer(which: str, sampling: Sampling, random_model: Path) -> None:
    """To the bit, where nothing else changes a sum: with a cache for each slot, in which it would not
    guess by itself.
    """
    path = self_test_path() if which == "bundled" else random_model
    async with loaded(path) as model:
        plain = await answers(model, sampling)
        more = model.engine.statistics.steps
    async with loaded(path) as model:
        planner = model.engine.scheduler._planner
        planner._capacity = replace(planner._capacity, lookup=True)
        guessed = await answers(model, sampling)
        steps = model.engine.statistics.steps
    assert [[one.token for one in some] for some in guessed] == [
        [one.token for one in some] for some in plain
    ]
    assert steps <= more


@pytest.mark.parametrize("which", ["bundled", "random"])
async def test_nearly_the_same_in_a_cache_that_is_shared(which: str, random_model: Path) -> None:
    """But where the two best tokens are level: guesses lie in cells that are free again later."""
    path = self_test_path() if which == "bundled" else random_model
    found = []
    for lookup in (True, False):
        async with loaded(path, kv_tokens=8192, prompt_lookup=lookup) as model:
            found.append(await answers(model, GREEDY))
    for one, other in zip(*found, strict=True):
        for a, b in zip(one, other, strict=True):
            if a.token != b.token:
                # As either saw them; the likeliest may be an end, which is never chosen here.
                seen = [{token: logprob for token, _, logprob in s.top} for s in (a, b)]
                assert min(abs(s[a.token] - s[b.token]) for s in seen) < LEVEL
                break


async def test_a_constraint_holds(random_model: Path) -> None:
    constraint = Constraint("regex", "(abcd[0-9]){12}")
    async with loaded(random_model, kv_tokens=8192) as model:
        await model.compile(constraint)
        text, _ = await ask(model, COPY, 100, replace(GREEDY, constraint=constraint))
        steps = model.engine.statistics.steps
    assert len(text) == 60
    assert all(text[i : i + 4] == "abcd" for i in range(0, 60, 5))
    assert steps < 60


async def test_what_is_left_is_reused(tmp_path: Path) -> None:
    path = random_gguf.write_chain(tmp_path / "loop.gguf", list("abcdefgh"), loop=True)
    async with loaded(path, kv_tokens=8192) as model:
        prompt = await model.encode("x" * 60 + "\n")
        text, _ = await ask(model, prompt, 99, stop=("habcdefghabcdefgh",))
        again, ended = await ask(model, (*prompt, *text.encode()), 16)
    assert again == ("abcdefgh" * 20)[len(text) :][:16]
    assert ended.usage.cached_tokens >= len(prompt) + len(text) - 1


async def test_nothing_is_guessed_beside_others(tmp_path: Path) -> None:
    path = random_gguf.write_chain(tmp_path / "loop.gguf", list("abcdefgh"), loop=True)
    async with loaded(path, kv_tokens=8192) as model:
        found = await asyncio.gather(*(ask(model, "hi", 64, who=str(i)) for i in range(4)))
        assert {text for text, _ in found} == {"abcdefgh" * 8}


async def test_nothing_is_guessed_where_company_changes_nothing(tmp_path: Path) -> None:
    path = random_gguf.write_chain(tmp_path / "loop.gguf", list("abcdefgh"), loop=True)
    async with loaded(path) as model:
        assert not model.facts.can_copy
        await ask(model, "hi", 64)
        assert model.engine.statistics.steps >= 64
