"""Who asks for what, from where; and what of it is kept."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..types import CompletionRequest, EmbeddingRequest, Message, Principal, Prompt, Sampling

_PLAIN = {
    "reproducible",
    "echo",
    "max_tokens",
    "max_seconds",
    "n",
    "adapter",
}
_DEFAULTS = CompletionRequest("", Principal(""), "", "")


@dataclass(frozen=True, slots=True)
class Asked:
    """`route` is what kind of answer is wanted, for counting; `notebook` and `cell` are what a client
    says of itself, and recorded only.
    """

    principal: Principal
    request_id: str
    route: str = "completions"
    client_ip: str | None = None
    request_path: str | None = None
    notebook: str | None = None
    cell: str | None = None


@dataclass(frozen=True, slots=True)
class Subject:
    """What is asked, as the ledger has it: `parameters` without texts, `prompt` as bytes to digest."""

    model: str
    parameters: Mapping[str, Any]
    prompt: bytes
    text: str
    """The prompt for a ledger that records content."""


def of_completion(request: CompletionRequest, digest: Any) -> Subject:
    """`digest` makes a text's keyed digest."""
    prompt = serialized(request.prompt)
    return Subject(request.model, _parameters(request, digest), prompt, prompt.decode())


def of_embedding(request: EmbeddingRequest) -> Subject:
    prompt = json.dumps(request.inputs, ensure_ascii=False).encode("utf-8", "backslashreplace")
    parameters: dict[str, Any] = {"inputs": len(request.inputs)}
    if request.dimensions is not None:
        parameters["dimensions"] = request.dimensions
    return Subject(request.model, parameters, prompt, prompt.decode())


def serialized(prompt: Prompt) -> bytes:
    """A text as it is, tokens and messages as JSON without blanks: what `prompt_digest` is of."""
    if isinstance(prompt, str):
        return prompt.encode("utf-8", "backslashreplace")
    if prompt and isinstance(prompt[0], Message):
        turns = [_turn(turn) for turn in prompt if isinstance(turn, Message)]
        return json.dumps(turns, ensure_ascii=False, separators=(",", ":")).encode(
            "utf-8", "backslashreplace"
        )
    return json.dumps(prompt, separators=(",", ":")).encode()


def _turn(message: Message) -> dict[str, str]:
    named = {"name": message.name} if message.name is not None else {}
    return {"role": message.role, "content": message.content, **named}


def _parameters(request: CompletionRequest, digest: Any) -> dict[str, Any]:
    """What differs from the defaults. What can carry content is digested."""
    found = {
        name: getattr(request, name)
        for name in sorted(_PLAIN)
        if getattr(request, name) != getattr(_DEFAULTS, name)
    }
    sampling = request.sampling
    plain = {f.name for f in fields(Sampling)} - {"logit_bias", "constraint", "reasoning"}
    default = Sampling()
    found |= {
        name: getattr(sampling, name)
        for name in sorted(plain)
        if getattr(sampling, name) != getattr(default, name)
    }
    if sampling.logit_bias:
        found["logit_bias"] = digest(json.dumps(sampling.logit_bias))
    if sampling.constraint is not None:
        source = sampling.constraint.source
        found["constraint"] = {"kind": sampling.constraint.kind, "source": digest(source)}
    if request.stop:
        found["stop"] = digest(json.dumps(request.stop))
    if request.suffix:
        found["suffix"] = digest(request.suffix)
    return found | _chat_parameters(request, digest)


def _chat_parameters(request: CompletionRequest, digest: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    chat = request.chat
    if chat.thinking is not None:
        found["thinking"] = chat.thinking
    if chat.effort is not None:
        found["reasoning_effort"] = chat.effort
    if chat.variables:
        found["chat_template_kwargs"] = digest(json.dumps(dict(chat.variables), sort_keys=True))
    if request.pin is not None:
        found["pin"] = {k: v for k, v in asdict(request.pin).items() if v not in (None, ())}
    return found
