"""What `%load_ext` wires together in a kernel."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from IPython.core.interactiveshell import InteractiveShell
from jupyter_core.paths import jupyter_runtime_dir

from .config import home, kernel_environment, load_config, load_system_config, settings
from .frames import register
from .notebook.board import follow
from .notebook.client import Connection, Server, Transport, find_server, say_inside
from .notebook.extension import load as load_magics
from .notebook.session import Resolved, Session, Tools

if TYPE_CHECKING:  # they are only needed by who calls from Python
    from .notebook.asking import Asker
    from .notebook.remote import AsyncConnection


_own: list[Any] = []
"""The service in this kernel, where it has one."""
_loaded: list[Session] = []
"""What the magics and the Python functions share, once the magics are loaded."""
_alone: list[Connection] = []
"""What the panel and the functions have without them."""


def load(shell: InteractiveShell) -> Session:
    tools = Tools(_resolve, _lock, _doctor, _versions, _names)
    session = load_magics(shell, _find, _local, tools, kernel_environment().session)
    _loaded[:] = [session]
    register(_framing)
    return session


def _framing() -> Any:
    from .framing import wiring

    return wiring()


def transport() -> Transport:
    """Where the panel asks. Raises `ServerUnreachable`."""
    if not _loaded and not _alone:
        _alone.append(Connection(_find, _local, _labels))
    return (_loaded[0].connection if _loaded else _alone[0]).transport()


def asker() -> tuple[Asker, AsyncConnection]:
    """For functions that are called from Python: through the same server as the magics, under the same
    rules. Where no model is named it is the server's default, whatever the magics have been told to use.
    """
    from .notebook.asking import Asker
    from .notebook.remote import AsyncConnection

    connection = AsyncConnection(_find, lambda: _said_local().asynchronous, _labels)

    async def prepare(body: dict[str, Any]) -> dict[str, Any]:
        for session in _loaded:
            session.origin.check()
        return await asyncio.to_thread(_pinned, body)

    return Asker(connection.transport, prepare=prepare), connection


def _labels() -> dict[str, str]:
    return _loaded[0].origin.headers() if _loaded else {}


def _pinned(body: dict[str, Any]) -> dict[str, Any]:
    found = _resolve(body, "", lambda: transport().get("shimmy/api/models"))
    return body if found is None else found.body


def _said_local() -> Any:
    if not _own:
        say_inside()
    return _local()


def _find() -> Server | None:
    known = kernel_environment()
    return find_server(known.server_url, known.token, known.server_pid, Path(jupyter_runtime_dir()))


def _local() -> Any:
    """One for all of this kernel's."""
    # The service's parts are only imported where there is no server to ask.
    from .local import LocalTransport

    if not _own or _own[0].closed:
        chosen = settings(load_config(), system=load_system_config(), kernel=True)
        _own[:] = [LocalTransport(chosen, _labels)]
    return _own[0]


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


def _names() -> list[str]:
    """Of the same lock."""
    from .models.pinning import Locks

    return Locks(Path, home(), None).names()


def _lock(model: str, alias: str, transport: Transport) -> list[str]:
    """Into the lock above the kernel's folder, or a new one there."""
    from .models.locking import lock

    def read(id: str) -> dict[str, Any]:
        job = transport.post(f"shimmy/api/models/{id}/verify", {})["job"]
        return follow(transport, job, lambda _look: None)

    listing: Any = transport.get("shimmy/api/models")
    now = datetime.now(UTC)
    return lock(model, alias, listing, read, now, start=Path.cwd(), home=home())


def _doctor() -> list[str]:
    from .cli.checklist import table
    from .doctor import checks, this_machine

    return list(table(checks(this_machine())))


def _versions() -> list[str]:
    from . import __version__

    found = [f"shimmy-jupyter {__version__}"]
    for name in ("llama-cpp-python", "jupyter-server", "ipython"):
        try:
            found.append(f"{name} {metadata.version(name)} in this kernel")
        except metadata.PackageNotFoundError:
            found.append(f"{name} is not installed in this kernel")
    return found
