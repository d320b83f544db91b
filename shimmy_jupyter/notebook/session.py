"""What a kernel's magics, its Python functions, its data frames and its panel share."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from IPython.core.interactiveshell import InteractiveShell

from ..errors import InvalidValue
from .client import Connection, Transport
from .conversation import Conversation
from .origin import Origin
from .remembered import Remembered
from .replay import Answers
from .result import Completion
from .saved import names_of

_POLL = 0.2


@dataclass(frozen=True, slots=True)
class Resolved:
    """A request with what a project has pinned for its model. `note` says so beside the answer."""

    body: dict[str, Any]
    note: str
    warnings: tuple[str, ...] = ()


Resolve = Callable[[dict[str, Any], str, Callable[[], dict[str, Any]]], Resolved | None]
"""Takes a request, a profile ("" is none in particular), and what lists the server's models. None where
the request's model is no name that a project has pinned.
"""


def as_it_is(
    _body: dict[str, Any], _profile: str, _listed: Callable[[], dict[str, Any]]
) -> Resolved | None:
    """Where no project has a say."""
    return None


def _nowhere(*_: Any) -> list[str]:
    return ["this is not to be had here"]


@dataclass(frozen=True, slots=True)
class Tools:
    """What reaches beyond the notebook, by whoever puts it together. Each returns lines to show.

    `lock` takes a model's id, the name that it is to have, and what reaches the server. `names` are those
    that a project has pinned; it raises `InvalidValue` where that cannot be told.
    """

    resolve: Resolve = as_it_is
    lock: Callable[[str, str, Transport], list[str]] = _nowhere
    doctor: Callable[[], list[str]] = _nowhere
    versions: Callable[[], list[str]] = list
    names: Callable[[], Sequence[str]] = tuple


@dataclass(slots=True)
class Session:
    """Of one kernel; closed when its magics go."""

    shell: InteractiveShell
    connection: Connection
    origin: Origin
    remembered: Remembered
    tools: Tools = field(default_factory=Tools)
    conversation: Conversation = field(default_factory=Conversation)
    aliases: dict[str, str] = field(default_factory=dict)
    answers: Answers = field(default_factory=Answers)
    given: dict[str, tuple[object, Completion]] = field(default_factory=dict)
    """What went into a variable, and the answer that it is of: by the value it is seen whether it is there yet."""
    borrowed: dict[str, Any] = field(default_factory=dict)
    """Another extension's `%ai`, by kind, which it gets back."""

    @property
    def rich(self) -> bool:
        """Whether there is a front end that can show more than text."""
        return hasattr(self.shell, "kernel")

    @property
    def transport(self) -> Transport:
        return self.connection.transport()

    def listed(self) -> dict[str, Any]:
        return self.transport.get("shimmy/api/models")

    def default_model(self) -> str:
        while (default := self.listed()["default"]) is None:
            time.sleep(_POLL)  # headers are being read that decide it
        return str(default)

    def meant(self, model: str) -> str:
        """The model that a name means: an alias's, or itself."""
        return self.aliases.get(model, model)

    def resolved(self, body: dict[str, Any], profile: str) -> Resolved:
        """A request for a model that somebody has named, with what the project has pinned for the name."""
        found = self.tools.resolve(body, profile, self.listed)
        return Resolved(body, "") if found is None else found

    def names(self) -> Sequence[str]:
        """Of models, aliases, and what the project has pinned. Raises what `Tools.names` does: which of the
        words of a line are names cannot be told then.
        """
        listed = (model["id"] for model in self.listed()["models"])
        return [*dict.fromkeys([*listed, *self.aliases, *self.tools.names()])]

    def names_at_hand(self) -> Sequence[str]:
        """The same for completion, for which no model is made to answer in this kernel."""
        transport = self.connection.at_hand()
        listed = [] if transport is None else transport.get("shimmy/api/models")["models"]
        found = [*(model["id"] for model in listed), *self.aliases]
        with suppress(InvalidValue):  # whoever then asks is told what is wrong
            found += self.tools.names()
        return [*dict.fromkeys(found)]

    def variables(self) -> Sequence[str]:
        """The user's own."""
        hidden: Any = self.shell.user_ns_hidden
        return [name for name in self.shell.user_ns if name[:1] != "_" and name not in hidden]

    def answered(self) -> Sequence[str]:
        """The user's variables, and what else an answer can be replayed by."""
        path = self.origin.path
        saved = [] if path is None else names_of(path)
        return [*self.variables(), *self.answers.names(), *saved]

    def assign(self, name: str, value: object, answer: Completion) -> None:
        """To a variable of the user's."""
        self.shell.push({name: value})  # type: ignore[no-untyped-call]
        self.given[name] = value, answer

    def close(self) -> None:
        """Closing twice is fine."""
        self.remembered.close()
