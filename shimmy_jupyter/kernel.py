"""What `%load_ext shimmy` wires together in a kernel."""

from __future__ import annotations

from pathlib import Path

from IPython.core.interactiveshell import InteractiveShell
from jupyter_core.paths import jupyter_runtime_dir

from .config import kernel_environment, load_config, settings
from .notebook.client import Server, Transport, find_server
from .notebook.extension import load as load_magics


def load(shell: InteractiveShell) -> None:
    load_magics(shell, _find, _local)


def _find() -> Server | None:
    known = kernel_environment()
    return find_server(known.server_url, known.token, known.server_pid, Path(jupyter_runtime_dir()))


def _local() -> Transport:
    # The service's parts are only imported where there is no server to ask.
    from .local import LocalTransport

    return LocalTransport(settings(load_config()))
