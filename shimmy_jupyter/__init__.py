"""A local language model inside Jupyter. Importing this imports nothing heavy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

__version__ = "0.1.0"


def _jupyter_server_extension_points() -> list[dict[str, Any]]:
    from .server.app import ShimmyApp

    return [{"module": "shimmy_jupyter", "app": ShimmyApp}]


def load_ipython_extension(shell: InteractiveShell) -> None:
    """`%load_ext shimmy_jupyter`, or `%load_ext shimmy`."""
    from .kernel import load

    load(shell)


def unload_ipython_extension(shell: InteractiveShell) -> None:
    from .notebook.extension import unload

    unload(shell)
