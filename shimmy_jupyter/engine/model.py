"""A loaded model as the service sees it: prompts become tokens, tokens become a stream."""

from __future__ import annotations

import asyncio
import itertools
import logging
import re
from collections.abc import Callable

from ..errors import (
    ContextLengthExceeded,
    EngineLost,
    InvalidValue,
    ModelLoadFailed,
    QueueFull,
    ShuttingDown,
)
from ..types import Failure, Message, ModelFacts, Prompt, Sampling
from .backend import Backend, LoadSpec, Sharing
from .deep import MAX_TEXT_BYTES, in_deep_thread
from .stream import TokenStream
from .template import ChatTemplate
from .worker import Engine

log = logging.getLogger("shimmy_jupyter.engine")


class LoadedModel:
    """Templates and tokenizing have threads of their own, one at a time, so that neither the event
    loop nor the engine waits for somebody's long prompt. The vocabulary does not change; the
    backend keeps it alive while it is being read.
    """

    def __init__(self, engine: Engine, facts: ModelFacts, *, max_waiting: int) -> None:
        self.engine = engine
        self.facts = facts
        self._one_at_a_time = asyncio.Lock()
        self._waiting = 0
        self._max_waiting = max_waiting
        self._special = _alternatives(facts.special_tokens)
        self._template: ChatTemplate | None = None
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
            raise ModelLoadFailed(f"llama-cpp-python does not load here: {error}") from error
        engine = Engine(
            made,
            spec,
            queue_size=queue_size,
            stream_capacity=stream_capacity,
            sharing=sharing,
        )
        model = cls(engine, await engine.start(), max_waiting=queue_size)
        if sharing is not None and sharing.public:
            engine.publish(await model.public_prefixes(sharing.public))
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

    async def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """The prompt's exact tokens. Raises `InvalidValue` where they cannot be had, and
        `ContextLengthExceeded` without counting further where they can never fit.
        """
        if self._closed:
            raise ShuttingDown("the model is being unloaded")
        if isinstance(prompt, tuple) and not (prompt and isinstance(prompt[0], Message)):
            tokens = tuple(token for token in prompt if isinstance(token, int))
            self._check_ids(tokens, "prompt")
            return tokens
        if self._waiting >= self._max_waiting:
            raise QueueFull(f"{self._waiting} prompts are waiting to be read; try again later")
        self._waiting += 1
        try:
            async with self._one_at_a_time:
                text = prompt if isinstance(prompt, str) else await self._render(prompt)
                size = self._check_length(text, "prompt" if text is prompt else "messages")
                return await in_deep_thread(lambda: self.engine.backend.tokenize(text), size)
        except EngineLost as error:
            self.engine.lose(Failure(error.code, error.message))
            raise
        finally:
            self._waiting -= 1

    async def _render(self, prompt: tuple[int, ...] | tuple[Message, ...]) -> str:
        messages = tuple(turn for turn in prompt if isinstance(turn, Message))
        return await in_deep_thread(lambda: self._compiled().render(messages), 0)

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
        if size > MAX_TEXT_BYTES:
            raise ContextLengthExceeded(
                f"the prompt has {size} bytes; at most {MAX_TEXT_BYTES} can be tokenized",
                param=param,
            )
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
        max_seconds: float | None = None,
    ) -> TokenStream:
        return self.engine.submit(
            principal,
            prompt,
            max_tokens,
            sampling,
            stop,
            reproducible=reproducible,
            max_seconds=max_seconds,
        )

    @property
    def active(self) -> int:
        return self.engine.active

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
        size = self.facts.vocabulary
        wrong = next((token for token in tokens if not 0 <= token < size), None)
        if wrong is not None:
            raise InvalidValue(
                f"{str(wrong)[:20]} is not a token of this model, which has 0 to {size - 1}",
                param=param,
            )

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


def _alternatives(tokens: tuple[str, ...]) -> re.Pattern[str] | None:
    longest_first = sorted((re.escape(token) for token in tokens if token), key=len, reverse=True)
    return re.compile("|".join(longest_first)) if longest_first else None
