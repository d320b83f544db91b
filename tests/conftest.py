"""For all layers: pytest-jupyter's server fixtures, which also run `async def` tests; and folders of
their own, so that what this machine has downloaded is not found and nothing is written beside it.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

pytest_plugins = ["pytest_jupyter.jupyter_server"]

_FOLDERS = ("HOME", "JUPYTER_DATA_DIR", "HF_HUB_CACHE", "OLLAMA_MODELS")
_KEPT = pytest.StashKey[tempfile.TemporaryDirectory[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_KEPT] = home = tempfile.TemporaryDirectory()
    Path(home.name, "home").mkdir()
    for name in _FOLDERS:
        os.environ[name] = str(Path(home.name, name.lower()))
    for name in ("HF_HOME", "HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE", "SHIMMY_MODEL_PATHS"):
        os.environ.pop(name, None)


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[_KEPT].cleanup()
