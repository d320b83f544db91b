"""One browser and one server with JupyterLab for all tests here; skipped where there are none."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import random_gguf

from .lab import CHROMIUM, SCREENSHOTS, Lab, chromium, running_lab

if TYPE_CHECKING:
    from playwright.sync_api import Browser

LONG = random_gguf.Shape(
    layers=1, width=128, heads=1, kv_heads=1, head_width=32, hidden=32, context=10240
)
THINKS = random_gguf.CHATML + "{% if enable_thinking == false %}<think></think>{% endif %}"
RICH = (
    "<think>", "It asks ", "for all", "</think>",
    "# A heading\n\n", "Text with `code`, ", "**weight** and [a link](https://example.org).\n\n",
    "```python\ndef f(x):\n    return x\n```\n\n", "| a | b |\n|---|---|\n| 1 | 2 |\n\n",
    "- one\n- two\n\n", "> a quote\n",
)  # fmt: skip
HOSTILE = (
    "<script>document.got = 'script'</script>\n\n",
    "<img src='http://hostile.invalid/html.png' onerror=\"document.got = 'onerror'\">\n\n",
    "![a picture](http://hostile.invalid/markdown.png)\n\n",
    "![by name][there]\n\n", "[there]: http://hostile.invalid/reference.png\n\n",
    "<svg onload=\"document.got = 'onload'\"></svg>\n\n",
    "<iframe src='http://hostile.invalid/frame'></iframe>\n\n",
    "<style>body {display: none} @import 'http://hostile.invalid/style.css';</style>\n\n",
    "<link rel='stylesheet' href='http://hostile.invalid/link.css'>\n\n",
    "<button data-commandlinker-command='apputils:reset'>free money</button>\n\n",
    "[press](javascript:document.got='link') ", "[here](data:text/html,<b>x</b>) ",
    "[again](/lab?reset) ",
    "[or here](http://hostile.invalid/page)\n\n",
    "$\\href{http://hostile.invalid/formula}{x}$ ", "and $x^2$\n\n",
    "# <details open ontoggle=\"document.got = 'ontoggle'\">\n\n",
    "```html\n</code></pre><img src='http://hostile.invalid/fence.png'>\n```\n",
)  # fmt: skip


@pytest.fixture(autouse=True)
def jp_asyncio_loop() -> None:
    """No loop of pytest-jupyter's here: Playwright's is this thread's."""


@pytest.fixture(autouse=True)
def jp_server_cleanup() -> None:
    """Nor a server in this process, whose end would need one."""


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    for package in ("playwright", "jupyterlab", "ipywidgets"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install shimmy-jupyter[browser]")
    if CHROMIUM is None:
        pytest.skip("chromium is not installed on this machine")
    shutil.rmtree(SCREENSHOTS, ignore_errors=True)
    with chromium() as found:
        yield found


@pytest.fixture(scope="package")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Beside the bundled model: "slow" talks until it is stopped, "long" does quickly, "rich" thinks and
    then answers in Markdown, "hostile" answers what should not come through.
    """
    folder = tmp_path_factory.mktemp("models")
    slow = random_gguf.Shape(layers=4, width=256, heads=8, head_width=32, hidden=1024)
    random_gguf.write(folder / "slow.gguf", slow, words=True, seed=3)
    random_gguf.write(folder / "long.gguf", LONG, words=True, seed=3)
    random_gguf.write_chain(folder / "rich.gguf", RICH, template=THINKS)
    random_gguf.write_chain(folder / "hostile.gguf", HOSTILE)
    return folder


@pytest.fixture(scope="package")
def lab(browser: Browser, models: Path) -> Iterator[Lab]:
    with running_lab(browser, environment={"SHIMMY_MODEL_PATHS": str(models)}) as running:
        yield running
