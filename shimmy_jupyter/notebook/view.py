"""One answer on the screen, as it comes: an output that is updated, or plain text in a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from typing import Any, Self

from IPython.core.interactiveshell import InteractiveShell
from IPython.display import display, update_display

from . import formats
from .arguments import Format
from .display import Pace, clean
from .formats import shown
from .result import Completion, Stream


class Shown(Completion):
    """An answer that the cell has shown already: it is not shown again for being the cell's last value. A
    copy of it, or what a pickle gives back, has not been shown.
    """

    @classmethod
    def of(cls, found: Completion, shell: InteractiveShell) -> Self:
        made = cls(**{one.name: getattr(found, one.name) for one in fields(Completion)})
        made.__dict__.update(_shell=shell, _count=shell.execution_count)
        return made

    def _ipython_display_(self) -> None:
        shell, count = self.__dict__.get("_shell"), self.__dict__.get("_count")
        if shell is None or shell.execution_count != count:
            data, metadata = self._repr_mimebundle_()
            display(data, metadata=metadata, raw=True)  # type: ignore[no-untyped-call]


class View:
    """Where there is no front end, a text is printed as it comes, and what has to be looked through first
    when it is whole.
    """

    def __init__(self, *, rich: bool, stream: bool, format: Format = Format.MARKDOWN) -> None:
        self._rich, self._format = rich, format
        self._stream = stream and (rich or format in (Format.MARKDOWN, Format.TEXT))
        self._id: str | None = None
        self._pace = Pace()
        self._printed = False
        self.gathered = Stream()

    def follow(self, items: Iterable[dict[str, Any]]) -> Stream:
        """Shows it as it comes. Returns all of it; the last look is for whoever has the figures."""
        for text in self._texts(items):
            if not self._stream:
                continue
            if not self._rich:
                self._printed = True
                print(clean(text), end="", flush=True)
            elif self._pace.due(time.monotonic()):
                self._show(done=False)
        return self.gathered

    def end(
        self, note: str, *, receipt: str = "", metadata: Mapping[str, Any] | None = None
    ) -> formats.Shown:
        """The answer as it stays, with what there is to say of it."""
        found = shown(
            self._format,
            self.gathered.text,
            note=note,
            reasoning=self.gathered.reasoning,
            receipt=receipt,
        )
        if self._rich:
            self._publish(found, metadata or {})
        elif self._printed:
            print(f"\n[{clean(note)}]")
        elif self.gathered.text:
            print(found.bundle["text/plain"])
        return found

    @property
    def begun(self) -> bool:
        """Whether there is something on the screen."""
        return self._id is not None or self._printed

    def _texts(self, items: Iterable[dict[str, Any]]) -> Iterator[str]:
        for item in items:
            if "waiting" in item:
                self._wait(item["waiting"])
                continue
            text = self.gathered.add(item)
            if text or (self.gathered.reasoning and not self.gathered.text):
                yield text

    def _wait(self, waiting: dict[str, Any]) -> None:
        """Say what there is to wait for, where it can be replaced by the answer."""
        if self._rich and self._stream:
            self._show(done=False, note=waited(waiting))

    def _show(self, *, done: bool, note: str = "") -> None:
        found, began = self.gathered, time.monotonic()
        made = shown(self._format, found.text, note=note, reasoning=found.reasoning, done=done)
        self._publish(made, {}, time.monotonic() - began)

    def _publish(
        self, found: formats.Shown, metadata: Mapping[str, Any], took: float = 0.0
    ) -> None:
        said = {**found.metadata, **metadata}
        if self._id is None:
            self._id = f"shimmy-{time.time_ns():x}"
            display(found.bundle, metadata=said, raw=True, display_id=self._id)  # type: ignore[no-untyped-call]
        else:
            update_display(found.bundle, metadata=said, raw=True, display_id=self._id)  # type: ignore[no-untyped-call]
        size = sum(len(part) for part in found.bundle.values() if isinstance(part, str))
        self._pace.shown(time.monotonic(), size, took)
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
