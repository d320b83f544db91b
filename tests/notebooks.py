"""Magics on a shell of their own, for tests that hand them a transport."""

from __future__ import annotations

import functools
from typing import Any

from IPython.core.interactiveshell import InteractiveShell
from IPython.testing.globalipapp import start_ipython

from shimmy_jupyter.notebook.board import Board
from shimmy_jupyter.notebook.extension import load
from shimmy_jupyter.notebook.magics import ShimmyMagics
from shimmy_jupyter.notebook.session import Session, Tools


@functools.cache
def shell() -> InteractiveShell:
    """The process's only one."""
    start_ipython()
    from IPython import get_ipython

    return get_ipython()  # type: ignore[no-any-return,no-untyped-call]


def session(transport: Any, tools: Tools | None = None) -> Session:
    """The transport is where requests go, whether it is a server's or the kernel's own."""
    return load(shell(), lambda: None, lambda: transport, tools)


def magics(transport: Any, tools: Tools | None = None) -> ShimmyMagics:
    made = session(transport, tools)
    (found,) = (c for c in made.shell.configurables if isinstance(c, ShimmyMagics))
    return found


def run(line: str, transport: Any) -> list[tuple[str, str]]:
    """What a line magic's command shows."""
    shown: list[tuple[str, str]] = []

    class Showing(Board):
        def show(self, text: str, page: str) -> None:
            shown.append((text, page))

    found = magics(transport)
    found.board = lambda: Showing(rich=False)  # type: ignore[method-assign]
    found.shimmy(line)
    return shown
