"""docs/configuration.md is what the settings are.

Cases: the file is what the script makes; every setting of every class, with a help; each example is accepted, in a
user's file and in the system's, and names settings that exist; what the examples say of themselves holds; what the column
"beside the system's" says is what happens, for every setting that has one; the files that are named; types of each kind.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import configuration_docs as docs
import pytest
from traitlets import Bool, Int, List, TraitError, Unicode
from traitlets.config import Config

from shimmy_jupyter.config import CONFIGURABLES, AppTraits, Settings, files, settings
from shimmy_jupyter.config.layers import bounded
from shimmy_jupyter.core import policy
from shimmy_jupyter.core.limits import NAMES, Limits, effective
from shimmy_jupyter.server.app import ShimmyApp
from shimmy_jupyter.types import Principal

TEXT = docs.PAGE.read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
BOUND = [(name, trait) for name in files.OURS for trait in docs.traits(docs.CLASSES[name])]


def written(example: str) -> Config:
    config = Config()
    exec(example, {"c": config})
    return config


def test_the_file_is_what_the_script_makes() -> None:
    assert docs.page() == TEXT, "run scripts/configuration_docs.py"


def test_every_setting_is_there_and_has_a_help() -> None:
    assert {*CONFIGURABLES, AppTraits} <= {*docs.CLASSES.values()}
    assert {*files.OURS} <= {*docs.CLASSES}
    for owner, cls in docs.CLASSES.items():
        found = docs.traits(cls)
        assert {*found} == {*cls.class_own_traits(config=True)}
        section = TEXT[TEXT.index(f"\n## {owner}\n") :].split("\n## ")[1]
        for name, trait in found.items():
            assert f"| `{name}` |" in section
            assert trait.help


def test_the_extensions_own_settings_are_all_there() -> None:
    assert {*ShimmyApp.class_own_traits(config=True)} <= {*docs.traits(AppTraits)}


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_are_accepted(example: str) -> None:
    config = written(example)
    for owner, section in config.items():
        for name in section:
            assert name in docs.traits(docs.CLASSES[owner]), f"{owner}.{name}"
    assert isinstance(settings(config, {}), Settings)
    assert isinstance(settings(Config(), {}, system=config), Settings)
    assert settings(config, {}) != settings(Config(), {})


def test_there_are_examples_for_what_needs_them() -> None:
    named = {
        f"{owner}.{name}"
        for one in EXAMPLES
        for owner, part in written(one).items()
        for name in part
    }
    assert named >= {"ShimmyPolicy.rules", "ShimmyLimits.groups", "ShimmyLimits.shared"}


def test_the_course() -> None:
    (example,) = [one for one in EXAMPLES if "course-*" in one]
    guard = settings(written(example), {}).guard
    student, teacher, other = (
        Principal("sam", ("students",)),
        Principal("tea", ("staff",)),
        Principal("ann", admin=True),
    )

    def may(who: Principal, action: str, model: str) -> bool:
        return policy.decide(guard.policies, who, action, model).allowed

    assert guard.admins == {"ann"}
    assert may(student, "use", "course-4b")
    assert may(teacher, "use", "qwen3-8b")
    for who, model in ((student, "qwen3-8b"), (teacher, "llama-70b-q4"), (other, "course-4b")):
        assert not may(who, "use", model)
    assert may(other, "pull", "a/b")
    assert not may(teacher, "pull", "a/b")


def test_limits_of_users_and_groups() -> None:
    (example,) = [one for one in EXAMPLES if "course-101" in one]
    tables = settings(written(example), {}).guard.limits
    (own,) = effective(tables, Limits(), Principal("sam"))
    assert (own.limits.tokens_per_day, own.limits.requests_per_minute) == (200_000, 60)
    own, shared = effective(tables, Limits(), Principal("tea", ("staff", "course-101")))
    assert (own.limits.tokens_per_day, own.limits.requests_per_minute) == (1_000_000, 60)
    assert (shared.limits.tokens_per_day, shared.limits.concurrent) == (5_000_000, 8)


HOLDS: dict[str, list[tuple[Any, Any, Any]]] = {
    "True where both are": [(True, False, False), (False, True, False), (True, True, True)],
    "True where either is": [(True, False, True), (False, True, True), (False, False, False)],
    "the greater; the system's 0 stays": [(5, 3, 5), (3, 5, 5), (5, 0, 0)],
    '"process" where either is': [
        ("process", "none", "process"),
        ("none", "process", "process"),
        ("none", "none", "none"),
    ],
    "the lesser": [(5, 3, 3), (3, 5, 3)],
    "the lesser; 0 is no limit": [(5, 3, 3), (3, 5, 3), (0, 5, 5), (5, 0, 5)],
    '"always" where either is': [
        ("always", "changed", "always"),
        ("changed", "always", "always"),
        ("changed", "changed", "changed"),
    ],
}
BY_KIND: list[tuple[type[Any], list[tuple[Any, Any, Any]]]] = [
    (Bool, [(True, False, False), (False, True, True)]),
    (Int, [(5, 30, 30), (30, 5, 5)]),
    (List, [(["a"], ["b"], ["b"]), (["a"], [], [])]),
    (Unicode, [("https://a.example", "https://b.example", "https://b.example")]),
]


def cases(owner: str, name: str) -> list[tuple[Any, Any, Any]]:
    """A user's value, the system's, and what holds, as the page says."""
    said = docs.beside(owner, name)
    trait = docs.traits(docs.CLASSES[owner])[name]
    if said.startswith("the system's"):
        return next(found for cls, found in BY_KIND if isinstance(trait, cls))
    if said == "what both name":
        one, two, three = (trait.default() or ["a", "b", "c"])[:3]
        return [([one, two], [two, three], [two]), ([one], [two], [])]
    return HOLDS.get(said, [])


@pytest.mark.parametrize(("owner", "name"), BOUND, ids=".".join)
def test_what_is_said_of_the_systems_value(owner: str, name: str) -> None:
    found = cases(owner, name)
    assert found or docs.beside(owner, name) in {"both hold", "the user's"}
    for user, system, expected in found:
        mine, theirs = Config({owner: {name: user}}), Config({owner: {name: system}})
        chosen = settings(mine, {}, system=theirs)
        if owner == "ShimmyApp":
            assert getattr(chosen, name) == expected
        elif name in NAMES:
            (account,) = effective(chosen.guard.limits, Limits(), Principal("x"))
            assert getattr(account.limits, NAMES[name]) == expected
        elif name == "features":
            both = {f for f in policy.FEATURES if policy.feature(chosen.guard.policies, f).allowed}
            assert both == {*expected}
        else:
            assert getattr(bounded(docs.CLASSES[owner], mine, theirs), name) == expected


@pytest.mark.parametrize("name", ["admins", "admin_groups"])
def test_administrators_where_the_system_sets_another(name: str) -> None:
    mine = Config({"ShimmyPolicy": {name: ["eve"]}})
    theirs = Config({"ShimmyPolicy": {"allow_in_kernel": False}})
    assert getattr(settings(mine, {}, system=theirs).guard, name) == frozenset()
    assert getattr(settings(mine, {}).guard, name) == {"eve"}


@pytest.mark.parametrize(
    ("name", "loose", "strict"),
    [
        ("rules", [{"allow": "*"}], [{"deny": "big"}]),
        ("ceilings", {"n": 9}, {"n": 2}),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_both_policies_hold(name: str, loose: Any, strict: Any, turned: bool) -> None:
    values = (strict, loose) if turned else (loose, strict)
    mine, theirs = (Config({"ShimmyPolicy": {name: value}}) for value in values)
    policies = settings(mine, {}, system=theirs).guard.policies
    if name == "rules":
        assert not policy.decide(policies, Principal("x"), "use", "big").allowed
        assert policy.decide(policies, Principal("x"), "use", "small").allowed
    else:
        assert policy.ceiling(policies, "n") == 2


@pytest.mark.parametrize("name", ["groups", "shared"])
@pytest.mark.parametrize("turned", [False, True])
def test_both_tables_hold(name: str, turned: bool) -> None:
    values = [{"lab": {"max_tokens_per_day": n}} for n in ((5, 3) if turned else (3, 5))]
    mine, theirs = (Config({"ShimmyLimits": {name: value}}) for value in values)
    tables = settings(mine, {}, system=theirs).guard.limits
    accounts = effective(tables, Limits(), Principal("x", ("lab",)))
    assert accounts[-1].limits.tokens_per_day == 3


def test_the_files_that_are_named() -> None:
    for kernel in (False, True):
        guard = settings(Config(), {}, kernel=kernel).guard
        assert guard.audit.path is not None
        assert guard.spending is not None
        folder = guard.spending.parent
        assert folder.name == "shimmy_jupyter"
        for path in (guard.audit.path, guard.spending):
            assert f"`{path.relative_to(folder)}`" in TEXT
    for name in files._NAMES:
        assert f"`{name}.py`" in TEXT


def test_a_wrong_value_is_refused_by_name() -> None:
    with pytest.raises(TraitError, match="max_requests_per_minute"):
        settings(Config({"ShimmyLimits": {"max_requests_per_minute": "many"}}), {})


def test_no_table_is_broken_by_what_is_in_it() -> None:
    for line in TEXT.splitlines():
        if line.startswith("| `"):
            cells = re.sub(r"\\\|", "", line).count("|") - 1
            assert cells in {2, 4, 5}, line


def test_a_rule_without_words_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(docs.RULES, "_theirs")
    with pytest.raises(KeyError):
        docs.page()


def test_the_script_writes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(docs.__file__).read_text()
    place = tmp_path / "scripts" / "configuration_docs.py"
    (tmp_path / "docs").mkdir()
    exec(compile(source, place, "exec"), {"__name__": "__main__", "__file__": str(place)})
    assert (tmp_path / "docs" / "configuration.md").read_text() == docs.page()
