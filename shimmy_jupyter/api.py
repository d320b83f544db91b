"""What `import shimmy` offers in a notebook. Each function that waits has a twin to await, whose name
begins with `a`.

All of them go through the service of the kernel's own server, so that its policy, limits and ledger
hold, and raise the typed errors of `shimmy_jupyter.errors`; an unknown keyword is a `TypeError`.
Interrupting the kernel, or cancelling the task of a twin, cancels the request on the server. A model
that is not named is the server's default. Nothing heavy is imported before the first call.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, Unpack, overload

from .errors import Misconfigured, ServerUnreachable
from .notebook.asking import (
    ChatParameters,
    CompletionParameters,
    ExtractParameters,
    Messages,
    Templating,
    Vectors,
    keywords,
    texts_of,
)

if TYPE_CHECKING:
    import openai

    from .notebook.asking import Asker
    from .notebook.classifying import Classification
    from .notebook.client import Server
    from .notebook.panel.widgets import Panel
    from .notebook.portal import AsyncStream, Portal, Stream
    from .notebook.result import Completion

__all__ = [
    "achat",
    "aclassify",
    "acomplete",
    "aembed",
    "aextract",
    "amodels",
    "astream",
    "atokenize",
    "chat",
    "classify",
    "complete",
    "embed",
    "extract",
    "models",
    "openai_client",
    "panel",
    "stream",
    "tokenize",
]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Session:
    """Through what this kernel asks. `server` is None where the model runs inside it."""

    asker: Asker
    portal: Portal
    server: Callable[[], Server | None]


_lock = threading.RLock()
_sessions: list[_Session] = []
"""The one in use, once there is one."""


def use(
    asker: Asker | None,
    *,
    server: Callable[[], Server | None] = lambda: None,
    last: Callable[[], Coroutine[Any, Any, None]] | None = None,
) -> None:
    """Ask through this from now on; None: through what the kernel finds when it is next asked. What is
    under way is cancelled. `last` is awaited before the event loop ends.
    """
    from .notebook.portal import Portal

    with _lock:
        while _sessions:
            _sessions.pop().portal.close()
        if asker is not None:
            portal = Portal()
            portal.last += [last] if last is not None else []
            _sessions.append(_Session(asker, portal, server))


def session() -> _Session:
    """Made when it is first needed."""
    with _lock:
        if not _sessions:
            from .kernel import asker

            made, connection = asker()
            use(made, server=connection.server, last=connection.aclose)
        return _sessions[0]


def _run(work: Callable[[Asker], Coroutine[Any, Any, T]]) -> T:
    found = session()
    return found.portal.run(lambda: work(found.asker))


async def _arun(work: Callable[[Asker], Coroutine[Any, Any, T]]) -> T:
    found = session()
    return await found.portal.arun(lambda: work(found.asker))


@keywords(ChatParameters)
def chat(prompt: Messages, **parameters: Unpack[ChatParameters]) -> Completion:
    """The answer to a prompt, or to a whole chat in OpenAI's form, once it is complete.

    `max_tokens` is in tokens, `max_seconds` in seconds with waiting included. A `seed` implies
    `reproducible`, the same bytes every time, unless that is given as False. `response_format` and
    `grammar` say what the answer must match; `logprobs` come as natural logarithms. `thinking` is
    True, False, or the most tokens to think. What the model or the policy cannot do is refused.

    Raises `RequestError` naming a wrong field, `ContextLengthExceeded`, `ModelNotFound`,
    `AccessDenied`, `RateLimitExceeded` and others of `ShimmyError`.
    """
    return _run(lambda asker: asker.chat(prompt, **parameters))


@keywords(ChatParameters)
async def achat(prompt: Messages, **parameters: Unpack[ChatParameters]) -> Completion:
    """`chat`, to be awaited."""
    return await _arun(lambda asker: asker.chat(prompt, **parameters))


@keywords(CompletionParameters)
def complete(prompt: str | Sequence[int], **parameters: Unpack[CompletionParameters]) -> Completion:
    """What a text, or token ids, go on with, without a chat template.

    With `suffix` it is what stands between the two, where the model knows how. `echo` puts the prompt
    in front of the text, and `logprobs` (an int: so many alternatives for each token) then cover the
    prompt, too. The other keywords and errors are those of `chat`.
    """
    return _run(lambda asker: asker.complete(prompt, **parameters))


@keywords(CompletionParameters)
async def acomplete(
    prompt: str | Sequence[int], **parameters: Unpack[CompletionParameters]
) -> Completion:
    """`complete`, to be awaited."""
    return await _arun(lambda asker: asker.complete(prompt, **parameters))


@keywords(ChatParameters)
def stream(prompt: Messages, **parameters: Unpack[ChatParameters]) -> Stream[Completion]:
    """The answer as it is made: an iterator of pieces of text, with `result`, the whole `Completion`, when it
    has been read to its end.

    The request begins with the first piece that is read. Closing the iterator, leaving its `with`
    block or letting go of it cancels the request. Keywords and errors are those of `chat`.
    """
    from .notebook.portal import Stream

    found = session()
    return Stream(found.portal, found.asker.stream(prompt, **parameters))


@keywords(ChatParameters)
def astream(prompt: Messages, **parameters: Unpack[ChatParameters]) -> AsyncStream[Completion]:
    """`stream`, for `async for`; it is not awaited itself."""
    from .notebook.portal import AsyncStream

    found = session()
    return AsyncStream(found.portal, found.asker.stream(prompt, **parameters))


def embed(
    texts: str | Iterable[str], *, model: str | None = None, dimensions: int | None = None
) -> Vectors:
    """Vectors of length 1, in the order of the texts: an array of shape (n, d), float32; a list of lists
    where numpy is not installed. One text is a list of one.

    `dimensions` keeps the first so many numbers. Without a `model`, the first that is listed and made
    for vectors. Texts are taken as they are: a prefix such as "query: " is for the caller to write.
    Any number of them, in requests of 2,048 at most.

    Raises `InvalidValue` naming the text that is empty, `ContextLengthExceeded` the one that is too
    long, and others as `chat`.
    """
    inputs = texts_of(texts)  # a generator is the caller's, and runs in this thread
    return _run(lambda asker: asker.embed(inputs, model=model, dimensions=dimensions))


async def aembed(
    texts: str | Iterable[str], *, model: str | None = None, dimensions: int | None = None
) -> Vectors:
    """`embed`, to be awaited."""
    inputs = texts_of(texts)  # a generator is the caller's, and runs in this thread
    return await _arun(lambda asker: asker.embed(inputs, model=model, dimensions=dimensions))


@overload
def extract(
    kind: type[T], text: str, prompt: str | None = None, **parameters: Unpack[ExtractParameters]
) -> T: ...
@overload
def extract(
    kind: Any, text: str, prompt: str | None = None, **parameters: Unpack[ExtractParameters]
) -> Any: ...
@keywords(ExtractParameters)
def extract(
    kind: Any, text: str, prompt: str | None = None, **parameters: Unpack[ExtractParameters]
) -> Any:
    """What a text says, as a validated value of a type: a pydantic model, a dataclass, a `TypedDict`, an
    enumeration, a `Literal`, a type such as `list[Model]` or `dict[str, int]`, or a JSON schema, for
    which the value is plain Python.

    The answer is held to the type's schema while it is made. `prompt` says what to look for, in place
    of our own words. Greedy unless a `temperature` is given; the other keywords are those of `chat`.

    Raises `RequestError`, with the reason and before anything is decoded, for a type or a schema
    that an answer cannot be held to; `AnswerCutOff` where `max_tokens` end it, and `AnswerInvalid`,
    naming the field, where the type's own validators refuse it, both with the `text`.
    """
    from .notebook.schemas import ask, shape_of

    # Types are read and values made here, as validators are the user's code.
    shape = shape_of(kind)
    return shape.read(_run(lambda asker: ask(asker, shape, text, prompt, **parameters)))


@overload
async def aextract(
    kind: type[T], text: str, prompt: str | None = None, **parameters: Unpack[ExtractParameters]
) -> T: ...
@overload
async def aextract(
    kind: Any, text: str, prompt: str | None = None, **parameters: Unpack[ExtractParameters]
) -> Any: ...
@keywords(ExtractParameters)
async def aextract(
    kind: Any, text: str, prompt: str | None = None, **parameters: Unpack[ExtractParameters]
) -> Any:
    """`extract`, to be awaited."""
    from .notebook.schemas import ask, shape_of

    shape = shape_of(kind)
    reply = await _arun(lambda asker: ask(asker, shape, text, prompt, **parameters))
    return shape.read(reply)


def classify(
    text: str, labels: Sequence[str], *, prompt: str | None = None, model: str | None = None
) -> Classification:
    """Which of at least two labels a text has: `label`, `probabilities` that sum to 1, and `scores`, of
    which they are the softmax, in nats.

    A label's score is the sum of its tokens' log-probabilities as the answer, less the same for an
    empty text. `prompt` is the question, in place of our own; the text follows it. Nothing is sampled.

    Raises `InvalidValue` for labels that are empty or there twice and what is no text, and others as `chat`.
    """
    return _run(lambda asker: _classified(asker, text, labels, prompt, model))


async def aclassify(
    text: str, labels: Sequence[str], *, prompt: str | None = None, model: str | None = None
) -> Classification:
    """`classify`, to be awaited."""
    return await _arun(lambda asker: _classified(asker, text, labels, prompt, model))


async def _classified(
    asker: Asker, text: str, labels: Sequence[str], prompt: str | None, model: str | None
) -> Classification:
    from .notebook.classifying import Classifier

    return await Classifier(asker, labels, prompt=prompt, model=model).classify(text)


@keywords(Templating)
def tokenize(text: Messages, model: str | None = None, **options: Unpack[Templating]) -> list[int]:
    """The exact token ids of a text as `complete` takes it, or of messages as `chat` does, for which
    `thinking`, `reasoning_effort` and `chat_template_kwargs` are. Also where they are too many.
    """
    return _run(lambda asker: asker.tokenize(text, model, **options))


@keywords(Templating)
async def atokenize(
    text: Messages, model: str | None = None, **options: Unpack[Templating]
) -> list[int]:
    """`tokenize`, to be awaited."""
    return await _arun(lambda asker: asker.tokenize(text, model, **options))


def models() -> list[dict[str, Any]]:
    """Every model, adapter and projector that one may use: `id`, `state`, `kind`, `quantization`,
    `context` and `usable_context` (tokens), `size_bytes`, `fit`, `sha256`, `error` and more, as `GET shimmy/api/models` says.
    """
    return _run(lambda asker: asker.models())


async def amodels() -> list[dict[str, Any]]:
    """`models`, to be awaited."""
    return await _arun(lambda asker: asker.models())


def openai_client(**options: Any) -> openai.OpenAI:
    """OpenAI's own client, for this kernel's server; `options` are its constructor's, but for `base_url`
    and `api_key`. Proxy settings are ignored: the token is for that server only.

    Raises `Misconfigured` where the package `openai` is not installed, and `ServerUnreachable` where
    the model runs inside the kernel, which has no address.
    """
    server = session().server()
    if server is None:
        raise ServerUnreachable(
            "the model runs inside this kernel: there is no address that a client could be given"
        )
    try:
        import openai
    except ImportError:
        raise Misconfigured("the package openai is not installed: `%pip install openai`") from None
    if "http_client" not in options:
        from .notebook.client import plain_client

        options["http_client"] = plain_client(server)
    base = "http://localhost/" if server.socket else server.url
    # There may be no token; the client insists on one.
    return openai.OpenAI(base_url=base + "shimmy/v1", api_key=server.token or "none", **options)


def panel() -> Panel:
    """A widget: models, asking, comparing, limits and records. Raises `Misconfigured` without ipywidgets 8.

    It asks in a thread of its own, which ends with `close()`; it looks at nothing while it is hidden or
    nobody has used it for five minutes.
    """
    from .kernel import transport
    from .notebook.panel import panel as made

    return made(transport)
