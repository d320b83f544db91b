"""The real engine: what it answers, how it samples, what it counts, and what it refuses to load.

Cases: the bundled model's answers; sixteen at once, in shared batches, against each alone; a prompt
over several batches; every sampling parameter, falsy ones too; end tokens that are not EOS; stop
strings; UTF-8; BOS; token prompts; damaged, foreign and NaN files; context limits; a shut-down
with work in flight.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import random_gguf

from shimmy_jupyter.engine.backend import LoadSpec
from shimmy_jupyter.engine.llama import facts
from shimmy_jupyter.engine.model import LoadedModel
from shimmy_jupyter.errors import InvalidValue, ModelLoadFailed, ShuttingDown
from shimmy_jupyter.types import FinishReason, Message, Sampling

from ..offered import on_disk
from . import conftest
from .conftest import GREEDY, ask, loaded, self_test_path

pytestmark = pytest.mark.usefixtures("isolation")
RANDOM = Sampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=7)


async def test_the_bundled_model_knows_its_lines() -> None:
    async with loaded(self_test_path()) as model:
        text, ended = await ask(model, "What does len do?")
        assert text == "Return the number of items in a container."
        assert ended.reason is FinishReason.STOP
        assert ended.usage.completion_tokens == len(model.engine.backend.tokenize(text)) + 1
        text, _ = await ask(model, "What is the capital of France?")
        assert text == "I only know what Python's standard library says about itself."


async def test_the_card_beside_the_bundled_model_is_true() -> None:
    import hashlib

    path = self_test_path()
    card = json.loads(path.with_suffix(".json").read_text())
    data = path.read_bytes()
    assert card["sha256"] == hashlib.sha256(data).hexdigest()
    assert card["size_bytes"] == len(data) <= 8 << 20
    assert {"data", "licence", "recipe", "training_minutes", "script"} <= set(card)
    async with loaded(path) as model:
        assert 2_500_000 < model.facts.parameters < 3_500_000
        assert "Q8_0" in model.facts.description


NAMES = (
    "len json.dumps os.path.join str.split collections.Counter abs sorted dict.get os.getcwd "
    "str.upper math.sqrt pathlib.Path random.choice shutil.copy textwrap.wrap time.sleep"
).split()


async def test_sixteen_at_once_answer_as_each_alone() -> None:
    async with loaded(self_test_path()) as model:
        alone = [await ask(model, f"What does {name} do?") for name in NAMES]
        assert model.engine.statistics.rows.keys() == {1}
        together = await asyncio.gather(*(ask(model, f"What does {name} do?") for name in NAMES))
        assert [text for text, _ in together] == [text for text, _ in alone]
        assert [e.usage for _, e in together] == [e.usage for _, e in alone]
        assert max(model.engine.statistics.rows) > 1


async def test_random_weights_agree_too(tmp_path: Path) -> None:
    """A random model has no memorised answer to fall back on: its best tokens are nearly level."""
    random = Random(1)
    prompts = [tuple(random.choices(range(300), k=random.randrange(3, 120))) for _ in range(48)]
    shape = random_gguf.Shape(layers=4, width=256, heads=8, head_width=32, hidden=1024)
    path = random_gguf.write(tmp_path / "random.gguf", shape, quantized=True)
    async with loaded(path) as model:
        alone = [await ask(model, prompt, 48) for prompt in prompts]
        for at in range(0, 48, 16):
            together = await asyncio.gather(*(ask(model, p, 48) for p in prompts[at : at + 16]))
            assert [text for text, _ in together] == [text for text, _ in alone[at : at + 16]]
        assert max(model.engine.statistics.rows) > 8


async def test_a_prompt_over_several_batches(random_model: Path) -> None:
    prompt = tuple(32 + i % 90 for i in range(1000))
    async with loaded(random_model, batch_tokens=512) as model:
        _, ended = await ask(model, prompt, 8)
        assert ended.usage.prompt_tokens == 1000
        assert model.engine.statistics.steps == 2 + 7


class TestSampling:
    async def test_seed_decides(self, random_model: Path) -> None:
        async with loaded(random_model) as model:
            first, _ = await ask(model, "x", 32, RANDOM)
            again, _ = await ask(model, "x", 32, RANDOM)
            other, _ = await ask(model, "x", 32, replace(RANDOM, seed=8))
            zero, _ = await ask(model, "x", 32, replace(RANDOM, seed=0))
            zero_again, _ = await ask(model, "x", 32, replace(RANDOM, seed=0))
            assert first == again
            assert zero == zero_again
            assert len({first, other, zero}) == 3
            free = {(await ask(model, "x", 32, replace(RANDOM, seed=None)))[0] for _ in range(3)}
            assert len(free) > 1

    async def test_narrowed_to_one_token_is_greedy(self, random_model: Path) -> None:
        async with loaded(random_model) as model:
            greedy, _ = await ask(model, "x", 16)
            for narrow in ({"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}):
                assert (await ask(model, "x", 16, replace(RANDOM, **narrow)))[0] == greedy
            assert (await ask(model, "x", 16, RANDOM))[0] != greedy

    async def test_bias_forces_and_forbids(self, random_model: Path) -> None:
        async with loaded(random_model) as model:
            forced, _ = await ask(model, "x", 5, replace(GREEDY, logit_bias=((65, 100.0),)))
            assert forced == "AAAAA"
            either = replace(GREEDY, logit_bias=((65, 100.0), (66, 90.0)))
            assert (await ask(model, "x", 1, either))[0] == "A"
            banned = replace(GREEDY, logit_bias=((65, -100.0), (66, 90.0)))
            assert (await ask(model, "x", 1, banned))[0] == "B"
            with pytest.raises(InvalidValue) as caught:
                model.check_bias(((320, 1.0),))
            assert caught.value.param == "logit_bias"

    async def test_penalties_change_a_repeating_answer(self, random_model: Path) -> None:
        loud = replace(GREEDY, logit_bias=((65, 30.0),))
        async with loaded(random_model) as model:
            assert (await ask(model, "x", 8, loud))[0] == "A" * 8
            for penalty in ("repeat_penalty", "presence_penalty", "frequency_penalty"):
                strong = replace(loud, **{penalty: 50.0})
                assert (await ask(model, "x", 8, strong))[0] != "A" * 8, penalty
                assert (await ask(model, "x", 8, replace(strong, repeat_last_n=0)))[0] == "A" * 8


async def test_every_end_token_ends(random_model: Path) -> None:
    eos, eot = 317, 319
    async with loaded(random_model) as model:
        for end in (eos, eot):
            text, ended = await ask(model, "x", 9, replace(GREEDY, logit_bias=((end, 100.0),)))
            assert (text, ended.reason) == ("", FinishReason.STOP)
            assert ended.usage.completion_tokens == 1


async def test_stop_strings_across_tokens() -> None:
    async with loaded(self_test_path()) as model:
        text, ended = await ask(model, "What does len do?", stop=("s in a con", "zzz"))
        assert text == "Return the number of item"
        assert ended.reason is FinishReason.STOP


async def test_bytes_that_are_no_text_come_out_as_text(random_model: Path) -> None:
    async with loaded(random_model) as model:
        for seed in range(8):
            text, _ = await ask(model, "x", 64, replace(RANDOM, seed=seed))
            text.encode()


async def test_characters_of_several_tokens_stay_whole(random_model: Path) -> None:
    async with loaded(random_model) as model:
        tokens = model.engine.backend.tokenize("🎉")
        assert len(tokens) == 4
        assert bytes(tokens) == "🎉".encode()  # this vocabulary's first 256 tokens are the bytes


class TestPrompts:
    async def test_a_chat_counts_exactly(self) -> None:
        async with loaded(self_test_path()) as model:
            tokens = await model.encode((Message("user", "hi"),))
            rendered = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
            assert tokens == model.engine.backend.tokenize(rendered)
            special = [t for t in tokens if t < 3]
            assert special == [1, 2, 1]

    async def test_bos_is_there_once_if_the_model_wants_it(self, tmp_path: Path) -> None:
        wants = random_gguf.write(tmp_path / "bos.gguf", add_bos=True)
        async with loaded(wants) as model:
            tokenize = model.engine.backend.tokenize
            assert tokenize("ab") == (317, 256)
            assert tokenize("<|endoftext|>ab") == (317, 256)
            assert tokenize("") == (317,)

    async def test_a_model_without_a_template_says_so(self, tmp_path: Path) -> None:
        bare = random_gguf.write(tmp_path / "bare.gguf", template=None)
        async with loaded(bare) as model:
            with pytest.raises(InvalidValue, match="no chat template"):
                await model.encode((Message("user", "hi"),))
            assert await model.encode("hi")

    async def test_a_hostile_template_is_refused_and_the_model_lives(self, tmp_path: Path) -> None:
        hostile = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
        path = random_gguf.write(tmp_path / "hostile.gguf", template=hostile)
        async with loaded(path) as model:
            with pytest.raises(InvalidValue, match="chat template"):
                await model.encode((Message("user", "hi"),))
            assert (await ask(model, (65,), 3))[1].usage.completion_tokens == 3


@pytest.mark.parametrize(
    ("values", "causal"),
    [
        ({"general.architecture": "llama"}, True),
        ({"general.architecture": "llama", "llama.attention.causal": "false"}, False),
        ({"general.architecture": "gemma-embedding"}, False),  # whose files do not say so
    ],
)
def test_which_models_see_both_ways(monkeypatch: Any, values: dict[str, str], causal: bool) -> None:
    monkeypatch.setattr(facts, "metadata", lambda _: values)
    assert facts.is_causal(None) is causal


class TestLoading:
    async def refused(self, path: Path, **spec: Any) -> str:
        with pytest.raises(ModelLoadFailed) as caught:
            await LoadedModel.load(conftest.making, LoadSpec(path=str(path), **spec))
        assert str(path.parent) not in caught.value.message
        return caught.value.message

    async def test_damaged_files(self, tmp_path: Path, random_model: Path) -> None:
        whole = random_model.read_bytes()
        for name, data in {
            "empty": b"",
            "text": b"not a model at all" * 100,
            "cut": whole[: len(whole) // 2],
            "head": whole[:100],
        }.items():
            path = tmp_path / f"{name}.gguf"
            path.write_bytes(data)
            assert "refused the file" in await self.refused(path)
        assert await self.refused(tmp_path / "missing.gguf")

    async def test_weights_that_are_not_numbers(self, tmp_path: Path) -> None:
        path = random_gguf.write(tmp_path / "nan.gguf", nan=True)
        assert "not finite" in await self.refused(path)

    @pytest.mark.parametrize(
        ("kv_type", "bytes_each"), [("f16", 2), ("q8_0", 34 / 32), ("q4_0", 18 / 32)]
    )
    async def test_types_of_the_cache(
        self, tmp_path: Path, kv_type: str, bytes_each: float
    ) -> None:
        shape = random_gguf.Shape(head_width=32)
        path = random_gguf.write(tmp_path / "wide.gguf", shape)
        prompt = tuple(b"once upon a time ")
        async with loaded(path, kv_type=kv_type, kv_tokens=4096) as model:
            assert model.facts.kv_bytes_per_token == 2 * 2 * 2 * 32 * bytes_each
            text, ended = await ask(model, prompt, 30)
            again, cached = await ask(model, prompt * 4, 30, who="other")
        assert ended.usage.completion_tokens > 1
        assert (text, again, cached) != ("", "", None)

    async def test_a_cache_that_the_heads_do_not_fit(self, random_model: Path) -> None:
        assert "kv_type" in await self.refused(random_model, kv_type="q8_0")

    async def test_a_model_that_is_split(self, tmp_path: Path) -> None:
        whole = random_gguf.write(tmp_path / "whole.gguf")
        parts = random_gguf.write(tmp_path / "split.gguf", split=7)
        assert parts.name == "split-00001-of-00003.gguf"
        async with loaded(whole) as one, loaded(parts) as other:
            prompt = tuple(b"once upon a time ")
            assert await self.text(one, prompt) == await self.text(other, prompt)
        sizes = {file.id: file.size_bytes for file in on_disk(tmp_path) if not file.bundled}
        assert set(sizes) == {"whole", "split"}
        assert sizes["split"] >= sizes["whole"]
        parts.with_name("split-00003-of-00003.gguf").unlink()
        assert "refused the file" in await self.refused(parts)

    async def text(self, model: LoadedModel, prompt: tuple[int, ...]) -> str:
        return (await ask(model, prompt, 20))[0]

    async def test_more_context_than_the_model_knows(self, random_model: Path) -> None:
        assert "knows only 2048" in await self.refused(random_model, context_size=4096)

    async def test_more_cache_than_memory(self, random_model: Path) -> None:
        assert "GB are free" in await self.refused(random_model, kv_tokens=10**12)

    async def test_sizes(self, random_model: Path) -> None:
        async with loaded(random_model, context_size=300, kv_tokens=1000) as model:
            assert (model.facts.context_size, model.facts.kv_tokens) == (300, 1024)
        async with loaded(random_model) as model:
            assert (model.facts.context_size, model.facts.kv_tokens) == (
                2048,
                40 * 2048,
            )  # a quarter more slots than sequences


async def test_stopping_with_work_in_flight(random_model: Path) -> None:
    model = await LoadedModel.load(conftest.making, LoadSpec(path=str(random_model), sequences=2))
    tokens = await model.encode("x")
    streams = [model.submit("local", tokens, 1500, RANDOM, ()) for _ in range(6)]
    assert await streams[0].read()
    await model.close()
    for stream in streams:
        with pytest.raises(ShuttingDown):
            while await stream.read():
                pass
    with pytest.raises(ShuttingDown):
        model.submit("local", tokens, 1, RANDOM, ())
    assert not model.engine._thread.is_alive()
    await model.close()
