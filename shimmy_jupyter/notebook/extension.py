"""Puts the magics into an IPython shell and takes them out again, whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from IPython.core.interactiveshell import InteractiveShell
from traitlets import TraitError
from traitlets.config.loader import DeferredConfig

from . import completer, questions
from .client import Connection, Server, Transport
from .display import clean
from .magics import ShimmyMagics
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
    _drop_rejected(shell)
    origin = Origin(shell, session)
    connection = Connection(find, local, origin.headers)
    made = Session(shell, connection, origin, Remembered(shell), tools or Tools())
    shell.register_magics(ShimmyMagics(made, origin.check))
    questions.install(shell, questions.questions_are_not_help)
    completer.install(shell, completer.Remembered(made.names_at_hand), made.variables)
    return made


def _drop_rejected(shell: InteractiveShell) -> None:
    """`%config` puts a value into the shell's configuration before it is refused, and there it would
    keep the magics from ever being made again.
    """
    section = shell.config.get(ShimmyMagics.__name__, {})
    traits: dict[str, Any] = ShimmyMagics.class_traits(config=True)
    for name in [name for name in traits if name in section]:
        trait, value = traits[name], section[name]
        if (value is None and trait.allow_none) or isinstance(value, DeferredConfig):
            continue
        try:
            trait.validate(None, value)
        except TraitError:
            del section[name]
            said = f"{ShimmyMagics.__name__}.{name} = {value!r}"
            print(f"shimmy: {clean(said)[:200]} is not taken: {name} cannot have this value")


def unload(shell: InteractiveShell) -> None:
    """Remove the magics, and what `%config`, completion and events know of them."""
    for loaded in list(shell.configurables):
        if isinstance(loaded, ShimmyMagics):
            loaded.session.close()
            shell.configurables.remove(loaded)
    for kind, table in shell.magics_manager.magics.items():
        table.pop("shimmy", None)
        ours = getattr(table.get("ai"), "__self__", None)
        if isinstance(ours, ShimmyMagics):
            del table["ai"]
            if kind in ours.session.borrowed:
                table["ai"] = ours.session.borrowed[kind]
    shell.magics_manager.registry.pop(ShimmyMagics.__name__, None)
    questions.uninstall(shell)
    completer.uninstall(shell)
