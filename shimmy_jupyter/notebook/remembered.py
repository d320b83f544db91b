"""What a notebook's cells were and what came of them: `In`, `Out` and `Err`, for prompts."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, overload

from IPython.core.error import UsageError
from IPython.core.history import HistoryManager
from IPython.core.interactiveshell import ExecutionInfo, ExecutionResult, InteractiveShell

from ..errors import ShimmyError
from .display import clean

_ESCAPE = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]+[0-~]|[@-_])"
)
_FRAME = re.compile(r'^(?P<indent>[ |]*)File "(?P<name>[^"\n]+)", line', re.MULTILINE)
_CELL = re.compile(r"\s*%%(?:shimmy|ai)\b")
_LINE = re.compile(r"[^\S\n]*(?:\w+\s*=\s*)?%(?:shimmy|ai)\b")


def plain(text: str, longest: int) -> str:
    """The text without escape sequences and controls, of `longest` characters at most beside a line that says
    how many are left out. The beginning and, as what matters is often last, more of the end are kept.
    """
    text = clean(_ESCAPE.sub("", text))
    if len(text) <= longest:
        return text
    first = longest // 3
    out = f"{len(text) - longest:,} characters left out"
    return f"{text[:first]}\n… {out} …\n{text[len(text) - longest + first :]}"


def is_prompt(source: str) -> bool:
    """Whether a cell does nothing but ask a model: `%%shimmy` or `%%ai`, or lines that all are `%shimmy`."""
    if _CELL.match(source):
        return True
    lines = (line.strip() for line in source.split("\n"))
    said = [line for line in lines if line and not line.startswith("#")]
    return bool(said) and all(_LINE.match(line) for line in said)


class NoSuchCell(LookupError):
    """There is no such input, output or error. Says which there are."""


@dataclass(frozen=True, slots=True)
class LastError:
    """`kind` is the exception's type by name, `traceback` plain text, `source` the cell as it was written."""

    number: int
    kind: str
    traceback: str
    source: str


class Inputs:
    """Sources as they were written, by number from 1; from -1 backwards those before the running cell.
    For all else like IPython's own list, which begins with an empty text.
    """

    def __init__(self, remembered: Remembered) -> None:
        self._remembered = remembered

    def __len__(self) -> int:
        return self._remembered.completed + 1

    def __iter__(self) -> Iterator[str]:
        return iter(self[:])

    @overload
    def __getitem__(self, n: int) -> str: ...
    @overload
    def __getitem__(self, n: slice) -> list[str]: ...
    def __getitem__(self, n: int | slice) -> str | list[str]:
        sources = self._remembered.sources
        if isinstance(n, slice):
            return list(islice(sources, len(self)))[n]
        last = len(self) - 1
        number = n + last + 1 if n < 0 else n
        if not 1 <= number <= last:
            raise _missing("In", n, range(1, last + 1), self._remembered.running)
        return str(sources[number])


class _Numbered(Mapping[int, Any]):
    """Values by a cell's number; -1 is the last there is, -2 the one before."""

    def __init__(self, name: str, values: Mapping[int, Any], remembered: Remembered) -> None:
        self._name, self._values, self._remembered = name, values, remembered

    def __getitem__(self, n: int) -> Any:
        if n in self._values:
            return self._values[n]
        there = sorted(self._values)
        if isinstance(n, int) and -len(there) <= n < 0:
            return self._values[there[n]]
        raise _missing(self._name, n, there, self._remembered.running)

    def __iter__(self) -> Iterator[int]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, n: object) -> bool:
        return n in self._values

    def get(self, n: int, default: Any = None) -> Any:
        return self._values.get(n, default)

    def __repr__(self) -> str:
        return repr(dict(self._values))


def _missing(name: str, n: object, there: Sequence[int], running: int | None) -> NoSuchCell:
    said = f"there is no {name}[{n!r}]"
    if n == running and n is not None:
        said += ": that cell is running"
    if not there:
        return NoSuchCell(f"{said}; there are none so far")
    shown = ", ".join(map(str, there[-8:]))
    more = f" and {len(there) - 8} before" if len(there) > 8 else ""
    return NoSuchCell(f"{said}; there {'are' if there[1:] else 'is'} {shown}{more}")


class Remembered:
    """Follows a shell's cells until it is closed. The errors of the last `MOST` cells that failed are kept."""

    MOST = 100
    LONGEST = 8000
    """Characters of a traceback."""

    def __init__(self, shell: InteractiveShell) -> None:
        self.shell = shell
        self._errors: dict[int, str] = {}
        self._last: LastError | None = None
        # A cell may run others. Whoever is loaded by a cell has missed its beginning.
        self._running: list[ExecutionInfo] = []
        if (result := shell.displayhook.exec_result) is not None:
            self._running.append(result.info)
        self.inputs = Inputs(self)
        shell.events.register("pre_run_cell", self._begins)
        shell.events.register("post_run_cell", self._ended)

    def close(self) -> None:
        """Follow no more; what is known stays. Closing again is fine."""
        for event, callback in (("pre_run_cell", self._begins), ("post_run_cell", self._ended)):
            if callback in self.shell.events.callbacks[event]:
                self.shell.events.unregister(event, callback)

    @property
    def sources(self) -> Sequence[str]:
        """IPython's list of all cells as they were written, the running one included; "" at 0."""
        sources: Sequence[str] = self._history.input_hist_raw
        return sources

    @property
    def _history(self) -> HistoryManager:
        history: HistoryManager | None = self.shell.history_manager
        assert history is not None
        return history

    @property
    def running(self) -> int | None:
        """The number of the cell that runs. None between cells."""
        if any(info.store_history for info in self._running):
            return len(self.sources) - 1
        return None

    @property
    def completed(self) -> int:
        """The number of the last cell that is not running; 0 before the first."""
        return len(self.sources) - (1 if self.running is None else 2)

    @property
    def outputs(self) -> Mapping[int, Any]:
        values: dict[int, Any] = self._history.output_hist  # type: ignore[assignment]
        return _Numbered("Out", values, self)

    @property
    def errors(self) -> Mapping[int, str]:
        """Tracebacks as plain text."""
        return _Numbered("Err", self._errors, self)

    @property
    def last_error(self) -> LastError | None:
        """What the last cell failed by that is no prompt; an interrupt does not count."""
        return self._last

    def namespace(self) -> dict[str, Any]:
        """The user's variables as they are now, with `In`, `Out` and `Err`, unless the user has those."""
        user = {**self.shell.user_global_ns, **self.shell.user_ns}
        history = self._history
        if user.get("In", history.input_hist_parsed) is history.input_hist_parsed:
            user["In"] = self.inputs
        if user.get("Out", history.output_hist) is history.output_hist:
            user["Out"] = self.outputs
        user.setdefault("Err", self.errors)
        return user

    def evaluate(self, expression: str) -> object:
        """What an expression says in the user's namespace. Raises whatever it raises, and `NoSuchCell`."""
        with self.shell.builtin_trap:
            code = compile(expression.strip(), "<prompt>", "eval", dont_inherit=True)
            return eval(code, self.namespace())  # noqa: S307  it is the user's, in the user's kernel

    def _begins(self, info: ExecutionInfo) -> None:
        self._running.append(info)

    def _ended(self, result: ExecutionResult | None) -> None:
        info: ExecutionInfo | None = None if result is None else result.info
        source = "" if info is None else info.raw_cell or ""
        if info is not None and not source.strip():
            return  # nothing has begun
        running = self.running
        if self._running:
            self._running.pop()
        if result is None or info is None or not info.store_history:
            return
        number = result.execution_count or running
        if number is None:
            return
        for stale in [n for n in self._errors if n >= number]:
            del self._errors[stale]  # %reset begins at 1 again
        error = result.error_before_exec or result.error_in_exec
        if error is not None:
            self._remember(number, error, source)

    def _remember(self, number: int, error: BaseException, source: str) -> None:
        text = plain(self._traceback(error), self.LONGEST)
        self._errors[number] = text
        while len(self._errors) > self.MOST:
            del self._errors[next(iter(self._errors))]
        if not isinstance(error, KeyboardInterrupt) and not is_prompt(source):
            self._last = LastError(number, type(error).__name__, text, source)

    def _traceback(self, error: BaseException) -> str:
        """Python's own, from the cell on and by its number: the same in every version and front end."""
        if isinstance(error, ShimmyError):
            return "\n".join(error._render_traceback_())
        frame = None if isinstance(error, UsageError) else error.__traceback__
        while frame is not None and self._cell(frame.tb_frame.f_code.co_filename) is None:
            frame = frame.tb_next
        # Without any of the cell's, as for a mistake in its syntax or with a magic, frames are IPython's alone.
        found = traceback.TracebackException(type(error), error, frame, compact=True)
        return _FRAME.sub(self._named, "".join(found.format())).rstrip("\n")

    def _cell(self, filename: str) -> str | None:
        named = self.shell.compile.format_code_name(filename)
        return " ".join(named) if named else None

    def _named(self, match: re.Match[str]) -> str:
        cell = self._cell(match["name"])
        return f"{match['indent']}{cell}, line" if cell else match[0]
