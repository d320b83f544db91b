"""A notebook on the real engine: frames, functions, the panel and the magics through one kernel and server.

Cases: a frame is mapped, and again from the cache, also right after the model's bytes were first read; a frame
and a function without a server; the panel opens, answers and leaves no thread; replay of a cell is identical;
one policy refuses all of them with the same code; a name of a lock is good wherever a model is named.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kernel_session import RunningServer, kernel, running_server, text_of

LEN = "Return the number of items in a container."


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_server() as running:
        yield running


async def said(session: Any, code: str) -> str:
    """What a cell shows last. Errors are raised."""
    outputs = await session.execute(code)
    for one in outputs:
        assert one["type"] != "error", text_of(one)
    return text_of(outputs[-1])


FRAME = (
    "import shimmy, pandas as pd\n"
    "df = pd.DataFrame({'f': ['len', 'zip', 'len']}, index=[7, 8, 9])\n"
    "found = df.shimmy.map('What does {f} do?')"
)


async def test_a_frame_and_its_cache(server: RunningServer) -> None:
    async with kernel(server) as session:
        await session.execute("%load_ext shimmy")
        first = await said(session, FRAME)
        assert first.startswith("3 rows")
        assert "from the cache" not in first
        assert "2 from the cache" in await said(session, FRAME)
        text = await said(session, "print(list(found.index), found['answer'].iloc[0])")
        assert text.strip() == f"[7, 8, 9] {LEN}"
        text = await said(session, "print(found['answer_error'].isna().all())")
        assert text.strip() == "True"


async def test_functions(server: RunningServer) -> None:
    async with kernel(server) as session:
        await session.execute("%load_ext shimmy\nimport shimmy")
        code = "print(shimmy.chat('What does len do?', temperature=0).text)"
        assert (await said(session, code)).strip() == LEN
        code = "print((await shimmy.achat('What does len do?', temperature=0)).text)"
        assert (await said(session, code)).strip() == LEN
        code = "print(shimmy.openai_client().models.list().data[0].id)"
        assert (await said(session, code)).strip() == "self-test"


async def test_the_panel_leaves_no_thread(server: RunningServer) -> None:
    names = "print([t.name for t in __import__('threading').enumerate() if 'panel' in t.name])"
    async with kernel(server) as session:
        await session.execute("%load_ext shimmy\nimport shimmy")
        await said(session, "panel = shimmy.panel(); panel")
        assert "shimmy-panel" in await said(session, names)
        gone = (
            "import threading, time\npanel.close()\nend = time.monotonic() + 20\n"
            "while time.monotonic() < end and 'shimmy-panel' in str(threading.enumerate()):\n"
            "    time.sleep(0.01)\n"
        )
        assert (await said(session, gone + names)).strip() == "[]"


async def test_a_cell_replays(server: RunningServer) -> None:
    async with kernel(server) as session:
        await session.execute("%load_ext shimmy")
        outputs = await session.execute("%shimmy --seed 3 --max-tokens 20 Tell me something")
        kept = outputs[-1]["content"]["metadata"]["shimmy"]
        assert kept["parameters"]["seed"] == 3
        assert kept["parameters"]["reproducible"] is True
        assert kept["request"]["messages"][-1]["content"] == "Tell me something"
        assert (await said(session, "%shimmy replay")).startswith("identical")
        await session.execute("x = %shimmy --seed 4 --max-tokens 9 Tell me something else")
        await session.execute("%shimmy --seed 5 --max-tokens 9 And now")
        assert (await said(session, "%shimmy replay x")).startswith("identical: 9 tokens")


async def test_one_policy_for_all(tmp_path: Path) -> None:
    rules = {"ShimmyPolicy": {"rules": [{"deny": "self-test"}]}}
    (tmp_path / "jupyter_shimmy_jupyter_config.json").write_text(json.dumps(rules))
    asks = (
        "%shimmy --model self-test hi",
        "shimmy.chat('hi', model='self-test')",
        "pd.DataFrame({'f': ['len']}).shimmy.map('What does {f} do?', model='self-test')",
        "shimmy.classify('hi', ['a', 'b'], model='self-test')",
    )
    environment = {"JUPYTER_CONFIG_PATH": str(tmp_path)}
    with running_server(environment=environment) as server:
        async with kernel(server) as session:
            await session.execute("%load_ext shimmy\nimport shimmy, pandas as pd")
            for ask in asks:
                code = (
                    f"try:\n    {ask}\nexcept Exception as e:\n    print(type(e).__name__, e.code)"
                )
                assert (await said(session, code)).strip() == "AccessDenied policy_denied", ask


def test_without_a_server(tmp_path: Path) -> None:
    code = (
        f"{FRAME}\nimport json\nprint(json.dumps([shimmy.chat('What does len do?', "
        "temperature=0).text, found['answer'].tolist()[0]]))"
    )
    done = subprocess.run(
        [sys.executable, "-m", "IPython", "--no-banner", "-c", f"%load_ext shimmy\n{code}"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=tmp_path,
    )
    assert json.loads(done.stdout.strip().splitlines()[-1]) == [LEN, LEN], done.stderr
    assert "the model runs inside it" in done.stdout


def test_a_name_of_the_lock(tmp_path: Path) -> None:
    code = (
        "%load_ext shimmy\nimport json, shimmy\n%shimmy lock self-test --alias tutor\n"
        "%shimmy load tutor\n%shimmy use tutor\n%shimmy --context 1 -o x What does len do\n"
        "print(json.dumps([shimmy.tokenize('hi', model='tutor') == shimmy.tokenize('hi'),"
        "shimmy.embed('hi', model='tutor').shape[0], x.model]))"
    )
    done = subprocess.run(
        [sys.executable, "-m", "IPython", "--no-banner", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=tmp_path,
    )
    assert json.loads(done.stdout.strip().splitlines()[-1]) == [True, 1, "self-test"], done.stdout
    assert "tutor of shimmy.lock" in done.stdout
