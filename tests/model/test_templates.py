"""The prompts of other people's chat templates, against llama-server's own Jinja. No token is computed.

It is asked in a process of its own, for it brings another llama.cpp along. The differences that
remain are meant, and listed.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import random_gguf
import vendored_templates

from shimmy_jupyter.engine.template import ChatTemplate
from shimmy_jupyter.errors import InvalidValue
from shimmy_jupyter.types import Message

VENDORED = vendored_templates.find()
pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed"
    ),
    pytest.mark.skipif(not VENDORED, reason=f"{vendored_templates.VARIABLE} is not set"),
]

BRIEF = ("system", "Be brief.")
TALK = [("user", "Is it?"), ("assistant", "It is."), ("user", "Why?")]
CHATS = {
    "system": [BRIEF, *TALK],
    "no system": TALK,
    "characters": [("user", "é \"<b>\" \\ & {{ x }}\n\n  'y'")],
    "reasoned": [TALK[0], ("assistant", "<think>\nWell.\n</think>\n\nIt is."), TALK[2]],
    "spaces": [("user", "\n Is it?\n"), ("assistant", " It is. "), ("user", "Why? ")],
}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": 'Wetter für <Ort> & "so"',
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Its name"},
                "days": {"type": "integer", "description": "How many", "enum": [1, 2]},
            },
            "required": ["city"],
        },
    },
}  # fmt: skip
VARIABLES: dict[str, dict[str, Any]] = {
    "thinking": {"enable_thinking": True},
    "not thinking": {"enable_thinking": False},
    "tools": {"enable_thinking": True, "tools": [TOOL]},
}
CASES = {
    f"{chat}, {variables}": (CHATS[chat], VARIABLES[variables])
    for chat in CHATS
    for variables in VARIABLES
    if variables == "thinking" or chat == "system"
}
MEANT = {
    # They merge a system message into the first of the user's; we pass the template's refusal on.
    ("google-gemma-2-2b-it", "system, thinking"),
    ("google-gemma-2-2b-it", "system, not thinking"),
    ("google-gemma-2-2b-it", "system, tools"),
    # They strip what these messages say, which the template does not.
    ("StepFun3.5-Flash", "spaces, thinking"),
}


def theirs(model: Path, sources: dict[str, str]) -> dict[tuple[str, str], str]:
    """What llama-server makes of each template and case. Runs in a process of its own."""
    import xllamacpp

    prompts = {}
    for name, source in sources.items():
        params = xllamacpp.CommonParams()
        params.model.path = str(model)
        params.chat_template = source
        params.use_jinja = True
        params.n_ctx = 256
        params.n_parallel = params.n_threads_http = 1
        params.cache_ram_mib = 0
        params.warmup = False
        params.verbosity = -1
        server = xllamacpp.Server(params)
        with httpx.Client(base_url=server.listening_address, trust_env=False) as client:
            for case, (chat, variables) in CASES.items():
                kwargs = {key: value for key, value in variables.items() if key != "tools"}
                body: dict[str, Any] = {
                    "messages": [{"role": role, "content": text} for role, text in chat],
                    "chat_template_kwargs": kwargs,
                }
                if "tools" in variables:
                    body["tools"] = variables["tools"]
                answer = client.post("/apply-template", json=body).json()
                prompts[name, case] = answer.get("prompt", f"refused: {answer}")
        del server
    return prompts


def ours(sources: dict[str, str]) -> dict[tuple[str, str], str]:
    special = {"bos_token": random_gguf.SPECIAL[0], "eos_token": random_gguf.SPECIAL[0]}
    prompts = {}
    for name, source in sources.items():
        template = ChatTemplate(source, special)
        for case, (chat, variables) in CASES.items():
            messages = tuple(Message(*turn) for turn in chat)
            try:
                prompts[name, case] = template.render(messages, variables=variables)
            except InvalidValue as error:
                prompts[name, case] = f"refused: {error.message}"
    return prompts


def test_they_are_what_llama_server_makes_of_them(random_model: Path) -> None:
    sources = {name: path.read_text() for name, path in VENDORED.items()}
    before = ours(sources)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        expected = pool.submit(theirs, random_model, sources).result()
    different = {key for key, prompt in before.items() if prompt != expected[key]}
    if different != MEANT:
        # Some say what day it is, and it may have become another one.
        after = ours({name: sources[name] for name, _ in different})
        different = {key for key in different if after[key] != expected[key]}
    assert different == MEANT
    assert len(before) == len(VENDORED) * len(CASES)
