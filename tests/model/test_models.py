"""From a file on the disk to an answer, on the real engine: found, checked, tried out, fitted, loaded, gone.

Cases: known only after its bytes were read, and not read or tried out again until they change, by another
process of ours either; headers against what the engine says; what must not be loaded, each with its reason,
and the server lives: cut short, a part missing, an adapter, a projector, no GGUF, what ends llama.cpp, with
and without the validator; two of one name; a model in parts as a cache of downloads has it; its bytes are
not those of its name; too large; the one not used for longest leaves, in use or not; an adapter, of
this model or another; vectors; a file that changes while it is in memory.
"""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import minilm_gguf
import mutated_gguf
import pytest
import random_gguf

from shimmy_jupyter.compose import build_service
from shimmy_jupyter.config import Settings
from shimmy_jupyter.errors import (
    InvalidValue,
    ModelDrifted,
    ModelLoadFailed,
    ShimmyError,
    UnsupportedParameter,
)
from shimmy_jupyter.models.jobs import Job
from shimmy_jupyter.models.sources import Places
from shimmy_jupyter.service import CompletionService
from shimmy_jupyter.types import (
    CompletionRequest,
    EmbeddingRequest,
    PinnedModel,
    Principal,
    Sampling,
)

from .test_embedding import tiny_bert

ME = Principal("local")


class Rig:
    """Services on one folder of models, as after a restart."""

    def __init__(self, folder: Path, mode: str) -> None:
        self.models, self.state = folder / "models", folder / "state"
        self.models.mkdir()
        self.settings = Settings(
            places=Places(roots=(self.models,)), state_folder=self.state, isolation=mode
        )
        self.made: list[CompletionService] = []

    def service(self, **changed: Any) -> CompletionService:
        service = build_service(replace(self.settings, **changed))
        self.made.append(service)
        assert service.pool.vetting is not None
        # What was written a moment ago is read each time.
        service.pool.vetting.hashes._clock = lambda: time.time() + 60
        return service

    async def close(self) -> None:
        for service in self.made:
            await service.close()


@pytest.fixture(params=["none", "process"])
def rig(request: Any, tmp_path: Path, jp_asyncio_loop: Any) -> Iterator[Rig]:
    rig = Rig(tmp_path, request.param)
    yield rig
    jp_asyncio_loop.run_until_complete(rig.close())


async def ask(service: CompletionService, model: str, **more: Any) -> str:
    request = CompletionRequest(
        "r", ME, model, tuple(b"once upon a time "), 16, Sampling(temperature=0), **more
    )
    async with await service.start(request) as completion:
        return await completion.text()


async def stages(service: CompletionService, id: str) -> tuple[Job, list[str]]:
    """A load's job, ended, and what it said on the way."""
    said: list[str] = []
    use = service.pool.use

    def listening(id: str, report: Callable[[Any], None], **more: Any) -> Any:
        def both(progress: Any) -> None:
            said.append(progress.message.partition(":")[0])
            report(progress)

        return use(id, both, **more)

    service.pool.use = listening  # type: ignore[method-assign]
    job = await service.library.load(id, ME)
    await job.wait()
    service.pool.use = use  # type: ignore[method-assign]
    return job, list(dict.fromkeys(said))


async def test_read_and_tried_out_once(rig: Rig) -> None:
    path = random_gguf.write(rig.models / "m.gguf", template=random_gguf.CHATML)
    service = rig.service()
    (before,) = [d for d in await service.library.describe() if d.status.file.id == "m"]
    assert (before.digests, before.status.state) == (None, "available")
    job, said = await stages(service, "m")
    assert said == ["waiting", "checking", "hashing", "waiting for memory", "probing", "loading"]
    assert job.state == "done", job.error
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert job.result is not None
    assert (job.result["sha256"], job.result["state"]) == (digest, "loaded")
    # What the header says is what the engine says.
    (model,) = service.pool.loaded()
    facts = before.to_json()
    assert facts["architecture"] == model.facts.architecture
    assert facts["parameters"] == model.facts.parameters
    assert facts["context"] == model.facts.context_size == 2048
    assert before.facts is not None
    assert before.facts.chat_template == model.facts.chat_template
    assert before.facts.vocabulary == model.facts.vocabulary
    answer = await ask(service, "m")
    assert answer

    again = rig.service()
    job, said = await stages(again, "m")
    assert said == ["waiting", "checking", "waiting for memory", "loading"]
    assert await ask(again, "m") == answer


async def test_changed_bytes_are_tried_out_again(rig: Rig) -> None:
    random_gguf.write(rig.models / "m.gguf")
    service = rig.service()
    assert await ask(service, "m")
    await service.pool.unload("m")
    random_gguf.write(rig.models / "m.gguf", seed=5)
    await service.library.discover()
    _, said = await stages(service, "m")
    assert "hashing" in said
    assert "probing" in said


def edited(base: bytes, name: str) -> bytes:
    file, _ = mutated_gguf.parsed(base)
    mutated_gguf.NAMED[name][1](file)
    return file.pack()


def _cut(path: Path) -> None:
    whole = random_gguf.write(path).read_bytes()
    path.write_bytes(whole[: len(whole) - 1000])


def _no_gguf(path: Path) -> None:
    path.write_bytes(b"not a model at all" * 100)


def _adapter(path: Path) -> None:
    random_gguf.write_adapter(path)


def _lacks_a_part(path: Path) -> None:
    first = random_gguf.write(path, split=7)
    first.with_name(first.name.replace("00001-of", "00002-of")).unlink()


def _no_layers(path: Path) -> None:
    base = random_gguf.write(path).read_bytes()
    path.write_bytes(edited(base, "block_count 0"))


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (_cut, "(is outside|beyond|ends|past|cut)"),
        (_no_gguf, "no GGUF"),
        (_adapter, "LoRA adapter: name it as the `adapter`"),
        (_lacks_a_part, "lacks 1 of its 3 parts"),
        (_no_layers, r"block_count 0 is outside 1…512"),
    ],
)
async def test_what_must_not_be_loaded(rig: Rig, make: Callable[[Path], None], why: str) -> None:
    make(rig.models / "bad.gguf")
    service = rig.service()
    with pytest.raises((ModelLoadFailed, UnsupportedParameter), match=why) as caught:
        await ask(service, "bad")
    assert str(rig.models) not in caught.value.message
    (described,) = [d for d in await service.library.describe() if d.status.file.id == "bad"]
    assert described.status.state == ("available" if make is _adapter else "failed")
    assert await ask(service, "self-test")


async def test_what_ends_llama_cpp_ends_the_probe(rig: Rig, monkeypatch: Any) -> None:
    """As if the validator had let it through."""
    good = random_gguf.write(rig.models / "a.gguf")
    from shimmy_jupyter.models import catalog, gguf

    facts = gguf.validate(good)
    good.write_bytes(edited(good.read_bytes(), "block_count 0"))
    monkeypatch.setattr(
        catalog, "validate", lambda path, parts: facts if path == good else gguf.validate(path)
    )
    service = rig.service()
    with pytest.raises(ModelLoadFailed, match=r"^a: the probe: ") as caught:
        await ask(service, "a")
    assert "shimmy probe" not in caught.value.message
    again = rig.service()
    with pytest.raises(ModelLoadFailed, match=r"`shimmy probe a` tries again$"):
        await ask(again, "a")
    assert await ask(again, "self-test")


async def test_a_verdict_is_about_the_bytes_that_were_tried(rig: Rig, monkeypatch: Any) -> None:
    """Another file stands there while the model is tried out, and the old one is put back."""
    path = random_gguf.write(rig.models / "m.gguf")
    aside = rig.models.parent / "aside"
    service = rig.service()
    assert service.pool.vetting is not None
    prober = service.pool.vetting.prober
    assert prober is not None
    usual = prober.probe

    def swapping(*given: Any, **more: Any) -> Any:
        path.rename(aside)
        random_gguf.write(path, seed=3)
        verdict = usual(*given, **more)
        path.unlink()
        aside.rename(path)
        return verdict

    monkeypatch.setattr(
        type(prober), "probe", lambda _self, *given, **more: swapping(*given, **more)
    )
    with pytest.raises(ModelLoadFailed, match="changed meanwhile"):
        await ask(service, "m")
    digests = service.pool.vetting.digests(
        (await service.pool.catalog.models())["m"], lambda _: None, lambda: False
    )
    assert prober.known(digests[0]) is None


async def test_read_at_every_load_where_that_is_wanted(rig: Rig) -> None:
    """Whether or not anything else wants to know."""
    random_gguf.write(rig.models / "m.gguf")
    service = rig.service(probe=False, verify_always=True)
    for _ in range(2):
        _, said = await stages(service, "m")
        assert "hashing" in said
        await service.pool.unload("m")


async def test_two_of_one_name(rig: Rig) -> None:
    for seed, folder in enumerate(("x", "y")):
        (rig.models / folder).mkdir()
        random_gguf.write(rig.models / folder / "m.gguf", seed=seed)
    service = rig.service()
    first, second, _ = [d.status.file for d in await service.library.describe()]
    assert first.id == "m"
    assert second.id.startswith("m@")
    assert await ask(service, first.id) != await ask(service, second.id)
    ids = [status.file.id for status in await service.models(ME) if status.state == "loaded"]
    assert ids == [first.id, second.id]


async def test_in_parts_as_a_cache_of_downloads_has_it(rig: Rig, tmp_path: Path) -> None:
    whole = random_gguf.write(rig.models / "whole.gguf")
    parts = random_gguf.write(tmp_path / "split.gguf", split=7)
    cache = tmp_path / "hub"
    snapshot = cache / "models--org--name" / "snapshots" / ("c" * 40)
    blobs = cache / "models--org--name" / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    for part in sorted(parts.parent.glob("split-*")):
        blob = blobs / hashlib.sha256(part.read_bytes()).hexdigest()
        shutil.move(part, blob)
        (snapshot / part.name).symlink_to(Path("../../blobs") / blob.name)
    service = rig.service(places=Places(roots=(rig.models,), huggingface=cache))
    assert whole.exists()
    assert await ask(service, "split") == await ask(service, "whole")
    (described,) = [d for d in await service.library.describe() if d.status.file.id == "split"]
    assert described.status.file.origin is not None
    assert described.status.file.origin.name == "org/name"

    # One byte of one part is another now, as after a bad disk.
    for blob in described.status.file.parts[-1], described.status.file.path:
        await service.pool.unload("split")
        before = blob.read_bytes()
        blob.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        await service.library.discover()
        with pytest.raises(ModelLoadFailed, match="not those that it was downloaded as"):
            await ask(service, "split")
        blob.write_bytes(before)


async def test_too_large(rig: Rig) -> None:
    random_gguf.write(rig.models / "m.gguf")
    service = rig.service(memory_reserve=1 << 50)
    with pytest.raises(ModelLoadFailed, match=r"^m: it needs .* MB, 0 .* available"):
        await ask(service, "m")
    (described,) = [d for d in await service.library.describe() if d.status.file.id == "m"]
    assert described.fit is not None
    assert not described.fit["ok"]
    assert await ask(rig.service(memory_reserve=1 << 50, memory_check=False), "m")


async def test_the_one_not_used_for_longest_leaves(rig: Rig) -> None:
    for seed, name in enumerate("abc"):
        random_gguf.write(rig.models / f"{name}.gguf", seed=seed)
    service = rig.service(kv_tokens=2048)
    answers = {name: await ask(service, name) for name in "ab"}
    held = sum(model.memory_bytes for model in service.pool.loaded())
    # A model is reckoned at its least, with what it computes in, before it is loaded.
    needed = (await service.library.describe_one("c")).fit
    assert needed is not None
    small = rig.service(kv_tokens=2048, memory_budget=held + needed["needed"] - 1)
    for name in "abac":
        answers[name] = await ask(small, name)
    states = {status.file.id: status.state for status in await small.models(ME)}
    assert states == {"a": "loaded", "b": "available", "c": "loaded", "self-test": "available"}
    # Everything at once: nobody is lost, and each is answered by the model that was asked for.
    found = await asyncio.gather(*(ask(small, name) for name in "abcabcabc"))
    assert found == [answers[name] for name in "abcabcabc"]


async def test_adapters(rig: Rig) -> None:
    random_gguf.write(rig.models / "m.gguf")
    random_gguf.write_adapter(rig.models / "fine.gguf")
    other = random_gguf.Shape(width=96)
    random_gguf.write_adapter(rig.models / "other.gguf", other)
    service = rig.service()
    plain = await ask(service, "m")
    assert await ask(service, "m", adapter="fine") != plain
    with pytest.raises(ModelLoadFailed) as caught:
        await ask(service, "m", adapter="other")
    assert caught.value.param == "adapter"
    assert "the probe: " in caught.value.message
    with pytest.raises(ModelLoadFailed, match="no LoRA adapter"):
        await ask(service, "m", adapter="self-test")
    with pytest.raises(UnsupportedParameter, match="fine: it is a LoRA adapter"):
        await ask(service, "fine")
    assert service.pool.status_of((await service.pool.catalog.models())["fine"]).error is None
    assert await ask(service, "m") == plain
    kinds = {d.status.file.id: d.to_json()["kind"] for d in await service.library.describe()}
    assert kinds == {"m": "model", "fine": "lora", "other": "lora", "self-test": "model"}
    assert [status.file.id for status in await service.models(ME)] == ["m", "self-test"]


async def test_vectors(rig: Rig, tmp_path: Path) -> None:
    minilm_gguf.convert(tiny_bert(tmp_path, head=False), rig.models / "bert.gguf")
    service = rig.service()
    request = EmbeddingRequest("r", ME, "bert", (("hello",), ("world",)), ("input.0", "input.1"))
    assert len((await service.embed(request)).vectors) == 2
    assert await service.library.default(wait=True) == "self-test"
    with pytest.raises(UnsupportedParameter, match="embeddings only"):
        await ask(service, "bert")


async def test_where_none_is_named(rig: Rig) -> None:
    random_gguf.write(rig.models / "a-plain.gguf", template=None)
    random_gguf.write_adapter(rig.models / "b-adapter.gguf")
    random_gguf.write(rig.models / "c-chat.gguf", template=random_gguf.CHATML)
    service = rig.service()
    assert await service.library.default(wait=True) == "c-chat"
    assert await service.library.default(lambda id: id != "c-chat", wait=True) == "self-test"
    assert await rig.service(memory_reserve=1 << 50).library.default(wait=True) == "self-test"


async def test_what_is_worth_downloading(rig: Rig) -> None:
    service = rig.service(memory_reserve=0)
    found = await service.library.suggestions("chat")
    assert found["suggestions"]
    assert found["first"] in {one["id"] for one in found["suggestions"]}
    assert all(one["memory_bytes"] <= found["memory_bytes"] for one in found["suggestions"])
    assert not any(one["here"] for one in found["suggestions"])
    assert (await rig.service(memory_reserve=1 << 60).library.suggestions())["suggestions"] == []
    with pytest.raises(InvalidValue, match="there is no task 'poetry'"):
        await service.library.suggestions("poetry")


@pytest.mark.parametrize("probe", [True, False])
async def test_probe_again_and_verify(rig: Rig, probe: bool) -> None:
    random_gguf.write(rig.models / "m.gguf")
    service = rig.service(probe=probe)
    job = await service.library.verify("m", ME)
    await job.wait()
    assert job.result is not None
    digest = hashlib.sha256((rig.models / "m.gguf").read_bytes()).hexdigest()
    assert job.result["sha256"] == [digest]
    job = await service.library.probe("m", ME)
    await job.wait()
    if probe:
        assert job.result is not None, job.error
        assert job.result["outcome"] == "ok"
        assert job.result["context_size"] == 2048
    else:
        assert isinstance(job.error, ShimmyError)
        assert "ShimmyModels.probe is off" in job.error.message
    assert await ask(service, "m")


class TestPinned:
    """A request that says which bytes are to answer."""

    async def pin(self, service: CompletionService, id: str, **changed: Any) -> PinnedModel:
        job = await service.library.verify(id, ME)
        await job.wait()
        assert job.result is not None, job.error
        found = (await service.library.describe_one(id)).to_json()
        pin = PinnedModel(
            found["size_bytes"],
            job.result["sha256"][0],
            tuple(job.result["sha256"][1:]),
            found["chat_template"],
            512,
        )
        return replace(pin, **changed)

    async def test_what_is_pinned_answers(self, rig: Rig) -> None:
        random_gguf.write(rig.models / "m.gguf")
        random_gguf.write(rig.models / "s.gguf", split=7)
        random_gguf.write_adapter(rig.models / "fine.gguf")
        service = rig.service()
        assert await ask(service, "m", pin=await self.pin(service, "m")) == await ask(service, "m")
        assert await ask(service, "s", pin=await self.pin(service, "s"))
        adapter = hashlib.sha256((rig.models / "fine.gguf").read_bytes()).hexdigest()
        pin = await self.pin(service, "m", adapter=adapter)
        assert await ask(service, "m", adapter="fine", pin=pin)
        with pytest.raises(ModelDrifted, match=r"adapters\.adapter: the adapter .* other bytes"):
            await ask(service, "m", adapter="fine", pin=replace(pin, adapter="0" * 64))

    @pytest.mark.parametrize(
        ("changed", "why"),
        [
            ({"sha256": "0" * 64}, "sha256: the file holds other bytes: 0000.* is pinned"),
            ({"size": 7}, "size: the model has another number of bytes: 7 is pinned"),
            ({"parts": ("1" * 64,)}, r"parts\[0\]: a further file"),
            ({"chat_template": "2" * 64}, "another chat template"),
            ({"context_size": 100_000}, "cannot have so long a context here"),
        ],
    )
    async def test_what_is_not_is_refused_before_it_is_loaded(
        self, rig: Rig, changed: dict[str, Any], why: str
    ) -> None:
        random_gguf.write(rig.models / "m.gguf")
        service = rig.service()
        pin = await self.pin(service, "m", **changed)
        with pytest.raises(ModelDrifted, match=rf"^m is not what is pinned: .*{why}") as caught:
            await ask(service, "m", pin=pin)
        assert (caught.value.status, caught.value.param) == (409, "pin")
        assert service.pool.loaded() == []

    async def test_every_difference_at_once(self, rig: Rig) -> None:
        random_gguf.write(rig.models / "m.gguf")
        service = rig.service()
        pin = await self.pin(service, "m", sha256="0" * 64, size=7, context_size=100_000)
        with pytest.raises(ModelDrifted) as caught:
            await ask(service, "m", pin=pin)
        assert caught.value.message.count(" is pinned, ") == 3

    async def test_a_file_that_was_replaced_while_it_is_in_memory(self, rig: Rig) -> None:
        path = random_gguf.write(rig.models / "m.gguf")
        service = rig.service()
        before = await self.pin(service, "m")
        assert await ask(service, "m", pin=before)
        path.unlink()  # as downloads do it: what is in memory stays what it was
        random_gguf.write(path, seed=9)
        await service.library.discover()
        with pytest.raises(ModelDrifted, match="sha256: the file holds other bytes"):
            await ask(service, "m", pin=before)
        after = await self.pin(service, "m")
        with pytest.raises(
            ModelDrifted, match="m in memory is not what is pinned, and another than the file"
        ):
            await ask(service, "m", pin=after)
        await service.pool.unload("m")
        assert await ask(service, "m", pin=after)

    async def test_without_knowing_its_digest_beforehand(self, rig: Rig) -> None:
        """Nobody wanted it when the model was loaded."""
        path = random_gguf.write(rig.models / "m.gguf")
        service = rig.service(probe=False)
        assert await ask(service, "m")
        before = await self.pin(service, "m")
        assert await ask(service, "m", pin=before)
        path.unlink()
        random_gguf.write(path, seed=9)
        other = rig.service(probe=False)
        await service.library.discover()
        with pytest.raises(ModelDrifted):
            await ask(service, "m", pin=await self.pin(service, "m"))
        assert await ask(other, "m", pin=await self.pin(other, "m"))

    async def test_an_adapter_that_is_not_pinned(self, rig: Rig) -> None:
        """As of Ollama's models, which can have one of their own."""
        random_gguf.write(rig.models / "m.gguf")
        own = random_gguf.write_adapter(rig.models / "own.gguf")
        service = rig.service()
        models = await service.pool.catalog.models()
        plain, pin = await ask(service, "m"), await self.pin(service, "m")
        models["m"] = replace(models["m"], adapters=(own,))
        assert await ask(service, "m") != plain
        with pytest.raises(ModelDrifted, match="adapter: it has an adapter: none is pinned"):
            await ask(service, "m", pin=pin)
        digest = hashlib.sha256(own.read_bytes()).hexdigest()
        assert await ask(service, "m", pin=replace(pin, adapter=digest)) != plain

    async def test_an_adapter_that_was_replaced(self, rig: Rig) -> None:
        random_gguf.write(rig.models / "m.gguf")
        path = random_gguf.write_adapter(rig.models / "fine.gguf")
        service = rig.service()
        assert await ask(service, "m", adapter="fine")
        path.unlink()
        random_gguf.write_adapter(path, seed=5)
        await service.library.discover()
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        pin = await self.pin(service, "m", adapter=digest)
        with pytest.raises(ModelLoadFailed, match="fine has changed since it was loaded: unload m"):
            await ask(service, "m", adapter="fine", pin=pin)
        await service.pool.unload("m")
        assert await ask(service, "m", adapter="fine", pin=pin)
