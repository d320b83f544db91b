"""From a cell's line and text to the request that is sent: what stands for braces, what was said before,
what ran last, what shape the answer must have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import ContextLengthExceeded, InvalidValue
from .arguments import Format, Options, did_you_mean, near
from .context import Item, as_message, recent, what_to_leave_out, without
from .formats import demands
from .interpolate import interpolate
from .session import Resolved, Session

if TYPE_CHECKING:  # it imports pydantic
    from .schemas import Shape

BUNDLED = "self-test"
"""Knows single questions only: what was said before would be no help to it."""
_CHAT_ONLY = frozenset({"messages", "stream", "stream_options", "n", "prompt"})


class Settings(Protocol):
    """Of the notebook, by `%config ShimmyMagics`."""

    model: str
    system: str
    temperature: Any
    max_tokens: int | None
    profile: str
    stream: bool
    interpolate: bool
    max_history: int


@dataclass(frozen=True, slots=True)
class Asked:
    """`body` is the request's as it is sent, `prompt` what the user has said, without what was added to it;
    `lines` are to be shown before the answer. `shape` is what `--schema` names. `note` and `warnings` are of
    what the project has pinned for the model, where the user has named one.
    """

    body: dict[str, Any]
    prompt: str
    options: Options
    shape: Shape | None = None
    lines: tuple[str, ...] = ()
    note: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def format(self) -> Format:
        default = Format.JSON if self.shape is not None else Format.MARKDOWN
        return self.options.format or default


def request(session: Session, settings: Settings, options: Options, prompt: str) -> Asked:
    """Raises `InvalidValue` for what cannot be asked so, what a project's names do, and
    `ContextLengthExceeded`, with what could be left out, where `--context` is more than fits.
    """
    _assignable(session, options.output)
    text, lines = _interpolated(session, settings, options, prompt)
    if not text.strip():
        raise InvalidValue("there is no prompt: `%shimmy PROMPT`, or write it below `%%shimmy`")
    shape = _shape(session, options)
    found = _addressed(session, settings, options, shape)
    # Of the model that answers, whatever the project calls it.
    model = str(found.body["model"])
    system = _system(settings, options)
    before = [{"role": "system", "content": system}] if system else []
    if model != BUNDLED:
        cell, run = session.origin.cell, session.origin.run
        for one in session.conversation.before(cell, run, settings.max_history):
            before += one.messages()
    messages, more = _with_context(session, options, found.body, before, text)
    body = {**found.body, "messages": messages}
    return Asked(body, text, options, shape, (*lines, *more), found.note, found.warnings)


def _assignable(session: Session, name: str | None) -> None:
    """Raises `InvalidValue` where the kernel's next cells could not do without what has the name."""
    hidden: Any = session.shell.user_ns_hidden
    if name is not None and name in hidden:
        raise InvalidValue(
            f"{name!r} was there before the first cell, and cells may need it; take another name, such as 'answer'",
            param="--output",
        )


def _addressed(
    session: Session, settings: Settings, options: Options, shape: Shape | None
) -> Resolved:
    """The request but for its messages. A project's names count only where the user has named a model."""
    named = options.model or settings.model
    if not named:
        return Resolved(_body(settings, options, session.default_model(), shape), "")
    body = _body(settings, options, session.meant(named), shape)
    return session.resolved(body, options.profile or settings.profile)


def _interpolated(
    session: Session, settings: Settings, options: Options, prompt: str
) -> tuple[str, tuple[str, ...]]:
    wanted = settings.interpolate if options.interpolate is None else options.interpolate
    if not wanted:
        return prompt, ()
    found = interpolate(prompt, session.remembered.evaluate)
    return found.text, tuple(f"not put in: {{{what}}} ({why})" for what, why in found.failed)


def _system(settings: Settings, options: Options) -> str:
    """The user's own, and what a format has to say of how it is to be answered."""
    own = settings.system if options.system is None else options.system
    wanted = demands(options.format).system if options.format is not None else None
    return "\n\n".join(filter(None, [own, wanted]))


def _shape(session: Session, options: Options) -> Shape | None:
    """Raises `InvalidValue` where there is no such variable, or no shape of answers."""
    if options.schema is None:
        return None
    from .schemas import shape_of

    try:
        kind = session.remembered.evaluate(options.schema)
    except (NameError, AttributeError):
        hint = did_you_mean(near(options.schema, session.variables()))
        raise InvalidValue(
            f"there is no variable {options.schema!r}{hint}", param="--schema"
        ) from None
    try:
        return shape_of(kind)
    except InvalidValue as error:
        raise InvalidValue(f"{options.schema}: {error.message}", param="--schema") from error


def _body(settings: Settings, options: Options, model: str, shape: Shape | None) -> dict[str, Any]:
    own = _parameters(options.parameters)
    body: dict[str, Any] = {
        "model": model,
        "temperature": settings.temperature if options.temperature is None else options.temperature,
        "max_tokens": settings.max_tokens if options.max_tokens is None else options.max_tokens,
        "seed": options.seed,
        "stop": list(options.stop) or None,
        # Whoever names a seed wants the same answer again.
        "reproducible": options.reproducible or (True if options.seed is not None else None),
    }
    if options.logprobs is not None:
        body |= {"logprobs": True, "top_logprobs": options.logprobs}
    body = {name: value for name, value in body.items() if value is not None}
    body |= own
    form = shape.response_format if shape is not None else _of_format(options)
    if form is not None:
        for name in ("response_format", "grammar"):
            if name in own:
                said = "--schema" if shape is not None else "--format"
                raise InvalidValue(f"{name!r} and {said} both say so", param="--model-parameters")
        body["response_format"] = form
    return body


def _of_format(options: Options) -> dict[str, Any] | None:
    found = demands(options.format).response_format if options.format is not None else None
    return None if found is None else dict(found)


def _parameters(given: Mapping[str, Any]) -> dict[str, Any]:
    """Of `-m`. Raises `InvalidValue` for one that no request has: the server would ignore it."""
    from .asking import ChatParameters

    known = ChatParameters.__annotations__.keys() | {"max_completion_tokens"}
    for name in given:
        if name in _CHAT_ONLY or name not in known:
            hint = did_you_mean(near(name, known))
            raise InvalidValue(
                f"no answer has a parameter {name!r}{hint}", param="--model-parameters"
            )
    return dict(given)


def wanted_tokens(body: Mapping[str, Any]) -> int | None:
    """Of the answer, by either of the names that there are for it; None where the request does not say, or
    says what the server will refuse.
    """
    said = [body.get(name) for name in ("max_tokens", "max_completion_tokens")]
    return next((one for one in said if type(one) is int), None)


def _with_context(
    session: Session,
    options: Options,
    body: Mapping[str, Any],
    before: list[dict[str, str]],
    text: str,
) -> tuple[list[dict[str, str]], tuple[str, ...]]:
    """The messages with the cells that `--context` wants; how many tokens they are is said first."""
    if options.context is None:
        if options.leave_out:
            raise InvalidValue("this goes with --context N", param="--leave-out")
        return [*before, {"role": "user", "content": text}], ()
    items = recent(session.shell, options.context, session.remembered)
    items = without(items, map(str, options.leave_out))

    def messages(some: list[Item]) -> list[dict[str, str]]:
        content = "\n\n".join(filter(None, [as_message(some), text]))
        return [*before, {"role": "user", "content": content}]

    def count(some: list[Item]) -> int:
        asked = {"model": body["model"], "messages": messages(some)}
        return int(session.transport.post("shimmy/api/tokenize", asked)["count"])

    # Counted first: the model is in memory then, and its own context is listed.
    tokens = count(items)
    context = session.transport.get(f"shimmy/api/models/{body['model']}")["usable_context"]
    wanted = wanted_tokens(body)
    # Where nobody says how long an answer is to be, there has to be room for a token.
    budget = (context or 0) - (1 if wanted is None else wanted)
    if budget > 0 and tokens > budget:
        choice = what_to_leave_out(items, count, budget)
        raise ContextLengthExceeded(f"{tokens:,} tokens: {choice}", param="--context")
    cells = ", ".join(f"In[{item.number}]" for item in items) or "no cell has run yet"
    short = [name for item in items for name in item.shortened]
    cut = f"; of {', '.join(short)} only the beginning and the end" if short else ""
    return messages(items), (f"with {cells}: {tokens:,} tokens{cut}",)
