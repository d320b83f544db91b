"""The administrator's values are ceilings: whatever a user's configuration says, both hold.

Cases: each value of `STRICTER` with a looser and with a stricter one of the user's; every limit; groups and
shared budgets; rules, ceilings and features; administrators; where the system says nothing; files of the
system's and of the user's, in the order in which Jupyter reads them; wrong values, by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from traitlets import TraitError
from traitlets.config import Config

from shimmy_jupyter.config import Settings, files, load_config, load_system_config, settings
from shimmy_jupyter.config.layers import STRICTER
from shimmy_jupyter.config.traits import (
    ShimmyAudit,
    ShimmyEngine,
    ShimmyLimits,
    ShimmyModels,
    ShimmyPolicy,
)
from shimmy_jupyter.core.limits import NAMES, Limits, effective
from shimmy_jupyter.core.policy import ceiling, decide, feature
from shimmy_jupyter.types import Principal

ANN = Principal("ann", ("staff",))


def both(user: dict[str, Any], system: dict[str, Any]) -> Settings:
    # As in a server: the system's files are a part of what it has read, and the user's win.
    merged = Config(system)
    merged.merge(Config(user))
    return settings(merged, {}, system=Config(system))


def own(found: Settings, who: Principal = ANN) -> Limits:
    return effective(found.guard.limits, Limits(), who)[0].limits


VALUES: dict[tuple[type, str], tuple[Any, Any, Any, Any]] = {
    # the system's, a looser one, a stricter one, and what holds with that
    (ShimmyEngine, "isolation"): ("process", "none", "process", "process"),
    (ShimmyEngine, "public_prefixes"): (["a"], ["a", "b"], [], []),
    (ShimmyModels, "search"): (["home", "ollama"], ["home", "system"], ["home"], ["home"]),
    (ShimmyModels, "probe"): (True, False, True, True),
    (ShimmyModels, "verify"): ("always", "changed", "always", "always"),
    (ShimmyModels, "memory_check"): (True, False, True, True),
    (ShimmyModels, "memory_reserve"): (1000, 10, 5000, 5000),
    (ShimmyModels, "memory_budget"): (1000, 0, 500, 500),
    (ShimmyModels, "idle_unload"): (60.0, 0.0, 30.0, 30.0),
    (ShimmyModels, "allow_pull"): (False, True, False, False),
    (ShimmyModels, "pull_hosts"): (["a.example"], ["a.example", "b.example"], [], []),
    (ShimmyModels, "hub"): ("https://hub.example", "https://evil.example", "", "https://hub.example"),
    (ShimmyModels, "roots"): (["/models"], ["/models", "/home/ann"], [], ["/models"]),
    (ShimmyLimits, "max_request_size"): (1000, 5000, 500, 500),
    (ShimmyPolicy, "allow_in_kernel"): (False, True, False, False),
    (ShimmyPolicy, "admins"): (["root"], ["ann", "root"], [], ["root"]),
    (ShimmyPolicy, "admin_groups"): (["ops"], ["ops", "staff"], [], ["ops"]),
    (ShimmyAudit, "enabled"): (True, False, True, True),
    (ShimmyAudit, "path"): ("/var/ledger", "/tmp/mine", "", "/var/ledger"),
    (ShimmyAudit, "record_content"): (False, True, False, False),
    (ShimmyAudit, "fail_closed"): (True, False, True, True),
    (ShimmyAudit, "durable"): (True, False, True, True),
    (ShimmyAudit, "retention"): (30, 9999, 7, 30),
}  # fmt: skip


def test_every_value_is_tried_here() -> None:
    assert set(VALUES) == {(kind, name) for kind, rules in STRICTER.items() for name in rules}


def held(found: Settings, name: str) -> Any:
    guard, audit, places = found.guard, found.guard.audit, found.places
    searched = {
        "home": places.home_models, "ollama": places.ollama, "system": places.system,
        "huggingface": places.huggingface,
    }  # fmt: skip
    elsewhere = {
        "search": [name for name, there in searched.items() if there],
        "verify": "always" if found.verify_always else "changed",
        "pull_hosts": list(found.pull_hosts),
        "public_prefixes": list(found.public_prefixes),
        "roots": [str(root) for root in places.roots],
        "max_request_size": found.max_request_bytes,
        "admins": sorted(guard.admins),
        "admin_groups": sorted(guard.admin_groups),
        "allow_in_kernel": guard.allow_in_kernel,
        "enabled": audit.path is not None,
        "path": str(audit.path),
    }
    if name in elsewhere:
        return elsewhere[name]
    return getattr(audit if hasattr(audit, name) else found, name)


@pytest.mark.parametrize(
    ("kind", "name"), list(VALUES), ids=lambda v: v if isinstance(v, str) else v.__name__
)
def test_a_user_cannot_loosen_it(kind: type, name: str) -> None:
    system, looser, stricter, then = VALUES[kind, name]
    section = kind.__name__
    found = both({section: {name: looser}}, {section: {name: system}})
    assert held(found, name) == ([*set(system) & set(looser)] if name == "search" else system)
    assert held(both({section: {name: stricter}}, {section: {name: system}}), name) == then
    assert held(both({}, {section: {name: system}}), name) == system
    free = settings(Config({section: {name: looser}}), {}, system=Config())
    assert held(free, name) == looser or name in {"memory_budget", "memory_reserve"}


@pytest.mark.parametrize("name", sorted(NAMES))
def test_limits(name: str) -> None:
    def limit(user: int | None, system: int | None) -> Any:
        user_said = {} if user is None else {"ShimmyLimits": {name: user}}
        system_said = {} if system is None else {"ShimmyLimits": {name: system}}
        return getattr(own(both(user_said, system_said)), NAMES[name])

    assert (limit(999, 111), limit(11, 111), limit(None, 111), limit(999, None)) == (
        111,
        11,
        111,
        999,
    )
    assert limit(None, None) is None
    found = both({"ShimmyLimits": {name: None}}, {"ShimmyLimits": {name: 5}})
    assert getattr(own(found), NAMES[name]) == 5
    assert set(found.guard.locked) == {name}


def test_groups_cannot_be_a_way_round() -> None:
    system = {
        "ShimmyLimits": {
            "max_tokens_per_day": 100,
            "groups": {"staff": {"max_tokens_per_day": 200}},
        }
    }
    user = {"ShimmyLimits": {"groups": {"staff": {"max_tokens_per_day": 9999}}}}
    found = both(user, system)
    assert own(found).tokens_per_day == 200
    assert own(found, Principal("bob")).tokens_per_day == 100
    shared = both(
        {"ShimmyLimits": {"shared": {"staff": {"max_tokens_per_day": 9}}}},
        {"ShimmyLimits": {"shared": {"staff": {"max_tokens_per_day": 5}}}},
    )
    _, account = effective(shared.guard.limits, Limits(), ANN)
    assert (account.key, account.limits.tokens_per_day) == ("group:staff", 5)


def test_rules_ceilings_and_features() -> None:
    system = {
        "ShimmyPolicy": {
            "rules": [{"deny": "big*"}],
            "ceilings": {"n": 2},
            "features": ["chat", "completions"],
        }
    }
    user = {
        "ShimmyPolicy": {
            "rules": [{"allow": "*"}],
            "ceilings": {"n": 16},
            "features": ["chat", "echo"],
        }
    }
    policies = both(user, system).guard.policies
    assert not decide(policies, ANN, "use", "big-70b").allowed
    assert ceiling(policies, "n") == 2
    assert [
        name for name in ("chat", "completions", "echo") if feature(policies, name).allowed
    ] == ["chat"]


def test_naming_oneself_an_administrator() -> None:
    system = {"ShimmyPolicy": {"rules": [{"deny": "*", "actions": ["pull"], "admin": False}]}}
    guard = both({"ShimmyPolicy": {"admins": ["ann"], "admin_groups": ["staff"]}}, system).guard
    assert (guard.admins, guard.admin_groups) == (frozenset(), frozenset())


def test_offline_and_bind_localhost_only() -> None:
    user = {"ShimmyApp": {"offline": False, "bind_localhost_only": False}}
    found = both(user, {"ShimmyApp": {"offline": True, "bind_localhost_only": True}})
    assert (found.offline, found.bind_localhost_only) == (True, True)


@pytest.mark.parametrize(
    ("section", "values", "names"),
    [
        ("ShimmyPolicy", {"rules": [{"deny": "*", "allow": "*"}]}, "rules[0]"),
        ("ShimmyPolicy", {"rules": [{}]}, "rules[0]"),
        ("ShimmyPolicy", {"rules": [{"deny": "*"}, {"deny": "*", "who": "ann"}]}, "rules[1] has 'who'"),
        ("ShimmyPolicy", {"rules": [{"deny": "*", "actions": ["fly"]}]}, "'fly'"),
        ("ShimmyPolicy", {"rules": [{"deny": "*", "admin": "no"}]}, "admin"),
        ("ShimmyPolicy", {"rules": [{"deny": 7}]}, "patterns"),
        ("ShimmyPolicy", {"ceilings": {"speed": 1}}, "speed"),
        ("ShimmyPolicy", {"features": ["magic"]}, "features"),
        ("ShimmyLimits", {"groups": {"staff": {"max_speed": 1}}}, "max_speed"),
        ("ShimmyLimits", {"groups": {"staff": {"max_concurrent": -1}}}, "max_concurrent"),
        ("ShimmyLimits", {"shared": {"staff": {"max_seconds": 1}}}, "max_seconds"),
        ("ShimmyLimits", {"max_tokens_per_day": -1}, "max_tokens_per_day"),
        ("ShimmyAudit", {"retention": 0}, "retention"),
    ],
)  # fmt: skip
def test_wrong_values_are_named(section: str, values: dict[str, Any], names: str) -> None:
    for user, system in (({section: values}, {}), ({}, {section: values})):
        with pytest.raises(TraitError) as error:
            both(user, system)
        assert names in str(error.value)


def test_files(tmp_path: Path, monkeypatch: Any) -> None:
    """The hostile user's file is read later than the system's, by Jupyter and by us."""
    system, user = tmp_path / "etc", tmp_path / "home"
    for folder in (system, user):
        folder.mkdir()
    (system / "jupyter_shimmy_jupyter_config.py").write_text(
        "c.ShimmyLimits.max_tokens_per_day = 111\nc.ShimmyPolicy.rules = [{'deny': 'big*'}]\n"
        "c.ShimmyPolicy.admins = ['root']\nc.ShimmyAudit.enabled = True\n"
    )
    (user / "jupyter_shimmy_jupyter_config.py").write_text(
        "c.ShimmyLimits.max_tokens_per_day = 999\nc.ShimmyPolicy.rules = []\n"
        "c.ShimmyPolicy.admins.append('ann')\nc.ShimmyAudit.enabled = False\n"
    )
    monkeypatch.setattr(files, "SYSTEM_CONFIG_PATH", [str(system)])
    monkeypatch.setattr(files, "ENV_CONFIG_PATH", [])
    monkeypatch.setattr(files, "jupyter_config_path", lambda: [str(user), str(system)])
    chosen = load_config()
    assert settings(chosen, {}).guard.limits[0].default.tokens_per_day == 999
    found = settings(chosen, {}, system=load_system_config())
    assert own(found).tokens_per_day == 111
    assert not decide(found.guard.policies, ANN, "use", "big-1").allowed
    assert found.guard.admins == {"root"}
    assert found.guard.audit.path is not None
    assert "max_tokens_per_day" in found.guard.locked


@pytest.mark.parametrize(
    ("user", "system", "holds"),
    [
        # Who sets only one of them would not have another diverted.
        ({"ShimmyAudit": {"path": "/tmp/mine"}}, {"ShimmyAudit": {"fail_closed": True}}, "path"),
        ({"ShimmyAudit": {"retention": 1}}, {"ShimmyAudit": {"enabled": True}}, "retention"),
        ({"ShimmyAudit": {"record_content": True}}, {"ShimmyAudit": {"enabled": True}}, "record_content"),
        ({"ShimmyPolicy": {"admins": ["ann"]}}, {"ShimmyLimits": {"max_queued": 3}}, "admins"),
        ({"ShimmyModels": {"hub": "https://e.example"}}, {"ShimmyModels": {"pull_hosts": []}}, "hub"),
        ({"ShimmyModels": {"memory_reserve": 1}}, {"ShimmyModels": {"memory_reserve": 0}}, "memory_reserve"),
    ],
)  # fmt: skip
def test_no_way_round(user: dict[str, Any], system: dict[str, Any], holds: str) -> None:
    assert held(both(user, system), holds) == held(both({}, system), holds)
