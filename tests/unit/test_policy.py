"""Who may do what: rules, ceilings, features; several policies at once.

Cases: nothing said; deny by name, user, group, administrators or all others; an allow-list; deny over
allow; actions apart; adapters; each ceiling, at it and over it; each feature; and as properties: a rule
that denies is never outvoted, and a further policy never allows more.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shimmy_jupyter.core.policy import (
    ACTIONS,
    CEILINGS,
    FEATURES,
    Policy,
    Rule,
    ceiling,
    decide,
    decide_request,
    feature,
)
from shimmy_jupyter.types import (
    ChatOptions,
    CompletionRequest,
    Constraint,
    Message,
    Principal,
    Sampling,
)

ANN = Principal("ann", ("staff",))
BOB = Principal("bob", ("students", "staff"))
ROOT = Principal("root", admin=True)


def request(**fields: Any) -> CompletionRequest:
    known = {"prompt": "x", "principal": ANN} | fields
    return CompletionRequest("id", model="tiny-1b", **known)


def test_nothing_is_said() -> None:
    for action in ACTIONS:
        assert decide((), ANN, action, "m").allowed
        assert Policy().decide(ANN, action, "m").allowed
    assert decide_request((Policy(),), request()).allowed


@pytest.mark.parametrize(
    ("rule", "denied"),
    [
        (Rule(False, models=("big-*",)), {("ann", "big-70b"), ("bob", "big-70b"), ("root", "big-70b")}),
        (Rule(False, users=("ann",)), {("ann", "big-70b"), ("ann", "tiny")}),
        (Rule(False, groups=("students",)), {("bob", "big-70b"), ("bob", "tiny")}),
        (Rule(False, users=("ann",), groups=("students",), models=("tiny",)), {("ann", "tiny"), ("bob", "tiny")}),
        (Rule(False, admin=False, models=("tiny",)), {("ann", "tiny"), ("bob", "tiny")}),
        (Rule(False, admin=True), {("root", "big-70b"), ("root", "tiny")}),
        (Rule(False, models=("TINY", "tin", "big")), set()),
    ],
)  # fmt: skip
def test_whom_a_rule_denies(rule: Rule, denied: set[tuple[str, str]]) -> None:
    policy = Policy((rule,))
    for who in (ANN, BOB, ROOT):
        for model in ("big-70b", "tiny"):
            found = policy.decide(who, "use", model)
            assert found.allowed == ((who.name, model) not in denied)
            assert found.allowed or (model in found.reason and found.param == "model")


def test_an_allow_list() -> None:
    policy = Policy(
        (Rule(True, models=("course-*",), groups=("students",)), Rule(True, users=("ann",)))
    )
    assert policy.decide(BOB, "use", "course-1").allowed
    assert not policy.decide(BOB, "use", "other").allowed
    assert policy.decide(ANN, "use", "other").allowed
    assert not policy.decide(ROOT, "use", "course-1").allowed


def test_deny_wins_whatever_the_order() -> None:
    rules = (Rule(True), Rule(False, models=("m",)))
    for order in (rules, rules[::-1]):
        assert not Policy(order).decide(ROOT, "use", "m").allowed
        assert Policy(order).decide(ROOT, "use", "n").allowed


def test_actions_apart() -> None:
    policy = Policy((Rule(False, actions=("pull", "unload")),))
    assert {a for a in ACTIONS if not policy.decide(ANN, a, "m").allowed} == {"pull", "unload"}
    # An allow-list is of the actions that it names.
    policy = Policy((Rule(True, actions=("pull",), models=("org/*",)),))
    assert policy.decide(ANN, "use", "m").allowed
    assert policy.decide(ANN, "pull", "org/m").allowed
    assert not policy.decide(ANN, "pull", "else/m").allowed


def test_an_adapter_is_a_model() -> None:
    policies = (Policy((Rule(False, models=("evil",)),)),)
    assert decide_request(policies, request(adapter="good")).allowed
    found = decide_request(policies, request(adapter="evil"))
    assert (found.allowed, found.param) == (False, "adapter")


LIMITED: dict[str, Any] = {
    "max_tokens": lambda n: {"max_tokens": n},
    "max_seconds": lambda n: {"max_seconds": n},
    "min_tokens": lambda n: {"sampling": Sampling(min_tokens=n)},
    "n": lambda n: {"n": n},
    "thinking": lambda n: {"chat": ChatOptions(thinking=n)},
    "top_logprobs": lambda n: {"sampling": Sampling(logprobs=n)},
}


def test_every_ceiling_is_tried_here() -> None:
    assert set(LIMITED) == set(CEILINGS)


@pytest.mark.parametrize("name", sorted(LIMITED))
def test_ceilings(name: str) -> None:
    policies = (Policy(ceilings={name: 5}), Policy(ceilings={name: 3}), Policy())
    assert ceiling(policies, name) == 3
    assert decide_request(policies, request(**LIMITED[name](3))).allowed
    found = decide_request(policies, request(**LIMITED[name](4)))
    assert (found.allowed, found.param) == (False, name)
    assert "3" in found.reason
    assert decide_request(policies, request()).allowed


ASKED: dict[str, dict[str, Any]] = {
    "adapters": {"adapter": "a"},
    "chat": {"prompt": (Message("user", "x"),)},
    "completions": {},
    "constraints": {"sampling": Sampling(constraint=Constraint("json_object"))},
    "echo": {"echo": True},
    "ignore_eos": {"sampling": Sampling(ignore_eos=True)},
    "infill": {"suffix": "y"},
    "logprobs": {"sampling": Sampling(logprobs=0)},
    "reasoning": {"chat": ChatOptions(thinking=True)},
    "reproducible": {"reproducible": True},
}


def test_every_feature_is_tried_here() -> None:
    assert {*ASKED, "embeddings", "rerank", "tokenize"} == set(FEATURES)


@pytest.mark.parametrize("name", sorted(ASKED))
def test_features(name: str) -> None:
    policies = (Policy(), Policy(features=frozenset(FEATURES) - {name}))
    found = decide_request(policies, request(**ASKED[name]))
    assert not found.allowed
    assert name in found.reason
    assert not feature(policies, name).allowed
    others = [other for other in ASKED if other not in {name, "completions"}]
    for other in others:
        if name != "completions" or other == "chat":
            assert decide_request(policies, request(**ASKED[other])).allowed, other


def test_what_has_no_tokens_is_a_completion() -> None:
    assert decide_request((Policy(),), request(prompt=())).allowed
    assert decide_request((Policy(),), request(prompt=(1, 2))).allowed


names = st.sampled_from(["ann", "bob", "root"])
patterns = st.lists(st.sampled_from(["*", "tiny*", "big-70b", "[bt]*", "t?ny"]), max_size=2)
rules = st.builds(
    Rule,
    st.booleans(),
    st.lists(st.sampled_from(ACTIONS)).map(tuple),
    patterns.map(tuple),
    st.lists(names, max_size=2).map(tuple),
    st.lists(st.sampled_from(["staff", "students"]), max_size=2).map(tuple),
    st.none() | st.booleans(),
)
policies = st.builds(Policy, st.lists(rules, max_size=4).map(tuple))
asked = st.tuples(
    st.sampled_from([ANN, BOB, ROOT]),
    st.sampled_from(ACTIONS),
    st.sampled_from(["tiny", "big-70b", "t", ""]),
)


@given(policies, policies, asked)
def test_a_further_policy_never_allows_more(
    one: Policy, other: Policy, question: tuple[Principal, str, str]
) -> None:
    both = decide((one, other), *question).allowed
    assert both == (one.decide(*question).allowed and other.decide(*question).allowed)


@given(policies, asked)
def test_a_rule_that_denies_is_never_outvoted(
    policy: Policy, question: tuple[Principal, str, str]
) -> None:
    who, action, model = question
    denying = [
        rule
        for rule in policy.rules
        if not rule.allow and action in rule.actions and rule.concerns(who) and rule.covers(model)
    ]
    assert not (denying and policy.decide(*question).allowed)
