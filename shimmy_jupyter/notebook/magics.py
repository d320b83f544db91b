"""`%%shimmy` and `%shimmy`: ask the model, see the answer as it is made, and the commands beside it."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from IPython.core.magic import Magics, line_cell_magic, magics_class, no_var_expand
from traitlets import Bool, Float, Int, Unicode

from ..errors import ContextLengthExceeded, InvalidValue, ShimmyError
from . import accounts, completer, managing, mending, questions, talking
from .arguments import Options, parse_cell
from .asked import Asked, request
from .board import Board
from .client import events
from .conversation import Exchange
from .display import clean, inert
from .grammar import Command, parse_line
from .helptext import about, usage
from .provenance import KEY, Kept, from_json, of, with_seed
from .replay import replay
from .result import Completion
from .saved import answer_of
from .session import Resolved, Session
from .view import Shown, View

_ASSIGNED = re.compile(r"=\s*(?:%shimmy|get_ipython\(\))")
_CHAT = "shimmy/v1/chat/completions"


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
    interpolate = Bool(
        True, help="Put the values of {expressions} into prompts; they run in this kernel."
    ).tag(config=True)
    max_history = Int(
        2,
        min=0,
        help="How many earlier questions of this notebook, with their answers, a prompt goes on from.",
    ).tag(config=True)

    def __init__(
        self,
        session: Session,
        check: Callable[[], None] = lambda: None,
        draw: Callable[[int], int] = secrets.randbelow,
    ) -> None:
        self.session = session  # first: a value of %config that is refused ends what follows
        super().__init__(session.shell)
        self._check, self._draw = check, draw
        self._warned: set[str] = set()

    @no_var_expand  # braces and dollars are a prompt's own
    @line_cell_magic
    def shimmy(self, line: str, cell: str | None = None) -> Completion | None:
        if cell is not None:
            self._check()
            return self._answer(parse_cell(line), cell.strip("\n"))
        found = parse_line(line, self.session.names, self.session.answered)
        if isinstance(found, Command):
            return self._command(found)
        if found.meant:
            print(f"shimmy: this is asked as a prompt; %shimmy {found.meant} is the command")
        self._check()
        return self._answer(found.options, found.text)

    def board(self) -> Board:
        return Board(rich=self.session.rich)

    # Prompts

    def _answer(self, options: Options, prompt: str) -> Completion | None:
        asked = request(self.session, self, options, prompt)
        if options.dry_run:
            talking.dry_run(self.session, asked, self.board())
            return None
        for line in asked.lines:
            print(f"shimmy: {clean(line)}")
        found = self._asked(asked)
        cell, run = self.session.origin.cell, self.session.origin.run
        self.session.conversation.add(Exchange(asked.prompt, found.text, cell, run))
        return self._given(asked, found)

    def _asked(self, asked: Asked) -> Completion:
        """Streamed onto the screen. Raises what ends it, with what had come shown as such."""
        self._warn(asked.warnings)
        body, origin = with_seed(asked.body, self._draw), asked.note
        stream = self.stream if asked.options.stream is None else asked.options.stream
        view = View(rich=self.session.rich, stream=stream, format=asked.format)
        sent = {**body, "stream": True, "stream_options": {"include_usage": True}}
        try:
            with self.session.transport.stream(_CHAT, sent) as chunks:
                gathered = view.follow(events(chunks))
        except KeyboardInterrupt:
            view.end("stopped")
            raise _stopped() from None
        except ContextLengthExceeded as error:
            if view.begun:
                view.end("failed")
            raise self._too_long(error, asked) from None
        except ShimmyError:
            if view.begun:
                view.end("failed")
            raise
        made = of(
            body,
            gathered.last,
            gathered.text,
            gathered.reason or "",
            reasoning=gathered.reasoning,
            variable=asked.options.output or "",
            origin=origin,
        )
        kept = {KEY: made.to_json()} if made is not None else {}
        found = gathered.completion(
            format=str(asked.format), provenance=kept.get(KEY), origin=origin
        )
        view.end(found.note, receipt=str(found.receipt or ""), metadata=kept)
        if made is not None:
            number, cell = self.session.remembered.running, self.session.origin.cell
            self.session.answers.add(Kept(made, gathered.text, number, cell))
        return found

    def _given(self, asked: Asked, found: Completion) -> Completion | None:
        """Into the variable, as what its format or its shape makes of it."""
        if asked.shape is not None:
            found = replace(found, parsed=asked.shape.read(found))
        name = asked.options.output
        if name is not None:
            plain = asked.shape is None and asked.format in ("markdown", "text")
            self.session.assign(name, found if plain else found.value, found)
        if asked.options.logprobs is not None:
            shown = found.likely()._repr_mimebundle_()
            self.board().show(shown["text/plain"], shown["text/html"])
        return self._returned(found)

    def _returned(self, found: Completion) -> Completion | None:
        """For `x = %shimmy …`, and for `Out`. A terminal would print an empty `Out[1]:` for it."""
        if not self.session.rich and not _ASSIGNED.search(self.session.remembered.sources[-1]):
            return None
        return Shown.of(found, self.session.shell)

    def _too_long(self, error: ContextLengthExceeded, asked: Asked) -> ContextLengthExceeded:
        """With what could be left out."""
        hints = []
        if any(message["role"] == "assistant" for message in asked.body["messages"]):
            hints.append("%shimmy reset forgets what was said before")
        if asked.options.context is not None:
            hints.append("a smaller --context, or --leave-out, sends fewer cells")
        said = "; ".join([error.message, *hints])
        return ContextLengthExceeded(said, param=error.param, request_id=error.request_id)

    def _warn(self, warnings: Iterable[str]) -> None:
        """Of each once in a notebook."""
        for warning in warnings:
            if warning not in self._warned:
                self._warned.add(warning)
                print(f"shimmy: {clean(warning)}")

    def _chosen(self, given: str | None) -> Resolved:
        """The model of a command, as a request: of this name, the notebook's, or the server's default."""
        named = given or self.model
        if not named:
            return Resolved({"model": self.session.default_model()}, "")
        found = self.session.resolved({"model": self.session.meant(named)}, self.profile)
        self._warn(found.warnings)
        return found

    # Commands

    def _command(self, command: Command) -> Completion | None:
        given, board = command.arguments, self.board()
        if command.name in _ON_A_MODEL:
            given = {**given, "model": self._chosen(given["model"]).body["model"]}
        if command.name in _SIMPLE:
            _SIMPLE[command.name](self.session, given, board)
            return None
        own: Callable[[Mapping[str, Any], Board], Completion | None]
        own = getattr(self, f"_{command.name}")
        return own(given, board)

    def _use(self, given: Mapping[str, Any], board: Board) -> None:
        if given["model"] is not None:
            self._chosen(given["model"])  # of a name that nothing can answer to, the error is now
            # Not the model's id: what the project pins goes by its own name.
            self.model = self.session.meant(given["model"])
        board.say(f"this notebook asks {self.model or self.session.default_model()}")

    def _help(self, given: Mapping[str, Any], board: Board) -> None:
        text = usage() if given["command"] is None else about(given["command"])
        board.show(text, f"<pre>{inert(text)}</pre>")

    def _version(self, _given: Mapping[str, Any], board: Board) -> None:
        board.say(*self.session.tools.versions())

    def _doctor(self, _given: Mapping[str, Any], board: Board) -> None:
        board.say("looking")
        board.say(*self.session.tools.doctor())

    def _compat(self, given: Mapping[str, Any], board: Board) -> None:
        """Answer to `%ai` and `%%ai`, too; only ever by this command."""
        if given["action"] is None:
            board.say("%shimmy compat ai makes %ai and %%ai shimmy's")
            return
        magics = self.session.shell.magics_manager
        theirs = {
            kind: table["ai"]
            for kind, table in magics.magics.items()
            if "ai" in table and getattr(table["ai"], "__self__", None) is not self
        }
        self.session.borrowed.update(theirs)
        for kind in ("line", "cell"):
            magics.register_function(self._bound(), kind, "ai")
        questions.install(self.session.shell, questions.nor_are_those_of_compat)
        completer.install(
            self.session.shell,
            completer.Remembered(self.session.names_at_hand),
            self.session.variables,
            ("shimmy", "ai"),
        )
        board.say(
            "%ai and %%ai are shimmy's now, until the extension is loaded again"
            + ("; they were another extension's before" if theirs else "")
        )

    def _bound(self) -> Any:
        return vars(type(self))["shimmy"].__get__(self)

    def _fix(self, given: Mapping[str, Any], board: Board) -> Completion | None:
        error = self.session.remembered.last_error
        if error is None:
            raise InvalidValue("no cell of this notebook has failed", param="fix")
        self._check()
        chosen = self._chosen(given["model"])
        body = {**chosen.body, "messages": mending.prompt_for(error)}
        found = self._asked(Asked(body, "", Options(), note=chosen.note))
        code = mending.corrected(found.text)
        if code is None:
            board.say("the answer has no corrected cell in it")
            return self._returned(found)
        offered = mending.offer(code, self.session.shell, error.source)
        said = (
            "nothing would change" if not offered.diff else "the corrected cell is below; not run"
        )
        if offered.removed:
            said += f"; {offered.removed} characters that would hide what it does are left out"
        board.show(
            f"{said}\n\n{offered.diff}", f"<p>{inert(said)}</p><pre>{inert(offered.diff)}</pre>"
        )
        return self._returned(found)

    def _compare(self, given: Mapping[str, Any], board: Board) -> None:
        self._check()
        all_asked = [
            request(self.session, self, Options(model=model), given["prompt"])
            for model in given["models"]
        ]
        for asked in all_asked:
            self._warn(asked.warnings)
        talking.compare(self.session, all_asked, board)

    def _replay(self, given: Mapping[str, Any], board: Board) -> None:
        which = given["variable"] or ""
        kept = self._held(which) or self.session.answers.get(which)
        if kept is None and self.session.origin.path is not None:
            kept = answer_of(self.session.origin.path, which)
        if kept is None:
            raise InvalidValue("there is no answer of this notebook to replay", param="variable")
        self._check()
        board.say("asking again")
        outcome = replay(self.session.transport, kept.provenance, kept.text)
        altered = ["the saved output does not have the answer's text as it was"] * (
            kept.text is None
        )
        board.say(*outcome.lines(), *altered)

    def _held(self, which: str) -> Kept | None:
        """The answer that a variable holds, by whichever way it came there. None where there is no such
        variable, as after a restart. The record of an answer that was there before would vouch for
        what it has not made.
        """
        variables = self.session.remembered.namespace()
        if which not in variables:
            return None
        found = variables[which]
        value, answer = self.session.given.get(which, (None, None))
        if answer is not None and value is found:
            found = answer
        if isinstance(found, Completion) and found.provenance is not None:
            return Kept(from_json(dict(found.provenance)), found.text)
        raise InvalidValue(
            f"what {which[:64]} is now has no record of what made it; name a variable that an answer is in, "
            "or the number of the cell that asked",
            param="variable",
        )

    def _lock(self, given: Mapping[str, Any], board: Board) -> None:
        model = self.session.meant(given["model"] or self.model) or self.session.default_model()
        board.say(f"reading {model}'s bytes")
        board.say(*self.session.tools.lock(model, given["alias"] or model, self.session.transport))

    def _bench(self, given: Mapping[str, Any], board: Board) -> None:
        from .measuring import bench

        chosen = self._chosen(given["model"])
        self._check()
        bench(self.session.transport, chosen.body, board)

    def _panel(self, _given: Mapping[str, Any], _board: Board) -> None:
        from IPython.display import display

        from .panel import panel

        display(panel(lambda: self.session.transport))  # type: ignore[no-untyped-call]


def _stopped() -> KeyboardInterrupt:
    """As the kernel's own, but for a traceback that would say nothing of the user's."""
    error = KeyboardInterrupt()
    error.__dict__["_render_traceback_"] = lambda: ["KeyboardInterrupt: the answer was stopped"]
    return error


vars(ShimmyMagics)["shimmy"].__doc__ = usage()

_ON_A_MODEL = frozenset({"load", "unload", "probe", "verify"})
"""Commands whose argument is a model's id by the time that they are called."""

_SIMPLE: dict[str, Callable[[Session, Mapping[str, Any], Board], None]] = {
    name: getattr(managing, name)
    for name in "models pull load unload probe verify alias update dealias".split()
} | {
    "limits": accounts.limits,
    "audit": accounts.audit,
    "history": talking.history,
    "reset": talking.reset,
}
