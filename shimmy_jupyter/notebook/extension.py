"""Puts the magics into an IPython shell and takes them out again, whole."""

from __future__ import annotations

from collections.abc import Callable

from IPython.core.interactiveshell import InteractiveShell

from .client import Connection, Server, Transport
from .magics import Resolve, ShimmyMagics, as_it_is, questions_are_not_help
from .origin import Origin


def load(
    shell: InteractiveShell,
    find: Callable[[], Server | None],
    local: Callable[[], Transport],
    resolve: Resolve = as_it_is,
    session: str | None = None,
) -> None:
    """Register one instance of the magics. Loading again replaces the one before."""
    unload(shell)
    origin = Origin(shell, session)
    connection = Connection(find, local, origin.headers)
    shell.register_magics(ShimmyMagics(shell, connection, resolve, origin.check))
    shell.input_transformers_cleanup.append(questions_are_not_help)


def unload(shell: InteractiveShell) -> None:
    """Remove the magics and what `%config` knows of them."""
    for table in shell.magics_manager.magics.values():
        table.pop("shimmy", None)
    shell.magics_manager.registry.pop(ShimmyMagics.__name__, None)
    while questions_are_not_help in shell.input_transformers_cleanup:
        shell.input_transformers_cleanup.remove(questions_are_not_help)
    shell.configurables[:] = [c for c in shell.configurables if not isinstance(c, ShimmyMagics)]
