"""The one use-case: a completion. HTTP handlers, the kernel's fallback, the command line and the
tests all come through here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from types import TracebackType
from typing import Any, Self

from .core.messages import Progress
from .engine.model import LoadedModel
from .engine.stream import TokenStream
from .errors import (
    Cancelled,
    ContextLengthExceeded,
    DeadlineExceeded,
    EngineLost,
    InvalidValue,
)
from .models.lifecycle import ModelPool, ModelStatus
from .types import CompletionRequest, Ended, FinishReason, Message, ModelFacts, Timings, Usage


@dataclass(frozen=True, slots=True)
class Dependency:
    """`status` is ok, degraded or down; `action` is what a person can do, if there is anything."""

    name: str
    status: str
    detail: str
    action: str | None = None


@dataclass(frozen=True, slots=True)
class Health:
    """`active` counts the requests that are queued or running."""

    dependencies: list[Dependency]
    active: int

    @property
    def ok(self) -> bool:
        """Whether a prompt could be answered."""
        return all(dependency.status != "down" for dependency in self.dependencies)

    def to_json(self) -> dict[str, Any]:
        worst = [d.status for d in self.dependencies]
        status = next((s for s in ("down", "degraded") if s in worst), "ok")
        return {
            "status": status,
            "active": self.active,
            "dependencies": [asdict(d) for d in self.dependencies],
        }


def _engine_health(loaded: list[LoadedModel]) -> Dependency:
    failures = [model.failure.message for model in loaded if model.failure is not None]
    if failures:
        again = "the next request loads the model again"
        return Dependency("engine", "degraded", "; ".join(failures), again)
    if find_spec("llama_cpp") is None:
        return Dependency(
            "engine", "down", "llama-cpp-python is not installed", "pip install llama-cpp-python"
        )
    notes = sorted({note for model in loaded for note in model.facts.notes})
    if notes:
        return Dependency("engine", "degraded", "; ".join(notes), "see docs/install.md")
    return Dependency(
        "engine", "ok", f"{len(loaded)} models loaded" if loaded else "not in use yet"
    )


def _models_health(statuses: list[ModelStatus]) -> Dependency:
    if not statuses:
        return Dependency("models", "down", "no models", "set ShimmyModels.roots")
    failed = [f"{s.file.id}: {s.error}" for s in statuses if s.error]
    if failed:
        return Dependency("models", "degraded", "; ".join(failed), "replace the file, or remove it")
    return Dependency("models", "ok", f"{len(statuses)} available")


@dataclass(slots=True)
class Completion:
    """An answer in the making. Read it, then `ended` holds the reason and the exact usage.

    It owns its sequence: leaving the `async with` block, or `close`, frees it.
    """

    request: CompletionRequest
    prompt_tokens: int
    stream: TokenStream | None

    async def read(self) -> list[str]:
        """Text that has arrived since the last call, waiting for some; empty at the end.

        Raises the error that ended the sequence, or `Cancelled` if somebody closed it.
        """
        if self.stream is None:
            return []
        texts = await self.stream.read()
        if not texts and self.ended.reason is FinishReason.CANCELLED:
            raise Cancelled("the request was cancelled")
        return texts

    async def wait(self, seconds: float) -> bool:
        """Whether there is something to read, the end too, within so many seconds."""
        return self.stream is None or await self.stream.wait(seconds)

    def waiting(self) -> Progress | None:
        """What it waited for a moment ago, None if that is not known yet; asks again."""
        if self.stream is None:
            return None
        self.stream.ask()
        return self.stream.progress

    async def __aiter__(self) -> AsyncIterator[str]:
        while texts := await self.read():
            for text in texts:
                yield text

    async def text(self) -> str:
        """The whole answer."""
        return "".join([text async for text in self])

    @property
    def ended(self) -> Ended:
        """How it ended; only meaningful once everything has been read."""
        if self.stream is None:
            return Ended(
                FinishReason.LENGTH, Usage(self.prompt_tokens, 0), Timings(0.0, None, None)
            )
        if self.stream.ended is None:
            usage = Usage(self.prompt_tokens, 0)
            return Ended(FinishReason.CANCELLED, usage, Timings(0.0, None, None))
        return self.stream.ended

    def close(self) -> None:
        if self.stream is not None:
            self.stream.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class CompletionService:
    """`default_max_tokens` is what a request gets that does not say how much it wants.

    `max_seconds` is the most that any request may take, None for as long as it takes.
    """

    def __init__(
        self,
        pool: ModelPool[LoadedModel],
        *,
        default_max_tokens: int = 1024,
        max_seconds: float | None = None,
    ) -> None:
        self.pool = pool
        self.default_max_tokens = default_max_tokens
        self.max_seconds = max_seconds

    async def start(self, request: CompletionRequest) -> Completion:
        """Resolve the model, count the prompt exactly, refuse what cannot fit, queue the rest."""
        limits = [t for t in (request.max_seconds, self.max_seconds) if t is not None]
        limit = min(limits, default=None)
        clock = asyncio.get_running_loop().time
        began = clock()
        try:
            async with asyncio.timeout(limit):
                model, prompt = await self._prepared(request)
        except TimeoutError:
            raise DeadlineExceeded("the request took longer than its max_seconds") from None
        max_tokens = self._room(request, len(prompt), model.facts)
        if max_tokens == 0:
            return Completion(request, len(prompt), None)
        sampling = request.sampling
        if request.reproducible and sampling.seed is None:
            sampling = replace(sampling, seed=0)
        stream = model.submit(
            request.principal.name,
            prompt,
            max_tokens,
            sampling,
            request.stop,
            reproducible=request.reproducible,
            max_seconds=None if limit is None else max(0.0, limit - (clock() - began)),
        )
        return Completion(request, len(prompt), stream)

    async def _encoded(self, request: CompletionRequest) -> tuple[LoadedModel, tuple[int, ...]]:
        model = await self.pool.get(request.model)
        model.check_bias(request.sampling.logit_bias)
        return model, await model.encode(request.prompt, request.principal.name)

    async def _prepared(self, request: CompletionRequest) -> tuple[LoadedModel, tuple[int, ...]]:
        try:
            return await self._encoded(request)
        except EngineLost:
            # Its process ended while nobody was using it: nothing of this request is lost.
            return await self._encoded(request)

    def _room(self, request: CompletionRequest, prompt_tokens: int, facts: ModelFacts) -> int:
        """How many tokens to generate. Raises `ContextLengthExceeded` if they cannot all fit."""
        context, wanted = facts.context_size, request.max_tokens
        chat = isinstance(next(iter(request.prompt), None), Message)
        param = "messages" if chat else "prompt"
        if prompt_tokens == 0:
            raise InvalidValue("the prompt is empty: there is nothing to continue", param=param)
        over = prompt_tokens + (1 if wanted is None else 0) - context
        if over > 0:
            raise ContextLengthExceeded(
                f"the prompt has {prompt_tokens} tokens: {over} too many for this model's context "
                f"of {context}",
                param=param,
            )
        if wanted is None:
            return min(self.default_max_tokens, context - prompt_tokens)
        over = prompt_tokens + wanted - context
        if over > 0:
            raise ContextLengthExceeded(
                f"the prompt's {prompt_tokens} tokens and max_tokens {wanted} are {over} tokens "
                f"more than this model's context of {context}",
                param="max_tokens",
            )
        return wanted

    async def models(self) -> list[ModelStatus]:
        return await self.pool.status()

    async def model(self, id: str) -> ModelStatus:
        """Raises `ModelNotFound`."""
        file = await self.pool.find(id)
        return self.pool.status_of(file)

    async def health(self) -> Health:
        """What the main job depends on. Looks, and loads nothing."""
        dependencies = [_engine_health(self.pool.loaded()), _models_health(await self.models())]
        return Health(dependencies, self.active)

    @property
    def active(self) -> int:
        """Requests queued or running, of all models."""
        return sum(model.active for model in self.pool.loaded())

    async def close(self) -> None:
        await self.pool.close()
