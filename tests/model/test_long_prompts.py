"""Prompts made to hurt the tokenizer, in a process of their own, as what they hurt is a process.

Left out: superbpe, whose splitting of digits takes time that grows with the square of their number
in llama.cpp itself.

Cases: a run of one character as long as is allowed, for every kind of splitting that overflowed an
ordinary thread's stack and some that did not; special tokens in numbers; text that must have too
many tokens, refused uncounted; the same over HTTP, while somebody else streams.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest
import random_gguf
from kernel_session import running_server
from tornado.httpclient import AsyncHTTPClient, HTTPRequest

from shimmy_jupyter.errors import ContextLengthExceeded
from shimmy_jupyter.types import Message

from .conftest import loaded, self_test_path

SPLITTINGS = (
    "default tekken deepseek-llm deepseek-coder deepseek-v3 falcon bloom gpt-4o llama4 poro-chat "
    "viking seed-coder hunyuan-dense gpt-2 llama-bpe qwen2 mpt"
).split()
LONG = """
import asyncio, sys
from pathlib import Path
from shimmy_jupyter.engine.backend import LoadSpec
from shimmy_jupyter.engine.deep import in_deep_thread
from shimmy_jupyter.engine.llama import LlamaBackend
for path in sorted(Path(sys.argv[1]).glob("*.gguf")):
    backend = LlamaBackend()
    backend.load(LoadSpec(path=str(path), sequences=1, kv_tokens=256, context_size=256))
    for run in "a", "1", "!", " ", "é":
        text = run * (60_000 // len(run.encode()))
        tokens = asyncio.run(in_deep_thread(lambda: backend.tokenize(text), len(text.encode())))
        assert tokens, (path, run)
    backend.unload()
    print(path.stem, flush=True)
"""


def test_long_runs_do_not_overflow_the_stack(tmp_path: Path) -> None:
    for pre in SPLITTINGS:
        random_gguf.write(tmp_path / f"{pre}.gguf", pre=pre)
    done = subprocess.run(
        [sys.executable, "-c", LONG, str(tmp_path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.split() == sorted(SPLITTINGS), done.stderr[-2000:]
    assert done.returncode == 0


async def test_what_must_be_too_long_is_not_counted() -> None:
    async with loaded(self_test_path()) as model:
        for text in ("a" * 8_000_000, "<|im_end|>" * 500_000, "<|im_end|>x" * 20_000, " " * 50_000):
            with pytest.raises(ContextLengthExceeded, match="or more: at least") as caught:
                await model.encode(text)
            assert caught.value.param == "prompt"
        with pytest.raises(ContextLengthExceeded) as caught:
            await model.encode((Message("user", "a" * 1_000_000),))
        assert caught.value.param == "messages"
        # The bound never refuses what fits.
        for count in (1, 10, 500):
            assert len(await model.encode("return " * count)) <= 2 * count + 1


async def test_a_server_survives_them_and_streams_on(tmp_path: Path) -> None:
    shape = random_gguf.Shape(
        layers=4, width=256, heads=8, head_width=32, hidden=1024, context=32768
    )
    random_gguf.write(tmp_path / "tekken.gguf", shape, pre="tekken")
    with running_server(environment={"SHIMMY_MODEL_PATHS": str(tmp_path)}) as server:
        client = AsyncHTTPClient()

        async def ask(prompt: str, max_tokens: int) -> dict[str, object]:
            body = {"model": "tekken", "prompt": prompt, "max_tokens": max_tokens}
            response = await client.fetch(
                HTTPRequest(
                    server.url + "shimmy/v1/completions",
                    method="POST",
                    headers={"Authorization": f"token {server.token}"},
                    body=json.dumps(body),
                    request_timeout=120,
                ),
                raise_error=False,
            )
            return dict(json.loads(response.body))

        running = asyncio.ensure_future(ask("go on", 300))
        for text in ("a" * 30_000, "1" * 90_000, "a" * 7_000_000, "<|im_end|>" * 30_000):
            answer = await ask(text, 0)
            assert answer.get("usage") or answer["error"]["code"] == "context_length_exceeded"  # type: ignore[index]
        assert (await running)["usage"]
