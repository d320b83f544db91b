"""Reasoning apart from the answer, over HTTP: bodies, streams, usage, the template's switches.

Cases: a body; a stream, with the role first; usage; several choices; log-probabilities; text completions
have none of it; thinking by each of its fields, and through the routes about tokens; what is refused.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from shimmy_jupyter.engine.fake import FakeBackend

from .conftest import Fakes, chat
from .test_choices import TEMPLATE, TOKENIZE, post
from .test_completions import CHAT, COMPLETIONS, events, refused

SWITCHED = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "<assistant>{% if enable_thinking is defined and not enable_thinking %}<think></think>"
    "{% endif %}{{ tone }}"
)
THOUGHTS = ["<think>", "why ", "not", "</think>", "\n\n", "Be", "cause"]


@pytest.fixture(autouse=True)
def thoughtful(fakes: Fakes) -> None:
    fakes.make = lambda: FakeBackend(lambda _: THOUGHTS, template=SWITCHED)


async def test_a_body(server: Any, jp_fetch: Any) -> None:
    answer = json.loads((await jp_fetch(*CHAT, method="POST", body=chat(n=2))).body)
    for choice in answer["choices"]:
        assert choice["message"] == {
            "role": "assistant",
            "content": "Because",
            "refusal": None,
            "reasoning_content": "why not",
        }
    used = answer["usage"]
    assert used["completion_tokens"] == 2 * 8
    assert used["completion_tokens_details"] == {"reasoning_tokens": 2 * 4}


async def test_a_stream(server: Any, jp_fetch: Any) -> None:
    body = chat(stream=True, stream_options={"include_usage": True})
    *chunks, last = events((await jp_fetch(*CHAT, method="POST", body=body)).body)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas == [
        {"role": "assistant", "content": ""},
        {"reasoning_content": "why"},
        {"reasoning_content": " not"},
        {"content": "Be"},
        {"content": "cause"},
        {},
    ]
    assert last["usage"]["completion_tokens_details"] == {"reasoning_tokens": 4}


@pytest.mark.parametrize("stream", [False, True])
async def test_log_probabilities(server: Any, jp_fetch: Any, stream: bool) -> None:
    body = chat(logprobs=True, stream=stream)
    answer = (await jp_fetch(*CHAT, method="POST", body=body)).body
    found: dict[str, str] = {"content": "", "reasoning_content": ""}
    for chunk in events(answer) if stream else [json.loads(answer)]:
        scores = chunk["choices"][0]["logprobs"] or {}
        for kind in found:
            found[kind] += "".join(one["token"] for one in scores.get(kind, []))
    assert found == {"content": "\n\nBecause", "reasoning_content": "<think>why not</think>"}


async def test_a_text_completion_is_what_the_model_wrote(server: Any, jp_fetch: Any) -> None:
    body = json.dumps({"model": "fake", "prompt": "hm"})
    answer = json.loads((await jp_fetch(*COMPLETIONS, method="POST", body=body)).body)
    assert answer["choices"][0]["text"] == "".join(THOUGHTS)
    for field, value in {"thinking": True, "reasoning_effort": "low"}.items():
        body = json.dumps({"model": "fake", "prompt": "hm", field: value})
        status, error = await refused(jp_fetch, *COMPLETIONS, body=body)
        assert (status, error["param"]) == (400, field)


@pytest.mark.parametrize(
    "fields",
    [
        {"thinking": False},
        {"thinking": 0},
        {"reasoning_effort": "none"},
        {"chat_template_kwargs": {"enable_thinking": False}},
    ],
)
async def test_switched_off(server: Any, jp_fetch: Any, fields: dict[str, Any]) -> None:
    answer = json.loads((await jp_fetch(*CHAT, method="POST", body=chat("hm", **fields))).body)
    # Closed in the prompt: whatever follows is the answer.
    assert answer["choices"][0]["message"]["content"] == "".join(THOUGHTS)
    assert answer["usage"]["prompt_tokens"] == len("<user>hm\n<assistant><think></think>")
    messages = [{"role": "user", "content": "hm"}]
    rendered = await post(jp_fetch, *TEMPLATE, messages=messages, **fields)
    assert rendered["prompt"] == "<user>hm\n<assistant><think></think>"
    counted = await post(jp_fetch, *TOKENIZE, messages=messages, **fields)
    assert counted["count"] == answer["usage"]["prompt_tokens"]


async def test_the_template_s_own_variables(server: Any, jp_fetch: Any) -> None:
    messages = [{"role": "user", "content": "hm"}]
    found = await post(jp_fetch, *TEMPLATE, messages=messages, chat_template_kwargs={"tone": "dry"})
    assert found["prompt"].endswith("<assistant>dry")


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"thinking": "yes"}, "invalid_value", "thinking"),
        ({"thinking": -1}, "invalid_value", "thinking"),
        ({"thinking": 100}, "unsupported_parameter", "thinking"),
        ({"reasoning_effort": "low"}, "unsupported_parameter", "reasoning_effort"),
        ({"reasoning_effort": ""}, "invalid_value", "reasoning_effort"),
        ({"thinking": True, "reasoning_effort": "none"}, "invalid_value", "reasoning_effort"),
        ({"chat_template_kwargs": {"messages": []}}, "invalid_value", "chat_template_kwargs"),
        ({"chat_template_kwargs": {"tone": "\ud800"}}, "invalid_value", "chat_template_kwargs"),
        (
            {"chat_template_kwargs": {"tone": [{"\udfff": 1}]}},
            "invalid_value",
            "chat_template_kwargs",
        ),
        (
            {"chat_template_kwargs": {str(i): i for i in range(33)}},
            "invalid_value",
            "chat_template_kwargs",
        ),
        ({"chat_template_kwargs": [1]}, "invalid_value", "chat_template_kwargs"),
        (
            {"thinking": True, "chat_template_kwargs": {"enable_thinking": False}},
            "invalid_value",
            "chat_template_kwargs",
        ),
    ],
)
async def test_what_is_refused(
    server: Any, jp_fetch: Any, fields: dict[str, Any], code: str, param: str
) -> None:
    status, error = await refused(jp_fetch, *CHAT, body=chat(**fields))
    assert (status, error["code"], error["param"]) == (400, code, param)


async def test_a_prompt_to_tokenize_has_no_template(server: Any, jp_fetch: Any) -> None:
    body = json.dumps({"model": "fake", "prompt": "hm", "thinking": False})
    status, error = await refused(jp_fetch, *TOKENIZE, body=body)
    assert (status, error["param"]) == (400, "thinking")
