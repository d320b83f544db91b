"""An administrator's values are ceilings, whatever a user's file says.

Cases: every trait that has a rule, loosened by the user; a user's stricter value; what the system does not
set; limits and rules as layers; who administers; values that are wrong, named; real files in a system's
folder and a user's, as a server and a kernel read them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from traitlets import TraitError
from traitlets.config import Config

from shimmy_jupyter.config import files, load_config, load_system_config, settings
from shimmy_jupyter.config.layers import STRICTER, bounded, limit_table, locked, policy
from shimmy_jupyter.config.traits import ShimmyAudit, ShimmyLimits, ShimmyModels, ShimmyPolicy
from shimmy_jupyter.core.limits import NAMES, Limits, effective
from shimmy_jupyter.core.policy import FEATURES, ceiling, decide, feature
from shimmy_jupyter.types import Principal

ANN, ROOT = Principal("ann"), Principal("root", admin=True)

LOOSENED: list[tuple[type[Any], str, Any, Any, Any]] = [
    (ShimmyModels, "roots", ["/srv"], ["/home/ann"], ["/srv"]),
    (ShimmyModels, "search", ["system"], ["ollama", "system"], ["system"]),
    (ShimmyModels, "probe", True, False, True),
    (ShimmyModels, "verify", "always", "changed", "always"),
    (ShimmyModels, "memory_check", True, False, True),
    (ShimmyModels, "memory_reserve", 1 << 30, 0, 1 << 30),
    (ShimmyModels, "memory_budget", 1 << 30, 0, 1 << 30),
    (ShimmyModels, "memory_budget", 1 << 30, 1 << 40, 1 << 30),
    (ShimmyModels, "idle_unload", 60.0, 0.0, 60.0),
    (ShimmyModels, "idle_unload", 60.0, 1e9, 60.0),
    (ShimmyModels, "allow_pull", False, True, False),
    (ShimmyModels, "hub", "https://hub.example.org", "https://evil.example", "https://hub.example.org"),
    (ShimmyModels, "pull_hosts", ["a.example"], ["a.example", "*"], ["a.example"]),
    (ShimmyModels, "pull_hosts", [], ["evil.example"], []),
    (ShimmyLimits, "max_request_size", 1 << 20, "1GB", 1 << 20),
    (ShimmyPolicy, "admins", ["root"], ["root", "ann"], ["root"]),
    (ShimmyPolicy, "admin_groups", ["ops"], ["users"], ["ops"]),
    (ShimmyPolicy, "allow_in_kernel", False, True, False),
    (ShimmyAudit, "enabled", True, False, True),
    (ShimmyAudit, "path", "/var/ledger.sqlite", "/dev/null", "/var/ledger.sqlite"),
    (ShimmyAudit, "record_content", True, False, True),
    (ShimmyAudit, "record_content", False, True, False),
    (ShimmyAudit, "fail_closed", True, False, True),
    (ShimmyAudit, "durable", True, False, True),
    (ShimmyAudit, "retention", 30, 1, 30),
]  # fmt: skip
"""Section, trait, the system's value, a user's, and what holds."""


def of(kind: type[Any], name: str, value: Any) -> Config:
    return Config({kind.__name__: {name: value}})


@pytest.mark.parametrize(("kind", "name", "system", "user", "holds"), LOOSENED)
def test_loosened_in_vain(kind: type[Any], name: str, system: Any, user: Any, holds: Any) -> None:
    merged, ceiling = of(kind, name, user), of(kind, name, system)
    assert getattr(bounded(kind, merged, ceiling), name) == holds
    assert getattr(bounded(kind, merged, Config()), name) == getattr(kind(config=merged), name)


def test_each_rule_is_tried() -> None:
    assert {(kind, name) for kind, name, *_ in LOOSENED} == {
        (kind, name) for kind, rules in STRICTER.items() for name in rules
    }
    traits = {(kind, name) for kind in STRICTER for name in kind.class_trait_names(config=True)}
    layered = {(ShimmyLimits, name) for name in (*NAMES, "groups", "shared")}
    layered |= {(ShimmyPolicy, name) for name in ("rules", "ceilings", "features")}
    assert traits == {(kind, name) for kind, rules in STRICTER.items() for name in rules} | layered


@pytest.mark.parametrize(
    ("kind", "name", "system", "user"),
    [
        (ShimmyModels, "allow_pull", True, False),
        (ShimmyModels, "memory_budget", 1 << 30, 1 << 20),
        (ShimmyModels, "search", ["ollama", "system"], ["system"]),
        (ShimmyLimits, "max_request_size", 1 << 20, 1 << 10),
        (ShimmyPolicy, "allow_in_kernel", True, False),
        (ShimmyAudit, "fail_closed", False, True),
    ],
)
def test_a_user_may_be_stricter(kind: type[Any], name: str, system: Any, user: Any) -> None:
    assert getattr(bounded(kind, of(kind, name, user), of(kind, name, system)), name) == user


class TestLayers:
    @pytest.mark.parametrize("name", NAMES)
    def test_each_limit(self, name: str) -> None:
        system, user = of(ShimmyLimits, name, 5), of(ShimmyLimits, name, 500)
        for given, holds in (
            (user, 5),
            (of(ShimmyLimits, name, None), 5),
            (of(ShimmyLimits, name, 2), 2),
        ):
            tables = settings(given, {}, system=system).guard.limits
            assert getattr(effective(tables, Limits(), ANN)[0].limits, NAMES[name]) == holds
        assert set(locked(system)) == {name}
        assert settings(user, {}).guard.locked == {}

    def test_groups_and_budgets(self) -> None:
        section = {"groups": {"x": {"max_queued": 5}}, "shared": {"x": {"max_tokens_per_day": 9}}}
        hostile = {
            "groups": {"x": {"max_queued": 500}, "y": {"max_queued": 500}},
            "shared": {},
            "max_queued": 500,
        }
        tables = settings(
            Config({"ShimmyLimits": hostile}), {}, system=Config({"ShimmyLimits": section})
        ).guard.limits
        own, shared = effective(tables, Limits(), Principal("ann", ("x", "y")))
        assert own.limits.queued == 5
        assert shared.limits.tokens_per_day == 9

    def test_rules_ceilings_and_features(self) -> None:
        system = Config({"ShimmyPolicy": {
            "rules": [{"deny": "*-70b"}], "ceilings": {"n": 2}, "features": ["chat"],
        }})  # fmt: skip
        user = Config({"ShimmyPolicy": {
            "rules": [{"allow": "*"}], "ceilings": {"n": 200}, "features": list(FEATURES),
        }})  # fmt: skip
        policies = settings(user, {}, system=system).guard.policies
        assert not decide(policies, ROOT, "use", "x-70b").allowed
        assert decide(policies, ANN, "use", "x").allowed
        assert ceiling(policies, "n") == 2
        assert [name for name in FEATURES if feature(policies, name).allowed] == ["chat"]

    @pytest.mark.parametrize("section", [{"rules": []}, {"admins": []}, {"allow_in_kernel": True}])
    def test_where_the_system_has_a_policy_it_says_who_administers(self, section: Any) -> None:
        user = Config({"ShimmyPolicy": {"admins": ["ann"], "admin_groups": ["x"]}})
        guard = settings(user, {}, system=Config({"ShimmyPolicy": section})).guard
        assert (guard.admins, guard.admin_groups) == (frozenset(), frozenset())
        alone = settings(user, {}).guard
        assert (alone.admins, alone.admin_groups) == ({"ann"}, {"x"})

    @pytest.mark.parametrize("name", ["offline", "bind_localhost_only"])
    def test_of_the_extension(self, name: str) -> None:
        off, on = Config({"ShimmyApp": {name: False}}), Config({"ShimmyApp": {name: True}})
        assert getattr(settings(off, {}, system=on), name)
        assert getattr(settings(on, {}, system=off), name)
        assert not getattr(settings(off, {}, system=Config()), name)


@pytest.mark.parametrize(
    ("section", "given", "named"),
    [
        ("ShimmyPolicy", {"rules": [{}]}, "rules[0]"),
        ("ShimmyPolicy", {"rules": [{"allow": "*"}, {"allow": "*", "deny": "*"}]}, "rules[1]"),
        ("ShimmyPolicy", {"rules": [{"deny": "*", "action": "use"}]}, "'action'"),
        ("ShimmyPolicy", {"rules": [{"deny": "*", "actions": ["fly"]}]}, "'fly'"),
        ("ShimmyPolicy", {"rules": [{"deny": 5}]}, "patterns"),
        ("ShimmyPolicy", {"rules": [{"deny": "*", "users": 5}]}, "users"),
        ("ShimmyPolicy", {"rules": [{"deny": "*", "groups": [5]}]}, "groups"),
        ("ShimmyPolicy", {"rules": [{"deny": "*", "admin": "no"}]}, "admin"),
        ("ShimmyPolicy", {"ceilings": {"speed": 1}}, "ceilings"),
        ("ShimmyPolicy", {"ceilings": {"n": -1}}, "ceilings"),
        ("ShimmyPolicy", {"features": ["telepathy"]}, "features"),
        ("ShimmyLimits", {"max_queued": -1}, "max_queued"),
        ("ShimmyLimits", {"max_seconds": 0}, "max_seconds"),
        ("ShimmyLimits", {"groups": {"x": {"max_fun": 1}}}, "max_fun"),
        ("ShimmyLimits", {"groups": {"x": {"max_queued": -1}}}, "max_queued"),
        ("ShimmyLimits", {"shared": {"x": {"max_prompt_tokens": 1}}}, "max_prompt_tokens"),
        ("ShimmyAudit", {"retention": 0}, "retention"),
    ],
)
def test_what_is_wrong_is_named(section: str, given: dict[str, Any], named: str) -> None:
    for user, system in ((given, {}), ({}, given)):
        with pytest.raises(TraitError) as caught:
            settings(Config({section: user}), {}, system=Config({section: system}))
        assert named in str(caught.value)


def test_texts_or_lists_of_them() -> None:
    made = policy(ShimmyPolicy(rules=[{"deny": ["a", "b"], "users": "ann", "actions": "use"}]))
    (rule,) = made.rules
    assert (rule.models, rule.users, rule.actions) == (("a", "b"), ("ann",), ("use",))
    assert limit_table(ShimmyLimits(max_queued=3)).default == Limits(queued=3)


ADMINISTRATOR = """
c.ShimmyPolicy.rules = [{"deny": "*-70b"}]
c.ShimmyPolicy.allow_in_kernel = False
c.ShimmyLimits.max_tokens_per_day = 100
c.ShimmyAudit.fail_closed = True
c.ShimmyModels.allow_pull = False
c.ShimmyApp.offline = True
"""
HOSTILE = """
c.ShimmyPolicy.rules = []
c.ShimmyPolicy.admins = ["ann"]
c.ShimmyPolicy.allow_in_kernel = True
c.ShimmyLimits.max_tokens_per_day = None
c.ShimmyAudit.enabled = False
c.ShimmyAudit.fail_closed = False
c.ShimmyModels.allow_pull = True
c.ShimmyApp.offline = False
"""


class TestFiles:
    @pytest.fixture(
        params=["jupyter_config", "jupyter_server_config", "jupyter_shimmy_jupyter_config"]
    )
    def written(self, request: Any, tmp_path: Path, monkeypatch: Any) -> None:
        system, user = tmp_path / "etc", tmp_path / "home"
        for folder, text in ((system, ADMINISTRATOR), (user, HOSTILE)):
            folder.mkdir()
            (folder / f"{request.param}.py").write_text(text)
        monkeypatch.setattr(files, "SYSTEM_CONFIG_PATH", [str(system)])
        monkeypatch.setattr(files, "ENV_CONFIG_PATH", [])
        monkeypatch.setattr(files, "jupyter_config_path", lambda: [str(user), str(system)])

    @pytest.mark.parametrize("kernel", [False, True])
    def test_the_administrator_s_holds(self, written: None, kernel: bool) -> None:
        assert load_config().ShimmyPolicy.allow_in_kernel  # plain Jupyter lets the user's win
        chosen = settings(load_config(), {}, system=load_system_config(), kernel=kernel)
        guard = chosen.guard
        assert not decide(guard.policies, ANN, "use", "x-70b").allowed
        assert not guard.allow_in_kernel
        assert not guard.admins
        assert effective(guard.limits, Limits(), ANN)[0].limits.tokens_per_day == 100
        assert guard.audit.fail_closed
        assert not chosen.allow_pull
        assert chosen.offline
        assert list(guard.locked) == ["max_tokens_per_day"]

    def test_only_sections_that_bind(self, tmp_path: Path, monkeypatch: Any) -> None:
        (tmp_path / "jupyter_config.py").write_text(
            "c.ServerApp.token = 'x'\nc.ShimmyEngine.nice = 5"
        )
        monkeypatch.setattr(files, "SYSTEM_CONFIG_PATH", [str(tmp_path)])
        monkeypatch.setattr(files, "ENV_CONFIG_PATH", [])
        assert load_system_config() == {}
