"""Who a request is counted against. Cases:

nobody; a hub's user, its groups and admin flag, of the wrong types, without a name, a service; a
gateway's user; stock providers, by token, cookie, password and without authentication; another
provider's user; its subclasses that inherit the token login, ask it last, name everybody's token, or
keep made-up names in a cookie, renamed or not; usernames that are UUIDs but not made up; names that
are empty, too long, unprintable, padded, no text, or `local`; groups that are none; what no name does:
change.
"""

from __future__ import annotations

import uuid
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jupyter_server.auth import User
from jupyter_server.auth.identity import (
    IdentityProvider,
    LegacyIdentityProvider,
    PasswordIdentityProvider,
)

from shimmy_jupyter.errors import AccessDenied
from shimmy_jupyter.guard.guard import Guard, Rules
from shimmy_jupyter.server.handlers.base import ShimmyHandler
from shimmy_jupyter.server.identity import (
    LOCAL,
    GatewayUser,
    checked_name,
    groups_of,
    principal_of,
)
from shimmy_jupyter.types import Principal

STOCK = [IdentityProvider, PasswordIdentityProvider, LegacyIdentityProvider]
BAD_NAMES = [
    "",
    "x" * 257,
    "a\nb",
    "a\x00",
    "a\u202eb",
    "a\u200bb",
    "\ud800",
    " ada",
    "ada ",
    "a\tb",
]


class Named(IdentityProvider):
    """One of its own: every request's user is its own affair."""

    def get_user(self, handler: Any) -> Any:
        return User("ada")


class NamedPassword(PasswordIdentityProvider):
    def process_login_form(self, handler: Any) -> Any:
        return User("ada")


def anonymous(provider: IdentityProvider) -> User:
    log = SimpleNamespace(debug=lambda *_: None)
    return provider.generate_anonymous_user(SimpleNamespace(log=log))  # type: ignore[arg-type]


def hub(**model: Any) -> User:
    user = User("whoever")
    user.hub_user = model  # type: ignore[attr-defined]
    return user


@pytest.mark.parametrize("user", [None, ""])
@pytest.mark.parametrize("provider", [*STOCK, Named])
def test_nobody_is_nobody(user: Any, provider: Any) -> None:
    with pytest.raises(AccessDenied, match="nobody is signed in"):
        principal_of(user, provider())


class TestHub:
    def test_a_user(self) -> None:
        user = hub(name="ada", groups=["staff", "staff", "ml"], admin=True, kind="user")
        expected = Principal("ada", ("staff", "ml"), admin=True, kind="hub")
        for provider in (*STOCK, Named):
            assert principal_of(user, provider(), token_authenticated=True) == expected

    @pytest.mark.parametrize("admin", [None, 0, 1, "false", "true", [1]])
    def test_only_true_makes_an_administrator(self, admin: Any) -> None:
        assert principal_of(hub(name="ada", admin=admin), Named()) == Principal("ada", kind="hub")

    @pytest.mark.parametrize("model", [{}, {"name": None}, {"name": 7}, {"name": ""}])
    def test_without_a_name(self, model: dict[str, Any]) -> None:
        with pytest.raises(AccessDenied, match="user name"):
            principal_of(hub(**model), Named())

    def test_a_service_is_not_the_user_of_its_name(self) -> None:
        service = principal_of(hub(name="ada", kind="service"), Named())
        assert service == Principal("service/ada", kind="hub")
        assert principal_of(hub(name="local", kind="service"), Named()).name == "service/local"
        with pytest.raises(AccessDenied):
            principal_of(hub(name="", kind="service"), Named())

    @pytest.mark.parametrize("hub_user", [None, "ada", ["ada"], 7])
    def test_what_is_no_model_is_none(self, hub_user: Any) -> None:
        user = User("bob")
        user.hub_user = hub_user  # type: ignore[attr-defined]
        assert principal_of(user, Named()) == Principal("bob", kind="provider")
        assert principal_of(user, IdentityProvider()) is LOCAL


def test_a_gateways_user() -> None:
    user = GatewayUser("ada", groups=("staff",), admin=True)
    expected = Principal("ada", ("staff",), admin=True, kind="gateway")
    for provider in (*STOCK, Named):
        for by_token in (True, False):
            assert principal_of(user, provider(), token_authenticated=by_token) == expected
    # A UUID that a gateway vouches for is nobody's invention.
    sub = uuid.uuid4().hex
    assert principal_of(GatewayUser(sub), Named()).name == sub


@pytest.mark.parametrize("provider", STOCK)
@pytest.mark.parametrize("by_token", [True, False])
def test_stock_providers_make_names_up(provider: Any, by_token: bool) -> None:
    for user in (User("3f1c9d"), User("anonymous"), anonymous(provider())):
        assert principal_of(user, provider(), token_authenticated=by_token) is LOCAL


class TestOtherProviders:
    def test_their_names_count(self) -> None:
        assert principal_of(User("ada"), Named()) == Principal("ada", kind="provider")
        assert principal_of(User("ada"), NamedPassword()) == Principal("ada", kind="provider")

    def test_their_own_tokens_count(self) -> None:
        """They say that a token did it, as Jupyter asks them to, but not Jupyter's own way."""

        class OwnToken(IdentityProvider):
            async def get_user_token(self, handler: Any) -> Any:
                return User("ada")

        for provider in (Named(), OwnToken()):
            found = principal_of(User("ada"), provider, token_authenticated=True)
            assert found == Principal("ada", kind="provider")

    @pytest.mark.parametrize("base", STOCK)
    def test_the_inherited_token_is_nobodys(self, base: Any) -> None:
        class Branded(base):  # type: ignore[misc]
            def identity_model(self, user: Any) -> Any:
                return {"name": "somebody"}

        user = User("ada")  # whose cookie came with the token
        for found in (user, anonymous(Branded())):
            assert principal_of(found, Branded(), token_authenticated=True) is LOCAL
        assert principal_of(user, Branded()).name == "ada"

    def test_a_token_for_everybody_is_still_that(self) -> None:
        class OneName(IdentityProvider):
            def generate_anonymous_user(self, handler: Any) -> User:
                return User("guest")

        assert principal_of(User("guest"), OneName(), token_authenticated=True) is LOCAL
        assert principal_of(User("guest"), OneName()).name == "guest"

    def test_asking_the_inherited_way_last(self) -> None:
        provider = Named()
        assert principal_of(anonymous(provider), provider, token_authenticated=True) is LOCAL
        assert principal_of(anonymous(provider), provider) is LOCAL  # kept in a cookie

    def test_made_up_names_that_were_edited(self) -> None:
        for provider in (NamedPassword(), type("Mine", (LegacyIdentityProvider,), {})()):
            user = anonymous(provider)
            user.name = user.display_name = "Ada"
            assert principal_of(user, provider) is LOCAL

    def test_made_up_names_that_look_otherwise(self) -> None:
        class Guests(IdentityProvider):
            def generate_anonymous_user(self, handler: Any) -> User:
                return User(uuid.uuid4().hex, "Guest")

        assert principal_of(User(uuid.uuid4().hex, "Guest"), Guests()) is LOCAL

    @pytest.mark.parametrize(
        "username",
        [
            uuid.UUID(int=5, version=4).hex,  # theirs, with a name that they have
            str(uuid.uuid4()),
            uuid.UUID(int=5, version=5).hex,
            uuid.uuid4().hex.upper() + "A",
            uuid.uuid4().hex + "0",
        ],
    )
    def test_ids_that_are_not_made_up(self, username: str) -> None:
        found = principal_of(User(username, "Ada"), Named(), token_authenticated=True)
        assert found == Principal(username, kind="provider")


class TestNames:
    @pytest.mark.parametrize("name", [*BAD_NAMES, None, 7, True, b"ada", ["ada"], {"a": 1}])
    def test_refused(self, name: Any) -> None:
        with pytest.raises(AccessDenied, match="cannot be used") as caught:
            checked_name(name)
        assert caught.value.message.isprintable()
        assert len(caught.value.message) < 300
        with pytest.raises(AccessDenied):
            principal_of(hub(name=name), Named())

    @pytest.mark.parametrize("name", [name for name in BAD_NAMES if name])
    def test_of_every_kind(self, name: str) -> None:
        for user, provider in ((User(name), Named()), (GatewayUser(name), Named())):
            with pytest.raises(AccessDenied):
                principal_of(user, provider)

    def test_nobody_else_is_local(self) -> None:
        for user in (hub(name="local"), GatewayUser("local"), User("local")):
            with pytest.raises(AccessDenied, match="server's own token"):
                principal_of(user, Named())
        for near in ("Local", "local.", "ｌocal"):
            assert principal_of(User(near), Named()).name == near

    @pytest.mark.parametrize(
        "name", ["a", "x" * 256, "ada@example.org", "Ada Lovelace", "李", "a/b"]
    )
    def test_taken_as_they_are(self, name: str) -> None:
        assert checked_name(name) is name

    @given(st.text(max_size=300))
    def test_no_name_becomes_another(self, name: str) -> None:
        try:
            found = checked_name(name)
        except AccessDenied:
            assert not name or len(name) > 256 or not name.isprintable() or name != name.strip()
        else:
            assert found == name


class TestGroups:
    @pytest.mark.parametrize("none", [None, [], ()])
    def test_none(self, none: Any) -> None:
        assert groups_of(none) == ()

    def test_each_once_in_order(self) -> None:
        assert groups_of(["b", "a", "b"]) == ("b", "a")
        assert len(groups_of([str(n) for n in range(1024)])) == 1024

    @pytest.mark.parametrize(
        "groups",
        [
            "staff",
            {"staff": 1},
            7,
            True,
            ["ok", None],
            [["a"]],
            [""],
            ["a\n"],
            ["x" * 257],
            ["a"] * 1025,
        ],
    )
    def test_none_is_left_out(self, groups: Any) -> None:
        with pytest.raises(AccessDenied, match="group"):
            groups_of(groups)
        with pytest.raises(AccessDenied, match="group"):
            principal_of(hub(name="ada", groups=groups), Named())


def test_the_handler_asks_with_what_jupyter_noted() -> None:
    class Branded(IdentityProvider):
        pass

    handler = ShimmyHandler.__new__(ShimmyHandler)
    handler.application = SimpleNamespace(
        settings={
            "identity_provider": Branded(),
            "shimmy_service": SimpleNamespace(guard=Guard(Rules(admins=frozenset({"eve"})))),
        }
    )  # type: ignore[assignment]
    handler._current_user = User("ada")
    assert handler.principal == Principal("ada", kind="provider")
    handler._token_authenticated = True  # type: ignore[attr-defined]
    assert handler.principal is LOCAL
    del handler._token_authenticated
    handler._current_user = User("eve")
    assert handler.principal.admin
