"""Several choices, log-probabilities and the routes about tokens, on a real Jupyter server.

Cases: n in one body and in a stream, each choice whole; usage counts the prompt once; choices differ in
their seeds; a place for one of three; a client that goes away from three; log-probabilities of a chat
and of a completion, in a body and in a stream, also of half a character and of held back text; tokenize,
detokenize and apply-template there and back; what they refuse.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from shimmy_jupyter.core.messages import OpenSlot
from shimmy_jupyter.engine.backend import LoadSpec
from shimmy_jupyter.engine.fake import FakeBackend

from .conftest import MODEL, Fakes, chat
from .test_completions import CHAT, COMPLETIONS, events, refused, until

TOKENIZE = ("shimmy", "api", "tokenize")
DETOKENIZE = ("shimmy", "api", "detokenize")
TEMPLATE = ("shimmy", "api", "apply-template")


async def post(fetch: Any, *path: str, **fields: Any) -> dict[str, Any]:
    body = json.dumps({"model": MODEL, **fields})
    response = await fetch(*path, method="POST", body=body)
    answer: dict[str, Any] = json.loads(response.body)
    return answer


async def test_choices_of_one_body(server: Any, jp_fetch: Any) -> None:
    response = await jp_fetch(*CHAT, method="POST", body=chat("one two three", n=3))
    answer = json.loads(response.body)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    for choice in answer["choices"]:
        assert choice["message"]["content"] == "one two three "
        assert choice["finish_reason"] == "stop"
    prompt = len("<user>one two three\n<assistant>")
    assert answer["usage"]["prompt_tokens"] == prompt
    assert answer["usage"]["completion_tokens"] == 3 * 4
    assert answer["usage"]["total_tokens"] == prompt + 12


async def test_choices_of_a_stream(server: Any, jp_fetch: Any) -> None:
    body = chat("one two three", n=3, stream=True, stream_options={"include_usage": True})
    response = await jp_fetch(*CHAT, method="POST", body=body)
    texts, reasons = ["", "", ""], [None, None, None]
    *chunks, last = events(response.body)
    for chunk in chunks:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
        reasons[choice["index"]] = reasons[choice["index"]] or choice["finish_reason"]
    assert texts == ["one two three "] * 3
    assert reasons == ["stop"] * 3
    assert last["usage"]["completion_tokens"] == 12


async def test_without_tokens_each_choice_is_empty(server: Any, jp_fetch: Any) -> None:
    response = await jp_fetch(*CHAT, method="POST", body=chat(n=2, max_tokens=0))
    answer = json.loads(response.body)
    assert [c["finish_reason"] for c in answer["choices"]] == ["length", "length"]
    assert answer["usage"]["completion_tokens"] == 0


@pytest.mark.parametrize(
    ("fields", "seeds"),
    [({"seed": 5}, [5, 6, 7]), ({}, [None] * 3), ({"reproducible": True}, [0, 1, 2])],
)
async def test_choices_have_seeds_of_their_own(
    server: Any, jp_fetch: Any, monkeypatch: Any, fields: dict[str, Any], seeds: list[Any]
) -> None:
    seen = []
    apply = FakeBackend.apply

    def record(self: FakeBackend, change: Any) -> None:
        if isinstance(change, OpenSlot):
            seen.append(change.sampling.seed)
        apply(self, change)

    monkeypatch.setattr(FakeBackend, "apply", record)
    await jp_fetch(*CHAT, method="POST", body=chat(n=3, **fields))
    assert seen == seeds


async def test_all_choices_or_none(server: Any, jp_fetch: Any, fakes: Fakes) -> None:
    fakes.spec, fakes.queue_size = LoadSpec(path="", sequences=1), 1
    status, error = await refused(jp_fetch, *CHAT, body=chat(n=16))
    assert (status, error["code"]) == (503, "queue_full")
    await until(lambda: fakes.models[0].active == 0)


async def test_log_probabilities_of_a_chat(server: Any, jp_fetch: Any, fakes: Fakes) -> None:
    fakes.make = lambda: FakeBackend(
        lambda _: ["a", "\u00e9".encode()[:1], "\u00e9".encode()[1:], "b"]
    )
    body = chat("x", logprobs=True, top_logprobs=2)
    answer = json.loads((await jp_fetch(*CHAT, method="POST", body=body)).body)
    (choice,) = answer["choices"]
    assert choice["message"]["content"] == "a\u00e9b"
    content = choice["logprobs"]["content"]
    assert [one["bytes"] for one in content] == [[97], [0xC3], [0xA9], [98]]
    assert [one["token"] for one in content] == ["a", "\ufffd", "\ufffd", "b"]
    assert all(one["logprob"] < 0 and len(one["top_logprobs"]) == 2 for one in content)

    response = await jp_fetch(*CHAT, method="POST", body=chat("x", logprobs=True, stream=True))
    streamed = []
    for chunk in events(response.body):
        for choice in chunk["choices"]:
            if choice["logprobs"]:
                part = choice["logprobs"]["content"]
                streamed += part
                shown = b"".join(bytes(one["bytes"]) for one in part).decode()
                assert choice["delta"]["content"] == shown
    assert [one["bytes"] for one in streamed] == [[97], [0xC3], [0xA9], [98]]
    assert all(one["top_logprobs"] == [] for one in streamed)


async def test_log_probabilities_of_a_completion(server: Any, jp_fetch: Any) -> None:
    fields = {"prompt": "<user>one two three\n<assistant>", "logprobs": 1}
    answer = await post(jp_fetch, *COMPLETIONS, **fields)
    scores = answer["choices"][0]["logprobs"]
    assert scores["tokens"] == ["one ", "two ", "three "]
    assert scores["text_offset"] == [0, 4, 8]
    assert len(scores["token_logprobs"]) == len(scores["top_logprobs"]) == 3
    body = json.dumps({"model": MODEL, **fields, "stream": True})
    chunks = events((await jp_fetch(*COMPLETIONS, method="POST", body=body)).body)
    offsets = [
        o for c in chunks for o in (c["choices"][0]["logprobs"] or {}).get("text_offset", [])
    ]
    assert offsets == [0, 4, 8]


async def test_a_stop_text_takes_its_tokens_along(server: Any, jp_fetch: Any) -> None:
    body = chat("one two three", logprobs=True, stop="two three")
    answer = json.loads((await jp_fetch(*CHAT, method="POST", body=body)).body)
    (choice,) = answer["choices"]
    assert choice["message"]["content"] == "one "
    assert [one["token"] for one in choice["logprobs"]["content"]] == ["one "]


@pytest.mark.parametrize(
    ("fields", "constraint"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, ("json_object", "")),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "null"}}}},
            ("json_schema", '{"type": "null"}'),
        ),
        ({"grammar": {"type": "regex", "value": "a+"}}, ("regex", "a+")),
    ],
)  # fmt: skip
async def test_constraints_reach_the_engine(
    server: Any, jp_fetch: Any, monkeypatch: Any, fields: dict[str, Any], constraint: Any
) -> None:
    seen = []
    apply = FakeBackend.apply

    def record(self: FakeBackend, change: Any) -> None:
        if isinstance(change, OpenSlot):
            found = change.sampling.constraint
            seen.append(found and (found.kind, found.source))
        apply(self, change)

    monkeypatch.setattr(FakeBackend, "apply", record)
    await jp_fetch(*CHAT, method="POST", body=chat(**fields))
    assert seen == [constraint]


async def test_constraints_that_cannot_be_had(server: Any, jp_fetch: Any) -> None:
    body = chat(grammar={"type": "regex", "value": "wrong"})
    status, error = await refused(jp_fetch, *CHAT, body=body)
    assert (status, error["code"], error["param"]) == (400, "invalid_value", "response_format")


async def test_adapters_by_id(server: Any, jp_fetch: Any) -> None:
    status, error = await refused(jp_fetch, *CHAT, body=chat(adapter="ghost"))
    assert (status, error["code"], error["param"]) == (404, "model_not_found", "adapter")
    response = await jp_fetch(*CHAT, method="POST", body=chat(adapter=MODEL))
    assert json.loads(response.body)["choices"][0]["finish_reason"] == "stop"


async def test_there_and_back(server: Any, jp_fetch: Any) -> None:
    found = await post(jp_fetch, *TOKENIZE, prompt="h\u00e9llo")
    assert found == {"tokens": list("h\u00e9llo".encode()), "count": 6}
    assert await post(jp_fetch, *DETOKENIZE, tokens=found["tokens"]) == {"text": "h\u00e9llo"}
    assert await post(jp_fetch, *DETOKENIZE, tokens=[]) == {"text": ""}
    assert await post(jp_fetch, *DETOKENIZE, tokens=[0xC3]) == {"text": "\ufffd"}
    messages = [{"role": "user", "content": "x"}]
    rendered = await post(jp_fetch, *TEMPLATE, messages=messages)
    assert rendered == {"prompt": "<user>x\n<assistant>", "count": 19, "cached_tokens": 0}
    counted = await post(jp_fetch, *TOKENIZE, messages=messages)
    assert counted["count"] == 19


@pytest.mark.parametrize(
    ("path", "fields", "code", "param"),
    [
        (TOKENIZE, {}, "invalid_value", "prompt"),
        (TOKENIZE, {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, "invalid_value", "prompt"),
        (TOKENIZE, {"prompt": [1]}, "invalid_value", "prompt"),
        (TOKENIZE, {"prompt": "x", "max_tokens": 3}, "unknown_parameter", "max_tokens"),
        (TOKENIZE, {"prompt": "x", "model": 4}, "invalid_value", "model"),
        (TOKENIZE, {"prompt": "x" * 40_000}, "context_length_exceeded", "prompt"),
        (DETOKENIZE, {}, "invalid_value", "tokens"),
        (DETOKENIZE, {"tokens": "x"}, "invalid_value", "tokens"),
        (DETOKENIZE, {"tokens": [-1]}, "invalid_value", "tokens"),
        (DETOKENIZE, {"tokens": [10**9]}, "invalid_value", "tokens"),
        (DETOKENIZE, {"tokens": [1] * 200_000}, "invalid_value", "tokens"),
        (TEMPLATE, {}, "invalid_value", "messages"),
        (TEMPLATE, {"messages": []}, "invalid_value", "messages"),
        (TEMPLATE, {"messages": [{"role": "user"}]}, "invalid_value", "messages.0.content"),
    ],
)  # fmt: skip
async def test_refused(
    server: Any, jp_fetch: Any, path: Any, fields: dict[str, Any], code: str, param: str
) -> None:
    status, error = await refused(jp_fetch, *path, body=json.dumps({"model": MODEL} | fields))
    assert (status, error["code"], error["param"]) == (400, code, param)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 2])
async def test_a_prompt_in_front(server: Any, jp_fetch: Any, stream: bool, max_tokens: int) -> None:
    def whole(body: bytes) -> tuple[str, dict[str, list[Any]]]:
        text, scores = "", dict[str, list[Any]]()
        for chunk in events(body) if stream else [json.loads(body)]:
            for choice in chunk["choices"]:
                text += choice["text"]
                for name, values in (choice["logprobs"] or {}).items():
                    scores.setdefault(name, []).extend(values)
        return text, scores

    asked = {"model": MODEL, "prompt": "ab c", "echo": True, "max_tokens": max_tokens}
    answer = ["ab ", "c "][:max_tokens]
    body = json.dumps({**asked, "stream": stream})
    text, scores = whole((await jp_fetch(*COMPLETIONS, method="POST", body=body)).body)
    assert (text, scores) == ("ab c" + "".join(answer), {})

    body = json.dumps({**asked, "logprobs": 1, "stream": stream})
    text, scores = whole((await jp_fetch(*COMPLETIONS, method="POST", body=body)).body)
    assert text == "ab c" + "".join(answer)
    assert scores["tokens"] == ["a", "b", " ", "c", *answer]
    assert scores["text_offset"] == [0, 1, 2, 3, 4, 7][: 4 + max_tokens]
    assert scores["token_logprobs"][:4] == [None, -0.098, -0.032, -0.099]
    assert scores["top_logprobs"][0] is None
    assert all(len(top) == 1 for top in scores["top_logprobs"][1:])


async def test_a_prompt_of_tokens_that_is_too_long(server: Any, jp_fetch: Any) -> None:
    """That is said before any of them is looked at."""
    body = json.dumps({"model": MODEL, "prompt": [2**30] * 100_000})
    status, error = await refused(jp_fetch, *COMPLETIONS, body=body)
    assert (status, error["code"]) == (400, "context_length_exceeded")
    assert error["message"].startswith("the prompt has 100000 tokens: ")


async def test_a_prompt_of_tokens_in_front(server: Any, jp_fetch: Any) -> None:
    answer = await post(jp_fetch, *COMPLETIONS, prompt=[104], echo=True, logprobs=0, max_tokens=0)
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("h", "length")
    assert choice["logprobs"]["token_logprobs"] == [None]
    assert answer["usage"]["completion_tokens"] == 0


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"suffix": "x"}, "echo"), ({"logprobs": 1, "n": 2}, "n"), ({"echo": 1}, "echo")],
)
async def test_what_does_not_go_with_it(
    server: Any, jp_fetch: Any, fields: dict[str, Any], param: str
) -> None:
    body = json.dumps({"model": MODEL, "prompt": "x", "echo": True, **fields})
    status, error = await refused(jp_fetch, *COMPLETIONS, body=body)
    assert (status, error["param"]) == (400, param)


async def test_what_would_be_reused(server: Any, jp_fetch: Any) -> None:
    """As the request then does; another's is not told."""
    messages = [{"role": "user", "content": "a" * 60}]
    await jp_fetch(*CHAT, method="POST", body=chat("a" * 60))
    messages[0]["content"] += "b" * 20
    rendered = await post(jp_fetch, *TEMPLATE, messages=messages)
    assert rendered["cached_tokens"] == len("<user>" + "a" * 60)
    response = await jp_fetch(*CHAT, method="POST", body=chat("a" * 60 + "b" * 20))
    used = json.loads(response.body)["usage"]
    assert used["prompt_tokens_details"]["cached_tokens"] == rendered["cached_tokens"]
    messages[0]["content"] = "b" + "a" * 60
    assert (await post(jp_fetch, *TEMPLATE, messages=messages))["cached_tokens"] == 0
