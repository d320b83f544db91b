"""What a kernel's magics, its Python functions, its data frames and its panel share."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from IPython.core.interactiveshell import InteractiveShell

from .board import Board
from .client import Connection, Transport
from .conversation import Conversation
from .origin import Origin
from .remembered import Remembered

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

    `lock` takes a name for a model and the model's row of `shimmy/api/models`; `doctor` takes nothing.
    """

    resolve: Resolve = as_it_is
    lock: Callable[[str, dict[str, Any]], list[str]] = _nowhere
    doctor: Callable[[], list[str]] = _nowhere
    versions: Callable[[], list[str]] = list


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

    @property
    def rich(self) -> bool:
        """Whether there is a front end that can show more than text."""
        return hasattr(self.shell, "kernel")

    @property
    def transport(self) -> Transport:
        return self.connection.transport()

    def board(self) -> Board:
        return Board(rich=self.rich)

    def listed(self) -> dict[str, Any]:
        return self.transport.get("shimmy/api/models")

    def default_model(self) -> str:
        while (default := self.listed()["default"]) is None:
            time.sleep(_POLL)  # headers are being read that decide it
        return str(default)

    def meant(self, model: str) -> str:
        """The model that a name means: an alias's, or itself."""
        return self.aliases.get(model, model)

    def names(self) -> Collection[str]:
        """Of models and aliases."""
        return [*(model["id"] for model in self.listed()["models"]), *self.aliases]

    def variables(self) -> Collection[str]:
        """The user's own."""
        hidden: Any = self.shell.user_ns_hidden
        return [name for name in self.shell.user_ns if name[:1] != "_" and name not in hidden]

    def close(self) -> None:
        """Closing twice is fine."""
        self.remembered.close()
