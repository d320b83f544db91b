"""Fixtures for all layers. Real parts wherever one is in reach; the fake backend for UI and faults."""

from __future__ import annotations

import pytest

pytest_plugins = ["pytest_jupyter.jupyter_server"]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
