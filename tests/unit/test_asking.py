"""What is asked, as the HTTP API has it, over a transport that is scripted here.

Cases: every keyword arrives as it is given, falsy ones too, None not at all; every field of the API is
a keyword; one that is not known is a TypeError; seeds; texts, chats, token ids, system messages, and
what is none of these; the model that is meant, also while it is being decided; what a lock says; an
answer read, with reasoning, log-probabilities, without a receipt; a stream, with comments and
reasoning; its result too early; an error amid it; left early; vectors: order, bytes, numpy or not,
none, batches by number and by size, the text that is wrong named as the caller knows it, which model;
tokens; models.
"""

from __future__ import annotations

import base64
import contextlib
import inspect
import json
import struct
import sys
from collections.abc import AsyncIterable, AsyncIterator
from dataclasses import FrozenInstanceError, dataclass, field
from typing import Any, get_type_hints

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shimmy_jupyter.errors import ContextLengthExceeded, InvalidValue, QueueFull
from shimmy_jupyter.notebook import asking
from shimmy_jupyter.notebook.asking import (
    Asker,
    ChatParameters,
    CompletionParameters,
    Templating,
)
from shimmy_jupyter.notebook.result import Completion, Receipt, from_body
from shimmy_jupyter.server import requests
from shimmy_jupyter.types import Timings, Usage

FIGURES = {
    "request_id": "r1", "receipt": {"request_id": "r1", "seq": 4, "leaf_hash": "ab"},
    "queue_ms": 1.0, "ttft_ms": 2.0, "tokens_per_second": 30.0, "cached_tokens": 0,
}  # fmt: skip
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
USED, TIMES, RECEIPT = Usage(3, 2), Timings(1.0, 2.0, 30.0), Receipt("r1", 4, "ab")


def answer(text: str = "hi", reason: str = "stop", **message: Any) -> dict[str, Any]:
    whole = {"role": "assistant", "content": text, "refusal": None, **message}
    choice = {"index": 0, "message": whole, "logprobs": None, "finish_reason": reason}
    return {"id": "x", "model": "m", "choices": [choice], "usage": USAGE, "shimmy": FIGURES}


LISTED = {"default": "first", "models": []}


@dataclass
class Scripted:
    """A transport that keeps what it is asked, and answers from a list; then with the same again."""

    answers: list[Any] = field(default_factory=lambda: [answer()])
    events: list[Any] = field(default_factory=list)
    listed: list[dict[str, Any]] = field(default_factory=lambda: [LISTED])
    asked: list[tuple[str, str, Any]] = field(default_factory=list)
    left: int = 0

    async def request(
        self, method: str, path: str, body: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        if (method, path) == ("GET", "shimmy/api/models"):
            return self.listed.pop(0) if len(self.listed) > 1 else self.listed[0]
        self.asked.append((method, path, json.loads(json.dumps(body))))
        said = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(said, Exception):
            raise said
        return said(body) if callable(said) else said  # type: ignore[no-any-return]

    @contextlib.asynccontextmanager
    async def stream(self, path: str, body: dict[str, Any]) -> AsyncIterator[AsyncIterable[bytes]]:
        self.asked.append(("STREAM", path, json.loads(json.dumps(body))))

        async def chunks() -> AsyncIterator[bytes]:
            for one in self.events:
                yield one if isinstance(one, bytes) else f"data: {json.dumps(one)}\n\n".encode()

        try:
            yield chunks()
        finally:
            self.left += 1

    @property
    def body(self) -> Any:
        return self.asked[-1][2]


def asker(**script: Any) -> tuple[Asker, Scripted]:
    transport = Scripted(**script)
    return Asker(lambda: transport), transport


COMMON: dict[str, Any] = {
    "model": "m", "max_tokens": 0, "temperature": 0, "top_p": 0.0, "top_k": 0, "min_p": 0.0,
    "repeat_penalty": 1.0, "repeat_last_n": 0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
    "min_tokens": 0, "ignore_eos": False, "seed": 0, "reproducible": False, "adapter": "lora",
    "pin": {"size": 0, "sha256": "0" * 64}, "max_seconds": 0.5, "stop": ["a", "b"],
    "logit_bias": {"5": 0.0}, "grammar": {"type": "regex", "value": "a"},
    "response_format": {"type": "text"},
}  # fmt: skip
CHAT: dict[str, Any] = {
    **COMMON, "logprobs": False, "top_logprobs": 0, "thinking": False, "reasoning_effort": "none",
    "chat_template_kwargs": {},
}  # fmt: skip
COMPLETION: dict[str, Any] = {**COMMON, "logprobs": 0, "suffix": "", "echo": False}


class TestParameters:
    async def test_each_arrives_as_it_is_given(self) -> None:
        ask, sent = asker()
        await ask.chat("q", **CHAT)
        assert sent.body == {**CHAT, "messages": [{"role": "user", "content": "q"}]}
        assert sent.asked[-1][:2] == ("POST", "shimmy/v1/chat/completions")
        sent.answers = [{**answer(), "choices": [{**answer()["choices"][0], "text": "t"}]}]
        del sent.answers[0]["choices"][0]["message"]
        assert (await ask.complete("q", **COMPLETION)).text == "t"
        assert sent.body == {**COMPLETION, "prompt": "q"}
        assert sent.asked[-1][:2] == ("POST", "shimmy/v1/completions")

    @pytest.mark.parametrize("name", [name for name in CHAT if name != "model"])
    async def test_none_is_not_given(self, name: str) -> None:
        ask, sent = asker()
        await ask.chat("q", **{**CHAT, name: None})
        there = name == "reproducible"  # as there is a seed
        assert (name in sent.body) is there

    def test_every_field_of_the_api_is_one(self) -> None:
        ours = {"stream", "stream_options", "n", "messages", "prompt", "max_completion_tokens"}
        chat = set(requests._Chat.model_fields) - ours
        assert set(get_type_hints(ChatParameters)) == chat | {"system"}
        assert set(CHAT) == chat
        assert set(get_type_hints(CompletionParameters)) == (
            set(requests._Completion.model_fields) - ours
        )
        assert set(get_type_hints(Templating)) == set(requests.Templated.model_fields)

    @pytest.mark.parametrize("name", ["chat", "complete", "stream", "tokenize"])
    def test_an_unknown_one_is_a_type_error_at_once(self, name: str) -> None:
        ask, sent = asker()
        with pytest.raises(TypeError, match=rf"{name}\(\).*'temprature'"):
            getattr(ask, name)("q", temprature=1)
        assert sent.asked == []

    def test_one_that_is_nearly_right(self) -> None:
        with pytest.raises(TypeError, match="did you mean temperature"):
            asker()[0].chat("q", temprature=1)  # type: ignore[call-arg]

    def test_they_are_in_the_signature(self) -> None:
        named = inspect.signature(Asker.chat).parameters
        assert {"self", "prompt", *get_type_hints(ChatParameters)} == set(named)
        assert named["temperature"].kind is inspect.Parameter.KEYWORD_ONLY
        assert named["temperature"].default is None

    @pytest.mark.parametrize(
        ("given", "reproducible"),
        [({}, None), ({"seed": 0}, True), ({"seed": 3, "reproducible": False}, False),
         ({"reproducible": True}, True), ({"seed": None}, None)],
    )  # fmt: skip
    async def test_a_seed_wants_the_same_again(self, given: Any, reproducible: Any) -> None:
        ask, sent = asker()
        await ask.chat("q", **given)
        assert sent.body.get("reproducible") is reproducible

    async def test_bias_by_numbers(self) -> None:
        ask, sent = asker()
        await ask.chat("q", logit_bias={7: -100, 8: 0})
        assert sent.body["logit_bias"] == {"7": -100, "8": 0}

    async def test_numbers_and_arrays_of_numpy(self) -> None:
        ask, sent = asker()
        await ask.chat(
            "q", seed=np.int64(3), temperature=np.float32(0.5), stop=np.array(["a"]),
            ignore_eos=np.True_,
        )  # fmt: skip
        wanted = {"seed": 3, "temperature": 0.5, "stop": ["a"], "ignore_eos": True}
        assert {name: sent.body[name] for name in wanted} == wanted
        assert type(sent.body["seed"]) is int


class TestPrompts:
    async def test_chats_and_system_messages(self) -> None:
        ask, sent = asker()
        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        await ask.chat(chat, system="s")
        assert sent.body["messages"] == [{"role": "system", "content": "s"}, *chat]
        await ask.chat("", system="")
        assert sent.body["messages"] == [
            {"role": "system", "content": ""},
            {"role": "user", "content": ""},
        ]
        assert "system" not in sent.body

    async def test_token_ids(self) -> None:
        ask, sent = asker()
        array = np.array([1, 2, 3])
        for ids in ((1, 2, 3), array, list(array), iter(array), pl.Series([1, 2, 3])):
            await ask.complete(ids)
            assert sent.body["prompt"] == [1, 2, 3]

    @pytest.mark.parametrize("prompt", [3, None, {"a": 1}, {1, 2}, b"x"])
    async def test_what_nothing_goes_on_with(self, prompt: Any) -> None:
        ask, sent = asker()
        with pytest.raises(InvalidValue) as caught:
            await ask.complete(prompt)
        assert (caught.value.param, sent.asked) == ("prompt", [])

    @pytest.mark.parametrize("prompt", [3, None, {"role": "user"}, ["a"], b"x"])
    async def test_what_is_no_prompt(self, prompt: Any) -> None:
        ask, sent = asker()
        with pytest.raises(InvalidValue) as caught:
            await ask.chat(prompt)
        assert caught.value.param == "prompt"
        assert sent.asked == []

    @pytest.mark.parametrize("role", ["system", "developer"])
    async def test_two_system_messages(self, role: str) -> None:
        ask, _ = asker()
        with pytest.raises(InvalidValue) as caught:
            await ask.chat([{"role": role, "content": "x"}], system="s")
        assert caught.value.param == "system"


class TestModels:
    async def test_the_servers_default_once_it_is_decided(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(asking, "_POLL", 0)
        undecided = {"default": None, "models": []}
        ask, sent = asker(listed=[undecided, undecided, LISTED])
        await ask.chat("q")
        assert sent.body["model"] == "first"
        await ask.chat("q", model="other")
        assert sent.body["model"] == "other"

    async def test_the_notebooks_default(self) -> None:
        transport = Scripted()

        async def chosen() -> str:
            return "chosen"

        ask = Asker(lambda: transport, default_model=chosen)
        await ask.chat("q", model="")
        assert transport.body["model"] == "chosen"

    async def test_a_lock_has_its_say(self) -> None:
        transport = Scripted(events=[b"data: [DONE]\n\n"])

        async def pinned(body: dict[str, Any]) -> dict[str, Any]:
            return {**body, "model": body["model"] + "-pinned", "pin": {"size": 1}}

        ask = Asker(lambda: transport, prepare=pinned)
        await ask.chat("q")
        assert (transport.body["model"], transport.body["pin"]) == ("first-pinned", {"size": 1})
        _ = [piece async for piece in ask.stream("q", model="x").pieces()]
        assert transport.body["model"] == "x-pinned"

    async def test_all_of_them(self) -> None:
        rows = [{"id": "a"}, {"id": "b"}]
        ask, _ = asker(listed=[{"default": "a", "models": rows}])
        assert await ask.models() == rows


class TestReplies:
    def test_all_that_a_body_says(self) -> None:
        body = answer("text", "length", reasoning_content="why")
        body["choices"][0]["logprobs"] = {"content": [{"token": "text", "logprob": -0.5}]}
        reply = from_body(body)
        assert (reply.text, reply.reasoning, reply.finish_reason) == ("text", "why", "length")
        assert (reply.model, reply.request_id, reply.usage) == ("m", "r1", USED)
        assert (reply.receipt, reply.timings) == (RECEIPT, TIMES)
        assert reply.logprobs == ({"token": "text", "logprob": -0.5},)
        assert reply.raw is body
        assert reply.parsed is None
        assert str(reply) == "text"
        assert "choices" not in repr(reply)

    def test_without_a_receipt_and_frozen(self) -> None:
        reply = from_body({**answer(), "shimmy": {**FIGURES, "receipt": None}})
        assert (reply.receipt, reply.reasoning) == (None, "")
        with pytest.raises(FrozenInstanceError):
            reply.text = "other"  # type: ignore[misc]


def delta(text: str = "", reason: str | None = None, **more: Any) -> dict[str, Any]:
    said = {"content": text} if text else {}
    choice = {"index": 0, "delta": said, "logprobs": None, "finish_reason": reason, **more}
    return {"id": "x", "model": "m", "choices": [choice], "usage": None}


LAST = {"id": "x", "model": "m", "choices": [], "usage": USAGE, "shimmy": FIGURES}
DONE = b"data: [DONE]\n\n"


class TestStreams:
    async def test_pieces_and_what_they_come_to(self) -> None:
        scores = {"content": [{"token": "a"}], "refusal": None}
        thought = {"content": [], "refusal": None, "reasoning_content": [{"token": "t"}]}
        ask, sent = asker(
            events=[
                b': {"state": "queued", "position": 1}\n\n',
                delta(delta={"role": "assistant", "content": ""}),
                delta(delta={"reasoning_content": "th"}, logprobs=thought),
                delta("a", logprobs=scores), delta("b"), delta("", "stop"), LAST, DONE,
            ]
        )  # fmt: skip
        stream = ask.stream("q", model="m", temperature=0)
        with pytest.raises(InvalidValue, match="not complete"):
            _ = stream.result
        assert [piece async for piece in stream.pieces()] == ["a", "b"]
        assert sent.body == {
            "model": "m", "temperature": 0, "messages": [{"role": "user", "content": "q"}],
            "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        reply = stream.result
        assert (reply.text, reply.reasoning, reply.finish_reason) == ("ab", "th", "stop")
        assert (reply.usage, reply.request_id) == (USED, "r1")
        assert reply.logprobs == ({"token": "a"},)
        assert sent.left == 1

    async def test_an_answer_without_text(self) -> None:
        ask, _ = asker(events=[delta("", "length"), LAST, DONE])
        stream = ask.stream("q")
        assert [piece async for piece in stream.pieces()] == []
        assert stream.result == Completion(
            text="", model="m", finish_reason="length", usage=USED, receipt=RECEIPT, timings=TIMES,
            request_id="r1", raw=stream.result.raw,
        )  # fmt: skip

    async def test_an_answer_that_does_not_say_how_it_ended(self) -> None:
        ask, _ = asker(events=[delta("a"), LAST, DONE])
        stream = ask.stream("q")
        assert [piece async for piece in stream.pieces()] == ["a"]
        assert stream.result.finish_reason == "stopped"

    async def test_an_error_amid_it(self) -> None:
        shape = {"message": "m", "code": "queue_full", "param": None, "request_id": "r"}
        ask, sent = asker(events=[delta("a"), {"error": shape}])
        stream = ask.stream("q")
        with pytest.raises(QueueFull):
            _ = [piece async for piece in stream.pieces()]
        with pytest.raises(InvalidValue):
            _ = stream.result
        assert sent.left == 1

    async def test_left_early(self) -> None:
        ask, sent = asker(events=[delta("a"), delta("b")])
        pieces = ask.stream("q").pieces()
        assert await anext(pieces) == "a"
        await pieces.aclose()
        assert sent.left == 1


def vectors(body: dict[str, Any]) -> dict[str, Any]:
    """Of each text its length, and the number that it begins with."""
    rows = [struct.pack("<2f", len(text), float(text[:6] or 0)) for text in body["input"]]
    data = [{"embedding": base64.b64encode(row).decode()} for row in rows]
    return {"data": data, "usage": {"prompt_tokens": 1, "total_tokens": 1}}


class TestVectors:
    async def test_an_array_in_order(self) -> None:
        ask, sent = asker(answers=[vectors])
        found = await ask.embed(iter(["1", "22", "333"]), model="m", dimensions=2)
        assert isinstance(found, np.ndarray)
        assert (found.dtype, found.shape) == (np.float32, (3, 2))
        assert found.tolist() == [[1, 1], [2, 22], [3, 333]]
        found[0, 0] = 5  # it is the caller's own
        assert sent.asked[0][1] == "shimmy/v1/embeddings"
        assert sent.body == {
            "model": "m", "input": ["1", "22", "333"], "encoding_format": "base64",
            "dimensions": 2,
        }  # fmt: skip

    async def test_one_text_is_a_list_of_one(self) -> None:
        ask, sent = asker(answers=[vectors])
        assert (await ask.embed("12", model="m")).shape == (1, 2)  # type: ignore[union-attr]
        assert "dimensions" not in sent.body

    async def test_without_numpy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "numpy", None)
        ask, _ = asker(answers=[vectors])
        assert await ask.embed(["1", "22"], model="m") == [[1.0, 1.0], [2.0, 22.0]]
        assert await ask.embed([], model="m") == []

    async def test_none(self) -> None:
        ask, sent = asker()
        assert (await ask.embed([])).shape == (0, 0)  # type: ignore[union-attr]
        assert (await ask.embed([], dimensions=8)).shape == (0, 8)  # type: ignore[union-attr]
        assert sent.asked == []

    async def test_no_more_in_a_request_than_the_server_takes(self) -> None:
        ask, sent = asker(answers=[vectors])
        texts = [str(100_000 + i) for i in range(5000)]
        found = await ask.embed(texts, model="m")
        assert [row[1] for row in found.tolist()] == [float(text) for text in texts]  # type: ignore[union-attr]
        assert [len(body["input"]) for _, _, body in sent.asked] == [2048, 2048, 904]

    @given(st.lists(st.integers(1, 300_000), max_size=12))
    def test_batches(self, sizes: list[int]) -> None:
        texts = ["x" * size for size in sizes]
        batches = list(asking._batches(texts))
        assert [text for batch in batches for text in batch] == texts
        for batch in batches:
            assert batch
            whole = sum(len(text) + asking._SPECIAL for text in batch)
            assert len(batch) == 1 or whole <= asking._MOST_TOKENS
        for one, next_ in zip(batches, batches[1:], strict=False):  # none could have been fuller
            whole = sum(len(text) + asking._SPECIAL for text in [*one, next_[0]])
            assert whole > asking._MOST_TOKENS

    async def test_a_wrong_text_is_named_as_the_caller_knows_it(self) -> None:
        wrong = ContextLengthExceeded("too long", param="input.3")
        ask, _ = asker(answers=[vectors, wrong])
        with pytest.raises(ContextLengthExceeded) as caught:
            await ask.embed(["1"] * 3000, model="m")
        assert caught.value.param == "texts.2051"

    async def test_other_fields_keep_their_names(self) -> None:
        ask, _ = asker(answers=[InvalidValue("too many", param="dimensions")])
        with pytest.raises(InvalidValue) as caught:
            await ask.embed(["1"], model="m", dimensions=99)
        assert caught.value.param == "dimensions"

    @pytest.mark.parametrize(
        ("texts", "param"),
        [(["a", ""], "texts.1"), ([3], "texts.0"), (5, "texts"), (None, "texts")],
    )
    async def test_what_has_no_vector(self, texts: Any, param: str) -> None:
        ask, sent = asker()
        with pytest.raises(InvalidValue) as caught:
            await ask.embed(texts, model="m")
        assert caught.value.param == param
        assert sent.asked == []

    async def test_the_first_model_made_for_it(self) -> None:
        row = {"kind": "model", "embedding": True, "error": None}
        rows = [
            {**row, "id": "chats", "embedding": False}, {**row, "id": "unread", "embedding": None},
            {**row, "id": "broken", "error": "why"}, {**row, "id": "minilm"},
            {**row, "id": "later"},
        ]  # fmt: skip
        ask, sent = asker(answers=[vectors], listed=[{"default": "chats", "models": rows}])
        await ask.embed(["1"])
        assert sent.body["model"] == "minilm"
        ask, _ = asker(listed=[{"default": "chats", "models": rows[:3]}])
        with pytest.raises(InvalidValue) as caught:
            await ask.embed(["1"])
        assert caught.value.param == "model"


async def test_tokens() -> None:
    ask, sent = asker(answers=[{"tokens": [1, 2], "count": 2}])
    assert await ask.tokenize("text", "m") == [1, 2]
    assert sent.asked[-1] == ("POST", "shimmy/api/tokenize", {"model": "m", "prompt": "text"})
    await ask.tokenize([{"role": "user", "content": ""}], thinking=False)
    assert sent.body == {
        "model": "first", "messages": [{"role": "user", "content": ""}], "thinking": False,
    }  # fmt: skip
