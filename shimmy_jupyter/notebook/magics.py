"""`%%shimmy` and `%shimmy`: ask the model, see the answer as it is made."""

from __future__ import annotations

import contextlib
import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from IPython.core.interactiveshell import InteractiveShell
from IPython.core.magic import Magics, line_cell_magic, magics_class
from IPython.display import display, update_display
from traitlets import Bool, Float, Int, Unicode

from ..errors import InvalidValue, ShimmyError
from .client import Connection, events
from .commands import Board, command
from .display import Answer, Pace, clean

_POLL = 0.2
_OPTION = re.compile(r"""--([a-z][a-z_-]*)(?:\s*=\s*|\s+)("[^"]*"|'[^']*'|\S+)\s*""")
_T = TypeVar("_T", int, float)


def _number(kind: Callable[[str], _T]) -> Callable[[str, str], _T]:
    def read(name: str, value: str) -> _T:
        number: _T | None = None
        with contextlib.suppress(ValueError):
            number = kind(value)
        if number is None or not math.isfinite(number):
            wanted = "a whole number" if kind is int else "a number"
            raise InvalidValue(f"{value!r} is not {wanted}", param=f"--{name}")
        return number

    return read


def _word(_name: str, value: str) -> str:
    return value


_OPTIONS: dict[str, Callable[[str, str], Any]] = {
    "model": _word,
    "system": _word,
    "temperature": _number(float),
    "max-tokens": _number(int),
    "seed": _number(int),
}


def parse_options(line: str) -> tuple[dict[str, Any], str]:
    """Options at the line's beginning, and the rest of it as it stands. `--` ends the options.

    Raises `InvalidValue` for an option that is not known or lacks its value.
    """
    options: dict[str, Any] = {}
    rest = line.strip()
    while rest.startswith("--"):
        if rest == "--" or rest[2].isspace():
            return options, rest[2:].strip()
        match = _OPTION.match(rest)
        name = (match[1] if match else rest[2:].split("=")[0].split()[0]).replace("_", "-")
        if name not in _OPTIONS:
            known = ", ".join(f"--{option}" for option in _OPTIONS)
            raise InvalidValue(f"there is no such option; there are {known}", param=f"--{name}")
        if match is None:
            raise InvalidValue("this option needs a value", param=f"--{name}")
        value = match[2]
        quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "\"'"
        options[name] = _OPTIONS[name](name, value[1:-1] if quoted else value)
        rest = rest[match.end() :]
    return options, rest


def parse_cell_line(line: str) -> dict[str, Any]:
    """The first line of a cell: options and at most one model, in any order."""
    options, rest = parse_options(line)
    if not rest:
        return options
    model, _, after = rest.partition(" ")
    more, extra = parse_options(after)
    if extra or "model" in options or "model" in more:
        raise InvalidValue(
            f"the first line takes options and one model, not {line.strip()!r}", param="model"
        )
    return {**options, **more, "model": model}


_ASKED = re.compile(r"^(\s*(?:\w+\s*=\s*)?)%shimmy\s+(\S.*\?)\s*$")


def questions_are_not_help(lines: list[str]) -> list[str]:
    """IPython reads `%shimmy What does len do?` as a wish for help on `do`. An input transformer,
    which takes and returns a cell's lines; it leaves other cells' magics and texts alone.
    """
    if not lines or lines[0].startswith("%%"):
        return lines
    changed = []
    inside = ""
    for line in lines:
        match = None if inside else _ASKED.match(line)
        if match:
            changed.append(f"{match[1]}get_ipython().run_line_magic('shimmy', {match[2]!r})\n")
            continue
        changed.append(line)
        for quotes in re.findall(r'"""|\'\'\'', line):
            inside = "" if inside == quotes else inside or quotes
    return changed


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


@magics_class
class ShimmyMagics(Magics):
    """Settings for one notebook: `%config ShimmyMagics.temperature = 0`."""

    model = Unicode("", help="The model to ask. Empty: the first that the server lists.").tag(
        config=True
    )
    system = Unicode("", help="A system message in front of every prompt.").tag(config=True)
    temperature = Float(None, allow_none=True, help="0 is greedy. None: the server's default.").tag(
        config=True
    )
    max_tokens = Int(
        None, allow_none=True, help="Most tokens to generate. None: the server's default."
    ).tag(config=True)

    profile = Unicode(
        "",
        help="Of shimmy.lock, for names that it has. Empty: what SHIMMY_PROFILE says, if anything.",
    ).tag(config=True)

    stream = Bool(True, help="Show the answer as it is made. False: once, when it is whole.").tag(
        config=True
    )

    def __init__(
        self,
        shell: InteractiveShell,
        connection: Connection,
        resolve: Resolve = as_it_is,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(shell)
        self._check = check
        self.connection = connection
        self._resolve = resolve
        self._warned: set[str] = set()

    @line_cell_magic
    def shimmy(self, line: str, cell: str | None = None) -> None:
        """Ask a local language model.

        %shimmy [OPTIONS] PROMPT
        %%shimmy [MODEL] [OPTIONS]
        PROMPT, as many lines as you like

        %shimmy models         what there is; with --suggest, what is worth downloading
        %shimmy pull MODEL     download: OWNER/NAME on Hugging Face, or a suggestion's name

        Options: --model NAME, --system TEXT, --temperature X (0 is greedy),
        --max-tokens N, --seed N. `%shimmy -- PROMPT` for a prompt that begins with "--".
        Interrupting the kernel stops the model too.
        """
        if cell is None and (run := command(line)) is not None:
            board = Board(rich=hasattr(self.shell, "kernel"))
            run(self.connection.transport(), board.show)
            return
        if cell is None:
            options, prompt = parse_options(line)
        else:
            options, prompt = parse_cell_line(line), cell.strip()
        self._check()
        if not prompt:
            raise InvalidValue("there is no prompt: `%shimmy PROMPT`, or write it below `%%shimmy`")
        self._ask(prompt, options)

    def _ask(self, prompt: str, options: dict[str, Any]) -> None:
        view = _View(rich=hasattr(self.shell, "kernel"), stream=self.stream)
        try:
            body = self._body(prompt, options)
            if resolved := self._resolved(body):
                body, view.origin = resolved.body, resolved.note
            transport = self.connection.transport()
            with transport.stream("shimmy/v1/chat/completions", body) as chunks:
                view.follow(events(chunks))
        except KeyboardInterrupt:
            view.end("stopped")
            raise KeyboardInterrupt from None
        except ShimmyError:
            view.end("failed")
            raise

    def _body(self, prompt: str, options: dict[str, Any]) -> dict[str, Any]:
        system = options.get("system", self.system)
        messages = [{"role": "system", "content": system}] if system else []
        body = {
            "model": options.get("model", self.model),
            "messages": [*messages, {"role": "user", "content": prompt}],
            "temperature": options.get("temperature", self.temperature),
            "max_tokens": options.get("max-tokens", self.max_tokens),
            "seed": options.get("seed"),
            # Whoever names a seed wants the same answer again.
            "reproducible": True if "seed" in options else None,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return {name: value for name, value in body.items() if value is not None}

    def _resolved(self, body: dict[str, Any]) -> Resolved | None:
        """By what the project has pinned, where a model is named; else the first is."""
        if not body["model"]:
            body["model"] = self._first_model()
            return None
        resolved = self._resolve(body, self.profile, self._listed)
        for warning in resolved.warnings if resolved is not None else ():
            if warning not in self._warned:
                self._warned.add(warning)
                print(f"shimmy: {clean(warning)}")
        return resolved

    def _listed(self) -> dict[str, Any]:
        return self.connection.transport().get("shimmy/api/models")

    def _first_model(self) -> str:
        transport = self.connection.transport()
        while (default := transport.get("shimmy/api/models")["default"]) is None:
            time.sleep(_POLL)  # headers are being read that decide it
        return str(default)


class _View:
    """One answer on the screen: an output that is updated, or plain text in a terminal."""

    def __init__(self, *, rich: bool, stream: bool) -> None:
        self._rich, self._stream = rich, stream
        self._text = self._reasoning = ""
        self.origin = ""
        """Where the model was taken from, for the figures."""
        self._id: str | None = None
        self._pace = Pace()

    def follow(self, items: Iterable[dict[str, Any]]) -> None:
        for text in self._texts(items):
            self._text += text
            if not self._stream:
                continue
            if not self._rich:
                print(clean(text), end="", flush=True)
            elif self._pace.due(time.monotonic()):
                self._show(Answer(self._text, "", self._reasoning))

    def end(self, note: str) -> None:
        if self._rich:
            if self._text or note != "failed":
                self._show(Answer(self._text, note, self._reasoning))
        elif self._text:
            whole = "" if self._stream else clean(self._text)
            print(f"{whole}\n[{note}]")

    def _wait(self, waiting: dict[str, Any]) -> None:
        """Say what there is to wait for, where it can be replaced by the answer."""
        if self._rich and self._stream:
            self._show(Answer("", waited(waiting)))

    def _texts(self, items: Iterable[dict[str, Any]]) -> Iterator[str]:
        reason, last = None, {}
        for item in items:
            if "waiting" in item:
                self._wait(item["waiting"])
                continue
            for choice in item["choices"]:
                reason = choice["finish_reason"] or reason
                self._reasoning += choice["delta"].get("reasoning_content", "")
                if text := choice["delta"].get("content"):
                    yield text
                elif self._reasoning and not self._text:
                    yield ""
            last = item
        self.end(_figures(last, reason, self.origin))

    def _show(self, answer: Answer) -> None:
        bundle = answer.bundle()
        if self._id is None:
            self._id = f"shimmy-{time.time_ns():x}"
            display(bundle, raw=True, display_id=self._id)  # type: ignore[no-untyped-call]
        else:
            update_display(bundle, raw=True, display_id=self._id)  # type: ignore[no-untyped-call]
        self._pace.shown(time.monotonic(), sum(map(len, bundle.values())))
        sys.stdout.flush()


def waited(waiting: dict[str, Any]) -> str:
    """What a request without an answer yet is waiting for, in words."""
    if waiting["state"] == "loading":
        done, total = waiting["done"], waiting["total"]
        share = f", {done * 100 // total}%" if total else ""
        return f"loading the model: {waiting['message']}{share}"
    if waiting["state"] == "prefill":
        return f"reading the prompt: {waiting['prompt_done']} of {waiting['prompt_tokens']} tokens"
    position = waiting["position"]
    before = f"{position} request{'s' * (position != 1)} before this one; " if position else ""
    return f"waiting: {before}{waiting['reason']}"


def _figures(last: dict[str, Any], reason: str | None, origin: str) -> str:
    used, timings = last["usage"], last["shimmy"]
    parts = [str(last["model"]), *filter(None, [origin])]
    parts.append(f"{used['completion_tokens']} tokens")
    if timings["tokens_per_second"]:
        parts.append(f"{timings['tokens_per_second']:.0f} tokens/s")
    if timings["ttft_ms"] is not None:
        parts.append(f"first token after {timings['ttft_ms']:.0f} ms")
    if reason == "length":
        parts.append("cut off at max_tokens")
    return " · ".join(parts)
