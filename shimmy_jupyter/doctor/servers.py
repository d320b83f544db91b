"""Checks of Jupyter's servers: that this extension is loaded, and who can reach them.

Nothing here has a token or a password in it, only whether there is one.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from traitlets.config import Config
from traitlets.config.loader import LazyConfigValue

from .look import Level, Machine
from .verdict import Check

_NAME = "shimmy_jupyter"
_ENABLE = "jupyter server extension enable shimmy_jupyter"
_HUB = re.compile("jupyterhub|labhub")
_OPTIONS = {"user": " --user", "system": " --system"}


def extension(look: Machine, config: Config | None) -> Check:
    """As a server decides it: its own setting, else the first level whose files name the extension."""
    name = "server extension"
    said = _setting(config, "ServerApp", "jpserver_extensions") or {}
    chosen = said.get(_NAME) if isinstance(said, dict) else None
    if chosen is not None and not chosen:
        action = "take shimmy_jupyter out of ServerApp.jpserver_extensions"
        return Check(name, "fail", "the server's configuration disables it", action)
    found = [(level, *named) for level in look.levels if (named := _named(level)) is not None]
    refusing = [(level, file) for level, file, enabled in found if not enabled]
    if chosen is None and not found:
        return Check(name, "fail", "no configuration file enables it", _ENABLE)
    if chosen is None and not found[0][2]:
        level, file = refusing[0]
        action = _ENABLE + _OPTIONS.get(level.name, "")
        return Check(name, "fail", f"{file} ({level.name}) disables it", action)
    if refusing:
        level, file = refusing[0]
        detail = f"it is enabled, though {file} ({level.name}) disables it"
        return Check(name, "warn", detail, "correct the one that is wrong")
    return Check(name, "ok", "it is enabled")


def _named(level: Level) -> tuple[str, bool] | None:
    """What a level's files say of the extension, the last one counting, and which says it."""
    folder = level.folder
    files = [*sorted((folder / "jupyter_server_config.d").glob("*.json"))]
    found = None
    for file in [*files, folder / "jupyter_server_config.json"]:
        try:
            said = json.loads(file.read_text(encoding="utf-8"))["ServerApp"]["jpserver_extensions"]
            found = (file.name, bool(said[_NAME])) if said[_NAME] is not None else None
        except (OSError, ValueError, KeyError, TypeError):
            continue  # a server passes over files that are not there, are no JSON, or say nothing of it
    return found


def _setting(config: Config | None, section: str, key: str) -> Any:
    """What a file sets; None where none does."""
    if config is None or section not in config or key not in config[section]:
        return None
    value = config[section][key]
    return value.get_value({}) if isinstance(value, LazyConfigValue) else value


@dataclass(frozen=True, slots=True)
class _Server:
    """Who can reach a server, and how they must show who they are. `identity` names what asks them,
    where that is neither a token nor a password.
    """

    ip: str
    secure: bool
    token: bool
    password: bool
    identity: str | None = None
    socket: bool = False

    @property
    def local(self) -> bool:
        return self.socket or _loopback(self.ip)

    @property
    def asks(self) -> str | None:
        if self.identity is not None:
            return self.identity
        kinds = [name for name in ("token", "password") if getattr(self, name)]
        return f"a {' or a '.join(kinds)}" if kinds else None

    @property
    def place(self) -> str:
        if self.socket:
            return "a socket of this machine"
        return "all addresses" if self.ip in {"", "*", "0.0.0.0", "::"} else self.ip  # noqa: S104


def _loopback(ip: str) -> bool:
    try:
        return ip == "localhost" or ipaddress.ip_address(ip).is_loopback
    except ValueError:  # a name; or nothing, or *, which are all addresses
        return False


def running(look: Machine) -> list[Check]:
    """Of each server of this account. Jupyter's own list deletes records, so they are read here."""
    return [_judged(f"server {name}", server) for name, server in _records(look)]


def _records(look: Machine) -> Iterator[tuple[str, _Server]]:
    for file in sorted(look.runtime.glob("jpserver-*.json")):
        try:
            info = json.loads(file.read_text(encoding="utf-8"))
            pid, port = int(info["pid"]), int(info.get("port") or 0)
            process = look.process(pid)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # being written, or not a server's
        if process is None:
            continue
        # The record calls all addresses "localhost", so what the process has opened comes first.
        opened = [ip for ip, its in process.listening if its == port]
        if process.command and not opened and not info.get("sock"):
            continue  # left over, and its number is another process's by now
        hub = any(_HUB.search(Path(word).name) for word in process.command[:3])
        ips = opened or [str(info.get("hostname", ""))]
        yield (
            str(port or pid),
            _Server(
                ip=next((ip for ip in ips if not _loopback(ip)), ips[0]),
                secure=bool(info.get("secure")),
                token=bool(info.get("token")),
                password=bool(info.get("password")),
                identity="JupyterHub" if hub else None,
                socket=bool(info.get("sock")),
            ),
        )


def configured(config: Config | None) -> Check:
    """Of the next server, as far as the configuration says; by default it makes itself a token."""
    name = "address"
    if config is None:
        return Check(name, "skip", "the configuration cannot be read")
    tokens = [
        _setting(config, s, "token") for s in ("IdentityProvider", "PasswordIdentityProvider")
    ]
    tokens += [_setting(config, "ServerApp", "token")]
    given = [token for token in tokens if token is not None]
    passwords = [
        _setting(config, "IdentityProvider", "hashed_password"),
        _setting(config, "PasswordIdentityProvider", "hashed_password"),
        _setting(config, "ServerApp", "password"),
    ]
    identity = _setting(config, "ServerApp", "identity_provider_class")
    ip = _setting(config, "ServerApp", "ip")
    server = _Server(
        ip="localhost" if ip is None else str(ip),
        secure=bool(_setting(config, "ServerApp", "certfile")),
        token=any(given) if given else not any(passwords),
        password=any(passwords),
        identity=None if identity is None else "an identity provider of its own",
        socket=bool(_setting(config, "ServerApp", "sock")),
    )
    return _judged(name, server)


def _judged(name: str, server: _Server) -> Check:
    if server.asks is None:
        detail = f"listens on {server.place} and asks nobody who they are: whoever comes runs code"
        action = 'remove token = "" from the configuration, or set one: jupyter server password'
        return Check(name, "fail", detail, action)
    if not server.local and not server.secure:
        detail = f"listens on {server.place} without TLS: what is sent can be read on the way"
        action = (
            "listen on localhost behind a proxy with TLS, or set ServerApp.certfile and keyfile"
        )
        return Check(name, "warn", detail, action)
    tls = " with TLS" if server.secure else ""
    return Check(name, "ok", f"listens on {server.place}{tls} and asks for {server.asks}")
