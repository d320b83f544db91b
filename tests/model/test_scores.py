"""Log-probabilities, endings that are put off, several choices and infill, on the real engine.

Cases: each token's and its rivals' log-probability as a computation of our own has them; sampling
parameters do not change them; those of a prompt, across slices, beside others and in a context of its own;
the likeliest first, as many as were asked for; min_tokens from 0 to all;
ignore_eos; choices share their prompt's KV; infill asks with the model's own tokens and is refused where
there are none.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace
from pathlib import Path

import llama_cpp
import pytest
import random_gguf

from shimmy_jupyter.errors import InvalidValue, UnsupportedParameter
from shimmy_jupyter.types import FinishReason, Message, Sampling, Scored

from .conftest import GREEDY, ask, loaded, self_test_path

pytestmark = pytest.mark.usefixtures("isolation")
QUESTION = "What does len do?"


STEP = 32
"""Tokens of a call. From 64 on llama.cpp's attention sums in another way, and logits move by up to 0.03."""


def log_softmax(path: Path, tokens: tuple[int, ...]) -> list[list[float]]:
    """After each token, by the binding alone, and summed exactly."""
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(
        str(path).encode(), llama_cpp.llama_model_default_params()
    )
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 512
    context = llama_cpp.llama_init_from_model(model, params)
    size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    batch = llama_cpp.llama_batch_init(STEP, 0, 1)
    rows = []
    for start in range(0, len(tokens), STEP):
        some = tokens[start : start + STEP]
        batch.n_tokens = len(some)
        for i, token in enumerate(some):
            batch.token[i], batch.pos[i], batch.logits[i] = token, start + i, True
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        assert llama_cpp.llama_decode(context, batch) == 0
        for i in range(len(some)):
            logits = llama_cpp.llama_get_logits_ith(context, i)[:size]
            norm = max(logits) + math.log(math.fsum(math.exp(x - max(logits)) for x in logits))
            rows.append([x - norm for x in logits])
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return rows


@pytest.mark.parametrize(
    "sampling", [GREEDY, Sampling(temperature=1.5, seed=3, presence_penalty=1, top_k=5)]
)
async def test_as_a_computation_of_our_own_has_them(sampling: Sampling) -> None:
    path = self_test_path()
    async with loaded(path) as model:
        prompt = await model.encode((Message("user", QUESTION),))
        stream = model.submit("local", prompt, 12, replace(sampling, logprobs=5), ())
        scored: list[Scored] = []
        async with stream:
            while pieces := await stream.read():
                for piece in pieces:
                    scored += piece.scored
                    assert b"".join(one.piece for one in piece.scored).decode() == piece.text
    answer = tuple(one.token for one in scored)
    assert stream.ended is not None
    stopped = stream.ended.reason is FinishReason.STOP  # by a token that is no text
    assert len(answer) == stream.ended.usage.completion_tokens - stopped
    rows = await asyncio.to_thread(log_softmax, path, (*prompt, *answer))
    for row, one in zip(rows[len(prompt) - 1 :], scored, strict=False):
        assert one.logprob == pytest.approx(row[one.token], abs=1e-3)
        best = sorted(range(len(row)), key=lambda token: -row[token])[:5]
        assert [token for token, _, _ in one.top] == best
        for token, _, logprob in one.top:
            assert logprob == pytest.approx(row[token], abs=1e-3)


@pytest.mark.parametrize("reproducible", [False, True])
async def test_those_of_a_prompt(reproducible: bool) -> None:
    path = self_test_path()
    async with loaded(path) as model:
        text = "len(obj) returns the number of items in a container. " * 4
        prompt = (await model.encode(text))[:100]
        sampling = replace(GREEDY, prompt_logprobs=3)
        others = [asyncio.create_task(ask(model, QUESTION, who="other")) for _ in range(3)]
        scored: list[Scored] = []
        async with model.submit("p", prompt, 0, sampling, (), reproducible=reproducible) as stream:
            while pieces := await stream.read():
                assert all(piece.prompt and not piece.text for piece in pieces)
                scored += [one for piece in pieces for one in piece.scored]
        await asyncio.gather(*others)
        assert stream.ended is not None
        assert stream.ended.usage.completion_tokens == 0
    assert tuple(one.token for one in scored) == prompt[1:]
    rows = await asyncio.to_thread(log_softmax, path, prompt)
    for row, one in zip(rows, scored, strict=False):
        assert one.logprob == pytest.approx(row[one.token], abs=1e-3)
        best = sorted(range(len(row)), key=lambda token: -row[token])[:3]
        assert [token for token, _, _ in one.top] == best


async def test_as_many_rivals_as_were_asked_for() -> None:
    async with loaded(self_test_path()) as model:
        prompt = await model.encode((Message("user", QUESTION),))
        for count in (0, 1, 20):
            sampling = replace(GREEDY, logprobs=count)
            async with model.submit("local", prompt, 2, sampling, ()) as stream:
                scored = []
                while pieces := await stream.read():
                    scored += [one for piece in pieces for one in piece.scored]
            assert scored
            for one in scored:
                assert len(one.top) == count
                assert list(one.top) == sorted(one.top, key=lambda top: -top[2])
                if count:
                    assert one.top[0] == (one.token, one.piece, one.logprob)  # greedy


async def test_an_end_can_be_put_off() -> None:
    async with loaded(self_test_path()) as model:
        text, ended = await ask(model, QUESTION)
        length = ended.usage.completion_tokens
        assert ended.reason is FinishReason.STOP
        for least in (0, length - 1):
            again, ended = await ask(model, QUESTION, sampling=replace(GREEDY, min_tokens=least))
            assert (again, ended.usage.completion_tokens) == (text, length)
        longer, ended = await ask(model, QUESTION, sampling=replace(GREEDY, min_tokens=length + 5))
        assert longer.startswith(text)
        assert ended.usage.completion_tokens >= length + 5
        never, ended = await ask(model, QUESTION, 40, sampling=replace(GREEDY, ignore_eos=True))
        assert never.startswith(text)
        assert (ended.reason, ended.usage.completion_tokens) == (FinishReason.LENGTH, 40)


async def test_choices_share_the_prompt(random_model: Path) -> None:
    prompt = tuple(i % 250 for i in range(400))
    async with loaded(random_model, kv_tokens=8192) as model:
        streams = [
            model.submit("p", prompt, 8, Sampling(seed=i, temperature=1.0), ()) for i in range(4)
        ]
        texts = ["".join([text async for text in stream]) for stream in streams]
        cached = [s.ended.usage.cached_tokens for s in streams if s.ended]
    assert cached[0] == 0
    assert min(cached[1:]) >= 390
    assert len(set(texts)) > 1


async def test_infill_has_the_models_own_tokens(tmp_path: Path) -> None:
    path = random_gguf.write(tmp_path / "fim.gguf", infill=True)
    async with loaded(path) as model:
        specials = model.facts.vocabulary
        text = model.between("ab", "c")
        tokens = await model.encode(text)
        pre, suf, mid = (specials - 6, specials - 5, specials - 4)
        assert tokens == (pre, 256, suf, ord("c"), mid)
        with pytest.raises(InvalidValue, match="is a text"):
            model.between((1, 2), "c")


async def test_infill_is_refused_where_there_is_none(random_model: Path) -> None:
    async with loaded(random_model) as model:
        with pytest.raises(UnsupportedParameter, match="no fill-in-the-middle") as refused:
            model.between("a", "b")
    assert refused.value.param == "suffix"
