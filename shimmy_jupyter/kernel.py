"""What `%load_ext shimmy` wires together in a kernel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from IPython.core.interactiveshell import InteractiveShell
from jupyter_core.paths import jupyter_runtime_dir

from .config import home, kernel_environment, load_config, load_system_config, settings
from .notebook.client import Server, Transport, find_server
from .notebook.extension import load as load_magics
from .notebook.magics import Resolved


def load(shell: InteractiveShell) -> None:
    load_magics(shell, _find, _local, _resolve, kernel_environment().session)


def _find() -> Server | None:
    known = kernel_environment()
    return find_server(known.server_url, known.token, known.server_pid, Path(jupyter_runtime_dir()))


def _local() -> Transport:
    # The service's parts are only imported where there is no server to ask.
    from .local import LocalTransport

    return LocalTransport(settings(load_config(), system=load_system_config(), kernel=True))


def _resolve(
    body: dict[str, Any], profile: str, listed: Callable[[], dict[str, Any]]
) -> Resolved | None:
    """By the lock above the folder that the kernel works in, which is the notebook's."""
    from .models.pinning import Locks, merged

    locks = Locks(Path, home(), profile or kernel_environment().profile)
    found = locks.pinned(body["model"], listed)
    if found is None:
        return None
    return Resolved(merged(body, found.fields), found.note, found.warnings)
