"""A long answer, streamed fast through a real server into a real kernel's cell: whole, and within what Jupyter
lets a kernel put out.

Cases: every character is there, as the API gives them for the same request; no rate limit is crossed, nor
said to be; each update goes on from the one before.
"""

from __future__ import annotations

import re
from pathlib import Path

import random_gguf
from kernel_session import kernel, running_server, text_of

from shimmy_jupyter.notebook.display import clean

TOKENS = 8100
"""As fast as they come: on two cores that have nothing else to do, at 2,000 in a second."""
WAITS = re.compile(r"\n\[(loading|waiting|reading)\b")
SHAPE = random_gguf.Shape(
    layers=1, width=128, heads=1, kv_heads=1, head_width=32, hidden=32, context=10240
)


async def test_eight_thousand_tokens_arrive_whole(tmp_path: Path) -> None:
    random_gguf.write(tmp_path / "long.gguf", SHAPE, words=True, seed=3)
    # Not greedy: that soon says the same again and again, where nothing would be missed.
    body = {
        "model": "long",
        "messages": [{"role": "user", "content": "Go on"}],
        "temperature": 0.3,
        "max_tokens": TOKENS,
        "seed": 7,
        "reproducible": True,
    }
    cell = f"%%shimmy long --temperature 0.3 --max-tokens {TOKENS} --seed 7\nGo on"
    with running_server(environment={"SHIMMY_MODEL_PATHS": str(tmp_path)}) as server:
        answer = await server.request("POST", "shimmy/v1/chat/completions", body)
        async with kernel(server) as session:
            await session.execute("%load_ext shimmy")
            outputs = await session.execute(cell)
        log = server.log.read_text()

    # Nothing else comes: that a limit was crossed, the server says to the cell, as text on stderr. It
    # counts messages; bytes only of such text.
    assert {one["type"] for one in outputs} == {"display_data", "update_display_data"}
    *growing, last = (text for text in map(text_of, outputs) if not WAITS.match(text))
    text, _, figures = last.rpartition("\n")
    assert figures.startswith(f"[long · {TOKENS:,} tokens · ")
    assert answer["usage"]["completion_tokens"] == TOKENS
    assert text == clean(answer["choices"][0]["message"]["content"])
    assert len({text[i : i + 30] for i in range(len(text))}) > 1000
    assert len(growing) > 10
    for before, after in zip(growing, [*growing[1:], text], strict=True):
        assert after.startswith(before)
    assert "iopub messages resumed" not in log
