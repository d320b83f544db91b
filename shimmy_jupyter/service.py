"""The use-cases: completions and embeddings. HTTP handlers, the kernel's fallback, the command line
and the tests all come through here.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .completion import Completion, Echo
from .engine.embedder import Embedder
from .engine.model import Encoded, LoadedModel
from .engine.stream import TokenStream
from .errors import (
    ContextLengthExceeded,
    DeadlineExceeded,
    EngineLost,
    InvalidValue,
    ModelLoadFailed,
    ModelNotFound,
    UnsupportedParameter,
)
from .models.jobs import Progress, Report, unheard
from .models.library import ModelLibrary
from .models.lifecycle import ModelPool
from .models.resident import ModelStatus
from .types import (
    ChatOptions,
    CompletionRequest,
    EmbeddingRequest,
    Message,
    ModelFacts,
    Principal,
    Prompt,
    Sampling,
)

_Prepared = tuple[LoadedModel, Encoded, str]
"""The model, the prompt, the adapter's path."""
_AS_IT_IS = ChatOptions()
_COUNTING = Progress("counting the prompt")


@dataclass(frozen=True, slots=True)
class Dependency:
    """`status` is ok, degraded or down; `action` is what a person can do, if there is anything."""

    name: str
    status: str
    detail: str
    action: str | None = None


@dataclass(frozen=True, slots=True)
class Health:
    """`active` counts the requests that are queued or running, and jobs."""

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
    # A broken file that nobody has asked for is no concern of the server's.
    failed = [f"{s.file.id}: {s.error}" for s in statuses if s.error and not s.file.problem]
    if failed:
        return Dependency("models", "degraded", "; ".join(failed), "replace the file, or remove it")
    usable = sum(s.file.kind == "model" and not s.file.problem for s in statuses)
    return Dependency("models", "ok", f"{usable} available")


@dataclass(frozen=True, slots=True)
class Vectors:
    """One of each input, and the tokens of all inputs together."""

    vectors: list[bytes]
    """Little-endian float32."""
    tokens: int


class CompletionService:
    """`default_max_tokens` is what a request gets that does not say how much it wants.

    `max_seconds` is the most that any request may take, None for as long as it takes.
    """

    def __init__(
        self,
        pool: ModelPool[LoadedModel],
        library: ModelLibrary,
        *,
        default_max_tokens: int = 1024,
        max_seconds: float | None = None,
    ) -> None:
        self.pool, self.library = pool, library
        self.default_max_tokens = default_max_tokens
        self.max_seconds = max_seconds

    async def start(self, request: CompletionRequest, report: Report = unheard) -> Completion:
        """Resolve the model, count the prompt exactly, refuse what cannot fit, queue the rest. A model
        that is not in memory is loaded first; `report` hears how far that is.
        """
        limits = [t for t in (request.max_seconds, self.max_seconds) if t is not None]
        limit = min(limits, default=None)
        clock = asyncio.get_running_loop().time
        began = clock()
        async with AsyncExitStack() as held:
            try:
                async with asyncio.timeout(limit):
                    model, encoded, adapter = await self._prepared(request, held, report)
            except TimeoutError:
                raise DeadlineExceeded("the request took longer than its max_seconds") from None
            count = len(encoded.tokens)
            max_tokens = self._room(request, count, model.facts)
            echo = await self._echo(model, request, encoded) if request.echo else None
            if max_tokens == 0 and request.sampling.prompt_logprobs is None:
                return Completion(request, count, echo=echo)
            left = None if limit is None else max(0.0, limit - (clock() - began))
            wanted = _Wanted(encoded, max_tokens, adapter, left)
            return Completion(request, count, *_submitted(model, request, wanted), echo)

    async def _encoded(
        self, request: CompletionRequest, held: AsyncExitStack, report: Report
    ) -> _Prepared:
        if request.pin is not None:
            await self.library.attached.hold(request.model, request.adapter, request.pin)
        model = await held.enter_async_context(self.pool.use(request.model, report))
        report(_COUNTING)
        if not model.facts.can_generate:
            raise UnsupportedParameter("this model makes embeddings only", param="model")
        model.check_bias(request.sampling.logit_bias)
        prompt = request.prompt
        if request.suffix:
            prompt = model.between(prompt, request.suffix)
        if request.sampling.constraint is not None:
            await model.compile(request.sampling.constraint, request.principal.name)
        adapter = await self._adapter(model, request)
        if request.pin is not None:
            await self.library.attached.hold_loaded(model, adapter, request.pin)
        encoded = await model.prepare(prompt, request.principal.name, request.chat)
        return model, encoded, str(adapter) if adapter is not None else ""

    async def _echo(self, model: LoadedModel, request: CompletionRequest, prompt: Encoded) -> Echo:
        prompted, who = request.prompt, request.principal.name
        text = prompted if isinstance(prompted, str) else await model.decode(prompt.tokens, who)
        first = await model.decode(prompt.tokens[:1], who)
        # What the model wants before every prompt is not part of this one's text.
        return Echo(text, first if text.startswith(first) else "")

    async def _adapter(self, model: LoadedModel, request: CompletionRequest) -> Path | None:
        """Its path, once it is loaded; None where the request names none and the model has none."""
        attached = self.library.attached
        try:
            return await attached.use_adapter(model, request.model, request.adapter)
        except (ModelNotFound, ModelLoadFailed) as error:
            error.param = "adapter"
            raise

    async def _prepared(
        self, request: CompletionRequest, held: AsyncExitStack, report: Report
    ) -> _Prepared:
        try:
            return await self._encoded(request, held, report)
        except EngineLost:
            # Its process ended while nobody was using it: nothing of this request is lost. What is
            # held of it is given up first, as another takes its place when nobody has it.
            await held.aclose()
            return await self._encoded(request, held, report)

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

    async def embed(self, request: EmbeddingRequest) -> Vectors:
        """Vectors of texts, or scores of a query's documents. Raises what `LoadedModel` does, and
        `UnsupportedParameter` where the model cannot make them.
        """
        who = request.principal.name
        try:
            async with asyncio.timeout(self.max_seconds), AsyncExitStack() as held:
                try:
                    embedder, tokens = await self._inputs(request, held)
                except EngineLost:
                    # As in `_prepared`.
                    await held.aclose()
                    embedder, tokens = await self._inputs(request, held)
                return Vectors(await embedder.vectors(tokens, who), sum(map(len, tokens)))
        except TimeoutError:
            raise DeadlineExceeded("the request took longer than max_seconds") from None

    async def _inputs(
        self, request: EmbeddingRequest, held: AsyncExitStack
    ) -> tuple[Embedder, tuple[tuple[int, ...], ...]]:
        model = await held.enter_async_context(self.pool.use(request.model))
        embedder = model.embedder
        if embedder is None:
            raise UnsupportedParameter("this model makes no embeddings", param="model")
        ranks = embedder.shape.pooling == "rank"
        if request.rank and not ranks:
            raise UnsupportedParameter("this model is no reranker", param="model")
        if ranks and not request.rank:
            raise UnsupportedParameter("this model is a reranker: it makes scores", param="model")
        width = embedder.shape.width
        if (request.dimensions or 0) > width:
            raise InvalidValue(f"this model's vectors have {width} numbers", param="dimensions")
        who = request.principal.name
        return embedder, await model.encode_inputs(request.inputs, request.names, who)

    async def tokenize(
        self, model: str, prompt: Prompt, principal: Principal, options: ChatOptions = _AS_IT_IS
    ) -> tuple[int, ...]:
        """The exact tokens that a prompt has, as `start` would count them."""
        async with self.pool.use(model) as found:
            return await found.encode(prompt, principal.name, options)

    async def detokenize(self, model: str, tokens: tuple[int, ...], principal: Principal) -> str:
        """The text of tokens; bytes that make no character become U+FFFD."""
        async with self.pool.use(model) as found:
            return await found.decode(tokens, principal.name)

    async def rendered(
        self, model: str, prompt: Prompt, principal: Principal, options: ChatOptions = _AS_IT_IS
    ) -> tuple[str, int]:
        """A chat as the model's template writes it, and how many tokens that is."""
        async with self.pool.use(model) as found:
            text = await found.render(prompt, principal.name, options)
            return text, len(await found.encode(text, principal.name))

    async def models(self) -> list[ModelStatus]:
        """Those that a request can name as its `model`."""
        statuses = await self.pool.status()
        return [s for s in statuses if s.file.kind == "model" and s.file.problem is None]

    async def model(self, id: str) -> ModelStatus:
        """Raises `ModelNotFound`."""
        return self.pool.status_of(await self.pool.catalog.find(id))

    async def health(self) -> Health:
        """What the main job depends on. Looks, and loads nothing."""
        dependencies = [
            _engine_health(self.pool.loaded()),
            _models_health(await self.pool.status()),
        ]
        return Health(dependencies, self.active)

    @property
    def active(self) -> int:
        """Requests queued or running, of all models, and jobs."""
        return sum(model.active for model in self.pool.loaded()) + self.library.jobs.active

    async def close(self) -> None:
        self.pool.begin_close()
        await self.library.close()
        await self.pool.close()


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A request that has become numbers. `adapter` is a path."""

    prompt: Encoded
    max_tokens: int
    adapter: str
    max_seconds: float | None


def _submitted(
    model: LoadedModel, request: CompletionRequest, wanted: _Wanted
) -> tuple[tuple[TokenStream, ...], asyncio.Event]:
    """A sequence for each choice, all or none of them. Raises `QueueFull`."""
    bell = asyncio.Event()
    streams: list[TokenStream] = []
    try:
        for choice in range(request.n):
            stream = model.submit(
                request.principal.name,
                wanted.prompt.tokens,
                wanted.max_tokens,
                _of_choice(request, choice, wanted.prompt),
                request.stop,
                reproducible=request.reproducible,
                adapter=wanted.adapter,
                max_seconds=wanted.max_seconds,
            )
            stream.bell = bell
            streams.append(stream)
    except BaseException:
        for stream in streams:
            stream.close()
        raise
    return tuple(streams), bell


def _of_choice(request: CompletionRequest, choice: int, prompt: Encoded) -> Sampling:
    """Choices with a seed have different ones, or they would all be the same."""
    seed = request.sampling.seed
    if seed is None and request.reproducible:
        seed = 0
    seed = None if seed is None else seed + choice
    return replace(request.sampling, seed=seed, reasoning=prompt.reasoning)
