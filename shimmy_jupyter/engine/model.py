"""A loaded model as the service sees it: prompts become tokens, tokens become a stream."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from ..errors import InvalidValue, ModelLoadFailed, ShuttingDown
from ..types import Failure, Message, ModelFacts, Prompt, Sampling
from .backend import Backend, LoadSpec
from .stream import TokenStream
from .template import ChatTemplate
from .worker import Engine

log = logging.getLogger("shimmy_jupyter.engine")


class LoadedModel:
    """Templates and tokenizing have a thread of their own, so that neither the event loop nor the
    engine waits for somebody's long prompt. The vocabulary does not change; the backend keeps it
    alive while it is being read.
    """

    def __init__(self, engine: Engine, facts: ModelFacts) -> None:
        self.engine = engine
        self.facts = facts
        self._texts = ThreadPoolExecutor(1, thread_name_prefix="shimmy-text")
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
    ) -> LoadedModel:
        """Load on the engine's own thread. Raises `ModelLoadFailed`."""
        # The factory imports the native library, which takes a while: not on the event loop.
        try:
            made = await asyncio.to_thread(backend)
        except (ImportError, OSError, RuntimeError) as error:
            log.exception("llama-cpp-python does not load")
            raise ModelLoadFailed(f"llama-cpp-python does not load here: {error}") from error
        engine = Engine(made, spec, queue_size=queue_size, stream_capacity=stream_capacity)
        return cls(engine, await engine.start())

    async def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """The prompt's exact tokens. Raises `InvalidValue` where they cannot be had."""
        if self._closed:
            raise ShuttingDown("the model is being unloaded")
        return await asyncio.get_running_loop().run_in_executor(self._texts, self._encode, prompt)

    def submit(
        self,
        principal: str,
        prompt: tuple[int, ...],
        max_tokens: int,
        sampling: Sampling,
        stop: tuple[str, ...],
    ) -> TokenStream:
        return self.engine.submit(principal, prompt, max_tokens, sampling, stop)

    @property
    def active(self) -> int:
        return self.engine.active

    async def close(self) -> None:
        """End its sequences and free the model. What is being tokenized is waited for."""
        self._closed = True
        await self.engine.stop()
        self._texts.shutdown(wait=False)

    @property
    def failure(self) -> Failure | None:
        """Why its engine ended, if it has."""
        return self.engine.failure

    def _encode(self, prompt: Prompt) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return self.engine.backend.tokenize(prompt)
        if prompt and isinstance(prompt[0], Message):
            messages = tuple(turn for turn in prompt if isinstance(turn, Message))
            return self.engine.backend.tokenize(self._compiled().render(messages))
        tokens = tuple(token for token in prompt if isinstance(token, int))
        self._check_ids(tokens, "prompt")
        return tokens

    def check_bias(self, bias: tuple[tuple[int, float], ...]) -> None:
        self._check_ids(tuple(token for token, _ in bias), "logit_bias")

    def _check_ids(self, tokens: tuple[int, ...], param: str) -> None:
        size = self.facts.vocabulary
        wrong = next((token for token in tokens if not 0 <= token < size), None)
        if wrong is not None:
            raise InvalidValue(
                f"{wrong} is not a token of this model, which has 0 to {size - 1}", param=param
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
