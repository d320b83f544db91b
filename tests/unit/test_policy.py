"""Decisions by themselves.

Cases: whom a rule concerns and what it covers; deny wins, whatever else is there and in whichever order;
an allow-list; one more policy never allows more; ceilings and features of several policies; each figure and
each feature of a request.
"""

from __future__ import annotations

from dataclasses import replace
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
from shimmy_jupyter.types import ChatOptions, CompletionRequest, Message, Principal, Sampling

NAMES, GROUPS, MODELS = ("ann", "bob"), ("x", "y"), ("a", "ab", "b-70b")
PEOPLE = st.builds(
    Principal,
    st.sampled_from(NAMES),
    st.lists(st.sampled_from(GROUPS), unique=True).map(tuple),
    st.booleans(),
)


def some(of: tuple[str, ...]) -> st.SearchStrategy[tuple[str, ...]]:
    return st.lists(st.sampled_from(of), unique=True, max_size=3).map(tuple)


RULES = st.builds(
    Rule,
    st.booleans(),
    some(ACTIONS),
    some(("*", "a*", "?", "*-70b", "[ab]")),
    some(NAMES),
    some(GROUPS),
    st.sampled_from([None, True, False]),
)
POLICIES = st.builds(
    Policy,
    st.lists(RULES, max_size=4).map(tuple),
    st.dictionaries(st.sampled_from(tuple(CEILINGS)), st.floats(0, 10)),
    st.lists(st.sampled_from(FEATURES), unique=True).map(frozenset),
)
REQUESTS = st.builds(
    CompletionRequest,
    st.just("id"),
    PEOPLE,
    st.sampled_from(MODELS),
    st.sampled_from(["text", (Message("user", "hi"),), (1, 2)]),
    sampling=st.builds(Sampling, logprobs=st.none() | st.integers(0, 5), ignore_eos=st.booleans()),
    max_tokens=st.none() | st.integers(0, 20),
    n=st.integers(1, 4),
    adapter=st.sampled_from(["", "ab"]),
    echo=st.booleans(),
    chat=st.builds(ChatOptions, thinking=st.sampled_from([None, True, False, 3])),
)
ANYTHING = st.sampled_from(ACTIONS)


@given(POLICIES, PEOPLE, ANYTHING, st.sampled_from(MODELS), st.randoms())
def test_deny_wins_in_any_order(
    policy: Policy, who: Principal, action: str, model: str, random: Any
) -> None:
    denies = [
        rule
        for rule in policy.rules
        if not rule.allow and action in rule.actions and rule.concerns(who) and rule.covers(model)
    ]
    rules = [*policy.rules]
    random.shuffle(rules)
    found = policy.decide(who, action, model)
    assert found == replace(policy, rules=tuple(rules)).decide(who, action, model)
    if denies:
        assert not found.allowed
        assert model in found.reason
        assert found.param == "model"


@given(st.lists(POLICIES, max_size=3), POLICIES, PEOPLE, ANYTHING, st.sampled_from(MODELS))
def test_one_more_never_allows_more(
    policies: list[Policy], more: Policy, who: Principal, action: str, model: str
) -> None:
    with_it = decide([*policies, more], who, action, model).allowed
    assert with_it <= decide(policies, who, action, model).allowed
    assert with_it <= decide([more], who, action, model).allowed
    for name in FEATURES:
        assert feature([*policies, more], name).allowed <= feature(policies, name).allowed
    for name in CEILINGS:
        before, after = ceiling(policies, name), ceiling([*policies, more], name)
        assert before is None or (after is not None and after <= before)


@given(st.lists(POLICIES, max_size=2), POLICIES, REQUESTS)
def test_nor_of_requests(policies: list[Policy], more: Policy, request: CompletionRequest) -> None:
    assert (
        decide_request([*policies, more], request).allowed
        <= decide_request(policies, request).allowed
    )
    assert decide_request([], request).allowed


@given(POLICIES, PEOPLE, ANYTHING, st.sampled_from(MODELS))
def test_one_more_denying_rule_never_allows_more(
    policy: Policy, who: Principal, action: str, model: str
) -> None:
    stricter = replace(policy, rules=(*policy.rules, Rule(False, ("use",), ("a*",))))
    assert stricter.decide(who, action, model).allowed <= policy.decide(who, action, model).allowed


def test_an_allow_list_is_of_its_actions() -> None:
    policy = Policy((Rule(True, ("use",), ("a*",), groups=("x",)),))
    member, other = Principal("ann", ("x",)), Principal("bob")
    assert policy.decide(member, "use", "ab").allowed
    assert not policy.decide(member, "use", "b").allowed
    assert not policy.decide(other, "use", "ab").allowed
    assert policy.decide(other, "load", "b").allowed


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        ({"max_tokens": 3}, "max_tokens"),
        ({"max_seconds": 2.5}, "max_seconds"),
        ({"n": 3}, "n"),
        ({"sampling": Sampling(min_tokens=3)}, "min_tokens"),
        ({"sampling": Sampling(logprobs=3)}, "top_logprobs"),
        ({"chat": ChatOptions(thinking=3)}, "thinking"),
    ],
)
def test_each_ceiling(request_: dict[str, Any], param: str) -> None:
    asked = replace(CompletionRequest("id", Principal("ann"), "m", "text"), **request_)
    found = decide_request([Policy(ceilings={param: 2})], asked)
    assert (found.allowed, found.param) == (False, param)
    assert "at most 2" in found.reason
    assert decide_request([Policy(ceilings={param: 3})], asked).allowed


def test_case_and_pattern() -> None:
    rule = Rule(False, models=("Evil-*", "x?z"))
    assert [rule.covers(m) for m in ("Evil-1", "evil-1", "xyz", "xz")] == [True, False, True, False]
