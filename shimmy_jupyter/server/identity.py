"""From the user that Jupyter has authenticated to the principal that is counted, allowed and recorded.

Limits, jobs and records are kept by a principal's name alone. So a name is taken whole or refused,
never shortened or cleaned, which would make two users one; and `local`, the name of whoever holds
the server's own token or password, is given to nobody else.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from jupyter_server.auth import User
from jupyter_server.auth.identity import (
    IdentityProvider,
    LegacyIdentityProvider,
    PasswordIdentityProvider,
)

from ..errors import AccessDenied
from ..types import Principal

LOCAL = Principal("local")

_LONGEST_NAME = 256
_MOST_GROUPS = 1024
_STOCK = (IdentityProvider, PasswordIdentityProvider, LegacyIdentityProvider)
_TOKEN_PATH = ("get_user", "_get_user", "get_user_token")
_UUID4 = re.compile(r"[0-9a-f]{12}4[0-9a-f]{3}[89ab][0-9a-f]{15}")


@dataclass
class GatewayUser(User):
    """Whom a gateway's token names; only `gateway.JWTIdentityProvider` makes these."""

    groups: tuple[str, ...] = ()
    admin: bool = False


def principal_of(
    user: Any, provider: IdentityProvider, *, token_authenticated: bool = False
) -> Principal:
    """Who a request is counted against. Reads nothing of the request itself.

    A hub's user and a gateway's have their names, groups and admin flag. Any other user is `local`
    where Jupyter's own providers do the authentication, as those invent names; where another
    provider does, its username counts, unless that was invented too: see `_invented`.
    `token_authenticated` is what Jupyter's token login has noted at the handler.

    Raises `AccessDenied` where nobody is signed in, and for names and groups that cannot be used.
    """
    if not user:
        raise AccessDenied("nobody is signed in")
    hub_user = getattr(user, "hub_user", None)
    if isinstance(hub_user, dict):
        groups = groups_of(hub_user.get("groups"))
        return Principal(_hub_name(hub_user), groups, hub_user.get("admin") is True, "hub")
    if isinstance(user, GatewayUser):
        return Principal(_own_name(user.username), groups_of(user.groups), user.admin, "gateway")
    if type(provider) in _STOCK or _invented(user, provider, token_authenticated):
        return LOCAL
    return Principal(_own_name(user.username), kind="provider")


def checked_name(name: object, what: str = "user name") -> str:
    """The same name. Raises `AccessDenied` unless it is 1 to 256 printable characters without
    spaces around them.
    """
    if (
        not isinstance(name, str)
        or not 0 < len(name) <= _LONGEST_NAME
        or not name.isprintable()
        or name != name.strip()
    ):
        raise AccessDenied(
            f"the {what} that this server was given for you cannot be used: it must have 1 to "
            f"{_LONGEST_NAME} characters, all printable, without spaces around them"
        )
    return name


def groups_of(value: object) -> tuple[str, ...]:
    """Each group once. Raises `AccessDenied` for what is no list of at most 1024 names: a group that
    were left out could be the one that a rule denies.
    """
    if value is None:
        return ()
    if not isinstance(value, list | tuple) or len(value) > _MOST_GROUPS:
        raise AccessDenied(
            "the groups that this server was given for you cannot be used: they must be a list of "
            f"at most {_MOST_GROUPS} names"
        )
    return tuple(dict.fromkeys(checked_name(group, "group") for group in value))


def _hub_name(hub_user: dict[str, Any]) -> str:
    # A hub's service may have the name of a user; no user's name has a slash.
    if hub_user.get("kind") == "service":
        return checked_name("service/" + checked_name(hub_user.get("name")))
    return _own_name(hub_user.get("name"))


def _own_name(name: object) -> str:
    checked = checked_name(name)
    if checked == LOCAL.name:
        raise AccessDenied(
            f"the user name {checked!r} cannot be used here: it stands for whoever holds this "
            "server's own token"
        )
    return checked


def _invented(user: Any, provider: IdentityProvider, token_authenticated: bool) -> bool:  # noqa: FBT001
    """Whether Jupyter's own token or password login made the user's name up.

    It did for a token that came in by the inherited way. A provider that only asks the inherited
    way when its own finds nobody cannot be told from outside, and a made-up name comes back in the
    login cookie; both are known by the name: a version 4 UUID, of somebody called "Anonymous" or
    whatever else, where the name can be edited or the provider changes how anonymous users look.
    """
    cls = type(provider)
    if token_authenticated and all(_inherited(cls, name) for name in _TOKEN_PATH):
        return True
    return _UUID4.fullmatch(str(user.username)) is not None and (
        str(user.name).startswith("Anonymous ")
        or "name" in getattr(provider, "updatable_fields", ())
        or not _inherited(cls, "generate_anonymous_user")
    )


def _inherited(cls: type[IdentityProvider], name: str) -> bool:
    return any(getattr(cls, name) is getattr(stock, name) for stock in _STOCK)
