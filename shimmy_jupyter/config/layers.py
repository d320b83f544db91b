"""An administrator's values are ceilings. Jupyter lets a user's configuration file win over the system's,
so the system's is read on its own, too, and of both the stricter holds.

That binds where users cannot choose the environment, on a Hub; elsewhere it is a courtesy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from traitlets import TraitError
from traitlets.config import Config, Configurable

from ..core.limits import NAMES, Limits, LimitTable
from ..core.policy import ACTIONS, Policy, Rule
from .traits import ShimmyAudit, ShimmyEngine, ShimmyLimits, ShimmyModels, ShimmyPolicy


def _both(user: Any, system: Any) -> Any:
    return user and system


def _either(user: Any, system: Any) -> Any:
    return user or system


def _theirs(_user: Any, system: Any) -> Any:
    return system


def _common(user: Any, system: Any) -> Any:
    return [one for one in user if one in system]


def _least(user: Any, system: Any) -> Any:
    """0 is no limit."""
    return min(user or system, system or user)


STRICTER: Mapping[type[Configurable], Mapping[str, Callable[[Any, Any], Any]]] = {
    ShimmyEngine: {
        "isolation": lambda user, system: "process" if "process" in (user, system) else "none",
        "public_prefixes": _common,
    },
    ShimmyModels: {
        "roots": _theirs,
        "search": _common,
        "probe": _either,
        "verify": lambda user, system: "always" if "always" in (user, system) else "changed",
        "memory_check": _either,
        # 0 is as much as suits the machine, which a few bytes must not undo.
        "memory_reserve": lambda user, system: max(user, system) if system else 0,
        "memory_budget": _least,
        "idle_unload": _least,
        "allow_pull": _both,
        "hub": _theirs,
        "pull_hosts": _common,
    },
    ShimmyLimits: {"max_request_size": min},
    ShimmyPolicy: {"admins": _theirs, "admin_groups": _theirs, "allow_in_kernel": _both},
    ShimmyAudit: {
        "enabled": _either,
        "path": _theirs,
        "record_content": _theirs,
        "fail_closed": _either,
        "durable": _either,
        "retention": _theirs,
    },
}
"""How a value of the system's configuration bounds the one that would hold without it. Limits and rules
are layers of their own."""


_RULING = ("ShimmyPolicy", "ShimmyLimits", "ShimmyAudit")


def bounded(kind: Any, config: Config, system: Config) -> Any:
    """An instance with what holds. Raises TraitError."""
    found, ceiling = kind(config=config), kind(config=system)
    for name in system.get(kind.__name__, {}):
        rule = STRICTER.get(kind, {}).get(name)
        if rule is not None:
            setattr(found, name, rule(getattr(found, name), getattr(ceiling, name)))
    if kind is ShimmyPolicy and any(name in system for name in _RULING):
        # Or whoever may not pull would name himself an administrator.
        found.admins, found.admin_groups = ceiling.admins, ceiling.admin_groups
    if kind is ShimmyAudit and kind.__name__ in system:
        # Or whoever is recorded would say where, for how long, and what of others.
        for name in ("path", "record_content", "retention"):
            setattr(found, name, getattr(ceiling, name))
    if kind is ShimmyModels and {"pull_hosts", "hub"} & system.get(kind.__name__, {}).keys():
        found.hub = ceiling.hub  # it is a host to pull from
    return found


def locked(system: Config) -> dict[str, str]:
    """The limits that the system's configuration sets, and why users cannot raise them."""
    why = "set in the system's configuration: a user's can only be stricter"
    return dict.fromkeys((name for name in system.get("ShimmyLimits", {}) if name in NAMES), why)


def limit_table(limits: ShimmyLimits) -> LimitTable:
    """Raises TraitError."""
    default = Limits(**{field: getattr(limits, name) for name, field in NAMES.items()})
    try:
        return LimitTable(
            default,
            {group: _limits(group, given) for group, given in limits.groups.items()},
            {group: _limits(group, given) for group, given in limits.shared.items()},
        )
    except ValueError as error:
        raise TraitError(f"ShimmyLimits.groups or .shared: {error}") from None


def _limits(group: str, given: Mapping[str, Any]) -> Limits:
    chosen = {}
    for name, value in given.items():
        if name not in NAMES:
            raise ValueError(f"{group} has no limit {name!r}; there are {', '.join(NAMES)}")
        # As a trait, so that a group's limit is what the same limit of everybody could be.
        chosen[NAMES[name]] = ShimmyLimits.class_traits()[name]._validate(ShimmyLimits(), value)  # noqa: SLF001
    return Limits(**chosen)


def policy(traits: ShimmyPolicy) -> Policy:
    """Raises TraitError."""
    return Policy(
        tuple(_rule(index, given) for index, given in enumerate(traits.rules)),
        dict(traits.ceilings),
        frozenset(traits.features),
    )


def _rule(index: int, given: Mapping[str, Any]) -> Rule:
    where = f"ShimmyPolicy.rules[{index}]"
    known = {"allow", "deny", "actions", "users", "groups", "admin"}
    if unknown := sorted(set(given) - known):
        raise TraitError(f"{where} has {unknown[0]!r}; there are {', '.join(sorted(known))}")
    if ("allow" in given) == ("deny" in given):
        raise TraitError(f"{where} must have either allow or deny, a pattern of model names")
    admin = given.get("admin")
    if admin is not None and not isinstance(admin, bool):
        raise TraitError(f"{where}: admin is True or False, not {admin!r}")
    actions = _texts(f"{where}: actions", given.get("actions", ACTIONS))
    if wrong := [action for action in actions if action not in ACTIONS]:
        raise TraitError(
            f"{where}: there is no action {wrong[0]!r}; there are {', '.join(ACTIONS)}"
        )
    return Rule(
        "allow" in given,
        actions,
        _texts(f"{where}: patterns", given.get("allow", given.get("deny"))),
        _texts(f"{where}: users", given.get("users", ())),
        _texts(f"{where}: groups", given.get("groups", ())),
        admin,
    )


def _texts(where: str, given: Any) -> tuple[str, ...]:
    texts = (given,) if isinstance(given, str) else given
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise TraitError(f"{where} are a text or a list of texts, not {given!r}")
    return tuple(texts)
