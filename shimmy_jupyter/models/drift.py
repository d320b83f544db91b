"""Whether what is on this machine is what a lock pins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import zip_longest

from .lockschema import Pin

_NONE = "none"


class Severity(StrEnum):
    """Whether a model that drifted may answer."""

    REFUSE = "refuse"
    WARN = "warn"


@dataclass(frozen=True, slots=True)
class Found:
    """What a model is here. `size` is in bytes, of all its files; `parts` are the SHA-256 of those
    after the first; `context_size` is the most tokens that it can have; `chat_template` is the SHA-256
    of the one in use, None where there is none; adapters are SHA-256 by name.
    """

    size: int
    sha256: str
    context_size: int
    engine: str
    parts: tuple[str, ...] = ()
    chat_template: str | None = None
    adapters: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Drift:
    """One difference. `key` is the path within the pin, such as `adapters.french`."""

    key: str
    what: str
    expected: str
    found: str
    severity: Severity

    def __str__(self) -> str:
        return f"{self.key}: {self.what}: {self.expected} is pinned, {self.found} was found"


def drift(pin: Pin, found: Found) -> list[Drift]:
    """Every difference, in the order of the lock's keys. What is not pinned does not drift, nor does a
    model that can have a larger context than is pinned.
    """
    drifts: list[Drift] = []

    def compare(
        key: str, what: str, expected: str, here: str | None, severity: Severity = Severity.REFUSE
    ) -> None:
        if expected != here:
            drifts.append(Drift(key, what, expected, here or _NONE, severity))

    compare("size", "the model has another number of bytes", str(pin.size), str(found.size))
    compare("sha256", "the file holds other bytes", pin.sha256, found.sha256)
    for i, (expected, here) in enumerate(zip_longest(pin.parts, found.parts)):
        what = "a further file of the model holds other bytes"
        compare(f"parts[{i}]", what, expected or _NONE, here or _NONE)
    if pin.chat_template is not None:
        what = "prompts are written by another chat template"
        compare("chat_template", what, pin.chat_template, found.chat_template)
    if pin.context_size is not None and found.context_size < pin.context_size:
        what = "the model cannot have so long a context here, in tokens"
        compare("context_size", what, str(pin.context_size), str(found.context_size))
    for adapter in pin.adapters:
        what = "the adapter is missing or holds other bytes"
        compare(f"adapters.{adapter.name}", what, adapter.sha256, found.adapters.get(adapter.name))
    if pin.engine is not None:
        what = "the engine has another version, and answers may differ"
        compare("engine", what, pin.engine, found.engine, Severity.WARN)
    return drifts
