"""What is asked of the engine's process, and what it answers. `wire` carries it."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.messages import Row, SlotChange, Step
from ..errors import EngineCrashed, EngineLost, ShimmyError, from_code
from ..types import Constraint
from .backend import LoadSpec

# Requests


@dataclass(frozen=True, slots=True)
class Load:
    """Answered by `ModelFacts`."""

    spec: LoadSpec


@dataclass(frozen=True, slots=True)
class Work:
    """Changes, then a step if there is one; answered by `StepResult`. `number` is for `Abort`."""

    number: int
    changes: tuple[SlotChange, ...]
    step: Step | None = None
    threads: int = 1
    limit: float | None = None


@dataclass(frozen=True, slots=True)
class LoadAdapter:
    """Answered by `Done`."""

    path: str


@dataclass(frozen=True, slots=True)
class Embed:
    """Rows of texts to embed; answered by `Embedded`. `number` is for `Abort`."""

    number: int
    rows: tuple[Row, ...]
    threads: int = 1
    limit: float | None = None


@dataclass(frozen=True, slots=True)
class Unload:
    """Answered by `Done`, after which the child ends."""


@dataclass(frozen=True, slots=True)
class Abort:
    """Of the work with this number and no other. Has no answer of its own."""

    number: int


@dataclass(frozen=True, slots=True)
class Tokenize:
    """Answered by `Tokens`, in order."""

    text: str


@dataclass(frozen=True, slots=True)
class TokenizeInputs:
    """Answered by `TokenLists`, in order."""

    inputs: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Detokenize:
    """Answered by `Text`, in order."""

    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Compile:
    """Answered by `Done`, in order."""

    constraint: Constraint


# Replies; any request may be answered by `Failed` too


@dataclass(frozen=True, slots=True)
class Done:
    pass


@dataclass(frozen=True, slots=True)
class Tokens:
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TokenLists:
    lists: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Text:
    text: bytes


@dataclass(frozen=True, slots=True)
class Failed:
    """An error. `lost` tells an `EngineLost` from the `EngineCrashed` whose code it shares."""

    code: str
    message: str
    lost: bool = False
    param: str | None = None

    @classmethod
    def of(cls, error: ShimmyError) -> Failed:
        return cls(error.code, error.message, isinstance(error, EngineLost), error.param)

    def error(self) -> ShimmyError:
        if self.code == EngineCrashed.code:
            return (EngineLost if self.lost else EngineCrashed)(self.message)
        return from_code(self.code, self.message, param=self.param)


WorkRequest = Load | Work | LoadAdapter | Embed | Unload
SideRequest = Abort | Tokenize | TokenizeInputs | Detokenize | Compile
