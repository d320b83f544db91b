"""Asking for an answer again, and saying what came of it: identical; or where and by how much it
diverged; or what has drifted since, be it the model's bytes, the template, the engine or the machine.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any
from urllib.parse import quote

from ..errors import InvalidValue, ModelNotFound, NotFound, ShimmyError
from ..types import MadeBy
from .board import follow
from .client import Transport, events
from .display import one_line
from .divergence import Divergence, Score, divergence
from .provenance import Kept, Provenance, digest, of
from .saved import names, pick

_CHAT = "shimmy/v1/chat/completions"
_TOP = 20
_SHOWN = 12
_NAMES = {
    "quantization": "quantisation",
    "chat_template": "chat template",
    "engine": "engine version",
    "build": "engine build",
    "cpu": "processor",
    "cpu_features": "processor's instructions",
    "context_size": "context size",
    "kv_type": "KV cache type",
    "gpu_layers": "layers on a GPU",
}
_PLAIN = (
    "quantization engine build cpu cpu_features context_size kv_type threads gpu_layers".split()
)
Watch = Callable[[dict[str, Any]], None]
"""Hears each event of the answer as it comes."""


class Verdict(StrEnum):
    """What came of a replay; where something has drifted, whether or not the text is the same."""

    IDENTICAL = "identical"
    DIVERGED = "diverged"
    DRIFTED = "drifted"


@dataclass(frozen=True, slots=True)
class Change:
    """What is not as it was when the answer was saved, in words and shortened digests."""

    name: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.name}: {self.before} → {self.after}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of a replay. `same` is whether the text is the same, `divergence` where it is not, None also where
    the text that was saved is not known; `after` is what made the new one.
    """

    same: bool
    changes: tuple[Change, ...]
    divergence: Divergence | None
    notes: tuple[str, ...]
    text: str
    after: Provenance

    @property
    def verdict(self) -> Verdict:
        if self.changes:
            return Verdict.DRIFTED
        return Verdict.IDENTICAL if self.same else Verdict.DIVERGED

    def lines(self) -> list[str]:
        """For people, a line each, without effect on a terminal; for HTML it is text like any other."""
        return [one_line(line) for line in (*self._said(), *self.notes)]

    def _said(self) -> Iterator[str]:
        found, used = self.verdict, self.after.usage
        figures = f"{used.completion_tokens} tokens, sha256 {_short(self.after.answer_sha256)}"
        if found is Verdict.IDENTICAL:
            yield f"{found}: {figures}"
            return
        if found is Verdict.DRIFTED:
            yield f"{found}: {'; '.join(map(str, self.changes))}"
        if self.same:
            yield f"nevertheless the text is identical: {figures}"
        elif self.divergence is None:
            yield "diverged: the text is another one, and where is not known"
        else:
            yield from self.divergence.lines()


def replay(
    transport: Transport,
    saved: Provenance,
    text: str | None,
    *,
    instead: Mapping[str, Any] | None = None,
    watch: Watch = lambda _: None,
) -> Outcome:
    """Ask again for what was `saved`, reproducibly, with the parameters that had effect; `text` is the
    answer's, None where it is not known. `instead` are other fields of the request, such as a model or
    a seed. Its model is looked for by its bytes first, then by its name.

    Raises `InvalidValue` where the request was too long to be kept, `ModelNotFound`, and what the
    service refuses a request by.
    """
    if saved.request is None:
        raise InvalidValue(
            "the messages were too long to be kept in the notebook: run the cell again",
            param="cell",
        )
    given = {name: value for name, value in saved.parameters.items() if value is not None}
    body = {**saved.request, **given, **(instead or {})}
    body |= _located(transport, saved, body)
    body |= {"reproducible": True, "stream": True, "stream_options": {"include_usage": True}}
    body |= {"logprobs": True, "top_logprobs": _TOP}
    answer, notes = _asked(transport, body, watch)
    after = of(body, answer.last, answer.text, answer.reason, reasoning=answer.reasoning)
    if after is None:
        raise NotFound("this server does not say what makes an answer: it cannot be compared")
    after, verified = _verified(transport, saved, after)
    changes = compare(saved, after)
    return Outcome(
        same := saved.answer_sha256 == after.answer_sha256,
        changes,
        None if same or text is None else divergence(text, answer.text, answer.scores),
        (*notes, *verified, *_remarks(saved, after, same=same)),
        answer.text,
        after,
    )


# Comparing


def compare(before: Provenance, after: Provenance) -> tuple[Change, ...]:
    """What differs in what made two answers, by which their texts may. What is not known on one side
    does not count, nor does what had no effect: a seed where nothing was left to chance, or how many
    tokens were allowed where no answer came to that.
    """
    return (
        *_made(before.made_by, after.made_by),
        *_settings(before, after),
        *_prompt(before, after),
    )


def _made(before: MadeBy, after: MadeBy) -> Iterator[Change]:
    if None not in (before.sha256, after.sha256) and before.sha256 != after.sha256:
        yield Change("model's bytes", _digests(before.sha256), _digests(after.sha256))
    # None of an adapter or a template is that there is none.
    for name in ("chat_template", "adapter"):
        yield from _change(name, getattr(before, name) or "none", getattr(after, name) or "none")
    for name in _PLAIN:
        yield from _change(name, getattr(before, name), getattr(after, name))


def _change(name: str, before: Any, after: Any) -> Iterator[Change]:
    if None not in (before, after) and before != after:
        yield Change(_NAMES.get(name, name), _word(before), _word(after))


def _settings(before: Provenance, after: Provenance) -> Iterator[Change]:
    old, new = before.parameters, after.parameters
    for name in old:
        if name == "reproducible":  # what it is for is that it has no effect
            continue
        if name == "seed" and (before.chance or old["temperature"] == new["temperature"] == 0):
            continue
        if name == "max_tokens" and before.finish_reason == after.finish_reason == "stop":
            continue
        if old[name] != new[name]:
            yield Change(name, _word(old[name]), _word(new[name]))
    was, now = before.request, after.request
    if was is None or now is None:
        yield from _change("request", before.request_sha256, after.request_sha256)
        return
    for name in sorted({*was, *now} - {"adapter"}):  # which is known by its bytes
        if was.get(name) != now.get(name):
            yield Change(name, _word(was.get(name)), _word(now.get(name)))


def _prompt(before: Provenance, after: Provenance) -> Iterator[Change]:
    """Where nothing else explains that the same messages became other tokens: a template can write the
    day's date.
    """
    one, other = before.made_by, after.made_by
    same = (one.sha256, one.chat_template) == (other.sha256, other.chat_template)
    if same and before.request_sha256 == after.request_sha256 and one.prompt != other.prompt:
        yield Change("tokens of the prompt", _short(one.prompt), _short(other.prompt))


def _digests(several: tuple[str, ...] | None) -> str:
    return ", ".join(map(_short, several or ()))


def _word(value: Any) -> str:
    if isinstance(value, str) and len(value) == 64:
        return _short(value)
    if isinstance(value, tuple):
        return " ".join(value) or "none"
    if isinstance(value, list | dict):
        return f"{type(value).__name__} of {len(value)}, sha256 {_short(digest(repr(value)))}"
    return "none" if value is None else str(value)


def _short(sha256: str) -> str:
    return f"{sha256[:_SHOWN]}…"


def _remarks(saved: Provenance, after: Provenance, *, same: bool) -> Iterator[str]:
    if saved.model != after.model:
        yield f"the model is called {after.model} here; it was {saved.model}"
    if None in (saved.made_by.sha256, after.made_by.sha256):
        when = "then" if saved.made_by.sha256 is None else "now"
        yield f"nobody had read the model's bytes {when}, so they are not compared"
    if same and saved.reasoning_sha256 != after.reasoning_sha256:
        yield "the reasoning before the answer is another one"
    if saved.chance:
        yield "it was not reproducible: it had no seed, so chance chose it"
    elif not (same or saved.parameters["reproducible"]):
        yield (
            "it was not asked for reproducibly: other requests beside it can have tipped a token that "
            "was nearly level"
        )


# Asking


@dataclass(slots=True)
class _Answer:
    text: str
    reasoning: str
    reason: str
    scores: list[Score]
    last: dict[str, Any]


def _located(transport: Transport, saved: Provenance, body: Mapping[str, Any]) -> dict[str, str]:
    """The ids that the bytes of the model and of its adapter have here, unless others are asked for.
    Raises `ModelNotFound`.
    """
    models = transport.get("shimmy/api/models")["models"]

    def here(id: str, sha256: str | None, *, lora: bool) -> str:
        several = [m for m in models if (m["kind"] == "lora") is lora and m["kind"] != "projector"]
        same = [m["id"] for m in several if sha256 is not None and m["sha256"] == sha256]
        found = [m["id"] for m in several if m["id"] == id]
        if not (same or found):
            bytes_ = f" (sha256 {_short(sha256)})" if sha256 is not None else ""
            raise ModelNotFound(
                f"{id}{bytes_} is not here, nor under another name",
                param="adapter" if lora else "model",
            )
        return str(id if id in same or not same else same[0])

    by, adapter = saved.made_by, (saved.request or {}).get("adapter")
    found = {}
    if "model" not in body:
        found["model"] = here(saved.model, by.sha256[0] if by.sha256 else None, lora=False)
    if adapter and body.get("adapter") == adapter:
        found["adapter"] = here(str(adapter), by.adapter, lora=True)
    return found


def _asked(
    transport: Transport, body: dict[str, Any], watch: Watch
) -> tuple[_Answer, tuple[str, ...]]:
    """Without what the server does not grant and a replay can do without. `body` is then what was asked."""
    notes: list[str] = []
    while True:
        try:
            return _answered(transport, body, watch), tuple(notes)
        except ShimmyError as error:
            if error.param in {"logprobs", "top_logprobs"} and "logprobs" in body:
                del body["logprobs"], body["top_logprobs"]
                notes.append(f"by how much is not known: {error.message}")
            elif error.param == "max_tokens" and "max_tokens" in body:
                del body["max_tokens"]
                notes.append(f"as many tokens as then are not to be had: {error.message}")
            else:
                raise


def _answered(transport: Transport, body: dict[str, Any], watch: Watch) -> _Answer:
    text, reasoning, reason, scores = [], [], "", list[Score]()
    last: dict[str, Any] = {}
    with transport.stream(_CHAT, body) as chunks:
        for item in events(chunks):
            watch(item)
            if "waiting" in item:
                continue
            last = item
            for choice in item["choices"]:
                delta = choice["delta"]
                text.append(delta.get("content") or "")
                reasoning.append(delta.get("reasoning_content") or "")
                reason = choice["finish_reason"] or reason
                scores += map(Score.of, (choice.get("logprobs") or {}).get("content") or ())
    return _Answer("".join(text), "".join(reasoning), reason, scores, last)


def _verified(
    transport: Transport, saved: Provenance, after: Provenance
) -> tuple[Provenance, tuple[str, ...]]:
    """With the bytes' digests, which have to be read where the server has not done so."""
    if saved.made_by.sha256 is None or after.made_by.sha256 is not None:
        return after, ()
    try:
        path = f"shimmy/api/models/{quote(after.model, safe='')}/verify"
        found = follow(transport, transport.post(path, {})["job"], lambda _: None)
    except ShimmyError as error:
        return after, (f"the model's bytes cannot be read: {error.message}",)
    return replace(after, made_by=replace(after.made_by, sha256=tuple(found["sha256"]))), ()


# What there is to replay


class Answers:
    """A kernel's own answers, the last of them: as many, and with so many characters at most."""

    def __init__(self, most: int = 200, characters: int = 16 << 20) -> None:
        self._most, self._characters = most, characters
        self._kept: deque[tuple[Kept, int]] = deque()
        self._held = 0

    def add(self, answer: Kept) -> None:
        size = len(answer.text or "") + len(repr(answer.provenance.request))
        self._kept.append((answer, size))
        self._held += size
        # The last stays, whatever its size: it is what `%shimmy replay` means.
        while len(self._kept) > self._most or (
            self._held > self._characters and len(self._kept) > 1
        ):
            self._held -= self._kept.popleft()[1]

    def get(self, which: str = "") -> Kept | None:
        """The last; or the last of the cell of this number, in this variable, or of the cell that the
        notebook calls so. None where there is none.
        """
        return pick([answer for answer, _ in self._kept], which)

    def names(self) -> list[str]:
        """What `get` finds them by."""
        return names([answer for answer, _ in self._kept])

    def __len__(self) -> int:
        return len(self._kept)
