"""What a cell, `-o` and the Python API give back: an answer with all that is known of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import InternalError, InvalidValue
from ..types import Timings, Usage
from . import formats
from .display import one_line, tame
from .likely import Likely, scores

OWN_JSON = "application/vnd.shimmy.completion+json"
"""The media type of a completion as JSON. JupyterLab shows `application/json` before anything else, as a
tree in the answer's stead: that is only there where a caller names it, or the format is JSON.
"""
_WORDS = {"length": "cut off at max_tokens", "stopped": "stopped", "cancelled": "stopped"}


@dataclass(frozen=True, slots=True)
class Receipt:
    """Where the audit log has the request: its place there, and the hash of the record in hexadecimal."""

    request_id: str
    seq: int
    leaf_hash: str

    def __str__(self) -> str:
        return f"receipt {self.seq} · leaf {one_line(self.leaf_hash)[:12]} · request {one_line(self.request_id)}"


@dataclass(frozen=True, slots=True, repr=False)
class Completion:
    """An answer. `str()` of it is its text; a notebook shows it as its `format` says.

    `finish_reason` is "stop", "length" where it was cut off at max_tokens, or "stopped" where somebody
    stopped it. `usage` counts tokens exactly; `timings` are in milliseconds and tokens per second; both are
    None where it was stopped before they were known.
    `receipt` is None where nothing is recorded. `logprobs` are the answer's tokens as OpenAI's chat
    API gives them, None where they were not asked for. `provenance` goes into the output's metadata
    as "shimmy". `parsed` is the validated value of a request with a schema; `raw` what the server
    answered. `origin` says where the model was taken from, "" for no place in particular.
    """

    text: str
    model: str = ""
    reasoning: str = ""
    finish_reason: str = "stop"
    usage: Usage | None = None
    timings: Timings | None = None
    receipt: Receipt | None = None
    request_id: str = ""
    format: str = "markdown"
    logprobs: tuple[Mapping[str, Any], ...] | None = None
    provenance: Mapping[str, Any] | None = None
    parsed: Any = None
    raw: Mapping[str, Any] = field(default_factory=dict)
    origin: str = ""

    def __str__(self) -> str:
        return self.text

    def __format__(self, spec: str) -> str:
        return format(self.text, spec)

    def __repr__(self) -> str:
        short = self.text if len(self.text) <= 60 else self.text[:57] + "..."
        return f"Completion({short!r}, model={self.model!r}, finish_reason={self.finish_reason!r})"

    def __hash__(self) -> int:
        return hash((self.request_id, self.text))

    @property
    def value(self) -> Any:
        """The thing itself: `parsed`, where there was a schema; else by `format` code without its fence, JSON
        as Python's objects, the page, the SVG, the formula; else the text.
        """
        return self.parsed if self.parsed is not None else formats.value(self.format, self.text)

    @property
    def note(self) -> str:
        """The line of figures below the answer."""
        return _line(self.model, self.origin, self.usage, self.timings, self.finish_reason)

    def likely(self) -> Likely:
        """How likely each token was, in colours. Raises `InvalidValue` where that was not asked for."""
        if self.logprobs is None:
            raise InvalidValue(
                "this answer has no log-probabilities: ask for them with the request",
                param="logprobs",
            )
        return Likely.of(self.logprobs, model=self.model)

    def to_json(self) -> dict[str, Any]:
        """What a notebook keeps of it, without `raw` and `logprobs`."""
        return {
            "text": self.text,
            "reasoning": self.reasoning,
            "model": self.model,
            "finish_reason": self.finish_reason,
            "usage": dataclasses.asdict(self.usage) if self.usage else None,
            "timings": dataclasses.asdict(self.timings) if self.timings else None,
            "receipt": dataclasses.asdict(self.receipt) if self.receipt else None,
            "request_id": self.request_id,
            "format": self.format,
        }

    def _repr_mimebundle_(
        self, include: Iterable[str] | None = None, exclude: Iterable[str] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        shown = formats.shown(
            self.format,
            self.text,
            note=self.note,
            reasoning=self.reasoning,
            receipt=str(self.receipt or ""),
        )
        data = {OWN_JSON: tame(self.to_json())} | shown.bundle
        if include is not None and "application/json" in include:
            data.setdefault("application/json", data[OWN_JSON])
        if include is not None:
            data = {name: data[name] for name in data if name in set(include)}
        if exclude is not None:
            data = {name: data[name] for name in data if name not in set(exclude)}
        metadata = {name: of for name, of in shown.metadata.items() if name in data}
        if self.provenance is not None:
            metadata["shimmy"] = dict(self.provenance)
        return data, metadata


def from_body(body: Mapping[str, Any], **known: Any) -> Completion:
    """The first choice of an OpenAI chat or text completion as our server answers it. `known` are further
    fields of `Completion`, such as `format` or `provenance`. Raises `InternalError` for what is none.
    """
    try:
        choice = body["choices"][0]
        message = choice.get("message") or {"content": choice["text"]}
        found = {
            "text": message["content"] or "",
            "reasoning": message.get("reasoning_content") or "",
            "finish_reason": choice["finish_reason"],
            "logprobs": scores(choice.get("logprobs")),
        }
        found |= _figures(body)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise InternalError(f"the server's answer is no completion: {error!r}") from error
    return Completion(**(found | known))


class Stream:
    """Makes a `Completion` of the chunks of a stream, as `client.events` gives them."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._thought: list[str] = []
        self._scores: list[Mapping[str, Any]] | None = None
        self._reason: str | None = None
        self.last: dict[str, Any] = {}
        """The last chunk, which has the figures, with the model's name from the first."""

    @property
    def text(self) -> str:
        self._texts[:] = ["".join(self._texts)]
        return self._texts[0]

    @property
    def reasoning(self) -> str:
        self._thought[:] = ["".join(self._thought)]
        return self._thought[0]

    @property
    def reason(self) -> str | None:
        """Why it ended; None as long as that has not been said."""
        return self._reason

    def add(self, chunk: Mapping[str, Any]) -> str:
        """Takes one chunk; gives the text of the answer that has come with it. Choices but the first, and
        what is said of waiting, are passed over.
        """
        if "waiting" in chunk:
            return ""
        text = ""
        for choice in chunk.get("choices", ()):
            if choice.get("index", 0):
                continue
            self._reason = choice.get("finish_reason") or self._reason
            delta = choice.get("delta") or {"content": choice.get("text")}
            text += delta.get("content") or ""
            self._thought.append(delta.get("reasoning_content") or "")
            found = scores(choice.get("logprobs"))
            if found is not None:
                self._scores = self._scores or []
                self._scores += found
        self._texts.append(text)
        self.last = {**self.last, **chunk}
        return text

    def completion(self, reason: str | None = None, **known: Any) -> Completion:
        """What has come so far. `reason` is how it ended where the stream does not say so."""
        found = {
            "text": self.text,
            "reasoning": self.reasoning,
            "finish_reason": self._reason or reason or "stopped",
            "logprobs": None if self._scores is None else tuple(self._scores),
        }
        return Completion(**(found | _figures(self.last) | known))


def figures(body: Mapping[str, Any], reason: str | None, origin: str = "") -> str:
    """The line below an answer: of a body or a stream's last chunk, and how it ended. `origin` says where
    the model was taken from. What is not there yet, as when it was stopped, is left out.
    """
    found = _figures(body)
    return _line(found["model"], origin, found["usage"], found["timings"], reason)


def receipt_line(body: Mapping[str, Any]) -> str:
    """What a body or a stream's last chunk says of the record; "" where nothing is recorded."""
    return str(_figures(body)["receipt"] or "")


def _figures(body: Mapping[str, Any]) -> dict[str, Any]:
    used, ours = body.get("usage"), body.get("shimmy")
    usage = timings = receipt = None
    if used is not None:
        cached = (used.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        thought = (used.get("completion_tokens_details") or {}).get("reasoning_tokens", 0)
        usage = Usage(used.get("prompt_tokens", 0), used["completion_tokens"], cached, thought)
    if ours is not None:
        queued = ours.get("queue_ms") or 0.0
        timings = Timings(queued, ours.get("ttft_ms"), ours.get("tokens_per_second"))
        kept = ours.get("receipt")
        receipt = kept and Receipt(kept["request_id"], kept["seq"], kept["leaf_hash"])
    return {
        "model": str(body.get("model", "")),
        "usage": usage,
        "timings": timings,
        "receipt": receipt,
        "request_id": str((ours or {}).get("request_id", "")),
        "raw": body,
    }


def _line(
    model: str, origin: str, usage: Usage | None, timings: Timings | None, reason: str | None
) -> str:
    parts = [one_line(model), one_line(origin)]
    if usage is not None:
        parts.append(f"{usage.completion_tokens:,} tokens")
    if timings is not None and timings.tokens_per_second:
        parts.append(f"{timings.tokens_per_second:,.0f} tokens/s")
    if timings is not None and timings.ttft_ms is not None:
        parts.append(f"first token after {timings.ttft_ms:,.0f} ms")
    if usage is not None and usage.cached_tokens:
        parts.append(f"cached {usage.cached_tokens:,} of {usage.prompt_tokens:,} prompt tokens")
    parts.append(_WORDS.get(reason or "", ""))
    return " · ".join(filter(None, parts))
