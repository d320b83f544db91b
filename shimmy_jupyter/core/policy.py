"""Who may do what with which model, and how much of it. Pure: a decision is made of what is passed in.

Several policies can hold at once, an administrator's and a user's: then all of them must allow.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from ..types import ChatOptions, CompletionRequest, Message, Principal

ACTIONS = ("use", "load", "unload", "pull", "probe", "verify")
FEATURES = (
    "chat",
    "completions",
    "embeddings",
    "rerank",
    "tokenize",
    "adapters",
    "constraints",
    "echo",
    "ignore_eos",
    "infill",
    "logprobs",
    "reasoning",
    "reproducible",
)
CEILINGS: Mapping[str, str] = {
    "max_tokens": "tokens of an answer",
    "max_seconds": "seconds of a request",
    "min_tokens": "tokens before which an answer may not end",
    "n": "choices",
    "thinking": "tokens of reasoning",
    "top_logprobs": "alternatives of each token",
}
"""Fields of a request that can have a ceiling."""


@dataclass(frozen=True, slots=True)
class Decision:
    """`reason` says why not; `param` names the field of the request, where one is to blame."""

    allowed: bool
    reason: str = ""
    param: str | None = None


ALLOWED = Decision(True)
_OF_REASONING = re.compile("think|reason", re.IGNORECASE)
_DUPLICATE = re.compile(r"^(.+)@[0-9a-f]{8}$")
"""A second file of the same name: what denies the name denies it."""


@dataclass(frozen=True, slots=True)
class Rule:
    """`models` are patterns as of a shell: `*`, `?` and `[…]`, case mattering; for `pull` they are held
    against what is to be downloaded. It is for everybody, or for those that `users` or `groups` name;
    with `admin` for administrators only, or for all others.
    """

    allow: bool
    actions: tuple[str, ...] = ACTIONS
    models: tuple[str, ...] = ("*",)
    users: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    admin: bool | None = None

    def concerns(self, principal: Principal) -> bool:
        if self.admin is not None and self.admin != principal.admin:
            return False
        if not (self.users or self.groups):
            return True
        return principal.name in self.users or not set(principal.groups).isdisjoint(self.groups)

    def covers(self, model: str, *, any_case: bool = False) -> bool:
        if any_case:  # a hub finds its repositories so
            model = model.lower()
            return any(fnmatchcase(model, pattern.lower()) for pattern in self.models)
        return any(fnmatchcase(model, pattern) for pattern in self.models)


@dataclass(frozen=True, slots=True)
class Policy:
    """Deny wins. Where any rule allows an action, what no rule allows is denied."""

    rules: tuple[Rule, ...] = ()
    ceilings: Mapping[str, float] = field(default_factory=dict)
    features: frozenset[str] = frozenset(FEATURES)

    def decide(
        self, principal: Principal, action: str, model: str, also: Sequence[str] = ()
    ) -> Decision:
        """What has a name of `also`, too, is denied under any of them, and allowed under the first."""
        rules = [rule for rule in self.rules if action in rule.actions]
        concerning = [r for r in rules if r.concerns(principal) and r.covers(model)]
        names = [model, *also, *_DUPLICATE.findall(model)]
        denying = [r for r in rules if not r.allow and r.concerns(principal)]
        if any(rule.covers(name, any_case=action == "pull") for rule in denying for name in names):
            return Decision(False, f"you may not {action} {model[:128]!r} here", "model")
        if any(rule.allow for rule in rules) and not concerning:
            return Decision(
                False, f"you may not {action} {model[:128]!r} here: nothing allows it", "model"
            )
        return ALLOWED

    def feature(self, name: str, param: str | None = None) -> Decision:
        if name in self.features:
            return ALLOWED
        return Decision(False, f"{name} is switched off here", param)


Policies = Sequence[Policy]


def decide(
    policies: Policies, principal: Principal, action: str, model: str, also: Sequence[str] = ()
) -> Decision:
    """Whether all of them allow it."""
    return _all(policy.decide(principal, action, model, also) for policy in policies)


def feature(policies: Policies, name: str, param: str | None = None) -> Decision:
    return _all(policy.feature(name, param) for policy in policies)


def ceiling(policies: Policies, name: str) -> float | None:
    """The lowest that any of them sets; None where none does."""
    return min((p.ceilings[name] for p in policies if name in p.ceilings), default=None)


def decide_request(policies: Policies, request: CompletionRequest) -> Decision:
    """Whether this user may have this answered, as it is asked."""
    found = decide(policies, request.principal, "use", request.model)
    if not found.allowed:
        return found
    if request.adapter:
        found = decide(policies, request.principal, "use", request.adapter)
        if not found.allowed:
            return Decision(False, found.reason, "adapter")
    return _all(
        [
            *(feature(policies, name, param) for name, param in _features(request)),
            *(_within(policies, name, value) for name, value in _figures(request)),
        ]
    )


def _all(decisions: Iterable[Decision]) -> Decision:
    return next((found for found in decisions if not found.allowed), ALLOWED)


def _is_chat(request: CompletionRequest) -> bool:
    return any(isinstance(turn, Message) for turn in request.prompt[:1])


def _features(request: CompletionRequest) -> list[tuple[str, str | None]]:
    sampling, chat = request.sampling, request.chat
    wanted = [
        ("chat" if _is_chat(request) else "completions", None, True),
        ("adapters", "adapter", bool(request.adapter)),
        ("constraints", "response_format", sampling.constraint is not None),
        ("echo", "echo", request.echo),
        ("ignore_eos", "ignore_eos", sampling.ignore_eos),
        ("infill", "suffix", bool(request.suffix)),
        ("logprobs", "logprobs", sampling.logprobs is not None),
        ("reasoning", "thinking", bool(chat.thinking) or chat.effort not in (None, "none")),
        (
            "reasoning",
            "chat_template_kwargs",
            any(v not in (False, 0, "none") for v in _told(chat)),
        ),
        ("reproducible", "reproducible", request.reproducible),
    ]
    return [(name, param) for name, param, asked in wanted if asked]


def _figures(request: CompletionRequest) -> list[tuple[str, float | None]]:
    sampling, thinking = request.sampling, request.chat.thinking
    return [
        ("max_tokens", request.max_tokens),
        ("max_seconds", request.max_seconds),
        ("min_tokens", sampling.min_tokens),
        ("n", request.n),
        ("thinking", math.inf if thinking is True else thinking),
        *(("thinking", math.inf if v is True else v) for v in _told(request.chat) if _counts(v)),
        ("top_logprobs", sampling.logprobs),
    ]


def _told(chat: ChatOptions) -> list[Any]:
    """Values for a template's own variables that are about reasoning."""
    return [value for name, value in chat.variables.items() if _OF_REASONING.search(name)]


def _counts(value: Any) -> bool:
    return isinstance(value, int | float)


def _within(policies: Policies, name: str, value: float | None) -> Decision:
    most = ceiling(policies, name)
    if most is None or value is None or value <= most:
        return ALLOWED
    return Decision(False, f"{name} may be at most {most:g} here, not {value:g}", name)
