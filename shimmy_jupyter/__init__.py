"""A local language model inside Jupyter. Importing this imports nothing heavy.

What there is for notebooks (`chat`, `stream`, `extract`, …) is in `shimmy_jupyter.api`, and here too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

__version__ = "0.1.0"

API = (
    "achat", "aclassify", "acomplete", "aembed", "aextract", "amodels", "astream", "atokenize", "chat",
    "classify", "complete", "embed", "extract", "models", "openai_client", "panel", "stream", "tokenize",
)  # fmt: skip
"""Taken from `shimmy_jupyter.api` when they are first needed; `models` only by `import shimmy`."""


def __getattr__(name: str) -> Any:
    if name in API and name != "models":  # which is a package of ours
        from . import api

        return getattr(api, name)
    if name in ("errors", "frames"):
        from importlib import import_module

        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *API])


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
