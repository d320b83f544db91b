"""A loaded model as the service sees it: prompts become tokens, tokens become a stream."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..errors import (
    ContextLengthExceeded,
    EngineLost,
    InvalidValue,
    ModelLoadFailed,
    ShuttingDown,
    UnsupportedParameter,
    without_folders,
)
from ..types import (
    ChatOptions,
    Constraint,
    EmbeddingInput,
    Failure,
    Message,
    ModelFacts,
    Prompt,
    Reasoning,
    Sampling,
)
from .backend import Backend, LoadSpec, Sharing
from .deep import bounded, check_bytes, in_deep_thread, longest
from .embedder import Embedder
from .inputs import batches, check_fits, check_ids, ids_of, size_of, texts_of
from .special import any_of
from .stream import TokenStream
from .template import ChatTemplate
from .thinking import Thinking
from .turns import Turns
from .worker import Engine

log = logging.getLogger("shimmy_jupyter.engine")

_SHORT = 4096
_AS_IT_IS = ChatOptions()
MOST_INPUT_TOKENS = 1 << 18
"""Of all inputs of one request for vectors."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A prompt's exact tokens, and what may come before the answer to it."""

    tokens: tuple[int, ...]
    reasoning: Reasoning | None = None


class LoadedModel:
    """Templates and tokenizing have threads of their own, one at a time, so that neither the event
    loop nor the engine waits for somebody's long prompt. The vocabulary does not change; the
    backend keeps it alive while it is being read.
    """

    def __init__(
        self,
        engine: Engine,
        facts: ModelFacts,
        special: re.Pattern[str] | None,
        thinking: Thinking,
        *,
        max_waiting: int,
    ) -> None:
        self.engine = engine
        self.facts = facts
        self._turns = Turns(max_waiting)
        self._special = special
        self._template: ChatTemplate | None = None
        self._thinking = thinking
        self.embedder: Embedder | None = None
        """What makes vectors, where the model can."""
        if facts.embedding is not None:
            self.embedder = Embedder(
                engine,
                facts,
                facts.embedding,
                max_waiting=max_waiting,
                fixed_threads=engine.spec.threads > 0,
            )
        self._adapters: set[str] = set()
        self._closed = False

    @classmethod
    async def load(
        cls,
        backend: Callable[[], Backend],
        spec: LoadSpec,
        *,
        queue_size: int = 256,
        stream_capacity: int = 256,
        sharing: Sharing | None = None,
    ) -> LoadedModel:
        """Load on the engine's own thread. Raises `ModelLoadFailed`, or `EngineLost`."""
        # The factory imports the native library, which takes a while: not on the event loop.
        try:
            made = await asyncio.to_thread(backend)
        except (ImportError, OSError, RuntimeError) as error:
            log.exception("llama-cpp-python does not load")
            said = without_folders(str(error))
            raise ModelLoadFailed(f"llama-cpp-python does not load here: {said}") from error
        engine = Engine(
            made,
            spec,
            queue_size=queue_size,
            stream_capacity=stream_capacity,
            sharing=sharing,
        )
        facts = await engine.start()
        try:
            # Thousands of them take a while.
            special = await asyncio.to_thread(any_of, facts.special_tokens)
            thinking = await asyncio.to_thread(Thinking, facts.chat_template or "")
            model = cls(engine, facts, special, thinking, max_waiting=queue_size)
            if sharing is not None and sharing.public:
                engine.publish(await model.public_prefixes(sharing.public))
        except BaseException:
            await engine.stop()
            raise
        return model

    async def public_prefixes(self, texts: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
        """Tokens of texts as the beginning of a prompt, and as a system message where there can be
        one. Too long for the context is of no use, and left out with a warning.
        """
        prompts: list[Prompt] = list(texts)
        if self.facts.chat_template is not None:
            prompts += [(Message("system", text), Message("user", "")) for text in texts]
        found = []
        for prompt in prompts:
            try:
                found.append(await self.encode(prompt))
            except (ContextLengthExceeded, InvalidValue) as error:
                log.warning("a prefix of ShimmyEngine.public_prefixes is of no use: %s", error)
        return tuple(found)

    async def encode(
        self, prompt: Prompt, principal: str = "", options: ChatOptions = _AS_IT_IS
    ) -> tuple[int, ...]:
        """The prompt's exact tokens. Raises as `prepare` does."""
        return (await self.prepare(prompt, principal, options)).tokens

    async def reusable(self, tokens: tuple[int, ...], principal: str, adapter: str = "") -> int:
        """How many of a prompt's tokens would not be computed again if it were asked now."""
        engine, owner = self.engine, (principal, adapter)
        return await engine.errand(lambda: engine.scheduler.line.room.reusable(tokens, owner))

    async def prepare(
        self, prompt: Prompt, principal: str = "", options: ChatOptions = _AS_IT_IS
    ) -> Encoded:
        """The prompt's exact tokens, when it is this principal's turn. Raises `QueueFull`,
        `InvalidValue` or `UnsupportedParameter` where they cannot be had, and
        `ContextLengthExceeded` without counting further where they can never fit.
        """
        if self._closed:
            raise ShuttingDown("the model is being unloaded")
        if isinstance(prompt, tuple) and not (prompt and isinstance(prompt[0], Message)):
            # First, as to look at millions takes long.
            check_fits(len(prompt), self.facts.context_size, "prompt")
            tokens = tuple(token for token in prompt if isinstance(token, int))
            self._check_ids(tokens, "prompt")
            with self._losing():
                await asyncio.to_thread(self.engine.backend.check)
            return Encoded(tokens)
        with self._losing():
            return await self._turns.keep(principal, lambda: self._prepared(prompt, options))

    async def _prepared(self, prompt: Prompt, options: ChatOptions) -> Encoded:
        raw = isinstance(prompt, str)
        text = prompt if isinstance(prompt, str) else await self._render(prompt, options)
        check = functools.partial(self._check_length, text, "prompt" if raw else "messages")
        # Off the event loop, for the sake of others when it is long.
        size = check() if len(text) < _SHORT else await asyncio.to_thread(check)
        found = await in_deep_thread(lambda: self.engine.backend.tokenize(text), size)
        return Encoded(found, None if raw else self._thinking.reasoning(text))

    def between(self, prefix: Prompt, suffix: str) -> str:
        """The prompt for what stands between two texts, the prefix first. Raises
        `UnsupportedParameter` where the model has no tokens for that.

        Bavarian et al., "Efficient Training of Language Models to Fill in the Middle", 2022.
        """
        if not self.facts.infill:
            raise UnsupportedParameter(
                "this model has no fill-in-the-middle tokens; leave suffix out", param="suffix"
            )
        if not isinstance(prefix, str):
            raise InvalidValue("with a suffix the prompt is a text", param="prompt")
        before, after, middle = self.facts.infill
        return f"{before}{prefix}{after}{suffix}{middle}"

    def has_adapter(self, path: str) -> bool:
        """Whether requests can name it already."""
        return path in self._adapters

    async def use_adapter(self, path: str) -> None:
        """See to it that requests can name this LoRA adapter. Raises `ModelLoadFailed`."""
        if path not in self._adapters:
            backend = self.engine.backend
            await self.engine.errand(lambda: backend.load_adapter(path))
            self._adapters.add(path)

    async def encode_inputs(
        self, inputs: tuple[EmbeddingInput, ...], names: tuple[str, ...], principal: str
    ) -> tuple[tuple[int, ...], ...]:
        """The exact tokens of texts to embed, as many at a time as is one principal's turn. `names`
        are for errors. Raises `QueueFull`, `InvalidValue` or `ContextLengthExceeded`.
        """
        found: list[tuple[int, ...]] = []
        total = 0
        for some in batches(list(zip(inputs, names, strict=True))):
            for tokens, (_, name) in zip(
                await self._encoded_inputs(some, principal), some, strict=True
            ):
                self._check_input(tokens, name)
                total += len(tokens)
                found.append(tokens)
            if total > MOST_INPUT_TOKENS:
                raise ContextLengthExceeded(
                    f"{total} tokens and more; at most {MOST_INPUT_TOKENS} in one request",
                    param=names[0].partition(".")[0],
                )
        return tuple(found)

    def _check_input(self, tokens: tuple[int, ...], name: str) -> None:
        assert self.facts.embedding is not None
        most = self.facts.embedding.tokens
        if len(tokens) > most:
            raise ContextLengthExceeded(
                f"an input of {len(tokens)} tokens: this model embeds at most {most}", param=name
            )
        if not tokens:
            raise InvalidValue("for this model it has no tokens", param=name)

    async def _encoded_inputs(
        self, some: list[tuple[EmbeddingInput, str]], principal: str
    ) -> list[tuple[int, ...]]:
        for one, name in some:
            if isinstance(one[0], int):
                self._check_ids(ids_of(one), name)
            else:
                check_bytes(size_of(one), name)
        asked = tuple(texts_of(one) for one, _ in some if isinstance(one[0], str))
        backend = self.engine.backend

        async def tokenize() -> tuple[tuple[int, ...], ...]:
            return await in_deep_thread(lambda: backend.tokenize_inputs(asked), longest(asked))

        encoded: tuple[tuple[int, ...], ...] = ()
        with self._losing():
            if asked:
                encoded = await self._turns.keep(principal, tokenize)
            else:
                await asyncio.to_thread(backend.check)
        rest = iter(encoded)
        return [next(rest) if isinstance(one[0], str) else ids_of(one) for one, _ in some]

    async def compile(self, constraint: Constraint, principal: str = "") -> None:
        """See whether answers can be held to it, when it is this principal's turn. Raises
        `InvalidValue` or `UnsupportedParameter`.
        """
        backend = self.engine.backend
        with self._losing():
            await self._turns.keep(
                principal, lambda: in_deep_thread(lambda: backend.compile(constraint), 0)
            )

    async def decode(self, tokens: tuple[int, ...], principal: str = "") -> str:
        """The tokens' text, when it is this principal's turn. Raises `InvalidValue`, `QueueFull`."""
        self._check_ids(tokens, "tokens")
        backend = self.engine.backend
        with self._losing():
            data = await self._turns.keep(
                principal, lambda: in_deep_thread(lambda: backend.detokenize(tokens), 0)
            )
        return bounded(data).decode("utf-8", "replace")

    async def render(
        self, messages: Prompt, principal: str = "", options: ChatOptions = _AS_IT_IS
    ) -> str:
        """A chat as the template writes it, when it is this principal's turn."""
        assert isinstance(messages, tuple)
        with self._losing():
            return await self._turns.keep(principal, lambda: self._render(messages, options))

    @contextlib.contextmanager
    def _losing(self) -> Iterator[None]:
        """Let the engine know that it is lost, if that is found out here."""
        try:
            yield
        except EngineLost as error:
            self.engine.lose(Failure(error.code, error.message))
            raise

    async def _render(self, prompt: Prompt, options: ChatOptions) -> str:
        messages = tuple(turn for turn in prompt if isinstance(turn, Message))

        def render() -> str:
            variables = self._thinking.variables(options)
            return self._compiled().render(messages, variables=variables)

        return await in_deep_thread(render, 0)

    def _check_length(self, text: str, param: str) -> int:
        """The text's bytes. Whatever the vocabulary, a token covers at most its longest piece, and a
        special token is one: a text that must have too many is not tokenized, which can take long.
        """
        size, context = len(text.encode()), self.facts.context_size
        at_least = -(-size // max(1, self.facts.longest_token))
        if self._special is not None and at_least <= context:
            found = itertools.islice(self._special.finditer(text), context + 1)
            at_least = max(at_least, sum(1 for _ in found))
        if at_least > context:
            raise ContextLengthExceeded(
                f"the prompt has {at_least} tokens or more: at least {at_least - context} too many "
                f"for this model's context of {context}",
                param=param,
            )
        check_bytes(size, param)
        return size

    def submit(
        self,
        principal: str,
        prompt: tuple[int, ...],
        max_tokens: int,
        sampling: Sampling,
        stop: tuple[str, ...],
        *,
        reproducible: bool = False,
        adapter: str = "",
        max_seconds: float | None = None,
    ) -> TokenStream:
        return self.engine.submit(
            principal,
            prompt,
            max_tokens,
            sampling,
            stop,
            reproducible=reproducible,
            adapter=adapter,
            max_seconds=max_seconds,
        )

    @property
    def active(self) -> int:
        return self.engine.active + (self.embedder.active if self.embedder is not None else 0)

    @property
    def context_size(self) -> int:
        return self.facts.context_size

    @property
    def mapped_bytes(self) -> int:
        """Of its file, which the system counts as available memory."""
        return self.facts.size_bytes

    @property
    def memory_bytes(self) -> int:
        facts = self.facts
        cache = facts.kv_tokens * facts.kv_bytes_per_token + facts.slots * facts.state_bytes
        return facts.size_bytes + cache

    async def close(self) -> None:
        """End its sequences and free the model. What is being tokenized is waited for."""
        self._closed = True
        await self.engine.stop()

    @property
    def failure(self) -> Failure | None:
        """Why its engine ended, if it has."""
        return self.engine.failure

    def check_bias(self, bias: tuple[tuple[int, float], ...]) -> None:
        self._check_ids(tuple(token for token, _ in bias), "logit_bias")

    def _check_ids(self, tokens: tuple[int, ...], param: str) -> None:
        check_ids(tokens, self.facts.vocabulary, param)

    def _compiled(self) -> ChatTemplate:
        if self._template is None:
            source = self.facts.chat_template
            if source is None:
                raise InvalidValue(
                    "this model's file has no chat template; use completions with a plain prompt",
                    param="messages",
                )
            self._template = ChatTemplate(source, dict(self.facts.special))
        return self._template
