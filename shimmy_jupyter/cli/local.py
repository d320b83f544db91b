"""What commands share: the service in this process, and a line that says how far things are."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

import click
from traitlets import TraitError

from ..errors import ShimmyError


class Progress:
    """One line that changes on a terminal, else a line for each thing, on standard error."""

    def __init__(self) -> None:
        self.terminal = sys.stderr.isatty()

    def say(self, text: str) -> None:
        click.echo(f"\r\x1b[K{text} …" if self.terminal else text, err=True, nl=not self.terminal)

    def end(self) -> None:
        if self.terminal:
            click.echo("\r\x1b[K", err=True, nl=False)


class Local:
    """The service in this process; its errors become the command's."""

    def __enter__(self) -> Any:
        from ..config import load_config, load_system_config, settings
        from ..local import LocalTransport

        try:
            chosen = settings(load_config(), system=load_system_config(), kernel=True)
        except TraitError as error:
            raise click.ClickException(f"in Jupyter's configuration: {error}") from error
        except Exception as error:  # a configuration file is a program of somebody else's
            from ..doctor.checks import where

            raise click.ClickException(f"in Jupyter's configuration: {where(error)}") from error
        self._transport = LocalTransport(chosen)
        return self._transport

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._transport.close()
        if isinstance(error, KeyboardInterrupt):
            click.echo("stopped", err=True)
            raise click.exceptions.Exit(130) from None
        if isinstance(error, ShimmyError):
            field = f" (field {error.param!r})" if error.param else ""
            raise click.ClickException(f"{error.message}{field} [{error.code}]") from None
