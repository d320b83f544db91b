"""What can be asked of the service, written once and asynchronously, over whatever transport there is.

Every field of the HTTP API is a keyword here, but `n`: whoever wants several answers asks several
times at once, and the prompt is computed once all the same. None is as if it were not given; 0, False
and "" are sent as they are.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import inspect
import struct
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict, TypeVar, Unpack, cast, get_type_hints

from ..errors import InvalidValue, ShimmyError, UnsupportedParameter
from .arguments import did_you_mean, near
from .result import Completion, Stream, from_body
from .values import python_value

if TYPE_CHECKING:  # these are heavy, and numpy need not be there
    import numpy as np

    from .held import Held
    from .remote import AsyncTransport

_CHAT, _COMPLETIONS = "shimmy/v1/chat/completions", "shimmy/v1/completions"
_POLL = 0.2
_MOST_INPUTS = 2048
_MOST_TOKENS = 1 << 18
"""Of one request for vectors, as `_MOST_INPUTS` is. A token is a byte at least."""
_SPECIAL = 4
"""Tokens that a model may put around an input."""

Messages: TypeAlias = "str | Sequence[Mapping[str, Any]]"
"""A prompt of the user's, or a whole chat as OpenAI writes it: `[{"role": …, "content": …}, …]`."""
Vectors: TypeAlias = "np.ndarray[tuple[int, int], np.dtype[np.float32]] | list[list[float]]"
"""Shape (n, d), float32; lists where numpy is not installed."""
F = TypeVar("F", bound=Callable[..., Any])


class Parameters(TypedDict, total=False):
    """Of every answer. Probabilities and penalties as in llama.cpp, whose defaults hold; `max_tokens`
    counts tokens, `max_seconds` seconds with waiting included.
    """

    model: str | None
    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repeat_penalty: float | None
    repeat_last_n: int | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | Mapping[str, float] | None
    stop: str | Sequence[str] | None
    min_tokens: int | None
    ignore_eos: bool | None
    seed: int | None
    reproducible: bool | None
    adapter: str | None
    pin: Mapping[str, Any] | None
    max_seconds: float | None


class Templating(TypedDict, total=False):
    """How a chat is rendered, where its model's template knows how."""

    thinking: bool | int | None
    reasoning_effort: str | None
    chat_template_kwargs: Mapping[str, Any] | None


class ExtractParameters(Parameters, Templating, total=False):
    system: str | None


class ChatParameters(ExtractParameters, total=False):
    logprobs: bool | None
    top_logprobs: int | None
    response_format: Mapping[str, Any] | None
    grammar: Mapping[str, str] | None


class CompletionParameters(Parameters, total=False):
    suffix: str | None
    echo: bool | None
    logprobs: int | None
    response_format: Mapping[str, Any] | None
    grammar: Mapping[str, str] | None


def keywords(kind: type) -> Callable[[F], F]:
    """Spells out a function's `**parameters`, for completion and help; any other is a `TypeError`, and
    before anything is sent.
    """

    def spelled(function: F) -> F:
        signature = inspect.signature(function)
        *first, _ = signature.parameters.values()
        named = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hint)
            for name, hint in get_type_hints(kind).items()
        ]
        whole = signature.replace(parameters=[*first, *named])

        @functools.wraps(function)
        def checked(*given: Any, **more: Any) -> Any:
            try:
                whole.bind(*given, **more)
            except TypeError as error:
                unknown = next((name for name in more if name not in whole.parameters), None)
                hint = did_you_mean(near(unknown, whole.parameters)) if unknown else ""
                raise TypeError(f"{function.__name__}(): {error}{hint}") from None
            return function(*given, **more)

        checked.__signature__ = whole  # type: ignore[attr-defined]
        return cast("F", checked)

    return spelled


async def _as_it_is(body: dict[str, Any]) -> dict[str, Any]:
    return body


class Asker:
    """`transport` is called for every request, in the event loop that makes it. `default_model` answers
    where none is named: the server's own default, if it is None. `prepare` sees each completion's
    body before it is sent, as a project's lock may have a say.
    """

    def __init__(
        self,
        transport: Callable[[], AsyncTransport],
        *,
        default_model: Callable[[], Awaitable[str]] | None = None,
        prepare: Callable[[dict[str, Any]], Awaitable[dict[str, Any]]] = _as_it_is,
    ) -> None:
        self._transport, self._prepare = transport, prepare
        self._default_model = default_model or self._servers_default

    @keywords(ChatParameters)
    async def chat(self, prompt: Messages, **parameters: Unpack[ChatParameters]) -> Completion:
        """The whole answer, once it is there. Raises what the service refuses it with."""
        return await self._whole(_CHAT, _chat(prompt, parameters))

    @keywords(CompletionParameters)
    async def complete(
        self, prompt: str | Sequence[int], **parameters: Unpack[CompletionParameters]
    ) -> Completion:
        """What a text, or token ids, go on with. Raises what the service refuses it with."""
        return await self._whole(_COMPLETIONS, _completion(prompt, parameters))

    @keywords(ChatParameters)
    def stream(self, prompt: Messages, **parameters: Unpack[ChatParameters]) -> Answering:
        """A chat's answer as it is made."""
        body = _chat(prompt, parameters)
        return Answering(lambda: self._streamed(body))

    async def embed(
        self, texts: str | Iterable[str], *, model: str | None = None, dimensions: int | None = None
    ) -> Vectors:
        """A vector of length 1 for each text, in order; in as many requests as the server's limits
        need. Raises `InvalidValue` where no model is named and none is made for this, and what `held` does.
        """
        inputs = texts_of(texts)
        if not inputs:
            return _matrix([], dimensions or 0)
        return await self.vectors(inputs, await self.embeds(model), dimensions)

    async def embeds(self, model: str | None) -> str:
        """The id of the model that makes vectors, named or not. Raises what `embed` and `held` do."""
        if not model:
            return await self.embedder()
        found = await self.held(model)
        if found.adapter is not None:
            raise UnsupportedParameter(
                f"{model} is pinned with an adapter, and vectors are made without one",
                param="model",
            )
        return found.id

    async def vectors(self, texts: list[str], id: str, dimensions: int | None = None) -> Vectors:
        """Of at least one text, by the model that has this id, whatever a project calls so."""
        inputs, rows = texts_of(texts), list[bytes]()
        for some in _batches(inputs):
            rows += await self._embedded(some, id, dimensions, len(rows))
        return _matrix(rows, len(rows[0]) // 4)

    @keywords(Templating)
    async def tokenize(
        self, text: Messages, model: str | None = None, **options: Unpack[Templating]
    ) -> list[int]:
        """The exact tokens that a prompt has: of a text as `complete` takes it, of messages as `chat`. Raises
        what the service refuses it with, and what `held` does.
        """
        what = "prompt" if isinstance(text, str) else "messages"
        asked = text if isinstance(text, str) else _messages(text, None)
        id = (await self.held(model)).id if model else await self._default_model()
        return await self.tokens({"model": id, **_given(options), what: asked})

    async def tokens(self, body: dict[str, Any]) -> list[int]:
        """Of a request's body, by the model that has its id, whatever a project calls so."""
        found: list[int] = (await self.post("shimmy/api/tokenize", body))["tokens"]
        return found

    async def held(self, model: str) -> Held:
        """The model that a name means, for requests that have no `pin`: where a project's lock has the name,
        what is pinned is compared here. Raises `ModelDrifted`, and what the lock does.
        """
        from .held import held

        return await held(self, await self._prepare({"model": model}))

    async def models(self) -> list[dict[str, Any]]:
        """Every model, adapter and projector, with the fields of `GET shimmy/api/models`."""
        found: list[dict[str, Any]] = (await self._listed())["models"]
        return found

    async def named(self, model: str | None) -> str:
        """The model that is meant."""
        return model or await self._default_model()

    async def prepared(self, body: dict[str, Any]) -> dict[str, Any]:
        """A completion's body as it is sent: with its model, and what a project's lock says of that."""
        return await self._prepare({**body, "model": await self.named(body.get("model"))})

    async def get(self, path: str) -> dict[str, Any]:
        return await self._transport().request("GET", path)

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return await self._transport().request("POST", path, body)

    async def _whole(self, path: str, body: dict[str, Any]) -> Completion:
        return from_body(await self.post(path, await self.prepared(body)))

    async def _streamed(self, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        from .remote import events

        body = await self.prepared(body)
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        async with self._transport().stream(_CHAT, body) as chunks:
            async for item in events(chunks):
                yield item

    async def _embedded(
        self, some: list[str], model: str, dimensions: int | None, before: int
    ) -> list[bytes]:
        body: dict[str, Any] = {"model": model, "input": some, "encoding_format": "base64"}
        if dimensions is not None:
            body["dimensions"] = dimensions
        try:
            answer = await self.post("shimmy/v1/embeddings", body)
        except ShimmyError as error:
            kind, _, index = (error.param or "").partition(".")
            if kind == "input" and index.isdecimal():
                error.param = f"texts.{before + int(index)}"
            raise
        return [base64.b64decode(one["embedding"]) for one in answer["data"]]

    async def embedder(self) -> str:
        """The first model that is made for vectors. Raises `InvalidValue` where there is none."""
        for row in await self.models():
            if row["embedding"] and row["kind"] == "model" and row["error"] is None:
                return str(row["id"])
        raise InvalidValue(
            "no model here is made for vectors: name one, of any kind, or `%shimmy pull` one",
            param="model",
        )

    async def _servers_default(self) -> str:
        while (default := (await self._listed())["default"]) is None:  # noqa: ASYNC110
            await asyncio.sleep(_POLL)  # headers are being read that decide it
        return str(default)

    async def _listed(self) -> dict[str, Any]:
        return await self.get("shimmy/api/models")


class Answering:
    """An answer that is being made. Its pieces are read once; `result` is there afterwards."""

    def __init__(self, items: Callable[[], AsyncGenerator[dict[str, Any], None]]) -> None:
        self._items = items
        self._result: Completion | None = None

    @property
    def result(self) -> Completion:
        """The whole answer. Raises `InvalidValue` as long as it is not."""
        if self._result is None:
            raise InvalidValue("the answer is not complete: read it to its end first")
        return self._result

    async def pieces(self) -> AsyncGenerator[str, None]:
        """Of the answer's text; reasoning is in `result` only."""
        whole = Stream()
        async with contextlib.aclosing(self._items()) as items:
            async for item in items:
                if text := whole.add(item):
                    yield text
        self._result = whole.completion()


def _given(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Those that are not None, as JSON has them."""
    body = {name: python_value(value) for name, value in parameters.items() if value is not None}
    if isinstance(bias := body.get("logit_bias"), Mapping):
        body["logit_bias"] = {str(token): value for token, value in bias.items()}
    if "seed" in body:
        # Whoever names a seed wants the same answer again.
        body.setdefault("reproducible", True)
    return body


def _chat(prompt: Messages, parameters: Mapping[str, Any]) -> dict[str, Any]:
    body = _given(parameters)
    body["messages"] = _messages(prompt, body.pop("system", None))
    return body


def _completion(prompt: str | Sequence[int], parameters: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(prompt, str):
        return {**_given(parameters), "prompt": prompt}
    if not isinstance(prompt, Iterable) or isinstance(prompt, Mapping | set | frozenset | bytes):
        raise InvalidValue("a text, or a list of token ids", param="prompt")
    return {**_given(parameters), "prompt": [python_value(one) for one in python_value(prompt)]}


def _messages(prompt: Messages, system: str | None) -> list[dict[str, Any]]:
    if isinstance(prompt, str):
        messages: list[Any] = [{"role": "user", "content": prompt}]
    elif isinstance(prompt, Sequence) and all(isinstance(one, Mapping) for one in prompt):
        messages = list(prompt)
    else:
        raise InvalidValue("a text, or a list of messages with role and content", param="prompt")
    if system is None:
        return messages
    if messages and messages[0].get("role") in ("system", "developer"):
        raise InvalidValue("the messages begin with a system message already", param="system")
    return [{"role": "system", "content": system}, *messages]


def check_text(text: object) -> None:
    """A cell without a value would be asked about by its name, as "None" or "nan". Raises `InvalidValue`."""
    if not isinstance(text, str):
        raise InvalidValue(f"a text, not {type(text).__name__}", param="text")


def texts_of(texts: str | Iterable[str]) -> list[str]:
    """Raises `InvalidValue`, naming the one that has no vector."""
    if not isinstance(texts, Iterable):
        raise InvalidValue(f"texts, not {type(texts).__name__}", param="texts")
    found = [texts] if isinstance(texts, str) else list(texts)
    for i, text in enumerate(found):
        if not isinstance(text, str):
            raise InvalidValue(f"a text, not {type(text).__name__}", param=f"texts.{i}")
        if not text:
            raise InvalidValue("an empty text has no vector", param=f"texts.{i}")
    return found


def _batches(texts: list[str]) -> Iterable[list[str]]:
    """As many in a request as are surely within the server's limits; a text by itself, if need be."""
    some: list[str] = []
    tokens = 0
    for text in texts:
        most = len(text.encode("utf-8", "replace")) + _SPECIAL
        if some and (len(some) == _MOST_INPUTS or tokens + most > _MOST_TOKENS):
            yield some
            some, tokens = [], 0
        some.append(text)
        tokens += most
    if some:
        yield some


def _matrix(rows: list[bytes], width: int) -> Vectors:
    try:
        import numpy as np
    except ImportError:
        return [list(struct.unpack(f"<{width}f", row)) for row in rows]
    return np.frombuffer(b"".join(rows), dtype="<f4").reshape(len(rows), width).copy()
