"""Answers that are asked for again of the real engine, in a process and in one of its own.

Cases: twice alike, also by another service, in the other isolation, out of a saved notebook, after a restart
and with nothing said but a seed; with another model file, another template, another seed, another KV cache's type,
each named; renamed, in several files, with an adapter; diverged at a token that is known beforehand, by as much
as the model says; more tokens than there is room for now; what is said of a model's own bytes where nobody has
read them. What made it is what is there: digests, sizes, processor, and defaults of the server.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import random_gguf
from kernel_session import running_server

from shimmy_jupyter.config import Settings
from shimmy_jupyter.local import LocalTransport
from shimmy_jupyter.models import hashes
from shimmy_jupyter.models.sources import Places
from shimmy_jupyter.notebook.board import follow
from shimmy_jupyter.notebook.client import HttpTransport, Server, Transport, events
from shimmy_jupyter.notebook.display import Answer
from shimmy_jupyter.notebook.provenance import Provenance, digest, from_json, of, with_seed
from shimmy_jupyter.notebook.replay import Verdict, replay
from shimmy_jupyter.notebook.saved import answer_of

SHAPE = random_gguf.Shape(heads=2, kv_heads=1, head_width=32)
OTHER_TEMPLATE = random_gguf.CHATML.replace("<|im_start|>", "<|im_start|>the ", 1)
ASK = {"model": "words", "messages": [{"role": "user", "content": "Go on, {n} times"}]}
Serve = Callable[..., LocalTransport]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "models").mkdir()
    random_gguf.write(tmp_path / "models" / "words.gguf", SHAPE, words=True, seed=3)
    return tmp_path / "models"


@pytest.fixture(params=["none", "process"])
def serve(folder: Path, request: pytest.FixtureRequest) -> Iterator[Serve]:
    """A service on the folder's models as they are; the one before is gone then."""
    running: list[LocalTransport] = []

    def start(**chosen: Any) -> LocalTransport:
        for one in running:
            one.close()
        chosen = {"isolation": request.param, "probe": False, "verify_always": True, **chosen}
        running.append(LocalTransport(Settings(places=Places(roots=(folder,)), **chosen)))
        return running[-1]

    yield start
    for one in running:
        one.close()


def asked(transport: Transport, **more: Any) -> tuple[Provenance, str]:
    """What a cell leaves behind, and its text."""
    body = {**ASK, "max_tokens": 40, "stream": True, **more}
    body = with_seed(body | {"stream_options": {"include_usage": True}}, random.Random(1).randrange)
    text, reason, last = "", "", dict[str, Any]()
    with transport.stream("shimmy/v1/chat/completions", body) as chunks:
        for item in events(chunks):
            last = item
            for choice in item["choices"]:
                text += choice["delta"].get("content", "")
                reason = choice["finish_reason"] or reason
    found = of(body, last, text, reason)
    assert found is not None
    assert found.answer_sha256 == digest(text)
    return found, text


SEEDED = {"temperature": 1.3, "top_k": 8, "seed": 11, "reproducible": True}


@pytest.mark.parametrize(
    "how", [SEEDED, {"temperature": 0, "reproducible": True}], ids=["seed", "0"]
)
def test_twice_alike(serve: Serve, how: dict[str, Any]) -> None:
    first = serve()
    before, text = asked(first, **how)
    again, same = asked(first, **how)
    assert same == text
    assert replay(first, before, text).verdict is Verdict.IDENTICAL
    second = serve()
    found = replay(second, again, text)
    assert found.verdict is Verdict.IDENTICAL
    assert (found.changes, found.notes, found.text) == ((), (), text)
    assert found.after.usage.completion_tokens == before.usage.completion_tokens


def test_in_the_other_isolation(serve: Serve, request: pytest.FixtureRequest) -> None:
    before, text = asked(serve(), **SEEDED)
    other = {"none": "process", "process": "none"}[request.node.callspec.params["serve"]]
    assert replay(serve(isolation=other), before, text).verdict is Verdict.IDENTICAL


def test_out_of_a_saved_notebook(serve: Serve, tmp_path: Path) -> None:
    before, text = asked(serve(), **SEEDED)
    output = {
        "output_type": "display_data",
        "data": Answer(text, "words · 40 tokens").bundle(),
        "metadata": {"shimmy": before.to_json()},
    }
    cells = [{"cell_type": "code", "execution_count": 3, "outputs": [output], "source": ""}]
    path = tmp_path / "lesson.ipynb"
    path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4}))
    saved = answer_of(path, "3")
    assert saved.text == text
    assert replay(serve(), saved.provenance, saved.text).verdict is Verdict.IDENTICAL


def test_a_seed_is_drawn_where_none_is_given(serve: Serve) -> None:
    before, text = asked(serve(), temperature=0.8)
    assert before.parameters["seed"] is not None
    assert not before.parameters["reproducible"]
    found = replay(serve(), before, text)
    assert found.changes == ()
    # The shared batch may have summed in another order; then that is said.
    assert found.same or "not asked for reproducibly" in found.notes[0]


def test_reproducible_without_a_seed(serve: Serve) -> None:
    how = {"temperature": 1.3, "reproducible": True}
    before, text = asked(serve(), **how)
    assert before.parameters["seed"] == 0
    assert asked(serve(), **how, seed=0)[1] == text
    assert replay(serve(), before, text).verdict is Verdict.IDENTICAL


def test_another_model_file(serve: Serve, folder: Path) -> None:
    before, text = asked(serve(), **SEEDED)
    random_gguf.write(folder / "words.gguf", SHAPE, words=True, seed=4)
    found = replay(serve(), before, text)
    assert found.verdict is Verdict.DRIFTED
    assert [change.name for change in found.changes] == ["model's bytes"]
    now = hashlib.sha256((folder / "words.gguf").read_bytes()).hexdigest()
    assert found.changes[0].after == f"{now[:12]}…"
    assert not found.same
    assert found.divergence is not None
    assert found.text[: found.divergence.character] == text[: found.divergence.character]


def test_another_file_that_answers_alike(serve: Serve, folder: Path) -> None:
    before, text = asked(serve(), **SEEDED)
    random_gguf.write(folder / "words.gguf", SHAPE, words=True, seed=3, infill=False, pre="default")
    found = replay(serve(), before, text)
    assert [change.name for change in found.changes] == ["model's bytes"]
    assert (found.verdict, found.same) == (Verdict.DRIFTED, True)
    assert found.lines()[1].startswith("nevertheless the text is identical")


def test_another_template(serve: Serve, folder: Path) -> None:
    before, text = asked(serve(), **SEEDED)
    random_gguf.write(folder / "words.gguf", SHAPE, words=True, seed=3, template=OTHER_TEMPLATE)
    found = replay(serve(), before, text)
    assert found.verdict is Verdict.DRIFTED
    assert [change.name for change in found.changes] == ["model's bytes", "chat template"]
    assert before.made_by.chat_template == hashlib.sha256(random_gguf.CHATML.encode()).hexdigest()
    assert found.after.made_by.chat_template == hashlib.sha256(OTHER_TEMPLATE.encode()).hexdigest()
    assert found.after.usage.prompt_tokens > before.usage.prompt_tokens


def test_another_seed(serve: Serve) -> None:
    transport = serve()
    before, text = asked(transport, **SEEDED)
    found = replay(transport, before, text, instead={"seed": 12})
    assert [str(change) for change in found.changes] == ["seed: 11 → 12"]
    assert (found.verdict, found.same) == (Verdict.DRIFTED, False)


def test_settings_of_the_engine(serve: Serve) -> None:
    before, text = asked(serve(threads=2), max_tokens=4, **SEEDED)
    found = replay(serve(threads=1, kv_type="q8_0", context_size=512), before, text)
    assert [str(change) for change in found.changes] == [
        f"context size: {before.made_by.context_size} → 512",
        "KV cache type: f16 → q8_0",
        "threads: 2 → 1",
    ]


def test_under_another_name(serve: Serve, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashes, "SETTLED", -1e9)
    before, text = asked(serve(), **SEEDED)
    (folder / "words.gguf").rename(folder / "renamed.gguf")
    random_gguf.write(folder / "words.gguf", SHAPE, words=True, seed=4)
    # Where nobody has read either, the name counts.
    transport = serve(verify_always=False)
    assert replay(transport, before, text).after.model == "words"
    job = transport.post("shimmy/api/models/renamed/verify", {})["job"]
    follow(transport, job, lambda _: None)
    found = replay(transport, before, text)
    assert found.after.model == "renamed"
    assert found.verdict is Verdict.IDENTICAL
    assert found.notes == ("the model is called renamed here; it was words",)


def test_in_several_files_and_with_an_adapter(serve: Serve, folder: Path) -> None:
    random_gguf.write(folder / "split.gguf", SHAPE, words=True, seed=5, split=6)
    random_gguf.write_adapter(folder / "style.gguf", SHAPE, seed=1)
    files = sorted(folder.glob("split-*.gguf"))
    assert len(files) > 1
    more = {"model": "split", "adapter": "style", **SEEDED}
    before, text = asked(serve(), **more)
    assert before.made_by.sha256 == tuple(
        hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    )
    assert (
        before.made_by.adapter == hashlib.sha256((folder / "style.gguf").read_bytes()).hexdigest()
    )
    assert replay(serve(), before, text).verdict is Verdict.IDENTICAL
    random_gguf.write_adapter(folder / "style.gguf", SHAPE, seed=2)
    found = replay(serve(), before, text)
    assert [change.name for change in found.changes] == ["adapter"]


def test_diverged_at_a_known_token(serve: Serve) -> None:
    transport = serve()
    greedy = {"temperature": 0, "reproducible": True, "max_tokens": 12}
    before, text = asked(transport, **greedy)
    scores = scores_of(transport, greedy)
    at = 7
    first, second = scores[at]["top_logprobs"][:2]
    assert first["token"] == scores[at]["token"]
    lead = "".join(one["token"] for one in scores[:at])
    # As if the other of the two likeliest had been taken then.
    old = lead + second["token"] + "!"
    last = before.to_json() | {"answer_sha256": digest(old)}
    found = replay(transport, from_json(last), old)
    assert (found.verdict, found.changes, found.text) == (Verdict.DIVERGED, (), text)
    where = found.divergence
    assert where is not None
    assert where.token == at
    assert where.chosen is not None
    assert where.other is not None
    assert where.chosen.piece == bytes(first["bytes"])
    assert where.other.piece == bytes(second["bytes"])
    assert where.rank == 2
    assert where.gap == pytest.approx(first["logprob"] - second["logprob"])
    assert where.gap > 0


def scores_of(transport: LocalTransport, how: dict[str, Any]) -> list[dict[str, Any]]:
    body = {**ASK, "stream": True, "logprobs": True, "top_logprobs": 5, **how}
    with transport.stream("shimmy/v1/chat/completions", body) as chunks:
        return [
            one
            for item in events(chunks)
            for choice in item["choices"]
            for one in (choice["logprobs"] or {}).get("content", [])
        ]


def test_less_room_than_there_was(serve: Serve) -> None:
    stops = {"temperature": 0, "reproducible": True, "stop": ["7"], "max_tokens": None}
    before, text = asked(serve(default_max_tokens=300), **stops)
    assert before.parameters["max_tokens"] == 300
    found = replay(serve(context_size=256), before, text)
    assert found.notes[0].startswith("as many tokens as then are not to be had: ")
    assert "context size" in [change.name for change in found.changes]
    assert found.same == (before.finish_reason == "stop")


def test_bytes_that_nobody_had_read(serve: Serve, folder: Path) -> None:
    unread = {"verify_always": False}
    known = hashlib.sha256((folder / "words.gguf").read_bytes()).hexdigest()
    before, text = asked(serve(), **SEEDED)
    assert before.made_by.sha256 == (known,)
    found = replay(serve(**unread), before, text)
    assert found.verdict is Verdict.IDENTICAL
    assert found.after.made_by.sha256 == (known,)  # read for it
    without, same = asked(serve(**unread), **SEEDED)
    assert (without.made_by.sha256, same) == (None, text)
    assert "then" in replay(serve(), without, text).notes[0]


def test_what_made_it_is_what_is_there(serve: Serve, folder: Path) -> None:
    transport = serve(threads=2, default_max_tokens=20)
    found, text = asked(transport, temperature=None, max_tokens=None)
    listed = {m["id"]: m for m in transport.get("shimmy/api/models")["models"]}["words"]
    by = found.made_by
    assert by.sha256 == (hashlib.sha256((folder / "words.gguf").read_bytes()).hexdigest(),)
    assert (by.quantization, by.chat_template) == (listed["quantization"], listed["chat_template"])
    assert by.engine == version("llama-cpp-python")
    assert by.build is not None
    assert len(by.build) == 64
    assert (by.threads, by.gpu_layers, by.kv_type, by.adapter) == (2, 0, "f16", None)
    parameters = dict(found.parameters)
    assert parameters.pop("seed") == random.Random(1).randrange(2**31)
    assert parameters.pop("max_tokens") == found.usage.completion_tokens == 20
    assert parameters == {
        "temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05, "repeat_penalty": 1.0,
        "repeat_last_n": 64, "presence_penalty": 0.0, "frequency_penalty": 0.0, "min_tokens": 0,
        "ignore_eos": False, "reproducible": False,
    }  # fmt: skip
    assert text
    assert len(json.dumps(found.to_json())) < 4000


def test_in_a_kernel_of_its_own_cpu_and_build_are_named(folder: Path) -> None:
    """Another processor or build is another answer, and is said to be."""
    with closing(
        LocalTransport(Settings(places=Places(roots=(folder,)), probe=False))
    ) as transport:
        before, text = asked(transport, **SEEDED)
        elsewhere = replace(before.made_by, cpu="aarch64 Abacus", build="0" * 64, engine="0.3.0")
        found = replay(transport, replace(before, made_by=elsewhere), text)
    assert [change.name for change in found.changes] == [
        "engine version",
        "engine build",
        "processor",
    ]
    assert found.same


def test_over_http(folder: Path) -> None:
    """A server, and after it another."""
    environment = {"SHIMMY_MODEL_PATHS": str(folder)}
    kept: list[tuple[Provenance, str]] = []
    for again in (False, True):
        with contextlib.ExitStack() as stack:
            running = stack.enter_context(running_server(environment=environment))
            transport = HttpTransport(Server(running.url, running.token))
            stack.enter_context(closing(transport._client))
            if again:
                found = replay(transport, *kept[0])
                assert (found.verdict, found.changes) == (Verdict.IDENTICAL, ())
                return
            kept.append(asked(transport, **SEEDED))
            whole = transport.post(
                "shimmy/v1/chat/completions", {**ASK, **SEEDED, "max_tokens": 40}
            )
            choice = whole["choices"][0]
            found_whole = of(
                {**ASK, **SEEDED}, whole, choice["message"]["content"], choice["finish_reason"]
            )
            assert found_whole is not None
            assert found_whole.made_by == kept[0][0].made_by
            assert found_whole.parameters == kept[0][0].parameters
            assert found_whole.answer_sha256 == kept[0][0].answer_sha256
            assert found_whole.receipt is not None
