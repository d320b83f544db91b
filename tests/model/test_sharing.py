"""Prefixes that are reused, requests that must be the same every time, deadlines and aborts: on the
real engine, in this process and in one of its own.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from pathlib import Path
from random import Random

import mutated_gguf
import pytest
import random_gguf

from shimmy_jupyter.core.messages import Row
from shimmy_jupyter.engine.backend import LoadSpec, Sharing
from shimmy_jupyter.engine.llama import LlamaBackend, context
from shimmy_jupyter.engine.llama.binding import quick
from shimmy_jupyter.engine.model import LoadedModel
from shimmy_jupyter.errors import DeadlineExceeded
from shimmy_jupyter.models.gguf import validate
from shimmy_jupyter.types import FinishReason, Sampling

from .conftest import GREEDY, ask, loaded, self_test_path

pytestmark = pytest.mark.usefixtures("isolation")

SHAPE = random_gguf.Shape(layers=4, width=256, heads=8, head_width=32, hidden=1024)
LETTERS = range(97, 123)
NO_END = Sampling(
    temperature=0, logit_bias=tuple((t, -100.0) for t in range(320) if t not in LETTERS)
)
"""One letter a token: answers do not end, and say which tokens they were."""
LEVEL = 0.1
"""Two best logits closer than this may change places when something else is computed beside them. The
largest gap seen where they did, in 72 answers that differed of 160, was 0.058.
"""


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_gguf.write(tmp_path_factory.mktemp("m") / "m.gguf", SHAPE, quantized=True)


def tokens(seed: int, count: int) -> tuple[int, ...]:
    return tuple(Random(seed).choices(range(300), k=count))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0)


class TestPrefixes:
    async def test_what_was_computed_is_not_computed_again(self, model_path: Path) -> None:
        prompt = tokens(1, 200)
        async with loaded(model_path, kv_tokens=4096) as model:
            first, cold = await ask(model, prompt, 16, NO_END)
            second, warm = await ask(model, prompt, 16, NO_END)
            assert (cold.usage.cached_tokens, warm.usage.cached_tokens) == (0, 199)
            agree(model_path, prompt, first, second)
            longer, ended = await ask(model, (*prompt[:150], *tokens(2, 9)), 16, NO_END)
            assert ended.usage.cached_tokens == 150
        async with loaded(model_path, kv_tokens=4096) as fresh:
            prompt = (*prompt[:150], *tokens(2, 9))
            agree(model_path, prompt, (await ask(fresh, prompt, 16, NO_END))[0], longer)

    async def test_others_do_not_see_it(self, model_path: Path) -> None:
        prompt = tokens(1, 200)
        async with loaded(model_path, kv_tokens=4096) as model:
            await ask(model, prompt, 4, NO_END, who="ann")
            _, theirs = await ask(model, prompt, 4, NO_END, who="ben")
            assert theirs.usage.cached_tokens == 0

    async def test_but_for_what_is_public(self, model_path: Path) -> None:
        text = "You are a tutor. " * 8
        sharing = Sharing(public=(text,))
        async with loaded(model_path, sharing, kv_tokens=4096) as model:
            public = len(await model.encode(text))
            for who, question in (("ann", "What is a list?"), ("ben", "And a dict?")):
                prompt = await model.encode(text + question)
                _, ended = await ask(model, prompt, 4, NO_END, who=who)
                assert ended.usage.cached_tokens == (0 if who == "ann" else public)

    async def test_a_beginning_that_is_in_use_is_shared(self, model_path: Path) -> None:
        prompt = tokens(1, 200)
        async with loaded(model_path, kv_tokens=4096) as model:
            answers = await asyncio.gather(
                *(ask(model, (*prompt, 65 + i), 24, NO_END) for i in range(6))
            )
            cached = sorted(ended.usage.cached_tokens for _, ended in answers)
            assert cached == [0, 200, 200, 200, 200, 200]
        for i, (text, _) in enumerate(answers):
            async with loaded(model_path, kv_tokens=4096) as fresh:
                exact, _ = await ask(fresh, (*prompt, 65 + i), 24, NO_END)
            agree(model_path, (*prompt, 65 + i), exact, text)

    async def test_saved_to_memory_and_back(self, model_path: Path) -> None:
        sharing = Sharing(saved_bytes=64 << 20)
        async with loaded(model_path, sharing, kv_tokens=512, context_size=400) as model:
            first, _ = await ask(model, tokens(1, 300), 8, NO_END)
            await ask(model, tokens(2, 300), 8, NO_END, who="ben")
            again, ended = await ask(model, tokens(1, 300), 8, NO_END)
            assert ended.usage.cached_tokens == 299
            agree(model_path, tokens(1, 300), first, again)

    @pytest.mark.parametrize("isolation", ["none"], indirect=True)
    async def test_no_memory_to_save_it(
        self, model_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It is computed again, and nobody else is disturbed."""

        def full(*_: object) -> None:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")

        sharing = Sharing(saved_bytes=64 << 20)
        async with loaded(model_path, sharing, kv_tokens=512, context_size=400) as model:
            first, _ = await ask(model, tokens(1, 300), 8, NO_END)
            with monkeypatch.context() as patched:
                patched.setattr(context.mmap, "mmap", full)
                await ask(model, tokens(2, 300), 8, NO_END, who="ben")
            again, ended = await ask(model, tokens(1, 300), 8, NO_END)
            assert ended.usage.cached_tokens == 0
            agree(model_path, tokens(1, 300), first, again)
            # What is saved from now on is there again.
            _, ended = await ask(model, tokens(2, 300), 8, NO_END, who="ben")
            assert ended.usage.cached_tokens == 299

    async def test_memory_that_another_was_saved_in(self, model_path: Path) -> None:
        async with loaded(model_path, kv_tokens=512, context_size=400) as model:
            each = model.facts.kv_bytes_per_token
        sharing = Sharing(saved_bytes=320 * each)
        async with loaded(model_path, sharing, kv_tokens=512, context_size=400) as model:
            await ask(model, tokens(1, 300), 8, NO_END, who="ann")
            first, _ = await ask(model, tokens(2, 280), 8, NO_END, who="ben")
            await ask(model, tokens(3, 300), 8, NO_END, who="ann")
            again, ended = await ask(model, tokens(2, 280), 8, NO_END, who="ben")
            assert ended.usage.cached_tokens == 279
            agree(model_path, tokens(2, 280), first, again)

    async def test_small_models_go_on_where_they_were(self) -> None:
        async with loaded(self_test_path()) as model:
            assert not model.facts.can_copy
            question = await model.encode("What does len do? " * 8)
            await ask(model, question, 8)
            _, ended = await ask(model, question, 8)
            assert ended.usage.cached_tokens == len(question) - 1


class TestReproducible:
    async def test_the_same_alone_and_under_load(self, model_path: Path) -> None:
        warm = Sampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=3)
        prompt = tokens(7, 100)

        async def noise(model: LoadedModel, i: int) -> None:
            await ask(model, tokens(100 + i, 20 + 9 * i), 60, NO_END, who=str(i % 3))

        for sampling in (GREEDY, warm):
            async with loaded(model_path, kv_tokens=8192) as model:
                alone, _ = await ask(model, prompt, 60, sampling, reproducible=True)
                beside = [asyncio.create_task(noise(model, i)) for i in range(12)]
                for _ in range(5):
                    text, ended = await ask(model, prompt, 60, sampling, reproducible=True)
                    assert text == alone
                    assert ended.usage.cached_tokens == 0
                await asyncio.gather(*beside)
            async with loaded(model_path, kv_tokens=8192) as other:
                assert (await ask(other, prompt, 60, sampling, reproducible=True))[0] == alone


async def test_everything_else_agrees_with_it_but_where_two_tokens_are_level(
    model_path: Path,
) -> None:
    """Random weights: their best tokens are as level as can be, so this is the hardest case."""
    prompts = [tokens(seed, 10 + 11 * seed) for seed in range(1, 25)]
    async with loaded(model_path, kv_tokens=16384) as model:
        exact = [await ask(model, p, 48, NO_END, reproducible=True) for p in prompts]
        together = await asyncio.gather(*(ask(model, p, 48, NO_END) for p in prompts))
    for prompt, (one, _), (other, _) in zip(prompts, exact, together, strict=True):
        agree(model_path, prompt, one, other)


def agree(path: Path, prompt: tuple[int, ...], one: str, other: str) -> None:
    """The same answers, or different from where the two best tokens were level."""
    assert len(one) == len(other)
    at = next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), None)
    if at is not None:
        assert logit_gap(path, (*prompt, *one[:at].encode())) < LEVEL


def logit_gap(path: Path, context: tuple[int, ...]) -> float:
    """Between the two best letters after `context`."""
    backend = LlamaBackend()
    backend.load(LoadSpec(path=str(path), sequences=1, kv_tokens=1024))
    shared = backend._shared
    assert shared is not None
    shared.decode([Row(0, 0, context, sample=True)], 2)
    logits = quick.llama_get_logits_ith(shared.handle, len(context) - 1)
    values = sorted(logits[i] for i in LETTERS)
    backend.unload()
    return float(values[-1] - values[-2])


class TestEndings:
    async def test_a_deadline(self, model_path: Path) -> None:
        async with loaded(model_path, kv_tokens=4096) as model:
            with pytest.raises(DeadlineExceeded):
                await ask(model, tokens(1, 100), 1900, NO_END, max_seconds=0.01)
            await ask(model, tokens(1, 100), 2, NO_END, max_seconds=1000)

    async def test_a_long_step_that_nobody_wants_is_aborted(self, tmp_path: Path) -> None:
        shape = random_gguf.Shape(layers=16, width=512, heads=8, head_width=64, hidden=2048)
        path = random_gguf.write(tmp_path / "slow.gguf", shape)
        async with loaded(path, kv_tokens=4096, threads=1) as model:
            engine = model.engine
            stream = model.submit("local", tokens(1, 1500), 4, GREEDY, ())
            await until(lambda: bool(engine._stepping))
            before = engine.statistics.steps
            stream.close()
            await until(lambda: stream.ended is not None)
            assert stream.ended is not None
            assert stream.ended.reason is FinishReason.CANCELLED
            assert (engine.statistics.aborted, engine.statistics.steps) == (1, before)
            # What the step had written is gone: the same prompt is computed as if for the first time.
            text, _ = await ask(model, tokens(1, 100), 8, NO_END)
        async with loaded(path, kv_tokens=4096, threads=1) as fresh:
            assert (await ask(fresh, tokens(1, 100), 8, NO_END))[0] == text


async def test_states_of_recurrent_layers_are_as_many_as_there_is_memory_for(
    tmp_path: Path,
) -> None:
    base = random_gguf.write(tmp_path / "base.gguf").read_bytes()
    path = tmp_path / "mamba.gguf"
    path.write_bytes(mutated_gguf.relative(base, "mamba"))
    prompt = tokens(1, 40)
    async with loaded(path) as model:
        facts = model.facts
        assert facts.state_bytes == validate(path).state_bytes > 0
        cache = facts.kv_tokens * facts.kv_bytes_per_token
        assert model.memory_bytes == facts.size_bytes + cache + facts.slots * facts.state_bytes
        expected, _ = await ask(model, prompt, 16, NO_END)
    async with loaded(path, free_bytes=facts.size_bytes + 4 * 5 * facts.state_bytes) as model:
        assert model.facts.slots == 5 < facts.slots
        answers = await asyncio.gather(*(ask(model, prompt, 16, NO_END) for _ in range(12)))
        assert {text for text, _ in answers} == {expected}
