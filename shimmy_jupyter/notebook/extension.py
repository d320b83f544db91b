"""Puts the magics into an IPython shell and takes them out again, whole."""

from __future__ import annotations

from collections.abc import Callable

from IPython.core.interactiveshell import InteractiveShell

from . import completer
from .client import Connection, Server, Transport
from .magics import ShimmyMagics, questions_are_not_help
from .origin import Origin
from .remembered import Remembered
from .session import Session, Tools


def load(
    shell: InteractiveShell,
    find: Callable[[], Server | None],
    local: Callable[[], Transport],
    tools: Tools | None = None,
    session: str | None = None,
) -> Session:
    """Register one instance of the magics. Loading again replaces the one before, and forgets what was
    said.
    """
    unload(shell)
    origin = Origin(shell, session)
    connection = Connection(find, local, origin.headers)
    made = Session(shell, connection, origin, Remembered(shell), tools or Tools())
    shell.register_magics(ShimmyMagics(made, origin.check))
    shell.input_transformers_cleanup.append(questions_are_not_help)
    completer.install(shell, completer.Remembered(made.names_at_hand), made.variables)
    return made


def unload(shell: InteractiveShell) -> None:
    """Remove the magics, and what `%config`, completion and events know of them."""
    for loaded in list(shell.configurables):
        if isinstance(loaded, ShimmyMagics):
            loaded.session.close()
            shell.configurables.remove(loaded)
    for table in shell.magics_manager.magics.values():
        table.pop("shimmy", None)
        if isinstance(getattr(table.get("ai"), "__self__", None), ShimmyMagics):
            del table["ai"]
    shell.magics_manager.registry.pop(ShimmyMagics.__name__, None)
    while questions_are_not_help in shell.input_transformers_cleanup:
        shell.input_transformers_cleanup.remove(questions_are_not_help)
    completer.uninstall(shell)
